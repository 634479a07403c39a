//! Connections as HTTP resources (RFC 9725): what `/v1/live`, WHIP and WHEP share. An offer makes one; `PATCH` trickles or
//! restarts ICE, `DELETE` ends it.

use super::{Service, access, error::ApiError, presenters::sentence};
use crate::{
    net::{IceServer, NetError, Peer},
    session::{Reason, SessionId},
};
use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant, SystemTime},
};
use tokio_util::sync::CancellationToken;

/// Largest offer or fragment; those of browsers have 2–8 KiB.
const MAX_SDP: usize = 64 * 1024;
pub(super) const SDP: &str = "application/sdp";
const FRAGMENT: &str = "application/trickle-ice-sdpfrag";
const ACCEPT_POST: HeaderName = HeaderName::from_static("accept-post");
const ACCEPT_PATCH: HeaderName = HeaderName::from_static("accept-patch");
/// How long `DELETE` waits for the place to be free, so that the next `POST` of the same caller finds it.
const GOODBYE: Duration = Duration::from_secs(2);
/// Changes to one connection: a client that trickles candidate by candidate stays far below.
const PATCHES: (f64, f64) = (50.0, 20.0);

/// The connections that stand, by the path of their resource.
#[derive(Clone, Default)]
pub(super) struct Peers(Arc<Mutex<HashMap<String, Entry>>>);

#[derive(Clone)]
struct Entry {
    peer: Arc<Peer>,
    /// The conversation that ends with this connection.
    session: Option<SessionId>,
    /// Cancelled when the connection is over and its place is given back.
    gone: CancellationToken,
    patches: Arc<Mutex<Pace>>,
}

impl Peers {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Lists a connection under its path until what is returned is dropped.
    pub(super) fn enter(&self, path: &str, peer: &Arc<Peer>, session: Option<SessionId>) -> Listed {
        let entry = Entry {
            peer: peer.clone(),
            session,
            gone: CancellationToken::new(),
            patches: Arc::new(Mutex::new(Pace::new(PATCHES, Instant::now()))),
        };
        self.lock().insert(path.to_string(), entry);
        Listed { peers: self.clone(), path: path.to_string() }
    }

    fn get(&self, path: &str) -> Result<Entry, ApiError> {
        self.lock().get(path).cloned().ok_or_else(|| {
            ApiError::not_found("no_such_session", "This connection has ended, or never was. Start a new one.")
        })
    }
}

/// Takes a connection off the list, however its task ends.
pub(super) struct Listed {
    peers: Peers,
    path: String,
}

impl Drop for Listed {
    fn drop(&mut self) {
        if let Some(entry) = self.peers.lock().remove(&self.path) {
            entry.gone.cancel();
        }
    }
}

/// So many at once, so many a second on average.
#[derive(Debug)]
pub(super) struct Pace {
    burst: f64,
    per_second: f64,
    left: f64,
    at: Instant,
}

impl Pace {
    pub(super) fn new((burst, per_second): (f64, f64), now: Instant) -> Pace {
        Pace { burst, per_second, left: burst, at: now }
    }

    /// Whether nothing of it is used.
    pub(super) fn rested(&self, now: Instant) -> bool {
        self.left + now.saturating_duration_since(self.at).as_secs_f64() * self.per_second >= self.burst
    }

    /// # Errors
    /// 429 with `Retry-After` for what is too much.
    pub(super) fn take(&mut self, now: Instant) -> Result<(), ApiError> {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * self.per_second;
        self.left = (self.left + gained).min(self.burst);
        self.at = now;
        if self.left < 1.0 {
            let mut error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, "too_many", "Too many requests; slow down.");
            error.retry_after =
                Some(Duration::from_secs_f64(((1.0 - self.left) / self.per_second).clamp(1.0, 3600.0).ceil()));
            return Err(error);
        }
        self.left -= 1.0;
        Ok(())
    }
}

/// The body of a `POST` that must be an offer.
///
/// # Errors
/// 415, 413, 400.
pub(super) async fn offer(headers: &HeaderMap, body: Body) -> Result<String, ApiError> {
    if super::media_type(headers) != SDP {
        return Err(wrong_type(SDP, "the offer"));
    }
    text(body, "offer").await
}

/// 201 with the answer, for a connection that was just made under `path`.
pub(super) fn created(service: &Service, path: &str, etag: &str, answer: String) -> Response {
    let mut response = (StatusCode::CREATED, answer).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(SDP));
    put(headers, header::LOCATION, path);
    put(headers, header::ETAG, etag);
    headers.insert(ACCEPT_PATCH, HeaderValue::from_static(FRAGMENT));
    links(headers, &service.rooms.net.ice_servers(SystemTime::now()));
    response
}

/// `PATCH` on a connection: `If-Match` with the current tag trickles, `*` restarts ICE, and so do new credentials.
pub(super) async fn patch(
    State(service): State<Arc<Service>>,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let Entry { peer, patches, .. } = service.peers.get(uri.path())?;
    patches.lock().unwrap_or_else(|e| e.into_inner()).take(Instant::now())?;
    if super::media_type(&headers) != FRAGMENT {
        return Err(wrong_type(FRAGMENT, "candidates or new credentials"));
    }
    let Some(wanted) = headers.get(header::IF_MATCH).cloned() else {
        return Err(ApiError::new(
            StatusCode::PRECONDITION_REQUIRED,
            "if_match_missing",
            "Send If-Match: the connection's ETag to add candidates, or * to restart ICE.",
        ));
    };
    let fragment = text(body, "fragment").await?;
    if wanted != "*" && wanted.as_bytes() != peer.etag().as_bytes() {
        return Err(ApiError::new(
            StatusCode::PRECONDITION_FAILED,
            "stale_etag",
            "ICE was restarted since this ETag was given. Use the newest one.",
        ));
    }
    if wanted == "*" || peer.is_restart(&fragment).await {
        let answer = peer.restart(&fragment).await.map_err(net_error)?;
        let mut response = (StatusCode::OK, answer).into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(FRAGMENT));
        put(response.headers_mut(), header::ETAG, &peer.etag());
        return Ok(response);
    }
    peer.trickle(&fragment).await.map_err(net_error)?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// `DELETE` on a connection: ends it; answers when its place is free.
