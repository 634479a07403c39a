//! `POST /v1/sessions/{id}/gesture`, and the WebSocket's `gesture`: what the presenter does besides speaking.

use super::{
    Service,
    error::ApiError,
    sessions::{Opened, Sent},
};
use crate::{
    avatar::{Act, Gesture, LIVELIEST, LONGEST_S},
    session::Handle,
};
use axum::{extract::State, http::StatusCode};
use serde::Deserialize;
use std::{sync::Arc, time::Duration};

/// As clients ask for it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Asked {
    gesture: String,
    #[serde(default = "whole")]
    strength: f32,
    #[serde(default = "a_while")]
    seconds: f32,
}

fn whole() -> f32 {
    1.0
}

fn a_while() -> f32 {
    2.0
}

/// `POST /v1/sessions/{id}/gesture`
pub(super) async fn route(
    State(service): State<Arc<Service>>,
    Opened(handle): Opened,
    Sent(asked): Sent<Asked>,
) -> Result<StatusCode, ApiError> {
    give(&service, &handle, &asked)?;
    Ok(StatusCode::ACCEPTED)
}

/// Hands a gesture to the presenter.
///
/// # Errors
/// 422 for an engine that cannot, or a gesture that is none; 503 while too many wait.
pub(super) fn give(service: &Service, handle: &Handle, asked: &Asked) -> Result<(), ApiError> {
    possible(service)?;
    let act = Act::named(&asked.gesture).ok_or_else(|| {
        let names: Vec<&str> = Act::ALL.iter().map(|a| a.0).collect();
        ApiError::unusable("no_such_gesture", format!("There is no such gesture; there are {}.", names.join(", ")))
    })?;
    if !(0.0..=1.0).contains(&asked.strength) {
        return Err(ApiError::unusable("wrong_strength", "A gesture's strength is from 0 to 1.".to_string()));
    }
    if !(0.1..=LONGEST_S).contains(&asked.seconds) {
        let text = format!("A gesture's seconds are from 0.1 to {LONGEST_S}.");
        return Err(ApiError::unusable("wrong_seconds", text));
    }
    let gesture = Gesture { act, strength: asked.strength, seconds: asked.seconds };
    if handle.direction().give(gesture) {
        return Ok(());
    }
    let text = "As many gestures wait as may; the presenter takes them as it speaks or listens.";
    Err(ApiError::unavailable("too_many_gestures", text, Duration::from_secs(1)))
}

/// # Errors
/// 422 with a sentence for engines whose presenters move as they like.
pub(super) fn possible(service: &Service) -> Result<(), ApiError> {
    if service.rooms.engine.capabilities().direction {
        return Ok(());
    }
    let name = service.rooms.engine_name;
    let text = format!("The engine `{name}` moves its presenter by itself and takes no gestures or liveliness.");
    Err(ApiError::unusable("no_gestures", text))
}

/// A liveliness as it is asked for.
pub(super) fn liveliness(service: &Service, asked: f32) -> Result<f32, ApiError> {
    possible(service)?;
    if !(0.0..=LIVELIEST).contains(&asked) {
        return Err(ApiError::unusable("wrong_liveliness", format!("A liveliness is from 0 to {LIVELIEST}.")));
    }
    Ok(asked)
}
