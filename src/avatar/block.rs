//! Block mode (LiveAvatar): causal blocks of latent frames, a few steps each, one key-value ring per step (MODEL.md §9;
//! liveavatar/models/wan/causal_s2v_pipeline.py and causal_s2v_pipeline_tpp.py of Alibaba-Quark/LiveAvatar at 9c2c38d).
//!
//! Two official programs, two ways to pixels: [`Deferred`] decodes clip by clip with re-encoded motion in front (one
//! GPU); [`Continuous`] decodes every block as it comes with the autoencoder's own history (five GPUs; here the ranks
//! run one after the other on one device, which gives the same numbers). Live faces use the second.

use std::sync::Arc;

use candle_core::Tensor;

use super::speakers::hear;
use super::studio::{Film, Studio, last, slide, still, without_first};
use crate::model::{
    At, Error, Result,
    dit::{Halfway, Opening, Schedule, StreamState, TextContext},
    vae::{Decoding, Probe, WanVae},
};

/// Copies of the picture that are encoded to get its settled latent.
const COPIES: usize = 5;
/// Frames that the very first block loses.
pub(super) const WARM_UP: usize = 3;
/// Motion latents that prime the continuous decoder.
const PRIMER: usize = 7;

/// Sizes of a block-mode run. Frames per block are the transformer's own.
#[derive(Clone, Debug)]
pub struct BlockSettings {
    /// Video frames per clip; a clip only sets noise seeds, audio slices and ring size.
    pub clip_frames: usize,
    /// Pixel frames of motion context (73).
    pub motion_frames: usize,
}

impl Default for BlockSettings {
    fn default() -> Self {
        BlockSettings { clip_frames: 48, motion_frames: 73 }
    }
}

impl BlockSettings {
    /// Blocks of `per_block` latent frames in a clip.
    ///
    /// # Errors
    /// There are none.
    pub(super) fn blocks(&self, per_block: usize) -> Result<usize> {
        match self.clip_frames / 4 / per_block.max(1) {
            0 => {
                let frames = self.clip_frames;
                Err(Error::Config(format!("clips of {frames} frames hold no block of {per_block} latent frames")))
            }
            blocks => Ok(blocks),
        }
    }
}

/// Reference and motion latents of a picture `[3, 1, height, width]` that is seen `motion_frames` times.
pub(super) fn look(vae: &WanVae, picture: &Tensor, motion_frames: usize) -> Result<(Tensor, Tensor)> {
    Ok((vae.encode(picture)?, vae.encode(&still(picture, motion_frames)?)?))
}

/// A decoder that has the picture's past.
pub(super) fn prime(vae: &WanVae, motion: &Tensor) -> Result<Decoding> {
    let mut decoding = Decoding::default();
    vae.decode_next(&mut decoding, &motion.narrow(1, 0, PRIMER.min(motion.dim(1)?))?)?;
    Ok(decoding)
}

/// Pixels of a block's latents, three frames fewer for the first block.
pub(super) fn show(vae: &WanVae, decoding: &mut Decoding, latents: &Tensor, first: bool) -> Result<Tensor> {
    let frames = vae.decode_next(decoding, latents)?;
    if first { without_first(&frames, WARM_UP) } else { Ok(frames) }
}

/// The same as frames in host memory; `planar`: as planes, where nothing larger has to leave the device for them.
pub(super) fn film(vae: &WanVae, decoding: &mut Decoding, latents: &Tensor, first: bool, planar: bool) -> Result<Film> {
    if !planar || !vae.gives_planes() {
        return Film::packed(&show(vae, decoding, latents, first)?);
    }
    let planes = vae.decode_i420(decoding, latents)?;
    let lost = if first { WARM_UP } else { 0 };
    Film::planar(&planes.narrow(0, lost, planes.dim(0)?.saturating_sub(lost))?.contiguous()?)
}

/// The transformer's half of block mode, the same for both ways to pixels.
pub struct Blocks {
    state: StreamState,
    done: usize,
    /// Where each of several speakers is heard; empty for one.
    reach: Vec<Tensor>,
}

impl Blocks {
    fn open(studio: &Studio, opening: &Opening, schedule: Arc<Schedule>) -> Result<Self> {
        let state = studio.dit.open(opening, &schedule)?;
        Ok(Blocks { state, done: 0, reach: Vec::new() })
    }

