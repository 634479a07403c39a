//! Text in: `say` over HTTP and over the WebSocket, by a real program and by a speech endpoint, interruptions included.

use crate::{
    server::{Answer, House, house, house_from, settings},
    sessions::Socket,
};
use loquent::{
    avatar,
    voice::{Config, Kind},
};
use serde_json::{Value, json};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

async fn speaking(voice: Config) -> House {
    house_from(loquent::config::Config { voice, ..settings() }, || Ok(avatar::test_card())).await
}

async fn say(house: &House, session: &Value, body: Value) -> Answer {
    let path =
        format!("{}/say?token={}", session["urls"]["session"].as_str().unwrap(), session["token"].as_str().unwrap());
    house.json("POST", &path, body).await
}

/// The end of this segment; others that end before it must have been cut off unheard.
async fn end_of(socket: &mut Socket, segment: &Value) -> Value {
    loop {
        let ended = socket.hear("speak_ended").await;
        if ended["segment"] == *segment {
            return ended;
        }
        assert!(ended["interrupted"] == true && seconds(&ended) == 0.0, "{ended}");
    }
}

fn seconds(ended: &Value) -> f64 {
    ended["position"].as_f64().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_speaks_texts_and_an_interruption_silences_those_that_wait_too() {
    let house = speaking(Config { kind: Kind::Command, ..Config::default() }).await;
    let session = house.begin().await;
    let mut socket = house.socket(&session).await;
    // Over HTTP: the answer comes with the first sound.
    let answer = say(&house, &session, json!({"text": "Good morning. This is the second sentence."})).await;
    let told = answer.json();
    assert_eq!((answer.status, &told["state"], &told["sentences"]), (200, &json!("speaking"), &json!(2)), "{told}");
    assert_eq!(socket.hear("speak_started").await["segment"], told["segment"]);
    let ended = socket.hear("speak_ended").await;
    assert_eq!((&ended["segment"], &ended["interrupted"]), (&told["segment"], &json!(false)));
    assert!((1.5..8.0).contains(&seconds(&ended)), "{ended}");
    // Over the WebSocket.
    socket.say(json!({"type": "say", "text": "Yes."})).await;
    socket.hear("speak_started").await;
    let ended = socket.hear("speak_ended").await;
    assert!(ended["interrupted"] == false && (0.2..3.0).contains(&seconds(&ended)), "{ended}");
    // A long one and one that waits behind it: both are cut off by one word.
    let long = "One two three four five six seven eight nine ten eleven twelve. ".repeat(4);
    socket.say(json!({"type": "say", "text": long})).await;
    let first = socket.hear("speak_started").await["segment"].clone();
    let waits = say(&house, &session, json!({"text": "This is never heard."})).await;
    // The program may be done with the first by now, for it is faster than speech; heard is one after the other.
    assert!([200, 202].contains(&waits.status), "{}", waits.text());
    tokio::time::sleep(Duration::from_millis(500)).await;
    let cut = Instant::now();
    socket.say(json!({"type": "interrupt"})).await;
    let ended = end_of(&mut socket, &first).await;
    assert!(ended["interrupted"] == true && seconds(&ended) < 3.0, "{ended}");
    assert!(cut.elapsed() < Duration::from_secs(1));
    // What comes now is the next that is heard.
    let answer = say(&house, &session, json!({"text": "And now this."})).await;
    assert!([200, 202].contains(&answer.status), "{}", answer.text());
    let begun = socket.hear("speak_started").await;
    if answer.status == 200 {
        assert_eq!(begun["segment"], answer.json()["segment"]);
    }
    // One that interrupts by itself.
    let answer = say(&house, &session, json!({"text": "Stop.", "interrupt": true})).await;
    assert_eq!(end_of(&mut socket, &begun["segment"]).await["interrupted"], true);
    let begun = socket.hear("speak_started").await;
    assert_eq!(end_of(&mut socket, &begun["segment"]).await["interrupted"], false);
    assert!(answer.status != 200 || answer.json()["segment"] == begun["segment"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_said_is_told_over_http_and_over_the_websocket() {
    let mute = house(|_| {}).await;
    let session = mute.begin().await;
    let refused = say(&mute, &session, json!({"text": "Hello."})).await;
    assert_eq!((refused.status, refused.code()), (403, "no_voice".into()));
    let mut socket = mute.socket(&session).await;
    socket.say(json!({"type": "say", "text": "Hello."})).await;
    assert_eq!(socket.hear("error").await["code"], "no_voice");

    let command = ["sh", "-c", "echo broken >&2; exit 3"].map(String::from).to_vec();
    let house = speaking(Config { kind: Kind::Command, command, longest_text: 50, ..Config::default() }).await;
    let session = house.begin().await;
    for (body, status, code) in [
        (json!({"text": "Hello."}), 502, "voice_failed"),
        (json!({"text": " … "}), 422, "no_text"),
        (json!({"text": "a".repeat(51)}), 413, "text_too_long"),
        (json!({"words": "Hello."}), 400, "wrong_json"),
    ] {
        let answer = say(&house, &session, body.clone()).await;
        assert_eq!((answer.status, answer.code()), (status, code.into()), "{body}");
    }
    let path = format!("{}/say", session["urls"]["session"].as_str().unwrap());
    assert_eq!(house.json("POST", &path, json!({"text": "Hello."})).await.code(), "no_token");
    let mut socket = house.socket(&session).await;
    socket.say(json!({"type": "say", "text": "Hello."})).await;
    let error = socket.hear("error").await;
    assert!(error["code"] == "voice_failed" && error["message"].as_str().unwrap().contains("broken"), "{error}");
}

/// A speech endpoint of OpenAI's shape. Every sentence is a second of tone, sent ten times as fast as it is heard; one
/// that begins with "Endless" never ends.
struct Endpoint {
    url: String,
    /// What was asked for, in order.
    asked: Arc<Mutex<Vec<Value>>>,
    /// Requests that were left before their end.
    left: Arc<AtomicUsize>,
}

async fn endpoint() -> Endpoint {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1/audio/speech", listener.local_addr().unwrap());
    let (asked, left) = (Arc::<Mutex<Vec<Value>>>::default(), Arc::<AtomicUsize>::default());
    let (all, gone) = (asked.clone(), left.clone());
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(answer(socket, all.clone(), gone.clone()));
        }
    });
    Endpoint { url, asked, left }
}

async fn answer(mut socket: TcpStream, asked: Arc<Mutex<Vec<Value>>>, left: Arc<AtomicUsize>) {
    let mut bytes = Vec::new();
    let wanted = loop {
        let mut piece = [0; 4096];
        let n = socket.read(&mut piece).await.unwrap();
        assert!(n > 0, "half a request");
        bytes.extend(&piece[..n]);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        if let Ok(wanted) = serde_json::from_str::<Value>(body) {
            assert!(
                head.starts_with("POST /v1/audio/speech ") && head.to_lowercase().contains("bearer secret"),
                "{head}"
            );
            break wanted;
        }
    };
    let input = wanted["input"].as_str().unwrap().to_string();
    asked.lock().unwrap().push(wanted);
    if input.starts_with("Refuse") {
        let body = r#"{"error": {"message": "You exceeded your quota."}}"#;
        let head = format!("HTTP/1.1 429 Too Many Requests\r\nContent-Length: {}\r\n\r\n", body.len());
        socket.write_all((head + body).as_bytes()).await.unwrap();
        return;
    }
    socket
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Type: audio/pcm\r\nTransfer-Encoding: chunked\r\n\r\n")
        .await
        .unwrap();
    let endless = input.starts_with("Endless");
    let mut chunks = 0;
    while endless || chunks < 10 {
        // A tenth of a second at 24 kHz.
        let tone = (0..2400).flat_map(|i| ((12_000.0 * (f64::from(i) * 0.13).sin()) as i16).to_le_bytes());
        let chunk = [&b"12c0\r\n"[..], &tone.collect::<Vec<u8>>(), b"\r\n"].concat();
        if socket.write_all(&chunk).await.is_err() {
            left.fetch_add(1, Ordering::SeqCst);
            return;
        }
        chunks += 1;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let _ = socket.write_all(b"0\r\n\r\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_speaks_sentence_by_sentence_and_is_left_when_interrupted() {
    let there = endpoint().await;
    let voice =
        Config { kind: Kind::Endpoint, url: there.url.clone(), voice: "nova".into(), queue: 2, ..Config::default() };
    let house = speaking(voice).await;
    let session = house.begin().await;
    let mut socket = house.socket(&session).await;
    let answer = say(&house, &session, json!({"text": "One. Two, three."})).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let ended = socket.hear("speak_ended").await;
    assert!(ended["interrupted"] == false && (seconds(&ended) - 2.0).abs() < 0.05, "{ended}");
    {
        let asked = there.asked.lock().unwrap();
        let inputs: Vec<_> = asked.iter().map(|a| a["input"].as_str().unwrap()).collect();
        assert_eq!(inputs, ["One.", "Two, three."]);
        assert!(asked.iter().all(|a| a["voice"] == "nova" && a["model"].is_string() && a["response_format"] == "pcm"));
    }
    // Cut off in the middle of a sentence: the request ends, the next sentence is never asked for.
    socket.say(json!({"type": "say", "text": "Endless words. Never asked for."})).await;
    socket.hear("speak_started").await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    socket.say(json!({"type": "interrupt"})).await;
    let ended = socket.hear("speak_ended").await;
    assert!(ended["interrupted"] == true && (0.2..1.5).contains(&seconds(&ended)), "{ended}");
    let began = Instant::now();
    while there.left.load(Ordering::SeqCst) == 0 {
        assert!(began.elapsed() < Duration::from_secs(5), "the endpoint still sends");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(there.asked.lock().unwrap().iter().all(|a| a["input"] != "Never asked for."));
    // Its complaints come through, and the next text is spoken all the same.
    let refused = say(&house, &session, json!({"text": "Refuse this."})).await;
    assert!(refused.code() == "voice_failed" && refused.text().contains("exceeded your quota"), "{}", refused.text());
    // One is spoken, two wait, a fourth is refused.
    let first = say(&house, &session, json!({"text": "Endless again."})).await;
    assert_eq!(first.status, 200, "{}", first.text());
    let rest = [
        say(&house, &session, json!({"text": "Second."})).await,
        say(&house, &session, json!({"text": "Third."})).await,
        say(&house, &session, json!({"text": "Fourth."})).await,
    ];
    assert_eq!(rest.each_ref().map(|a| a.status), [202, 202, 429]);
    assert_eq!(rest[2].code(), "too_many_texts");
}
