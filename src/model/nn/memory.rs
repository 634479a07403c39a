//! Keys and values that queries look back at: one fixed buffer each, written in place, never concatenated.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::{Rope, Rows, Unit, attention, norm};
use crate::model::Result;
#[cfg(feature = "cuda")]
use crate::model::{Error, kernels::cuda};

/// Keys (normed and turned) and values of one layer, `[rows, dim]` each. On a card they may be e4m3; the rows are then, and
/// in bf16 too, a multiple of 128, which cuDNN's kernels are fastest on, and the rows behind the valid ones are masked.
/// Values may lie transposed ([`Memory::transposed`]).
#[derive(Debug, Clone)]
pub struct Memory {
    k: Tensor,
    v: Tensor,
    /// The same in host memory, if it was there before: right but for the rows written since.
    home: Option<(Tensor, Tensor)>,
    /// Of values in e4m3, and so of what attention makes of them.
    unit: Option<Unit>,
    #[cfg(feature = "cuda")]
    units: Option<cuda::attention::Units>,
    /// Whether values lie as `attention90.cu` wants them.
    #[cfg(feature = "cuda")]
    transposed: bool,
    /// What is taken from values when they are stored, and added to what attention gives; f32 `[dim]`, in their unit.
    #[cfg(feature = "cuda")]
    mean: Option<Tensor>,
}

/// Where a block's keys and values go, and how many rows count afterwards.
#[derive(Debug, Clone)]
pub struct Slot {
    /// First row.
    pub at: usize,
    /// Valid rows from the beginning.
    pub keys: usize,
    /// The same on a card, u32: first row, queries, valid rows. Launches recorded in a graph read them there.
    pub card: Option<Tensor>,
}

impl Slot {
    /// The same with its numbers on the device, if that is a card.
    pub fn on(self, device: &Device, queries: usize) -> Result<Self> {
        let card = match device {
            Device::Cpu => None,
            _ => Some(Tensor::new(&self.numbers(queries), device)?),
        };
        Ok(Self { card, ..self })
    }

    /// The numbers as [`Slot::card`] holds them.
    pub fn numbers(&self, queries: usize) -> [u32; 3] {
        [self.at as u32, queries as u32, self.keys as u32]
    }
}

/// Rows of a memory on a card are a multiple of this.
const TILE: usize = 128;

/// So many rows of values tell their means.
#[cfg(feature = "cuda")]
const SAMPLE: usize = 4096;

impl Memory {
    /// Room for `[rows, dim]` keys and values in the element type of `values` (`[n, all]`), or in e4m3 if `fp8`. e4m3
    /// values are scaled once and for all by the largest of `values`, with room above it for values `headroom` times as
    /// large; memories of some of the heads (`dim` below `all`) have one scale that way.
    pub fn new(values: &Tensor, (rows, dim): (usize, usize), fp8: bool, headroom: f64) -> Result<Self> {
        let device = values.device();
        let rows = if matches!(device, Device::Cpu) { rows } else { rows.next_multiple_of(TILE) };
        let dtype = if fp8 { DType::F8E4M3 } else { values.dtype() };
        // Zeros, because masked rows are read all the same, and 0 · NaN is NaN.
        let zeros = || Tensor::zeros((rows, dim), dtype, device);
        let unit = if fp8 {
            let largest = values.abs()?.max(1)?.to_dtype(DType::F32)?.max(0)?.clamp(1e-6, f32::MAX)?;
            Some(Unit::new((largest * (headroom / super::fp8::LARGEST))?.reshape(1)?)?)
        } else {
            None
        };
        #[cfg(feature = "cuda")]
        let units = unit.as_ref().map(|u| cuda::attention::Units::new(u.value())).transpose()?;
        Ok(Self {
            k: zeros()?,
            v: zeros()?,
            home: None,
            unit,
            #[cfg(feature = "cuda")]
            units,
            #[cfg(feature = "cuda")]
            transposed: false,
            #[cfg(feature = "cuda")]
            mean: None,
        })
    }

