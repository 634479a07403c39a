//! The device thread: admission, fairness, failure.

use loquent::{
    avatar::{self, AvatarError, Fill, Generator, OpenOptions, Stream, test_card},
    engine::{Change, Config, Engine, EngineError, Health, LaneClosed, LaneEvent, Refusal, TryPush},
    media::{AudioBlock, FrameBlock, Geometry, MediaTime, Portrait, SPEECH_RATE},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(20);

fn config(sessions: usize) -> Config {
    Config { sessions, rebuilds: 0, ..Config::default() }
}

fn portrait() -> Portrait {
    test_card().sample_portrait()
}

fn audio(at: usize, len: usize) -> AudioBlock {
    AudioBlock { at: MediaTime::from_units(at as i64, SPEECH_RATE), samples: vec![0.1; len] }
}

/// The test card on a device of which each face takes a part.
struct Roomy {
    free: Arc<AtomicU64>,
}

struct RoomyStream(Box<dyn Stream>, Arc<AtomicU64>);

/// Bytes of a face, and what its blocks hold in passing.
const FACE: u64 = 25 << 30;
const PASSING: u64 = 4 << 30;

impl Generator for Roomy {
    fn geometry(&self) -> Geometry {
        test_card().geometry()
    }
    fn memory(&self) -> Vec<Fill> {
        vec![Fill { free: self.free.load(Ordering::Relaxed), passing: PASSING }]
    }
    fn open(&mut self, portrait: &Portrait, options: &OpenOptions) -> avatar::Result<Box<dyn Stream>> {
        let stream = test_card().open(portrait, options)?;
        let taken = self.free.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| free.checked_sub(FACE));
        taken.map_err(|_| AvatarError::Options("out of memory".into()))?;
        Ok(Box::new(RoomyStream(stream, self.free.clone())))
    }
}

impl Stream for RoomyStream {
    fn push(&mut self, audio: &AudioBlock) -> avatar::Result<()> {
        self.0.push(audio)
    }
    fn pull(&mut self) -> avatar::Result<Option<FrameBlock>> {
        self.0.pull()
    }
    fn finish(&mut self) -> avatar::Result<()> {
        self.0.finish()
    }
}

