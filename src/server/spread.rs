//! One service of several processes, as HTTP sees it: which node a request is for, and how it gets there.
//!
//! | request | answered by |
//! | --- | --- |
//! | `POST /v1/live`, `/v1/sessions`, `/v1/livekit`… | a worker with a free place (`cluster::Node::place`) |
//! | anything of one session or connection | the node at the end of its id: over the bus, or, for WebSockets and recordings, through [`tunnel`] |
//! | `GET /v1/sessions` | everybody, put together |
//! | a page, a picture, health, metrics | whoever was asked |
//!
//! The node that a client reaches checks keys, origins and rates, and says who asks; a session's token is checked where
//! the session is. Keys do not leave the node they were shown to.

use super::{
    Service,
    access::{Caller, Right},
    error::ApiError,
    guard, health, limits, live,
    portraits::Consent,
    tunnel,
};
use crate::{
    cluster::{Ask, Facts, Local, Node, NodeId, Reply, Standing, State as NodeState, Unanswered},
    engine::Refusal,
    media::Portrait,
    session::{Reason, SessionId},
};
use axum::{
    Router,
    body::{Body, Bytes},
    extract::Request,
    http::{HeaderMap, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures::future::BoxFuture;
use hyper::service::Service as _;
use hyper_util::service::TowerToHyperService;
use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

/// Largest body of a request or an answer that goes over the bus; NATS allows a megabyte by default.
const MAX_BODY: usize = 900 * 1024;
/// Time left for our own part of a request that another node answers.
const OURS: Duration = Duration::from_secs(1);
/// Wait before the next try, where a node or the bus is away for a moment.
const SOON: Duration = Duration::from_secs(2);
/// Wait before the next try, where every place is taken.
const FULL: Duration = Duration::from_secs(5);
/// How long a list waits for nodes that do not answer.
const LIST: Duration = Duration::from_secs(2);
/// The method of an [`Ask`] for a piece of an uploaded picture, which is no HTTP.
const PICTURE: &str = "PICTURE";
const PIECE: usize = 512 * 1024;

/// Where a request belongs.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Here,
    /// Wherever there is room.
    Anywhere,
    Everywhere,
    At(NodeId),
}

fn place(route: Option<&str>, method: &Method, path: &str) -> Place {
    let Some(route) = route else { return Place::Here };
    let begins =
        ["/v1/live", "/v1/sessions", "/v1/livekit", "/v1/livekit/v1/sessions", "/v1/livekit/v1/session", "/v1/session"];
    if begins.contains(&route) {
        return match *method {
            Method::POST => Place::Anywhere,
            Method::GET if route == "/v1/sessions" => Place::Everywhere,
            _ => Place::Here,
        };
    }
    let of_one = route.starts_with("/v1/sessions/{id}") || route.starts_with("/v1/live/{id}");
    if !of_one || method == Method::OPTIONS {
        return Place::Here;
    }
    path.split('/').nth(3).and_then(NodeId::of).map_or(Place::Here, Place::At)
}

/// Answers a request that was let in, here or elsewhere.
pub(super) async fn reach(
    service: &Arc<Service>,
    route: Option<&str>,
    caller: Caller,
    request: Request,
    next: Next,
) -> Response {
    let Some(cluster) = &service.rooms.cluster else { return next.run(request).await };
    let done = match place(route, request.method(), request.uri().path()) {
        Place::At(id) if id == cluster.id() => return next.run(request).await,
        Place::Here => return next.run(request).await,
        Place::Anywhere => begin(service, cluster, caller, request).await,
        Place::Everywhere => list(cluster, caller, request, next).await,
        Place::At(id) => of_another(service, cluster, id, route.unwrap_or_default(), caller, request).await,
    };
    done.unwrap_or_else(IntoResponse::into_response)
}

fn patience(service: &Service) -> Duration {
    service.config.request_timeout().saturating_sub(OURS).max(OURS)
}

async fn begin(service: &Service, cluster: &Node, caller: Caller, request: Request) -> Result<Response, ApiError> {
    let again = format!("{}{}", cluster.public_url(), request.uri().path());
    let ask = letter(&caller, request, false).await?;
    let counted = limits::counted(service, &caller);
    let placed = cluster.place(ask, patience(service), counted.as_ref()).await;
    placed.map(answered).map_err(|why| match (why, counted) {
        (Unanswered::TooMany, Some((_, most))) => limits::too_many(&caller, most, FULL),
        (why, _) => unanswered(why, again),
    })
}

async fn of_another(
    service: &Arc<Service>,
    cluster: &Arc<Node>,
    id: NodeId,
    route: &str,
    caller: Caller,
    request: Request,
) -> Result<Response, ApiError> {
    let new = if route.starts_with("/v1/live") { "/v1/live" } else { "/v1/sessions" };
    let again = format!("{}{new}", cluster.public_url());
    if !cluster.reachable() {
        return Err(unanswered(Unanswered::Unreachable, again));
    }
    match cluster.standing(id) {
        Standing::Dead => return Err(unanswered(Unanswered::Gone, again)),
        Standing::Unknown => return Err(unanswered(Unanswered::Absent, again)),
        Standing::Alive => {}
    }
    let file = route.ends_with("/recording/{file}");
    if file || request.headers().contains_key(header::UPGRADE) {
        return tunnel::open(service, cluster, id, again, &caller, request).await;
    }
    // A session's token is checked where the session is.
    let token = service.rights.get().is_some_and(|rights| rights.get(route) == Some(&Right::Session));
    let ask = letter(&caller, request, token).await?;
    cluster.ask(id, ask, patience(service)).await.map(answered).map_err(|why| unanswered(why, again))
}

/// The sessions of all nodes.
async fn list(cluster: &Node, caller: Caller, request: Request, next: Next) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let ask = letter(&caller, Request::from_parts(parts.clone(), Body::empty()), false).await?;
    let (own, others) = tokio::join!(next.run(Request::from_parts(parts, body)), cluster.everybody(&ask, LIST));
    let (parts, body) = own.into_parts();
    let own = super::read_body(body, usize::MAX, String::new).await?;
    let read = |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes).ok();
    let mut all = read(&own).unwrap_or_default();
    if let Some(sessions) = all.get_mut("sessions").and_then(|s| s.as_array_mut()) {
        for other in others.iter().filter_map(|reply| read(&reply.body)) {
            sessions.extend(other["sessions"].as_array().into_iter().flatten().cloned());
        }
    }
    let mut response = axum::Json(all).into_response();
    *response.status_mut() = parts.status;
    Ok(response)
}

