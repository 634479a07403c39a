//! How the pocket model hears (`audio: "mel"`): log-mel front-end and audio net, both as streams.

mod mel;
mod net;

pub use mel::{AHEAD, BANDS, HOP, Mel, MelState};
pub use net::{AudioConfig, AudioNet, AudioState, FEATURES, VISEMES};
