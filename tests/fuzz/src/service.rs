//! A whole service with the test card, on a socket of this machine: what is sent to it is what a stranger could send.

use crate::Cut;
use futures::{SinkExt as _, StreamExt as _};
use loquent::{
    avatar,
    config::Config,
    engine::Engine,
    net::Net,
    server::{Presenter, Rooms, Server, Service},
    session::Registry,
    voice::Voice,
};
use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    runtime::Runtime,
};
use tokio_tungstenite::tungstenite::{Error, Message};

/// What takes longer than this to be answered hangs.
const ANSWERED: Duration = Duration::from_secs(10);

pub struct House {
    pub runtime: Runtime,
    pub address: SocketAddr,
    /// Of the session that is spoken to: its WebSocket's address.
    talk: Mutex<Option<String>>,
}

/// Begun once; every panic anywhere in it ends the process, which is a finding.
pub fn house() -> &'static House {
    static HOUSE: OnceLock<House> = OnceLock::new();
    HOUSE.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut all = Config::default();
        all.server.listen = "127.0.0.1:0".into();
        all.net.bind = vec!["127.0.0.1".parse().unwrap()];
        all.engine.sessions = 2;
        // What is tried is what requests do, not how many there may be.
        all.server.requests_per_second = 0;
        all.server.sessions_per_address = 0;
        all.session.connect_timeout_s = 1;
        all.session.idle_timeout_s = 2;
        let engine = Engine::start("card", &all.engine, || Ok(avatar::test_card())).unwrap();
        let address = runtime.block_on(async {
            let rooms = Rooms {
                engine,
                engine_name: "card",
                net: Net::new(all.net).unwrap(),
                sessions: Registry::new(),
                session_config: all.session,
                livekit: Default::default(),
                steps: None,
                presenters: vec![Presenter {
                    id: "card".into(),
                    name: "Test card".into(),
                    description: "Bars".into(),
                    png: bytes::Bytes::from_static(include_bytes!("../../../web/card.png")),
                }],
                voice: Voice::new(all.voice, None).unwrap(),
                cluster: None,
            };
            let server = Server::bind(Service::new(all.server, rooms)).await.unwrap();
            let address = server.local_addr().unwrap();
            tokio::spawn(server.run(Default::default()));
            address
        });
        House { runtime, address, talk: Mutex::default() }
    })
}

const CASES: &[(&str, &str, &str)] = &[
    ("POST", "/v1/live", "application/sdp"),
    ("POST", "/v1/sessions", "application/json"),
    ("POST", "/v1/portraits", "image/png"),
    ("POST", "/v1/portraits", "multipart/form-data; boundary=b"),
    ("PATCH", "/v1/sessions/none", "application/json"),
    ("GET", "", ""),
];

