//! Fragments of session descriptions: candidates that trickle in and new credentials that restart ICE (RFC 8840, RFC 9725
//! §4.3). Pure; as in [`super::sdp`] nothing indexes and nothing unwraps, for all of it comes from strangers.

use super::{
    NetError,
    sdp::{MAX_CANDIDATES, lines},
};
use std::net::IpAddr;

/// Whether `candidate` (`candidate:…`) names a literal address over UDP or TCP. Names such as `….local` (mDNS) are
/// not resolved: the browser reaches us first, and its real address is learnt from its checks.
pub(super) fn usable(candidate: &str) -> bool {
    let words: Vec<&str> = candidate.trim_start_matches("candidate:").split_ascii_whitespace().collect();
    let [foundation, component, transport, priority, address, port, typ, kind, ..] = words[..] else { return false };
    foundation.len() <= 32
        && component.parse::<u16>().is_ok_and(|c| c == 1 || c == 2)
        && ["udp", "tcp"].contains(&transport.to_ascii_lowercase().as_str())
        && priority.parse::<u32>().is_ok()
        && address.parse::<IpAddr>().is_ok_and(|ip| !ip.is_unspecified() && !ip.is_multicast())
        && port.parse::<u16>().is_ok()
        && typ == "typ"
        && ["host", "srflx", "prflx", "relay"].contains(&kind)
        // An active TCP candidate is a client that will connect by itself; there is nothing to check towards it.
        && !words.windows(2).any(|w| w == ["tcptype", "active"])
}

/// What a fragment says (RFC 8840): credentials, and candidates by media section.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Fragment {
    pub(super) ufrag: Option<String>,
    pub(super) pwd: Option<String>,
    /// Usable ones only: (mid, `candidate:…`).
    pub(super) candidates: Vec<(Option<String>, String)>,
    /// Candidates left out because they cannot be used here (names, unknown transports).
    pub(super) skipped: usize,
    pub(super) end_of_candidates: bool,
}

/// Reads an `application/trickle-ice-sdpfrag` body.
///
/// # Errors
/// [`NetError::TooLarge`]; [`NetError::Malformed`] when a line is not `x=value` or nothing in it concerns ICE.
pub(super) fn parse_fragment(text: &str) -> Result<Fragment, NetError> {
    let lines = lines(text)?;
    let mut fragment = Fragment::default();
    let mut mid = None;
    let mut known = false;
    for (n, line) in lines.iter().enumerate() {
        let Some((key, value)) = line.split_once('=').filter(|(k, _)| k.len() == 1) else {
            return Err(NetError::Malformed(format!("line {} of the fragment is not of the form `x=value`", n + 1)));
        };
        if key == "m" {
            mid = None;
            continue;
        }
        if key != "a" {
            continue;
        }
        if let Some(v) = value.strip_prefix("mid:") {
            mid = Some(v.to_string());
        } else if let Some(v) = value.strip_prefix("ice-ufrag:") {
            known = true;
            fragment.ufrag.get_or_insert_with(|| v.to_string());
        } else if let Some(v) = value.strip_prefix("ice-pwd:") {
            known = true;
            fragment.pwd.get_or_insert_with(|| v.to_string());
        } else if value.starts_with("candidate:") {
            known = true;
            if fragment.candidates.len() < MAX_CANDIDATES && usable(value) {
                fragment.candidates.push((mid.clone(), value.to_string()));
            } else {
                fragment.skipped += 1;
            }
        } else if value == "end-of-candidates" {
            known = true;
            fragment.end_of_candidates = true;
        }
    }
    let fits = |v: &Option<String>, least: usize| {
        v.as_ref().is_none_or(|v| {
            (least..=256).contains(&v.len()) && v.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'+' || b == b'/')
        })
    };
    if !known {
        return Err(NetError::Malformed("the fragment has no ICE credentials and no candidates".into()));
    }
    if !fits(&fragment.ufrag, 4) || !fits(&fragment.pwd, 22) {
        return Err(NetError::Malformed("a=ice-ufrag or a=ice-pwd is not as RFC 8839 §5.4 wants it".into()));
    }
    Ok(fragment)
}

/// The first credentials in a description.
pub(super) fn credentials(sdp: &str) -> Option<(String, String)> {
    let find = |name: &str| sdp.lines().find_map(|l| l.trim_end().strip_prefix(name)).map(str::to_string);
    Some((find("a=ice-ufrag:")?, find("a=ice-pwd:")?))
}

