//! Counts the microphone's packets as they arrive; order and jitter are the session's business.

use crate::session::SpeechPacket;
use rtc::rtp;
use std::time::Instant;

/// What has arrived of one incoming stream.
#[derive(Debug, Default)]
pub(super) struct SpeechIn {
    first: Option<u64>,
    highest: u64,
    received: u64,
    padding: u64,
}

impl SpeechIn {
    pub(super) fn take(&mut self, packet: rtp::Packet, arrived: Instant) -> SpeechPacket {
        let sequence = packet.header.sequence_number;
        let extended = match self.first {
            // One cycle up, so that packets before the first do not fall below zero.
            None => u64::from(sequence) + 0x1_0000,
            // The value nearest to the highest so far.
            Some(_) => self.highest.wrapping_add_signed(i64::from(sequence.wrapping_sub(self.highest as u16) as i16)),
        };
        self.first = Some(self.first.map_or(extended, |first| first.min(extended)));
        self.highest = self.highest.max(extended);
        self.received += 1;
        self.padding += u64::from(packet.payload.is_empty());
        SpeechPacket {
            sequence,
            timestamp: packet.header.timestamp,
            payload: packet.payload,
            marker: packet.header.marker,
            arrived,
        }
    }

    /// Packets missing so far (late ones are taken back when they come).
    pub(super) fn lost(&self) -> u64 {
        self.first.map_or(0, |first| (self.highest - first + 1).saturating_sub(self.received))
    }

    pub(super) fn padding(&self) -> u64 {
        self.padding
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_counted_across_the_wrap_and_padding_keeps_its_number() {
        let mut speech = SpeechIn::default();
        let mut take = |sequence: u16, payload: &'static [u8]| {
            let packet = rtp::Packet {
                header: rtp::header::Header { sequence_number: sequence, ..Default::default() },
                payload: bytes::Bytes::from_static(payload),
            };
            speech.take(packet, Instant::now()).sequence
        };
        for (sequence, payload) in [(65534, &b"a"[..]), (65535, b""), (2, b"b"), (1, b"c"), (65533, b"d")] {
            assert_eq!(take(sequence, payload), sequence);
        }
        assert_eq!(speech.lost(), 1, "only number 0 is missing");
        assert_eq!(speech.padding(), 1);
    }
}
