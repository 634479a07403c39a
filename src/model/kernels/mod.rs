//! Fused CPU operations, each with a plain twin that its test compares it to.

pub mod dit_attention;
pub mod dit_linear;
pub mod dit_rows;
mod simd;
