//! WebSockets and files of sessions on other nodes, passed through byte by byte over a connection to that node's HTTP.
//!
//! Passed through, not redirected: browsers' WebSockets follow no redirect, `fetch` drops `Authorization` on the way to
//! another host, and pages may connect to their own site only. When the node dies, the client of a WebSocket is told so
//! as the session itself would tell it: `closed`, with `reconnect` beside the reason, and close code 1012.

use super::{Service, access::Caller, error::ApiError, spread};
use crate::cluster::{Node, NodeId, Standing, Unanswered};
use axum::{
    body::Body,
    extract::Request,
    http::{HeaderName, StatusCode, header},
    response::Response,
};
use hyper_util::rt::TokioIo;
use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// To other nodes: never by a proxy of the environment, never on to a third place.
static HTTP: LazyLock<reqwest::Result<reqwest::Client>> = LazyLock::new(|| {
    reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(Duration::from_secs(3))
        .http1_only()
        .build()
});

const BUFFER: usize = 16 * 1024;
/// How often a silent tunnel looks whether its other end lives.
const LOOK: Duration = Duration::from_secs(1);
/// A client that takes nothing for so long is gone.
const STUCK: Duration = Duration::from_secs(30);

/// Passes a request through to a node.
///
/// # Errors
/// Nothing is known of where the node is, or it cannot be reached.
pub(super) async fn open(
    service: &Arc<Service>,
    cluster: &Arc<Node>,
    id: NodeId,
    again: String,
    caller: &Caller,
    mut request: Request,
) -> Result<Response, ApiError> {
    let Some(address) = cluster.address_of(id) else {
        tracing::warn!(node = %id, "a node does not say where it is: set its cluster.address");
        return Err(spread::unanswered(Unanswered::Absent, again));
    };
    let Ok(http) = &*HTTP else { return Err(ApiError::internal("No connection to other machines can be made.")) };
    let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
    let method = request.method().clone();
    let mut onward = http.request(method, format!("{}{target}", address.trim_end_matches('/')));
    for (name, value) in request.headers() {
        // The origin was compared with our name; it is not that of the other node.
        let ours = [header::HOST, header::ORIGIN, header::CONTENT_LENGTH, header::COOKIE].contains(name);
        if !ours && *name != HeaderName::from_static("x-forwarded-for") {
            onward = onward.header(name, value);
        }
    }
    if let Some(address) = caller.address {
        onward = onward.header("x-forwarded-for", address.to_string());
    }
    let answer = onward.send().await.map_err(|e| {
        tracing::warn!(node = %id, "a node's HTTP cannot be reached: {}", e.without_url());
        spread::unanswered(Unanswered::Absent, again.clone())
    })?;
    let mut response = Response::new(Body::empty());
    *response.status_mut() = answer.status();
    for (name, value) in answer.headers() {
        if *name != header::TRANSFER_ENCODING {
            response.headers_mut().append(name, value.clone());
        }
    }
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        *response.body_mut() = Body::from_stream(answer.bytes_stream());
        return Ok(response);
    }
    let Ok(place) = service.sockets.clone().try_acquire_owned() else {
        let text = "As many WebSockets are open as server.max_connections allows.";
        return Err(ApiError::unavailable("full", text, Duration::from_secs(5)));
    };
    let (client, cluster) = (hyper::upgrade::on(&mut request), cluster.clone());
    tokio::spawn(async move {
        if let (Ok(client), Ok(node)) = (client.await, answer.upgrade().await) {
            pass(TokioIo::new(client), node, &cluster, id, &again).await;
        }
        drop(place);
    });
    Ok(response)
}

