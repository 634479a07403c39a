//! The whole conversation: 60 simulated seconds with a generator that takes its (simulated) time, and ten real
//! seconds on a real engine thread with a link that records.

use crate::session::{Sender, ms};
use loquent::{
    avatar::{self, OpenOptions, Stream},
    engine::{self, Engine, Splice},
    media::{FrameBlock, Geometry, MediaTime, Pcm, Portrait},
    session::{
        Config, Conversation, Effect, EncodedAudio, EncodedVideo, EncoderReport, Input, Job, Line, LinkEvent, LinkOut,
        LinkStats, Picture, Reason, Registry, SessionEvent, SessionId, SessionSpec, SpeechQueue, State, run,
    },
};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

fn portrait() -> Portrait {
    Portrait { width: 300, height: 400, rgb: vec![120; 300 * 400 * 3].into() }
}

/// A conversation in simulated time with a test card behind it.
struct World {
    now: Instant,
    begun: Instant,
    talk: Conversation,
    geometry: Geometry,
    stream: Box<dyn Stream>,
    splice: Splice,
    made: u64,
    loud: Vec<(Instant, bool)>,
    /// Blocks being made: when they will be there.
    making: VecDeque<(Instant, FrameBlock)>,
    free_at: Instant,
    block_takes: Duration,
    sender: Sender,
    muted: bool,
    lose: fn(u64) -> bool,
    packets: u64,
    voices: Vec<(MediaTime, Instant)>,
    jobs: Vec<(MediaTime, Instant, bool, Option<Instant>)>,
    keyframes: usize,
    messages: Vec<String>,
    events: Vec<(SessionEvent, Instant)>,
    speech: Arc<SpeechQueue>,
    states: Vec<State>,
    closed: Option<Reason>,
}

impl World {
    fn new(config: Config) -> World {
        let mut generator = avatar::test_card();
        let geometry = generator.geometry();
        let now = Instant::now();
        let speech = SpeechQueue::new(Arc::default());
        let talk = Conversation::new(&config, &geometry, &portrait(), speech.clone(), now).unwrap();
        let stream = generator.open(&portrait(), &OpenOptions::default()).unwrap();
        World {
            now,
            begun: now,
            talk,
            geometry,
            stream,
            splice: Splice::default(),
            made: 0,
            loud: vec![],
            making: VecDeque::new(),
            free_at: now,
            block_takes: ms(60),
            sender: Sender::new(now + ms(600), 80.0),
            muted: false,
            lose: |_| false,
            packets: 0,
            voices: vec![],
            jobs: vec![],
            keyframes: 0,
            messages: vec![],
            events: vec![],
            speech,
            states: vec![],
            closed: None,
        }
    }

    fn seconds(&self) -> f64 {
        self.now.duration_since(self.begun).as_secs_f64()
    }

    fn advance(&mut self) {
        self.talk.advance(Line::default(), self.now).unwrap();
        // The engine: takes whatever it is given, makes one block at a time, cuts at an interruption.
        if self.talk.epoch() != self.splice.epoch() {
            let made = self.geometry.first_frame(self.made) * 640;
            let kept = self.stream.cut().then_some(made);
            self.splice.raise(self.talk.epoch(), kept);
        }
        while let Some(speech) = self.talk.next_speech() {
            self.stream.push(&self.splice.audio(speech)).unwrap();
        }
        while self.free_at <= self.now
            && let Some(mut block) = self.stream.pull().unwrap()
        {
            self.made += 1;
            self.splice.block(&mut block);
            self.free_at = self.now + self.block_takes;
            self.making.push_back((self.free_at, block));
        }
        while let Some(effect) = self.talk.effect() {
            match effect {
                Effect::Voice(audio, wall) => {
                    assert!(wall <= self.now, "nothing leaves before it is due");
                    self.voices.push((audio.at, self.now));
                }
                Effect::Show(Job { at, wall, spoken, picture, .. }) => {
                    if let Picture::Rgb(frame) = &picture {
                        // The level meter at −49 dB: anything that is not silence.
                        let lit = frame.pixels.rgb().unwrap()[3 * (178 * 256 + 26) + 1] > 100;
                        self.loud.push((self.now, lit));
                    }
                    assert!(wall <= self.now);
                    assert!(self.jobs.last().is_none_or(|j| j.0 < at), "picture times rise");
                    self.jobs.push((at, self.now, matches!(picture, Picture::Rgb(_)), spoken));
                }
                Effect::Discard | Effect::Made(_) => {}
                Effect::Keyframe => self.keyframes += 1,
                Effect::Message(text) => self.messages.push(text),
                Effect::Tell(event) => self.events.push((event, self.now)),
                Effect::Entered(state) => self.states.push(state),
                Effect::Close(reason) => self.closed = Some(reason),
            }
        }
    }

