//! Several devices behind one face, as threads on the processor: any cut of the work gives the same pictures, shared
//! steps give the same latents, and a rank that dies ends its faces with a reason while the engine goes on.

use crate::s2v::{assert_planes_of, face, load, options, rgb, speak, speech, tiny};
use candle_core::{DType, Device, Tensor};
use loquent::{
    avatar::{
        self, AvatarError, Generator, Intake, OpenOptions, Stream,
        block::BlockSettings,
        crew::{Build, Crew, FaceOpening, Line, Picture, Watch},
        s2v::{self, Config, Mode, Share},
        studio::{Studio, Tools},
    },
    engine::{self, Engine, Health, LaneEvent},
    media::{AudioBlock, Frame, FrameBlock, Geometry, MediaTime, Pixels, Portrait, SPEECH_RATE},
    model::{
        self,
        dit::{self, Dit},
        ranks::{Costs, Layout, Split, Stage, in_process},
        sampler::Euler,
        vae::WanVae,
        wav2vec2::Wav2Vec2,
        weights::{
            Weights,
            synth::{Whole, imagined, preset},
        },
    },
};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::timeout;

#[test]
fn pictures_are_the_same_however_many_devices_make_them() {
    let (speech, options) = (speech(1.7), options(Mode::Block));
    let base = Config { clip_frames: Some(24), audio_context_ms: 200, ..tiny(Mode::Block) };
    let one = rgb(&speak(load(&base).as_mut(), &speech, 8000, &options));
    assert_eq!(one.len(), 9 + 3 * 12, "two clips: the second has its own reference");
    for (devices, share) in [(2, Share::Balanced), (3, Share::Balanced), (5, Share::Steps)] {
        let config = Config { device: vec!["cpu"; devices].join(","), share, ..base.clone() };
        let mut generator = load(&config);
        for cut in [1600, usize::MAX >> 1] {
            let all = speak(generator.as_mut(), &speech, cut, &options);
            assert!(rgb(&all) == one, "{devices} devices, {share:?}, cut by {cut}");
            if cut > 1600 {
                let planes = speak(generator.as_mut(), &speech, cut, &OpenOptions { planar: true, ..options.clone() });
                assert_planes_of(&planes, &all);
            }
            assert!(all.iter().all(|b| b.stages.busiest.is_some_and(|t| t > Duration::ZERO)));
        }
    }
}

#[test]
fn what_several_devices_cannot_do_is_said() {
    let refused = |config: Config, part: &str| match s2v::load(&config, &[], Arc::new(|_| {})) {
        Err(AvatarError::Options(text)) => assert!(text.contains(part), "{text}"),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("was taken: {config:?}"),
    };
    let two = || "cpu,cpu".to_string();
    refused(Config { device: two(), ..tiny(Mode::Clip) }, "one device in clip mode");
    refused(Config { device: two(), mode: Mode::Auto, ..tiny(Mode::Block) }, "share the work of block mode");
    refused(Config { device: "cpu,tpu".into(), ..tiny(Mode::Block) }, "tpu");
    refused(Config { device: two(), stage_ms: [1.0, 0.0, 1.0], ..tiny(Mode::Block) }, "stage_ms");
    // Four ranks cannot share three heads.
    let config = Config { device: "cpu,cpu,cpu,cpu,cpu".into(), share: Share::Sequence, ..tiny(Mode::Block) };
    let why = load(&config).open(&face(), &options(Mode::Block)).err().map(|e| format!("{e:?}")).unwrap_or_default();
    assert!(why.contains("3 heads"), "{why}");
}

/// A tiny model with this many heads.
fn studio(heads: usize) -> model::Result<Studio> {
    let weights = |name: &str| -> model::Result<Weights> {
        Ok(Weights::new(imagined(preset(name)?, 7)?, &Device::Cpu, DType::F32))
    };
    let whole = Whole::named("tiny")?;
    let config = dit::Config { num_heads: heads, ..whole.transformer_config() };
    Ok(Studio {
        dit: Dit::load(config, &weights("s2v-tiny")?)?,
        vae: WanVae::load(&weights("wan21-vae-tiny")?)?,
        hearing: Wav2Vec2::load(&weights("wav2vec2-tiny")?, &whole.hearing_config())?,
    })
}

