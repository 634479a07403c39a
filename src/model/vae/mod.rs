//! Autoencoders: pixels to latents and back, block by block.

pub mod patch;
