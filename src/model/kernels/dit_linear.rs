//! `x Wᵀ + b` in f32 with the bias and the activation folded in.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::{
    Packed, Pool,
    simd::{dispatch, exp, slice},
};
use crate::model::nn::Activation;

/// Below this many products another thread is not worth waking.
const ALONE: usize = 1 << 20;

/// `x` `[n, in]`, contiguous f32; `packed` holds `[out, in]` and the bias.
pub fn linear(x: &Tensor, packed: Arc<Packed>, activation: Activation) -> Result<Tensor> {
    x.apply_op1_no_bwd(&Linear { packed, activation })
}

struct Linear {
    packed: Arc<Packed>,
    activation: Activation,
}

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(storage, layout)?;
        let (rows, width) = layout.shape().dims2()?;
        let out_width = self.packed.outputs();
        if width != self.packed.inputs() {
            let inputs = self.packed.inputs();
            candle_core::bail!("a matrix [{out_width}, {inputs}] cannot be applied to {:?}", layout.shape());
        }
        let mut out = vec![0f32; rows * out_width];
        if rows * width * out_width < ALONE {
            self.packed.rows(x, width, &[0], rows, &mut out, out_width);
        } else {
            self.packed.linear(&Pool::shared(), x, rows, &mut out);
        }
        if self.activation == Activation::GeluTanh {
            gelu_tanh(&mut out);
        }
        Ok((CpuStorage::F32(out), Shape::from((rows, out_width))))
    }
}

dispatch! {
    /// GELU, tanh approximation, in place: `x · σ(2u)` with `u = √(2/π)(x + 0.044715 x³)` is the same function.
    pub fn gelu_tanh(x: &mut [f32]) {
        for v in x.iter_mut() {
            let u = 0.797_884_6 * (*v + 0.044_715 * *v * *v * *v);
            *v /= 1.0 + exp(-2.0 * u);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use crate::model::nn::{Activation, Linear};

    #[test]
    fn agrees_with_matmul_bias_and_gelu() {
        let cpu = Device::Cpu;
        for (n, k, m) in [(1, 7, 5), (64, 256, 300), (65, 33, 129)] {
            let x = Tensor::randn(0f32, 1.0, (n, k), &cpu).unwrap();
            let w = Tensor::randn(0f32, 0.3, (m, k), &cpu).unwrap();
            let b = Tensor::randn(0f32, 1.0, m, &cpu).unwrap();
            let want = x.matmul(&w.t().unwrap()).unwrap().broadcast_add(&b).unwrap();
            let layer = Linear::new(w, Some(b)).unwrap();
            for (activation, want) in [(Activation::None, want.clone()), (Activation::GeluTanh, want.gelu().unwrap())] {
                let got = layer.forward_with(&x, activation).unwrap();
                let d = (got - want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(d < 2e-5, "{n} {k} {m}: {d}");
            }
        }
    }
}
