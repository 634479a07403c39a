//! The parts networks are made of. Activations are two-dimensional, `[tokens, channels]`, batch 1.
//!
//! Every part computes through one function, so that a faster or a quantised form goes in at one place: matrices in
//! [`Linear`], attention in [`attention`], norms in [`norm`], rotations in [`rope`]. Where a device can do several of them
//! in one pass, the parts between two matrices are one operation: [`Residual`] (sum and norm), [`Memory`] (norm, rotation
//! and storing of keys and values), [`Folded`] (attention to known keys and its output projection), and they hand on [`Rows`] in the form the next matrix wants.

mod attention;
mod conv;
mod folded;
pub mod fp8;
mod linear;
mod matrix;
mod memory;
pub mod norm;
mod operand;
mod residual;
pub mod rope;

pub use attention::{attention, attention_to_few, plain as attention_plain};
pub use conv::{CausalConv1d, PatchEmbed, convolve};
pub use folded::Folded;
pub use linear::{Activation, Gated, Linear};
pub use matrix::{Matrix, Numbers, Side, quantised};
pub use memory::{Memory, Slot};
pub use operand::{Form, Rows, Unit};
pub use residual::Residual;
pub use rope::Rope;