impl Drop for RoomyStream {
    fn drop(&mut self) {
        self.1.fetch_add(FACE, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn more_faces_than_memory_holds_are_refused_before_they_are_opened() {
    let free = Arc::new(AtomicU64::new(60 << 30));
    let built = free.clone();
    let build = move || Ok(Box::new(Roomy { free: built.clone() }) as Box<dyn Generator>);
    let engine = Engine::start("roomy", &config(4), build).unwrap();
    assert_eq!(engine.stats().slots, 2, "60 − 25 in the warm-up leaves 35, less 4 in passing");
    let first = engine.admit().unwrap().open(portrait(), OpenOptions::default()).await.unwrap();
    let second = engine.admit().unwrap().open(portrait(), OpenOptions::default()).await.unwrap();
    let retry_after = Duration::from_secs(5);
    let refusal = engine.admit().err().unwrap();
    assert_eq!(refusal, Refusal::Memory { fit: 2, configured: 4, retry_after });
    assert!(refusal.to_string().contains("holds 2 of the 4 faces"), "{refusal}");
    drop((first, second));
    timeout(SOON, async {
        while engine.stats().used > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    assert!(engine.admit().is_ok());
    // What is configured is never exceeded.
    let roomy = Arc::new(AtomicU64::new(u64::MAX / 2));
    let build = move || Ok(Box::new(Roomy { free: roomy.clone() }) as Box<dyn Generator>);
    assert_eq!(Engine::start("roomy", &config(4), build).unwrap().stats().slots, 4);
}

/// The test card, with faults: the block number at which it panics or fails is the seed (0 = never).
pub(crate) struct Faulty {
    pub(crate) how: How,
}

#[derive(Clone, Copy)]
pub(crate) enum How {
    Panic,
    Device,
    Face,
}

struct FaultyStream(Box<dyn Stream>, How, u64, u64);

impl Generator for Faulty {
    fn geometry(&self) -> Geometry {
        test_card().geometry()
    }
    fn open(&mut self, portrait: &Portrait, options: &OpenOptions) -> avatar::Result<Box<dyn Stream>> {
        // Warm-up opens with the default seed 1 and must pass.
        let at = if options.seed == 1 { u64::MAX } else { options.seed - 2 };
        Ok(Box::new(FaultyStream(test_card().open(portrait, options)?, self.how, at, 0)))
    }
}

impl Stream for FaultyStream {
    fn push(&mut self, audio: &AudioBlock) -> avatar::Result<()> {
        self.0.push(audio)
    }
    fn pull(&mut self) -> avatar::Result<Option<FrameBlock>> {
        if self.3 == self.2 {
            match self.1 {
                How::Panic => panic!("a tensor came out crooked"),
                How::Device => {
                    let source = std::io::Error::other("out of memory").into();
                    return Err(AvatarError::Device { block: self.3, stage: "decode", source });
                }
                How::Face => return Err(AvatarError::Portrait("this face is no more".into())),
            }
        }
        let block = self.0.pull()?;
        self.3 += u64::from(block.is_some());
        Ok(block)
    }
    fn finish(&mut self) -> avatar::Result<()> {
        self.0.finish()
    }
}

pub(crate) async fn slot_is_back(engine: &Engine) -> loquent::engine::Slot {
    let began = std::time::Instant::now();
    loop {
        match engine.admit() {
            Ok(slot) => return slot,
            Err(refusal) => assert!(began.elapsed() < SOON, "{refusal}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn speech_goes_in_and_every_frame_comes_out_in_order() {
    let engine = Engine::start("card", &config(1), || Ok(test_card())).unwrap();
    let mut lane = engine.admit().unwrap().open(portrait(), OpenOptions::default()).await.unwrap();
    let input = lane.input.clone();
    let feeder = tokio::spawn(async move {
        for i in 0..150 {
            input.push(audio(i * 320, 320)).await.unwrap();
        }
        input.finish().await;
        input
    });
    let mut frames = Vec::new();
    loop {
        match timeout(SOON, lane.output.recv()).await.unwrap().unwrap() {
            LaneEvent::Block(block) => frames.extend(block.frames),
            LaneEvent::Finished => break,
            LaneEvent::Failed(why) => panic!("{why}"),
        }
    }
    assert_eq!(frames.len(), 76, "75 frames of speech, padded to whole blocks");
    assert!(frames.iter().enumerate().all(|(k, f)| f.at == MediaTime::from_units(k as i64, 25)));
    assert!(timeout(SOON, lane.output.recv()).await.unwrap().is_none(), "finished is the last word");
    assert_eq!(feeder.await.unwrap().push(audio(0, 1)).await, Err(LaneClosed));
    slot_is_back(&engine).await;
    let stats = engine.stats();
    assert_eq!((stats.blocks, stats.samples_in), (19, 48_000));
    assert!(stats.real_time_factor > 0.0);
}

#[tokio::test]
async fn a_full_house_refuses_at_once_and_a_dropped_slot_is_free_again() {
    let engine = Engine::start("full", &config(2), || Ok(test_card())).unwrap();
    let first = engine.admit().unwrap();
    let second = engine.admit().unwrap();
    assert_eq!(engine.admit().err(), Some(Refusal::Full { retry_after: Duration::from_secs(5) }));
    assert_eq!(engine.stats().used, 2);
    drop(first);
    let first = engine.admit().unwrap();
    let lane = second.open(portrait(), OpenOptions::default()).await.unwrap();
    assert!(engine.admit().is_err(), "an open lane keeps its slot");
    drop(lane);
    let second = slot_is_back(&engine).await;
    drop((first, second));
    engine.drain();
    assert_eq!(engine.admit().err(), Some(Refusal::Draining));
}

#[tokio::test]
async fn a_reader_that_went_away_ends_the_lane_even_when_speech_goes_on() {
    let engine = Engine::start("gone", &config(1), || Ok(test_card())).unwrap();
    let lane = engine.admit().unwrap().open(portrait(), OpenOptions::default()).await.unwrap();
    drop(lane.output);
    slot_is_back(&engine).await;
    assert_eq!(timeout(SOON, lane.input.push(audio(0, 320))).await.unwrap(), Err(LaneClosed));
    lane.input.finish().await;
}

#[tokio::test]
async fn a_refused_picture_is_a_sentence_and_gives_the_slot_back() {
    let engine = Engine::start("picture", &config(1), || Ok(test_card())).unwrap();
    let empty = Portrait { width: 0, height: 0, rgb: Vec::new().into() };
    let error = engine.admit().unwrap().open(empty, OpenOptions::default()).await.err().unwrap();
    assert!(matches!(&error, EngineError::Open(AvatarError::Portrait(_))), "{error}");
    slot_is_back(&engine).await;
}

#[tokio::test]
async fn a_lane_changes_its_face_and_a_refused_one_changes_nothing() {
    let engine = Engine::start("change", &config(1), || Ok(test_card())).unwrap();
    let mut lane = engine.admit().unwrap().open(portrait(), OpenOptions::default()).await.unwrap();
    // The portrait's corner of the card.
    let corner = |block: &FrameBlock| block.frames[0].pixels.rgb().unwrap()[3 * (40 * 256 + 200)];
    let change = async |lane: &mut loquent::engine::Lane, portrait: Portrait| {
        let (reply, answer) = tokio::sync::oneshot::channel();
        let options = OpenOptions::default();
        assert!(lane.input.change(Change { portrait, options, reply }).is_none(), "there is room");
        timeout(SOON, answer).await.unwrap().unwrap()
    };
    let block = async |lane: &mut loquent::engine::Lane| match timeout(SOON, lane.output.recv()).await.unwrap() {
        Some(LaneEvent::Block(block)) => block,
        other => panic!("{other:?}"),
    };
    // One block and a little: what is beyond the block is forgotten when the face changes.
    lane.input.push(audio(0, 6000)).await.unwrap();
    assert_eq!(corner(&block(&mut lane).await), 128);
    let empty = Portrait { width: 0, height: 0, rgb: Vec::new().into() };
    assert!(matches!(change(&mut lane, empty).await, Err(AvatarError::Portrait(_))));
    lane.input.push(audio(6000, 2000)).await.unwrap();
    let second = block(&mut lane).await;
    assert_eq!((second.frames[0].at, corner(&second)), (MediaTime::from_millis(160), 128));
    let white = Portrait { width: 8, height: 8, rgb: vec![255; 192].into() };
    change(&mut lane, white.clone()).await.unwrap();
    lane.input.push(audio(16_000, 6000)).await.unwrap();
    let third = block(&mut lane).await;
    assert_eq!((third.frames[0].at, corner(&third)), (MediaTime::from_millis(1000), 255), "where the speech goes on");
    // Whoever gave up waiting has not changed anything.
    let (reply, answer) = tokio::sync::oneshot::channel();
    drop(answer);
    let options = OpenOptions::default();
    assert!(lane.input.change(Change { portrait: portrait(), options, reply }).is_none());
    lane.input.push(audio(22_000, 2000)).await.unwrap();
    assert_eq!(corner(&block(&mut lane).await), 255);
}

#[tokio::test]
async fn a_panicking_generator_turns_health_and_fails_every_lane() {
    for how in [How::Panic, How::Device] {
        let engine = Engine::start("panic", &config(2), move || Ok(Box::new(Faulty { how }))).unwrap();
        let mut well = engine.admit().unwrap().open(portrait(), OpenOptions::default()).await.unwrap();
        // Its reader never reads: the last word must reach it all the same.
        for i in 0..100 {
            if well.input.try_push(audio(i * 320, 320)).is_err() {
                break;
            }
        }
        let options = OpenOptions { seed: 3, ..OpenOptions::default() };
        let mut ill = engine.admit().unwrap().open(portrait(), options).await.unwrap();
        for i in 0..4 {
            ill.input.push(audio(i * 8000, 8000)).await.ok();
        }
        let mut health = engine.health();
        let state = timeout(SOON, health.wait_for(|h| *h != Health::Ready)).await.unwrap().unwrap().clone();
        let Health::Failed(why) = state else { unreachable!() };
        let expected = if matches!(how, How::Panic) { "crooked" } else { "block 1, decode: out of memory" };
        assert!(why.contains(expected), "{why}");
        for output in [&mut well.output, &mut ill.output] {
            let mut last = None;
            while let Some(event) = timeout(SOON, output.recv()).await.unwrap() {
                last = Some(event);
            }
            assert!(matches!(&last, Some(LaneEvent::Failed(w)) if w.contains(expected)), "{last:?}");
        }
        assert!(matches!(engine.admit(), Err(Refusal::Failed(_))));
        let began = std::time::Instant::now();
        while engine.stats().used > 0 {
            assert!(began.elapsed() < SOON, "a failed engine gives its slots back");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test]
async fn a_fault_of_one_face_leaves_the_others_alone() {
    let engine = Engine::start("face", &config(2), || Ok(Box::new(Faulty { how: How::Face }))).unwrap();
    let options = OpenOptions { seed: 2, ..OpenOptions::default() };
    let mut ill = engine.admit().unwrap().open(portrait(), options).await.unwrap();
    let mut well = engine.admit().unwrap().open(portrait(), OpenOptions::default()).await.unwrap();
    ill.input.push(audio(0, 16_000)).await.unwrap();
    assert!(matches!(timeout(SOON, ill.output.recv()).await.unwrap(), Some(LaneEvent::Failed(_))));
    well.input.push(audio(0, 16_000)).await.unwrap();
    assert!(matches!(timeout(SOON, well.output.recv()).await.unwrap(), Some(LaneEvent::Block(_))));
    assert_eq!(*engine.health().borrow(), Health::Ready);
    // A gap in the speech is a fault of that face too.
    well.input.push(audio(5, 10)).await.unwrap();
    while let Some(event) = timeout(SOON, well.output.recv()).await.unwrap() {
        if let LaneEvent::Failed(why) = event {
            assert!(why.contains("does not continue"), "{why}");
            slot_is_back(&engine).await;
            return;
        }
    }
    panic!("the gap went unseen");
}

#[tokio::test]
async fn a_stalled_reader_does_not_stall_another_lane() {
    let engine = Engine::start("stall", &config(2), || Ok(test_card())).unwrap();
    let stalled = engine.admit().unwrap().open(portrait(), OpenOptions::default()).await.unwrap();
    let mut lively = engine.admit().unwrap().open(portrait(), OpenOptions::default()).await.unwrap();
    // Fill the stalled lane to the brim: two blocks out, two complete inside, the queue full.
    let mut at = 0;
    while timeout(Duration::from_millis(300), stalled.input.push(audio(at, 320))).await.is_ok() {
        at += 320;
        assert!(at < 16_000 * 60, "a lane that nobody reads must stop taking speech");
    }
    assert!(matches!(stalled.input.try_push(audio(at, 320)), Err(TryPush::Full(_))));
    let input = lively.input.clone();
    let feeder = tokio::spawn(async move {
        for i in 0..200 {
            input.push(audio(i * 320, 320)).await.unwrap();
        }
        input.finish().await;
    });
    let mut blocks = 0;
    while let Some(LaneEvent::Block(_)) = timeout(SOON, lively.output.recv()).await.unwrap() {
        blocks += 1;
    }
    assert_eq!(blocks, 25);
    feeder.await.unwrap();
    // The stalled reader wakes up and finds everything.
    let mut stalled = stalled;
    drop(stalled.input);
    let mut frames = 0;
    while let Some(LaneEvent::Block(block)) = timeout(SOON, stalled.output.recv()).await.unwrap() {
        assert_eq!(block.frames[0].at, MediaTime::from_units(frames, 25));
        frames += 4;
    }
    assert_eq!(frames as usize, at.div_ceil(640).div_ceil(4) * 4);
}

#[test]
fn a_generator_that_cannot_be_built_is_an_error_not_a_hang() {
    let built = Engine::start("none", &config(1), || Err(AvatarError::Weights("no weights".into())));
    assert!(matches!(built, Err(EngineError::Build { .. })));
    let built = Engine::start("none", &config(1), || panic!("no"));
    assert!(matches!(built, Err(EngineError::WarmUp { .. })));
}

#[tokio::test]
async fn stopping_the_engine_tells_open_lanes_and_waiting_slots() {
    let engine = Engine::start("stop", &config(2), || Ok(test_card())).unwrap();
    let mut lane = engine.admit().unwrap().open(portrait(), OpenOptions::default()).await.unwrap();
    let slot = engine.admit().unwrap();
    drop(engine);
    assert!(matches!(timeout(SOON, lane.output.recv()).await.unwrap(), Some(LaneEvent::Failed(_))));
    assert!(matches!(slot.open(portrait(), OpenOptions::default()).await, Err(EngineError::Failed(_))));
}
