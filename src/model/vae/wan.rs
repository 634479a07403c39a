//! The pieces that the Wan video autoencoders are made of: causal 3-D convolution over chunks, RMS norm, residual and
//! attention blocks, resampling (MODEL.md §5.2, §5.3; wan/modules/vae2_1.py and vae2_2.py of Wan-Video/Wan2.2 at
//! 42bf4cf).
//!
//! A video is held frame-major, `[frames, channels, height, width]`, so that every spatial convolution is one batched
//! 2-D convolution and the temporal part is a sum over shifted frames. What a layer remembers from chunk to chunk is a
//! [`Slot`] of [`History`] (`chunk.rs`); the layers themselves are immutable and shared.
//!
//! On an NVIDIA card, in bf16, 2.1's layers go channels-last, `[frames, height, width, channels]`: cuDNN convolves, and
//! all that lies between two convolutions (bias, residual sum, norm, SiLU, the past in front) is one pass over memory.
//! Past frames are fixed buffers there, zero at the start, which is what §5.3's rules about missing history amount to.

use candle_core::{D, DType, Result, Tensor};

#[cfg(feature = "cuda")]
use crate::model::kernels::cuda::{
    gemm::{self, Product},
    vae::{self as card, Bend, Convolution, Way},
};
use crate::model::{Result as Loaded, nn::convolve, weights::Weights};

#[cfg(feature = "cuda")]
use super::chunk::card_error;
use super::chunk::{History, Slot, Video, last_frames};

/// Reads layers and numbers the temporal ones.
pub(super) struct Loader<'a> {
    pub(super) weights: &'a Weights,
    slots: usize,
    /// Layers take the form for cards.
    card: bool,
    savings: Savings,
    /// Frames come in even numbers to the layers that are read now, but for the very first one, which comes alone.
    pub(super) even: bool,
}

/// What layers on a card leave out because it changes nothing. All of it, unless a benchmark compares.
#[derive(Clone, Copy, Debug)]
pub struct Savings {
    /// Pictures are not doubled before a convolution: it runs on the small one, with sums of weights.
    pub doubling: bool,
    /// Convolutions over three frames go by pairs of frames where these come in even numbers.
    pub pairs: bool,
}

/// Channels from which pairs pay. Of c to c channels a frame's pixel costs 18 c² operations less and 7 c bytes of traffic
/// more; cards that were measured do about 110 operations in the time of a byte.
const PAIRS_FROM: usize = 48;

impl Default for Savings {
    fn default() -> Self {
        Savings { doubling: true, pairs: true }
    }
}

impl<'a> Loader<'a> {
    pub(super) fn new(weights: &'a Weights) -> Self {
        Loader { weights, slots: 0, card: false, savings: Savings::default(), even: false }
    }

    /// Layers take the form for cards: channels of all layers are multiples of 8, numbers bf16.
    pub(super) fn for_card(mut self, card: bool, savings: Savings) -> Self {
        self.card = card && cfg!(feature = "cuda");
        self.savings = savings;
        self
    }

    fn next_slot(&mut self) -> usize {
        self.slots += 1;
        self.slots - 1
    }

    fn bias(&self, name: &str, channels: usize) -> Loaded<Tensor> {
        Ok(self.weights.get(channels, &format!("{name}.bias"))?.reshape((1, channels, 1, 1))?)
    }
}

/// Causal 3-D convolution: spatial zero padding as usual, in time only towards the past.
pub(super) struct CausalConv {
    /// One 2-D kernel `[out, in, kh, kw]` per temporal tap, oldest first.
    taps: Vec<Tensor>,
    bias: Tensor,
    pad: usize,
    slot: Option<usize>,
    #[cfg(feature = "cuda")]
    card: Option<Convolution>,
}

impl CausalConv {
    /// A kernel of `time`×`side`×`side`.
    pub(super) fn load(
        l: &mut Loader,
        name: &str,
        (input, out): (usize, usize),
        (time, side): (usize, usize),
    ) -> Loaded<Self> {
        Self::load_strided(l, name, (input, out), (time, side), 1)
    }

