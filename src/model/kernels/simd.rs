//! One body, compiled for several instruction sets, chosen at run time.

use candle_core::{CpuStorage, Layout, Result};

/// Declares a function over plain arguments whose body is also compiled for AVX2 and AVX-512 and dispatched by what the
/// machine has. The order of additions is in the source, so every thread count gives the same numbers.
macro_rules! dispatch {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body($($arg: $ty),*) $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn wide($($arg: $ty),*) {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn middle($($arg: $ty),*) {
                    body($($arg),*)
                }
                let fma = std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
                if fma
                    && std::is_x86_feature_detected!("avx512f")
                    && std::is_x86_feature_detected!("avx512bw")
                    && std::is_x86_feature_detected!("avx512dq")
                    && std::is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the features were just detected.
                    return unsafe { wide($($arg),*) };
                }
                if fma {
                    // SAFETY: the features were just detected.
                    return unsafe { middle($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use dispatch;

/// Lanes the bodies are written for; two AVX-512 registers keep both adders busy.
pub(crate) const LANES: usize = 32;

/// `e^x` to about 1e-7 relative, without branches so that it becomes vector code; 0 below -87.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Comparisons rather than `clamp`, and bits rather than a cast to an integer: both would check for NaN, which passes
    // through here by itself.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    // Adding 1.5·2^23 rounds to the nearest integer and leaves it in the lowest bits.
    let shifted = x * std::f32::consts::LOG2_E + 12_582_912.0;
    let n = shifted - 12_582_912.0;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4f32;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 5.000_000_3e-1] {
        p = p * r + c;
    }
    let p = p * r * r + r + 1.0;
    p * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// Sum with a fixed order that vectorises.
#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().sum();
    for c in chunks {
        for (l, v) in lanes.iter_mut().zip(c) {
            *l += v;
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// Sum of squared distances from `mean`, in a fixed order.
#[inline(always)]
pub(crate) fn sum_squares(x: &[f32], mean: f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|v| (v - mean) * (v - mean)).sum();
    for c in chunks {
        for (l, v) in lanes.iter_mut().zip(c) {
            *l += (v - mean) * (v - mean);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// The elements of a contiguous f32 operand.
pub(crate) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("a fused operation was given a strided tensor"),
    }
}

/// The elements of an f32 matrix whose rows may stand apart, from its first element on.
pub(crate) fn rows<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let (n, c) = layout.shape().dims2()?;
    let (step, start) = (layout.stride()[0], layout.start_offset());
    let all = storage.as_slice::<f32>()?;
    let length = if n == 0 { 0 } else { (n - 1) * step + c };
    match all.get(start..start + length) {
        Some(part) if layout.stride()[1] == 1 || c <= 1 => Ok(part),
        _ => candle_core::bail!("a fused operation was given rows that are not contiguous"),
    }
}

/// `run[i]` of row `i`, from the lengths of the runs.
pub(crate) fn run_of_rows(runs: &[usize]) -> Vec<usize> {
    runs.iter().enumerate().flat_map(|(s, n)| std::iter::repeat_n(s, *n)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let (got, want) = (exp(x) as f64, (x as f64).exp());
            assert!((got / want - 1.0).abs() < 4e-7, "{x}: {got} {want}");
        }
        assert!(exp(-1e9) < 1e-37 && exp(f32::NAN).is_nan());
    }
}
