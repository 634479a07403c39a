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
    let mut waiting = Vec::new();
    let mut visit = |i: usize, waiting: &mut Vec<usize>| {
        if !reached[i] && open(i) {
            reached[i] = true;
            waiting.push(i);
        }
    };
    for i in seeds {
        visit(i, &mut waiting);
        while let Some(i) = waiting.pop() {
            let (x, y) = (i % side, i / side);
            let beside = [(x > 0, i.wrapping_sub(1)), (x + 1 < side, i + 1)];
            let above = [(y > 0, i.wrapping_sub(side)), (y + 1 < side, i + side)];
            for (_, next) in beside.into_iter().chain(above).filter(|(inside, _)| *inside) {
                visit(next, &mut waiting);
            }
        }
    }
    reached
}

/// Grown by the width of an edge, along rows and then along columns.
fn near(mut mask: Vec<bool>, side: usize) -> Vec<bool> {
    let reach = (side / EDGE).max(1);
    let mut line = vec![false; side];
    for (stride, step) in [(side, 1), (1, side)] {
        for start in (0..side).map(|n| n * stride) {
            line.iter_mut().enumerate().for_each(|(k, v)| *v = mask[start + k * step]);
            for k in (0..side).filter(|&k| line[k]) {
                for j in k.saturating_sub(reach)..(k + reach + 1).min(side) {
                    mask[start + j * step] = true;
                }
            }
        }
    }
    mask
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
