//! Activations between an operation and the matrix that takes them next.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use candle_core::{DType, Device, Tensor};

use super::fp8;
use crate::model::Result;

/// How a matrix wants its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Numbers of this type.
    Plain(DType),
    /// e4m3 with a scale per row, or one for all where it is known beforehand.
    Scaled,
}

/// What a stored unit of e4m3 numbers is worth, one for all rows: from a bound that holds for every input, so that nothing
/// is looked at before it is stored. e4m3 is a floating-point format, 15 octaves of the same precision; that the bound is
/// some times what occurs costs a few of them at the lower end. On the device, where a recorded graph reads it.
#[derive(Debug, Clone)]
pub struct Unit {
    value: Tensor,
    inverse: Tensor,
    /// Vectors of it by length.
    rows: Arc<Mutex<HashMap<usize, Tensor>>>,
    /// [`Unit::spread`] by length.
    spread: Arc<Mutex<HashMap<usize, (Tensor, Tensor)>>>,
}

impl Unit {
    /// For numbers of at most `most` in size (f32, any shape).
    pub fn of(most: &Tensor) -> Result<Self> {
        let most = most.flatten_all()?.max(0)?.reshape(1)?.clamp(1e-12, f32::MAX)?;
        Self::new((most * (fp8::MARGIN / fp8::LARGEST))?)
    }

    /// Of this value, f32 `[1]`.
    pub fn new(value: Tensor) -> Result<Self> {
        Ok(Self { inverse: value.recip()?, value, rows: Arc::default(), spread: Arc::default() })
    }

    /// f32 `[1]`.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// 1 / value, f32 `[1]`.
    pub fn inverse(&self) -> &Tensor {
        &self.inverse
    }

    /// The value for each of `n` rows, f32 `[n]`; made when first asked for.
    pub fn of_rows(&self, n: usize) -> Result<Tensor> {
        let mut rows = self.rows.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(units) = rows.get(&n) {
            return Ok(units.clone());
        }
        let units = self.value.broadcast_as(n)?.contiguous()?;
        rows.insert(n, units.clone());
        Ok(units)
    }

    /// A unit for each of `n` rows, f32 `[n]`, up to an octave above the value and spread evenly between, and what their
    /// numbers are multiplied by when they are stored, value / unit; made when first asked for. Where rows are alike, one
    /// unit would round them all the same way: what sums and means over rows cannot take out again.
    pub fn spread(&self, n: usize) -> Result<(Tensor, Tensor)> {
        let mut spread = self.spread.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(both) = spread.get(&n) {
            return Ok(both.clone());
        }
        // Multiples of the golden section leave no gap anywhere.
        let factors: Vec<f32> = (0..n).map(|i| (-(i as f64 * 0.618_033_988_749_895).fract()).exp2() as f32).collect();
        let factors = Tensor::from_vec(factors, n, self.value.device())?;
        let units = factors.recip()?.broadcast_mul(&self.value)?;
        spread.insert(n, (units.clone(), factors.clone()));
        Ok((units, factors))
    }

    /// The same on another device.
    pub fn moved(&self, device: &Device) -> Result<Self> {
        let (value, inverse) = (self.value.to_device(device)?, self.inverse.to_device(device)?);
        Ok(Self { value, inverse, rows: Arc::default(), spread: Arc::default() })
    }
}

/// Rows `[n, width]` in one of these forms. Operations that end a row give it in the form its reader wants, so that no
/// pass over memory is made for the change.
#[derive(Debug, Clone)]
pub enum Rows {
    /// Numbers as they are.
    Plain(Tensor),
    /// `value = stored · unit` of the row.
    Scaled {
        /// `[n, width]`, element type F8E4M3.
        stored: Tensor,
        /// `[n]`, f32.
        units: Tensor,
    },
    /// `value = stored · unit` of all.
    Bound {
        /// `[n, width]`, element type F8E4M3.
        stored: Tensor,
        /// From a bound.
        unit: Unit,
    },
}

impl Rows {
    /// Rows and columns.
    pub fn dims(&self) -> &[usize] {
        match self {
            Rows::Plain(x) | Rows::Scaled { stored: x, .. } | Rows::Bound { stored: x, .. } => x.dims(),
        }
    }

    /// e4m3 numbers with a unit for each row, `[n]`; none where they are plain.
    pub fn by_row(&self) -> Result<Option<(&Tensor, Tensor)>> {
        Ok(match self {
            Rows::Plain(_) => None,
            Rows::Scaled { stored, units } => Some((stored, units.clone())),
            Rows::Bound { stored, unit } => Some((stored, unit.of_rows(stored.dim(0)?)?)),
        })
    }

    /// The numbers themselves.
    pub fn plain(&self) -> Result<Tensor> {
        match self {
            Rows::Plain(x) => Ok(x.clone()),
            Rows::Scaled { stored, units } => fp8::restore(stored, units),
            Rows::Bound { stored, unit } => fp8::restore(stored, unit.value()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows that follow each other, as many as one likes, have units all over the octave above the value.
    #[test]
    fn units_of_rows_are_spread_evenly_over_an_octave() {
        let unit = Unit::new(Tensor::new(&[0.3f32], &Device::Cpu).unwrap()).unwrap();
        let (units, factors) = unit.spread(3168).unwrap();
        let (units, factors) = (units.to_vec1::<f32>().unwrap(), factors.to_vec1::<f32>().unwrap());
        assert!(units.iter().zip(&factors).all(|(u, f)| (u * f / 0.3 - 1.0).abs() < 1e-6));
        for few in units.chunks_exact(64) {
            let mut octaves: Vec<f32> = few.iter().map(|u| (u / 0.3).log2()).collect();
            octaves.sort_by(f32::total_cmp);
            assert!(octaves[0] > -1e-6 && octaves[63] < 1.0);
            let edges = [&[0.0], &octaves[..], &[1.0]].concat();
            assert!(edges.windows(2).all(|w| w[1] - w[0] < 3.0 / 64.0), "{octaves:?}");
        }
    }
}
