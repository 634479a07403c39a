//! Norms with what surrounds them: modulation, rotation, gated sums. f32 on the CPU goes through fused kernels; anything
//! else through the plain forms at the end of this file, which are also the kernels' twins in tests.

use candle_core::{D, DType, Device, Tensor};

use super::{Rope, Unit};
use crate::model::{Error, Result, kernels::dit_rows};

/// One scale and shift per run of rows: run `s` covers `rows[s]` rows and uses row `s` of both tensors.
#[derive(Debug, Clone)]
pub struct Affine {
    /// `[runs, channels]`, multiplies.
    pub scale: Tensor,
    /// `[runs, channels]`, added.
    pub shift: Tensor,
    /// What a stored unit is worth where results are e4m3; none = each row gets its own.
    pub unit: Option<Unit>,
}

impl Affine {
    /// Scale and shift, `[runs, channels]` each.
    pub fn new(scale: Tensor, shift: Tensor) -> Self {
        Self { scale, shift, unit: None }
    }

    /// The same with a unit for its results. A row that leaves a LayerNorm is no longer than √channels, so no number is
    /// larger, whatever came in.
    pub fn bounded(self) -> Result<Self> {
        let most = ((self.scale.abs()? * (self.scale.dim(1)? as f64).sqrt())? + self.shift.abs()?)?;
        Ok(Self { unit: Some(Unit::of(&most)?), ..self })
    }

    /// The same on another device.
    pub fn moved(&self, device: &Device) -> Result<Self> {
        let unit = self.unit.as_ref().map(|u| u.moved(device)).transpose()?;
        Ok(Self { scale: self.scale.to_device(device)?, shift: self.shift.to_device(device)?, unit })
    }
}

fn fused(x: &Tensor) -> bool {
    matches!(x.device(), Device::Cpu) && x.dtype() == DType::F32
}

/// Rows may stand apart (part of a wider matrix); anything else is copied.
fn rows_apart(x: &Tensor) -> Result<Tensor> {
    let fits = x.rank() == 2 && x.stride()[1] == 1 && x.stride()[0] >= x.dim(1)?;
    Ok(if fits { x.clone() } else { x.contiguous()? })
}

pub(super) fn runs_cover(x: &Tensor, runs: &[usize], values: &Tensor) -> Result<()> {
    let rows = x.dim(0)?;
    if runs.iter().sum::<usize>() != rows || values.dims() != [runs.len(), x.dim(1)?] {
        return Err(Error::Input(format!(
            "runs {runs:?} with values {:?} do not cover {rows} rows of {} channels",
            values.dims(),
            x.dim(1)?
        )));
    }
    Ok(())
}

/// LayerNorm over channels (population variance), then `· scale + shift` of the row's run.
pub fn layer_norm(x: &Tensor, affine: &Affine, runs: &[usize], eps: f64) -> Result<Tensor> {
    runs_cover(x, runs, &affine.scale)?;
    runs_cover(x, runs, &affine.shift)?;
    if fused(x) {
        return Ok(dit_rows::layer_norm(&x.contiguous()?, &affine.scale, &affine.shift, runs, eps)?);
    }
    #[cfg(feature = "cuda")]
    if card::takes(x, runs.len()) {
        return card::layer_norm(x, affine, runs, eps);
    }
    plain::layer_norm(x, affine, runs, eps)
}

/// `x + y · gate` of the row's run; the result has the element type of `x`.
pub fn gated_add(x: &Tensor, y: &Tensor, gate: &Tensor, runs: &[usize]) -> Result<Tensor> {
    runs_cover(x, runs, gate)?;
    if fused(x) && fused(y) {
        return Ok(dit_rows::gated_add(&x.contiguous()?, &y.contiguous()?, gate, runs)?);
    }
    plain::gated_add(x, y, gate, runs)
}

/// RMS norm over all channels times `weight`, f32 statistics.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if fused(x) && fused(weight) {
        return Ok(dit_rows::rms_norm(&rows_apart(x)?, weight, eps)?);
    }
    #[cfg(feature = "cuda")]
    if card::takes(x, 1) && x.dtype() == DType::BF16 && weight.dtype() == DType::BF16 {
        return card::norm_rotate(x, Some(weight), None, eps);
    }
    plain::rms_norm(x, weight, eps)
}

/// RMS norm, then the rotation of each token.
pub fn rms_norm_rotate(x: &Tensor, weight: &Tensor, eps: f64, rope: &Rope) -> Result<Tensor> {
    rope_fits(x, rope)?;
    if fused(x) && fused(weight) && fused(rope.table()) {
        return Ok(dit_rows::rms_norm_rotate(&rows_apart(x)?, weight, rope.table(), eps)?);
    }
    #[cfg(feature = "cuda")]
    if card::takes(x, 1) && x.dtype() == DType::BF16 && weight.dtype() == DType::BF16 && rope.head() % 8 == 0 {
        return card::norm_rotate(x, Some(weight), Some(rope), eps);
    }
    plain::rotate(&plain::rms_norm(x, weight, eps)?, rope)
}