    /// The same with every `stride`-th frame only, on cards (elsewhere [`CausalConv::valid`] is told).
    fn load_strided(
        l: &mut Loader,
        name: &str,
        (input, out): (usize, usize),
        (time, side): (usize, usize),
        _stride: usize,
    ) -> Loaded<Self> {
        let w = l.weights.get((out, input, time, side, side), &format!("{name}.weight"))?;
        let slot = (time > 1).then(|| l.next_slot());
        let bias = l.bias(name, out)?;
        let pad = side / 2;
        let _pairs = l.savings.pairs && l.even && (time, side) == (3, 3) && input.min(out) >= PAIRS_FROM;
        #[cfg(feature = "cuda")]
        let card = match l.card {
            true => Some(Convolution::new(&w, &bias, (pad, pad), (_stride, 1))?),
            false => None,
        };
        #[cfg(feature = "cuda")]
        let card = if _pairs { card.map(Convolution::paired).transpose()? } else { card };
        let taps = match l.card {
            true => Vec::new(),
            false => (0..time).map(|k| w.narrow(2, k, 1)?.squeeze(2)?.contiguous()).collect::<Result<_>>()?,
        };
        Ok(CausalConv {
            taps,
            bias,
            pad,
            slot,
            #[cfg(feature = "cuda")]
            card,
        })
    }

    /// On a card: the sum on its way through `norm` and SiLU into this convolution. Also the sum itself if `keep`.
    #[cfg(feature = "cuda")]
    fn card(
        &self,
        x: &card::Video,
        norm: Option<&Norm>,
        keep: bool,
        history: &mut History,
    ) -> Loaded<(Option<Tensor>, card::Video)> {
        let Some(conv) = &self.card else {
            return Err(crate::model::Error::Input("this layer was not loaded for a card".into()));
        };
        let cache = match self.slot {
            Some(slot) => Some(history.buffer(slot, x.place()?, conv.past(), x.channels()?)?),
            None => None,
        };
        let paired = conv.by_pairs(x.frames()?);
        let bend = norm.map_or(Bend::None, |_| Bend::Silu);
        let way = Way { gain: norm.map(|n| &n.gain), bend, cache: cache.as_ref(), paired };
        let (sum, input) = match (keep, norm.is_some() || cache.is_some()) {
            (true, _) => {
                let (sum, input) = x.settled_and(&way)?;
                (Some(sum), input)
            }
            (false, true) => (None, x.through(&way)?),
            (false, false) => (None, x.settled()?),
        };
        Ok((sum, if paired { conv.products(&input, x.usual)? } else { conv.apply(&input, x.usual)? }))
    }

    /// The matrix `[out, in]` and bias of a 1×1×1 convolution on a card, f32.
    #[cfg(feature = "cuda")]
    pub(super) fn matrix(&self) -> Result<Option<(Tensor, Tensor)>> {
        let Some(c) = &self.card else { return Ok(None) };
        Ok(Some((c.weight.flatten_from(1)?.to_dtype(DType::F32)?, c.bias.clone())))
    }

    /// Latents `[16, frames, h, w]` on a card through a matrix into this convolution; `usual` come at once.
    #[cfg(feature = "cuda")]
    pub(super) fn latents(
        &self,
        z: &Tensor,
        matrix: &Tensor,
        bias: &Tensor,
        usual: usize,
        history: &mut History,
    ) -> Result<Video> {
        let (Some(conv), Some(slot)) = (&self.card, self.slot) else {
            candle_core::bail!("this layer was not loaded for a card")
        };
        let (c, _, h, w) = z.dims4()?;
        let mut run = || {
            let cache = history.buffer(slot, (z.device(), h, w), conv.past(), c)?;
            let x = card::latents(z, matrix, bias, &cache)?;
            conv.apply(&x, usual)
        };
        run().map_err(card_error).map(Video::Card)
    }

    /// Outputs of this convolution go on as they are, before the next norm.
    pub(super) fn onward(&self, x: Video, history: &mut History) -> Result<Video> {
        match x {
            Video::Plain(x) => Ok(Video::Plain(self.forward(&x, history)?)),
            #[cfg(feature = "cuda")]
            Video::Card(x) => Ok(Video::Card(self.card(&x, None, false, history).map_err(card_error)?.1)),
        }
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
            let y = convolve(&part, tap, self.pad, 1)?;
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
        if l.card {
            let gain = (g.to_dtype(DType::F32)?.flatten_all()? * (c as f64).sqrt())?;
            return Ok(Norm { gain });
        }
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
    /// On a card: the biases of the last convolution and the shortcut together.
    #[cfg(feature = "cuda")]
    bias: Option<Tensor>,
}

impl Residual {
    fn load(l: &mut Loader, name: &str, input: usize, out: usize) -> Loaded<Self> {
        let shortcut = match input != out {
            true => Some(CausalConv::load(l, &format!("{name}.shortcut"), (input, out), (1, 1))?),
            false => None,
        };
        let r = |k: usize| format!("{name}.residual.{k}");
        let first = (Norm::load(l, &r(0), input, 4)?, CausalConv::load(l, &r(2), (input, out), (3, 3))?);
        let second = (Norm::load(l, &r(3), out, 4)?, CausalConv::load(l, &r(6), (out, out), (3, 3))?);
        #[cfg(feature = "cuda")]
        let bias = match (&second.1.card, shortcut.as_ref().and_then(|s| s.card.as_ref())) {
            (Some(a), Some(b)) => Some((&a.bias + &b.bias)?),
            (Some(a), None) => Some(a.bias.clone()),
            _ => None,
        };
        Ok(Residual {
            first,
            second,
            shortcut,
            #[cfg(feature = "cuda")]
            bias,
        })
    }

