//! The pocket autoencoder (`vae: "patch"`): 4 frames of RGB ↔ one latent of 16 channels at an eighth of the size.
//!
//! Convolutions over pixel-unshuffled patches, ReLU, residual blocks; the decoder remembers one latent, which is all
//! that joins consecutive blocks. Latents have mean 0 and deviation 1 per channel. Everything runs channels-last on
//! [`kernels`](crate::model::kernels); pixel shuffles are folded into the order of a convolution's outputs.

use crate::model::{
    Result,
    kernels::{Conv, Isa, Output, Plane, Pool},
    weights::Weights,
};
use std::sync::Arc;

/// Channels of a latent.
pub const LATENT: usize = 16;
/// Frames in a latent.
pub const FRAMES: usize = 4;
/// Pixels in a latent's cell, in each direction.
pub const CELL: usize = 8;

const ENCODER: [usize; 2] = [96, 192];
const DECODER: [usize; 2] = [112, 32];

/// `x + b(relu(a(relu x)))`.
struct Residual {
    a: Conv,
    b: Conv,
}

/// A convolution of shape `[out, in, kernel]` as it is stored.
pub(super) fn conv(w: &Weights, isa: Isa, shape: [usize; 3], stride: usize, order: Option<&[usize]>) -> Result<Conv> {
    let [cout, cin, k] = shape;
    let weight = w.get((cout, cin, k, k), "weight")?.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
    let bias = w.get(cout, "bias")?.contiguous()?.to_vec1::<f32>()?;
    Conv::new(isa, &weight, &bias, shape, stride, order)
}

impl Residual {
    fn load(w: &Weights, isa: Isa, cin: usize, channels: usize) -> Result<Residual> {
        Ok(Residual {
            a: conv(&w.pp("a"), isa, [channels, cin, 3], 1, None)?,
            b: conv(&w.pp("b"), isa, [channels, channels, 3], 1, None)?,
        })
    }

    /// `relu_x` is read and then replaced by the result's ReLU; `between` is working space.
    fn run(&self, pool: &Pool, x: &Plane, relu_x: &mut Plane, between: &mut Plane, raw: Option<&mut Plane>) {
        self.a.run(pool, relu_x, Output { relu: Some(between), ..Output::default() });
        self.b.run(pool, between, Output { residual: Some(x), raw, relu: Some(relu_x), ..Output::default() });
    }
}

/// Pixels to latent.
pub struct Encoder {
    conv_in: Conv,
    res1: Residual,
    down: Conv,
    res2: Residual,
    res3: Residual,
    conv_out: Conv,
}

impl Encoder {
    /// `w` stands at `vae.encoder`.
    pub fn load(w: &Weights, isa: Isa) -> Result<Encoder> {
        let [a, b] = ENCODER;
        Ok(Encoder {
            conv_in: conv(&w.pp("conv_in"), isa, [a, FRAMES * 48, 3], 1, None)?,
            res1: Residual::load(&w.pp("res1"), isa, a, a)?,
            down: conv(&w.pp("down"), isa, [b, a, 3], 2, None)?,
            res2: Residual::load(&w.pp("res2"), isa, b, b)?,
            res3: Residual::load(&w.pp("res3"), isa, b, b)?,
            conv_out: conv(&w.pp("conv_out"), isa, [LATENT, b, 1], 1, None)?,
        })
    }