    fn run_until(&mut self, seconds: f64) {
        while self.seconds() < seconds && self.closed.is_none() {
            self.advance();
            let mut next = self.talk.deadline(self.now).min(self.sender.due());
            if let Some((at, _)) = self.making.front() {
                next = next.min(*at);
            }
            self.now = next.max(self.now + Duration::from_micros(100));
            while self.making.front().is_some_and(|m| m.0 <= self.now) {
                let (_, block) = self.making.pop_front().unwrap();
                self.talk.block(block, self.now);
            }
            while self.sender.due() <= self.now {
                self.packets += 1;
                if self.muted {
                    self.sender.pause(1);
                } else if (self.lose)(self.packets) {
                    self.sender.skip();
                } else {
                    let packet = self.sender.next(self.now);
                    self.talk.link(LinkEvent::Speech(packet), self.now);
                }
            }
        }
    }

    fn metrics(&mut self) -> loquent::session::Metrics {
        self.talk.measure(&EncoderReport::default(), 0, &LinkStats::default(), self.now);
        self.talk.metrics().clone()
    }

    /// Pictures sent in a stretch of wall time, and the worst offset against the voice that left for the same time.
    fn judge(&self, from: f64, to: f64) -> (usize, f64) {
        let mut worst = 0.0f64;
        let mut count = 0;
        for (at, left, _, _) in &self.jobs {
            let t = left.duration_since(self.begun).as_secs_f64();
            if t < from || t >= to {
                continue;
            }
            count += 1;
            let i = self.voices.partition_point(|v| v.0 <= *at);
            let Some((voice_at, voice_left)) = i.checked_sub(1).map(|i| self.voices[i]) else { continue };
            let voice_t = voice_left.duration_since(self.begun).as_secs_f64() + (*at - voice_at).as_secs_f64();
            worst = worst.max((t - voice_t).abs() * 1e3);
        }
        (count, worst)
    }
}

