//! The HTTP side, over real sockets: routes, refusals, limits, headers, the end.

use bytes::Bytes;
use loquent::{
    avatar::{self, AvatarError, Generator, OpenOptions, Stream},
    cluster::Node,
    engine::Engine,
    media::{Geometry, Portrait},
    net::{self, Net},
    server::{Config, Presenter, Rooms, Server, Service},
    session::Registry,
    voice::Voice,
};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

const CARD: &[u8] = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/web/card.png"));

/// A running service with the test card; ends when dropped.
pub(crate) struct House {
    pub(crate) address: SocketAddr,
    pub(crate) service: Arc<Service>,
    engine: Engine,
    stop: CancellationToken,
    http: Option<JoinHandle<()>>,
}

impl Drop for House {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

pub(crate) async fn house(change: impl FnOnce(&mut Config)) -> House {
    house_with(change, || Ok(avatar::test_card())).await
}

pub(crate) async fn house_with(
    change: impl FnOnce(&mut Config),
    build: impl FnMut() -> avatar::Result<Box<dyn Generator>> + Send + 'static,
) -> House {
    house_of(change, |_| {}, build).await
}

pub(crate) async fn house_of(
    change: impl FnOnce(&mut Config),
    change_net: impl FnOnce(&mut net::Config),
    build: impl FnMut() -> avatar::Result<Box<dyn Generator>> + Send + 'static,
) -> House {
    let mut all = settings();
    change(&mut all.server);
    change_net(&mut all.net);
    house_from(all, build).await
}

/// What a house is made from when nothing else is said.
pub(crate) fn settings() -> loquent::config::Config {
    let mut all = loquent::config::Config::default();
    all.server.listen = "127.0.0.1:0".into();
    all.net.bind = vec!["127.0.0.1".parse().unwrap()];
    all
}

pub(crate) async fn house_from(
    all: loquent::config::Config,
    build: impl FnMut() -> avatar::Result<Box<dyn Generator>> + Send + 'static,
) -> House {
    let loquent::config::Config {
        server: config, net, engine: settings, session: session_config, voice, cluster, ..
    } = all;
    let engine = tokio::task::spawn_blocking(move || Engine::start("card", &settings, build));
    let engine = engine.await.unwrap().unwrap();
    let rooms = Rooms {
        engine: engine.clone(),
        engine_name: "card",
        net: Net::new(net).unwrap(),
        sessions: Registry::new(),
        session_config,
        livekit: Default::default(),
        steps: None,
        presenters: vec![Presenter {
            id: "card".into(),
            name: "Test card".into(),
            description: "Bars".into(),
            png: Bytes::from_static(CARD),
        }],
        // A key for the endpoint that tests bring.
        voice: Voice::new(voice, Some("secret".into())).unwrap(),
        cluster: cluster.on().then(|| Node::new(cluster)),
    };
    let service = Service::new(config, rooms);
    let server = Server::bind(service.clone()).await.unwrap();
    let address = server.local_addr().unwrap();
    let stop = CancellationToken::new();
    let http = Some(tokio::spawn(server.run(stop.clone())));
    House { address, service, engine, stop, http }
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("no JSON ({e}): {}", self.text()))
    }
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
    /// The code of an error answer, whose message must be a sentence.
    pub(crate) fn code(&self) -> String {
        let error = &self.json()["error"];
        let message = error["message"].as_str().unwrap();
        assert!(message.ends_with('.') && message.starts_with(char::is_uppercase), "no sentence: {message}");
        error["code"].as_str().unwrap().into()
    }
}

impl House {
    /// Places that are taken.
    pub(crate) fn used(&self) -> usize {
        self.engine.stats().used
    }
    pub(crate) async fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
        if !body.is_empty() {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        let mut socket = TcpStream::connect(self.address).await.unwrap();
        socket.write_all(format!("{head}\r\n").as_bytes()).await.unwrap();
        // A server that refuses early may close before it has read everything.
        let _ = socket.write_all(body).await;
        let mut bytes = Vec::new();
        tokio::time::timeout(Duration::from_secs(30), socket.read_to_end(&mut bytes)).await.unwrap().unwrap();
        parse(&bytes)
    }
    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[], b"").await
    }
    pub(crate) async fn post(&self, path: &str, kind: &str, body: &[u8]) -> Answer {
        self.ask("POST", path, &[("Content-Type", kind)], body).await
    }
}

