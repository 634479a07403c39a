//! The randomness of faces: a function of seed and block number alone, never of how speech was cut.

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

/// `count` whole numbers of `range` (both ends included) for block `index`; independent of its noise.
pub(super) fn whole(seed: u64, index: u64, count: usize, range: (usize, usize)) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // Blocks count from zero: the upper half of the streams is free.
    rng.set_stream(index | 1 << 63);
    let span = (range.1 - range.0 + 1) as u64;
    (0..count).map(|_| range.0 + (rng.next_u64() % span) as usize).collect()
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

    #[test]
    fn whole_numbers_stay_in_their_range_and_reach_its_ends() {
        let many: Vec<usize> = (0..200).flat_map(|b| whole(7, b, 4, (4, 30))).collect();
        assert_eq!((many.iter().min(), many.iter().max()), (Some(&4), Some(&30)));
        assert_eq!(whole(7, 3, 4, (4, 30)), whole(7, 3, 4, (4, 30)));
    }
}