#[test]
fn sixty_simulated_seconds_with_everything_that_happens() {
    let mut w = World::new(Config::default());
    // Connected before the engine is ready: a picture at once.
    w.now += ms(50);
    w.talk.link(LinkEvent::Connected, w.now);
    w.advance();
    assert_eq!((w.jobs.len(), w.keyframes, w.jobs[0].2), (1, 1, false), "the portrait is shown at once");
    assert_eq!(w.states, [State::Preparing]);
    w.now += ms(150);
    w.talk.opened(w.now).unwrap();
    // Before anyone speaks the presenter moves.
    w.sender.tone = false;
    w.run_until(1.0);
    let first = w.jobs.iter().find(|j| j.2).unwrap().1.duration_since(w.begun);
    assert!(first < ms(330), "the first generated picture came after {first:?}");
    assert_eq!(w.states, [State::Preparing, State::Idle]);
    // Idle, then speaking.
    w.sender.tone = true;
    w.run_until(11.0);
    assert_eq!(w.states.last(), Some(&State::Speaking));
    let (pictures, offset) = w.judge(1.0, 11.0);
    println!("clean: {pictures} pictures in 10 s, offset {offset:.2} ms, {:?}", w.metrics());
    assert!((249..=251).contains(&pictures) && offset < 2.0);
    assert_eq!(w.metrics().frames_held, 0);
    // Delay from the microphone to the picture leaving: block 160 + look-ahead 130 + making 60 + margin and grain.
    let delays: Vec<f64> =
        w.jobs.iter().filter_map(|j| Some(j.1.duration_since(j.3?).as_secs_f64() * 1e3)).skip(100).collect();
    let mean = delays.iter().sum::<f64>() / delays.len() as f64;
    println!("spoken → picture leaves: {mean:.0} ms");
    assert!((330.0..420.0).contains(&mean), "{mean}");
    // Loss of one in twenty.
    w.lose = |i| i % 20 == 3;
    w.run_until(26.0);
    let m = w.metrics();
    let (pictures, offset) = w.judge(13.0, 26.0);
    println!("5 % lost: {pictures} pictures in 13 s, offset {offset:.2} ms, {m:?}");
    assert!(m.lost_in >= 35 && m.repaired_in >= 35 && pictures >= 310, "{pictures}, {m:?}");
    w.lose = |_| false;
    // Interrupted: silence at once, a new epoch, and on we go.
    w.talk.link(LinkEvent::Message("{\"type\":\"interrupt\"}".into()), w.now);
    w.run_until(27.5);
    assert!(w.states.ends_with(&[State::Idle, State::Speaking]), "{:?}", w.states);
    // Muted: idles in real time.
    w.muted = true;
    w.run_until(36.0);
    assert_eq!(w.states.last(), Some(&State::Idle));
    let (pictures, offset) = w.judge(30.0, 36.0);
    assert!((148..=152).contains(&pictures) && offset < 6.0, "muted: {pictures} in 6 s, {offset:.2} ms");
    w.muted = false;
    // Blocks later by 200 ms for good: held briefly, then in time again.
    w.run_until(38.0);
    let before = w.metrics().frames_held;
    w.block_takes = ms(155);
    w.run_until(50.0);
    let m = w.metrics();
    let (pictures, offset) = w.judge(45.0, 50.0);
    println!("slow blocks: {pictures} in 5 s, offset {offset:.2} ms, held {}, {m:?}", m.frames_held - before);
    assert!(pictures >= 120 && offset < 15.0 && m.frames_held - before < 60, "{pictures}, {offset:.2}, {m:?}");
    // A keyframe is asked for five times within 100 ms: the first at once, the rest as one.
    w.block_takes = ms(60);
    w.run_until(55.0);
    let before = w.keyframes;
    for k in 0..5 {
        w.talk.link(LinkEvent::KeyframeRequested, w.now);
        w.run_until(55.0 + 0.02 * f64::from(k + 1));
    }
    w.run_until(56.0);
    assert_eq!(w.keyframes - before, 2);
    // The voice left every 20 ms without a gap or a jump in its times.
    assert!(w.voices.windows(2).all(|v| v[1].0 - v[0].0 == MediaTime::from_millis(20)));
    // Drained: plays out, then ends.
    w.talk.order(Input::Drain(Reason::ServiceClosing), w.now);
    w.run_until(60.0);
    assert_eq!(w.closed, Some(Reason::ServiceClosing));
    assert!(w.seconds() > 56.2 && w.seconds() < 57.0, "drained after {:.2} s", w.seconds() - 56.0);
    assert!(w.messages.last().unwrap().contains("\"closed\""), "{:?}", w.messages.last());
}

