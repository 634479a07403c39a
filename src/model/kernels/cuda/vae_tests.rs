//! The video autoencoder's kernels against plain loops in f64 over the same numbers: fresh inputs, odd sizes; results lie
//! in memory that holds NaN before (`empty` sees to that in tests).

use candle_core::{DType, Device, Tensor};

use super::vae::{self, Bend, Convolution, Form, Video, Way};
use crate::model::picture;

fn card() -> Device {
    static CARD: std::sync::OnceLock<Device> = std::sync::OnceLock::new();
    CARD.get_or_init(|| super::open(0).unwrap()).clone()
}

/// Numbers that bf16 holds, on the card and flat in f64.
fn bf16(shape: &[usize]) -> (Tensor, Vec<f64>) {
    let t = Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
    (t.to_device(&card()).unwrap(), flat(&t))
}

fn f32s(shape: &[usize]) -> (Tensor, Vec<f64>) {
    let t = Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
    (t.to_device(&card()).unwrap(), flat(&t))
}

fn flat(t: &Tensor) -> Vec<f64> {
    let t = t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap().to_dtype(DType::F64).unwrap();
    t.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn close(what: &str, got: &[f64], want: &[f64], bound: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let (mut apart, mut all) = (0.0, 1e-30);
    for (g, w) in got.iter().zip(want) {
        apart += (g - w) * (g - w);
        all += w * w;
    }
    let error = (apart / all).sqrt();
    assert!(error <= bound, "{what}: relative error {error:.2e}, at most {bound:.0e} expected");
}

/// A first summand of a pass that lies in this form, and what it is as `[t, h, w, c]`.
fn summand(form: Form, [t, h, w, c]: [usize; 4]) -> (Tensor, Vec<f64>) {
    let (high, wide) = (h / 2 + 1, w / 2 + 1);
    let (x, x64) = match form {
        Form::Frames => bf16(&[t, h, w, c]),
        Form::Quarters => bf16(&[t, high, wide, 4 * c]),
        Form::Products => bf16(&[2 * t, h, w, c]),
    };
    let value = |i: usize| {
        let (k, px, py, f) = (i % c, i / c % w, i / c / w % h, i / c / w / h);
        match form {
            Form::Frames => x64[i],
            Form::Quarters => {
                let window = (f * high + py.div_ceil(2)) * wide + px.div_ceil(2);
                x64[(window * 4 + py % 2 * 2 + px % 2) * c + k]
            }
            Form::Products => {
                let m = |k: usize| x64[((k * t / 2 + f / 2) * h * w) * c + i % (h * w * c)];
                if f % 2 == 0 { m(0) + m(1) + m(2) } else { m(1) - m(2) - m(3) }
            }
        }
    };
    (x, (0..t * h * w * c).map(value).collect())
}

#[test]
fn card_passes_over_video_agree_with_f64() {
    for (form, t, h, w, c, past) in [
        (Form::Frames, 1, 3, 5, 8, 2),
        (Form::Frames, 3, 2, 7, 96, 2),
        (Form::Frames, 2, 5, 3, 192, 1),
        (Form::Frames, 4, 1, 3, 384, 2),
        (Form::Frames, 1, 3, 3, 640, 0),
        (Form::Quarters, 1, 2, 6, 8, 2),
        (Form::Quarters, 3, 4, 14, 96, 2),
        (Form::Quarters, 2, 10, 6, 192, 1),
        (Form::Quarters, 4, 2, 2, 384, 2),
        (Form::Quarters, 1, 6, 4, 640, 0),
        (Form::Products, 2, 3, 5, 8, 2),
        (Form::Products, 4, 5, 3, 96, 2),
        (Form::Products, 6, 1, 7, 192, 1),
        (Form::Products, 2, 7, 1, 384, 2),
        (Form::Frames, 2, 3, 11, 48, 2),
        (Form::Quarters, 4, 6, 10, 96, 2),
        (Form::Products, 4, 7, 9, 320, 2),
        (Form::Products, 2, 3, 5, 768, 2),
    ] {
        let (p, what) = (h * w, format!("{form:?}, {t}×{h}×{w}×{c}, {past}"));
        let ((x, x64), (y, y64), (bias, b64)) = (summand(form, [t, h, w, c]), bf16(&[t, h, w, c]), f32s(&[c]));
        let ((gain, mut g64), (cache, k64)) = (f32s(&[c]), bf16(&[past.max(1), h, w, c]));
        // With large gains the exponential of SiLU leaves what f32 holds.
        let wild = if c == 320 { 500.0 } else { 1.0 };
        let gain = (gain * wild).unwrap();
        g64.iter_mut().for_each(|g| *g *= wild);
        let video = Video { form, y: Some(y), ..Video::new(x, Some(&bias), t) };
        let cut = Way { bend: Bend::Relu, ..Way::default() };
        let want: Vec<f64> = (0..t * p * c).map(|i| (x64[i] + y64[i] + b64[i % c]).max(0.0)).collect();
        close(&what, &flat(&video.through(&cut).unwrap()), &want, 4e-3);
        let way = Way { gain: Some(&gain), bend: Bend::Silu, cache: (past > 0).then_some(&cache), paired: false };
        let (sum, out) = video.settled_and(&way).unwrap();
        let want: Vec<f64> = (0..t * p * c).map(|i| x64[i] + y64[i] + b64[i % c]).collect();
        close(&what, &flat(&sum), &want, 4e-3);
        let sum = flat(&sum);
        let mut joined = k64[..past * p * c].to_vec();
        for row in sum.chunks_exact(c) {
            let length = row.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-12);
            joined.extend(row.iter().zip(&g64).map(|(v, g)| v / length * g).map(|v| v / (1.0 + (-v).exp())));
        }
        close(&what, &flat(&out), &joined, 4e-3);
        if past > 0 {
            let out = flat(&out);
            assert_eq!(flat(&cache), out[out.len() - past * p * c..], "{what}: what is remembered");
        }
        if past == 2 && t % 2 == 0 {
            let before = flat(&cache);
            let out = video.through(&Way { paired: true, ..way }).unwrap();
            let all = [&before, &joined[past * p * c..]].concat();
            let mut want = Vec::new();
            for (a, sign, b) in [(0, -1.0, 2), (1, 1.0, 2), (2, -1.0, 1), (1, -1.0, 3)] {
                let at = |pair: usize, frame: usize| &all[(2 * pair + frame) * p * c..][..p * c];
                let pairs = (0..t / 2).flat_map(|pair| at(pair, a).iter().zip(at(pair, b)));
                want.extend(pairs.map(|(a, b)| a + sign * b));
            }
            close(&format!("{what}, by pairs"), &flat(&out), &want, 6e-3);
            assert_eq!(flat(&cache), before, "{what}: what is remembered of the same by pairs");
        }
    }
}

