//! What goes wrong, caused on purpose, and what comes of it. `deploy/OPERATIONS.md` has the table of outcomes.
//!
//! Elsewhere: a bad network and a dark one in `net.rs` and `tests/browser` (`loss`, `dark`), a page that reloads in
//! `server.rs`, spoilt input in `hostile.rs`, a disk torn byte by byte in `recording.rs`.

use crate::{
    access::Program,
    conformance::both,
    engine::{Faulty, How},
    server::{House, SDP, house_from, offer, settings},
    session_loop::Recorder,
    sessions::Socket,
};
use loquent::{
    avatar,
    session::{EncodedAudio, EncodedVideo, Handle, LinkOut, LinkStats, SessionId, SinkRole},
};
use serde_json::{Value, json};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

async fn two_places(change: impl FnOnce(&mut loquent::config::Config), how: Option<How>) -> House {
    let mut all = settings();
    all.engine.sessions = 2;
    change(&mut all);
    house_from(all, move || match how {
        Some(how) => Ok(Box::new(Faulty { how }) as _),
        None => Ok(avatar::test_card()),
    })
    .await
}

/// Speaks 400 ms and hears that it was played to its end.
pub(crate) async fn speaks(socket: &mut Socket) {
    socket.say(json!({"type": "set", "rate": 16_000})).await;
    socket.sound(400).await;
    socket.say(json!({"type": "speak_end"})).await;
    let ended = socket.hear("speak_ended").await;
    assert!(ended["interrupted"] == false && ended["position"].as_f64().unwrap() > 0.38, "{ended}");
}

async fn begin_with(house: &House, wanted: Value) -> Value {
    let begun = house.json("POST", "/v1/sessions", wanted).await;
    assert_eq!(begun.status, 201, "{}", begun.text());
    begun.json()
}

fn handle(house: &House, session: &Value) -> Handle {
    house.service.session(&SessionId::from(session["id"].as_str().unwrap())).unwrap()
}

/// The engine panics, or its device fails (a CUDA error comes through the same door): everybody on it is told, nobody
/// is admitted meanwhile, and it is built anew in place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_engine_tells_its_sessions_and_comes_back() {
    for how in [How::Panic, How::Device] {
        let house = two_places(|_| {}, Some(how)).await;
        let well = house.begin().await;
        let mut first = house.socket(&well).await;
        speaks(&mut first).await;
        // Fails at its sixth block.
        let ill = begin_with(&house, json!({"seed": 7})).await;
        let mut second = house.socket(&ill).await;
        for socket in [&mut first, &mut second] {
            assert_eq!(socket.hear("closed").await["reason"], "engine_failed");
        }
        let ready = house.get("/readyz").await;
        assert_eq!((ready.status, &ready.json()["state"]), (503, &json!("engine_restarting")));
        let refused = house.json("POST", "/v1/sessions", json!({})).await;
        assert_eq!((refused.status, refused.code()), (503, "engine_restarting".into()));
        assert!(!refused.header("retry-after").is_empty());
        assert_eq!(house.get("/healthz").await.status, 200, "the process is well");
        let began = Instant::now();
        while house.get("/readyz").await.status != 200 {
            assert!(began.elapsed() < Duration::from_secs(20), "it did not come back");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let mut third = house.socket(&house.begin().await).await;
        speaks(&mut third).await;
        let metrics = house.get("/metrics").await.text();
        // The counter is the process's, which other tests share.
        assert!(!metrics.contains("loquent_engine_rebuilds_total 0"), "{metrics}");
    }
}

/// A fault of one face costs that face.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fault_of_one_face_is_its_own() {
    let house = two_places(|_| {}, Some(How::Face)).await;
    let mut well = house.socket(&house.begin().await).await;
    let mut ill = house.socket(&begin_with(&house, json!({"seed": 7})).await).await;
    assert_eq!(ill.hear("closed").await["reason"], "engine_failed");
    speaks(&mut well).await;
    assert_eq!(house.get("/readyz").await.status, 200);
}

