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
/// 3/2]` bytes, each frame Y, then U, then V, in the fixed point of `codec::to_i420`, which gives the same bytes.
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

/// What a pixel takes from its neighbours, as Pillow names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    Bilinear,
    Lanczos,
}

impl Filter {
    fn support(self) -> f64 {
        if self == Filter::Lanczos { 3.0 } else { 1.0 }
    }

    fn at(self, x: f64) -> f64 {
        let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) };
        match self {
            Filter::Bilinear => (1.0 - x.abs()).max(0.0),
            Filter::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Filter::Lanczos => 0.0,
        }
    }
}

/// For each output position the first input position and the weights from there, which sum to one.
fn weights(filter: Filter, input: usize, output: usize) -> Vec<(usize, Vec<f64>)> {
    let scale = input as f64 / output as f64;
    let filter_scale = scale.max(1.0);
    let support = filter.support() * filter_scale;
    (0..output)
        .map(|i| {
            let centre = (i as f64 + 0.5) * scale;
            let first = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(input);
            let weights: Vec<f64> =
                (first..end).map(|x| filter.at((x as f64 - centre + 0.5) * (1.0 / filter_scale))).collect();
            let sum: f64 = weights.iter().sum();
            (first, weights.into_iter().map(|w| if sum != 0.0 { w / sum } else { w }).collect())
        })
        .collect()
}

/// The same in Pillow's fixed point.
fn coefficients(filter: Filter, input: usize, output: usize) -> Vec<(usize, Vec<i32>)> {
    let fixed = |w: f64| {
        let v = w * f64::from(1u32 << PRECISION);
        if v < 0.0 { (v - 0.5) as i32 } else { (v + 0.5) as i32 }
    };
    weights(filter, input, output).into_iter().map(|(first, w)| (first, w.into_iter().map(fixed).collect())).collect()
}

