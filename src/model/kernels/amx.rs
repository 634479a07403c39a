//! Matrix products in Intel's AMX tiles, which multiply bf16 and sum in f32. A number is cut into one, two or three bf16
//! parts of 8 bits of mantissa each; the products of parts that matter (1, 3 or 6) are all summed. Three parts are all
//! that f32 has, two leave an error of 2⁻¹⁷.
//!
//! What comes out does not depend on how the work is cut: each output is one chain of the same tile products.

use super::packed::Stretch;
use super::tile::UNIT;
use std::{arch::asm, arch::x86_64::*, cell::RefCell, sync::OnceLock};

/// Most bf16 parts of a number.
const MOST: usize = 3;
/// Inputs in one tile product.
const DEPTH: usize = 32;
/// Pixels of a tile.
const ROWS: usize = 16;
/// Elements of a tile of weights: 16 pairs of inputs × 16 outputs × 2.
const TILE: usize = DEPTH * UNIT;

/// Whether the processor has AMX and the system lets this process use it.
pub(super) fn available() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        let leaf = __cpuid_count(7, 0);
        let (bf16, tile) = (leaf.edx >> 22 & 1, leaf.edx >> 24 & 1);
        bf16 == 1
            && tile == 1
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bf16")
            && permitted()
    })
}

/// Linux gives the tiles' state only to processes that ask: `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`
/// (Documentation/arch/x86/xstate.rst).
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    let mut result = 158i64;
    // SAFETY: the call takes two numbers and touches no memory of ours; rcx and r11 are what `syscall` overwrites.
    unsafe {
        asm!("syscall", inout("rax") result, in("rdi") 0x1023u64, in("rsi") 18u64, out("rcx") _, out("r11") _,
            options(nostack));
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Weights in the order in which the tiles take them: `[panel][tap][depth][part][unit][pair of inputs][output][2]`.
pub(super) struct Matrix {
    cin: usize,
    cout: usize,
    taps: usize,
    parts: usize,
    data: Vec<u16>,
}

/// Inputs of a stretch of pixels, in parts, with room behind for tiles that are not full.
pub(super) struct Split {
    data: Vec<u16>,
    length: usize,
}

thread_local! {
    static SCRATCH: RefCell<Vec<u16>> = const { RefCell::new(Vec::new()) };
}

impl Split {
    /// Of `x`, to be walked in steps of up to `step`. Gives its memory back for the next one when dropped.
    pub(super) fn new(x: &[f32], step: usize, parts: usize) -> Split {
        let length = x.len() + ROWS * 2 * step + DEPTH;
        let mut data = SCRATCH.take();
        data.resize(parts * length, 0);
        let split = Split { data, length };
        let base = split.data.as_ptr().cast_mut();
        // SAFETY: each part has `length` elements and `x` is shorter; the machine has what `available` asks for.
        unsafe {
            let to: [*mut u16; MOST] = std::array::from_fn(|part| base.wrapping_add(part * length));
            cut(x, &to[..parts]);
            for part in 0..parts {
                base.add(part * length + x.len()).write_bytes(0, length - x.len());
            }
        }
        split
    }
}

impl Drop for Split {
    fn drop(&mut self) {
        SCRATCH.set(std::mem::take(&mut self.data));
    }
}

/// # Safety
/// The machine has AVX-512 BF16; `to` are the beginnings of separate memory for as many elements as `x` has.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn cut(x: &[f32], to: &[*mut u16]) {
    let mut at = 0;
    // SAFETY: only elements below `x.len()` are read and written.
    unsafe {
        while at + 16 <= x.len() {
            let mut rest = _mm512_loadu_ps(x.as_ptr().add(at));
            for &part in to {
                let rounded = _mm512_cvtneps_pbh(rest);
                rest = _mm512_sub_ps(rest, _mm512_cvtpbh_ps(rounded));
                part.add(at).cast::<__m256bh>().write_unaligned(rounded);
            }
            at += 16;
        }
        for (i, &value) in x.iter().enumerate().skip(at) {
            let mut rest = value;
            for &part in to {
                let rounded = half::bf16::from_f32(rest);
                rest -= rounded.to_f32();
                part.add(i).write(rounded.to_bits());
            }
        }
    }
}

