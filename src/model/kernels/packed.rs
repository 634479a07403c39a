//! Matrices packed for the CPU's innermost loop ([`Tile`]), f32, and the linear layers and one-dimensional convolutions
//! that they are by themselves; `conv.rs` makes two-dimensional ones of them.

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::{
    Pool,
    tile::{Isa, Tile, UNIT},
};

/// A matrix `[out][tap][in]` packed for the innermost loop.
pub struct Packed {
    isa: Isa,
    cin: usize,
    cout: usize,
    taps: usize,
    /// Sizes of the panels in units.
    pub(super) panels: Vec<usize>,
    /// Panel after panel: `[tap][cin][units · UNIT]`.
    weight: Vec<f32>,
    pub(super) bias: Vec<f32>,
    /// Instead of `weight`, for [`Isa::Amx`].
    #[cfg(target_arch = "x86_64")]
    pub(super) tiles: Option<amx::Matrix>,
}

impl Packed {
    /// `weight(o, tap, i)` is asked once for each element.
    pub fn new(
        isa: Isa,
        cout: usize,
        taps: usize,
        cin: usize,
        bias: Option<&[f32]>,
        weight: impl Fn(usize, usize, usize) -> f32,
    ) -> Packed {
        let units = cout.div_ceil(UNIT);
        let panels = isa.panels(units);
        let mut padded = vec![0.0; units * UNIT];
        if let Some(bias) = bias {
            padded[..cout].copy_from_slice(&bias[..cout]);
        }
        #[cfg(target_arch = "x86_64")]
        if let Isa::Amx(parts) = isa {
            let tiles = Some(amx::Matrix::new(cout, taps, cin, &panels, parts, weight));
            return Packed { isa, cin, cout, taps, panels, weight: Vec::new(), bias: padded, tiles };
        }
        let mut packed = Vec::with_capacity(units * UNIT * taps * cin);
        let mut first = 0;
        for &panel in &panels {
            for tap in 0..taps {
                for i in 0..cin {
                    packed
                        .extend((first..first + panel * UNIT).map(|o| if o < cout { weight(o, tap, i) } else { 0.0 }));
                }
            }
            first += panel * UNIT;
        }
        Packed {
            isa,
            cin,
            cout,
            taps,
            panels,
            weight: packed,
            bias: padded,
            #[cfg(target_arch = "x86_64")]
            tiles: None,
        }
    }

    /// One tap, from `cout` rows of `cin` inputs that stand `step` apart: keys, as attention has them.
    pub fn of_rows(isa: Isa, rows: &[f32], step: usize, cout: usize, cin: usize) -> Packed {
        let mut packed = Self::blank(isa, cout, cin);
        let (mut first, mut rest) = (0, &mut packed.weight[..]);
        for &panel in &packed.panels {
            let width = panel * UNIT;
            let (now, later) = rest.split_at_mut(width * cin);
            for o in 0..width.min(cout - first) {
                let row = &rows[(first + o) * step..][..cin];
                now.chunks_exact_mut(width).zip(row).for_each(|(to, v)| to[o] = *v);
            }
            (first, rest) = (first + width, later);
        }
        packed
    }

    /// One tap, from `cin` rows of `cout` outputs that stand `step` apart: values, as attention has them.
    pub fn of_columns(isa: Isa, columns: &[f32], step: usize, cout: usize, cin: usize) -> Packed {
        let mut packed = Self::blank(isa, cout, cin);
        let (mut first, mut rest) = (0, &mut packed.weight[..]);
        for &panel in &packed.panels {
            let width = panel * UNIT;
            let (now, later) = rest.split_at_mut(width * cin);
            let n = width.min(cout - first);
            for (i, to) in now.chunks_exact_mut(width).enumerate() {
                to[..n].copy_from_slice(&columns[i * step + first..][..n]);
            }
            (first, rest) = (first + width, later);
        }
        packed
    }

    fn blank(isa: Isa, cout: usize, cin: usize) -> Packed {
        #[cfg(target_arch = "x86_64")]
        assert!(!matches!(isa, Isa::Amx(_)), "passing matrices are not packed for tiles");
        let units = cout.div_ceil(UNIT);
        let (weight, bias) = (vec![0.0; units * UNIT * cin], vec![0.0; units * UNIT]);
        Packed {
            isa,
            cin,
            cout,
            taps: 1,
            panels: isa.panels(units),
            weight,
            bias,
            #[cfg(target_arch = "x86_64")]
            tiles: None,
        }
    }