    /// One block: features `[layers, channels, 4 · frames_per_block]`, noise `[16, frames_per_block, h, w]` → latents.
    fn next(
        &mut self,
        studio: &Studio,
        features: &Tensor,
        noise: &Tensor,
        distance: &[usize],
        probe: Probe,
    ) -> Result<Tensor> {
        let dit = &studio.dit;
        let audio = hear(dit, features, &self.reach)?;
        let (begin, way) = (Halfway { latent: noise.clone(), tokens: None }, dit.way(self.state.steps()));
        let end = dit
            .travel(&mut self.state, begin, way, &audio, None, distance, probe)
            .at(|| format!("block {}", self.done))?;
        self.state.advance(dit.config().frames_per_block);
        self.done += 1;
        Ok(end.latent)
    }
}

/// One GPU: blocks now, pixels clip by clip, later or (`online`) the first clip at once so that it can replace the
/// reference.
pub struct Deferred {
    settings: BlockSettings,
    blocks: Blocks,
    /// `[16, 2, h, w]`; the second frame is the reference.
    reference: Tensor,
    /// The last pixel frames `[3, 5 · motion_frames, height, width]`.
    window: Tensor,
    /// Their latents.
    motion: Tensor,
    online: bool,
    shown: usize,
    clips: usize,
}

impl Deferred {
    /// `picture` `[3, 1, height, width]` at the output size.
    pub fn open(
        studio: &Studio,
        picture: &Tensor,
        text: Option<Arc<TextContext>>,
        schedule: Arc<Schedule>,
        settings: BlockSettings,
        online: bool,
    ) -> Result<Self> {
        let copies = still(picture, COPIES)?;
        let reference = studio.vae.encode(&copies)?;
        // the official program repeats the stack, not the picture: five times motion_frames
        let window = still(&copies, settings.motion_frames)?;
        let motion = studio.vae.encode(&window)?;
        let settled = reference.narrow(1, 1, 1)?;
        let opening = Opening { reference: &settled, motion: Some(&motion), text };
        let blocks = Blocks::open(studio, &opening, schedule)?;
        Ok(Deferred { settings, blocks, reference, window, motion, online, shown: 0, clips: 0 })
    }

    /// Latents of the stack of pictures `[16, 2, h, w]`.
    pub fn reference(&self) -> &Tensor {
        &self.reference
    }

    /// Latents of the motion window.
    pub fn motion(&self) -> &Tensor {
        &self.motion
    }

    /// From now on features belong to several speakers, one after the other along the layers; see
    /// [`super::speakers::reach`]. Before the first block.
    pub fn cast(&mut self, reach: Vec<Tensor>) {
        self.blocks.reach = reach;
    }

    /// The latents of a whole clip `[16, T, h, w]` from its features `[layers, channels, clip_frames]`, noise and ρ per
    /// block and step.
    pub fn clip(
        &mut self,
        studio: &Studio,
        features: &Tensor,
        noise: &Tensor,
        distance: &[Vec<usize>],
        probe: Probe,
    ) -> Result<Tensor> {
        let per_block = studio.dit.config().frames_per_block;
        let blocks = noise.dim(1)? / per_block;
        if blocks == 0 || features.dim(2)? != blocks * per_block * 4 {
            return Err(Error::Input(format!(
                "a clip of {} latent frames with {} frames of audio is not made of blocks of {per_block}",
                noise.dim(1)?,
                features.dim(2)?
            )));
        }
        let mut done = Vec::new();
        for b in 0..blocks {
            let noise = noise.narrow(1, b * per_block, per_block)?;
            let heard = features.narrow(2, b * per_block * 4, per_block * 4)?;
            let rho = distance.get(b).map_or(&[][..], Vec::as_slice);
            done.push(self.blocks.next(studio, &heard, &noise, rho, probe)?);
        }
        self.clips += 1;
        Ok(Tensor::cat(&done, 1)?)
    }

    /// Pixels of a clip's latents `[3, n, height, width]`, in the order of the clips. With `online`, the first clip
    /// must be shown before the second is made: it replaces the reference.
    pub fn show(&mut self, studio: &Studio, latents: &Tensor) -> Result<Tensor> {
        let decoded = studio.vae.decode(&Tensor::cat(&[&self.motion, latents], 1)?)?;
        let mut frames = last(&decoded, self.settings.clip_frames)?;
        let first = self.shown == 0;
        if first {
            frames = without_first(&frames, WARM_UP)?;
        }
        self.window = slide(&self.window, &frames, self.settings.motion_frames)?;
        self.motion = studio.vae.encode(&self.window)?;
        if first && self.online {
            let reference = latents.narrow(1, 0, 1)?;
            studio.dit.recondition(&mut self.blocks.state, &reference, Some(&self.motion))?;
        }
        self.shown += 1;
        Ok(frames)
    }
}

