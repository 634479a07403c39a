//! One denoising step of LiveAvatar's 14B transformer on an NVIDIA card: random weights of the true shapes, device events.
//!
//! `cargo bench --features cuda --bench step [-- SIZES [PRECISIONS [WHAT]]]`, for example `704x384,480x832 fp8,bf16 step`.
//! WHAT: `step` (the whole step, by graph and by launches), `parts` (its products, attentions and row passes one by one),
//! `error` (fp8 and bf16 against f32 of the same weights at reduced depth), `whole` (fp8 against bf16, all layers). One JSON
//! line per figure.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use loquent::model::{
    Result,
    dit::{Config, Dit, Opening, Trace},
    kernels::cuda::{self, gemm, rows, time},
    nn::{self, Activation, Folded, Form, Linear, Memory, Residual, Slot, norm::Affine},
    weights::{
        Fp8, Weights,
        synth::{imagined, preset},
    },
};

const RUNS: usize = 9;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let list = |i: usize, or: &str| -> Vec<String> {
        words.get(i).map_or(or, String::as_str).split(',').map(str::to_string).collect()
    };
    let sizes: Vec<(usize, usize)> = list(0, "704x384,480x832")
        .iter()
        .filter_map(|s| s.split_once('x').and_then(|(h, w)| Some((h.parse().ok()?, w.parse().ok()?))))
        .collect();
    let (precisions, what) = (list(1, "fp8,bf16"), list(2, "parts,step,error"));
    let device = cuda::open(0)?;
    let (name, driver) = time::name(&device)?;
    println!("{name}, CUDA {}.{}", driver / 1000, driver % 1000 / 10);
    let wants = |w: &str| what.iter().any(|x| x == w);
    if wants("parts") {
        for &size in &sizes {
            parts(&device, size)?;
        }
    }
    if wants("error") {
        errors(&device)?;
    }
    if wants("whole") {
        for &size in &sizes {
            whole(&device, size)?;
        }
    }
    if wants("step") {
        for precision in &precisions {
            steps(&device, precision, &sizes)?;
        }
    }
    Ok(())
}

fn report(what: &str, size: (usize, usize), precision: &str, all: &[f32], tflop: f64) {
    let ms = all[all.len() / 2];
    println!(
        "{}",
        serde_json::json!({
            "what": what, "size": format!("{}x{}", size.0, size.1), "precision": precision,
            "ms": ms, "least": all[0], "most": all[all.len() - 1], "tflops": tflop / f64::from(ms) * 1e3,
        })
    );
}

/// Tokens of a latent frame.
fn frame((h, w): (usize, usize)) -> usize {
    (h / 16) * (w / 16)
}

fn fp8(precision: &str) -> Fp8 {
    match precision {
        "fp8" => Fp8::All,
        "fp8-linears" => Fp8::Linears,
        _ => Fp8::Off,
    }
}

fn load(device: &Device, precision: &str, config: Config) -> Result<Dit> {
    device.set_seed(20260101)?;
    let dtype = if precision == "f32" { DType::F32 } else { DType::BF16 };
    let weights = Weights::new(imagined(preset("s2v-14b")?, 7)?, device, dtype).with_fp8(fp8(precision));
    Dit::load(config, &weights)
}

struct Inputs {
    reference: Tensor,
    text: Tensor,
    audio: Tensor,
    noise: Tensor,
}

fn inputs(device: &Device, (h, w): (usize, usize)) -> Result<Inputs> {
    let random =
        |shape: &[usize]| -> Result<Tensor> { Ok(Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?.to_device(device)?) };
    Ok(Inputs {
        reference: random(&[16, 1, h / 8, w / 8])?,
        text: random(&[64, 4096])?,
        audio: random(&[25, 1024, 12])?,
        noise: random(&[16, 3, h / 8, w / 8])?,
    })
}

