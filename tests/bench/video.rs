//! What stands around the transformer on an NVIDIA card: the video decoder and the audio encoder, random weights of the
//! true shapes, device events.
//!
//! `cargo bench --features cuda --bench video [-- SIZES [WHAT]]`, for example `704x384,480x832 check,decode,encode,ears`.
//! `check`: the card in bf16 against the CPU in f32 of the same weights, three latents in one pass against one by one,
//! YUV against its plain form. `compare`: the decoder without what it leaves out, with one saving after the other, and
//! their errors against the first. One JSON line per figure; TFLOP/s count what it would be without savings.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use loquent::model::{
    Result,
    kernels::cuda::{self, time},
    picture,
    vae::{Decoding, Encoding, Savings, WanVae, quiet},
    wav2vec2::{Config, Wav2Vec2},
    weights::{
        Tensors, Weights,
        synth::{imagined, preset},
    },
};

const RUNS: usize = 9;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let list = |i: usize, or: &str| -> Vec<String> {
        words.get(i).map_or(or, String::as_str).split(',').map(str::to_string).collect()
    };
    let sizes: Vec<(usize, usize)> = list(0, "704x384,480x832,720x1280")
        .iter()
        .filter_map(|s| s.split_once('x').and_then(|(h, w)| Some((h.parse().ok()?, w.parse().ok()?))))
        .collect();
    let what = list(1, "check,decode,encode,ears");
    let wants = |w: &str| what.iter().any(|x| x == w);
    let device = cuda::open(0)?;
    let (name, driver) = time::name(&device)?;
    println!("{name}, CUDA {}.{}", driver / 1000, driver % 1000 / 10);
    let step = |name: &str, done: Result<()>| {
        if let Err(e) = done {
            println!("{name}: {e}");
        }
    };
    if wants("check") {
        step("check", check(&device));
    }
    if wants("decode") || wants("compare") || wants("encode") {
        let load = |savings| {
            WanVae::load_with(&Weights::new(imagined(preset("wan21-vae")?, 3)?, &device, DType::BF16), savings)
        };
        let vae = load(Savings::default())?;
        for &size in &sizes {
            if wants("decode") {
                step("decode", decode(&device, &vae, size));
            }
            if wants("compare") {
                step("compare", compare(&device, &load, size));
            }
            if wants("encode") {
                step("encode", encode(&device, &vae, size));
            }
        }
    }
    if wants("ears") {
        for dtype in [DType::F32, DType::BF16] {
            step("ears", ears(&device, dtype));
        }
    }
    Ok(())
}

fn report(what: &str, size: (usize, usize), all: &[f32], tflop: f64) {
    let ms = f64::from(all[all.len() / 2]);
    println!(
        "{}",
        serde_json::json!({
            "what": what, "size": format!("{}x{}", size.0, size.1), "ms": ms, "least": all[0],
            "most": all[all.len() - 1], "tflops": tflop / ms * 1e3,
        })
    );
}

fn random(shape: &[usize], device: &Device) -> Result<Tensor> {
    Ok(Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?.to_device(device)?)
}

/// ‖a − b‖ / ‖b‖.
fn apart(a: &Tensor, b: &Tensor) -> Result<f64> {
    let flat = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all();
    let (a, b) = (flat(a)?, flat(b)?);
    let norm = |t: &Tensor| t.sqr()?.sum_all()?.to_scalar::<f64>();
    Ok((norm(&(a - &b)?)? / norm(&b)?.max(1e-300)).sqrt())
}

fn check(device: &Device) -> Result<()> {
    let source = imagined(preset("wan21-vae")?, 3)?;
    let all: Result<Vec<_>> = source.names().into_iter().map(|n| Ok((n.clone(), source.load(&n)?))).collect();
    let source = Arc::new(Tensors::new(all?, "the same numbers on both"));
    let load = |device: &Device, dtype| WanVae::load(&Weights::new(source.clone(), device, dtype));
    let (card, cpu) = (load(device, DType::BF16)?, load(&Device::Cpu, DType::F32)?);
    // An odd number of rows, columns and positions.
    let z = Tensor::randn(0f32, 1.0, (16, 4, 3, 5), &Device::Cpu)?;
    let on_card = z.to_device(device)?;
    let want = cpu.decode(&z.narrow(1, 0, 2)?)?;
    let got = card.decode(&on_card.narrow(1, 0, 2)?)?;
    println!("decode: card in bf16 against CPU in f32: {:.2e}", apart(&got, &want)?);
    let whole = card.decode(&on_card)?;
    let mut state = Decoding::default();
    let parts: Result<Vec<_>> = (0..4).map(|i| Ok(card.decode_next(&mut state, &on_card.narrow(1, i, 1)?)?)).collect();
    println!("decode: three latents in one pass against one by one: {:e}", apart(&Tensor::cat(&parts?, 1)?, &whole)?);
    let colours = card.decode_i420(&mut Decoding::default(), &on_card)?;
    println!("YUV against its plain form: {:e}", apart(&colours, &picture::i420(&whole)?)?);
    let video = Tensor::randn(0f32, 0.5, (3, 5, 24, 40), &Device::Cpu)?;
    let (want, got) = (cpu.encode(&video)?, card.encode(&video.to_device(device)?)?);
    println!("encode: card in bf16 against CPU in f32: {:.2e}", apart(&got, &want)?);
    let mut state = Encoding::default();
    let first = card.encode_next(&mut state, &video.narrow(1, 0, 3)?.to_device(device)?)?;
    let rest = card.encode_next(&mut state, &video.narrow(1, 3, 2)?.to_device(device)?)?;
    let both: Vec<Tensor> = first.into_iter().chain(rest).collect();
    println!("encode: cut against whole: {:e}", apart(&Tensor::cat(&both, 1)?, &got)?);
    Ok(())
}

