//! Which requests for lost packets are answered.
//!
//! A receiver on a full path asks again and again for packets that are still waiting in a queue; answering everything made
//! 17 000 retransmissions in 20 s of one measured collapse. So: a packet is not resent within a round trip of its last
//! sending, not more than [`MAX_TIMES`] times, not when it is old, not when a later keyframe made it useless; and all
//! resending together stays within a share of the target rate.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Packets kept.
const CAPACITY: usize = 1024;
/// Packets older than this are not resent: the picture they belong to is past.
const MAX_AGE: Duration = Duration::from_millis(1500);
const MAX_TIMES: u8 = 6;
/// Share of the target rate that retransmissions may take over time.
const SHARE: f64 = 0.2;
/// And at once, bytes: a burst of losses is healed even when the rate is low.
const BURST: f64 = 18_000.0;

#[derive(Debug)]
struct Kept<P> {
    sequence: u16,
    last: Instant,
    first: Instant,
    times: u8,
    size: usize,
    packet: P,
}

/// Sent packets and the budget for sending them again.
#[derive(Debug)]
pub(super) struct Retransmit<P> {
    kept: VecDeque<Kept<P>>,
    budget: f64,
    filled: Option<Instant>,
    cursor: usize,
    pub(super) refused: u64,
}

impl<P: Clone> Retransmit<P> {
    pub(super) fn new() -> Self {
        Retransmit { kept: VecDeque::new(), budget: BURST, filled: None, cursor: 0, refused: 0 }
    }

    /// Remembers a packet that leaves now. A packet that starts a keyframe makes all before it useless.
    pub(super) fn keep(&mut self, now: Instant, sequence: u16, size: usize, packet: P, starts_keyframe: bool) {
        if starts_keyframe {
            self.kept.clear();
        }
        if self.kept.len() == CAPACITY {
            self.kept.pop_front();
        }
        self.kept.push_back(Kept { sequence, last: now, first: now, times: 0, size, packet });
    }

    /// The packets to send again for a request, oldest first. `backed_up`: the pacer is behind, nothing may be added.
    pub(super) fn request(
        &mut self,
        now: Instant,
        sequences: impl IntoIterator<Item = u16>,
        round_trip: Duration,
        target: f64,
        backed_up: bool,
    ) -> Vec<(usize, P)> {
        if let Some(filled) = self.filled.replace(now) {
            let fill = SHARE * target / 8.0 * now.saturating_duration_since(filled).as_secs_f64();
            self.budget = (self.budget + fill).min(BURST);
        }
        let gap = round_trip.clamp(Duration::from_millis(15), Duration::from_millis(500)) * 9 / 10;
        let mut out = Vec::new();
        for sequence in sequences {
            let Some(front) = self.kept.front().map(|k| k.sequence) else {
                self.refused += 1;
                continue;
            };
            let answer = self.kept.get_mut(usize::from(sequence.wrapping_sub(front))).filter(|k| {
                k.sequence == sequence
                    && !backed_up
                    && k.times < MAX_TIMES
                    && now.saturating_duration_since(k.last) >= gap
                    && now.saturating_duration_since(k.first) <= MAX_AGE
                    && self.budget >= k.size as f64
            });
            match answer {
                Some(kept) => {
                    self.budget -= kept.size as f64;
                    kept.times += 1;
                    kept.last = now;
                    out.push((kept.size, kept.packet.clone()));
                }
                None => self.refused += 1,
            }
        }
        out
    }

    /// A recent packet to send once more as padding for a probe; the receiver drops what it has already.
    pub(super) fn padding(&mut self) -> Option<(usize, P)> {
        let recent = self.kept.len().min(24);
        if recent == 0 {
            return None;
        }
        self.cursor = (self.cursor + 1) % recent;
        let from = self.kept.len() - recent;
        // The larger of two neighbours: fewer packets for the same bytes.
        let pick = [from + self.cursor, from + (self.cursor + 1) % recent];
        let kept = &self.kept[*pick.iter().max_by_key(|i| self.kept[**i].size)?];
        Some((kept.size, kept.packet.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(40);

    fn with(packets: u16, t0: Instant) -> Retransmit<u16> {
        let mut r = Retransmit::new();
        for n in 0..packets {
            r.keep(t0, n.wrapping_sub(3), 1000, n, false);
        }
        r
    }

    #[test]
    fn a_packet_is_not_resent_within_a_round_trip_nor_for_ever() {
        let t0 = Instant::now();
        let at = |ms| t0 + Duration::from_millis(ms);
        let mut r = with(10, t0);
        assert!(r.request(at(10), [0], RTT, 1e6, false).is_empty(), "it has only just left");
        assert_eq!(r.request(at(40), [0, 0], RTT, 1e6, false), [(1000, 3)]);
        assert!(r.request(at(60), [0], RTT, 1e6, false).is_empty());
        assert!(r.request(at(100), [0], RTT, 1e6, true).is_empty(), "backed up");
        assert_eq!(r.request(at(100), [0], RTT, 1e6, false).len(), 1);
        assert!(r.request(at(200), [500, u16::MAX - 10], RTT, 1e6, false).is_empty(), "never sent");
        assert!(r.request(at(1600), [0], RTT, 1e6, false).is_empty(), "too old");
        assert_eq!(r.refused, 7);
    }

    #[test]
    fn resending_stays_within_its_share() {
        let t0 = Instant::now();
        let mut r = Retransmit::new();
        let mut resent = 0;
        // 700 kbit/s, and the receiver asks for everything three times.
        for n in 0..5000u16 {
            let now = t0 + Duration::from_millis(14 * u64::from(n));
            r.keep(now, n, 1200, n, false);
            if n > 20 {
                for _ in 0..3 {
                    resent += r.request(now, n - 20..n - 10, RTT, 700e3, false).len();
                }
            }
        }
        let share = f64::from(resent as u32) / 5000.0;
        assert!(share < SHARE + 0.01, "{share}");
        assert!(share > SHARE - 0.05, "{share}");
    }

    #[test]
    fn a_keyframe_makes_older_packets_useless() {
        let t0 = Instant::now();
        let mut r = with(10, t0);
        r.keep(t0, 7, 1000, 10, true);
        let later = t0 + Duration::from_millis(100);
        assert!(r.request(later, [5], RTT, 1e6, false).is_empty());
        assert_eq!(r.request(later, [7], RTT, 1e6, false).len(), 1);
        assert_eq!(r.padding(), Some((1000, 10)));
        assert_eq!(Retransmit::<u8>::new().padding(), None);
    }
}
