//! The mouth of every stream: checks that speech continues, makes bad samples harmless, counts frames.

use super::{AvatarError, Result};
use crate::media::{AudioBlock, Geometry, MediaTime, SPEECH_RATE};

/// Where a stream stands: origin, samples taken, and how many blocks they are enough for.
#[derive(Clone, Debug, Default)]
pub struct Intake {
    origin: Option<MediaTime>,
    samples: u64,
    repaired: u64,
    finished: bool,
}

impl Intake {
    /// Appends `audio` to `into`, with every NaN or infinity replaced by zero (and counted) and the rest clamped to
    /// −1..1. Audio after [`Intake::finish`] or with a gap is refused.
    pub fn take(&mut self, audio: &AudioBlock, into: &mut Vec<f32>) -> Result<()> {
        if self.finished {
            return Err(AvatarError::Ended);
        }
        let want = self.end().unwrap_or(audio.at);
        if want != audio.at {
            let (got_ms, want_ms) = (audio.at.as_millis_f64(), want.as_millis_f64());
            return Err(AvatarError::Discontinuous { got_ms, want_ms });
        }
        self.origin.get_or_insert(audio.at);
        self.samples += audio.samples.len() as u64;
        into.reserve(audio.samples.len());
        for &s in &audio.samples {
            let bad = !s.is_finite();
            self.repaired += u64::from(bad);
            into.push(if bad { 0.0 } else { s.clamp(-1.0, 1.0) });
        }
        Ok(())
    }

    /// Forgets what came after the first `samples`.
    pub fn rewind(&mut self, samples: u64) {
        self.samples = self.samples.min(samples);
    }

    /// No more speech will come.
    pub fn finish(&mut self) {
        self.finished = true;
    }
    pub fn is_finished(&self) -> bool {
        self.finished
    }
    /// Samples taken so far, at 16 kHz.
    pub fn samples(&self) -> u64 {
        self.samples
    }
    /// Samples that were not numbers and became zero.
    pub fn repaired(&self) -> u64 {
        self.repaired
    }
    /// Time of the first sample; zero before any came.
    pub fn origin(&self) -> MediaTime {
        self.origin.unwrap_or_default()
    }
    fn end(&self) -> Option<MediaTime> {
        self.origin.map(|o| o + MediaTime::from_units(self.samples as i64, SPEECH_RATE))
    }
    /// Video frames that the speech taken so far touches.
    pub fn frames(&self, fps: u32) -> u64 {
        (self.samples * u64::from(fps)).div_ceil(u64::from(SPEECH_RATE))
    }

    /// Whether block `index` may be made: its speech and look-ahead are here, or speech ended and it has a frame left.
    pub fn allows(&self, geometry: &Geometry, index: u64) -> bool {
        if self.finished {
            return geometry.first_frame(index) < self.frames(geometry.fps);
        }
        let end = MediaTime::from_units(geometry.first_frame(index + 1) as i64, geometry.fps) + geometry.look_ahead;
        MediaTime::from_units(self.samples as i64, SPEECH_RATE) >= end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn audio(at_samples: i64, samples: Vec<f32>) -> AudioBlock {
        AudioBlock { at: MediaTime::from_units(at_samples, SPEECH_RATE), samples }
    }

    #[test]
    fn samples_that_are_not_numbers_become_silence_and_are_counted() {
        let mut intake = Intake::default();
        let mut out = Vec::new();
        intake.take(&audio(7, vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3.0, -0.5]), &mut out).unwrap();
        assert_eq!(out, [0.0, 0.0, 0.0, 1.0, -0.5]);
        assert_eq!(intake.repaired(), 3);
        assert_eq!(intake.origin(), MediaTime::from_units(7, SPEECH_RATE));
    }

    #[test]
    fn a_gap_or_late_speech_is_refused() {
        let mut intake = Intake::default();
        let mut out = Vec::new();
        intake.take(&audio(0, vec![0.0; 10]), &mut out).unwrap();
        assert!(intake.take(&audio(11, vec![0.0; 10]), &mut out).is_err());
        assert!(intake.take(&audio(10, vec![0.0; 10]), &mut out).is_ok());
        intake.finish();
        assert!(intake.take(&audio(20, vec![0.0; 10]), &mut out).is_err());
        assert_eq!(out.len(), 20, "refused audio leaves no trace");
    }
}
