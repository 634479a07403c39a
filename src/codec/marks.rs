//! Marks that say a picture was made by a machine, for machines: an SEI message in the H.264 stream, XMP in files.
//!
//! * **SEI** `user_data_unregistered` (ITU-T H.264 D.1.7): [`SEI_UUID`], then JSON in UTF-8 with `ai_generated`, `by`,
//!   `engine`, `when` and, for live pictures, `session`. It stands in front of every keyframe, so whoever begins to
//!   watch gets it with the first picture, and it survives any remuxing.
//! * **XMP** (ISO 16684-1) in a `uuid` box (XMP Specification Part 3, "MPEG-4") with the IPTC term
//!   `trainedAlgorithmicMedia` as digital source type.
//!
//! C2PA manifests are not written: they need a signing certificate of whoever runs the service.

use std::time::{SystemTime, UNIX_EPOCH};

/// Names our message among unregistered ones.
pub const SEI_UUID: [u8; 16] =
    [0x6c, 0x6f, 0x71, 0x75, 0x65, 0x6e, 0x74, 0x2d, 0x8e, 0x01, 0x4a, 0x5b, 0x9d, 0x3c, 0x71, 0x20];

/// The `uuid` box of XMP in MPEG-4.
const XMP_UUID: [u8; 16] =
    [0xbe, 0x7a, 0xcf, 0xcb, 0x97, 0xa9, 0x42, 0xe8, 0x9c, 0x71, 0x99, 0x94, 0x91, 0xe3, 0xaf, 0xac];

/// Who made it, and for whom it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// The engine's name, such as `pocket`.
    pub engine: String,
    /// The live session, as it is named in logs; empty for files made offline.
    pub session: String,
}

/// The program and its version.
pub fn maker() -> String {
    format!("Loquent {}", env!("CARGO_PKG_VERSION"))
}

impl Mark {
    /// Puts the SEI message into a keyframe's access unit (Annex B), between parameter sets and picture. `when`: RFC
    /// 3339.
    pub fn insert(&self, access_unit: &mut Vec<u8>, when: &str) {
        let mut json = serde_json::json!({
            "ai_generated": true, "by": maker(), "engine": self.engine, "when": when,
        });
        if !self.session.is_empty() {
            json["session"] = self.session.as_str().into();
        }
        let unit = sei(&SEI_UUID, json.to_string().as_bytes());
        let at = first_slice(access_unit).unwrap_or(0);
        access_unit.splice(at..at, unit);
    }

    /// A `uuid` box with the XMP packet. `when`: RFC 3339.
    pub fn xmp_box(&self, when: &str) -> Vec<u8> {
        let packet = self.xmp(when);
        let mut out = ((24 + packet.len()) as u32).to_be_bytes().to_vec();
        out.extend(b"uuid");
        out.extend(XMP_UUID);
        out.extend(packet.as_bytes());
        out
    }

    fn xmp(&self, when: &str) -> String {
        let Mark { engine, session } = self;
        let (engine, session, when) = (escaped(engine), escaped(session), escaped(when));
        let maker = maker();
        let label =
            if session.is_empty() { String::new() } else { format!("\n   <dc:identifier>{session}</dc:identifier>") };
        format!(
            r#"<?xpacket begin="{bom}" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
   <xmp:CreatorTool>{maker} ({engine})</xmp:CreatorTool>
   <xmp:CreateDate>{when}</xmp:CreateDate>{label}
   <dc:description><rdf:Alt><rdf:li xml:lang="x-default">AI-generated: a computer-made presenter speaks.</rdf:li><rdf:li xml:lang="zh">人工智能生成：由计算机合成的主播在说话。</rdf:li></rdf:Alt></dc:description>
   <Iptc4xmpExt:DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia</Iptc4xmpExt:DigitalSourceType>
   <Iptc4xmpExt:AISystemUsed>{engine}</Iptc4xmpExt:AISystemUsed>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"#,
            bom = '\u{feff}'
        )
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// One SEI NAL unit with start code (H.264 7.3.2.3, D.1.7), emulation prevention included.
fn sei(uuid: &[u8; 16], text: &[u8]) -> Vec<u8> {
    let mut payload = vec![5];
    let mut size = uuid.len() + text.len();
    while size >= 255 {
        payload.push(255);
        size -= 255;
    }
    payload.push(size as u8);
    payload.extend(uuid);
    payload.extend(text);
    payload.push(0x80);
    let mut unit = vec![0, 0, 0, 1, 6];
    let mut zeros = 0;
    for byte in payload {
        if zeros == 2 && byte <= 3 {
            unit.push(3);
            zeros = 0;
        }
        zeros = if byte == 0 { zeros + 1 } else { 0 };
        unit.push(byte);
    }
    unit
}

/// Where the start code of the first slice begins.
fn first_slice(stream: &[u8]) -> Option<usize> {
    let at = stream.windows(4).position(|w| w[..3] == [0, 0, 1] && matches!(w[3] & 0x1f, 1 | 5))?;
    Some(if at > 0 && stream[at - 1] == 0 { at - 1 } else { at })
}

/// A moment as RFC 3339 in UTC, whole seconds.
pub fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days since 1 March of year 0, in eras of 400 years: leap days then stand at the end of a year.
    let z = days + 719_468;
    let (era, day) = (z / 146_097, z % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates_are_right_also_around_leap_days() {
        for (seconds, want) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_868_799, "2000-02-29T23:59:59Z"),
            (1_709_164_800, "2024-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), want);
        }
    }

    #[test]
    fn the_message_stands_before_the_picture_and_hides_start_codes() {
        let mut unit = vec![0, 0, 0, 1, 0x67, 1, 0, 0, 0, 1, 0x68, 2, 0, 0, 0, 1, 0x65, 9, 9];
        let mark = Mark { engine: "card".into(), session: "0123".into() };
        mark.insert(&mut unit, "2026-01-02T03:04:05Z");
        let at = first_slice(&unit).unwrap();
        assert_eq!(&unit[at..], [0, 0, 0, 1, 0x65, 9, 9]);
        assert_eq!(&unit[12..17], [0, 0, 0, 1, 6]);
        let text = String::from_utf8_lossy(&unit);
        assert!(text.contains(r#""ai_generated":true"#) && text.contains(r#""session":"0123""#), "{text}");
        let hidden = sei(&[0; 16], &[0, 0, 1]);
        assert!(!hidden[4..].windows(3).any(|w| w[0] == 0 && w[1] == 0 && w[2] <= 2), "{hidden:?}");
    }
}
