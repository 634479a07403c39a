//! `/v1/sessions`: sessions that programs begin, see, change and end, and the tokens that open one to its users.
//!
//! Two rights: the control API (begin, list, end) is for whoever runs the service; a session's token is for one
//! session's media and speech, and may be given to a page. It is random, kept as its SHA-256 only, expires, and is
//! taken from `Authorization: Bearer` or, for pages and WebSockets that cannot send headers, from `?token=`.
//!
//! | edge | capacity | when full |
//! | --- | --- | --- |
//! | sessions | `engine.sessions` | 503 with `Retry-After` |
//! | ends that are remembered, for whoever asks later | 256 | the oldest leaves |

use super::{
    Service,
    access::{self, Caller},
    error::ApiError,
    gesture,
    info::Ice,
    keys, limits, livekit, presenters, resource,
};
use crate::{
    avatar::{AvatarError, OpenOptions},
    codec::View,
    engine::Slot,
    livekit::Joined,
    media::Portrait,
    session::{self, ChangeError, Handle, Reason, SessionId, SessionSpec, SinkRole, Snapshot},
};
use axum::{
    Extension, Json,
    body::Body,
    extract::{FromRequest, FromRequestParts, RawPathParams, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use futures::FutureExt;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::{
    collections::{HashMap, VecDeque},
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant, SystemTime},
};

/// Largest JSON body of the control API.
const MAX_JSON: usize = 64 * 1024;
/// Longest prompt, characters.
pub(super) const MAX_PROMPT: usize = 4000;
const REMEMBERED: usize = 256;
/// How long `DELETE` waits for the place to be free.
const GOODBYE: Duration = Duration::from_secs(2);

/// Tokens of live sessions and the ends of past ones.
#[derive(Clone, Default)]
pub(super) struct Sessions(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    live: HashMap<SessionId, Entry>,
    ended: VecDeque<(SessionId, Reason)>,
}

struct Entry {
    /// SHA-256 of the token.
    token: [u8; 32],
    expires: Instant,
}

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A new token; an older one is worth nothing any more.
    fn issue(&self, id: &SessionId, ttl: Duration, now: Instant) -> String {
        let token = format!("{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>());
        self.lock().live.insert(id.clone(), Entry { token: digest(&token), expires: now + ttl });
        token
    }

    fn check(&self, id: &SessionId, token: &str, now: Instant) -> Result<(), ApiError> {
        let inner = self.lock();
        // Hashes are compared: how long that takes says nothing about the token.
        match inner.live.get(id) {
            Some(entry) if !keys::same(&entry.token, &digest(token)) => Err(unauthorised(
                "wrong_token",
                "This token does not open this session. Use the newest one that the session was given.",
            )),
            Some(entry) if now >= entry.expires => {
                Err(unauthorised("expired_token", "This token has expired. Ask for a new one: POST …/token."))
            }
            Some(_) => Ok(()),
            None => Err(unauthorised("wrong_token", "No token opens this session.")),
        }
    }

    /// Whether a token opens any session.
    pub(super) fn knows(&self, token: &str, now: Instant) -> bool {
        let hash = digest(token);
        self.lock().live.values().any(|entry| now < entry.expires && keys::same(&entry.token, &hash))
    }

    fn end(&self, id: &SessionId, reason: Reason) {
        let mut inner = self.lock();
        inner.live.remove(id);
        inner.ended.push_back((id.clone(), reason));
        if inner.ended.len() > REMEMBERED {
            inner.ended.pop_front();
        }
    }

    fn gone(&self, id: &SessionId) -> ApiError {
        let ended = self.lock().ended.iter().find(|e| e.0 == *id).map(|e| e.1.clone());
        let Some(reason) = ended else {
            return ApiError::not_found("no_such_session", "This session has ended, or never was. Begin a new one.");
        };
        let status = StatusCode::from_u16(reason.status()).unwrap_or(StatusCode::GONE);
        ApiError::new(status, reason.label(), reason.message())
    }
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

fn unauthorised(code: &'static str, message: &str) -> ApiError {
    ApiError::new(StatusCode::UNAUTHORIZED, code, message)
}

/// The live session that a route's `{id}` names, opened by its token.
///
/// # Errors
/// 401 without a good token; 404, 410 or 503 for a session that is over.
pub(super) struct Opened(pub(super) Handle);

impl FromRequestParts<Arc<Service>> for Opened {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, service: &Arc<Service>) -> Result<Opened, ApiError> {
        let Controlled(handle) = Controlled::from_request_parts(parts, service).await?;
        let asked = || parts.uri.query()?.split('&').find_map(|pair| pair.strip_prefix("token="));
        let token = access::bearer(&parts.headers).or_else(asked).ok_or_else(|| {
            let how = "Show the session's token: Authorization: Bearer TOKEN, or ?token=TOKEN.";
            unauthorised("no_token", how)
        })?;
        service.sessions.check(handle.id(), token, Instant::now())?;
        Ok(Opened(handle))
    }
}

/// The live session that a route's `{id}` names, for the control API, whose routes need a key (`access.rs`).
///
/// # Errors
/// 404, 410 or 503 for a session that is over.
pub(super) struct Controlled(Handle);

impl FromRequestParts<Arc<Service>> for Controlled {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, service: &Arc<Service>) -> Result<Controlled, ApiError> {
        let path = RawPathParams::from_request_parts(parts, service).await;
        let named = path.iter().flatten().find(|(name, _)| *name == "id").map_or("", |(_, id)| id);
        let id = SessionId::from(named);
        service.rooms.sessions.get(&id).map(Controlled).ok_or_else(|| service.sessions.gone(&id))
    }
}

