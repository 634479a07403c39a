//! The pocket engine: the causal, block-wise form of the speech-to-video transformer in a small configuration.
//!
//! ```text
//! speech → log-mel → audio net ─ features ┐                         25 a second
//!        └ tone ─── → liveliness ─ controls ┴→ transformer → latent → decoder → 4 frames
//! ```
//!
//! One block is one latent is 4 frames is 160 ms. The mouth needs 126 ms of speech beyond a block's end.

mod audition;
pub mod design;
mod matte;
mod portrait;
mod stream;

use super::{AvatarError, Capabilities, Controls, Generator, OpenOptions, Result, Stream};
use crate::{
    media::{Geometry, MediaTime, Portrait, SPEECH_RATE},
    model::{
        self,
        audio::{AHEAD, AudioConfig, AudioNet, FEATURES, HOP, Mel},
        dit::{self, Dit, Opening, Schedule, StreamState},
        kernels::{Isa, Pool},
        vae::patch::{Decoder, Encoder, FRAMES, Grid, LATENT},
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
    /// Sizes of square pictures that the decoder has a fine part for; absent in files of one size, `size`.
    #[serde(default)]
    sizes: Vec<usize>,
    /// Size that portraits are encoded at; absent = `size`.
    #[serde(default)]
    reference_size: Option<usize>,
    #[serde(default)]
    fine_blocks: Option<usize>,
    /// `joint`: the decoder gives the matte, too; absent: there is none.
    #[serde(default)]
    matte: Option<String>,
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
    /// Width and height at which portraits are encoded.
    reference: usize,
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

/// How the engine is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loading {
    /// For the arithmetic, 0 = all cores.
    pub threads: usize,
    /// Width and height of the pictures; none = the model's own.
    pub size: Option<usize>,
    /// None = the fastest this machine has.
    pub isa: Option<Isa>,
}

impl Loading {
    /// So many threads, everything else as it comes.
    pub fn on(threads: usize) -> Loading {
        Loading { threads, size: None, isa: None }
    }
}

/// Loads the weights that are part of the binary. `threads`: for the arithmetic, 0 = all cores.
pub fn load(threads: usize) -> Result<Box<dyn Generator>> {
    load_as(&Loading::on(threads))
}

/// The same, with other choices.
///
/// # Errors
/// A size that the weights have no decoder for.
pub fn load_as(how: &Loading) -> Result<Box<dyn Generator>> {
    let shards = super::embedded::weights()?;
    let source = Safetensors::from_vecs(shards, "the embedded pocket weights").map_err(fits)?;
    build(source, how, true)
}

/// Loads weights from files: for trying out a training result. Portraits are not judged, so that weights that are not
/// trained to the end can be looked at.
pub fn load_files<P: AsRef<Path>>(paths: &[P], how: &Loading) -> Result<Box<dyn Generator>> {
    build(Safetensors::open(paths).map_err(fits)?, how, false)
}

fn fits(error: model::Error) -> AvatarError {
    AvatarError::Weights(error.to_string())
}

fn build(source: Safetensors, how: &Loading, judge: bool) -> Result<Box<dyn Generator>> {
    let json = source
        .metadata("config")
        .ok_or_else(|| AvatarError::Weights("the pocket weights carry no configuration in their header".into()))?
        .to_string();
    let sizes: Sizes = serde_json::from_str(&json)
        .map_err(|e| AvatarError::Weights(format!("the configuration in the pocket weights cannot be read: {e}")))?;
    let size = how.size.unwrap_or(sizes.size[0]);
    let mut known_sizes = sizes.sizes.clone();
    if known_sizes.is_empty() {
        known_sizes.push(sizes.size[0]);
    }
    if !known_sizes.contains(&size) {
        let all: Vec<String> = known_sizes.iter().map(usize::to_string).collect();
        return Err(AvatarError::Options(format!(
            "the pocket model has no pictures of {size}×{size}; its sizes are {}",
            all.join(", ")
        )));
    }
    let [_, h, w] = sizes.latent;
    let reference = sizes.reference_size.unwrap_or(sizes.size[0]);
    let cells = h > 0 && h == w && reference % (2 * h) == 0 && known_sizes.iter().all(|s| s % (4 * h) == 0);
    let known = sizes.vae == "patch" && sizes.audio == "mel" && sizes.sample_rate == SPEECH_RATE;
    let square = sizes.size[0] == sizes.size[1] && sizes.latent[0] == LATENT;
    if !known || !cells || !square || sizes.fps as usize * 2 * HOP != SPEECH_RATE as usize {
        return Err(AvatarError::Weights(format!(
            "the pocket weights ask for autoencoder `{}` at {:?} of {:?}, {} fps, latents {:?} and audio `{}` at {} Hz, \
             which this program does not have",
            sizes.vae, known_sizes, sizes.size, sizes.fps, sizes.latent, sizes.audio, sizes.sample_rate
        )));
    }
    let plan = Plan {
        size,
        reference,
        grid: Grid {
            name: if sizes.sizes.is_empty() { String::new() } else { size.to_string() },
            factor: size / (4 * h),
            blocks: sizes.fine_blocks.unwrap_or(2),
            matte: sizes.matte.as_deref() == Some("joint"),
        },
    };
    let config = dit::Config::parse(&json).map_err(fits)?;
    let shared = Arc::new(assemble(source, how, config, &sizes, &plan).map_err(fits)?);
    let audition = judge.then(|| Audition::new(&shared));
    Ok(Box::new(Pocket { shared, default_steps: sizes.default_steps, schedules: HashMap::new(), audition }))
}

/// What of the weights is used.
struct Plan {
    size: usize,
    reference: usize,
    grid: Grid,
}

fn assemble(
    source: Safetensors,
    how: &Loading,
    config: dit::Config,
    sizes: &Sizes,
    plan: &Plan,
) -> model::Result<Shared> {
    let isa = how.isa.unwrap_or_else(Isa::swift);
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
            width: plan.size as u32,
            height: plan.size as u32,
            fps: sizes.fps,
            first_block_frames: FRAMES as u32,
            block_frames: FRAMES as u32,
            look_ahead: MediaTime::from_units(look_ahead as i64, SPEECH_RATE),
            matte: plan.grid.matte,
        },
        grid: [sizes.latent[1], sizes.latent[2]],
        pool: Pool::share(how.threads),
        mel: Mel::new(&filters),
        mel_ahead: audio.look_ahead(),
        net: AudioNet::load(&weights.pp("audio"), isa, &audio)?,
        dit: Dit::load(config, &weights.pp("dit"))?,
        encoder: Encoder::load(&weights.pp("vae.encoder"), isa, plan.reference / (2 * sizes.latent[1]))?,
        decoder: Decoder::load(&weights.pp("vae.decoder"), isa, &plan.grid)?,
        reference: plan.reference,
        control_scale: std::array::from_fn(|i| scale[i]),
        control_range: std::array::from_fn(|i| [range[2 * i], range[2 * i + 1]]),
        control_neutral: sizes.control_neutral,
    };
    for other in sizes.sizes.iter().filter(|other| **other != plan.size) {
        weights.pp("vae.decoder").ignore(&format!("{other}."));
    }
    weights.finish()?;
    Ok(shared)
}

