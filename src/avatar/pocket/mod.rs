//! The pocket engine: the causal, block-wise form of the speech-to-video transformer in a small configuration.
//!
//! ```text
//! speech → log-mel → audio net ─ features ┐                         25 a second
//!        └ loudness → liveliness ─ controls ┴→ transformer → latent → decoder → 4 frames
//! ```
//!
//! One block is one latent is 4 frames is 160 ms. The mouth needs 126 ms of speech beyond a block's end.

mod audition;
mod portrait;
mod stream;

use super::{AvatarError, Controls, Generator, OpenOptions, Result, Stream};
use crate::{
    media::{Geometry, MediaTime, Portrait, SPEECH_RATE},
    model::{
        self,
        audio::{AHEAD, AudioConfig, AudioNet, FEATURES, HOP, Mel},
        dit::{self, Dit, Opening, Schedule, StreamState},
        kernels::{Isa, Pool},
        vae::{
            matte::Matte,
            patch::{CELL, Decoder, Encoder, FRAMES, LATENT},
        },
        weights::{Safetensors, Source, Weights},
    },
};
use audition::Audition;
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use std::{collections::HashMap, path::Path, sync::Arc};
use stream::Face;

/// What of the weights' configuration is not the transformer's.
#[derive(Deserialize)]
struct Sizes {
    size: [usize; 2],
    fps: u32,
    latent: [usize; 3],
    sample_rate: u32,
    default_steps: usize,
    vae: String,
    audio: String,
    audio_dilation: Vec<usize>,
    audio_ahead: Vec<usize>,
    control_neutral: Controls,
}

/// Weights and everything else that faces share; immutable once loaded.
struct Shared {
    geometry: Geometry,
    /// Rows and columns of a latent.
    grid: [usize; 2],
    pool: Arc<Pool>,
    mel: Mel,
    /// Mel frames the audio net needs beyond a block's own.
    mel_ahead: usize,
    net: AudioNet,
    dit: Dit,
    encoder: Encoder,
    decoder: Decoder,
    matte: Matte,
    control_scale: [f32; 10],
    control_range: [[f32; 2]; 10],
    /// The pose of the built-in portraits.
    control_neutral: Controls,
}

impl Shared {
    /// The next latent `[16][h][w]` of a stream, from four frames of features `[4][192]` and controls.
    fn imagine(
        &self,
        state: &mut StreamState,
        features: impl Iterator<Item = f32>,
        controls: &[Controls],
        noise: Vec<f32>,
    ) -> model::Result<Vec<f32>> {
        // [1 layer][192 features ‖ 10 controls][4 frames]
        let mut audio = vec![0.0; (FEATURES + 10) * FRAMES];
        for (i, v) in features.enumerate() {
            audio[i % FEATURES * FRAMES + i / FEATURES] = v;
        }
        for (f, controls) in controls.iter().enumerate() {
            for (c, (v, scale)) in controls.iter().zip(&self.control_scale).enumerate() {
                audio[(FEATURES + c) * FRAMES + f] = v * scale;
            }
        }
        let audio = self.dit.audio(&Tensor::from_vec(audio, (1, FEATURES + 10, FRAMES), &Device::Cpu)?)?;
        let [h, w] = self.grid;
        let noise = Tensor::from_vec(noise, (LATENT, 1, h, w), &Device::Cpu)?;
        let latent = self.dit.generate(state, &audio, noise, None, &[])?;
        Ok(latent.contiguous()?.flatten_all()?.to_vec1()?)
    }
}

struct Pocket {
    shared: Arc<Shared>,
    default_steps: usize,
    schedules: HashMap<usize, Arc<Schedule>>,
    /// Absent: every picture is taken.
    audition: Option<Audition>,
}

/// Loads the weights that are part of the binary. `threads`: for the arithmetic, 0 = all cores.
pub fn load(threads: usize) -> Result<Box<dyn Generator>> {
    let shards = super::embedded::weights();
    let source = Safetensors::from_statics(shards, "the embedded pocket weights").map_err(fits)?;
    build(source, threads, true)
}

/// Loads weights from files: for trying out a training result. Portraits are not judged, so that weights that are not
/// trained to the end can be looked at.
pub fn load_files<P: AsRef<Path>>(paths: &[P], threads: usize) -> Result<Box<dyn Generator>> {
    build(Safetensors::open(paths).map_err(fits)?, threads, false)
}

fn fits(error: model::Error) -> AvatarError {
    AvatarError::Weights(error.to_string())
}

fn build(source: Safetensors, threads: usize, judge: bool) -> Result<Box<dyn Generator>> {
    let json = source
        .metadata("config")
        .ok_or_else(|| AvatarError::Weights("the pocket weights carry no configuration in their header".into()))?
        .to_string();
    let sizes: Sizes = serde_json::from_str(&json)
        .map_err(|e| AvatarError::Weights(format!("the configuration in the pocket weights cannot be read: {e}")))?;
    let [width, height] = sizes.size;
    let latent = [LATENT, height / CELL, width / CELL];
    let known = sizes.vae == "patch" && sizes.audio == "mel" && sizes.sample_rate == SPEECH_RATE;
    if !known || sizes.latent != latent || sizes.fps as usize * 2 * HOP != SPEECH_RATE as usize {
        return Err(AvatarError::Weights(format!(
            "the pocket weights ask for autoencoder `{}` at {width}×{height}, {} fps, latents {:?} and audio `{}` at {} \
             Hz, which this program does not have",
            sizes.vae, sizes.fps, sizes.latent, sizes.audio, sizes.sample_rate
        )));
    }
    let config = dit::Config::parse(&json).map_err(fits)?;
    let shared = Arc::new(assemble(source, threads, config, &sizes).map_err(fits)?);
    let audition = judge.then(|| Audition::new(&shared));
    Ok(Box::new(Pocket { shared, default_steps: sizes.default_steps, schedules: HashMap::new(), audition }))
}

