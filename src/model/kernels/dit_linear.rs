//! `x Wᵀ + b` in f32 with the bias and the activation folded in.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use gemm::{Parallelism, gemm};

use super::simd::{dispatch, exp, slice};
use crate::model::nn::Activation;

/// `x` `[n, in]`, `weight` `[out, in]`, `bias` `[out]`, all contiguous f32.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
    let op = Linear { activation };
    match bias {
        Some(b) => x.apply_op3_no_bwd(weight, &b.contiguous()?, &op),
        None => x.apply_op2_no_bwd(weight, &op),
    }
}

struct Linear {
    activation: Activation,
}

impl Linear {
    fn run(&self, x: &[f32], lx: &Layout, w: &[f32], lw: &Layout, b: Option<&[f32]>) -> Result<(CpuStorage, Shape)> {
        let ((n, k), (m, kw)) = (lx.shape().dims2()?, lw.shape().dims2()?);
        if k != kw || b.is_some_and(|b| b.len() != m) {
            candle_core::bail!("a matrix {:?} cannot be applied to {:?}", lw.shape(), lx.shape());
        }
        let mut out = match b {
            Some(b) => b.repeat(n),
            None => vec![0f32; n * m],
        };
        // Small products are not worth waking the other threads.
        let threads = if n * m * k < 1 << 21 { 1 } else { candle_core::utils::get_num_threads() };
        let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
        if n > 0 && m > 0 {
            // SAFETY: the three slices are contiguous row-major matrices of the sizes given (checked above, `out` made
            // here), and `out` aliases neither operand.
            unsafe {
                gemm(
                    n,
                    m,
                    k,
                    out.as_mut_ptr(),
                    1,
                    m as isize,
                    b.is_some(),
                    x.as_ptr(),
                    1,
                    k as isize,
                    w.as_ptr(),
                    k as isize,
                    1,
                    1.0,
                    1.0,
                    false,
                    false,
                    false,
                    parallelism,
                );
            }
        }
        if self.activation == Activation::GeluTanh {
            gelu_tanh(&mut out);
        }
        Ok((CpuStorage::F32(out), Shape::from((n, m))))
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run(slice(s1, l1)?, l1, slice(s2, l2)?, l2, None)
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run(slice(s1, l1)?, l1, slice(s2, l2)?, l2, Some(slice(s3, l3)?))
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