fn crew(ranks: usize, heads: usize) -> Arc<Crew> {
    let builds = (0..ranks).map(|_| Box::new(move || studio(heads).map(Into::into)) as Build).collect();
    Arc::new(Crew::start(in_process(&vec![Device::Cpu; ranks]), builds).unwrap())
}

const STEPS: usize = 2;
/// Height and width of the picture.
const SIDE: [usize; 2] = [48, 80];

fn open(crew: &Arc<Crew>, layout: Layout, watch: Option<Watch>) -> model::Result<Line> {
    let text = Tensor::zeros((3, 64), DType::F32, &Device::Cpu)?;
    crew.open(FaceOpening {
        layout,
        picture: Picture::New(wave(&[3, 1, SIDE[0], SIDE[1]], 0.3)?),
        text: Some(("nothing".into(), text)),
        euler: Euler::live_avatar(STEPS, 3.0)?,
        settings: BlockSettings::default(),
        reach: Vec::new(),
        planar: false,
        watch,
    })
}

fn wave(shape: &[usize], phase: f32) -> model::Result<Tensor> {
    let count = shape.iter().product::<usize>();
    let values: Vec<f32> = (0..count).map(|i| (i as f32 * 0.37 + phase).sin() + (i as f32 * 1.7).cos()).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

fn submit(line: &mut Line, number: u64, hear: avatar::crew::Hear) -> model::Result<()> {
    let noise = wave(&[16, 3, SIDE[0] / 8, SIDE[1] / 8], number as f32)?;
    line.submit(hear, noise, &[20, 7])
}

fn heard(number: u64) -> avatar::crew::Hear {
    Box::new(move |_| wave(&[25, 32, 12], 100.0 + number as f32))
}

/// Latents of six blocks.
fn latents(crew: &Arc<Crew>, layout: Layout) -> Vec<Vec<f32>> {
    let seen: Arc<Mutex<BTreeMap<u64, Vec<f32>>>> = Arc::default();
    let into = seen.clone();
    let watch: Watch = Arc::new(move |name: &str, block, x: &Tensor| {
        if name == "latents" {
            into.lock().unwrap().insert(block, x.flatten_all().unwrap().to_vec1().unwrap());
        }
    });
    let mut line = open(crew, layout, Some(watch)).unwrap();
    for number in 0..6 {
        if line.full() {
            line.next(true).unwrap().unwrap();
        }
        submit(&mut line, number, heard(number)).unwrap();
    }
    while line.next(true).unwrap().is_some() {}
    drop(line);
    let all = seen.lock().unwrap().values().cloned().collect::<Vec<_>>();
    assert_eq!(all.len(), 6);
    all
}

#[test]
fn ranks_that_share_every_step_give_what_one_gives() {
    let layers = studio(8).unwrap().dit.config().num_layers;
    let crew = crew(4, 8);
    let plan = |ranks, split| Layout::plan(ranks, STEPS, layers, &Costs::MEASURED, split).unwrap();
    let shared = |team: usize| {
        let stages = vec![Stage { ranks: 0..team, way: 0..STEPS * layers }];
        Layout { stages, decoder: team - 1, blocks: layers }
    };
    let alone = latents(&crew, plan(1, Split::Steps));
    // 8 heads and 15 tokens a frame: three ranks have 2, 3 and 3 heads, and 5 tokens each; four have 3 or 4 tokens.
    let both = vec![Stage { ranks: 0..2, way: 0..layers }, Stage { ranks: 2..4, way: layers..STEPS * layers }];
    let hybrid = Layout { stages: both, decoder: 3, blocks: layers };
    for layout in [shared(2), shared(3), shared(4), plan(4, Split::Sequence), hybrid] {
        for (block, (got, want)) in latents(&crew, layout.clone()).iter().zip(&alone).enumerate() {
            let size = want.iter().map(|v| v * v).sum::<f32>().sqrt();
            let apart = got.iter().zip(want).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt();
            assert!(size > 1.0 && apart < 1e-4 * size, "{layout:?}, block {block}: {apart} of {size}");
        }
    }
}

#[test]
fn a_rank_that_only_decodes_needs_no_transformer() {
    let layers = studio(8).unwrap().dit.config().num_layers;
    let whole = Tools::from(studio(8).unwrap());
    let builds: Vec<Tools> = vec![
        Tools { vae: None, ..whole.clone() },
        Tools { vae: None, hearing: None, ..whole.clone() },
        Tools { dit: None, hearing: None, ..whole },
    ];
    let builds = builds.into_iter().map(|tools| Box::new(move || Ok(tools)) as Build).collect();
    let apart = Arc::new(Crew::start(in_process(&vec![Device::Cpu; 3]), builds).unwrap());
    let layout = Layout::with_decoder_apart(3, STEPS, layers, &Costs::MEASURED, Split::Balanced).unwrap();
    assert_eq!((layout.stages.len(), layout.decoder), (2, 2));
    let alone = latents(&crew(1, 8), Layout::plan(1, STEPS, layers, &Costs::MEASURED, Split::Steps).unwrap());
    assert!(latents(&apart, layout) == alone);
    // A layout that asks for what is not there is refused, and the crew lives on.
    let wrong = Layout::plan(3, STEPS, layers, &Costs::MEASURED, Split::Balanced).unwrap();
    let why = open(&apart, wrong, None).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(why.contains("no transformer") && apart.fault().is_none(), "{why}");
}

/// Where a rank dies.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// The first rank panics while it hears.
    Panic,
    /// The first rank fails while it hears.
    Error,
    /// The last rank panics when it has decoded.
    Decoder,
}

