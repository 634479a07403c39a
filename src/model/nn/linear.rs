//! `x Wᵀ + b`.

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor};

use super::{Form, Matrix, Rows, Unit, fp8, norm::Affine};
use crate::model::{
    Error, Result,
    kernels::{Isa, Packed, dit_linear},
};

/// A matrix `[out, in]` with an optional bias. The one place where a GEMM is chosen.
#[derive(Clone)]
pub struct Linear {
    matrix: Matrix,
    bias: Option<Tensor>,
    /// Whether e4m3 rows have one unit for all, so that the first of their scales is the matrix's.
    even: bool,
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

/// What the rows of a matrix are worth, and its bias, with a factor for each result in them: a gate that costs nothing.
#[derive(Debug, Clone)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub struct Gated {
    /// `[out]`, f32.
    scale: Tensor,
    bias: Option<Tensor>,
}

/// Most that the largest values of a matrix's rows may lie apart for one unit to lose nothing: a row whose largest value is
/// 448 / 64 = 7 units still has 448 between it and the smallest number with all its bits (2⁻⁶), and what lies below that is
/// off by 2⁻¹⁰ units at most, 1/7000 of the row's largest value, where rounding that value itself costs a sixteenth.
#[cfg(feature = "cuda")]
const APART: f32 = 64.0;

