//! Attention in f32: one task per head, which packs its keys and values once for the same inner loop that linear layers
//! use, then takes the queries tile by tile.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::{
    Isa, Packed, Pool,
    simd::{LANES, dispatch, exp, slice},
};

/// Queries whose scores are held at a time.
const TILE: usize = 16;

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
        let (isa, scale) = (Isa::best(), 1.0 / (head as f32).sqrt());
        let target = Out(out.as_mut_ptr());
        let one = |task: usize| {
            let (h, group) = (task % heads, task / heads);
            let (at, keys_at) = (group * rows_in * dim + h * head, group * keys_in * dim + h * head);
            let (q, k, v) = (&q[at..], &k[keys_at..], &v[keys_at..]);
            let keys = Packed::of_rows(isa, k, dim, keys_in, head);
            let values = Packed::of_columns(isa, v, dim, head, keys_in);
            let rows = TILE.min(rows_in);
            let (mut scores, mut mixed) = (vec![0f32; rows * keys_in], vec![0f32; rows * head]);
            let mut sums = [0f32; TILE];
            for first in (0..rows_in).step_by(TILE) {
                let n = TILE.min(rows_in - first);
                keys.rows(&q[first * dim..], dim, &[0], n, &mut scores, keys_in);
                softmax(&mut scores[..n * keys_in], keys_in, scale, &mut sums[..n]);
                values.rows(&scores, keys_in, &[0], n, &mut mixed, head);
                for (i, row) in mixed.chunks_exact(head).take(n).enumerate() {
                    // SAFETY: the row lies inside the result, which has the shape of the queries; a task writes the
                    // channels of its own head and group only, so no two touch the same element.
                    let to = unsafe { std::slice::from_raw_parts_mut(target.at(at + (first + i) * dim), head) };
                    let inv = 1.0 / sums[i];
                    to.iter_mut().zip(row).for_each(|(o, v)| *o = v * inv);
                }
            }
        };
        let tasks = heads * groups;
        if tasks * rows_in * keys_in * head < 1 << 19 {
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
    /// Exponentials of `scale` times each row less its maximum, and their sums; the caller divides at the end.
    fn softmax(scores: &mut [f32], keys: usize, scale: f32, sums: &mut [f32]) {
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
                    *v = exp((*v - max) * scale);
                    *s += *v;
                }
            }
            let mut sum: f32 = 0.0;
            for v in chunks.into_remainder() {
                *v = exp((*v - max) * scale);
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
        for (a, b, heads, head, groups) in
            [(5, 3, 2, 8, 1), (70, 130, 3, 32, 1), (64, 416, 4, 64, 1), (64, 5, 4, 64, 3), (1, 1, 1, 2, 2)]
        {
            let make = |n| Tensor::randn(0f32, 2.0, (n, heads * head), &cpu).unwrap();
            let (q, k, v) = (make(a * groups), make(b * groups), make(b * groups));
            let got = attention(&q, &k, &v, heads, groups).unwrap();
            let want = attention_plain(&q, &k, &v, heads, groups).unwrap();
            let d = (got - want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(d < 1e-5, "{d}");
        }
    }
}