/// A generator on three ranks, one of which dies at the third block of faces that are opened with seed 2.
struct Mortal {
    crew: Arc<Crew>,
    fault: Fault,
}

fn lost(e: model::Error) -> AvatarError {
    AvatarError::Device { block: 0, stage: "ranks", source: e.into() }
}

struct MortalFace {
    line: Line,
    intake: Intake,
    geometry: Geometry,
    begun: u64,
    fault: Option<Fault>,
}

impl Generator for Mortal {
    fn geometry(&self) -> Geometry {
        Geometry {
            width: SIDE[1] as u32,
            height: SIDE[0] as u32,
            fps: 25,
            first_block_frames: 9,
            block_frames: 12,
            look_ahead: MediaTime::ZERO,
            matte: false,
        }
    }

    fn open(&mut self, _: &Portrait, options: &OpenOptions) -> avatar::Result<Box<dyn Stream>> {
        let fault = (options.seed == 2).then_some(self.fault);
        let watch: Option<Watch> = matches!(fault, Some(Fault::Decoder)).then(|| {
            Arc::new(|name: &str, block: u64, _: &Tensor| assert!(name != "frames" || block < 2, "the screen broke"))
                as Watch
        });
        let layers = Whole::named("tiny").unwrap().transformer_config().num_layers;
        let layout = Layout::plan(3, STEPS, layers, &Costs::MEASURED, Split::Steps).unwrap();
        assert_eq!(layout.ranks(), 3);
        let line = open(&self.crew, layout, watch).map_err(lost)?;
        let geometry = self.geometry();
        Ok(Box::new(MortalFace { line, intake: Intake::default(), geometry, begun: 0, fault }))
    }
}

impl Stream for MortalFace {
    fn push(&mut self, audio: &AudioBlock) -> avatar::Result<()> {
        self.intake.take(audio, &mut Vec::new())
    }

