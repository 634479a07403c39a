//! Several nodes as one service, over Debian's nats-server: places, sessions found from anywhere, death, drain, silence.

use crate::{
    access::{Program, folder},
    server::{Answer, FRAGMENT, House, SDP, house_from, offer, settings},
    sessions::Socket,
};
use futures::StreamExt;
use loquent::{
    avatar,
    config::Config,
    server::{Key, Scope},
};
use serde_json::{Value, json};
use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const SECRET: &str = "a secret of all nodes, for tests only";

/// A NATS server of its own, ended when dropped.
pub(crate) struct Bus {
    child: Option<Child>,
    pub(crate) port: u16,
    /// Flags besides its address.
    flags: Vec<String>,
}

impl Bus {
    pub(crate) fn start() -> Bus {
        Bus::with(&[])
    }

    fn with(flags: &[&str]) -> Bus {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let flags = flags.iter().map(|f| f.to_string()).collect();
        let mut bus = Bus { child: None, port, flags };
        bus.up();
        bus
    }

    fn up(&mut self) {
        let program =
            ["/usr/sbin/nats-server", "/usr/bin/nats-server"].into_iter().find(|p| std::fs::exists(p).unwrap());
        let mut command = Command::new(program.unwrap_or("nats-server"));
        command.args(["--addr", "127.0.0.1", "--port", &self.port.to_string()]).args(&self.flags);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        self.child = Some(command.spawn().expect("nats-server is missing: apt-get install -y nats-server"));
    }

    fn down(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// A node with so many places, in this process.
    async fn node(&self, places: usize) -> House {
        self.node_with(places, |_| {}).await
    }

    async fn node_with(&self, places: usize, change: impl FnOnce(&mut Config)) -> House {
        let mut all = settings();
        all.engine.sessions = places;
        all.cluster.nats = vec![self.url()];
        all.cluster.secret = SECRET.into();
        all.cluster.public_url = "https://avatars.example".into();
        change(&mut all);
        all.validate().unwrap();
        house_from(all, || Ok(avatar::test_card())).await
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.down();
        }
    }
}

fn metric(house: &str, name: &str) -> f64 {
    let line = house.lines().find(|l| l.starts_with(&format!("{name} ")));
    line.and_then(|l| l.split(' ').nth(1)).and_then(|n| n.parse().ok()).unwrap_or(f64::NAN)
}

