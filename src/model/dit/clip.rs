//! The clip form of S2V: one bidirectional pass over noisy, reference and motion tokens.

use candle_core::{DType, Tensor};

use super::{BlockAudio, Dit, DropMode, TextContext, trace::Trace};
use crate::model::{
    At, Error, Result,
    nn::{
        Residual,
        rope::{Group, Rope, Rounding},
    },
};

/// Inputs of one forward.
pub struct ClipInputs<'a> {
    /// Noisy latent `[16, T, h, w]`.
    pub latent: &'a Tensor,
    /// 0…1000.
    pub timestep: f32,
    /// None where the model takes no text.
    pub text: Option<&'a TextContext>,
    /// `[16, 1, h, w]`.
    pub reference: &'a Tensor,
    /// `[16, frames, h, w]`; none = the motion tokens are left out (first clip).
    pub motion: Option<&'a Tensor>,
    /// `add_last_motion`, 2 in inference.
    pub keep_last_motion: usize,
    /// Pose latents `[16, T, h, w]`; none = zeros.
    pub cond: Option<&'a Tensor>,
    /// Of the whole clip, from [`Dit::audio`].
    pub audio: &'a BlockAudio,
}

impl Dit {
    /// Velocity `[16, T, h, w]` (f32) of a clip.
    pub fn clip(&self, inputs: &ClipInputs, trace: &mut Trace) -> Result<Tensor> {
        let speech = self.speech()?;
        let (_, frames, _, _) = inputs.latent.dims4()?;
        let (gh, gw) = self.grid(inputs.latent)?;
        if inputs.audio.tokens.frames != frames || inputs.reference.dims()[2..] != inputs.latent.dims()[2..] {
            return Err(Error::Input(format!(
                "latent {:?}, reference {:?} and audio of {} latent frames do not belong together",
                inputs.latent.dims(),
                inputs.reference.dims(),
                inputs.audio.tokens.frames
            )));
        }
        let mask = |i: usize| speech.mask.narrow(0, i, 1);
        let zeros;
        let cond = match inputs.cond {
            Some(c) => c,
            None => {
                zeros = inputs.latent.zeros_like()?;
                &zeros
            }
        };
        let noisy = (self.patch.forward(inputs.latent)? + speech.cond.forward(cond)?)?.to_dtype(DType::F32)?;
        let n = noisy.dim(0)?;
        let reference = self.patch.forward(inputs.reference)?.to_dtype(DType::F32)?;
        let mut parts = vec![noisy.broadcast_add(&mask(0)?)?, reference.broadcast_add(&mask(1)?)?];
        let mut groups = vec![Group::frames(0, frames, gh, gw), Group::frames(30, 1, gh, gw)];
        if let Some(motion) = inputs.motion {
            let (tokens, at) = speech.packer.forward(motion, inputs.keep_last_motion, DropMode::Pad)?;
            parts.push(tokens.broadcast_add(&mask(2)?)?);
            groups.extend(at);
        }
        let x = Tensor::cat(&parts, 0)?;
        let rope = Rope::new(&groups, self.config.head(), Rounding::Exact, &self.device)?;
        trace.see("tokens_in", &x);
        trace.see("rope_cos", &rope.cos()?);
        trace.see("rope_sin", &rope.sin()?);
        let timing = self.timing(&[inputs.timestep, 0.0], 1)?;
        trace.see("e0", &timing.e0.transpose(0, 1)?);
        let runs = [n, x.dim(0)? - n];
        let mut x = Residual::new(x);
        for (i, block) in self.blocks.iter().enumerate() {
            let text = inputs.text.and_then(|t| t.blocks.get(i));
            trace.within(|| format!("mid.blocks.{i}"));
            block
                .bring(&self.device)?
                .forward(&mut x, &timing.blocks[i], &runs, text, trace, |a, y| a.whole(y, &rope))
                .at(|| format!("block {i}"))?;
            trace.outside();
            trace.see_tokens(|| format!("mid.blocks.{i}"), &mut x)?;
            if let Some(j) = self.injector_after(i) {
                let all = x.into_tokens()?;
                let mut heard = Residual::new(all.narrow(0, 0, n)?.force_contiguous()?);
                speech.injectors[j]
                    .bring(&self.device)?
                    .forward(&mut heard, &inputs.audio.injectors[j], frames)
                    .at(|| format!("audio after block {i}"))?;
                let others = all.narrow(0, n, all.dim(0)? - n)?;
                x = Residual::new(Tensor::cat(&[&heard.into_tokens()?, &others], 0)?);
                trace.see_tokens(|| format!("mid.after_inject.{i}"), &mut x)?;
            }
        }
        let x = x.into_tokens()?;
        let patches = self.head.forward(&x.narrow(0, 0, n)?.contiguous()?, &timing.head, &[n], None).at(|| "head")?;
        trace.see("mid.head", &patches);
        self.head.unpatch(&patches, frames, gh, gw)
    }
}