fn parse(bytes: &[u8]) -> Answer {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or_else(|| panic!("no head: {bytes:?}"));
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let mut headers = BTreeMap::<String, String>::new();
    for (name, value) in lines.filter_map(|l| l.split_once(": ")) {
        // Repeated headers become one list, as they may.
        let all = headers.entry(name.to_ascii_lowercase()).or_default();
        *all = if all.is_empty() { value.into() } else { format!("{all}, {value}") };
    }
    Answer { status, headers, body: bytes[end + 4..].to_vec() }
}

/// What a browser offers: one section for each way, one for the data channel.
pub(crate) fn offer() -> String {
    let print = vec!["AB"; 32].join(":");
    let transport = format!(
        "c=IN IP4 0.0.0.0\r\na=rtcp:9 IN IP4 0.0.0.0\r\na=ice-ufrag:Qm9v\r\na=ice-pwd:MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMg\r\n\
         a=ice-options:trickle\r\na=fingerprint:sha-256 {print}\r\na=setup:actpass\r\n"
    );
    format!(
        "v=0\r\no=- 4611731400430051336 2 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\na=group:BUNDLE 0 1 2\r\n\
         a=extmap-allow-mixed\r\na=msid-semantic: WMS s\r\n\
         m=audio 9 UDP/TLS/RTP/SAVPF 111\r\n{transport}a=mid:0\r\na=sendrecv\r\na=msid:s t\r\na=rtcp-mux\r\n\
         a=rtpmap:111 opus/48000/2\r\na=fmtp:111 minptime=10;useinbandfec=1\r\na=ssrc:1 cname:c\r\n\
         m=video 9 UDP/TLS/RTP/SAVPF 108 109\r\n{transport}a=mid:1\r\na=recvonly\r\na=rtcp-mux\r\na=rtcp-rsize\r\n\
         a=rtpmap:108 H264/90000\r\na=rtcp-fb:108 nack\r\na=rtcp-fb:108 nack pli\r\na=rtcp-fb:108 transport-cc\r\n\
         a=fmtp:108 level-asymmetry-allowed=1;packetization-mode=1;profile-level-id=42e01f\r\n\
         a=rtpmap:109 rtx/90000\r\na=fmtp:109 apt=108\r\n\
         m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\n{transport}a=mid:2\r\na=sctp-port:5000\r\n\
         a=max-message-size:262144\r\n"
    )
}

pub(crate) const SDP: &str = "application/sdp";
pub(crate) const FRAGMENT: &str = "application/trickle-ice-sdpfrag";

