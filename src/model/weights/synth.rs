//! Random checkpoints of true names and shapes, for tests and benchmarks: what the loaders ask an empty source for is
//! what is written, so that a preset cannot differ from the network it stands for.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use half::bf16;

use super::{Source, Tensors, Weights};
use crate::model::{
    Error, Result,
    dit::{Config, Dit},
    taehv::Taehv,
    umt5::{self, Umt5},
    vae::{Kind, WanVae},
    wav2vec2::{self, Wav2Vec2},
};

/// One network at one size.
pub struct Preset {
    pub name: &'static str,
    /// What it is and where its sizes stand.
    pub about: &'static str,
    ask: fn(&Weights) -> Result<()>,
}

fn tiny_transformer() -> Config {
    Config {
        dim: 96,
        num_heads: 3,
        num_layers: 4,
        ffn_dim: 256,
        text_dim: 64,
        text_len: 24,
        audio_dim: 32,
        audio_inject_layers: vec![0, 2],
        ..Config::default()
    }
}

/// A member of the base family: `t2v`, `i2v` or `ti2v`, by its channels (wan/configs/wan_*.py of Wan-Video/Wan2.2 at
/// 42bf4cf; the sizes of A14B are those of S2V).
fn base(model_type: &str, of: Config) -> Config {
    let (in_dim, out_dim) = match model_type {
        "i2v" => (36, 16),
        "ti2v" => (48, 48),
        _ => (16, 16),
    };
    Config { model_type: model_type.into(), in_dim, out_dim, audio_inject_layers: Vec::new(), ..of }
}

/// TI2V-5B (wan/configs/wan_ti2v_5B.py).
fn ti2v_5b() -> Config {
    base("ti2v", Config { dim: 3072, ffn_dim: 14336, num_heads: 24, num_layers: 30, ..Config::default() })
}

fn tiny_hearing() -> wav2vec2::Config {
    wav2vec2::Config {
        hidden_size: 32,
        num_attention_heads: 4,
        intermediate_size: 64,
        conv_dim: vec![24; 7],
        num_conv_pos_embeddings: 16,
        num_conv_pos_embedding_groups: 4,
        ..wav2vec2::Config::default()
    }
}

fn tiny_text() -> umt5::Config {
    umt5::Config { vocab_size: 200, dim: 64, dim_attn: 64, dim_ffn: 96, num_heads: 4, layers: 3, num_buckets: 32 }
}

fn vae(w: &Weights, kind: Kind, widths: (usize, usize)) -> Result<()> {
    WanVae::build(w, kind, Some(widths.0), widths.1).map(drop)
}

/// The small decoder's preset; every random model has it.
pub const SMALL_DECODER: &str = "taew2_1";