    /// The same, still empty, with values transposed where attention is faster that way: in e4m3 on Hopper, with heads of
    /// this width. Such a memory is attended to with a slot, and does not park.
    pub fn transposed(self, head: usize) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if self.units.is_some() && cuda::attention::has_own(self.v.device(), head)? {
            let (rows, dim) = self.v.dims2()?;
            return Ok(Self { v: self.v.reshape((dim, rows))?, transposed: true, ..self });
        }
        let _ = head;
        Ok(self)
    }

    /// The same, still empty, with a mean for each channel left out of values that are stored, if they lie transposed.
    /// Whatever the means are, attention is the same: weights sum to one. But sums of e4m3 products over many keys come out
    /// small where values have a mean (`attention90.cu`). Such a memory takes values as they come from their product
    /// ([`Memory::store`], [`Memory::place`]), not from [`Memory::ready`]. Results come in units that are spread
    /// ([`Unit::spread`]), for a mean of many values is alike in all rows.
    pub fn centred(self) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if self.transposed {
            let mean = Tensor::zeros(self.k.dim(1)?, DType::F32, self.k.device())?;
            return Ok(Self { mean: Some(mean), ..self });
        }
        Ok(self)
    }

    /// Takes the means of values like these `[n, dim]` from what is stored from now on. `before`: all values that are stored
    /// already, from row 0 on; they are stored again.
    pub fn centre(&self, values: &Tensor, before: Option<&Tensor>) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let (Some(mean), Some(unit)) = (&self.mean, &self.unit) {
            let n = values.dim(0)?.min(SAMPLE);
            let some = values.narrow(0, 0, n)?.contiguous()?;
            let sums = Tensor::ones((1, n), some.dtype(), some.device())?.matmul(&some)?;
            let means = (sums.squeeze(0)?.to_dtype(DType::F32)? / n as f64)?;
            // In place: a recorded graph reads it there.
            mean.slice_set(&means.broadcast_mul(unit.inverse())?, 0, 0)?;
            return before.map_or(Ok(()), |v| self.place_values(v, 0));
        }
        let _ = (values, before);
        Ok(())
    }

    /// Keys and values that are ready as they are.
    pub fn of(k: Tensor, v: Tensor) -> Self {
        Self {
            k,
            v,
            home: None,
            unit: None,
            #[cfg(feature = "cuda")]
            units: None,
            #[cfg(feature = "cuda")]
            transposed: false,
            #[cfg(feature = "cuda")]
            mean: None,
        }
    }

    /// Goes to host memory. Of what was there before, only the rows `written` since are brought.
    pub fn park(&mut self, written: &[Range<usize>]) -> Result<()> {
        if self.k.device().is_cpu() {
            return Ok(());
        }
        #[cfg(feature = "cuda")]
        if self.transposed {
            return Err(Error::Input("a memory whose values lie transposed does not park".into()));
        }
        let brought = |t: &Tensor, home: Option<Tensor>| -> Result<Tensor> {
            let Some(home) = home else { return Ok(t.to_device(&Device::Cpu)?) };
            for rows in written.iter().filter(|r| !r.is_empty()) {
                let part = t.narrow(0, rows.start, rows.len())?.force_contiguous()?.to_device(&Device::Cpu)?;
                home.slice_set(&part, 0, rows.start)?;
            }
            Ok(home)
        };
        let (k, v) = self.home.take().unzip();
        (self.k, self.v) = (brought(&self.k, k)?, brought(&self.v, v)?);
        Ok(())
    }

    /// Comes to `device`.
    pub fn come(&mut self, device: &Device) -> Result<()> {
        if self.k.device().same_device(device) {
            return Ok(());
        }
        self.home = Some((self.k.clone(), self.v.clone()));
        (self.k, self.v) = (self.k.to_device(device)?, self.v.to_device(device)?);
        Ok(())
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        [&self.k, &self.v].iter().map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
    }

    /// Rows `from` and below, keys and values as numbers (for tests).
    pub fn part(&self, from: usize, rows: usize) -> Result<(Tensor, Tensor)> {
        let part = |t: &Tensor, unit: Option<f32>| -> Result<Tensor> {
            let t = t.narrow(0, from, rows)?;
            Ok(match unit {
                Some(unit) => super::fp8::restore(&t.contiguous()?, &Tensor::full(unit, rows, t.device())?)?,
                None => t,
            })
        };
        #[cfg(feature = "cuda")]
        if let Some(unit) = &self.unit {
            let unit = unit.value().to_vec1::<f32>()?[0];
            if self.transposed {
                let (dim, all) = self.v.dims2()?;
                let v = super::fp8::restore(&self.v, &Tensor::full(1f32, dim, self.v.device())?)?;
                // Heads, 16 keys, channels, and the order of the 16 that `store_transposed` tells.
                let v = v
                    .reshape(vec![dim / 128, all / 16, 128, 4, 2, 2])?
                    .permute(vec![1, 4, 3, 5, 0, 2])?
                    .contiguous()?;
                let v = v.reshape((all, dim))?.narrow(0, from, rows)?;
                let v = match &self.mean {
                    Some(mean) => v.broadcast_add(&mean.to_device(v.device())?)?,
                    None => v,
                };
                let v = (v * f64::from(unit))?;
                return Ok((part(&self.k, Some(1.0))?, v));
            }
            return Ok((part(&self.k, Some(1.0))?, part(&self.v, Some(unit))?));
        }
        Ok((part(&self.k, None)?, part(&self.v, None)?))
    }

    /// Norms and turns queries and keys, stores keys and values at the slot, returns the queries ready for
    /// [`Memory::attend`]. `weights` are the RMS norms' of queries and keys.
    pub fn store(
        &self,
        [q, k, v]: [&Tensor; 3],
        weights: [&Tensor; 2],
        eps: f64,
        rope: &Rope,
        slot: &Slot,
    ) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if self.fused(q, rope.head()) {
            let card = slot.card.as_ref().ok_or_else(|| Error::Input("the slot is not on the card".into()))?;
            return self.store_fused([q, k, v], weights, eps, Some(rope), &card.narrow(0, 0, 1)?);
        }
        let queries = norm::rms_norm_rotate(q, weights[0], eps, rope)?;
        self.k.slice_set(&norm::rms_norm_rotate(k, weights[1], eps, rope)?.to_dtype(self.k.dtype())?, 0, slot.at)?;
        self.v.slice_set(&v.contiguous()?, 0, slot.at)?;
        Ok(queries)
    }

    /// Queries, keys and values of [`Memory::store`], ready but stored nowhere: for ranks that exchange them first.
    pub fn ready(&self, [q, k, v]: [&Tensor; 3], weights: [&Tensor; 2], eps: f64, rope: &Rope) -> Result<[Tensor; 3]> {
        #[cfg(feature = "cuda")]
        if self.mean.is_some() {
            return Err(Error::Input("a memory of centred values takes them as they come".into()));
        }
        #[cfg(feature = "cuda")]
        if self.fused(q, rope.head()) {
            let empty = || cuda::empty(q.device(), q.shape(), self.k.dtype());
            let out = [empty()?, empty()?, empty()?];
            let lane =
                |input, weight, rotate, out, unit| cuda::rows::Lane { input, weight, rotate, out, unit, slot: false };
            let lanes = [
                lane(q, Some(weights[0]), true, &out[0], None),
                lane(k, Some(weights[1]), true, &out[1], None),
                lane(v, None, false, &out[2], self.units.as_ref()),
            ];
            cuda::rows::norm_rotate(&lanes, Some(rope.table()), None, eps)?;
            return Ok(out);
        }
        Ok([
            norm::rms_norm_rotate(q, weights[0], eps, rope)?,
            norm::rms_norm_rotate(k, weights[1], eps, rope)?.to_dtype(self.k.dtype())?,
            v.contiguous()?.to_dtype(self.v.dtype())?,
        ])
    }

    /// Keys and values that are ready, stored from `row` on.
    pub fn keep(&self, k: &Tensor, v: &Tensor, row: usize) -> Result<()> {
        self.k.slice_set(k, 0, row)?;
        #[cfg(feature = "cuda")]
        if let (true, Some(units)) = (self.transposed, &self.units) {
            return cuda::attention::store_transposed(v, &self.v, None, row, units, self.mean.as_ref());
        }
        Ok(self.v.slice_set(v, 0, row)?)
    }

    /// Rows that [`Memory::attend`] gave in e4m3, cut or put together since, with their units.
    pub fn scaled(&self, stored: Tensor) -> Result<Rows> {
        let n = stored.dim(0)?;
        Ok(match &self.unit {
            #[cfg(feature = "cuda")]
            Some(unit) if self.mean.is_some() => Rows::Scaled { units: unit.spread(n)?.0, stored },
            Some(unit) => Rows::Scaled { units: unit.of_rows(n)?, stored },
            None => Rows::Plain(stored),
        })
    }

    /// Keys that are normed but not turned, turned and stored from `row` on.
    pub fn place_keys(&self, k: &Tensor, rope: &Rope, row: usize) -> Result<()> {
        #[cfg(feature = "cuda")]
        if self.fused(k, rope.head()) {
            return self.place_fused(k, Some(rope), &self.k, row);
        }
        Ok(self.k.slice_set(&rope.rotate(k)?.contiguous()?.to_dtype(self.k.dtype())?, 0, row)?)
    }

    /// Values, stored from `row` on.
    pub fn place_values(&self, v: &Tensor, row: usize) -> Result<()> {
        #[cfg(feature = "cuda")]
        if self.fused(v, 8) {
            return self.place_fused(v, None, &self.v, row);
        }
        Ok(self.v.slice_set(&v.contiguous()?, 0, row)?)
    }

    /// Keys that need no turning, and values.
    pub fn place(&self, k: &Tensor, v: &Tensor) -> Result<()> {
        #[cfg(feature = "cuda")]
        if self.fused(k, 8) {
            self.place_fused(k, None, &self.k, 0)?;
            return self.place_fused(v, None, &self.v, 0);
        }
        self.k.slice_set(&k.contiguous()?, 0, 0)?;
        Ok(self.v.slice_set(&v.contiguous()?, 0, 0)?)
    }

    /// Queries of another sequence, normed as this memory wants them.
    pub fn queries(&self, q: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if self.units.is_some() {
            let out = cuda::empty(q.device(), q.shape(), DType::F8E4M3)?;
            let lane =
                cuda::rows::Lane { input: q, weight: Some(weight), rotate: false, out: &out, unit: None, slot: false };
            cuda::rows::norm_rotate(&[lane], None, None, eps)?;
            return Ok(out);
        }
        norm::rms_norm(q, weight, eps)
    }

    /// Attention of ready queries over the valid rows (all, without a slot).
    pub fn attend(&self, q: &Tensor, heads: usize, slot: Option<&Slot>) -> Result<Rows> {
        #[cfg(feature = "cuda")]
        if matches!(q.device(), Device::Cuda(_)) && cuda_takes(q, heads) {
            let valid = match slot {
                Some(Slot { card: Some(card), .. }) => Some(card.narrow(0, 1, 2)?),
                Some(_) => return Err(Error::Input("the slot is not on the card".into())),
                None => None,
            };
            let y = if self.transposed {
                let valid =
                    valid.ok_or_else(|| Error::Input("transposed values are attended to with a slot".into()))?;
                let centre = match (&self.mean, &self.unit) {
                    (Some(mean), Some(unit)) => Some((mean, unit.spread(q.dim(0)?)?.1)),
                    _ => None,
                };
                let centre = centre.as_ref().map(|(mean, factors)| (*mean, factors));
                cuda::attention::attention_transposed(q, &self.k, &self.v, heads, &valid, centre)?
            } else {
                cuda::attention::attention(q, &self.k, &self.v, heads, 1, valid.as_ref(), self.units.as_ref())?
            };
            return self.scaled(y);
        }
        let keys = slot.map_or(self.k.dims()[0], |s| s.keys);
        let (k, v) = (self.k.narrow(0, 0, keys)?, self.v.narrow(0, 0, keys)?);
        Ok(Rows::Plain(attention(q, &k, &v, heads, 1)?))
    }
}