impl Generator for Pocket {
    fn geometry(&self) -> Geometry {
        self.shared.geometry.clone()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { direction: true, prompt: false, design: true }
    }

    fn sample_portrait(&self) -> Portrait {
        super::embedded::portrait().unwrap_or_else(|| {
            let Geometry { width, height, .. } = self.shared.geometry;
            Portrait { width, height, rgb: vec![128; 3 * width as usize * height as usize].into() }
        })
    }

    fn open(&mut self, portrait: &Portrait, options: &OpenOptions) -> Result<Box<dyn Stream>> {
        let s = self.shared.clone();
        let picture = portrait::prepare(portrait, s.reference)?;
        let z = s.encoder.encode(&s.pool, [&picture; FRAMES], s.reference, s.reference);
        let device = |stage, e: model::Error| AvatarError::Device { block: 0, stage, source: e.into() };
        let [h, w] = s.grid;
        let reference =
            Tensor::from_vec(z, (LATENT, 1, h, w), &Device::Cpu).map_err(|e| device("portrait", e.into()))?;
        let opening = Opening { reference: &reference, motion: None, text: None };
        if let Some(mut audition) = self.audition.take() {
            let schedule = self.schedule(1)?;
            let state = s.dit.open(&opening, &schedule).map_err(|e| device("portrait", e))?;
            let shown = s.geometry.width as usize;
            let small = if shown == s.reference { picture } else { portrait::prepare(portrait, shown)? };
            let verdict = audition.judge(&s, state, &small);
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
