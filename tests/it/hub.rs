//! A session as a hub, on a real engine thread: sinks that come, go and are slow; speech from programs; the end.

use crate::{
    session::ms,
    session_loop::{Recorder, engine, spec},
};
use loquent::{
    engine::Engine,
    media::{MediaTime, Pcm, Portrait},
    session::{ChangeError, Config, Handle, Reason, Registry, SessionEvent, SinkRole, State, host},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{sync::broadcast, task::JoinHandle};

async fn hosted(config: Config) -> (Engine, Registry, Handle, JoinHandle<Reason>) {
    let engine = tokio::task::spawn_blocking(engine).await.unwrap();
    let registry = Registry::new();
    let spec = spec(&engine);
    let control = registry.enter(spec.id.clone(), "test", Instant::now());
    let handle = registry.get(&spec.id).unwrap();
    let task = tokio::spawn(host(spec, engine.admit().unwrap(), control, config));
    (engine, registry, handle, task)
}

fn tone(rate: u32, length: u64) -> Pcm {
    let count = u64::from(rate) * length / 1000;
    let samples = (0..count).map(|i| 0.4 * (i as f32 * 2765.0 / rate as f32).sin()).collect();
    Pcm { at: MediaTime::ZERO, rate, samples }
}

/// The next event that is not a number or a state.
async fn next(events: &mut broadcast::Receiver<SessionEvent>) -> SessionEvent {
    loop {
        let event = tokio::time::timeout(ms(5000), events.recv()).await.expect("an event").unwrap();
        if !matches!(event, SessionEvent::Metrics(_) | SessionEvent::State(_)) {
            return event;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_sinks_one_encoding_and_a_slow_one_costs_only_itself() {
    let (_engine, registry, handle, task) = hosted(Config::default()).await;
    let [first, second, slow] = [(); 3].map(|()| Arc::new(Recorder::default()));
    let keep = handle.attach(first.clone(), SinkRole::Viewer);
    tokio::time::sleep(ms(700)).await;
    let joined = Instant::now();
    let others = [handle.attach(second.clone(), SinkRole::Viewer), handle.attach(slow.clone(), SinkRole::Viewer)];
    tokio::time::sleep(ms(800)).await;
    *slow.queue.lock().unwrap() = ms(900);
    tokio::time::sleep(ms(1000)).await;
    assert_eq!(handle.sinks(), 3);
    let stuck = slow.videos.lock().unwrap().len();
    *slow.queue.lock().unwrap() = Duration::ZERO;
    tokio::time::sleep(ms(1000)).await;
    drop(others);
    tokio::time::sleep(ms(50)).await;
    let left = second.videos.lock().unwrap().len();
    tokio::time::sleep(ms(700)).await;
    drop(keep);
    let metrics = handle.snapshot().metrics;
    handle.close(Reason::Stopped);
    assert_eq!(task.await.unwrap(), Reason::Stopped);
    assert!(registry.is_empty());

    let (a, b, c) = (first.videos.lock().unwrap(), second.videos.lock().unwrap(), slow.videos.lock().unwrap());
    println!("{} · {} · {} pictures, slow one stuck at {stuck}; {metrics:?}", a.len(), b.len(), c.len());
    assert_eq!(b.len(), left, "who has left gets nothing");
    // Each began with a keyframe, soon.
    assert!(a[0].0.keyframe && b[0].0.keyframe && c[0].0.keyframe);
    assert!(b[0].2.duration_since(joined) < ms(400));
    // The same bytes for everyone, not encoded again.
    for (video, ..) in b.iter() {
        let same = a.iter().find(|v| v.0.at == video.at).unwrap();
        assert_eq!(same.0.data.as_ptr(), video.data.as_ptr());
    }
    // The first was not disturbed: a picture each 40 ms from the join to the end.
    let times: Vec<MediaTime> = a.iter().map(|v| v.0.at).filter(|at| *at > b[0].0.at).collect();
    let gaps = times.windows(2).filter(|t| t[1] - t[0] > MediaTime::from_millis(45)).count();
    assert!(gaps <= 2, "{gaps} gaps in {} pictures", times.len());
    // The slow one got nothing while it was slow, and went on with a keyframe.
    let after = &c[stuck..];
    assert!(after.len() > 15 && after[0].0.keyframe, "{}", after.len());
    assert!(metrics.sinks_slowed == 1 && metrics.sink_pictures_dropped >= 20, "{metrics:?}");
    // Joining three at two times and one recovery: not a storm.
    assert!(a.iter().filter(|v| v.0.keyframe).count() <= 5);
    // The voice went to everyone without a gap.
    for sink in [&first, &slow] {
        let audios = sink.audios.lock().unwrap();
        assert!(audios.windows(2).all(|v| v[1].0.at - v[0].0.at == MediaTime::from_millis(20)));
        assert_eq!(*sink.closed.lock().unwrap(), 0, "detached before the end");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn segments_are_played_told_and_interrupted() {
    let (_engine, _registry, handle, task) = hosted(Config::default()).await;
    let sink = Arc::new(Recorder::default());
    let _watching = handle.attach(sink.clone(), SinkRole::Recorder);
    let mut events = handle.events();
    tokio::time::sleep(ms(600)).await;
    let port = handle.speech();
    // Faster than it is played, at another rate.
    let first = port.push(tone(24_000, 600)).await.unwrap();
    port.end();
    assert_eq!(next(&mut events).await, SessionEvent::SpeakStarted { segment: first });
    let begun = Instant::now();
    let SessionEvent::SpeakEnded { segment, position, interrupted: false } = next(&mut events).await else { panic!() };
    assert_eq!(segment, first);
    assert!(position.abs_diff(ms(600)) < ms(12), "{position:?}");
    assert!(begun.elapsed().abs_diff(ms(600)) < ms(120), "played in {:?}", begun.elapsed());
    // Long speech, cut off after about half a second; what follows at once is heard.
    let second = port.push(tone(16_000, 8000)).await.unwrap();
    assert_eq!(next(&mut events).await, SessionEvent::SpeakStarted { segment: second });
    tokio::time::sleep(ms(500)).await;
    assert_eq!(handle.snapshot().state, State::Speaking);
    handle.interrupt();
    let third = port.push(tone(16_000, 200)).await.unwrap();
    port.end();
    let SessionEvent::SpeakEnded { segment, position, interrupted: true } = next(&mut events).await else { panic!() };
    assert_eq!(segment, second);
    assert!((ms(400)..ms(800)).contains(&position), "{position:?}");
    assert_eq!(next(&mut events).await, SessionEvent::SpeakStarted { segment: third });
    assert!(matches!(next(&mut events).await, SessionEvent::SpeakEnded { interrupted: false, .. }));
    // The end is told, and what was still to be said with it.
    let last = port.push(tone(16_000, 3000)).await.unwrap();
    assert_eq!(next(&mut events).await, SessionEvent::SpeakStarted { segment: last });
    handle.close(Reason::Stopped);
    assert!(matches!(next(&mut events).await, SessionEvent::SpeakEnded { interrupted: true, .. }));
    assert_eq!(next(&mut events).await, SessionEvent::Closed(Reason::Stopped));
    task.await.unwrap();
    assert!(port.push(tone(16_000, 10)).await.is_err());
    assert_eq!(*sink.closed.lock().unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_presenter_appears_while_the_voice_goes_on() {
    let (_engine, _registry, handle, task) = hosted(Config::default()).await;
    let sink = Arc::new(Recorder::default());
    let _watching = handle.attach(sink.clone(), SinkRole::Recorder);
    let port = handle.speech();
    port.push(tone(16_000, 4000)).await.unwrap();
    tokio::time::sleep(ms(1200)).await;
    let empty = Portrait { width: 0, height: 0, rgb: Vec::new().into() };
    let refused = handle.change(Some(("nobody".into(), empty)), None).await;
    assert!(matches!(refused, Err(ChangeError::Refused(_))), "{refused:?}");
    assert_eq!(handle.snapshot().presenter, "test");
    tokio::time::sleep(ms(600)).await;
    let before = sink.videos.lock().unwrap().last().unwrap().0.at;
    let white = Portrait { width: 8, height: 8, rgb: vec![255; 192].into() };
    handle.change(Some(("white".into(), white)), None).await.unwrap();
    assert_eq!(handle.snapshot().presenter, "white");
    tokio::time::sleep(ms(1200)).await;
    let metrics = handle.snapshot().metrics;
    handle.close(Reason::Stopped);
    task.await.unwrap();

    let mut decoder = openh264::decoder::Decoder::new().unwrap();
    let mut brightness = |data: &[u8]| {
        use openh264::formats::YUVSource;
        let picture = decoder.decode(data).unwrap().unwrap();
        // The portrait's corner of the card.
        picture.y()[50 * picture.strides().0 + 200]
    };
    let videos = sink.videos.lock().unwrap();
    let seen: Vec<_> = videos.iter().map(|v| (v.0.at, v.0.keyframe, brightness(&v.0.data))).collect();
    let first = seen.iter().position(|s| s.2 > 200).expect("the new presenter");
    let (at, keyframe, _) = seen[first];
    println!("asked at {before:?}, there at {at:?}; {metrics:?}");
    assert!(keyframe, "it begins with a keyframe");
    assert!(at - before < MediaTime::from_millis(800), "{before:?} → {at:?}");
    assert!(seen[..first].iter().all(|s| s.2 < 170) && seen[first..].iter().all(|s| s.2 > 200), "once, and for good");
    assert!(seen.len() - first > 10, "and it goes on");
    let gap = seen.windows(2).map(|s| s[1].0 - s[0].0).max().unwrap();
    assert!(gap < MediaTime::from_millis(700), "the picture stood still for {gap:?}");
    // The voice knew nothing of it: no gap, and no delay that grew for it.
    let audios = sink.audios.lock().unwrap();
    assert!(audios.windows(2).all(|v| v[1].0.at - v[0].0.at == MediaTime::from_millis(20)));
    assert!(metrics.playout_delay_ms < 600.0, "{metrics:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_nobody_uses_ends_by_itself() {
    let config = Config { idle_timeout_s: 1, ..Config::default() };
    let (engine, registry, _handle, task) = hosted(config).await;
    assert_eq!(task.await.unwrap(), Reason::IdleLimit);
    assert!(registry.is_empty() && engine.admit().is_ok());
}
