//! `GET /v1/info`: what a page needs to know before it starts.

use super::Service;
use crate::codec::BadgePlace;
use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use serde::Serialize;
use std::sync::Arc;

#[derive(Serialize)]
struct Info<'a> {
    version: &'static str,
    engine: EngineInfo<'a>,
    /// As `RTCPeerConnection` takes them.
    ice_servers: Vec<Ice<'a>>,
    portrait_max_bytes: usize,
}

#[derive(Serialize)]
struct EngineInfo<'a> {
    name: &'a str,
    width: u32,
    height: u32,
    fps: u32,
    /// Length of one block of video; blocks must be made faster than this.
    block_ms: f64,
    slots: usize,
    /// Pictures can come without their background (`view=stacked`).
    matte: bool,
    /// Pictures wear a badge that says they are computer-made.
    badge: bool,
}

#[derive(Serialize)]
struct Ice<'a> {
    urls: &'a [String],
    #[serde(skip_serializing_if = "str::is_empty")]
    username: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    credential: &'a str,
}

pub(super) async fn info(State(service): State<Arc<Service>>) -> Response {
    let g = service.rooms.engine.geometry();
    let servers = service.rooms.net.ice_servers().iter();
    Json(Info {
        version: env!("CARGO_PKG_VERSION"),
        engine: EngineInfo {
            name: service.rooms.engine_name,
            width: g.width,
            height: g.height,
            fps: g.fps,
            block_ms: g.block_span(1).as_millis_f64(),
            slots: service.rooms.engine.stats().slots,
            matte: g.matte,
            badge: service.rooms.session_config.badge != BadgePlace::Off,
        },
        ice_servers: servers.map(|s| Ice { urls: &s.urls, username: &s.username, credential: &s.credential }).collect(),
        portrait_max_bytes: service.config.portrait_max_mb << 20,
    })
    .into_response()
}
