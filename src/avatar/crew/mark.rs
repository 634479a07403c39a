//! When a device did what.

use std::time::{Duration, Instant};

use candle_core::Device;

use crate::model::Result;
#[cfg(feature = "cuda")]
use crate::model::kernels::cuda::time::Event;

/// A moment in a device's work: on a card, when what was handed in so far is done.
pub(super) enum Mark {
    Host(Instant),
    #[cfg(feature = "cuda")]
    Card(Event),
}

impl Mark {
    /// After all work that this device was given.
    pub(super) fn now(device: &Device) -> Result<Mark> {
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            return Ok(Mark::Card(Event::record(device)?));
        }
        let _ = device;
        Ok(Mark::Host(Instant::now()))
    }

    /// Time since an earlier one of the same device; on a card this waits for both.
    pub(super) fn since(&self, earlier: &Mark) -> Result<Duration> {
        match (earlier, self) {
            (Mark::Host(from), Mark::Host(to)) => Ok(to.saturating_duration_since(*from)),
            #[cfg(feature = "cuda")]
            (Mark::Card(from), Mark::Card(to)) => to.since(from),
            #[cfg(feature = "cuda")]
            _ => Err(crate::model::Error::Input("two moments of different devices".into())),
        }
    }
}
