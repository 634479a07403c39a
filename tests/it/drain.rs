//! The end of a service: nobody new, those inside finish or are told, a deadline; and TLS, which begins with it.

use crate::{
    access::{Program, folder},
    server::{House, house_from, settings},
    sessions::Socket,
};
use loquent::avatar;
use serde_json::json;
use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixDatagram},
};
use tokio_rustls::{TlsConnector, rustls};

fn ended(program: &mut Program, within: Duration) -> Option<i32> {
    let began = Instant::now();
    loop {
        if let Some(status) = program.child.try_wait().unwrap() {
            return status.code();
        }
        assert!(began.elapsed() < within, "still running: {}", program.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

async fn told(socket: &UnixDatagram) -> String {
    let mut bytes = [0; 100];
    let n = tokio::time::timeout(Duration::from_secs(10), socket.recv(&mut bytes)).await.unwrap().unwrap();
    String::from_utf8_lossy(&bytes[..n]).into_owned()
}

/// As a service manager does it: told when it is ready; SIGTERM; a conversation goes on to its own end, nobody new
/// comes in; the process ends as soon as nobody is left, with code 0.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_lets_conversations_finish_and_admits_nobody() {
    let own = folder("notify");
    let manager = UnixDatagram::bind(own.join("socket")).unwrap();
    let before = format!("export NOTIFY_SOCKET={};", own.join("socket").display());
    let mut program = Program::start("drain", &before, &["--sessions", "2", "--set", "server.drain_wait_s=60"]);
    assert_eq!(told(&manager).await, "READY=1");
    let session = program.json("POST", "/v1/sessions", "");
    let mut socket = Socket::to(&program.address, &session).await;
    program.signal("-TERM");
    assert_eq!(told(&manager).await, "STOPPING=1");
    let ready = program.ask("GET", "/readyz", "");
    assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("draining"), "{ready}");
    assert_eq!(program.json("POST", "/v1/sessions", "")["error"]["code"], "draining");
    // Whoever is inside speaks on, undisturbed.
    socket.say(json!({"type": "set", "rate": 16_000})).await;
    socket.sound(1000).await;
    socket.say(json!({"type": "speak_end"})).await;
    assert_eq!(socket.hear("speak_ended").await["interrupted"], false);
    let at = format!("/v1/sessions/{}", session["id"].as_str().unwrap());
    assert!(program.ask("DELETE", &at, "").starts_with("HTTP/1.1 204"));
    assert_eq!(ended(&mut program, Duration::from_secs(15)), Some(0), "as soon as nobody is left");
    std::fs::remove_dir_all(own).unwrap();
}

/// Whoever does not finish is told why, at the deadline; the process ends with code 0.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_has_a_deadline() {
    let sets = ["--set", "server.drain_wait_s=1", "--set", "server.drain_timeout_s=1"];
    let mut program = Program::start("deadline", "", &sets);
    let session = program.json("POST", "/v1/sessions", "");
    let mut socket = Socket::to(&program.address, &session).await;
    socket.say(json!({"type": "set", "rate": 16_000})).await;
    for _ in 0..30 {
        socket.sound(1000).await;
    }
    program.signal("-TERM");
    assert_eq!(socket.hear("closed").await["reason"], "service_closing");
    assert_eq!(ended(&mut program, Duration::from_secs(20)), Some(0));
}

/// A certificate for `localhost`, made for this test; its DER.
fn certificate(folder: &Path) -> rustls::pki_types::CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
    std::fs::write(folder.join("cert.pem"), made.cert.pem()).unwrap();
    std::fs::write(folder.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    made.cert.der().clone()
}

/// Asks over TLS, believing this certificate alone.
async fn ask(house: &House, believed: &rustls::pki_types::CertificateDer<'static>) -> std::io::Result<String> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(believed.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(roots).with_no_client_auth();
    let stream = TcpStream::connect(house.address).await?;
    let name = "localhost".try_into().unwrap();
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_by_file_and_a_renewal_without_restart() {
    let folder = folder("tls");
    let first = certificate(&folder);
    let mut all = settings();
    all.server.tls_cert = folder.join("cert.pem").display().to_string();
    let why = all.validate().unwrap_err().to_string();
    assert!(why.contains("both server.tls_cert and server.tls_key"), "{why}");
    all.server.tls_key = folder.join("cert.pem").display().to_string();
    let why = all.validate().unwrap_err().to_string();
    assert!(why.contains("server.tls_key") && why.contains("PEM"), "{why}");
    all.server.tls_key = folder.join("key.pem").display().to_string();
    all.server.header_timeout_s = 1;
    all.validate().unwrap();
    let house = house_from(all, || Ok(avatar::test_card())).await;
    let answer = ask(&house, &first).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("strict-transport-security"), "{answer}");
    // Renewed: new connections get the new one. Files that do not fit together change nothing.
    let second = certificate(&folder);
    house.service.reload(true);
    assert!(ask(&house, &second).await.unwrap().starts_with("HTTP/1.1 200"));
    assert!(ask(&house, &first).await.is_err());
    std::fs::write(folder.join("key.pem"), "nothing").unwrap();
    house.service.reload(true);
    assert!(ask(&house, &second).await.is_ok());
    // Whoever says nothing, or speaks plain HTTP, is not waited for.
    for hello in [&b""[..], b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"] {
        let mut socket = TcpStream::connect(house.address).await.unwrap();
        socket.write_all(hello).await.unwrap();
        let mut rest = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(5), socket.read_to_end(&mut rest)).await.expect("it hangs");
        assert!(!rest.starts_with(b"HTTP/"));
    }
    std::fs::remove_dir_all(folder).unwrap();
}
