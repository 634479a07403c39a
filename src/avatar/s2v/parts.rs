//! From what lies on disk to networks: finding the parts, holding them against each other, loading them one by one.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use candle_core::{DType, Device};

use super::config::{Config, Offload, Place, Precision, adapter};
use crate::{
    avatar::{AvatarError, Result},
    model::{
        self, Error,
        dit::{self, Dit},
        umt5,
        vae::WanVae,
        wav2vec2::{self, Wav2Vec2},
        weights::{
            self, Adapted, Fp8, Shapes, Source, Survey, Weights,
            layout::Part,
            synth::{self, Whole},
        },
    },
};

/// How far loading is: parameters of one part.
#[derive(Clone, Copy, Debug)]
pub struct Loading {
    /// Which part, in words.
    pub what: &'static str,
    pub done: usize,
    pub total: usize,
}

/// Told while a model loads.
pub type Watcher = Arc<dyn Fn(Loading) + Send + Sync>;

/// Everything a model is made of, opened but not loaded.
pub(super) struct Parts {
    pub(super) transformer: Arc<dyn Source>,
    pub(super) transformer_config: dit::Config,
    pub(super) vae: Arc<dyn Source>,
    pub(super) text: Arc<dyn Source>,
    pub(super) text_config: umt5::Config,
    pub(super) tokenizer: Vec<u8>,
    pub(super) hearing: Arc<dyn Source>,
    pub(super) hearing_config: wav2vec2::Config,
    /// Whether a LiveAvatar adapter is among the adapters.
    pub(super) live: bool,
}

pub(super) fn fits(error: Error) -> AvatarError {
    AvatarError::Weights(error.to_string())
}

/// What a model needs.
pub const WANTED: [Part; 4] = [Part::Speech, Part::Vae21, Part::Text, Part::Hearing];

impl Parts {
    /// Finds and checks the parts by their shapes alone; nothing is loaded yet.
    pub(super) fn find(config: &Config) -> Result<Parts> {
        let mut parts = match config.checkpoint.as_slice() {
            [] => {
                return Err(AvatarError::Weights(
                    "no checkpoint is named: give the folder with --checkpoint or as s2v.checkpoint (it is published at \
                     huggingface.co/Wan-AI/Wan2.2-S2V-14B); random:tiny tries the machinery without one"
                        .into(),
                ));
            }
            [one] if one.starts_with("random:") => Parts::random(&one["random:".len()..]).map_err(fits)?,
            paths => Parts::on_disk(&paths.iter().map(PathBuf::from).collect::<Vec<_>>())?,
        };
        let mut adapters = Vec::new();
        for lora in &config.loras {
            let (path, weight) = adapter(lora).map_err(AvatarError::Options)?;
            let opened = weights::open(&path).map_err(fits)?;
            if opened.part != Part::Lora {
                return Err(AvatarError::Weights(format!(
                    "{} is no adapter but: {}",
                    path.display(),
                    opened.part.name()
                )));
            }
            parts.live |= opened.source.names().iter().any(|n| n.contains(".lora_A.default."));
            adapters.push((opened.source, weight));
        }
        if !adapters.is_empty() {
            parts.transformer = Arc::new(Adapted::new(parts.transformer, adapters).map_err(fits)?);
        }
        Ok(parts)
    }

    /// `tiny`, `14b`, each with an optional seed: `tiny:7`.
    fn random(name: &str) -> model::Result<Parts> {
        let (name, seed) = match name.split_once(':') {
            Some((name, seed)) => (
                name,
                seed.parse()
                    .map_err(|_| Error::Config(format!("random:{name}:{seed}: a seed is a whole number from 0")))?,
            ),
            None => (name, 1),
        };
        let whole = Whole::named(name)?;
        let part = |preset: &str| synth::imagined(synth::preset(preset)?, seed);
        let text = part(whole.text)?;
        Ok(Parts {
            transformer: part(whole.transformer)?,
            transformer_config: whole.transformer_config(),
            vae: part(whole.vae)?,
            text_config: umt5::Config::from_weights(&cursor(&text)),
            text,
            tokenizer: synth::tokenizer().to_string().into_bytes(),
            hearing: part(whole.hearing)?,
            hearing_config: whole.hearing_config(),
            live: false,
        })
    }

