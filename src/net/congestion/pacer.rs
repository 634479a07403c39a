//! When the next video packet leaves. Voice does not pass here: it is small, and ears forgive less than eyes.
//!
//! A keyframe is twenty times an ordinary frame; sent at once it would fill the queue of the narrowest link and delay the
//! voice behind it. So video leaves at [`FACTOR`] times the target, by bytes; retransmissions first, since somebody waits
//! for them. A queue that would take longer than [`LIMIT`] is not worth its bytes: it is thrown away, a keyframe is asked
//! for, and everything before that keyframe is dropped too.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Pacing rate over target rate.
const FACTOR: f64 = 1.5;
/// Longest queue of ordinary frames.
const LIMIT: Duration = Duration::from_millis(250);
/// How far the pacer may fall behind its schedule and catch up at once (timers are a millisecond coarse).
const CATCH_UP: Duration = Duration::from_millis(5);
/// Early enough to leave now rather than at the next wake-up.
const SLACK: Duration = Duration::from_micros(500);

/// What the pacer says to do now.
#[derive(Debug, PartialEq)]
pub(super) enum Next<P> {
    Send(P),
    /// Send something else of about this rate's packet size: a probe runs and nothing is queued.
    Pad,
    /// Nothing before this.
    Wait(Instant),
    Idle,
}

#[derive(Debug)]
struct Queued<P> {
    size: usize,
    key: bool,
    packet: P,
}

#[derive(Debug)]
pub(super) struct Pacer<P> {
    target: f64,
    first: VecDeque<(usize, P)>,
    media: VecDeque<Queued<P>>,
    bytes: usize,
    key_bytes: usize,
    free: Option<Instant>,
    /// (bits per second, bytes left)
    probe: Option<(f64, usize)>,
    /// Everything is dropped until a keyframe begins.
    await_key: bool,
    /// The path is dead: keyframes are dropped as well.
    suspended: bool,
    pub(super) dropped: u64,
}

impl<P> Pacer<P> {
    pub(super) fn new(target: f64) -> Self {
        Pacer {
            target,
            first: VecDeque::new(),
            media: VecDeque::new(),
            bytes: 0,
            key_bytes: 0,
            free: None,
            probe: None,
            await_key: false,
            suspended: false,
            dropped: 0,
        }
    }

    pub(super) fn set_target(&mut self, bits_per_second: f64) {
        self.target = bits_per_second;
    }

    fn rate(&self) -> f64 {
        let pacing = self.target * FACTOR;
        self.probe.map_or(pacing, |(rate, _)| rate.max(pacing))
    }

    fn time(&self, bytes: usize) -> Duration {
        Duration::from_secs_f64(bytes as f64 * 8.0 / (self.target * FACTOR))
    }

    /// Time the queue needs to empty.
    pub(super) fn queue(&self) -> Duration {
        self.time(self.bytes)
    }

    /// Queues a media packet. `key`: it belongs to a keyframe; `start`: it is that keyframe's first. Returns true when the
    /// queue was thrown away and a keyframe is needed.
    pub(super) fn push(&mut self, size: usize, key: bool, start: bool, packet: P) -> bool {
        if self.suspended || (self.await_key && !start) {
            self.dropped += 1;
            return false;
        }
        if start {
            self.await_key = false;
            // What is still queued before a keyframe is only in its way.
            self.clear();
        }
        self.bytes += size;
        self.key_bytes += if key { size } else { 0 };
        self.media.push_back(Queued { size, key, packet });
        // A keyframe at a low rate takes longer than the limit by itself, and more frames queue meanwhile: throwing those
        // away would only ask for the next such keyframe.
        if self.queue() > LIMIT + 2 * self.time(self.key_bytes) {
            self.clear();
            self.await_key = true;
            return true;
        }
        false
    }

    pub(super) fn awaits_keyframe(&self) -> bool {
        self.await_key && !self.suspended
    }

    fn clear(&mut self) {
        self.dropped += self.media.len() as u64;
        self.media.clear();
        self.first.clear();
        (self.bytes, self.key_bytes) = (0, 0);
    }

    /// Queues a retransmission, before all media.
    pub(super) fn push_first(&mut self, size: usize, packet: P) {
        if !self.suspended {
            self.bytes += size;
            self.first.push_back((size, packet));
        }
    }

    /// Whether the path is thought dead: then nothing is queued at all.
    pub(super) fn suspend(&mut self, suspended: bool) {
        if suspended && !self.suspended {
            self.clear();
            self.probe = None;
        }
        if self.suspended && !suspended {
            self.await_key = true;
        }
        self.suspended = suspended;
    }

    /// Sends the next `bytes` at `rate`, padding included.
    pub(super) fn probe(&mut self, rate: f64, bytes: usize) {
        self.probe = Some((rate, bytes));
        self.free = None;
    }

    pub(super) fn probing(&self) -> bool {
        self.probe.is_some()
    }

    pub(super) fn cancel_probe(&mut self) {
        self.probe = None;
    }

