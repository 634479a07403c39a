//! Tracing set-up, the metrics that rooms count themselves, and [`traces`] for a collector.
//!
//! A leaf: any room may use it. What can be sampled when somebody asks (slots, sessions by state, real-time factor) is
//! not here; `server` reads it from its owner at each scrape.

mod traces;

pub use traces::{Attribute, Span, Trace, Traces, export, traces};

use prometheus::{
    Encoder as _, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    TextEncoder,
};
use serde::{Deserialize, Serialize};
use std::{sync::OnceLock, time::Duration};

/// What is logged, and how. Logs go to standard error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `tracing` filter: a level, or levels per room such as `info,loquent::net=debug`.
    pub filter: String,
    /// For people or for machines.
    pub format: Format,
    /// Where traces are sent: a collector's address for OTLP over HTTP. Empty: none are made.
    pub traces: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    Text,
    Json,
}

impl Default for Config {
    fn default() -> Self {
        // The transport's crates tell of every lost packet; only their errors matter to an operator. What NATS' crate tells
        // with every try, `cluster` tells once.
        Config {
            filter: "info,webrtc=error,rtc=error,async_nats=off".into(),
            format: Format::Text,
            traces: String::new(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error(
        "log.filter = \"{value}\" is not a filter: {why}; allowed is a level (error, warn, info, debug, trace) or levels per room such as info,loquent::net=debug"
    )]
    Filter { value: String, why: String },
    #[error(
        "log.traces = \"{value}\" cannot be used: {why}; give the address of an OTLP collector, such as http://127.0.0.1:4318/v1/traces"
    )]
    Traces { value: String, why: String },
    #[error("logging was already set up in this process")]
    Twice,
}

impl Config {
    fn parsed(&self) -> Result<tracing_subscriber::EnvFilter, TelemetryError> {
        tracing_subscriber::EnvFilter::try_new(&self.filter)
            .map_err(|e| TelemetryError::Filter { value: self.filter.clone(), why: e.to_string() })
    }

    /// Says whether the values are usable, without setting anything up.
    ///
    /// # Errors
    /// A filter that `tracing` does not understand; an address of a collector that is none.
    pub fn validate(&self) -> Result<(), TelemetryError> {
        self.parsed()?;
        let known = self.traces.is_empty() || self.traces.starts_with("http://") || self.traces.starts_with("https://");
        if !known {
            let why = "it begins with neither http:// nor https://".into();
            return Err(TelemetryError::Traces { value: self.traces.clone(), why });
        }
        Ok(())
    }
}

/// Sends the process's logs to standard error.
///
/// # Errors
/// A filter that `tracing` does not understand; a second call in one process.
pub fn init(config: &Config) -> Result<(), TelemetryError> {
    let filter = config.parsed()?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let done = match config.format {
        // Colours only where somebody looks.
        Format::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init(),
        Format::Json => builder.json().try_init(),
    };
    done.map_err(|_| TelemetryError::Twice)
}

/// A pocket block is 160 ms of video: made in less, we are in time. Buckets are dense around that deadline.
const BLOCK_BUCKETS: [f64; 16] =
    [0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.10, 0.12, 0.14, 0.16, 0.18, 0.20, 0.24, 0.32, 0.64, 1.28];

/// Voice at the microphone to the same voice and lips leaving the server; the goal is 600 ms to the screen.
const DELAY_BUCKETS: [f64; 12] = [0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 3.0];

/// Everything counted as it happens. Names, units and labels are the public interface of `/metrics`.
pub struct Metrics {
    registry: Registry,
    /// Seconds per block and stage; `stage` is one of `features`, `generation`, `decode`, `encode`, `total`.
    pub block_seconds: HistogramVec,
    /// Seconds from voice received to voice and lips sent.
    pub delay_seconds: Histogram,
    /// Frames by `outcome`: `sent`, `held` (shown again for want of a new one), `skipped` (too late to be shown).
    pub frames: IntCounterVec,
    /// Speech packets by `outcome`: `received`, `lost`, `recovered` (by FEC), `concealed`, `late`, `padding`.
    pub speech_packets: IntCounterVec,
    /// HTTP answers by `route`, `method` and `status`.
    pub http_requests: IntCounterVec,
    /// Requests refused by `why`: `requests`, `sessions`, `full`, `memory`, `wrong_key`, `wrong_scope`, `wrong_host`,
    /// `wrong_origin`.
    pub refusals: IntCounterVec,
    /// Times a failed engine was built anew, or tried to be.
    pub engine_rebuilds: IntCounter,
    /// Connections refused because too many were open.
    pub connections_refused: IntCounter,
    /// HTTP connections open now.
    pub connections: IntGauge,
    /// WebSockets open now.
    pub websockets: IntGauge,
    /// Blocks' traces by `outcome`: `sent`, `dropped` (the collector was slow), `failed` (it did not take them).
    pub trace_blocks: IntCounterVec,
    /// Their messages by `kind`: `sound`, `control`, `refused`.
    pub websocket_messages: IntCounterVec,
    /// Requests that other nodes were asked to answer, by `outcome`: `answered`, `late`, `absent`, `unreachable`.
    pub cluster_asks: IntCounterVec,
    /// Things begun in a cluster, by `at`: `own` node, `other`, `nobody` (there was no room).
    pub cluster_placements: IntCounterVec,
    /// Messages of the bus that were not believed, by `why`: `foreign` (wrong signature or time), `again` (repeated).
    pub cluster_messages_refused: IntCounterVec,
}

