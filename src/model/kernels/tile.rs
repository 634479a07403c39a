//! The innermost loops: a few output pixels times a panel of output channels, summed over taps and input channels.
//!
//! Each output is one chain of fused multiply-adds in a fixed order (bias, then tap by tap, channel by channel), so the
//! AVX-512, AVX2 and NEON forms agree bit for bit, whatever the tiling or the number of threads. (AMX, in `amx`, sums in
//! an order of its own, as fixed.)

/// Channels in the unit that panels are made of.
pub(super) const UNIT: usize = 16;

/// As many as the registers of the plainest machine of the family hold.
const PORTABLE_PIXELS: usize = if cfg!(target_arch = "aarch64") { 4 } else { 2 };

/// Which instructions are used. Chosen once, when weights are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Intel's matrix tiles, with so many bf16 parts of every number (see `amx`).
    #[cfg(target_arch = "x86_64")]
    Amx(usize),
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// What the compiler makes of plain loops (NEON on aarch64).
    Portable,
}

impl Isa {
    /// The best this machine has.
    pub fn best() -> Isa {
        Isa::available()[0]
    }

    /// The fastest, where bf16 operands are good enough (the pocket model: `tests/it/pocket.rs` holds the figures).
    pub fn swift() -> Isa {
        #[cfg(target_arch = "x86_64")]
        if super::amx::available() {
            return Isa::Amx(1);
        }
        Isa::best()
    }

    /// All this machine can run, best first.
    pub fn available() -> Vec<Isa> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                all.push(Isa::Avx512);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                all.push(Isa::Avx2);
            }
        }
        all.push(Isa::Portable);
        all
    }

    /// [`Isa::available`] and the matrix units, where there are any: what a test goes through.
    pub fn everything() -> Vec<Isa> {
        #[allow(unused_mut)]
        let mut all = Isa::available();
        #[cfg(target_arch = "x86_64")]
        if super::amx::available() {
            all.extend([Isa::Amx(1), Isa::Amx(2), Isa::Amx(3)]);
        }
        all
    }

    /// Largest error of a product of two numbers, relative.
    pub fn error(self) -> f64 {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx(parts) => 2f64.powi(2 - 9 * parts.min(2) as i32 - 7 * parts.saturating_sub(2) as i32),
            _ => 2f64.powi(-23),
        }
    }

    /// How `units` of output channels are divided into panels (sizes in units).
    pub(super) fn panels(self, units: usize) -> Vec<usize> {
        match self {
            // Two tiles of outputs times two of pixels are the four sums that hide each other's latency.
            #[cfg(target_arch = "x86_64")]
            Isa::Amx(_) => [vec![2; units / 2], vec![1; units % 2]].concat(),
            // Three units times eight pixels fill 24 of the 32 registers; a lone unit at the end would starve them.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => match units % 3 {
                0 => vec![3; units / 3],
                1 if units > 1 => [vec![3; units / 3 - 1], vec![2, 2]].concat(),
                rest => [vec![3; units / 3], vec![rest]].concat(),
            },
            _ => vec![1; units],
        }
    }

    /// Pixels in a full tile.
    pub(super) fn pixels(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx(_) => 32,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => 8,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => 6,
            Isa::Portable => PORTABLE_PIXELS,
        }
    }
}

/// One tile. Pointers are to the first pixel's first channel of the panel; steps are in floats from pixel to pixel.
pub(super) struct Tile<'a> {
    /// Input at tap offset 0.
    pub(super) x: *const f32,
    pub(super) x_step: usize,
    /// Offsets in floats from `x`, one for each tap.
    pub(super) taps: &'a [usize],
    pub(super) cin: usize,
    /// Packed panel: `[tap][cin][units * UNIT]`.
    pub(super) w: *const f32,
    /// `[units * UNIT]`.
    pub(super) bias: *const f32,
    pub(super) units: usize,
    /// Channels of the last unit that exist (1..=UNIT).
    pub(super) last: usize,
    /// Added to the sum; null: nothing.
    pub(super) residual: *const f32,
    pub(super) residual_step: usize,
    /// Where the sum goes; null: nowhere.
    pub(super) raw: *mut f32,
    pub(super) raw_step: usize,
    /// Where max(sum, 0) goes; null: nowhere.
    pub(super) relu: *mut f32,
    pub(super) relu_step: usize,
}

impl Tile<'_> {
    /// Computes `pixels` pixels, which is [`Isa::pixels`] or 1.
    ///
    /// # Safety
    /// For each pixel `i` below `pixels`: `x + i·x_step + tap .. + cin` is readable for every tap; `w` and `bias` have
    /// the sizes above; `residual`, `raw` and `relu`, where not null, have `(units−1)·UNIT + last` floats at
    /// `i·step`; nobody else touches the outputs meanwhile; `isa` is one of [`Isa::available`].
    pub(super) unsafe fn compute(&self, isa: Isa, pixels: usize) {
        // SAFETY: as promised by the caller.
        unsafe {
            match isa {
                // `Packed` sends tiles of that kind to `amx`.
                #[cfg(target_arch = "x86_64")]
                Isa::Amx(_) => unreachable!("no vector form"),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => match (pixels, self.units) {
                    (1, 1) => avx512::<1, 1>(self),
                    (1, 2) => avx512::<1, 2>(self),
                    (1, _) => avx512::<1, 3>(self),
                    (_, 1) => avx512::<8, 1>(self),
                    (_, 2) => avx512::<8, 2>(self),
                    (_, _) => avx512::<8, 3>(self),
                },
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => match pixels {
                    1 => avx2::<1>(self),
                    _ => avx2::<6>(self),
                },
                Isa::Portable => match pixels {
                    1 => portable::<1>(self),
                    _ => portable::<PORTABLE_PIXELS>(self),
                },
            }
        }
    }

    /// Stores one unit of one pixel, channel by channel.
    ///
    /// # Safety
    /// As [`Tile::compute`].
    unsafe fn store(&self, pixel: usize, sums: &[f32; UNIT]) {
        // SAFETY: as promised by the caller of `compute`.
        unsafe {
            for (j, &sum) in sums[..self.last].iter().enumerate() {
                let mut v = sum;
                if !self.residual.is_null() {
                    v += *self.residual.add(pixel * self.residual_step + j);
                }
                if !self.raw.is_null() {
                    *self.raw.add(pixel * self.raw_step + j) = v;
                }
                if !self.relu.is_null() {
                    *self.relu.add(pixel * self.relu_step + j) = v.max(0.0);
                }
            }
        }
    }
}

