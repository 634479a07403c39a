//! The pocket engine: the causal, block-wise form of the speech-to-video transformer in a small configuration.
//!
//! ```text
//! speech → log-mel → audio net ─ features ┐                         25 a second
//!        └ loudness → liveliness ─ controls ┴→ transformer → latent → decoder → 4 frames
//! ```
//!
//! One block is one latent is 4 frames is 160 ms. The mouth needs 126 ms of speech beyond a block's end.

mod noise;
mod portrait;
mod stream;

use super::{AvatarError, Generator, OpenOptions, Result, Stream};
use crate::{
    media::{Geometry, MediaTime, Portrait, SPEECH_RATE},
    model::{
        self,
        audio::{AHEAD, AudioConfig, AudioNet, HOP, Mel},
        dit::{self, Dit, Opening, Schedule},
        kernels::{Isa, Pool},
        vae::patch::{CELL, Decoder, Encoder, FRAMES, LATENT, Memory},
        weights::{Safetensors, Source, Weights},
    },
};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use std::{collections::HashMap, path::Path, sync::Arc};
use stream::Face;

/// Below this likeness (dB of a picture that went through the autoencoder) the model would paint something else.
const LEAST_LIKENESS_DB: f32 = 17.0;

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
}

/// Weights and everything else that faces share; immutable once loaded.
struct Shared {
    geometry: Geometry,
    /// Rows and columns of a latent.
    grid: [usize; 2],
    pool: Arc<Pool>,
    mel: Mel,
    net: AudioNet,
    dit: Dit,
    encoder: Encoder,
    decoder: Decoder,
    control_scale: [f32; 10],
    control_range: [[f32; 2]; 10],
}

struct Pocket {
    shared: Arc<Shared>,
    default_steps: usize,
    schedules: HashMap<usize, Arc<Schedule>>,
    judge: bool,
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
    let shared = assemble(source, threads, config, &sizes).map_err(fits)?;
    let pocket =
        Pocket { shared: Arc::new(shared), default_steps: sizes.default_steps, schedules: HashMap::new(), judge };
    Ok(Box::new(pocket))
}

fn assemble(source: Safetensors, threads: usize, config: dit::Config, sizes: &Sizes) -> model::Result<Shared> {
    let isa = Isa::best();
    let weights = Weights::new(Arc::new(source) as Arc<dyn Source>, &Device::Cpu, DType::F32);
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
        },
        grid: [sizes.latent[1], sizes.latent[2]],
        pool: Pool::share(threads),
        mel: Mel::new(&filters),
        net: AudioNet::load(&weights.pp("audio"), isa, &audio)?,
        dit: Dit::load(config, &weights.pp("dit"))?,
        encoder: Encoder::load(&weights.pp("vae.encoder"), isa)?,
        decoder: Decoder::load(&weights.pp("vae.decoder"), isa)?,
        control_scale: std::array::from_fn(|i| scale[i]),
        control_range: std::array::from_fn(|i| [range[2 * i], range[2 * i + 1]]),
    };
    weights.finish()?;
    Ok(shared)
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
        let s = &self.shared;
        let (width, height) = (s.geometry.width as usize, s.geometry.height as usize);
        let picture = portrait::prepare(portrait, width)?;
        let z = s.encoder.encode(&s.pool, [&picture; FRAMES], width, height);
        if self.judge {
            judge(s, &picture, &z)?;
        }
        let device = |stage, e: model::Error| AvatarError::Device { block: 0, stage, source: e.into() };
        let steps = options.steps.unwrap_or(self.default_steps);
        let schedule = match self.schedules.get(&steps) {
            Some(schedule) => schedule.clone(),
            None => {
                let made = s.dit.schedule_of(steps).map_err(|e| AvatarError::Options(e.to_string()))?;
                self.schedules.entry(steps).or_insert(Arc::new(made)).clone()
            }
        };
        let [h, w] = s.grid;
        let reference =
            Tensor::from_vec(z, (LATENT, 1, h, w), &Device::Cpu).map_err(|e| device("portrait", e.into()))?;
        let opening = Opening { reference: &reference, motion: None, text: None };
        let state = s.dit.open(&opening, &schedule).map_err(|e| device("portrait", e))?;
        Ok(Box::new(Face::new(s.clone(), state, Memory::new(h, w), options.seed)))
    }
}

/// Says whether the model can show this picture: it must survive the autoencoder.
fn judge(s: &Shared, picture: &[u8], z: &[f32]) -> Result<()> {
    let [h, w] = s.grid;
    let mut memory = Memory::new(h, w);
    s.decoder.decode(&s.pool, z, &mut memory);
    // The second block has a memory, as all but the first have.
    let shown = s.decoder.decode(&s.pool, z, &mut memory);
    let likeness = portrait::psnr(&shown[FRAMES - 1], picture);
    if likeness < LEAST_LIKENESS_DB {
        return Err(AvatarError::Portrait(format!(
            "The pocket engine cannot draw this picture: what comes back differs too much from it ({likeness:.0} dB, at \
             least {LEAST_LIKENESS_DB:.0} needed). It was made for drawn presenters, seen from the front with the face in \
             the middle; choose such a picture, or one of the built-in presenters."
        )));
    }
    Ok(())
}