#[tokio::test(flavor = "multi_thread")]
async fn the_page_and_its_files_come_with_their_types_and_a_strict_policy() {
    let house = house(|_| {}).await;
    for (path, kind) in [
        ("/", "text/html; charset=utf-8"),
        ("/index.html", "text/html; charset=utf-8"),
        ("/app.js", "text/javascript; charset=utf-8"),
        ("/live.js", "text/javascript; charset=utf-8"),
        ("/meter.js", "text/javascript; charset=utf-8"),
        ("/style.css", "text/css; charset=utf-8"),
        ("/icon.svg", "image/svg+xml"),
        ("/favicon.ico", "image/svg+xml"),
    ] {
        let answer = house.get(path).await;
        assert_eq!((answer.status, answer.header("content-type")), (200, kind), "{path}");
        let policy = answer.header("content-security-policy");
        assert!(policy.contains("default-src 'none'") && policy.contains("script-src 'self'"), "{policy}");
        assert!(!policy.contains("unsafe"), "{policy}");
        assert_eq!(answer.header("x-content-type-options"), "nosniff");
        assert_eq!(answer.header("referrer-policy"), "no-referrer");
        assert!(answer.header("permissions-policy").contains("microphone=(self)"));
        let again = house.ask("GET", path, &[("If-None-Match", answer.header("etag"))], b"").await;
        assert_eq!((again.status, again.body.len()), (304, 0), "{path}");
    }
    let page = house.get("/").await.text();
    assert!(page.contains(">Start</button>"));
    // The policy forbids them; the page must not need them.
    assert!(!page.contains("style=\"") && !page.contains(" onclick="), "inline style or script");
    assert!(!page.contains("http://") && !page.contains("https://"), "the page must need no other site");
    for path in ["/nothing", "/../Cargo.toml", "/%2e%2e/Cargo.toml", "/v1/nothing", "/a/b/c"] {
        let answer = house.get(path).await;
        assert_eq!((answer.status, answer.code().as_str()), (404, "no_such_page"), "{path}");
    }
    let answer = house.ask("DELETE", "/v1/presenters", &[], b"").await;
    assert_eq!((answer.status, answer.code().as_str()), (405, "method_not_allowed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_can_stand_in_for_the_built_in_page() {
    let folder = std::env::temp_dir().join(format!("loquent-web-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("index.html"), "mine").unwrap();
    let text = folder.display().to_string();
    let house = house(|c| c.web_dir = text).await;
    assert_eq!(house.get("/").await.text(), "mine");
    assert_eq!(house.get("/app.js").await.status, 404, "only what lies there");
    std::fs::write(folder.join("index.html"), "changed").unwrap();
    assert_eq!(house.get("/").await.text(), "changed");
    std::fs::remove_dir_all(&folder).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn health_readiness_and_metrics() {
    let house = house(|_| {}).await;
    assert_eq!(house.get("/healthz").await.text(), "ok\n");
    let ready = house.get("/readyz").await;
    assert_eq!((ready.status, ready.json()["ready"].as_bool()), (200, Some(true)));
    let metrics = house.get("/metrics").await;
    assert_eq!(metrics.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    let text = metrics.text();
    for name in [
        "loquent_build_info{version=\"0.1.0\"} 1",
        "loquent_engine_ready 1",
        "loquent_slots 1",
        "loquent_slots_used 0",
        "loquent_real_time_factor ",
        "loquent_block_seconds_bucket{stage=\"total\",le=\"0.16\"}",
        "loquent_block_deadline_ratio_bucket{le=\"1\"}",
        "loquent_sessions{state=\"idle\"} 0",
        "loquent_sessions_closed_total{reason=\"stopped\"} 0",
        "loquent_http_requests_total{method=\"GET\",route=\"/healthz\",status=\"200\"}",
        "loquent_frames_total{outcome=\"held\"}",
        "loquent_packets_lost_total{direction=\"out\"} 0",
    ] {
        assert!(text.contains(name), "{name} is missing in:\n{text}");
    }
    // Every line is a comment or `name{labels} number`.
    for line in text.lines().filter(|l| !l.starts_with('#') && !l.is_empty()) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        assert!(name.starts_with("loquent_") && value.parse::<f64>().is_ok(), "{line}");
    }
    house.service.drain();
    let ready = house.get("/readyz").await;
    assert_eq!((ready.status, ready.json()["state"].as_str()), (503, Some("draining")));
    let refused = house.post("/v1/live", SDP, offer().as_bytes()).await;
    assert_eq!((refused.status, refused.code().as_str()), (503, "draining"));
    assert_eq!(house.get("/healthz").await.status, 200, "alive while draining");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_takes_the_place_and_gives_it_back() {
    let house = house(|_| {}).await;
    let first = house.post("/v1/live?presenter=card&seed=7", SDP, offer().as_bytes()).await;
    assert_eq!(first.status, 201, "{}", first.text());
    assert_eq!(first.header("content-type"), SDP);
    let answer = first.text();
    assert!(
        answer.contains("m=audio") && answer.contains("H264/90000") && answer.contains("a=setup:active"),
        "{answer}"
    );
    let location = first.header("location").to_string();
    assert!(location.starts_with("/v1/live/") && location.len() == "/v1/live/".len() + 32, "{location}");
    let etag = first.header("etag").to_string();
    assert!(etag.starts_with('"') && etag.ends_with('"'), "a strong tag: {etag}");
    assert_eq!(first.header("accept-patch"), FRAGMENT);

    // One place: the second is told at once, and when to come back.
    let began = Instant::now();
    let second = house.post("/v1/live", SDP, offer().as_bytes()).await;
    assert_eq!((second.status, second.code().as_str()), (503, "full"));
    assert_eq!(second.header("retry-after"), "5");
    assert_eq!(second.json()["reason"], "full");
    assert!(second.json()["message"].is_string());
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    let metrics = house.get("/metrics").await.text();
    assert!(metrics.contains("loquent_slots_used 1"), "{metrics}");

    // Trickle and restart, by the rules of RFC 9725 §4.3.
    let trickle = "a=ice-ufrag:Qm9v\r\na=ice-pwd:MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMg\r\nm=audio 9 UDP/TLS/RTP/SAVPF 111\r\n\
                   a=mid:0\r\na=candidate:1 1 udp 2113937151 127.0.0.1 9 typ host\r\na=end-of-candidates\r\n";
    let patch =
        async |headers: &[(&str, &str)], body: &str| house.ask("PATCH", &location, headers, body.as_bytes()).await;
    let with = |tag: &'static str| [("Content-Type", FRAGMENT), ("If-Match", tag)];
    assert_eq!(patch(&[("Content-Type", FRAGMENT), ("If-Match", &etag)], trickle).await.status, 204);
    assert_eq!(patch(&[("Content-Type", FRAGMENT)], trickle).await.status, 428);
    assert_eq!(patch(&with("\"stale\""), trickle).await.status, 412);
    assert_eq!(patch(&[("Content-Type", "text/plain"), ("If-Match", &etag)], trickle).await.status, 415);
    assert_eq!(patch(&[("Content-Type", FRAGMENT), ("If-Match", &etag)], "\u{1}nonsense").await.status, 400);
    assert_eq!(patch(&with("*"), trickle).await.status, 422, "the credentials in use are no restart");
    let restart = trickle.replace("Qm9v", "bmV3").replace("MTIz", "NEUx");
    let restarted = patch(&with("*"), &restart).await;
    assert_eq!(restarted.status, 200, "{}", restarted.text());
    assert_eq!(restarted.header("content-type"), FRAGMENT);
    assert!(restarted.text().contains("a=ice-ufrag:") && restarted.text().contains("a=ice-pwd:"));
    assert_ne!(restarted.header("etag"), etag);
    assert_eq!(patch(&[("Content-Type", FRAGMENT), ("If-Match", &etag)], trickle).await.status, 412, "the old tag");

    let gone = house.ask("DELETE", &location, &[], b"").await;
    assert_eq!(gone.status, 200);
    // Its place is free by the time the answer came.
    let third = house.post("/v1/live", SDP, offer().as_bytes()).await;
    assert_eq!(third.status, 201, "{}", third.text());
    let metrics = house.get("/metrics").await.text();
    assert!(metrics.contains("loquent_sessions_closed_total{reason=\"stopped\"} 1"), "{metrics}");
    for method in ["DELETE", "PATCH"] {
        let again = house.ask(method, &location, &with("*"), b"").await;
        assert_eq!((again.status, again.code().as_str()), (404, "no_such_session"), "{method}");
    }
    assert_eq!(house.ask("DELETE", third.header("location"), &[], b"").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_offers_are_refused_in_sentences_and_cost_no_place() {
    let house = house(|_| {}).await;
    let good = offer();
    let cases: Vec<(&str, &str, Vec<u8>, u16, &str)> = vec![
        ("/v1/live", "text/plain", good.clone().into(), 415, "wrong_content_type"),
        ("/v1/live", "", good.clone().into(), 415, "wrong_content_type"),
        ("/v1/live", SDP, vec![], 400, "malformed_sdp"),
        ("/v1/live", SDP, b"hello".to_vec(), 400, "malformed_sdp"),
        ("/v1/live", SDP, vec![0xff, 0xfe], 400, "malformed_sdp"),
        ("/v1/live", SDP, vec![b'v'; 65 * 1024], 413, "too_large"),
        ("/v1/live?seed=many", SDP, good.clone().into(), 400, "wrong_query"),
        ("/v1/live?presenter=nobody", SDP, good.clone().into(), 404, "no_such_presenter"),
        ("/v1/live?presenter=portrait:1234", SDP, good.clone().into(), 404, "no_such_portrait"),
        ("/v1/live", SDP, good.replace("H264", "VP8").into(), 422, "no_h264"),
        ("/v1/live", SDP, good.replace("opus/48000/2", "PCMU/8000").into(), 422, "no_opus"),
        ("/v1/live", SDP, good.replace("a=sendrecv", "a=inactive").into(), 422, "no_microphone"),
        ("/v1/live", SDP, good.replace("a=recvonly", "a=inactive").into(), 422, "no_video"),
    ];
    for (path, kind, body, status, code) in cases {
        let answer = house.post(path, kind, &body).await;
        assert_eq!((answer.status, answer.code().as_str()), (status, code), "{path} {kind}");
    }
    assert!(house.get("/metrics").await.text().contains("loquent_slots_used 0"));
    let options = house.ask("OPTIONS", "/v1/live", &[], b"").await;
    assert_eq!((options.status, options.header("accept-post")), (200, SDP));
    assert_eq!(house.get("/v1/live").await.status, 204);
}

#[tokio::test(flavor = "multi_thread")]
async fn presenters_and_pictures_of_ones_own() {
    let house = house(|c| c.portrait_max_mb = 1).await;
    let list = house.get("/v1/presenters").await.json();
    assert_eq!(list["default"], "card");
    let thumbnail = house.get(list["presenters"][0]["thumbnail"].as_str().unwrap()).await;
    assert_eq!((thumbnail.status, thumbnail.header("content-type")), (200, "image/png"));
    assert_eq!(thumbnail.body, CARD);
    assert_eq!(house.get("/v1/presenters/nobody.png").await.code(), "no_such_presenter");
    assert_eq!(house.get("/v1/presenters/card").await.status, 404);
    let info = house.get("/v1/info").await.json();
    assert_eq!((info["engine"]["fps"].as_u64(), info["engine"]["name"].as_str()), (Some(25), Some("card")));
    assert_eq!(info["portrait_max_bytes"], 1 << 20);

    let stored = house.post("/v1/portraits?consent=It%20is%20me.", "image/png", CARD).await;
    assert_eq!(stored.status, 201, "{}", stored.text());
    let told = stored.json();
    assert_eq!((told["width"].as_u64(), told["height"].as_u64()), (Some(256), Some(256)));
    let path = format!("/v1/live?presenter={}", told["presenter"].as_str().unwrap());
    let live = house.post(&path, SDP, offer().as_bytes()).await;
    assert_eq!(live.status, 201, "{}", live.text());
    house.ask("DELETE", live.header("location"), &[], b"").await;

    let silent = house.post("/v1/portraits?consent=%20", "image/png", CARD).await;
    assert_eq!((silent.status, silent.code()), (400, "no_consent".into()));
    assert_eq!(told["consent"], "It is me.");
    let cases: [(&str, Vec<u8>, u16, &str); 6] = [
        ("text/plain", CARD.to_vec(), 415, "not_a_picture"),
        ("multipart/form-data", CARD.to_vec(), 415, "not_a_picture"),
        ("image/png", vec![], 422, "unusable_picture"),
        ("image/png", b"no picture at all".to_vec(), 422, "unusable_picture"),
        ("image/png", CARD[..CARD.len() / 2].to_vec(), 422, "unusable_picture"),
        ("image/png", vec![0; (1 << 20) + 1], 413, "too_large"),
    ];
    for (kind, body, status, code) in cases {
        let answer = house.post("/v1/portraits?consent=test", kind, &body).await;
        assert_eq!((answer.status, answer.code().as_str()), (status, code), "{kind}, {} bytes", body.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_sites_are_let_in_only_by_name() {
    let asks = |origin: &'static str| [("Origin", origin), ("Access-Control-Request-Method", "POST")];
    let closed = house(|_| {}).await;
    let answer = closed.ask("OPTIONS", "/v1/live", &asks("https://app.example"), b"").await;
    assert_eq!(answer.header("access-control-allow-origin"), "");
    drop(closed);

    let open = house(|c| c.cors_origins = vec!["https://app.example".into()]).await;
    let answer = open.ask("OPTIONS", "/v1/live", &asks("https://app.example"), b"").await;
    assert!((200..300).contains(&answer.status));
    assert_eq!(answer.header("access-control-allow-origin"), "https://app.example");
    assert!(answer.header("access-control-allow-methods").contains("PATCH"));
    assert!(answer.header("access-control-allow-headers").contains("If-Match"));
    assert_eq!(answer.header("accept-post"), SDP);
    let answer = open.ask("OPTIONS", "/v1/live", &asks("https://evil.example"), b"").await;
    assert_eq!(answer.header("access-control-allow-origin"), "");
    let answer = open.ask("GET", "/v1/presenters", &[("Origin", "https://app.example")], b"").await;
    assert_eq!(answer.header("access-control-allow-origin"), "https://app.example");
    assert!(answer.header("access-control-expose-headers").contains("Location"));
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_and_surplus_clients_are_shed() {
    let house = house(|c| {
        c.header_timeout_s = 1;
        c.request_timeout_s = 1;
        c.max_connections = 2;
    })
    .await;
    // Half a head, then nothing.
    let mut slow = TcpStream::connect(house.address).await.unwrap();
    slow.write_all(b"GET / HTTP/1.1\r\nHost: te").await.unwrap();
    // A body that never ends.
    let mut endless = TcpStream::connect(house.address).await.unwrap();
    let head =
        "POST /v1/live HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/sdp\r\nContent-Length: 1000\r\n\r\nv=0";
    endless.write_all(head.as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    // Two are open: the third is closed at once.
    let mut third = TcpStream::connect(house.address).await.unwrap();
    let mut bytes = Vec::new();
    let _ = third.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    let closed = tokio::time::timeout(Duration::from_secs(1), third.read_to_end(&mut bytes)).await;
    assert!(closed.is_ok() && bytes.is_empty(), "{bytes:?}");

    let mut bytes = Vec::new();
    tokio::time::timeout(Duration::from_secs(5), slow.read_to_end(&mut bytes)).await.expect("closed in time").unwrap();
    let mut bytes = vec![0; 12];
    tokio::time::timeout(Duration::from_secs(5), endless.read_exact(&mut bytes))
        .await
        .expect("answered in time")
        .unwrap();
    assert_eq!(&bytes, b"HTTP/1.1 408");
    drop((slow, endless));
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(house.get("/healthz").await.status, 200, "there is room again");
}

/// Breaks when a guest's face is opened.
struct Fragile(Box<dyn Generator>, usize);

impl Generator for Fragile {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    fn open(&mut self, portrait: &Portrait, options: &OpenOptions) -> avatar::Result<Box<dyn Stream>> {
        self.1 += 1;
        // The first face is the warm-up's.
        if self.1 > 1 {
            return Err(AvatarError::Device { block: 0, stage: "open", source: "it broke".into() });
        }
        self.0.open(portrait, options)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_engine_is_seen_everywhere() {
    let mut all = settings();
    all.engine.rebuilds = 0;
    let house = house_from(all, || Ok(Box::new(Fragile(avatar::test_card(), 0)))).await;
    assert_eq!(house.get("/readyz").await.status, 200);
    // Whether the failure overtakes the answer is a matter of scheduling; the place is given back either way.
    house.post("/v1/live", SDP, offer().as_bytes()).await;
    let deadline = Instant::now() + Duration::from_secs(20);
    while house.get("/readyz").await.status != 503 {
        assert!(Instant::now() < deadline, "readyz never turned red");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let ready = house.get("/readyz").await.json();
    assert_eq!(ready["state"], "engine_failed");
    assert!(ready["why"].as_str().unwrap().contains("it broke"), "{ready}");
    let refused = house.post("/v1/live", SDP, offer().as_bytes()).await;
    assert_eq!((refused.status, refused.code().as_str()), (503, "engine_failed"));
    assert!(!refused.text().contains("it broke"), "what broke is for the log");
    let ended = "loquent_sessions_closed_total{reason=\"engine_failed\"} 1";
    loop {
        let metrics = house.get("/metrics").await.text();
        if metrics.contains(ended) && metrics.contains("loquent_slots_used 0") {
            assert!(metrics.contains("loquent_engine_ready 0"));
            break;
        }
        assert!(Instant::now() < deadline, "{metrics}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The program itself: prints where it listens, serves, ends on SIGTERM with code 0 and in time.
#[test]
fn the_program_serves_and_ends_when_told() {
    use std::io::{BufRead, BufReader, Read, Write};
    let mut program = std::process::Command::new(env!("CARGO_BIN_EXE_loquent"))
        .args(["serve", "--engine", "card", "--listen", "127.0.0.1:0", "--stop-after", "60"])
        .current_dir(std::env::temp_dir())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(program.stdout.take().unwrap()).lines().map_while(Result::ok);
    let line = lines.into_iter().find(|l| l.starts_with("Open http://")).expect("the address to open is printed");
    let address = line.trim_start_matches("Open http://").split('/').next().unwrap().to_string();
    let mut socket = std::net::TcpStream::connect(&address).unwrap();
    socket.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    let told = std::process::Command::new("kill").args(["-TERM", &program.id().to_string()]).status().unwrap();
    assert!(told.success());
    let began = Instant::now();
    let ended = loop {
        if let Some(status) = program.try_wait().unwrap() {
            break status;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "still running");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(ended.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_is_orderly_and_the_address_is_free_again() {
    let mut house = house(|_| {}).await;
    assert_eq!(house.get("/healthz").await.status, 200);
    // An idle connection must not hold the end.
    let _idle = TcpStream::connect(house.address).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    house.stop.cancel();
    let http = house.http.take().unwrap();
    tokio::time::timeout(Duration::from_secs(3), http).await.expect("in time").unwrap();
    assert!(TcpStream::connect(house.address).await.is_err());
}
