//! `GET /v1/status`: how the service is, for the page `/status` and whoever has a key with the scope `metrics`.
//!
//! What can be known of a session without ending or watching it: the first digits of its id, never the id.

use super::{Service, health, memory};
use crate::cluster::{Node, Standing, State as NodeState};
use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// Nodes that are listed; more are counted only.
const NODES: usize = 100;

fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 10_000.0).round() / 10.0
}

/// `GET /v1/status`
pub(super) async fn status(State(service): State<Arc<Service>>) -> Response {
    let rooms = &service.rooms;
    let (engine, geometry) = (rooms.engine.stats(), rooms.engine.geometry());
    let (_, state, why) = health::state(&service);
    let sessions: Vec<Value> = rooms.sessions.snapshots().iter().map(session).collect();
    let counts = rooms.sessions.counts();
    let ended: Value =
        counts.by_reason.iter().filter(|r| r.1 > 0).map(|(name, n)| (name.to_string(), json!(n))).collect();
    let metrics = crate::telemetry::metrics();
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "state": state,
        "why": why,
        "up_s": service.began.elapsed().as_secs(),
        "engine": {
            "name": rooms.engine_name,
            "size": format!("{}×{}", geometry.width, geometry.height),
            "fps": geometry.fps,
            "block_ms": ms(geometry.block_span(1).as_duration()),
            "slots": engine.slots,
            "slots_used": engine.used,
            "blocks": engine.blocks,
            "real_time_factor": (engine.real_time_factor * 1000.0).round() / 1000.0,
            "stages_ms": {
                "features": ms(engine.stages.features),
                "generation": ms(engine.stages.generation),
                "decode": ms(engine.stages.decode),
            },
            "block_median_ms": ms(engine.block_median),
            "block_p95_ms": ms(engine.block_p95),
            "lag_ms": ms(engine.lag),
            "worst_lag_ms": ms(engine.worst_lag),
            "cards_free_mb": engine.cards_free.iter().map(|bytes| bytes >> 20).collect::<Vec<_>>(),
            "rebuilds": metrics.engine_rebuilds.get(),
        },
        "cluster": rooms.cluster.as_ref().map(|node| cluster(node, Instant::now())),
        "sessions": sessions,
        "sessions_started": counts.started,
        "sessions_ended": ended,
        "http_connections": metrics.connections.get(),
        "websockets": metrics.websockets.get(),
        "media_connections": service.config.connections_max - service.connections.available_permits(),
        "portraits": service.portraits.size().0,
        "memory_free_mb": memory::available().map(|bytes| bytes >> 20),
    }))
    .into_response()
}

/// The cluster as this node sees it.
fn cluster(node: &Node, now: Instant) -> Value {
    let (bus, known, living) = (node.bus(), node.known(), node.nodes());
    let listed = known.iter().take(NODES).map(|(place, standing)| {
        let beat = &place.beat;
        json!({
            "id": beat.node.to_string(),
            "state": match standing {
                Standing::Alive => json!(beat.state),
                Standing::Dead if beat.state == NodeState::Left => json!("left"),
                Standing::Dead => json!("dead"),
                Standing::Unknown => json!("unknown"),
            },
            "slots": beat.slots,
            "slots_used": beat.used,
            "heard_ms": ms(now.saturating_duration_since(place.heard)),
            "address": beat.address,
            "version": beat.version,
        })
    });
    json!({
        "id": node.id().to_string(),
        "reachable": bus.reachable,
        "away_s": bus.away.map(|away| away.as_secs()),
        "why": bus.why,
        "alive": living.len(),
        "known": known.len(),
        "slots": living.iter().map(|place| place.beat.slots).sum::<usize>(),
        "slots_used": living.iter().map(|place| place.beat.used).sum::<usize>(),
        "nodes": listed.collect::<Vec<_>>(),
    })
}

fn session(s: &crate::session::Snapshot) -> Value {
    json!({
        "id": s.id.short(),
        "state": s.state.label(),
        "presenter": s.presenter,
        "age_s": s.since.elapsed().as_secs(),
        "metrics": s.metrics.wire(),
    })
}
