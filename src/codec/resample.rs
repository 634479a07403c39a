//! Changing the sample rate by rubato: between fixed rates, and by the few parts per million two clocks differ.
//!
//! Why one decoder at 48 kHz and a resampler to 16 kHz, rather than two decoders: the presenter must hear exactly the
//! samples that are played back (same repairs, same drift correction, same time), concealment then runs once, and
//! 48 → 16 kHz costs 2 µs per 10 ms.

use super::CodecError;
use rubato::{
    Adjustable, Async, Fft, FixedAsync, FixedSync, Indexing, Resampler as _, SincInterpolationParameters,
    SincInterpolationType, WindowFunction, audioadapter_buffers::direct::InterleavedSlice,
};

/// Streaming mono resampler between two fixed rates. Its delay is taken out: output sample n belongs to the time of
/// input sample n × from / to.
pub struct Resampler {
    /// `None` when the rates are equal.
    inner: Option<Fft<f32>>,
    from: u32,
    to: u32,
    pending: Vec<f32>,
    /// Output samples of the filter's delay still to drop.
    skip: usize,
    taken: u64,
    given: u64,
}

impl Resampler {
    pub fn new(from: u32, to: u32) -> Result<Self, CodecError> {
        let mut this = Resampler { inner: None, from, to, pending: Vec::new(), skip: 0, taken: 0, given: 0 };
        if from != to {
            let why = |why: String| CodecError::Resample { from, to, why };
            if from == 0 || to == 0 {
                return Err(why("a sample rate cannot be zero".into()));
            }
            // About 10 ms a chunk: 5 ms of delay for the common rates. An odd block would be half a sample off.
            let unit = from / gcd(from, to);
            let mut chunk = (from / 100).div_ceil(unit).max(1) * unit;
            if chunk % 2 != 0 {
                chunk = chunk.checked_mul(2).ok_or_else(|| why("the rates have too little in common".into()))?;
            }
            if chunk > 1 << 20 {
                return Err(why("the rates have too little in common".into()));
            }
            let window = WindowFunction::BlackmanHarris2;
            let fft = Fft::new_custom(from as usize, to as usize, chunk as usize, 1, 1, window, FixedSync::Both)
                .map_err(|e| why(e.to_string()))?;
            this.skip = fft.output_delay();
            this.inner = Some(fft);
        }
        Ok(this)
    }

    /// Takes any number of samples, gives what is ready.
    pub fn push(&mut self, samples: &[f32]) -> Result<Vec<f32>, CodecError> {
        self.taken += samples.len() as u64;
        let mut out = Vec::new();
        if self.inner.is_none() {
            self.given += samples.len() as u64;
            out.extend_from_slice(samples);
            return Ok(out);
        }
        self.pending.extend_from_slice(samples);
        self.drain(&mut out)?;
        self.given += out.len() as u64;
        Ok(out)
    }

    /// The rest: after this, exactly `round(taken × to / from)` samples were given in all.
    pub fn finish(&mut self) -> Result<Vec<f32>, CodecError> {
        let total = (self.taken * u64::from(self.to) + u64::from(self.from) / 2) / u64::from(self.from);
        let mut out = Vec::new();
        while self.given + (out.len() as u64) < total {
            let Some(fft) = self.inner.as_ref() else { break };
            let want = fft.input_frames_next();
            self.pending.resize(want, 0.0);
            self.drain(&mut out)?;
        }
        out.truncate((total - self.given) as usize);
        self.given += out.len() as u64;
        Ok(out)
    }