/// The sound of a program that interrupts itself a hundred times, on engines fast and slow.
#[test]
fn a_hundred_interruptions_without_a_picture_of_what_was_cut_off() {
    for (takes, most) in [(20, 130), (80, 200)] {
        let mut w = World::new(Config::default());
        w.block_takes = ms(takes);
        w.muted = true;
        w.talk.link(LinkEvent::Connected, w.now);
        w.talk.opened(w.now).unwrap();
        w.run_until(3.0);
        let port = w.speech.port();
        let (mut delays, mut said) = (vec![], vec![]);
        for k in 0..100 {
            let samples = (0..24_000 * 6).map(|i| 0.5 * (i as f32 * 0.1).sin()).collect();
            let push = port.push(Pcm { at: MediaTime::ZERO, rate: 24_000, samples });
            said.push(futures::executor::block_on(push).unwrap());
            w.run_until(w.seconds() + 0.8 + 0.0137 * f64::from(k % 29));
            assert!(w.loud.last().unwrap().1, "it speaks");
            let (cut, shown, heard) = (w.now, w.loud.len(), w.voices.len());
            w.speech.interrupt();
            w.run_until(w.seconds() + 0.7);
            let after = &w.loud[shown..];
            assert!(after.iter().all(|f| !f.1), "interruption {k}: a picture of what was cut off");
            delays.push(after[0].0.duration_since(cut));
            assert!(w.voices.len() - heard >= 34, "the voice goes on as silence");
            assert!(after.len() >= 12, "{} pictures in 0.7 s", after.len());
        }
        delays.sort_unstable();
        println!("{takes} ms a block: new silence after {:?} (median), {:?} (worst)", delays[50], delays[99]);
        assert!(delays[99] <= ms(most), "{delays:?}");
        let m = w.metrics();
        assert_eq!((m.interruptions, m.blocks_skipped), (100, 0), "{m:?}");
        assert!(m.playout_delay_ms < 450.0, "interruptions do not make it slower: {m:?}");
        let ends = w.events.iter().filter_map(|(event, _)| match event {
            SessionEvent::SpeakEnded { segment, position, interrupted: true } => Some((*segment, *position)),
            _ => None,
        });
        let ends: Vec<_> = ends.collect();
        assert_eq!(ends.iter().map(|e| e.0).collect::<Vec<_>>(), said);
        // Spoken into at the start; heard from one playout delay later to the cut.
        assert!(ends.iter().all(|e| (ms(300)..ms(1000)).contains(&e.1)), "{ends:?}");
    }
}

#[test]
fn an_engine_too_slow_for_good_skips_speech_and_never_lags_beyond_the_bound() {
    // Beyond four times too slow nothing can be in time: the look-ahead of one block is the beginning of the next.
    // A block lasts 160 ms; the rest of the table: what it takes, pictures at least shown in 30 s (those made, less
    // some), blocks at least skipped in a minute.
    for (takes, pictures_least, skipped_least) in [(230, 480, 80), (620, 170, 230)] {
        let mut w = World::new(Config::default());
        w.block_takes = ms(takes);
        w.talk.link(LinkEvent::Connected, w.now);
        w.talk.opened(w.now).unwrap();
        w.run_until(60.0);
        let m = w.metrics();
        // Pictures that are shown are of their time: lips are right when they are there.
        let (pictures, offset) = w.judge(30.0, 60.0);
        println!("{takes} ms a block: {pictures} pictures in 30 s, offset {offset:.1} ms, {m:?}");
        assert!(m.blocks_skipped > skipped_least, "{m:?}");
        assert!(m.playout_delay_ms <= 2000.0);
        assert!(pictures > pictures_least && offset < 45.0, "{takes}: {pictures} pictures, {offset:.1} ms");
        assert!(w.voices.windows(2).all(|v| v[1].0 - v[0].0 == MediaTime::from_millis(20)));
    }
}

