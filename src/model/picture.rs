//! The reference picture on its way to the network: the search for an output size, Pillow's antialiased bilinear
//! resize in 8-bit fixed point, and the centre crop with black padding (MODEL.md §8.1, §8.2;
//! wan/speech2video.py::get_size_less_than_area of Wan-Video/Wan2.2 at 42bf4cf; torchvision Resize and CenterCrop;
//! Pillow's Resample.c).

use candle_core::{Device, Tensor};

use super::{Error, Result};

/// Sides are multiples of this.
const DIVISOR: usize = 64;

/// Output height and width for a picture of `height`×`width` and an area of at most `area` pixels.
pub fn output_size(height: usize, width: usize, area: usize) -> Result<(usize, usize)> {
    if height == 0 || width == 0 || height > 1 << 20 || width > 1 << 20 {
        return Err(Error::Input(format!("a picture of {width}×{height} pixels cannot be used")));
    }
    let (h, w, target) = (height as f64, width as f64, area as f64);
    let (smallest, largest) = if height * width <= area {
        (0.1, 1.0)
    } else {
        let d = (DIVISOR - 1) as f64;
        let (a, b, c) = (h * w, d * (h + w), d * d - target);
        // 2ac, not 4ac: as the official program has it
        ((-b + (b * b - 2.0 * a * c).max(0.0).sqrt()) / (2.0 * a), (target / (h * w)).sqrt())
    };
    for i in 0..100 {
        let scale = largest - (largest - smallest) * i as f64 / 100.0;
        let padded = |side: f64| ((side * scale).max(0.0) as usize).next_multiple_of(DIVISOR);
        let (ph, pw) = (padded(h), padded(w));
        if ph * pw <= area && ph * pw > 0 {
            return Ok((ph, pw));
        }
    }
    let aspect = w / h;
    let whole = |side: f64| (side / DIVISOR as f64).floor() as usize * DIVISOR;
    let (mut pw, mut ph) = (whole((target * aspect).sqrt()), whole((target / aspect).sqrt()));
    if pw >= width || ph >= height {
        (pw, ph) = (width / DIVISOR * DIVISOR, height / DIVISOR * DIVISOR);
    }
    if pw == 0 || ph == 0 {
        return Err(Error::Input(format!(
            "a picture of {width}×{height} pixels has no size of at most {area} pixels with sides that are multiples of \
             {DIVISOR}; take a larger area or a less elongated picture"
        )));
    }
    Ok((ph, pw))
}

/// Pictures `[3, frames, height, width]` in −1…1 as planar YUV 4:2:0 in BT.601 limited range: `[frames, height · width ·
/// 3/2]` bytes, each frame Y, then U, then V, in the fixed point of `codec::rgb_to_i420`, which gives the same bytes.
pub fn i420(planes: &Tensor) -> candle_core::Result<Tensor> {
    let (c, t, h, w) = planes.dims4()?;
    if c != 3 || h % 2 != 0 || w % 2 != 0 {
        candle_core::bail!("pictures of {w}×{h} with {c} planes cannot be 4:2:0");
    }
    let values = planes.flatten_all()?.to_dtype(candle_core::DType::F32)?.to_vec1::<f32>()?;
    let (pixels, all) = (h * w, t * h * w);
    let mut out = vec![0u8; t * pixels / 2 * 3];
    for (f, frame) in out.chunks_exact_mut((pixels / 2 * 3).max(1)).enumerate() {
        let (luma, chroma) = frame.split_at_mut(pixels);
        let (u, v) = chroma.split_at_mut(pixels / 4);
        for (i, (u, v)) in u.iter_mut().zip(v).enumerate() {
            let (row, column) = (i / (w / 2) * 2, i % (w / 2) * 2);
            let mut sum = [0i32; 3];
            for k in 0..4 {
                let at = (row + k / 2) * w + column + k % 2;
                let rgb = [0, 1, 2].map(|c| level(values[c * all + f * pixels + at]));
                sum.iter_mut().zip(rgb).for_each(|(s, v)| *s += v);
                let [r, g, b] = rgb;
                luma[at] = ((16_829 * r + 33_039 * g + 6_416 * b + (16 << 16) + (1 << 15)) >> 16) as u8;
            }
            let [r, g, b] = sum;
            *u = ((-9_714 * r - 19_071 * g + 28_785 * b + (128 << 18) + (1 << 17)) >> 18) as u8;
            *v = ((28_784 * r - 24_103 * g - 4_681 * b + (128 << 18) + (1 << 17)) >> 18) as u8;
        }
    }
    Tensor::from_vec(out, (t, pixels / 2 * 3), planes.device())
}

