//! Sessions in LiveKit rooms, started by the calls that agents' avatar plugins make anyway.
//!
//! | call | compatible with the plugin | fields |
//! | --- | --- | --- |
//! | `POST /v1/livekit/v1/sessions`, JSON | Beyond Presence | `url`, `token`, `avatar_id` |
//! | `POST /v1/livekit/v1/session`, `/v1/session`, JSON | the same, before 1.8 | `livekit_url`, `livekit_token`, `avatar_id` |
//! | `POST /v1/livekit`, JSON or multipart `payload` + `image` | LemonSlice | `properties.livekit_url`, `properties.livekit_token`, `agent_id`, `agent_prompt`, `idle_timeout` |
//! | `POST /v1/livekit`, multipart, or JSON with `image` in base64 | bitHuman | `livekit_url`, `livekit_token`, `avatar_image`, `avatar_id` or `agent_id` |
//! | any of these, JSON | our own | `livekit: {url, token, agent}`, `presenter`, `seed` |
//!
//! All shapes are read by one reader on all routes: every plugin's URL may be `http://HOST/v1/livekit`. The call is answered when the room was entered, so that a wrong
//! token or an unreachable server is told to the caller; a place on the engine is taken before.
//! Fields as in livekit-plugins-{bey,lemonslice,bithuman} 1.8.9, and of livekit/agents @da6af86.

use super::{
    Service,
    access::Caller,
    error::ApiError,
    limits,
    presenters::{self, portrait},
    sessions,
};
use crate::{
    avatar::OpenOptions,
    livekit::{self, Invitation, Joined, LivekitError},
    media::Portrait,
};
use axum::{
    Extension, Json,
    body::{Body, Bytes},
    extract::{FromRequest, Multipart, Request, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use serde::Deserialize;
use std::sync::Arc;

/// Largest JSON beside a picture.
const MAX_FIELD: usize = 64 * 1024;
/// The avatar that the Beyond Presence plugin names when its user names none.
const STOCK: &str = "b9be11b8-89fb-4227-8f86-4a881393cbdb";

/// What a caller wants, whichever shape it came in.
#[derive(Default)]
struct Wanted {
    url: Option<String>,
    token: Option<String>,
    agent: Option<String>,
    presenter: Option<String>,
    picture: Option<Bytes>,
    picture_url: bool,
    prompt: Option<String>,
    seed: Option<u64>,
    idle_timeout_s: Option<u64>,
}

/// All JSON shapes in one; what is not named here is of no use to us and ignored, as plugins send more.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Wire {
    url: Option<String>,
    token: Option<String>,
    livekit_url: Option<String>,
    livekit_token: Option<String>,
    properties: Option<Box<Wire>>,
    livekit: Option<Room>,
    presenter: Option<String>,
    avatar_id: Option<String>,
    agent_id: Option<String>,
    agent_prompt: Option<String>,
    image: Option<String>,
    agent_image_url: Option<String>,
    idle_timeout: Option<f64>,
    seed: Option<u64>,
}

/// The room of a session: our own shape.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Room {
    /// `wss://…`
    url: String,
    /// Made by the agent, for the worker.
    token: String,
    /// The agent's identity.
    agent: Option<String>,
}

/// Enters a room; [`Joined::run`] with a session's handle does the rest.
pub(super) async fn enter(service: &Service, room: Room) -> Result<Joined, ApiError> {
    let invitation = Invitation { url: room.url, token: room.token, agent: room.agent };
    livekit::join(invitation, &service.rooms.livekit).await.map_err(not_joined)
}