    pub fn outputs(&self) -> usize {
        self.cout
    }
    /// Inputs of one tap.
    pub fn inputs(&self) -> usize {
        self.cin
    }

    /// One stretch of pixels through every panel.
    ///
    /// # Safety
    /// As [`Tile::compute`] for each of `pixels` pixels and all channels; `taps` has as many offsets as the packing.
    pub(super) unsafe fn stretch(&self, taps: &[usize], pixels: usize, at: &Stretch) {
        for panel in 0..self.panels.len() {
            // SAFETY: as promised by the caller.
            unsafe { self.panel(panel, taps, pixels, at) }
        }
    }

    /// One stretch of pixels through one panel, which stays near while they pass.
    ///
    /// # Safety
    /// As [`Packed::stretch`].
    unsafe fn panel(&self, panel: usize, taps: &[usize], pixels: usize, at: &Stretch) {
        let units = self.panels[panel];
        let first: usize = self.panels[..panel].iter().sum::<usize>() * UNIT;
        let last = if panel + 1 == self.panels.len() { self.cout - (first + (units - 1) * UNIT) } else { UNIT };
        let full = self.isa.pixels();
        let mut p = 0;
        while p < pixels {
            let now = if p + full <= pixels { full } else { 1 };
            // SAFETY: the panel begins after the ones before it; `offset` leaves null pointers alone; the rest is
            // promised by the caller.
            unsafe {
                let tile = Tile {
                    x: at.x.add(p * at.x_step),
                    x_step: at.x_step,
                    taps,
                    cin: self.cin,
                    w: self.weight.as_ptr().add(first * self.taps * self.cin),
                    bias: self.bias.as_ptr().add(first),
                    units,
                    last,
                    residual: offset(at.residual.cast_mut(), p * at.residual_step + first),
                    residual_step: at.residual_step,
                    raw: offset(at.raw, p * at.raw_step + first),
                    raw_step: at.raw_step,
                    relu: offset(at.relu, p * at.relu_step + first),
                    relu_step: at.relu_step,
                };
                tile.compute(self.isa, now);
            }
            p += now;
        }
    }

    /// `rows` results at `out[r·out_step..]` from inputs at `x[r·x_step + tap..]`: a linear layer (one tap, 0) or a
    /// one-dimensional convolution (a tap per kernel position). Panics if a slice is too short.
    pub fn rows(&self, x: &[f32], x_step: usize, taps: &[usize], rows: usize, out: &mut [f32], out_step: usize) {
        if rows == 0 {
            return;
        }
        assert_eq!(taps.len(), self.taps, "taps");
        let reach = taps.iter().max().map_or(0, |t| t + self.cin);
        assert!((rows - 1) * x_step + reach <= x.len(), "the input is too short for {rows} rows");
        assert!(out_step >= self.cout && (rows - 1) * out_step + self.cout <= out.len(), "the output is too short");
        let at = Stretch { x: x.as_ptr(), x_step, raw: out.as_mut_ptr(), raw_step: out_step, ..Stretch::NONE };
        #[cfg(target_arch = "x86_64")]
        if let Some(tiles) = &self.tiles {
            let x = amx::Split::new(&x[..(rows - 1) * x_step + reach], x_step, tiles.parts());
            // SAFETY: the bounds were just checked and `out` is borrowed exclusively.
            return unsafe {
                tiles.stretch(&self.panels, 0..self.panels.len(), &self.bias, taps, &x, 0, rows, &at);
            };
        }
        // SAFETY: the bounds were just checked and `out` is borrowed exclusively.
        unsafe { self.stretch(taps, rows, &at) }
    }