    /// Four frames as packed RGB bytes of `width × height` (multiples of 8) → latent `[16][height/8][width/8]`.
    /// Panics if a frame has another size.
    pub fn encode(&self, pool: &Pool, frames: [&[u8]; FRAMES], width: usize, height: usize) -> Vec<f32> {
        assert!(width % CELL == 0 && height % CELL == 0 && frames.iter().all(|f| f.len() == 3 * width * height));
        let (h, w) = (height / 4, width / 4);
        let [a, b] = ENCODER;
        let mut x = Plane::zeros(1, h, w, FRAMES * 48, 1);
        for (f, frame) in frames.iter().enumerate() {
            for y in 0..height {
                for px in 0..width {
                    for c in 0..3 {
                        let value = f32::from(frame[3 * (y * width + px) + c]) / 127.5 - 1.0;
                        x.pixel_mut(0, y / 4, px / 4)[f * 48 + c * 16 + (y % 4) * 4 + px % 4] = value;
                    }
                }
            }
        }
        let (mut raw, mut relu) = (Plane::zeros(1, h, w, a, 0), Plane::zeros(1, h, w, a, 1));
        let (mut raw1, mut between) = (raw.clone(), relu.clone());
        self.conv_in.run(pool, &x, Output { raw: Some(&mut raw), relu: Some(&mut relu), ..Output::default() });
        self.res1.run(pool, &raw, &mut relu, &mut between, Some(&mut raw1));
        let (h, w) = (h / 2, w / 2);
        // The shortcut around `down`: 2×2 pixels unshuffled, channels averaged in pairs, times √2.
        let mut shortcut = Plane::zeros(1, h, w, b, 0);
        for y in 0..h {
            for px in 0..w {
                for o in 0..b {
                    let row = 2 * y + o % 2;
                    let pair = raw1.pixel(0, row, 2 * px)[o / 2] + raw1.pixel(0, row, 2 * px + 1)[o / 2];
                    shortcut.pixel_mut(0, y, px)[o] = pair * 0.5 * std::f32::consts::SQRT_2;
                }
            }
        }
        let (mut x0, mut x1) = (Plane::zeros(1, h, w, b, 0), Plane::zeros(1, h, w, b, 0));
        let (mut relu2, mut between) = (Plane::zeros(1, h, w, b, 1), Plane::zeros(1, h, w, b, 1));
        let out = Output { residual: Some(&shortcut), raw: Some(&mut x0), relu: Some(&mut relu2), relu_channel: 0 };
        self.down.run(pool, &relu, out);
        self.res2.run(pool, &x0, &mut relu2, &mut between, Some(&mut x1));
        self.res3.run(pool, &x1, &mut relu2, &mut between, None);
        let mut z = Plane::zeros(1, h, w, LATENT, 0);
        self.conv_out.run(pool, &relu2, Output { raw: Some(&mut z), ..Output::default() });
        (0..LATENT * h * w).map(|i| z.pixel(0, i / w % h, i % w)[i / (h * w)]).collect()
    }
}

/// Latent to pixels, one latent at a time.
pub struct Decoder {
    conv_in: Conv,
    mem: Residual,
    res1: Residual,
    res2: Residual,
    up: Conv,
    res3: Residual,
    res4: Residual,
    conv_out: Conv,
}

/// What a decoder remembers of one stream, with its working space.
pub struct Memory {
    z: Plane,
    /// The last latent's features in the upper half of the channels; zero at the start.
    pair: Plane,
    wide: [Plane; 2],
    wide_relu: [Plane; 2],
    up: Plane,
    fine: [Plane; 2],
    fine_relu: [Plane; 2],
    out: Plane,
}

impl Memory {
    /// For latents of `height × width` cells.
    pub fn new(height: usize, width: usize) -> Memory {
        let [a, c] = DECODER;
        let wide = || Plane::zeros(1, height, width, a, 0);
        let fine = |border| Plane::zeros(FRAMES, 2 * height, 2 * width, c, border);
        let wide_relu = || Plane::zeros(1, height, width, a, 1);
        Memory {
            z: Plane::zeros(1, height, width, LATENT, 1),
            pair: Plane::zeros(1, height, width, 2 * a, 1),
            wide: [wide(), wide()],
            wide_relu: [wide_relu(), wide_relu()],
            up: Plane::zeros(1, height, width, 16 * c, 0),
            fine: [fine(0), fine(0)],
            fine_relu: [fine(1), fine(1)],
            out: Plane::zeros(FRAMES, 2 * height, 2 * width, 48, 0),
        }
    }
}

impl Memory {
    /// What the last latent looked like just before it became pixels: coarse `[h][w][112]` and fine
    /// `[4][2h][2w][32]`, both after ReLU. For heads that read more than colours.
    pub(super) fn features(&self) -> (&Plane, &Plane) {
        (&self.wide_relu[0], &self.fine_relu[0])
    }
}

