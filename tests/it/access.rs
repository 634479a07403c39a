//! Who is let in, and how much of it anybody gets: keys, tokens, origins, limits, over real sockets.

use crate::{
    server::{Answer, House, SDP, house, house_from, offer, settings},
    session_loop::Recorder,
};
use loquent::{
    avatar,
    config::Config,
    server::{Key, Scope, Visitors},
    session::{SessionId, SinkRole},
};
use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader, Read, Write},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

fn key(scope: Scope, limits: &[&str]) -> (String, String) {
    let limits: Vec<String> = limits.iter().map(|l| l.to_string()).collect();
    let (key, secret) = Key::generate("test", &[scope], &limits).unwrap();
    (key.to_string(), secret)
}

/// A house that knows these keys, with so many places.
async fn guarded(keys: &[String], places: usize, change: impl FnOnce(&mut Config)) -> House {
    let mut all = settings();
    all.server.keys = keys.to_vec();
    all.engine.sessions = places;
    change(&mut all);
    house_from(all, || Ok(avatar::test_card())).await
}

async fn with(house: &House, method: &str, path: &str, secret: Option<&str>) -> Answer {
    let bearer = secret.map(|s| format!("Bearer {s}"));
    let headers: Vec<(&str, &str)> = bearer.iter().map(|b| ("Authorization", b.as_str())).collect();
    house.ask(method, path, &headers, b"").await
}

