//! One conversation: state machine, ingest, playout, fan-out.

mod link;

pub use link::{EncodedAudio, EncodedVideo, LinkEvent, LinkOut, LinkStats, SpeechPacket};
