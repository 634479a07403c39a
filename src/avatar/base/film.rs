//! The base family from a checkpoint on disk, as a generator that hears nothing: one video of so many frames from a prompt
//! and, where the model takes one, a picture. An empty picture stands for none.
//!
//! | model | by | frames | official defaults |
//! | --- | --- | --- | --- |
//! | T2V-A14B | 16 channels | 81 at 16 a second | 40 UniPC steps, shift 12, guidance 3 and 4, boundary 0.875, 1280×720 |
//! | I2V-A14B | 36 channels in | 81 at 16 | 40 steps, shift 5, guidance 3.5, boundary 0.9, area 1280·720 |
//! | TI2V-5B | 48 channels | 121 at 24 | 50 steps, shift 5, guidance 5, 1280×704 |

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use candle_core::{DType, Device, Tensor};

use super::{
    BaseSettings, Start, best_size,
    experts::{OnDisk, Parts, Told, of_base},
    latents, noise, output_size,
};
use crate::{
    avatar::{
        AvatarError, Capabilities, Generator, OpenOptions, Result, Stream,
        s2v::{
            Config, Loading, Mode, Size, Watcher,
            parts::{self, fits},
            words::Reader,
        },
        studio::pictures,
    },
    media::{AudioBlock, Epoch, Frame, FrameBlock, Geometry, MediaTime, Pixels, Portrait, StageTimes},
    model::{
        self, picture,
        vae::{Decoding, WanVae},
        weights::layout::Part,
    },
};

/// `sample_neg_prompt` of wan/configs/shared_config.py (Wan-Video/Wan2.2 at 42bf4cf).
const OFFICIAL_NEGATIVE_PROMPT: &str = "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走";

/// Whether a checkpoint's model makes videos without hearing anything, so that [`load`] takes it; told by its content.
///
/// # Errors
/// The checkpoint cannot be looked into.
pub fn makes(config: &Config) -> Result<bool> {
    of_base(config)
}

struct Film {
    config: Config,
    size: Size,
    settings: BaseSettings,
    kind: Kind,
    vae: Arc<WanVae>,
    experts: Arc<Mutex<OnDisk>>,
    reader: Reader,
    watcher: Watcher,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Words,
    Picture,
    Either,
}

/// Loads a model of the base family; the transformers follow when a video is made. See [`crate::avatar::s2v::load`].
///
/// # Errors
/// As there.
pub fn load(config: &Config, prompts: &[String], watcher: Watcher) -> Result<Box<dyn Generator>> {
    config.validate().map_err(AvatarError::Options)?;
    let size = Size::parse(&config.size).map_err(AvatarError::Options)?;
    for (flag, given) in [
        ("--mode", config.mode != Mode::Auto),
        ("--clip-frames (its videos are --frames long)", config.clip_frames.is_some()),
        ("--first-frame (it begins with --image anyway)", config.first_frame),
    ] {
        if given {
            return Err(AvatarError::Options(format!("this model hears no speech and has no {flag}; leave it out")));
        }
    }
    let device = parts::device(config)?;
    let dtype = parts::precision(config, &device)?;
    let found = Parts::find(config)?;
    let (kind, official) = match found.config.model_type.as_str() {
        "i2v" => (Kind::Picture, BaseSettings::i2v_a14b()),
        "ti2v" => (Kind::Either, BaseSettings::ti2v_5b()),
        _ => (Kind::Words, BaseSettings::t2v_a14b()),
    };
    let settings = BaseSettings {
        frames: config.frames.unwrap_or(official.frames),
        solver: config.solver.map_or(official.solver, Into::into),
        shift: config.shift.unwrap_or(official.shift),
        guidance: config.guidance.map_or(official.guidance, |g| [g, g]),
        ..official
    };
    settings.check().map_err(|e| AvatarError::Options(e.to_string()))?;
    let text_len = found.config.text_len;
    let mut reader = Reader::new(&found.text, text_len, &device, dtype, &watcher).map_err(fits)?;
    let mut known: Vec<&str> = vec![&config.prompt];
    known.extend(guided(&settings).then_some(negative(config)));
    known.extend(prompts.iter().map(String::as_str));
    reader.learn(&known).map_err(fits)?;
    let part = if kind == Kind::Either { Part::Vae22 } else { Part::Vae21 };
    let weights = parts::watched(&found.vae, part.name(), &device, DType::F32, &watcher);
    let vae = WanVae::load(&weights).map_err(fits)?;
    weights.finish().map_err(fits)?;
    let experts = OnDisk::new(&found, config, &device, dtype, &watcher);
    Ok(Box::new(Film {
        config: config.clone(),
        size,
        settings,
        kind,
        vae: Arc::new(vae),
        experts: Arc::new(Mutex::new(experts)),
        reader,
        watcher,
    }))
}

