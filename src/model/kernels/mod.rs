//! Fused operations, each with a plain twin that its test compares it to: for the CPU here, for NVIDIA cards in [`cuda`].

#[cfg(target_arch = "x86_64")]
mod amx;
mod conv;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dit_attention;
pub mod dit_linear;
pub mod dit_rows;
mod pool;
mod simd;
mod tile;

pub use conv::{Conv, Output, Packed, Plane, conv_plain};
pub use pool::Pool;
pub use tile::Isa;
