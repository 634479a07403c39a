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
}

impl KeyframeGate {
    /// Shortest time between two requests passed on.
    const GAP: Duration = Duration::from_millis(250);

    fn ask(&mut self) {
        self.wanted = true;
    }

    /// Whether to pass a request on now.
    fn pass(&mut self, now: Instant, round_trip: Duration) -> bool {
        self.gap = Self::GAP.max(round_trip + Duration::from_millis(50)).min(Duration::from_secs(1));
        let due = self.wanted && self.last.is_none_or(|last| now.saturating_duration_since(last) >= self.gap);
        if due {
            self.wanted = false;
            self.last = Some(now);
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
}
