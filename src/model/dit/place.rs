//! Where a part's weights are: on the device, or in host memory, from where they travel for each use.
//!
//! Parts that travel are copied before they compute and dropped after, one at a time, so the device never holds more
//! than one of them; the numbers are the same. The copy does not overlap with computing: a block of the 14B model is
//! 0.7 GB, which costs about as long as its own share of a clip's forward.

use std::ops::Deref;

use candle_core::Device;

use crate::model::{Result, weights::Weights};

/// A part that can be copied to another device.
pub(super) trait Portable: Sized {
    fn moved(&self, device: &Device) -> Result<Self>;
}

/// A part and where it is.
#[derive(Debug)]
pub(super) enum Placed<T> {
    Here(T),
    Away(T),
}

/// A part on the device, for as long as it is needed.
pub(super) enum Brought<'a, T> {
    Kept(&'a T),
    Copied(T),
}

impl<T: Portable> Placed<T> {
    /// Loads a part to the device of `weights`, or with `away` to host memory.
    pub(super) fn load(weights: &Weights, away: bool, load: impl FnOnce(&Weights) -> Result<T>) -> Result<Self> {
        if away { Ok(Self::Away(load(&weights.kept_on(&Device::Cpu))?)) } else { Ok(Self::Here(load(weights)?)) }
    }

    /// The part on `device`.
    pub(super) fn bring(&self, device: &Device) -> Result<Brought<'_, T>> {
        Ok(match self {
            Self::Here(t) => Brought::Kept(t),
            Self::Away(t) => Brought::Copied(t.moved(device)?),
        })
    }

    /// Whether it is in host memory.
    pub(super) fn travels(&self) -> bool {
        matches!(self, Self::Away(_))
    }

    /// The part where it is.
    pub(super) fn kept(&self) -> &T {
        match self {
            Self::Here(t) | Self::Away(t) => t,
        }
    }
}

impl<T> Deref for Brought<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match self {
            Self::Kept(t) => t,
            Self::Copied(t) => t,
        }
    }
}
