//! Session descriptions as text: what we check in an offer before the WebRTC library sees it, and what we make of its
//! answer. Pure: no sockets, no clock.
//!
//! Everything here reads text from strangers. Nothing indexes, nothing unwraps; sizes are bounded first.

use super::{NetError, fragment::usable};
use std::net::IpAddr;

/// Largest description or fragment accepted. Chromium's offers have 3–8 KiB.
pub(super) const MAX_BYTES: usize = 64 * 1024;
/// Most media sections accepted. The live page offers three.
const MAX_SECTIONS: usize = 16;
/// Most candidates taken from one description or fragment.
pub(super) const MAX_CANDIDATES: usize = 64;

/// What a connection is for: what its offer must have, and what we answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// Two-way: microphone in, voice and face out, messages.
    Live,
    /// WHIP (RFC 9725): a publisher's voice in, nothing out. A picture is taken and not looked at.
    Whip,
    /// WHEP (draft-ietf-wish-whep-03): voice, face or both out, nothing in.
    Whep,
    /// Data channels only.
    Data,
}

/// An offer that was looked at.
#[derive(Clone, Debug)]
pub(super) struct Checked {
    pub(super) shape: Shape,
    /// The offer, cleaned: line ends `\r\n`, candidates we cannot use left out, directions that would make the answer
    /// go the wrong way narrowed.
    pub(super) text: String,
    /// Whether we send a voice and a face.
    pub(super) voice: bool,
    pub(super) face: bool,
    /// The offerer is a DTLS client only (`a=setup:active`, RFC 9725 §4.4.4).
    pub(super) dtls_client: bool,
}

/// Checks that `offer` can become what `shape` says.
///
/// # Errors
/// [`NetError::TooLarge`], `Malformed`, `NoMicrophone`, `NoOpus`, `NoVideo`, `NoH264`; for WHIP and WHEP, where single
/// sections are not to be rejected in the answer (RFC 9725 §4.4.3), also `NothingToSend` and `Unsupported`.
pub(super) fn check_offer(offer: &str, shape: Shape) -> Result<Checked, NetError> {
    let lines = well_formed(offer)?;
    let sections = sections(&lines);
    let session = &lines[..lines.iter().position(|l| l.starts_with("m=")).unwrap_or(lines.len())];
    let (voice, face) = match shape {
        Shape::Live => check_live(&sections, session)?,
        Shape::Whip => check_whip(&sections, session)?,
        Shape::Whep => check_whep(&sections, session)?,
        Shape::Data => (false, false),
    };
    let text = clean(&lines, |line| match (shape, line) {
        (Shape::Whip, "a=sendrecv") => "a=sendonly",
        (Shape::Whep, "a=sendrecv") => "a=recvonly",
        (_, line) => line,
    });
    let dtls_client = lines.contains(&"a=setup:active");
    Ok(Checked { shape, text, voice, face, dtls_client })
}

/// The lines of a description that has what every one must have.
fn well_formed(text: &str) -> Result<Vec<&str>, NetError> {
    let lines = lines(text)?;
    if lines.first() != Some(&"v=0") {
        return Err(NetError::Malformed("it does not begin with `v=0`".into()));
    }
    for (n, line) in lines.iter().enumerate() {
        let mut chars = line.chars();
        if !(chars.next().is_some_and(|c| c.is_ascii_lowercase()) && chars.next() == Some('=')) {
            return Err(NetError::Malformed(format!("line {} is not of the form `x=value`", n + 1)));
        }
    }
    let sections = lines.iter().filter(|l| l.starts_with("m=")).count();
    if sections > MAX_SECTIONS {
        return Err(NetError::Malformed(format!("it has {sections} media sections")));
    }
    let has = |name: &str| lines.iter().any(|l| l.starts_with(name));
    if !has("a=ice-ufrag:") || !has("a=ice-pwd:") {
        return Err(NetError::Malformed("it has no a=ice-ufrag and a=ice-pwd".into()));
    }
    if !has("a=fingerprint:") {
        return Err(NetError::Malformed("it has no a=fingerprint, and media without encryption is refused".into()));
    }
    Ok(lines)
}

/// The lines as text, each passed through `change`, without the candidates we cannot use.
fn clean<'a>(lines: &[&'a str], change: impl Fn(&'a str) -> &'a str) -> String {
    let mut taken = 0;
    let mut text = String::new();
    for line in lines {
        if let Some(candidate) = line.strip_prefix("a=")
            && candidate.starts_with("candidate:")
        {
            taken += 1;
            if taken > MAX_CANDIDATES || !usable(candidate) {
                continue;
            }
        }
        text.push_str(change(line));
        text.push_str("\r\n");
    }
    text
}