impl Wanted {
    fn json(&mut self, bytes: &[u8]) -> Result<(), ApiError> {
        let wire: Wire = serde_json::from_slice(bytes).map_err(|e| {
            ApiError::bad_request("malformed_json", format!("The request is no JSON that is known here: {e}."))
        })?;
        if let Some(inner) = wire.properties {
            (self.url, self.token) = (inner.livekit_url, inner.livekit_token);
        }
        if let Some(room) = wire.livekit {
            (self.url, self.token, self.agent) = (Some(room.url), Some(room.token), room.agent);
        }
        self.url = wire.livekit_url.or(wire.url).or(self.url.take());
        self.token = wire.livekit_token.or(wire.token).or(self.token.take());
        self.presenter = wire.presenter.or(wire.avatar_id).or(wire.agent_id).or(self.presenter.take());
        self.picture_url |= wire.agent_image_url.is_some();
        // Of use to engines that take a prompt; others ignore it.
        self.prompt = wire.agent_prompt.map(|p| p.chars().take(sessions::MAX_PROMPT).collect());
        self.seed = wire.seed;
        self.idle_timeout_s = wire.idle_timeout.filter(|s| s.is_finite() && *s > 0.0).map(|s| s.ceil() as u64);
        if let Some(image) = wire.image {
            // A URL stands in the same field.
            self.picture_url |= image.starts_with("http://") || image.starts_with("https://");
            if !self.picture_url {
                let bytes = BASE64_STANDARD.decode(image.trim().as_bytes()).map_err(|_| {
                    ApiError::bad_request(
                        "unusable_picture",
                        "The field `image` is not base64; send the picture's bytes in base64.",
                    )
                })?;
                self.picture = Some(bytes.into());
            }
        }
        Ok(())
    }

    async fn form(&mut self, mut form: Multipart) -> Result<(), ApiError> {
        let broken = |e: axum::extract::multipart::MultipartError| {
            ApiError::new(e.status(), "malformed_form", presenters::sentence(&e.body_text()))
        };
        while let Some(field) = form.next_field().await.map_err(broken)? {
            let name = field.name().unwrap_or_default().to_string();
            let bytes = field.bytes().await.map_err(broken)?;
            if ["image", "avatar_image"].contains(&name.as_str()) {
                self.picture = Some(bytes);
                continue;
            }
            if bytes.len() > MAX_FIELD {
                let why = format!("The field `{}` is longer than {} KiB.", short(&name), MAX_FIELD / 1024);
                return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", why));
            }
            let text = || Some(String::from_utf8_lossy(&bytes).trim().to_string()).filter(|t| !t.is_empty());
            match name.as_str() {
                "payload" => self.json(&bytes)?,
                "livekit_url" => self.url = text(),
                "livekit_token" => self.token = text(),
                "avatar_id" | "agent_id" | "presenter" => self.presenter = text(),
                "avatar_image_url" => self.picture_url = true,
                _ => {}
            }
        }
        Ok(())
    }
}

fn short(name: &str) -> String {
    name.chars().take(40).collect()
}

/// `POST /v1/livekit` and the other routes of the table.
pub(super) async fn start(
    State(service): State<Arc<Service>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let wanted = read(&service, request).await?;
    let (Some(url), Some(token)) = (wanted.url, wanted.token) else {
        return Err(ApiError::bad_request(
            "no_room",
            "Name the room: livekit_url and livekit_token, or livekit with url and token.",
        ));
    };
    if wanted.picture_url {
        return Err(ApiError::unusable(
            "picture_by_url",
            "Pictures are not fetched from elsewhere; upload the picture itself in this call.",
        ));
    }
    let slot = limits::place(&service, &caller)?;
    let face = face(&service, wanted.presenter.as_deref(), wanted.picture).await?;
    let joined = enter(&service, Room { url, token, agent: wanted.agent }).await?;

    let mut options = OpenOptions { steps: service.rooms.steps, prompt: wanted.prompt, ..OpenOptions::default() };
    options.seed = wanted.seed.unwrap_or(options.seed);
    let mut config = limits::bounded(service.rooms.session_config.clone(), &caller);
    if let Some(idle) = wanted.idle_timeout_s {
        // A caller may ask for less patience than the operator has, not for more.
        config.idle_timeout_s = if config.idle_timeout_s == 0 { idle } else { idle.min(config.idle_timeout_s) };
    }
    let room = joined.room().to_string();
    let (handle, token) = sessions::host(&service, slot, face, options, config, Some(joined))?;
    let id = handle.id().as_str();
    let told = serde_json::json!({ "id": id, "session_id": id, "token": token, "room": room });
    Ok((StatusCode::CREATED, Json(told)).into_response())
}