impl Metrics {
    fn new() -> prometheus::Result<Metrics> {
        let registry = Registry::new_custom(Some("loquent".into()), None)?;
        let m = Metrics {
            block_seconds: HistogramVec::new(
                HistogramOpts::new(
                    "block_seconds",
                    "Time to make one block of video, by stage; a pocket block lasts 0.16 s",
                )
                .buckets(BLOCK_BUCKETS.to_vec()),
                &["stage"],
            )?,
            delay_seconds: Histogram::with_opts(
                HistogramOpts::new("delay_seconds", "From voice received to the same voice and its lips sent")
                    .buckets(DELAY_BUCKETS.to_vec()),
            )?,
            frames: IntCounterVec::new(
                Opts::new(
                    "frames_total",
                    "Video frames sent, held (the one before was shown again) or skipped (too late)",
                ),
                &["outcome"],
            )?,
            speech_packets: IntCounterVec::new(
                Opts::new("speech_packets_total", "Packets of microphones, by what became of them"),
                &["outcome"],
            )?,
            http_requests: IntCounterVec::new(
                Opts::new("http_requests_total", "HTTP answers"),
                &["route", "method", "status"],
            )?,
            refusals: IntCounterVec::new(
                Opts::new("refusals_total", "Requests that were turned away, by why"),
                &["why"],
            )?,
            engine_rebuilds: IntCounter::new(
                "engine_rebuilds_total",
                "Times a failed engine was built anew, or that was tried",
            )?,
            connections_refused: IntCounter::new(
                "http_connections_refused_total",
                "HTTP connections closed at once because too many were open",
            )?,
            websockets: IntGauge::new("websockets", "WebSockets open now")?,
            websocket_messages: IntCounterVec::new(
                Opts::new("websocket_messages_total", "Messages that programs sent over WebSockets, by kind"),
                &["kind"],
            )?,
            cluster_asks: IntCounterVec::new(
                Opts::new("cluster_asks_total", "Requests that other nodes were asked to answer"),
                &["outcome"],
            )?,
            cluster_placements: IntCounterVec::new(
                Opts::new("cluster_placements_total", "Sessions that this node found a place for, by whose it is"),
                &["at"],
            )?,
            cluster_messages_refused: IntCounterVec::new(
                Opts::new("cluster_messages_refused_total", "Messages of the bus that were not believed"),
                &["why"],
            )?,
            trace_blocks: IntCounterVec::new(
                Opts::new(
                    "trace_blocks_total",
                    "Blocks whose traces were sent, dropped for want of room, or not taken",
                ),
                &["outcome"],
            )?,
            connections: IntGauge::new("http_connections", "HTTP connections open now")?,
            registry: registry.clone(),
        };
        registry.register(Box::new(m.block_seconds.clone()))?;
        registry.register(Box::new(m.delay_seconds.clone()))?;
        registry.register(Box::new(m.frames.clone()))?;
        registry.register(Box::new(m.speech_packets.clone()))?;
        registry.register(Box::new(m.http_requests.clone()))?;
        registry.register(Box::new(m.refusals.clone()))?;
        registry.register(Box::new(m.engine_rebuilds.clone()))?;
        registry.register(Box::new(m.connections_refused.clone()))?;
        registry.register(Box::new(m.connections.clone()))?;
        registry.register(Box::new(m.websockets.clone()))?;
        registry.register(Box::new(m.websocket_messages.clone()))?;
        registry.register(Box::new(m.cluster_asks.clone()))?;
        registry.register(Box::new(m.cluster_placements.clone()))?;
        registry.register(Box::new(m.cluster_messages_refused.clone()))?;
        registry.register(Box::new(m.trace_blocks.clone()))?;
        for outcome in ["sent", "dropped", "failed"] {
            m.trace_blocks.with_label_values(&[outcome]);
        }
        for kind in ["sound", "control", "refused"] {
            m.websocket_messages.with_label_values(&[kind]);
        }
        for outcome in ["answered", "late", "absent", "unreachable"] {
            m.cluster_asks.with_label_values(&[outcome]);
        }
        for at in ["own", "other", "nobody"] {
            m.cluster_placements.with_label_values(&[at]);
        }
        for why in ["foreign", "again"] {
            m.cluster_messages_refused.with_label_values(&[why]);
        }
        // A series that does not exist yet reads as "no data"; one that exists reads as zero.
        for stage in ["features", "generation", "decode", "encode", "total"] {
            m.block_seconds.with_label_values(&[stage]);
        }
        for why in ["requests", "sessions", "full", "memory", "wrong_key", "wrong_scope", "wrong_host", "wrong_origin"]
        {
            m.refusals.with_label_values(&[why]);
        }
        for outcome in ["sent", "held", "skipped"] {
            m.frames.with_label_values(&[outcome]);
        }
        for outcome in ["received", "lost", "recovered", "concealed", "late", "padding"] {
            m.speech_packets.with_label_values(&[outcome]);
        }
        Ok(m)
    }