fn steps(device: &Device, precision: &str, sizes: &[(usize, usize)]) -> Result<()> {
    let before = time::memory(device)?.0;
    let dit = load(device, precision, Config::default())?;
    device.synchronize()?;
    println!("{precision}: weights {:.1} GiB", (before - time::memory(device)?.0) as f64 / (1u64 << 30) as f64);
    let schedule = Arc::new(dit.schedule_of(4)?);
    for &size in sizes {
        let x = inputs(device, size)?;
        let n = frame(size);
        let text = Arc::new(dit.text(&x.text)?);
        let mut state = dit.open(&Opening { reference: &x.reference, motion: None, text: Some(text) }, &schedule)?;
        let audio = dit.audio(&x.audio)?;
        let all = time::milliseconds(device, 1, RUNS, || dit.audio(&x.audio).map(drop))?;
        report("audio, once a block", size, precision, &all, 0.0);
        let step = |state: &mut _| dit.forward(state, &x.noise, 0, &audio, None, 30, &mut Trace::off());
        // Four blocks fill the ring; the first runs by launches, the others by the graph.
        for _ in 0..3 {
            step(&mut state)?;
            state.advance(3);
        }
        state.use_graphs(false);
        let eager = step(&mut state)?;
        let all = time::milliseconds(device, 1, RUNS, || step(&mut state).map(drop))?;
        let tflop = dit.config().tflop(3 * n, 29 * n / 2);
        report("step by launches", size, precision, &all, tflop);
        state.use_graphs(true);
        let replayed = step(&mut state)?;
        let apart = (&eager - &replayed)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        println!("graph and launches differ by {apart:e}");
        let all = time::milliseconds(device, 1, RUNS, || step(&mut state).map(drop))?;
        report("step by graph", size, precision, &all, tflop);
        let all = time::milliseconds(device, 1, 3, || (0..8).try_for_each(|_| step(&mut state).map(drop)))?;
        report("eight steps by graph", size, precision, &all, 8.0 * tflop);
        let finite = replayed.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        let (free, total) = time::memory(device)?;
        println!(
            "largest prediction {finite}; memory used with one ring {:.1} GiB",
            (total - free) as f64 / (1u64 << 30) as f64
        );
    }
    Ok(())
}

/// What one step computes, piece by piece, on tensors of its own.
fn parts(device: &Device, size: (usize, usize)) -> Result<()> {
    let q = 3 * frame(size);
    let (d, f) = (5120usize, 13824usize);
    let random = |shape: &[usize], deviation: f32| -> Result<Tensor> {
        Ok(Tensor::randn(0f32, deviation, shape, device)?.to_dtype(DType::BF16)?)
    };
    for (name, width, out) in [("qkv", d, 3 * d), ("o", d, d), ("ffn.0", d, f), ("ffn.2", f, d)] {
        let (x, w, b) = (random(&[q, width], 1.0)?, random(&[out, width], 0.015)?, random(&[out], 0.1)?);
        let tflop = 2.0 * (q * width * out) as f64 / 1e12;
        let plain = gemm::Product { x: &x, weight: &w, scales: None, bias: Some(&b), gelu: false };
        let all = time::milliseconds(device, 3, RUNS, || gemm::product(&plain).map(drop))?;
        report(&format!("product {name}"), size, "bf16", &all, tflop);
        let ((x8, xu), (w8, wu)) = (rows::quantise(&x, false)?, rows::quantise(&w, false)?);
        let scaled = gemm::Product { x: &x8, weight: &w8, scales: Some((&xu, &wu)), bias: Some(&b), gelu: false };
        match time::milliseconds(device, 3, RUNS, || gemm::product(&scaled).map(drop)) {
            Ok(all) => report(&format!("product {name}"), size, "fp8", &all, tflop),
            Err(e) => println!("product {name} in fp8: {e}"),
        }
        // A sum made by the product that is added.
        let y = random(&[q, out], 1.0)?;
        println!("product {name} can be added: {}", gemm::add_product(&scaled, &y)?);
        match time::milliseconds(device, 3, RUNS, || gemm::add_product(&scaled, &y).map(drop)) {
            Ok(all) => report(&format!("product {name}, added"), size, "fp8", &all, tflop),
            Err(e) => println!("product {name}, added, in fp8: {e}"),
        }
        let all = time::milliseconds(device, 3, RUNS, || rows::quantise(&x, true).map(drop))?;
        report(&format!("gelu+quantise {q}x{width}"), size, "fp8", &all, 0.0);
    }
    let keys = 29 * frame(size) / 2;
    // A ring lies transposed where that is faster; in rows it is what other cards attend to.
    for (name, keys, counted) in [("ring", keys + 128, keys), ("ring in rows", keys + 128, keys), ("text", 512, 512)] {
        for fp8 in [false, true] {
            let v = random(&[keys, d], 1.0)?;
            let memory = Memory::new(&v, (keys, d), fp8, 4.0)?;
            let memory = if name == "ring" { memory.transposed(d / 40)? } else { memory };
            let k = random(&[counted, d], 1.0)?;
            memory.place(&k, &v.narrow(0, 0, counted)?.contiguous()?)?;
            let ones = Tensor::ones(d, DType::BF16, device)?;
            let queries = memory.queries(&random(&[q, d], 1.0)?, &ones, 1e-6)?;
            let slot = Slot { at: 0, keys: counted, card: None }.on(device, q)?;
            let slot = (name != "text").then_some(&slot);
            let precision = if fp8 { "fp8" } else { "bf16" };
            match time::milliseconds(device, 3, RUNS, || memory.attend(&queries, 40, slot).map(drop)) {
                Ok(all) => {
                    report(&format!("attention {name}"), size, precision, &all, 4.0 * (q * counted * d) as f64 / 1e12);
                }
                Err(e) => println!("attention {name} in {precision}: {e}"),
            }
        }
    }
    known(device, size)?;
    bounded(device, size)?;
    let (x, y) = (random(&[q, d], 1.0)?, random(&[q, d], 1.0)?);
    let (gate, row) = (Tensor::randn(0f32, 0.1, (1, d), device)?, Tensor::randn(0f32, 1.0, (1, d), device)?);
    let runs = [q];
    for out in [DType::F8E4M3, DType::BF16] {
        let sum = rows::Sum { y: &y, gate: Some((&gate, &runs)) };
        let norm = rows::Norm { scale: &row, shift: &row, runs: &runs, eps: 1e-6, out, unit: None };
        let all = time::milliseconds(device, 3, RUNS, || rows::residual_norm(&x, Some(&sum), Some(&norm)).map(drop))?;
        report(&format!("sum+norm → {out:?}"), size, "-", &all, 0.0);
        let all = time::milliseconds(device, 3, RUNS, || rows::residual_norm(&x, None, Some(&norm)).map(drop))?;
        report(&format!("norm → {out:?}"), size, "-", &all, 0.0);
    }
    Ok(())
}