/// Every block decoded as it comes: what a live face uses.
pub struct Continuous {
    blocks: Blocks,
    blocks_per_clip: usize,
    reference: Tensor,
    motion: Tensor,
    decoding: Decoding,
    /// The first generated latent frame, which becomes the reference when the second clip begins.
    own: Option<Tensor>,
}

/// One block of a [`Continuous`] face.
pub struct Shown {
    /// `[16, frames_per_block, h, w]`.
    pub latents: Tensor,
    /// `[3, n, height, width]` in −1..1: four per latent frame, three fewer in the very first block.
    pub frames: Tensor,
}

impl Continuous {
    /// `picture` `[3, 1, height, width]` at the output size.
    pub fn open(
        studio: &Studio,
        picture: &Tensor,
        text: Option<Arc<TextContext>>,
        schedule: Arc<Schedule>,
        settings: &BlockSettings,
    ) -> Result<Self> {
        Self::open_looked(studio, look(&studio.vae, picture, settings.motion_frames)?, text, schedule, settings)
    }

    /// The same from what was seen of the picture before: [`Continuous::reference`] and [`Continuous::motion`].
    pub fn open_looked(
        studio: &Studio,
        (reference, motion): (Tensor, Tensor),
        text: Option<Arc<TextContext>>,
        schedule: Arc<Schedule>,
        settings: &BlockSettings,
    ) -> Result<Self> {
        let blocks_per_clip = settings.blocks(studio.dit.config().frames_per_block)?;
        let opening = Opening { reference: &reference, motion: Some(&motion), text };
        let blocks = Blocks::open(studio, &opening, schedule)?;
        let decoding = prime(&studio.vae, &motion)?;
        Ok(Continuous { blocks, blocks_per_clip, reference, motion, decoding, own: None })
    }

    /// Latent of the picture `[16, 1, h, w]`.
    pub fn reference(&self) -> &Tensor {
        &self.reference
    }

    /// Latents of the picture repeated `[16, frames, h, w]`.
    pub fn motion(&self) -> &Tensor {
        &self.motion
    }

    /// From now on features belong to several speakers, one after the other along the layers; see
    /// [`super::speakers::reach`]. Before the first block.
    pub fn cast(&mut self, reach: Vec<Tensor>) {
        self.blocks.reach = reach;
    }

    /// The next block: features `[layers, channels, 4 · frames_per_block]`, noise `[16, frames_per_block, h, w]`, ρ per
    /// step.
    pub fn next(
        &mut self,
        studio: &Studio,
        features: &Tensor,
        noise: &Tensor,
        distance: &[usize],
        probe: Probe,
    ) -> Result<Shown> {
        let latents = self.imagine(studio, features, noise, distance, probe)?;
        let frames = self.show(studio, &latents)?;
        Ok(Shown { latents, frames })
    }

    /// The transformer's half of [`Continuous::next`]: latents `[16, frames_per_block, h, w]`.
    pub fn imagine(
        &mut self,
        studio: &Studio,
        features: &Tensor,
        noise: &Tensor,
        distance: &[usize],
        probe: Probe,
    ) -> Result<Tensor> {
        if self.blocks.done == self.blocks_per_clip
            && let Some(own) = &self.own
        {
            studio.dit.recondition(&mut self.blocks.state, own, Some(&self.motion))?;
        }
        let latents = self.blocks.next(studio, features, noise, distance, probe)?;
        if self.own.is_none() {
            self.own = Some(latents.narrow(1, 0, 1)?.force_contiguous()?);
        }
        Ok(latents)
    }

    /// The decoder's half: pixels of the latents that were imagined last, three frames fewer for the first block.
    pub fn show(&mut self, studio: &Studio, latents: &Tensor) -> Result<Tensor> {
        show(&studio.vae, &mut self.decoding, latents, self.blocks.done <= 1)
    }

    /// The same as frames in host memory, as planes if `planar` and the decoder gives them.
    pub(super) fn film(&mut self, studio: &Studio, latents: &Tensor, planar: bool) -> Result<Film> {
        film(&studio.vae, &mut self.decoding, latents, self.blocks.done <= 1, planar)
    }
}