/// A stored offer with other ICE credentials and candidates: what a client's new offer would say after its restart.
pub(super) fn with_credentials(offer: &str, ufrag: &str, pwd: &str, candidates: &[(Option<String>, String)]) -> String {
    let mut out = String::with_capacity(offer.len() + 512);
    let mut placed = false;
    let mut in_media = false;
    let place = |out: &mut String, placed: &mut bool| {
        if !std::mem::replace(placed, true) {
            for (_, candidate) in candidates {
                out.push_str("a=");
                out.push_str(candidate);
                out.push_str("\r\n");
            }
        }
    };
    for line in offer.lines().map(str::trim_end).filter(|l| !l.is_empty()) {
        if line.starts_with("m=") {
            // BUNDLE: the first section's transport is everybody's.
            if in_media {
                place(&mut out, &mut placed);
            }
            in_media = true;
        }
        if line.starts_with("a=candidate:") || line == "a=end-of-candidates" {
            continue;
        } else if line.starts_with("a=ice-ufrag:") {
            out.push_str("a=ice-ufrag:");
            out.push_str(ufrag);
        } else if line.starts_with("a=ice-pwd:") {
            out.push_str("a=ice-pwd:");
            out.push_str(pwd);
        } else {
            out.push_str(line);
        }
        out.push_str("\r\n");
    }
    if in_media {
        place(&mut out, &mut placed);
    }
    out
}

/// The fragment to answer an ICE restart with, cut from our new answer (RFC 9725 §4.3.3).
pub(super) fn fragment_of(answer: &str) -> String {
    let mut head = String::new();
    let mut body = String::new();
    let mut first_media: Option<&str> = None;
    for line in answer.lines().map(str::trim_end) {
        if line.starts_with("m=") {
            if first_media.is_some() {
                break;
            }
            first_media = Some(line);
        } else if line == "a=ice-lite" || line.starts_with("a=ice-options:") || line.starts_with("a=group:BUNDLE") {
            head.push_str(line);
            head.push_str("\r\n");
        } else if line.starts_with("a=ice-ufrag:") || line.starts_with("a=ice-pwd:") {
            // Credentials stand once, before the sections (max-bundle).
            if !head.contains(line) {
                head.push_str(line);
                head.push_str("\r\n");
            }
        } else if line.starts_with("a=mid:") || line.starts_with("a=candidate:") || line == "a=end-of-candidates" {
            body.push_str(line);
            body.push_str("\r\n");
        }
    }
    if let Some(media) = first_media {
        head.push_str(media);
        head.push_str("\r\n");
    }
    head + &body
}

#[cfg(test)]
mod tests {
    use super::{
        super::sdp::tests::{OFFER, live},
        *,
    };

    #[test]
    fn fragments_are_read_and_unusable_candidates_skipped() {
        let fragment = parse_fragment(
            "a=ice-ufrag:EsAw\r\na=ice-pwd:P2uYro0UCOQ4zxjKXaWCBui1\r\nm=audio 9 RTP/AVP 0\r\na=mid:0\r\n\
             a=candidate:1387637174 1 udp 2122260223 192.0.2.1 61764 typ host generation 0 ufrag EsAw network-id 1\r\n\
             a=candidate:1 1 udp 1 x.local 1 typ host\r\na=candidate:2 1 tcp 1 192.0.2.1 9 typ host tcptype active\r\n\
             a=candidate:garbage\r\na=end-of-candidates\r\n",
        )
        .unwrap();
        assert_eq!(fragment.candidates.len(), 1);
        assert_eq!(fragment.candidates[0].0.as_deref(), Some("0"));
        assert_eq!((fragment.skipped, fragment.end_of_candidates), (3, true));
        for bad in ["", "hello", "a=mid:0", "a=ice-ufrag:x y z w", "a=ice-pwd:short"] {
            assert!(matches!(parse_fragment(bad), Err(NetError::Malformed(_))), "{bad}");
        }
        assert!(matches!(parse_fragment(&"a=mid:0\r\n".repeat(10_000)), Err(NetError::TooLarge(_))));
    }

    #[test]
    fn a_restart_changes_every_credential_and_moves_candidates_to_the_first_section() {
        let candidates = vec![(Some("0".into()), "candidate:9 1 udp 1 192.0.2.9 9 typ host".into())];
        let offer = with_credentials(OFFER, "efgh", "9876543210987654321098", &candidates);
        assert_eq!(offer.matches("a=ice-ufrag:efgh\r\n").count(), 2);
        assert_eq!(offer.matches("a=candidate:").count(), 1);
        assert!(offer.find("192.0.2.9").unwrap() < offer.find("m=video").unwrap());
        assert_eq!(credentials(&offer).unwrap().1, "9876543210987654321098");
        assert!(live(&offer).is_ok());
        let fragment = fragment_of(&offer);
        assert!(fragment.contains("m=audio") && !fragment.contains("m=video") && fragment.contains("192.0.2.9"));
        let read = parse_fragment(&fragment).unwrap();
        assert_eq!((read.ufrag.as_deref(), read.candidates.len()), (Some("efgh"), 1));
    }
}