    fn drain(&mut self, out: &mut Vec<f32>) -> Result<(), CodecError> {
        let (from, to) = (self.from, self.to);
        let Some(fft) = self.inner.as_mut() else { return Ok(()) };
        let mut used = 0;
        loop {
            let want = fft.input_frames_next();
            if self.pending.len() - used < want {
                break;
            }
            let chunk =
                step(fft, &self.pending[used..used + want]).map_err(|why| CodecError::Resample { from, to, why })?;
            used += want;
            let drop = self.skip.min(chunk.len());
            self.skip -= drop;
            out.extend_from_slice(&chunk[drop..]);
        }
        self.pending.drain(..used);
        Ok(())
    }
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Stretches or squeezes by parts per million, to follow another machine's clock. Same nominal rate in and out.
pub struct DriftResampler {
    inner: Async<f32>,
    rate: u32,
    ppm: f64,
    pending: Vec<f32>,
}

/// The widest correction, parts per million. Clocks of sound cards differ by less than 300; the rest is for catching
/// up, and 2 000 (3.5 cents) is still below what an ear notices in speech.
pub const WIDEST_PPM: f64 = 2_000.0;

/// Input samples per step: 5 ms at 48 kHz.
const DRIFT_CHUNK: usize = 240;

impl DriftResampler {
    pub fn new(rate: u32) -> Result<Self, CodecError> {
        let parameters = SincInterpolationParameters::new(64, WindowFunction::BlackmanHarris2)
            .oversampling_factor(128)
            .interpolation(SincInterpolationType::Cubic);
        let span = 1.0 + 2.0 * WIDEST_PPM * 1e-6;
        let inner = Async::new_sinc(1.0, span, &parameters, DRIFT_CHUNK, 1, FixedAsync::Input)
            .map_err(|e| CodecError::Resample { from: rate, to: rate, why: e.to_string() })?;
        Ok(DriftResampler { inner, rate, ppm: 0.0, pending: Vec::new() })
    }

    /// Samples by which the output trails the input (half the filter).
    pub fn delay(&self) -> usize {
        self.inner.output_delay()
    }

    /// Samples taken but not yet processed.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Positive: more samples out than in (the sender's clock is slow). Ramps, so no click. Clamped to ±[`WIDEST_PPM`].
    pub fn set_ppm(&mut self, ppm: f64) -> Result<(), CodecError> {
        let ppm = if ppm.is_finite() { ppm.clamp(-WIDEST_PPM, WIDEST_PPM) } else { 0.0 };
        if ppm == self.ppm {
            return Ok(());
        }
        self.ppm = ppm;
        let rate = self.rate;
        self.inner.set_resample_ratio(1.0 + ppm * 1e-6, true).map_err(|e| CodecError::Resample {
            from: rate,
            to: rate,
            why: e.to_string(),
        })
    }

    pub fn ppm(&self) -> f64 {
        self.ppm
    }

    /// Takes any number of samples, gives what is ready (steps of 5 ms).
    pub fn push(&mut self, samples: &[f32]) -> Result<Vec<f32>, CodecError> {
        self.pending.extend_from_slice(samples);
        let (mut out, mut used) = (Vec::new(), 0);
        while self.pending.len() - used >= self.inner.input_frames_next() {
            let want = self.inner.input_frames_next();
            let chunk = step(&mut self.inner, &self.pending[used..used + want])
                .map_err(|why| CodecError::Resample { from: self.rate, to: self.rate, why })?;
            used += want;
            out.extend_from_slice(&chunk);
        }
        self.pending.drain(..used);
        Ok(out)
    }
}

/// One chunk through any rubato resampler, mono.
fn step(resampler: &mut dyn rubato::Resampler<f32>, input: &[f32]) -> Result<Vec<f32>, String> {
    let room = resampler.output_frames_next();
    let mut out = vec![0.0; room];
    let source = InterleavedSlice::new(input, 1, input.len()).map_err(|e| e.to_string())?;
    let mut sink = InterleavedSlice::new_mut(&mut out, 1, room).map_err(|e| e.to_string())?;
    let (_, n) = resampler.process_into_buffer(&source, &mut sink, None::<&Indexing>).map_err(|e| e.to_string())?;
    out.truncate(n);
    Ok(out)
}
