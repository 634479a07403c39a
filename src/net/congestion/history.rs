//! Every packet that left, until the receiver has spoken of it.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Packets remembered: 4 s at 1000 packets/s. Older ones are forgotten first.
const CAPACITY: usize = 4096;
/// Feedback about packets older than this is of no use.
const HORIZON: Duration = Duration::from_secs(6);

/// What became of one packet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Ack {
    pub(super) departure: Instant,
    /// Arrival on the receiver's clock; `None` when it did not arrive.
    pub(super) arrival: Option<Duration>,
    /// Bytes of UDP payload.
    pub(super) size: usize,
    /// The probe it belonged to.
    pub(super) probe: Option<u32>,
    /// It was reported missing before and came after all.
    pub(super) late: bool,
}

#[derive(Debug)]
struct Sent {
    departure: Instant,
    size: usize,
    probe: Option<u32>,
    missing: bool,
    done: bool,
}

/// Numbers packets and finds them again.
#[derive(Debug, Default)]
pub(super) struct History {
    /// Number of the first of `sent`.
    base: u16,
    sent: VecDeque<Sent>,
}

impl History {
    /// Records a packet that leaves now; returns its transport-wide sequence number.
    pub(super) fn depart(&mut self, now: Instant, size: usize, probe: Option<u32>) -> u16 {
        while self.sent.len() >= CAPACITY
            || self.sent.front().is_some_and(|s| now.saturating_duration_since(s.departure) > HORIZON)
        {
            self.sent.pop_front();
            self.base = self.base.wrapping_add(1);
        }
        self.sent.push_back(Sent { departure: now, size, probe, missing: false, done: false });
        self.base.wrapping_add(self.sent.len() as u16 - 1)
    }

    /// What a feedback entry means; `None` for numbers never sent, forgotten, or spoken of already.
    pub(super) fn resolve(&mut self, sequence: u16, arrival: Option<Duration>) -> Option<Ack> {
        let sent = self.sent.get_mut(usize::from(sequence.wrapping_sub(self.base)))?;
        if sent.done || (sent.missing && arrival.is_none()) {
            return None;
        }
        let late = sent.missing;
        sent.missing = arrival.is_none();
        sent.done = arrival.is_some();
        Some(Ack { departure: sent.departure, arrival, size: sent.size, probe: sent.probe, late })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_wrap_and_each_packet_is_told_once() {
        let t0 = Instant::now();
        let mut history = History { base: u16::MAX - 1, ..Default::default() };
        let numbers: Vec<u16> = (0..4).map(|n| history.depart(t0, 100 + n, None)).collect();
        assert_eq!(numbers, [u16::MAX - 1, u16::MAX, 0, 1]);
        let at = Some(Duration::from_millis(5));
        assert_eq!(history.resolve(0, at).unwrap().size, 102);
        assert_eq!(history.resolve(0, at), None, "twice");
        assert!(history.resolve(1, None).unwrap().arrival.is_none());
        assert_eq!(history.resolve(1, None), None);
        assert!(history.resolve(1, at).unwrap().late);
        assert_eq!(history.resolve(2, at), None, "never sent");
        history.depart(t0 + HORIZON * 2, 7, None);
        assert_eq!(history.resolve(u16::MAX, at), None, "forgotten");
        for n in 0..2 * CAPACITY {
            history.depart(t0 + HORIZON * 2, n, None);
        }
        assert_eq!(history.sent.len(), CAPACITY);
    }
}
