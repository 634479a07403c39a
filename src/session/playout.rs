//! Media time → wall time. The voice is the clock: one delay for voice and picture, as small as the engine's blocks
//! allow, measured, not guessed. Pictures are held (none came in time) or skipped (came too late), never the voice.
//!
//! `wall(t) = begun + (t − origin) + delay`. The delay follows how late blocks come: each second's latest block counts,
//! and of the last 30 seconds the worst tenth is forgiven. It moves slowly while someone speaks (at most 5 % faster or
//! 0.5 % slower than life) and quicker while nobody does.
//!
//! A block that comes later than the longest delay can never be in time, and on an engine that slow none ever is. Its
//! pictures are shown all the same, one a slot from when they come, until one comes that is in time or a newer block: late,
//! but moving. They take the time of the slot in which they are shown, and count as late.

use crate::{
    codec::{OPUS_RATE, VOICE_FRAME},
    media::{Frame, MediaTime, Pcm},
};
use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Seconds whose latest blocks are remembered, and how many of them may be forgiven.
const REMEMBERED: usize = 30;
const FORGIVEN_SHARE: usize = 10;
/// Change of delay per second of wall time: growing and shrinking, while speaking and while silent.
const GROW: f64 = 0.05;
const SHRINK: f64 = 0.005;
const SHRINK_SILENT: f64 = 0.1;
/// The delay shrinks only when it is this much too long.
const SLACK: Duration = Duration::from_millis(8);
/// A voice packet below this is silence (−60 dB).
const SILENCE: f32 = 0.001;
/// Longest voice that may wait: beyond, the oldest leaves (it is far too late by then).
const LONGEST_VOICE: usize = 4 * OPUS_RATE as usize;
/// Frames that may wait: 4 s at 25 fps.
const MOST_FRAMES: usize = 100;

/// Something whose time has come.
#[derive(Debug)]
pub enum Due {
    /// 20 ms of voice.
    Voice { at: MediaTime, wall: Instant, samples: Vec<f32> },
    /// A picture, in its time; `late` by less than a frame.
    Frame { frame: Frame, wall: Instant, late: bool },
    /// No picture for this time: the last one stays.
    Held { at: MediaTime, wall: Instant },
}

/// Counters since the beginning, and the delay now.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PlayoutStats {
    pub held: u64,
    /// Pictures made but never shown.
    pub skipped: u64,
    /// Pictures of blocks that could not be in time, shown when they came.
    pub late: u64,
    pub voice_packets: u64,
    /// Voice packets made of silence because no voice was there: always zero unless ingest stood still.
    pub voice_gaps: u64,
    pub delay: Duration,
    pub wanted: Duration,
}

/// See the module.
pub struct Playout {
    begun: Instant,
    origin: MediaTime,
    frame_span: MediaTime,
    margin: Duration,
    least: Duration,
    most: Duration,
    delay: Duration,
    /// While nobody listens the delay may jump.
    free: bool,
    adapted: Instant,
    /// Latest block of each of the last seconds: (second, needed delay).
    seconds: VecDeque<(u64, Duration)>,
    voice: VecDeque<f32>,
    /// Time of the first waiting sample.
    voice_at: MediaTime,
    /// Samples whose time passed before they came.
    owed: usize,
    blocks: u64,
    frames: VecDeque<Frame>,
    /// Pictures of the newest block, where it came too late for any delay.
    belated: VecDeque<Frame>,
    /// The slot that is open or next.
    slot: MediaTime,
    slot_filled: bool,
    begun_showing: bool,
    /// Pictures before this belong to what was interrupted.
    floor: MediaTime,
    /// Pictures before this make up for an interruption and say nothing about how late blocks are.
    counted: MediaTime,
    stats: PlayoutStats,
}

impl Playout {
    /// The timeline begins at `origin`; `begun` is that moment on the wall without any delay. `expected` is the delay
    /// to begin with, `margin` is added to what is measured, `most` bounds it.
    pub fn new(
        begun: Instant,
        origin: MediaTime,
        frame_span: MediaTime,
        expected: Duration,
        margin: Duration,
        most: Duration,
    ) -> Self {
        Playout {
            begun,
            origin,
            frame_span,
            margin,
            least: Duration::from_millis(20).min(most),
            most,
            delay: expected.min(most),
            free: true,
            adapted: begun,
            seconds: VecDeque::new(),
            voice: VecDeque::new(),
            voice_at: origin,
            owed: 0,
            blocks: 0,
            frames: VecDeque::new(),
            belated: VecDeque::new(),
            slot: origin,
            slot_filled: false,
            begun_showing: false,
            floor: origin,
            counted: origin,
            stats: PlayoutStats::default(),
        }
    }

