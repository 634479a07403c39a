//! Packed RGB to planar YUV 4:2:0, BT.601 limited range, and back, and scaling of the planes.

use super::CodecError;
use crate::media::{Frame, I420, Pixels};
use std::borrow::Cow;

// BT.601 limited range in 16.16 fixed point: Y = 16 + 219 (0.299 R + 0.587 G + 0.114 B) / 255, and so on
// (ITU-R BT.601-7 §2.5). The rows of U and V each sum to zero, so grey stays exactly 128.
const Y: [i32; 3] = [16_829, 33_039, 6_416];
const U: [i32; 3] = [-9_714, -19_071, 28_785];
const V: [i32; 3] = [28_784, -24_103, -4_681];

/// A frame as the encoder wants it. Chroma is the mean of each 2 × 2 pixels.
///
/// # Errors
/// The buffer is not as long as its form and size say, or a side is odd or zero.
pub fn to_i420(frame: &Frame) -> Result<I420, CodecError> {
    let (w, h) = (frame.width as usize, frame.height as usize);
    if w == 0 || h == 0 || w % 2 != 0 || h % 2 != 0 {
        return Err(CodecError::Picture(format!("a picture of {w}×{h} cannot be 4:2:0: both sides must be even")));
    }
    let (bytes, form, need) = match &frame.pixels {
        Pixels::Rgb(bytes) => (bytes, "RGB", 3 * w * h),
        Pixels::I420(bytes) => (bytes, "I420", w * h / 2 * 3),
    };
    if bytes.len() != need {
        let got = bytes.len();
        return Err(CodecError::Picture(format!("a picture of {w}×{h} needs {need} bytes of {form}, not {got}")));
    }
    if let Pixels::I420(_) = frame.pixels {
        let (y, chroma) = bytes.split_at(w * h);
        let (u, v) = chroma.split_at(w * h / 4);
        let (width, height) = (frame.width, frame.height);
        return Ok(I420 { width, height, y: y.into(), u: u.into(), v: v.into() });
    }
    let mut out = I420 {
        width: frame.width,
        height: frame.height,
        y: vec![0; w * h],
        u: vec![0; w * h / 4],
        v: vec![0; w * h / 4],
    };
    let rows = bytes.chunks_exact(6 * w).zip(out.y.chunks_exact_mut(2 * w));
    let chroma = out.u.chunks_exact_mut(w / 2).zip(out.v.chunks_exact_mut(w / 2));
    for ((rgb, luma), (u, v)) in rows.zip(chroma) {
        let (top, bottom) = rgb.split_at(3 * w);
        let (luma_top, luma_bottom) = luma.split_at_mut(w);
        let pairs = top.chunks_exact(6).zip(bottom.chunks_exact(6));
        let lumas = luma_top.chunks_exact_mut(2).zip(luma_bottom.chunks_exact_mut(2));
        for (((t, b), (yt, yb)), (u, v)) in pairs.zip(lumas).zip(u.iter_mut().zip(v.iter_mut())) {
            yt[0] = luma_of(t[0], t[1], t[2]);
            yt[1] = luma_of(t[3], t[4], t[5]);
            yb[0] = luma_of(b[0], b[1], b[2]);
            yb[1] = luma_of(b[3], b[4], b[5]);
            let sum = |c: usize| i32::from(t[c]) + i32::from(t[c + 3]) + i32::from(b[c]) + i32::from(b[c + 3]);
            let (r, g, bl) = (sum(0), sum(1), sum(2));
            *u = chroma_of(U, r, g, bl);
            *v = chroma_of(V, r, g, bl);
        }
    }
    Ok(out)
}

/// A frame as packed RGB; planes give each 2 × 2 pixels one chroma.
///
/// # Errors
/// The buffer is not as long as its form and size say.
pub fn to_rgb(frame: &Frame) -> Result<Cow<'_, [u8]>, CodecError> {
    let (w, h) = (frame.width as usize, frame.height as usize);
    let (bytes, need) = match &frame.pixels {
        Pixels::Rgb(bytes) => (Cow::Borrowed(&bytes[..]), 3 * w * h),
        Pixels::I420(planes) if planes.len() == w * h + 2 * w.div_ceil(2) * h.div_ceil(2) => {
            (Cow::Owned(rgb_of(planes, w, h)), 3 * w * h)
        }
        Pixels::I420(planes) => (Cow::Borrowed(&planes[..]), w * h + 2 * w.div_ceil(2) * h.div_ceil(2)),
    };
    if bytes.len() != need {
        return Err(CodecError::Picture(format!("a picture of {w}×{h} has {} bytes instead of {need}", bytes.len())));
    }
    Ok(bytes)
}

