//! One conversation from a terminal, without a browser: `talk --url http://HOST:PORT --speech FILE [--seconds S] [--query Q]`.
//!
//! Offers a microphone and a receive-only picture to `/v1/live`, speaks the file over and over as Opus in real time, and
//! says what came back: time to the first picture, pictures a second, the longest gap, how many decode, and how many of
//! the decoded ones differ from the one before (a held face repeats itself). Counting begins ten seconds after the first
//! picture. Ends with one line of JSON; times in milliseconds. Needs no GPU itself, so that the same command tries every
//! engine.

#[allow(dead_code)]
#[path = "../it/peer.rs"]
mod peer;

use loquent::codec::{
    VOICE_FRAME, VoiceEncoder,
    audio_file::{Limits, SpeechFile, scan},
};
use openh264::{decoder::Decoder, formats::YUVSource};
use serde_json::json;
use std::{
    collections::{BTreeMap, hash_map::DefaultHasher},
    hash::{Hash, Hasher},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// Pictures before this are not counted: the bandwidth estimate still climbs.
const SETTLING: Duration = Duration::from_secs(10);

/// The whole file as Opus packets.
fn packets(path: &Path) -> Vec<Vec<u8>> {
    let source = path.into();
    scan(&source, &Limits::default()).expect("a sound file");
    let mut file = SpeechFile::open(&source).expect("a sound file");
    let mut voice = Vec::new();
    while let Some(part) = file.read().expect("a sound file that stays as it is") {
        voice.extend(part.voice.samples);
    }
    voice.resize(voice.len().next_multiple_of(VOICE_FRAME), 0.0);
    let mut encoder = VoiceEncoder::new(32_000, 0).expect("an Opus encoder");
    voice.chunks_exact(VOICE_FRAME).map(|c| encoder.encode(c).expect("20 ms of sound")).collect()
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let mut arguments = BTreeMap::new();
    let mut words = std::env::args().skip(1);
    while let (Some(name), Some(value)) = (words.next(), words.next()) {
        arguments.insert(name, value);
    }
    let get = |name: &str, default: &str| arguments.get(name).cloned().unwrap_or_else(|| default.into());
    let base = get("--url", "http://127.0.0.1:8080");
    let seconds = Duration::from_secs_f64(get("--seconds", "20").parse().expect("--seconds NUMBER"));
    let speech = packets(Path::new(&get("--speech", "")));

    let mut client = peer::Client::new().await;
    let offer = client.offer().await;
    let http = reqwest::Client::new();
    let asked = Instant::now();
    let request = http.post(format!("{base}/v1/live{}", get("--query", ""))).header("content-type", "application/sdp");
    let response = request.body(offer).send().await.expect("the server answers");
    let status = response.status();
    let resource = response.headers().get("location").and_then(|l| l.to_str().ok()).map(str::to_string);
    let answer = response.text().await.expect("a text");
    assert!(status == 201, "{status}: {answer}");
    client.accept(&answer).await;
    assert!(client.connected(Duration::from_secs(30)).await, "no connection within 30 s");

    let client = Arc::new(client);
    let stop = Arc::new(AtomicBool::new(false));
    let mouth = tokio::spawn({
        let (client, stop) = (client.clone(), stop.clone());
        async move {
            let mut tick = tokio::time::interval(Duration::from_millis(20));
            for n in 0.. {
                tick.tick().await;
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                client.speak(n, &speech[n as usize % speech.len()]).await;
            }
        }
    });
    let first = loop {
        let came = client.received.lock().unwrap().video.iter().find(|(_, p)| p.header.marker).map(|(at, _)| *at);
        match came {
            Some(at) => break at,
            None if asked.elapsed() > Duration::from_secs(60) => panic!("no picture within 60 s"),
            None => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    tokio::time::sleep((SETTLING + seconds).saturating_sub(first.elapsed())).await;
    let end = Instant::now();
    stop.store(true, Ordering::Relaxed);
    let _ = mouth.await;
    if let Some(resource) = resource {
        let _ = http.delete(format!("{base}{resource}")).send().await;
    }

    // When each picture was complete: the arrival of its last packet.
    let (mut arrived, mut voices) = (BTreeMap::new(), 0);
    {
        let received = client.received.lock().unwrap();
        let from = received.video.first().map_or(0, |(_, p)| p.header.timestamp);
        for (at, packet) in &received.video {
            let time = packet.header.timestamp.wrapping_sub(from);
            arrived.entry(time).and_modify(|a: &mut Instant| *a = (*a).max(*at)).or_insert(*at);
        }
        voices += received.audio.iter().filter(|(at, _)| *at > first + SETTLING && *at <= end).count();
    }
    let counted: Vec<Instant> = arrived.values().copied().filter(|at| *at > first + SETTLING && *at <= end).collect();
    let gaps = counted.windows(2).map(|w| w[1].saturating_duration_since(w[0]));
    let span = (end - (first + SETTLING)).as_secs_f64();
    let mut decoder = Decoder::new().expect("an H.264 decoder");
    let (mut decoded, mut undecodable, mut different, mut last, mut size) = (0, 0, 0, 0, (0, 0));
    let units = client.units();
    let all = units.len();
    for unit in units.iter().filter(|u| u.complete) {
        match decoder.decode(&unit.data) {
            Ok(Some(picture)) => {
                let mut hasher = DefaultHasher::new();
                picture.y().hash(&mut hasher);
                let hash = hasher.finish();
                (decoded, different, last, size) =
                    (decoded + 1, different + usize::from(hash != last), hash, picture.dimensions());
            }
            Ok(None) => {}
            Err(_) => undecodable += 1,
        }
    }
    println!(
        "{}",
        json!({
            "first_picture_ms": (first - asked).as_millis() as u64, "seconds": span,
            "fps": (counted.len() as f64 / span * 100.0).round() / 100.0,
            "longest_gap_ms": gaps.max().unwrap_or_default().as_millis() as u64,
            "voice_per_s": (voices as f64 / span * 10.0).round() / 10.0,
            "units": all, "decoded": decoded, "different": different, "undecodable": undecodable,
            "size": format!("{}x{}", size.0, size.1),
            "last_metrics": client.received.lock().unwrap().messages.iter().rev().find(|m| m.contains("metrics")),
        })
    );
    client.close().await;
}