/// What [`write`] can make.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "s2v-14b",
        about: "Wan2.2-S2V-14B transformer (Wan-Video/Wan2.2 42bf4cf, wan/configs/wan_s2v_14B.py), 32.6 GB",
        ask: |w| Dit::load(Config::default(), w).map(drop),
    },
    Preset {
        name: "s2v-tiny",
        about: "the same architecture at width 96",
        ask: |w| Dit::load(tiny_transformer(), w).map(drop),
    },
    Preset {
        name: "t2v-14b",
        about: "one of the two transformers of Wan2.2-T2V-A14B (Wan-Video/Wan2.2 42bf4cf, wan/configs/wan_t2v_A14B.py), 28.6 GB",
        ask: |w| Dit::load(base("t2v", Config::default()), w).map(drop),
    },
    Preset {
        name: "i2v-14b",
        about: "one of the two transformers of Wan2.2-I2V-A14B (Wan-Video/Wan2.2 42bf4cf, wan/configs/wan_i2v_A14B.py), 28.6 GB",
        ask: |w| Dit::load(base("i2v", Config::default()), w).map(drop),
    },
    Preset {
        name: "ti2v-5b",
        about: "Wan2.2-TI2V-5B transformer (Wan-Video/Wan2.2 42bf4cf, wan/configs/wan_ti2v_5B.py), 10 GB",
        ask: |w| Dit::load(ti2v_5b(), w).map(drop),
    },
    Preset {
        name: "t2v-tiny",
        about: "the architecture of T2V at width 96",
        ask: |w| Dit::load(base("t2v", tiny_transformer()), w).map(drop),
    },
    Preset {
        name: "i2v-tiny",
        about: "the architecture of I2V at width 96",
        ask: |w| Dit::load(base("i2v", tiny_transformer()), w).map(drop),
    },
    Preset {
        name: "ti2v-tiny",
        about: "the architecture of TI2V at width 96",
        ask: |w| Dit::load(base("ti2v", tiny_transformer()), w).map(drop),
    },
    Preset {
        name: "wan21-vae",
        about: "Wan 2.1 video autoencoder (Wan-Video/Wan2.2 42bf4cf, wan/modules/vae2_1.py)",
        ask: |w| vae(w, Kind::Wan21, Kind::Wan21.widths()),
    },
    Preset { name: "wan21-vae-tiny", about: "the same at width 4", ask: |w| vae(w, Kind::Wan21, (4, 4)) },
    Preset {
        name: "wan22-vae",
        about: "Wan 2.2 video autoencoder (Wan-Video/Wan2.2 42bf4cf, wan/modules/vae2_2.py)",
        ask: |w| vae(w, Kind::Wan22, Kind::Wan22.widths()),
    },
    Preset { name: "wan22-vae-tiny", about: "the same at width 4", ask: |w| vae(w, Kind::Wan22, (4, 4)) },
    Preset {
        name: SMALL_DECODER,
        about: "small decoder for Wan 2.1's latents (madebyollin/taehv 1f14a56, taehv.py, taew2_1.pth), 20 MB",
        ask: |w| Taehv::load(w, 16).map(drop),
    },
    Preset {
        name: "umt5-xxl",
        about: "UMT5-XXL text encoder (Wan-Video/Wan2.2 42bf4cf, wan/modules/t5.py), 11.4 GB",
        ask: |w| Umt5::load(w, &umt5::Config::default()).map(drop),
    },
    Preset {
        name: "umt5-tiny",
        about: "the same architecture at width 64",
        ask: |w| Umt5::load(w, &tiny_text()).map(drop),
    },
    Preset {
        name: "wav2vec2-large",
        about: "wav2vec2-large-xlsr-53 audio encoder (huggingface/transformers v4.51.3, models/wav2vec2/modeling_wav2vec2.py)",
        ask: |w| Wav2Vec2::load(&w.pp("wav2vec2"), &wav2vec2::Config::default()).map(drop),
    },
    Preset {
        name: "wav2vec2-tiny",
        about: "the same architecture at width 32",
        ask: |w| Wav2Vec2::load(&w.pp("wav2vec2"), &tiny_hearing()).map(drop),
    },
];

/// Names and shapes of a preset.
pub fn shapes(preset: &Preset) -> Result<BTreeMap<String, Vec<usize>>> {
    let empty = Tensors::new([], preset.name);
    let weights = Weights::new(Arc::new(empty), &Device::Cpu, DType::BF16);
    (preset.ask)(&weights)?;
    Ok(weights.asked())
}

/// A small fast generator (SplitMix64); quality is of no concern here, speed is.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Four numbers, evenly spread in ±√3·`deviation`.
    fn four(&mut self, deviation: f32) -> [bf16; 4] {
        let bits = self.next();
        [0, 16, 32, 48].map(|s| {
            let unit = ((bits >> s) & 0xffff) as f32 / 32768.0 - 1.0;
            bf16::from_f32(unit * 1.732 * deviation)
        })
    }
}

/// Mean and deviation of a tensor by its name and shape: gains near one, the rest so that signals keep their size.
fn kind(name: &str, shape: &[usize]) -> (f32, f32) {
    let gain = name.ends_with("gamma") || name.ends_with("original0") || name.ends_with("weight_g");
    if gain || (name.contains("norm") && name.ends_with("weight") && shape.len() == 1) {
        return (1.0, 0.02);
    }
    if shape.len() < 2 {
        return (0.0, 0.01);
    }
    let fan_in: usize = shape[1..].iter().product();
    (0.0, 1.0 / (fan_in.max(1) as f32).sqrt())
}