/// Checks somebody else's answer to our offer and returns it cleaned.
///
/// # Errors
/// [`NetError::TooLarge`], `Malformed`.
pub(super) fn check_answer(answer: &str) -> Result<String, NetError> {
    let lines = well_formed(answer)?;
    Ok(clean(&lines, |line| line))
}

fn check_live<'a>(sections: &[Section<'a>], session: &[&'a str]) -> Result<(bool, bool), NetError> {
    let audio = sections.iter().find(|s| s.kind == "audio" && s.sends(session)).ok_or(NetError::NoMicrophone)?;
    if audio.rtpmaps("opus/48000").is_empty() {
        return Err(NetError::NoOpus);
    }
    let video = sections.iter().find(|s| s.kind == "video" && s.receives(session)).ok_or(NetError::NoVideo)?;
    if !video.offers_our_h264() {
        return Err(NetError::NoH264);
    }
    Ok((true, true))
}

fn check_whip<'a>(sections: &[Section<'a>], session: &[&'a str]) -> Result<(bool, bool), NetError> {
    let (audio, video) = one_stream(sections, session)?;
    let audio = audio.filter(|s| s.sends(session)).ok_or(NetError::NoMicrophone)?;
    if audio.rtpmaps("opus/48000").is_empty() {
        return Err(NetError::NoOpus);
    }
    if let Some(video) = video {
        // What arrives is told apart by its source alone.
        if [audio, video].iter().any(|s| s.attribute("ssrc").is_none()) {
            return Err(NetError::Unsupported("an offer of voice and picture must name its sources (a=ssrc)".into()));
        }
        if !video.sends(session) {
            return Err(NetError::Unsupported("the video section of a publisher must be sendonly or sendrecv".into()));
        }
        if !VIDEO_CODECS.iter().any(|codec| !video.rtpmaps(codec).is_empty()) {
            return Err(NetError::Unsupported(
                "the video section lists none of H264, VP8, VP9, AV1; the picture is not looked at, so leave it out"
                    .into(),
            ));
        }
    }
    Ok((false, false))
}

fn check_whep<'a>(sections: &[Section<'a>], session: &[&'a str]) -> Result<(bool, bool), NetError> {
    let (audio, video) = one_stream(sections, session)?;
    if [audio, video].into_iter().flatten().any(|s| !s.receives(session)) {
        return Err(NetError::Unsupported("every section of a player must be recvonly or sendrecv".into()));
    }
    if audio.is_none() && video.is_none() {
        return Err(NetError::NothingToSend);
    }
    if audio.is_some_and(|s| s.rtpmaps("opus/48000").is_empty()) {
        return Err(NetError::NoOpus);
    }
    if video.is_some_and(|s| !s.offers_our_h264()) {
        return Err(NetError::NoH264);
    }
    Ok((audio.is_some(), video.is_some()))
}

/// What an ignored picture may be coded in; the WebRTC library's default list.
const VIDEO_CODECS: [&str; 4] = ["h264/90000", "vp8/90000", "vp9/90000", "av1/90000"];

/// The one audio and the one video section of a WHIP or WHEP offer, all in one stream, all bundled with RTCP on the same
/// port (RFC 9725 §4.4.1, §4.4.2).
type OneEach<'s, 'a> = (Option<&'s Section<'a>>, Option<&'s Section<'a>>);
fn one_stream<'s, 'a>(sections: &'s [Section<'a>], session: &[&'a str]) -> Result<OneEach<'s, 'a>, NetError> {
    let unsupported = |what: &str| Err(NetError::Unsupported(what.into()));
    let media: Vec<_> = sections.iter().filter(|s| ["audio", "video"].contains(&s.kind)).collect();
    let only = |kind: &str| media.iter().copied().filter(|s| s.kind == kind).collect::<Vec<_>>();
    let (audio, video) = (only("audio"), only("video"));
    if audio.len() > 1 || video.len() > 1 {
        return unsupported("it has more than one audio or more than one video section; one of each is possible");
    }
    if sections.iter().any(|s| !["audio", "video", "application"].contains(&s.kind)) {
        return unsupported("it has a section that is neither audio nor video");
    }
    if media.iter().any(|s| s.rejected()) {
        return unsupported("it has a section with port 0; leave out what is not wanted");
    }
    let mut streams: Vec<&str> = media.iter().filter_map(|s| s.stream()).collect();
    streams.sort_unstable();
    streams.dedup();
    if streams.len() > 1 {
        return unsupported("its sections belong to different streams (a=msid); one MediaStream is possible");
    }
    if media.iter().any(|s| !s.lines.contains(&"a=rtcp-mux")) {
        return unsupported("a section lacks a=rtcp-mux; RTCP on a port of its own is not possible");
    }
    let bundled = session.iter().find_map(|l| l.strip_prefix("a=group:BUNDLE")).unwrap_or_default();
    let in_bundle = |s: &&Section| s.mid().is_some_and(|mid| bundled.split(' ').any(|word| word == mid));
    if sections.len() > 1 && !sections.iter().all(|s| in_bundle(&s)) {
        return unsupported("its sections are not all in one a=group:BUNDLE; use the bundle policy max-bundle");
    }
    Ok((audio.first().copied(), video.first().copied()))
}