impl Decoder {
    /// `w` stands at `vae.decoder`.
    pub fn load(w: &Weights, isa: Isa) -> Result<Decoder> {
        let [a, c] = DECODER;
        // Stored as (frame, channel, row, column): asked for as (frame, row, column, channel).
        let up: Vec<usize> = (0..16 * c).map(|o| o / (4 * c) * 4 * c + o % c * 4 + o / c % 4).collect();
        // Stored as (channel, row, column): asked for as (row, column, channel).
        let rgb: Vec<usize> = (0..48).map(|o| o % 3 * 16 + o / 3).collect();
        Ok(Decoder {
            conv_in: conv(&w.pp("conv_in"), isa, [a, LATENT, 3], 1, None)?,
            mem: Residual::load(&w.pp("mem"), isa, 2 * a, a)?,
            res1: Residual::load(&w.pp("res1"), isa, a, a)?,
            res2: Residual::load(&w.pp("res2"), isa, a, a)?,
            up: conv(&w.pp("up"), isa, [16 * c, a, 1], 1, Some(&up))?,
            res3: Residual::load(&w.pp("res3"), isa, c, c)?,
            res4: Residual::load(&w.pp("res4"), isa, c, c)?,
            conv_out: conv(&w.pp("conv_out"), isa, [48, c, 3], 1, Some(&rgb))?,
        })
    }

    /// The next latent `[16][h][w]` → four frames of packed RGB bytes, `8h × 8w`. Values that are not numbers become
    /// black. Panics if `z` has another size than `memory`.
    pub fn decode(&self, pool: &Pool, z: &[f32], memory: &mut Memory) -> [Arc<[u8]>; FRAMES] {
        let m = memory;
        let (h, w) = (m.z.height, m.z.width);
        let [a, c] = DECODER;
        assert_eq!(z.len(), LATENT * h * w, "latent");
        for (i, &v) in z.iter().enumerate() {
            m.z.pixel_mut(0, i / w % h, i % w)[i / (h * w)] = v;
        }
        let [x0, x1] = &mut m.wide;
        let [r0, r1] = &mut m.wide_relu;
        let out = Output { raw: Some(x0), relu: Some(&mut m.pair), ..Output::default() };
        self.conv_in.run(pool, &m.z, out);
        self.mem.a.run(pool, &m.pair, Output { relu: Some(r1), ..Output::default() });
        for y in 0..h {
            for pixel in m.pair.row_mut(0, y).chunks_exact_mut(2 * a) {
                pixel.copy_within(..a, a);
            }
        }
        let out = Output { residual: Some(x0), raw: Some(x1), relu: Some(r0), ..Output::default() };
        self.mem.b.run(pool, r1, out);
        self.res1.run(pool, x1, r0, r1, Some(x0));
        self.res2.run(pool, x0, r0, r1, None);
        self.up.run(pool, r0, Output { raw: Some(&mut m.up), ..Output::default() });
        let [f0, f1] = &mut m.fine;
        let [s0, s1] = &mut m.fine_relu;
        for f in 0..FRAMES {
            for y in 0..2 * h {
                let from = m.up.row(0, y / 2);
                let group = (f * 2 + y % 2) * 2 * c;
                for (x, (to, relu)) in
                    f0.row_mut(f, y).chunks_exact_mut(2 * c).zip(s0.row_mut(f, y).chunks_exact_mut(2 * c)).enumerate()
                {
                    // Two neighbouring pixels lie side by side, here as there.
                    let pair = &from[x * 16 * c + group..][..2 * c];
                    to.copy_from_slice(pair);
                    relu.iter_mut().zip(pair).for_each(|(r, v)| *r = v.max(0.0));
                }
            }
        }
        self.res3.run(pool, f0, s0, s1, Some(f1));
        self.res4.run(pool, f1, s0, s1, None);
        self.conv_out.run(pool, s0, Output { raw: Some(&mut m.out), ..Output::default() });
        std::array::from_fn(|f| {
            let mut rgb = Vec::with_capacity(3 * 64 * h * w);
            for y in 0..CELL * h {
                for pixel in m.out.row(f, y / 4).chunks_exact(48) {
                    let part = &pixel[y % 4 * 12..][..12];
                    // `as` cuts off the fraction, saturates, and turns what is not a number into 0.
                    rgb.extend(part.iter().map(|v| (v * 127.5 + 128.0) as u8));
                }
            }
            rgb.into()
        })
    }
}
