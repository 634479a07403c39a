//! Row-wise operations of the transformer, fused: LayerNorm with modulation, gated residual, RMS norm with rotation.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

use super::simd::{dispatch, rows, run_of_rows, slice, sum, sum_squares};

/// LayerNorm of each row, `· scale + shift` of its run.
pub fn layer_norm(x: &Tensor, scale: &Tensor, shift: &Tensor, runs: &[usize], eps: f64) -> Result<Tensor> {
    let op = LayerNorm { runs: run_of_rows(runs), eps: eps as f32 };
    x.apply_op3_no_bwd(&scale.contiguous()?, &shift.contiguous()?, &op)
}

struct LayerNorm {
    runs: Vec<usize>,
    eps: f32,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm-modulate"
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
        let (x, scale, shift) = (slice(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?);
        let c = l1.shape().dims2()?.1;
        let mut out = vec![0f32; x.len()];
        layer_norm_rows(x, scale, shift, &self.runs, c, self.eps, &mut out);
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

dispatch! {
    fn layer_norm_rows(x: &[f32], scale: &[f32], shift: &[f32], runs: &[usize], c: usize, eps: f32, out: &mut [f32]) {
        for ((x, out), run) in x.chunks_exact(c).zip(out.chunks_exact_mut(c)).zip(runs) {
            let mean = sum(x) / c as f32;
            let inv = 1.0 / (sum_squares(x, mean) / c as f32 + eps).sqrt();
            let (a, b) = (&scale[run * c..(run + 1) * c], &shift[run * c..(run + 1) * c]);
            for (((o, v), a), b) in out.iter_mut().zip(x).zip(a).zip(b) {
                *o = (v - mean) * inv * a + b;
            }
        }
    }
}

/// `x + y · gate` of the row's run.
pub fn gated_add(x: &Tensor, y: &Tensor, gate: &Tensor, runs: &[usize]) -> Result<Tensor> {
    x.apply_op3_no_bwd(y, &gate.contiguous()?, &GatedAdd { runs: run_of_rows(runs) })
}

struct GatedAdd {
    runs: Vec<usize>,
}

impl CustomOp3 for GatedAdd {
    fn name(&self) -> &'static str {
        "gated-add"
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
        let (x, y, gate) = (slice(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?);
        if x.len() != y.len() {
            candle_core::bail!("gated sum of {:?} and {:?}", l1.shape(), l2.shape());
        }
        let c = l1.shape().dims2()?.1;
        let mut out = vec![0f32; x.len()];
        gated_add_rows(x, y, gate, &self.runs, c, &mut out);
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

dispatch! {
    fn gated_add_rows(x: &[f32], y: &[f32], gate: &[f32], runs: &[usize], c: usize, out: &mut [f32]) {
        for (((x, y), out), run) in x.chunks_exact(c).zip(y.chunks_exact(c)).zip(out.chunks_exact_mut(c)).zip(runs) {
            let g = &gate[run * c..(run + 1) * c];
            for (((o, x), y), g) in out.iter_mut().zip(x).zip(y).zip(g) {
                *o = x + y * g;
            }
        }
    }
}

/// RMS norm of each row times `weight`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    x.apply_op2_no_bwd(&weight.contiguous()?, &RmsNorm { eps: eps as f32 })
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (rows(s1, l1)?, slice(s2, l2)?);
        let (n, c) = l1.shape().dims2()?;
        if weight.len() != c {
            candle_core::bail!("RMS norm of {c} channels with a weight of {}", weight.len());
        }
        let mut out = vec![0f32; n * c];
        rms_rows(x, l1.stride()[0], weight, c, self.eps, &mut out);
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

/// RMS norm times `weight`, then each pair of adjacent channels turned by `table` `[rows, head]`.
pub fn rms_norm_rotate(x: &Tensor, weight: &Tensor, table: &Tensor, eps: f64) -> Result<Tensor> {
    x.apply_op3_no_bwd(&weight.contiguous()?, &table.contiguous()?, &RmsNormRotate { eps: eps as f32 })
}

struct RmsNormRotate {
    eps: f32,
}

impl CustomOp3 for RmsNormRotate {
    fn name(&self) -> &'static str {
        "rms-norm-rotate"
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
        let (x, weight, table) = (rows(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?);
        let (n, c) = l1.shape().dims2()?;
        let head = l3.shape().dims2()?.1;
        if weight.len() != c {
            candle_core::bail!("RMS norm of {c} channels with a weight of {}", weight.len());
        }
        let mut out = vec![0f32; n * c];
        rms_rows(x, l1.stride()[0], weight, c, self.eps, &mut out);
        rotate_rows(table, head, c, &mut out);
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

/// The rotation alone.
pub fn rotate(x: &Tensor, table: &Tensor) -> Result<Tensor> {
    x.apply_op2_no_bwd(&table.contiguous()?, &Rotate)
}

struct Rotate;

impl CustomOp2 for Rotate {
    fn name(&self) -> &'static str {
        "rotate"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, table) = (slice(s1, l1)?, slice(s2, l2)?);
        let mut out = x.to_vec();
        rotate_rows(table, l2.shape().dims2()?.1, l1.shape().dims2()?.1, &mut out);
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

dispatch! {
    fn rms_rows(x: &[f32], step: usize, weight: &[f32], c: usize, eps: f32, out: &mut [f32]) {
        for (i, out) in out.chunks_exact_mut(c).enumerate() {
            let x = &x[i * step..i * step + c];
            let inv = 1.0 / (sum_squares(x, 0.0) / c as f32 + eps).sqrt();
            for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
                *o = v * inv * w;
            }
        }
    }
}

dispatch! {
    fn rotate_rows(table: &[f32], head: usize, c: usize, out: &mut [f32]) {
        for (row, turn) in out.chunks_exact_mut(c).zip(table.chunks_exact(head)) {
            let (cos, sin) = turn.split_at(head / 2);
            for h in row.chunks_exact_mut(head) {
                for ((pair, c), s) in h.chunks_exact_mut(2).zip(cos).zip(sin) {
                    let (a, b) = (pair[0], pair[1]);
                    pair[0] = a * c - b * s;
                    pair[1] = a * s + b * c;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use crate::model::nn::{
        Rope,
        norm::{self, Affine, plain},
        rope::{Group, Rounding},
    };

    fn close(a: &Tensor, b: &Tensor) {
        let d = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(d < 1e-5, "differs by {d}");
    }

    #[test]
    fn fused_rows_agree_with_their_plain_twins() {
        let cpu = Device::Cpu;
        for (rows, c, head) in [(7, 36, 12), (24, 96, 32)] {
            let x = Tensor::randn(0.3f32, 2.0, (rows, c), &cpu).unwrap();
            let y = Tensor::randn(0f32, 1.0, (rows, c), &cpu).unwrap();
            let random = |mean: f32| Tensor::randn(mean, 1.0, (3, c), &cpu).unwrap();
            let affine = Affine::new(random(1.0), random(0.0));
            let runs = [2, 0, rows - 2];
            close(
                &norm::layer_norm(&x, &affine, &runs, 1e-6).unwrap(),
                &plain::layer_norm(&x, &affine, &runs, 1e-6).unwrap(),
            );
            let gate = &affine.shift;
            close(&norm::gated_add(&x, &y, gate, &runs).unwrap(), &plain::gated_add(&x, &y, gate, &runs).unwrap());
            let w = Tensor::randn(1f32, 1.0, c, &cpu).unwrap();
            let rope = Rope::new(&[Group::frames(5, rows, 1, 1)], head, Rounding::Exact, &cpu).unwrap();
            let (a, b) = (norm::rms_norm(&x, &w, 1e-6).unwrap(), plain::rms_norm(&x, &w, 1e-6).unwrap());
            close(&a, &b);
            close(&norm::rotate(&a, &rope).unwrap(), &plain::rotate(&b, &rope).unwrap());
            close(&norm::rms_norm_rotate(&x, &w, 1e-6, &rope).unwrap(), &plain::rotate(&b, &rope).unwrap());
        }
    }

    #[test]
    fn runs_that_do_not_cover_the_rows_are_refused() {
        let x = Tensor::zeros((4, 8), candle_core::DType::F32, &Device::Cpu).unwrap();
        let gate = Tensor::zeros((1, 8), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(norm::gated_add(&x, &x, &gate, &[3]).is_err());
    }
}
