//! Access units and Opus packets into RTP, with timestamps of our own.

use super::clock::RtpClock;
use crate::{
    media::MediaTime,
    session::{EncodedAudio, EncodedVideo},
};
use bytes::Bytes;
use rtc::rtp::{self, codec::h264::H264Payloader, packetizer::Payloader};

/// Largest RTP payload. With headers, extensions, SRTP and an RTX prefix a packet stays under 1200 bytes of UDP payload,
/// which passes every path that WebRTC is seen on.
pub(super) const MAX_PAYLOAD: usize = 1130;

/// One outgoing RTP stream.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) ssrc: u32,
    pub(super) payload_type: u8,
    pub(super) clock: RtpClock,
    sequence: u16,
}

impl Stream {
    pub(super) fn new(ssrc: u32, payload_type: u8, clock: RtpClock, sequence: u16) -> Self {
        Stream { ssrc, payload_type, clock, sequence }
    }

    fn packet(&mut self, at: MediaTime, marker: bool, payload: Bytes) -> rtp::Packet {
        let sequence_number = self.sequence;
        self.sequence = self.sequence.wrapping_add(1);
        rtp::Packet {
            header: rtp::header::Header {
                version: 2,
                marker,
                payload_type: self.payload_type,
                sequence_number,
                timestamp: self.clock.timestamp(at),
                ssrc: self.ssrc,
                ..Default::default()
            },
            payload,
        }
    }

    /// One access unit in Annex B as RTP (RFC 6184, packetization mode 1: single NAL units, STAP-A for the parameter
    /// sets, FU-A). The last packet carries the marker. Empty when the unit has no NAL unit to send.
    pub(super) fn video(&mut self, video: &EncodedVideo) -> Vec<rtp::Packet> {
        // A payloader of its own for every unit: parameter sets must not wait for a later one.
        let payloads = H264Payloader::default().payload(MAX_PAYLOAD, &video.data).unwrap_or_default();
        let last = payloads.len().saturating_sub(1);
        payloads.into_iter().enumerate().map(|(n, p)| self.packet(video.at, n == last, p)).collect()
    }

    /// One Opus packet as RTP (RFC 7587). `first` marks the beginning of a talk spurt.
    pub(super) fn audio(&mut self, audio: &EncodedAudio, first: bool) -> rtp::Packet {
        self.packet(audio.at, first, audio.data.clone())
    }
}

/// Whether a video payload begins a keyframe: parameter sets or an IDR slice, alone, aggregated or fragmented.
pub(super) fn starts_keyframe(payload: &[u8]) -> bool {
    match payload {
        [first, ..] if [5, 7].contains(&(first & 0x1f)) => true,
        [first, _, _, nal, ..] if first & 0x1f == 24 => [5, 7].contains(&(nal & 0x1f)),
        [first, fu, ..] if first & 0x1f == 28 => fu & 0x80 != 0 && fu & 0x1f == 5,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(parts: &[&[u8]]) -> Bytes {
        parts.iter().flat_map(|p| [&[0, 0, 0, 1], *p].concat()).collect::<Vec<u8>>().into()
    }

    #[test]
    fn a_keyframe_becomes_stap_a_and_fragments_with_one_timestamp_and_one_marker() {
        let mut stream = Stream::new(7, 108, RtpClock { rate: 90_000, offset: 1000 }, u16::MAX);
        let idr: Vec<u8> = std::iter::once(0x65).chain((0..3000u32).map(|i| 1 + (i % 250) as u8)).collect();
        let video = EncodedVideo {
            at: MediaTime::from_millis(40),
            duration: MediaTime::from_millis(40),
            keyframe: true,
            width: 64,
            height: 64,
            data: unit(&[&[0x67, 1, 2, 3], &[0x68, 9], &idr]),
        };
        let packets = stream.video(&video);
        assert_eq!(packets.len(), 4, "STAP-A and three fragments");
        assert_eq!(packets[0].payload[0] & 0x1f, 24);
        assert!(packets[1..].iter().all(|p| p.payload[0] & 0x1f == 28 && p.payload.len() <= MAX_PAYLOAD));
        assert!(packets.iter().all(|p| p.header.timestamp == 1000 + 3600 && p.header.ssrc == 7));
        assert_eq!(packets.iter().map(|p| p.header.marker).collect::<Vec<_>>(), [false, false, false, true]);
        assert_eq!(packets.iter().map(|p| p.header.sequence_number).collect::<Vec<_>>(), [u16::MAX, 0, 1, 2]);
        assert!(starts_keyframe(&packets[0].payload) && starts_keyframe(&packets[1].payload));
        assert!(!starts_keyframe(&packets[2].payload));
        let delta = EncodedVideo { data: unit(&[&[0x41, 5, 6]]), keyframe: false, ..video };
        assert!(!starts_keyframe(&stream.video(&delta)[0].payload));
        let nothing = EncodedVideo { data: Bytes::new(), ..delta };
        assert!(stream.video(&nothing).is_empty());
    }
}