    /// Notes how long a stage of one block took.
    pub fn stage(&self, stage: &str, took: Duration) {
        self.block_seconds.with_label_values(&[stage]).observe(took.as_secs_f64());
    }

    /// Notes `n` frames with one outcome.
    pub fn frame(&self, outcome: &str, n: u64) {
        self.frames.with_label_values(&[outcome]).inc_by(n);
    }

    /// Notes `n` speech packets with one outcome.
    pub fn speech(&self, outcome: &str, n: u64) {
        self.speech_packets.with_label_values(&[outcome]).inc_by(n);
    }

    /// Notes `n` blocks' traces with one outcome.
    pub fn trace(&self, outcome: &str, n: u64) {
        self.trace_blocks.with_label_values(&[outcome]).inc_by(n);
    }

    /// Notes a request that was turned away.
    pub fn refused(&self, why: &str) {
        self.refusals.with_label_values(&[why]).inc();
    }

    /// Notes a request to another node.
    pub fn cluster_ask(&self, outcome: &str) {
        self.cluster_asks.with_label_values(&[outcome]).inc();
    }

    /// Notes where something was begun.
    pub fn cluster_placement(&self, at: &str) {
        self.cluster_placements.with_label_values(&[at]).inc();
    }

    /// Notes a message of the bus that was not believed.
    pub fn cluster_message(&self, why: &str) {
        self.cluster_messages_refused.with_label_values(&[why]).inc();
    }

    /// Notes a message of a WebSocket.
    pub fn websocket_message(&self, kind: &str) {
        self.websocket_messages.with_label_values(&[kind]).inc();
    }

    /// Everything counted so far in Prometheus' text format (version 0.0.4).
    pub fn text(&self) -> String {
        let mut out = Vec::new();
        if let Err(e) = TextEncoder::new().encode(&self.registry.gather(), &mut out) {
            tracing::warn!("metrics could not be written: {e}");
        }
        String::from_utf8_lossy(&out).into_owned()
    }
}

/// The process's metrics.
pub fn metrics() -> &'static Metrics {
    static METRICS: OnceLock<Metrics> = OnceLock::new();
    METRICS.get_or_init(|| {
        // Only constant names and buckets go in: a failure here is a mistake in this file, found by its test.
        Metrics::new().expect("metric names and buckets in telemetry.rs are valid")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_can_be_built_and_read() {
        let m = metrics();
        m.stage("generation", Duration::from_millis(50));
        m.frame("held", 2);
        let text = m.text();
        assert!(text.contains("loquent_block_seconds_bucket{stage=\"generation\",le=\"0.16\"}"), "{text}");
        assert!(text.lines().any(|l| l.starts_with("loquent_frames_total{outcome=\"held\"} ")), "{text}");
    }

    #[test]
    fn a_wrong_filter_is_told() {
        let config = Config { filter: "loquent=shout".into(), ..Config::default() };
        let said = config.validate().unwrap_err().to_string();
        assert!(said.contains("log.filter") && said.contains("shout"), "{said}");
        Config::default().validate().unwrap();
    }
}