/// Whoever reads the page for operators finds every metric and every way a session ends; the dashboard asks for nothing
/// that there is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_operators_pages_and_the_service_say_the_same() {
    let read = |name: &str| std::fs::read_to_string(format!("{}/deploy/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let (page, board) = (read("OPERATIONS.md"), read("grafana.json"));
    let house = two_places(|_| {}, None).await;
    // A metric with labels is there from its first value on: one conversation, ended, and a request that is refused.
    let session = house.begin().await;
    speaks(&mut house.socket(&session).await).await;
    house.ask("DELETE", &format!("/v1/sessions/{}", session["id"].as_str().unwrap()), &[], b"").await;
    house.get("/nowhere").await;
    let text = house.get("/metrics").await.text();
    let names: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("# TYPE loquent_")?.split(' ').next()).collect();
    assert!(names.len() > 25, "{names:?}");
    for name in &names {
        assert!(page.contains(&format!("`{name}`")), "deploy/OPERATIONS.md does not explain {name}");
    }
    for reason in loquent::session::Reason::LABELS {
        assert!(page.contains(&format!("`{reason}`")), "deploy/OPERATIONS.md does not explain the end {reason}");
    }
    serde_json::from_str::<Value>(&board).unwrap();
    for asked in board.split("loquent_").skip(1) {
        let asked: String = asked.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
        let known = |n: &&str| {
            [**n == asked, ["_bucket", "_sum", "_count"].iter().any(|e| format!("{n}{e}") == asked)].contains(&true)
        };
        assert!(names.iter().any(|n| known(&n)), "deploy/grafana.json asks for {asked}, which there is not");
    }
}

/// Too little memory for one more is seen before it is taken.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_would_run_out_refuses_the_next_and_keeps_the_others() {
    let house = two_places(|c| c.server.memory_reserve_mb = 1 << 40, None).await;
    let refused = house.json("POST", "/v1/sessions", json!({})).await;
    assert_eq!((refused.status, refused.code()), (503, "no_memory".into()));
    assert!(!refused.header("retry-after").is_empty());
    assert_eq!(house.get("/metrics").await.text().matches("loquent_slots_used 0").count(), 1);
}

/// A sink that kills the thread it is called on.
struct Bomb;

impl LinkOut for Bomb {
    fn video(&self, _: EncodedVideo, _: Instant) {
        panic!("a bomb in the encoder's thread");
    }
    fn audio(&self, _: EncodedAudio, _: Instant) {}
    fn message(&self, _: String) {}
    fn stats(&self) -> LinkStats {
        LinkStats::default()
    }
    fn close(&self) {}
}

/// An encoder thread that dies ends its session with a reason; the other one does not notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_encoder_thread_ends_its_session_and_no_other() {
    let house = two_places(|_| {}, None).await;
    let (ill, well) = (house.begin().await, house.begin().await);
    let (mut its, mut others) = (house.socket(&ill).await, house.socket(&well).await);
    let _place = handle(&house, &ill).attach(Arc::new(Bomb), SinkRole::Viewer);
    assert_eq!(its.hear("closed").await["reason"], "codec_failed");
    let watching = Arc::new(Recorder::default());
    let _watching = handle(&house, &well).attach(watching.clone(), SinkRole::Viewer);
    speaks(&mut others).await;
    assert!(watching.videos.lock().unwrap().len() > 5);
    // Its place is free.
    house.begin().await;
}

/// A recording on a disk that is full ends with its reason and keeps what it has; the session goes on. (A limit on the
/// size of files stands for the disk: the program is told the same way.)
#[test]
fn a_full_disk_ends_the_recording_and_not_the_session() {
    let program = Program::start("disk", "trap '' XFSZ; ulimit -f 200;", &["--set", "server.recordings_dir=films"]);
    let session = program.json("POST", "/v1/sessions", "");
    let (id, token) = (session["id"].as_str().unwrap(), session["token"].as_str().unwrap());
    let bearer = format!("Authorization: Bearer {token}\r\n");
    let at = format!("/v1/sessions/{id}/recording");
    let begun = program.ask("POST", &at, &bearer);
    assert!(begun.starts_with("HTTP/1.1 201"), "{begun}");
    let began = Instant::now();
    let told = loop {
        let told = program.ask("GET", &at, &bearer);
        if told.contains("\"over\"") {
            break told;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "the disk was not full: {told}");
        std::thread::sleep(Duration::from_millis(100));
    };
    assert!(told.to_lowercase().contains("too large") || told.to_lowercase().contains("space"), "no reason: {told}");
    assert!(program.ask("GET", &format!("/v1/sessions/{id}"), "").starts_with("HTTP/1.1 200"), "the session is gone");
    let film = std::fs::read_dir(program.folder.join("films")).unwrap().next().unwrap().unwrap().path();
    let size = film.metadata().unwrap().len();
    assert!(size > 20_000, "{size} bytes were kept");
}

