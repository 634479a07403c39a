//! A caller's picture becomes the model's: cropped to a square where faces are, scaled to its size.

use crate::{
    avatar::{AvatarError, Result},
    media::Portrait,
};

/// The smallest side that still shows a face.
const SMALLEST: u32 = 64;

/// Packed RGB of `size × size` from `portrait`: the middle of a wide one, the upper part of a tall one (people are
/// photographed with the head near the top).
pub(super) fn prepare(portrait: &Portrait, size: usize) -> Result<Vec<u8>> {
    let (w, h) = (portrait.width as usize, portrait.height as usize);
    if portrait.rgb.len() != 3 * w * h || w == 0 || h == 0 {
        return Err(AvatarError::Portrait("The picture has no pixels; choose another one.".into()));
    }
    if portrait.width.min(portrait.height) < SMALLEST {
        return Err(AvatarError::Portrait(format!(
            "The picture is {w}×{h} pixels, too small to show a face; choose one of at least {SMALLEST}×{SMALLEST}."
        )));
    }
    let side = w.min(h);
    let (left, top) = ((w - side) / 2, (h - side) / 6);
    if side == size {
        return Ok((top..top + size).flat_map(|y| &portrait.rgb[3 * (y * w + left)..][..3 * size]).copied().collect());
    }
    let square: Vec<u8> =
        (top..top + side).flat_map(|y| &portrait.rgb[3 * (y * w + left)..][..3 * side]).copied().collect();
    Ok(resize(&square, side, size))
}

/// A square of `side` pixels as one of `size`, packed RGB.
pub(super) fn resize(square: &[u8], side: usize, size: usize) -> Vec<u8> {
    let weights = kernel(side, size);
    // Columns first, row by row; then rows.
    let mut narrow = vec![0f32; side * size * 3];
    for y in 0..side {
        let row = &square[3 * y * side..][..3 * side];
        for (x, (first, taps)) in weights.iter().enumerate() {
            for c in 0..3 {
                let sum = taps.iter().enumerate().map(|(i, t)| t * f32::from(row[3 * (first + i) + c])).sum();
                narrow[(y * size + x) * 3 + c] = sum;
            }
        }
    }
    let mut out = Vec::with_capacity(3 * size * size);
    for (first, taps) in &weights {
        for x in 0..3 * size {
            let sum: f32 = taps.iter().enumerate().map(|(i, t)| t * narrow[(first + i) * size * 3 + x]).sum();
            out.push(sum.round() as u8);
        }
    }
    out
}

/// For each of `to` outputs: the first input and the weights of a triangle as wide as the larger of the two pixels
/// (bilinear when enlarging, smoothed when reducing).
fn kernel(from: usize, to: usize) -> Vec<(usize, Vec<f32>)> {
    let scale = from as f32 / to as f32;
    let reach = scale.max(1.0);
    (0..to)
        .map(|o| {
            let centre = (o as f32 + 0.5) * scale - 0.5;
            let first = ((centre - reach).ceil().max(0.0)) as usize;
            let last = ((centre + reach).floor() as usize).min(from - 1);
            let taps: Vec<f32> = (first..=last).map(|i| (1.0 - (i as f32 - centre).abs() / reach).max(0.0)).collect();
            let sum: f32 = taps.iter().sum();
            (first, taps.into_iter().map(|t| t / sum).collect())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: u32, height: u32, f: impl Fn(u32, u32) -> u8) -> Portrait {
        let rgb: Vec<u8> = (0..width * height).flat_map(|i| [f(i % width, i / width); 3]).collect();
        Portrait { width, height, rgb: rgb.into() }
    }

    #[test]
    fn any_size_becomes_the_models_and_stays_in_place() {
        for (w, h) in [(64, 64), (100, 300), (256, 256), (1000, 640), (257, 255)] {
            // A ramp over the central square keeps its value at the same relative place.
            let side = w.min(h);
            let left = (w - side) / 2;
            let ramp = picture(w, h, |x, _| ((x.clamp(left, left + side - 1) - left) * 200 / side) as u8);
            let out = prepare(&ramp, 256).unwrap();
            assert_eq!(out.len(), 3 * 256 * 256);
            for x in [20usize, 128, 230] {
                let got = f32::from(out[3 * (100 * 256 + x)]);
                assert!((got - x as f32 * 200.0 / 256.0).abs() < 4.0, "{w}×{h} at {x}: {got}");
            }
            assert!(prepare(&picture(w, h, |_, _| 77), 256).unwrap().iter().all(|v| *v == 77));
        }
    }

    #[test]
    fn pictures_that_show_nothing_are_refused_in_words() {
        for bad in [picture(10, 500, |_, _| 0), Portrait { width: 80, height: 80, rgb: vec![0; 5].into() }] {
            assert!(matches!(prepare(&bad, 256), Err(AvatarError::Portrait(text)) if text.contains("choose")));
        }
    }
}