/// A JSON body.
///
/// # Errors
/// 415, 413, and 400 with a sentence that says what is wrong with it.
pub(super) struct Sent<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Arc<Service>> for Sent<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _service: &Arc<Service>) -> Result<Sent<T>, ApiError> {
        if super::media_type(request.headers()) != "application/json" {
            return Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "wrong_content_type",
                "Send JSON with Content-Type: application/json.",
            ));
        }
        let too_large = || format!("The request is larger than {} KiB.", MAX_JSON / 1024);
        let bytes = super::read_body(request.into_body(), MAX_JSON, too_large).await?;
        let bytes = if bytes.is_empty() { &b"{}"[..] } else { &bytes };
        serde_json::from_slice(bytes).map(Sent).map_err(|e| {
            ApiError::bad_request("wrong_json", presenters::sentence(&format!("The request cannot be read: {e}")))
        })
    }
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Wanted {
    /// A built-in presenter's name or `portrait:ID`; none is the default one.
    presenter: Option<String>,
    prompt: Option<String>,
    /// The engine that is expected here; another one is an error.
    engine: Option<String>,
    profile: Option<String>,
    seed: Option<u64>,
    background: Option<String>,
    /// How much the presenter moves of its own; none is as configured.
    liveliness: Option<f32>,
    /// A LiveKit room to show it in.
    livekit: Option<livekit::Room>,
    limits: Limits,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Limits {
    max_session_s: Option<u64>,
    idle_timeout_s: Option<u64>,
}

/// What is asked for within what the service allows; 0 stands for no limit.
fn limited(key: &str, asked: Option<u64>, allowed: u64) -> Result<u64, ApiError> {
    match asked {
        None => Ok(allowed),
        Some(0) if allowed > 0 => {
            Err(ApiError::unusable("limit_too_high", format!("At most {allowed} is allowed for limits.{key}.")))
        }
        Some(s) if allowed > 0 && s > allowed => {
            Err(ApiError::unusable("limit_too_high", format!("At most {allowed} is allowed for limits.{key}.")))
        }
        Some(s) => Ok(s),
    }
}

/// What of this the engine cannot do, as a sentence.
fn possible(service: &Service, wanted: &Wanted) -> Result<(), ApiError> {
    let name = service.rooms.engine_name;
    let cannot = |code, text: String| Err(ApiError::unusable(code, text));
    if let Some(engine) = wanted.engine.as_deref().filter(|e| *e != name) {
        return cannot(
            "no_such_engine",
            format!("This service runs the engine `{name}`, not `{}`.", printable(engine)),
        );
    }
    if let Some(profile) = wanted.profile.as_deref().filter(|p| *p != "default") {
        return cannot(
            "no_such_profile",
            format!("There is no profile `{}`; the only one is `default`.", printable(profile)),
        );
    }
    if let Some(prompt) = &wanted.prompt {
        if !service.rooms.engine.capabilities().prompt {
            return cannot("no_prompt", format!("The engine `{name}` does not read prompts; leave `prompt` out."));
        }
        if prompt.chars().count() > MAX_PROMPT {
            return cannot("prompt_too_long", format!("A prompt may have at most {MAX_PROMPT} characters."));
        }
    }
    Ok(())
}

fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(40).collect()
}

