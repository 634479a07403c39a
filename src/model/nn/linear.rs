//! `x Wᵀ + b`.

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor};

use super::Matrix;
use crate::model::{
    Error, Result,
    kernels::{Isa, Packed, dit_linear},
};

/// A matrix `[out, in]` with an optional bias. The one place where a GEMM is chosen.
#[derive(Clone)]
pub struct Linear {
    matrix: Matrix,
    bias: Option<Tensor>,
    /// The same for the CPU's f32 kernel, packed when first used.
    packed: OnceLock<Arc<Packed>>,
    /// The instructions that kernel uses.
    isa: Isa,
}

impl std::fmt::Debug for Linear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Linear({} → {}, {})", self.width(), self.out(), self.matrix.kind())
    }
}

/// What is applied to the result while it is still near.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    None,
    /// GELU, tanh approximation.
    GeluTanh,
}

impl Linear {
    /// `weight` `[out, in]`, `bias` `[out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        Self::of(Matrix::plain(weight)?, bias)
    }

    /// The same with numbers kept in any form.
    pub fn of(matrix: Matrix, bias: Option<Tensor>) -> Result<Self> {
        let out = matrix.dims().0;
        if let Some(b) = &bias
            && b.dims() != [out]
        {
            return Err(Error::Weights(format!("a matrix with {out} rows has a bias of shape {:?}", b.dims())));
        }
        Ok(Self { matrix, bias, packed: OnceLock::new(), isa: Isa::best() })
    }

    /// Computes with other instructions than the most exact ones where it runs on the CPU.
    pub fn with_isa(mut self, isa: Isa) -> Self {
        self.isa = isa;
        self
    }

    /// Several matrices over the same input as one, results side by side; none if one of them is quantised, or a
    /// stand-in without memory of its own.
    pub fn stacked(parts: &[&Linear]) -> Result<Option<Self>> {
        let plain = parts.iter().map(|l| l.matrix.as_plain().filter(|t| t.is_contiguous()));
        let Some(plain) = plain.collect::<Option<Vec<_>>>() else { return Ok(None) };
        let weight = Tensor::cat(&plain, 0)?;
        let zero = |l: &Linear| Tensor::zeros(l.out(), weight.dtype(), weight.device());
        let bias = if parts.iter().any(|l| l.bias.is_some()) {
            let all: candle_core::Result<Vec<Tensor>> =
                parts.iter().map(|l| l.bias.clone().map_or_else(|| zero(l), Ok)).collect();
            Some(Tensor::cat(&all?, 0)?)
        } else {
            None
        };
        let isa = parts.first().map_or_else(Isa::best, |l| l.isa);
        Ok(Some(Self::new(weight, bias)?.with_isa(isa)))
    }

    /// Rows of the matrix.
    pub fn out(&self) -> usize {
        self.matrix.dims().0
    }

    /// Columns of the matrix.
    pub fn width(&self) -> usize {
        self.matrix.dims().1
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.matrix.device()
    }

    /// How the numbers are kept.
    pub fn matrix(&self) -> &Matrix {
        &self.matrix
    }

    /// `[n, in]` → `[n, out]`, in the element type of the weights.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_with(x, Activation::None)
    }

    /// The same with an activation.
    pub fn forward_with(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let x = x.to_dtype(self.matrix.dtype())?;
        if let Some(weight) = self.matrix.as_plain()
            && matches!(x.device(), Device::Cpu)
            && x.dtype() == DType::F32
            && weight.is_contiguous()
        {
            return Ok(dit_linear::linear(&x.contiguous()?, self.packed(weight)?, activation)?);
        }
        let y = self.matrix.multiply(&x)?;
        let y = match &self.bias {
            Some(b) => y.broadcast_add(b)?,
            None => y,
        };
        Ok(match activation {
            Activation::None => y,
            Activation::GeluTanh => y.gelu()?,
        })
    }

    fn packed(&self, weight: &Tensor) -> Result<Arc<Packed>> {
        if let Some(packed) = self.packed.get() {
            return Ok(packed.clone());
        }
        let (out, width) = weight.dims2()?;
        let weight = weight.flatten_all()?.to_vec1::<f32>()?;
        let bias = self.bias.as_ref().map(|b| b.to_vec1::<f32>()).transpose()?;
        let packed = Packed::new(self.isa, out, 1, width, bias.as_deref(), |o, _, i| weight[o * width + i]);
        Ok(self.packed.get_or_init(|| Arc::new(packed)).clone())
    }
}
