//! FramePack: motion latents compressed more the older they are.

use candle_core::{DType, Tensor};

use super::{Config, FramePack};
use crate::model::{
    Result,
    nn::{PatchEmbed, rope::Group},
    weights::Weights,
};

/// Motion latents that are looked at.
pub(super) const FRAMES: usize = 19;

/// What happens to the newest frames when there is little motion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropMode {
    /// They are zeroed.
    Pad,
    /// Their tokens are left out.
    Drop,
}

/// The three projections.
#[derive(Debug)]
pub struct FramePacker {
    one: PatchEmbed,
    two: PatchEmbed,
    four: PatchEmbed,
    patch: [usize; 3],
    kind: FramePack,
}

impl FramePacker {
    /// Official key names below `frame_packer`.
    pub fn load(weights: &Weights, c: &Config) -> Result<Self> {
        let at = weights.pp("frame_packer");
        let [_, h, w] = c.patch;
        let time = |n| if c.framepack == FramePack::Still { 1 } else { n };
        Ok(Self {
            one: PatchEmbed::load(&at, "proj", 16, c.dim, [1, h, w])?,
            two: PatchEmbed::load(&at, "proj_2x", 16, c.dim, [time(2), 2 * h, 2 * w])?,
            four: PatchEmbed::load(&at, "proj_4x", 16, c.dim, [time(4), 4 * h, 4 * w])?,
            patch: c.patch,
            kind: c.framepack,
        })
    }

    /// `motion` `[16, frames, h, w]` (oldest first; fewer than 19 are preceded by zeros) → tokens, newest first, and
    /// where they stand. `keep` is `add_last_motion`: 2 in inference; 1 and 0 drop the newest one or three frames.
    pub fn forward(&self, motion: &Tensor, keep: usize, mode: DropMode) -> Result<(Tensor, Vec<Group>)> {
        let (c, frames, h, w) = motion.dims4()?;
        let (gh, gw) = ((h / self.patch[1]) as i64, (w / self.patch[2]) as i64);
        let group = |start: i64, end: i64, shrink: i64, span: i64| Group {
            start: [start, 0, 0],
            end: [end, gh / shrink, gw / shrink],
            span: [span, gh, gw],
            shift: 0,
        };
        let groups = [group(-1, 0, 1, 1), group(-3, -2, 2, 2), group(-19, -15, 4, 16)];
        let tokens = match self.kind {
            FramePack::Still => {
                let newest = motion.narrow(1, frames - 1, 1)?;
                let old = self.four.forward(&newest)?;
                let old = Tensor::cat(&[&old, &old, &old, &old], 0)?;
                [self.one.forward(&newest)?, self.two.forward(&newest)?, old]
            }
            FramePack::Motion => {
                let n = frames.min(FRAMES);
                let zeros = |n| Tensor::zeros((c, n, h, w), motion.dtype(), motion.device());
                let mut z = Tensor::cat(&[&zeros(FRAMES - n)?, &motion.narrow(1, frames - n, n)?], 1)?;
                if keep < 2 && mode == DropMode::Pad {
                    let off = if keep == 1 { 1 } else { 3 };
                    z = Tensor::cat(&[&z.narrow(1, 0, FRAMES - off)?, &zeros(off)?], 1)?;
                }
                [
                    self.one.forward(&z.narrow(1, 18, 1)?)?,
                    self.two.forward(&z.narrow(1, 16, 2)?)?,
                    self.four.forward(&z.narrow(1, 0, 16)?)?,
                ]
            }
        };
        let skip = match (mode, keep) {
            (DropMode::Drop, 0) => 2,
            (DropMode::Drop, 1) => 1,
            _ => 0,
        };
        let tokens: Vec<Tensor> = tokens.into_iter().skip(skip).collect();
        Ok((Tensor::cat(&tokens, 0)?.to_dtype(DType::F32)?, groups[skip..].to_vec()))
    }
}
