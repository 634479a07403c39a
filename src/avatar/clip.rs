//! Clip mode (S2V): one bidirectional diffusion per clip, the last frames handed from clip to clip as motion context
//! (MODEL.md §8; wan/speech2video.py of Wan-Video/Wan2.2 at 42bf4cf).

use std::sync::Arc;

use candle_core::Tensor;

use super::speakers::hear;
use super::studio::{Studio, last, slide, still, without_first};
use crate::model::{
    At, Error, Result,
    dit::{BlockAudio, ClipInputs, TextContext, Trace},
    sampler::Solver,
    vae::Probe,
};

/// Frames of the reference picture at the end of the first motion window when a clip begins with the picture itself.
const FIRST_FRAMES: usize = 6;
/// Frames that a clip without motion context loses at its beginning.
pub(super) const WARM_UP: usize = 3;

/// How clips are made. The defaults are the official ones (wan/configs/wan_s2v_14B.py).
#[derive(Clone, Debug)]
pub struct ClipSettings {
    /// Video frames per clip; a multiple of four.
    pub clip_frames: usize,
    /// Pixel frames that reach from clip to clip.
    pub motion_frames: usize,
    pub solver: Solver,
    pub steps: usize,
    pub shift: f64,
    /// Classifier-free guidance; the second pass is left out at 1 or below.
    pub guidance: f64,
    /// Begin with the picture itself instead of free motion.
    pub first_frame: bool,
}

impl Default for ClipSettings {
    fn default() -> Self {
        ClipSettings {
            clip_frames: 80,
            motion_frames: 73,
            solver: Solver::UniPc,
            steps: 40,
            shift: 3.0,
            guidance: 4.5,
            first_frame: false,
        }
    }
}

impl ClipSettings {
    /// Latent frames per clip.
    pub fn latent_frames(&self) -> usize {
        let motion = self.motion_frames.div_ceil(4);
        ((self.clip_frames + 3 + self.motion_frames) / 4).saturating_sub(motion)
    }

    fn check(&self) -> Result<()> {
        if self.clip_frames == 0 || self.clip_frames % 4 != 0 || self.motion_frames == 0 || self.steps == 0 {
            return Err(Error::Config(format!(
                "clips of {} frames with {} of motion in {} steps cannot be made: clip frames must be a multiple of 4, \
                 and none may be zero",
                self.clip_frames, self.motion_frames, self.steps
            )));
        }
        Ok(())
    }
}

/// What a face says to look like: embeddings of the prompt, and of the negative prompt for guidance.
#[derive(Clone, Debug)]
pub struct Words {
    pub prompt: Arc<TextContext>,
    pub negative: Option<Arc<TextContext>>,
}

/// One face in clip mode.
pub struct ClipStream {
    settings: ClipSettings,
    words: Words,
    reference: Tensor,
    /// The last pixel frames `[3, motion_frames, height, width]`.
    window: Tensor,
    /// Their latents, once they are asked for: a first clip without motion and a last one never ask.
    motion: Option<Tensor>,
    clips: usize,
    /// Where each of several speakers is heard; empty for one.
    reach: Vec<Tensor>,
}

impl ClipStream {
    /// `picture` `[3, 1, height, width]` at the output size.
    pub fn open(studio: &Studio, picture: &Tensor, words: Words, settings: ClipSettings) -> Result<Self> {
        settings.check()?;
        let (_, _, h, w) = picture.dims4()?;
        let reference = studio.vae.encode(picture)?;
        let n = settings.motion_frames;
        let mut window = Tensor::zeros((3, n, h, w), picture.dtype(), picture.device())?;
        if settings.first_frame {
            window = slide(&window, &still(picture, FIRST_FRAMES)?, FIRST_FRAMES)?;
        }
        Ok(ClipStream { settings, words, reference, window, motion: None, clips: 0, reach: Vec::new() })
    }

    /// From now on features belong to several speakers, one after the other along the layers; see
    /// [`super::speakers::reach`].
    pub fn cast(&mut self, reach: Vec<Tensor>) {
        self.reach = reach;
    }

    /// Latent of the picture `[16, 1, h, w]`.
    pub fn reference(&self) -> &Tensor {
        &self.reference
    }