/// Writes a preset as one bf16 safetensors file; `seed` makes it reproducible. The file appears when it is complete.
/// `progress` is told bytes written and bytes in all.
pub fn write(preset: &Preset, path: &Path, seed: u64, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
    let shapes = shapes(preset)?;
    let wrong = |e: std::io::Error| Error::Weights(format!("{} cannot be written: {e}", path.display()));
    let mut header = serde_json::Map::new();
    let mut at = 0u64;
    for (name, shape) in &shapes {
        let end = at + 2 * shape.iter().product::<usize>() as u64;
        let entry = serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, end]});
        header.insert(name.clone(), entry);
        at = end;
    }
    let total = at;
    let about = serde_json::json!({"preset": preset.name, "seed": seed.to_string(), "about": "random numbers"});
    header.insert("__metadata__".into(), about);
    let mut text = serde_json::Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let part = path.with_extension("part");
    let mut file = BufWriter::with_capacity(1 << 20, File::create(&part).map_err(wrong)?);
    let mut body = || -> std::io::Result<()> {
        file.write_all(&(text.len() as u64).to_le_bytes())?;
        file.write_all(&text)?;
        let mut random = Random(seed);
        let mut done = 0u64;
        for (name, shape) in &shapes {
            let (mean, deviation) = kind(name, shape);
            let mut left: usize = shape.iter().product();
            done += 2 * left as u64;
            while left > 0 {
                let four = random.four(deviation).map(|v| bf16::from_f32(v.to_f32() + mean).to_le_bytes());
                let n = left.min(4);
                file.write_all(&four.as_flattened()[..2 * n])?;
                left -= n;
            }
            progress(done, total);
        }
        file.flush()
    };
    let outcome = body().and_then(|()| fs::rename(&part, path));
    if outcome.is_err() {
        let _ = fs::remove_file(&part);
    }
    outcome.map_err(wrong)
}

/// A whole model of random numbers: the parts of an official folder.
pub struct Whole {
    pub name: &'static str,
    pub about: &'static str,
    pub transformer: &'static str,
    /// Folders of the transformers: one beside the rest, or two experts' own.
    pub folders: &'static [&'static str],
    pub vae: &'static str,
    pub text: &'static str,
    /// Models that hear.
    pub hearing: Option<&'static str>,
}

/// Where the experts of A14B lie (wan/configs/wan_t2v_A14B.py).
const EXPERTS: &[&str] = &["high_noise_model", "low_noise_model"];

/// What [`write_folder`] can make, and `random:NAME` names.
pub const WHOLES: &[Whole] = &[
    Whole {
        name: "tiny",
        about: "a whole model at width 96, 8 MB: every part, and a tokenizer",
        transformer: "s2v-tiny",
        folders: &[""],
        vae: "wan21-vae-tiny",
        text: "umt5-tiny",
        hearing: Some("wav2vec2-tiny"),
    },
    Whole {
        name: "14b",
        about: "a whole model of the true sizes, 45 GB: every part, and a tokenizer of single letters",
        transformer: "s2v-14b",
        folders: &[""],
        vae: "wan21-vae",
        text: "umt5-xxl",
        hearing: Some("wav2vec2-large"),
    },
    Whole {
        name: "tiny-t2v",
        about: "a whole text-to-video model with two experts at width 96",
        transformer: "t2v-tiny",
        folders: EXPERTS,
        vae: "wan21-vae-tiny",
        text: "umt5-tiny",
        hearing: None,
    },
    Whole {
        name: "tiny-i2v",
        about: "a whole image-to-video model with two experts at width 96",
        transformer: "i2v-tiny",
        folders: EXPERTS,
        vae: "wan21-vae-tiny",
        text: "umt5-tiny",
        hearing: None,
    },
    Whole {
        name: "tiny-ti2v",
        about: "a whole text-and-image-to-video model at width 96",
        transformer: "ti2v-tiny",
        folders: &[""],
        vae: "wan22-vae-tiny",
        text: "umt5-tiny",
        hearing: None,
    },
];

