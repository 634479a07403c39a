//! The 14B engine on several devices: the same faces, made by a [`Crew`].

use std::{
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use candle_core::{DType, Device, Tensor};

use super::{
    BLOCK_STEPS, Config, How, Size, Wire, assemble,
    ears::Ears,
    face::{DISTANCE, frames},
    how,
    parts::{self, Parts, Watcher, fits},
    reach, sample,
    words::Reader,
};
use crate::{
    avatar::{
        AvatarError, Generator, Intake, OpenOptions, Result, Stream,
        block::BlockSettings,
        crew::{Build, Crew, FaceOpening, Line, Made},
        noise::{normal, whole},
        studio::Studio,
    },
    media::{AudioBlock, Epoch, FrameBlock, Geometry, MediaTime, Portrait, SPEECH_RATE},
    model::{
        self, picture,
        ranks::{Layout, connect},
        sampler::Euler,
    },
};

/// A rank failed, and with it all faces: the engine is built anew.
fn lost(error: model::Error) -> AvatarError {
    AvatarError::Device { block: 0, stage: "ranks", source: error.into() }
}

/// Starts the ranks.
fn start(
    config: &Config,
    parts: &Arc<Parts>,
    how: &How,
    devices: &[Device],
    dtype: DType,
    watcher: &Watcher,
) -> model::Result<Arc<Crew>> {
    let links = connect(devices, config.wire == Wire::Nccl)?;
    let build = |device: &Device| -> Build {
        let (parts, config, how) = (parts.clone(), config.clone(), how.clone());
        let (device, watcher) = (device.clone(), watcher.clone());
        Box::new(move || -> model::Result<Studio> {
            let mut transformer = parts.transformer_config.clone();
            if let How::Block { settings, .. } = &how {
                transformer.kv_frames = settings.clip_frames / 4;
            }
            assemble(&parts, &config, &how, transformer, &device, dtype, &watcher)
        })
    };
    Ok(Arc::new(Crew::start(links, devices.iter().map(build).collect())?))
}

struct Team {
    config: Config,
    parts: Arc<Parts>,
    how: How,
    size: Size,
    settings: BlockSettings,
    shift: f64,
    per_block: usize,
    crew: Arc<Crew>,
    /// Reads on the first rank's device, and so on its thread.
    reader: Arc<Mutex<Reader>>,
}

/// As [`super::load`], on several devices.
pub(super) fn load(config: &Config, prompts: &[String], watcher: Watcher) -> Result<Box<dyn Generator>> {
    Ok(Box::new(load_team(config, prompts, watcher)?))
}

fn load_team(config: &Config, prompts: &[String], watcher: Watcher) -> Result<Team> {
    let size = Size::parse(&config.size).map_err(AvatarError::Options)?;
    let places = config.places().map_err(AvatarError::Options)?;
    let devices = places.into_iter().map(parts::opened).collect::<Result<Vec<_>>>()?;
    let dtype = parts::precision(config, &devices[0])?;
    for device in &devices[1..] {
        if parts::precision(config, device)? != dtype {
            return Err(AvatarError::Options(format!(
                "the devices of `{}` compute in different types; give --dtype, or devices of one kind",
                config.device
            )));
        }
    }
    let parts = Arc::new(Parts::find(config)?);
    let how = how(config, parts.live)?;
    let How::Block { settings, shift } = how.clone() else {
        return Err(AvatarError::Options(
            "several devices share the work of block mode; clip mode runs on one: give --mode block or one device"
                .into(),
        ));
    };
    let per_block = parts.transformer_config.frames_per_block;
    let mut reader =
        Reader::new(&parts.text, parts.transformer_config.text_len, &devices[0], dtype, &watcher).map_err(fits)?;
    let known: Vec<&str> = std::iter::once(config.prompt.as_str()).chain(prompts.iter().map(String::as_str)).collect();
    reader.learn(&known).map_err(fits)?;
    let crew = start(config, &parts, &how, &devices, dtype, &watcher).map_err(fits)?;
    let (config, reader) = (config.clone(), Arc::new(Mutex::new(reader)));
    let team = Team { config, parts, how, size, settings, shift, per_block, crew, reader };
    let layout = team.layout(BLOCK_STEPS)?;
    for line in layout.describe(&team.config.costs()) {
        tracing::info!("{line}");
    }
    Ok(team)
}

impl Team {
    fn layout(&self, steps: usize) -> Result<Layout> {
        let config = &self.config;
        let blocks = self.parts.transformer_config.num_layers;
        Layout::plan(self.crew.ranks(), steps, blocks, &config.costs(), config.share.into())
            .map_err(|e| AvatarError::Options(e.to_string()))
    }

    fn geometry_of(&self, size: (usize, usize)) -> Geometry {
        self.how.geometry(self.per_block, self.config.reach(), size)
    }
}

impl Generator for Team {
    fn geometry(&self) -> Geometry {
        self.geometry_for(&self.sample_portrait())
    }

    fn geometry_for(&self, portrait: &Portrait) -> Geometry {
        // A picture without a size is refused when it is opened.
        self.geometry_of(self.how.output(self.size, portrait).unwrap_or((64, 64)))
    }

    fn sample_portrait(&self) -> Portrait {
        sample()
    }

    fn open(&mut self, portrait: &Portrait, options: &OpenOptions) -> Result<Box<dyn Stream>> {
        let failed = |e: model::Error| AvatarError::Device { block: 0, stage: "portrait", source: e.into() };
        if options.pose.is_some() {
            return Err(AvatarError::Options("block mode takes no pose; leave --pose out, or --mode clip".into()));
        }
        let size = self.how.output(self.size, portrait)?;
        let looked = picture::prepare(&portrait.rgb, (portrait.width as usize, portrait.height as usize), size);
        let looked = looked.map_err(|e| AvatarError::Portrait(e.to_string()))?;
        let steps = options.steps.unwrap_or(BLOCK_STEPS);
        let euler = Euler::live_avatar(steps, self.shift).map_err(|e| AvatarError::Options(e.to_string()))?;
        let layout = self.layout(steps)?;
        let prompt = options.prompt.clone().unwrap_or_else(|| self.config.prompt.clone());
        let (reader, asked) = (self.reader.clone(), prompt.clone());
        let read = self.crew.on(0, move |_| {
            Ok(reader.lock().unwrap_or_else(|e| e.into_inner()).states(&asked)?.to_device(&Device::Cpu)?)
        });
        let text = Some((prompt, read.map_err(failed)?));
        let reach = reach(portrait, &options.masks, size, SCALE * self.parts.transformer_config.patch[1])?;
        let settings = self.settings.clone();
        let opening = FaceOpening { layout, picture: looked, text, euler, settings, reach, watch: None };
        let line = self.crew.open(opening).map_err(failed)?;
        let geometry = self.geometry_of(size);
        let lead = self.how.frames(self.per_block).1 * SPEECH_RATE as usize / geometry.fps as usize;
        let speaker = || {
            let ears = Ears::new(self.config.reach(), geometry.fps, lead);
            Speaker { ears: Arc::new(Mutex::new(ears)), intake: Intake::default() }
        };
        let channels = self.parts.transformer_config.in_dim;
        Ok(Box::new(Face {
            speakers: (0..options.masks.len().max(1)).map(|_| speaker()).collect(),
            noise: [channels, self.per_block, size.0 / SCALE, size.1 / SCALE],
            seed: options.seed,
            begun: 0,
            steps,
            geometry,
            line,
        }))
    }
}

/// Pixels per latent position and side: what the autoencoder of every S2V checkpoint has.
const SCALE: usize = 8;

/// One voice; the first rank listens while more speech comes.
struct Speaker {
    ears: Arc<Mutex<Ears>>,
    intake: Intake,
}

/// One face as its owner sees it.
struct Face {
    line: Line,
    geometry: Geometry,
    speakers: Vec<Speaker>,
    seed: u64,
    noise: [usize; 4],
    steps: usize,
    /// The next block to be begun.
    begun: u64,
}

impl Face {
    /// Whether all speech of the next block is here.
    fn allows(&self) -> bool {
        self.speakers.iter().all(|s| s.intake.allows(&self.geometry, self.begun))
    }

    fn begin(&mut self) -> model::Result<()> {
        let frames = self.geometry.block_frames as usize;
        let first = self.begun * frames as u64;
        let all: Vec<_> = self.speakers.iter().map(|s| s.ears.clone()).collect();
        let hear = move |studio: &Studio| {
            let listen = |ears: &Arc<Mutex<Ears>>| {
                let mut ears = ears.lock().unwrap_or_else(|e| e.into_inner());
                ears.listen(&studio.hearing, studio.device(), first, frames)
            };
            let heard = all.iter().map(listen).collect::<model::Result<Vec<_>>>()?;
            Ok(if let [one] = &heard[..] { one.clone() } else { Tensor::cat(&heard, 0)? })
        };
        let noise = normal(self.seed, self.begun, self.noise.iter().product());
        let noise = Tensor::from_vec(noise, &self.noise, &Device::Cpu)?;
        let distance = whole(self.seed, self.begun, self.steps, DISTANCE);
        self.line.submit(Box::new(hear), noise, &distance)?;
        self.begun += 1;
        Ok(())
    }

    fn told(&self, made: Made) -> FrameBlock {
        let stages = made.times.told(self.line.layout().ranks());
        let origin = self.speakers.first().map_or(MediaTime::ZERO, |s| s.intake.origin());
        let frames = frames(made.pictures(), &self.geometry, origin, made.number);
        FrameBlock { epoch: Epoch::default(), index: made.number, frames, stages, controls: Vec::new() }
    }
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
        ears.lock().unwrap_or_else(|e| e.into_inner()).push(&clean);
        Ok(())
    }

    fn pull(&mut self) -> Result<Option<FrameBlock>> {
        while self.allows() && !self.line.full() {
            self.begin().map_err(lost)?;
        }
        let wait = self.line.full() || self.speakers.iter().all(|s| s.intake.is_finished());
        Ok(self.line.next(wait).map_err(lost)?.map(|made| self.told(made)))
    }

    fn under_way(&self) -> usize {
        self.line.under_way()
    }

    fn poll_ready(&mut self, cx: &mut Context) -> Poll<()> {
        self.line.poll(cx)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::avatar::s2v::Mode;

    #[test]
    fn a_rank_that_dies_takes_the_engine_with_it_and_says_why() {
        let config = Config {
            checkpoint: vec!["random:tiny".into()],
            mode: Mode::Block,
            size: "64x64".into(),
            device: "cpu,cpu".into(),
            audio_context_ms: 200,
            ..Config::default()
        };
        let mut team = load_team(&config, &[], Arc::new(|_| {})).unwrap();
        let options = OpenOptions { steps: Some(1), ..OpenOptions::default() };
        let portrait = team.sample_portrait();
        let mut stream = team.open(&portrait, &options).unwrap();
        let speech = AudioBlock { at: MediaTime::ZERO, samples: vec![0.1; SPEECH_RATE as usize] };
        stream.push(&speech).unwrap();
        let died = team.crew.on(1, |_| -> model::Result<()> { panic!("a card fell off the bus") });
        assert!(died.unwrap_err().to_string().contains("rank 1 panicked: a card fell off the bus"));
        let lost = loop {
            match stream.pull() {
                Ok(_) => std::thread::yield_now(),
                Err(e) => break e,
            }
        };
        assert!(lost.to_string().contains("a card fell off the bus"), "{lost}");
        for lost in [Some(lost), team.open(&portrait, &options).err()] {
            assert!(matches!(lost, Some(AvatarError::Device { .. })), "{lost:?}");
        }
    }
}