fn guided(settings: &BaseSettings) -> bool {
    settings.guidance.iter().any(|g| *g > 1.0)
}

fn negative(config: &Config) -> &str {
    if config.negative_prompt.is_empty() { OFFICIAL_NEGATIVE_PROMPT } else { &config.negative_prompt }
}

/// Whether a portrait stands for none.
fn none(portrait: &Portrait) -> bool {
    portrait.width == 0 || portrait.height == 0
}

impl Film {
    /// Pixels of a patch.
    fn unit(&self) -> usize {
        2 * self.vae.scale()
    }

    /// Height and width for a picture or none.
    fn output(&self, portrait: &Portrait) -> Result<(usize, usize)> {
        let unit = self.unit();
        let official = 1280 * if self.kind == Kind::Either { 704 } else { 720 };
        let area = match self.size {
            Size::Exact(w, h) if w % unit == 0 && h % unit == 0 => return Ok((h, w)),
            Size::Exact(w, h) => {
                return Err(AvatarError::Options(format!("{w}x{h}: sides are multiples of {unit} with this model")));
            }
            Size::Area(area) => area,
            Size::Official => official,
        };
        let dims = (portrait.width as usize, portrait.height as usize);
        let size = match self.kind {
            _ if none(portrait) => {
                // 16:9 in whole patches, within the area: 480p is 832×480 and 720p is 1280×720.
                let height = ((area as f64 * 9.0 / 16.0).sqrt() / unit as f64).round().max(1.0) as usize * unit;
                Ok((height, (area / height / unit).max(1) * unit))
            }
            Kind::Either => best_size(dims, area, unit),
            _ => output_size(dims, area, unit),
        };
        size.map_err(|e| AvatarError::Portrait(e.to_string()))
    }

    /// The first frame, `[3, 1, height, width]`, as the official program of the model makes it; a given size is covered.
    fn picture(&self, portrait: &Portrait, size: (usize, usize)) -> model::Result<Tensor> {
        let dims = (portrait.width as usize, portrait.height as usize);
        let stretched = self.kind == Kind::Picture && !matches!(self.size, Size::Exact(..));
        let made = if stretched { picture::bicubic } else { picture::cover }(&portrait.rgb, dims, size)?;
        Ok(made.to_device(self.vae.device())?)
    }
}

impl Generator for Film {
    fn geometry(&self) -> Geometry {
        self.geometry_for(&self.sample_portrait())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { prompt: true, ..Capabilities::default() }
    }

    fn geometry_for(&self, portrait: &Portrait) -> Geometry {
        // What is refused here is refused with its reason when it is opened.
        let (height, width) = self.output(portrait).unwrap_or((64, 64));
        Geometry {
            width: width as u32,
            height: height as u32,
            fps: self.settings.fps,
            first_block_frames: 1,
            block_frames: 4,
            look_ahead: MediaTime::ZERO,
            matte: false,
        }
    }

    fn frames(&self) -> Option<u64> {
        Some(self.settings.frames as u64)
    }

    fn sample_portrait(&self) -> Portrait {
        Portrait { width: 0, height: 0, rgb: Arc::from([]) }
    }

