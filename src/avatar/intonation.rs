//! What liveliness hears of a voice: loudness and pitch of each video frame, from 16 kHz speech.

/// Samples of a video frame at 25 a second.
const FRAME: usize = 640;
/// Four samples become one: pitch needs no more than 4 kHz.
const FEWER: usize = 4;
/// Shortest and longest period at 4 kHz: 400 and 80 Hz.
const PERIODS: [usize; 2] = [10, 50];
/// Least autocorrelation of a voiced frame.
const VOICED: f32 = 0.55;

/// One frame of a voice.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tone {
    /// Root-mean-square, 0..1.
    pub level: f32,
    /// Hz; none where there is no clear one.
    pub pitch: Option<f32>,
}

impl From<f32> for Tone {
    fn from(level: f32) -> Self {
        Tone { level, pitch: None }
    }
}

/// Cuts speech into frames and listens to each.
#[derive(Clone, Debug, Default)]
pub(super) struct Intonation {
    partial: Vec<f32>,
}

impl Intonation {
    /// Tones of the frames that these samples complete.
    pub(super) fn push(&mut self, speech: &[f32]) -> Vec<Tone> {
        self.partial.extend_from_slice(speech);
        let whole = self.partial.len() / FRAME * FRAME;
        let tones = self.partial[..whole].chunks_exact(FRAME).map(tone).collect();
        self.partial.drain(..whole);
        tones
    }
}

fn tone(frame: &[f32]) -> Tone {
    let level = (frame.iter().map(|s| s * s).sum::<f32>() / frame.len() as f32).sqrt();
    Tone { level, pitch: if level < 1e-3 { None } else { pitch(frame) } }
}

/// The period at which the frame resembles itself most, by normalised autocorrelation; the shortest among equals, so
/// that a voice is not heard an octave low.
fn pitch(frame: &[f32]) -> Option<f32> {
    let x: Vec<f32> = frame.chunks_exact(FEWER).map(|c| c.iter().sum::<f32>() / FEWER as f32).collect();
    let mean = x.iter().sum::<f32>() / x.len() as f32;
    let x: Vec<f32> = x.iter().map(|v| v - mean).collect();
    let likeness = |period: usize| {
        let (a, b) = (&x[period..], &x[..x.len() - period]);
        let product = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        product(a, b) / (product(a, a) * product(b, b)).sqrt().max(1e-12)
    };
    let all: Vec<f32> = (PERIODS[0] - 1..=PERIODS[1] + 1).map(likeness).collect();
    let best = all.iter().copied().fold(0.0, f32::max);
    let peak = (1..all.len() - 1)
        .find(|&i| all[i] >= VOICED.max(0.9 * best) && all[i] >= all[i - 1] && all[i] >= all[i + 1])?;
    // The top of a parabola through three points.
    let (before, at, after) = (all[peak - 1], all[peak], all[peak + 1]);
    let shift = 0.5 * (before - after) / (before - 2.0 * at + after).min(-1e-6);
    let rate = 16_000.0 / FEWER as f32;
    Some(rate / ((peak + PERIODS[0] - 1) as f32 + shift.clamp(-0.5, 0.5)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A buzz with overtones whose pitch goes from one value to another.
    fn buzz(from: f32, to: f32, frames: usize) -> Vec<f32> {
        let n = frames * FRAME;
        let mut phase = 0.0f32;
        let wave = |i: usize| {
            phase += (from + (to - from) * i as f32 / n as f32) / 16_000.0;
            let t = phase.fract() * std::f32::consts::TAU;
            0.2 * (t.sin() + 0.6 * (2.0 * t).sin() + 0.4 * (3.0 * t).sin())
        };
        (0..n).map(wave).collect()
    }

    #[test]
    fn it_hears_the_pitch_of_voices_and_none_in_noise() {
        for hz in [90.0, 120.0, 210.0, 330.0] {
            for tone in Intonation::default().push(&buzz(hz, hz, 5)) {
                let heard = tone.pitch.unwrap();
                assert!((heard / hz - 1.0).abs() < 0.04, "{hz}: {heard}");
                assert!((0.1..0.25).contains(&tone.level));
            }
        }
        let mut seed = 1u32;
        let noise: Vec<f32> = (0..50 * FRAME)
            .map(|_| {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (seed >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect();
        let voiced = Intonation::default().push(&noise).iter().filter(|t| t.pitch.is_some()).count();
        assert!(voiced < 5, "{voiced} of 50 frames of noise have a pitch");
        assert!(Intonation::default().push(&[0.0; FRAME])[0].pitch.is_none());
    }

    #[test]
    fn however_it_is_cut_it_hears_the_same() {
        let speech = buzz(100.0, 200.0, 6);
        let whole = Intonation::default().push(&speech);
        let mut parts = Intonation::default();
        let cut: Vec<Tone> = speech.chunks(333).flat_map(|c| parts.push(c)).collect();
        assert_eq!(whole, cut);
        assert_eq!(whole.len(), 6);
    }
}