/// Planes of BT.601 limited range as packed RGB (ITU-R BT.601-7 §2.5, solved for R, G and B). Odd sides have a chroma
/// value of their own at the end.
pub(super) fn rgb_of(planes: &[u8], width: usize, height: usize) -> Vec<u8> {
    let (cw, ch) = (width.div_ceil(2), height.div_ceil(2));
    let (y, rest) = planes.split_at(width * height);
    let (u, v) = rest.split_at(cw * ch);
    let mut rgb = Vec::with_capacity(3 * width * height);
    for row in 0..height {
        for column in 0..width {
            let c = row / 2 * cw + column / 2;
            let luma = (f32::from(y[row * width + column]) - 16.0) * 255.0 / 219.0;
            let (u, v) = ((f32::from(u[c]) - 128.0) * 255.0 / 224.0, (f32::from(v[c]) - 128.0) * 255.0 / 224.0);
            let part = |x: f32| (x + 0.5).clamp(0.0, 255.0) as u8;
            rgb.extend([part(luma + 1.402 * v), part(luma - 0.344_14 * u - 0.714_14 * v), part(luma + 1.772 * u)]);
        }
    }
    rgb
}

#[inline(always)]
fn luma_of(r: u8, g: u8, b: u8) -> u8 {
    // At most 235: no clamp needed.
    ((Y[0] * i32::from(r) + Y[1] * i32::from(g) + Y[2] * i32::from(b) + (16 << 16) + (1 << 15)) >> 16) as u8
}

/// Of the sum of four pixels.
#[inline(always)]
fn chroma_of(k: [i32; 3], r: i32, g: i32, b: i32) -> u8 {
    ((k[0] * r + k[1] * g + k[2] * b + (128 << 18) + (1 << 17)) >> 18) as u8
}

/// Scales by area (each output pixel is the weighted mean of what it covers): right for making smaller, which is what
/// a poor network needs. Sides must be even and not zero.
pub fn scale_i420(picture: &I420, width: u32, height: u32) -> Result<I420, CodecError> {
    if width == 0 || height == 0 || width % 2 != 0 || height % 2 != 0 {
        return Err(CodecError::Picture(format!("cannot scale to {width}×{height}: both sides must be even")));
    }
    let (w, h) = (picture.width as usize, picture.height as usize);
    if picture.y.len() != w * h || picture.u.len() != w * h / 4 || picture.v.len() != w * h / 4 {
        return Err(CodecError::Picture(format!("the planes of a {w}×{h} picture have the wrong lengths")));
    }
    let (to_w, to_h) = (width as usize, height as usize);
    Ok(I420 {
        width,
        height,
        y: scale_plane(&picture.y, w, h, to_w, to_h),
        u: scale_plane(&picture.u, w / 2, h / 2, to_w / 2, to_h / 2),
        v: scale_plane(&picture.v, w / 2, h / 2, to_w / 2, to_h / 2),
    })
}

fn scale_plane(from: &[u8], w: usize, h: usize, to_w: usize, to_h: usize) -> Vec<u8> {
    if (w, h) == (to_w, to_h) {
        return from.to_vec();
    }
    // Separable: rows first into f32, then columns.
    let across = coverage(w, to_w);
    let down = coverage(h, to_h);
    let mut rows = vec![0.0f32; to_w * h];
    for (line, out) in from.chunks_exact(w).zip(rows.chunks_exact_mut(to_w)) {
        for (o, (first, weights)) in out.iter_mut().zip(&across) {
            *o = line[*first..].iter().zip(weights).map(|(s, k)| f32::from(*s) * k).sum();
        }
    }
    let mut out = vec![0u8; to_w * to_h];
    let mut line = vec![0.0f32; to_w];
    for (o, (first, weights)) in out.chunks_exact_mut(to_w).zip(&down) {
        line.fill(0.5);
        for (k, row) in weights.iter().zip(rows[first * to_w..].chunks_exact(to_w)) {
            for (l, r) in line.iter_mut().zip(row) {
                *l += k * r;
            }
        }
        for (o, l) in o.iter_mut().zip(&line) {
            *o = *l as u8;
        }
    }
    out
}

/// For each output pixel: the first input pixel it covers and the share of each; shares sum to one.
fn coverage(from: usize, to: usize) -> Vec<(usize, Vec<f32>)> {
    let ratio = from as f64 / to as f64;
    (0..to)
        .map(|i| {
            let (start, end) = (i as f64 * ratio, (i + 1) as f64 * ratio);
            let first = (start as usize).min(from - 1);
            let last = ((end - 1e-9) as usize).clamp(first, from - 1);
            let weights: Vec<f64> =
                (first..=last).map(|p| (end.min((p + 1) as f64) - start.max(p as f64)).max(0.0)).collect();
            let total: f64 = weights.iter().sum();
            (first, weights.into_iter().map(|k| (k / total) as f32).collect())
        })
        .collect()
}