/// A media section of a description.
struct Section<'a> {
    kind: &'a str,
    port: &'a str,
    lines: &'a [&'a str],
}

impl<'a> Section<'a> {
    fn direction(&self, session: &[&'a str]) -> &'a str {
        let find = |lines: &[&'a str]| {
            lines.iter().rev().find_map(|l| {
                let d = l.strip_prefix("a=")?;
                ["sendrecv", "sendonly", "recvonly", "inactive"].contains(&d).then_some(d)
            })
        };
        find(self.lines).or_else(|| find(session)).unwrap_or("sendrecv")
    }
    /// A zero port rejects a section, unless it is bundled with another (RFC 8843 §6).
    fn rejected(&self) -> bool {
        self.port == "0" && !self.lines.contains(&"a=bundle-only")
    }
    fn attribute(&self, name: &str) -> Option<&'a str> {
        self.lines.iter().find_map(|l| l.strip_prefix("a=")?.strip_prefix(name)?.strip_prefix(':'))
    }
    fn mid(&self) -> Option<&'a str> {
        self.attribute("mid")
    }
    /// The MediaStream a section belongs to; `-` stands for none (RFC 8830).
    fn stream(&self) -> Option<&'a str> {
        self.attribute("msid").and_then(|v| v.split(' ').next()).filter(|id| *id != "-")
    }
    fn sends(&self, session: &[&'a str]) -> bool {
        !self.rejected() && self.direction(session).starts_with("send")
    }
    fn receives(&self, session: &[&'a str]) -> bool {
        !self.rejected() && ["sendrecv", "recvonly"].contains(&self.direction(session))
    }
    /// Payload types whose rtpmap begins with `codec` (any case).
    fn rtpmaps(&self, codec: &str) -> Vec<&'a str> {
        self.lines
            .iter()
            .filter_map(|l| l.strip_prefix("a=rtpmap:")?.split_once(' '))
            .filter(|(_, name)| name.get(..codec.len()).is_some_and(|start| start.eq_ignore_ascii_case(codec)))
            .map(|(pt, _)| pt)
            .collect()
    }
    /// Whether one H.264 payload type is baseline (profile 42) with packetization mode 1.
    fn offers_our_h264(&self) -> bool {
        self.rtpmaps("h264/90000").iter().any(|pt| {
            self.lines.iter().any(|l| {
                let Some((number, parameters)) = l.strip_prefix("a=fmtp:").and_then(|l| l.split_once(' ')) else {
                    return false;
                };
                let value = |name: &str| {
                    parameters.split(';').find_map(|p| {
                        let (key, value) = p.trim().split_once('=')?;
                        key.eq_ignore_ascii_case(name).then_some(value)
                    })
                };
                number == *pt
                    && value("packetization-mode") == Some("1")
                    && value("profile-level-id").is_some_and(|p| p.len() == 6 && p.starts_with("42"))
            })
        })
    }
}

pub(super) fn lines(text: &str) -> Result<Vec<&str>, NetError> {
    if text.len() > MAX_BYTES {
        return Err(NetError::TooLarge(text.len()));
    }
    if text.contains('\0') {
        return Err(NetError::Malformed("it contains a zero byte".into()));
    }
    Ok(text.lines().map(str::trim_end).filter(|l| !l.is_empty()).collect())
}