/// Norm, product and GELU with one unit each, the result in e4m3, beside what they replace; and what the bound takes.
fn bounded(device: &Device, size: (usize, usize)) -> Result<()> {
    let (q, d, f) = (3 * frame(size), 5120usize, 13824usize);
    let random = |shape: &[usize], deviation: f32, dtype: DType| -> Result<Tensor> {
        Ok(Tensor::randn(0f32, deviation, shape, device)?.to_dtype(dtype)?)
    };
    let x = random(&[q, d], 1.0, DType::BF16)?;
    let row = |deviation: f32| random(&[1, d], deviation, DType::F32);
    let norms = Affine::new(row(0.5)?, row(0.2)?);
    for (name, out) in [("qkv", 3 * d), ("ffn.0", f)] {
        let tflop = 2.0 * (q * d * out) as f64 / 1e12;
        let make = || Linear::new(random(&[out, d], 0.015, DType::BF16)?, Some(random(&[out], 0.1, DType::BF16)?));
        for (units, linear, norm) in [
            ("units by row", make()?.scaled()?, norms.clone()),
            ("one unit", make()?.evenly_scaled()?, norms.clone().bounded()?),
        ] {
            let mut x = Residual::new(x.copy()?);
            let all = time::milliseconds(device, 3, RUNS, || x.norm(&norm, &[q], 1e-6, linear.form()).map(drop))?;
            report(&format!("norm before {name}, {units}"), size, "fp8", &all, 0.0);
            let y = x.norm(&norm, &[q], 1e-6, linear.form())?;
            let all = time::milliseconds(device, 3, RUNS, || linear.forward_rows(&y, Activation::None).map(drop))?;
            report(&format!("product {name}, {units}"), size, "fp8", &all, tflop);
            let unit = linear.unit_after(&norm)?;
            let gelu = || linear.forward_to_gelu(&y, Form::Scaled, unit.as_ref()).map(drop);
            let all = time::milliseconds(device, 3, RUNS, gelu)?;
            report(&format!("product {name} to GELU in e4m3, {units}"), size, "fp8", &all, tflop);
            let all = time::milliseconds(device, 3, RUNS, || linear.unit_after(&norm).map(drop))?;
            report(&format!("bound after {name}, {units}"), size, "fp8", &all, 0.0);
        }
    }
    Ok(())
}

