//! The pocket audio net: mel frames (50 a second) → 192 features a video frame (25 a second), as a stream.
//!
//! `conv_in` (kernel 3, one frame ahead), six residual blocks (channel norm, dilated convolution of kernel 5, GELU,
//! 1×1), a convolution of stride 2, layer norm. Each layer keeps the inputs that later outputs still need, so a stream
//! gives the same numbers as the whole, bit for bit, however it is cut.

use super::mel::BANDS;
use crate::model::{
    Error, Result,
    kernels::{Isa, Packed},
    weights::Weights,
};

/// Features of a video frame.
pub const FEATURES: usize = 192;
/// Mouth shapes of the auxiliary head: jaw, width, press, fv, tongue, upper lip.
pub const VISEMES: usize = 6;
const KERNEL: usize = 5;

/// How the blocks look ahead, read from the configuration.
#[derive(Clone, Debug)]
pub struct AudioConfig {
    pub dilation: Vec<usize>,
    /// Mel frames each block sees beyond its output.
    pub ahead: Vec<usize>,
}

impl AudioConfig {
    /// Mel frames that must be known beyond a video frame's own two before its features are final.
    pub fn look_ahead(&self) -> usize {
        1 + self.ahead.iter().sum::<usize>()
    }
}

/// A convolution in time.
struct TimeConv {
    packed: Packed,
    cin: usize,
    kernel: usize,
    dilation: usize,
    stride: usize,
}

impl TimeConv {
    fn load(w: &Weights, isa: Isa, shape: [usize; 3], dilation: usize, stride: usize) -> Result<TimeConv> {
        let [cout, cin, kernel] = shape;
        let weight = w.get((cout, cin, kernel), "weight")?.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
        let bias = w.get(cout, "bias")?.contiguous()?.to_vec1::<f32>()?;
        let packed = Packed::new(isa, cout, kernel, cin, Some(&bias), |o, t, i| weight[(o * cin + i) * kernel + t]);
        Ok(TimeConv { packed, cin, kernel, dilation, stride })
    }

    /// Takes what `line` has complete; the frames no longer needed are dropped from it.
    fn take(&self, line: &mut Line) -> Vec<f32> {
        let have = line.frames.len() / self.cin;
        let reach = (self.kernel - 1) * self.dilation + 1;
        if have < reach {
            return Vec::new();
        }
        let rows = (have - reach) / self.stride + 1;
        let taps: Vec<usize> = (0..self.kernel).map(|t| t * self.dilation * self.cin).collect();
        let cout = self.packed.outputs();
        let mut out = vec![0.0; rows * cout];
        self.packed.rows(&line.frames, self.stride * self.cin, &taps, rows, &mut out, cout);
        line.frames.drain(..rows * self.stride * self.cin);
        out
    }
}

/// Frames that wait in front of a layer.
#[derive(Clone)]
struct Line {
    frames: Vec<f32>,
}

impl Line {
    /// Begins with `n` frames of zeros, the layer's padding.
    fn padded(n: usize, channels: usize) -> Line {
        Line { frames: vec![0.0; n * channels] }
    }
}

struct Block {
    norm: (Vec<f32>, Vec<f32>),
    conv: TimeConv,
    proj: Packed,
    scale: Vec<f32>,
    dilation: usize,
    ahead: usize,
}

/// The weights.
pub struct AudioNet {
    conv_in: TimeConv,
    blocks: Vec<Block>,
    down: TimeConv,
    norm: (Vec<f32>, Vec<f32>),
    visemes: Packed,
}

/// What one stream remembers.
#[derive(Clone)]
pub struct AudioState {
    first: Line,
    /// For each block: normalised inputs of its convolution, and the inputs that wait to be added.
    blocks: Vec<(Line, Vec<f32>)>,
    last: Line,
}

impl AudioNet {
    /// `w` stands at `audio`.
    pub fn load(w: &Weights, isa: Isa, config: &AudioConfig) -> Result<AudioNet> {
        if config.dilation.len() != config.ahead.len() || config.dilation.contains(&0) {
            return Err(Error::Config("audio_dilation and audio_ahead must name the same blocks".into()));
        }
        let d = FEATURES;
        let vector = |w: &Weights, name: &str| -> Result<Vec<f32>> { Ok(w.get(d, name)?.contiguous()?.to_vec1()?) };
        let pair = |w: &Weights| Ok::<_, Error>((vector(w, "weight")?, vector(w, "bias")?));
        let blocks = (config.dilation.iter().zip(&config.ahead).enumerate())
            .map(|(j, (&dilation, &ahead))| {
                let at = w.pp(format!("blocks.{j}"));
                let conv = TimeConv::load(&at.pp("conv"), isa, [d, d, KERNEL], dilation, 1)?;
                let proj = TimeConv::load(&at.pp("proj"), isa, [d, d, 1], 1, 1)?.packed;
                Ok(Block { norm: pair(&at.pp("norm"))?, conv, proj, scale: vector(&at, "scale")?, dilation, ahead })
            })
            .collect::<Result<_>>()?;
        let head = w.pp("visemes");
        let (weight, bias) = (head.get((VISEMES, d), "weight")?, head.get(VISEMES, "bias")?);
        let (weight, bias) = (weight.contiguous()?.flatten_all()?.to_vec1::<f32>()?, bias.contiguous()?.to_vec1()?);
        Ok(AudioNet {
            conv_in: TimeConv::load(&w.pp("conv_in"), isa, [d, BANDS, 3], 1, 1)?,
            blocks,
            down: TimeConv::load(&w.pp("down"), isa, [d, d, 2], 1, 2)?,
            norm: pair(&w.pp("norm"))?,
            visemes: Packed::new(isa, VISEMES, 1, d, Some(&bias), |o, _, i| weight[o * d + i]),
        })
    }