/// A plane of `width`×`height` with one of its axes resized, in floats.
fn resize_axis(from: &[f32], (width, height): (usize, usize), across: bool, size: usize) -> Vec<f32> {
    let (count, new) = if across { (width, (size, height)) } else { (height, (width, size)) };
    let table = weights(Filter::Bilinear, count, size);
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

/// Resizes interleaved 8-bit RGB as Pillow's `resize` before version 13 does, bit for bit: across, then down. (Pillow 13
/// takes the cheaper order, which moves some pixels by one level; the reference values are of the older.)
pub fn resize(
    rgb: &[u8],
    (width, height): (usize, usize),
    (new_width, new_height): (usize, usize),
    filter: Filter,
) -> Vec<u8> {
    let clip = |sum: i64| (sum >> PRECISION).clamp(0, 255) as u8;
    let half = 1i64 << (PRECISION - 1);
    let mut rows = rgb.to_vec();
    if new_width != width {
        let table = coefficients(filter, width, new_width);
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
        for (first, weights) in coefficients(filter, height, new_height) {
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

/// Refuses pixels that are not as many as the size says, and sizes of nothing.
fn usable(rgb: &[u8], (w, h): (usize, usize), (height, width): (usize, usize)) -> Result<()> {
    if w == 0 || h == 0 || height == 0 || width == 0 || rgb.len() != w * h * 3 {
        return Err(Error::Input(format!("a picture of {w}×{h} pixels with {} bytes cannot be used", rgb.len())));
    }
    Ok(())
}

/// As [`prepare`] for frames of a pose video, which the official program normalises first: resized in floats (with
/// antialiasing, as torchvision does), and mid-grey where the picture is smaller.
pub fn prepare_float(rgb: &[u8], (w, h): (usize, usize), (height, width): (usize, usize)) -> Result<Tensor> {
    usable(rgb, (w, h), (height, width))?;
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
    usable(rgb, (w, h), (height, width))?;
    let (nw, nh) = short_side((w, h), (height, width))?;
    let small = if (nw, nh) == (w, h) { rgb.to_vec() } else { resize(rgb, (w, h), (nw, nh), Filter::Bilinear) };
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

/// Interleaved 8-bit RGB covering `height`×`width`: resized with Lanczos until both sides reach, and what stands over is
/// cut off on both sides alike (wan/textimage2video.py::i2v of Wan-Video/Wan2.2 at 42bf4cf). `[3, 1, height, width]` in
/// −1..1, f32, on the CPU.
pub fn cover(rgb: &[u8], (w, h): (usize, usize), (height, width): (usize, usize)) -> Result<Tensor> {
    usable(rgb, (w, h), (height, width))?;
    let scale = (width as f64 / w as f64).max(height as f64 / h as f64);
    let side = |n: usize| (n as f64 * scale).round_ties_even() as usize;
    let (nw, nh) = (side(w).max(width), side(h).max(height));
    if nw.max(nh) > 1 << 16 {
        return Err(Error::Input(format!("a picture of {w}×{h} pixels is too elongated to be used")));
    }
    let large = if (nw, nh) == (w, h) { rgb.to_vec() } else { resize(rgb, (w, h), (nw, nh), Filter::Lanczos) };
    let (left, top) = ((nw - width) / 2, (nh - height) / 2);
    let mut out = Vec::with_capacity(3 * height * width);
    for c in 0..3 {
        for y in 0..height {
            let row = ((y + top) * nw + left) * 3 + c;
            out.extend(large[row..].iter().step_by(3).take(width).map(|v| f32::from(*v) / 255.0 * 2.0 - 1.0));
        }
    }
    Ok(Tensor::from_vec(out, (3, 1, height, width), &Device::Cpu)?)
}

/// Interleaved 8-bit RGB stretched to `height`×`width` as torch's `interpolate(mode='bicubic')` does it on floats: four
/// taps a side (a = −0.75), the edge repeated, no antialiasing, overshoots kept (wan/image2video.py of Wan-Video/Wan2.2 at
/// 42bf4cf; ATen's UpSampleKernel). `[3, 1, height, width]` about −1..1, f32, on the CPU.
pub fn bicubic(rgb: &[u8], (w, h): (usize, usize), (height, width): (usize, usize)) -> Result<Tensor> {
    usable(rgb, (w, h), (height, width))?;
    const A: f32 = -0.75;
    let near = |x: f32| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f32| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    let table = |input: usize, output: usize| -> Vec<([usize; 4], [f32; 4])> {
        let scale = input as f32 / output as f32;
        let taps = |i: usize| {
            let at = scale * (i as f32 + 0.5) - 0.5;
            let part = at - at.floor();
            let place = |k: isize| (at.floor() as isize + k).clamp(0, input as isize - 1) as usize;
            ([-1, 0, 1, 2].map(place), [far(part + 1.0), near(part), near(1.0 - part), far(2.0 - part)])
        };
        (0..output).map(taps).collect()
    };
    let (across, down) = (table(w, width), table(h, height));
    let mut out = Vec::with_capacity(3 * height * width);
    for c in 0..3 {
        let value = |x: usize, y: usize| (f32::from(rgb[(y * w + x) * 3 + c]) / 255.0 - 0.5) / 0.5;
        for (rows, row_weights) in &down {
            for (columns, weights) in &across {
                let row = |y: usize| columns.iter().zip(weights).map(|(&x, k)| value(x, y) * k).sum::<f32>();
                out.push(rows.iter().zip(row_weights).map(|(&y, k)| row(y) * k).sum::<f32>());
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
        let resize = |filter| resize(&grey, (40, 20), (17, 31), filter);
        assert!([Filter::Bilinear, Filter::Lanczos].into_iter().flat_map(resize).all(|p| p == 77));
        let t = prepare(&grey, (40, 20), (64, 64)).unwrap();
        assert_eq!(t.dims(), [3, 1, 64, 64]);
        assert!(prepare(&grey, (40, 21), (64, 64)).is_err());
    }

    /// Some colours of 8 bits.
    fn pattern(w: usize, h: usize) -> Vec<u8> {
        let value = |i: usize| {
            let (x, y, c) = (i / 3 % w, i / 3 / w, i % 3);
            ((x * 37 + y * 91 + c * 53 + x * y * 7) % 256) as u8
        };
        (0..3 * w * h).map(value).collect()
    }

    #[test]
    fn stretching_is_torchs_bicubic() {
        // torch 2.15, interpolate(mode='bicubic') of the same pattern
        let want = [
            -0.95289, -0.41624, 0.1585, 0.70725, -0.44097, 0.42981, -0.63859, -0.21122, 0.53245, -0.35244, -0.51721,
            0.3282, 0.14048, -0.6508, 0.55831, 0.27041, -0.71611, 0.36279, 0.85139, -0.26614, 0.03549, 0.77421,
            -0.29235, 0.80882,
        ];
        let got = bicubic(&pattern(7, 5), (7, 5), (6, 4)).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < 2e-5, "{got} instead of {want}");
        }
    }

    #[test]
    fn covering_is_pillows_lanczos_and_the_middle() {
        // Pillow 13: resize((8, 7), LANCZOS), rows 1 to 4, green; its order of axes differs, so a level is allowed
        let want = [
            163, 122, 104, 148, 114, 158, 140, 99, 112, 140, 165, 133, 133, 100, 126, 153, 197, 114, 122, 131, 143,
            152, 160, 76, 128, 173, 124, 128, 130, 135, 84, 142,
        ];
        let green = cover(&pattern(12, 10), (12, 10), (4, 8)).unwrap().get(1).unwrap();
        for (got, want) in green.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().zip(want) {
            assert!((got * 127.5 + 127.5 - want as f32).abs() < 1.01, "{} instead of {want}", got * 127.5 + 127.5);
        }
    }

    #[test]
    fn what_a_pose_frame_does_not_cover_is_mid_grey() {
        // the short side is fitted, so an elongated output leaves bars
        let t = prepare_float(&[255; 30 * 30 * 3], (30, 30), (64, 128)).unwrap();
        let row = t.get(0).unwrap().get(0).unwrap().get(32).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!((row[0], row[127]), (0.0, 0.0));
        assert!((row[64] - 1.0).abs() < 1e-5);
    }
}
