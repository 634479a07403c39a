//! Autoencoders: pixels to latents and back, block by block.

pub mod patch;
mod video;
mod wan;

pub use video::{Decoding, Encoding, Kind, WanVae};
pub use wan::{Probe, quiet};