/// −1…1 to 0…255, to nearest; what is not a number becomes black.
fn level(v: f32) -> i32 {
    i32::from((v.clamp(-1.0, 1.0) * 127.5 + 128.0) as u8)
}

/// Bits behind the point in Pillow's 8-bit coefficients.
const PRECISION: u32 = 32 - 8 - 2;

/// For each output position the first input position and the weights from there, which sum to one.
fn weights(input: usize, output: usize) -> Vec<(usize, Vec<f64>)> {
    let scale = input as f64 / output as f64;
    let filter_scale = scale.max(1.0);
    let support = filter_scale;
    (0..output)
        .map(|i| {
            let centre = (i as f64 + 0.5) * scale;
            let first = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(input);
            let weights: Vec<f64> =
                (first..end).map(|x| (1.0 - ((x as f64 - centre + 0.5) / filter_scale).abs()).max(0.0)).collect();
            let sum: f64 = weights.iter().sum();
            (first, weights.into_iter().map(|w| if sum != 0.0 { w / sum } else { w }).collect())
        })
        .collect()
}

/// The same in Pillow's fixed point.
fn coefficients(input: usize, output: usize) -> Vec<(usize, Vec<i32>)> {
    let fixed = |w: f64| {
        let v = w * f64::from(1u32 << PRECISION);
        if v < 0.0 { (v - 0.5) as i32 } else { (v + 0.5) as i32 }
    };
    weights(input, output).into_iter().map(|(first, w)| (first, w.into_iter().map(fixed).collect())).collect()
}

/// A plane of `width`×`height` with one of its axes resized, in floats.
fn resize_axis(from: &[f32], (width, height): (usize, usize), across: bool, size: usize) -> Vec<f32> {
    let (count, new) = if across { (width, (size, height)) } else { (height, (width, size)) };
    let table = weights(count, size);
    let mut out = Vec::with_capacity(new.0 * new.1);
    for y in 0..new.1 {
        for x in 0..new.0 {
            let (first, weights) = if across { &table[x] } else { &table[y] };
            let at = |i: usize| if across { y * width + i } else { i * width + x };
            let taps = weights.iter().enumerate().map(|(i, w)| f64::from(from[at(first + i)]) * w);
            out.push(taps.sum::<f64>() as f32);
        }
    }
    out
}

/// Resizes interleaved 8-bit RGB as Pillow's `resize(BILINEAR)` before version 13 does, bit for bit: across, then down.
/// (Pillow 13 takes the cheaper order, which moves some pixels by one level; the reference values are of the older.)
pub fn resize(rgb: &[u8], (width, height): (usize, usize), (new_width, new_height): (usize, usize)) -> Vec<u8> {
    let clip = |sum: i64| (sum >> PRECISION).clamp(0, 255) as u8;
    let half = 1i64 << (PRECISION - 1);
    let mut rows = rgb.to_vec();
    if new_width != width {
        let table = coefficients(width, new_width);
        let mut out = Vec::with_capacity(height * new_width * 3);
        for row in rgb.chunks_exact(width * 3).take(height) {
            for (first, weights) in &table {
                for c in 0..3 {
                    let taps = row[first * 3 + c..].iter().step_by(3).zip(weights);
                    out.push(clip(half + taps.map(|(&p, &w)| i64::from(p) * i64::from(w)).sum::<i64>()));
                }
            }
        }
        rows = out;
    }
    if new_height != height {
        let stride = new_width * 3;
        let mut out = Vec::with_capacity(new_height * stride);
        for (first, weights) in coefficients(height, new_height) {
            for x in 0..stride {
                let taps = rows[first * stride + x..].iter().step_by(stride).zip(&weights);
                out.push(clip(half + taps.map(|(&p, &w)| i64::from(p) * i64::from(w)).sum::<i64>()));
            }
        }
        rows = out;
    }
    rows
}

