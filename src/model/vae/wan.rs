//! The pieces that the Wan video autoencoders are made of: causal 3-D convolution over chunks, RMS norm, residual and
//! attention blocks, resampling (MODEL.md §5.2, §5.3; wan/modules/vae2_1.py and vae2_2.py of Wan-Video/Wan2.2 at
//! 42bf4cf).
//!
//! A video is held frame-major, `[frames, channels, height, width]`, so that every spatial convolution is one batched
//! 2-D convolution and the temporal part is a sum over shifted frames. What a layer remembers from chunk to chunk is a
//! [`Slot`] of [`History`]; the layers themselves are immutable and shared.

use candle_core::{D, Result, Tensor};

use crate::model::{Result as Loaded, weights::Weights};

/// Called with the name and value of an intermediate result; tests compare them, everyone else passes [`quiet`].
pub type Probe<'a> = &'a mut dyn FnMut(&str, &Tensor);

/// A probe that looks at nothing.
pub fn quiet(_: &str, _: &Tensor) {}

/// What one temporal layer remembers.
#[derive(Clone, Default)]
enum Slot {
    /// Nothing has passed yet.
    #[default]
    Empty,
    /// The single first frame has passed an upsampler, which keeps nothing of it.
    Started,
    /// Past input frames, oldest first.
    Frames(Tensor),
}

/// Everything a pass remembers from chunk to chunk: one slot per temporal layer. A new value starts a new video.
#[derive(Clone, Default)]
pub(super) struct History(Vec<Slot>);

impl History {
    fn slot(&mut self, index: usize) -> &mut Slot {
        if self.0.len() <= index {
            self.0.resize_with(index + 1, Slot::default);
        }
        &mut self.0[index]
    }
}

/// Reads layers and numbers the temporal ones.
pub(super) struct Loader<'a> {
    pub(super) weights: &'a Weights,
    slots: usize,
}

impl<'a> Loader<'a> {
    pub(super) fn new(weights: &'a Weights) -> Self {
        Loader { weights, slots: 0 }
    }

    fn next_slot(&mut self) -> usize {
        self.slots += 1;
        self.slots - 1
    }

    fn bias(&self, name: &str, channels: usize) -> Loaded<Tensor> {
        Ok(self.weights.get(channels, &format!("{name}.bias"))?.reshape((1, channels, 1, 1))?)
    }
}

/// The last `n` frames of history and chunk together.
fn last_frames(history: Option<&Tensor>, x: &Tensor, n: usize) -> Result<Tensor> {
    let t = x.dim(0)?;
    if t >= n {
        return x.narrow(0, t - n, n)?.force_contiguous();
    }
    match history {
        Some(h) => {
            let keep = (n - t).min(h.dim(0)?);
            Tensor::cat(&[&h.narrow(0, h.dim(0)? - keep, keep)?, x], 0)
        }
        None => Ok(x.clone()),
    }
}

/// Causal 3-D convolution: spatial zero padding as usual, in time only towards the past.
pub(super) struct CausalConv {
    /// One 2-D kernel `[out, in, kh, kw]` per temporal tap, oldest first.
    taps: Vec<Tensor>,
    bias: Tensor,
    pad: usize,
    slot: Option<usize>,
}

impl CausalConv {
    /// A kernel of `time`×`side`×`side`.
    pub(super) fn load(
        l: &mut Loader,
        name: &str,
        (input, out): (usize, usize),
        (time, side): (usize, usize),
    ) -> Loaded<Self> {
        let w = l.weights.get((out, input, time, side, side), &format!("{name}.weight"))?;
        let taps = (0..time).map(|k| w.narrow(2, k, 1)?.squeeze(2)?.contiguous()).collect::<Result<_>>()?;
        let slot = (time > 1).then(|| l.next_slot());
        Ok(CausalConv { taps, bias: l.bias(name, out)?, pad: side / 2, slot })
    }

    /// Convolves `[frames, in, h, w]` with every temporal tap; `frames − taps + 1` frames come out, every `stride`-th.
    fn valid(&self, x: &Tensor, stride: usize) -> Result<Tensor> {
        let frames = x.dim(0)?;
        let kt = self.taps.len();
        if frames < kt {
            candle_core::bail!("{frames} frames are fewer than the {kt} temporal taps of this convolution");
        }
        let out = (frames - kt) / stride + 1;
        let mut sum: Option<Tensor> = None;
        for (k, tap) in self.taps.iter().enumerate() {
            let part = if stride == 1 {
                x.narrow(0, k, out)?
            } else {
                let index: Vec<u32> = (0..out).map(|i| (i * stride + k) as u32).collect();
                x.index_select(&Tensor::new(index, x.device())?, 0)?
            };
            let y = part.conv2d(tap, self.pad, 1, 1, 1)?;
            sum = Some(match sum {
                Some(s) => (s + y)?,
                None => y,
            });
        }
        match sum {
            Some(s) => s.broadcast_add(&self.bias),
            None => candle_core::bail!("a convolution without taps"),
        }
    }

