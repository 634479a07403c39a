//! Autoencoders: pixels to latents and back, block by block.

mod chunk;
pub mod patch;
mod video;
mod wan;

pub use chunk::{Probe, quiet};
pub use video::{Decoding, Encoding, Kind, WanVae};
pub use wan::Savings;