/// Waits until a node sees so many places, and so many taken, in the whole cluster.
async fn sees(house: &House, slots: usize, used: usize) {
    let began = Instant::now();
    loop {
        let text = house.get("/metrics").await.text();
        let seen = [metric(&text, "loquent_cluster_slots"), metric(&text, "loquent_cluster_slots_used")];
        if seen == [slots as f64, used as f64] && metric(&text, "loquent_cluster_reachable") == 1.0 {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(15), "{seen:?} instead of {slots} and {used}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn at(session: &Value) -> String {
    format!("/v1/sessions/{}", session["id"].as_str().unwrap())
}

async fn post(house: &House, path: &str, token: &str, kind: &str, body: &[u8]) -> Answer {
    let bearer = format!("Bearer {token}");
    house.ask("POST", path, &[("Content-Type", kind), ("Authorization", &bearer)], body).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_node_places_a_session_and_finds_it_again() {
    let bus = Bus::start();
    let (front, one, two) = (bus.node(0).await, bus.node(2).await, bus.node(2).await);
    for house in [&front, &one, &two] {
        sees(house, 4, 0).await;
    }
    assert_eq!(front.get("/readyz").await.status, 200);
    assert_eq!(front.get("/v1/info").await.json()["engine"]["slots"], 4);
    let mut all = Vec::new();
    for _ in 0..4 {
        all.push(front.begin().await);
    }
    assert_eq!((one.used(), two.used()), (2, 2), "every place of both");
    let full = front.json("POST", "/v1/sessions", json!({})).await;
    assert_eq!((full.status, full.code()), (503, "full".into()));
    assert!(full.header("retry-after").parse::<u64>().unwrap() >= 1);
    let wrong = front.json("POST", "/v1/sessions", json!({"presenter": "nobody"})).await;
    assert_eq!(wrong.status, 503, "a place comes before everything else: {}", wrong.text());

    // Everybody finds every session; the token is checked where it is.
    for house in [&front, &one, &two] {
        let list = house.get("/v1/sessions").await.json();
        assert_eq!(list["sessions"].as_array().unwrap().len(), 4);
        for session in &all {
            assert_eq!(house.get(&at(session)).await.json()["id"], session["id"]);
            let interrupt = format!("{}/interrupt", at(session));
            assert_eq!(post(house, &interrupt, "123", "text/plain", b"").await.code(), "wrong_token");
            let token = session["token"].as_str().unwrap();
            assert_eq!(post(house, &interrupt, token, "text/plain", b"").await.status, 204);
        }
    }
    // Each knows of the others, and which one it is itself.
    sees(&two, 4, 4).await;
    let status = two.get("/v1/status").await.json();
    let cluster = &status["cluster"];
    let told = |field: &str| cluster[field].as_u64().unwrap();
    assert_eq!([told("alive"), told("known"), told("slots"), told("slots_used")], [3, 3, 4, 4]);
    assert_eq!(
        (&cluster["reachable"], &cluster["away_s"], &cluster["why"]),
        (&json!(true), &json!(null), &json!(null))
    );
    let nodes = cluster["nodes"].as_array().unwrap();
    let itself = nodes.iter().find(|n| n["id"] == cluster["id"]).unwrap();
    assert_eq!((&itself["state"], &itself["slots"], &itself["slots_used"]), (&json!("ready"), &json!(2), &json!(2)));
    assert!(nodes.iter().all(|n| n["heard_ms"].as_f64().unwrap() < 3500.0), "{nodes:?}");
    assert!(all.iter().all(|s| nodes.iter().any(|n| s["id"].as_str().unwrap().ends_with(n["id"].as_str().unwrap()))));
    // A player connects through one node and is changed and ended through another.
    let token = all[0]["token"].as_str().unwrap();
    let player = post(&one, &format!("{}/whep", at(&all[0])), token, SDP, player().as_bytes()).await;
    assert_eq!(player.status, 201, "{}", player.text());
    let place = player.header("location").to_string();
    assert!(place.starts_with(&at(&all[0])) && !player.header("etag").is_empty());
    let stale = [("Content-Type", FRAGMENT), ("If-Match", "\"x\"")];
    assert_eq!(two.ask("PATCH", &place, &stale, b"a=ice-ufrag:x\r\n").await.code(), "stale_etag");
    assert_eq!(front.ask("DELETE", &place, &[], b"").await.status, 200);
    assert_eq!(front.ask("DELETE", &place, &[], b"").await.status, 404);
    // A WebSocket through the front: speech in, events out, the end.
    let mut socket = front.socket(&all[1]).await;
    socket.hear("state").await;
    socket.say(json!({"type": "set", "rate": 16_000})).await;
    socket.sound(300).await;
    socket.say(json!({"type": "speak_end"})).await;
    assert_eq!(socket.hear("speak_ended").await["interrupted"], false);
    assert_eq!(front.ask("DELETE", &at(&all[1]), &[], b"").await.status, 204);
    assert_eq!(socket.hear("closed").await["reason"], "stopped");
    assert_eq!(two.get(&at(&all[1])).await.code(), "stopped", "the end is known everywhere");

    // A page's conversation, and a picture that was brought to a node that shows nobody. What became free is known
    // elsewhere with the next beat.
    sees(&front, 4, 3).await;
    let card = include_bytes!("../../web/card.png");
    let picture = front.post("/v1/portraits?consent=It+is+a+card", "image/png", card).await;
    assert_eq!(picture.status, 201, "{}", picture.text());
    let presenter = picture.json()["presenter"].as_str().unwrap().to_string();
    let shown = front.json("POST", "/v1/sessions", json!({"presenter": presenter})).await;
    assert_eq!(shown.status, 201, "{}", shown.text());
    sees(&front, 4, 4).await;
    assert_eq!(front.ask("DELETE", &at(&shown.json()), &[], b"").await.status, 204);
    sees(&front, 4, 3).await;
    let talk = front.post("/v1/live?presenter=card", SDP, offer().as_bytes()).await;
    assert_eq!(talk.status, 201, "{}", talk.text());
    assert_eq!(one.ask("DELETE", talk.header("location"), &[], b"").await.status, 200);
    for session in &all {
        two.ask("DELETE", &at(session), &[], b"").await;
    }
    sees(&front, 4, 0).await;
    assert_eq!((one.used(), two.used()), (0, 0), "nothing is left");
}

/// What a player offers: as a page does, without a microphone.
fn player() -> String {
    let text = offer().replace("a=sendrecv", "a=recvonly");
    let channel = text.find("m=application").unwrap();
    text[..channel].replace("BUNDLE 0 1 2", "BUNDLE 0 1")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_node_is_told_and_a_draining_one_is_spared() {
    let bus = Bus::start();
    let front = bus.node(0).await;
    let (nats, secret) = (bus.url(), format!("cluster.secret={SECRET}"));
    let mut worker = Program::start("worker", "", &["--cluster", &nats, "--set", &secret]);
    sees(&front, 1, 0).await;
    let session = front.begin().await;
    let mut socket = Socket::to(front.address, &session).await;
    socket.hear("state").await;
    worker.child.kill().unwrap();
    worker.child.wait().unwrap();
    // Whoever listens is told at once where to begin anew; whoever asks, as soon as three beats were missed.
    let closed = socket.hear("closed").await;
    assert_eq!(
        (&closed["reason"], &closed["reconnect"]),
        (&json!("worker_gone"), &json!("https://avatars.example/v1/sessions"))
    );
    assert_eq!(u16::from(socket.code().await), 1012);
    let began = Instant::now();
    let gone = loop {
        let answer = front.get(&at(&session)).await;
        if answer.status != 503 {
            break answer;
        }
        assert!(!answer.header("retry-after").is_empty() && began.elapsed() < Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!((gone.status, gone.code()), (410, "worker_gone".into()));
    assert_eq!(gone.json()["error"]["reconnect"], "https://avatars.example/v1/sessions");
    let nobody = front.json("POST", "/v1/sessions", json!({})).await;
    assert_eq!((nobody.status, nobody.code()), (503, "no_worker".into()));

    // Drain: nothing new there, what it has goes on.
    let (one, two) = (bus.node(3).await, bus.node(3).await);
    sees(&front, 6, 0).await;
    let session = front.begin().await;
    let (old, other) = if one.used() == 1 { (&one, &two) } else { (&two, &one) };
    old.service.drain();
    let began = Instant::now();
    while !front.get("/metrics").await.text().contains("loquent_cluster_nodes{state=\"draining\"} 1") {
        assert!(began.elapsed() < Duration::from_secs(5), "a drain is told at once");
    }
    for _ in 0..3 {
        front.begin().await;
    }
    assert_eq!((old.used(), other.used()), (1, 3));
    assert_eq!(front.json("POST", "/v1/sessions", json!({})).await.status, 503);
    let mut socket = front.socket(&session).await;
    socket.say(json!({"type": "set", "rate": 16_000})).await;
    socket.sound(200).await;
    socket.say(json!({"type": "speak_end"})).await;
    assert_eq!(socket.hear("speak_ended").await["interrupted"], false);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_bus_everybody_has_what_is_theirs_and_it_comes_back() {
    let mut bus = Bus::start();
    let (front, one, two) = (bus.node(0).await, bus.node(2).await, bus.node(2).await);
    sees(&front, 4, 0).await;
    let mut own = one.begin().await;
    while one.used() == 0 {
        own = one.begin().await;
    }
    let begun = one.used() + two.used();
    let mut socket = Socket::to(front.address, &own).await;
    socket.hear("state").await;
    bus.down();
    let began = Instant::now();
    while front.get("/readyz").await.status == 200 {
        assert!(began.elapsed() < Duration::from_secs(5));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(front.get("/readyz").await.json()["state"], "cluster_unreachable");
    let cluster = front.get("/v1/status").await.json()["cluster"].take();
    assert_eq!((&cluster["reachable"], &cluster["nodes"][0]["state"]), (&json!(false), &json!("unknown")));
    assert!(cluster["away_s"].is_u64(), "{cluster}");
    let refused = front.json("POST", "/v1/sessions", json!({})).await;
    assert_eq!(
        (refused.status, refused.code(), refused.header("retry-after")),
        (503, "cluster_unreachable".into(), "2")
    );
    assert_eq!(front.get(&at(&own)).await.code(), "cluster_unreachable");
    // What stands goes on, and a worker serves those who come to it.
    socket.say(json!({"type": "set", "rate": 16_000})).await;
    socket.sound(200).await;
    socket.say(json!({"type": "speak_end"})).await;
    assert_eq!(socket.hear("speak_ended").await["interrupted"], false);
    assert_eq!(one.get(&at(&own)).await.status, 200);
    assert_eq!(one.get("/readyz").await.status, 200);
    let here = one.json("POST", "/v1/sessions", json!({})).await;
    assert!(here.status == 201 || one.used() == 2, "{}", here.text());
    bus.up();
    sees(&front, 4, begun + usize::from(here.status == 201)).await;
    assert_eq!(front.get(&at(&own)).await.status, 200, "it was there all the time");
}

/// Whoever reaches the bus, and does not know the secret, can neither order nor learn how to order again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_intruder_on_the_bus_is_not_believed() {
    let bus = Bus::start();
    let (front, worker) = (bus.node(0).await, bus.node(4).await);
    sees(&front, 4, 0).await;
    let intruder = async_nats::connect(bus.url()).await.unwrap();
    let mut overheard = intruder.subscribe("loquent.>").await.unwrap();
    // Flushed is not subscribed: the server has come to that when it gives back what was said after it.
    intruder.publish("loquent.myself", Vec::new().into()).await.unwrap();
    let subscribed = async { while overheard.next().await.is_some_and(|m| m.subject.as_str() != "loquent.myself") {} };
    tokio::time::timeout(Duration::from_secs(10), subscribed).await.expect("the bus echoes");
    front.begin().await;
    assert_eq!(worker.used(), 1);
    let mut said = Vec::new();
    // Beats go on for ever: the time is for all of it, not for each message.
    let listening = async {
        while said.len() < 2
            && let Some(message) = overheard.next().await
        {
            if message.subject.starts_with("loquent.node.") {
                said.push(message);
            }
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(10), listening).await;
    assert_eq!(said.len(), 2, "the question and that its answer came");
    let ask = &said[0];
    let mut spoilt = ask.payload.to_vec();
    let last = spoilt.len() - 1;
    spoilt[last] ^= 1;
    for payload in [ask.payload.clone(), spoilt.into(), b"{}".to_vec().into(), vec![0; 70_000].into()] {
        let request = async_nats::Request::new().payload(payload).timeout(Some(Duration::from_millis(300)));
        assert!(intruder.send_request(ask.subject.clone(), request).await.is_err(), "nothing is answered");
    }
    intruder.publish("loquent.beat", vec![7; 300].into()).await.unwrap();
    intruder.flush().await.unwrap();
    sees(&front, 4, 1).await;
    assert_eq!(worker.used(), 1);
    // Each node finds that out when it comes to it.
    let began = Instant::now();
    loop {
        let text = worker.get("/metrics").await.text();
        let refused = |why: &str| metric(&text, &format!("loquent_cluster_messages_refused_total{{why=\"{why}\"}}"));
        if refused("again") >= 1.0 && refused("foreign") >= 4.0 {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(5), "{text}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What one caller may have at once holds for all nodes together, whichever it asks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sessions_of_a_key_or_an_address_are_counted_in_the_whole_cluster() {
    let (bus, folder) = (Bus::start(), folder("counted"));
    let (key, secret) = Key::generate("shop", &[Scope::Control, Scope::Live], &["sessions=2".into()]).unwrap();
    let (ours, master) = Key::generate("ours", &[Scope::Control, Scope::Metrics], &[]).unwrap();
    let file = folder.join("keys");
    std::fs::write(&file, format!("{key}\n{ours}\n")).unwrap();
    let set = |all: &mut Config| {
        all.server.keys_file = file.display().to_string();
        all.server.visitors = loquent::server::Visitors::Anyone;
        all.server.sessions_per_address = 1;
    };
    let (front, one, two) = (bus.node_with(0, set).await, bus.node_with(4, set).await, bus.node_with(4, set).await);
    let (shop, master) = (format!("Bearer {secret}"), format!("Bearer {master}"));
    let began = Instant::now();
    let seen = async |used: u64| {
        for house in [&front, &one, &two] {
            loop {
                let status = house.ask("GET", "/v1/status", &[("Authorization", &master)], b"").await.json();
                let cluster = &status["cluster"];
                if (cluster["slots"].as_u64(), cluster["slots_used"].as_u64()) == (Some(8), Some(used)) {
                    break;
                }
                assert!(began.elapsed() < Duration::from_secs(30), "{cluster} instead of {used} of 8");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    };
    seen(0).await;
    let headers = [("Content-Type", "application/json"), ("Authorization", shop.as_str())];
    let begin = async |house: &House| house.ask("POST", "/v1/sessions", &headers, b"{}").await;
    // All at once through one front: as many as may be, or one more where a beat came in that very moment.
    let all = futures::future::join_all((0..12).map(|_| begin(&front))).await;
    let begun: Vec<&Answer> = all.iter().filter(|answer| answer.status == 201).collect();
    assert!((2..=3).contains(&begun.len()), "{:?}", all.iter().map(|a| a.status).collect::<Vec<_>>());
    let refused = all.iter().find(|answer| answer.status != 201).unwrap();
    assert_eq!((refused.status, refused.code()), (429, "too_many_sessions".into()));
    assert!(!refused.header("retry-after").is_empty());
    let end = async |answer: &Answer| {
        let ended = one.ask("DELETE", &at(&answer.json()), &[("Authorization", &master)], b"").await;
        assert_eq!(ended.status, 204, "{}", ended.text());
    };
    for more in begun.iter().skip(2).copied() {
        end(more).await;
    }
    seen(2).await;
    for house in [&front, &one, &two] {
        let refused = begin(house).await;
        assert_eq!((refused.status, refused.code()), (429, "too_many_sessions".into()));
    }
    // One that ends makes room, and that is known at once.
    end(begun[0]).await;
    seen(1).await;
    assert_eq!(begin(&two).await.status, 201);
    assert_eq!(begin(&one).await.status, 429);
    // Visitors are counted by their address.
    let from = async |house: &House, address: &str| {
        let headers = [("Content-Type", SDP), ("X-Forwarded-For", address)];
        house.ask("POST", "/v1/live?presenter=card", &headers, offer().as_bytes()).await.status
    };
    assert_eq!(from(&one, "203.0.113.5").await, 201);
    seen(3).await;
    assert_eq!([from(&two, "203.0.113.5").await, from(&front, "203.0.113.6").await], [429, 201]);
    std::fs::remove_dir_all(&folder).unwrap();
}

/// Waits until a program's log has this; returns all of it.
async fn logged(program: &Program, text: &str) -> String {
    let began = Instant::now();
    loop {
        let log = program.log();
        if log.contains(text) {
            return log;
        }
        assert!(began.elapsed() < Duration::from_secs(15), "{text} is not in:\n{log}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// An authority and a certificate of it for 127.0.0.1, as files.
fn authority(folder: &Path, name: &str) -> PathBuf {
    let (key, own) = (rcgen::KeyPair::generate().unwrap(), rcgen::KeyPair::generate().unwrap());
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    let authority = rcgen::CertifiedIssuer::self_signed(params, key).unwrap();
    let leaf = rcgen::CertificateParams::new(vec!["127.0.0.1".into()]).unwrap().signed_by(&own, &authority).unwrap();
    let file = |what: &str| folder.join(format!("{name}-{what}.pem"));
    std::fs::write(file("ca"), authority.pem()).unwrap();
    std::fs::write(file("cert"), leaf.pem()).unwrap();
    std::fs::write(file("key"), own.serialize_pem()).unwrap();
    file("ca")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bus_with_tls_and_a_password_and_what_is_told_of_wrong_ones() {
    let folder = folder("bus-tls");
    let (ours, other) = (authority(&folder, "ours"), authority(&folder, "other"));
    let file = |name: &str| folder.join(name).display().to_string();
    let (cert, key) = (file("ours-cert.pem"), file("ours-key.pem"));
    let mut bus =
        Bus::with(&["--tls", "--tlscert", &cert, "--tlskey", &key, "--user", "node", "--pass", "not to be guessed"]);
    let start = |name: &str, ca: &Path, password: &str| {
        let nats = bus.url();
        let set = [
            format!("cluster.secret={SECRET}"),
            format!("cluster.tls_ca={}", ca.display()),
            "cluster.user=node".into(),
            format!("cluster.password={password}"),
        ];
        let mut args = vec!["--cluster", &nats];
        set.iter().for_each(|set| args.extend(["--set", set]));
        Program::start(name, "", &args)
    };
    let good = start("bus-good", &ours, "not to be guessed");
    let front = bus.node_with(0, |all| {
        all.cluster.tls_ca = ours.display().to_string();
        (all.cluster.user, all.cluster.password) = ("node".into(), "not to be guessed".into());
    });
    let front = front.await;
    sees(&front, 1, 0).await;
    front.begin().await;
    assert!(!logged(&good, "the bus is there").await.contains("not to be guessed"));

    // What is wrong is said, with what to do, once; the node serves alone, and says so.
    let foreign = start("bus-foreign", &other, "not to be guessed");
    let guessed = start("bus-guessed", &ours, "guessed");
    let bare = start("bus-bare", Path::new(""), "not to be guessed");
    for (program, why, advice) in [
        (&foreign, "UnknownIssuer", "cluster.tls_ca"),
        (&guessed, "authorization violation", "cluster.password"),
        (&bare, "UnknownIssuer", "cluster.tls_ca"),
    ] {
        let log = logged(program, "the bus cannot be reached").await;
        assert!(log.contains(why) && log.contains(advice), "{log}");
        assert!(!log.contains("not to be guessed"), "a secret in the log: {log}");
        let status = program.json("GET", "/v1/status", "");
        let cluster = &status["cluster"];
        assert_eq!((&cluster["reachable"], &cluster["alive"]), (&json!(false), &json!(0)));
        assert!(cluster["why"].as_str().unwrap().contains(why), "{cluster}");
    }
    sees(&front, 1, 1).await;

    // A bus that stays away is a line in the log, not a line a second.
    bus.down();
    tokio::time::sleep(Duration::from_secs(4)).await;
    bus.up();
    sees(&front, 1, 1).await;
    let about = |log: &str| log.lines().filter(|l| l.contains("the bus")).map(String::from).collect::<Vec<_>>();
    let began = Instant::now();
    while about(&good.log()).len() < 3 && began.elapsed() < Duration::from_secs(5) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let lines = about(&good.log());
    let begins = ["the bus is there", "the bus is gone", "the bus is there"];
    assert!(lines.len() == 3 && lines.iter().zip(begins).all(|(line, begin)| line.contains(begin)), "{lines:?}");
    for program in [&foreign, &guessed, &bare] {
        assert_eq!(about(&program.log()).len(), 1, "{}", program.log());
        assert!(!program.log().contains("async_nats"), "{}", program.log());
    }
    std::fs::remove_dir_all(&folder).unwrap();
}
