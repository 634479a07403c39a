//! What passes between the layers of the Wan video autoencoders ([`Video`]), and what they remember from chunk to chunk
//! ([`History`]).

use candle_core::{DType, Result, Tensor};

#[cfg(feature = "cuda")]
use candle_core::Device;

#[cfg(feature = "cuda")]
use crate::model::{Result as Loaded, kernels::cuda::vae as card};

/// Video between layers.
pub(super) enum Video {
    /// `[frames, channels, height, width]`.
    Plain(Tensor),
    /// On a card.
    #[cfg(feature = "cuda")]
    Card(card::Video),
}

/// Called with the name and value of an intermediate result; tests compare them, everyone else passes [`quiet`].
pub type Probe<'a> = &'a mut dyn FnMut(&str, &Tensor);

/// A probe that looks at nothing.
pub fn quiet(_: &str, _: &Tensor) {}

impl Video {
    /// The tensor of the plain form.
    pub(super) fn plain(&self) -> Option<Tensor> {
        match self {
            Video::Plain(x) => Some(x.clone()),
            #[cfg(feature = "cuda")]
            Video::Card(_) => None,
        }
    }

    /// Shows the plain form.
    pub(super) fn show(&self, probe: Probe, name: impl FnOnce() -> String) -> Result<()> {
        if let Some(x) = self.plain() {
            probe(&name(), &x);
        }
        Ok(())
    }

    /// `[frames, channels, height, width]` to a card's form; channels are filled up to a multiple of 8.
    #[cfg(feature = "cuda")]
    pub(super) fn on_card(x: &Tensor, usual: usize) -> Result<Video> {
        let c = x.dim(1)?;
        let x = x.pad_with_zeros(1, 0, c.next_multiple_of(8) - c)?.permute((0, 2, 3, 1))?.contiguous()?;
        Ok(Video::Card(card::Video::new(x, None, usual)))
    }

    /// `[frames, channels, height, width]`.
    pub(super) fn leave(self) -> Result<Tensor> {
        match self {
            Video::Plain(x) => Ok(x),
            #[cfg(feature = "cuda")]
            Video::Card(x) => x.settled().map_err(card_error)?.permute((0, 3, 1, 2))?.contiguous(),
        }
    }

    /// Pictures as `[3, frames, height, width]` in −1…1, f32.
    pub(super) fn planes(self) -> Result<Tensor> {
        match self {
            Video::Plain(x) => x.transpose(0, 1)?.to_dtype(DType::F32)?.contiguous()?.clamp(-1.0, 1.0),
            #[cfg(feature = "cuda")]
            Video::Card(x) => x.planes().map_err(card_error),
        }
    }

    /// Pictures as planar YUV 4:2:0, `[frames, height · width · 3/2]` bytes.
    pub(super) fn i420(self) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Video::Card(x) = &self {
            return x.i420().map_err(card_error);
        }
        crate::model::picture::i420(&self.planes()?)
    }
}

/// What one temporal layer remembers.
#[derive(Default)]
pub(super) enum Slot {
    /// Nothing has passed yet.
    #[default]
    Empty,
    /// The single first frame has passed an upsampler, which keeps nothing of it.
    Started,
    /// Past input frames, oldest first.
    Frames(Tensor),
}

/// Everything a pass remembers from chunk to chunk: one slot per temporal layer. A new value starts a new video.
#[derive(Default)]
pub(super) struct History(Vec<Slot>);

impl History {
    pub(super) fn slot(&mut self, index: usize) -> &mut Slot {
        if self.0.len() <= index {
            self.0.resize_with(index + 1, Slot::default);
        }
        &mut self.0[index]
    }

    /// The buffer of past frames of a layer on a card: zeros when nothing has passed yet.
    #[cfg(feature = "cuda")]
    pub(super) fn buffer(
        &mut self,
        index: usize,
        (device, h, w): (&Device, usize, usize),
        past: usize,
        channels: usize,
    ) -> Loaded<Tensor> {
        let slot = self.slot(index);
        if let Slot::Frames(t) = slot {
            return Ok(t.clone());
        }
        let blank = card::blank(device, (past, h, w, channels))?;
        *slot = Slot::Frames(blank.clone());
        Ok(blank)
    }
}

/// The last `n` frames of history and chunk together.
pub(super) fn last_frames(history: Option<&Tensor>, x: &Tensor, n: usize) -> Result<Tensor> {
    let t = x.dim(0)?;
    if t >= n {
        return x.narrow(0, t - n, n)?.force_contiguous();
    }
    match history {
        Some(h) => {
            let keep = (n - t).min(h.dim(0)?);
            Tensor::cat(&[&h.narrow(0, h.dim(0)? - keep, keep)?, x], 0)
        }
        None => Ok(x.clone()),
    }
}

/// The tensor library's error, as the layers give it.
#[cfg(feature = "cuda")]
pub(super) fn card_error(e: crate::model::Error) -> candle_core::Error {
    match e {
        crate::model::Error::Candle(e) => e,
        other => candle_core::Error::Msg(other.to_string()),
    }
}