#[cfg(feature = "cuda")]
impl Memory {
    fn fused(&self, x: &Tensor, head: usize) -> bool {
        let stored = matches!(self.k.dtype(), DType::BF16 | DType::F8E4M3);
        matches!(x.device(), Device::Cuda(_))
            && stored
            && x.dtype() == DType::BF16
            && head % 8 == 0
            && cuda::rows::fits(x.dims()[1], 1)
    }

    fn store_fused(
        &self,
        [q, k, v]: [&Tensor; 3],
        weights: [&Tensor; 2],
        eps: f64,
        rope: Option<&Rope>,
        offset: &Tensor,
    ) -> Result<Tensor> {
        let queries = cuda::empty(q.device(), q.shape(), self.k.dtype())?;
        let rotate = rope.is_some();
        let lane = |input, weight, rotate, out, slot| cuda::rows::Lane { input, weight, rotate, out, unit: None, slot };
        let lanes = [
            lane(q, Some(weights[0]), rotate, &queries, false),
            lane(k, Some(weights[1]), rotate, &self.k, true),
            cuda::rows::Lane { unit: self.units.as_ref(), ..lane(v, None, false, &self.v, true) },
        ];
        let lanes = if let (true, Some(units)) = (self.transposed, &self.units) {
            cuda::attention::store_transposed(v, &self.v, Some(offset), 0, units, self.mean.as_ref())?;
            &lanes[..2]
        } else {
            &lanes[..]
        };
        cuda::rows::norm_rotate(lanes, rope.map(Rope::table), Some(offset), eps)?;
        Ok(queries)
    }

    fn place_fused(&self, x: &Tensor, rope: Option<&Rope>, target: &Tensor, row: usize) -> Result<()> {
        if let (true, Some(units)) = (self.transposed && target.id() == self.v.id(), &self.units) {
            return cuda::attention::store_transposed(x, target, None, row, units, self.mean.as_ref());
        }
        let out = target.narrow(0, row, x.dim(0)?)?;
        let unit = if rope.is_none() && target.id() == self.v.id() { self.units.as_ref() } else { None };
        let lane = cuda::rows::Lane { input: x, weight: None, rotate: rope.is_some(), out: &out, unit, slot: false };
        cuda::rows::norm_rotate(&[lane], rope.map(Rope::table), None, 0.0)
    }
}

/// Whether cuDNN's attention takes heads of this width.
#[cfg(feature = "cuda")]
pub(super) fn cuda_takes(q: &Tensor, heads: usize) -> bool {
    let width = q.dims()[1] / heads.max(1);
    match q.dtype() {
        DType::BF16 => width % 8 == 0 && width <= 128,
        DType::F8E4M3 => width % 16 == 0 && width <= 128,
        _ => false,
    }
}
