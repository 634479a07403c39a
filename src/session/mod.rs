//! One conversation: state machine, ingest, playout, encoding for the viewer.
//!
//! Everything that decides is pure and takes `now`: [`machine`] (the life), [`ingest`] (packets → voice and speech on
//! one timeline), [`playout`] (media time → wall time; hold or skip), [`ladder`] (bitrate → size and rate), and
//! [`conversation`], which ties them together. [`run`] turns their outputs into effects; one named thread per
//! presenter encodes pictures.
//!
//! A session is a hub: one presenter, one encoding of voice and picture, handed by a [`Fan`] to any number of sinks
//! ([`LinkOut`]), and speech from one microphone ([`LinkEvent`]s) or from [`SpeechPort`]s. [`run`] is a session that its
//! one peer begins and ends, [`host`] one that lives by itself. From outside it is a [`Handle`].

mod conversation;
mod encoder;
mod fan;
mod ingest;
mod ladder;
mod ledger;
mod link;
mod machine;
mod playout;
mod recorder;
mod registry;
mod run;
mod speech;
mod stage;
mod trail;

pub use conversation::{Conversation, Effect};
pub use encoder::{Encoder, EncoderReport, Job, Look, Picture};
pub use fan::{Attachment, Fan, Line, SinkRole};
pub use ingest::{Ingest, IngestStats};
pub use ladder::{Ladder, Rung};
pub use link::{EncodedAudio, EncodedVideo, LinkEvent, LinkOut, LinkStats, SpeechPacket};
pub use machine::{Input, Machine, Output, Reason, State};
pub use playout::{Due, Playout, PlayoutStats};
pub use recorder::{Recorder, RecordingSpec, RecordingStatus};
pub use registry::{ChangeError, Counts, Handle, Registry, SessionControl, SessionId, Snapshot};
pub use run::{SessionSpec, host, run};
pub use speech::{SpeechClosed, SpeechPort, SpeechQueue};
pub use trail::Made;

use crate::codec::{BadgeLanguage, BadgePlace};
use serde::{Deserialize, Serialize};
use std::{sync::Arc, time::Duration};

/// Settings of a conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Seconds a transport may take to come up.
    pub connect_timeout_s: u64,
    /// Seconds the engine may take to prepare a presenter once the transport is up.
    pub prepare_timeout_s: u64,
    /// Seconds an interrupted transport may take to come back.
    pub interrupted_timeout_s: u64,
    /// Seconds a draining conversation may take to play out.
    pub drain_timeout_s: u64,
    /// Longest conversation in seconds; 0 = no limit.
    pub max_session_s: u64,
    /// Seconds without speech after which the place is given free; 0 = never.
    pub idle_timeout_s: u64,
    /// Shortest and longest wait for a packet that is missing or late, milliseconds.
    pub reorder_min_ms: u32,
    pub reorder_max_ms: u32,
    /// Bits per second of the voice sent to the viewer.
    pub voice_bitrate: u32,
    /// Loss in percent that the voice's in-band repair is dimensioned for; 0 switches it off.
    pub voice_loss_percent: u8,
    /// Bits per second of the picture: floor and ceiling; ceiling 0 = by picture size (half a bit per pixel).
    pub video_min_bitrate: u32,
    pub video_max_bitrate: u32,
    /// Safety added to the measured lateness of blocks when the voice is delayed for them, milliseconds.
    pub playout_margin_ms: u32,
    /// The voice is never delayed by more than this; behind that, speech is skipped for the presenter, milliseconds.
    pub playout_max_ms: u32,
    /// Keyframes asked for within this time of the last one wait, milliseconds.
    pub keyframe_spacing_ms: u32,
    /// Seconds of speech that may wait to be spoken; whoever brings more waits.
    pub speech_buffer_s: u64,
    /// Where the badge stands that says the picture is computer-made.
    pub badge: BadgePlace,
    /// What the badge is written in.
    pub badge_language: BadgeLanguage,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            connect_timeout_s: 20,
            prepare_timeout_s: 60,
            interrupted_timeout_s: 15,
            drain_timeout_s: 5,
            max_session_s: 7200,
            idle_timeout_s: 900,
            reorder_min_ms: 40,
            reorder_max_ms: 60,
            voice_bitrate: 32_000,
            voice_loss_percent: 5,
            video_min_bitrate: 30_000,
            video_max_bitrate: 0,
            playout_margin_ms: 10,
            playout_max_ms: 2000,
            keyframe_spacing_ms: 300,
            speech_buffer_s: 60,
            badge: BadgePlace::BottomRight,
            badge_language: BadgeLanguage::En,
        }
    }
}