/// The whole process stands still for three seconds, as when a machine is paused or its clock jumps: whoever was there is
/// there afterwards, and speech goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leap_in_time_is_survived() {
    let program = Program::start("leap", "", &[]);
    let session = program.json("POST", "/v1/sessions", "");
    let mut socket = Socket::to(&program.address, &session).await;
    speaks(&mut socket).await;
    program.signal("-STOP");
    tokio::time::sleep(Duration::from_secs(3)).await;
    program.signal("-CONT");
    speaks(&mut socket).await;
    let metrics = program.ask("GET", "/metrics", "");
    assert!(metrics.contains("loquent_slots_used 1") && metrics.contains("loquent_engine_ready 1"), "{metrics}");
}

/// A program whose machine went away without a word: its socket stands, and nothing answers. Its place is given back, its
/// session waits for it as for any other, and is there for the next socket.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_websocket_gives_its_place_back() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let house = two_places(
        |c| {
            c.server.max_connections = 1;
            c.server.websocket_silence_s = 2;
        },
        None,
    )
    .await;
    let session = house.begin().await;
    let path = session["urls"]["websocket"].as_str().unwrap();
    let mut silent = tokio::net::TcpStream::connect(house.address).await.unwrap();
    let head = format!(
        "GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        house.address
    );
    silent.write_all(head.as_bytes()).await.unwrap();
    let mut said = [0; 12];
    silent.read_exact(&mut said).await.unwrap();
    assert_eq!(&said, b"HTTP/1.1 101");
    // It never answers a ping. Until it is given up there is no place for another; then its end is told and there is.
    let refused = tokio_tungstenite::connect_async(format!("ws://{}{path}", house.address)).await;
    assert!(matches!(refused, Err(tokio_tungstenite::tungstenite::Error::Http(r)) if r.status() == 503));
    let mut rest = Vec::new();
    let end = tokio::time::timeout(Duration::from_secs(20), silent.read_to_end(&mut rest)).await;
    assert!(end.is_ok(), "a silent client is kept for ever");
    let mut socket = house.socket(&session).await;
    speaks(&mut socket).await;
}

/// A crowd of players that post offers and never connect: as many as there is room for, the rest is told so, the session
/// speaks on, and what never connected is given back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_viewers_and_half_open_ones() {
    let house = two_places(
        |c| {
            c.server.connections_max = 5;
            c.session.connect_timeout_s = 1;
        },
        None,
    )
    .await;
    let house = Arc::new(house);
    let session = house.begin().await;
    let mut socket = house.socket(&session).await;
    speaks(&mut socket).await;
    let path = format!("{}?token={}", session["urls"]["whep"].as_str().unwrap(), session["token"].as_str().unwrap());
    let storm: Vec<_> = (0..120)
        .map(|_| {
            let (house, path) = (house.clone(), path.clone());
            tokio::spawn(async move { house.post(&path, SDP, both("recvonly").as_bytes()).await })
        })
        .collect();
    let stormed = Instant::now();
    let mut statuses = std::collections::BTreeMap::<u16, usize>::new();
    for one in storm {
        let answer = one.await.unwrap();
        assert!(answer.status == 201 || !answer.header("retry-after").is_empty(), "{}", answer.text());
        *statuses.entry(answer.status).or_default() += 1;
    }
    println!("120 offers: {statuses:?}");
    assert_eq!(statuses.remove(&201), Some(5));
    assert!(statuses.keys().all(|s| [429, 503].contains(s)), "{statuses:?}");
    speaks(&mut socket).await;
    // A two-way page that never connects gives its place back, too.
    assert_eq!(house.post("/v1/live", SDP, offer().as_bytes()).await.status, 201);
    assert_eq!(house.post("/v1/live", SDP, offer().as_bytes()).await.status, 503);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(house.post("/v1/live", SDP, offer().as_bytes()).await.status, 201);
    while house.post(&path, SDP, both("recvonly").as_bytes()).await.status != 201 {
        assert!(stormed.elapsed() < Duration::from_secs(40), "half-open players hold their places");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    speaks(&mut socket).await;
}
