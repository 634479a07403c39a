//! Convolution on the CPU, f32, channels last: weights packed once, input read in place (no im2col), bias, residual
//! and ReLU in the epilogue. 1×1 convolutions and linear layers are the same loop with one tap.

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::{
    Pool,
    tile::{Isa, Tile, UNIT},
};
use crate::model::{Error, Result};

/// Images as `[n][height + 2·border][width + 2·border][channels]`; the border is zero and stays zero.
#[derive(Clone, Debug)]
pub struct Plane {
    pub n: usize,
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    pub border: usize,
    data: Vec<f32>,
}

impl Plane {
    pub fn zeros(n: usize, height: usize, width: usize, channels: usize, border: usize) -> Plane {
        let len = n * (height + 2 * border) * (width + 2 * border) * channels;
        Plane { n, height, width, channels, border, data: vec![0.0; len] }
    }

    /// Offset of a pixel's first channel.
    fn at(&self, n: usize, y: usize, x: usize) -> usize {
        let (h, w) = (self.height + 2 * self.border, self.width + 2 * self.border);
        ((n * h + y + self.border) * w + x + self.border) * self.channels
    }

    /// The channels of a pixel.
    pub fn pixel(&self, n: usize, y: usize, x: usize) -> &[f32] {
        let at = self.at(n, y, x);
        &self.data[at..at + self.channels]
    }
    pub fn pixel_mut(&mut self, n: usize, y: usize, x: usize) -> &mut [f32] {
        let at = self.at(n, y, x);
        &mut self.data[at..at + self.channels]
    }
    /// A row without its border: `[width][channels]`.
    pub fn row(&self, n: usize, y: usize) -> &[f32] {
        let at = self.at(n, y, 0);
        &self.data[at..at + self.width * self.channels]
    }
    pub fn row_mut(&mut self, n: usize, y: usize) -> &mut [f32] {
        let at = self.at(n, y, 0);
        &mut self.data[at..at + self.width * self.channels]
    }

    fn row_step(&self) -> usize {
        (self.width + 2 * self.border) * self.channels
    }
}

/// Where a convolution's result goes; each is optional.
#[derive(Default)]
pub struct Output<'a> {
    /// Added to the result first.
    pub residual: Option<&'a Plane>,
    pub raw: Option<&'a mut Plane>,
    /// The result after ReLU, written to the channels from `relu_channel` on (so that two may share a plane).
    pub relu: Option<&'a mut Plane>,
    pub relu_channel: usize,
}

