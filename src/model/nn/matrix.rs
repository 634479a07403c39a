//! How the numbers of a matrix are kept in memory: plain, 8-bit floats with scales, or ggml blocks; with adapters beside
//! it where merging would round them away.
//!
//! Quantised numbers stay as they are stored and are widened for each use ([`Matrix::dense`]); a device that can
//! multiply them directly looks at [`Matrix::numbers`] first. Adapters on quantised numbers are a side path,
//! `x Wᵀ + (x Aᵀ) Bᵀ`: exact, and 5 % more work at rank 128 and width 5120, where requantising the sum would lose what
//! lies below the grid of `W`.

use std::sync::Arc;

use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QStorage, QTensor},
};

use float8::F8E4M3;

use crate::model::{Error, Result};

/// The stored numbers.
#[derive(Clone)]
pub enum Numbers {
    /// Any floating-point type, `[out, in]`.
    Dense(Tensor),
    /// e4m3 values `[out, in]` and what multiplies them: f32, `[1]` for all or `[out]`, one per row.
    Float8 { values: Tensor, scale: Tensor },
    /// The same on a card that does not multiply them directly, and for which candle has no e4m3 conversion: their bytes
    /// `[out, in]`, what each byte is worth `[256]` in f32, and the scale.
    Coded { codes: Tensor, worth: Tensor, scale: Tensor },
    /// ggml blocks (Q8_0, Q6_K, Q5_K, Q4_K…), `[out, in]`.
    Blocks(Arc<QTensor>),
}

/// A low-rank addition `up · down`.
#[derive(Clone, Debug)]
pub struct Side {
    /// `[rank, in]`.
    pub down: Tensor,
    /// `[out, rank]`, weight and alpha/rank included.
    pub up: Tensor,
}

/// A matrix `[out, in]` as it is kept.
#[derive(Clone)]
pub struct Matrix {
    numbers: Numbers,
    side: Vec<Side>,
    /// Element type of inputs and results.
    dtype: DType,
}

impl Matrix {
    /// Plain numbers; computes in their type.
    pub fn plain(weight: Tensor) -> Result<Self> {
        weight.dims2()?;
        Ok(Self { dtype: weight.dtype(), numbers: Numbers::Dense(weight), side: Vec::new() })
    }

    /// Numbers as stored, adapters beside them. Computes in `dtype`.
    pub fn new(numbers: Numbers, side: Vec<Side>, dtype: DType) -> Result<Self> {
        let made = Self { numbers, side, dtype };
        let (out, width) = made.dims();
        if let Numbers::Float8 { values, scale } = &made.numbers {
            if values.dtype() != DType::F8E4M3 || (scale.elem_count() != 1 && scale.dims() != [out]) {
                return Err(Error::Weights(format!(
                    "8-bit floats {:?} of {:?} cannot have scales {:?}",
                    values.dims(),
                    values.dtype(),
                    scale.dims()
                )));
            }
        }
        let fits = |s: &Side| s.down.dims().last() == Some(&width) && s.up.dims().first() == Some(&out);
        if made.side.iter().all(fits) { Ok(made) } else { Err(Error::Weights("an adapter does not fit".into())) }
    }

    /// How it is kept.
    pub fn numbers(&self) -> &Numbers {
        &self.numbers
    }

    /// Adapters beside quantised numbers; empty for plain ones, which have them merged.
    pub fn side(&self) -> &[Side] {
        &self.side
    }

    /// Element type of inputs and results.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The tensor, where the numbers are plain.
    pub fn as_plain(&self) -> Option<&Tensor> {
        match &self.numbers {
            Numbers::Dense(t) => Some(t),
            _ => None,
        }
    }

    /// Rows and columns.
    pub fn dims(&self) -> (usize, usize) {
        let dims = match &self.numbers {
            Numbers::Dense(t) | Numbers::Float8 { values: t, .. } | Numbers::Coded { codes: t, .. } => t.dims(),
            Numbers::Blocks(q) => q.shape().dims(),
        };
        (dims[0], dims[1])
    }

    /// Where the numbers are.
    pub fn device(&self) -> Device {
        match &self.numbers {
            Numbers::Dense(t) | Numbers::Float8 { values: t, .. } | Numbers::Coded { codes: t, .. } => {
                t.device().clone()
            }
            Numbers::Blocks(q) => q.device(),
        }
    }

    /// Bytes held, adapters included.
    pub fn bytes(&self) -> usize {
        let size = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        let own = match &self.numbers {
            Numbers::Dense(t) => size(t),
            Numbers::Float8 { values, scale } => size(values) + size(scale),
            Numbers::Coded { codes, worth, scale } => size(codes) + size(worth) + size(scale),
            Numbers::Blocks(q) => q.storage_size_in_bytes(),
        };
        own + self.side.iter().map(|s| size(&s.down) + size(&s.up)).sum::<usize>()
    }

    /// What it is kept as, in a word.
    pub fn kind(&self) -> String {
        match &self.numbers {
            Numbers::Dense(t) => format!("{:?}", t.dtype()),
            Numbers::Float8 { .. } | Numbers::Coded { .. } => "e4m3".into(),
            Numbers::Blocks(q) => format!("{:?}", q.dtype()),
        }
    }