impl Whole {
    /// By its name.
    pub fn named(name: &str) -> Result<&'static Whole> {
        WHOLES.iter().find(|w| w.name == name).ok_or_else(|| {
            let names: Vec<_> = WHOLES.iter().map(|w| w.name).collect();
            Error::Config(format!("there is no random model `{name}`; there are {}", names.join(", ")))
        })
    }

    /// By what stands behind `random:`, a name and if wanted a seed: `tiny:7`.
    pub fn random(text: &str) -> Result<(&'static Whole, u64)> {
        let (name, seed) = text.split_once(':').unwrap_or((text, "1"));
        let seed =
            seed.parse().map_err(|_| Error::Config(format!("random:{text}: a seed is a whole number from 0")))?;
        Ok((Whole::named(name)?, seed))
    }

    /// What stands in `config.json` beside the transformer.
    pub fn transformer_config(&self) -> Config {
        match self.transformer {
            "s2v-tiny" => tiny_transformer(),
            tiny => match tiny.strip_suffix("-tiny") {
                Some(kind) => base(kind, tiny_transformer()),
                None => Config::default(),
            },
        }
    }

    /// And beside the audio encoder.
    pub fn hearing_config(&self) -> wav2vec2::Config {
        if self.hearing == Some("wav2vec2-tiny") { tiny_hearing() } else { wav2vec2::Config::default() }
    }

    /// The autoencoder's official file name, without its ending.
    fn vae_name(&self) -> &'static str {
        if self.vae.starts_with("wan22") { "Wan2.2_VAE" } else { "Wan2.1_VAE" }
    }
}

/// A preset by its name.
pub fn preset(name: &str) -> Result<&'static Preset> {
    PRESETS.iter().find(|p| p.name == name).ok_or_else(|| {
        let names: Vec<_> = PRESETS.iter().map(|p| p.name).collect();
        Error::Config(format!("there is no preset `{name}`; choose one of {}", names.join(", ")))
    })
}

/// Writes a whole model in the official layout: transformers with index and `config.json`, autoencoder, text encoder,
/// `google/umt5-xxl/tokenizer.json`, and the audio encoder's folder.
pub fn write_folder(whole: &Whole, folder: &Path, seed: u64, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
    let wrong = |e: std::io::Error| Error::Weights(format!("{} cannot be written: {e}", folder.display()));
    let text = |path: std::path::PathBuf, value: serde_json::Value| -> Result<()> {
        fs::write(path, value.to_string()).map_err(wrong)
    };
    let words = folder.join("google/umt5-xxl");
    fs::create_dir_all(&words).map_err(wrong)?;
    let shard = "diffusion_pytorch_model-00001-of-00001.safetensors";
    let listed = shapes(preset(whole.transformer)?)?;
    let map: serde_json::Map<_, _> = listed.into_keys().map(|name| (name, shard.into())).collect();
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    let c = whole.transformer_config();
    for (place, at) in whole.folders.iter().zip(0..) {
        let place = folder.join(place);
        fs::create_dir_all(&place).map_err(wrong)?;
        write(preset(whole.transformer)?, &place.join(shard), seed + at, progress)?;
        text(place.join("diffusion_pytorch_model.safetensors.index.json"), index.clone())?;
        text(
            place.join("config.json"),
            serde_json::json!({
                "model_type": c.model_type, "dim": c.dim, "ffn_dim": c.ffn_dim, "freq_dim": c.freq_dim,
                "num_heads": c.num_heads, "num_layers": c.num_layers, "in_dim": c.in_dim, "out_dim": c.out_dim,
                "text_len": c.text_len, "eps": c.eps, "audio_dim": c.audio_dim, "num_audio_token": c.num_audio_token,
                "audio_inject_layers": c.audio_inject_layers,
            }),
        )?;
    }
    let beside = |name: &str| folder.join(format!("{name}.safetensors"));
    write(preset(whole.vae)?, &beside(whole.vae_name()), seed, progress)?;
    write(preset(whole.text)?, &beside("models_t5_umt5-xxl-enc-bf16"), seed, progress)?;
    if let Some(name) = whole.hearing {
        let hearing = folder.join("wav2vec2-large-xlsr-53-english");
        fs::create_dir_all(&hearing).map_err(wrong)?;
        write(preset(name)?, &hearing.join("model.safetensors"), seed, progress)?;
        let h = whole.hearing_config();
        text(
            hearing.join("config.json"),
            serde_json::json!({
                "hidden_size": h.hidden_size, "num_hidden_layers": h.num_hidden_layers,
                "num_attention_heads": h.num_attention_heads, "intermediate_size": h.intermediate_size,
                "conv_dim": h.conv_dim, "conv_kernel": h.conv_kernel, "conv_stride": h.conv_stride,
                "num_conv_pos_embeddings": h.num_conv_pos_embeddings,
                "num_conv_pos_embedding_groups": h.num_conv_pos_embedding_groups, "layer_norm_eps": h.layer_norm_eps,
            }),
        )?;
    }
    text(words.join("tokenizer.json"), tokenizer())
}

