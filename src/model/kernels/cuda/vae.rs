//! Doors to the kernels of `vae.cu` and `narrow.cu` and to the plans of `vae.cpp`: video `[frames, height, width,
//! channels]` in bf16.

use std::{ffi::c_void, sync::Arc};

use candle_core::{DType, Device, Tensor};

use super::{Context, Plan, address, context, empty, launched};
use crate::model::{Error, Result};

unsafe extern "C" {
    fn lq_vae_pass(
        x: u64,
        y: u64,
        bias: u64,
        sum: u64,
        gain: u64,
        out: u64,
        cache: u64,
        frames: i32,
        past: i32,
        height: i32,
        width: i32,
        channels: i32,
        bend: i32,
        form: i32,
        paired: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lq_vae_spread(
        x: u64,
        y: u64,
        bias: u64,
        out: u64,
        frames: i32,
        height: i32,
        width: i32,
        channels: i32,
        halves: i32,
        doubled: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lq_vae_latents(
        z: u64,
        matrix: u64,
        bias: u64,
        out: u64,
        cache: u64,
        frames: i32,
        pixels: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lq_vae_narrow(
        x: u64,
        weight: u64,
        out: u64,
        frames: i32,
        height: i32,
        width: i32,
        channels: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lq_vae_planes(y: u64, bias: u64, out: u64, frames: i32, pixels: i32, stream: *mut c_void) -> i32;
    fn lq_vae_i420(y: u64, bias: u64, out: u64, frames: i32, height: i32, width: i32, stream: *mut c_void) -> i32;
    fn lq_vae_softmax(x: u64, out: u64, rows: i32, columns: i32, step: i32, scale: f32, stream: *mut c_void) -> i32;
    fn lq_convolution_plan(
        handle: *mut c_void,
        numbers: *const i64,
        frames: i64,
        reference: i64,
        most_room: i64,
    ) -> *mut c_void;
    fn lq_product_plan(
        handle: *mut c_void,
        turned: i32,
        wide: i32,
        rows: i64,
        depth: i64,
        columns: i64,
        a_step: i64,
        b_step: i64,
        c_step: i64,
    ) -> *mut c_void;
}

/// Bytes that an engine of a convolution may ask for beside its operands.
const MOST_ROOM: i64 = 256 << 20;

/// How the result of a convolution lies until a pass makes it `[frames, height, width, channels]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(i32)]
pub enum Form {
    /// As it is.
    #[default]
    Frames,
    /// `[frames, height/2 + 1, width/2 + 1, 4 · channels]`, see [`Convolution::doubling`].
    Quarters,
    /// `[4 · frames/2, height, width, channels]`, see [`Convolution::paired`].
    Products,
}

/// Video whose last sum was not made yet: it is `x + y + bias`, and the next pass over it adds them on its way.
pub struct Video {
    /// bf16, as `form` says.
    pub x: Tensor,
    pub form: Form,
    /// `[frames, height, width, channels]`, bf16.
    pub y: Option<Tensor>,
    /// `[channels]`, f32.
    pub bias: Option<Tensor>,
    /// Frames that come at once at this place when a whole block passes: what engines are chosen for.
    pub usual: usize,
}

fn at(t: Option<&Tensor>) -> Result<u64> {
    t.map_or(Ok(0), address)
}

fn fits(what: &str, good: bool) -> Result<()> {
    if good { Ok(()) } else { Err(Error::Input(format!("operands of the video {what} do not fit each other"))) }
}

/// The activation between a sum and the next convolution.
#[derive(Clone, Copy, Default)]
#[repr(i32)]
pub enum Bend {
    #[default]
    None,
    Silu,
    Relu,
}

/// What happens to a sum on its way into a convolution.
#[derive(Default)]
pub struct Way<'a> {
    /// RMS norm over channels with this gain `[channels]`, f32, `√channels` in it.
    pub gain: Option<&'a Tensor>,
    pub bend: Bend,
    /// `[past, height, width, channels]`: put in front of the result, then replaced by its last frames.
    pub cache: Option<&'a Tensor>,
    /// As [`Convolution::products`] takes it: two frames of past in front of an even number of frames.
    pub paired: bool,
}

impl Video {
    pub fn new(x: Tensor, bias: Option<&Tensor>, usual: usize) -> Video {
        Video { x, form: Form::Frames, y: None, bias: bias.cloned(), usual }
    }

    /// Where it is, rows and columns.
    pub fn place(&self) -> Result<(&Device, usize, usize)> {
        let [_, h, w, _] = self.dims()?;
        Ok((self.x.device(), h, w))
    }

    pub fn frames(&self) -> Result<usize> {
        Ok(self.dims()?[0])
    }

    pub fn channels(&self) -> Result<usize> {
        Ok(self.dims()?[3])
    }

    fn dims(&self) -> Result<[usize; 4]> {
        let (t, h, w, c) = self.x.dims4()?;
        let [t, h, w, c] = match self.form {
            Form::Frames => [t, h, w, c],
            Form::Quarters => [t, 2 * h.max(1) - 2, 2 * w.max(1) - 2, c / 4],
            Form::Products => [t / 2, h, w, c],
        };
        let like = |o: &Option<Tensor>| o.as_ref().is_none_or(|y| y.dims() == [t, h, w, c] && y.dtype() == DType::BF16);
        let bias = self.bias.as_ref().is_none_or(|b| b.dims() == [c] && b.dtype() == DType::F32);
        fits("sum", self.x.dtype() == DType::BF16 && like(&self.y) && bias)?;
        Ok([t, h, w, c])
    }

    /// The sum itself, and the sum on its way: either only when asked for.
    fn pass(&self, keep: bool, way: Option<&Way>) -> Result<(Tensor, Option<Tensor>)> {
        let [t, h, w, c] = self.dims()?;
        let device = self.x.device();
        let pending = self.form != Form::Frames || self.y.is_some() || self.bias.is_some();
        let sum = if keep && pending { Some(empty(device, (t, h, w, c), DType::BF16)?) } else { None };
        let (gain, cache) = (way.and_then(|w| w.gain), way.and_then(|w| w.cache));
        let past = cache.map_or(0, |k| k.dims()[0]);
        fits("norm", gain.is_none_or(|g| g.dims() == [c] && g.dtype() == DType::F32))?;
        fits("past", cache.is_none_or(|k| k.dims() == [past, h, w, c] && k.dtype() == DType::BF16))?;
        let paired = way.is_some_and(|w| w.paired);
        fits("pairs", !paired && self.form != Form::Products || t % 2 == 0 && (!paired || past == 2))?;
        let given = if paired { 2 * t } else { past + t };
        let out = way.map(|_| empty(device, (given, h, w, c), DType::BF16)).transpose()?;
        if sum.is_some() || out.is_some() {
            // SAFETY: shapes and types were checked; the cache is touched by this stream's work only.
            let status = unsafe {
                lq_vae_pass(
                    address(&self.x)?,
                    at(self.y.as_ref())?,
                    at(self.bias.as_ref())?,
                    at(sum.as_ref())?,
                    at(gain)?,
                    at(out.as_ref())?,
                    at(cache)?,
                    t as i32,
                    past as i32,
                    h as i32,
                    w as i32,
                    c as i32,
                    way.map_or(Bend::None, |w| w.bend) as i32,
                    self.form as i32,
                    i32::from(paired),
                    context(device)?.stream(),
                )
            };
            launched("a pass over video", status)?;
        }
        Ok((sum.unwrap_or_else(|| self.x.clone()), out))
    }

    /// The sum.
    pub fn settled(&self) -> Result<Tensor> {
        Ok(self.pass(true, None)?.0)
    }

    /// The sum, and what goes into the next convolution: `[past + frames, …]`, or `[4 · frames/2, …]` if paired.
    pub fn settled_and(&self, way: &Way) -> Result<(Tensor, Tensor)> {
        let (sum, out) = self.pass(true, Some(way))?;
        Ok((sum, out.unwrap_or_else(|| self.x.clone())))
    }

    /// Only what goes into the next convolution.
    pub fn through(&self, way: &Way) -> Result<Tensor> {
        Ok(self.pass(false, Some(way))?.1.unwrap_or_else(|| self.x.clone()))
    }

    /// `halves` of the channels become frames; rows and columns are `doubled` by repeating.
    pub fn spread(&self, halves: usize, doubled: bool) -> Result<Tensor> {
        let [t, h, w, c] = self.dims()?;
        fits("frames", halves > 0 && c % (8 * halves) == 0)?;
        if halves == 1 && !doubled {
            return self.settled();
        }
        if self.form != Form::Frames {
            return Video::new(self.settled()?, None, self.usual).spread(halves, doubled);
        }
        let times = if doubled { 2 } else { 1 };
        let out = empty(self.x.device(), (t * halves, times * h, times * w, c / halves), DType::BF16)?;
        // SAFETY: shapes and types were checked.
        let status = unsafe {
            lq_vae_spread(
                address(&self.x)?,
                at(self.y.as_ref())?,
                at(self.bias.as_ref())?,
                address(&out)?,
                t as i32,
                h as i32,
                w as i32,
                (c / halves) as i32,
                halves as i32,
                i32::from(doubled),
                context(self.x.device())?.stream(),
            )
        };
        launched("frames and doubling of video", status)?;
        Ok(out)
    }

    /// Three of eight channels as planes `[3, frames, height, width]` in −1…1, f32.
    pub fn planes(&self) -> Result<Tensor> {
        let [t, h, w, c] = self.dims()?;
        fits("planes", c == 8 && self.form == Form::Frames && self.y.is_none() && self.bias.is_some())?;
        let out = empty(self.x.device(), (3, t, h, w), DType::F32)?;
        let stream = context(self.x.device())?.stream();
        // SAFETY: shapes and types were checked.
        let status = unsafe {
            lq_vae_planes(address(&self.x)?, at(self.bias.as_ref())?, address(&out)?, t as i32, (h * w) as i32, stream)
        };
        launched("planes of video", status)?;
        Ok(out)
    }

    /// Three of eight channels as planar YUV 4:2:0: `[frames, height · width · 3/2]` bytes.
    pub fn i420(&self) -> Result<Tensor> {
        let [t, h, w, c] = self.dims()?;
        let even = h % 2 == 0 && w % 2 == 0 && self.form == Form::Frames;
        fits("colours", c == 8 && even && self.y.is_none() && self.bias.is_some())?;
        let out = empty(self.x.device(), (t, h * w / 2 * 3), DType::U8)?;
        let stream = context(self.x.device())?.stream();
        // SAFETY: shapes and types were checked.
        let status = unsafe {
            let bias = at(self.bias.as_ref())?;
            lq_vae_i420(address(&self.x)?, bias, address(&out)?, t as i32, h as i32, w as i32, stream)
        };
        launched("colours of video", status)?;
        Ok(out)
    }
}

/// Latents `[16, frames, h, w]` in f32 through `matrix` `[16, 16]` and `bias` `[16]`, with `cache` in front:
/// `[2 + frames, h, w, 16]`.
pub fn latents(z: &Tensor, matrix: &Tensor, bias: &Tensor, cache: &Tensor) -> Result<Tensor> {
    let (c, t, h, w) = z.dims4()?;
    let f32s = [z, matrix, bias].iter().all(|t| t.dtype() == DType::F32);
    fits("latents", f32s && c == 16 && matrix.dims() == [16, 16] && bias.dims() == [16])?;
    fits("latents", cache.dims() == [2, h, w, 16] && cache.dtype() == DType::BF16)?;
    let out = empty(z.device(), (2 + t, h, w, 16), DType::BF16)?;
    let stream = context(z.device())?.stream();
    // SAFETY: shapes and types were checked; the cache is touched by this stream's work only.
    let status = unsafe {
        lq_vae_latents(
            address(z)?,
            address(matrix)?,
            address(bias)?,
            address(&out)?,
            address(cache)?,
            t as i32,
            (h * w) as i32,
            stream,
        )
    };
    launched("latents", status)?;
    Ok(out)
}

/// A convolution: nothing is padded in time.
#[derive(Clone)]
pub struct Convolution {
    /// `[out, taps, side, side, in]`, bf16; channels are multiples of 8.
    pub weight: Tensor,
    /// `[out]`, f32: added by whoever reads the result.
    pub bias: Tensor,
    /// Rows and columns of zeros in front and behind.
    pub padding: (usize, usize),
    /// In time and in space.
    pub stride: (usize, usize),
    /// How what [`Convolution::apply`] gives lies.
    form: Form,
    /// `[4, out, 1, side, side, in]`, bf16.
    pairs: Option<Tensor>,
    /// 3×3×3 to at most three channels: a kernel of our own (`narrow.cu`) instead of cuDNN.
    narrow: bool,
}

/// `t` with zeros behind, up to a multiple of eight along `axis`.
fn filled(t: &Tensor, axis: usize) -> Result<Tensor> {
    let n = t.dim(axis)?;
    Ok(t.pad_with_zeros(axis, 0, n.next_multiple_of(8) - n)?)
}

impl Convolution {
    /// From the official form `[out, in, taps, side, side]` (any type) and `[out]`; channels are filled up with zeros.
    pub fn new(weight: &Tensor, bias: &Tensor, padding: (usize, usize), stride: (usize, usize)) -> Result<Self> {
        let (out, input, taps, side, _) = weight.dims5()?;
        let narrow =
            out <= 3 && (taps, side, padding, stride) == (3, 3, (1, 1), (1, 1)) && [32, 64, 96, 128].contains(&input);
        let weight = filled(&filled(weight, 0)?, 1)?.permute((0, 2, 3, 4, 1))?.contiguous()?.to_dtype(DType::BF16)?;
        let bias = filled(&bias.flatten_all()?.to_dtype(DType::F32)?, 0)?.contiguous()?;
        Ok(Self { weight, bias, padding, stride, form: Form::Frames, pairs: None, narrow })
    }

    /// Rows and columns doubled by repeating, then a convolution of 3×3 with one zero around, from `[out, in, 3, 3]` and
    /// `[out]`: computed on the small picture with 4/9 of the multiplications, and the large one is never written.
    ///
    /// Of the three rows that a doubled row looks at, two repeat the same small row: their weights are added beforehand.
    /// An even row looks at small rows i − 1 and i, the odd one at i and i + 1; so each window of 2×2 of the small picture
    /// gives the four pixels around its middle, as four times as many channels of one convolution.
    pub fn doubling(weight: &Tensor, bias: &Tensor) -> Result<Self> {
        // The even row or column, and the odd one.
        let parities = |t: &Tensor, axis: usize| -> Result<[Tensor; 2]> {
            let tap = |from: usize, n: usize| t.narrow(axis, from, n)?.sum_keepdim(axis);
            Ok([Tensor::cat(&[tap(0, 1)?, tap(1, 2)?], axis)?, Tensor::cat(&[tap(0, 2)?, tap(2, 1)?], axis)?])
        };
        let mut quarters = Vec::new();
        for rows in parities(&filled(&weight.to_dtype(DType::F32)?, 0)?, 2)? {
            quarters.extend(parities(&rows, 3)?);
        }
        let bias = filled(&bias.flatten_all()?, 0)?;
        let conv = Self::new(&Tensor::cat(&quarters, 0)?.unsqueeze(2)?, &bias, (1, 1), (1, 1))?;
        Ok(Self { form: Form::Quarters, ..conv })
    }

    /// This convolution, three taps in time, also by pairs: two frames come of four by four convolutions in space instead of
    /// six, of sums of frames with sums of taps (F(2, 3): S. Winograd, Arithmetic Complexity of Computations, 1980; A. Lavin
    /// and S. Gray, Fast Algorithms for Convolutional Neural Networks, 2016, arXiv 1509.09308).
    pub fn paired(self) -> Result<Self> {
        fits("pairs", self.weight.dim(1)? == 3 && self.stride == (1, 1) && self.form == Form::Frames)?;
        let w = self.weight.to_dtype(DType::F32)?;
        let (first, last) = (w.narrow(1, 0, 1)?, w.narrow(1, 2, 1)?);
        let (ends, middle) = (((&first + &last)? * 0.5)?, (w.narrow(1, 1, 1)? * 0.5)?);
        let pairs = Tensor::stack(&[first, (&ends + &middle)?, (&ends - &middle)?, last], 0)?;
        Ok(Self { pairs: Some(pairs.to_dtype(DType::BF16)?), ..self })
    }

    /// Whether so many frames go by pairs. Streaming equals one pass only where a cut never parts a pair.
    pub fn by_pairs(&self, frames: usize) -> bool {
        self.pairs.is_some() && frames.is_multiple_of(2)
    }

    /// [`Convolution::apply`] by pairs: of `[4 · frames/2, height, width, in]`, as [`Way::paired`] gives it.
    pub fn products(&self, x: &Tensor, usual: usize) -> Result<Video> {
        let Some(weights) = &self.pairs else { return Err(Error::Input("a convolution without pairs".into())) };
        let pairs = x.dim(0)? / 4;
        fits("pairs", x.dim(0)? == 4 * pairs)?;
        let y = self.room(x, 4 * pairs)?;
        for k in 0..4 {
            let part = |t: &Tensor| t.narrow(0, k * pairs, pairs);
            self.compute(&part(x)?, &weights.get(k)?, &part(&y)?, usual / 2)?;
        }
        Ok(Video { form: Form::Products, ..Video::new(y, Some(&self.bias), usual) })
    }

    /// `[frames, height, width, in]` convolved; the bias is still to be added. `usual`: frames that come out when a whole
    /// block passes.
    pub fn apply(&self, x: &Tensor, usual: usize) -> Result<Video> {
        Ok(Video { form: self.form, ..Video::new(self.run(x, usual)?, Some(&self.bias), usual) })
    }

    /// Frames of past that a causal convolution of this kind wants in front.
    pub fn past(&self) -> usize {
        self.weight.dims()[1] - 1
    }

    /// [`Convolution::apply`] as it lies: `[frames', height', width', out]`.
    pub fn run(&self, x: &Tensor, usual: usize) -> Result<Tensor> {
        let (t, taps) = (x.dim(0)?, self.weight.dim(1)?);
        fits("convolution", t >= taps)?;
        let frames = (t - taps) / self.stride.0 + 1;
        let y = self.room(x, frames)?;
        if !self.narrow {
            // Where frames go by pairs, only a video's very first comes here.
            let usual = if self.pairs.is_some() { 1 } else { usual };
            self.compute(x, &self.weight, &y, usual)?;
            return Ok(y);
        }
        let (_, h, w, c) = x.dims4()?;
        fits("convolution", c == self.weight.dim(4)? && x.dtype() == DType::BF16)?;
        let [n, h, w, c] = [frames, h, w, c].map(|n| n as i32);
        let stream = context(x.device())?.stream();
        // SAFETY: shapes and types were checked.
        let status = unsafe { lq_vae_narrow(address(x)?, address(&self.weight)?, address(&y)?, n, h, w, c, stream) };
        launched("a convolution to three channels", status)?;
        Ok(y)
    }

    /// Memory for `frames` frames that come out.
    fn room(&self, x: &Tensor, frames: usize) -> Result<Tensor> {
        let ((_, h, w, _), (out, _, side, ..)) = (x.dims4()?, self.weight.dims5()?);
        let (before, behind) = self.padding;
        fits("convolution", h.min(w) + before + behind >= side)?;
        let extent = |n: usize| (n + before + behind - side) / self.stride.1 + 1;
        empty(x.device(), (frames, extent(h), extent(w), out), DType::BF16)
    }

    /// One plan on one part of the operands.
    fn compute(&self, x: &Tensor, weight: &Tensor, y: &Tensor, usual: usize) -> Result<()> {
        let ((t, h, w, c), (out, taps, side, _, input)) = (x.dims4()?, weight.dims5()?);
        fits("convolution", c == input && x.dtype() == DType::BF16)?;
        let (before, behind) = self.padding;
        let numbers = [c, out, h, w, taps, side, before, behind, self.stride.0, self.stride.1, 0].map(|n| n as i64);
        let reference = ((usual.max(1) - 1) * self.stride.0 + taps) as i64;
        let context = context(x.device())?;
        let plan = plan(&context, numbers, t as i64, reference)?;
        context.run(&plan, &[(1, address(x)?), (2, address(weight)?), (3, address(y)?)])
    }
}

fn plan(context: &Context, numbers: [i64; 11], frames: i64, reference: i64) -> Result<Arc<Plan>> {
    let key = ("convolution", [&numbers[..], &[frames, reference]].concat());
    context.plan(key, |handle| {
        // SAFETY: eleven numbers, as the other side reads them.
        unsafe { lq_convolution_plan(handle, numbers.as_ptr(), frames, reference, MOST_ROOM) }
    })
}

/// Pictures `[n, in, height, width]` convolved with `[out, in, side, side]`, all f32, `padding` zeros around: `[n, out,
/// height', width']`. Tensor cores round the factors to TF32, as PyTorch's convolutions do unless told otherwise.
pub fn convolve(x: &Tensor, kernel: &Tensor, padding: usize, stride: usize) -> Result<Tensor> {
    let ((n, c, h, w), (out, input, side, _)) = (x.dims4()?, kernel.dims4()?);
    fits("convolution in f32", c == input && x.dtype() == DType::F32 && kernel.dtype() == DType::F32)?;
    let last = |t: &Tensor| t.permute((0, 2, 3, 1))?.contiguous();
    let (x, kernel) = (last(x)?, last(kernel)?);
    let extent = |n: usize| (n + 2 * padding - side) / stride + 1;
    let y = empty(x.device(), (n, extent(h), extent(w), out), DType::F32)?;
    let numbers = [c, out, h, w, 1, side, padding, padding, 1, stride, 1].map(|n| n as i64);
    let context = context(x.device())?;
    let plan = plan(&context, numbers, n as i64, n as i64)?;
    context.run(&plan, &[(1, address(&x)?), (2, address(&kernel)?), (3, address(&y)?)])?;
    Ok(y.permute((0, 3, 1, 2))?.contiguous()?)
}

/// Self-attention of one head over the pixels of each frame: `[frames, pixels, 3 · channels]` (queries, keys, values) →
/// `[frames, pixels, channels]`; softmax in f32.
pub fn attention(qkv: &Tensor) -> Result<Tensor> {
    let (t, p, c3) = qkv.dims3()?;
    fits("attention", c3 % 24 == 0 && qkv.dtype() == DType::BF16)?;
    let (c, device, step) = (c3 / 3, qkv.device(), p.next_multiple_of(8));
    let context = context(device)?;
    let out = empty(device, (t, p, c), DType::BF16)?;
    let (scores, weights) = (empty(device, (p, step), DType::F32)?, empty(device, (p, step), DType::BF16)?);
    let product = |turned: bool, wide: bool, depth: usize, columns: usize, steps: [usize; 3]| {
        let [m, k, n, a, b, c] = [p, depth, columns, steps[0], steps[1], steps[2]].map(|n| n as i64);
        let key = ("product", vec![i64::from(turned), i64::from(wide), m, k, n, a, b, c]);
        context.plan(key, |handle| {
            // SAFETY: takes numbers.
            unsafe { lq_product_plan(handle, i32::from(turned), i32::from(wide), m, k, n, a, b, c) }
        })
    };
    let compare = product(true, true, c, p, [c3, c3, step])?;
    let mix = product(false, false, p, c, [step, c3, c])?;
    let scale = 1.0 / (c as f32).sqrt();
    for frame in 0..t {
        let q = address(qkv)? + (2 * frame * p * c3) as u64;
        let (k, v) = (q + 2 * c as u64, q + 4 * c as u64);
        context.run(&compare, &[(1, q), (2, k), (3, address(&scores)?)])?;
        // SAFETY: both have `p` rows of `step`.
        let status = unsafe {
            let (from, to) = (address(&scores)?, address(&weights)?);
            lq_vae_softmax(from, to, p as i32, p as i32, step as i32, scale, context.stream())
        };
        launched("softmax", status)?;
        let to = address(&out)? + (2 * frame * p * c) as u64;
        context.run(&mix, &[(1, address(&weights)?), (2, v), (3, to)])?;
    }
    Ok(out)
}

/// Zeros to remember frames in.
pub fn blank(device: &Device, shape: (usize, usize, usize, usize)) -> Result<Tensor> {
    Ok(Tensor::zeros(shape, DType::BF16, device)?)
}
