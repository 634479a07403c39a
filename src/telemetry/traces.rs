//! Traces for OpenTelemetry, sent as OTLP over HTTP in its JSON form (`POST …/v1/traces`, opentelemetry-proto 1.x).
//!
//! A trace is the way of one block. Whoever has one hands it over and goes on: it is sent by a task of its own, a second's
//! worth at a time.
//!
//! | edge | capacity | when full |
//! | --- | --- | --- |
//! | sessions → collector | 256 blocks | the newest are dropped, counted |

use super::{TelemetryError, metrics};
use serde_json::{Value, json};
use std::{
    sync::OnceLock,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tokio::sync::mpsc;

const WAITING: usize = 256;
/// Blocks in one request at most.
const BATCH: usize = 64;
/// How long blocks are gathered.
const GATHER: Duration = Duration::from_secs(1);
/// A collector that takes longer is as good as none.
const PATIENCE: Duration = Duration::from_secs(5);

static TRACES: OnceLock<Traces> = OnceLock::new();

/// A stretch of time with a name.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    pub name: &'static str,
    pub begun: Instant,
    pub ended: Instant,
    pub attributes: Vec<(&'static str, Attribute)>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Attribute {
    Text(String),
    Number(i64),
}

/// A span and what it is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    pub whole: Span,
    pub parts: Vec<Span>,
}

/// Where traces go.
pub struct Traces(mpsc::Sender<Trace>);

/// The process's, when it was told to have one.
pub fn traces() -> Option<&'static Traces> {
    TRACES.get()
}

impl Traces {
    /// Never waits.
    pub fn hand(&self, trace: Trace) {
        if self.0.try_send(trace).is_err() {
            metrics().trace("dropped", 1);
        }
    }
}

/// Sends traces to `endpoint` from now on; to be called within a runtime.
///
/// # Errors
/// An endpoint that no client can be made for; a second call in one process.
pub fn export(endpoint: &str) -> Result<(), TelemetryError> {
    let wrong = |why: String| TelemetryError::Traces { value: endpoint.into(), why };
    let endpoint = reqwest::Url::parse(endpoint).map_err(|e| wrong(e.to_string()))?;
    let client = reqwest::Client::builder().timeout(PATIENCE).build().map_err(|e| wrong(e.to_string()))?;
    let (sender, receiver) = mpsc::channel(WAITING);
    TRACES.set(Traces(sender)).map_err(|_| TelemetryError::Twice)?;
    tokio::spawn(send(client, endpoint, receiver));
    Ok(())
}

async fn send(client: reqwest::Client, endpoint: reqwest::Url, mut waiting: mpsc::Receiver<Trace>) {
    let (mut batch, mut well) = (Vec::new(), true);
    while waiting.recv_many(&mut batch, BATCH).await > 0 {
        tokio::time::sleep(GATHER).await;
        while batch.len() < BATCH
            && let Ok(more) = waiting.try_recv()
        {
            batch.push(more);
        }
        let body = request(&batch, Instant::now(), SystemTime::now()).to_string();
        let asked = client.post(endpoint.clone()).header("content-type", "application/json").body(body);
        let sent = asked.send().await.and_then(|answer| answer.error_for_status());
        let outcome = if sent.is_ok() { "sent" } else { "failed" };
        metrics().trace(outcome, batch.len() as u64);
        if let Err(error) = &sent
            && std::mem::take(&mut well)
        {
            // Once for each time it goes away; the counter tells how much is missing.
            tracing::warn!(error = %error.to_string(), "traces cannot be sent");
        }
        well = sent.is_ok();
        batch.clear();
    }
}

/// `ExportTraceServiceRequest`. `now` and `unix` are one moment on two clocks.
fn request(traces: &[Trace], now: Instant, unix: SystemTime) -> Value {
    let nanos = |at: Instant| {
        let ago = now.saturating_duration_since(at);
        unix.checked_sub(ago).unwrap_or(unix).duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos().to_string()
    };
    let attribute = |(key, value): &(&str, Attribute)| match value {
        Attribute::Text(text) => json!({"key": key, "value": {"stringValue": text}}),
        // 64-bit numbers are strings in protobuf's JSON.
        Attribute::Number(n) => json!({"key": key, "value": {"intValue": n.to_string()}}),
    };
    let mut spans = Vec::new();
    for trace in traces {
        let (trace_id, root) = (hex(rand::random::<u128>(), 32), hex(rand::random::<u64>().into(), 16));
        let mut span = |span: &Span, id: String, parent: &str| {
            spans.push(json!({
                "traceId": trace_id,
                "spanId": id,
                "parentSpanId": parent,
                "name": span.name,
                "kind": 1,
                "startTimeUnixNano": nanos(span.begun),
                "endTimeUnixNano": nanos(span.ended),
                "attributes": span.attributes.iter().map(attribute).collect::<Vec<_>>(),
            }));
        };
        span(&trace.whole, root.clone(), "");
        trace.parts.iter().for_each(|part| span(part, hex(rand::random::<u64>().into(), 16), &root));
    }
    let text = |key: &'static str, value: &str| attribute(&(key, Attribute::Text(value.into())));
    json!({"resourceSpans": [{
        "resource": {"attributes": [
            text("service.name", env!("CARGO_PKG_NAME")),
            text("service.version", env!("CARGO_PKG_VERSION")),
        ]},
        "scopeSpans": [{"scope": {"name": env!("CARGO_PKG_NAME")}, "spans": spans}],
    }]})
}

/// All zeros is no id.
fn hex(id: u128, digits: usize) -> String {
    format!("{:0digits$x}", id.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_that_is_slow_costs_traces_and_no_time() {
        let (sender, waiting) = mpsc::channel(WAITING);
        let (traces, at) = (Traces(sender), Instant::now());
        let whole = Span { name: "block", begun: at, ended: at, attributes: vec![] };
        for _ in 0..WAITING + 10 {
            traces.hand(Trace { whole: whole.clone(), parts: vec![] });
        }
        assert_eq!(waiting.len(), WAITING);
        assert!(metrics().text().contains("loquent_trace_blocks_total{outcome=\"dropped\"} 10"));
    }
}