fn assemble(source: Safetensors, threads: usize, config: dit::Config, sizes: &Sizes) -> model::Result<Shared> {
    let isa = Isa::swift();
    let weights = Weights::new(Arc::new(source) as Arc<dyn Source>, &Device::Cpu, DType::F32).with_isa(isa);
    let audio = AudioConfig { dilation: sizes.audio_dilation.clone(), ahead: sizes.audio_ahead.clone() };
    let flat = |name: &str, shape: (usize, usize)| -> model::Result<Vec<f32>> {
        Ok(weights.get(shape, name)?.contiguous()?.flatten_all()?.to_vec1()?)
    };
    let filters = flat("audio.mel_filters", (64, 257))?;
    let range = flat("control_range", (10, 2))?;
    let scale: Vec<f32> = weights.get(10, "control_scale")?.contiguous()?.to_vec1()?;
    let look_ahead = audio.look_ahead() * HOP + AHEAD;
    let shared = Shared {
        geometry: Geometry {
            width: sizes.size[0] as u32,
            height: sizes.size[1] as u32,
            fps: sizes.fps,
            first_block_frames: FRAMES as u32,
            block_frames: FRAMES as u32,
            look_ahead: MediaTime::from_units(look_ahead as i64, SPEECH_RATE),
            matte: true,
        },
        grid: [sizes.latent[1], sizes.latent[2]],
        pool: Pool::share(threads),
        mel: Mel::new(&filters),
        mel_ahead: audio.look_ahead(),
        net: AudioNet::load(&weights.pp("audio"), isa, &audio)?,
        dit: Dit::load(config, &weights.pp("dit"))?,
        encoder: Encoder::load(&weights.pp("vae.encoder"), isa)?,
        decoder: Decoder::load(&weights.pp("vae.decoder"), isa)?,
        matte: matte(isa)?,
        control_scale: std::array::from_fn(|i| scale[i]),
        control_range: std::array::from_fn(|i| [range[2 * i], range[2 * i + 1]]),
        control_neutral: sizes.control_neutral,
    };
    weights.finish()?;
    Ok(shared)
}

/// The matte head comes from the program also where the other weights come from files: it reads the decoder's
/// features, so it must be trained again after a decoder was.
fn matte(isa: Isa) -> model::Result<Matte> {
    let source = Safetensors::from_statics(super::embedded::matte_weights(), "the embedded matte head")?;
    let weights = Weights::new(Arc::new(source) as Arc<dyn Source>, &Device::Cpu, DType::F32);
    let matte = Matte::load(&weights.pp("matte"), isa)?;
    weights.finish()?;
    Ok(matte)
}

impl Generator for Pocket {
    fn geometry(&self) -> Geometry {
        self.shared.geometry.clone()
    }

    fn sample_portrait(&self) -> Portrait {
        super::embedded::portrait().unwrap_or_else(|| {
            let Geometry { width, height, .. } = self.shared.geometry;
            Portrait { width, height, rgb: vec![128; 3 * width as usize * height as usize].into() }
        })
    }

    fn open(&mut self, portrait: &Portrait, options: &OpenOptions) -> Result<Box<dyn Stream>> {
        let s = self.shared.clone();
        let (width, height) = (s.geometry.width as usize, s.geometry.height as usize);
        let picture = portrait::prepare(portrait, width)?;
        let z = s.encoder.encode(&s.pool, [&picture; FRAMES], width, height);
        let device = |stage, e: model::Error| AvatarError::Device { block: 0, stage, source: e.into() };
        let [h, w] = s.grid;
        let reference =
            Tensor::from_vec(z, (LATENT, 1, h, w), &Device::Cpu).map_err(|e| device("portrait", e.into()))?;
        let opening = Opening { reference: &reference, motion: None, text: None };
        if let Some(mut audition) = self.audition.take() {
            let schedule = self.schedule(1)?;
            let state = s.dit.open(&opening, &schedule).map_err(|e| device("portrait", e))?;
            let verdict = audition.judge(&s, state, &picture);
            self.audition = Some(audition);
            verdict?;
        }
        let schedule = self.schedule(options.steps.unwrap_or(self.default_steps))?;
        let state = s.dit.open(&opening, &schedule).map_err(|e| device("portrait", e))?;
        Ok(Box::new(Face::new(s, state, options)))
    }
}

impl Pocket {
    /// The noise levels for so many steps, prepared once.
    fn schedule(&mut self, steps: usize) -> Result<Arc<Schedule>> {
        if let Some(schedule) = self.schedules.get(&steps) {
            return Ok(schedule.clone());
        }
        let made = self.shared.dit.schedule_of(steps).map_err(|e| AvatarError::Options(e.to_string()))?;
        Ok(self.schedules.entry(steps).or_insert(Arc::new(made)).clone())
    }
}