    pub(super) fn forward(&self, x: &Tensor, history: &mut History) -> Result<Tensor> {
        let Some(index) = self.slot else { return self.valid(x, 1) };
        let past = self.taps.len() - 1;
        let slot = history.slot(index);
        let old = match slot {
            Slot::Frames(t) => Some(t.clone()),
            _ => None,
        };
        *slot = Slot::Frames(last_frames(old.as_ref(), x, past)?);
        let joined = match &old {
            Some(h) => Tensor::cat(&[h, x], 0)?,
            None => x.clone(),
        };
        let missing = past - old.map_or(Ok(0), |h| h.dim(0))?;
        self.valid(&joined.pad_with_zeros(0, missing, 0)?, 1)
    }
}

/// L2 normalisation over channels times √C times a learned gain.
pub(super) struct Norm {
    gain: Tensor,
}

impl Norm {
    /// The gain is stored as `[c, 1, 1, 1]`, in attention blocks as `[c, 1, 1]`.
    fn load(l: &Loader, name: &str, c: usize, axes: usize) -> Loaded<Self> {
        let mut shape = vec![1; axes];
        shape[0] = c;
        let g = l.weights.get(shape, &format!("{name}.gamma"))?;
        Ok(Norm { gain: (g.reshape((1, c, 1, 1))? * (c as f64).sqrt())? })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let norm = x.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(1e-12)?;
        x.broadcast_div(&norm)?.broadcast_mul(&self.gain)
    }
}

/// norm, SiLU, conv, norm, SiLU, conv, added to the (possibly widened) input.
pub(super) struct Residual {
    first: (Norm, CausalConv),
    second: (Norm, CausalConv),
    shortcut: Option<CausalConv>,
}

impl Residual {
    fn load(l: &mut Loader, name: &str, input: usize, out: usize) -> Loaded<Self> {
        let shortcut = match input != out {
            true => Some(CausalConv::load(l, &format!("{name}.shortcut"), (input, out), (1, 1))?),
            false => None,
        };
        let r = |k: usize| format!("{name}.residual.{k}");
        Ok(Residual {
            first: (Norm::load(l, &r(0), input, 4)?, CausalConv::load(l, &r(2), (input, out), (3, 3))?),
            second: (Norm::load(l, &r(3), out, 4)?, CausalConv::load(l, &r(6), (out, out), (3, 3))?),
            shortcut,
        })
    }

    fn forward(&self, x: &Tensor, history: &mut History) -> Result<Tensor> {
        let kept = match &self.shortcut {
            Some(c) => c.forward(x, history)?,
            None => x.clone(),
        };
        let y = self.first.1.forward(&self.first.0.forward(x)?.silu()?, history)?;
        kept + self.second.1.forward(&self.second.0.forward(&y)?.silu()?, history)?
    }
}

/// Self-attention of one head over the positions of each frame.
pub(super) struct Attention {
    norm: Norm,
    qkv: (Tensor, Tensor),
    proj: (Tensor, Tensor),
}

