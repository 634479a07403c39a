//! Rotary positions in three axes: time, row, column.
//!
//! Pairs are adjacent channels. Of the `D/2` pairs of a head a third (rounded down) belongs to rows, a third to columns
//! and the rest to time; pair `k` of an axis with `p` pairs turns by `position · 10000^(-k/p)`. Angles, sines and cosines
//! are made in f64 and stored as f32, optionally rounded to half precision first (LiveAvatar's tables are).

use candle_core::{Device, Tensor};

use crate::model::{Error, Result};

/// A box of tokens: per axis `end - start` samples spread over `span` positions from `start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// First position of time, row, column. A negative time counts down and turns the other way.
    pub start: [i64; 3],
    /// One past the last sample.
    pub end: [i64; 3],
    /// Positions covered.
    pub span: [i64; 3],
    /// Added to the time positions after spreading.
    pub shift: i64,
}

impl Group {
    /// Tokens at consecutive times from `time`, on a full grid.
    pub fn frames(time: i64, count: usize, rows: usize, columns: usize) -> Self {
        let (count, rows, columns) = (count as i64, rows as i64, columns as i64);
        Self { start: [time, 0, 0], end: [time + count, rows, columns], span: [count, rows, columns], shift: 0 }
    }

    /// The same group later in time.
    pub fn shifted(self, by: i64) -> Self {
        Self { shift: self.shift + by, ..self }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        (0..3).map(|a| (self.end[a] - self.start[a]).max(0) as usize).product()
    }

    fn positions(&self, axis: usize) -> Vec<i64> {
        let (start, count, span) = (self.start[axis], self.end[axis] - self.start[axis], self.span[axis]);
        let mut out = if axis == 0 && start < 0 {
            spread(-start, -span - start + 1, count).into_iter().map(|p| -p).collect()
        } else {
            spread(start, start + span - 1, count)
        };
        if axis == 0 {
            out.iter_mut().for_each(|p| *p += self.shift);
        }
        out
    }
}

/// `trunc(linspace(start, stop, count))`. The step is multiplied, not summed: truncation is sensitive to the order.
fn spread(start: i64, stop: i64, count: i64) -> Vec<i64> {
    if count <= 0 {
        return Vec::new();
    }
    if count == 1 {
        return vec![start];
    }
    let (a, b) = (start as f64, stop as f64);
    let step = (b - a) / (count - 1) as f64;
    (0..count).map(|j| if j == count - 1 { stop } else { (a + j as f64 * step).trunc() as i64 }).collect()
}

/// Precision of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// f64 rounded once to f32.
    Exact,
    /// Rounded to f16 on the way.
    Half,
}

/// The rotation of every token of a sequence.
#[derive(Debug, Clone)]
pub struct Rope {
    /// `[tokens, D]`: per token `D/2` cosines, then `D/2` sines.
    table: Tensor,
}

impl Rope {
    /// Tables for the groups in order; `head` is the head width D.
    pub fn new(groups: &[Group], head: usize, rounding: Rounding, device: &Device) -> Result<Self> {
        if head == 0 || head % 2 != 0 {
            return Err(Error::Config(format!("a head of {head} channels cannot be rotated in pairs")));
        }
        let c = head / 2;
        let pairs = [c - 2 * (c / 3), c / 3, c / 3];
        let tokens: usize = groups.iter().map(Group::tokens).sum();
        let mut table = Vec::with_capacity(tokens * head);
        let round = |v: f64| match rounding {
            Rounding::Exact => v as f32,
            Rounding::Half => half::f16::from_f64(v).to_f32(),
        };
        for group in groups {
            // Sines and cosines per axis position; tokens only copy them.
            let axis: Vec<Vec<(Vec<f32>, Vec<f32>)>> = (0..3)
                .map(|a| {
                    let p = pairs[a];
                    let turn = |x: i64| {
                        let angle = |k: usize| x as f64 * (1.0 / 10000f64.powf(2.0 * k as f64 / (2.0 * p as f64)));
                        (
                            (0..p).map(|k| round(angle(k).cos())).collect(),
                            (0..p).map(|k| round(angle(k).sin())).collect(),
                        )
                    };
                    group.positions(a).into_iter().map(turn).collect()
                })
                .collect();
            for t in &axis[0] {
                for r in &axis[1] {
                    for w in &axis[2] {
                        for part in [&t.0, &r.0, &w.0, &t.1, &r.1, &w.1] {
                            table.extend_from_slice(part);
                        }
                    }
                }
            }
        }
        Ok(Self { table: Tensor::from_vec(table, (tokens, head), device)? })
    }

    /// From a table as [`Rope::table`] gives it.
    pub fn from_table(table: Tensor) -> Result<Self> {
        table.dims2()?;
        Ok(Self { table })
    }

    /// From cosines and sines `[tokens, D/2]`.
    pub fn from_tables(cos: &Tensor, sin: &Tensor) -> Result<Self> {
        Ok(Self { table: Tensor::cat(&[cos, sin], 1)?.contiguous()? })
    }

    /// Cosines `[tokens, D/2]`.
    pub fn cos(&self) -> Result<Tensor> {
        Ok(self.table.narrow(1, 0, self.head() / 2)?)
    }

    /// Sines `[tokens, D/2]`.
    pub fn sin(&self) -> Result<Tensor> {
        Ok(self.table.narrow(1, self.head() / 2, self.head() / 2)?)
    }

    /// Tokens of the table.
    pub fn tokens(&self) -> usize {
        self.table.dims()[0]
    }

    /// Head width D.
    pub fn head(&self) -> usize {
        self.table.dims()[1]
    }

    /// `[tokens, D]`, cosines then sines.
    pub fn table(&self) -> &Tensor {
        &self.table
    }

    /// Rotates `[tokens, heads · D]`; f32 result.
    pub fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        super::norm::rotate(x, self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_motion_positions_truncate_towards_zero() {
        let g = Group { start: [-19, 0, 0], end: [-15, 2, 3], span: [16, 8, 16], shift: 0 };
        assert_eq!(g.positions(0), [-19, -14, -9, -4]);
        assert_eq!(g.positions(1), [0, 7]);
        assert_eq!(g.positions(2), [0, 7, 15]);
        assert_eq!(g.shifted(5).positions(0), [-14, -9, -4, 1]);
        assert_eq!(Group { start: [-3, 0, 0], end: [-2, 1, 1], span: [2, 1, 1], shift: 0 }.positions(0), [-3]);
    }

    #[test]
    fn an_odd_head_is_refused() {
        assert!(Rope::new(&[], 7, Rounding::Exact, &Device::Cpu).is_err());
    }
}