/// `POST /v1/sessions`
pub(super) async fn begin(
    State(service): State<Arc<Service>>,
    Extension(caller): Extension<Caller>,
    Sent(mut wanted): Sent<Wanted>,
) -> Result<Response, ApiError> {
    possible(&service, &wanted)?;
    let view = wanted.background.as_deref().map(|b| background(&service, b)).transpose()?;
    let liveliness = wanted.liveliness.map(|l| gesture::liveliness(&service, l)).transpose()?;
    let mut config = limits::bounded(service.rooms.session_config.clone(), &caller);
    config.max_session_s = limited("max_session_s", wanted.limits.max_session_s, config.max_session_s)?;
    config.idle_timeout_s = limited("idle_timeout_s", wanted.limits.idle_timeout_s, config.idle_timeout_s)?;
    let slot = limits::place(&service, &caller)?;
    let face = presenters::portrait(&service, wanted.presenter.as_deref()).await?;
    let room = match wanted.livekit.take() {
        Some(room) => Some(livekit::enter(&service, room).await?),
        None => None,
    };
    let mut options = OpenOptions { steps: service.rooms.steps, prompt: wanted.prompt, ..OpenOptions::default() };
    options.seed = wanted.seed.unwrap_or(options.seed);
    let (handle, token) = host(&service, slot, face, options, config, room)?;
    let id = handle.id().clone();
    let ttl = Duration::from_secs(service.config.session_token_ttl_s);
    if let Some(view) = view {
        handle.set_view(view);
    }
    if let Some(liveliness) = liveliness {
        handle.direction().set_liveliness(liveliness);
    }
    let mut told = told(&service, &handle.snapshot(), handle.sinks());
    told.token = Some(token.clone());
    told.token_expires_in_s = Some(ttl.as_secs());
    told.urls = urls(&id, &token);
    let servers = service.rooms.net.ice_servers(SystemTime::now());
    told.ice_servers = Some(servers.into_iter().map(Ice::from).collect());
    let mut response = (StatusCode::CREATED, Json(told)).into_response();
    if let Ok(location) = HeaderValue::from_str(&format!("/v1/sessions/{}", id.as_str())) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
}

/// A background as it is asked for: `keep`, or what a [`View`] is called. `?view=` of a player is the same.
pub(super) fn background(service: &Service, asked: &str) -> Result<View, ApiError> {
    let name = service.rooms.engine_name;
    let view = match asked {
        "keep" => View::Plain,
        other => other
            .replace("%23", "#")
            .parse()
            .map_err(|e: String| ApiError::unusable("no_such_background", presenters::sentence(&printable_long(&e))))?,
    };
    if view.cuts_out() && !service.rooms.engine.geometry().matte {
        let text = format!(
            "The engine `{name}` does not know what of its picture is background. Choose a portrait before a flat colour \
             and key it out in the player."
        );
        return Err(ApiError::unusable("no_matte", text));
    }
    Ok(view)
}

fn printable_long(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(300).collect()
}

