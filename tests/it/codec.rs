//! Opus, H.264, resampling and colour against plain twins and against decoders.

use loquent::{
    avatar::presenters,
    codec::{
        DriftResampler, H264Config, OPUS_RATE, Resampler, SpeechDecoder, VOICE_FRAME, VideoEncoder, VoiceEncoder,
        picture::{PictureLimits, decode_portrait},
        scale_i420,
        subject::subject,
        to_i420, to_rgb,
    },
    media::{Frame, I420, MediaTime, Pixels, Portrait},
};

/// Something like a voice: a pulse train with moving pitch through two resonances, in syllables.
fn speech(seconds: f64, rate: u32) -> Vec<f32> {
    let n = (seconds * f64::from(rate)) as usize;
    let (mut phase, mut out) = (0.0f64, Vec::with_capacity(n));
    for i in 0..n {
        let t = i as f64 / f64::from(rate);
        phase += (120.0 + 30.0 * (t * 2.3).sin()) / f64::from(rate);
        let syllable = (0.5 - 0.5 * (t * 2.0 * std::f64::consts::PI * 3.5).cos()).powf(0.7);
        let mut s = 0.0;
        for k in 1..=24 {
            let f = 120.0 * f64::from(k);
            let gain = 1.0 / (1.0 + ((f - 600.0) / 250.0).powi(2)) + 0.5 / (1.0 + ((f - 1700.0) / 300.0).powi(2));
            s += gain * (2.0 * std::f64::consts::PI * phase * f64::from(k)).sin();
        }
        out.push((0.18 * syllable * s) as f32);
    }
    out
}

fn snr_db(reference: &[f32], got: &[f32]) -> f64 {
    let n = reference.len().min(got.len());
    let signal: f64 = reference[..n].iter().map(|s| f64::from(*s).powi(2)).sum();
    let noise: f64 = reference[..n].iter().zip(&got[..n]).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    10.0 * (signal / noise.max(1e-12)).log10()
}

fn packets(pcm: &[f32]) -> Vec<Vec<u8>> {
    let mut encoder = VoiceEncoder::new(32_000, 15).unwrap();
    pcm.chunks_exact(VOICE_FRAME).map(|c| encoder.encode(c).unwrap()).collect()
}

#[test]
fn opus_carries_a_voice_at_both_rates() {
    let pcm = speech(4.0, OPUS_RATE);
    let sent = packets(&pcm);
    let rate: usize = sent.iter().map(Vec::len).sum::<usize>() * 8 / 4;
    assert!((15_000..45_000).contains(&rate), "{rate} bit/s");
    for rate in [48_000, 16_000] {
        let mut decoder = SpeechDecoder::new(rate).unwrap();
        let mut got = Vec::new();
        for p in &sent {
            assert_eq!(decoder.samples_in(p).unwrap(), rate as usize / 50);
            got.extend(decoder.decode(p).unwrap());
        }
        assert_eq!(got.len(), 4 * rate as usize);
        // Loudness survives, per 100 ms.
        let level = |s: &[f32]| (s.iter().map(|x| x * x).sum::<f32>() / s.len() as f32).sqrt();
        let (a, b) = (OPUS_RATE as usize / 10, rate as usize / 10);
        for k in 1..39 {
            let (want, have) = (level(&pcm[k * a..(k + 1) * a]), level(&got[k * b..(k + 1) * b]));
            assert!(have < 0.05 + want * 2.0 && have > want * 0.5 - 0.05, "{rate} Hz, {k}: {want} became {have}");
        }
    }
}

#[test]
fn opus_repairs_a_lost_packet_from_the_next_better_than_it_conceals() {
    let pcm = speech(8.0, OPUS_RATE);
    let sent = packets(&pcm);
    let mut whole = SpeechDecoder::new(OPUS_RATE).unwrap();
    let reference: Vec<f32> = sent.iter().flat_map(|p| whole.decode(p).unwrap()).collect();
    let run = |repair: bool| {
        let mut decoder = SpeechDecoder::new(OPUS_RATE).unwrap();
        let mut out = Vec::new();
        for (i, p) in sent.iter().enumerate() {
            if i % 13 == 12 {
                out.extend(match sent.get(i + 1) {
                    Some(next) if repair => decoder.fec(next, VOICE_FRAME).unwrap(),
                    _ => decoder.conceal(VOICE_FRAME).unwrap(),
                });
            } else {
                out.extend(decoder.decode(p).unwrap());
            }
        }
        snr_db(&reference, &out)
    };
    let (with, without) = (run(true), run(false));
    println!("7.7 % loss: repaired {with:.1} dB, concealed {without:.1} dB");
    assert!(with > without + 3.0 && with > 8.0, "repaired {with:.1} dB, concealed {without:.1} dB");
}