    pub fn stats(&self) -> PlayoutStats {
        PlayoutStats { delay: self.delay, wanted: self.wanted(), ..self.stats }
    }

    /// When this media time is due on the wall.
    pub fn wall(&self, at: MediaTime) -> Instant {
        self.bare(at) + self.delay
    }

    /// When it would be due without any delay: when its sound was heard.
    pub(super) fn bare(&self, at: MediaTime) -> Instant {
        self.begun + (at - self.origin).as_duration()
    }

    /// The media time that is due now.
    pub fn playhead(&self, now: Instant) -> MediaTime {
        let since = now.saturating_duration_since(self.begun);
        // Before the first due time this lies before the origin.
        self.origin + MediaTime::from_duration(since) - MediaTime::from_duration(self.delay)
    }

    /// Someone listens from now on: the delay moves gently.
    pub fn listen(&mut self, now: Instant) {
        self.free = false;
        self.adapted = now;
    }

    /// The time of the voice that leaves next.
    pub fn voice_at(&self) -> MediaTime {
        self.voice_at
    }

    /// Appends voice; contiguous with what came before.
    pub fn voice(&mut self, pcm: &Pcm) {
        let passed = self.owed.min(pcm.samples.len());
        self.owed -= passed;
        self.voice.extend(&pcm.samples[passed..]);
        while self.voice.len() > LONGEST_VOICE {
            self.voice.drain(..VOICE_FRAME);
            self.voice_at += MediaTime::from_units(VOICE_FRAME as i64, OPUS_RATE);
            self.stats.voice_gaps += 1;
        }
    }

    /// Takes the pictures of one block, made at `now`; times rise. Returns how long after its own time (without
    /// delay) the first one came: what the delay must cover; zero for pictures that make up for an interruption.
    pub fn block(&mut self, frames: Vec<Frame>, now: Instant) -> Duration {
        let Some(first) = frames.first() else { return Duration::ZERO };
        let needed = now.saturating_duration_since(self.bare(first.at));
        let counts = first.at >= self.counted;
        if counts {
            self.remember(needed, now);
        }
        let (waiting, mut late) = (self.frames.len(), VecDeque::new());
        for frame in frames {
            let passed = frame.at < self.slot || (frame.at == self.slot && self.slot_filled);
            let stale = frame.at < self.floor;
            let disorder = self.frames.back().is_some_and(|b| b.at >= frame.at);
            if stale {
                continue;
            }
            if passed && needed > self.most {
                late.push_back(frame);
            } else if passed || disorder || self.frames.len() >= MOST_FRAMES {
                self.skip();
            } else {
                self.frames.push_back(frame);
            }
        }
        // What this block replaces, and the beginning of one whose end is in time, is not shown any more.
        if !late.is_empty() && self.frames.len() == waiting {
            std::mem::swap(&mut self.belated, &mut late);
        }
        late.iter().for_each(|_| self.skip());
        if self.free {
            self.delay = self.wanted();
        }
        if counts { needed } else { Duration::ZERO }
    }

    /// Silences the voice before `until`, fading within 5 ms, and drops every picture that waits. Others are made for
    /// the time from `pictures` on; they are shown as soon as they are there.
    pub fn interrupt(&mut self, until: MediaTime, pictures: MediaTime) {
        self.floor = pictures;
        self.counted = self.counted.max(until);
        let old = (until - self.voice_at).units(OPUS_RATE).clamp(0, self.voice.len() as i64) as usize;
        let fade = 240;
        for (i, s) in self.voice.iter_mut().take(old).enumerate() {
            *s *= 1.0 - (i as f32 / fade as f32).min(1.0);
        }
        self.frames.clear();
        self.belated.clear();
    }

