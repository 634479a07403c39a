//! The base family (T2V, I2V, TI2V): no audio, no reference, no motion; a timestep per token.

use candle_core::{DType, Tensor};

use super::{Dit, TextContext, trace::Trace};
use crate::model::{
    At, Error, Result,
    nn::{
        Residual,
        rope::{Group, Rope, Rounding},
    },
};

impl Dit {
    /// Velocity `[out_dim, T, h, w]` (f32) of a latent `[in_dim, T, h, w]` (for I2V: the noisy latent and the 20 extra
    /// channels, one after the other). `timesteps`: one for all tokens, or one per token (TI2V: 0 for a given frame).
    pub fn base(&self, latent: &Tensor, timesteps: &[f32], text: &TextContext, trace: &mut Trace) -> Result<Tensor> {
        let (_, frames, _, _) = latent.dims4()?;
        let (gh, gw) = self.grid(latent)?;
        let x = self.patch.forward(latent)?.to_dtype(DType::F32)?;
        let n = x.dim(0)?;
        if timesteps.len() != 1 && timesteps.len() < n {
            return Err(Error::Input(format!("{} timesteps for {n} tokens", timesteps.len())));
        }
        // Neighbours with the same timestep share one modulation.
        let (mut values, mut runs): (Vec<f32>, Vec<usize>) = (Vec::new(), Vec::new());
        for i in 0..n {
            let t = if timesteps.len() == 1 { timesteps[0] } else { timesteps[i] };
            match (values.last(), runs.last_mut()) {
                (Some(v), Some(run)) if *v == t => *run += 1,
                _ => {
                    values.push(t);
                    runs.push(1);
                }
            }
        }
        let timing = self.timing(&values, values.len())?;
        let rope = Rope::new(&[Group::frames(0, frames, gh, gw)], self.config.head(), Rounding::Exact, &self.device)?;
        let mut x = Residual::new(x);
        for (i, block) in self.blocks.iter().enumerate() {
            trace.within(|| format!("mid.blocks.{i}"));
            block
                .bring(&self.device)?
                .forward(&mut x, &timing.blocks[i], &runs, text.blocks.get(i), trace, |a, y| a.whole(y, &rope))
                .at(|| format!("block {i}"))?;
            trace.outside();
            trace.see_tokens(|| format!("mid.blocks.{i}"), &mut x)?;
        }
        let x = x.into_tokens()?;
        let patches = self.head.forward(&x, &timing.head, &runs, None).at(|| "head")?;
        self.head.unpatch(&patches, frames, gh, gw)
    }
}
