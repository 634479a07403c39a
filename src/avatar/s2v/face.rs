//! One face of the 14B model.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use candle_core::{Device, Tensor};

use super::{ears::Ears, pose::Pose};
use crate::{
    avatar::{
        AvatarError, Intake, Result, Stream,
        block::Continuous,
        clip::ClipStream,
        noise::{normal, whole},
        studio::{Film, Studio},
    },
    media::{AudioBlock, Epoch, Frame, FrameBlock, Geometry, MediaTime, Pixels, StageTimes},
    model::{self, vae::quiet},
};

/// How far ahead of a block the reference may stay; drawn anew for every step (causal_model_s2v.py of
/// Alibaba-Quark/LiveAvatar at 9c2c38d draws from an unseeded generator, here it comes from the face's seed).
pub(super) const DISTANCE: (usize, usize) = (4, 30);

/// The two ways to frames.
pub(super) enum Way {
    Block { face: Box<Continuous>, steps: usize },
    Clip { face: Box<ClipStream>, pose: Option<Pose> },
}

/// One voice under way.
pub(super) struct Speaker {
    pub(super) ears: Ears,
    pub(super) intake: Intake,
}

/// Everything one face remembers.
pub(super) struct Face {
    pub(super) studio: Arc<Studio>,
    pub(super) geometry: Geometry,
    pub(super) way: Way,
    /// One speaker, or several.
    pub(super) speakers: Vec<Speaker>,
    pub(super) seed: u64,
    /// Frames may be planes.
    pub(super) planar: bool,
    /// Shape of a block's noise: channels, latent frames, rows, columns.
    pub(super) noise: [usize; 4],
    /// The next block.
    pub(super) index: u64,
}

impl Face {
    fn block(&mut self) -> model::Result<(Vec<Pixels>, StageTimes)> {
        let studio = self.studio.clone();
        let device = studio.device().clone();
        let began = Instant::now();
        // Audio is counted in whole blocks; the first block's missing frames are the silence before the speech.
        let frames = self.geometry.block_frames as usize;
        let first = self.index * frames as u64;
        let heard = self.speakers.iter_mut().map(|s| s.ears.listen(&studio.hearing, &device, first, frames));
        let heard = heard.collect::<model::Result<Vec<_>>>()?;
        let features = if let [one] = &heard[..] { one.clone() } else { Tensor::cat(&heard, 0)? };
        let heard = settled(&device, began)?;
        let noise = normal(self.seed, self.index, self.noise.iter().product());
        let noise = Tensor::from_vec(noise, &self.noise, &Device::Cpu)?.to_device(&device)?;
        let latents = match &mut self.way {
            Way::Block { face, steps } => {
                let distance = whole(self.seed, self.index, *steps, DISTANCE);
                face.imagine(&studio, &features, &noise, &distance, &mut quiet)?
            }
            Way::Clip { face, pose } => {
                let pose = pose.as_mut().map(|p| p.clip(&studio, frames)).transpose()?;
                face.imagine(&studio, &features, &noise, pose.as_ref(), &mut quiet)?
            }
        };
        let imagined = settled(&device, began)?;
        let film = match &mut self.way {
            Way::Block { face, .. } => face.film(&studio, &latents, self.planar)?,
            Way::Clip { face, .. } => Film::packed(&face.show(&studio, &latents)?)?,
        };
        let shown = film.cut();
        let (generation, decode) = (imagined - heard, settled(&device, began)? - imagined);
        let stages = StageTimes { features: heard, generation, decode, busiest: None };
        Ok((shown, stages))
    }
}

/// Time since `began` when the device has done what it was told. Once a stage: a few microseconds.
fn settled(device: &Device, began: Instant) -> model::Result<Duration> {
    device.synchronize()?;
    Ok(began.elapsed())
}

/// The frames of block `index` of a face that began at `origin`.
pub(super) fn frames(shown: Vec<Pixels>, g: &Geometry, origin: MediaTime, index: u64) -> Vec<Frame> {
    let first = g.first_frame(index);
    let frame = |(i, pixels): (usize, Pixels)| Frame {
        at: origin + MediaTime::from_units(first as i64 + i as i64, g.fps),
        width: g.width,
        height: g.height,
        pixels,
        matte: None,
    };
    shown.into_iter().enumerate().map(frame).collect()
}

impl Stream for Face {
    fn push(&mut self, audio: &AudioBlock) -> Result<()> {
        self.push_to(0, audio)
    }

    fn push_to(&mut self, speaker: usize, audio: &AudioBlock) -> Result<()> {
        let count = self.speakers.len();
        let Some(Speaker { ears, intake }) = self.speakers.get_mut(speaker) else {
            return Err(AvatarError::Options(format!("there is no speaker {}; there are {count}", speaker + 1)));
        };
        let mut clean = Vec::new();
        intake.take(audio, &mut clean)?;
        ears.push(&clean);
        Ok(())
    }

    fn pull(&mut self) -> Result<Option<FrameBlock>> {
        if !self.speakers.iter().all(|s| s.intake.allows(&self.geometry, self.index)) {
            return Ok(None);
        }
        let index = self.index;
        let (shown, stages) =
            self.block().map_err(|e| AvatarError::Device { block: index, stage: "generation", source: e.into() })?;
        let origin = self.speakers.first().map_or(MediaTime::ZERO, |s| s.intake.origin());
        let frames = frames(shown, &self.geometry, origin, index);
        self.index += 1;
        Ok(Some(FrameBlock { epoch: Epoch::default(), index, frames, stages, controls: Vec::new() }))
    }

    fn finish(&mut self) -> Result<()> {
        self.speakers.iter_mut().for_each(|s| s.intake.finish());
        Ok(())
    }
}

impl Drop for Face {
    fn drop(&mut self) {
        let repaired: u64 = self.speakers.iter().map(|s| s.intake.repaired()).sum();
        if repaired > 0 {
            tracing::warn!(repaired, "samples of speech were not numbers and became silence");
        }
    }
}