/// A request as it is told to another node.
async fn letter(caller: &Caller, request: Request, token: bool) -> Result<Ask, ApiError> {
    let (parts, body) = request.into_parts();
    let too_large = || {
        "This request is too large to be handed on to another machine. Bring the picture by itself (POST /v1/portraits) \
         and name it."
            .to_string()
    };
    let body = super::read_body(body, MAX_BODY, too_large).await?;
    let mut headers = Vec::new();
    for name in ["content-type", "accept", "if-match", "authorization", "x-api-key", "api-secret"] {
        let Some(value) = parts.headers.get(name).and_then(|v| v.to_str().ok()) else { continue };
        let secret = ["authorization", "x-api-key", "api-secret"].contains(&name);
        // That a key was shown is known there by who the caller is.
        headers.push((name.to_string(), if secret && !token { "checked".into() } else { value.to_string() }));
    }
    Ok(Ask {
        method: parts.method.to_string(),
        target: parts.uri.path_and_query().map_or("/", |target| target.as_str()).into(),
        headers,
        caller: serde_json::to_value(caller).map_err(|e| ApiError::internal(e.to_string()))?,
        body,
        ..Ask::default()
    })
}

fn answered(reply: Reply) -> Response {
    let status = StatusCode::from_u16(reply.status).unwrap_or(StatusCode::BAD_GATEWAY);
    let mut response = (status, reply.body).into_response();
    response.headers_mut().remove(header::CONTENT_TYPE);
    for (name, value) in reply.headers {
        if let (Ok(name), Ok(value)) = (header::HeaderName::try_from(name), value.parse()) {
            response.headers_mut().append(name, value);
        }
    }
    response
}

