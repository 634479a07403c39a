//! Where an interruption cuts a stream: relabels speech and pictures so that a session may go on from another time
//! while the stream itself knows no gap. Pure.

use crate::media::{AudioBlock, Epoch, FrameBlock, MediaTime, SPEECH_RATE};

/// The seam between a session's timeline and its stream's.
#[derive(Clone, Debug, Default)]
pub struct Splice {
    epoch: Epoch,
    /// Time of the stream's first sample, and samples since.
    base: Option<MediaTime>,
    samples: u64,
    /// The session's time is this much ahead of the stream's.
    shift: MediaTime,
    /// Pictures before this time of the stream show what was interrupted.
    seam: MediaTime,
    /// The next speech is the first of its epoch: its time is where the session goes on.
    fresh: bool,
}

impl Splice {
    /// Before a stream that begins in this epoch.
    pub fn begun(epoch: Epoch) -> Splice {
        Splice { epoch, ..Splice::default() }
    }

    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Samples that the stream has and will make pictures of.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// A new epoch. `kept`: samples that the stream still counts when it could forget the rest
    /// ([`Stream::cut`](crate::avatar::Stream::cut)); `None` when it could not, and its pictures of them are stale.
    pub fn raise(&mut self, epoch: Epoch, kept: Option<u64>) {
        self.epoch = epoch;
        self.samples = kept.unwrap_or(self.samples);
        self.seam = self.end();
        self.fresh = true;
    }

    /// Speech of the current epoch, as the stream must be given it.
    pub fn audio(&mut self, mut audio: AudioBlock) -> AudioBlock {
        if self.base.is_none() {
            self.base = Some(audio.at);
            self.seam = audio.at;
        }
        if std::mem::take(&mut self.fresh) {
            self.shift = audio.at - self.end();
        }
        audio.at = audio.at - self.shift;
        self.samples += audio.samples.len() as u64;
        audio
    }

    /// A block of the stream, as the session must be given it: without stale pictures, perhaps without any.
    pub fn block(&self, block: &mut FrameBlock) {
        block.epoch = self.epoch;
        block.frames.retain(|f| f.at >= self.seam);
        block.frames.iter_mut().for_each(|f| f.at += self.shift);
    }

    fn end(&self) -> MediaTime {
        self.base.unwrap_or_default() + MediaTime::from_units(self.samples as i64, SPEECH_RATE)
    }
}
