//! Fused operations, each with a plain twin that its test compares it to: for the CPU here, for NVIDIA cards in [`cuda`].

#[cfg(target_arch = "x86_64")]
mod amx;
mod conv;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dit_attention;
pub mod dit_linear;
pub mod dit_rows;
mod packed;
mod pool;
mod simd;
mod tile;

pub use conv::{Conv, Output, Plane, conv_plain};
pub use packed::Packed;
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

/// An NVIDIA card as benchmarks name it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Card {
    pub name: String,
    /// Of the driver's CUDA, such as `13.0`.
    pub cuda: String,
    /// Bytes of its memory: in all, and in use by everybody, memory that this program keeps for later included.
    pub memory: u64,
    pub used: u64,
}

/// What card `ordinal` is, and how full. None where this build or this machine has none.
pub fn card_facts(ordinal: usize) -> Option<Card> {
    #[cfg(feature = "cuda")]
    {
        let device = cuda::open(ordinal).ok()?;
        let ((name, version), (free, all)) = (cuda::time::name(&device).ok()?, cuda::time::memory(&device).ok()?);
        let cuda = format!("{}.{}", version / 1000, version % 1000 / 10);
        Some(Card { name, cuda, memory: all as u64, used: (all - free) as u64 })
    }
    #[cfg(not(feature = "cuda"))]
    {
        let _ = ordinal;
        None
    }
}

/// Bytes of a card's memory: free to this program, and what work in passing held at most beyond what is held now, since
/// this was asked last. None for the processor, or where the driver does not tell.
pub fn card_memory(device: &candle_core::Device) -> Option<(u64, u64)> {
    #[cfg(feature = "cuda")]
    return cuda::time::room(device).ok();
    #[cfg(not(feature = "cuda"))]
    {
        let _ = device;
        None
    }
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
