//! Sessions of programs: the API, tokens, and the WebSocket with a client that is not ours.

use crate::server::{Answer, House, house, house_from, settings};
use futures::{SinkExt, StreamExt};
use loquent::{
    avatar::{self, Act, Capabilities, Direction, Generator, OpenOptions, Stream},
    media::{Geometry, Portrait},
};
use serde_json::{Value, json};
use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{Message, protocol::frame::coding::CloseCode},
};

impl House {
    pub(crate) async fn json(&self, method: &str, path: &str, body: Value) -> Answer {
        self.ask(method, path, &[("Content-Type", "application/json")], body.to_string().as_bytes()).await
    }
    pub(crate) async fn begin(&self) -> Value {
        let begun = self.json("POST", "/v1/sessions", json!({})).await;
        assert_eq!(begun.status, 201, "{}", begun.text());
        begun.json()
    }
    pub(crate) async fn socket(&self, session: &Value) -> Socket {
        Socket::to(self.address, session).await
    }
}

pub(crate) struct Socket(WebSocketStream<MaybeTlsStream<TcpStream>>);

impl Socket {
    pub(crate) async fn to(address: impl std::fmt::Display, session: &Value) -> Socket {
        let path = session["urls"]["websocket"].as_str().unwrap();
        Socket(tokio_tungstenite::connect_async(format!("ws://{address}{path}")).await.unwrap().0)
    }
    pub(crate) async fn say(&mut self, message: Value) {
        self.0.send(Message::text(message.to_string())).await.unwrap();
    }
    /// A tone of so many milliseconds at 16 kHz.
    pub(crate) async fn sound(&mut self, ms: usize) {
        let tone = (0..16 * ms).flat_map(|i| ((12_000.0 * (i as f64 * 0.17).sin()) as i16).to_le_bytes());
        self.0.send(Message::binary(tone.collect::<Vec<u8>>())).await.unwrap();
    }
    /// The next message of this type; others are skipped.
    pub(crate) async fn hear(&mut self, kind: &str) -> Value {
        loop {
            let message = tokio::time::timeout(Duration::from_secs(8), self.0.next()).await;
            let message = message.unwrap_or_else(|_| panic!("no {kind} came")).unwrap().unwrap();
            let Message::Text(text) = message else { continue };
            let said: Value = serde_json::from_str(&text).unwrap();
            if said["type"] == kind {
                return said;
            }
        }
    }
    pub(crate) async fn code(&mut self) -> CloseCode {
        loop {
            match tokio::time::timeout(Duration::from_secs(8), self.0.next()).await.unwrap() {
                Some(Ok(Message::Close(frame))) => return frame.unwrap().code,
                Some(Ok(_)) => {}
                other => panic!("no close frame: {other:?}"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_begun_seen_and_ended_by_a_program() {
    let house = house(|_| {}).await;
    for (body, status, code) in [
        (json!({"presenter": "nobody"}), 404, "no_such_presenter"),
        (json!({"presenter": "portrait:gone"}), 404, "no_such_portrait"),
        (json!({"engine": "other"}), 422, "no_such_engine"),
        (json!({"profile": "fast"}), 422, "no_such_profile"),
        (json!({"prompt": "smile"}), 422, "no_prompt"),
        (json!({"liveliness": 1}), 422, "no_gestures"),
        (json!({"background": "plaid"}), 422, "no_such_background"),
        (json!({"limits": {"max_session_s": 1_000_000}}), 422, "limit_too_high"),
        (json!({"presentre": "card"}), 400, "wrong_json"),
        (json!([1]), 400, "wrong_json"),
        (json!({"seed": -1}), 400, "wrong_json"),
    ] {
        let answer = house.json("POST", "/v1/sessions", body.clone()).await;
        assert_eq!((answer.status, answer.code()), (status, code.into()), "{body}");
    }
    let plain = house.post("/v1/sessions", "text/plain", b"{}").await;
    assert_eq!((plain.status, plain.code()), (415, "wrong_content_type".into()));

    let session = house.begin().await;
    let id = session["id"].as_str().unwrap();
    let at = format!("/v1/sessions/{id}");
    assert_eq!(session["token"].as_str().unwrap().len(), 64);
    assert_eq!(session["urls"]["whep"], format!("{at}/whep"));
    let full = house.json("POST", "/v1/sessions", json!({})).await;
    assert_eq!((full.status, full.code(), full.header("retry-after")), (503, "full".into(), "5"));
    let list = house.get("/v1/sessions").await.json();
    assert_eq!(list["sessions"][0]["id"], *id);
    let one = house.get(&at).await;
    assert_eq!((one.status, &one.json()["presenter"]), (200, &json!("card")));
    assert!(!one.text().contains("token"), "a token is told once");
    let changed = house.json("PATCH", &at, json!({"prompt": "smile"})).await;
    assert_eq!((changed.status, changed.code()), (422, "no_prompt".into()));
    let nobody = house.json("PATCH", &at, json!({"presenter": "nobody", "background": "green"})).await;
    assert_eq!((nobody.status, nobody.code()), (404, "no_such_presenter".into()));
    let changed = house.json("PATCH", &at, json!({"presenter": "card"})).await;
    assert_eq!((changed.status, &changed.json()["presenter"]), (200, &json!("card")), "{}", changed.text());
    assert_eq!(house.json("PATCH", &at, json!({})).await.status, 200);

    // Its media and speech need its token.
    let interrupt = format!("{at}/interrupt");
    let none = house.ask("POST", &interrupt, &[], b"").await;
    assert_eq!((none.status, none.code(), none.header("www-authenticate")), (401, "no_token".into(), "Bearer"));
    let wrong = house.ask("POST", &interrupt, &[("Authorization", "Bearer 123")], b"").await;
    assert_eq!((wrong.status, wrong.code()), (401, "wrong_token".into()));
    let token = session["token"].as_str().unwrap();
    let good = format!("bearer {token}");
    assert_eq!(house.ask("POST", &interrupt, &[("Authorization", &good)], b"").await.status, 204);
    assert_eq!(house.ask("POST", &format!("{interrupt}?token={token}"), &[], b"").await.status, 204);
    // A new token makes the old one worthless.
    let newer = house.json("POST", &format!("{at}/token"), json!({})).await;
    assert_eq!(newer.status, 201);
    assert_eq!(house.ask("POST", &interrupt, &[("Authorization", &good)], b"").await.code(), "wrong_token");
    let not = house.get(newer.json()["urls"]["websocket"].as_str().unwrap()).await;
    assert_eq!((not.status, not.code()), (426, "no_websocket".into()));

    assert_eq!(house.ask("DELETE", &at, &[], b"").await.status, 204);
    let gone = house.get(&at).await;
    assert!(gone.status == 410 && gone.code() == "stopped", "{}", gone.text());
    assert_eq!(house.get("/v1/sessions/0123").await.status, 404);
    // Its place is free.
    let again = house.begin().await;
    assert_ne!(again["id"], session["id"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_expires() {
    let house = house(|c| c.session_token_ttl_s = 1).await;
    let session = house.begin().await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let path = format!("/v1/sessions/{}/interrupt", session["id"].as_str().unwrap());
    let path = format!("{path}?token={}", session["token"].as_str().unwrap());
    assert_eq!(house.ask("POST", &path, &[], b"").await.code(), "expired_token");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_speaks_over_a_websocket_and_interrupts_itself() {
    let house = house(|_| {}).await;
    let session = house.begin().await;
    let mut socket = house.socket(&session).await;
    assert!(socket.hear("state").await["state"].is_string());
    // What is not understood is answered, and the connection stays.
    socket.sound(20).await;
    assert_eq!(socket.hear("error").await["code"], "no_rate");
    for (text, code) in [
        ("no json", "wrong_message"),
        ("{\"type\":\"dance\"}", "wrong_message"),
        ("{\"type\":\"set\",\"rate\":7}", "wrong_rate"),
        ("{\"type\":\"set\"}", "wrong_message"),
    ] {
        socket.0.send(Message::text(text)).await.unwrap();
        assert_eq!(socket.hear("error").await["code"], code, "{text}");
    }
    socket.say(json!({"type": "set", "rate": 16_000})).await;
    socket.0.send(Message::binary(vec![0u8; 3])).await.unwrap();
    assert_eq!(socket.hear("error").await["code"], "odd_bytes");
    socket.say(json!({"type": "ping", "t": 7})).await;
    assert_eq!(socket.hear("pong").await["t"], 7);
    // Spoken to its end.
    socket.sound(600).await;
    socket.say(json!({"type": "speak_end"})).await;
    let first = socket.hear("speak_started").await["segment"].clone();
    let ended = socket.hear("speak_ended").await;
    assert_eq!((&ended["segment"], &ended["interrupted"]), (&first, &json!(false)));
    assert!((ended["position"].as_f64().unwrap() - 0.6).abs() < 0.012, "{ended}");
    // Ten seconds at once, cut off soon; the next words are heard.
    for _ in 0..10 {
        socket.sound(1000).await;
    }
    socket.hear("speak_started").await;
    let metrics = socket.hear("metrics").await;
    assert!(metrics["speech_buffered_ms"].as_f64().unwrap() > 5000.0, "{metrics}");
    let cut = Instant::now();
    socket.say(json!({"type": "interrupt"})).await;
    socket.sound(200).await;
    socket.say(json!({"type": "speak_end"})).await;
    let ended = socket.hear("speak_ended").await;
    assert_eq!(ended["interrupted"], true);
    assert!(cut.elapsed() < Duration::from_secs(1) && ended["position"].as_f64().unwrap() < 4.0, "{ended}");
    socket.hear("speak_started").await;
    assert_eq!(socket.hear("speak_ended").await["interrupted"], false);
    let metrics = house.get("/metrics").await.text();
    // The counters are the process's, which other tests share.
    let count = |name: &str| metrics.lines().find_map(|l| l.strip_prefix(name)?.trim().parse::<f64>().ok());
    assert!(count("loquent_interruptions_total ").is_some(), "{metrics}");
    assert!(count("loquent_websockets ").is_some_and(|n| n >= 1.0), "{metrics}");
    // The end says why.
    let at = format!("/v1/sessions/{}", session["id"].as_str().unwrap());
    assert_eq!(house.ask("DELETE", &at, &[], b"").await.status, 204);
    assert_eq!(socket.hear("closed").await["reason"], "stopped");
    assert_eq!(socket.code().await, CloseCode::Normal);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_websocket_that_misbehaves_is_closed_and_an_overfed_one_waits() {
    let house = house(|_| {}).await;
    let session = house.begin().await;
    let mut socket = house.socket(&session).await;
    for _ in 0..100 {
        socket.0.send(Message::text("?")).await.unwrap();
    }
    assert_eq!(socket.code().await, CloseCode::Policy);
    let mut socket = house.socket(&session).await;
    let _ = socket.0.send(Message::binary(vec![0u8; (1 << 20) + 2])).await;
    assert_eq!(socket.code().await, CloseCode::Size);
    // Far more than is buffered: the socket stops taking, and nothing grows.
    let mut socket = house.socket(&session).await;
    socket.say(json!({"type": "set", "rate": 8000})).await;
    let flood = async {
        for _ in 0..400 {
            socket.0.send(Message::binary(vec![0u8; 256 * 1024])).await.unwrap();
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(3), flood).await.is_err(), "100 MB were taken");
    let one = house.get(&format!("/v1/sessions/{}", session["id"].as_str().unwrap())).await.json();
    let buffered = one["speech_buffered_ms"].as_f64().unwrap();
    assert!((50_000.0..61_000.0).contains(&buffered), "{one}");
    assert_eq!(house.get("/healthz").await.status, 200);
}

/// Every route of the router is in the document with its methods, and the other way round.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_openapi_document_and_the_router_say_the_same() {
    let house = house(|_| {}).await;
    let document = house.get("/v1/openapi.json").await.json();
    assert_eq!(document["openapi"], "3.1.0");
    let routes = crate::access::of_the_router();
    let documented: Vec<&String> = document["paths"].as_object().unwrap().keys().collect();
    assert!(routes.len() > 10);
    for path in &documented {
        assert!(routes.contains(path), "{path} is documented and is no route");
    }
    for route in routes {
        let Some(item) = document["paths"].get(&route) else { panic!("{route} is not in src/server/openapi.rs") };
        // A method that nothing has: the answer lists those that there are.
        let concrete: Vec<&str> = route.split('/').map(|p| if p.starts_with('{') { "x" } else { p }).collect();
        let refused = house.ask("TRACE", &concrete.join("/"), &[], b"").await;
        assert_eq!(refused.status, 405, "{route}");
        let mut real: Vec<String> =
            refused.header("allow").split(',').map(|m| m.trim().to_ascii_lowercase()).filter(|m| m != "head").collect();
        let mut told: Vec<String> =
            item.as_object().unwrap().keys().filter(|k| *k != "parameters" && *k != "head").cloned().collect();
        real.sort();
        told.sort();
        assert_eq!(real, told, "{route}");
    }
}

/// The test card as an engine that can everything; it remembers with what it opened the last face.
struct Watched(Box<dyn Generator>, Arc<Mutex<Option<OpenOptions>>>);

impl Generator for Watched {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities { direction: true, prompt: true, design: true }
    }
    fn open(&mut self, portrait: &Portrait, options: &OpenOptions) -> avatar::Result<Box<dyn Stream>> {
        *self.1.lock().unwrap() = Some(options.clone());
        self.0.open(portrait, options)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gestures_and_liveliness_reach_the_face() {
    let seen = Arc::new(Mutex::new(None));
    let kept = seen.clone();
    let mut all = settings();
    all.engine.liveliness = 0.4;
    // The first face that is opened is the session's.
    all.engine.warm_up_blocks = 0;
    let house = house_from(all, move || Ok(Box::new(Watched(avatar::test_card(), kept.clone())))).await;
    let session = house.begin().await;
    let direction = async || loop {
        match seen.lock().unwrap().clone() {
            Some(options) => return options.direction,
            None => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    let direction: Direction = tokio::time::timeout(Duration::from_secs(5), direction()).await.unwrap();
    assert_eq!(direction.liveliness(), 0.4, "as configured");
    direction.take();

    let (id, token) = (session["id"].as_str().unwrap(), session["token"].as_str().unwrap());
    let (at, path) = (format!("/v1/sessions/{id}"), format!("/v1/sessions/{id}/gesture?token={token}"));
    let nod = house.json("POST", &path, json!({"gesture": "nod"})).await;
    assert_eq!(nod.status, 202, "{}", nod.text());
    let left = json!({"gesture": "look_left", "strength": 0.5, "seconds": 7});
    assert_eq!(house.json("POST", &path, left).await.status, 202);
    let given = direction.take();
    assert_eq!((given[0].act, given[1].act, given[1].strength, given[1].seconds), (Act::Nod, Act::LookLeft, 0.5, 7.0));
    for (body, status, code) in [
        (json!({"gesture": "dance"}), 422, "no_such_gesture"),
        (json!({"gesture": "nod", "strength": 2}), 422, "wrong_strength"),
        (json!({"gesture": "nod", "seconds": 1e9}), 422, "wrong_seconds"),
        (json!({"gesture": "nod", "why": 1}), 400, "wrong_json"),
        (json!({}), 400, "wrong_json"),
    ] {
        let refused = house.json("POST", &path, body.clone()).await;
        assert_eq!((refused.status, refused.code()), (status, code.into()), "{body}");
    }
    let mut full = 0;
    while house.json("POST", &path, json!({"gesture": "smile"})).await.status == 202 {
        full += 1;
        assert!(full < 100, "the queue of gestures has no end");
    }
    assert_eq!(house.json("POST", &path, json!({"gesture": "smile"})).await.code(), "too_many_gestures");
    direction.take();

    assert_eq!(house.json("PATCH", &at, json!({"liveliness": 1.5})).await.status, 200);
    assert_eq!(direction.liveliness(), 1.5);
    assert_eq!(house.json("PATCH", &at, json!({"liveliness": 3})).await.code(), "wrong_liveliness");
    let mut socket = house.socket(&session).await;
    socket.say(json!({"type": "gesture", "gesture": "shake"})).await;
    socket.say(json!({"type": "set", "liveliness": 0})).await;
    socket.say(json!({"type": "gesture", "gesture": "fly"})).await;
    assert_eq!(socket.hear("error").await["code"], "no_such_gesture");
    assert_eq!((direction.take()[0].act, direction.liveliness()), (Act::Shake, 0.0));
    socket.say(json!({"type": "set"})).await;
    assert_eq!(socket.hear("error").await["code"], "wrong_message");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_takes_no_gestures_says_so() {
    let house = house(|_| {}).await;
    let session = house.begin().await;
    let (id, token) = (session["id"].as_str().unwrap(), session["token"].as_str().unwrap());
    let path = format!("/v1/sessions/{id}/gesture?token={token}");
    assert_eq!(house.json("POST", &path, json!({"gesture": "nod"})).await.code(), "no_gestures");
    let mut socket = house.socket(&session).await;
    socket.say(json!({"type": "gesture", "gesture": "nod"})).await;
    assert_eq!(socket.hear("error").await["code"], "no_gestures");
}

/// Prompts and nearest looks, too, are a matter of what the generator says, not of what it is called.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_engine_can_is_told_by_its_generator() {
    let seen = Arc::new(Mutex::new(None));
    let kept = seen.clone();
    let able = house_from(settings(), move || Ok(Box::new(Watched(avatar::test_card(), kept.clone())))).await;
    let plain = house(|_| {}).await;
    let (path, card) = ("/v1/portraits?consent=test", include_bytes!("../../web/card.png"));
    let like = able.post(path, "image/png", card).await.json()["nearest"].clone();
    assert!(like.as_str().is_some_and(|look| look.starts_with("design:")), "{like}");
    assert!(plain.post(path, "image/png", card).await.json()["nearest"].is_null());

    let begun = able.json("POST", "/v1/sessions", json!({"prompt": "smile"})).await;
    assert_eq!(begun.status, 201, "{}", begun.text());
    let heard = async || {
        while seen.lock().unwrap().as_ref().is_none_or(|o: &OpenOptions| o.prompt.as_deref() != Some("smile")) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), heard()).await.expect("the prompt does not reach the face");
}