#[test]
fn opus_answers_nonsense_with_errors_or_sound_in_range() {
    let mut decoder = SpeechDecoder::new(OPUS_RATE).unwrap();
    assert!(decoder.decode(&[]).is_err());
    assert!(decoder.conceal(7).is_err() && decoder.conceal(0).is_err() && decoder.conceal(96_000).is_err());
    assert!(VoiceEncoder::new(32_000, 5).unwrap().encode(&[0.0; 100]).is_err());
    let mut seed = 1u64;
    let mut decoded = 0;
    for len in (1..400).cycle().take(3000) {
        let bytes: Vec<u8> = (0..len)
            .map(|_| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (seed >> 56) as u8
            })
            .collect();
        for got in [decoder.decode(&bytes), decoder.fec(&bytes, VOICE_FRAME)].into_iter().flatten() {
            decoded += 1;
            assert!(got.iter().all(|s| s.is_finite() && s.abs() <= 1.0));
        }
    }
    assert!(decoded > 0);
}

#[test]
fn fixed_resampling_keeps_time_and_sound() {
    for (from, to) in [(48_000, 16_000), (16_000, 48_000), (44_100, 16_000), (8_000, 16_000), (16_000, 16_000)] {
        let tone = |rate: u32, n: usize| -> Vec<f32> {
            (0..n)
                .map(|i| (i as f64 / f64::from(rate) * 2.0 * std::f64::consts::PI * 440.0).sin() as f32 * 0.5)
                .collect()
        };
        let input = tone(from, from as usize);
        // Cutting changes nothing.
        let mut whole = Resampler::new(from, to).unwrap();
        let mut one = whole.push(&input).unwrap();
        one.extend(whole.finish().unwrap());
        let mut cut = Resampler::new(from, to).unwrap();
        let mut many = Vec::new();
        for piece in input.chunks(333) {
            many.extend(cut.push(piece).unwrap());
        }
        many.extend(cut.finish().unwrap());
        assert_eq!(one, many);
        assert_eq!(one.len(), to as usize, "{from} → {to}");
        // The delay is taken out: the tone stands where it stood.
        let want = tone(to, to as usize);
        let edge = to as usize / 20;
        let snr = snr_db(&want[edge..want.len() - edge], &one[edge..one.len() - edge]);
        assert!(snr > 55.0, "{from} → {to}: {snr:.1} dB");
    }
}

#[test]
fn drift_resampling_changes_length_by_the_parts_per_million_asked() {
    for ppm in [-300.0, 0.0, 250.0] {
        let mut r = DriftResampler::new(48_000).unwrap();
        r.set_ppm(ppm).unwrap();
        let tone: Vec<f32> = (0..48_000 * 20)
            .map(|i| (f64::from(i) / 48_000.0 * 2.0 * std::f64::consts::PI * 300.0).sin() as f32)
            .collect();
        let mut out = Vec::new();
        for c in tone.chunks(960) {
            out.extend(r.push(c).unwrap());
        }
        let want = tone.len() as f64 * (1.0 + ppm * 1e-6);
        assert!((out.len() as f64 - want).abs() < 40.0, "{ppm}: {} against {want}", out.len());
        // No glitch: the second difference of a 300 Hz sine is bounded by (2π 300 / 48000)².
        let bound = (2.0 * std::f32::consts::PI * 300.0 / 48_000.0).powi(2) * 1.2;
        let worst = out[200..].windows(3).map(|w| (w[0] - 2.0 * w[1] + w[2]).abs()).fold(0.0, f32::max);
        assert!(worst < bound, "{ppm}: {worst} against {bound}");
    }
}

