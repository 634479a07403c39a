//! One forward of the whole S2V transformer for a clip of 80 frames, both branches of the guidance in turn, on an NVIDIA
//! card: random weights of the true shapes, device events.
//!
//! `cargo bench --features cuda --bench clip [-- SIZES [PRECISIONS]]`, for example `480x832 bf16,fp8`; `peer_clip.py` is the
//! same in PyTorch. The time of a whole clip of five seconds at 40 steps is 40 such pairs, and the decoder: both are printed.
//! One JSON line per figure.

use candle_core::{DType, Device, Tensor};
use loquent::model::{
    Result,
    dit::{ClipInputs, Config, Dit, Trace},
    kernels::cuda::{self, time},
    weights::{
        Fp8, Weights,
        synth::{imagined, preset},
    },
};

const RUNS: usize = 7;
const STEPS: usize = 40;
/// Latent frames of 80 frames, and of the 73 of motion before them.
const FRAMES: usize = 20;
const MOTION: usize = 19;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let list = |i: usize, or: &str| -> Vec<String> {
        words.get(i).map_or(or, String::as_str).split(',').map(str::to_string).collect()
    };
    let sizes: Vec<(usize, usize)> = list(0, "480x832")
        .iter()
        .filter_map(|s| s.split_once('x').and_then(|(h, w)| Some((h.parse().ok()?, w.parse().ok()?))))
        .collect();
    let device = cuda::open(0)?;
    let (name, driver) = time::name(&device)?;
    println!("{name}, CUDA {}.{}", driver / 1000, driver % 1000 / 10);
    for precision in list(1, "bf16,fp8") {
        device.set_seed(20260101)?;
        let fp8 = if precision == "fp8" { Fp8::All } else { Fp8::Off };
        let weights = Weights::new(imagined(preset("s2v-14b")?, 7)?, &device, DType::BF16).with_fp8(fp8);
        let dit = Dit::load(Config::default(), &weights)?;
        for &size in &sizes {
            forward(&device, &dit, size, &precision)?;
        }
    }
    Ok(())
}

fn forward(device: &Device, dit: &Dit, (h, w): (usize, usize), precision: &str) -> Result<()> {
    let random =
        |shape: &[usize]| -> Result<Tensor> { Ok(Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?.to_device(device)?) };
    let reference = random(&[16, 1, h / 8, w / 8])?;
    let (latent, motion) = (random(&[16, FRAMES, h / 8, w / 8])?, random(&[16, MOTION, h / 8, w / 8])?);
    let features = random(&[25, 1024, 4 * FRAMES])?;
    let (audio, silence) = (dit.audio(&features)?, dit.audio(&features.zeros_like()?)?);
    let texts = [dit.text(&random(&[64, 4096])?)?, dit.text(&random(&[64, 4096])?)?];
    let inputs = |text, audio| ClipInputs {
        latent: &latent,
        timestep: 700.0,
        text: Some(text),
        reference: &reference,
        motion: Some(&motion),
        keep_last_motion: 2,
        cond: None,
        audio,
    };
    let pair = || -> Result<[Tensor; 2]> {
        Ok([
            dit.clip(&inputs(&texts[0], &audio), &mut Trace::off())?,
            dit.clip(&inputs(&texts[1], &silence), &mut Trace::off())?,
        ])
    };
    let largest = |t: &Tensor| -> Result<f32> { Ok(t.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?) };
    let [prompted, free] = pair()?;
    let (largest, apart) = (largest(&prompted)?, largest(&(&prompted - &free)?)?);
    if !largest.is_finite() || apart == 0.0 {
        println!("the predictions are wrong: the largest is {largest}, the branches differ by {apart}");
    }
    let all = time::milliseconds(device, 1, RUNS, || pair().map(drop))?;
    // Reference and packed motion are 2.5 frames' worth of tokens, less what the packing's grids leave out.
    let tokens = (h / 16) * (w / 16) * (2 * FRAMES + 5) / 2;
    let tflop = 2.0 * dit.config().tflop(tokens, tokens);
    let ms = all[all.len() / 2];
    let (free, total) = time::memory(device)?;
    println!(
        "{}",
        serde_json::json!({
            "what": "clip of 80 frames: a forward of each branch", "size": format!("{h}x{w}"), "precision": precision,
            "ms": ms, "least": all[0], "most": all[all.len() - 1], "tflops": tflop / f64::from(ms) * 1e3,
            "seconds_of_40_steps": f64::from(ms) * STEPS as f64 / 1e3,
            "memory_gib": (total - free) as f64 / (1u64 << 30) as f64,
        })
    );
    Ok(())
}