    #[cfg(feature = "cuda")]
    fn card(&self, x: &card::Video, history: &mut History) -> Loaded<card::Video> {
        let (sum, y) = self.first.1.card(x, Some(&self.first.0), true, history)?;
        let (_, y) = self.second.1.card(&y, Some(&self.second.0), false, history)?;
        let kept = card::Video::new(sum.unwrap_or_else(|| x.x.clone()), None, x.usual);
        let kept = match &self.shortcut {
            Some(c) => c.card(&kept, None, false, history)?.1.x,
            None => kept.x,
        };
        Ok(card::Video { y: Some(kept), bias: self.bias.clone(), ..y })
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
        let (mut qkv, mut proj) = (conv("to_qkv", 3 * c)?, conv("proj", c)?);
        if l.card {
            for pair in [&mut qkv, &mut proj] {
                *pair = (pair.0.flatten_from(1)?.contiguous()?, pair.1.flatten_all()?.contiguous()?);
            }
        }
        Ok(Attention { norm, qkv, proj })
    }

    #[cfg(feature = "cuda")]
    fn card(&self, x: &card::Video) -> Loaded<card::Video> {
        let (sum, normed) = x.settled_and(&Way { gain: Some(&self.norm.gain), ..Way::default() })?;
        let (t, h, w, c) = normed.dims4()?;
        let product = |x: &Tensor, (weight, bias): &(Tensor, Tensor)| {
            gemm::product(&Product { x, weight, scales: None, bias: Some(bias), gelu: false })
        };
        let qkv = product(&normed.reshape((t * h * w, c))?, &self.qkv)?;
        let mixed = card::attention(&qkv.reshape((t, h * w, 3 * c))?)?;
        let y = product(&mixed.reshape((t * h * w, c))?, &self.proj)?.reshape((t, h, w, c))?;
        Ok(card::Video { y: Some(y), ..card::Video::new(sum, None, x.usual) })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (t, c, h, w) = x.dims4()?;
        let y = convolve(&self.norm.forward(x)?, &self.qkv.0, 0, 1)?.broadcast_add(&self.qkv.1)?;
        let y = y.reshape((t, 3, c, h * w))?;
        let part = |i: usize| y.narrow(1, i, 1)?.squeeze(1);
        let q = (part(0)?.transpose(1, 2)?.contiguous()? * (1.0 / (c as f64).sqrt()))?;
        let weights = candle_nn::ops::softmax_last_dim(&q.matmul(&part(1)?.contiguous()?)?)?;
        let out = weights.matmul(&part(2)?.transpose(1, 2)?.contiguous()?)?;
        let out = out.transpose(1, 2)?.contiguous()?.reshape((t, c, h, w))?;
        x + convolve(&out, &self.proj.0, 0, 1)?.broadcast_add(&self.proj.1)?
    }
}

/// Halving or doubling of rows and columns and, with a temporal convolution, of frames.
pub(super) struct Resample {
    kernel: Tensor,
    bias: Tensor,
    time: Option<CausalConv>,
    slot: usize,
    down: bool,
    /// On a card: the picture is doubled before `card`, which else does it itself.
    #[cfg(feature = "cuda")]
    doubled: bool,
    #[cfg(feature = "cuda")]
    card: Option<Convolution>,
}

impl Resample {
    fn load(l: &mut Loader, name: &str, (input, out): (usize, usize), temporal: bool, down: bool) -> Loaded<Self> {
        let time = match temporal {
            true => {
                let widened = if down { input } else { 2 * input };
                let (name, stride) = (format!("{name}.time_conv"), if down { 2 } else { 1 });
                Some(CausalConv::load_strided(l, &name, (input, widened), (3, 1), stride)?)
            }
            false => None,
        };
        let spatial = format!("{name}.resample.1");
        let kernel = l.weights.get((out, input, 3, 3), &format!("{spatial}.weight"))?;
        let bias = l.bias(&spatial, out)?;
        let _doubled = !l.savings.doubling;
        #[cfg(feature = "cuda")]
        let card = match l.card {
            // one column to the right and one row below
            true if down => Some(Convolution::new(&kernel.unsqueeze(2)?, &bias, (0, 1), (1, 2))?),
            true if _doubled => Some(Convolution::new(&kernel.unsqueeze(2)?, &bias, (1, 1), (1, 1))?),
            true => Some(Convolution::doubling(&kernel, &bias)?),
            false => None,
        };
        Ok(Resample {
            kernel,
            bias,
            time,
            slot: l.next_slot(),
            down,
            #[cfg(feature = "cuda")]
            doubled: _doubled,
            #[cfg(feature = "cuda")]
            card,
        })
    }