    /// What is due, one thing at a time; the voice first. `None`: come back at [`Playout::deadline`].
    pub fn poll(&mut self, now: Instant) -> Option<Due> {
        self.adapt(now);
        let voice_due = self.wall(self.voice_at);
        if voice_due <= now {
            return Some(self.next_voice(voice_due));
        }
        loop {
            while self.frames.front().is_some_and(|f| f.at < self.slot) {
                self.frames.pop_front();
                self.skip();
            }
            let (at, due) = (self.slot, self.wall(self.slot));
            if due > now {
                return None;
            }
            let end = at + self.frame_span;
            let ready = !self.slot_filled && self.frames.front().is_some_and(|f| f.at < end);
            if self.wall(end) > now {
                let frame = match ready {
                    true => {
                        let passed = std::mem::take(&mut self.belated);
                        passed.iter().for_each(|_| self.skip());
                        self.frames.pop_front()?
                    }
                    false if self.slot_filled => return None,
                    false => {
                        let frame = self.belated.pop_front()?;
                        self.stats.late += 1;
                        Frame { at, ..frame }
                    }
                };
                self.slot_filled = true;
                self.begun_showing = true;
                let late = now.saturating_duration_since(due) > Duration::from_millis(10);
                return Some(Due::Frame { frame, wall: due, late });
            }
            // The slot is over; the next one opens.
            self.slot = end;
            if std::mem::take(&mut self.slot_filled) {
                continue;
            }
            if ready {
                // The picture was there, but nobody asked in time.
                self.frames.pop_front();
                self.skip();
            }
            if self.begun_showing {
                self.stats.held += 1;
                return Some(Due::Held { at, wall: due });
            }
        }
    }

    /// A picture that is not shown. Before the first one was shown nothing counts: a beginning is not a stumble.
    fn skip(&mut self) {
        if self.begun_showing {
            self.stats.skipped += 1;
        }
    }

    /// When [`Playout::poll`] will have something, unless a block comes before.
    pub fn deadline(&self) -> Instant {
        let voice = self.wall(self.voice_at);
        let end = self.slot + self.frame_span;
        let ready = !self.slot_filled && (!self.belated.is_empty() || self.frames.front().is_some_and(|f| f.at < end));
        voice.min(self.wall(if ready { self.slot } else { end }))
    }

    /// Whether everything up to `until` was played.
    pub fn played(&self, until: MediaTime) -> bool {
        self.voice_at >= until
    }

    fn next_voice(&mut self, wall: Instant) -> Due {
        let at = self.voice_at;
        let have = self.voice.len().min(VOICE_FRAME);
        let mut samples: Vec<f32> = self.voice.drain(..have).collect();
        if have < VOICE_FRAME {
            self.stats.voice_gaps += 1;
            samples.resize(VOICE_FRAME, 0.0);
            // What is missing may still come; its time has passed then.
            self.owed += VOICE_FRAME - have;
        }
        self.voice_at += MediaTime::from_units(VOICE_FRAME as i64, OPUS_RATE);
        self.stats.voice_packets += 1;
        Due::Voice { at, wall, samples }
    }

    fn remember(&mut self, needed: Duration, now: Instant) {
        self.blocks += 1;
        if self.blocks == 3 {
            // The first two were made with cold caches and a look-ahead given at once: they say nothing.
            self.seconds.clear();
        }
        let second = now.saturating_duration_since(self.begun).as_secs();
        match self.seconds.back_mut() {
            Some((s, worst)) if *s == second => *worst = (*worst).max(needed),
            _ => self.seconds.push_back((second, needed)),
        }
        let remembered = if self.free { 2 } else { REMEMBERED };
        while self.seconds.len() > remembered {
            self.seconds.pop_front();
        }
    }

    fn wanted(&self) -> Duration {
        if self.seconds.is_empty() {
            return self.delay;
        }
        let mut worst: Vec<Duration> = self.seconds.iter().map(|s| s.1).collect();
        worst.sort_unstable_by(|a, b| b.cmp(a));
        let forgiven = worst.len() / FORGIVEN_SHARE;
        (worst[forgiven] + self.margin).clamp(self.least, self.most)
    }

    fn adapt(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.adapted).as_secs_f64();
        // In steps of 20 ms or more, so that a flood of polls costs nothing.
        if self.free || passed < 0.02 {
            return;
        }
        self.adapted = now;
        let passed = passed.min(1.0);
        let (wanted, silent) = (self.wanted(), self.silent());
        if wanted > self.delay {
            let step = if silent { wanted } else { Duration::from_secs_f64(GROW * passed) };
            self.delay += (wanted - self.delay).min(step);
        } else if self.delay - wanted > SLACK {
            let rate = if silent { SHRINK_SILENT } else { SHRINK };
            self.delay -= (self.delay - wanted).min(Duration::from_secs_f64(rate * passed));
        }
    }

    /// Whether the voice that leaves next is silence.
    fn silent(&self) -> bool {
        let n = self.voice.len().min(2 * VOICE_FRAME);
        self.voice.iter().take(n).map(|s| s * s).sum::<f32>() <= SILENCE * SILENCE * n as f32
    }
}
