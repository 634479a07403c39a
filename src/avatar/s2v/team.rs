//! The 14B engine on several devices, or on two streams of one: the same faces, made by a [`Crew`].

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use candle_core::{DType, Device, Tensor};

use super::{
    BLOCK_STEPS, Config, How, Loader, Place, Share, Size, Wire,
    album::{Album, Key},
    ears::Ears,
    face::{DISTANCE, frames},
    parts::{self, Parts, Watcher, fits},
    reach, sample,
    words::Reader,
};
use crate::{
    avatar::{
        AvatarError, Capabilities, Fill, Generator, Intake, OpenOptions, Result, Stream,
        block::BlockSettings,
        crew::{Build, Crew, FaceOpening, Line, Made, Picture},
        noise::{normal, whole},
        studio::{Tools, fill},
    },
    media::{AudioBlock, Epoch, FrameBlock, Geometry, MediaTime, Portrait, SPEECH_RATE, StageTimes},
    model::{
        self, picture,
        ranks::{Costs, Layout, connect},
        sampler::Euler,
    },
};

/// A rank failed, and with it all faces: the engine is built anew.
fn lost(error: model::Error) -> AvatarError {
    AvatarError::Device { block: 0, stage: "ranks", source: error.into() }
}

/// Starts the ranks. Each loads what it needs: the first the audio encoder; where one only decodes, it has the autoencoder
/// and nothing else, and the others have none. Ranks on the processor have one set of weights.
fn start(
    config: &Config,
    parts: &Arc<Parts>,
    how: &How,
    (places, devices): (&[Place], &[Device]),
    dtype: DType,
    watcher: &Watcher,
) -> model::Result<Arc<Crew>> {
    // A card twice is no pair for NCCL.
    let twice = places.iter().enumerate().any(|(i, p)| places[..i].contains(p));
    let links = connect(devices, config.wire == Wire::Nccl && !twice)?;
    let common: Arc<Mutex<Option<Tools>>> = Arc::default();
    let build = |rank: usize| -> Build {
        let (parts, config, how, watcher) = (parts.clone(), config.clone(), how.clone(), watcher.clone());
        let (device, common) = (devices[rank].clone(), common.clone());
        let decodes_only = Config::decodes_only(places, rank);
        let decodes = decodes_only || !Config::decodes_only(places, places.len() - 1);
        Box::new(move || -> model::Result<Tools> {
            let loader = Loader { parts: &parts, config: &config, how: &how, dtype, watcher: &watcher };
            let load = |steps: bool, hears: bool, decodes: bool| -> model::Result<Tools> {
                Ok(Tools {
                    dit: steps.then(|| loader.dit(&device)).transpose()?.map(Arc::new),
                    vae: decodes.then(|| loader.vae(&device)).transpose()?.map(Arc::new),
                    hearing: hears.then(|| loader.hearing(&device)).transpose()?.map(Arc::new),
                    device: device.clone(),
                })
            };
            if !device.is_cpu() {
                return load(!decodes_only, rank == 0, decodes);
            }
            let mut common = common.lock().unwrap_or_else(|e| e.into_inner());
            match &mut *common {
                Some(tools) => Ok(tools.clone()),
                none => Ok(none.insert(load(true, true, true)?).clone()),
            }
        })
    };
    Ok(Arc::new(Crew::start(links, (0..devices.len()).map(build).collect())?))
}

/// Blocks whose times are remembered.
const REMEMBERED: usize = 9;

/// What blocks took on each rank, ring full.
#[derive(Default)]
struct Seen(VecDeque<(StageTimes, Vec<Duration>)>);

impl Seen {
    fn note(&mut self, stages: StageTimes, busy: Vec<Duration>) {
        if self.0.back().is_some_and(|(_, b)| b.len() != busy.len()) {
            self.0.clear();
        }
        self.0.push_back((stages, busy));
        if self.0.len() > REMEMBERED {
            self.0.pop_front();
        }
    }

    /// Medians in milliseconds: what hearing, a step of `steps` and decoding took, and each rank. None while too few were
    /// seen.
    fn medians(&self, steps: usize) -> Option<(Costs, Vec<f64>)> {
        let ranks = self.0.front()?.1.len();
        if self.0.len() < REMEMBERED / 2 {
            return None;
        }
        let median = |of: &dyn Fn(&(StageTimes, Vec<Duration>)) -> Duration| {
            let mut all: Vec<Duration> = self.0.iter().map(of).collect();
            all.sort_unstable();
            all[all.len() / 2].as_secs_f64() * 1e3
        };
        let costs = Costs {
            hearing: median(&|s| s.0.features),
            step: median(&|s| s.0.generation) / steps.max(1) as f64,
            decode: median(&|s| s.0.decode),
        };
        Some((costs, (0..ranks).map(|rank| median(&|s| s.1[rank])).collect()))
    }
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
    /// Each device once.
    cards: Vec<Device>,
    /// Reads on the first rank's device, and so on its thread.
    reader: Arc<Mutex<Reader>>,
    album: Album,
    /// What blocks of the newest layout took, and which one that is.
    seen: Arc<Mutex<Seen>>,
    newest: Option<(usize, Layout)>,
}

/// As [`super::load`], on several devices. `found`: the first of them, and what was made out of the checkpoint.
pub(super) fn load(
    config: &Config,
    prompts: &[String],
    watcher: Watcher,
    found: (Device, Parts, How),
) -> Result<Box<dyn Generator>> {
    Ok(Box::new(load_team(config, prompts, watcher, found)?))
}