    /// As [`Packed::rows`] for a dense matrix `x` `[rows][in]` → `[rows][out]`, shared out over the pool.
    pub fn linear(&self, pool: &Pool, x: &[f32], rows: usize, out: &mut [f32]) {
        assert_eq!(x.len(), rows * self.cin, "input of a linear layer");
        assert_eq!(out.len(), rows * self.cout, "output of a linear layer");
        // By panels first: each thread then reads only its share of the weights, which is most of what moves.
        let chunks = rows.div_ceil(ROWS);
        let to = Pointer(out.as_mut_ptr());
        #[cfg(target_arch = "x86_64")]
        if let Some(tiles) = &self.tiles {
            // Several panels share the cut of their input.
            let groups = self.panels.len().div_ceil(4);
            return pool.run(groups * chunks, |part| {
                let (group, first) = (part / chunks, part % chunks * ROWS);
                let count = ROWS.min(rows - first);
                let which = group * 4..(group * 4 + 4).min(self.panels.len());
                let raw = to.get().wrapping_add(first * self.cout);
                let at = Stretch { x_step: self.cin, raw, raw_step: self.cout, ..Stretch::NONE };
                let x = amx::Split::new(&x[first * self.cin..][..count * self.cin], self.cin, tiles.parts());
                // SAFETY: sizes were checked above; parts write different rows or channels.
                unsafe { tiles.stretch(&self.panels, which, &self.bias, &[0], &x, 0, count, &at) }
            });
        }
        pool.run(self.panels.len() * chunks, |part| {
            let (panel, first) = (part / chunks, part % chunks * ROWS);
            let at = Stretch {
                // SAFETY: `first` is below `rows`, so both stay inside; parts write different rows or channels.
                x: unsafe { x.as_ptr().add(first * self.cin) },
                x_step: self.cin,
                raw: unsafe { to.get().add(first * self.cout) },
                raw_step: self.cout,
                ..Stretch::NONE
            };
            // SAFETY: sizes were checked above.
            unsafe { self.panel(panel, &[0], ROWS.min(rows - first), &at) }
        });
    }
}

/// Rows of a linear layer in one part.
const ROWS: usize = 64;

/// Moves a pointer unless it is null.
fn offset(p: *mut f32, by: usize) -> *mut f32 {
    if p.is_null() { p } else { p.wrapping_add(by) }
}

/// Inputs and outputs of a stretch of pixels; steps are in floats from pixel to pixel.
pub(super) struct Stretch {
    pub(super) x: *const f32,
    pub(super) x_step: usize,
    pub(super) residual: *const f32,
    pub(super) residual_step: usize,
    pub(super) raw: *mut f32,
    pub(super) raw_step: usize,
    pub(super) relu: *mut f32,
    pub(super) relu_step: usize,
}

impl Stretch {
    const NONE: Stretch = Stretch {
        x: std::ptr::null(),
        x_step: 0,
        residual: std::ptr::null(),
        residual_step: 0,
        raw: std::ptr::null_mut(),
        raw_step: 0,
        relu: std::ptr::null_mut(),
        relu_step: 0,
    };
}

/// A pointer that may cross to the pool's threads; each part writes its own rows.
pub(super) struct Pointer(pub(super) *mut f32);
// SAFETY: see above.
unsafe impl Sync for Pointer {}
impl Pointer {
    pub(super) fn get(&self) -> *mut f32 {
        self.0
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A small deterministic generator: values in −1..1.
    pub(crate) struct Lcg(pub(crate) u64);
    impl Lcg {
        pub(crate) fn next(&mut self) -> f32 {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
        }
        pub(crate) fn below(&mut self, n: usize) -> usize {
            ((self.next() + 1.0) * 0.5 * n as f32) as usize % n
        }
        pub(crate) fn many(&mut self, n: usize) -> Vec<f32> {
            (0..n).map(|_| self.next()).collect()
        }
    }

    #[test]
    fn a_linear_layer_is_a_convolution_with_one_tap() {
        let mut r = Lcg(3);
        for (rows, cin, cout) in [(1, 1, 1), (64, 256, 48), (13, 40, 70)] {
            let (weight, bias, x) = (r.many(cout * cin), r.many(cout), r.many(rows * cin));
            for isa in Isa::available() {
                let packed = Packed::new(isa, cout, 1, cin, Some(&bias), |o, _, i| weight[o * cin + i]);
                let (mut a, mut b) = (vec![0.0; rows * cout], vec![0.0; rows * cout]);
                packed.linear(&Pool::new(2), &x, rows, &mut a);
                packed.rows(&x, cin, &[0], rows, &mut b, cout);
                assert!(a == b);
                for row in 0..rows {
                    for o in 0..cout {
                        let want: f64 = f64::from(bias[o])
                            + (0..cin)
                                .map(|i| f64::from(weight[o * cin + i]) * f64::from(x[row * cin + i]))
                                .sum::<f64>();
                        assert!((f64::from(a[row * cout + o]) - want).abs() < 1e-4);
                    }
                }
            }
        }
    }
}