/// TFLOP of decoding three latents (MODEL.md §13 counts 40.65 at 480×832).
fn work((h, w): (usize, usize)) -> f64 {
    40.65 * (h * w) as f64 / (480.0 * 832.0)
}

fn decode(device: &Device, vae: &WanVae, size: (usize, usize)) -> Result<()> {
    let before = time::memory(device)?.0;
    let mut state = Decoding::default();
    let z = random(&[16, 7, size.0 / 8, size.1 / 8], device)?;
    vae.decode_next(&mut state, &z)?;
    let block = z.narrow(1, 0, 3)?.contiguous()?;
    let all =
        time::milliseconds(device, 2, RUNS, || vae.decode_i420(&mut state, &block).map(drop).map_err(Into::into))?;
    report("decode 3 latents to I420", size, &all, work(size));
    let all = time::milliseconds(device, 1, 3, || {
        vae.decode_next(&mut Decoding::default(), &z).map(drop).map_err(Into::into)
    })?;
    report("decode 7 motion latents from the start", size, &all, work(size) * 25.0 / 12.0);
    let taken = before.saturating_sub(time::memory(device)?.0);
    println!(
        "{}x{}: the decoder holds {:.1} GiB, what it frees and takes again included",
        size.0,
        size.1,
        taken as f64 / (1u64 << 30) as f64
    );
    Ok(())
}

fn compare(device: &Device, load: &dyn Fn(Savings) -> Result<WanVae>, size: (usize, usize)) -> Result<()> {
    let mut plain = None;
    let z = random(&[16, 4, size.0 / 8, size.1 / 8], device)?;
    let block = z.narrow(1, 0, 3)?.contiguous()?;
    let all = [
        (false, false, "no savings"),
        (true, false, "doubling"),
        (false, true, "pairs"),
        (true, true, "doubling and pairs"),
    ];
    for (doubling, pairs, what) in all {
        // Imagined weights are drawn on the card.
        device.set_seed(11)?;
        let vae = load(Savings { doubling, pairs })?;
        let mut state = Decoding::default();
        let whole = vae.decode_next(&mut state, &z)?;
        let all =
            time::milliseconds(device, 2, RUNS, || vae.decode_i420(&mut state, &block).map(drop).map_err(Into::into))?;
        report(&format!("decode 3 latents to I420, {what}"), size, &all, work(size));
        println!("{what}: apart from no savings by {:.2e}", apart(&whole, plain.get_or_insert(whole.clone()))?);
    }
    Ok(())
}

fn encode(device: &Device, vae: &WanVae, size: (usize, usize)) -> Result<()> {
    for frames in [1, 5, 73] {
        let video = random(&[3, frames, size.0, size.1], device)?;
        let all = time::milliseconds(device, 1, 3, || vae.encode(&video).map(drop).map_err(Into::into))?;
        report(&format!("encode {frames} frames"), size, &all, 0.0);
    }
    Ok(())
}

fn ears(device: &Device, dtype: DType) -> Result<()> {
    let weights = Weights::new(imagined(preset("wav2vec2-large")?, 5)?, device, dtype);
    let net = Wav2Vec2::load(&weights, &Config::default())?;
    for samples in [7680, 16_000 * 2, 16_000 * 5] {
        let x = random(&[samples], device)?;
        let all = time::milliseconds(device, 2, RUNS, || net.hidden_states(&x, &mut quiet).map(drop))?;
        report(&format!("wav2vec2-large, {dtype:?}, {samples} samples"), (0, 0), &all, 0.0);
    }
    Ok(())
}
