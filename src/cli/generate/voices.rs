//! The voices of one video, read in step: speech for the model, speaker by speaker, and their sum for the ear.

use crate::{
    codec::audio_file::{self, AudioFileError, Limits, Source, SpeechFile, VOICE_RATE},
    media::{AudioBlock, MediaTime, SPEECH_RATE},
};
use std::path::PathBuf;

/// Read at a time, in samples of each rate: half a second.
const STEP: (usize, usize) = (SPEECH_RATE as usize / 2, VOICE_RATE as usize / 2);

/// One speaker's file, and what of it was read and not given yet.
struct Voice {
    file: SpeechFile,
    speech: Vec<f32>,
    heard: Vec<f32>,
    ended: bool,
}

/// All speakers' files. Who falls silent before the longest has ended is silent, not absent.
pub(super) struct Voices {
    voices: Vec<Voice>,
    /// Samples that are still to come, of either rate.
    left: (usize, usize),
    given: usize,
}

/// A stretch of all voices.
pub(super) struct Stretch {
    /// 16 kHz, one per speaker, of equal length.
    pub(super) speech: Vec<AudioBlock>,
    /// 48 kHz, all together.
    pub(super) voice: Vec<f32>,
}

/// Length of the longest of the files and what is wrong with some of them.
///
/// # Errors
/// One cannot be used.
pub(super) fn scan(paths: &[PathBuf], limits: &Limits) -> Result<(MediaTime, Vec<String>), AudioFileError> {
    let (mut length, mut warnings) = (MediaTime::ZERO, Vec::new());
    for path in paths {
        let summary = audio_file::scan(&Source::from(path.as_path()), limits)?;
        length = length.max(summary.length);
        warnings.extend(summary.warnings.iter().map(ToString::to_string));
    }
    Ok((length, warnings))
}

impl Voices {
    /// The first `length` of the files.
    pub(super) fn open(paths: &[PathBuf], length: MediaTime) -> Result<Voices, AudioFileError> {
        let open = |path: &PathBuf| {
            let file = SpeechFile::open(&Source::from(path.as_path()))?;
            Ok(Voice { file, speech: Vec::new(), heard: Vec::new(), ended: false })
        };
        let samples = |rate: u32| if paths.is_empty() { 0 } else { length.units(rate).max(0) as usize };
        Ok(Voices {
            voices: paths.iter().map(open).collect::<Result<_, AudioFileError>>()?,
            left: (samples(SPEECH_RATE), samples(VOICE_RATE)),
            given: 0,
        })
    }

    /// The next stretch; `None` at the end.
    pub(super) fn read(&mut self) -> Result<Option<Stretch>, AudioFileError> {
        if self.left == (0, 0) {
            return Ok(None);
        }
        // The last stretch takes what rounding left over.
        let last = self.left.0 <= STEP.0 || self.left.1 <= STEP.1;
        let (speech, heard) = if last { self.left } else { STEP };
        self.left = (self.left.0 - speech, self.left.1 - heard);
        let at = MediaTime::from_units(self.given as i64, SPEECH_RATE);
        self.given += speech;
        let mut stretch = Stretch { speech: Vec::new(), voice: vec![0.0; heard] };
        for voice in &mut self.voices {
            let samples = voice.take(speech, heard, &mut stretch.voice)?;
            stretch.speech.push(AudioBlock { at, samples });
        }
        Ok(Some(stretch))
    }
}

impl Voice {
    /// So many samples of speech; as many of the voice are added to `sum`.
    fn take(&mut self, speech: usize, heard: usize, sum: &mut [f32]) -> Result<Vec<f32>, AudioFileError> {
        while !self.ended && (self.speech.len() < speech || self.heard.len() < heard) {
            match self.file.read()? {
                Some(part) => {
                    self.speech.extend(part.speech.samples);
                    self.heard.extend(part.voice.samples);
                }
                None => self.ended = true,
            }
        }
        let heard = heard.min(self.heard.len());
        sum.iter_mut().zip(self.heard.drain(..heard)).for_each(|(sum, v)| *sum += v);
        let mut samples: Vec<f32> = self.speech.drain(..speech.min(self.speech.len())).collect();
        samples.resize(speech, 0.0);
        Ok(samples)
    }
}