/// # Safety
/// As [`Tile::compute`], and the machine has AVX-512 F.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512<const P: usize, const U: usize>(t: &Tile) {
    use std::arch::x86_64::*;
    // SAFETY: every address is inside what `Tile::compute` asks for; masked lanes are not touched.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); U]; P];
        for pixel in &mut sums {
            for (u, sum) in pixel.iter_mut().enumerate() {
                *sum = _mm512_loadu_ps(t.bias.add(u * UNIT));
            }
        }
        let mut w = t.w;
        for &tap in t.taps {
            let x = t.x.add(tap);
            for c in 0..t.cin {
                let mut row = [_mm512_setzero_ps(); U];
                for (u, v) in row.iter_mut().enumerate() {
                    *v = _mm512_loadu_ps(w.add(u * UNIT));
                }
                w = w.add(U * UNIT);
                for (p, pixel) in sums.iter_mut().enumerate() {
                    let value = _mm512_set1_ps(*x.add(p * t.x_step + c));
                    for (sum, weight) in pixel.iter_mut().zip(&row) {
                        *sum = _mm512_fmadd_ps(value, *weight, *sum);
                    }
                }
            }
        }
        let zero = _mm512_setzero_ps();
        for (p, pixel) in sums.iter().enumerate() {
            for (u, &sum) in pixel.iter().enumerate() {
                let mask: __mmask16 = if u + 1 == U { 0xffffu16 >> (UNIT - t.last) } else { 0xffff };
                let mut v = sum;
                if !t.residual.is_null() {
                    v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, t.residual.add(p * t.residual_step + u * UNIT)));
                }
                if !t.raw.is_null() {
                    _mm512_mask_storeu_ps(t.raw.add(p * t.raw_step + u * UNIT), mask, v);
                }
                if !t.relu.is_null() {
                    _mm512_mask_storeu_ps(t.relu.add(p * t.relu_step + u * UNIT), mask, _mm512_max_ps(v, zero));
                }
            }
        }
    }
}

/// # Safety
/// As [`Tile::compute`] with one unit, and the machine has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const P: usize>(t: &Tile) {
    use std::arch::x86_64::*;
    // SAFETY: every address is inside what `Tile::compute` asks for.
    unsafe {
        let bias = [_mm256_loadu_ps(t.bias), _mm256_loadu_ps(t.bias.add(8))];
        let mut sums = [bias; P];
        let mut w = t.w;
        for &tap in t.taps {
            let x = t.x.add(tap);
            for c in 0..t.cin {
                let row = [_mm256_loadu_ps(w), _mm256_loadu_ps(w.add(8))];
                w = w.add(UNIT);
                for (p, pixel) in sums.iter_mut().enumerate() {
                    let value = _mm256_set1_ps(*x.add(p * t.x_step + c));
                    pixel[0] = _mm256_fmadd_ps(value, row[0], pixel[0]);
                    pixel[1] = _mm256_fmadd_ps(value, row[1], pixel[1]);
                }
            }
        }
        for (p, pixel) in sums.iter().enumerate() {
            let mut flat = [0f32; UNIT];
            _mm256_storeu_ps(flat.as_mut_ptr(), pixel[0]);
            _mm256_storeu_ps(flat.as_mut_ptr().add(8), pixel[1]);
            t.store(p, &flat);
        }
    }
}

/// # Safety
/// As [`Tile::compute`] with one unit.
unsafe fn portable<const P: usize>(t: &Tile) {
    // SAFETY: every address is inside what `Tile::compute` asks for.
    unsafe {
        let mut sums = [*t.bias.cast::<[f32; UNIT]>(); P];
        let mut w = t.w;
        for &tap in t.taps {
            let x = t.x.add(tap);
            for c in 0..t.cin {
                // By value: the compiler then knows that nothing changes it and keeps the sums in registers.
                let row = *w.cast::<[f32; UNIT]>();
                w = w.add(UNIT);
                for p in 0..P {
                    let value = *x.add(p * t.x_step + c);
                    for j in 0..UNIT {
                        sums[p][j] = multiply_add(value, row[j], sums[p][j]);
                    }
                }
            }
        }
        for (p, pixel) in sums.iter().enumerate() {
            t.store(p, pixel);
        }
    }
}

/// Fused where that is one instruction; a call into a library for each product would be far too slow.
#[inline(always)]
fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) { a.mul_add(b, c) } else { a * b + c }
}
