//! Log-mel spectrogram, one frame at a time: 16 kHz, window 512, hop 320 (50 frames a second), 64 bands.
//!
//! Frame `i` is centred on sample `320 i + 160`; the stream is zero outside itself. Values are
//! `clamp(log10(filters · power + 1e-8) + 8, 0, 11)`.

use realfft::{RealFftPlanner, RealToComplex, num_complex::Complex};
use std::{collections::VecDeque, sync::Arc};

/// Bands of a frame.
pub const BANDS: usize = 64;
/// Samples from frame to frame.
pub const HOP: usize = 320;
const WINDOW: usize = 512;
const BINS: usize = WINDOW / 2 + 1;
/// Zeros before the first sample: the window of frame 0 begins 96 samples before it.
const BEFORE: usize = 96;
/// Samples beyond a frame's own hop that its window sees.
pub const AHEAD: usize = WINDOW - BEFORE - HOP;

/// The filter bank and the transform, shared by streams.
pub struct Mel {
    /// First bin and weights of each band; zeros at both ends are left away.
    filters: Vec<(usize, Vec<f64>)>,
    window: Vec<f64>,
    fft: Arc<dyn RealToComplex<f64>>,
}

/// What one stream remembers: samples whose frames are not complete.
#[derive(Clone)]
pub struct MelState {
    samples: VecDeque<f32>,
}

impl Default for MelState {
    fn default() -> Self {
        MelState { samples: VecDeque::from(vec![0.0; BEFORE]) }
    }
}

impl Mel {
    /// `filters` `[64][257]`, row-major.
    pub fn new(filters: &[f32]) -> Mel {
        let filters = filters
            .chunks_exact(BINS)
            .map(|row| {
                let first = row.iter().position(|w| *w != 0.0).unwrap_or(0);
                let end = row.iter().rposition(|w| *w != 0.0).map_or(first, |e| e + 1);
                (first, row[first..end].iter().map(|w| f64::from(*w)).collect())
            })
            .collect();
        let window =
            (0..WINDOW).map(|i| 0.5 - 0.5 * (2.0 * std::f64::consts::PI * i as f64 / WINDOW as f64).cos()).collect();
        Mel { filters, window, fft: RealFftPlanner::new().plan_fft_forward(WINDOW) }
    }

    /// Appends speech; returns the frames it completes, `[n][64]`.
    pub fn push(&self, state: &mut MelState, speech: &[f32]) -> Vec<f32> {
        state.samples.extend(speech);
        let mut out = Vec::new();
        let (mut input, mut spectrum) = (self.fft.make_input_vec(), self.fft.make_output_vec());
        let mut scratch = self.fft.make_scratch_vec();
        while state.samples.len() >= WINDOW {
            for ((to, s), w) in input.iter_mut().zip(&state.samples).zip(&self.window) {
                *to = f64::from(*s) * w;
            }
            // Fails only on buffers of another size, and these were made by the plan.
            if self.fft.process_with_scratch(&mut input, &mut spectrum, &mut scratch).is_err() {
                spectrum.fill(Complex::default());
            }
            let power: Vec<f64> = spectrum.iter().map(|c| c.norm_sqr()).collect();
            out.extend(self.filters.iter().map(|(first, weights)| {
                let sum: f64 = weights.iter().zip(&power[*first..]).map(|(w, p)| w * p).sum();
                ((sum + 1e-8).log10() + 8.0).clamp(0.0, 11.0) as f32
            }));
            state.samples.drain(..HOP);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_zero_and_cuts_do_not_matter() {
        let filters: Vec<f32> = (0..BANDS * BINS).map(|i| if i % BINS / 4 == i / BINS { 1e-3 } else { 0.0 }).collect();
        let mel = Mel::new(&filters);
        assert!(mel.push(&mut MelState::default(), &[0.0; 5000]).iter().all(|v| *v == 0.0));
        let speech: Vec<f32> = (0..4001).map(|i| (i as f32 * 0.37).sin() * 0.5).collect();
        let whole = mel.push(&mut MelState::default(), &speech);
        assert_eq!(whole.len() / BANDS, (4001 + BEFORE - WINDOW) / HOP + 1);
        for cut in [1, 17, 320, 999] {
            let mut state = MelState::default();
            let parts: Vec<f32> = speech.chunks(cut).flat_map(|c| mel.push(&mut state, c)).collect();
            assert!(parts == whole, "cut {cut}");
        }
    }
}
