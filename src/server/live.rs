//! `/v1/live`: one WHIP-shaped resource per conversation (RFC 9725, but two-way).
//!
//! A place is taken before the offer is looked at; everything a refused or broken offer took is given back by `drop`.

use super::{
    Service,
    error::ApiError,
    presenters::{portrait, sentence},
};
use crate::{
    avatar::OpenOptions,
    engine::Refusal,
    net::{IceServer, NetError, Peer},
    session::{self, Reason, SessionId, SessionSpec},
};
use axum::{
    body::Body,
    extract::{Path, Query, State, rejection::QueryRejection},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use futures::FutureExt;
use serde::Deserialize;
use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

/// Largest offer or fragment; those of browsers have 2–8 KiB.
const MAX_SDP: usize = 64 * 1024;
const SDP: &str = "application/sdp";
const FRAGMENT: &str = "application/trickle-ice-sdpfrag";
const ACCEPT_POST: HeaderName = HeaderName::from_static("accept-post");
const ACCEPT_PATCH: HeaderName = HeaderName::from_static("accept-patch");
/// How long `DELETE` waits for the place to be free, so that the next `POST` of the same caller finds it.
const GOODBYE: Duration = Duration::from_secs(2);

/// The peers of live conversations, by session id.
#[derive(Clone, Default)]
pub(super) struct Peers(Arc<Mutex<HashMap<SessionId, Entry>>>);

#[derive(Clone)]
struct Entry {
    peer: Arc<Peer>,
    /// Cancelled when the conversation is over and its place is given back.
    gone: CancellationToken,
}

impl Peers {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<SessionId, Entry>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn get(&self, id: &str) -> Result<(SessionId, Entry), ApiError> {
        let id = SessionId::from(id);
        let entry = self.lock().get(&id).cloned();
        entry.map(|e| (id, e)).ok_or_else(|| {
            ApiError::not_found("no_such_session", "This conversation has ended, or never was. Start a new one.")
        })
    }
}

/// Takes a conversation off the list, however its task ends.
struct Listed {
    peers: Peers,
    id: SessionId,
}

impl Drop for Listed {
    fn drop(&mut self) {
        if let Some(entry) = self.peers.lock().remove(&self.id) {
            entry.gone.cancel();
        }
    }
}

#[derive(Deserialize)]
pub(super) struct Asked {
    presenter: Option<String>,
    /// Same seed, same face movements for the same voice.
    seed: Option<u64>,
}

/// `POST /v1/live`
pub(super) async fn offer(
    State(service): State<Arc<Service>>,
    asked: Result<Query<Asked>, QueryRejection>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    if super::media_type(&headers) != SDP {
        return Err(wrong_type(SDP, "the offer"));
    }
    let Query(asked) = asked.map_err(|e| {
        ApiError::bad_request("wrong_query", format!("{}. Allowed are presenter=ID and seed=NUMBER.", e.body_text()))
    })?;
    let offer = text(body, "offer").await?;

    let slot = service.rooms.engine.admit().map_err(refused)?;
    let (presenter, portrait) = portrait(&service, asked.presenter.as_deref()).await?;
    let ((peer, events, out), answer) = service.rooms.net.answer_live(&offer).await.map_err(net_error)?;

    let id = SessionId::random();
    let peer = Arc::new(peer);
    let gone = CancellationToken::new();
    let etag = peer.etag();
    service.peers.lock().insert(id.clone(), Entry { peer: peer.clone(), gone });
    let listed = Listed { peers: service.peers.clone(), id: id.clone() };
    let control = service.rooms.sessions.enter(id.clone(), &presenter, Instant::now());
    let mut options = OpenOptions { steps: service.rooms.steps, ..OpenOptions::default() };
    if let Some(seed) = asked.seed {
        options.seed = seed;
    }
    let geometry = service.rooms.engine.geometry().clone();
    let spec = SessionSpec { id: id.clone(), portrait, presenter, options, geometry };
    let config = service.rooms.session_config.clone();
    tokio::spawn(async move {
        let talk = session::run(spec, slot, events, out, control, config);
        if AssertUnwindSafe(talk).catch_unwind().await.is_err() {
            tracing::error!(session = listed.id.short(), "a conversation's task panicked; this is a bug");
        }
        peer.close().await;
        drop(listed);
    });

    let mut response = (StatusCode::CREATED, answer).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(SDP));
    put(headers, header::LOCATION, &format!("/v1/live/{}", id.as_str()));
    put(headers, header::ETAG, &etag);
    headers.insert(ACCEPT_PATCH, HeaderValue::from_static(FRAGMENT));
    links(headers, service.rooms.net.ice_servers());
    Ok(response)
}

