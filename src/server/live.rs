//! `POST /v1/live`: one WHIP-shaped resource per conversation (RFC 9725, but two-way).
//!
//! A place is taken before the offer is looked at; everything a refused or broken offer took is given back by `drop`.

use super::{Service, access::Caller, error::ApiError, limits, presenters::portrait, resource};
use crate::{
    avatar::OpenOptions,
    engine::Refusal,
    session::{self, SessionId, SessionSpec},
};
use axum::{
    Extension,
    body::Body,
    extract::{Query, State, rejection::QueryRejection},
    http::HeaderMap,
    response::Response,
};
use futures::FutureExt;
use serde::Deserialize;
use std::{
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

#[derive(Deserialize)]
pub(super) struct Asked {
    presenter: Option<String>,
    /// Same seed, same face movements for the same voice.
    seed: Option<u64>,
}

/// `POST /v1/live`
pub(super) async fn offer(
    State(service): State<Arc<Service>>,
    Extension(caller): Extension<Caller>,
    asked: Result<Query<Asked>, QueryRejection>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let offer = resource::offer(&headers, body).await?;
    let Query(asked) = asked.map_err(|e| {
        ApiError::bad_request("wrong_query", format!("{}. Allowed are presenter=ID and seed=NUMBER.", e.body_text()))
    })?;

    let slot = limits::place(&service, &caller)?;
    let (presenter, portrait) = portrait(&service, asked.presenter.as_deref()).await?;
    let ((peer, events, out), answer) = service.rooms.net.answer_live(&offer).await.map_err(resource::net_error)?;

    let id = SessionId::from(service.unguessable().as_str());
    let path = format!("/v1/live/{}", id.as_str());
    let peer = Arc::new(peer);
    let etag = peer.etag();
    let listed = service.peers.enter(&path, &peer, Some(id.clone()));
    let control = service.rooms.sessions.enter(id.clone(), &presenter, Instant::now());
    let mut options = OpenOptions { steps: service.rooms.steps, ..OpenOptions::default() };
    if let Some(seed) = asked.seed {
        options.seed = seed;
    }
    let geometry = service.rooms.engine.geometry().clone();
    let spec = SessionSpec { id: id.clone(), portrait, presenter, options, geometry };
    let config = limits::bounded(service.rooms.session_config.clone(), &caller);
    let short = id.short().to_string();
    tokio::spawn(async move {
        let talk = session::run(spec, slot, events, out, control, config);
        if AssertUnwindSafe(talk).catch_unwind().await.is_err() {
            tracing::error!(session = short, "a conversation's task panicked; this is a bug");
        }
        peer.close().await;
        drop(listed);
    });

    Ok(resource::created(&service, &path, &etag, answer))
}

pub(super) fn refused(refusal: Refusal) -> ApiError {
    match refusal {
        Refusal::Full { retry_after } => {
            ApiError::unavailable("full", "Every presenter is in a conversation just now.", retry_after)
        }
        Refusal::Memory { fit, configured, retry_after } => {
            tracing::warn!("a conversation was refused: memory holds {fit} of the {configured} faces configured");
            ApiError::unavailable(
                "full",
                "The memory of this server holds no more presenters at once; all are in a conversation just now.",
                retry_after,
            )
        }
        Refusal::Rebuilding { retry_after } => ApiError::unavailable(
            "engine_restarting",
            "The engine that draws the presenter has failed and is being started again.",
            retry_after,
        ),
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