fn load_team(
    config: &Config,
    prompts: &[String],
    watcher: Watcher,
    (first, parts, how): (Device, Parts, How),
) -> Result<Team> {
    let size = Size::parse(&config.size).map_err(AvatarError::Options)?;
    let places = config.places().map_err(AvatarError::Options)?;
    let others = places.iter().skip(1).copied().map(parts::opened);
    let devices = std::iter::once(Ok(first)).chain(others).collect::<Result<Vec<_>>>()?;
    let dtype = parts::precision(config, &devices[0])?;
    for device in &devices[1..] {
        if parts::precision(config, device)? != dtype {
            return Err(AvatarError::Options(format!(
                "the devices of `{}` compute in different types; give --dtype, or devices of one kind",
                config.device
            )));
        }
    }
    let parts = Arc::new(parts);
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
    let crew = start(config, &parts, &how, (&places, &devices), dtype, &watcher).map_err(fits)?;
    let (config, reader) = (config.clone(), Arc::new(Mutex::new(reader)));
    let (seen, newest) = (Arc::default(), None);
    let once = |(i, _): &(usize, &Device)| !places[..*i].contains(&places[*i]);
    let cards = devices.iter().enumerate().filter(once).map(|(_, d)| d.clone()).collect();
    Ok(Team {
        config,
        parts,
        how,
        size,
        settings,
        shift,
        per_block,
        crew,
        cards,
        reader,
        album: Album::default(),
        seen,
        newest,
    })
}

impl Team {
    /// Who does what for a new face: by the configured times at first, evened by what blocks were seen to take then.
    fn layout(&mut self, steps: usize) -> Result<Layout> {
        let blocks = self.parts.transformer_config.num_layers;
        let planned = self.config.layout(steps, blocks).map_err(AvatarError::Options)?;
        let mut seen = self.seen.lock().unwrap_or_else(|e| e.into_inner());
        let mut costs = self.config.costs();
        let layout = match (&self.newest, seen.medians(steps)) {
            (Some((of, layout)), Some((measured, busy))) if *of == steps && self.config.share == Share::Balanced => {
                costs = measured;
                layout.evened(&busy, &measured)
            }
            (Some((of, layout)), _) if *of == steps => layout.clone(),
            _ => planned,
        };
        if self.newest.as_ref().is_none_or(|(_, l)| *l != layout) {
            layout.describe(&costs).iter().for_each(|line| tracing::info!("{line}"));
            *seen = Seen::default();
            self.newest = Some((steps, layout.clone()));
        }
        Ok(layout)
    }

    /// Blocks of a face after which its rings are full.
    fn filled(&self) -> u64 {
        (self.settings.clip_frames / 4 / self.per_block.max(1)) as u64 + 1
    }

    fn geometry_of(&self, size: (usize, usize)) -> Geometry {
        self.how.geometry(self.per_block, self.config.reach(), size)
    }
}

impl Generator for Team {
    fn geometry(&self) -> Geometry {
        self.geometry_for(&self.sample_portrait())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { prompt: true, ..Capabilities::default() }
    }

    fn geometry_for(&self, portrait: &Portrait) -> Geometry {
        // A picture without a size is refused when it is opened.
        self.geometry_of(self.how.output(self.size, portrait).unwrap_or((64, 64)))
    }

    fn tflop_per_block(&self, geometry: &Geometry, steps: Option<usize>) -> Option<f64> {
        Some(self.how.tflop(&self.parts.transformer_config, SCALE, geometry, steps))
    }

    fn settled_after(&self) -> u64 {
        self.how.settled_after(self.per_block, self.config.reach())
    }

    fn memory(&self) -> Vec<Fill> {
        fill(&self.cards)
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
        let key = Key::of(portrait, size);
        let picture = match self.album.find(key) {
            Some((reference, motion)) => Picture::Known { reference, motion },
            None => {
                let source = (portrait.width as usize, portrait.height as usize);
                let looked = picture::prepare(&portrait.rgb, source, size);
                Picture::New(looked.map_err(|e| AvatarError::Portrait(e.to_string()))?)
            }
        };
        let new = matches!(picture, Picture::New(_));
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
        let opening =
            FaceOpening { layout, picture, text, euler, settings, reach, planar: options.planar, watch: None };
        let line = self.crew.open(opening).map_err(failed)?;
        if new {
            self.album.keep(key, (line.reference().clone(), line.motion().clone()));
        }
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
            seen: self.seen.clone(),
            filled: self.filled(),
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
    seen: Arc<Mutex<Seen>>,
    filled: u64,
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
        let hear = move |tools: &Tools| {
            let hearing = tools.hearing()?;
            let listen = |ears: &Arc<Mutex<Ears>>| {
                let mut ears = ears.lock().unwrap_or_else(|e| e.into_inner());
                ears.listen(hearing, &tools.device, first, frames)
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
        let ranks = self.line.layout().ranks();
        let stages = made.times.told(ranks);
        if made.number >= self.filled {
            let busy = (0..ranks).map(|rank| made.times.busy(rank)).collect();
            self.seen.lock().unwrap_or_else(|e| e.into_inner()).note(stages, busy);
        }
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
    use crate::avatar::s2v::{Mode, how};

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
        let parts = Parts::find(&config).unwrap();
        let how = how(&config, parts.live).unwrap();
        let mut team = load_team(&config, &[], Arc::new(|_| {}), (Device::Cpu, parts, how)).unwrap();
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
