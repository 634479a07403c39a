//! The 14B engine: Wan2.2-S2V and LiveAvatar from a checkpoint on disk.
//!
//! | mode | frames | a block is | official defaults |
//! | --- | --- | --- | --- |
//! | block (LiveAvatar) | 25 a second | 12 frames, the first 9 | 4 Euler steps, shift 3, area 704·384, ring of 48 frames |
//! | clip (S2V) | 16 a second | a clip, the first 3 frames shorter | 40 UniPC steps, shift 3, guidance 4.5, 80 frames, area 1024·704 |
//!
//! The defaults are those of liveavatar/configs/s2v_causal_sft.yaml and minimal_inference/ (Alibaba-Quark/LiveAvatar at
//! 9c2c38d) and of wan/configs/wan_s2v_14B.py and generate.py (Wan-Video/Wan2.2 at 42bf4cf).
//!
//! Frame k shows the speech of [k/fps, (k+1)/fps): the official programs lose three frames at the beginning and leave the
//! voice where it is, which makes the picture lead by 120 ms (188 ms in clip mode). Here three frames of silence go
//! before the speech instead, and they are what is lost. A clip that begins with the picture itself loses nothing.

mod album;
mod config;
mod ears;
mod face;
pub(super) mod parts;
mod pose;
mod team;
pub(super) mod words;

pub use config::{Config, Mode, Offload, Place, Precision, Share, Size, SolverName, Wire, adapter};
pub use ears::{Ears, Features, LEAST_AHEAD, Normalise, Reach, numbers, whole};
pub use parts::{Loading, WANTED, Watcher};

use std::{collections::HashMap, sync::Arc};

use candle_core::{DType, Device, Tensor};

use super::{
    AvatarError, Capabilities, Fill, Generator, Intake, OpenOptions, Result, Stream,
    block::{self, BlockSettings, Continuous},
    clip::{self, ClipSettings, ClipStream, Words},
    speakers::{self, Mask},
    studio::{Studio, fill},
};
use crate::{
    media::{Geometry, MediaTime, Portrait, SPEECH_RATE},
    model::{
        self,
        dit::{self, Schedule},
        sampler::Euler,
        vae::WanVae,
        wav2vec2::Wav2Vec2,
        weights::layout::Part,
    },
};
use album::{Album, Key};
use face::{Face, Speaker, Way};
use parts::{Parts, fits};
use pose::Pose;
use words::Reader;

/// LiveAvatar's rate, steps, shift and area.
const BLOCK_FPS: u32 = 25;
const BLOCK_STEPS: usize = 4;
const BLOCK_AREA: usize = 704 * 384;
/// S2V's rate and area.
const CLIP_FPS: u32 = 16;
const CLIP_AREA: usize = 1024 * 704;

struct S2v {
    config: Config,
    size: Size,
    studio: Arc<Studio>,
    reader: Reader,
    how: How,
    schedules: HashMap<usize, Arc<Schedule>>,
    album: Album,
}

/// The settled mode.
#[derive(Clone)]
enum How {
    Block { settings: BlockSettings, shift: f64 },
    Clip(ClipSettings),
}

/// Loads a model. `prompts` beside the configured ones are encoded in the same pass of the text encoder. `watcher` is told
/// how far it is.
///
/// # Errors
/// [`AvatarError::Weights`] lists everything that is absent or does not fit and where it is published;
/// [`AvatarError::Options`] names a setting that this model or machine does not have.
pub fn load(config: &Config, prompts: &[String], watcher: Watcher) -> Result<Box<dyn Generator>> {
    config.validate().map_err(AvatarError::Options)?;
    let size = Size::parse(&config.size).map_err(AvatarError::Options)?;
    let device = parts::device(config)?;
    let dtype = parts::precision(config, &device)?;
    let parts = Parts::find(config)?;
    let how = how(config, parts.live)?;
    let beside = config.beside(!device.is_cpu(), matches!(how, How::Block { .. }));
    let config = beside.as_ref().unwrap_or(config);
    if config.places().map_err(AvatarError::Options)?.len() > 1 {
        return team::load(config, prompts, watcher, (device, parts, how));
    }
    let mut reader =
        Reader::new(&parts.text, parts.transformer_config.text_len, &device, dtype, &watcher).map_err(fits)?;
    let mut known: Vec<&str> = vec![&config.prompt];
    known.extend(how.guided().then_some(config.negative()));
    known.extend(prompts.iter().map(String::as_str));
    reader.learn(&known).map_err(fits)?;
    let loader = Loader { parts: &parts, config, how: &how, dtype, watcher: &watcher };
    let load = || -> model::Result<Studio> {
        Ok(Studio { dit: loader.dit(&device)?, vae: loader.vae(&device)?, hearing: loader.hearing(&device)? })
    };
    let studio = load().map_err(fits)?;
    Ok(Box::new(S2v {
        config: config.clone(),
        size,
        studio: Arc::new(studio),
        reader,
        how,
        schedules: HashMap::new(),
        album: Album::default(),
    }))
}

