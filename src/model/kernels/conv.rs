//! Convolution on the CPU, f32, channels last: weights [packed](Packed) once, input read in place (no im2col), bias,
//! residual and ReLU in the epilogue. 1×1 convolutions are the same loop with one tap.

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::{
    Isa, Pool,
    packed::{Packed, Pointer, Stretch},
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

/// Rows of a picture in one part, where rows share work.
#[cfg(target_arch = "x86_64")]
const STRIP: usize = 4;

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
        self.packed.outputs()
    }

    /// Size of the result for an input of `size` (height or width).
    pub fn extent(&self, size: usize) -> usize {
        (size - 1) / self.stride + 1
    }

    /// Convolves; the work is split by rows, which does not change the result. Panics if planes do not fit: their
    /// sizes are fixed by the model, not by input.
    pub fn run(&self, pool: &Pool, x: &Plane, out: Output) {
        let reach = self.kernel / 2;
        assert!(x.channels == self.packed.inputs() && x.border >= reach, "input of a convolution");
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
    use super::{super::packed::tests::Lcg, *};

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
    fn weights_that_do_not_fit_are_an_error() {
        assert!(Conv::new(Isa::best(), &[0.0; 8], &[0.0; 2], [2, 4, 3], 1, None).is_err());
        assert!(Conv::new(Isa::best(), &[0.0; 8], &[0.0; 2], [2, 4, 1], 1, Some(&[0, 7])).is_err());
    }
}
