//! Who can be shown: the built-in presenters, and pictures that visitors bring.

use super::{Service, design, error::ApiError, portraits::Consent, spread};
use crate::{
    codec::{
        picture::{PictureLimits, decode_portrait},
        subject::subject,
    },
    media::Portrait,
};
use axum::{
    Json,
    body::Body,
    extract::{Path, Query, State, rejection::QueryRejection},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

/// Somebody who can be shown without an upload.
#[derive(Clone, Debug)]
pub struct Presenter {
    /// What `presenter=` names; letters, digits and dashes.
    pub id: String,
    pub name: String,
    /// One line for the page.
    pub description: String,
    /// The picture as a PNG file.
    pub png: bytes::Bytes,
}

/// What `presenter=` begins with when it names an uploaded picture.
const PORTRAIT: &str = "portrait:";

#[derive(Serialize)]
struct List<'a> {
    presenters: Vec<Told<'a>>,
    /// The one shown when a caller names none.
    default: Option<&'a str>,
}

#[derive(Serialize)]
struct Told<'a> {
    id: &'a str,
    name: &'a str,
    description: &'a str,
    thumbnail: String,
}

/// `GET /v1/presenters`
pub(super) async fn list(State(service): State<Arc<Service>>) -> Response {
    fn told(p: &Presenter) -> Told<'_> {
        let Presenter { id, name, description, .. } = p;
        Told { id, name, description, thumbnail: format!("/v1/presenters/{id}.png") }
    }
    let default = service.rooms.presenters.first().map(|p| p.id.as_str());
    Json(List { presenters: service.rooms.presenters.iter().map(told).collect(), default }).into_response()
}

/// `GET /v1/presenters/{id}.png`
pub(super) async fn picture(
    State(service): State<Arc<Service>>,
    Path(file): Path<String>,
) -> Result<Response, ApiError> {
    let Some(presenter) = file.strip_suffix(".png").and_then(|id| service.presenter(id)) else {
        return Err(ApiError::not_found(
            "no_such_presenter",
            "There is no presenter of this name; /v1/presenters lists all.",
        ));
    };
    let headers = [(header::CONTENT_TYPE, "image/png"), (header::CACHE_CONTROL, "public, max-age=3600")];
    Ok((headers, presenter.png.clone()).into_response())
}

#[derive(Serialize)]
struct Stored {
    id: String,
    /// What to give as `presenter=`.
    presenter: String,
    width: u32,
    height: u32,
    expires_after_s: u64,
    /// The statement that was recorded, and when (seconds since 1970).
    consent: String,
    consented_at: u64,
    /// What speaks against the picture; it is kept all the same, and the engine decides.
    warnings: Vec<serde_json::Value>,
    /// The designed presenter that is most like it, for when the engine refuses the picture.
    #[serde(skip_serializing_if = "Option::is_none")]
    nearest: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct Stated {
    consent: Option<String>,
}

/// Longest statement, characters.
const MAX_CONSENT: usize = 1000;

/// # Errors
/// 400 with a sentence where nothing, or too much, was stated.
fn consent(stated: Result<Query<Stated>, QueryRejection>) -> Result<Consent, ApiError> {
    let refused = |text: &str| Err(ApiError::bad_request("no_consent", text));
    let statement = stated.ok().and_then(|q| q.0.consent).map(|s| s.trim().to_string()).unwrap_or_default();
    if statement.is_empty() {
        return refused(
            "State that the person in the picture agreed to be shown speaking: add ?consent= and your statement, in \
             words. It is kept with the picture.",
        );
    }
    if statement.chars().count() > MAX_CONSENT {
        return refused("The statement of consent may have at most 1000 characters.");
    }
    Ok(Consent { statement, at: SystemTime::now() })
}

/// `POST /v1/portraits`: keeps a picture for a while.
pub(super) async fn upload(
    State(service): State<Arc<Service>>,
    stated: Result<Query<Stated>, QueryRejection>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    // Only types for which a browser asks leave before it sends them across origins.
    let kind = super::media_type(&headers);
    if !(kind.starts_with("image/") || kind == "application/octet-stream") {
        return Err(ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "not_a_picture",
            "Send the picture itself as the body, with Content-Type image/png, image/jpeg or image/webp.",
        ));
    }
    let most = service.config.portrait_max_mb << 20;
    let bytes = super::read_body(body, most, || {
        format!("The picture is larger than {} MB. Make it smaller and try again.", service.config.portrait_max_mb)
    })
    .await?;
    let consent = consent(stated)?;
    let portrait = read_picture(&service, bytes).await?;
    let (width, height) = (portrait.width, portrait.height);
    let warning = subject(&portrait).warning();
    let warnings = warning.into_iter().map(|(code, message)| json!({ "code": code, "message": message })).collect();
    let nearest = design::like(&service, &portrait).await;
    let since = |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let (statement, consented_at) = (consent.statement.clone(), since(consent.at));
    let id = service.portraits.put(service.unguessable(), portrait, consent, Instant::now());
    let location = format!("/v1/portraits/{id}");
    let stored = Stored {
        presenter: format!("{PORTRAIT}{id}"),
        id,
        width,
        height,
        expires_after_s: service.config.portrait_ttl_s,
        consent: statement,
        consented_at,
        warnings,
        nearest,
    };
    let mut response = (StatusCode::CREATED, Json(stored)).into_response();
    if let Ok(location) = HeaderValue::from_str(&location) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
}