/// What a client is told. `again`: where to begin anew.
pub(super) fn unanswered(why: Unanswered, again: String) -> ApiError {
    let mut error = match why {
        Unanswered::Gone => ApiError::new(
            StatusCode::GONE,
            "worker_gone",
            format!(
                "The machine that held this session is gone, and the session with it. Begin a new one: POST {again}."
            ),
        ),
        Unanswered::Unreachable => {
            let text = "The machines of this service cannot reach each other just now. What stands goes on; try again in \
                        a moment.";
            ApiError::unavailable("cluster_unreachable", text, SOON)
        }
        Unanswered::Absent => {
            ApiError::unavailable("worker_absent", "The machine that this is for does not answer just now.", SOON)
        }
        Unanswered::Late => {
            let text = "The machine that was asked did not answer in time. Try again.";
            ApiError::new(StatusCode::GATEWAY_TIMEOUT, "worker_late", text)
        }
        Unanswered::TooLarge(most) => {
            let text = format!("The request is larger than the {most} bytes that can be handed on.");
            ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", text)
        }
        // Told by whoever counted.
        Unanswered::TooMany | Unanswered::Full => live::refused(Refusal::Full { retry_after: FULL }),
        Unanswered::Nobody => {
            let text = "No machine that draws presenters is there just now.";
            ApiError::unavailable("no_worker", text, SOON * 3)
        }
    };
    if error.status == StatusCode::GONE {
        error.reconnect = Some(again);
    }
    error
}

/// The service as other nodes ask it.
pub(super) struct Doors {
    pub(super) service: Arc<Service>,
    /// The routes without what stands before them: the node that let the caller in has done that.
    pub(super) inner: Router,
}

impl Local for Doors {
    fn report(&self) -> (NodeState, usize, usize, Facts) {
        let rooms = &self.service.rooms;
        let (stats, g) = (rooms.engine.stats(), rooms.engine.geometry());
        let state = match health::own(&self.service).1 {
            "ready" => NodeState::Ready,
            "draining" => NodeState::Draining,
            _ => NodeState::Failed,
        };
        let facts = Facts {
            engine: rooms.engine_name.into(),
            width: g.width,
            height: g.height,
            fps: g.fps,
            block_ms: g.block_span(1).as_millis_f64(),
            matte: g.matte,
        };
        (state, stats.slots, stats.used, facts)
    }

    fn held(&self) -> Vec<(String, usize)> {
        self.service.limits.sessions()
    }

    fn answer(self: Arc<Self>, ask: Ask) -> BoxFuture<'static, Reply> {
        Box::pin(async move {
            if ask.method == PICTURE {
                return piece(&self.service, &ask);
            }
            let limit = self.service.config.request_timeout();
            reply(guard::bounded(limit, self.route(ask)).await).await
        })
    }

    fn undo(&self, reply: &Reply) {
        let told: serde_json::Value = serde_json::from_slice(&reply.body).unwrap_or_default();
        // A page's conversation ends by itself when its connection does not come up.
        let id = told.get("session_id").or(told.get("id")).and_then(|id| id.as_str());
        if let Some(handle) = id.and_then(|id| self.service.rooms.sessions.get(&SessionId::from(id)))
            && handle.sinks() == 0
        {
            handle.close(Reason::Stopped);
        }
    }
}

