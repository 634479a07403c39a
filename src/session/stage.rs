//! The timeline of a conversation once a face is there: speech on its way to the engine, pictures on their way back, and
//! where one of them leaves something out. Pure.

use super::{Ingest, Playout};
use crate::media::{Geometry, MediaTime, SPEECH_RATE};
use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// The part that exists once the engine has opened its lane.
pub(super) struct Stage {
    pub(super) ingest: Ingest,
    pub(super) playout: Playout,
    /// 16 kHz speech for the engine; `feed_at` is the stream time of its first sample.
    pub(super) feed: VecDeque<f32>,
    pub(super) feed_at: MediaTime,
    /// Stream time up to which pictures have come back.
    pub(super) received: MediaTime,
    /// Blocks come so late that every one must be of the newest speech.
    pub(super) late: bool,
    /// Samples of speech that may wait for the engine: [`Stage::most_patience`] until that is not enough, then less and
    /// less, until the engine takes whatever there is.
    pub(super) patience: usize,
    /// Something was left out since the last block came.
    pub(super) short: bool,
    /// Stream time from which media time is this much ahead of it: speech that was skipped.
    pub(super) skips: Vec<(MediaTime, MediaTime)>,
    /// Another face says what is heard from this media time on; speech before it is not handed over any more.
    pub(super) face_from: Option<MediaTime>,
    /// The first picture from this media time on shows another face.
    pub(super) cut_at: Option<MediaTime>,
    pub(super) origin: MediaTime,
    pub(super) shown: bool,
}

impl Stage {
    pub(super) fn skipped(&self) -> MediaTime {
        self.skips.last().map_or(MediaTime::ZERO, |s| s.1)
    }
    /// An interruption. The time between what is played now and what is heard now is made once more, from silence, and
    /// pictures of it are shown from the first moment at which they can be there.
    pub(super) fn begin_anew(&mut self, making: Duration, span: MediaTime, fps: u32, now: Instant) {
        let head = self.ingest.head();
        let end = self.media(self.feed_at) + MediaTime::from_units(self.feed.len() as i64, SPEECH_RATE);
        let soonest = self.playout.playhead(now) + MediaTime::from_duration(making);
        // On the grid of the pictures, and not after the speech that is there.
        let slots = (soonest - self.origin).units(fps) + 1;
        let most = (end - self.origin).units(fps);
        let from = self.origin + MediaTime::from_ticks(span.ticks() * slots.min(most).max(0));
        self.playout.interrupt(head, from);
        self.ingest.hush();
        self.feed.clear();
        self.feed.resize((end - from).units(SPEECH_RATE).max(0) as usize, 0.0);
        (self.feed_at, self.received) = (from, from);
        self.skips.clear();
        if self.face_from.take().is_some() {
            self.cut_at = Some(from);
        }
    }
    /// Blocks of speech that may wait for an engine that may yet catch up.
    pub(super) fn most_patience(geometry: &Geometry) -> usize {
        4 * geometry.block_span(1).units(SPEECH_RATE).max(1) as usize
    }
    /// One block and a grain of speech, and the grain: the fewest pictures that are a whole number of samples.
    fn least_patience(geometry: &Geometry) -> (usize, usize) {
        let grain = (SPEECH_RATE / common_divisor(SPEECH_RATE, geometry.fps)) as usize;
        (geometry.block_span(1).units(SPEECH_RATE).max(1) as usize + grain, grain)
    }
    /// Bounds the speech that waits for an engine that is too slow: the oldest is left out, a few pictures' worth at a
    /// time, so that the engine loses the share it cannot make and no more. One whole block always waits: it never
    /// stands idle. Returns the samples left out.
    pub(super) fn keep_up(&mut self, geometry: &Geometry) -> usize {
        let (_, grain) = Stage::least_patience(geometry);
        let over = self.feed.len().saturating_sub(self.patience) / grain * grain;
        if over > 0 {
            self.skip(over);
            self.short = true;
        }
        over
    }
    /// A block came: where speech is left out, what waits for nothing but its turn is delay. Less of it, gently.
    pub(super) fn came(&mut self, geometry: &Geometry) {
        let (least, grain) = Stage::least_patience(geometry);
        let less = match (self.late, std::mem::take(&mut self.short)) {
            (true, _) => 3 * grain,
            (false, short) => grain * usize::from(short),
        };
        self.patience = self.patience.saturating_sub(less).max(least);
    }
    /// Speech at the head of the feed that the engine does not get.
    pub(super) fn skip(&mut self, samples: usize) {
        self.feed.drain(..samples);
        let ahead = self.skipped() + MediaTime::from_units(samples as i64, SPEECH_RATE);
        match self.skips.last_mut() {
            Some(last) if last.0 == self.feed_at => last.1 = ahead,
            _ => self.skips.push((self.feed_at, ahead)),
        }
        if self.skips.len() > 64 {
            self.skips.remove(0);
        }
    }
    /// Another face takes over: with the first picture that can be there in time, not with what it would say too late.
    pub(super) fn change_face(&mut self, making: Duration, span: MediaTime, fps: u32, now: Instant) {
        let soonest = self.playout.playhead(now) + MediaTime::from_duration(making);
        let slots = (soonest.max(self.media(self.feed_at)) - self.origin).units(fps) + 1;
        self.face_from = Some(self.origin + MediaTime::from_ticks(span.ticks() * slots.max(0)));
    }
    /// Leaves out speech before [`Stage::face_from`]; whether the feed may go on.
    pub(super) fn reached_face(&mut self) -> bool {
        let Some(from) = self.face_from else { return true };
        let early = (from - self.media(self.feed_at)).units(SPEECH_RATE).max(0) as usize;
        let now = early.min(self.feed.len());
        if now > 0 {
            self.skip(now);
        }
        if now == early {
            // What the old face had in hand does not come any more.
            self.received = self.feed_at;
            self.cut_at = self.face_from.take();
        }
        now == early
    }
    pub(super) fn media(&self, stream: MediaTime) -> MediaTime {
        let after = self.skips.partition_point(|s| s.0 <= stream);
        stream + after.checked_sub(1).map_or(MediaTime::ZERO, |i| self.skips[i].1)
    }
}

fn common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { common_divisor(b, a % b) }
}
