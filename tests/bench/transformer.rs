//! Time of the pocket transformer on this machine: one denoising step, and its parts.
//!
//! `cargo bench --bench transformer [-- THREADS]`. CPU time is printed beside wall time, because on a busy machine only
//! the former says what the code costs. THREADS is read by the kernels' pool when it is first used.

use std::{path::Path, sync::Arc, time::Instant};

use candle_core::{DType, Device, Tensor};
use loquent::model::{
    Result,
    dit::{Config, Dit, Opening, Trace},
    nn::{self, Activation, Linear, norm},
    weights::{Safetensors, Weights},
};

/// CPU seconds of this process so far, by /proc; 0 where there is none.
fn cpu_seconds() -> f64 {
    let Ok(text) = std::fs::read_to_string("/proc/self/schedstat") else { return 0.0 };
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let all = threads.filter_map(|t| std::fs::read_to_string(t.path().join("schedstat")).ok());
    let nanos = |s: String| s.split_whitespace().next().and_then(|n| n.parse::<f64>().ok()).unwrap_or(0.0);
    let sum: f64 = all.map(nanos).sum();
    sum.max(nanos(text)) / 1e9
}

fn measure(name: &str, flops: f64, runs: usize, mut body: impl FnMut() -> Result<()>) -> Result<()> {
    for _ in 0..3 {
        body()?;
    }
    let (cpu, mut walls) = (cpu_seconds(), Vec::with_capacity(runs));
    for _ in 0..runs {
        let began = Instant::now();
        body()?;
        walls.push(began.elapsed().as_secs_f64());
    }
    let cpu = (cpu_seconds() - cpu) / runs as f64;
    walls.sort_by(f64::total_cmp);
    println!(
        "{name:34} wall median {:8.3} ms  best {:8.3} ms  cpu {:8.3} ms  {:6.1} GFLOP/s of cpu time  {:6.1} at best",
        walls[runs / 2] * 1e3,
        walls[0] * 1e3,
        cpu * 1e3,
        flops / cpu.max(1e-9) / 1e9,
        flops / walls[0] / 1e9
    );
    Ok(())
}

fn main() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("pocket");
    let list = std::fs::read_dir(&folder).expect("the folder of the pocket model");
    let mut shards: Vec<_> = list.filter_map(|e| Some(e.ok()?.path())).collect();
    shards.retain(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("pocket-")));
    shards.sort();
    let file = Safetensors::open(&shards)?;
    let config = Config::parse(file.metadata("config").expect("the weights carry their configuration"))?;
    let (d, f, layers, heads) = (config.dim, config.ffn_dim, config.num_layers, config.num_heads);
    let (kv, injected) = (config.kv_frames, config.audio_inject_layers.len());
    let cpu = Device::Cpu;
    let dit = Dit::load(config, &Weights::new(Arc::new(file), &cpu, DType::F32).pp("dit"))?;

    let reference = Tensor::randn(0f32, 1.0, (16, 1, 32, 32), &cpu)?;
    let schedule = Arc::new(dit.schedule_of(dit.config().default_steps)?);
    let mut state = dit.open(&Opening { reference: &reference, motion: None, text: None }, &schedule)?;
    let features = Tensor::randn(0f32, 1.0, (1, dit.config().audio_dim, 4), &cpu)?;
    let noise = Tensor::randn(0f32, 1.0, (16, 1, 32, 32), &cpu)?;
    for _ in 0..kv + 1 {
        let audio = dit.audio(&features)?;
        dit.generate(&mut state, &audio, noise.clone(), None, &[])?;
    }
    let (n, keys) = (64.0, (64 * kv + 160) as f64);
    let (df, ff) = (d as f64, f as f64);
    let step = layers as f64 * (n * (8.0 * df * df + 4.0 * df * ff) + 4.0 * n * keys * df)
        + injected as f64 * n * 4.0 * df * df
        + n * 4.0 * 256.0 * df;
    let audio = dit.audio(&features)?;
    measure("one denoising step", step, 200, || {
        dit.forward(&mut state, &noise, 0, &audio, None, 30, &mut Trace::off())?;
        Ok(())
    })?;
    measure("audio of one block", 0.0, 100, || dit.audio(&features).map(|_| ()))?;
    let open = Opening { reference: &reference, motion: None, text: None };
    measure("opening a stream", 0.0, 20, || dit.open(&open, &schedule).map(|_| ()))?;

    let make = |rows: usize, columns: usize| Tensor::randn(0f32, 1.0, (rows, columns), &cpu);
    for (rows, width, out, act) in [
        (64, d, d, Activation::None),
        (64, d, 3 * d, Activation::None),
        (64, d, f, Activation::None),
        (64, d, f, Activation::GeluTanh),
        (64, f, d, Activation::None),
    ] {
        let layer = Linear::new(make(out, width)?, Some(Tensor::zeros(out, DType::F32, &cpu)?))?;
        let x = make(rows, width)?;
        let name = format!("linear {rows}×{width}→{out} {act:?}");
        measure(&name, 2.0 * (rows * width * out) as f64, 500, || layer.forward_with(&x, act).map(|_| ()))?;
    }
    let (q, k) = (make(64, d)?, make(64 * kv + 160, d)?);
    measure("attention", 4.0 * n * keys * df, 500, || nn::attention(&q, &k, &k, heads, 1).map(|_| ()))?;
    let one = norm::Affine::new(make(1, d)?, make(1, d)?);
    measure("layer norm", 0.0, 500, || norm::layer_norm(&q, &one, &[64], 1e-6).map(|_| ()))?;
    measure("gated add", 0.0, 500, || norm::gated_add(&q, &q, &one.scale, &[64]).map(|_| ()))?;
    let groups = [nn::rope::Group::frames(3, 1, 8, 8)];
    let rope = nn::Rope::new(&groups, d / heads, nn::rope::Rounding::Exact, &cpu)?;
    let weight = one.scale.flatten_all()?;
    measure("rms norm and rotation", 0.0, 500, || norm::rms_norm_rotate(&q, &weight, 1e-6, &rope).map(|_| ()))
}