/// Loads the networks one by one.
struct Loader<'a> {
    parts: &'a Parts,
    config: &'a Config,
    how: &'a How,
    dtype: DType,
    watcher: &'a Watcher,
}

impl Loader<'_> {
    fn dit(&self, device: &Device) -> model::Result<dit::Dit> {
        let mut transformer = self.parts.transformer_config.clone();
        if let How::Block { settings, .. } = self.how {
            transformer.kv_frames = settings.clip_frames / 4;
        }
        parts::transformer(&self.parts.transformer, transformer, self.config, device, self.dtype, self.watcher)
    }

    /// LiveAvatar's autoencoder runs in the transformer's type, S2V's in f32 (MODEL.md §12 of the specification).
    fn vae(&self, device: &Device) -> model::Result<WanVae> {
        let dtype = if matches!(self.how, How::Block { .. }) { self.dtype } else { DType::F32 };
        parts::autoencoder(self.parts, self.config, device, dtype, self.watcher)
    }

    /// LiveAvatar's audio encoder runs in the transformer's type, S2V's in f32 (the same place). On a card bf16 halves its
    /// part of a block; on the processor it is worth nothing.
    fn hearing(&self, device: &Device) -> model::Result<Wav2Vec2> {
        let live = matches!(self.how, How::Block { .. }) && !device.is_cpu();
        let dtype = if live { self.dtype } else { DType::F32 };
        let weights = parts::watched(&self.parts.hearing, Part::Hearing.name(), device, dtype, self.watcher);
        let hearing = Wav2Vec2::load(&weights, &self.parts.hearing_config)?;
        weights.finish()?;
        Ok(hearing)
    }
}

/// Only the audio encoder of a checkpoint, and where it lives: for measuring what windows hear.
///
/// # Errors
/// As [`load`].
pub fn load_hearing(config: &Config) -> Result<(Wav2Vec2, Device)> {
    let device = parts::device(config)?;
    let parts = Parts::find(config)?;
    let weights = parts::watched(&parts.hearing, Part::Hearing.name(), &device, DType::F32, &(Arc::new(|_| {}) as _));
    let hearing = Wav2Vec2::load(&weights, &parts.hearing_config).map_err(fits)?;
    weights.finish().map_err(fits)?;
    Ok((hearing, device))
}

/// Settles the mode and refuses settings that it does not have.
fn how(config: &Config, live: bool) -> Result<How> {
    let refuse = |text: &str| Err(AvatarError::Options(text.into()));
    if config.frames.is_some() {
        return refuse(
            "--frames is for models that hear nothing: this one's videos are as long as the speech, or end by --max-clips",
        );
    }
    let block = match config.mode {
        Mode::Auto => live,
        Mode::Block => true,
        Mode::Clip => false,
    };
    if !block {
        let official = ClipSettings::default();
        return Ok(How::Clip(ClipSettings {
            clip_frames: config.clip_frames.unwrap_or(official.clip_frames),
            solver: config.solver.map_or(official.solver, Into::into),
            shift: config.shift.unwrap_or(official.shift),
            guidance: config.guidance.unwrap_or(official.guidance),
            first_frame: config.first_frame,
            ..official
        }));
    }
    if config.guidance.is_some_and(|g| g > 1.0) {
        return refuse("block mode has no guidance (LiveAvatar is distilled without): leave --guidance out");
    }
    if config.solver.is_some_and(|s| s != SolverName::Euler) {
        return refuse("block mode has no solver but euler: leave --solver out");
    }
    if !config.negative_prompt.is_empty() {
        return refuse(
            "block mode has no negative prompt (LiveAvatar is distilled without): leave --negative-prompt out",
        );
    }
    if config.first_frame {
        return refuse("block mode has no --first-frame: it always begins with the picture as its motion");
    }
    let official = BlockSettings::default();
    let clip_frames = config.clip_frames.unwrap_or(official.clip_frames);
    if clip_frames % 12 != 0 {
        return refuse("in block mode --clip-frames is a multiple of 12, the frames of a block");
    }
    if !live {
        tracing::warn!(
            "block mode without a LiveAvatar adapter: the plain S2V model is not made for four steps; give \
             liveavatar.safetensors with --lora"
        );
    }
    Ok(How::Block { settings: BlockSettings { clip_frames, ..official }, shift: config.shift.unwrap_or(3.0) })
}

impl How {
    fn guided(&self) -> bool {
        matches!(self, How::Clip(s) if s.guidance > 1.0)
    }

    fn fps(&self) -> u32 {
        if matches!(self, How::Block { .. }) { BLOCK_FPS } else { CLIP_FPS }
    }

