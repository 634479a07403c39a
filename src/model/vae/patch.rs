//! The pocket autoencoder (`vae: "patch"`): 4 frames of RGB ↔ one latent of 16 channels.
//!
//! Convolutions over pixel-unshuffled patches, ReLU, residual blocks; the decoder remembers one latent, which is all
//! that joins consecutive blocks. Latents have mean 0 and deviation 1 per channel. Everything runs channels-last on
//! [`kernels`](crate::model::kernels); pixel shuffles are folded into the order of a convolution's outputs.
//!
//! A latent has 32×32 cells whatever the picture's size. The coarse part of the decoder works on all four frames
//! together; the fine part, of which there is one per size, on each frame by itself. So frames are shared out over the
//! pool, and what one frame needs stays near the core that makes it.

use crate::model::{
    Result,
    kernels::{Conv, Isa, Output, Plane, Pool},
    weights::Weights,
};
use std::sync::{Arc, Mutex, MutexGuard};

/// Channels of a latent.
pub const LATENT: usize = 16;
/// Frames in a latent.
pub const FRAMES: usize = 4;
/// Pixels in a cell of the decoder's fine grid, in each direction.
const FINE: usize = 4;

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
    /// Pixels of an input cell in each direction; two of them make a latent's cell.
    cell: usize,
    conv_in: Conv,
    res1: Residual,
    down: Conv,
    res2: Residual,
    res3: Residual,
    conv_out: Conv,
}

impl Encoder {
    /// `w` stands at `vae.encoder`; `cell` is half of the pixels that a latent's cell has in each direction.
    pub fn load(w: &Weights, isa: Isa, cell: usize) -> Result<Encoder> {
        let [a, b] = ENCODER;
        Ok(Encoder {
            cell,
            conv_in: conv(&w.pp("conv_in"), isa, [a, FRAMES * 3 * cell * cell, 3], 1, None)?,
            res1: Residual::load(&w.pp("res1"), isa, a, a)?,
            down: conv(&w.pp("down"), isa, [b, a, 3], 2, None)?,
            res2: Residual::load(&w.pp("res2"), isa, b, b)?,
            res3: Residual::load(&w.pp("res3"), isa, b, b)?,
            conv_out: conv(&w.pp("conv_out"), isa, [LATENT, b, 1], 1, None)?,
        })
    }