    fn on_disk(paths: &[PathBuf]) -> Result<Parts> {
        let survey = Survey::of(paths).map_err(fits)?;
        let names: Vec<String> = paths.iter().map(|p| p.display().to_string()).collect();
        let incomplete = |what: String| {
            AvatarError::Weights(format!("the checkpoint in {} cannot be used:\n  {what}", names.join(", ")))
        };
        if let Some(lack) = survey.lack(&WANTED, true) {
            return Err(incomplete(lack));
        }
        let found = |part: Part| survey.part(part).ok_or_else(|| incomplete(format!("no {}", part.name())));
        let [transformer, vae, text, hearing] =
            [found(Part::Speech)?, found(Part::Vae21)?, found(Part::Text)?, found(Part::Hearing)?];
        let hearing_config = match hearing.beside("config.json") {
            Some(json) => serde_json::from_value(json)
                .map_err(|e| incomplete(format!("config.json of the audio encoder cannot be read: {e}")))?,
            None => wav2vec2::Config::default(),
        };
        let transformer_config = transformer_config(transformer).map_err(|e| incomplete(e.to_string()))?;
        let text_config = umt5::Config::from_weights(&cursor(&text.source));
        // All that does not fit is told at once, before anything large is read.
        let mut wrong = Vec::new();
        let mut check = |c: &weights::Checkpoint, build: &dyn Fn(&Weights) -> model::Result<()>| {
            let names = c.source.names().into_iter();
            let shapes = names.map(|n| (n.clone(), c.source.shape(&n).unwrap_or_default()));
            let cursor = Weights::new(Arc::new(Shapes::new(shapes)), &Device::Cpu, DType::BF16);
            match build(&cursor).and_then(|()| cursor.finish()) {
                Ok(report) if !report.unexpected.is_empty() => tracing::warn!(
                    "{}: {} tensors have no place, such as {}",
                    c.source.origin(),
                    report.unexpected.len(),
                    report.unexpected[0]
                ),
                Ok(_) => {}
                // The shapes stand for the file.
                Err(e) => {
                    wrong.push(c.explain(e, c.part).to_string().replace("a list of shapes", &c.source.origin()));
                }
            }
        };
        check(transformer, &|w| Dit::load(transformer_config.clone(), w).map(drop));
        check(vae, &|w| {
            if !w.has("encoder.conv1.weight") {
                return Err(Error::Weights("the autoencoder has no encoder (keys `encoder.*`)".into()));
            }
            WanVae::load(w).map(drop)
        });
        check(text, &|w| umt5::Umt5::load(w, &text_config).map(drop));
        check(hearing, &|w| Wav2Vec2::load(w, &hearing_config).map(drop));
        if text_config.dim != transformer_config.text_dim {
            wrong.push(format!(
                "the text encoder is {} wide, the transformer takes {}: they do not belong together",
                text_config.dim, transformer_config.text_dim
            ));
        }
        if hearing_config.hidden_size != transformer_config.audio_dim {
            wrong.push(format!(
                "the audio encoder is {} wide, the transformer takes {}: they do not belong together",
                hearing_config.hidden_size, transformer_config.audio_dim
            ));
        }
        if !wrong.is_empty() {
            return Err(incomplete(wrong.join("\n  ")));
        }
        let source = |c: &weights::Checkpoint| c.source.clone();
        Ok(Parts {
            transformer: source(transformer),
            transformer_config,
            vae: source(vae),
            text: source(text),
            text_config,
            tokenizer: survey.tokenizer.as_ref().map(|(_, text)| text.clone()).unwrap_or_default(),
            hearing: source(hearing),
            hearing_config,
            live: false,
        })
    }
}

fn cursor(source: &Arc<dyn Source>) -> Weights {
    Weights::new(source.clone(), &Device::Cpu, DType::F32)
}

