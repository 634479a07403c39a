//! Ulysses sequence parallelism (MODEL.md §6.9 of the specification; after wan/distributed/ulysses.py of Wan-Video/Wan2.2
//! at 42bf4cf): each rank has some of every frame's tokens, and for the attention some of the heads with all tokens.
//!
//! Two things differ from the official form. A rank's tokens are the same part of *every* latent frame, so audio is heard
//! where the tokens are and nothing is gathered for it; the order of tokens in the attention changes with that, which
//! attention does not see. And neither tokens nor heads need divide: some ranks have one more.

use std::{ops::Range, sync::Arc};

use candle_core::{Device, Tensor};

use super::{Link, part};
use crate::model::{Error, Result};

/// A rank's part of a block's tokens and of the heads.
#[derive(Debug, Clone)]
pub struct Share {
    link: Arc<dyn Link>,
    team: Range<usize>,
    heads: usize,
    frames: usize,
    tokens: usize,
}

impl Share {
    /// For a transformer with `heads` heads and blocks of `frames` latent frames of `tokens` tokens each, shared by the
    /// ranks of `team`.
    ///
    /// # Errors
    /// The link's rank is not in the team, or there are more ranks than heads or tokens.
    pub fn new(link: Arc<dyn Link>, team: Range<usize>, heads: usize, frames: usize, tokens: usize) -> Result<Share> {
        if !team.contains(&link.rank()) || team.len() > heads.min(tokens) {
            return Err(Error::Config(format!(
                "{heads} heads and {tokens} tokens a frame cannot be shared by {} ranks",
                team.len()
            )));
        }
        Ok(Share { link, team, heads, frames, tokens })
    }

    fn own_index(&self) -> usize {
        self.link.rank() - self.team.start
    }

    fn tokens_of(&self, member: usize) -> Range<usize> {
        part(self.tokens, self.team.len(), member)
    }

    fn heads_of(&self, member: usize) -> Range<usize> {
        part(self.heads, self.team.len(), member)
    }

    /// The tokens of a frame that are computed here.
    pub fn tokens(&self) -> Range<usize> {
        self.tokens_of(self.own_index())
    }

    /// The heads whose keys and values are here.
    pub fn heads(&self) -> Range<usize> {
        self.heads_of(self.own_index())
    }

    /// The rows of `[frames · tokens, width]` that belong here, frame by frame.
    pub fn own(&self, rows: &Tensor) -> Result<Tensor> {
        let (width, own) = (rows.dim(1)?, self.tokens());
        let rows = rows.reshape((self.frames, self.tokens, width))?.narrow(1, own.start, own.len())?;
        Ok(rows.contiguous()?.reshape((self.frames * own.len(), width))?)
    }

    /// Everybody's own rows, put together in the order of the whole block.
    pub fn all(&self, own: Tensor) -> Result<Tensor> {
        let width = own.dim(1)?;
        let parts = self.link.exchange(self.team.clone(), vec![vec![own.contiguous()?]; self.team.len()])?;
        let part = |(member, parcel): (usize, Vec<Tensor>)| -> Result<Tensor> {
            Ok(only(parcel)?.reshape((self.frames, self.tokens_of(member).len(), width))?)
        };
        let parts = parts.into_iter().enumerate().map(part).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&parts, 1)?.reshape((self.frames * self.tokens, width))?)
    }

    /// The columns of the heads that are here.
    pub fn columns(&self, x: &Tensor, head: usize) -> Result<Tensor> {
        columns(x, scaled(self.heads(), head))
    }

    /// Own tokens with all heads → all tokens with own heads. Rows then stand by rank, and by frame within a rank.
    pub fn scatter(&self, own: [Tensor; 3], head: usize) -> Result<[Tensor; 3]> {
        let parcel = |member: usize| -> Result<Vec<Tensor>> {
            own.iter().map(|x| columns(x, scaled(self.heads_of(member), head))).collect()
        };
        let parcels = (0..self.team.len()).map(parcel).collect::<Result<Vec<_>>>()?;
        let got = self.link.exchange(self.team.clone(), parcels)?;
        let stack = |i: usize| -> Result<Tensor> {
            let parts = got.iter().map(|p| p.get(i).cloned().ok_or_else(torn)).collect::<Result<Vec<_>>>()?;
            together(&parts, 0)
        };
        Ok([stack(0)?, stack(1)?, stack(2)?])
    }

    /// The way back: all tokens with own heads, in the order of [`Share::scatter`] → own tokens with all heads.
    pub fn gather(&self, y: &Tensor) -> Result<Tensor> {
        let mut from = 0;
        let mut parcels = Vec::with_capacity(self.team.len());
        for member in 0..self.team.len() {
            let rows = self.frames * self.tokens_of(member).len();
            parcels.push(vec![y.narrow(0, from, rows)?]);
            from += rows;
        }
        let got = self.link.exchange(self.team.clone(), parcels)?;
        together(&got.into_iter().map(only).collect::<Result<Vec<_>>>()?, 1)
    }
}

fn scaled(heads: Range<usize>, head: usize) -> Range<usize> {
    heads.start * head..heads.end * head
}

fn torn() -> Error {
    Error::Link("a parcel came with too few tensors".into())
}

fn only(mut parcel: Vec<Tensor>) -> Result<Tensor> {
    parcel.pop().ok_or_else(torn)
}

/// Some columns of `[rows, width]`, contiguous.
fn columns(x: &Tensor, which: Range<usize>) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return crate::model::kernels::cuda::columns(x, which);
    }
    Ok(x.narrow(1, which.start, which.len())?.contiguous()?)
}

/// Tensors of any element type side by side along `dim`.
fn together(parts: &[Tensor], dim: usize) -> Result<Tensor> {
    match parts {
        [one] => Ok(one.clone()),
        [first, ..] if !matches!(first.device(), Device::Cpu) => {
            let mut shape = first.dims().to_vec();
            shape[dim] = parts.iter().map(|p| p.dims()[dim]).sum();
            let all = Tensor::zeros(shape, first.dtype(), first.device())?;
            let mut at = 0;
            for part in parts {
                all.slice_set(part, dim, at)?;
                at += part.dims()[dim];
            }
            Ok(all)
        }
        _ => Ok(Tensor::cat(parts, dim)?),
    }
}