/// Makes a portrait of somebody's picture file.
///
/// # Errors
/// 422 with what is wrong with it; 503 while too many are being read.
pub(super) async fn read_picture(service: &Service, bytes: bytes::Bytes) -> Result<Portrait, ApiError> {
    // Decoding takes real time and memory: a few at once, and nobody waits in line for long.
    let Ok(Ok(_place)) = tokio::time::timeout(Duration::from_secs(5), service.decoders.acquire()).await else {
        return Err(ApiError::unavailable(
            "busy",
            "Other pictures are being read just now. Try again in a moment.",
            Duration::from_secs(2),
        ));
    };
    let limits = PictureLimits { bytes: service.config.portrait_max_mb << 20, ..PictureLimits::default() };
    match tokio::task::spawn_blocking(move || decode_portrait(&bytes, &limits)).await {
        Ok(Ok(portrait)) => Ok(portrait),
        Ok(Err(e)) => Err(ApiError::unusable("unusable_picture", sentence(&e.to_string()))),
        Err(e) => {
            tracing::error!("the picture decoder panicked; this is a bug: {e}");
            Err(ApiError::internal("The picture could not be read because of a mistake in this program."))
        }
    }
}

/// An inner error's text as a sentence of its own.
pub(super) fn sentence(text: &str) -> String {
    let mut chars = text.chars();
    let Some(first) = chars.next() else { return String::new() };
    let end = if text.ends_with(['.', '!', '?']) { "" } else { "." };
    first.to_uppercase().chain(chars).chain(end.chars()).collect()
}

/// The picture behind `presenter=`; none named is the first built-in one.
///
/// # Errors
/// 404 with a sentence when there is no such presenter or picture.
pub(super) async fn portrait(service: &Service, asked: Option<&str>) -> Result<(String, Portrait), ApiError> {
    if let Some(id) = asked.and_then(|a| a.strip_prefix(PORTRAIT)) {
        let kept = match service.portraits.get(id, Instant::now()) {
            None => spread::portrait(service, id).await,
            kept => kept,
        };
        let picture = kept.ok_or_else(|| {
            ApiError::not_found(
                "no_such_portrait",
                "This uploaded picture is not kept any more. Upload it again and start anew.",
            )
        })?;
        if let Some(consent) = service.portraits.consent(id) {
            let short = id.get(..8).unwrap_or_default();
            tracing::info!(portrait = short, consent = ?consent.statement, "an uploaded picture is shown");
        }
        // The id is a secret of whoever uploaded the picture; logs and panels say only what it is.
        return Ok(("portrait".into(), picture));
    }
    if let Some(look) = asked.and_then(|a| a.strip_prefix(design::DESIGN)) {
        return design::portrait(service, look).await;
    }
    let presenter = match asked {
        None | Some("") => service.rooms.presenters.first(),
        Some(id) => service.presenter(id),
    };
    let Some(presenter) = presenter else {
        return Err(ApiError::not_found(
            "no_such_presenter",
            "There is no presenter of this name; /v1/presenters lists all.",
        ));
    };
    let limits = PictureLimits::default();
    let picture = decode_portrait(&presenter.png, &limits).map_err(|e| {
        tracing::error!("the built-in presenter {} cannot be read; this is a bug: {e}", presenter.id);
        ApiError::internal("The built-in presenter could not be read because of a mistake in this program.")
    })?;
    Ok((presenter.id.clone(), picture))
}