    /// The numbers widened to [`Matrix::dtype`], without adapters; a view where they are plain.
    pub fn dense(&self) -> Result<Tensor> {
        Ok(match &self.numbers {
            Numbers::Dense(t) => t.clone(),
            Numbers::Float8 { values, scale } => {
                let scale = scale.reshape(((), 1))?;
                values.to_dtype(DType::F32)?.broadcast_mul(&scale)?.to_dtype(self.dtype)?
            }
            Numbers::Coded { codes, worth, scale } => {
                let wide = worth.index_select(&codes.flatten_all()?, 0)?.reshape(codes.shape())?;
                wide.broadcast_mul(&scale.reshape(((), 1))?)?.to_dtype(self.dtype)?
            }
            Numbers::Blocks(q) => q.dequantize(&q.device())?.to_dtype(self.dtype)?,
        })
    }

    /// `x` `[n, in]`, already in [`Matrix::dtype`] → `[n, out]`.
    pub fn multiply(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.dense()?.t()?)?;
        self.aside(x, y)
    }

    /// `y` plus what the adapters make of `x`.
    pub fn aside(&self, x: &Tensor, y: Tensor) -> Result<Tensor> {
        self.side.iter().try_fold(y, |y, s| Ok((y + x.matmul(&s.down.t()?)?.matmul(&s.up.t()?)?)?))
    }

    /// Whether `device` multiplies these e4m3 numbers as they are: a scale per row, sizes of 16, no adapter beside them,
    /// and a card that can.
    pub(super) fn direct(&self, device: &Device) -> bool {
        let Numbers::Float8 { scale, .. } = &self.numbers else { return false };
        let (out, width) = self.dims();
        device.is_cuda()
            && scale.dims() == [out]
            && out % 16 == 0
            && width % 16 == 0
            && self.side.is_empty()
            && crate::model::kernels::fp8(device)
    }

    /// The same on another device, in the same format; there adapters and plain numbers have element type `dtype`.
    pub fn moved(&self, device: &Device, dtype: DType) -> Result<Self> {
        let float = |t: &Tensor| -> Result<Tensor> {
            // Convert on the CPU only when that makes the transfer smaller.
            let smaller = t.dtype().size_in_bytes() > dtype.size_in_bytes();
            let t = if smaller { t.to_dtype(dtype)? } else { t.clone() };
            Ok(t.to_device(device)?.to_dtype(dtype)?)
        };
        let numbers = match &self.numbers {
            Numbers::Dense(t) => Numbers::Dense(float(t)?),
            Numbers::Float8 { values, scale } if device.is_cuda() && !self.direct(device) => {
                coded(values, scale, device)?
            }
            Numbers::Float8 { values, scale } => {
                Numbers::Float8 { values: values.to_device(device)?, scale: scale.to_device(device)? }
            }
            Numbers::Coded { codes, worth, scale } => Numbers::Coded {
                codes: codes.to_device(device)?,
                worth: worth.to_device(device)?,
                scale: scale.to_device(device)?,
            },
            Numbers::Blocks(q) if q.device().same_device(device) => Numbers::Blocks(q.clone()),
            Numbers::Blocks(q) => {
                let storage = QStorage::from_data(q.data()?, device, q.dtype())?;
                Numbers::Blocks(Arc::new(QTensor::new(storage, q.shape().clone())?))
            }
        };
        let side: Result<Vec<Side>> =
            self.side.iter().map(|s| Ok(Side { down: float(&s.down)?, up: float(&s.up)? })).collect();
        Self::new(numbers, side?, dtype)
    }
}

/// e4m3 values as bytes on `device`, which need not know the type.
fn coded(values: &Tensor, scale: &Tensor, device: &Device) -> Result<Numbers> {
    let bytes: Vec<F8E4M3> = values.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
    let bytes: Vec<u8> = bytes.into_iter().map(|v| v.to_bits()).collect();
    // Two bytes are not numbers, and the last one candle's lookup takes for zero; weights have neither.
    let worth: Vec<f32> = (0..=255).map(|b| F8E4M3::from_bits(b).to_f32()).collect();
    Ok(Numbers::Coded {
        codes: Tensor::from_vec(bytes, values.shape(), &Device::Cpu)?.to_device(device)?,
        worth: Tensor::from_vec(worth, 256, &Device::Cpu)?.to_device(device)?,
        scale: scale.to_device(device)?,
    })
}

/// Whether a ggml type is a quantised one.
pub fn quantised(kind: GgmlDType) -> bool {
    !matches!(kind, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_worth_what_the_floats_were() {
        let wave: Vec<f32> = (0..32 * 48).map(|i| (i as f32 * 0.37).sin() * 500.0).collect();
        let values = Tensor::from_vec(wave, (32, 48), &Device::Cpu).unwrap().clamp(-448.0, 448.0).unwrap();
        let values = values.to_dtype(DType::F8E4M3).unwrap();
        let rows = Tensor::from_vec((1..=32).map(|i| i as f32 * 0.013).collect(), 32, &Device::Cpu).unwrap();
        for scale in [Tensor::new(&[0.37f32], &Device::Cpu).unwrap(), rows] {
            let coded = coded(&values, &scale, &Device::Cpu).unwrap();
            let float = Numbers::Float8 { values: values.clone(), scale };
            let dense = |numbers| {
                let wide = Matrix::new(numbers, Vec::new(), DType::BF16).unwrap().dense().unwrap();
                wide.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap()
            };
            assert_eq!(dense(coded), dense(float));
        }
    }
}
