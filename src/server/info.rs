//! `GET /v1/info`: what a page needs to know before it starts.

use super::{Service, access};
use crate::{cluster::Facts, codec::BadgePlace, net::IceServer};
use axum::{
    Json,
    extract::State,
    http::HeaderMap,
    response::{IntoResponse, Response},
};
use serde::Serialize;
use std::sync::Arc;

#[derive(Serialize)]
struct Info<'a> {
    version: &'static str,
    engine: EngineInfo<'a>,
    /// As `RTCPeerConnection` takes them.
    ice_servers: Vec<Ice>,
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

/// A server as `RTCPeerConnection` takes it.
#[derive(Serialize)]
pub(super) struct Ice {
    urls: Vec<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    username: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    credential: String,
}

impl From<IceServer> for Ice {
    fn from(IceServer { urls, username, credential }: IceServer) -> Ice {
        Ice { urls, username, credential }
    }
}

pub(super) async fn info(State(service): State<Arc<Service>>, headers: HeaderMap) -> Response {
    let g = service.rooms.engine.geometry();
    // A node that makes no pictures tells what those of the others are like.
    let own = service.rooms.engine.stats().slots;
    let facts = service.rooms.cluster.as_ref().filter(|_| own == 0).and_then(|cluster| cluster.facts());
    let facts = facts.unwrap_or_else(|| Facts {
        engine: service.rooms.engine_name.into(),
        width: g.width,
        height: g.height,
        fps: g.fps,
        block_ms: g.block_span(1).as_millis_f64(),
        matte: g.matte,
    });
    Json(Info {
        version: env!("CARGO_PKG_VERSION"),
        engine: EngineInfo {
            name: &facts.engine,
            width: facts.width,
            height: facts.height,
            fps: facts.fps,
            block_ms: facts.block_ms,
            slots: service.rooms.cluster.as_ref().map_or(own, |c| c.nodes().iter().map(|n| n.beat.slots).sum()),
            matte: facts.matte,
            badge: service.rooms.session_config.badge != BadgePlace::Off,
        },
        ice_servers: access::ice_servers(&service, &headers).into_iter().map(Ice::from).collect(),
        portrait_max_bytes: service.config.portrait_max_mb << 20,
    })
    .into_response()
}