async fn begin(house: &House, secret: &str) -> Value {
    let bearer = format!("Bearer {secret}");
    let headers = [("Content-Type", "application/json"), ("Authorization", bearer.as_str())];
    let begun = house.ask("POST", "/v1/sessions", &headers, b"{}").await;
    assert_eq!(begun.status, 201, "{}", begun.text());
    begun.json()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Needs {
    Nothing,
    Live,
    Control,
    Metrics,
    Token,
    /// The connection's own address.
    Address,
}

/// What every route needs for its methods other than `OPTIONS`. A route that is not here fails the test.
const ROWS: &[(&str, Needs)] = &[
    ("/", Needs::Nothing),
    ("/{file}", Needs::Nothing),
    ("/v1/info", Needs::Nothing),
    ("/v1/openapi.json", Needs::Nothing),
    ("/v1/live", Needs::Live),
    ("/v1/live/{id}", Needs::Address),
    ("/v1/sessions", Needs::Control),
    ("/v1/sessions/{id}", Needs::Control),
    ("/v1/sessions/{id}/token", Needs::Control),
    ("/v1/sessions/{id}/interrupt", Needs::Token),
    ("/v1/sessions/{id}/gesture", Needs::Token),
    ("/v1/sessions/{id}/live", Needs::Token),
    ("/v1/sessions/{id}/ws", Needs::Token),
    ("/v1/sessions/{id}/whip", Needs::Token),
    ("/v1/sessions/{id}/whep", Needs::Token),
    ("/v1/sessions/{id}/whip/{connection}", Needs::Address),
    ("/v1/sessions/{id}/whep/{connection}", Needs::Address),
    ("/whip/{id}", Needs::Nothing),
    ("/whep/{id}", Needs::Nothing),
    ("/v1/sessions/{id}/publish", Needs::Token),
    ("/v1/sessions/{id}/publish/{publication}", Needs::Token),
    ("/v1/sessions/{id}/say", Needs::Token),
    ("/v1/sessions/{id}/recording", Needs::Token),
    ("/v1/sessions/{id}/recording/{file}", Needs::Token),
    ("/v1/recordings", Needs::Control),
    ("/v1/recordings/{file}", Needs::Control),
    ("/v1/livekit", Needs::Control),
    ("/v1/livekit/v1/sessions", Needs::Control),
    ("/v1/livekit/v1/session", Needs::Control),
    ("/v1/session", Needs::Control),
    ("/v1/presenters", Needs::Nothing),
    ("/v1/presenters/{file}", Needs::Nothing),
    ("/v1/design", Needs::Nothing),
    ("/v1/design/{file}", Needs::Nothing),
    ("/v1/portraits", Needs::Live),
    ("/healthz", Needs::Nothing),
    ("/readyz", Needs::Nothing),
    ("/metrics", Needs::Metrics),
    ("/v1/status", Needs::Metrics),
];

/// The routes of the router itself.
pub(crate) fn of_the_router() -> Vec<String> {
    let source = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/src/server/mod.rs")).unwrap();
    let paths =
        source.split(".route(").skip(1).map(|r| r.trim_start().trim_start_matches('"').split('"').next().unwrap());
    paths.map(String::from).collect()
}

/// Each with its methods.
async fn routes() -> Vec<(String, Vec<String>)> {
    let open = house(|_| {}).await;
    let mut all = Vec::new();
    for path in of_the_router() {
        let concrete: Vec<&str> = path.split('/').map(|p| if p.starts_with('{') { "x" } else { p }).collect();
        let refused = open.ask("TRACE", &concrete.join("/"), &[], b"").await;
        let methods =
            refused.header("allow").split(',').map(|m| m.trim().to_string()).filter(|m| m != "HEAD").collect();
        all.push((path, methods));
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_matrix_of_every_route_and_every_credential() {
    let [control, live, metrics, stale] =
        [Scope::Control, Scope::Live, Scope::Metrics, Scope::Control].map(|s| key(s, &[]));
    let keys = [&control, &live, &metrics].map(|k| k.0.clone());
    let films = std::env::temp_dir().join(format!("loquent-matrix-{}", std::process::id()));
    let house = guarded(&keys, 4, |c| {
        c.server.session_token_ttl_s = 2;
        c.server.recordings_dir = films.display().to_string();
    })
    .await;
    let mut sessions = Vec::new();
    for _ in 0..3 {
        sessions.push(begin(&house, &control.1).await);
    }
    let text = |v: &Value, name: &str| v[name].as_str().unwrap().to_string();
    let [mine, other, old] = [0, 1, 2].map(|i| text(&sessions[i], "id"));
    let expired = text(&sessions[2], "token");
    let bearer = format!("Bearer {}", live.1);
    let headers = [("Content-Type", SDP), ("Authorization", bearer.as_str())];
    let made = house.ask("POST", "/v1/live", &headers, offer().as_bytes()).await;
    assert_eq!(made.status, 201, "{}", made.text());
    let address = made.header("location").to_string();
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let fresh = async |id: &str| {
        let told = with(&house, "POST", &format!("/v1/sessions/{id}/token"), Some(&control.1)).await;
        told.json()["token"].as_str().unwrap().to_string()
    };

    println!("{:<45} {:>8} {:>8} {:>8} {:>8} {:>8}", "route", "none", "expired", "other's", "scope", "right");
    let mut all = routes().await;
    assert!(all.len() > 30, "the routes of src/server/mod.rs were not found");
    // What ends a session comes last.
    all.sort_by_key(|(path, _)| path == "/v1/sessions/{id}");
    for (route, methods) in all {
        let Some((_, needs)) = ROWS.iter().find(|r| r.0 == route) else { panic!("{route} has no row in this test") };
        for method in methods {
            let path = |id: &str| {
                let parts = route.split('/').map(|part| match part {
                    "{id}" => id,
                    part if part.starts_with('{') => "x",
                    part => part,
                });
                parts.collect::<Vec<_>>().join("/")
            };
            let looks = ["GET", "OPTIONS"].contains(&method.as_str());
            let offers = ["/live", "/whip", "/whep", "/v1/live"].iter().any(|end| route.ends_with(end));
            let needs = match needs {
                _ if method == "OPTIONS" => Needs::Nothing,
                // `GET` where offers are posted shows nothing.
                _ if offers && looks => Needs::Nothing,
                Needs::Address if looks => Needs::Nothing,
                needs => *needs,
            };
            let others_token = fresh(&other).await;
            let (past, wrong, right) = match needs {
                Needs::Token => (expired.clone(), control.1.clone(), fresh(&mine).await),
                Needs::Metrics => (stale.1.clone(), control.1.clone(), metrics.1.clone()),
                Needs::Live => (stale.1.clone(), metrics.1.clone(), live.1.clone()),
                _ => (stale.1.clone(), metrics.1.clone(), control.1.clone()),
            };
            let ask = async |path: &str, secret: Option<&str>| {
                let answer = with(&house, &method, path, secret).await;
                let code = (answer.status >= 400).then(|| answer.code()).unwrap_or_default();
                (answer.status, code)
            };
            let of_expired = if needs == Needs::Token { path(&old) } else { path(&mine) };
            let answers = [
                ask(&path(&mine), None).await,
                ask(&of_expired, Some(&past)).await,
                ask(&path(&mine), Some(&others_token)).await,
                ask(&path(&mine), Some(&wrong)).await,
                ask(&path(&mine), Some(&right)).await,
            ];
            let row = format!("{method} {route}");
            println!("{row:<45} {}", answers.iter().map(|a| format!("{:>8}", a.0)).collect::<Vec<_>>().join(" "));
            let said: Vec<(u16, &str)> = answers.iter().map(|a| (a.0, a.1.as_str())).collect();
            match needs {
                Needs::Nothing => assert!(said.iter().all(|a| ![401, 403].contains(&a.0)), "{row}: {said:?}"),
                Needs::Token => assert_eq!(
                    said[..4],
                    [(401, "no_token"), (401, "expired_token"), (401, "wrong_token"), (401, "wrong_token")],
                    "{row}"
                ),
                // No credential replaces the address.
                Needs::Address => assert!(said.iter().all(|a| *a == (404, "no_such_session")), "{row}: {said:?}"),
                _ => assert_eq!(
                    said[..4],
                    [(401, "no_key"), (401, "wrong_key"), (401, "wrong_key"), (403, "wrong_scope")],
                    "{row}"
                ),
            }
            let last = said[4];
            assert!(![401, 403, 500].contains(&last.0), "{row}: {last:?}");
        }
    }
    // The right address needs nothing else.
    assert_eq!(with(&house, "PATCH", &address, None).await.status, 415);
    assert_eq!(with(&house, "DELETE", &address, None).await.status, 200);
    let ended = house.service.session(&SessionId::from(mine.as_str()));
    assert!(ended.is_none(), "the last row ended it");
    let _ = std::fs::remove_dir_all(films);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_sites_and_other_names_are_turned_away() {
    let open = house(|c| c.cors_origins = vec!["https://app.example".into()]).await;
    let json = ("Content-Type", "application/json");
    let asks = async |headers: &[(&str, &str)]| open.ask("PATCH", "/v1/sessions/x", headers, b"{}").await;
    for origin in ["https://evil.example", "null", "http://localhost:1"] {
        let answer = asks(&[json, ("Origin", origin)]).await;
        assert_eq!((answer.status, answer.code()), (403, "origin_not_allowed".into()), "{origin}");
    }
    for origin in ["https://app.example", "http://localhost", "https://localhost:443", "HTTP://LOCALHOST:80"] {
        assert_eq!(asks(&[json, ("Origin", origin)]).await.status, 404, "{origin}");
    }
    let socket = [("Origin", "https://evil.example"), ("Upgrade", "websocket"), ("Connection", "Upgrade")];
    assert_eq!(open.ask("GET", "/v1/sessions/x/ws", &socket, b"").await.code(), "origin_not_allowed");
    // A name that somebody else gave this address: DNS rebinding, or a proxy for the whole world.
    for (host, status) in
        [("evil.example:80", 421), ("127.0.0.1.evil.example", 421), ("[::1]:80", 200), ("127.0.0.1", 200)]
    {
        let mut socket = std::net::TcpStream::connect(open.address).unwrap();
        write!(socket, "GET /healthz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        socket.read_to_string(&mut text).unwrap();
        assert!(text.starts_with(&format!("HTTP/1.1 {status}")), "{host}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn addresses_and_keys_have_their_limits() {
    let control = key(Scope::Control, &["sessions=2", "max_session_s=60"]);
    let house = guarded(&[control.0.clone()], 8, |c| {
        c.server.visitors = Visitors::Anyone;
        c.server.sessions_per_address = 1;
        c.server.requests_per_second = 2;
    })
    .await;
    let talk = async |address: &str| {
        house.ask("POST", "/v1/live", &[("Content-Type", SDP), ("X-Forwarded-For", address)], offer().as_bytes()).await
    };
    // One conversation for each address, and its place comes back.
    let first = talk("203.0.113.1").await;
    assert_eq!(first.status, 201, "{}", first.text());
    let second = talk("203.0.113.1").await;
    assert_eq!((second.status, second.code()), (429, "too_many_sessions".into()));
    assert!(second.header("retry-after").parse::<u64>().unwrap() >= 1);
    assert_eq!(talk("203.0.113.2").await.status, 201);
    assert_eq!(house.ask("DELETE", first.header("location"), &[], b"").await.status, 200);
    let began = Instant::now();
    while talk("203.0.113.1").await.status != 201 {
        assert!(began.elapsed() < Duration::from_secs(10), "the ticket did not come back");
        tokio::time::sleep(Duration::from_millis(600)).await;
    }
    // A key's own limits, whatever the address.
    let (one, _two) = (begin(&house, &control.1).await, begin(&house, &control.1).await);
    let bearer = format!("Bearer {}", control.1);
    let headers = [("Content-Type", "application/json"), ("Authorization", bearer.as_str())];
    let third = house.ask("POST", "/v1/sessions", &headers, b"{}").await;
    assert_eq!((third.status, third.code()), (429, "too_many_sessions".into()));
    let at = format!("/v1/sessions/{}", one["id"].as_str().unwrap());
    assert_eq!(with(&house, "DELETE", &at, Some(&control.1)).await.status, 204);
    let long = house.ask("POST", "/v1/sessions", &headers, br#"{"limits":{"max_session_s":61}}"#).await;
    assert_eq!((long.status, long.code()), (422, "limit_too_high".into()));
    // Requests: twenty at once, then two a second; others are not concerned.
    let look = async |address: &str| house.ask("GET", "/healthz", &[("X-Forwarded-For", address)], b"").await;
    let mut refused = None;
    for _ in 0..40 {
        let answer = look("203.0.113.9").await;
        if answer.status == 429 {
            refused = Some(answer);
            break;
        }
    }
    let refused = refused.expect("forty at once are too many");
    assert_eq!((refused.code(), refused.header("retry-after")), ("too_many".into(), "1"));
    assert_eq!(look("203.0.113.10").await.status, 200);
    // Guessing keys is slow, and counted.
    let mut codes = Vec::new();
    for i in 0..22 {
        let address = format!("2001:db8::{i}");
        let headers = [("Authorization", "Bearer lq_00000000_guess"), ("X-Forwarded-For", address.as_str())];
        codes.push(house.ask("GET", "/v1/recordings", &headers, b"").await.status);
    }
    assert!(codes[..10].iter().all(|c| *c == 401) && codes.contains(&429), "{codes:?}");
}

/// 20 clients at once against 2 places: two get all of it, eighteen are told so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_at_two_places() {
    let mut all = settings();
    all.engine.sessions = 2;
    let house = Arc::new(house_from(all, || Ok(avatar::test_card())).await);
    let clients: Vec<_> = (0..20)
        .map(|_| {
            let house = house.clone();
            tokio::spawn(async move {
                let began = Instant::now();
                let answer = house.json("POST", "/v1/sessions", json!({})).await;
                (answer, began.elapsed())
            })
        })
        .collect();
    let (mut inside, mut slowest) = (Vec::new(), Duration::ZERO);
    for client in clients {
        let (answer, took) = client.await.unwrap();
        match answer.status {
            201 => inside.push(answer.json()),
            _ => {
                assert_eq!((answer.status, answer.code(), answer.header("retry-after")), (503, "full".into(), "5"));
                slowest = slowest.max(took);
            }
        }
    }
    println!("18 refused, the slowest after {slowest:?}");
    assert_eq!(inside.len(), 2);
    let mut watched = Vec::new();
    for session in &inside {
        let handle = house.service.session(&SessionId::from(session["id"].as_str().unwrap())).unwrap();
        let sink = Arc::new(Recorder::default());
        let place = handle.attach(sink.clone(), SinkRole::Viewer);
        let mut socket = house.socket(session).await;
        socket.say(json!({"type": "set", "rate": 16_000})).await;
        socket.sound(1500).await;
        socket.say(json!({"type": "speak_end"})).await;
        watched.push((handle, sink, place, socket));
    }
    // More of them come meanwhile, and nobody inside notices.
    for _ in 0..20 {
        assert_eq!(house.json("POST", "/v1/sessions", json!({})).await.status, 503);
    }
    for (handle, sink, _place, socket) in &mut watched {
        let ended = socket.hear("speak_ended").await;
        assert!((ended["position"].as_f64().unwrap() - 1.5).abs() < 0.02 && ended["interrupted"] == false, "{ended}");
        let metrics = handle.snapshot().metrics;
        println!(
            "{} pictures sent, {} held, {} skipped",
            metrics.frames_sent, metrics.frames_held, metrics.frames_skipped
        );
        let videos = sink.videos.lock().unwrap();
        // Each picture has its own time, and none is missing between the first and the last but those that were counted
        // because the machine had other things to do.
        let times: Vec<i64> = videos.iter().map(|v| (v.0.at.as_millis_f64() / 40.0).round() as i64).collect();
        assert!(times.len() > 25, "{}", times.len());
        let gaps = times.windows(2).filter(|t| t[1] - t[0] != 1).count();
        let counted = (metrics.frames_held + metrics.frames_skipped) as usize;
        assert!(gaps <= 2 + counted, "{gaps} gaps in {} pictures, {counted} counted", times.len());
        let voices = sink.audios.lock().unwrap();
        assert!(voices.windows(2).all(|v| (v[1].0.at - v[0].0.at).as_millis_f64() == 20.0), "the voice has a gap");
    }
}

/// The program in a folder of its own; ends when dropped.
pub(crate) struct Program {
    pub(crate) child: Child,
    pub(crate) address: String,
    pub(crate) folder: PathBuf,
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

pub(crate) fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("loquent-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

impl Program {
    /// Serves the test card. `before`: what a shell does first; `log` in the folder gets its standard error.
    pub(crate) fn start(name: &str, before: &str, more: &[&str]) -> Program {
        let folder = folder(name);
        let mut child = Command::new("sh")
            .args(["-c", &format!("{before} exec \"$@\""), "sh", env!("CARGO_BIN_EXE_loquent")])
            .args(["serve", "--engine", "card", "--listen", "127.0.0.1:0", "--stop-after", "120"])
            .args(more)
            .env("LOQUENT__NET__BIND", "127.0.0.1")
            .current_dir(&folder)
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(folder.join("log")).unwrap())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let line = lines.into_iter().find(|l| l.starts_with("Open http")).expect("the address to open is printed");
        let address = line.split('/').nth(2).unwrap().to_string();
        Program { child, address, folder }
    }

    pub(crate) fn ask(&self, method: &str, path: &str, more: &str) -> String {
        let mut socket = std::net::TcpStream::connect(&self.address).unwrap();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{more}\r\n");
        socket.write_all(head.as_bytes()).unwrap();
        let mut text = String::new();
        socket.read_to_string(&mut text).unwrap();
        text
    }

    /// An empty object in, an object out.
    pub(crate) fn json(&self, method: &str, path: &str, more: &str) -> Value {
        let body = "Content-Type: application/json\r\nContent-Length: 2\r\n";
        let answer = self.ask(method, path, &format!("{more}{body}\r\n{{}}"));
        let text = answer.split("\r\n\r\n").nth(1).unwrap_or_default();
        serde_json::from_str(text).unwrap_or_else(|e| panic!("no JSON ({e}): {answer}"))
    }

    pub(crate) fn signal(&self, signal: &str) {
        let told = Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap();
        assert!(told.success());
    }

    fn status(&self, key: &str) -> String {
        self.ask("GET", "/v1/sessions", &format!("Authorization: Bearer {key}\r\n")).chars().skip(9).take(3).collect()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).unwrap()
    }
}

fn new_key(folder: &std::path::Path, name: &str) -> String {
    let made = Command::new(env!("CARGO_BIN_EXE_loquent"))
        .args(["key", "new", name, "--file", "keys"])
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    String::from_utf8(made.stdout).unwrap().trim().to_string()
}

/// As an operator does it: no key, no address for others; a key; a second one, the first taken back; no restart.
#[test]
fn keys_are_made_listed_and_rotated_while_it_runs_and_no_secret_is_logged() {
    let folder = folder("rotation");
    let remote = Command::new(env!("CARGO_BIN_EXE_loquent"))
        .args(["serve", "--engine", "card", "--listen", "0.0.0.0:0"])
        .current_dir(&folder)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&remote.stderr);
    assert!(!remote.status.success() && said.contains("loquent key new") && said.contains("0.0.0.0:0"), "{said}");

    let first = new_key(&folder, "first");
    let file = std::fs::read_to_string(folder.join("keys")).unwrap();
    assert!(!file.contains(&first[12..]), "the file keeps the hash alone");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(folder.join("keys")).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let program = Program::start("rotation", "", &["--keys-file", "keys", "--set", "log.filter=trace"]);
    assert_eq!(program.status(&first), "200");
    let second = new_key(&program.folder, "second");
    let listed = Command::new(env!("CARGO_BIN_EXE_loquent"))
        .args(["key", "list", "--file", "keys"])
        .current_dir(&program.folder)
        .output()
        .unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert!(listed.contains("first") && listed.contains("second") && !listed.contains(&second), "{listed}");
    let becomes = |key: &str, status: &str| {
        let began = Instant::now();
        while program.status(key) != status {
            assert!(began.elapsed() < Duration::from_secs(10), "{key} is not {status}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    program.signal("-HUP");
    becomes(&second, "200");
    assert_eq!(program.status(&first), "200", "both count while callers move");
    let file = std::fs::read_to_string(program.folder.join("keys")).unwrap();
    let kept: Vec<&str> = file.lines().filter(|l| !l.contains(" first ")).collect();
    std::fs::write(program.folder.join("keys"), kept.join("\n")).unwrap();
    // Also without a signal.
    becomes(&first, "401");
    assert_eq!(program.status(&second), "200");
    // A session begun and used, its token in a header and in an address; then the log is searched.
    let told = program.json("POST", "/v1/sessions", &format!("Authorization: Bearer {second}\r\n"));
    let (id, token) = (told["id"].as_str().unwrap(), told["token"].as_str().unwrap());
    let path = format!("/v1/sessions/{id}/interrupt");
    assert!(program.ask("POST", &format!("{path}?token={token}"), "").starts_with("HTTP/1.1 204"));
    assert!(program.ask("POST", &path, &format!("Authorization: Bearer {token}\r\n")).starts_with("HTTP/1.1 204"));
    let log = program.log();
    assert!(log.contains(&id[..8]), "the log tells of the session");
    for secret in [&first[12..], &second[12..], token, id] {
        assert!(
            !log.contains(secret),
            "a secret stands in the log: {}",
            log.lines().find(|l| l.contains(secret)).unwrap()
        );
    }
}