/// Begins a session on a place that was taken; with a room, in that room too. Returns it and its token.
pub(super) fn host(
    service: &Arc<Service>,
    slot: Slot,
    (presenter, portrait): (String, Portrait),
    options: OpenOptions,
    config: session::Config,
    room: Option<Joined>,
) -> Result<(Handle, String), ApiError> {
    let id = SessionId::from(service.unguessable().as_str());
    let geometry = service.rooms.engine.geometry().clone();
    let (width, height) = (geometry.width, geometry.height);
    let now = Instant::now();
    let token = service.sessions.issue(&id, Duration::from_secs(service.config.session_token_ttl_s), now);
    let control = service.rooms.sessions.enter(id.clone(), &presenter, now);
    let handle = service.rooms.sessions.get(&id);
    let spec = SessionSpec { id: id.clone(), portrait, presenter, options, geometry };
    let sessions = service.sessions.clone();
    let own = id.clone();
    let worker = room
        .zip(handle.clone())
        .map(|(room, handle)| tokio::spawn(room.run(service.rooms.net.clone(), handle, width, height)));
    tokio::spawn(async move {
        let talk = session::host(spec, slot, control, config);
        let reason = AssertUnwindSafe(talk).catch_unwind().await.unwrap_or_else(|_| {
            tracing::error!(session = own.short(), "a session's task panicked; this is a bug");
            Reason::Abandoned
        });
        sessions.end(&own, reason);
        if let Some(mut worker) = worker
            && tokio::time::timeout(GOODBYE, &mut worker).await.is_err()
        {
            worker.abort();
        }
    });
    handle.map(|handle| (handle, token)).ok_or_else(|| service.sessions.gone(&id))
}

/// Where everything of a session is, relative to this service.
fn urls(id: &SessionId, token: &str) -> serde_json::Value {
    let at = format!("/v1/sessions/{}", id.as_str());
    let page = format!("session={}&token={token}", id.as_str());
    json!({
        "session": at,
        "live": format!("{at}/live"),
        "whip": format!("{at}/whip"),
        "whep": format!("{at}/whep"),
        "websocket": format!("{at}/ws?token={token}"),
        "overlay": format!("/overlay?{page}"),
        "bot": format!("/bot?{page}"),
    })
}

#[derive(Serialize)]
struct Told {
    id: String,
    state: &'static str,
    presenter: String,
    engine: &'static str,
    age_s: u64,
    sinks: usize,
    width: u32,
    height: u32,
    fps: u32,
    speech_buffered_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_expires_in_s: Option<u64>,
    #[serde(skip_serializing_if = "serde_json::Value::is_null")]
    urls: serde_json::Value,
    /// For players: STUN, and TURN with credentials that hold for a while.
    #[serde(skip_serializing_if = "Option::is_none")]
    ice_servers: Option<Vec<Ice>>,
}

fn told(service: &Service, s: &Snapshot, sinks: usize) -> Told {
    let g = service.rooms.engine.geometry();
    Told {
        id: s.id.as_str().into(),
        state: s.state.label(),
        presenter: s.presenter.clone(),
        engine: service.rooms.engine_name,
        age_s: s.since.elapsed().as_secs(),
        sinks,
        width: g.width,
        height: g.height,
        fps: g.fps,
        speech_buffered_ms: s.metrics.speech_buffered_ms.round(),
        token: None,
        token_expires_in_s: None,
        urls: serde_json::Value::Null,
        ice_servers: None,
    }
}

/// `GET /v1/sessions`
pub(super) async fn list(State(service): State<Arc<Service>>) -> Result<Response, ApiError> {
    let all: Vec<Told> =
        service.rooms.sessions.snapshots().iter().map(|s| told(&service, s, s.metrics.sinks as usize)).collect();
    Ok(Json(json!({ "sessions": all })).into_response())
}

/// `GET /v1/sessions/{id}`
pub(super) async fn one(State(service): State<Arc<Service>>, Controlled(handle): Controlled) -> Response {
    Json(told(&service, &handle.snapshot(), handle.sinks())).into_response()
}