/// An engine a bit too slow loses the share it cannot make, not half; what it makes is shown, in time.
#[test]
fn nine_tenths_of_what_an_engine_can_make_are_shown() {
    for (speed, delay_most_ms) in [(0.5, 2000), (0.93, 2000), (0.93, 800), (0.97, 600), (1.0, 2000)] {
        let mut w = World::new(Config { playout_max_ms: delay_most_ms, ..Config::default() });
        w.block_takes = Duration::from_secs_f64(0.160 / speed);
        w.talk.link(LinkEvent::Connected, w.now);
        w.talk.opened(w.now).unwrap();
        w.run_until(90.0);
        let m = w.metrics();
        let (pictures, offset) = w.judge(30.0, 90.0);
        let can = 60.0 * 25.0 * speed;
        let made: Vec<Instant> = w.jobs.iter().filter(|j| j.2).map(|j| j.1).collect();
        let gap = made.windows(2).filter(|p| p[0].duration_since(w.begun) > ms(30_000)).map(|p| p[1] - p[0]).max();
        let lost = m.blocks_skipped as f64 * 0.16 / 90.0;
        println!(
            "{speed}×, {delay_most_ms} ms: {pictures} of {can:.0} pictures, {offset:.1} ms off, gap {gap:?}, {m:?}"
        );
        assert!(pictures as f64 >= 0.9 * can, "{speed}×: {pictures} of {can:.0}");
        assert!((lost - (1.0 - speed)).abs() < 0.05, "{speed}×: {lost:.3} of the speech was left out");
        assert!(offset < 45.0, "{speed}×: {offset:.1} ms");
        let spread = Duration::from_secs_f64(0.120 + 0.160 * (1.0 / speed - 1.0));
        assert!(gap.unwrap() < spread, "what is left out is spread: {gap:?}");
        assert!(w.voices.windows(2).all(|v| v[1].0 - v[0].0 == MediaTime::from_millis(20)));
    }
}

#[test]
fn an_engine_that_is_never_in_time_still_moves() {
    // Nineteen times too slow: a block of four pictures every three seconds, all of them later than any delay.
    let mut w = World::new(Config::default());
    w.block_takes = ms(3000);
    w.talk.link(LinkEvent::Connected, w.now);
    w.talk.opened(w.now).unwrap();
    w.run_until(60.0);
    let m = w.metrics();
    let shown: Vec<Instant> = w.jobs.iter().filter(|j| j.2).map(|j| j.1).collect();
    println!("{} blocks, {} pictures shown, {m:?}", m.blocks, shown.len());
    assert!((18..=20).contains(&m.blocks), "{m:?}");
    assert!(shown.len() as u64 >= 4 * m.blocks - 4, "every picture that was made is seen: {}", shown.len());
    // Four in a row as they come, a picture's time apart.
    let quick = shown.windows(2).filter(|p| p[1] - p[0] < ms(60)).count() as u64;
    assert!(quick >= 3 * (m.blocks - 1), "{quick}");
    // The voice goes on meanwhile, within the longest delay.
    assert!(m.playout_delay_ms <= 2000.0);
    assert!(w.voices.windows(2).all(|v| v[1].0 - v[0].0 == MediaTime::from_millis(20)));
}

#[derive(Default)]
pub(crate) struct Recorder {
    pub(crate) videos: Mutex<Vec<(EncodedVideo, Instant, Instant)>>,
    pub(crate) audios: Mutex<Vec<(EncodedAudio, Instant, Instant)>>,
    messages: Mutex<Vec<String>>,
    pub(crate) closed: Mutex<u32>,
    /// What its pacer claims to hold.
    pub(crate) queue: Mutex<Duration>,
}

impl LinkOut for Recorder {
    fn video(&self, video: EncodedVideo, wall: Instant) {
        self.videos.lock().unwrap().push((video, wall, Instant::now()));
    }
    fn audio(&self, audio: EncodedAudio, wall: Instant) {
        self.audios.lock().unwrap().push((audio, wall, Instant::now()));
    }
    fn message(&self, text: String) {
        self.messages.lock().unwrap().push(text);
    }
    fn stats(&self) -> LinkStats {
        let pacer_queue = *self.queue.lock().unwrap();
        LinkStats { round_trip: Some(ms(10)), pacer_queue, ..LinkStats::default() }
    }
    fn close(&self) {
        *self.closed.lock().unwrap() += 1;
    }
}

pub(crate) fn engine() -> Engine {
    Engine::start("test", &engine::Config::default(), || Ok(avatar::test_card())).unwrap()
}