    fn pull(&mut self) -> avatar::Result<Option<FrameBlock>> {
        while self.intake.allows(&self.geometry, self.begun) && !self.line.full() {
            let hear: avatar::crew::Hear = match self.fault.filter(|_| self.begun == 2) {
                Some(Fault::Panic) => Box::new(|_| panic!("an ear fell off")),
                Some(Fault::Error) => Box::new(|_| Err(model::Error::Input("an ear is full of water".into()))),
                _ => heard(self.begun),
            };
            submit(&mut self.line, self.begun, hear).map_err(lost)?;
            self.begun += 1;
        }
        let wait = self.line.full() || self.intake.is_finished();
        let Some(made) = self.line.next(wait).map_err(lost)? else { return Ok(None) };
        let first = self.geometry.first_frame(made.number) as i64;
        let frame = |(i, pixels): (usize, Pixels)| Frame {
            at: MediaTime::from_units(first + i as i64, 25),
            width: self.geometry.width,
            height: self.geometry.height,
            pixels,
            matte: None,
        };
        let frames = made.pictures().into_iter().enumerate().map(frame).collect();
        let (stages, controls) = (made.times.told(3), Vec::new());
        Ok(Some(FrameBlock { epoch: Default::default(), index: made.number, frames, stages, controls }))
    }

    fn under_way(&self) -> usize {
        self.line.under_way()
    }

    fn poll_ready(&mut self, cx: &mut Context) -> Poll<()> {
        self.line.poll(cx)
    }

    fn finish(&mut self) -> avatar::Result<()> {
        self.intake.finish();
        Ok(())
    }
}

const SOON: Duration = Duration::from_secs(60);

/// Speaks two seconds; the frames that came, and why there are no more if that was not the end.
async fn talk(engine: &Engine, seed: u64, live: bool) -> (usize, Option<String>) {
    let slot = crate::engine::slot_is_back(engine).await;
    let options = OpenOptions { seed, ..OpenOptions::default() };
    let mut lane = slot.open(face(), options).await.unwrap();
    let input = lane.input.clone();
    let feeder = tokio::spawn(async move {
        for i in 0..100 {
            let audio = AudioBlock { at: MediaTime::from_units(i * 320, SPEECH_RATE), samples: vec![0.1; 320] };
            if input.push(audio).await.is_err() {
                return;
            }
        }
        // Live: the blocks come although nobody says that this was all.
        if !live {
            input.finish().await;
        }
        std::future::pending::<()>().await;
    });
    let mut frames = 0;
    let end = loop {
        match timeout(SOON, lane.output.recv()).await.expect("neither a block nor an end") {
            Some(LaneEvent::Block(block)) => frames += block.frames.len(),
            Some(LaneEvent::Failed(why)) => break Some(why),
            Some(LaneEvent::Finished) | None => break None,
        }
        if live && frames == 9 + 3 * 12 {
            break None;
        }
    };
    feeder.abort();
    (frames, end)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_that_dies_ends_its_faces_with_a_reason_and_the_engine_goes_on() {
    for (fault, said) in [
        (Fault::Panic, "rank 0 panicked: an ear fell off"),
        (Fault::Error, "rank 0 failed: an ear is full of water"),
        (Fault::Decoder, "rank 2 panicked: the screen broke"),
    ] {
        let started = Arc::<AtomicU64>::default();
        let settings = engine::Config { warm_up_blocks: 1, steps: Some(STEPS), ..engine::Config::default() };
        let count = started.clone();
        let build = move || {
            count.fetch_add(1, Ordering::SeqCst);
            Ok(Box::new(Mortal { crew: crew(3, 3), fault }) as Box<dyn Generator>)
        };
        let engine = tokio::task::spawn_blocking(move || Engine::start("ranks", &settings, build)).await;
        let engine = engine.unwrap().unwrap();
        assert_eq!(talk(&engine, 3, false).await, (9 + 4 * 12, None), "{fault:?}: before");
        let (frames, why) = talk(&engine, 2, false).await;
        let why = why.unwrap_or_default();
        assert!(why.contains(said), "{fault:?}: {why}");
        assert!(frames <= 9 + 12, "{fault:?}: {frames} frames of two blocks");
        // The engine is built anew with new ranks, and blocks that come late are noticed.
        let mut health = engine.health();
        let well = health.wait_for(|h| *h == Health::Ready && started.load(Ordering::SeqCst) == 2);
        timeout(SOON, well).await.expect("it is not built anew").unwrap();
        assert_eq!(talk(&engine, 3, true).await, (9 + 3 * 12, None), "{fault:?}: after");
        assert_eq!(started.load(Ordering::SeqCst), 2);
    }
}
