//! Checkpoints in every layout: full-size key listings, real little files of each format, and damaged ones.

use super::names;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use loquent::model::{
    dit::{Config, Dit},
    umt5::{self, Umt5},
    vae::WanVae,
    wav2vec2::{self, Wav2Vec2},
    weights::{
        Format, Shapes, Source, Weights,
        layout::{Layout, Official, Part},
        open,
    },
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

type Shaped = BTreeMap<String, Vec<usize>>;

fn listing(name: &str) -> Shaped {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/data/keys/{name}.json"));
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn scratch(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("loquent-checkpoints-{}-{name}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// Loads from shapes alone; every listed key must be taken exactly once, `unused` ones not at all.
fn takes_all(stored: Shaped, part: Part, layout: Layout, unused: &[&str], load: impl Fn(&Weights)) {
    let shapes = Arc::new(Shapes::new(stored.clone()));
    let (source, found, form) = Official::new(shapes.clone()).unwrap();
    assert_eq!((found, form), (part, layout));
    let weights = Weights::new(Arc::new(source), &Device::Cpu, DType::BF16);
    load(&weights);
    let report = weights.finish().unwrap_or_else(|e| panic!("{part:?} {layout:?}: {e}"));
    assert_eq!(report.unexpected, Vec::<String>::new(), "{part:?} {layout:?}");
    let loads = shapes.loads();
    for name in stored.keys() {
        let want = usize::from(!unused.iter().any(|u| name.starts_with(u) || name.ends_with(u)));
        assert_eq!(loads.get(name).copied().unwrap_or(0), want, "{part:?} {layout:?}: {name}");
    }
}

fn prefixed(keys: &Shaped, prefix: &str) -> Shaped {
    keys.iter().map(|(k, s)| (format!("{prefix}{k}"), s.clone())).collect()
}

fn load_dit(w: &Weights) {
    Dit::load(Config::default(), w).unwrap();
}

fn load_vae(w: &Weights) {
    WanVae::load(w).unwrap();
}

fn load_text(w: &Weights) {
    let config = umt5::Config::from_weights(w);
    assert_eq!(config, umt5::Config::default());
    Umt5::load(w, &config).unwrap();
}

#[test]
fn every_key_of_the_transformer_is_taken_once_in_each_layout() {
    let keys = listing("wan22_s2v_14b");
    takes_all(keys.clone(), Part::Speech, Layout::Official, &[], load_dit);
    takes_all(prefixed(&keys, "model.diffusion_model."), Part::Speech, Layout::Prefixed, &[], load_dit);
    let diffusers = keys.iter().map(|(k, s)| (names::diffusers_transformer(k), s.clone())).collect();
    takes_all(diffusers, Part::Speech, Layout::Diffusers, &[], load_dit);
    // ComfyUI's 8-bit files carry scales and a marker beside the weights
    let mut scaled = keys.clone();
    for k in keys.keys().filter(|k| k.ends_with("_attn.q.weight")) {
        scaled.insert(k.replace(".weight", ".scale_weight"), vec![1]);
        scaled.insert(k.replace(".weight", ".scale_input"), vec![1]);
    }
    scaled.insert("scaled_fp8".into(), vec![0]);
    takes_all(scaled, Part::Speech, Layout::Official, &["scaled_fp8", ".scale_input"], |w| {
        load_dit(w);
    });
}

#[test]
fn every_key_of_the_autoencoders_is_taken_once() {
    let keys = listing("wan21_vae");
    takes_all(keys.clone(), Part::Vae21, Layout::Official, &[], load_vae);
    takes_all(prefixed(&keys, "first_stage_model."), Part::Vae21, Layout::Prefixed, &[], load_vae);
    takes_all(listing("wan22_vae"), Part::Vae22, Layout::Official, &[], load_vae);
    let stored = keys.iter().map(|(k, s)| (names::diffusers_vae21(k), s.clone())).collect();
    takes_all(stored, Part::Vae21, Layout::Diffusers, &[], load_vae);
    let stored = listing("wan22_vae").iter().map(|(k, s)| (names::diffusers_vae22(k), s.clone())).collect();
    takes_all(stored, Part::Vae22, Layout::Diffusers, &[], load_vae);
}

#[test]
fn every_key_of_the_text_encoder_is_taken_once() {
    let keys = listing("umt5_xxl_encoder");
    takes_all(keys.clone(), Part::Text, Layout::Official, &[], load_text);
    let mut stored: Shaped = keys.iter().map(|(k, s)| (names::transformers_text(k), s.clone())).collect();
    takes_all(stored.clone(), Part::Text, Layout::Transformers, &[], load_text);
    // ComfyUI packs the tokenizer with it
    stored.insert("spiece_model".into(), vec![4_500_000]);
    takes_all(stored, Part::Text, Layout::Transformers, &["spiece_model"], load_text);
    let llama = keys.iter().map(|(k, s)| (names::llama_text(k), s.clone())).collect();
    takes_all(llama, Part::Text, Layout::LlamaCpp, &[], load_text);
}

#[test]
fn every_key_of_the_audio_encoder_is_taken_once_in_both_spellings() {
    let load = |w: &Weights| drop(Wav2Vec2::load(w, &wav2vec2::Config::default()).unwrap());
    let unused = ["wav2vec2.masked_spec_embed", "lm_head", "masked_spec_embed"];
    let keys = listing("wav2vec2_large_xlsr_53");
    takes_all(keys.clone(), Part::Hearing, Layout::Official, &unused, load);
    let old = |k: &str| {
        let k = k.replace("parametrizations.weight.original0", "weight_g");
        k.replace("parametrizations.weight.original1", "weight_v")
    };
    takes_all(keys.iter().map(|(k, s)| (old(k), s.clone())).collect(), Part::Hearing, Layout::Official, &unused, load);
    let bare = |k: &str| k.trim_start_matches("wav2vec2.").to_string();
    takes_all(keys.iter().map(|(k, s)| (bare(k), s.clone())).collect(), Part::Hearing, Layout::Official, &unused, load);
}

#[test]
fn a_wrong_checkpoint_is_explained_in_one_message() {
    let mut keys = listing("wan21_vae");
    keys.remove("decoder.head.2.bias");
    keys.insert("conv1.bias".into(), vec![7]);
    keys.insert("something.else".into(), vec![1]);
    let (source, ..) = Official::new(Arc::new(Shapes::new(keys))).unwrap();
    let weights = Weights::new(Arc::new(source), &Device::Cpu, DType::BF16);
    WanVae::load(&weights).unwrap();
    let said = weights.finish().unwrap_err().to_string();
    for part in ["decoder.head.2.bias", "conv1.bias is [7], expected [32]", "something.else"] {
        assert!(said.contains(part), "{said}");
    }
}

fn torch_file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiny.pth")
}

fn numbers(source: &dyn Source, name: &str) -> Vec<f32> {
    source.load(name).unwrap().to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn a_torch_archive_is_read_without_running_it() {
    let c = open(&torch_file()).unwrap();
    assert_eq!(c.format, Format::Torch);
    let s = &*c.source;
    assert_eq!(s.names(), ["half", "ints", "param", "plain", "slice", "turned"]);
    let plain: Vec<f32> = (0..24).map(|i| i as f32).collect();
    assert_eq!(numbers(s, "plain"), plain);
    assert_eq!(numbers(s, "half"), plain);
    assert_eq!(s.shape("turned").unwrap(), [6, 4]);
    assert_eq!(numbers(s, "turned")[..5], [0.0, 6.0, 12.0, 18.0, 1.0]);
    assert_eq!(numbers(s, "slice"), [8.0, 9.0, 10.0, 14.0, 15.0, 16.0]);
    assert_eq!(numbers(s, "param"), [1.5, -2.0]);
    assert_eq!(numbers(s, "ints"), [1.0, -2.0, 3.0]);
}

fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..n).map(|_| (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0).map(|x| x * 0.02).collect()
}

fn gguf_file(folder: &Path) -> PathBuf {
    let path = folder.join("x.gguf");
    let w = Tensor::from_vec(random(8 * 512, 1), (8, 512), &Device::Cpu).unwrap();
    let kinds = [
        ("f32", GgmlDType::F32),
        ("f16", GgmlDType::F16),
        ("bf16", GgmlDType::BF16),
        ("q8", GgmlDType::Q8_0),
        ("q6k", GgmlDType::Q6K),
        ("q5k", GgmlDType::Q5K),
        ("q4k", GgmlDType::Q4K),
    ];
    let tensors: Vec<(&str, QTensor)> = kinds.iter().map(|(n, k)| (*n, QTensor::quantize(&w, *k).unwrap())).collect();
    let refs: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (*n, t)).collect();
    let arch = gguf_file::Value::String("wan".into());
    gguf_file::write(&mut fs::File::create(&path).unwrap(), &[("general.architecture", &arch)], &refs).unwrap();
    path
}

/// ‖a − b‖ / ‖b‖.
fn apart(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let d: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(a - b))).sum();
    (d / b.iter().map(|b| square(f64::from(*b))).sum::<f64>()).sqrt()
}

