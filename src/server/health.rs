//! Is it alive, can it serve, how is it doing: `/healthz`, `/readyz`, `/metrics`.

use super::Service;
use crate::{
    cluster::{Beat, State},
    engine::{BLOCK_BUCKETS, Health},
    session,
    telemetry::metrics,
};
use axum::{
    Json,
    extract::State as Shared,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use std::{fmt::Write as _, sync::Arc, sync::atomic::Ordering};

/// `GET /healthz`: the process answers.
pub(super) async fn healthz() -> Response {
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], "ok\n").into_response()
}

/// Whether new conversations can be had, the word for it, and what happened if not.
pub(super) fn state(service: &Service) -> (StatusCode, &'static str, Option<String>) {
    let alone = service.rooms.engine.stats().slots == 0
        && service.rooms.cluster.as_ref().is_some_and(|cluster| !cluster.reachable());
    match own(service) {
        (StatusCode::OK, ..) if alone => (StatusCode::SERVICE_UNAVAILABLE, "cluster_unreachable", None),
        own => own,
    }
}

/// The same of this process alone, whatever becomes of others.
pub(super) fn own(service: &Service) -> (StatusCode, &'static str, Option<String>) {
    let health = service.rooms.engine.health().borrow().clone();
    match health {
        Health::Failed(why) => (StatusCode::SERVICE_UNAVAILABLE, "engine_failed", Some(why)),
        Health::Rebuilding(why) => (StatusCode::SERVICE_UNAVAILABLE, "engine_restarting", Some(why)),
        Health::Ready if service.draining.load(Ordering::Acquire) => {
            (StatusCode::SERVICE_UNAVAILABLE, "draining", None)
        }
        Health::Ready => (StatusCode::OK, "ready", None),
    }
}

#[derive(Serialize)]
struct Ready {
    ready: bool,
    /// `ready`, `draining`, `engine_restarting`, `engine_failed`, or `cluster_unreachable` where no face is made.
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
    slots: usize,
    slots_used: usize,
}

/// `GET /readyz`: new conversations can be had (a full house is still ready; it answers 503 by itself).
pub(super) async fn readyz(Shared(service): Shared<Arc<Service>>) -> Response {
    let stats = service.rooms.engine.stats();
    let (status, state, why) = state(&service);
    // What failed is the operator's business: /status and the log say it.
    let why = why.filter(|_| service.keys.open());
    let told = Ready { ready: status == StatusCode::OK, state, why, slots: stats.slots, slots_used: stats.used };
    (status, Json(told)).into_response()
}