impl Doors {
    async fn route(&self, ask: Ask) -> Response {
        let caller: Result<Caller, _> = serde_json::from_value(ask.caller);
        let request = ask.headers.into_iter().fold(
            axum::http::Request::builder().method(ask.method.as_str()).uri(ask.target),
            |request, (name, value)| request.header(name, value),
        );
        let (Ok(caller), Ok(request)) = (caller, request.body(Body::from(ask.body))) else {
            return ApiError::bad_request("wrong_request", "Another node sent a request that is none.").into_response();
        };
        let mut request: Request = request;
        request.extensions_mut().insert(caller);
        match TowerToHyperService::new(self.inner.clone()).call(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    }
}

async fn reply(response: Response) -> Reply {
    let (parts, body) = response.into_parts();
    let Ok(body) = axum::body::to_bytes(body, MAX_BODY).await else {
        let error = ApiError::internal("The answer is larger than one machine may hand another.");
        return Reply { status: error.status.as_u16(), body: Bytes::from(error.message), ..Reply::default() };
    };
    let own = [header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::CONNECTION];
    let told = |headers: &HeaderMap| {
        let told = headers.iter().filter(|(name, _)| !own.contains(name));
        told.filter_map(|(name, value)| Some((name.to_string(), value.to_str().ok()?.to_string()))).collect()
    };
    Reply { status: parts.status.as_u16(), headers: told(&parts.headers), body }
}

/// A piece of an uploaded picture, for the node that is to show it.
fn piece(service: &Service, ask: &Ask) -> Reply {
    let kept = service.portraits.get(&ask.target, Instant::now()).zip(service.portraits.consent(&ask.target));
    let offset = ask.headers.iter().find(|h| h.0 == "offset").and_then(|h| h.1.parse::<usize>().ok());
    let (Some((portrait, consent)), Some(offset)) = (kept, offset) else {
        return Reply { status: 404, ..Reply::default() };
    };
    let (from, to) = (offset.min(portrait.rgb.len()), offset.saturating_add(PIECE).min(portrait.rgb.len()));
    let since = consent.at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let told = [
        ("width", portrait.width.to_string()),
        ("height", portrait.height.to_string()),
        ("consent", consent.statement),
        ("consented", since.as_secs().to_string()),
    ];
    Reply {
        status: 200,
        headers: told.map(|(name, value)| (name.to_string(), value)).into(),
        body: Bytes::copy_from_slice(&portrait.rgb[from..to]),
    }
}

/// An uploaded picture that another node has; kept here from then on. `None` where nobody has it.
pub(super) async fn portrait(service: &Service, id: &str) -> Option<Portrait> {
    let cluster = service.rooms.cluster.as_ref()?;
    let node = NodeId::of(id).filter(|node| *node != cluster.id())?;
    // The most that a picture of ours has (`PictureLimits`), with room to spare.
    let most = 64 << 20;
    let mut rgb: Vec<u8> = Vec::new();
    loop {
        let headers = vec![("offset".to_string(), rgb.len().to_string())];
        let ask = Ask { method: PICTURE.into(), target: id.into(), headers, ..Ask::default() };
        let reply = cluster.ask(node, ask, Duration::from_secs(5)).await.ok().filter(|reply| reply.status == 200)?;
        let value = |name: &str| reply.headers.iter().find(|h| h.0 == name).map(|h| h.1.clone());
        let number = |name: &str| value(name)?.parse::<u64>().ok();
        let (width, height) = (u32::try_from(number("width")?).ok()?, u32::try_from(number("height")?).ok()?);
        let whole = (width as usize).checked_mul(height as usize)?.checked_mul(3).filter(|n| *n <= most)?;
        rgb.extend_from_slice(&reply.body);
        if rgb.len() > whole || (reply.body.is_empty() && rgb.len() < whole) {
            return None;
        }
        if rgb.len() == whole {
            let portrait = Portrait { width, height, rgb: rgb.into() };
            let at = SystemTime::UNIX_EPOCH + Duration::from_secs(number("consented")?);
            let consent = Consent { statement: value("consent")?, at };
            service.portraits.put(id.into(), portrait.clone(), consent, Instant::now());
            return Some(portrait);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_goes_where_its_session_is() {
        let node = NodeId::from_bits(5);
        let id = node.unguessable();
        let at = |route: &str, method: Method, path: &str| place(Some(route), &method, path);
        assert_eq!(at("/v1/live", Method::POST, "/v1/live"), Place::Anywhere);
        assert_eq!(at("/v1/sessions", Method::GET, "/v1/sessions"), Place::Everywhere);
        assert_eq!(at("/v1/sessions/{id}/whep", Method::POST, &format!("/v1/sessions/{id}/whep")), Place::At(node));
        assert_eq!(at("/v1/live/{id}", Method::PATCH, &format!("/v1/live/{id}")), Place::At(node));
        assert_eq!(at("/v1/live/{id}", Method::OPTIONS, &format!("/v1/live/{id}")), Place::Here);
        assert_eq!(at("/v1/sessions/{id}", Method::GET, "/v1/sessions/0123"), Place::Here);
        assert_eq!(at("/v1/portraits", Method::POST, "/v1/portraits"), Place::Here);
        assert_eq!(place(None, &Method::POST, "/v1/live"), Place::Here);
    }
}
