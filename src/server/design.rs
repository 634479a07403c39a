//! Presenters by design: `GET /v1/design` tells which traits there are, `GET /v1/design/{look}.png` draws a look, and
//! `presenter=design:LOOK` shows it. A look is its text, so nothing is kept.
//!
//! | edge | capacity | when full |
//! | --- | --- | --- |
//! | drawing | one at a time, a tenth of a second each | waits up to 5 s, then 503 |

use super::{Service, error::ApiError, presenters::sentence};
use crate::{
    avatar::pocket::design::{Design, TRAITS, nearest},
    codec::picture::encode_png,
    media::Portrait,
};
use axum::{
    Json,
    extract::{Path, State},
    http::header,
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};
use std::{sync::Arc, time::Duration};

/// What `presenter=` begins with when it names a look.
pub(super) const DESIGN: &str = "design:";
/// Width and height of pictures for looking at.
const SHOWN: u32 = 256;

/// `GET /v1/design`
pub(super) async fn traits() -> Response {
    let all: Map<String, Value> = TRAITS.iter().map(|(name, choices)| (name.to_string(), json!(choices))).collect();
    Json(json!({ "traits": all, "presenter": "design:SEED,TRAIT=CHOICE,…", "picture": "/v1/design/LOOK.png" }))
        .into_response()
}

/// `GET /v1/design/{look}.png`
pub(super) async fn picture(
    State(service): State<Arc<Service>>,
    Path(file): Path<String>,
) -> Result<Response, ApiError> {
    let look = file.strip_suffix(".png").ok_or_else(|| {
        ApiError::not_found("no_such_design", "A look's picture is LOOK.png, such as 7,skin=brown.png.")
    })?;
    let design = parse(look)?;
    let png = work(&service, move || encode_png(&design.draw(SHOWN))).await?.map_err(|e| {
        tracing::error!("a drawn presenter could not be written as PNG: {e}");
        ApiError::internal("The picture could not be written.")
    })?;
    let headers = [(header::CONTENT_TYPE, "image/png"), (header::CACHE_CONTROL, "public, max-age=86400")];
    Ok((headers, png).into_response())
}

/// # Errors
/// 422 with what is wrong with the look.
fn parse(look: &str) -> Result<Design, ApiError> {
    look.parse().map_err(|e: String| ApiError::unusable("no_such_design", sentence(&e)))
}

/// Draws a look as the engine's portrait. Returns it with what it is called.
///
/// # Errors
/// 422 with what is wrong with the look; 503 while others are drawn.
pub(super) async fn portrait(service: &Service, look: &str) -> Result<(String, Portrait), ApiError> {
    let design = parse(look)?;
    // Portraits are encoded at 384, or at the pictures' own size where that is larger.
    let size = service.rooms.engine.geometry().width.clamp(384, 512);
    let name = format!("{DESIGN}{design}");
    Ok((name, work(service, move || design.draw(size)).await?))
}

/// The look that is nearest to an uploaded picture, where the engine's presenters are such as are designed.
pub(super) async fn like(service: &Service, portrait: &Portrait) -> Option<String> {
    if !service.rooms.engine.capabilities().design {
        return None;
    }
    let portrait = portrait.clone();
    let found = work(service, move || nearest(&portrait)).await.ok()?.ok()?;
    Some(format!("{DESIGN}{found}"))
}

/// Draws on a thread that may take its time.
async fn work<T: Send + 'static>(service: &Service, draw: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    let Ok(Ok(_place)) = tokio::time::timeout(Duration::from_secs(5), service.easel.acquire()).await else {
        let text = "Other presenters are being drawn just now. Try again in a moment.";
        return Err(ApiError::unavailable("busy", text, Duration::from_secs(2)));
    };
    tokio::task::spawn_blocking(draw).await.map_err(|e| {
        tracing::error!("drawing a presenter panicked; this is a bug: {e}");
        ApiError::internal("The presenter could not be drawn because of a mistake in this program.")
    })
}
