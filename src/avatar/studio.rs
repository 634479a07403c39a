//! The networks around one speech-to-video transformer, and what clip mode and block mode do the same way: listening to
//! a whole voice, looking at a picture, handing the last frames on.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::Fill;
use crate::media::Pixels;
use crate::model::{
    Error, Result,
    dit::Dit,
    kernels, picture,
    vae::WanVae,
    wav2vec2::{Wav2Vec2, features},
};

/// Transformer, video autoencoder and audio encoder of one model. Immutable; shared by all its faces.
pub struct Studio {
    pub dit: Dit,
    pub vae: WanVae,
    pub hearing: Wav2Vec2,
}

/// The networks that one of several ranks needs, which are shared where ranks are on the same device.
#[derive(Clone)]
pub struct Tools {
    pub device: Device,
    pub dit: Option<Arc<Dit>>,
    pub vae: Option<Arc<WanVae>>,
    pub hearing: Option<Arc<Wav2Vec2>>,
}

impl From<Studio> for Tools {
    fn from(studio: Studio) -> Tools {
        let device = studio.device().clone();
        let Studio { dit, vae, hearing } = studio;
        Tools { device, dit: Some(dit.into()), vae: Some(vae.into()), hearing: Some(hearing.into()) }
    }
}

impl Tools {
    /// # Errors
    /// This rank computes no steps.
    pub fn dit(&self) -> Result<&Arc<Dit>> {
        self.dit.as_ref().ok_or_else(|| Error::Config("this rank has no transformer".into()))
    }

    /// # Errors
    /// This rank makes no pixels.
    pub fn vae(&self) -> Result<&Arc<WanVae>> {
        self.vae.as_ref().ok_or_else(|| Error::Config("this rank has no autoencoder".into()))
    }

    /// # Errors
    /// This rank hears nothing.
    pub fn hearing(&self) -> Result<&Arc<Wav2Vec2>> {
        self.hearing.as_ref().ok_or_else(|| Error::Config("this rank has no audio encoder".into()))
    }
}

/// A whole voice as the transformer hears it.
pub struct Voice {
    /// `[layers, channels, clips · clip_frames]`.
    pub features: Tensor,
    /// Clips that the voice fills, the last one with silence behind it.
    pub clips: usize,
}

impl Voice {
    /// `frames` video frames from `at` on.
    pub fn part(&self, at: usize, frames: usize) -> Result<Tensor> {
        let have = self.features.dim(2)?;
        if at + frames > have {
            return Err(Error::Input(format!("the voice has {have} frames; {frames} from {at} on were asked for")));
        }
        Ok(self.features.narrow(2, at, frames)?)
    }
}

impl Studio {
    /// Encodes 16 kHz speech as one piece, as the official programs do, for video at `fps` in clips of `clip_frames`.
    pub fn listen(&self, speech: &[f32], fps: f64, clip_frames: usize) -> Result<Voice> {
        let samples = Tensor::new(features::normalise(speech), self.device())?;
        let states = self.hearing.hidden_states(&samples, &mut crate::model::vae::quiet)?;
        let states = features::to_feature_rate(&states.to_dtype(DType::F32)?)?;
        let buckets = features::buckets(&states, fps, clip_frames, 0)?;
        Ok(Voice { features: features::as_audio_input(&buckets.frames)?, clips: buckets.clips })
    }

    /// Interleaved 8-bit RGB of `size` (width, height) as `[3, 1, height, width]` in −1..1 at the output size
    /// (height, width).
    pub fn look(&self, rgb: &[u8], size: (usize, usize), output: (usize, usize)) -> Result<Tensor> {
        Ok(picture::prepare(rgb, size, output)?.to_device(self.device())?)
    }

    /// Where the networks live.
    pub fn device(&self) -> &Device {
        self.vae.device()
    }
}

/// How full these devices are, as far as they are cards.
pub(super) fn fill(devices: &[Device]) -> Vec<Fill> {
    let told = devices.iter().filter_map(kernels::card_memory);
    told.map(|(free, passing)| Fill { free, passing }).collect()
}

/// A video `[3, n, height, width]` in −1..1 as packed 8-bit RGB, one per frame.
pub(super) fn pictures(video: &Tensor) -> Result<Vec<Arc<[u8]>>> {
    Ok(apart(&raster(video)?, video.dim(1)?))
}

/// Frames in host memory, one after the other.
pub(super) struct Film {
    bytes: Vec<u8>,
    frames: usize,
    planar: bool,
}

impl Film {
    /// Of a video `[3, n, height, width]` in −1..1: packed RGB.
    pub(super) fn packed(video: &Tensor) -> Result<Film> {
        Ok(Film { bytes: raster(video)?, frames: video.dim(1)?, planar: false })
    }

    /// Of planes that are encoder-ready, `[n, width · height · 3/2]` bytes ([`WanVae::decode_i420`]).
    pub(super) fn planar(planes: &Tensor) -> Result<Film> {
        Ok(Film { bytes: planes.flatten_all()?.to_vec1()?, frames: planes.dim(0)?, planar: true })
    }

    /// The frames apart.
    pub(super) fn cut(&self) -> Vec<Pixels> {
        apart(&self.bytes, self.frames).into_iter().map(if self.planar { Pixels::I420 } else { Pixels::Rgb }).collect()
    }
}

/// As many pictures as lie in these bytes one after the other.
fn apart(bytes: &[u8], frames: usize) -> Vec<Arc<[u8]>> {
    bytes.chunks_exact((bytes.len() / frames.max(1)).max(1)).take(frames).map(Arc::from).collect()
}

/// A video `[3, n, height, width]` in −1..1 as packed 8-bit RGB, frame after frame.
fn raster(video: &Tensor) -> Result<Vec<u8>> {
    // half added before the cut to whole numbers: rounding
    let bytes = video.affine(127.5, 128.0)?.clamp(0.0, 255.0)?.to_dtype(DType::U8)?;
    Ok(bytes.permute((1, 2, 3, 0))?.contiguous()?.flatten_all()?.to_vec1()?)
}

/// `frames` copies of a picture `[3, 1, height, width]`.
pub(super) fn still(picture: &Tensor, frames: usize) -> Result<Tensor> {
    Ok(picture.repeat((1, frames, 1, 1))?)
}

/// The newest `n` frames of `window` followed by `frames` `[3, t, h, w]`, where at most `reach` of `frames` enter; the
/// window keeps its length.
pub(super) fn slide(window: &Tensor, frames: &Tensor, reach: usize) -> Result<Tensor> {
    let (have, new) = (window.dim(1)?, frames.dim(1)?);
    let n = reach.min(new).min(have);
    Ok(Tensor::cat(&[&window.narrow(1, n, have - n)?, &frames.narrow(1, new - n, n)?], 1)?)
}

/// The last `n` frames of a video `[3, t, h, w]`.
pub(super) fn last(video: &Tensor, n: usize) -> Result<Tensor> {
    let t = video.dim(1)?;
    if n > t {
        return Err(Error::Input(format!("{n} frames were asked for, {t} were decoded")));
    }
    Ok(video.narrow(1, t - n, n)?)
}

/// Without the first `n` frames.
pub(super) fn without_first(video: &Tensor, n: usize) -> Result<Tensor> {
    let n = n.min(video.dim(1)?.saturating_sub(1));
    Ok(video.narrow(1, n, video.dim(1)? - n)?)
}
