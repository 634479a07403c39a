//! What of a conversation is sent on when it is due: the voice always, pictures where somebody watches and the line has
//! room, a keyframe where one was asked for, the portrait until the presenter moves.

use super::{Conversation, Effect};
use crate::{
    codec::CodecError,
    media::MediaTime,
    session::{EncodedAudio, Job, Picture, fan::CONGESTED, playout::Due},
};
use bytes::Bytes;
use std::time::{Duration, Instant};

impl Conversation {
    /// From now on somebody watches: what was held or skipped before does not count.
    pub(super) fn begin_showing(&mut self, now: Instant) {
        if let Some(stage) = &mut self.stage {
            stage.playout.listen(now);
            let so_far = stage.playout.stats();
            self.before = (so_far.held, so_far.skipped);
        }
    }

    /// A picture for somebody who may have none: at once, as a keyframe.
    pub fn want_keyframe(&mut self) {
        self.want_keyframe = true;
    }

    pub(super) fn play(&mut self, now: Instant) -> Result<(), CodecError> {
        let flowing = self.flowing();
        while let Some(due) = self.stage.as_mut().and_then(|s| s.playout.poll(now)) {
            match due {
                Due::Voice { at, wall, samples } => {
                    let played = self.ledger.played(at + MediaTime::from_millis(20));
                    self.effects.extend(played.into_iter().map(Effect::Tell));
                    if flowing {
                        let data = Bytes::from(self.voice.encode(&samples)?);
                        let duration = MediaTime::from_millis(20);
                        self.effects.push_back(Effect::Voice(EncodedAudio { at, duration, data }, wall));
                    }
                }
                Due::Frame { frame, wall, .. } => {
                    if let Some(stage) = &mut self.stage {
                        stage.shown = true;
                        if stage.cut_at.take_if(|at| frame.at >= *at).is_some() {
                            // Another face: cheaper whole than as changes, and clear at once.
                            self.want_keyframe = true;
                        }
                    }
                    let thinned = (frame.at.units(self.geometry.fps) as u64) % u64::from(self.ladder.rung().every) != 0;
                    self.last_picture = Some(frame.clone());
                    if !flowing || (thinned && !self.want_keyframe) {
                        continue;
                    }
                    if self.line.queue > CONGESTED && !self.want_keyframe {
                        self.congested += 1;
                        continue;
                    }
                    let at = frame.at;
                    self.show(Picture::Rgb(frame), at, wall, now);
                }
                Due::Held { at, wall } => {
                    // Nothing new, but a viewer who cannot decode needs the old one afresh.
                    if let Some(frame) = self.last_picture.clone().filter(|_| flowing && self.keyframe_due(now)) {
                        self.show(Picture::Rgb(frame), at, wall, now);
                    }
                }
            }
        }
        if flowing && self.keyframe_due(now) && !self.stage.as_ref().is_some_and(|s| s.shown) {
            self.show_portrait(now);
        }
        Ok(())
    }

    fn keyframe_due(&self, now: Instant) -> bool {
        self.want_keyframe && now >= self.keyframe_allowed
    }

    pub(super) fn show_portrait(&mut self, now: Instant) {
        let Some(planes) = self.portrait.clone() else { return };
        // Before the timeline begins; its first picture comes later than this.
        let latest = self.stage.as_ref().map(|s| s.origin - MediaTime::from_millis(20));
        let at = self.elapsed(now).min(latest.unwrap_or(self.elapsed(now)));
        self.show(Picture::Planes(planes), at, now, now);
    }

    pub(super) fn show(&mut self, picture: Picture, at: MediaTime, wall: Instant, now: Instant) {
        if self.keyframe_due(now) {
            self.want_keyframe = false;
            self.keyframe_allowed = now + Duration::from_millis(u64::from(self.config.keyframe_spacing_ms));
            self.effects.push_back(Effect::Keyframe);
        }
        // Times on the wire rise; a repeated picture comes one unit of the 90 kHz clock later.
        let at = if at > self.last_at { at } else { self.last_at + MediaTime::from_units(1, 90_000) };
        self.last_at = at;
        let duration = self.geometry.frame_span();
        let spoken = self.stage.as_ref().and_then(|s| s.ingest.spoken(at));
        self.effects.push_back(Effect::Show(Job {
            picture,
            at,
            duration,
            wall,
            rung: self.ladder.rung(),
            fps: self.ladder.fps(),
            bitrate: self.ladder.bitrate(),
            max_bitrate: self.ladder.most(),
            spoken,
        }));
    }
}