async fn read(service: &Service, request: Request<Body>) -> Result<Wanted, ApiError> {
    let headers: &HeaderMap = request.headers();
    let most = (service.config.portrait_max_mb << 20) + 2 * MAX_FIELD;
    let mut wanted = Wanted::default();
    match super::media_type(headers).as_str() {
        "application/json" => {
            // A picture in base64 is a third longer.
            let too_large = || "The request is larger than a picture may be.".to_string();
            let body = super::read_body(request.into_body(), most * 4 / 3, too_large).await?;
            wanted.json(&body)?;
        }
        "multipart/form-data" => {
            // A form needs no leave before a browser sends it across origins; a header of this kind does.
            if !["x-api-key", "authorization", "api-secret"].iter().any(|name| headers.contains_key(*name)) {
                return Err(ApiError::new(
                    StatusCode::UNAUTHORIZED,
                    "key_missing",
                    "Send an x-api-key or Authorization header with a form, as the plugins do.",
                ));
            }
            let (head, body) = request.into_parts();
            let bytes =
                super::read_body(body, most, || "The form is larger than a picture may be.".to_string()).await?;
            let form = Multipart::from_request(Request::from_parts(head, Body::from(bytes)), &())
                .await
                .map_err(|e| ApiError::bad_request("malformed_form", presenters::sentence(&e.body_text())))?;
            wanted.form(form).await?;
        }
        _ => {
            return Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "wrong_content_type",
                "Send application/json, or multipart/form-data with a picture.",
            ));
        }
    }
    Ok(wanted)
}

/// Whom to show: the picture in the call, else the presenter that it names.
async fn face(service: &Service, named: Option<&str>, picture: Option<Bytes>) -> Result<(String, Portrait), ApiError> {
    match picture {
        Some(bytes) => Ok(("portrait".into(), presenters::read_picture(service, bytes).await?)),
        None => portrait(service, named.filter(|id| *id != STOCK)).await,
    }
}

fn not_joined(error: LivekitError) -> ApiError {
    let (status, code) = match &error {
        LivekitError::Url(_) => (StatusCode::BAD_REQUEST, "bad_livekit_url"),
        LivekitError::Host(_) | LivekitError::Private(_) => (StatusCode::FORBIDDEN, "livekit_host_not_allowed"),
        LivekitError::Token(_) => (StatusCode::BAD_REQUEST, "bad_livekit_token"),
        LivekitError::Refused { .. } if error.is_client() => (StatusCode::BAD_REQUEST, "livekit_token_refused"),
        LivekitError::Unreachable { .. } => (StatusCode::BAD_GATEWAY, "livekit_unreachable"),
        LivekitError::Refused { .. } | LivekitError::Left(_) | LivekitError::Net(_) => {
            (StatusCode::BAD_GATEWAY, "livekit_failed")
        }
    };
    ApiError::new(status, code, presenters::sentence(&error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_plugins_json_is_understood() {
        let read = |text: &str| {
            let mut wanted = Wanted::default();
            wanted.json(text.as_bytes()).map(|()| wanted)
        };
        let bey =
            read(r#"{"avatar_id":"b9be11b8-89fb-4227-8f86-4a881393cbdb","livekit_url":"wss://h","livekit_token":"t"}"#)
                .unwrap();
        assert_eq!((bey.url.as_deref(), bey.token.as_deref()), (Some("wss://h"), Some("t")));
        let bey = read(r#"{"transport":"livekit","avatar_id":"ada","url":"wss://h","token":"t"}"#).unwrap();
        assert_eq!((bey.url.as_deref(), bey.presenter.as_deref()), (Some("wss://h"), Some("ada")));
        let lemon = read(
            r#"{"transport_type":"livekit","properties":{"livekit_url":"wss://h","livekit_token":"t","livekit_session_id":"RM"},
                "agent_id":"ada","agent_prompt":"smile","idle_timeout":60}"#,
        )
        .unwrap();
        assert_eq!(
            (lemon.url.as_deref(), lemon.presenter.as_deref(), lemon.idle_timeout_s),
            (Some("wss://h"), Some("ada"), Some(60))
        );
        let human = read(r#"{"livekit_url":"wss://h","livekit_token":"t","room_name":"r","mode":"gpu","image":"aGk=","agent_id":"x"}"#).unwrap();
        assert_eq!(human.picture.as_deref(), Some(&b"hi"[..]));
        let own = read(r#"{"livekit":{"url":"wss://h","token":"t","agent":"a"},"presenter":"ada","seed":7}"#).unwrap();
        assert_eq!((own.agent.as_deref(), own.seed), (Some("a"), Some(7)));
        assert!(read(r#"{"livekit_url":"h","livekit_token":"t","agent_image_url":"http://x"}"#).unwrap().picture_url);
        for bad in ["", "{", r#"{"livekit_url":7}"#, r#"{"image":"%%"}"#, r#"{"livekit":{"url":"x"}}"#] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