/// A unigram tokenizer of single letters with the special tokens of UMT5's (`<pad>` 0, `</s>` 1, `<unk>` 2).
pub fn tokenizer() -> serde_json::Value {
    let mut vocabulary = vec![("<pad>".to_string(), 0.0), ("</s>".into(), 0.0), ("<unk>".into(), 0.0)];
    vocabulary.push(("\u{2581}".into(), -2.0));
    vocabulary.extend(('!'..='~').map(|c| (c.to_string(), -4.0)));
    let special = |id: usize, content: &str| {
        serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let space = serde_json::json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always",
        "split": true});
    let sequence = |id: &str| serde_json::json!({"Sequence": {"id": id, "type_id": 0}});
    let end = serde_json::json!({"SpecialToken": {"id": "</s>", "type_id": 0}});
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<pad>"), special(1, "</s>"), special(2, "<unk>")],
        "normalizer": null, "pre_tokenizer": space, "decoder": space,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [sequence("A"), end],
            "pair": [sequence("A"), end, sequence("B"), end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocabulary, "byte_fallback": false},
    })
}

/// A preset's numbers made when they are asked for: nothing is read from anywhere, and the same seed gives the same.
struct Imagined {
    shapes: BTreeMap<String, Vec<usize>>,
    name: &'static str,
    seed: u64,
}

/// A random checkpoint without a file, for benchmarks on machines that cannot hold one.
pub fn imagined(preset: &Preset, seed: u64) -> Result<Arc<dyn Source>> {
    Ok(Arc::new(Imagined { shapes: shapes(preset)?, name: preset.name, seed }))
}

/// Numbers that one worker makes at a time, with a seed of their own.
const PART: usize = 1 << 20;

impl Source for Imagined {
    fn names(&self) -> Vec<String> {
        self.shapes.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.shapes.get(name).cloned()
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        let shape = self.shapes.get(name).ok_or_else(|| Error::Weights(format!("no tensor {name}")))?;
        let (mean, deviation) = kind(name, shape);
        // FNV-1a: every tensor has numbers of its own, in whatever order they are asked for.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        let count: usize = shape.iter().product();
        let mut values = vec![bf16::ZERO; count.next_multiple_of(4)];
        let fill = |i: usize, part: &mut [bf16]| {
            let mut random = Random(self.seed ^ hash ^ (i as u64) << 40);
            for four in part.chunks_exact_mut(4) {
                four.copy_from_slice(&random.four(deviation).map(|v| bf16::from_f32(v.to_f32() + mean)));
            }
        };
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        let each = values.len().div_ceil(PART).div_ceil(workers).max(1);
        std::thread::scope(|scope| {
            for (w, some) in values.chunks_mut(each * PART).enumerate() {
                scope.spawn(move || some.chunks_mut(PART).enumerate().for_each(|(i, part)| fill(w * each + i, part)));
            }
        });
        values.truncate(count);
        Ok(Tensor::from_vec(values, shape.as_slice(), &Device::Cpu)?)
    }

    /// A card makes its own (other numbers than the CPU's, but as many and alike): 33 GB need not cross the bus.
    fn made_on(&self, name: &str, device: &Device) -> Result<Option<Tensor>> {
        let Some(shape) = self.shapes.get(name) else { return Ok(None) };
        // The card's generator makes pairs.
        if !device.is_cuda() || shape.iter().product::<usize>() % 2 != 0 {
            return Ok(None);
        }
        let (mean, deviation) = kind(name, shape);
        Ok(Some(Tensor::randn(mean, deviation, shape.as_slice(), device)?.to_dtype(DType::BF16)?))
    }

    fn origin(&self) -> String {
        format!("random {} (seed {})", self.name, self.seed)
    }
}