#[test]
fn gguf_blocks_come_back_within_their_precision() {
    let folder = scratch("gguf");
    let c = open(&gguf_file(&folder)).unwrap();
    assert_eq!(c.format, Format::Gguf);
    let exact = random(8 * 512, 1);
    let limits =
        [("f32", 0.0), ("f16", 6e-4), ("bf16", 3e-3), ("q8", 8e-3), ("q6k", 0.03), ("q5k", 0.05), ("q4k", 0.1)];
    for (name, limit) in limits {
        assert_eq!(c.source.shape(name).unwrap(), [8, 512]);
        let d = apart(&numbers(&*c.source, name), &exact);
        assert!(d <= limit, "{name}: {d}");
    }
    fs::remove_dir_all(folder).unwrap();
}

/// A file of each format.
pub(crate) fn seeds(folder: &Path) -> [PathBuf; 3] {
    [torch_file(), gguf_file(folder), scaled_file(folder)]
}

fn scaled_file(folder: &Path) -> PathBuf {
    let path = folder.join("scaled.safetensors");
    let x = Tensor::from_vec(random(4 * 32, 2), (4, 32), &Device::Cpu).unwrap();
    let q = (x * 1000.0).unwrap().to_dtype(DType::F8E4M3).unwrap();
    let scale = Tensor::new(&[0.001f32], &Device::Cpu).unwrap();
    let map: std::collections::HashMap<String, Tensor> = [
        ("model.diffusion_model.blocks.0.self_attn.q.weight".to_string(), q),
        ("model.diffusion_model.blocks.0.self_attn.q.scale_weight".to_string(), scale),
    ]
    .into();
    candle_core::safetensors::save(&map, &path).unwrap();
    path
}

