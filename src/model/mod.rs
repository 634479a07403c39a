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
//! | [`wav2vec2`] | how the 14B model hears: all hidden states, 30 Hz features, per-frame buckets |
//! | [`taehv`] | a small decoder instead of Wan 2.1's |
//! | [`umt5`] | how it reads: prompt cleaning, tokens, text encoder |
//! | [`budget`] | what the 14B model takes of a card, and the frames per second to expect |
//! | [`ranks`] | several devices, one stream of video: layouts, links, shares |
//! | [`picture`] | the reference picture: output size, resize, crop |
//! | [`kernels`] | fused CPU operations, each beside its plain twin |

pub mod audio;
pub mod budget;
pub mod dit;
mod error;
pub mod kernels;
pub mod nn;
pub mod picture;
pub mod ranks;
pub mod sampler;
pub mod taehv;
pub mod umt5;
pub mod vae;
pub mod wav2vec2;
pub mod weights;

pub use error::{At, Error, Result};