#[test]
fn card_convolutions_agree_with_f64() {
    for (t, h, w, cin, cout, taps, side, padding, stride) in [
        (5, 5, 7, 16, 24, 3, 3, (1, 1), (1, 1)),
        (3, 4, 3, 96, 96, 3, 1, (0, 0), (1, 1)),
        (5, 3, 5, 8, 16, 3, 1, (0, 0), (2, 1)),
        (2, 7, 5, 24, 3, 1, 3, (1, 1), (1, 1)),
        (2, 6, 8, 16, 16, 1, 3, (0, 1), (1, 2)),
        (3, 3, 5, 32, 3, 3, 3, (1, 1), (1, 1)),
        (5, 9, 35, 96, 3, 3, 3, (1, 1), (1, 1)),
        (4, 17, 32, 128, 2, 3, 3, (1, 1), (1, 1)),
    ] {
        let (kernel, k64) = bf16(&[cout, cin, taps, side, side]);
        let (bias, _) = f32s(&[cout]);
        let conv = Convolution::new(&kernel, &bias, padding, stride).unwrap();
        let (x, x64) = bf16(&[t, h, w, cin]);
        let extent = |n: usize| (n + padding.0 + padding.1 - side) / stride.1 + 1;
        let (frames, oh, ow, wide) = ((t - taps) / stride.0 + 1, extent(h), extent(w), cout.next_multiple_of(8));
        let got = flat(&conv.run(&x, frames).unwrap());
        let mut want = vec![0.0; frames * oh * ow * wide];
        for (i, out) in want.iter_mut().enumerate().filter(|(i, _)| i % wide < cout) {
            let (o, px, py, f) = (i % wide, i / wide % ow, i / wide / ow % oh, i / wide / ow / oh);
            for (k, ky, kx) in (0..taps * side * side).map(|n| (n / side / side, n / side % side, n % side)) {
                let (sy, sx) =
                    ((py * stride.1 + ky).wrapping_sub(padding.0), (px * stride.1 + kx).wrapping_sub(padding.0));
                if sy < h && sx < w {
                    for c in 0..cin {
                        let weight = k64[(((o * cin + c) * taps + k) * side + ky) * side + kx];
                        *out += weight * x64[(((f * stride.0 + k) * h + sy) * w + sx) * cin + c];
                    }
                }
            }
        }
        let what = format!("{cin}→{cout}, {taps}×{side}×{side}");
        close(&what, &got, &want, 4e-3);
        let mut filled = got.chunks_exact(wide).flat_map(|pixel| &pixel[cout..]);
        assert!(filled.all(|v| *v == 0.0), "{what}: channels that only fill up");
        if cout < 8 && taps == 3 {
            let alone = (0..frames).map(|f| conv.run(&x.narrow(0, f * stride.0, taps).unwrap(), frames).unwrap());
            assert_eq!(alone.flat_map(|y| flat(&y)).collect::<Vec<_>>(), got, "{what}: frame by frame");
        }
    }
}