/// What a checkpoint is worth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Every tensor is there and of the right shape.
    Complete,
    /// What is missing, unexpected or of wrong shape.
    Wrong(String),
    /// Nothing to hold it against: an adapter needs its base, a small variant its `config.json`.
    Unchecked,
}

/// Checks a checkpoint against the network it holds, by shapes alone: one message that lists what is missing,
/// unexpected or of wrong shape and where the right file is published.
pub fn verdict(c: &super::Checkpoint) -> Verdict {
    use super::{Shapes, layout::Part};
    let source = &c.source;
    let list = source.names().into_iter().map(|n| {
        let shape = source.shape(&n).unwrap_or_default();
        (n, shape)
    });
    let weights = Weights::new(Arc::new(Shapes::new(list)), &Device::Cpu, DType::BF16);
    let loaded = match c.part {
        Part::Speech | Part::Base => transformer(&weights).and_then(|config| Dit::load(config, &weights).map(drop)),
        Part::Vae21 | Part::Vae22 => WanVae::load(&weights).map(drop),
        Part::Text => Umt5::load(&weights, &umt5::Config::from_weights(&weights)).map(drop),
        Part::Hearing if weights.shape("wav2vec2.encoder.layer_norm.weight").is_some_and(|s| s == [1024]) => {
            Wav2Vec2::load(&weights, &wav2vec2::Config::default()).map(drop)
        }
        _ => return Verdict::Unchecked,
    };
    match loaded.and_then(|()| weights.finish()) {
        Ok(report) if report.unexpected.is_empty() => Verdict::Complete,
        Ok(report) => {
            let few: Vec<&str> = report.unexpected.iter().take(4).map(String::as_str).collect();
            Verdict::Wrong(format!("usable, but {} tensors have no place: {}", report.unexpected.len(), few.join(", ")))
        }
        Err(e) => Verdict::Wrong(c.explain(e, c.part).to_string()),
    }
}

/// A transformer's sizes as its shapes tell them. The width of a head cannot be seen in shapes: 128, as published,
/// where that divides the width, else 32.
pub fn transformer(w: &Weights) -> Result<Config> {
    let mut c = Config::default();
    let axis = |name: &str, i: usize| w.shape(name).and_then(|s| s.get(i).copied());
    if let Some(dim) = axis("blocks.0.self_attn.q.weight", 0) {
        c.dim = dim;
        c.num_heads = if dim % 128 == 0 { dim / 128 } else { (dim / 32).max(1) };
    }
    c.ffn_dim = axis("blocks.0.ffn.0.weight", 0).unwrap_or(c.ffn_dim);
    c.freq_dim = axis("time_embedding.0.weight", 1).unwrap_or(c.freq_dim);
    c.text_dim = axis("text_embedding.0.weight", 1).unwrap_or(c.text_dim);
    c.audio_dim = axis("casual_audio_encoder.encoder.conv1_local.conv.weight", 1).unwrap_or(c.audio_dim);
    c.in_dim = axis("patch_embedding.weight", 1).unwrap_or(c.in_dim);
    c.out_dim = axis("head.head.weight", 0).map_or(c.out_dim, |n| n / c.patch.iter().product::<usize>().max(1));
    if !w.has("casual_audio_encoder.weights") {
        // The base family: I2V is told of its picture through channels, TI2V has the 48 of Wan 2.2's autoencoder.
        c.model_type = match (c.in_dim, c.out_dim) {
            (inner, outer) if inner > outer => "i2v",
            (_, 48) => "ti2v",
            _ => "t2v",
        }
        .into();
    }
    let blocks = (0..4096).take_while(|i| w.has(&format!("blocks.{i}.self_attn.q.weight"))).count();
    let injectors = (0..4096).take_while(|j| w.has(&format!("audio_injector.injector.{j}.q.weight"))).count();
    if blocks > 0 && blocks != c.num_layers {
        c.num_layers = blocks;
    }
    if injectors != c.audio_inject_layers.len() {
        // which blocks they follow stands in config.json; the shapes do not depend on it
        c.audio_inject_layers = (0..injectors.min(blocks)).collect();
    }
    c.audio_inject_layers.retain(|l| *l < c.num_layers);
    c.check()?;
    Ok(c)
}