pub(crate) fn spec(engine: &Engine) -> SessionSpec {
    SessionSpec {
        id: SessionId::random(),
        portrait: portrait(),
        presenter: "test".into(),
        options: OpenOptions::default(),
        geometry: engine.geometry().clone(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_real_seconds_on_a_real_engine() {
    let engine = tokio::task::spawn_blocking(engine).await.unwrap();
    let link = Arc::new(Recorder::default());
    let registry = Registry::new();
    let (events, inbox) = mpsc::channel(64);
    let spec = spec(&engine);
    let id = spec.id.clone();
    let control = registry.enter(id.clone(), "test", Instant::now());
    let slot = engine.admit().unwrap();
    let task = tokio::spawn(run(spec, slot, inbox, link.clone(), control, Config::default()));
    events.send(LinkEvent::Connected).await.unwrap();
    events.send(LinkEvent::TargetBitrate(500_000)).await.unwrap();
    let begun = Instant::now();
    let mut sender = Sender::new(begun + ms(300), 0.0);
    while begun.elapsed() < ms(8000) {
        tokio::time::sleep_until(sender.due().into()).await;
        let packet = sender.next(Instant::now());
        events.send(LinkEvent::Speech(packet)).await.unwrap();
    }
    assert_eq!(registry.get(&id).unwrap().snapshot().state, State::Speaking);
    registry.get(&id).unwrap().close(Reason::Stopped);
    assert_eq!(task.await.unwrap(), Reason::Stopped);
    assert!(registry.is_empty() && *link.closed.lock().unwrap() == 1);
    assert_eq!(registry.counts().by_reason.iter().find(|r| r.0 == "stopped").unwrap().1, 1);
    drop(engine.admit().expect("the slot was given back"));

    let videos = link.videos.lock().unwrap();
    let audios = link.audios.lock().unwrap();
    let messages = link.messages.lock().unwrap();
    let first = videos[0].2.duration_since(begun);
    println!(
        "first picture after {first:?}; {} pictures, {} voice packets; {}",
        videos.len(),
        audios.len(),
        messages.last().unwrap()
    );
    assert!(videos[0].0.keyframe && first < ms(200));
    assert!(videos.len() > 175, "{} pictures in 8 s", videos.len());
    assert!(videos.windows(2).all(|v| v[0].0.at < v[1].0.at));
    assert!(audios.windows(2).all(|a| a[1].0.at - a[0].0.at == MediaTime::from_millis(20)));
    // One mapping from media time to the wall for both.
    let offset = |at: MediaTime, wall: Instant| wall.duration_since(begun).as_secs_f64() * 1e3 - at.as_millis_f64();
    let last = |v: &[f64]| {
        let mut v = v.to_vec();
        v.sort_by(f64::total_cmp);
        v[v.len() / 2]
    };
    let v: Vec<f64> = videos[75..].iter().map(|(v, wall, _)| offset(v.at, *wall)).collect();
    let a: Vec<f64> = audios[150..].iter().map(|(a, wall, _)| offset(a.at, *wall)).collect();
    assert!((last(&v) - last(&a)).abs() < 2.0, "{} {}", last(&v), last(&a));
    // Every picture decodes, and the bitrate is kept.
    let mut decoder = openh264::decoder::Decoder::new().unwrap();
    assert!(videos.iter().all(|(v, ..)| decoder.decode(&v.data).unwrap().is_some()));
    let bytes: usize = videos[50..].iter().map(|v| v.0.data.len()).sum();
    let bits = bytes as f64 * 8.0 * 25.0 / (videos.len() - 50) as f64;
    assert!(bits < 450_000.0, "{bits:.0} bit/s");
    let metrics = messages.iter().filter(|m| m.contains("\"metrics\"")).count();
    assert!((6..=9).contains(&metrics), "{metrics} metrics lines");
    assert!(messages.iter().any(|m| m.contains("\"speaking\"")) && messages.last().unwrap().contains("\"closed\""));
}

/// A line that lets every fourth picture out, as a pacer on a narrow line does.
#[derive(Default)]
struct Narrow {
    given: std::sync::atomic::AtomicU64,
    told: Mutex<Vec<serde_json::Value>>,
}

impl LinkOut for Narrow {
    fn video(&self, _: EncodedVideo, _: Instant) {
        self.given.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
    fn audio(&self, _: EncodedAudio, _: Instant) {}
    fn message(&self, text: String) {
        let message: serde_json::Value = serde_json::from_str(&text).unwrap();
        self.told.lock().unwrap().extend((message["type"] == "metrics").then_some(message));
    }
    fn stats(&self) -> LinkStats {
        let left = self.given.load(std::sync::atomic::Ordering::Relaxed) / 4;
        LinkStats { sent_pictures: Some(left), ..LinkStats::default() }
    }
    fn close(&self) {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rate_that_is_told_is_of_the_pictures_that_left() {
    let engine = tokio::task::spawn_blocking(engine).await.unwrap();
    let (registry, link) = (Registry::new(), Arc::new(Narrow::default()));
    let (events, inbox) = mpsc::channel(64);
    let spec = spec(&engine);
    let control = registry.enter(spec.id.clone(), "test", Instant::now());
    let handle = registry.get(&spec.id).unwrap();
    let slot = engine.admit().unwrap();
    let task = tokio::spawn(run(spec, slot, inbox, link.clone(), control, Config::default()));
    events.send(LinkEvent::Connected).await.unwrap();
    tokio::time::sleep(ms(4300)).await;
    handle.close(Reason::Stopped);
    task.await.unwrap();
    let (told, given) = (link.told.lock().unwrap(), link.given.load(std::sync::atomic::Ordering::Relaxed));
    let last = told.last().unwrap();
    println!("{given} pictures given, told {last}");
    assert!(given > 40, "{given}");
    let sent = last["frames_sent"].as_u64().unwrap();
    assert!(sent <= given / 4 && sent + 8 >= given / 4, "{sent} of {given} were told");
    assert!(told.iter().all(|m| m["fps"].as_f64().unwrap() <= 10.0), "{told:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ends_are_clean_whatever_ends_it() {
    let engine = tokio::task::spawn_blocking(engine).await.unwrap();
    let registry = Registry::new();
    let start = |spec: SessionSpec| {
        let link = Arc::new(Recorder::default());
        let (events, inbox) = mpsc::channel(64);
        let control = registry.enter(spec.id.clone(), "test", Instant::now());
        let slot = engine.admit().expect("the slot of the one before is free");
        let config = Config { connect_timeout_s: 1, ..Config::default() };
        (tokio::spawn(run(spec, slot, inbox, link.clone(), control, config)), events, link)
    };
    // The transport goes.
    let (task, events, link) = start(spec(&engine));
    events.send(LinkEvent::Connected).await.unwrap();
    drop(events);
    assert!(matches!(task.await.unwrap(), Reason::PeerLeft(_)));
    assert_eq!(*link.closed.lock().unwrap(), 1);
    // It never comes.
    let (task, events, _) = start(spec(&engine));
    assert_eq!(task.await.unwrap(), Reason::ConnectTimeout);
    drop(events);
    // The task is dropped.
    let (task, events, link) = start(spec(&engine));
    events.send(LinkEvent::Connected).await.unwrap();
    tokio::time::sleep(ms(100)).await;
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    assert_eq!(*link.closed.lock().unwrap(), 1);
    // The portrait is refused.
    let bad = Portrait { width: 0, height: 0, rgb: vec![].into() };
    tokio::time::sleep(ms(200)).await;
    let (task, _events, link) = start(SessionSpec { portrait: bad, ..spec(&engine) });
    assert!(matches!(task.await.unwrap(), Reason::PortraitRefused(_)));
    assert!(link.messages.lock().unwrap().last().unwrap().contains("portrait_refused"));
    let counts = registry.counts();
    assert_eq!(counts.started, 4);
    assert_eq!(counts.by_reason.iter().map(|r| r.1).sum::<u64>(), 4, "{counts:?}");
    assert_eq!(counts.by_reason.iter().find(|r| r.0 == "abandoned").unwrap().1, 1);
    assert!(registry.emptied(ms(10)).await);
}