    fn area(&self) -> usize {
        if matches!(self, How::Block { .. }) { BLOCK_AREA } else { CLIP_AREA }
    }

    /// Frames per block and how many of the first block's are lost, with `per_block` latent frames a block.
    fn frames(&self, per_block: usize) -> (usize, usize) {
        match self {
            How::Block { .. } => (4 * per_block, block::WARM_UP),
            How::Clip(s) => (s.clip_frames, if s.first_frame { 0 } else { clip::WARM_UP }),
        }
    }

    /// Blocks until the window of speech and the ring have their full length, and one that is the first to have it. A
    /// clip's hearing is nothing beside it, and it remembers nothing that grows.
    fn settled_after(&self, per_block: usize, reach: Reach) -> u64 {
        let How::Block { settings, .. } = self else { return 1 };
        let (frames, ring) = (self.frames(per_block).0, settings.clip_frames / 4 / per_block.max(1));
        let window = (reach.context * self.fps() as usize).div_ceil(frames.max(1) * SPEECH_RATE as usize);
        window.max(ring) as u64 + 1
    }

    /// What the transformer computes a block, 10¹² operations. `scale`: pixels of a latent position's side.
    fn tflop(&self, c: &dit::Config, scale: usize, geometry: &Geometry, steps: Option<usize>) -> f64 {
        let side = scale * c.patch[1];
        let tokens = (geometry.width as usize / side) * (geometry.height as usize / side);
        let frames = geometry.block_frames as usize / 4;
        match self {
            How::Block { settings, .. } => {
                let ring = settings.clip_frames / 4;
                c.tflop(frames * tokens, (ring * 2 + 5) * tokens / 2) * steps.unwrap_or(BLOCK_STEPS) as f64
            }
            How::Clip(s) => {
                // Reference and motion are tokens of the same sequence: 2.5 frames' worth.
                let all = (2 * frames + 5) * tokens / 2;
                c.tflop(all, all) * (steps.unwrap_or(s.steps) * if self.guided() { 2 } else { 1 }) as f64
            }
        }
    }

    /// Height and width of the output for a picture.
    fn output(&self, size: Size, portrait: &Portrait) -> Result<(usize, usize)> {
        let (w, h) = (portrait.width as usize, portrait.height as usize);
        if w == 0 || h == 0 || portrait.rgb.len() != 3 * w * h {
            return Err(AvatarError::Portrait("The picture has no pixels; choose another one.".into()));
        }
        size.of((w, h), self.area()).map_err(|e| AvatarError::Portrait(e.to_string()))
    }

    fn geometry(&self, per_block: usize, reach: Reach, (height, width): (usize, usize)) -> Geometry {
        let (frames, lost) = self.frames(per_block);
        Geometry {
            width: width as u32,
            height: height as u32,
            fps: self.fps(),
            first_block_frames: (frames - lost) as u32,
            block_frames: frames as u32,
            look_ahead: MediaTime::from_units(reach.ahead as i64, SPEECH_RATE),
            matte: false,
        }
    }
}

/// What each of several speakers' voices reaches; nothing for one speaker. `patch`: pixels of
/// a token's side.
fn reach(portrait: &Portrait, masks: &[Portrait], size: (usize, usize), patch: usize) -> Result<Vec<Tensor>> {
    if masks.is_empty() {
        return Ok(Vec::new());
    }
    if let Some((i, m)) =
        masks.iter().enumerate().find(|(_, m)| (m.width, m.height) != (portrait.width, portrait.height))
    {
        return Err(AvatarError::Portrait(format!(
            "the mask of speaker {} is {}x{}, the picture {}x{}; a mask is drawn over the picture and has its size",
            i + 1,
            m.width,
            m.height,
            portrait.width,
            portrait.height
        )));
    }
    let greys: Vec<Vec<u8>> = masks.iter().map(|m| m.rgb.iter().skip(1).step_by(3).copied().collect()).collect();
    let masks: Vec<Mask> = (greys.iter().zip(masks))
        .map(|(grey, m)| Mask { grey, width: m.width as usize, height: m.height as usize })
        .collect();
    speakers::reach(&masks, size, patch).map_err(|e| AvatarError::Portrait(e.to_string()))
}

/// A picture to try a model with.
fn sample() -> Portrait {
    super::embedded::portrait().unwrap_or(Portrait { width: 256, height: 256, rgb: vec![128; 3 << 16].into() })
}

impl S2v {
    /// Frames per block and how many of the first block's are lost.
    fn frames(&self) -> (usize, usize) {
        self.how.frames(self.studio.dit.config().frames_per_block)
    }

    /// Height and width of the output for a picture.
    fn output(&self, portrait: &Portrait) -> Result<(usize, usize)> {
        self.how.output(self.size, portrait)
    }

