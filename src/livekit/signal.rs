//! The signalling connection: LiveKit's protobuf messages over a WebSocket.
//!
//! Source: `livekit-api/src/signal_client` of livekit/rust-sdks @0b5462a and `livekit_rtc.proto` of livekit/protocol @d74e7cd.

use super::{Config, LivekitError, target::Target};
use futures::{SinkExt, StreamExt};
use livekit_protocol::{
    LeaveRequest, Ping, SignalRequest, SignalResponse, leave_request::Action, signal_request, signal_response,
};
use prost::Message as _;
use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    Connector, MaybeTlsStream, WebSocketStream, client_async_tls_with_config,
    tungstenite::{self, Message, client::IntoClientRequest, http::HeaderValue, protocol::WebSocketConfig},
};

/// Version of the protocol we speak; the one with which resuming and leave actions are as used here.
const PROTOCOL: &str = "17";
/// Tells other participants that we know RPC version 1 and plain data streams only, so that they use these towards us.
const CLIENT_PROTOCOL: &str = "0";
/// Largest message of the server: a join answer with some thousand participants.
const MAX_MESSAGE: usize = 4 << 20;
/// A server that does not take a message for so long is gone.
const SEND: Duration = Duration::from_secs(5);
/// Time for one address to accept a connection.
const CONNECT: Duration = Duration::from_secs(4);

/// An open signalling connection.
pub(super) struct Signal {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
}

impl Signal {
    /// Connects and waits for the first message: a join answer, or with `resume` (our participant's sid) a reconnect
    /// answer.
    ///
    /// # Errors
    /// Why it cannot be reached, or what it answered instead.
    pub(super) async fn open(
        target: &Target,
        token: &str,
        resume: Option<&str>,
        config: &Config,
    ) -> Result<(Signal, signal_response::Message), LivekitError> {
        let most = Duration::from_secs(config.join_timeout_s);
        let late = || LivekitError::Unreachable {
            host: target.to_string(),
            why: format!("it did not answer within {} s", config.join_timeout_s),
        };
        timeout(most, connect(target, token, resume, config)).await.map_err(|_| late())?
    }

    /// The next message; an error when the connection is over. Cancelling loses nothing.
    pub(super) async fn next(&mut self) -> Result<signal_response::Message, String> {
        loop {
            match self.socket.next().await {
                Some(Ok(Message::Binary(data))) => {
                    let response = SignalResponse::decode(data).map_err(|e| format!("it sent nonsense: {e}"))?;
                    // A kind of message newer than we are is no fault.
                    if let Some(message) = response.message {
                        return Ok(message);
                    }
                }
                Some(Ok(Message::Close(frame))) => {
                    return Err(frame.map_or("it closed the connection".into(), |f| format!("it closed: {}", f.reason)));
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error.to_string()),
                None => return Err("the connection ended".into()),
            }
        }
    }

    pub(super) async fn send(&mut self, message: signal_request::Message) -> Result<(), String> {
        let request = SignalRequest { message: Some(message) }.encode_to_vec();
        match timeout(SEND, self.socket.send(Message::Binary(request.into()))).await {
            Ok(sent) => sent.map_err(|e| e.to_string()),
            Err(_) => Err("it does not take messages any more".into()),
        }
    }

    pub(super) async fn ping(&mut self, rtt_ms: i64) -> Result<(), String> {
        self.send(signal_request::Message::PingReq(Ping { timestamp: unix_ms(), rtt: rtt_ms })).await
    }

    /// Says goodbye; what cannot be said any more is left unsaid.
    pub(super) async fn leave(&mut self) {
        let leave = LeaveRequest {
            reason: livekit_protocol::DisconnectReason::ClientInitiated.into(),
            action: Action::Disconnect.into(),
            ..LeaveRequest::default()
        };
        let goodbye = async {
            let _ = self.send(signal_request::Message::Leave(leave)).await;
            let _ = self.socket.close(None).await;
        };
        let _ = timeout(Duration::from_secs(1), goodbye).await;
    }
}

/// Wall clock as LiveKit's messages carry it.
pub(super) fn unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

async fn connect(
    target: &Target,
    token: &str,
    resume: Option<&str>,
    config: &Config,
) -> Result<(Signal, signal_response::Message), LivekitError> {
    let unreachable = |why: String| LivekitError::Unreachable { host: target.to_string(), why };
    let mut query = vec![
        ("sdk", "rust"),
        ("version", env!("CARGO_PKG_VERSION")),
        ("protocol", PROTOCOL),
        ("client_protocol", CLIENT_PROTOCOL),
        // What others publish is not needed: the voice comes by byte streams.
        ("auto_subscribe", "0"),
        ("adaptive_stream", "0"),
    ];
    if let Some(sid) = resume {
        query.extend([("reconnect", "1"), ("sid", sid)]);
    }
    let endpoint = target.endpoint(&query);
    let mut request = endpoint.as_str().into_client_request().map_err(|e| LivekitError::Url(e.to_string()))?;
    let bearer = HeaderValue::from_str(&format!("Bearer {token}"))
        .map_err(|_| LivekitError::Token("it has characters that no token has".into()))?;
    request.headers_mut().insert(tungstenite::http::header::AUTHORIZATION, bearer);
    let stream = dial(&target.addresses(config).await?).await.map_err(&unreachable)?;
    let limits = WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_MESSAGE));
    let connector = if target.tls() { tls().map_err(&unreachable)? } else { Connector::Plain };
    let (socket, _) = client_async_tls_with_config(request, stream, Some(limits), Some(connector)).await.map_err(
        |error| match error {
            tungstenite::Error::Http(response) => {
                let body = response.body().as_deref().map(String::from_utf8_lossy).unwrap_or_default();
                let status = response.status().as_u16();
                LivekitError::Refused { status, why: body.trim().chars().take(200).collect() }
            }
            other => unreachable(other.to_string()),
        },
    )?;
    let mut signal = Signal { socket };
    let first = signal.next().await.map_err(&unreachable)?;
    Ok((signal, first))
}

/// The first address that accepts.
async fn dial(addresses: &[SocketAddr]) -> Result<TcpStream, String> {
    let mut why = String::from("no address");
    for address in addresses {
        match timeout(CONNECT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                // Signalling is small messages that somebody waits for.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) => why = error.to_string(),
            Err(_) => why = format!("no answer within {} s", CONNECT.as_secs()),
        }
    }
    Err(why)
}

/// Certificates are checked against Mozilla's roots. The provider is named, so that it does not matter which others some
/// dependency brings along.
fn tls() -> Result<Connector, String> {
    let roots = rustls::RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Connector::Rustls(Arc::new(config)))
}