#[test]
fn card_large_convolutions_round_alike_whole_and_frame_by_frame() {
    // Other numbers of frames have other lists of engines.
    let (t, h, w, c) = (3, 79, 83, 384);
    let ((kernel, k64), (bias, _), (x, x64)) = (bf16(&[c, c, 1, 3, 3]), f32s(&[c]), bf16(&[t, h, w, c]));
    let conv = Convolution::new(&kernel, &bias, (1, 1), (1, 1)).unwrap();
    let whole = flat(&conv.run(&x, t).unwrap());
    let alone = (0..t).flat_map(|f| flat(&conv.run(&x.narrow(0, f, 1).unwrap(), t).unwrap()));
    assert!(alone.eq(whole.iter().copied()), "frame by frame");
    let (f, py, px) = (1, 40, 41);
    let want = (0..c).map(|o| {
        let tap = |n: usize| &x64[((f * h + py + n / 3 - 1) * w + px + n % 3 - 1) * c..][..c];
        (0..9).map(|n| (0..c).map(|i| k64[(o * c + i) * 9 + n] * tap(n)[i]).sum::<f64>()).sum::<f64>()
    });
    let got = &whole[((f * h + py) * w + px) * c..][..c];
    close("a pixel", got, &want.collect::<Vec<_>>(), 4e-3);
}

#[test]
fn card_doubling_before_a_convolution_agrees_with_f64() {
    for (t, h, w, cin, cout) in [(2, 3, 5, 16, 24), (1, 1, 1, 8, 3), (3, 4, 3, 96, 48), (1, 1, 6, 24, 8)] {
        let ((kernel, k64), (bias, b64)) = (bf16(&[cout, cin, 3, 3]), f32s(&[cout]));
        let (x, x64) = bf16(&[t, h, w, cin]);
        let got = Convolution::doubling(&kernel, &bias).unwrap().apply(&x, t).unwrap().settled().unwrap();
        let wide = cout.next_multiple_of(8);
        let mut want = vec![0.0; t * 4 * h * w * wide];
        for (i, out) in want.iter_mut().enumerate().filter(|(i, _)| i % wide < cout) {
            let (o, px, py, f) = (i % wide, i / wide % (2 * w), i / wide / (2 * w) % (2 * h), i / wide / (4 * w * h));
            *out = b64[o];
            for (ky, kx) in (0..9).map(|n| (n / 3, n % 3)) {
                // Of the doubled picture, with one zero around.
                let (sy, sx) = ((py + ky).wrapping_sub(1), (px + kx).wrapping_sub(1));
                if sy < 2 * h && sx < 2 * w {
                    let from = ((f * h + sy / 2) * w + sx / 2) * cin;
                    *out += (0..cin).map(|c| k64[((o * cin + c) * 3 + ky) * 3 + kx] * x64[from + c]).sum::<f64>();
                }
            }
        }
        assert_eq!(got.dims(), [t, 2 * h, 2 * w, wide]);
        // Sums of weights are rounded once more.
        close(&format!("doubled {cin}→{cout}"), &flat(&got), &want, 6e-3);
    }
}

