//! What the parts of one peer share: its streams' clocks, its counters, its way to the session.

use super::{
    clock::{MediaClock, RtpClock},
    congestion::Limits,
    events::Events,
};
use crate::session::{LinkEvent, LinkStats};
use std::{
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

pub(super) struct Shared {
    pub(super) events: Events,
    pub(super) clock: Mutex<MediaClock>,
    pub(super) keyframes: Mutex<KeyframeGate>,
    /// The newest estimates and counters that are written from one place each.
    pub(super) stats: Mutex<LinkStats>,
    pub(super) connected: AtomicBool,
    pub(super) closed: AtomicBool,
    /// As the peer reported, voice and video.
    pub(super) lost_out: [AtomicU64; 2],
    pub(super) lost_in: AtomicU64,
    pub(super) padding_in: AtomicU64,
    pub(super) target: AtomicU32,
    pub(super) audio: (u32, RtpClock),
    pub(super) video: (u32, RtpClock),
    pub(super) video_rtx: u32,
    pub(super) limits: Limits,
}

/// A lock that survives a panic elsewhere: all we guard is plain numbers.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Shared {
    pub(super) fn stats(&self) -> LinkStats {
        LinkStats {
            lost_out: self.lost_out.iter().map(|l| l.load(Relaxed)).sum(),
            lost_in: self.lost_in.load(Relaxed),
            padding_in: self.padding_in.load(Relaxed),
            target_bitrate: self.target.load(Relaxed),
            events_dropped: self.events.dropped(),
            ..*lock(&self.stats)
        }
    }

    /// Somebody (the peer, or our own queue after it was flushed) needs a keyframe.
    pub(super) fn want_keyframe(&self, now: Instant) {
        let mut gate = lock(&self.keyframes);
        gate.ask();
        self.pass_keyframe_request(&mut gate, now);
    }

    /// Sends on a request that waited, once it is due.
    pub(super) fn pass_keyframe_request(&self, gate: &mut KeyframeGate, now: Instant) {
        let round_trip = lock(&self.stats).round_trip.unwrap_or_default();
        if gate.pass(now, round_trip) {
            lock(&self.stats).keyframe_requests += 1;
            self.events.send(LinkEvent::KeyframeRequested);
        }
    }
}

/// Makes one request of many: PLIs repeat until a keyframe has arrived, and one keyframe answers all of them.
#[derive(Debug, Default)]
pub(super) struct KeyframeGate {
    wanted: bool,
    last: Option<Instant>,
    gap: Duration,
    /// One of many viewers, whose keyframes everybody pays for: asking again and again is answered ever more slowly.
    passive: bool,
    repeats: u32,
}

impl KeyframeGate {
    /// Shortest time between two requests passed on.
    const GAP: Duration = Duration::from_millis(250);
    /// The longest for a passive viewer: a keyframe every 4 s costs the others a twentieth of their bits.
    const LONGEST: Duration = Duration::from_secs(4);
    /// Without a request for so long a passive viewer counts as well.
    const WELL: Duration = Duration::from_secs(10);

    pub(super) fn new(passive: bool) -> Self {
        KeyframeGate { passive, ..KeyframeGate::default() }
    }

    fn ask(&mut self) {
        self.wanted = true;
    }

    /// Whether to pass a request on now.
    fn pass(&mut self, now: Instant, round_trip: Duration) -> bool {
        let base = Self::GAP.max(round_trip + Duration::from_millis(50)).min(Duration::from_secs(1));
        self.gap = (base * 2u32.pow(self.repeats)).min(Self::LONGEST);
        let since = self.last.map(|last| now.saturating_duration_since(last));
        let due = self.wanted && since.is_none_or(|since| since >= self.gap);
        if due {
            self.wanted = false;
            self.last = Some(now);
            let again = self.passive && since.is_some_and(|since| since < Self::WELL);
            self.repeats = if again { (self.repeats + 1).min(4) } else { 0 };
        }
        due
    }

    /// When a waiting request is due.
    pub(super) fn due(&self) -> Option<Instant> {
        self.wanted.then(|| self.last.map(|last| last + self.gap)).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_coalesced_but_never_forgotten() {
        let t0 = Instant::now();
        let at = |ms| t0 + Duration::from_millis(ms);
        let mut gate = KeyframeGate::default();
        let rtt = Duration::from_millis(40);
        assert!(!gate.pass(t0, rtt));
        gate.ask();
        assert!(gate.pass(t0, rtt));
        gate.ask();
        gate.ask();
        assert!(!gate.pass(at(100), rtt));
        assert_eq!(gate.due(), Some(at(250)));
        assert!(gate.pass(at(250), rtt));
        assert!(!gate.pass(at(900), rtt));
        assert_eq!(gate.due(), None);
    }

    #[test]
    fn a_viewer_that_asks_for_ever_gets_ever_fewer_keyframes_and_a_well_one_is_served_at_once() {
        let t0 = Instant::now();
        let rtt = Duration::from_millis(40);
        let mut gate = KeyframeGate::new(true);
        let mut passed = vec![];
        for ms in (0..30_000).step_by(10) {
            gate.ask();
            if gate.pass(t0 + Duration::from_millis(ms), rtt) {
                passed.push(ms);
            }
        }
        assert!(passed.len() < 13, "{passed:?}");
        assert!(passed.windows(2).all(|w| w[1] - w[0] <= 4000), "{passed:?}");
        gate.ask();
        assert!(gate.pass(t0 + Duration::from_secs(60), rtt));
        gate.ask();
        assert!(gate.pass(t0 + Duration::from_millis(60_260), rtt));
    }
}