/// Attention to a text and to a voice with the output projection in it, piece by piece, and what making it takes.
fn known(device: &Device, size: (usize, usize)) -> Result<()> {
    let (d, heads, frames, q) = (5120usize, 40, 3, 3 * frame(size));
    let random = |shape: &[usize], deviation: f32| -> Result<Tensor> {
        Ok(Tensor::randn(0f32, deviation, shape, device)?.to_dtype(DType::BF16)?)
    };
    let (queries, weight) = (random(&[q, d], 1.0)?, random(&[d], 1.0)?);
    for (precision, fp8) in [("bf16", false), ("fp8", true)] {
        let o = Linear::new(random(&[d, d], 0.015)?, Some(random(&[d], 0.1)?))?;
        let o = if fp8 { o.scaled()? } else { o };
        let product = |of: &Linear| 2.0 * (q * of.width() * d) as f64 / 1e12;
        for n in [24, 64, 96] {
            let (k, v) = (random(&[n + 1, d], 1.0)?, random(&[n + 1, d], 1.0)?);
            let make = || Folded::new(&o, &k, &v, 512 - n, &weight, heads, 1e-6);
            let all = time::milliseconds(device, 3, RUNS, || make().map(drop))?;
            report(&format!("text of {n} tokens made"), size, precision, &all, 0.0);
            let text = make()?;
            let all = time::milliseconds(device, 3, RUNS, || text.weights(&queries).map(drop))?;
            report(&format!("weights of {n} tokens"), size, precision, &all, 0.0);
            let p = text.weights(&queries)?;
            let out = text.product();
            let all = time::milliseconds(device, 3, RUNS, || out.forward_rows(&p, Activation::None).map(drop))?;
            report(&format!("product of {n} tokens, {} columns", out.width()), size, precision, &all, product(out));
        }
        let (k, v) = (random(&[5 * frames, d], 1.0)?, random(&[5 * frames, d], 1.0)?);
        let form = if fp8 { Form::Scaled } else { Form::Plain(DType::BF16) };
        let attend = || nn::attention_to_few(&queries, &weight, &k, &v, heads, frames, 1e-6, form);
        let all = time::milliseconds(device, 3, RUNS, || attend().map(drop))?;
        report("attention to the voice", size, precision, &all, 0.0);
        let make = || Folded::grouped(&o, &k, &v, frames, &weight, heads, 1e-6);
        let all = time::milliseconds(device, 3, RUNS, || make().map(drop))?;
        report("voice made", size, precision, &all, 0.0);
        let voice = make()?;
        let all = time::milliseconds(device, 3, RUNS, || voice.weights(&queries).map(drop))?;
        report("weights of the voice", size, precision, &all, 0.0);
        let (p, out) = (voice.weights(&queries)?, voice.product());
        let all = time::milliseconds(device, 3, RUNS, || out.forward_rows(&p, Activation::None).map(drop))?;
        report(&format!("product of the voice, {} columns", out.width()), size, precision, &all, product(out));
    }
    Ok(())
}

/// Relative error of a step's prediction, block after block of a stream, at an eighth of the depth.
fn errors(device: &Device) -> Result<()> {
    let config = Config { num_layers: 5, audio_inject_layers: vec![0, 4], ..Config::default() };
    let x = inputs(device, (256, 256))?;
    // Named "unfolded": attention to text and voice apart from their output projection.
    let all = [("f32", true), ("bf16", true), ("fp8-linears", true), ("fp8", true), ("bf16", false), ("fp8", false)]
        .map(|(precision, fold)| predictions(device, &config, &x, precision, fold));
    let all = all.into_iter().collect::<Result<Vec<_>>>()?;
    for (i, j) in [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (2, 1), (3, 1), (5, 4)] {
        differ(config.num_layers, &all[i], &all[j])?;
    }
    Ok(())
}

/// The same of the whole model, fp8 against bf16.
fn whole(device: &Device, size: (usize, usize)) -> Result<()> {
    let (config, x) = (Config::default(), inputs(device, size)?);
    let bf16 = predictions(device, &config, &x, "bf16", true)?;
    for precision in ["fp8-linears", "fp8"] {
        differ(config.num_layers, &predictions(device, &config, &x, precision, true)?, &bf16)?;
    }
    Ok(())
}

/// What a stream's first five blocks predict, on the processor, and how that was computed.
fn predictions(
    device: &Device,
    config: &Config,
    x: &Inputs,
    precision: &str,
    fold: bool,
) -> Result<(String, Vec<Tensor>)> {
    let dit = load(device, precision, config.clone())?.folding(fold);
    let schedule = Arc::new(dit.schedule_of(4)?);
    let text = Arc::new(dit.text(&x.text)?);
    let mut state = dit.open(&Opening { reference: &x.reference, motion: None, text: Some(text) }, &schedule)?;
    let audio = dit.audio(&x.audio)?;
    let mut out = Vec::new();
    for _ in 0..5 {
        let prediction = dit.forward(&mut state, &x.noise, 0, &audio, None, 30, &mut Trace::off())?;
        out.push(prediction.to_dtype(DType::F32)?.to_device(&Device::Cpu)?);
        state.advance(3);
    }
    Ok((format!("{precision}{}", if fold { "" } else { " unfolded" }), out))
}

fn differ(layers: usize, (of, a): &(String, Vec<Tensor>), (against, b): &(String, Vec<Tensor>)) -> Result<()> {
    let norm = |t: &Tensor| -> Result<f32> { Ok(t.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt()) };
    let errors = a.iter().zip(b).map(|(a, b)| Ok(norm(&(a - b)?)? / norm(b)?)).collect::<Result<Vec<f32>>>()?;
    println!(
        "{}",
        serde_json::json!({"what": "relative error of a prediction, five blocks", "layers": layers, "of": of,
            "against": against, "errors": errors})
    );
    Ok(())
}