impl Attention {
    fn load(l: &Loader, name: &str, c: usize) -> Loaded<Self> {
        let conv = |n: &str, out: usize| -> Loaded<(Tensor, Tensor)> {
            let n = format!("{name}.{n}");
            Ok((l.weights.get((out, c, 1, 1), &format!("{n}.weight"))?, l.bias(&n, out)?))
        };
        let norm = Norm::load(l, &format!("{name}.norm"), c, 3)?;
        Ok(Attention { norm, qkv: conv("to_qkv", 3 * c)?, proj: conv("proj", c)? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (t, c, h, w) = x.dims4()?;
        let y = self.norm.forward(x)?.conv2d(&self.qkv.0, 0, 1, 1, 1)?.broadcast_add(&self.qkv.1)?;
        let y = y.reshape((t, 3, c, h * w))?;
        let part = |i: usize| y.narrow(1, i, 1)?.squeeze(1);
        let q = (part(0)?.transpose(1, 2)?.contiguous()? * (1.0 / (c as f64).sqrt()))?;
        let weights = candle_nn::ops::softmax_last_dim(&q.matmul(&part(1)?.contiguous()?)?)?;
        let out = weights.matmul(&part(2)?.transpose(1, 2)?.contiguous()?)?;
        let out = out.transpose(1, 2)?.contiguous()?.reshape((t, c, h, w))?;
        x + out.conv2d(&self.proj.0, 0, 1, 1, 1)?.broadcast_add(&self.proj.1)?
    }
}

/// Halving or doubling of rows and columns and, with a temporal convolution, of frames.
pub(super) struct Resample {
    kernel: Tensor,
    bias: Tensor,
    time: Option<CausalConv>,
    slot: usize,
    down: bool,
}

impl Resample {
    fn load(l: &mut Loader, name: &str, (input, out): (usize, usize), temporal: bool, down: bool) -> Loaded<Self> {
        let time = match temporal {
            true => {
                let widened = if down { input } else { 2 * input };
                Some(CausalConv::load(l, &format!("{name}.time_conv"), (input, widened), (3, 1))?)
            }
            false => None,
        };
        let spatial = format!("{name}.resample.1");
        Ok(Resample {
            kernel: l.weights.get((out, input, 3, 3), &format!("{spatial}.weight"))?,
            bias: l.bias(&spatial, out)?,
            time,
            slot: l.next_slot(),
            down,
        })
    }

    /// Whether frames are halved or doubled too.
    pub(super) fn temporal(&self) -> bool {
        self.time.is_some()
    }

    fn space(&self, x: &Tensor) -> Result<Tensor> {
        let y = if self.down {
            x.pad_with_zeros(D::Minus1, 0, 1)?.pad_with_zeros(D::Minus2, 0, 1)?.conv2d(&self.kernel, 0, 2, 1, 1)?
        } else {
            let (_, _, h, w) = x.dims4()?;
            x.upsample_nearest2d(h * 2, w * 2)?.conv2d(&self.kernel, 1, 1, 1, 1)?
        };
        y.broadcast_add(&self.bias)
    }

    fn forward(&self, x: &Tensor, history: &mut History) -> Result<Tensor> {
        let Some(time) = &self.time else { return self.space(x) };
        let slot = history.slot(self.slot);
        if self.down {
            let x = self.space(x)?;
            let old = std::mem::replace(slot, Slot::Frames(last_frames(None, &x, 1)?));
            return match old {
                Slot::Frames(h) => time.valid(&Tensor::cat(&[&h, &x], 0)?, 2),
                _ => Ok(x),
            };
        }
        let past = match slot {
            Slot::Empty => {
                *slot = Slot::Started;
                return self.space(x);
            }
            Slot::Started => x.narrow(0, 0, 1)?.zeros_like()?.repeat((2, 1, 1, 1))?,
            Slot::Frames(t) => t.clone(),
        };
        *slot = Slot::Frames(last_frames(Some(&past), x, 2)?);
        let y = time.valid(&Tensor::cat(&[&past, x], 0)?, 1)?;
        // channels are (half, c): half 0 is frame 2t, half 1 frame 2t + 1
        let (t, c2, h, w) = y.dims4()?;
        self.space(&y.reshape((t * 2, c2 / 2, h, w))?)
    }
}

/// One numbered layer of a path.
pub(super) enum Layer {
    Residual(Residual),
    Attention(Attention),
    Resample(Resample),
}

impl Layer {
    pub(super) fn residual(l: &mut Loader, name: &str, input: usize, out: usize) -> Loaded<Self> {
        Ok(Layer::Residual(Residual::load(l, name, input, out)?))
    }

    /// Halves (`down`) or doubles the sides, and with `temporal` the frames.
    pub(super) fn resample(
        l: &mut Loader,
        name: &str,
        channels: (usize, usize),
        temporal: bool,
        down: bool,
    ) -> Loaded<Self> {
        Ok(Layer::Resample(Resample::load(l, name, channels, temporal, down)?))
    }

    /// The three layers in the middle: residual, attention, residual.
    pub(super) fn middle(l: &mut Loader, name: &str, c: usize) -> Loaded<Vec<Self>> {
        Ok(vec![
            Layer::residual(l, &format!("{name}.0"), c, c)?,
            Layer::Attention(Attention::load(l, &format!("{name}.1"), c)?),
            Layer::residual(l, &format!("{name}.2"), c, c)?,
        ])
    }

    pub(super) fn forward(&self, x: &Tensor, history: &mut History) -> Result<Tensor> {
        match self {
            Layer::Residual(r) => r.forward(x, history),
            Layer::Attention(a) => a.forward(x),
            Layer::Resample(r) => r.forward(x, history),
        }
    }
}

/// Norm, SiLU, convolution at the end of encoder and decoder.
pub(super) struct Head(Norm, CausalConv);

impl Head {
    pub(super) fn load(l: &mut Loader, name: &str, input: usize, out: usize) -> Loaded<Self> {
        let norm = Norm::load(l, &format!("{name}.0"), input, 4)?;
        Ok(Head(norm, CausalConv::load(l, &format!("{name}.2"), (input, out), (3, 3))?))
    }

    pub(super) fn forward(&self, x: &Tensor, history: &mut History) -> Result<Tensor> {
        self.1.forward(&self.0.forward(x)?.silu()?, history)
    }
}