    /// A fresh stream: zeros before its first frame.
    pub fn start(&self) -> AudioState {
        let block = |b: &Block| (Line::padded(4 * b.dilation - b.ahead, FEATURES), Vec::new());
        AudioState {
            first: Line::padded(1, BANDS),
            blocks: self.blocks.iter().map(block).collect(),
            last: Line::padded(0, FEATURES),
        }
    }

    /// Appends mel frames `[n][64]`; returns the features that became final, `[m][192]`.
    pub fn push(&self, state: &mut AudioState, mel: &[f32]) -> Vec<f32> {
        state.first.frames.extend(mel.iter().map(|v| (v - 5.0) / 2.0));
        let mut x = self.conv_in.take(&mut state.first);
        for (block, (line, waiting)) in self.blocks.iter().zip(&mut state.blocks) {
            x = block.push(line, waiting, &x);
        }
        self.end(state, x)
    }

    /// The stream ended: the frames that waited for look-ahead get zeros, each layer its own. The state is used up.
    pub fn finish(&self, state: &mut AudioState) -> Vec<f32> {
        state.first.frames.extend([0.0; BANDS]);
        let mut x = self.conv_in.take(&mut state.first);
        for (block, (line, waiting)) in self.blocks.iter().zip(&mut state.blocks) {
            let mut y = block.push(line, waiting, &x);
            // Zero padding belongs behind the normalised inputs, where the convolution reads.
            line.frames.extend(std::iter::repeat_n(0.0, block.ahead * FEATURES));
            y.extend(block.out(line, waiting));
            x = y;
        }
        self.end(state, x)
    }

    fn end(&self, state: &mut AudioState, x: Vec<f32>) -> Vec<f32> {
        state.last.frames.extend(x);
        let mut features = self.down.take(&mut state.last);
        normalise(&mut features, &self.norm);
        features
    }

    /// Mouth shapes of features `[n][192]` → `[n][6]`.
    pub fn visemes(&self, features: &[f32]) -> Vec<f32> {
        let rows = features.len() / FEATURES;
        let mut out = vec![0.0; rows * VISEMES];
        self.visemes.rows(features, FEATURES, &[0], rows, &mut out, VISEMES);
        out
    }
}

impl Block {
    fn push(&self, line: &mut Line, waiting: &mut Vec<f32>, x: &[f32]) -> Vec<f32> {
        waiting.extend(x);
        let mut normed = x.to_vec();
        normalise(&mut normed, &self.norm);
        line.frames.extend(normed);
        self.out(line, waiting)
    }

    fn out(&self, line: &mut Line, waiting: &mut Vec<f32>) -> Vec<f32> {
        let mut h = self.conv.take(line);
        h.iter_mut().for_each(|v| *v = gelu(*v));
        let rows = h.len() / FEATURES;
        let mut y = vec![0.0; h.len()];
        self.proj.rows(&h, FEATURES, &[0], rows, &mut y, FEATURES);
        for (i, (v, x)) in y.iter_mut().zip(waiting.drain(..rows * FEATURES)).enumerate() {
            *v = x + self.scale[i % FEATURES] * *v;
        }
        y
    }
}

/// Layer norm of each frame over its channels, eps 1e-5.
fn normalise(frames: &mut [f32], (weight, bias): &(Vec<f32>, Vec<f32>)) {
    for frame in frames.chunks_exact_mut(FEATURES) {
        let mean = frame.iter().sum::<f32>() / FEATURES as f32;
        let var = frame.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / FEATURES as f32;
        let scale = 1.0 / (var + 1e-5).sqrt();
        for ((v, w), b) in frame.iter_mut().zip(weight).zip(bias) {
            *v = (*v - mean) * scale * w + b;
        }
    }
}

/// Exact GELU (with the error function).
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + candle_core::cpu::erf::erf_f32(x * std::f32::consts::FRAC_1_SQRT_2))
}
