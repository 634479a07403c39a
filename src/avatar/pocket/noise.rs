//! The noise that blocks are made from: a function of seed and block number alone.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

/// `count` standard normal values of block `index` of the face with this `seed` (Box–Muller in f64).
pub(super) fn normal(seed: u64, index: u64, count: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(index);
    let mut unit = || ((rng.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    let mut out = Vec::with_capacity(count + 1);
    while out.len() < count {
        let (radius, angle) = ((-2.0 * unit().ln()).sqrt(), std::f64::consts::TAU * unit());
        out.push((radius * angle.cos()) as f32);
        out.push((radius * angle.sin()) as f32);
    }
    out.truncate(count);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_normal_and_depends_on_seed_and_block_only() {
        let a = normal(1, 5, 16384);
        assert_eq!(a, normal(1, 5, 16384));
        assert_ne!(a, normal(1, 6, 16384));
        assert_ne!(a, normal(2, 5, 16384));
        let n = a.len() as f32;
        let mean = a.iter().sum::<f32>() / n;
        let var = a.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n;
        let tails = a.iter().filter(|v| v.abs() > 1.96).count() as f32 / n;
        assert!(mean.abs() < 0.03 && (var - 1.0).abs() < 0.04 && (tails - 0.05).abs() < 0.01, "{mean} {var} {tails}");
    }
}