    fn open(&mut self, portrait: &Portrait, options: &OpenOptions) -> Result<Box<dyn Stream>> {
        match (self.kind, none(portrait)) {
            (Kind::Words, false) => {
                return Err(AvatarError::Portrait(
                    "this model makes videos from words alone: leave --image out".into(),
                ));
            }
            (Kind::Picture, true) => {
                return Err(AvatarError::Portrait(
                    "this model makes videos from a picture: name one with --image".into(),
                ));
            }
            _ => {}
        }
        if options.pose.is_some() || !options.masks.is_empty() {
            return Err(AvatarError::Options("this model follows neither a pose nor speakers".into()));
        }
        let size = self.output(portrait)?;
        let failed = |e: model::Error| AvatarError::Device { block: 0, stage: "prompt", source: e.into() };
        let first = match none(portrait) {
            true => None,
            false => Some(self.picture(portrait, size).map_err(|e| AvatarError::Portrait(e.to_string()))?),
        };
        let mut settings = self.settings.clone();
        settings.steps = options.steps.unwrap_or(settings.steps);
        let prompt = options.prompt.as_deref().unwrap_or(&self.config.prompt);
        let against = options.negative_prompt.as_deref().unwrap_or(negative(&self.config));
        let said = [Some(prompt), guided(&settings).then_some(against)];
        let words = said.into_iter().flatten().map(|p| self.reader.states(p)).collect::<model::Result<Vec<_>>>();
        let scale = self.vae.scale();
        Ok(Box::new(Shot {
            geometry: self.geometry_for(portrait),
            shape: (self.vae.channels(), settings.latent_frames(), size.0 / scale, size.1 / scale),
            vae: self.vae.clone(),
            experts: self.experts.clone(),
            words: words.map_err(failed)?,
            first,
            settings,
            seed: options.seed,
            watcher: self.watcher.clone(),
            latents: None,
            decoding: Decoding::default(),
            index: 0,
        }))
    }
}

/// One video: its latents are made with the first block, its frames come as they are decoded.
struct Shot {
    geometry: Geometry,
    /// Channels, latent frames, rows, columns.
    shape: (usize, usize, usize, usize),
    vae: Arc<WanVae>,
    experts: Arc<Mutex<OnDisk>>,
    words: Vec<Tensor>,
    first: Option<Tensor>,
    settings: BaseSettings,
    seed: u64,
    watcher: Watcher,
    latents: Option<Tensor>,
    decoding: Decoding,
    index: u64,
}

impl Shot {
    fn imagine(&self) -> model::Result<Tensor> {
        let start = self.first.as_ref().map_or(Start::Words, Start::Picture);
        let mut experts = self.experts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut told = Told { experts: &mut experts, words: &self.words, asked: None };
        let noise = noise(self.seed, self.shape, &Device::Cpu)?.to_device(self.vae.device())?;
        let (total, mut done) = (self.settings.steps, 0);
        let mut step = |name: &str, _: &Tensor| {
            if name == "latents_in" {
                (self.watcher)(Loading { what: Loading::STEPS, done, total });
                done += 1;
            }
        };
        let made = latents(&mut told, &self.vae, &start, &self.settings, &noise, &mut step)?;
        (self.watcher)(Loading { what: Loading::STEPS, done: total, total });
        Ok(made)
    }

    fn block(&mut self) -> model::Result<Option<FrameBlock>> {
        let began = Instant::now();
        if self.latents.is_none() {
            self.latents = Some(self.imagine()?);
        }
        let imagined = began.elapsed();
        let at = self.index as usize;
        let Some(latents) = self.latents.as_ref().filter(|_| at < self.shape.1) else { return Ok(None) };
        let shown = pictures(&self.vae.decode_next(&mut self.decoding, &latents.narrow(1, at, 1)?)?)?;
        let g = &self.geometry;
        let first = g.first_frame(self.index) as i64;
        let frame = |(rgb, i): (Arc<[u8]>, i64)| Frame {
            at: MediaTime::from_units(first + i, g.fps),
            width: g.width,
            height: g.height,
            pixels: Pixels::Rgb(rgb),
            matte: None,
        };
        let frames = shown.into_iter().zip(0..).map(frame).collect();
        let stages = StageTimes { generation: imagined, decode: began.elapsed() - imagined, ..StageTimes::default() };
        let block = FrameBlock { epoch: Epoch::default(), index: self.index, frames, stages, controls: Vec::new() };
        self.index += 1;
        Ok(Some(block))
    }
}

impl Stream for Shot {
    fn push(&mut self, _: &AudioBlock) -> Result<()> {
        Err(AvatarError::Options("this model hears no speech".into()))
    }

    fn pull(&mut self) -> Result<Option<FrameBlock>> {
        let block = self.index;
        self.block().map_err(|e| AvatarError::Device { block, stage: "generation", source: e.into() })
    }

    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}