/// Runs of one norm for whose results a bound is worth its making: a timestep for each token is more.
const FEW_RUNS: usize = 8;

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
        Ok(Self { matrix, bias, even: false, packed: OnceLock::new(), isa: Isa::best() })
    }

    /// Computes with other instructions than the most exact ones where it runs on the CPU.
    pub fn with_isa(mut self, isa: Isa) -> Self {
        self.isa = isa;
        self
    }

    /// The same matrix in e4m3 with a scale per row, where the card computes so and the sizes allow it; otherwise as it
    /// was. Halves the memory of a bf16 matrix.
    pub fn scaled(self) -> Result<Self> {
        self.in_e4m3(false)
    }

    /// The same with one unit for the whole matrix where its rows are alike enough for that, as a product of rows with one
    /// unit wants it ([`Rows::Bound`]). Numbers that come in e4m3 keep the scales that they have.
    pub fn evenly_scaled(self) -> Result<Self> {
        self.in_e4m3(true)
    }

    fn in_e4m3(self, evenly: bool) -> Result<Self> {
        #[cfg(feature = "cuda")]
        {
            use super::Numbers;
            use crate::model::kernels::cuda;
            let (out, width) = (self.out(), self.width());
            let plain = self.matrix.as_plain().filter(|w| w.dtype() == DType::BF16 && w.is_contiguous());
            let fits = out % 16 == 0 && width % 16 == 0 && cuda::rows::fits(width, 1);
            if let (Device::Cuda(_), Some(weight), true) = (self.device(), plain, fits)
                && cuda::context(weight.device())?.fp8()
            {
                let (mut values, mut scale) = cuda::rows::quantise(weight, false)?;
                let most = scale.max(0)?;
                let even = evenly && most.to_scalar::<f32>()? <= APART * scale.min(0)?.to_scalar::<f32>()?;
                if even {
                    // From the numbers themselves, not from those that were rounded already.
                    values = cuda::rows::quantise_by(weight, false, &most.reshape(1)?)?;
                    scale = most.broadcast_as(out)?.contiguous()?;
                }
                let matrix = Matrix::new(Numbers::Float8 { values, scale }, Vec::new(), DType::BF16)?;
                return Ok(Self { matrix, even, ..self });
            }
        }
        let _ = evenly;
        Ok(self)
    }

    /// Whether it is in e4m3 with one unit: what leaves a norm for it may have one too ([`Affine::bounded`]).
    pub fn even(&self) -> bool {
        self.even && self.direct().is_some()
    }

    /// A unit for its results, which holds for every row that leaves `norm` with a unit, also after GELU, which makes no
    /// number larger. None for a norm without, or of many runs.
    pub fn unit_after(&self, norm: &Affine) -> Result<Option<Unit>> {
        let Some(unit) = norm.unit.as_ref().filter(|_| norm.scale.dims()[0] <= FEW_RUNS) else { return Ok(None) };
        Unit::of(&self.bounds(norm, unit)?).map(Some)
    }

    /// The largest size of each result, f32 `[runs, out]`: see [`fp8::bounds`].
    pub(in crate::model) fn bounds(&self, norm: &Affine, unit: &Unit) -> Result<Tensor> {
        let bias = self.bias.as_ref();
        #[cfg(feature = "cuda")]
        if let Some(numbers) = self.direct() {
            use crate::model::kernels::cuda::rows;
            return rows::bounds(numbers, bias, &norm.scale, &norm.shift, unit.value());
        }
        fp8::bounds(&self.matrix.dense()?, bias, norm, unit.value())
    }

    /// How the matrix wants its input.
    pub fn form(&self) -> Form {
        if self.direct().is_some() { Form::Scaled } else { Form::Plain(self.matrix.dtype()) }
    }

    /// e4m3 values and row scales that the card multiplies as they are.
    fn direct(&self) -> Option<(&Tensor, &Tensor)> {
        #[cfg(feature = "cuda")]
        if let super::Numbers::Float8 { values, scale } = self.matrix.numbers()
            && self.matrix.direct(values.device())
        {
            return Some((values, scale));
        }
        None
    }

    /// Several matrices over the same input as one, results side by side; none if they are kept in different ways, or
    /// one is a stand-in without memory of its own.
    pub fn stacked(parts: &[&Linear]) -> Result<Option<Self>> {
        if let Some(scaled) = parts.iter().map(|l| l.direct()).collect::<Option<Vec<_>>>() {
            let (values, scales): (Vec<_>, Vec<_>) = scaled.into_iter().unzip();
            let numbers = super::Numbers::Float8 { values: Tensor::cat(&values, 0)?, scale: Tensor::cat(&scales, 0)? };
            let matrix = Matrix::new(numbers, Vec::new(), DType::BF16)?;
            return Self::of(matrix, Self::biases(parts, DType::BF16)?).map(Some);
        }
        let plain = parts.iter().map(|l| l.matrix.as_plain().filter(|t| t.is_contiguous()));
        let Some(plain) = plain.collect::<Option<Vec<_>>>() else { return Ok(None) };
        let weight = Tensor::cat(&plain, 0)?;
        let bias = Self::biases(parts, weight.dtype())?;
        let isa = parts.first().map_or_else(Isa::best, |l| l.isa);
        Ok(Some(Self::new(weight, bias)?.with_isa(isa)))
    }

    fn biases(parts: &[&Linear], dtype: DType) -> Result<Option<Tensor>> {
        if parts.iter().all(|l| l.bias.is_none()) {
            return Ok(None);
        }
        let zero = |l: &Linear| Tensor::zeros(l.out(), dtype, &l.device());
        let all: candle_core::Result<Vec<Tensor>> =
            parts.iter().map(|l| l.bias.clone().map_or_else(|| zero(l), Ok)).collect();
        Ok(Some(Tensor::cat(&all?, 0)?))
    }

    /// Rows of the matrix.
    pub fn out(&self) -> usize {
        self.matrix.dims().0
    }

    /// Columns of the matrix.
    pub fn width(&self) -> usize {
        self.matrix.dims().1
    }

    /// What is added to the product, `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.matrix.device()
    }

    /// The same on another device.
    pub fn moved(&self, device: &Device) -> Result<Self> {
        let bias = self.bias.as_ref().map(|b| b.to_device(device)).transpose()?;
        let packed = if device.is_cpu() && self.device().is_cpu() { self.packed.clone() } else { OnceLock::new() };
        Ok(Self { matrix: self.matrix.moved(device, self.matrix.dtype())?, bias, packed, ..*self })
    }

    /// How the numbers are kept.
    pub fn matrix(&self) -> &Matrix {
        &self.matrix
    }

    /// `[n, in]` → `[n, out]`, in the element type of the weights.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_with(x, Activation::None)
    }

    /// What the matrix makes of each of `x` `[n, in]`, without the bias, as a column: `W xᵀ`, `[out, n]`.
    pub fn columns(&self, x: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() && x.dim(0)? % 16 == 0 {
            use crate::model::kernels::cuda::gemm::{Product, product};
            // The product's operands change places, and no pass over memory turns the result.
            if let Some((weight, own)) = self.direct()
                && let Rows::Scaled { stored, units } = &scaled(x, false)?
            {
                return product(&Product {
                    x: weight,
                    weight: stored,
                    scales: Some((own, units)),
                    bias: None,
                    gelu: false,
                });
            }
            let plain = self.matrix.as_plain().filter(|w| w.dtype() == DType::BF16 && w.is_contiguous());
            if let (Some(weight), 0) = (plain, self.width() % 8) {
                let x = &x.to_dtype(DType::BF16)?.contiguous()?;
                return product(&Product { x: weight, weight: x, scales: None, bias: None, gelu: false });
            }
        }
        let bare = Self { bias: None, packed: OnceLock::new(), ..self.clone() };
        Ok(bare.forward(x)?.t()?.contiguous()?)
    }

    /// The same with an activation.
    pub fn forward_with(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        if self.direct().is_some() {
            return self.forward_rows(&scaled(x, false)?, activation);
        }
        let x = x.to_dtype(self.matrix.dtype())?;
        if let Some(weight) = self.matrix.as_plain()
            && matches!(x.device(), Device::Cpu)
            && x.dtype() == DType::F32
            && weight.is_contiguous()
        {
            return Ok(dit_linear::linear(&x.contiguous()?, self.packed(weight)?, activation)?);
        }
        #[cfg(feature = "cuda")]
        if matches!(x.device(), Device::Cuda(_)) && x.dtype() == DType::BF16 && self.matrix.side().is_empty() {
            use crate::model::kernels::cuda::gemm::{Product, product};
            let gelu = activation == Activation::GeluTanh;
            let (x, weight, bias) = (&x.contiguous()?, &self.matrix.dense()?.contiguous()?, self.bias.as_ref());
            // Rows of odd lengths are not aligned as the library wants them; candle's product takes those.
            if self.width() % 8 == 0 && self.out() % 8 == 0 {
                return product(&Product { x, weight, scales: None, bias, gelu });
            }
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

    /// The same for rows that are already as the matrix wants them ([`Linear::form`]).
    pub fn forward_rows(&self, x: &Rows, activation: Activation) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let (Some((x, units)), Some((weight, own))) = (x.by_row()?, self.direct()) {
            use crate::model::kernels::cuda::gemm::{Product, product};
            let (gelu, bias) = (activation == Activation::GeluTanh, self.bias.as_ref());
            // By rows also where one unit is known: that kernel is 5 % faster once the card is at its power limit.
            return product(&Product { x, weight, scales: Some((&units, own)), bias, gelu });
        }
        self.forward_with(&x.plain()?, activation)
    }

    /// e4m3 values and their one unit, `[1]`.
    #[cfg(feature = "cuda")]
    fn whole(&self) -> Result<Option<(&Tensor, Tensor)>> {
        let Some((values, scale)) = self.direct().filter(|_| self.even) else { return Ok(None) };
        Ok(Some((values, scale.narrow(0, 0, 1)?)))
    }

    /// GELU of the result, in the form that a second matrix wants: between the feed-forward layers. `unit`: of results in
    /// e4m3 ([`Linear::unit_after`]); they leave the product so where the device can.
    pub fn forward_to_gelu(&self, x: &Rows, form: Form, unit: Option<&Unit>) -> Result<Rows> {
        match (form, unit) {
            (Form::Plain(_), _) => Ok(Rows::Plain(self.forward_rows(x, Activation::GeluTanh)?)),
            // The pass that quantises applies GELU on its way; in the product's epilogue it would only be extra work.
            (Form::Scaled, None) => scaled(&self.forward_rows(x, Activation::None)?, true),
            (Form::Scaled, Some(unit)) => {
                #[cfg(feature = "cuda")]
                if let (Rows::Bound { stored: x, unit: own }, Some((weight, whole))) = (x, self.whole()?) {
                    use crate::model::kernels::cuda::gemm::{Product, stored_product};
                    let scales = Some((own.value(), &whole));
                    let product = Product { x, weight, scales, bias: self.bias.as_ref(), gelu: true };
                    if let Some(stored) = stored_product(&product, unit.inverse())? {
                        return Ok(Rows::Bound { stored, unit: unit.clone() });
                    }
                }
                bound(&self.forward_rows(x, Activation::None)?, true, unit)
            }
        }
    }

    /// `gate` `[1, out]` as [`Linear::add_rows`] takes it; none where it is kept in a way that has no factors of its own.
    pub fn gated(&self, gate: &Tensor) -> Result<Option<Gated>> {
        let (Some((_, scale)), 1) = (self.direct(), gate.dim(0)?) else { return Ok(None) };
        let gate = gate.reshape(self.out())?;
        let bias = match &self.bias {
            Some(bias) => Some((bias.to_dtype(DType::F32)? * &gate)?.to_dtype(bias.dtype())?),
            None => None,
        };
        Ok(Some(Gated { scale: (scale * gate)?, bias }))
    }

    /// Adds the result for `x`, in the form the matrix wants, to `sum` `[n, out]`, **in place**: in the product itself, so
    /// that it is rounded once and passes the memory once. False, and nothing is done, where there is no such product.
    pub fn add_rows(&self, x: &Rows, gated: Option<&Gated>, sum: &Tensor) -> Result<bool> {
        #[cfg(feature = "cuda")]
        if sum.device().is_cuda() && sum.dtype() == DType::BF16 && sum.is_contiguous() {
            use crate::model::kernels::cuda::gemm::{Product, add_product};
            if let (Some((stored, units)), Some((weight, own))) = (x.by_row()?, self.direct()) {
                let (own, bias) = gated.map_or((own, self.bias.as_ref()), |g| (&g.scale, g.bias.as_ref()));
                let scales = Some((&units, own));
                return add_product(&Product { x: stored, weight, scales, bias, gelu: false }, sum);
            }
            let plain = self.matrix.as_plain().filter(|w| w.dtype() == DType::BF16 && w.is_contiguous());
            let even = self.width() % 8 == 0 && self.out() % 8 == 0;
            if let (Rows::Plain(x), Some(weight), None, true) = (x, plain, gated, even)
                && x.dtype() == DType::BF16
            {
                let (x, bias) = (&x.contiguous()?, self.bias.as_ref());
                return add_product(&Product { x, weight, scales: None, bias, gelu: false }, sum);
            }
        }
        let _ = (x, gated, sum);
        Ok(false)
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

/// Rows (through GELU if wanted) in e4m3 with a unit each.
pub(super) fn scaled(x: &Tensor, gelu: bool) -> Result<Rows> {
    #[cfg(feature = "cuda")]
    if matches!(x.device(), Device::Cuda(_)) {
        let x = x.to_dtype(DType::BF16)?.contiguous()?;
        let (stored, units) = crate::model::kernels::cuda::rows::quantise(&x, gelu)?;
        return Ok(Rows::Scaled { stored, units });
    }
    let x = if gelu { x.to_dtype(DType::F32)?.gelu()? } else { x.clone() };
    let (stored, units) = fp8::quantise_rows(&x)?;
    Ok(Rows::Scaled { stored, units })
}

/// The same with one unit for all.
pub(super) fn bound(x: &Tensor, gelu: bool, unit: &Unit) -> Result<Rows> {
    #[cfg(feature = "cuda")]
    if matches!(x.device(), Device::Cuda(_)) {
        let x = x.to_dtype(DType::BF16)?.contiguous()?;
        let stored = crate::model::kernels::cuda::rows::quantise_by(&x, gelu, unit.value())?;
        return Ok(Rows::Bound { stored, unit: unit.clone() });
    }
    let x = if gelu { x.to_dtype(DType::F32)?.gelu()? } else { x.clone() };
    Ok(Rows::Bound { stored: fp8::quantise_by(&x, unit.value())?, unit: unit.clone() })
}