/// `DELETE /v1/sessions/{id}`: answers when the place is free.
pub(super) async fn end(State(service): State<Arc<Service>>, Controlled(handle): Controlled) -> StatusCode {
    handle.close(Reason::Stopped);
    // Until its place is free, which is a moment after its last event.
    let over = async {
        while service.rooms.sessions.get(handle.id()).is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let _ = tokio::time::timeout(GOODBYE, over).await;
    StatusCode::NO_CONTENT
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Change {
    presenter: Option<String>,
    prompt: Option<String>,
    background: Option<String>,
    liveliness: Option<f32>,
}

/// `PATCH /v1/sessions/{id}`: what can be changed while it lives. All of it, or nothing and an error.
pub(super) async fn change(
    State(service): State<Arc<Service>>,
    Controlled(handle): Controlled,
    Sent(Change { presenter, prompt, background: asked, liveliness }): Sent<Change>,
) -> Result<Response, ApiError> {
    let view = asked.as_deref().map(|b| background(&service, b)).transpose()?;
    let liveliness = liveliness.map(|l| gesture::liveliness(&service, l)).transpose()?;
    possible(&service, &Wanted { prompt: prompt.clone(), ..Wanted::default() })?;
    let face = match &presenter {
        Some(presenter) => Some(presenters::portrait(&service, Some(presenter)).await?),
        None => None,
    };
    if face.is_some() || prompt.is_some() {
        let patience = Duration::from_secs(service.rooms.session_config.prepare_timeout_s);
        match tokio::time::timeout(patience, handle.change(face, prompt)).await {
            Ok(Ok(())) => {}
            Ok(Err(ChangeError::Refused(AvatarError::Portrait(why) | AvatarError::Options(why)))) => {
                return Err(ApiError::unusable("unusable_picture", presenters::sentence(&why)));
            }
            Ok(Err(ChangeError::Refused(error))) => {
                tracing::error!("a presenter could not be changed: {error}");
                return Err(ApiError::internal("The engine could not change the presenter; the one before stays."));
            }
            Ok(Err(ChangeError::Overtaken)) => {
                let text = "The session ended meanwhile, or a newer change came first.";
                return Err(ApiError::new(StatusCode::CONFLICT, "overtaken", text));
            }
            Err(_) => {
                let text = "The engine is not ready for a change; the presenter is as before. Try again in a moment.";
                return Err(ApiError::unavailable("not_changed", text, Duration::from_secs(5)));
            }
        }
    }
    if let Some(view) = view {
        handle.set_view(view);
    }
    if let Some(liveliness) = liveliness {
        handle.direction().set_liveliness(liveliness);
    }
    Ok(Json(told(&service, &handle.snapshot(), handle.sinks())).into_response())
}

/// `POST /v1/sessions/{id}/token`: a new token; the one before opens nothing any more. What is connected stays so.
pub(super) async fn token(State(service): State<Arc<Service>>, Controlled(handle): Controlled) -> Response {
    let ttl = Duration::from_secs(service.config.session_token_ttl_s);
    let token = service.sessions.issue(handle.id(), ttl, Instant::now());
    let urls = urls(handle.id(), &token);
    let told = json!({ "token": token, "token_expires_in_s": ttl.as_secs(), "urls": urls });
    (StatusCode::CREATED, Json(told)).into_response()
}

/// `POST /v1/sessions/{id}/interrupt`: silence now.
pub(super) async fn interrupt(Opened(handle): Opened) -> StatusCode {
    handle.interrupt();
    StatusCode::NO_CONTENT
}

/// `POST /v1/sessions/{id}/live`: a two-way page joins; its microphone is the one that is heard from now on.
pub(super) async fn join(
    State(service): State<Arc<Service>>,
    Opened(handle): Opened,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let offer = resource::offer(&headers, body).await?;
    let ((peer, events, out), answer) = service.rooms.net.answer_live(&offer).await.map_err(resource::net_error)?;
    let path = format!("/v1/live/{}", service.unguessable());
    let peer = Arc::new(peer);
    let etag = peer.etag();
    let listed = service.peers.enter(&path, &peer, None);
    let place = handle.attach(out, SinkRole::Peer);
    handle.listen(events);
    tokio::spawn(async move {
        peer.ended().await;
        drop((place, listed));
    });
    Ok(resource::created(&service, &path, &etag, answer))
}
