//! Sound as it travels between rooms: mono, `f32` in −1..1.

use super::MediaTime;

/// Sample rate of the speech the models listen to.
pub const SPEECH_RATE: u32 = 16_000;

/// Mono PCM at any rate.
#[derive(Clone, Debug)]
pub struct Pcm {
    /// Time of the first sample.
    pub at: MediaTime,
    /// Samples per second.
    pub rate: u32,
    pub samples: Vec<f32>,
}

impl Pcm {
    /// Time just after the last sample.
    pub fn end(&self) -> MediaTime {
        self.at + MediaTime::from_units(self.samples.len() as i64, self.rate)
    }
}

/// A stretch of speech for a generator: mono 16 kHz ([`SPEECH_RATE`]), any length.
/// Consecutive blocks of one stream are contiguous: `at` equals the end of the block before.
#[derive(Clone, Debug)]
pub struct AudioBlock {
    pub at: MediaTime,
    pub samples: Vec<f32>,
}

impl AudioBlock {
    pub fn end(&self) -> MediaTime {
        self.at + MediaTime::from_units(self.samples.len() as i64, SPEECH_RATE)
    }
}
