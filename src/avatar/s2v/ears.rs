//! Hearing a voice while it is spoken: wav2vec2 on sliding windows instead of a whole file.
//!
//! ```text
//!            context            frames asked for      look-ahead
//!  ├───────────────────────────┼────────────────────┼────────────┤   one pass of wav2vec2
//! ```
//!
//! Where a window lies depends on the frames alone, never on how the speech was cut, so that a stream hears the same
//! however it is fed. Two things differ from the official whole-file pass (wan/modules/s2v/audio_encoder.py of
//! Wan-Video/Wan2.2 at 42bf4cf), because they need the end of the file:
//!
//! * Normalisation. The file is brought to zero mean and unit variance as a whole. Doing that for every window by itself
//!   would make a pause as loud as speech. Here mean and variance are those of everything heard up to the window's end,
//!   which grow into the whole file's; a second of speech of ordinary loudness is counted in from the start, so that
//!   the first breath is not blown up either.
//! * Rate. 50 states a second become 30 by interpolation with aligned corners, which stretches a file by up to two
//!   thirds of a state (13 ms); here a state's time is its own.

use candle_core::{DType, Device, Tensor};

use crate::{
    media::SPEECH_RATE,
    model::{
        At, Error, Result,
        vae::quiet,
        wav2vec2::{
            Wav2Vec2,
            features::{self, FEATURE_RATE, SOURCE_RATE},
        },
    },
};

/// Samples between two states of wav2vec2.
const STRIDE: u64 = SPEECH_RATE as u64 / SOURCE_RATE as u64;
/// Samples that one state sees; the least that must lie beyond the last frame asked for.
pub const LEAST_AHEAD: usize = 400;
/// The speech that is counted in from the start: how many samples, and their mean square (−26 dB).
const PRIOR: (f64, f64) = (SPEECH_RATE as f64, 0.0025);

/// How far a window reaches, in samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Before the first frame asked for.
    pub context: usize,
    /// Beyond the last one; at least [`LEAST_AHEAD`].
    pub ahead: usize,
    pub normalise: Normalise,
}

/// What a window's loudness is held against.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Normalise {
    /// Everything heard up to its end.
    #[default]
    Running,
    /// Itself: only to see what that does.
    Window,
}

impl Reach {
    /// From milliseconds.
    pub fn from_millis(context: u32, ahead: u32) -> Reach {
        let samples = |ms: u32| ms as usize * SPEECH_RATE as usize / 1000;
        Reach { context: samples(context), ahead: samples(ahead).max(LEAST_AHEAD), normalise: Normalise::Running }
    }
}

/// How loud it was so far.
#[derive(Clone, Debug, Default)]
struct Loudness {
    samples: f64,
    sum: f64,
    squares: f64,
}

impl Loudness {
    fn hear(&mut self, speech: &[f32]) {
        self.samples += speech.len() as f64;
        for &s in speech {
            self.sum += f64::from(s);
            self.squares += f64::from(s) * f64::from(s);
        }
    }

    fn normalise(&self, speech: &[f32]) -> Vec<f32> {
        let n = self.samples + PRIOR.0;
        let mean = self.sum / n;
        let variance = (self.squares + PRIOR.0 * PRIOR.1) / n - mean * mean;
        let scale = 1.0 / (variance + 1e-7).sqrt();
        speech.iter().map(|&s| ((f64::from(s) - mean) * scale) as f32).collect()
    }
}

/// What one face has heard and still needs.
#[derive(Clone, Debug)]
pub struct Ears {
    reach: Reach,
    fps: u32,
    /// Speech that windows to come may reach.
    speech: Vec<f32>,
    /// Place of its first sample.
    start: u64,
    loudness: Loudness,
    /// Samples that are counted in the loudness.
    counted: u64,
}

impl Ears {
    /// `lead` samples of silence come before the speech.
    pub fn new(reach: Reach, fps: u32, lead: usize) -> Ears {
        let loudness = Loudness::default();
        Ears { reach, fps, speech: vec![0.0; lead], start: 0, loudness, counted: 0 }
    }

    /// More speech, 16 kHz.
    pub fn push(&mut self, speech: &[f32]) {
        self.speech.extend_from_slice(speech);
    }

    /// Samples held: bounded by a window and what was pushed ahead.
    pub fn held(&self) -> usize {
        self.speech.len()
    }