impl Matrix {
    pub(super) fn new(
        cout: usize,
        taps: usize,
        cin: usize,
        panels: &[usize],
        parts: usize,
        weight: impl Fn(usize, usize, usize) -> f32,
    ) -> Matrix {
        let mut data = Vec::new();
        let mut first = 0;
        for &units in panels {
            for tap in 0..taps {
                for depth in (0..cin).step_by(DEPTH) {
                    let at = data.len();
                    data.resize(at + parts * units * TILE, 0);
                    for o in 0..units * UNIT {
                        for i in 0..DEPTH {
                            let there = first + o < cout && depth + i < cin;
                            let mut rest = if there { weight(first + o, tap, depth + i) } else { 0.0 };
                            for part in 0..parts {
                                let rounded = half::bf16::from_f32(rest);
                                rest -= rounded.to_f32();
                                let tile = at + (part * units + o / UNIT) * TILE;
                                data[tile + (i / 2 * UNIT + o % UNIT) * 2 + i % 2] = rounded.to_bits();
                            }
                        }
                    }
                }
            }
            first += units * UNIT;
        }
        Matrix { cin, cout, taps, parts, data }
    }

    pub(super) fn parts(&self) -> usize {
        self.parts
    }

    /// `pixels` pixels through the panels `which`; the input of the first pixel at tap offset 0 is element `from` of
    /// `x`. `at` says where results go; its `x` is not read.
    ///
    /// # Safety
    /// `x` reaches as far as the last pixel's last tap; the outputs of `at` are as `Tile::compute` asks.
    #[allow(clippy::too_many_arguments)]
    pub(super) unsafe fn stretch(
        &self,
        panels: &[usize],
        which: std::ops::Range<usize>,
        bias: &[f32],
        taps: &[usize],
        x: &Split,
        from: usize,
        pixels: usize,
        at: &Stretch,
    ) {
        // Palette 1: eight tiles of 16 rows of 64 bytes.
        let mut config = [0u8; 64];
        config[0] = 1;
        config[16..32].copy_from_slice(&[64, 0].repeat(8));
        config[48..56].fill(16);
        // SAFETY: `available` was asked before a matrix was made; the configuration is a valid one.
        unsafe { asm!("ldtilecfg [{}]", in(reg) config.as_ptr(), options(nostack, readonly, preserves_flags)) }
        let step = self.taps * self.cin.div_ceil(DEPTH) * self.parts * TILE;
        for panel in which {
            let (units, before) = (panels[panel], panels[..panel].iter().sum::<usize>());
            let w = self.data[before * step..][..units * step].as_ptr();
            let mut first = 0;
            while first < pixels {
                let rows = ROWS * 2;
                let now = rows.min(pixels - first);
                let a = x.data[from + first * at.x_step..].as_ptr();
                // SAFETY: the scratch behind the input has room for the pixels that a tile has beyond the last.
                unsafe {
                    let sums = match (now > ROWS, units) {
                        (true, 2) => self.tiles::<2, 2>(a, x.length, at.x_step, taps, w),
                        (true, _) => self.tiles::<2, 1>(a, x.length, at.x_step, taps, w),
                        (false, 2) => self.tiles::<1, 2>(a, x.length, at.x_step, taps, w),
                        (false, _) => self.tiles::<1, 1>(a, x.length, at.x_step, taps, w),
                    };
                    store(&sums, bias, before * UNIT, units, self.cout, first, now, at);
                }
                first += now;
            }
        }
        // SAFETY: leaves the tiles unused, which makes switching threads cheap again.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) }
    }

