//! `/v1/sessions/{id}/publish`: carries a session to other people's WHIP servers, which then show it to thousands.
//!
//! | route | what |
//! | --- | --- |
//! | `POST` `{"url", "token"}` | begins; 201 with `Location` and how it stands |
//! | `GET` | all of this session, also those given up, until they are deleted or the session ends |
//! | `GET`, `DELETE …/{publication}` | how one stands; ends it, tells the other server, and answers when it has |

use super::{
    Service,
    error::ApiError,
    presenters, resource,
    sessions::{Opened, Sent},
};
use crate::{
    net::{Publication, PublishState, Reach, Target, Url},
    session::SessionId,
};
use axum::{
    Json,
    extract::{Path, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Instant,
};

/// Publications of one session at once, those given up included.
const MOST: usize = 4;

struct Entry {
    url: String,
    publication: Publication,
}

/// All publications, by session and their own id.
#[derive(Default)]
pub(super) struct Publications(Mutex<HashMap<SessionId, HashMap<String, Arc<Entry>>>>);

impl Publications {
    fn lock(&self) -> MutexGuard<'_, HashMap<SessionId, HashMap<String, Arc<Entry>>>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Those of sessions that are over go with them.
    fn sweep(&self, service: &Service) {
        self.lock().retain(|id, _| service.rooms.sessions.get(id).is_some());
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    url: String,
    #[serde(default)]
    token: String,
}

/// How a publication stands.
#[derive(Serialize)]
struct Told<'a> {
    id: &'a str,
    url: &'a str,
    /// `connecting`, `live`, `waiting` (tried again after a pause), `failed` (given up), `stopped`.
    state: &'static str,
    /// Why it waits or failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// Seconds in this state.
    since_s: f64,
    attempts: u32,
}

fn told<'a>(id: &'a str, entry: &'a Entry) -> Told<'a> {
    let status = entry.publication.status();
    let (state, reason) = match status.state {
        PublishState::Connecting => ("connecting", None),
        PublishState::Live => ("live", None),
        PublishState::Waiting(why) => ("waiting", Some(why)),
        PublishState::Failed(why) => ("failed", Some(why)),
        PublishState::Stopped => ("stopped", None),
    };
    let since_s = (Instant::now().saturating_duration_since(status.since).as_secs_f64() * 10.0).round() / 10.0;
    Told { id, url: &entry.url, state, reason, since_s, attempts: status.attempts }
}

/// `POST /v1/sessions/{id}/publish`
pub(super) async fn begin(
    State(service): State<Arc<Service>>,
    Opened(handle): Opened,
    Sent(wanted): Sent<Wanted>,
) -> Result<Response, ApiError> {
    service.publications.sweep(&service);
    let reach = Reach::new(&service.config.publish_hosts);
    let url = target(&reach, &wanted.url)?;
    let mut all = service.publications.lock();
    let of_session = all.entry(handle.id().clone()).or_default();
    if of_session.len() >= MOST {
        let why = format!("A session can have {MOST} publications. Delete one that is not needed any more.");
        return Err(ApiError::new(StatusCode::CONFLICT, "too_many_publications", why));
    }
    // What is shown again has no credentials in it.
    let mut shown = url.clone();
    let _ = shown.set_password(None);
    shown.set_query(None);
    let target = Target { url, token: wanted.token, reach };
    let location = format!("/v1/sessions/{}/publish", handle.id().as_str());
    let publication = service.rooms.net.publish(target, handle).map_err(resource::net_error)?;
    let name = format!("{:032x}", rand::random::<u128>());
    let entry = Arc::new(Entry { url: shown.to_string(), publication });
    of_session.insert(name.clone(), entry.clone());
    drop(all);
    let location = format!("{location}/{name}");
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Json(told(&name, &entry))).into_response())
}

/// The address to publish to.
fn target(reach: &Reach, url: &str) -> Result<Url, ApiError> {
    let bad = |why: String| ApiError::unusable("bad_url", why);
    let url: Url = url.parse().map_err(|e| bad(format!("The url cannot be read: {e}.")))?;
    let host = url.host_str().unwrap_or_default();
    if !["http", "https"].contains(&url.scheme()) || host.is_empty() {
        return Err(bad("The url must begin with https:// or http:// and name a host.".into()));
    }
    match reach.allows(&url) {
        Ok(()) => Ok(url),
        Err(why) => Err(ApiError::new(StatusCode::FORBIDDEN, "host_not_allowed", presenters::sentence(&why))),
    }
}

/// `GET /v1/sessions/{id}/publish`
pub(super) async fn list(State(service): State<Arc<Service>>, Opened(handle): Opened) -> Response {
    let all = service.publications.lock();
    let mine = all.get(handle.id()).into_iter().flatten();
    Json(mine.map(|(name, entry)| told(name, entry)).collect::<Vec<_>>()).into_response()
}

fn find(service: &Service, id: &SessionId, name: &str) -> Result<Arc<Entry>, ApiError> {
    let found = service.publications.lock().get(id).and_then(|all| all.get(name)).cloned();
    found.ok_or_else(|| ApiError::not_found("no_such_publication", "This session has no publication of this id."))
}

/// `GET /v1/sessions/{id}/publish/{publication}`
pub(super) async fn one(
    State(service): State<Arc<Service>>,
    Opened(handle): Opened,
    Path((_, name)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let entry = find(&service, handle.id(), &name)?;
    Ok(Json(told(&name, &entry)).into_response())
}

/// `DELETE /v1/sessions/{id}/publish/{publication}`
pub(super) async fn end(
    State(service): State<Arc<Service>>,
    Opened(handle): Opened,
    Path((_, name)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let entry = find(&service, handle.id(), &name)?;
    entry.publication.stop().await;
    if let Some(all) = service.publications.lock().get_mut(handle.id()) {
        all.remove(&name);
    }
    Ok(Json(told(&name, &entry)).into_response())
}