/// What happens in a session, for whoever drives it ([`Handle::events`]).
#[derive(Clone, Debug, PartialEq)]
pub enum SessionEvent {
    State(State),
    /// The first sound of a segment ([`SpeechPort::push`] gave its number) was played.
    SpeakStarted {
        segment: u64,
    },
    /// A segment is over: everything was played, or an interruption cut it off. `position` is how much was truly played.
    SpeakEnded {
        segment: u64,
        position: Duration,
        interrupted: bool,
    },
    /// Once a second.
    Metrics(Arc<Metrics>),
    /// The session is over; the last event.
    Closed(Reason),
}

/// What a conversation measures, as the panel, the registry and `/metrics` show it. Counters run since its start,
/// the rest describes the last second or so.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// Pictures a second that left for the viewer: those that the pacer held back or threw away do not count.
    pub fps: f64,
    /// From a sound at the microphone to the picture that shows it leaving us, plus the network both ways (half a
    /// round trip each) and the pacer's queue; median of the last second, milliseconds. `None` while nobody speaks.
    /// What the viewer's own buffer, decoder and screen add is known to the page only.
    pub delay_ms: Option<f64>,
    /// The part of `delay_ms` that happens in this process.
    pub delay_server_ms: Option<f64>,
    pub ingest_ms: f64,
    pub features_ms: f64,
    pub generation_ms: f64,
    pub decode_ms: f64,
    pub encode_ms: f64,
    /// Blocks a second that are needed over those that can be made: above 1 the engine, or the encoder beside it, is too
    /// slow. An engine of several devices is as fast as the busiest of them, however long a block's way through all.
    pub real_time_factor: f64,
    pub blocks: u64,
    /// Blocks' worth of speech the presenter did not get because the engine was too slow.
    pub blocks_skipped: u64,
    /// Blocks dropped because they belonged to what was interrupted.
    pub blocks_stale: u64,
    pub frames_sent: u64,
    pub frames_held: u64,
    pub frames_skipped: u64,
    pub lost_in: u64,
    pub repaired_in: u64,
    pub concealed_in_ms: u64,
    pub late_in: u64,
    pub padding_in: u64,
    pub lost_out: u64,
    /// Bits per second of pictures sent, and what the estimator allows for everything.
    pub bitrate: u64,
    pub target_bitrate: u32,
    pub width: u32,
    pub height: u32,
    pub nominal_fps: f64,
    /// How long the voice is kept so that lips can be in time with it.
    pub playout_delay_ms: f64,
    /// How late a block came after its speech was complete: now and worst.
    pub lag_ms: f64,
    pub worst_lag_ms: f64,
    pub drift_ppm: f64,
    pub round_trip_ms: Option<f64>,
    /// Sinks now; pictures that slow or joining ones did not get; how often one became slow.
    pub sinks: u64,
    pub sink_pictures_dropped: u64,
    pub sinks_slowed: u64,
    /// Speech that waits to be spoken.
    pub speech_buffered_ms: f64,
    /// Interruptions so far.
    pub interruptions: u64,
}

impl Metrics {
    /// As pages and programs are told, once a second; tenths are enough.
    pub fn wire(&self) -> serde_json::Value {
        let m = self;
        let tenth = |v: f64| (v * 10.0).round() / 10.0;
        serde_json::json!({
            "type": "metrics",
            "fps": tenth(m.fps),
            "nominal_fps": m.nominal_fps,
            "delay_ms": m.delay_ms.map(tenth),
            "delay_server_ms": m.delay_server_ms.map(tenth),
            "playout_delay_ms": tenth(m.playout_delay_ms),
            "stages": {
                "ingest": tenth(m.ingest_ms),
                "features": tenth(m.features_ms),
                "generation": tenth(m.generation_ms),
                "decode": tenth(m.decode_ms),
                "encode": tenth(m.encode_ms),
            },
            "frames_sent": m.frames_sent,
            "frames_held": m.frames_held,
            "frames_skipped": m.frames_skipped,
            "blocks": m.blocks,
            "blocks_skipped": m.blocks_skipped,
            "lost_in": m.lost_in,
            "lost_out": m.lost_out,
            "bitrate": m.bitrate,
            "target_bitrate": m.target_bitrate,
            "width": m.width,
            "height": m.height,
            "real_time_factor": (m.real_time_factor * 1000.0).round() / 1000.0,
            "lag_ms": tenth(m.lag_ms),
            "drift_ppm": tenth(m.drift_ppm),
            "sinks": m.sinks,
            "speech_buffered_ms": m.speech_buffered_ms.round(),
            "round_trip_ms": m.round_trip_ms.map(tenth),
        })
    }
}