    fn sample_of(&self, frame: u64) -> u64 {
        frame * u64::from(SPEECH_RATE) / u64::from(self.fps)
    }

    /// Features of `frames` video frames from `first` on, `[layers, channels, frames]`, f32. Frames are asked for in order
    /// and once; speech that is not there is silence.
    pub fn listen(&mut self, hearing: &Wav2Vec2, device: &Device, first: u64, frames: usize) -> Result<Tensor> {
        let begin = self.sample_of(first).saturating_sub(self.reach.context as u64) / STRIDE * STRIDE;
        let end = self.sample_of(first + frames as u64) + self.reach.ahead as u64;
        if begin < self.start {
            return Err(Error::Input(format!("frame {first} was heard already; frames are heard in order")));
        }
        let have = self.start + self.speech.len() as u64;
        if have < end {
            self.speech.resize(self.speech.len() + (end - have) as usize, 0.0);
        }
        let at = |sample: u64| (sample - self.start) as usize;
        if end > self.counted {
            self.loudness.hear(&self.speech[at(self.counted)..at(end)]);
        }
        let window = &self.speech[at(begin)..at(end)];
        let window = match self.reach.normalise {
            Normalise::Running => self.loudness.normalise(window),
            Normalise::Window => features::normalise(window),
        };
        self.counted = self.counted.max(end);
        let states = states(hearing, device, window)?;
        let heard = per_frame(&states, self.fps, first, frames, begin / STRIDE).at(|| "hearing")?;
        // Nothing before the next window is needed any more, but what is not yet counted stays.
        let next = self.sample_of(first + frames as u64).saturating_sub(self.reach.context as u64) / STRIDE * STRIDE;
        let next = next.min(self.counted).max(self.start);
        self.speech.drain(..(next - self.start) as usize);
        self.start = next;
        Ok(heard)
    }
}

/// All hidden states of normalised samples, `[layers, states, channels]`, f32.
fn states(hearing: &Wav2Vec2, device: &Device, samples: Vec<f32>) -> Result<Tensor> {
    let samples = Tensor::new(samples, device)?;
    Ok(hearing.hidden_states(&samples, &mut quiet)?.to_dtype(DType::F32)?)
}

/// The states that video frames show: frame → nearest of 30 a second (half to even) → between two states. `before`
/// states lie before the ones given.
fn per_frame(states: &Tensor, fps: u32, first: u64, frames: usize, before: u64) -> Result<Tensor> {
    let last = states.dim(1)?.saturating_sub(1);
    let (mut low, mut high, mut part) = (Vec::new(), Vec::new(), Vec::new());
    for frame in first..first + frames as u64 {
        let at = (frame as f64 / f64::from(fps) * FEATURE_RATE).round_ties_even() * SOURCE_RATE / FEATURE_RATE;
        let within = at - before as f64;
        let whole = (within.max(0.0) as usize).min(last);
        low.push(whole as u32);
        high.push((whole + 1).min(last) as u32);
        part.push((within - whole as f64).clamp(0.0, 1.0) as f32);
    }
    let device = states.device();
    let part = Tensor::from_vec(part, (1, frames, 1), device)?;
    let low = states.index_select(&Tensor::new(low, device)?, 1)?.broadcast_mul(&part.affine(-1.0, 1.0)?)?;
    let high = states.index_select(&Tensor::new(high, device)?, 1)?.broadcast_mul(&part)?;
    Ok((low + high)?.transpose(1, 2)?.contiguous()?)
}

/// Features of a whole voice at once, as [`Ears`] would give them if windows had no ends: what windows are held against.
/// `[layers, channels, frames]`.
pub fn whole(hearing: &Wav2Vec2, device: &Device, speech: &[f32], fps: u32) -> Result<Tensor> {
    let states = states(hearing, device, features::normalise(speech))?;
    let frames = (speech.len() as u64 * u64::from(fps) / u64::from(SPEECH_RATE)) as usize;
    per_frame(&states, fps, 0, frames, 0)
}

/// Features `[layers, channels, frames]` as the commands see them.
pub type Features = Tensor;

/// Their numbers, `[layers][channels][frames]`.
pub fn numbers(features: &Features) -> Result<Vec<Vec<Vec<f32>>>> {
    Ok(features.to_vec3()?)
}
