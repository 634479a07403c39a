//! e4m3 quantisation as LiveAvatar's FP8 linears do it: one scale per tensor, both operands, activations at each call.
//!
//! Scale `min(448 / max(largest, 1e-12), 448)`; the cap leaves tensors with values below 1 unstretched. The product with
//! the scale is rounded to bf16 before it is rounded to e4m3.

use candle_core::{DType, Tensor};

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

/// Quantises a bf16 (or wider) tensor. Reads the largest value back from the device.
pub fn quantise(x: &Tensor) -> Result<Quantised> {
    let x = x.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
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
        Some(b) => y.broadcast_add(&b.to_dtype(DType::F32)?)?,
        None => y,
    };
    Ok(y.to_dtype(DType::BF16)?)
}