fn picture(w: u32, h: u32, t: u32) -> Frame {
    let mut rgb = Vec::with_capacity((3 * w * h) as usize);
    for y in 0..h {
        for x in 0..w {
            let (dx, dy) = (x as f32 - w as f32 * 0.5 - (t as f32 * 0.2).sin() * 20.0, y as f32 - h as f32 * 0.55);
            let inside = dx * dx * 1.4 + dy * dy < (w as f32 * 0.3).powi(2);
            let noise = ((x.wrapping_mul(2_654_435_761) ^ y.wrapping_mul(40_503)) >> 13) as u8 % 12;
            let mouth = dx.abs() < 24.0 && (dy - 30.0).abs() < 4.0 + 8.0 * (t as f32 * 0.9).sin().abs();
            let p = match (mouth, inside) {
                (true, _) => [90, 20, 30],
                (_, true) => [200 + noise, 160, 140 + noise],
                _ => [(x / 4) as u8, 60 + noise, (y / 3) as u8],
            };
            rgb.extend(p);
        }
    }
    Frame {
        at: MediaTime::from_units(i64::from(t), 25),
        width: w,
        height: h,
        pixels: Pixels::Rgb(rgb.into()),
        matte: None,
    }
}

/// The same conversion in f64, straight from the standard.
fn twin(frame: &Frame) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (w, h) = (frame.width as usize, frame.height as usize);
    let at = |x: usize, y: usize, c: usize| f64::from(frame.pixels.rgb().unwrap()[3 * (y * w + x) + c]) / 255.0;
    let ypbpr = |r: f64, g: f64, b: f64| {
        let y = 0.299 * r + 0.587 * g + 0.114 * b;
        (16.0 + 219.0 * y, 128.0 + 224.0 * 0.5 * (b - y) / (1.0 - 0.114), 128.0 + 224.0 * 0.5 * (r - y) / (1.0 - 0.299))
    };
    let mut planes = (Vec::new(), Vec::new(), Vec::new());
    for y in 0..h {
        for x in 0..w {
            planes.0.push(ypbpr(at(x, y, 0), at(x, y, 1), at(x, y, 2)).0);
        }
    }
    for y in (0..h).step_by(2) {
        for x in (0..w).step_by(2) {
            let mean = |c| (at(x, y, c) + at(x + 1, y, c) + at(x, y + 1, c) + at(x + 1, y + 1, c)) / 4.0;
            let (_, u, v) = ypbpr(mean(0), mean(1), mean(2));
            planes.1.push(u);
            planes.2.push(v);
        }
    }
    planes
}