#[test]
fn card_convolutions_by_pairs_agree_with_f64() {
    for (t, h, w, cin, cout) in [(4, 5, 7, 16, 24), (2, 3, 3, 96, 48), (6, 1, 4, 8, 8)] {
        let ((kernel, k64), (bias, b64)) = (bf16(&[cout, cin, 3, 3, 3]), f32s(&[cout]));
        let conv = Convolution::new(&kernel, &bias, (1, 1), (1, 1)).unwrap().paired().unwrap();
        assert!(conv.by_pairs(t) && !conv.by_pairs(1));
        let ((cache, mut x64), (x, now)) = (bf16(&[2, h, w, cin]), bf16(&[t, h, w, cin]));
        x64.extend(now);
        let run = |from: usize, n: usize, cache: &Tensor| {
            let video = Video::new(x.narrow(0, from, n).unwrap(), None, t);
            let way = Way { cache: Some(cache), paired: true, ..Way::default() };
            flat(&conv.products(&video.through(&way).unwrap(), t).unwrap().settled().unwrap())
        };
        let whole = run(0, t, &cache.copy().unwrap());
        let parts: Vec<f64> = (0..t).step_by(2).flat_map(|from| run(from, 2, &cache)).collect();
        assert_eq!(whole, parts, "{cin}→{cout} by pairs: whole against cut");
        let mut want = vec![0.0; t * h * w * cout];
        for (i, out) in want.iter_mut().enumerate() {
            let (o, px, py, f) = (i % cout, i / cout % w, i / cout / w % h, i / cout / w / h);
            *out = b64[o];
            for (k, ky, kx) in (0..27).map(|n| (n / 9, n / 3 % 3, n % 3)) {
                let (sy, sx) = ((py + ky).wrapping_sub(1), (px + kx).wrapping_sub(1));
                if sy < h && sx < w {
                    let from = (((f + k) * h + sy) * w + sx) * cin;
                    let weight = |c: usize| k64[(((o * cin + c) * 3 + k) * 3 + ky) * 3 + kx];
                    *out += (0..cin).map(|c| weight(c) * x64[from + c]).sum::<f64>();
                }
            }
        }
        // Sums of frames, of weights and of products are rounded, not only the result.
        close(&format!("{cin}→{cout} by pairs"), &whole, &want, 8e-3);
    }
}

#[test]
fn card_convolves_pictures_in_f32() {
    for (n, h, w, cin, cout, side, padding, stride) in [
        (3, 5, 7, 16, 24, 3, 1, 1),
        (1, 9, 4, 3, 12, 3, 1, 1),
        (2, 6, 8, 24, 3, 3, 1, 1),
        (2, 7, 9, 16, 16, 3, 0, 2),
        (4, 3, 5, 32, 96, 1, 0, 1),
    ] {
        let ((x, x64), (kernel, k64)) = (f32s(&[n, cin, h, w]), f32s(&[cout, cin, side, side]));
        let extent = |n: usize| (n + 2 * padding - side) / stride + 1;
        let (oh, ow) = (extent(h), extent(w));
        let mut want = vec![0.0; n * cout * oh * ow];
        for (i, out) in want.iter_mut().enumerate() {
            let (px, py, o, f) = (i % ow, i / ow % oh, i / ow / oh % cout, i / ow / oh / cout);
            for (c, ky, kx) in (0..cin * side * side).map(|n| (n / side / side, n / side % side, n % side)) {
                let (sy, sx) = ((py * stride + ky).wrapping_sub(padding), (px * stride + kx).wrapping_sub(padding));
                if sy < h && sx < w {
                    *out += k64[((o * cin + c) * side + ky) * side + kx] * x64[((f * cin + c) * h + sy) * w + sx];
                }
            }
        }
        let got = flat(&vae::convolve(&x, &kernel, padding, stride).unwrap());
        // TF32 keeps ten bits of each factor.
        close(&format!("f32 {cin}→{cout}, {side}×{side}, {stride}"), &got, &want, 1e-3);
    }
}