/// Sizes from the shapes, and from `config.json` what shapes do not tell, under the official names or Diffusers'.
fn transformer_config(c: &weights::Checkpoint) -> model::Result<dit::Config> {
    let mut config = synth::transformer(&cursor(&c.source))?;
    let Some(json) = c.beside("config.json") else { return Ok(config) };
    let number = |names: [&str; 2]| names.iter().find_map(|n| json[n].as_u64()).map(|v| v as usize);
    if let Some(heads) = number(["num_heads", "num_attention_heads"]).filter(|h| *h > 0) {
        config.num_heads = heads;
    }
    config.text_len = number(["text_len", "text_len"]).unwrap_or(config.text_len);
    config.num_audio_token = number(["num_audio_token", "num_audio_token"]).unwrap_or(config.num_audio_token);
    config.eps = json["eps"].as_f64().unwrap_or(config.eps);
    for name in ["audio_inject_layers", "inject_layers"] {
        let layers = json[name].as_array().map(|l| l.iter().filter_map(|v| Some(v.as_u64()? as usize)).collect());
        // A list that does not fit the file's injectors is another model's.
        if let Some(layers) = layers.filter(|l: &Vec<usize>| l.len() == config.audio_inject_layers.len()) {
            config.audio_inject_layers = layers;
        }
    }
    config.check()?;
    Ok(config)
}

/// Opens the device.
pub(super) fn device(config: &Config) -> Result<Device> {
    let cuda = |n: usize| model::kernels::card(n).map_err(|e| AvatarError::Options(e.to_string()));
    match Place::parse(&config.device).map_err(AvatarError::Options)? {
        Place::Cpu => Ok(Device::Cpu),
        Place::Cuda(n) => cuda(n),
        Place::Auto if candle_core::utils::cuda_is_available() => match cuda(0) {
            Ok(device) => Ok(device),
            Err(why) => {
                tracing::warn!("{why}; the processor is used");
                Ok(Device::Cpu)
            }
        },
        Place::Auto => Ok(Device::Cpu),
    }
}

/// The transformer's element type.
pub(super) fn precision(config: &Config, device: &Device) -> Result<DType> {
    let dtype = match (config.dtype, device.is_cpu()) {
        (Precision::Auto, true) | (Precision::F32, _) => DType::F32,
        (Precision::Auto, false) | (Precision::Bf16 | Precision::Fp8, _) => DType::BF16,
        (Precision::F16, _) => DType::F16,
    };
    if device.is_cpu() && dtype != DType::F32 {
        return Err(AvatarError::Options(
            "the processor computes in f32 only; leave --dtype out, or take a GPU with --device cuda".into(),
        ));
    }
    if config.dtype == Precision::Fp8 && !model::kernels::fp8(device) {
        return Err(AvatarError::Options(
            "this card does not compute in fp8 (that takes compute capability 9.0, Hopper or later); take --dtype bf16"
                .into(),
        ));
    }
    Ok(dtype)
}

/// A cursor that tells `watcher` how far the part is.
pub(super) fn watched(
    source: &Arc<dyn Source>,
    what: &'static str,
    device: &Device,
    dtype: DType,
    watcher: &Watcher,
) -> Weights {
    let parameters = |n: &String| source.shape(n).map_or(0, |s| s.iter().product::<usize>());
    let total = source.names().iter().map(parameters).sum();
    let (done, watcher) = (AtomicUsize::new(0), watcher.clone());
    watcher(Loading { what, done: 0, total });
    Weights::new(source.clone(), device, dtype).watched(Arc::new(move |more| {
        let done = done.fetch_add(more, Ordering::Relaxed) + more;
        watcher(Loading { what, done, total });
    }))
}

/// Loads the transformer.
pub(super) fn transformer(
    parts: &Parts,
    config: dit::Config,
    settings: &Config,
    device: &Device,
    dtype: DType,
    watcher: &Watcher,
) -> model::Result<Dit> {
    let fp8 = if settings.dtype == Precision::Fp8 { Fp8::All } else { Fp8::Off };
    let weights = watched(&parts.transformer, Part::Speech.name(), device, dtype, watcher).with_fp8(fp8);
    let dit = match settings.offload {
        Offload::None => Dit::load(config, &weights)?,
        Offload::Blocks => Dit::load_offloaded(config, &weights, 0)?,
    };
    weights.finish()?;
    Ok(dit)
}
