//! The seam to a transport: what a session needs of a peer, declared by the consumer. `net` implements it.

use crate::media::MediaTime;
use bytes::Bytes;
use std::time::{Duration, Instant};

/// What arrives from a peer. Sent over a bounded channel; see [`crate::edge`].
#[derive(Debug)]
pub enum LinkEvent {
    /// ICE and DTLS stand; media can flow.
    Connected,
    /// Media stopped flowing, ICE may recover by itself or by a restart.
    Interrupted,
    /// One Opus packet of the microphone as it came (unordered, possibly empty = padding only).
    Speech(SpeechPacket),
    /// PLI or FIR.
    KeyframeRequested,
    /// The estimator's new target for all media to this peer, bits per second.
    TargetBitrate(u32),
    /// A text message on the data channel.
    Message(String),
    /// The transport is gone for good.
    Closed(String),
}

#[derive(Clone, Debug)]
pub struct SpeechPacket {
    pub sequence: u16,
    /// RTP timestamp, 48 kHz.
    pub timestamp: u32,
    /// Opus; empty for a padding-only packet.
    pub payload: Bytes,
    pub marker: bool,
    pub arrived: Instant,
}

/// One H.264 access unit in Annex B.
#[derive(Clone, Debug)]
pub struct EncodedVideo {
    pub at: MediaTime,
    pub duration: MediaTime,
    pub keyframe: bool,
    pub width: u32,
    pub height: u32,
    pub data: Bytes,
}

/// One Opus packet.
#[derive(Clone, Debug)]
pub struct EncodedAudio {
    pub at: MediaTime,
    pub duration: MediaTime,
    pub data: Bytes,
}

/// Counters since the link began, and the newest estimates.
#[derive(Clone, Copy, Debug, Default)]
pub struct LinkStats {
    pub round_trip: Option<Duration>,
    /// Packets the peer reported lost of what we sent.
    pub lost_out: u64,
    pub sent_packets: u64,
    pub sent_bytes: u64,
    /// Pictures whose last packet left for the first time; `None` where nothing lies between us and the viewer that
    /// could hold them back.
    pub sent_pictures: Option<u64>,
    pub retransmitted: u64,
    pub nacks_refused: u64,
    pub keyframe_requests: u64,
    /// Speech packets missing at our side.
    pub lost_in: u64,
    pub padding_in: u64,
    pub target_bitrate: u32,
    /// Time the pacer's queue would need to empty.
    pub pacer_queue: Duration,
    /// Events dropped because the session did not take them in time.
    pub events_dropped: u64,
}

/// The sending half of a link. Cheap to clone behind an `Arc`; no call blocks.
pub trait LinkOut: Send + Sync {
    /// Sends one access unit. Audio and video of one media time are given the same wall time by the sender reports:
    /// `wall` is when media time `video.at` is due.
    fn video(&self, video: EncodedVideo, wall: Instant);
    fn audio(&self, audio: EncodedAudio, wall: Instant);
    /// Sends a text message on the data channel; dropped with a count when there is none or it is full.
    fn message(&self, text: String);
    fn stats(&self) -> LinkStats;
    /// Ends the link; idempotent.
    fn close(&self);
}