/// The rotation alone.
pub fn rotate(x: &Tensor, rope: &Rope) -> Result<Tensor> {
    rope_fits(x, rope)?;
    if fused(x) && fused(rope.table()) {
        return Ok(dit_rows::rotate(&x.contiguous()?, rope.table())?);
    }
    #[cfg(feature = "cuda")]
    if card::takes(x, 1) && x.dtype() == DType::BF16 && rope.head() % 8 == 0 {
        return card::norm_rotate(x, None, Some(rope), 0.0);
    }
    plain::rotate(x, rope)
}

fn rope_fits(x: &Tensor, rope: &Rope) -> Result<()> {
    let (tokens, dim) = x.dims2()?;
    if tokens != rope.tokens() || dim % rope.head() != 0 {
        return Err(Error::Input(format!(
            "rotations for {} tokens with heads of {} cannot turn [{tokens}, {dim}]",
            rope.tokens(),
            rope.head()
        )));
    }
    Ok(())
}

/// The same on an NVIDIA card.
#[cfg(feature = "cuda")]
mod card {
    use super::*;
    use crate::model::kernels::cuda::{empty, rows};

    pub(super) fn takes(x: &Tensor, runs: usize) -> bool {
        let types = matches!(x.dtype(), DType::F32 | DType::BF16);
        matches!(x.device(), Device::Cuda(_)) && x.rank() == 2 && types && rows::fits(x.dims()[1], runs)
    }

    pub(super) fn layer_norm(x: &Tensor, affine: &Affine, runs: &[usize], eps: f64) -> Result<Tensor> {
        let (scale, shift) = (&affine.scale.contiguous()?, &affine.shift.contiguous()?);
        let norm = rows::Norm { scale, shift, runs, eps, out: DType::F32, unit: None };
        let y = rows::residual_norm(&x.contiguous()?, None, Some(&norm))?;
        Ok(y.ok_or_else(|| Error::Input("a norm gave nothing".into()))?.0)
    }

    pub(super) fn norm_rotate(x: &Tensor, weight: Option<&Tensor>, rope: Option<&Rope>, eps: f64) -> Result<Tensor> {
        let (input, out) = (&rows_apart(x)?, empty(x.device(), x.shape(), DType::BF16)?);
        let lane = rows::Lane { input, weight, rotate: rope.is_some(), out: &out, unit: None, slot: false };
        rows::norm_rotate(&[lane], rope.map(Rope::table), None, eps)?;
        Ok(out)
    }
}

/// The same in plain tensor operations: any device, any element type; f64 stays f64, anything else is computed in f32.
pub mod plain {
    use super::*;

    fn wide(x: &Tensor) -> Result<Tensor> {
        Ok(if x.dtype() == DType::F64 { x.clone() } else { x.to_dtype(DType::F32)? })
    }

    fn spread(values: &Tensor, runs: &[usize]) -> Result<Tensor> {
        let c = values.dim(1)?;
        let parts: candle_core::Result<Vec<Tensor>> = runs
            .iter()
            .enumerate()
            .filter(|(_, n)| **n > 0)
            .map(|(s, n)| values.narrow(0, s, 1)?.broadcast_as((*n, c)))
            .collect();
        wide(&Tensor::cat(&parts?, 0)?)
    }

    /// See [`super::layer_norm`].
    pub fn layer_norm(x: &Tensor, affine: &Affine, runs: &[usize], eps: f64) -> Result<Tensor> {
        let x = wide(x)?;
        let x = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let x = x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?)?;
        Ok(((x * spread(&affine.scale, runs)?)? + spread(&affine.shift, runs)?)?)
    }

    /// See [`super::gated_add`].
    pub fn gated_add(x: &Tensor, y: &Tensor, gate: &Tensor, runs: &[usize]) -> Result<Tensor> {
        let sum = (wide(x)? + (wide(y)? * spread(gate, runs)?)?)?;
        Ok(sum.to_dtype(x.dtype())?)
    }

    /// See [`super::rms_norm`]: statistics in f32, the result rounded to the input's type before the weight.
    pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        let y = wide(x)?;
        let y = y.broadcast_div(&(y.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?)?.to_dtype(x.dtype())?;
        Ok(y.broadcast_mul(&weight.to_dtype(x.dtype())?)?)
    }

    /// See [`super::rotate`].
    pub fn rotate(x: &Tensor, rope: &Rope) -> Result<Tensor> {
        let (tokens, dim) = x.dims2()?;
        let pairs = rope.head() / 2;
        let y = wide(x)?.reshape((tokens, dim / rope.head(), pairs, 2))?;
        let (a, b) = (y.narrow(3, 0, 1)?.squeeze(3)?, y.narrow(3, 1, 1)?.squeeze(3)?);
        let (c, s) = (rope.cos()?.unsqueeze(1)?, rope.sin()?.unsqueeze(1)?);
        let re = (a.broadcast_mul(&c)? - b.broadcast_mul(&s)?)?;
        let im = (a.broadcast_mul(&s)? + b.broadcast_mul(&c)?)?;
        Ok(Tensor::stack(&[re, im], 3)?.reshape((tokens, dim))?.to_dtype(x.dtype())?)
    }
}