    #[cfg(feature = "cuda")]
    fn card(&self, x: &card::Video, history: &mut History) -> Loaded<card::Video> {
        let Some(space) = &self.card else {
            return Err(crate::model::Error::Input("this layer was not loaded for a card".into()));
        };
        if self.down {
            let small = space.apply(&x.settled()?, x.usual)?;
            let Some(time) = self.time.as_ref().and_then(|t| t.card.as_ref()) else { return Ok(small) };
            let first = matches!(history.slot(self.slot), Slot::Empty);
            let cache = history.buffer(self.slot, small.place()?, 1, small.channels()?)?;
            let (sum, joined) = small.settled_and(&Way { cache: Some(&cache), ..Way::default() })?;
            let usual = (x.usual / 2).max(1);
            return Ok(match first {
                true => card::Video::new(sum, None, usual),
                false => time.apply(&joined, usual)?,
            });
        }
        let Some(time) = self.time.as_ref().and_then(|t| t.card.as_ref()) else {
            return space.apply(&x.spread(1, self.doubled)?, x.usual);
        };
        if matches!(history.slot(self.slot), Slot::Empty) {
            *history.slot(self.slot) = Slot::Started;
            return space.apply(&x.spread(1, self.doubled)?, 2 * x.usual);
        }
        let cache = history.buffer(self.slot, x.place()?, 2, x.channels()?)?;
        let joined = x.through(&Way { cache: Some(&cache), ..Way::default() })?;
        space.apply(&time.apply(&joined, x.usual)?.spread(2, self.doubled)?, 2 * x.usual)
    }

    /// Whether frames are halved or doubled too.
    pub(super) fn temporal(&self) -> bool {
        self.time.is_some()
    }

    fn space(&self, x: &Tensor) -> Result<Tensor> {
        let y = if self.down {
            convolve(&x.pad_with_zeros(D::Minus1, 0, 1)?.pad_with_zeros(D::Minus2, 0, 1)?, &self.kernel, 0, 2)?
        } else {
            let (_, _, h, w) = x.dims4()?;
            convolve(&x.upsample_nearest2d(h * 2, w * 2)?, &self.kernel, 1, 1)?
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

    pub(super) fn forward(&self, x: Video, history: &mut History) -> Result<Video> {
        match x {
            Video::Plain(x) => Ok(Video::Plain(match self {
                Layer::Residual(r) => r.forward(&x, history)?,
                Layer::Attention(a) => a.forward(&x)?,
                Layer::Resample(r) => r.forward(&x, history)?,
            })),
            #[cfg(feature = "cuda")]
            Video::Card(x) => {
                let y = match self {
                    Layer::Residual(r) => r.card(&x, history),
                    Layer::Attention(a) => a.card(&x),
                    Layer::Resample(r) => r.card(&x, history),
                };
                Ok(Video::Card(y.map_err(card_error)?))
            }
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

    pub(super) fn forward(&self, x: Video, history: &mut History) -> Result<Video> {
        match x {
            Video::Plain(x) => Ok(Video::Plain(self.1.forward(&self.0.forward(&x)?.silu()?, history)?)),
            #[cfg(feature = "cuda")]
            Video::Card(x) => Ok(Video::Card(self.1.card(&x, Some(&self.0), false, history).map_err(card_error)?.1)),
        }
    }
}
