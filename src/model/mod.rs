//! The networks as maths; candle lives here. No tokio, no clock, no sockets.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`weights`] | where numbers come from: files, quantised rows, the report of what did not fit |
//! | [`nn`] | the parts: linear, norms, rotary positions, attention, causal convolution |
//! | [`dit`] | the speech-to-video transformer: clip form, streaming form, and the base family |
//! | [`sampler`] | from noise to a latent: Euler, UniPC, DPM++ 2M, flow match |
//! | [`audio`] | how the pocket model hears: log-mel front-end and audio net |
//! | [`vae`] | pixels to latents and back |
//! | [`kernels`] | fused CPU operations, each beside its plain twin |

pub mod audio;
pub mod dit;
mod error;
pub mod kernels;
pub mod nn;
pub mod sampler;
pub mod vae;
pub mod weights;

pub use error::{At, Error, Result};
