//! Several speakers in one picture, one voice each: who hears which voice is said by a mask per speaker (MODEL.md §9.3,
//! after liveavatar/models/wan/causal_s2v_pipeline.py of Alibaba-Quark/LiveAvatar at 9c2c38d).
//!
//! Masks are grown by a tenth of their speaker's box. A place hears every voice whose speaker is not kept from it by
//! another speaker's grown mask, so the background hears all and a face only its own. Masks come as pictures; the official
//! program draws them with SAM2, which is not part of this one.

use candle_core::{Device, Tensor};

use crate::model::{
    Error, Result,
    dit::{BlockAudio, Dit},
    picture,
};

/// Part of a speaker's box by which its mask grows on each side.
const GROWTH: f64 = 0.1;

/// One mask as 8-bit grey, row by row, of the source picture's size; 128 and above belong to the speaker.
pub struct Mask<'a> {
    pub grey: &'a [u8],
    pub width: usize,
    pub height: usize,
}

/// For each speaker what its voice reaches, `[rows · columns, 1]` of the patch grid with patches of `patch` pixels, from
/// masks that pass the same resize and crop as the reference picture on its way to `output` (height, width).
///
/// # Errors
/// [`Error::Input`] for fewer than two masks, an empty one, or one of the wrong size.
pub fn reach(masks: &[Mask], output: (usize, usize), patch: usize) -> Result<Vec<Tensor>> {
    if masks.len() < 2 {
        return Err(Error::Input("several speakers need a mask each, at least two".into()));
    }
    let (rows, columns) = (output.0 / patch.max(1), output.1 / patch.max(1));
    let mut grown = Vec::with_capacity(masks.len());
    for (i, m) in masks.iter().enumerate() {
        if m.grey.len() != m.width * m.height {
            return Err(Error::Input(format!("mask {} of {}×{} has {} bytes", i + 1, m.width, m.height, m.grey.len())));
        }
        let rgb: Vec<u8> = m.grey.iter().flat_map(|&v| [if v >= 128 { 255 } else { 0 }; 3]).collect();
        let fitted = picture::prepare(&rgb, (m.width, m.height), output)?.get(0)?.flatten_all()?.to_vec1::<f32>()?;
        let inside: Vec<bool> = fitted.iter().map(|v| *v >= 0.0).collect();
        let Some(inside) = grow(&inside, output.1) else {
            return Err(Error::Input(format!(
                "mask {} shows nobody inside the output picture; white must cover the speaker",
                i + 1
            )));
        };
        let covered = |r: usize, c: usize| {
            (r * patch..(r + 1) * patch).any(|y| inside[y * output.1..][c * patch..(c + 1) * patch].contains(&true))
        };
        grown.push((0..rows * columns).map(|i| covered(i / columns, i % columns)).collect::<Vec<bool>>());
    }
    let own = |a: usize| {
        let free = |i: usize| !grown.iter().enumerate().any(|(b, other)| b != a && other[i]);
        let values: Vec<f32> = (0..rows * columns).map(|i| f32::from(u8::from(free(i)))).collect();
        Ok(Tensor::from_vec(values, (rows * columns, 1), &Device::Cpu)?)
    };
    (0..masks.len()).map(own).collect()
}

/// Grows a mask by [`GROWTH`] of its box in both directions; none if it is empty.
fn grow(inside: &[bool], width: usize) -> Option<Vec<bool>> {
    let height = inside.len() / width.max(1);
    let places = || inside.iter().enumerate().filter(|(_, v)| **v).map(|(i, _)| (i / width, i % width));
    let (top, bottom) = (places().map(|p| p.0).min()?, places().map(|p| p.0).max()?);
    let (left, right) = (places().map(|p| p.1).min()?, places().map(|p| p.1).max()?);
    let by = |from: usize, to: usize| ((to - from + 1) as f64 * GROWTH).round() as usize;
    let (dy, dx) = (by(top, bottom), by(left, right));
    // one axis after the other: a box grows like that
    let spread = |line: &[bool], d: usize| -> Vec<bool> {
        (0..line.len()).map(|i| line[i.saturating_sub(d)..(i + d + 1).min(line.len())].contains(&true)).collect()
    };
    let wide: Vec<bool> = inside.chunks(width).flat_map(|row| spread(row, dx)).collect();
    let mut out = vec![false; wide.len()];
    for x in 0..width {
        let column: Vec<bool> = (0..height).map(|y| wide[y * width + x]).collect();
        for (y, v) in spread(&column, dy).into_iter().enumerate() {
            out[y * width + x] = v;
        }
    }
    Some(out)
}

/// The voices of a block or clip as the transformer hears them: one speaker's features `[layers, channels, frames]`, or
/// several speakers' one after the other, `[speakers · layers, channels, frames]`, with what each one reaches.
pub(super) fn hear(dit: &Dit, features: &Tensor, reach: &[Tensor]) -> Result<BlockAudio> {
    if reach.is_empty() {
        return dit.audio(features);
    }
    let rows = features.dim(0)?;
    if rows % reach.len() != 0 {
        return Err(Error::Input(format!("features of {rows} layers do not belong to {} speakers", reach.len())));
    }
    let layers = rows / reach.len();
    let part = |(i, mask): (usize, &Tensor)| -> Result<(BlockAudio, Tensor)> {
        Ok((dit.audio(&features.narrow(0, i * layers, layers)?)?, mask.to_device(features.device())?))
    };
    BlockAudio::together(reach.iter().enumerate().map(part).collect::<Result<_>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// White in columns `from..to` of 64 × 64.
    fn stripe(from: usize, to: usize) -> Vec<u8> {
        (0..64 * 64).map(|i| if (from..to).contains(&(i % 64)) { 255 } else { 0 }).collect()
    }

    fn reached(stripes: &[(usize, usize)]) -> Vec<Vec<f32>> {
        let greys: Vec<Vec<u8>> = stripes.iter().map(|(a, b)| stripe(*a, *b)).collect();
        let masks: Vec<Mask> = greys.iter().map(|g| Mask { grey: g, width: 64, height: 64 }).collect();
        let row = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap()[..8].to_vec();
        reach(&masks, (64, 64), 8).unwrap().into_iter().map(row).collect()
    }

    #[test]
    fn a_face_hears_its_own_voice_and_the_background_hears_all() {
        // columns 0..16 and 40..60; grown by 2 they cover patches 0..=2 and 4..=7
        let heard = reached(&[(0, 16), (40, 60)]);
        assert_eq!(heard[0], [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(heard[1], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn masks_that_cannot_be_used_are_refused() {
        let (white, black) = (stripe(0, 9), stripe(0, 0));
        let mask = |grey| Mask { grey, width: 64, height: 64 };
        assert!(reach(&[mask(&white)], (64, 64), 8).is_err());
        let nobody = reach(&[mask(&white), mask(&black)], (64, 64), 8).unwrap_err().to_string();
        assert!(nobody.contains("mask 2"), "{nobody}");
        assert!(reach(&[mask(&white), Mask { grey: &white, width: 9, height: 9 }], (64, 64), 8).is_err());
    }
}
