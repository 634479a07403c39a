//! The small decoder on an NVIDIA card, in bf16, channels last: cuDNN convolves, what lies between two convolutions is one
//! pass over memory. The frame before is not put beside a frame's channels but in front of the frames: a memory block's
//! first convolution over twice the channels is one over two frames in time. The 1×1 growth runs before the doubling of
//! rows and columns instead of after it, on a quarter of the pixels: repeating pixels does not change what it gives. The
//! convolution after the doubling runs on the small picture, too ([`Convolution::doubling`]).

use candle_core::{DType, Result, Tensor};

use super::{Conv, Small, Taehv};
use crate::model::{
    Result as Loaded,
    kernels::cuda::vae::{Bend, Convolution, Video, Way, blank},
};

/// Latents of a usual block: what engines are chosen for.
const USUAL: usize = 3;
const RELU: Way = Way { gain: None, bend: Bend::Relu, cache: None, paired: false };

struct Stage {
    blocks: Vec<[Convolution; 3]>,
    grow: Convolution,
    /// Frames that one becomes.
    times: usize,
    out: Convolution,
}

pub(super) struct Decoder {
    inlet: Convolution,
    stages: Vec<Stage>,
    /// Gives −1…1 where the published one gives 0…1.
    outlet: Convolution,
}

pub(super) fn error(e: crate::model::Error) -> candle_core::Error {
    candle_core::Error::Msg(e.to_string())
}

/// A convolution in space; `scale` and `shift` bend what it gives.
fn flat(conv: &Conv, (scale, shift): (f64, f64)) -> Loaded<Convolution> {
    let out = conv.0.dim(0)?;
    let bias = match &conv.1 {
        Some(b) => b.flatten_all()?.to_dtype(DType::F32)?,
        None => Tensor::zeros(out, DType::F32, conv.0.device())?,
    };
    let side = conv.0.dim(2)? / 2;
    Convolution::new(&conv.0.affine(scale, 0.0)?.unsqueeze(2)?, &bias.affine(scale, shift)?, (side, side), (1, 1))
}

/// Rows and columns doubled and the convolution after it, which has no bias, in one.
fn doubling(conv: &Conv) -> Loaded<Convolution> {
    Convolution::doubling(&conv.0, &Tensor::zeros(conv.0.dim(0)?, DType::F32, conv.0.device())?)
}

/// A convolution over a frame's channels and those of the frame before, as one over two frames: the older comes first.
fn over_two(conv: &Conv) -> Loaded<Convolution> {
    let n = conv.0.dim(1)? / 2;
    let taps = Tensor::stack(&[conv.0.narrow(1, n, n)?, conv.0.narrow(1, 0, n)?], 2)?;
    let bias = conv.1.as_ref().map_or_else(|| Tensor::zeros(n, DType::F32, conv.0.device()), Tensor::flatten_all)?;
    Convolution::new(&taps, &bias, (1, 1), (1, 1))
}

impl Decoder {
    /// `None` where the form does not fit: not a card, not bf16, or widths that are no multiples of eight.
    pub(super) fn of(net: &Taehv) -> Loaded<Option<Self>> {
        let wide = |c: &Conv| -> Result<bool> { Ok(c.0.dim(0)? % 8 == 0 && c.0.dim(0)? <= 768) };
        let mut fits = net.inlet.0.device().is_cuda() && net.dtype == DType::BF16 && wide(&net.inlet)?;
        for stage in &net.stages {
            fits &= wide(&stage.grow)? && wide(&stage.out)?;
        }
        if !fits {
            return Ok(None);
        }
        let mut stages = Vec::new();
        for stage in &net.stages {
            let blocks = stage.blocks.iter();
            let blocks = blocks.map(|[a, b, c]| Ok([over_two(a)?, flat(b, (1.0, 0.0))?, flat(c, (1.0, 0.0))?]));
            stages.push(Stage {
                blocks: blocks.collect::<Loaded<_>>()?,
                times: stage.grow.0.dim(0)? / stage.grow.0.dim(1)?,
                grow: flat(&stage.grow, (1.0, 0.0))?,
                out: doubling(&stage.out)?,
            });
        }
        Ok(Some(Decoder { inlet: flat(&net.inlet, (1.0, 0.0))?, stages, outlet: flat(&net.outlet, (2.0, -1.0))? }))
    }

    /// `[frames, channels, h, w]` to pictures of eight channels whose bias is not added yet.
    pub(super) fn decode(&self, state: &mut Small, x: Tensor, growth: usize) -> Result<Video> {
        self.run(state, x, growth).map_err(error)
    }

    fn run(&self, state: &mut Small, x: Tensor, growth: usize) -> Loaded<Video> {
        let mut usual = USUAL;
        let c = x.dim(1)?;
        let x = x.pad_with_zeros(1, 0, c.next_multiple_of(8) - c)?.permute((0, 2, 3, 1))?.contiguous()?;
        let mut x = self.inlet.apply(&x, usual)?;
        let (mut number, mut bend) = (0, Bend::Relu);
        for stage in &self.stages {
            for [a, b, c] in &stage.blocks {
                let (device, h, w) = x.place()?;
                if state.past.len() <= number {
                    state.past.push(Some(blank(device, (1, h, w, x.channels()?))?));
                }
                let before = state.past[number].as_ref();
                let joined = x.through(&Way { bend, cache: before, ..Way::default() })?;
                let now = joined.narrow(0, 1, joined.dim(0)? - 1)?;
                let y = b.apply(&a.apply(&joined, usual)?.through(&RELU)?, usual)?.through(&RELU)?;
                x = Video { y: Some(now), ..c.apply(&y, usual)? };
                bend = Bend::Relu;
                number += 1;
            }
            let grown =
                Video { bias: None, ..stage.grow.apply(&x.through(&RELU)?, usual)? }.spread(stage.times, false)?;
            usual *= stage.times;
            // What comes out of a stage goes into the next block as it is.
            (x, bend) = (Video { bias: None, ..stage.out.apply(&grown, usual)? }, Bend::None);
        }
        let mut y = self.outlet.run(&x.through(&RELU)?, usual)?;
        if !state.begun {
            state.begun = true;
            y = y.narrow(0, growth - 1, y.dim(0)? - (growth - 1))?;
        }
        Ok(Video::new(y, Some(&self.outlet.bias), usual))
    }
}