fn sections<'a>(lines: &'a [&'a str]) -> Vec<Section<'a>> {
    let starts: Vec<usize> = lines.iter().enumerate().filter(|(_, l)| l.starts_with("m=")).map(|(i, _)| i).collect();
    starts
        .iter()
        .enumerate()
        .map(|(n, &start)| {
            let end = starts.get(n + 1).copied().unwrap_or(lines.len());
            let mut words = lines[start].trim_start_matches("m=").split(' ');
            Section {
                kind: words.next().unwrap_or_default(),
                port: words.next().unwrap_or_default(),
                lines: &lines[start + 1..end],
            }
        })
        .collect()
}

/// Our answer with its private host addresses replaced by `public` ones of the same family, and without second
/// components and repeated candidates (everything is bundled and RTCP is multiplexed).
pub(super) fn publish(answer: &str, public: &[IpAddr]) -> String {
    let mut out = String::with_capacity(answer.len());
    let mut seen: Vec<String> = Vec::new();
    for line in answer.lines().map(str::trim_end).filter(|l| !l.is_empty()) {
        if line.starts_with("m=") {
            seen.clear();
        }
        if let Some(candidate) = line.strip_prefix("a=candidate:") {
            let mut words: Vec<String> = candidate.split(' ').map(str::to_string).collect();
            if words.get(1).is_some_and(|component| component != "1") {
                continue;
            }
            let address = words.get(4).and_then(|a| a.parse::<IpAddr>().ok());
            let host = words.get(7).is_some_and(|k| k == "host");
            let same: Vec<&IpAddr> =
                public.iter().filter(|p| address.is_some_and(|a| a.is_ipv4() == p.is_ipv4())).collect();
            let mut variants = Vec::new();
            if host && !same.is_empty() && address.is_some_and(|a| !a.is_loopback()) {
                for ip in same {
                    words[4] = ip.to_string();
                    variants.push(words.join(" "));
                }
            } else {
                variants.push(words.join(" "));
            }
            for variant in variants {
                // The foundation may differ between repeats; compare from the transport on.
                let key = variant.split(' ').skip(2).collect::<Vec<_>>().join(" ");
                if !seen.contains(&key) {
                    seen.push(key);
                    out.push_str("a=candidate:");
                    out.push_str(&variant);
                    out.push_str("\r\n");
                }
            }
            continue;
        }
        out.push_str(line);
        out.push_str("\r\n");
        if line == "a=rtcp-mux" && !answer.contains("a=rtcp-mux-only") {
            out.push_str("a=rtcp-mux-only\r\n");
        }
    }
    out
}

/// Asks whoever sends pictures in this answer for the smallest ones (RFC 8866 §5.8): nobody looks at them.
pub(super) fn ask_for_small_pictures(answer: &str) -> String {
    let mut out = String::with_capacity(answer.len() + 16);
    let mut wanted = false;
    for line in answer.lines() {
        // After `c=`, before the attributes, is where bandwidth stands.
        if wanted && line.starts_with("a=") {
            out.push_str("b=AS:50\r\n");
            wanted = false;
        }
        wanted |= line.starts_with("m=video ");
        out.push_str(line);
        out.push_str("\r\n");
    }
    out
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::net) const OFFER: &str = "v=0\r\no=- 1 2 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\na=group:BUNDLE 0 1\r\na=fingerprint:sha-256 AA\r\n\
        m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:0\r\na=ice-ufrag:abcd\r\na=ice-pwd:0123456789012345678901\r\n\
        a=candidate:1 1 udp 2113937151 5a6b.local 50000 typ host\r\na=candidate:2 1 udp 2113937151 10.0.0.2 50000 typ host\r\n\
        a=sendrecv\r\na=rtpmap:111 opus/48000/2\r\n\
        m=video 9 UDP/TLS/RTP/SAVPF 108 109\r\na=mid:1\r\na=ice-ufrag:abcd\r\na=ice-pwd:0123456789012345678901\r\n\
        a=recvonly\r\na=rtpmap:108 H264/90000\r\n\
        a=fmtp:108 level-asymmetry-allowed=1;packetization-mode=1;profile-level-id=42e01f\r\n";

    pub(in crate::net) fn live(offer: &str) -> Result<String, NetError> {
        check_offer(offer, Shape::Live).map(|c| c.text)
    }

    #[test]
    fn an_offer_is_cleaned_of_what_cannot_be_used() {
        let clean = live(&OFFER.replace("\r\n", "\n")).unwrap();
        assert!(!clean.contains(".local") && clean.contains("10.0.0.2") && clean.contains("\r\n"));
        // The direction may also stand in the session part.
        assert!(live(&OFFER.replace("a=sendrecv\r\n", "")).is_ok());
        let session_level = OFFER.replace("a=sendrecv\r\n", "").replace("t=0 0\r\n", "t=0 0\r\na=recvonly\r\n");
        assert!(matches!(live(&session_level), Err(NetError::NoMicrophone)));
        assert!(matches!(live(&OFFER.replace("m=video 9", "m=video 0")), Err(NetError::NoVideo)));
        assert!(matches!(live(&OFFER.replace("42e01f", "640c1f")), Err(NetError::NoH264)));
    }

    #[test]
    fn the_answer_shows_public_addresses_and_each_candidate_once() {
        let answer = "m=audio 9 x 0\r\na=candidate:1 1 udp 5 10.0.0.5 4000 typ host\r\na=candidate:1 2 udp 5 10.0.0.5 4000 typ host\r\n\
            a=candidate:2 1 udp 5 127.0.0.1 4000 typ host\r\na=candidate:1 1 udp 5 10.0.0.5 4000 typ host\r\n";
        let out = publish(answer, &["203.0.113.7".parse().unwrap()]);
        assert_eq!(out.matches("a=candidate").count(), 2);
        assert!(out.contains("203.0.113.7 4000 typ host") && out.contains("127.0.0.1") && !out.contains("10.0.0.5"));
    }
}
