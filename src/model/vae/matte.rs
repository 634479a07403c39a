//! The matte head of the pocket autoencoder: how much the presenter covers the background, read from what the
//! [`Decoder`](super::patch::Decoder) has in hand after a latent. Colours do not change by it.
//!
//! Coarse features (32×32, all four frames together) pass a short detour at 16×16, which sees most of the picture, and
//! are unfolded into the four frames at 64×64; there they meet the fine features. `pocket/train/model.py` (`Matte`) is
//! the form that trains.

use super::patch::{FRAMES, Memory, conv, matte_bytes};
use crate::model::{
    Result,
    kernels::{Conv, Isa, Output, Plane, Pool},
    weights::Weights,
};
use std::sync::Arc;

/// Channels: of the coarse and the fine features, and the head's own at 32×32, 16×16, and per frame at 64×64.
const WIDE: usize = 112;
const FINE: usize = 32;
const NEAR: usize = 24;
const FAR: usize = 32;
const FRAME: usize = 8;
const LAST: usize = 16;

/// See the module.
pub struct Matte {
    wide: Conv,
    near: Conv,
    down: Conv,
    far1: Conv,
    far2: Conv,
    up: Conv,
    join: Conv,
    frames: Conv,
    /// Of the fine features, and of the unfolded coarse ones: one convolution of their union.
    fine: Conv,
    unfolded: Conv,
    fine2: Conv,
    out: Conv,
}

/// Working space of one stream.
pub struct Bench {
    near: [Plane; 2],
    near_raw: Plane,
    far: [Plane; 2],
    up: Plane,
    flat: Plane,
    frames: Plane,
    sum: Plane,
    last: [Plane; 2],
    out: Plane,
}

impl Bench {
    /// For latents of `height × width` cells, both even.
    pub fn new(height: usize, width: usize) -> Bench {
        let near = || Plane::zeros(1, height, width, NEAR, 1);
        let far = || Plane::zeros(1, height / 2, width / 2, FAR, 1);
        let fine = |channels, border| Plane::zeros(1, 2 * height, 2 * width, channels, border);
        Bench {
            near: [near(), near()],
            near_raw: Plane::zeros(1, height, width, NEAR, 0),
            far: [far(), far()],
            up: Plane::zeros(1, height / 2, width / 2, 4 * NEAR, 0),
            flat: Plane::zeros(1, height, width, FRAMES * 4 * FRAME, 0),
            frames: fine(FRAME, 1),
            sum: fine(LAST, 0),
            last: [fine(LAST, 1), fine(LAST, 1)],
            out: fine(16, 0),
        }
    }
}

fn raw(to: &mut Plane) -> Output<'_> {
    Output { raw: Some(to), ..Output::default() }
}

fn relu(to: &mut Plane) -> Output<'_> {
    Output { relu: Some(to), ..Output::default() }
}

