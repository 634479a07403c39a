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

/// Opens NVIDIA card `ordinal` on a stream of its own; every device of this program that is a card is opened here.
///
/// # Errors
/// What is missing, and what to do: a build without feature `cuda`, no driver, no such card, one that is too old.
pub fn card(ordinal: usize) -> crate::model::Result<candle_core::Device> {
    #[cfg(feature = "cuda")]
    return cuda::open(ordinal);
    #[cfg(not(feature = "cuda"))]
    Err(crate::model::Error::Config(format!(
        "this program was built without support for NVIDIA cards, so card {ordinal} cannot be used; build it with `cargo \
         build --release --features cuda`"
    )))
}

/// Whether card `device` computes in e4m3 (Hopper and later).
pub fn fp8(device: &candle_core::Device) -> bool {
    #[cfg(feature = "cuda")]
    return cuda::context(device).is_ok_and(|c| c.fp8());
    #[cfg(not(feature = "cuda"))]
    {
        let _ = device;
        false
    }
}
