//! What the decoder's mattes lack: a presenter is one figure without holes. The decoder leaves specks beside high contrasts
//! (eyes, jewellery), where a background would shine through a face.

use std::sync::Arc;

/// Share of the side within which values between the figure and the background are believed.
const EDGE: usize = 48;
/// Of a byte: from here on it is figure.
const FIGURE: u8 = 128;

/// The matte `[side][side]` with the figure (what hangs together with the picture's lowest row) opaque and the background
/// (what hangs together with its other edges) clear, except near the line between the two.
pub(super) fn solid(matte: &[u8], side: usize) -> Arc<[u8]> {
    let lowest = side * side.saturating_sub(1);
    let around = (0..side).chain((0..side).flat_map(|y| [y * side, y * side + side - 1]));
    let background = near(flood(side, around, |i| matte[i] < FIGURE), side);
    let figure = near(flood(side, lowest..side * side, |i| matte[i] >= FIGURE), side);
    let value = |(i, &m): (usize, &u8)| match (background[i], figure[i]) {
        (false, _) => 255,
        (true, false) => 0,
        (true, true) => m,
    };
    matte.iter().enumerate().map(value).collect()
}

/// What is reached from `seeds` over neighbours, where `open` lets through.
fn flood(side: usize, seeds: impl Iterator<Item = usize>, open: impl Fn(usize) -> bool) -> Vec<bool> {
    let mut reached = vec![false; side * side];
    let mut waiting: Vec<usize> = Vec::new();
    for seed in seeds {
        waiting.push(seed);
        while let Some(i) = waiting.pop() {
            if reached[i] || !open(i) {
                continue;
            }
            // The whole stretch of the row at once, and what is above and below where that begins to be open.
            let row = i - i % side;
            let free = |k: usize, reached: &[bool]| open(k) && !reached[k];
            let (mut from, mut to) = (i, i + 1);
            while from > row && free(from - 1, &reached) {
                from -= 1;
            }
            while to < row + side && free(to, &reached) {
                to += 1;
            }
            reached[from..to].fill(true);
            for beside in
                [row.checked_sub(side), Some(row + side).filter(|next| *next < side * side)].into_iter().flatten()
            {
                let mut before = false;
                for k in from - row + beside..to - row + beside {
                    let here = free(k, &reached);
                    if here && !before {
                        waiting.push(k);
                    }
                    before = here;
                }
            }
        }
    }
    reached
}

/// Grown by the width of an edge, along columns and then along rows; what was reached reaches no further.
fn near(mask: Vec<bool>, side: usize) -> Vec<bool> {
    let reach = (side / EDGE).clamp(1, 254) as u8;
    let left = |was: u8, here: bool| if here { reach + 1 } else { was.saturating_sub(1) };
    let mut tall = mask.clone();
    for there in [true, false] {
        let mut columns = vec![0; side];
        for n in 0..side {
            let first = if there { n } else { side - 1 - n } * side;
            let rows = tall[first..first + side].iter_mut().zip(&mask[first..first + side]);
            for (c, (grown, &here)) in columns.iter_mut().zip(rows) {
                *c = left(*c, here);
                *grown |= *c > 0;
            }
        }
    }
    let mut wide = tall.clone();
    for (grown, row) in wide.chunks_exact_mut(side).zip(tall.chunks_exact(side)) {
        let (mut there, mut back) = (0, 0);
        for k in 0..side {
            there = left(there, row[k]);
            grown[k] |= there > 0;
            back = left(back, row[side - 1 - k]);
            grown[side - 1 - k] |= back > 0;
        }
    }
    wide
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bust with a soft edge, a hole in its middle and a speck beside it.
    #[test]
    fn holes_are_filled_and_specks_taken_away_but_edges_stay() {
        const SIDE: usize = 96;
        let mut matte: Vec<u8> = (0..SIDE * SIDE)
            .map(|i| {
                let (x, y) = ((i % SIDE) as f32 - 47.5, (i / SIDE) as f32);
                let inside = if y < 60.0 { 24.0 - x.hypot(y - 40.0) } else { 24.0 - x.abs() };
                ((inside / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0) as u8
            })
            .collect();
        let whole = matte.clone();
        for (x, y) in [(46, 40), (47, 40), (60, 70)] {
            matte[y * SIDE + x] = 20;
        }
        matte[10 * SIDE + 5] = 230;
        assert!(*solid(&matte, SIDE) == *whole);
        assert!(*solid(&whole, SIDE) == *whole);
        assert!(solid(&[0; SIDE * SIDE], SIDE).iter().all(|m| *m == 0), "nobody there");
        assert!(solid(&[255; SIDE * SIDE], SIDE).iter().all(|m| *m == 255), "nothing else there");
    }
}