impl Matte {
    /// `w` stands at `matte`.
    pub fn load(w: &Weights, isa: Isa) -> Result<Matte> {
        // Stored as (channel, row, column): asked for as (row, column, channel); likewise behind the frame.
        let up: Vec<usize> = (0..4 * NEAR).map(|o| o % NEAR * 4 + o / NEAR).collect();
        let unfold: Vec<usize> =
            (0..FRAMES * 4 * FRAME).map(|o| o / (4 * FRAME) * 4 * FRAME + o % FRAME * 4 + o / FRAME % 4).collect();
        let shape = [LAST, FINE + FRAME, 3];
        let joint = w.pp("fine1").get((LAST, FINE + FRAME, 3, 3), "weight")?.flatten_all()?.to_vec1::<f32>()?;
        let bias = w.pp("fine1").get(LAST, "bias")?.to_vec1::<f32>()?;
        let part = |from: usize, count: usize, bias: &[f32]| {
            let rows = joint.chunks_exact(shape[1] * 9).flat_map(|o| &o[from * 9..(from + count) * 9]);
            Conv::new(isa, &rows.copied().collect::<Vec<f32>>(), bias, [LAST, count, 3], 1, None)
        };
        Ok(Matte {
            wide: conv(&w.pp("wide"), isa, [NEAR, WIDE, 1], 1, None)?,
            near: conv(&w.pp("near"), isa, [NEAR, NEAR, 3], 1, None)?,
            down: conv(&w.pp("down"), isa, [FAR, NEAR, 3], 2, None)?,
            far1: conv(&w.pp("far1"), isa, [FAR, FAR, 3], 1, None)?,
            far2: conv(&w.pp("far2"), isa, [FAR, FAR, 3], 1, None)?,
            up: conv(&w.pp("up"), isa, [4 * NEAR, FAR, 1], 1, Some(&up))?,
            join: conv(&w.pp("join"), isa, [NEAR, NEAR, 3], 1, None)?,
            frames: conv(&w.pp("frames"), isa, [FRAMES * 4 * FRAME, NEAR, 1], 1, Some(&unfold))?,
            fine: part(0, FINE, &bias)?,
            unfolded: part(FINE, FRAME, &[0.0; LAST])?,
            fine2: conv(&w.pp("fine2"), isa, [LAST, LAST, 3], 1, None)?,
            out: conv(&w.pp("out"), isa, [16, LAST, 3], 1, None)?,
        })
    }

    /// The mattes of the four frames that were decoded last into `memory`: `8h × 8w` bytes each, 255 where nothing of
    /// the background is seen.
    pub fn read(&self, pool: &Pool, memory: &Memory, bench: &mut Bench) -> [Arc<[u8]>; FRAMES] {
        let (coarse, b) = (memory.coarse(), bench);
        let (h, w) = (coarse.height, coarse.width);
        let [n0, n1] = &mut b.near;
        let [f0, f1] = &mut b.far;
        self.wide.run(pool, coarse, relu(n0));
        self.near.run(pool, n0, Output { raw: Some(&mut b.near_raw), relu: Some(n1), ..Output::default() });
        self.down.run(pool, n1, relu(f0));
        self.far1.run(pool, f0, relu(f1));
        self.far2.run(pool, f1, relu(f0));
        self.up.run(pool, f0, raw(&mut b.up));
        for y in 0..h {
            for x in 0..w {
                let far = &b.up.pixel(0, y / 2, x / 2)[(y % 2 * 2 + x % 2) * NEAR..][..NEAR];
                for ((to, near), far) in n0.pixel_mut(0, y, x).iter_mut().zip(b.near_raw.pixel(0, y, x)).zip(far) {
                    *to = (near.max(0.0) + far).max(0.0);
                }
            }
        }
        self.join.run(pool, n0, relu(n1));
        self.frames.run(pool, n1, raw(&mut b.flat));
        std::array::from_fn(|f| {
            for y in 0..2 * h {
                let from = b.flat.row(0, y / 2);
                let group = (f * 2 + y % 2) * 2 * FRAME;
                for (x, to) in b.frames.row_mut(0, y).chunks_exact_mut(2 * FRAME).enumerate() {
                    // Two neighbouring pixels lie side by side, here as there.
                    let pair = &from[x * FRAMES * 4 * FRAME + group..][..2 * FRAME];
                    to.iter_mut().zip(pair).for_each(|(to, v)| *to = v.max(0.0));
                }
            }
            let [l0, l1] = &mut b.last;
            memory.fine(f, |fine| self.fine.run(pool, fine, raw(&mut b.sum)));
            self.unfolded.run(pool, &b.frames, Output { residual: Some(&b.sum), relu: Some(l0), ..Output::default() });
            self.fine2.run(pool, l0, relu(l1));
            self.out.run(pool, l1, raw(&mut b.out));
            matte_bytes(&b.out, 0)
        })
    }
}
