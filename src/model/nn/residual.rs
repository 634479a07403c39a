//! The residual stream: `x += y · gate`, and the norm that every part of a block begins with.
//!
//! A sum is made by the product that is added, where the device can. Else it is not made at once: it waits for the next
//! norm, so that a device that can makes both in one pass over memory; where nothing can be fused, the sum is made at once
//! and the norm is a norm.

use candle_core::{DType, Device, Tensor};

use super::{
    Activation, Form, Gated, Linear, Rows,
    norm::{self, Affine},
};
use crate::model::{Error, Result};

/// Tokens on their way through the blocks, `[tokens, dim]`.
#[derive(Debug)]
pub struct Residual {
    x: Tensor,
    waiting: Option<Waiting>,
}

#[derive(Debug)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
struct Waiting {
    y: Tensor,
    gate: Option<(Tensor, Vec<usize>)>,
}

impl Residual {
    /// Starts with `x`. A device with fused kernels writes its sums **into** it: hand in a tensor that nobody else reads.
    pub fn new(x: Tensor) -> Self {
        Self { x, waiting: None }
    }

    /// Adds `y`, times the gate of the row's run where there is one.
    pub fn add(&mut self, y: Tensor, gate: Option<(&Tensor, &[usize])>) -> Result<()> {
        self.settle()?;
        let runs = gate.map_or(1, |g| g.1.len());
        if fused(&self.x, runs) && y.dtype() == DType::BF16 && y.dims() == self.x.dims() {
            let gate = gate.map(|(g, runs)| (g.clone(), runs.to_vec()));
            self.waiting = Some(Waiting { y: y.contiguous()?, gate });
            return Ok(());
        }
        self.x = match gate {
            Some((gate, runs)) => norm::gated_add(&self.x, &y, gate, runs)?,
            None => (&self.x + y.to_dtype(self.x.dtype())?)?,
        };
        Ok(())
    }

    /// Adds what `o` makes of `y`, times a gate, which may be in `gated` already.
    pub fn add_through(
        &mut self,
        o: &Linear,
        y: &Rows,
        gate: Option<(&Tensor, &[usize])>,
        gated: Option<&Gated>,
    ) -> Result<()> {
        if fused(&self.x, 1) && gate.is_some() == gated.is_some() && y.dims() == [self.rows(), o.width()] {
            self.settle()?;
            if o.add_rows(y, gated, &self.x)? {
                return Ok(());
            }
        }
        self.add(o.forward_rows(y, Activation::None)?, gate)
    }

    /// LayerNorm of the sum so far, in the form its reader wants; in e4m3 with the norm's unit, if it has one.
    pub fn norm(&mut self, affine: &Affine, runs: &[usize], eps: f64, form: Form) -> Result<Rows> {
        norm::runs_cover(&self.x, runs, &affine.scale)?;
        norm::runs_cover(&self.x, runs, &affine.shift)?;
        let unit = affine.unit.as_ref().filter(|_| form == Form::Scaled);
        #[cfg(feature = "cuda")]
        if fused(&self.x, runs.len()) {
            use crate::model::kernels::cuda::rows;
            let waiting = self.waiting.take();
            let sum = waiting.as_ref().map(Waiting::sum);
            let out = match form {
                Form::Plain(dtype) => dtype,
                Form::Scaled => DType::F8E4M3,
            };
            let given = unit.map(super::Unit::value);
            let norm = rows::Norm { scale: &affine.scale, shift: &affine.shift, runs, eps, out, unit: given };
            return match (rows::residual_norm(&self.x, sum.as_ref(), Some(&norm))?, unit) {
                (Some((stored, Some(units))), _) => Ok(Rows::Scaled { stored, units }),
                (Some((stored, None)), Some(unit)) => Ok(Rows::Bound { stored, unit: unit.clone() }),
                (Some((plain, None)), None) => Ok(Rows::Plain(plain)),
                (None, _) => Err(Error::Input("a norm gave nothing".into())),
            };
        }
        let y = norm::layer_norm(self.settle()?, affine, runs, eps)?;
        match (form, unit) {
            (Form::Plain(_), _) => Ok(Rows::Plain(y)),
            (Form::Scaled, None) => super::linear::scaled(&y, false),
            (Form::Scaled, Some(unit)) => super::linear::bound(&y, false, unit),
        }
    }

    /// The tokens with every sum made.
    pub fn settle(&mut self) -> Result<&Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(waiting) = self.waiting.take() {
            crate::model::kernels::cuda::rows::residual_norm(&self.x, Some(&waiting.sum()), None)?;
        }
        if self.waiting.is_some() {
            return Err(Error::Input("a sum waits that nothing can make".into()));
        }
        Ok(&self.x)
    }

    /// The tokens with every sum made, as they are now: later sums do not change them.
    pub fn snapshot(&mut self) -> Result<Tensor> {
        let x = self.settle()?;
        if matches!(x.device(), Device::Cpu) { Ok(x.clone()) } else { Ok(x.copy()?) }
    }

    /// Ends the stream.
    pub fn into_tokens(mut self) -> Result<Tensor> {
        self.settle()?;
        Ok(self.x)
    }

    /// Tokens.
    pub fn rows(&self) -> usize {
        self.x.dims()[0]
    }
}

#[cfg(feature = "cuda")]
impl Waiting {
    fn sum(&self) -> crate::model::kernels::cuda::rows::Sum<'_> {
        let gate = self.gate.as_ref().map(|(g, runs)| (g, runs.as_slice()));
        crate::model::kernels::cuda::rows::Sum { y: &self.y, gate }
    }
}

/// Whether sums and norms of `x` are one kernel's work.
fn fused(x: &Tensor, runs: usize) -> bool {
    #[cfg(feature = "cuda")]
    {
        let type_fits = matches!(x.dtype(), DType::F32 | DType::BF16);
        matches!(x.device(), Device::Cuda(_))
            && type_fits
            && x.is_contiguous()
            && x.rank() == 2
            && crate::model::kernels::cuda::rows::fits(x.dims()[1], runs)
    }
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (x, runs);
        false
    }
}