#[test]
fn eight_bit_floats_are_scaled_and_prefixes_fall_away() {
    let folder = scratch("scaled");
    let c = open(&scaled_file(&folder)).unwrap();
    assert_eq!((c.part, c.layout), (Part::Base, Layout::Prefixed));
    assert_eq!(c.source.names(), ["blocks.0.self_attn.q.weight"]);
    let d = apart(&numbers(&*c.source, "blocks.0.self_attn.q.weight"), &random(4 * 32, 2));
    assert!(d < 0.04, "{d}");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_folder_is_opened_by_its_index() {
    let folder = scratch("index");
    let shard = |name: &str, key: &str| {
        let map =
            std::collections::HashMap::from([(key.to_string(), Tensor::ones(2, DType::F32, &Device::Cpu).unwrap())]);
        candle_core::safetensors::save(&map, folder.join(name)).unwrap();
    };
    shard("m-1.safetensors", "a");
    let index = |b: &str| {
        let text = format!(r#"{{"weight_map": {{"a": "m-1.safetensors", "b": "{b}"}}}}"#);
        fs::write(folder.join("m.safetensors.index.json"), text).unwrap();
        open(&folder).map(|c| c.source.names()).map_err(|e| e.to_string())
    };
    assert!(index("m-2.safetensors").unwrap_err().contains("m-2.safetensors"));
    assert!(index("../m-2.safetensors").unwrap_err().contains("outside"));
    shard("m-2.safetensors", "b");
    assert_eq!(index("m-2.safetensors").unwrap(), ["a", "b"]);
    fs::remove_file(folder.join("m.safetensors.index.json")).unwrap();
    let many = open(&folder).map(|_| ()).unwrap_err().to_string();
    assert!(many.contains("name one"), "{many}");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn damaged_files_end_in_a_message() {
    let folder = scratch("fuzz");
    let seeds = seeds(&folder);
    let target = folder.join("mutant");
    let mut rng = StdRng::seed_from_u64(7);
    let mut refused = 0;
    for seed in seeds {
        let good = fs::read(seed).unwrap();
        for round in 0..700 {
            let mut bad = good.clone();
            match round % 4 {
                0 => bad.truncate(rng.random_range(0..bad.len())),
                // headers stand in front, a zip's directory at the end
                kind => {
                    for _ in 0..rng.random_range(1..6) {
                        let reach = bad.len().min(1200);
                        let at = rng.random_range(0..reach);
                        let at = if kind == 3 { bad.len() - 1 - at } else { at };
                        bad[at] = if rng.random_bool(0.3) { 0xff } else { rng.random() };
                    }
                }
            }
            fs::write(&target, &bad).unwrap();
            match open(&target) {
                Ok(c) => {
                    for name in c.source.names() {
                        let _ = c.source.load(&name);
                    }
                }
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > 500, "only {refused} of 2100 mutants were refused; the mutations do not bite");
    for (text, said) in [
        (&b"version https://git-lfs.github.com/spec/v1\noid"[..], "Git LFS"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"", "neither"),
    ] {
        fs::write(&target, text).unwrap();
        let e = open(&target).map(|_| ()).unwrap_err().to_string();
        assert!(e.contains(said) || text.is_empty(), "{e}");
    }
    fs::remove_dir_all(folder).unwrap();
}
