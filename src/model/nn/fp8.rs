//! e4m3 quantisation as LiveAvatar's FP8 linears do it: one scale per tensor, both operands, activations at each call.
//!
//! Scale `min(448 / max(largest, 1e-12), 448)`; the cap leaves tensors with values below 1 unstretched. The product with
//! the scale is rounded to bf16 before it is rounded to e4m3. This half is the official arithmetic, to be compared with; it
//! runs on the CPU, because candle has no e4m3 conversion for cards.
//!
//! What this program itself computes in e4m3 has a scale per row of both operands instead, which costs nothing more and
//! loses less: the second half of this file.

use candle_core::{DType, Device, Tensor};

use crate::model::Result;

const LARGEST: f64 = 448.0;

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

/// Numbers of e4m3 rows, f32. By way of the CPU: for tests and for what is rare.
pub fn restore(stored: &Tensor, units: &Tensor) -> Result<Tensor> {
    let wide = stored.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_device(stored.device())?;
    Ok(wide.broadcast_mul(&units.to_dtype(DType::F32)?.unsqueeze(1)?)?)
}