    fn geometry_of(&self, size: (usize, usize)) -> Geometry {
        self.how.geometry(self.studio.dit.config().frames_per_block, self.config.reach(), size)
    }

    /// The noise levels for so many steps, prepared once.
    fn schedule(&mut self, steps: usize, shift: f64) -> Result<Arc<Schedule>> {
        if let Some(schedule) = self.schedules.get(&steps) {
            return Ok(schedule.clone());
        }
        let made = Euler::live_avatar(steps, shift).and_then(|e| self.studio.dit.schedule(e));
        let made = made.map_err(|e| AvatarError::Options(e.to_string()))?;
        Ok(self.schedules.entry(steps).or_insert(Arc::new(made)).clone())
    }
}

impl Generator for S2v {
    fn geometry(&self) -> Geometry {
        self.geometry_for(&self.sample_portrait())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { prompt: true, ..Capabilities::default() }
    }

    fn geometry_for(&self, portrait: &Portrait) -> Geometry {
        // A picture without a size is refused when it is opened.
        self.geometry_of(self.output(portrait).unwrap_or((64, 64)))
    }

    fn tflop_per_block(&self, geometry: &Geometry, steps: Option<usize>) -> Option<f64> {
        Some(self.how.tflop(self.studio.dit.config(), self.studio.vae.scale(), geometry, steps))
    }

    fn settled_after(&self) -> u64 {
        self.how.settled_after(self.studio.dit.config().frames_per_block, self.config.reach())
    }

    fn memory(&self) -> Vec<Fill> {
        fill(std::slice::from_ref(self.studio.device()))
    }

    fn sample_portrait(&self) -> Portrait {
        sample()
    }

    fn open(&mut self, portrait: &Portrait, options: &OpenOptions) -> Result<Box<dyn Stream>> {
        let size = self.output(portrait)?;
        let geometry = self.geometry_of(size);
        let failed = |e: model::Error| AvatarError::Device { block: 0, stage: "portrait", source: e.into() };
        let studio = self.studio.clone();
        let look = || {
            let picture = studio.look(&portrait.rgb, (portrait.width as usize, portrait.height as usize), size);
            picture.map_err(|e| AvatarError::Portrait(e.to_string()))
        };
        let prompt = options.prompt.as_deref().unwrap_or(&self.config.prompt);
        let prompt = self.reader.read(&studio.dit, prompt).map_err(failed)?;
        let patch = studio.vae.scale() * studio.dit.config().patch[1];
        let reach = reach(portrait, &options.masks, size, patch)?;
        let (frames, lost) = self.frames();
        let way = match &self.how {
            How::Block { settings, shift } => {
                if options.pose.is_some() {
                    return Err(AvatarError::Options(
                        "block mode takes no pose; leave --pose out, or --mode clip".into(),
                    ));
                }
                let (settings, shift) = (settings.clone(), *shift);
                let steps = options.steps.unwrap_or(BLOCK_STEPS);
                let schedule = self.schedule(steps, shift)?;
                let key = Key::of(portrait, size);
                let mut face = match self.album.find(key) {
                    Some(looked) => Continuous::open_looked(&studio, looked, Some(prompt), schedule, &settings),
                    None => Continuous::open(&studio, &look()?, Some(prompt), schedule, &settings)
                        .inspect(|f| self.album.keep(key, (f.reference().clone(), f.motion().clone()))),
                }
                .map_err(failed)?;
                face.cast(reach);
                Way::Block { face: Box::new(face), steps }
            }
            How::Clip(settings) => {
                let pose = options.pose.as_deref().map(|p| Pose::open(p, size, lost)).transpose()?;
                let mut settings = settings.clone();
                settings.steps = options.steps.unwrap_or(settings.steps);
                let negative = options.negative_prompt.as_deref().unwrap_or(self.config.negative());
                let negative = match self.how.guided() {
                    true => Some(self.reader.read(&studio.dit, negative).map_err(failed)?),
                    false => None,
                };
                let words = Words { prompt, negative };
                let mut face = ClipStream::open(&studio, &look()?, words, settings).map_err(failed)?;
                face.cast(reach);
                Way::Clip { face: Box::new(face), pose }
            }
        };
        let lead = lost * SPEECH_RATE as usize / geometry.fps as usize;
        let speaker =
            || Speaker { ears: Ears::new(self.config.reach(), geometry.fps, lead), intake: Intake::default() };
        let scale = studio.vae.scale();
        let noise = [studio.dit.config().in_dim, frames / 4, size.0 / scale, size.1 / scale];
        Ok(Box::new(Face {
            speakers: (0..options.masks.len().max(1)).map(|_| speaker()).collect(),
            studio,
            geometry,
            way,
            seed: options.seed,
            planar: options.planar,
            noise,
            index: 0,
        }))
    }
}