    /// Latents of the motion window `[16, frames, h, w]`.
    pub fn motion(&mut self, studio: &Studio) -> Result<Tensor> {
        if let Some(motion) = &self.motion {
            return Ok(motion.clone());
        }
        Ok(self.motion.insert(studio.vae.encode(&self.window)?).clone())
    }

    /// Whether the next clip starts without motion context.
    fn unmoved(&self) -> bool {
        self.clips == 0 && !self.settings.first_frame
    }

    /// The next clip: features `[layers, channels, clip_frames]` of its speech, noise `[16, T, h, w]`, pose latents of
    /// the same shape if any. Frames `[3, n, height, width]` in −1..1; n is `clip_frames`, three fewer in a first clip
    /// without motion. The probe sees `latents_in` before and `pred` after every pass.
    pub fn next(
        &mut self,
        studio: &Studio,
        features: &Tensor,
        noise: &Tensor,
        pose: Option<&Tensor>,
        probe: Probe,
    ) -> Result<Tensor> {
        let latents = self.imagine(studio, features, noise, pose, probe)?;
        self.show(studio, &latents)
    }

    /// The transformer's half of [`ClipStream::next`]: latents `[16, T, h, w]`.
    pub fn imagine(
        &mut self,
        studio: &Studio,
        features: &Tensor,
        noise: &Tensor,
        pose: Option<&Tensor>,
        probe: Probe,
    ) -> Result<Tensor> {
        let motion = if self.unmoved() { None } else { Some(self.motion(studio)?) };
        let guided = self.settings.guidance > 1.0;
        let audio = hear(&studio.dit, features, &self.reach)?;
        let silence = if guided { Some(hear(&studio.dit, &features.zeros_like()?, &self.reach)?) } else { None };
        let mut sampler = self.settings.solver.start(self.settings.steps, self.settings.shift)?;
        let mut x = noise.clone();
        for step in 0..self.settings.steps {
            probe("latents_in", &x);
            let timestep = sampler.timestep(step)?;
            let pass = |words: &TextContext, audio: &BlockAudio| {
                let inputs = ClipInputs {
                    latent: &x,
                    timestep,
                    text: Some(words),
                    reference: &self.reference,
                    motion: motion.as_ref(),
                    keep_last_motion: 2,
                    cond: pose,
                    audio,
                };
                studio.dit.clip(&inputs, &mut Trace::off())
            };
            let mut v = pass(&self.words.prompt, &audio).at(|| format!("clip {}, step {step}", self.clips))?;
            probe("pred", &v);
            if let (Some(silence), Some(negative)) = (&silence, &self.words.negative) {
                let free = pass(negative, silence).at(|| format!("clip {}, step {step}", self.clips))?;
                probe("pred", &free);
                v = (&free + ((v - &free)? * self.settings.guidance)?)?;
            }
            x = sampler.step(step, &x, &v)?;
        }
        Ok(x)
    }

    /// The decoder's half: the clip's pixels; they become the next clip's motion context.
    pub fn show(&mut self, studio: &Studio, latents: &Tensor) -> Result<Tensor> {
        let unmoved = self.unmoved();
        let before = if unmoved { self.reference.clone() } else { self.motion(studio)? };
        let decoded = studio.vae.decode(&Tensor::cat(&[&before, latents], 1)?)?;
        let mut frames = last(&decoded, self.settings.clip_frames)?;
        if unmoved {
            frames = without_first(&frames, WARM_UP)?;
        }
        self.window = slide(&self.window, &frames, self.settings.motion_frames)?;
        self.motion = None;
        self.clips += 1;
        Ok(frames)
    }
}

/// Latents of a clip's pose pictures `[3, clip_frames, height, width]`: the first one is doubled in front. The first
/// latent belongs to the doubled picture and is dropped by [`drop_first`] before the transformer sees them.
pub fn pose_latents(studio: &Studio, pose: &Tensor) -> Result<Tensor> {
    studio.vae.encode(&Tensor::cat(&[&pose.narrow(1, 0, 1)?, pose], 1)?).map_err(Into::into)
}

/// Without the first latent frame.
pub fn drop_first(latents: &Tensor) -> Result<Tensor> {
    Ok(latents.narrow(1, 1, latents.dim(1)?.saturating_sub(1))?)
}
