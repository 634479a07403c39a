//! The parts networks are made of. Activations are two-dimensional, `[tokens, channels]`, batch 1.
//!
//! Every part computes through one function, so that a faster or a quantised form goes in at one place: matrices in
//! [`Linear`], attention in [`attention`], norms in [`norm`], rotations in [`rope`].

mod attention;
mod conv;
pub mod fp8;
mod linear;
mod matrix;
pub mod norm;
pub mod rope;

pub use attention::{attention, plain as attention_plain};
pub use conv::{CausalConv1d, PatchEmbed};
pub use linear::{Activation, Linear};
pub use matrix::{Matrix, Numbers, Side, quantised};
pub use rope::Rope;