/// `PATCH /v1/live/{id}`: `If-Match` with the current tag trickles, `*` restarts ICE.
pub(super) async fn patch(
    State(service): State<Arc<Service>>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let (_, Entry { peer, .. }) = service.peers.get(&id)?;
    if super::media_type(&headers) != FRAGMENT {
        return Err(wrong_type(FRAGMENT, "candidates or new credentials"));
    }
    let Some(wanted) = headers.get(header::IF_MATCH).cloned() else {
        return Err(ApiError::new(
            StatusCode::PRECONDITION_REQUIRED,
            "if_match_missing",
            "Send If-Match: the conversation's ETag to add candidates, or * to restart ICE.",
        ));
    };
    let fragment = text(body, "fragment").await?;
    if wanted == "*" {
        let answer = peer.restart(&fragment).await.map_err(net_error)?;
        let mut response = (StatusCode::OK, answer).into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(FRAGMENT));
        put(response.headers_mut(), header::ETAG, &peer.etag());
        return Ok(response);
    }
    if wanted.as_bytes() != peer.etag().as_bytes() {
        return Err(ApiError::new(
            StatusCode::PRECONDITION_FAILED,
            "stale_etag",
            "ICE was restarted since this ETag was given. Use the newest one.",
        ));
    }
    peer.trickle(&fragment).await.map_err(net_error)?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// `DELETE /v1/live/{id}`: ends it; answers when its place is free.
pub(super) async fn delete(
    State(service): State<Arc<Service>>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    let (id, Entry { peer, gone }) = service.peers.get(&id)?;
    match service.rooms.sessions.get(&id) {
        Some(handle) => handle.close(Reason::Stopped),
        None => peer.close().await,
    }
    let _ = tokio::time::timeout(GOODBYE, gone.cancelled()).await;
    Ok(StatusCode::OK)
}

/// `OPTIONS /v1/live` (not a CORS preflight): what may be posted, and which ICE servers to use.
pub(super) async fn options(State(service): State<Arc<Service>>) -> Response {
    let mut response = StatusCode::OK.into_response();
    response.headers_mut().insert(ACCEPT_POST, HeaderValue::from_static(SDP));
    links(response.headers_mut(), service.rooms.net.ice_servers());
    response
}

/// `GET /v1/live`: nothing to see, and that is no error (RFC 9725 §4.2).
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

fn refused(refusal: Refusal) -> ApiError {
    match refusal {
        Refusal::Full { retry_after } => {
            ApiError::unavailable("full", "Every presenter is in a conversation just now.", retry_after)
        }
        Refusal::Failed(why) => {
            tracing::warn!("a conversation was refused: the engine has failed: {why}");
            ApiError::unavailable(
                "engine_failed",
                "The engine that draws the presenter has failed. The server's log says why; it must be started again.",
                Duration::from_secs(30),
            )
        }
        Refusal::Draining => ApiError::unavailable(
            "draining",
            "The service is being stopped and takes no new conversations.",
            Duration::from_secs(30),
        ),
    }
}

fn net_error(error: NetError) -> ApiError {
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
