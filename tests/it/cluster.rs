//! Several nodes as one service, over Debian's nats-server: places, sessions found from anywhere, death, drain, silence.

use crate::{
    access::Program,
    server::{Answer, FRAGMENT, House, SDP, house_from, offer, settings},
    sessions::Socket,
};
use futures::StreamExt;
use loquent::avatar;
use serde_json::{Value, json};
use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const SECRET: &str = "a secret of all nodes, for tests only";

/// A NATS server of its own, ended when dropped.
pub(crate) struct Bus {
    child: Option<Child>,
    pub(crate) port: u16,
}

impl Bus {
    pub(crate) fn start() -> Bus {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut bus = Bus { child: None, port };
        bus.up();
        bus
    }

    fn up(&mut self) {
        let program =
            ["/usr/sbin/nats-server", "/usr/bin/nats-server"].into_iter().find(|p| std::fs::exists(p).unwrap());
        let mut command = Command::new(program.unwrap_or("nats-server"));
        command.args(["--addr", "127.0.0.1", "--port", &self.port.to_string()]);
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
        let mut all = settings();
        all.engine.sessions = places;
        all.cluster.nats = vec![self.url()];
        all.cluster.secret = SECRET.into();
        all.cluster.public_url = "https://avatars.example".into();
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
    intruder.flush().await.unwrap();
    front.begin().await;
    assert_eq!(worker.used(), 1);
    let mut said = Vec::new();
    while let Ok(Some(message)) = tokio::time::timeout(Duration::from_secs(2), overheard.next()).await {
        if message.subject.starts_with("loquent.node.") {
            said.push(message.clone());
        }
        if said.len() == 2 {
            break;
        }
    }
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
    let text = worker.get("/metrics").await.text();
    let refused = |why: &str| metric(&text, &format!("loquent_cluster_messages_refused_total{{why=\"{why}\"}}"));
    assert!(refused("again") >= 1.0 && refused("foreign") >= 4.0, "{text}");
}
