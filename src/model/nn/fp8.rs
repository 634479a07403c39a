//! e4m3 quantisation as LiveAvatar's FP8 linears do it: one scale per tensor, both operands, activations at each call.
//!
//! Scale `min(448 / max(largest, 1e-12), 448)`; the cap leaves tensors with values below 1 unstretched. The product with
//! the scale is rounded to bf16 before it is rounded to e4m3. This half is the official arithmetic, to be compared with; it
//! runs on the CPU, because candle has no e4m3 conversion for cards.
//!
//! What this program itself computes in e4m3 has a scale per row of both operands instead, which costs nothing more and
//! loses less, or one from a bound that holds for every input, where there is one: the second half of this file.

use candle_core::{DType, Device, Tensor};

use super::norm::Affine;
use crate::model::Result;

/// e4m3's largest value.
pub(super) const LARGEST: f64 = 448.0;
/// What sums in f32, and the shorter ones of a card's e4m3 matrix units, may add to a bound.
pub(in crate::model) const MARGIN: f64 = 33.0 / 32.0;

/// A tensor on the e4m3 grid.
#[derive(Debug, Clone)]
pub struct Quantised {
    /// Element type F8E4M3.
    pub values: Tensor,
    /// Multiplies `values` to give back the original.
    pub factor: f32,
}

/// Quantises a bf16 (or wider) tensor; the values are on the CPU.
pub fn quantise(x: &Tensor) -> Result<Quantised> {
    let x = x.to_device(&Device::Cpu)?.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
    let largest = if x.elem_count() == 0 { 0.0 } else { f64::from(x.abs()?.max_all()?.to_scalar::<f32>()?) };
    let scale = (LARGEST / largest.max(1e-12)).min(LARGEST);
    let scaled = (x * scale)?.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
    let values = scaled.clamp(-LARGEST, LARGEST)?.to_dtype(DType::F8E4M3)?;
    Ok(Quantised { values, factor: (1.0 / scale) as f32 })
}

/// `x Wᵀ + b` of quantised operands, bf16 result: the plain twin of a device's scaled matmul.
pub fn linear(x: &Quantised, weight: &Quantised, bias: Option<&Tensor>) -> Result<Tensor> {
    let wide = |q: &Quantised| q.values.to_dtype(DType::F32);
    let y = (wide(x)?.matmul(&wide(weight)?.t()?)? * f64::from(x.factor * weight.factor))?;
    let y = match bias {
        Some(b) => y.broadcast_add(&b.to_device(&Device::Cpu)?.to_dtype(DType::F32)?)?,
        None => y,
    };
    Ok(y.to_dtype(DType::BF16)?)
}

/// What a stored unit of each row is worth when its largest value becomes the largest e4m3 value, f32 `[rows]`.
pub fn row_units(x: &Tensor) -> Result<Tensor> {
    let x = x.to_dtype(DType::F32)?;
    Ok((x.abs()?.max(1)?.clamp(1e-12, f32::MAX)? / LARGEST)?)
}

/// Rows in e4m3 (element type F8E4M3) with a unit each: the plain twin of a device's quantisation, on the CPU.
pub fn quantise_rows(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let x = x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    let units = row_units(&x)?;
    let scaled = x.broadcast_div(&units.unsqueeze(1)?)?.clamp(-LARGEST, LARGEST)?;
    Ok((scaled.to_dtype(DType::F8E4M3)?, units))
}

/// Rows in e4m3 with one unit for all, f32 `[1]`.
pub fn quantise_by(x: &Tensor, unit: &Tensor) -> Result<Tensor> {
    let scaled = x.to_dtype(DType::F32)?.broadcast_div(&unit.reshape((1, 1))?)?.clamp(-LARGEST, LARGEST)?;
    Ok(scaled.to_dtype(DType::F8E4M3)?)
}

/// The largest size that each result of `weight` `[out, d]` and `bias` `[out]` can have for a row that left `norm` and was
/// rounded to e4m3 with `unit`, f32 `[runs, out]`: the plain twin of a device's.
///
/// A row `z` that leaves a LayerNorm is no longer than √d, so by Cauchy and Schwarz `w · (z ∘ scale)` is at most
/// `√d ‖w ∘ scale‖`; the shift and the bias are known. Rounding moves a number by a sixteenth of it, or by half of the
/// smallest step, 2⁻¹⁰ units.
pub fn bounds(weight: &Tensor, bias: Option<&Tensor>, norm: &Affine, unit: &Tensor) -> Result<Tensor> {
    let (w, d) = (weight.to_dtype(DType::F32)?.t()?, weight.dim(1)? as f64);
    let of_rows = norm.scale.sqr()?.matmul(&w.sqr()?)?.affine(d, 0.0)?.sqrt()?;
    let known = norm.shift.matmul(&w)?;
    let known = match bias {
        Some(b) => known.broadcast_add(&b.to_dtype(DType::F32)?)?,
        None => known,
    };
    let steps = (norm.shift.abs()? / 16.0)?.broadcast_add(&(unit.reshape((1, 1))? / 1024.0)?)?;
    Ok(((of_rows * (17.0 / 16.0))? + known.abs()? + steps.matmul(&w.abs()?)?)?)
}

/// Numbers of e4m3 rows, f32, whose units are `[n]`, or `[1]` for all. By way of the CPU: for tests and for what is rare.
pub fn restore(stored: &Tensor, units: &Tensor) -> Result<Tensor> {
    let wide = stored.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_device(stored.device())?;
    Ok(wide.broadcast_mul(&units.to_dtype(DType::F32)?.unsqueeze(1)?)?)
}