    /// Four frames as packed RGB bytes of `width × height` (multiples of two cells) → latent
    /// `[16][height/(2·cell)][width/(2·cell)]`. Panics if a frame has another size.
    pub fn encode(&self, pool: &Pool, frames: [&[u8]; FRAMES], width: usize, height: usize) -> Vec<f32> {
        let n = self.cell;
        let fits = width.is_multiple_of(2 * n) && height.is_multiple_of(2 * n);
        assert!(fits && frames.iter().all(|f| f.len() == 3 * width * height));
        let (h, w) = (height / n, width / n);
        let [a, b] = ENCODER;
        let mut x = Plane::zeros(1, h, w, FRAMES * 3 * n * n, 1);
        for (f, frame) in frames.iter().enumerate() {
            for y in 0..height {
                for px in 0..width {
                    for c in 0..3 {
                        let value = f32::from(frame[3 * (y * width + px) + c]) / 127.5 - 1.0;
                        x.pixel_mut(0, y / n, px / n)[((f * 3 + c) * n + y % n) * n + px % n] = value;
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

/// The fine part of a decoder, as weights files differ in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Where its weights stand below the decoder's; empty = with the others.
    pub name: String,
    /// Fine cells in a latent's cell, in each direction: a picture has `4 · factor` pixels where a latent has one cell.
    pub factor: usize,
    /// Residual blocks.
    pub blocks: usize,
    /// Whether the last convolution also gives the matte.
    pub matte: bool,
}

/// Latent to pixels, one latent at a time.
pub struct Decoder {
    conv_in: Conv,
    mem: Residual,
    res1: Residual,
    res2: Residual,
    factor: usize,
    up: Conv,
    fine: Vec<Residual>,
    conv_out: Conv,
    matte: Option<Conv>,
    /// For what one thread does by itself.
    alone: Arc<Pool>,
}

/// What a decoder remembers of one stream, with its working space.
pub struct Memory {
    z: Plane,
    /// The last latent's features in the upper half of the channels; zero at the start.
    pair: Plane,
    wide: [Plane; 2],
    wide_relu: [Plane; 2],
    up: Plane,
    frames: [Mutex<Bench>; FRAMES],
}

/// Working space of one frame's fine part.
struct Bench {
    raw: [Plane; 2],
    relu: [Plane; 2],
    out: Plane,
}

/// No thread that panicked leaves anything behind that the next latent does not overwrite.
fn bench(frame: &Mutex<Bench>) -> MutexGuard<'_, Bench> {
    frame.lock().unwrap_or_else(|e| e.into_inner())
}

impl Memory {
    /// For latents of `height × width` cells, as `decoder` makes pictures of them.
    pub fn new(decoder: &Decoder, height: usize, width: usize) -> Memory {
        let ([a, c], k) = (DECODER, decoder.factor);
        let wide = || Plane::zeros(1, height, width, a, 0);
        let wide_relu = || Plane::zeros(1, height, width, a, 1);
        let fine = |channels, border| Plane::zeros(1, k * height, k * width, channels, border);
        Memory {
            z: Plane::zeros(1, height, width, LATENT, 1),
            pair: Plane::zeros(1, height, width, 2 * a, 1),
            wide: [wide(), wide()],
            wide_relu: [wide_relu(), wide_relu()],
            up: Plane::zeros(1, height, width, FRAMES * k * k * c, 0),
            frames: std::array::from_fn(|_| {
                Mutex::new(Bench { raw: [fine(c, 0), fine(c, 0)], relu: [fine(c, 1), fine(c, 1)], out: fine(48, 0) })
            }),
        }
    }

    /// What a frame of the last latent looked like just before it became pixels, `[k·h][k·w][32]` after ReLU.
    fn fine<T>(&self, frame: usize, read: impl FnOnce(&Plane) -> T) -> T {
        read(&bench(&self.frames[frame]).relu[0])
    }
}

impl Decoder {
    /// `w` stands at `vae.decoder`.
    pub fn load(w: &Weights, isa: Isa, grid: &Grid) -> Result<Decoder> {
        let ([a, c], k) = (DECODER, grid.factor);
        // Stored as (frame, channel, row, column): asked for as (frame, row, column, channel).
        let up: Vec<usize> =
            (0..FRAMES * k * k * c).map(|o| o / (k * k * c) * k * k * c + o % c * k * k + o / c % (k * k)).collect();
        // Stored as (colour, row, column): asked for as (row, column, colour).
        let rgb: Vec<usize> = (0..48).map(|o| o % 3 * 16 + o / 3).collect();
        let below = if grid.name.is_empty() { w.clone() } else { w.pp(&grid.name) };
        let outputs = if grid.matte { 64 } else { 48 };
        let last = below.pp("conv_out");
        let weight = last.get((outputs, c, 3, 3), "weight")?.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
        let bias = last.get(outputs, "bias")?.contiguous()?.to_vec1::<f32>()?;
        let (colour, matte) = weight.split_at(48 * c * 9);
        Ok(Decoder {
            conv_in: conv(&w.pp("conv_in"), isa, [a, LATENT, 3], 1, None)?,
            mem: Residual::load(&w.pp("mem"), isa, 2 * a, a)?,
            res1: Residual::load(&w.pp("res1"), isa, a, a)?,
            res2: Residual::load(&w.pp("res2"), isa, a, a)?,
            factor: k,
            up: conv(&below.pp("up"), isa, [FRAMES * k * k * c, a, 1], 1, Some(&up))?,
            fine: (3..3 + grid.blocks)
                .map(|i| Residual::load(&below.pp(format!("res{i}")), isa, c, c))
                .collect::<Result<_>>()?,
            conv_out: Conv::new(isa, colour, &bias[..48], [48, c, 3], 1, Some(&rgb))?,
            matte: grid.matte.then(|| Conv::new(isa, matte, &bias[48..], [16, c, 3], 1, None)).transpose()?,
            alone: Pool::new(1),
        })
    }

    /// The next latent `[16][h][w]` → four frames of packed RGB bytes, `4kh × 4kw` with the grid's factor k. Values that
    /// are not numbers become black. Panics if `z` has another size than `memory`.
    pub fn decode(&self, pool: &Pool, z: &[f32], memory: &mut Memory) -> [Arc<[u8]>; FRAMES] {
        let m = memory;
        let (h, w) = (m.z.height, m.z.width);
        let [a, _] = DECODER;
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
        let up = &m.up;
        each(pool, |f| self.finish(up, f, &mut bench(&m.frames[f])))
    }

    /// One frame from the coarse features to its bytes.
    fn finish(&self, up: &Plane, f: usize, bench: &mut Bench) -> Arc<[u8]> {
        let ([_, c], k) = (DECODER, self.factor);
        let Bench { raw: [f0, f1], relu: [s0, s1], out } = bench;
        for y in 0..k * up.height {
            let from = up.row(0, y / k);
            let group = (f * k + y % k) * k * c;
            for (x, (to, relu)) in
                f0.row_mut(0, y).chunks_exact_mut(k * c).zip(s0.row_mut(0, y).chunks_exact_mut(k * c)).enumerate()
            {
                // Neighbouring pixels of a cell lie side by side, here as there.
                let cell = &from[x * FRAMES * k * k * c + group..][..k * c];
                to.copy_from_slice(cell);
                relu.iter_mut().zip(cell).for_each(|(r, v)| *r = v.max(0.0));
            }
        }
        let (mut x, mut next) = (f0, f1);
        for (i, block) in self.fine.iter().enumerate() {
            let raw = (i + 1 < self.fine.len()).then_some(&mut *next);
            block.run(&self.alone, x, s0, s1, raw);
            (x, next) = (next, x);
        }
        self.conv_out.run(&self.alone, s0, Output { raw: Some(out), ..Output::default() });
        let mut rgb = Vec::with_capacity(3 * FINE * FINE * out.height * out.width);
        for y in 0..FINE * out.height {
            for pixel in out.row(0, y / FINE).chunks_exact(48) {
                let part = &pixel[y % FINE * 12..][..12];
                // `as` cuts off the fraction, saturates, and turns what is not a number into 0.
                rgb.extend(part.iter().map(|v| (v * 127.5 + 128.0) as u8));
            }
        }
        rgb.into()
    }

    /// The mattes of the four frames that were decoded last into `memory`: bytes, 255 where nothing of the background is
    /// seen; none where the decoder gives none.
    pub fn mattes(&self, pool: &Pool, memory: &Memory) -> Option<[Arc<[u8]>; FRAMES]> {
        let matte = self.matte.as_ref()?;
        Some(each(pool, |f| {
            memory.fine(f, |fine| {
                let mut out = Plane::zeros(1, fine.height, fine.width, 16, 0);
                matte.run(&self.alone, fine, Output { raw: Some(&mut out), ..Output::default() });
                matte_bytes(&out, 0)
            })
        }))
    }
}

/// Calls `make` once for each frame, on the pool's threads.
fn each(pool: &Pool, make: impl Fn(usize) -> Arc<[u8]> + Sync) -> [Arc<[u8]>; FRAMES] {
    let made: [Mutex<Arc<[u8]>>; FRAMES] = std::array::from_fn(|_| Mutex::new(Arc::from([])));
    pool.run(FRAMES, |f| *made[f].lock().unwrap_or_else(|e| e.into_inner()) = make(f));
    made.map(|frame| frame.into_inner().unwrap_or_else(|e| e.into_inner()))
}

/// Picture `n` of cells of 4×4 values from 0 to 1 as bytes.
fn matte_bytes(cells: &Plane, n: usize) -> Arc<[u8]> {
    let mut matte = Vec::with_capacity(16 * cells.height * cells.width);
    for y in 0..FINE * cells.height {
        let row = cells.row(n, y / FINE).chunks_exact(16);
        // `as` cuts off the fraction and saturates.
        matte.extend(row.flat_map(|c| &c[y % FINE * FINE..][..FINE]).map(|v| (v * 255.0 + 0.5) as u8));
    }
    matte.into()
}
