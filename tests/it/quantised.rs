//! Quantised checkpoints of random numbers: kept as they are stored, and how far their results are from bf16. And blocks
//! that stay in host memory.

use std::{collections::BTreeMap, fs, path::PathBuf, sync::Arc};

use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use loquent::model::{
    dit::{BlockAudio, ClipInputs, Config, Dit, Opening, Trace},
    nn::Residual,
    weights::{Adapted, Source, Tensors, Weights, open},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

/// Widths that hold whole blocks of 256.
fn config() -> Config {
    Config {
        dim: 256,
        num_heads: 2,
        num_layers: 3,
        ffn_dim: 512,
        text_dim: 256,
        text_len: 8,
        audio_dim: 32,
        audio_inject_layers: vec![0, 2],
        ..Config::default()
    }
}

fn random(shape: &[usize], deviation: f32, rng: &mut StdRng) -> Tensor {
    let bell = |rng: &mut StdRng| ((0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0) * deviation;
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| bell(rng)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// A whole transformer, rounded to bf16.
fn checkpoint() -> BTreeMap<String, Tensor> {
    let asked = Weights::new(Arc::new(Tensors::new([], "nothing")), &Device::Cpu, DType::F32);
    Dit::load(config(), &asked).unwrap();
    let mut rng = StdRng::seed_from_u64(7);
    let mut made = BTreeMap::new();
    for (name, shape) in asked.asked() {
        let deviation =
            if shape.len() < 2 { 0.05 } else { (shape[1..].iter().product::<usize>() as f32).sqrt().recip() };
        let mut t = random(&shape, deviation, &mut rng);
        if name.contains("norm") && name.ends_with("weight") {
            t = (t + 1.0).unwrap();
        }
        made.insert(name, t.to_dtype(DType::BF16).unwrap());
    }
    made
}

/// Matrices of the blocks and injectors: what files quantise.
fn large(name: &str, t: &Tensor) -> bool {
    (name.starts_with("blocks.") || name.starts_with("audio_injector.")) && name.ends_with(".weight") && t.rank() == 2
}

fn weights(source: Arc<dyn Source>, dtype: DType) -> Weights {
    Weights::new(source, &Device::Cpu, dtype)
}

fn transformer(source: Arc<dyn Source>, dtype: DType) -> Dit {
    let w = weights(source, dtype);
    let dit = Dit::load(config(), &w).unwrap();
    assert_eq!(w.finish().unwrap().unexpected, Vec::<String>::new());
    dit
}

/// The velocity of one clip.
fn velocity(dit: &Dit) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(8);
    let mut input = |shape: &[usize]| random(shape, 1.0, &mut rng);
    let (latent, reference, motion) = (input(&[16, 2, 8, 8]), input(&[16, 1, 8, 8]), input(&[16, 19, 8, 8]));
    let text = dit.text(&input(&[5, 256])).unwrap();
    let audio = dit.audio(&input(&[25, 32, 8])).unwrap();
    let inputs = ClipInputs {
        latent: &latent,
        timestep: 600.0,
        text: Some(&text),
        reference: &reference,
        motion: Some(&motion),
        keep_last_motion: 2,
        cond: None,
        audio: &audio,
    };
    let v = dit.clip(&inputs, &mut Trace::off()).unwrap();
    v.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// ‖a − b‖ / ‖b‖.
fn apart(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x).powi(2);
    let d: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (d / b.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
}

fn scratch(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("loquent-quantised-{}-{name}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// As llama.cpp's tools and ComfyUI-GGUF write it: large matrices in blocks, the rest in f32.
fn gguf(numbers: &BTreeMap<String, Tensor>, kind: GgmlDType, path: &PathBuf) {
    let all: Vec<(&str, QTensor)> = (numbers.iter())
        .map(|(name, t)| {
            let kind = if large(name, t) { kind } else { GgmlDType::F32 };
            (name.as_str(), QTensor::quantize(&t.to_dtype(DType::F32).unwrap(), kind).unwrap())
        })
        .collect();
    let refs: Vec<(&str, &QTensor)> = all.iter().map(|(n, t)| (*n, t)).collect();
    let arch = gguf_file::Value::String("wan".into());
    gguf_file::write(&mut fs::File::create(path).unwrap(), &[("general.architecture", &arch)], &refs).unwrap();
}

/// As ComfyUI's `fp8_scaled` files: e4m3 over the full range and `scale_weight`.
fn fp8_scaled(numbers: &BTreeMap<String, Tensor>, path: &PathBuf) {
    let mut all = std::collections::HashMap::new();
    for (name, t) in numbers {
        let (full, mut t) = (format!("model.diffusion_model.{name}"), t.clone());
        if large(name, &t) {
            t = t.to_dtype(DType::F32).unwrap();
            let scale = t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() / 448.0;
            t = (t / f64::from(scale)).unwrap().to_dtype(DType::F8E4M3).unwrap();
            let key = full.replace(".weight", ".scale_weight");
            all.insert(key, Tensor::new(&[scale], &Device::Cpu).unwrap());
        }
        all.insert(full, t);
    }
    candle_core::safetensors::save(&all, path).unwrap();
}

#[test]
fn quantised_checkpoints_stay_quantised_and_near_bf16() {
    let folder = scratch("near");
    let numbers = checkpoint();
    let exact = velocity(&transformer(Arc::new(Tensors::new(numbers.clone(), "bf16")), DType::F32));
    let computed = velocity(&transformer(Arc::new(Tensors::new(numbers.clone(), "bf16")), DType::BF16));
    println!("bf16 computing against f32: {:.2e}", apart(&computed, &exact));
    assert!(apart(&computed, &exact) < 0.03);
    let bytes = |m: &loquent::model::nn::Linear| m.matrix().bytes() as f64 / (512.0 * 256.0);
    for (kind, per_number, limit) in [
        (Some(GgmlDType::Q8_0), 1.0625, 0.012),
        (Some(GgmlDType::Q6K), 0.8204, 0.03),
        (Some(GgmlDType::Q5K), 0.6875, 0.06),
        (Some(GgmlDType::Q4K), 0.5625, 0.11),
        (None, 1.001, 0.06),
    ] {
        let path = folder.join("file");
        let name = match kind {
            Some(kind) => {
                gguf(&numbers, kind, &path);
                format!("GGUF {kind:?}")
            }
            None => {
                fp8_scaled(&numbers, &path);
                "fp8_scaled".into()
            }
        };
        let source = open(&path).unwrap().source;
        let linear = weights(source.clone(), DType::F32).linear("blocks.0.ffn.0", 256, 512, true).unwrap();
        let held = bytes(&linear);
        assert!((held - per_number).abs() < 0.01, "{name} holds {held} bytes a number");
        let distance = apart(&velocity(&transformer(source, DType::F32)), &exact);
        println!("{name}: {held:.3} bytes a number, velocity {distance:.2e} from bf16");
        assert!(distance < limit, "{name}: {distance} from bf16");
    }
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn an_adapter_beside_quantised_numbers_equals_the_merged_sum() {
    let folder = scratch("side");
    let path = folder.join("file");
    gguf(&checkpoint(), GgmlDType::Q4K, &path);
    let source = open(&path).unwrap().source;
    let mut rng = StdRng::seed_from_u64(9);
    let half = |shape: &[usize], rng: &mut StdRng| random(shape, 0.1, rng);
    let adapter: BTreeMap<String, Tensor> = (0..3)
        .flat_map(|i| ["self_attn.q", "self_attn.o", "cross_attn.o", "ffn.0"].map(|m| format!("blocks.{i}.{m}")))
        .flat_map(|m| {
            let out = if m.ends_with("ffn.0") { 512 } else { 256 };
            [
                (format!("{m}.lora_A.weight"), half(&[4, 256], &mut rng)),
                (format!("{m}.lora_B.weight"), half(&[out, 4], &mut rng)),
            ]
        })
        .collect();
    let adapter: Arc<dyn Source> = Arc::new(Tensors::new(adapter, "adapter"));
    let merged = Arc::new(Adapted::new(source.clone(), vec![(adapter, 0.7)]).unwrap());
    // the same source, widened first, has the products merged
    let wide: BTreeMap<String, Tensor> =
        merged.names().into_iter().map(|n| (n.clone(), merged.load(&n).unwrap())).collect();
    let beside = weights(merged.clone(), DType::F32).linear("blocks.1.ffn.0", 256, 512, true).unwrap();
    assert_eq!((beside.matrix().kind(), beside.matrix().side().len()), ("Q4K".to_string(), 1));
    let (a, b) = (
        velocity(&transformer(merged.clone(), DType::F32)),
        velocity(&transformer(Arc::new(Tensors::new(wide, "wide")), DType::F32)),
    );
    assert!(apart(&a, &b) < 1e-5, "{}", apart(&a, &b));
    let folded = velocity(&transformer(merged, DType::F32).folding(true));
    assert!(folded != a && apart(&folded, &a) < 1e-5, "{}", apart(&folded, &a));
    assert!(apart(&a, &velocity(&transformer(source, DType::F32))) > 1e-3, "the adapter changed nothing");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn blocks_that_travel_compute_the_same_bits() {
    let source: Arc<dyn Source> = Arc::new(Tensors::new(checkpoint(), "bf16"));
    let whole = velocity(&transformer(source.clone(), DType::F32));
    for resident in [0, 2] {
        let w = weights(source.clone(), DType::F32);
        let dit = Dit::load_offloaded(config(), &w, resident).unwrap();
        assert_eq!(velocity(&dit), whole, "{resident} resident blocks");
    }
}

#[test]
fn every_voice_reaches_its_own_tokens() {
    let dit = transformer(Arc::new(Tensors::new(checkpoint(), "bf16")), DType::F32);
    let mut rng = StdRng::seed_from_u64(10);
    let voices = [0, 1].map(|_| dit.audio(&random(&[25, 32, 8], 1.0, &mut rng)).unwrap());
    // two latent frames of four tokens
    let x = random(&[8, 256], 1.0, &mut rng);
    let heard = |audio: &BlockAudio| -> Vec<Vec<f32>> {
        let mut y = Residual::new(x.clone());
        dit.injector(0).unwrap().forward(&mut y, &audio.injectors[0], 2).unwrap();
        (y.into_tokens().unwrap() - &x).unwrap().to_vec2().unwrap()
    };
    let alone = [heard(&voices[0]), heard(&voices[1])];
    let [one, two] = voices;
    let mask = |v: [f32; 4]| Tensor::new(&v, &Device::Cpu).unwrap().reshape((4, 1)).unwrap();
    let both =
        BlockAudio::together(vec![(one, mask([1.0, 1.0, 0.0, 0.0])), (two, mask([0.0, 1.0, 1.0, 0.0]))]).unwrap();
    for (i, row) in heard(&both).into_iter().enumerate() {
        for (c, v) in row.into_iter().enumerate() {
            let (a, b) = (alone[0][i][c], alone[1][i][c]);
            let want = [a, a + b, b, 0.0][i % 4];
            assert!((v - want).abs() < 1e-5, "token {i}: {v} instead of {want}");
        }
    }
    assert!(BlockAudio::together(Vec::new()).is_err());
}

#[test]
fn attention_made_into_its_projection_is_the_same() {
    let source: Arc<dyn Source> = Arc::new(Tensors::new(checkpoint(), "bf16"));
    let (plain, folded) =
        (|| transformer(source.clone(), DType::F32), || transformer(source.clone(), DType::F32).folding(true));
    let (a, b) = (velocity(&folded()), velocity(&plain()));
    // Not the same bits: otherwise nothing was folded.
    assert!(a != b && apart(&a, &b) < 1e-5, "{}", apart(&a, &b));

    // Blocks of a stream, and two voices.
    let stream = |dit: &Dit| -> Vec<f32> {
        let mut rng = StdRng::seed_from_u64(11);
        let mut input = |shape: &[usize]| random(shape, 1.0, &mut rng);
        let (reference, noise) = (input(&[16, 1, 8, 8]), input(&[16, 3, 8, 8]));
        let text = Some(Arc::new(dit.text(&input(&[5, 256])).unwrap()));
        let mask = |from: usize| {
            Tensor::cat(
                &[
                    &Tensor::zeros((from, 1), DType::F32, &Device::Cpu).unwrap(),
                    &Tensor::ones((16 - from, 1), DType::F32, &Device::Cpu).unwrap(),
                ],
                0,
            )
            .unwrap()
        };
        let voices = [0, 6].map(|from| (dit.audio(&input(&[25, 32, 12])).unwrap(), mask(from)));
        let audio = BlockAudio::together(voices.into()).unwrap();
        let schedule = Arc::new(dit.schedule_of(2).unwrap());
        let mut state = dit.open(&Opening { reference: &reference, motion: None, text }, &schedule).unwrap();
        let blocks = (0..2).map(|_| dit.generate(&mut state, &audio, noise.clone(), None, &[]).unwrap());
        blocks.flat_map(|block| block.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect()
    };
    let (a, b) = (stream(&folded()), stream(&plain()));
    assert!(a != b && apart(&a, &b) < 1e-5, "{}", apart(&a, &b));
}