pub(super) async fn delete(State(service): State<Arc<Service>>, uri: Uri) -> Result<StatusCode, ApiError> {
    let Entry { peer, session, gone, .. } = service.peers.get(uri.path())?;
    match session.and_then(|id| service.rooms.sessions.get(&id)) {
        Some(handle) => handle.close(Reason::Stopped),
        None => peer.close().await,
    }
    let _ = tokio::time::timeout(GOODBYE, gone.cancelled()).await;
    Ok(StatusCode::OK)
}

/// `OPTIONS` (not a CORS preflight) where offers are posted: what may be posted, and which ICE servers to use.
pub(super) async fn options(State(service): State<Arc<Service>>, headers: HeaderMap) -> Response {
    let mut response = StatusCode::OK.into_response();
    response.headers_mut().insert(ACCEPT_POST, HeaderValue::from_static(SDP));
    links(response.headers_mut(), &access::ice_servers(&service, &headers));
    response
}

/// `OPTIONS` (not a CORS preflight) on a connection: how it may be changed.
pub(super) async fn options_of_one() -> Response {
    (StatusCode::OK, [(ACCEPT_PATCH, FRAGMENT)]).into_response()
}

/// `GET`: nothing to see, and that is no error (RFC 9725 §4.1).
pub(super) async fn nothing() -> StatusCode {
    StatusCode::NO_CONTENT
}

async fn text(body: Body, what: &str) -> Result<String, ApiError> {
    let too_large = || format!("The {what} is larger than {} KiB.", MAX_SDP / 1024);
    let bytes = super::read_body(body, MAX_SDP, too_large).await?;
    String::from_utf8(bytes.into())
        .map_err(|_| ApiError::bad_request("malformed_sdp", format!("The {what} is not text (UTF-8).")))
}

fn wrong_type(wanted: &str, what: &str) -> ApiError {
    ApiError::new(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "wrong_content_type",
        format!("Send {what} with Content-Type: {wanted}."),
    )
}

pub(super) fn net_error(error: NetError) -> ApiError {
    let message = sentence(&error.to_string());
    match error {
        NetError::TooLarge(_) => ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message),
        NetError::Malformed(_) => ApiError::bad_request("malformed_sdp", message),
        NetError::NoMicrophone => ApiError::unusable("no_microphone", message),
        NetError::NoVideo => ApiError::unusable("no_video", message),
        NetError::NoOpus => ApiError::unusable("no_opus", message),
        NetError::NoH264 => ApiError::unusable("no_h264", message),
        NetError::NothingToSend => ApiError::unusable("nothing_to_send", message),
        NetError::Unsupported(_) => ApiError::unusable("unsupported_offer", message),
        NetError::NotARestart => ApiError::unusable("not_a_restart", message),
        NetError::Closed => ApiError::not_found("no_such_session", message),
        NetError::NoPort(_) => {
            tracing::warn!("a conversation was refused: {message}");
            ApiError::unavailable("no_port", message, Duration::from_secs(5))
        }
        NetError::Config(_) | NetError::Stack(_) => {
            tracing::error!("an offer could not be answered: {message}");
            ApiError::internal(message)
        }
    }
}

fn put(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    match HeaderValue::from_str(value) {
        Ok(value) => {
            headers.append(name, value);
        }
        Err(_) => tracing::warn!("a value cannot stand in the header {name}: check net.ice_servers"),
    }
}

/// One `Link` per ICE server (RFC 9725 §4.6).
fn links(headers: &mut HeaderMap, servers: &[IceServer]) {
    for server in servers {
        for url in &server.urls {
            put(headers, header::LINK, &link(url, server));
        }
    }
}

fn link(url: &str, server: &IceServer) -> String {
    if server.username.is_empty() {
        return format!("<{url}>; rel=\"ice-server\"");
    }
    let quoted = |s: &str| s.replace('\\', "\\\\").replace('"', "\\\"");
    format!(
        "<{url}>; rel=\"ice-server\"; username=\"{}\"; credential=\"{}\"; credential-type=\"password\"",
        quoted(&server.username),
        quoted(&server.credential)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_allows_a_burst_and_then_its_rate() {
        let t0 = Instant::now();
        let mut pace = Pace::new((3.0, 2.0), t0);
        let ok = |pace: &mut Pace, ms| pace.take(t0 + Duration::from_millis(ms)).is_ok();
        assert_eq!([0, 0, 0, 0].map(|ms| ok(&mut pace, ms)), [true, true, true, false]);
        assert_eq!([400, 600, 700, 60_000].map(|ms| ok(&mut pace, ms)), [false, true, false, true]);
    }

    #[test]
    fn an_ice_server_becomes_a_link() {
        let mut server = IceServer { urls: vec!["stun:stun.example.net".into()], ..IceServer::default() };
        assert_eq!(link(&server.urls[0], &server), "<stun:stun.example.net>; rel=\"ice-server\"");
        server.username = "me".into();
        server.credential = "a\"b".into();
        assert_eq!(
            link("turn:t.example.net", &server),
            "<turn:t.example.net>; rel=\"ice-server\"; username=\"me\"; credential=\"a\\\"b\"; \
             credential-type=\"password\""
        );
    }
}