async fn pass(
    client: impl AsyncRead + AsyncWrite,
    node: impl AsyncRead + AsyncWrite,
    cluster: &Node,
    id: NodeId,
    again: &str,
) {
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_node, mut to_node) = tokio::io::split(node);
    let up = async {
        // The client's end is passed on; what the node still has to say comes all the same.
        let _ = tokio::io::copy(&mut from_client, &mut to_node).await;
        let _ = to_node.shutdown().await;
        std::future::pending::<()>().await
    };
    let down = async {
        let (mut frames, mut buffer) = (Frames::default(), vec![0; BUFFER]);
        loop {
            let n = match tokio::time::timeout(LOOK, from_node.read(&mut buffer)).await {
                Ok(Ok(n @ 1..)) => n,
                Ok(_) => break,
                Err(_) if cluster.standing(id) == Standing::Dead => break,
                Err(_) => continue,
            };
            frames.feed(&buffer[..n]);
            if !matches!(tokio::time::timeout(STUCK, to_client.write_all(&buffer[..n])).await, Ok(Ok(()))) {
                return;
            }
        }
        if frames.may_speak() {
            let _ = tokio::time::timeout(LOOK, to_client.write_all(&gone(again))).await;
        }
        let _ = to_client.shutdown().await;
    };
    tokio::select! {
        () = up => {}
        () = down => {}
    }
}

/// What a client is told when the node is gone: a text message and a close frame (RFC 6455 §5.2, §7.4).
fn gone(again: &str) -> Vec<u8> {
    let told = serde_json::json!({
        "type": "closed",
        "reason": "worker_gone",
        "message": "The machine that held this session is gone, and the session with it.",
        "reconnect": again,
    });
    let text = told.to_string();
    let mut out = vec![0x81, 126];
    out.extend_from_slice(&(text.len() as u16).to_be_bytes());
    if text.len() < 126 {
        out.truncate(1);
        out.push(text.len() as u8);
    }
    out.extend_from_slice(text.as_bytes());
    let why = b"worker_gone";
    out.extend_from_slice(&[0x88, 2 + why.len() as u8]);
    out.extend_from_slice(&1012_u16.to_be_bytes());
    out.extend_from_slice(why);
    out
}

/// Follows the frames of a server's direction (unmasked), so that a word of ours does not fall into one.
#[derive(Default)]
struct Frames {
    head: Vec<u8>,
    left: u64,
    /// A message has begun and not ended.
    open: bool,
    closed: bool,
}

impl Frames {
    fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.left > 0 {
                let n = self.left.min(bytes.len() as u64);
                self.left -= n;
                bytes = &bytes[n as usize..];
                continue;
            }
            self.head.push(bytes[0]);
            bytes = &bytes[1..];
            let length = match (self.head.get(1), self.head.len()) {
                (Some(n @ ..126), 2) => u64::from(*n),
                (Some(126), 4) => u64::from(u16::from_be_bytes([self.head[2], self.head[3]])),
                (Some(127), 10) => self.head[2..].iter().fold(0, |n, b| n << 8 | u64::from(*b)),
                (Some(128..), _) => {
                    // Masked: not what a server says; nothing of ours may follow.
                    self.closed = true;
                    self.head.clear();
                    continue;
                }
                _ => continue,
            };
            let (last, kind) = (self.head[0] & 0x80 != 0, self.head[0] & 0x0f);
            match kind {
                8 => self.closed = true,
                0..=2 => self.open = !last,
                _ => {}
            }
            self.left = length;
            self.head.clear();
        }
    }

    fn may_speak(&self) -> bool {
        self.head.is_empty() && self.left == 0 && !self.open && !self.closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_followed_however_they_are_cut() {
        let mut sent = vec![0x81, 2, b'h', b'i', 0x82, 126, 1, 0];
        sent.extend(vec![0; 256]);
        sent.extend([0x01, 1, b'a', 0x89, 0, 0x80, 1, b'b']);
        let ends = [0, 4, 264, sent.len()];
        for cut in 0..=sent.len() {
            let mut frames = Frames::default();
            frames.feed(&sent[..cut]);
            assert_eq!(frames.may_speak(), ends.contains(&cut), "after {cut} bytes");
            frames.feed(&sent[cut..]);
            assert!(frames.may_speak());
        }
        let mut frames = Frames::default();
        frames.feed(&gone("https://a.example/v1/sessions"));
        assert!(frames.closed && frames.left == 0 && frames.head.is_empty(), "what we say is frames, the last a close");
    }
}