#[test]
fn colour_equals_its_f64_twin() {
    let corners = [0u8, 255, 1, 254, 127, 128];
    let mut rgb = Vec::new();
    for i in 0..64 * 64u32 {
        let k = |d: u32| corners[((i / d) % 6) as usize];
        rgb.extend([k(1), k(6), k(36)]);
    }
    let hard = Frame { at: MediaTime::ZERO, width: 64, height: 64, pixels: Pixels::Rgb(rgb.into()), matte: None };
    for frame in [hard, picture(128, 96, 3)] {
        let got = to_i420(&frame).unwrap();
        let want = twin(&frame);
        for (g, w) in [(&got.y, &want.0), (&got.u, &want.1), (&got.v, &want.2)] {
            assert_eq!(g.len(), w.len());
            let worst = g.iter().zip(w.iter()).map(|(g, w)| (f64::from(*g) - w).abs()).fold(0.0, f64::max);
            assert!(worst < 0.51, "off by {worst}");
        }
    }
    // Planes pass as they are, and come back as packed colours.
    let smooth = picture(128, 96, 3);
    let i420 = to_i420(&smooth).unwrap();
    let planes = Pixels::I420([&i420.y[..], &i420.u, &i420.v].concat().into());
    let planar = Frame { pixels: planes, ..smooth.clone() };
    let again = to_i420(&planar).unwrap();
    assert!((again.y, again.u, again.v) == (i420.y.clone(), i420.u, i420.v));
    let (back, packed) = (to_rgb(&planar).unwrap(), to_rgb(&smooth).unwrap());
    let off = back.iter().zip(packed.iter()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / back.len() as f64;
    assert!(back.len() == packed.len() && off < 3.0, "off by {off} on average");
    let short = Frame { pixels: Pixels::I420(vec![0; 18].into()), ..smooth };
    assert!(to_i420(&short).is_err() && to_rgb(&short).is_err());
    let odd = Frame { at: MediaTime::ZERO, width: 3, height: 2, pixels: Pixels::Rgb(vec![0; 18].into()), matte: None };
    assert!(to_i420(&odd).is_err());
    let short =
        Frame { at: MediaTime::ZERO, width: 4, height: 2, pixels: Pixels::Rgb(vec![0; 18].into()), matte: None };
    assert!(to_i420(&short).is_err());
}

#[test]
fn scaling_keeps_the_mean_and_refuses_odd_sizes() {
    let full = to_i420(&picture(256, 256, 1)).unwrap();
    let mean = |p: &[u8]| p.iter().map(|v| f64::from(*v)).sum::<f64>() / p.len() as f64;
    for side in [192, 160, 128] {
        let small = scale_i420(&full, side, side).unwrap();
        assert_eq!((small.y.len(), small.u.len()), ((side * side) as usize, (side * side / 4) as usize));
        assert!((mean(&small.y) - mean(&full.y)).abs() < 0.6 && (mean(&small.v) - mean(&full.v)).abs() < 0.6);
    }
    assert!(scale_i420(&full, 127, 128).is_err());
    assert!(scale_i420(&full, 0, 128).is_err());
}

/// NAL unit types of an Annex B access unit.
fn nal_types(data: &[u8]) -> Vec<u8> {
    data.windows(4).filter(|w| w[..3] == [0, 0, 1]).map(|w| w[3] & 31).collect()
}

fn psnr(a: &I420, y: &[u8], stride: usize) -> f64 {
    let w = a.width as usize;
    let mut sum = 0.0;
    for row in 0..a.height as usize {
        for x in 0..w {
            sum += (f64::from(a.y[row * w + x]) - f64::from(y[row * stride + x])).powi(2);
        }
    }
    10.0 * (255.0f64.powi(2) / (sum / (w * a.height as usize) as f64).max(1e-9)).log10()
}

#[test]
fn h264_is_constrained_baseline_with_parameter_sets_at_every_keyframe_and_decodes() {
    use openh264::formats::YUVSource;
    let config = H264Config { width: 256, height: 256, fps: 25.0, bitrate: 600_000, max_bitrate: 2_000_000 };
    let mut encoder = VideoEncoder::new(config).unwrap();
    let mut decoder = openh264::decoder::Decoder::new().unwrap();
    let (mut worst, mut keyframes) = (f64::MAX, Vec::new());
    for t in 0..75u32 {
        let source = to_i420(&picture(256, 256, t)).unwrap();
        // Forced before the first frame (harmless) and twice later.
        let got = encoder.encode(&source, MediaTime::from_units(i64::from(t), 25), [0, 30, 31].contains(&t)).unwrap();
        if got.keyframe {
            keyframes.push(t);
            assert_eq!(nal_types(&got.data), [7, 8, 5], "frame {t}");
            // profile_idc 66, constraint_set0 and 1, level at most 3.1: fits 42e01f.
            let sps = got.data.windows(4).position(|w| w == [0, 0, 1, 0x67]).unwrap() + 4;
            assert_eq!(got.data[sps], 66);
            assert_eq!(got.data[sps + 1] & 0xc0, 0xc0);
            assert!(got.data[sps + 2] <= 31, "level {}", got.data[sps + 2]);
        } else {
            assert_eq!(nal_types(&got.data), [1], "frame {t}");
        }
        let picture = decoder.decode(&got.data).unwrap().expect("one picture per access unit, at once");
        assert_eq!(picture.dimensions(), (256, 256));
        worst = worst.min(psnr(&source, picture.y(), picture.strides().0));
    }
    assert_eq!(keyframes, [0, 30, 31]);
    assert!(worst > 32.0, "worst frame {worst:.1} dB");
}

#[test]
fn h264_follows_its_bitrate_down_and_up_while_running() {
    let config = H264Config { width: 256, height: 256, fps: 25.0, bitrate: 300_000, max_bitrate: 1_500_000 };
    let mut encoder = VideoEncoder::new(config).unwrap();
    let mut t = 0u32;
    let mut run = |encoder: &mut VideoEncoder, frames: u32| {
        let mut bytes = 0;
        for i in 0..frames {
            // Fine noise that moves: plenty to code.
            let mut frame = picture(256, 256, t);
            let rgb: Vec<u8> = frame
                .pixels
                .rgb()
                .unwrap()
                .iter()
                .enumerate()
                .map(|(i, v)| {
                    v.wrapping_add(((i as u32).wrapping_mul(747_796_405).wrapping_add(t * 97) >> 24) as u8 / 12)
                })
                .collect();
            frame.pixels = Pixels::Rgb(rgb.into());
            let source = to_i420(&frame).unwrap();
            let got = encoder.encode(&source, MediaTime::from_units(i64::from(t), 25), false).unwrap();
            // The second half, after rate control has settled.
            if i >= frames / 2 {
                bytes += got.data.len();
            }
            t += 1;
        }
        bytes as f64 * 8.0 * 25.0 / f64::from(frames - frames / 2)
    };
    let begin = run(&mut encoder, 100);
    encoder.set_bitrate(150_000);
    let low = run(&mut encoder, 100);
    encoder.set_bitrate(600_000);
    let high = run(&mut encoder, 100);
    println!("{begin:.0} → {low:.0} → {high:.0} bit/s");
    for (got, want) in [(begin, 300e3), (low, 150e3), (high, 600e3)] {
        assert!((got / want - 1.0).abs() < 0.25, "{begin:.0} → {low:.0} → {high:.0}: {got:.0} for {want:.0}");
    }
}

#[test]
fn h264_refuses_what_it_cannot_do() {
    let config = H264Config { width: 256, height: 256, fps: 25.0, bitrate: 400_000, max_bitrate: 0 };
    for bad in [
        H264Config { width: 255, ..config },
        H264Config { height: 0, ..config },
        H264Config { width: 4096, ..config },
        H264Config { fps: f32::NAN, ..config },
    ] {
        assert!(VideoEncoder::new(bad).is_err(), "{bad:?}");
    }
    let mut encoder = VideoEncoder::new(config).unwrap();
    let other = to_i420(&picture(128, 128, 0)).unwrap();
    assert!(encoder.encode(&other, MediaTime::ZERO, false).is_err());
    let mut short = to_i420(&picture(256, 256, 0)).unwrap();
    short.v.pop();
    assert!(encoder.encode(&short, MediaTime::ZERO, false).is_err());
    // Time that stands still or runs backwards is survived.
    let fine = to_i420(&picture(256, 256, 0)).unwrap();
    for at in [1000, 1000, 200, -5] {
        encoder.encode(&fine, MediaTime::from_millis(at), false).unwrap();
    }
}

/// The presenter at a fraction of the size, in front of a grey-green slope.
fn far(near: &Portrait, times: usize) -> Portrait {
    let (w, h) = (near.width as usize, near.height as usize);
    let mut rgb: Vec<u8> = (0..w * h).flat_map(|i| [90, 110 + (i / w * 60 / h) as u8, 100]).collect();
    for y in 0..h / times {
        for x in 0..w / times {
            let (to, from) = (3 * ((y + h / 3) * w + x + w / 3), 3 * (y * times * w + x * times));
            rgb[to..to + 3].copy_from_slice(&near.rgb[from..from + 3]);
        }
    }
    Portrait { rgb: rgb.into(), ..near.clone() }
}

#[test]
fn presenters_pass_and_the_same_ones_far_away_are_warned_about() {
    let mut told = 0;
    for presenter in presenters() {
        let near = decode_portrait(presenter.png, &PictureLimits::default()).unwrap();
        let (close, distant) = (subject(&near), subject(&far(&near, 8)));
        println!("{}: {close:?}, far {distant:?}", presenter.id);
        assert_eq!(close.warning(), None, "{}", presenter.id);
        told += usize::from(distant.warning().is_some_and(|w| w.0 == "small_face"));
    }
    assert!(told >= 9, "{told} of 12");
}