/// Size of a picture whose short side is that of the output.
fn short_side((w, h): (usize, usize), (height, width): (usize, usize)) -> Result<(usize, usize)> {
    let short = height.min(width);
    let long = |long: usize, of: usize| ((short * long) as f64 / of as f64) as usize;
    let (nw, nh) = if w <= h { (short, long(h, w)) } else { (long(w, h), short) };
    if nw.max(nh) > 1 << 16 {
        return Err(Error::Input(format!("a picture of {w}×{h} pixels is too elongated to be used")));
    }
    Ok((nw, nh))
}

/// Where a crop of `crop` begins in `size`; negative where it is larger.
fn offset(size: usize, crop: usize) -> isize {
    if size < crop { -(((crop - size) / 2) as isize) } else { ((size - crop) as f64 / 2.0).round_ties_even() as isize }
}

/// As [`prepare`] for frames of a pose video, which the official program normalises first: resized in floats (with
/// antialiasing, as torchvision does), and mid-grey where the picture is smaller.
pub fn prepare_float(rgb: &[u8], (w, h): (usize, usize), (height, width): (usize, usize)) -> Result<Tensor> {
    if w == 0 || h == 0 || height == 0 || width == 0 || rgb.len() != w * h * 3 {
        return Err(Error::Input(format!("a picture of {w}×{h} pixels with {} bytes cannot be used", rgb.len())));
    }
    let (nw, nh) = short_side((w, h), (height, width))?;
    let (top, left) = (offset(nh, height), offset(nw, width));
    let mut out = Vec::with_capacity(3 * height * width);
    for c in 0..3 {
        let plane: Vec<f32> = rgb[c..].iter().step_by(3).map(|&v| f32::from(v) / 255.0 * 2.0 - 1.0).collect();
        let plane = resize_axis(&resize_axis(&plane, (w, h), true, nw), (nw, h), false, nh);
        for y in 0..height as isize {
            for x in 0..width as isize {
                let (sy, sx) = (y + top, x + left);
                let inside = (0..nh as isize).contains(&sy) && (0..nw as isize).contains(&sx);
                out.push(if inside { plane[sy as usize * nw + sx as usize] } else { 0.0 });
            }
        }
    }
    Ok(Tensor::from_vec(out, (3, 1, height, width), &Device::Cpu)?)
}

/// Prepares interleaved 8-bit RGB: short side to `min(height, width)`, centre crop to `height`×`width`, black where the
/// picture is smaller. `[3, 1, height, width]` in −1..1, f32, on the CPU.
pub fn prepare(rgb: &[u8], (w, h): (usize, usize), (height, width): (usize, usize)) -> Result<Tensor> {
    if w == 0 || h == 0 || height == 0 || width == 0 || rgb.len() != w * h * 3 {
        return Err(Error::Input(format!("a picture of {w}×{h} pixels with {} bytes cannot be used", rgb.len())));
    }
    let (nw, nh) = short_side((w, h), (height, width))?;
    let small = if (nw, nh) == (w, h) { rgb.to_vec() } else { resize(rgb, (w, h), (nw, nh)) };
    let (top, left) = (offset(nh, height), offset(nw, width));
    let mut out = Vec::with_capacity(3 * height * width);
    for c in 0..3 {
        for y in 0..height as isize {
            for x in 0..width as isize {
                let (sy, sx) = (y + top, x + left);
                let inside = (0..nh as isize).contains(&sy) && (0..nw as isize).contains(&sx);
                let v = if inside { small[(sy as usize * nw + sx as usize) * 3 + c] } else { 0 };
                out.push(f32::from(v) / 255.0 * 2.0 - 1.0);
            }
        }
    }
    Ok(Tensor::from_vec(out, (3, 1, height, width), &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_sizes() {
        assert_eq!(output_size(1080, 1920, 480 * 832).unwrap(), (448, 832));
        assert!(output_size(0, 4, 4096).is_err());
        assert!(output_size(10, 100_000, 4096).is_err());
    }

    #[test]
    fn a_flat_picture_stays_flat_and_black_surrounds_it() {
        let grey = vec![77u8; 40 * 20 * 3];
        assert!(resize(&grey, (40, 20), (17, 31)).iter().all(|&p| p == 77));
        let t = prepare(&grey, (40, 20), (64, 64)).unwrap();
        assert_eq!(t.dims(), [3, 1, 64, 64]);
        assert!(prepare(&grey, (40, 21), (64, 64)).is_err());
    }
}