/// A matrix `[out][tap][in]` packed for the innermost loop.
pub struct Packed {
    isa: Isa,
    cin: usize,
    cout: usize,
    taps: usize,
    /// Sizes of the panels in units.
    panels: Vec<usize>,
    /// Panel after panel: `[tap][cin][units · UNIT]`.
    weight: Vec<f32>,
    bias: Vec<f32>,
    /// Instead of `weight`, for [`Isa::Amx`].
    #[cfg(target_arch = "x86_64")]
    tiles: Option<amx::Matrix>,
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
    unsafe fn stretch(&self, taps: &[usize], pixels: usize, at: &Stretch) {
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

/// Rows of a picture in one part, where rows share work.
#[cfg(target_arch = "x86_64")]
const STRIP: usize = 4;

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
struct Pointer(*mut f32);
// SAFETY: see above.
unsafe impl Sync for Pointer {}
impl Pointer {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

/// A 2-D convolution with zero padding `kernel / 2`, weights `[out][in][kernel][kernel]`.
pub struct Conv {
    packed: Packed,
    kernel: usize,
    stride: usize,
}

impl Conv {
    /// `order[o]` names the channel of `weight` that becomes output `o`: a pixel shuffle costs nothing this way.
    pub fn new(
        isa: Isa,
        weight: &[f32],
        bias: &[f32],
        shape: [usize; 3],
        stride: usize,
        order: Option<&[usize]>,
    ) -> Result<Conv> {
        let [cout, cin, kernel] = shape;
        let permutation = order.is_none_or(|o| o.len() == cout && o.iter().all(|&c| c < cout));
        if weight.len() != cout * cin * kernel * kernel || bias.len() != cout || kernel % 2 == 0 || !permutation {
            let (w, b) = (weight.len(), bias.len());
            return Err(Error::Config(format!("a convolution of {shape:?} does not fit {w} weights and {b} biases")));
        }
        let from = |o: usize| order.map_or(o, |order| order[o]);
        let bias: Vec<f32> = (0..cout).map(|o| bias[from(o)]).collect();
        let packed = Packed::new(isa, cout, kernel * kernel, cin, Some(&bias), |o, tap, i| {
            weight[(from(o) * cin + i) * kernel * kernel + tap]
        });
        Ok(Conv { packed, kernel, stride })
    }

    pub fn outputs(&self) -> usize {
        self.packed.cout
    }

    /// Size of the result for an input of `size` (height or width).
    pub fn extent(&self, size: usize) -> usize {
        (size - 1) / self.stride + 1
    }

    /// Convolves; the work is split by rows, which does not change the result. Panics if planes do not fit: their
    /// sizes are fixed by the model, not by input.
    pub fn run(&self, pool: &Pool, x: &Plane, out: Output) {
        let reach = self.kernel / 2;
        assert!(x.channels == self.packed.cin && x.border >= reach, "input of a convolution");
        let (height, width) = (self.extent(x.height), self.extent(x.width));
        let fits = |p: &Plane, room: usize| (p.n, p.height, p.width) == (x.n, height, width) && room >= self.outputs();
        let Output { residual, raw, relu, relu_channel } = out;
        assert!(residual.is_none_or(|p| fits(p, p.channels)), "residual of a convolution");
        assert!(raw.as_ref().is_none_or(|p| fits(p, p.channels)), "output of a convolution");
        assert!(relu.as_ref().is_none_or(|p| fits(p, p.channels.saturating_sub(relu_channel))), "ReLU output");
        let taps: Vec<usize> = (0..self.kernel * self.kernel)
            .map(|t| (t / self.kernel) * x.row_step() + (t % self.kernel) * x.channels)
            .collect();
        // A moved-out description of each output: pointer and geometry.
        let describe = |p: Option<&mut Plane>| {
            p.map(|p| {
                let shape = Plane { data: Vec::new(), ..*p };
                (Pointer(p.data.as_mut_ptr()), shape)
            })
        };
        let (raw, relu) = (describe(raw), describe(relu));
        let place = |to: &Option<(Pointer, Plane)>, n: usize, y: usize, channel: usize| match to {
            Some((p, shape)) => (p.get().wrapping_add(shape.at(n, y, 0) + channel), shape.channels),
            None => (std::ptr::null_mut(), 0),
        };
        let row = |n: usize, y: usize| {
            let (raw, raw_step) = place(&raw, n, y, 0);
            let (relu, relu_step) = place(&relu, n, y, relu_channel);
            let from = (x.at(n, y * self.stride, 0) - reach * x.row_step()) - reach * x.channels;
            let at = Stretch {
                x: x.data[from..].as_ptr(),
                x_step: self.stride * x.channels,
                residual: residual.map_or(std::ptr::null(), |p| p.row(n, y).as_ptr()),
                residual_step: residual.map_or(0, |p| p.channels),
                raw,
                raw_step,
                relu,
                relu_step,
            };
            (from, at)
        };
        #[cfg(target_arch = "x86_64")]
        if let Some(tiles) = &self.packed.tiles {
            // Rows share the cut of their inputs: a kernel of three sees each row three times.
            let strips = height.div_ceil(STRIP);
            let last = taps.last().map_or(0, |t| t + x.channels);
            return pool.run(x.n * strips, |part| {
                let (n, first) = (part / strips, part % strips * STRIP);
                let end = height.min(first + STRIP);
                let (begin, _) = row(n, first);
                let (from, at) = row(n, end - 1);
                let x =
                    amx::Split::new(&x.data[begin..from + (width - 1) * at.x_step + last], at.x_step, tiles.parts());
                for y in first..end {
                    let (from, at) = row(n, y);
                    let panels = &self.packed.panels;
                    // SAFETY: as below.
                    unsafe {
                        let bias = &self.packed.bias;
                        tiles.stretch(panels, 0..panels.len(), bias, &taps, &x, from - begin, width, &at);
                    }
                }
            });
        }
        pool.run(x.n * height, |part| {
            let (_, at) = row(part / height, part % height);
            // SAFETY: the planes were checked to fit, the border holds every tap, and each part writes its own row of
            // planes that this call borrows exclusively.
            unsafe { self.packed.stretch(&taps, width, &at) }
        });
    }
}

/// The plain twin of [`Conv::run`], for tests: `[out]` at each output pixel, in f64.
pub fn conv_plain(x: &Plane, weight: &[f32], bias: &[f32], shape: [usize; 3], stride: usize) -> Vec<Vec<f64>> {
    let [cout, cin, kernel] = shape;
    let reach = (kernel / 2) as isize;
    let mut all = Vec::new();
    for n in 0..x.n {
        for y in (0..x.height).step_by(stride) {
            for px in (0..x.width).step_by(stride) {
                let mut sums: Vec<f64> = bias.iter().map(|&b| f64::from(b)).collect();
                for ky in 0..kernel {
                    for kx in 0..kernel {
                        let (sy, sx) = (y as isize + ky as isize - reach, px as isize + kx as isize - reach);
                        if sy < 0 || sx < 0 || sy >= x.height as isize || sx >= x.width as isize {
                            continue;
                        }
                        let pixel = x.pixel(n, sy as usize, sx as usize);
                        for o in 0..cout {
                            for (i, v) in pixel.iter().enumerate() {
                                let w = weight[((o * cin + i) * kernel + ky) * kernel + kx];
                                sums[o] += f64::from(w) * f64::from(*v);
                            }
                        }
                    }
                }
                all.push(sums);
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small deterministic generator: values in −1..1.
    struct Lcg(u64);
    impl Lcg {
        fn next(&mut self) -> f32 {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
        }
        fn below(&mut self, n: usize) -> usize {
            ((self.next() + 1.0) * 0.5 * n as f32) as usize % n
        }
        fn many(&mut self, n: usize) -> Vec<f32> {
            (0..n).map(|_| self.next()).collect()
        }
    }

    fn random_plane(r: &mut Lcg, n: usize, h: usize, w: usize, c: usize, border: usize) -> Plane {
        let mut p = Plane::zeros(n, h, w, c, border);
        for i in 0..n {
            for y in 0..h {
                p.row_mut(i, y).iter_mut().for_each(|v| *v = r.next());
            }
        }
        p
    }

    #[test]
    fn odd_sizes_agree_with_the_plain_twin_on_every_instruction_set() {
        let mut r = Lcg(5);
        for case in 0..60 {
            let kernel = [1, 3, 5][case % 3];
            let stride = 1 + r.below(2);
            let (n, h, w) = (1 + r.below(3), 1 + r.below(11), 1 + r.below(27));
            let (cin, cout) = (1 + r.below(21), 1 + r.below(120));
            let shape = [cout, cin, kernel];
            let (weight, bias) = (r.many(cout * cin * kernel * kernel), r.many(cout));
            let x = random_plane(&mut r, n, h, w, cin, 2);
            let expected = conv_plain(&x, &weight, &bias, shape, stride);
            let (oh, ow) = (h.div_ceil(stride), w.div_ceil(stride));
            let residual = random_plane(&mut r, n, oh, ow, cout, 0);
            for isa in Isa::everything() {
                let conv = Conv::new(isa, &weight, &bias, shape, stride, None).unwrap();
                for threads in [1, 3] {
                    let pool = Pool::new(threads);
                    let mut raw = Plane::zeros(n, oh, ow, cout, 0);
                    let mut relu = Plane::zeros(n, oh, ow, cout + 5, 1);
                    conv.run(
                        &pool,
                        &x,
                        Output {
                            residual: Some(&residual),
                            raw: Some(&mut raw),
                            relu: Some(&mut relu),
                            relu_channel: 3,
                        },
                    );
                    for (i, sums) in expected.iter().enumerate() {
                        let (n, y, px) = (i / (oh * ow), i / ow % oh, i % ow);
                        for (o, sum) in sums.iter().enumerate() {
                            let want = sum + f64::from(residual.pixel(n, y, px)[o]);
                            let got = raw.pixel(n, y, px)[o];
                            let bound = (1e-5 + isa.error()) * (cin * kernel * kernel) as f64;
                            assert!((f64::from(got) - want).abs() < bound, "{isa:?} {shape:?}: {got} {want}");
                            assert_eq!(relu.pixel(n, y, px)[o + 3], got.max(0.0));
                        }
                        let beside = relu.pixel(n, y, px);
                        assert!(beside[..3].iter().chain(&beside[cout + 3..]).all(|v| *v == 0.0), "neighbours");
                    }
                    assert!(relu.data.iter().zip(0..).all(|(v, i)| {
                        let (y, px) = (i / relu.row_step() % (oh + 2), i / relu.channels % (ow + 2));
                        *v == 0.0 || (y > 0 && y <= oh && px > 0 && px <= ow)
                    }));
                }
            }
        }
    }

    #[test]
    fn instruction_sets_with_fused_products_agree_bit_for_bit() {
        let mut r = Lcg(9);
        let shape = [112, 33, 3];
        let (weight, bias) = (r.many(112 * 33 * 9), r.many(112));
        let x = random_plane(&mut r, 1, 7, 19, 33, 1);
        let mut seen: Option<Plane> = None;
        let fused = |isa: &Isa| *isa != Isa::Portable || cfg!(target_arch = "aarch64");
        for isa in Isa::available().into_iter().filter(fused) {
            let mut raw = Plane::zeros(1, 7, 19, 112, 0);
            let conv = Conv::new(isa, &weight, &bias, shape, 1, None).unwrap();
            conv.run(&Pool::new(2), &x, Output { raw: Some(&mut raw), ..Output::default() });
            if let Some(other) = &seen {
                assert!(other.data == raw.data, "{isa:?}");
            }
            seen = Some(raw);
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

    #[test]
    fn weights_that_do_not_fit_are_an_error() {
        assert!(Conv::new(Isa::best(), &[0.0; 8], &[0.0; 2], [2, 4, 3], 1, None).is_err());
        assert!(Conv::new(Isa::best(), &[0.0; 8], &[0.0; 2], [2, 4, 1], 1, Some(&[0, 7])).is_err());
    }
}