#[test]
fn card_latents_agree_with_f64() {
    for (t, h, w) in [(1, 3, 5), (3, 2, 7), (2, 1, 1)] {
        let p = h * w;
        let ((z, z64), (matrix, m64), (bias, b64)) = (f32s(&[16, t, h, w]), f32s(&[16, 16]), f32s(&[16]));
        let (cache, k64) = bf16(&[2, h, w, 16]);
        let got = flat(&vae::latents(&z, &matrix, &bias, &cache).unwrap());
        let mut want = k64;
        for i in 0..t * p {
            let column = |c: usize| z64[c * t * p + i];
            want.extend((0..16).map(|o| b64[o] + (0..16).map(|c| m64[o * 16 + c] * column(c)).sum::<f64>()));
        }
        close(&format!("latents {t}×{h}×{w}"), &got, &want, 4e-3);
        assert_eq!(flat(&cache), got[got.len() - 2 * p * 16..], "what is remembered");
    }
}

#[test]
fn card_doubles_mixes_and_colours_as_plain_loops_do() {
    let (t, h, w, c) = (2, 3, 5, 24);
    let ((x, x64), (bias, b64)) = (bf16(&[t, h, w, 2 * c]), f32s(&[2 * c]));
    let video = Video::new(x, Some(&bias), t);
    let got = flat(&video.spread(2, true).unwrap());
    let want: Vec<f64> = (0..8 * t * h * w * c)
        .map(|i| (i % c, i / c % (2 * w) / 2, i / c / (2 * w) % (2 * h) / 2, i / c / (4 * w * h)))
        .map(|(k, px, py, f)| (((f / 2 * h + py) * w + px) * 2 * c + f % 2 * c + k, f % 2 * c + k))
        .map(|(at, channel)| x64[at] + b64[channel])
        .collect();
    close("doubling", &got, &want, 4e-3);
    let got = flat(&video.spread(2, false).unwrap());
    let want: Vec<f64> = (0..2 * t * h * w * c)
        .map(|i| (i % c, i / c % (w * h), i / c / (w * h)))
        .map(|(k, pixel, f)| ((f / 2 * h * w + pixel) * 2 * c + f % 2 * c + k, f % 2 * c + k))
        .map(|(at, channel)| x64[at] + b64[channel])
        .collect();
    close("halves as frames", &got, &want, 4e-3);

    let (p, c) = (37, 48);
    let (qkv, v64) = bf16(&[2, p, 3 * c]);
    let got = flat(&vae::attention(&qkv).unwrap());
    let mut want = Vec::new();
    for (f, q) in (0..2 * p).map(|i| (i / p, i % p)) {
        let row = |r: usize, part: usize| &v64[(f * p + r) * 3 * c + part * c..][..c];
        let dot = |k: usize| row(q, 0).iter().zip(row(k, 1)).map(|(a, b)| a * b).sum::<f64>() / (c as f64).sqrt();
        let weights: Vec<f64> = (0..p).map(|k| dot(k).exp()).collect();
        let sum: f64 = weights.iter().sum();
        want.extend((0..c).map(|i| (0..p).map(|k| weights[k] / sum * row(k, 2)[i]).sum::<f64>()));
    }
    close("attention", &got, &want, 1e-2);

    let ((x, x64), (bias, b64)) = (bf16(&[3, 6, 10, 8]), f32s(&[8]));
    let video = Video::new(x, Some(&bias), 3);
    let (planes, bytes) = (video.planes().unwrap(), video.i420().unwrap());
    let want: Vec<f64> = (0..3 * 180).map(|i| (x64[i % 180 * 8 + i / 180] + b64[i / 180]).clamp(-1.0, 1.0)).collect();
    close("planes", &flat(&planes), &want, 1e-6);
    assert_eq!(flat(&bytes), flat(&picture::i420(&planes).unwrap()), "colours");
}