impl House {
    /// The first byte says what is asked; the rest is the body, or for the last of [`CASES`] everything on the wire.
    pub fn ask(&self, bytes: &[u8]) {
        let [which, body @ ..] = bytes else { return };
        let (method, path, kind) = CASES[usize::from(*which) % CASES.len()];
        let mut wire = Vec::new();
        if !path.is_empty() {
            let head = format!(
                "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
                self.address,
                body.len()
            );
            wire.extend_from_slice(head.as_bytes());
        }
        wire.extend_from_slice(body);
        let answer = self.exchange(&wire, path.is_empty());
        let status = answer.get(9..12).and_then(|s| std::str::from_utf8(s).ok()).unwrap_or("").to_string();
        assert!(!status.starts_with('5') || status == "503" || status == "501", "{}", String::from_utf8_lossy(&answer));
        // What was begun is ended, or the next inputs find a full house.
        let head = String::from_utf8_lossy(&answer);
        let begun = head.lines().take_while(|l| !l.is_empty()).find_map(|l| l.strip_prefix("location: "));
        if let Some(path) = begun {
            let wire = format!("DELETE {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.address);
            self.exchange(wire.as_bytes(), false);
        }
    }

    /// From one of many addresses: ports of connections that were closed are not free for a minute, and one address has too
    /// few of them for thousands of inputs a second.
    async fn dial(&self) -> TcpStream {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (process, n) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let from = Ipv4Addr::from(0x7f00_0000 | (process << 8 & 0xff_ff00) | (2 + n % 128));
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((from, 0).into()).unwrap_or_else(|e| panic!("no port of {from}: {e}"));
        let socket =
            socket.connect(self.address).await.unwrap_or_else(|e| panic!("the service takes no connection: {e}"));
        socket.set_nodelay(true).unwrap();
        socket
    }

    /// What is answered. A client that has finished is not answered what takes a moment, so only one that may have sent half
    /// a request says that it has.
    fn exchange(&self, wire: &[u8], finish: bool) -> Vec<u8> {
        self.runtime.block_on(async {
            let mut answer = Vec::new();
            let mut socket = self.dial().await;
            // It may answer and close before everything was sent.
            let _ = socket.write_all(wire).await;
            if finish {
                let _ = socket.shutdown().await;
            }
            let _ = socket.read_to_end(&mut answer).await;
            answer
        })
    }

    /// Messages to the WebSocket of a session, each with its kind and a length before it; some are no messages at all. All
    /// are answered before this returns, so that what an input does is its own.
    pub fn talk(&self, bytes: &[u8]) {
        let mut talk = self.talk.lock().unwrap();
        let url = talk.get_or_insert_with(|| self.begin()).clone();
        let said = self.runtime.block_on(async {
            let connected = tokio_tungstenite::client_async(url.as_str(), self.dial().await).await;
            let mut socket = match connected {
                Ok((socket, _)) => socket,
                // It has idled out.
                Err(Error::Http(answer)) if answer.status() != 401 => return None,
                Err(error) => panic!("the WebSocket of a session cannot be opened: {error}"),
            };
            let mut cut = Cut(bytes);
            while !cut.done() {
                let (kind, n) = (cut.u8(), usize::from(cut.u16()));
                let raw = cut.take(n);
                let message = match kind % 8 {
                    0 => Message::Binary(raw.to_vec().into()),
                    1 => Message::Ping(raw[..raw.len().min(125)].to_vec().into()),
                    7 => {
                        let wire = socket.get_mut();
                        let _ = wire.write_all(raw).await;
                        let _ = wire.shutdown().await;
                        break;
                    }
                    _ => Message::Text(String::from_utf8_lossy(raw).into_owned().into()),
                };
                // A client that was given up is told so; that is an outcome.
                if socket.send(message).await.is_err() {
                    break;
                }
            }
            // Sound that waits would be heard in real time, and by the next input.
            for end in [r#"{"type":"interrupt"}"#, r#"{"type":"ping","t":"over"}"#] {
                let _ = socket.send(Message::Text(end.into())).await;
            }
            let over = async {
                while let Some(Ok(told)) = socket.next().await {
                    if told.to_text().is_ok_and(|text| text.contains("pong") && text.contains("over")) {
                        break;
                    }
                }
            };
            tokio::time::timeout(ANSWERED, over).await.expect("the WebSocket neither answers nor ends");
            Some(())
        });
        if said.is_none() {
            // The next input begins another.
            *talk = None;
        }
    }

    fn begin(&self) -> String {
        let head = format!("POST /v1/sessions HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n", self.address);
        let wire = format!("{head}Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{{}}");
        let mut answer = String::new();
        for _ in 0..100 {
            answer = String::from_utf8(self.exchange(wire.as_bytes(), false)).unwrap();
            let body = answer.split_once("\r\n\r\n").map_or("", |a| a.1);
            if let Ok(begun) = serde_json::from_str::<serde_json::Value>(body)
                && let Some(path) = begun["urls"]["websocket"].as_str()
            {
                return format!("ws://{}{path}", self.address);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("no session could be begun: {answer}")
    }
}