/// `GET /metrics`: Prometheus text format.
pub(super) async fn prometheus(Shared(service): Shared<Arc<Service>>) -> Response {
    let mut text = metrics().text();
    sampled(&service, &mut text);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

/// What is read from its owner at each scrape.
fn sampled(service: &Service, text: &mut String) {
    let mut page = Page(text);
    page.one("build_info", "gauge", "The program's version", &[("version", env!("CARGO_PKG_VERSION"))], 1.0);
    let engine = service.rooms.engine.stats();
    let ready = matches!(&*service.rooms.engine.health().borrow(), Health::Ready);
    page.one("engine_ready", "gauge", "1 while the engine works", &[], f64::from(u8::from(ready)));
    page.one("slots", "gauge", "Faces that can be had at once", &[], engine.slots as f64);
    page.one("slots_used", "gauge", "Faces taken now", &[], engine.used as f64);
    page.one("blocks_total", "counter", "Blocks of video made since the start", &[], engine.blocks as f64);
    let help = "Time to make a block over the time it shows, smoothed; above 1 the engine falls behind";
    page.one("real_time_factor", "gauge", help, &[], engine.real_time_factor);
    let help = "From complete speech to finished block, newest";
    page.one("engine_lag_seconds", "gauge", help, &[], engine.lag.as_secs_f64());
    let help = "From complete speech to finished block, worst since the start";
    page.one("engine_worst_lag_seconds", "gauge", help, &[], engine.worst_lag.as_secs_f64());
    page.head("block_deadline_ratio", "histogram", "Time to make a block over the time it shows; 1 is just in time");
    for (bound, count) in BLOCK_BUCKETS.iter().zip(engine.block_buckets) {
        page.line("block_deadline_ratio_bucket", &[("le", &bound.to_string())], count as f64);
    }
    page.line("block_deadline_ratio_bucket", &[("le", "+Inf")], engine.blocks as f64);
    let span = service.rooms.engine.geometry().block_span(1).as_secs_f64();
    page.line("block_deadline_ratio_sum", &[], engine.block_time_total.as_secs_f64() / span.max(1e-9));
    page.line("block_deadline_ratio_count", &[], engine.blocks as f64);
    page.head("card_memory_free_bytes", "gauge", "Memory free on each card that the engine uses");
    for (card, free) in engine.cards_free.iter().enumerate() {
        page.line("card_memory_free_bytes", &[("card", &card.to_string())], *free as f64);
    }
    let c = service.rooms.sessions.counts();
    page.one("sessions_started_total", "counter", "Conversations begun since the start", &[], c.started as f64);
    page.head("sessions", "gauge", "Conversations now, by state");
    for (state, n) in &c.by_state {
        page.line("sessions", &[("state", state)], *n as f64);
    }
    page.head("sessions_closed_total", "counter", "Conversations that ended, by reason");
    for (reason, n) in &c.by_reason {
        page.line("sessions_closed_total", &[("reason", reason)], *n as f64);
    }
    let help = "Packets that did not arrive: of visitors' voices (in), of what was sent to them (out)";
    page.head("packets_lost_total", "counter", help);
    page.line("packets_lost_total", &[("direction", "in")], c.lost_in as f64);
    page.line("packets_lost_total", &[("direction", "out")], c.lost_out as f64);
    let help = "Pictures that slow or joining sinks did not get";
    page.one("sink_pictures_dropped_total", "counter", help, &[], c.sink_pictures_dropped as f64);
    page.one("sinks_slowed_total", "counter", "Times a sink became too slow", &[], c.sinks_slowed as f64);
    page.one("interruptions_total", "counter", "Times speech was cut off by order", &[], c.interruptions as f64);
    let live = service.rooms.sessions.snapshots();
    let sum = |f: fn(&session::Metrics) -> f64| live.iter().map(|s| f(&s.metrics)).sum::<f64>();
    page.one("sinks", "gauge", "Pages, players and recorders attached", &[], sum(|m| m.sinks as f64));
    let help = "Speech that waits to be spoken";
    page.one("speech_buffered_seconds", "gauge", help, &[], sum(|m| m.speech_buffered_ms / 1e3));
    let help = "Bits per second of pictures sent to all visitors";
    page.one("video_bitrate", "gauge", help, &[], sum(|m| m.bitrate as f64));
    let help = "Bits per second that the estimates of all visitors' lines allow";
    page.one("target_bitrate", "gauge", help, &[], sum(|m| f64::from(m.target_bitrate)));
    if let Some(cluster) = &service.rooms.cluster {
        let help = "1 while other nodes of the cluster can be asked";
        page.one("cluster_reachable", "gauge", help, &[], f64::from(u8::from(cluster.reachable())));
        let nodes = cluster.nodes();
        page.head("cluster_nodes", "gauge", "Living nodes that this one hears, by state");
        for (word, state) in [("ready", State::Ready), ("draining", State::Draining), ("failed", State::Failed)] {
            let n = nodes.iter().filter(|node| node.beat.state == state).count();
            page.line("cluster_nodes", &[("state", word)], n as f64);
        }
        let sum = |f: fn(&Beat) -> usize| nodes.iter().map(|node| f(&node.beat)).sum::<usize>() as f64;
        page.one("cluster_slots", "gauge", "Faces that can be had at once, of all nodes", &[], sum(|b| b.slots));
        page.one("cluster_slots_used", "gauge", "Faces taken now, of all nodes", &[], sum(|b| b.used));
    }
    let (pictures, bytes) = service.portraits.size();
    page.one("portraits", "gauge", "Uploaded pictures kept in memory", &[], pictures as f64);
    page.one("portrait_bytes", "gauge", "Memory that uploaded pictures take", &[], bytes as f64);
}

/// Writes lines of the text format; names get the prefix here.
struct Page<'a>(&'a mut String);

impl Page<'_> {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP loquent_{name} {help}\n# TYPE loquent_{name} {kind}\n");
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> = labels.iter().map(|(k, v)| format!("{k}=\"{}\"", escaped(v))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.0, "loquent_{name}{labels} {value}");
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, labels: &[(&str, &str)], value: f64) {
        self.head(name, kind, help);
        self.line(name, labels, value);
    }
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