    /// `[2 · ROWS][2 · UNIT]` sums of `P` tiles of pixels and `U` of outputs.
    ///
    /// # Safety
    /// Tiles are configured; `a` is readable for `P · ROWS` pixels at every tap and part, `w` is a panel of `U` units.
    unsafe fn tiles<const P: usize, const U: usize>(
        &self,
        a: *const u16,
        part: usize,
        step: usize,
        taps: &[usize],
        mut w: *const u16,
    ) -> Sums {
        macro_rules! tile {
            ($op:literal) => {
                asm!($op, options(nostack, nomem, preserves_flags))
            };
            ($op:literal, $at:expr, $step:expr) => {
                asm!($op, in(reg) $at, in(reg) $step, options(nostack, preserves_flags))
            };
        }
        let mut sums = Sums([[0.0; 2 * UNIT]; 2 * ROWS]);
        // SAFETY: as promised by the caller.
        unsafe {
            tile!("tilezero tmm0");
            tile!("tilezero tmm1");
            tile!("tilezero tmm2");
            tile!("tilezero tmm3");
            for &tap in taps {
                for depth in (0..self.cin).step_by(DEPTH) {
                    let x = a.add(tap + depth);
                    for b in 0..self.parts {
                        let tile = w.add(b * U * TILE);
                        tile!("tileloadd tmm6, [{} + {}*1]", tile, 64usize);
                        if U == 2 {
                            tile!("tileloadd tmm7, [{} + {}*1]", tile.add(TILE), 64usize);
                        }
                        // Products below the last bit of f32 are left out.
                        for i in 0..self.parts - b {
                            let x = x.add(i * part);
                            tile!("tileloadd tmm4, [{} + {}*1]", x, step * 2);
                            tile!("tdpbf16ps tmm0, tmm4, tmm6");
                            if U == 2 {
                                tile!("tdpbf16ps tmm1, tmm4, tmm7");
                            }
                            if P == 2 {
                                tile!("tileloadd tmm5, [{} + {}*1]", x.add(ROWS * step), step * 2);
                                tile!("tdpbf16ps tmm2, tmm5, tmm6");
                                if U == 2 {
                                    tile!("tdpbf16ps tmm3, tmm5, tmm7");
                                }
                            }
                        }
                    }
                    w = w.add(self.parts * U * TILE);
                }
            }
            let (to, across) = (sums.0.as_mut_ptr().cast::<f32>(), 2 * UNIT * 4);
            tile!("tilestored [{} + {}*1], tmm0", to, across);
            if U == 2 {
                tile!("tilestored [{} + {}*1], tmm1", to.add(UNIT), across);
            }
            if P == 2 {
                tile!("tilestored [{} + {}*1], tmm2", to.add(ROWS * 2 * UNIT), across);
                if U == 2 {
                    tile!("tilestored [{} + {}*1], tmm3", to.add(ROWS * 2 * UNIT + UNIT), across);
                }
            }
        }
        sums
    }
}

#[repr(align(64))]
struct Sums([[f32; 2 * UNIT]; 2 * ROWS]);

/// Bias, residual and ReLU on the way to memory.
///
/// # Safety
/// As [`Matrix::stretch`].
#[allow(clippy::too_many_arguments)]
#[target_feature(enable = "avx512f")]
unsafe fn store(
    sums: &Sums,
    bias: &[f32],
    channel: usize,
    units: usize,
    cout: usize,
    first: usize,
    pixels: usize,
    at: &Stretch,
) {
    let zero = _mm512_setzero_ps();
    for u in 0..units {
        let c = channel + u * UNIT;
        let exist = UNIT.min(cout - c);
        let mask: __mmask16 = 0xffffu16 >> (UNIT - exist);
        // SAFETY: masked lanes are not touched; the rest is promised by the caller.
        unsafe {
            let bias = _mm512_loadu_ps(bias[c..c + UNIT].as_ptr());
            for (p, row) in sums.0.iter().enumerate().take(pixels) {
                let pixel = first + p;
                let mut v = _mm512_add_ps(_mm512_load_ps(row.as_ptr().add(u * UNIT)), bias);
                if !at.residual.is_null() {
                    let residual = at.residual.add(pixel * at.residual_step + c);
                    v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, residual));
                }
                if !at.raw.is_null() {
                    _mm512_mask_storeu_ps(at.raw.add(pixel * at.raw_step + c), mask, v);
                }
                if !at.relu.is_null() {
                    _mm512_mask_storeu_ps(at.relu.add(pixel * at.relu_step + c), mask, _mm512_max_ps(v, zero));
                }
            }
        }
    }
}
