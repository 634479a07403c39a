//! Text to sound: a real program, and a small server that stands in for a speech endpoint.

use loquent::voice::{Config, Kind, Voice, VoiceError};
use std::{
    io::{Read, Write},
    net::TcpListener,
    time::{Duration, Instant},
};

async fn say(voice: &Voice, text: &str) -> Result<Vec<(u32, usize)>, VoiceError> {
    let mut speech = voice.speak(text)?;
    let mut got = Vec::new();
    while let Some(piece) = speech.next().await {
        let piece = piece?;
        got.push((piece.rate, piece.samples.len()));
    }
    Ok(got)
}

fn command(words: &[&str]) -> Voice {
    let command = words.iter().map(|w| w.to_string()).collect();
    Voice::new(Config { kind: Kind::Command, command, patience_s: 5, ..Config::default() }, None).unwrap()
}

#[tokio::test]
async fn a_program_speaks_and_hostile_text_is_only_text() {
    let voice = command(&["espeak-ng", "--stdin", "--stdout"]);
    let got = say(&voice, "Good morning. This is the second sentence.").await.unwrap();
    let seconds: f64 = got.iter().map(|(rate, n)| *n as f64 / f64::from(*rate)).sum();
    assert!((1.5..8.0).contains(&seconds) && got.iter().all(|g| g.0 == 22_050), "{seconds} s: {got:?}");
    let hostile = "$(touch /tmp/loquent-was-here) `id`; --help -w /tmp/loquent-was-here.wav \0 \u{202e}";
    say(&voice, hostile).await.unwrap();
    assert!(!std::path::Path::new("/tmp/loquent-was-here").exists());
    assert!(!std::path::Path::new("/tmp/loquent-was-here.wav").exists());
}

#[tokio::test]
async fn what_goes_wrong_with_a_program_is_told_and_stops_in_time() {
    for (words, word) in [
        (&["no-such-program-at-all"][..], "cannot be started"),
        (&["sh", "-c", "echo broken >&2; exit 3"], "broken"),
        (&["sh", "-c", "cat > /dev/null"], "without any"),
        (&["sh", "-c", "echo '{\"error\": 1}'"], "text instead of sound"),
    ] {
        let said = say(&command(words), "Hello.").await.unwrap_err().to_string();
        assert!(said.contains(word), "{words:?}: {said}");
    }
    let began = Instant::now();
    let slow = Config {
        kind: Kind::Command,
        command: ["sleep", "60"].map(String::from).into(),
        patience_s: 1,
        ..Config::default()
    };
    let said = say(&Voice::new(slow, None).unwrap(), "Hello.").await.unwrap_err();
    assert!(matches!(said, VoiceError::TooSlow(_)) && began.elapsed() < Duration::from_secs(10), "{said}");
    for (text, word) in [("", "nothing"), (" … ", "nothing"), (&"a".repeat(10_001)[..], "10000")] {
        let said = command(&["true"]).speak(text).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(said.contains(word), "{said}");
    }
    let off = Voice::new(Config::default(), None).unwrap();
    assert!(matches!(off.speak("Hello."), Err(VoiceError::Off)));
}

#[tokio::test]
async fn dropping_the_speech_kills_the_program() {
    let mark = format!("86400.{}", std::process::id());
    let voice = command(&["sh", "-c", &format!("head -c 9600 /dev/zero; exec sleep {mark}")]);
    let mut speech = voice.speak("Hello.").unwrap();
    assert!(!speech.next().await.unwrap().unwrap().samples.is_empty());
    let running = || {
        let all =
            std::fs::read_dir("/proc").unwrap().filter_map(|p| std::fs::read(p.ok()?.path().join("cmdline")).ok());
        all.into_iter().any(|c| String::from_utf8_lossy(&c).replace('\0', " ").trim() == format!("sleep {mark}"))
    };
    let wait = async |what: bool| {
        for _ in 0..100 {
            if running() == what {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("running should be {what}");
    };
    wait(true).await;
    drop(speech);
    wait(false).await;
}

/// Answers requests one after the other; gives back what was asked.
fn endpoint(answers: Vec<Vec<u8>>) -> (String, std::thread::JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1/audio/speech", listener.local_addr().unwrap());
    let thread = std::thread::spawn(move || {
        answers
            .into_iter()
            .map(|answer| {
                let (mut stream, _) = listener.accept().unwrap();
                let (mut asked, mut piece) = (Vec::new(), [0; 4096]);
                while !String::from_utf8_lossy(&asked).contains("response_format") {
                    let n = stream.read(&mut piece).unwrap();
                    asked.extend(&piece[..n]);
                }
                // In two parts, cut in the middle of a sample.
                let middle = answer.len() - 401.min(answer.len() / 2);
                stream.write_all(&answer[..middle]).unwrap();
                std::thread::sleep(Duration::from_millis(20));
                stream.write_all(&answer[middle..]).unwrap();
                String::from_utf8_lossy(&asked).into()
            })
            .collect()
    });
    (url, thread)
}

fn answer(status: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

#[tokio::test]
async fn an_endpoint_is_asked_sentence_by_sentence_and_its_complaints_are_passed_on() {
    let sound = vec![7u8; 4800];
    let complaint = br#"{"error": {"message": "You exceeded your quota."}}"#;
    let (url, thread) =
        endpoint(vec![answer("200 OK", &sound), answer("200 OK", &sound), answer("429 Too Many Requests", complaint)]);
    let config = Config { kind: Kind::Endpoint, url, voice: "nova".into(), ..Config::default() };
    assert!(matches!(Voice::new(config.clone(), None), Err(VoiceError::NoKey(_))), "a key that is named must be there");
    let voice = Voice::new(config, Some("secret".into())).unwrap();
    let got = say(&voice, "One. Two, three.").await.unwrap();
    assert_eq!(got.iter().map(|g| g.1).sum::<usize>(), 4800);
    assert!(got.iter().all(|g| g.0 == 24_000));
    let said = say(&voice, "Four.").await.unwrap_err().to_string();
    assert!(said.contains("429") && said.contains("exceeded your quota"), "{said}");
    let asked = thread.join().unwrap();
    assert!(asked[0].to_lowercase().contains("authorization: bearer secret"), "{}", asked[0]);
    assert!(asked[0].contains(r#""input":"One.""#) && asked[0].contains(r#""voice":"nova""#), "{}", asked[0]);
    assert!(asked[1].contains(r#""input":"Two, three.""#), "{}", asked[1]);
    let gone = Config {
        kind: Kind::Endpoint,
        url: "http://127.0.0.1:9/".into(),
        key_variable: String::new(),
        ..Config::default()
    };
    let said = say(&Voice::new(gone, None).unwrap(), "Hello.").await.unwrap_err().to_string();
    assert!(said.contains("cannot be reached"), "{said}");
}
