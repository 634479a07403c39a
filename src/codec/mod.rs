//! Opus, H.264, resampling, colour conversion, audio and video files, pictures.
//!
//! Knows no clock and no network. The C libraries (libopus, openh264) and rubato are named here only.

pub mod audio_file;
mod badge;
mod colour;
mod edits;
pub mod fragments;
mod guard;
mod h264;
pub mod marks;
mod movie;
pub mod mp4;
mod opus;
pub mod picture;
pub mod pose;
mod resample;
pub mod subject;
mod tracks;
mod view;

pub use badge::{Badge, BadgeLanguage, BadgePlace};
pub use colour::{scale_i420, to_i420, to_rgb};
pub use h264::{EncodedFrame, H264Config, VideoEncoder};
pub use opus::{OPUS_RATE, SpeechDecoder, VOICE_FRAME, VoiceEncoder};
pub use resample::{DriftResampler, Resampler, WIDEST_PPM};
pub use view::{View, nothing, view_of};

/// Why a codec could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// libopus refused; usually a damaged packet.
    #[error("Opus {doing}: {why}")]
    Opus { doing: &'static str, why: String },
    /// openh264 refused.
    #[error("H.264 {doing}: {why}")]
    H264 { doing: &'static str, why: String },
    /// rubato refused; rates or sizes it cannot do.
    #[error("resampling from {from} Hz to {to} Hz: {why}")]
    Resample { from: u32, to: u32, why: String },
    /// A picture whose size or buffer is not what the codec needs; the text says what was wrong.
    #[error("{0}")]
    Picture(String),
}
