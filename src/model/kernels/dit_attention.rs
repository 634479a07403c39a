//! Attention in f32 on token-major operands: no transposed copies, one task per head and tile of queries.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use gemm::{Parallelism, gemm};

use super::{
    Pool,
    simd::{LANES, dispatch, exp, slice},
};

/// Queries per task. Fixed, so that results do not depend on the number of threads.
const TILE: usize = 64;

/// See [`crate::model::nn::attention`]; operands are contiguous f32.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, groups: usize) -> Result<Tensor> {
    q.apply_op3_no_bwd(k, v, &Attention { heads, groups })
}

struct Attention {
    heads: usize,
    groups: usize,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
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
        let (q, k, v) = (slice(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?);
        let ((rows, dim), keys) = (l1.shape().dims2()?, l2.shape().dims2()?.0);
        let (heads, groups) = (self.heads, self.groups);
        if k.len() != keys * dim || v.len() != k.len() || dim % heads != 0 || rows % groups != 0 || keys % groups != 0 {
            candle_core::bail!("attention of {:?} over {:?} and {:?}", l1.shape(), l2.shape(), l3.shape());
        }
        let (rows_in, keys_in, head) = (rows / groups, keys / groups, dim / heads);
        let mut out = vec![0f32; q.len()];
        let tiles = rows_in.div_ceil(TILE);
        let target = Out(out.as_mut_ptr());
        let one = |task: usize| {
            let (tile, h, group) = (task % tiles, task / tiles % heads, task / (tiles * heads));
            let first = tile * TILE;
            let n = TILE.min(rows_in - first);
            let at = (group * rows_in + first) * dim + h * head;
            let keys_at = group * keys_in * dim + h * head;
            let mut scores = vec![0f32; n * keys_in];
            let mut sums = [0f32; TILE];
            // SAFETY: all offsets stay inside the operands: a task reads rows `first..first+n` of its group and head of
            // q, all rows of its group and head of k and v, and writes the same rows and columns of `out` as it read of
            // q, which no other task touches.
            unsafe {
                gemm(
                    n,
                    keys_in,
                    head,
                    scores.as_mut_ptr(),
                    1,
                    keys_in as isize,
                    false,
                    q.as_ptr().add(at),
                    1,
                    dim as isize,
                    k.as_ptr().add(keys_at),
                    dim as isize,
                    1,
                    0.0,
                    1.0 / (head as f32).sqrt(),
                    false,
                    false,
                    false,
                    Parallelism::None,
                );
                softmax(&mut scores, keys_in, &mut sums[..n]);
                gemm(
                    n,
                    head,
                    keys_in,
                    target.at(at),
                    1,
                    dim as isize,
                    false,
                    scores.as_ptr(),
                    1,
                    keys_in as isize,
                    v.as_ptr().add(keys_at),
                    1,
                    dim as isize,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    Parallelism::None,
                );
                for (i, s) in sums[..n].iter().enumerate() {
                    let row = std::slice::from_raw_parts_mut(target.at(at + i * dim), head);
                    let inv = 1.0 / s;
                    row.iter_mut().for_each(|v| *v *= inv);
                }
            }
        };
        let tasks = tiles * heads * groups;
        if tasks * rows_in.min(TILE) * keys_in * head < 1 << 19 {
            (0..tasks).for_each(one);
        } else {
            Pool::shared().run(tasks, one);
        }
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

/// The result, shared by tasks that write disjoint parts of it.
struct Out(*mut f32);

// SAFETY: tasks write disjoint elements and the vector outlives them.
unsafe impl Sync for Out {}

impl Out {
    /// SAFETY: `offset` must lie inside the vector.
    unsafe fn at(&self, offset: usize) -> *mut f32 {
        unsafe { self.0.add(offset) }
    }
}

dispatch! {
    /// Exponentials of each row less its maximum, and their sums; the caller divides at the end.
    fn softmax(scores: &mut [f32], keys: usize, sums: &mut [f32]) {
        for (row, total) in scores.chunks_exact_mut(keys).zip(sums.iter_mut()) {
            let mut lanes = [f32::NEG_INFINITY; LANES];
            for c in row.chunks_exact(LANES) {
                for (l, v) in lanes.iter_mut().zip(c) {
                    *l = if *v > *l { *v } else { *l };
                }
            }
            let rest = row.chunks_exact(LANES).remainder().iter();
            let max = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, v| m.max(*v));
            let mut sums = [0f32; LANES];
            let mut chunks = row.chunks_exact_mut(LANES);
            for c in &mut chunks {
                for (s, v) in sums.iter_mut().zip(c) {
                    *v = exp(*v - max);
                    *s += *v;
                }
            }
            let mut sum: f32 = 0.0;
            for v in chunks.into_remainder() {
                *v = exp(*v - max);
                sum += *v;
            }
            *total = sum + sums.iter().sum::<f32>();
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use crate::model::nn::{attention, attention_plain};

    #[test]
    fn agrees_with_its_plain_twin() {
        let cpu = Device::Cpu;
        for (a, b, heads, head, groups) in [(5, 3, 2, 8, 1), (70, 130, 3, 32, 1), (64, 5, 4, 64, 3), (1, 1, 1, 2, 2)] {
            let make = |n| Tensor::randn(0f32, 2.0, (n, heads * head), &cpu).unwrap();
            let (q, k, v) = (make(a * groups), make(b * groups), make(b * groups));
            let got = attention(&q, &k, &v, heads, groups).unwrap();
            let want = attention_plain(&q, &k, &v, heads, groups).unwrap();
            let d = (got - want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(d < 1e-5, "{d}");
        }
    }
}
