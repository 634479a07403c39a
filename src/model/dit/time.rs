//! Time: the sinusoid, its two layers, and the modulation that every block makes of it.

use candle_core::{DType, Tensor};

use super::Config;
use crate::model::{
    Result,
    nn::{Gated, Linear, Unit, norm::Affine},
    weights::Weights,
};

/// `time_embedding` and `time_projection`, in f32.
#[derive(Debug)]
pub struct TimeEmbedding {
    first: Linear,
    second: Linear,
    projection: Linear,
    freq: usize,
    dim: usize,
}

impl TimeEmbedding {
    /// Official key names.
    pub fn load(weights: &Weights, c: &Config) -> Result<Self> {
        let w = weights.with_dtype(DType::F32);
        Ok(Self {
            first: w.linear("time_embedding.0", c.freq_dim, c.dim, true)?,
            second: w.linear("time_embedding.2", c.dim, c.dim, true)?,
            projection: w.linear("time_projection.1", c.dim, 6 * c.dim, true)?,
            freq: c.freq_dim,
            dim: c.dim,
        })
    }

    /// Timesteps (0…1000) → `e` `[n, dim]` and `e0` `[n, 6, dim]`. The sinusoid is made in f64.
    pub fn forward(&self, timesteps: &[f32]) -> Result<(Tensor, Tensor)> {
        let half = self.freq / 2;
        let mut sinusoid = Vec::with_capacity(timesteps.len() * self.freq);
        for t in timesteps {
            let angle = |i: usize| *t as f64 * 10000f64.powf(-(i as f64) / half as f64);
            sinusoid.extend((0..half).map(|i| angle(i).cos() as f32));
            sinusoid.extend((0..half).map(|i| angle(i).sin() as f32));
        }
        let x = Tensor::from_vec(sinusoid, (timesteps.len(), self.freq), &self.first.device())?;
        let e = self.second.forward(&self.first.forward(&x)?.silu()?)?;
        let e0 = self.projection.forward(&e.silu()?)?.reshape((timesteps.len(), 6, self.dim))?;
        Ok((e, e0))
    }
}

/// Modulation of one block for each run of tokens, ready to use.
#[derive(Debug, Clone)]
pub struct BlockModulation {
    /// Before attention.
    pub attention: Affine,
    /// `[runs, dim]` on the attention's result.
    pub attention_gate: Tensor,
    /// Before the feed-forward layers.
    pub feed_forward: Affine,
    /// `[runs, dim]` on their result.
    pub feed_forward_gate: Tensor,
    /// Both gates in the matrices before them, where they have one run and the matrices can.
    pub gated: [Option<Gated>; 2],
    /// Of what lies between the feed-forward layers, where they are e4m3 and a bound is known.
    pub hidden: Option<Unit>,
}

impl BlockModulation {
    /// `own` `[6, dim]` of the block plus `e0` `[runs, 6, dim]`; rows shift, scale, gate, twice.
    pub fn new(own: &Tensor, e0: &Tensor) -> Result<Self> {
        let m = e0.broadcast_add(own)?;
        let row = |i: usize| -> Result<Tensor> { Ok(m.narrow(1, i, 1)?.squeeze(1)?.contiguous()?) };
        let affine = |i: usize| -> Result<Affine> { Ok(Affine::new((row(i + 1)? + 1.0)?, row(i)?)) };
        Ok(Self {
            attention: affine(0)?,
            attention_gate: row(2)?,
            feed_forward: affine(3)?,
            feed_forward_gate: row(5)?,
            gated: [None, None],
            hidden: None,
        })
    }
}

/// Everything that depends on the timestep alone, for a list of runs.
#[derive(Debug, Clone)]
pub struct Timing {
    /// One per block.
    pub blocks: Vec<BlockModulation>,
    /// Before the head.
    pub head: Affine,
    /// `[runs, 6, dim]`.
    pub e0: Tensor,
}