    pub(super) fn next(&mut self, now: Instant) -> Next<P> {
        if self.first.is_empty() && self.media.is_empty() && self.probe.is_none() {
            return Next::Idle;
        }
        if let Some(free) = self.free
            && free > now + SLACK
        {
            return Next::Wait(free);
        }
        if let Some((size, packet)) = self.first.pop_front() {
            self.bytes -= size;
            self.left(now, size);
            return Next::Send(packet);
        }
        if let Some(queued) = self.media.pop_front() {
            self.bytes -= queued.size;
            self.key_bytes -= if queued.key { queued.size } else { 0 };
            self.left(now, queued.size);
            return Next::Send(queued.packet);
        }
        Next::Pad
    }

    /// When to ask [`Self::next`] again; `None` when there is nothing to send.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        let idle = self.first.is_empty() && self.media.is_empty() && self.probe.is_none();
        (!idle).then(|| self.free.unwrap_or(now))
    }

    /// `size` bytes left now (also padding).
    pub(super) fn left(&mut self, now: Instant, size: usize) {
        let from = self.free.unwrap_or(now).max(now.checked_sub(CATCH_UP).unwrap_or(now));
        self.free = Some(from + Duration::from_secs_f64(size as f64 * 8.0 / self.rate()));
        if let Some((_, left)) = &mut self.probe {
            *left = left.saturating_sub(size);
            if *left == 0 {
                self.probe = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes what leaves, in steps of 1 ms, until `until` ms.
    fn drain(pacer: &mut Pacer<u32>, t0: Instant, until: u64) -> Vec<(u64, u32)> {
        let mut out = vec![];
        for ms in 0..until {
            while let Next::Send(packet) = pacer.next(t0 + Duration::from_millis(ms)) {
                out.push((ms, packet));
            }
        }
        out
    }

    #[test]
    fn video_leaves_at_its_rate_and_retransmissions_first() {
        let t0 = Instant::now();
        let mut pacer = Pacer::new(800e3);
        for n in 0..20 {
            assert!(!pacer.push(1200, false, false, n));
        }
        pacer.push_first(1200, 99);
        assert!(pacer.queue() > Duration::from_millis(160), "{:?}", pacer.queue());
        let out = drain(&mut pacer, t0, 400);
        assert_eq!(out[0], (0, 99));
        assert_eq!(out.len(), 21);
        // 1200 bytes at 1.2 Mbit/s are 8 ms.
        let last = out[20].0;
        assert!((155..=165).contains(&last), "{last}");
        assert_eq!(pacer.next(t0 + Duration::from_secs(1)), Next::Idle);
    }

    #[test]
    fn an_old_queue_is_thrown_away_and_only_a_keyframe_opens_it_again() {
        let mut pacer = Pacer::new(400e3);
        let flushed: Vec<bool> = (0..20).map(|n| pacer.push(1200, false, false, n)).collect();
        assert_eq!(flushed.iter().filter(|f| **f).count(), 1);
        assert_eq!(pacer.queue(), Duration::ZERO);
        assert!(!pacer.push(1200, false, false, 50));
        assert_eq!(pacer.dropped, 21);
        assert!(!pacer.push(1200, true, true, 51));
        assert!(!pacer.push(1200, false, false, 52));
        assert_eq!(drain(&mut pacer, Instant::now(), 100).iter().map(|o| o.1).collect::<Vec<_>>(), [51, 52]);
    }

    #[test]
    fn a_large_keyframe_at_a_low_rate_is_let_through() {
        let mut pacer = Pacer::new(150e3);
        // 20 kB take 0.7 s at 225 kbit/s; frames of 150 kbit/s follow meanwhile.
        for n in 0..17 {
            assert!(!pacer.push(1200, true, n == 0, n));
        }
        for n in 17..37 {
            assert!(!pacer.push(750, false, false, n), "frame {n}");
        }
    }

    #[test]
    fn a_dead_path_gets_nothing_until_a_new_keyframe() {
        let mut pacer = Pacer::new(500e3);
        pacer.push(1200, false, false, 1);
        pacer.suspend(true);
        assert!(!pacer.push(1200, true, true, 2));
        assert_eq!(pacer.next(Instant::now()), Next::Idle);
        pacer.suspend(false);
        pacer.push(1200, false, false, 3);
        assert_eq!(pacer.next(Instant::now()), Next::Idle);
        pacer.push(1200, true, true, 4);
        assert_eq!(pacer.next(Instant::now()), Next::Send(4));
    }

    #[test]
    fn a_probe_asks_for_padding_at_its_rate() {
        let t0 = Instant::now();
        let mut pacer: Pacer<u32> = Pacer::new(300e3);
        pacer.probe(1.2e6, 6_000);
        let mut padded = vec![];
        for ms in 0..100 {
            let now = t0 + Duration::from_millis(ms);
            while pacer.next(now) == Next::Pad {
                pacer.left(now, 1200);
                padded.push(ms);
            }
        }
        assert_eq!(padded, [0, 8, 16, 24, 32]);
        assert!(!pacer.probing());
    }
}
