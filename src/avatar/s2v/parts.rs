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
        taehv::Taehv,
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

/// How far loading is: parameters of one part, or steps of a long denoising.
#[derive(Clone, Copy, Debug)]
pub struct Loading {
    /// Which part, in words.
    pub what: &'static str,
    pub done: usize,
    pub total: usize,
}

impl Loading {
    /// `what` of denoising steps, which are counted the same way.
    pub const STEPS: &str = "steps";
}

/// Told while a model loads.
pub type Watcher = Arc<dyn Fn(Loading) + Send + Sync>;

/// What reads prompts: the text encoder, and the text of its `tokenizer.json`.
pub(in crate::avatar) struct Text {
    pub(in crate::avatar) source: Arc<dyn Source>,
    pub(in crate::avatar) config: umt5::Config,
    pub(in crate::avatar) tokenizer: Vec<u8>,
}

impl Text {
    /// Of a survey that lacks neither.
    pub(in crate::avatar) fn of(survey: &Survey, encoder: &weights::Checkpoint) -> Text {
        Text {
            config: umt5::Config::from_weights(&cursor(&encoder.source)),
            source: encoder.source.clone(),
            tokenizer: survey.tokenizer.as_ref().map(|(_, text)| text.clone()).unwrap_or_default(),
        }
    }

    /// Random numbers and a tokenizer of single letters.
    pub(in crate::avatar) fn random(whole: &Whole, seed: u64) -> model::Result<Text> {
        let source = synth::imagined(synth::preset(whole.text)?, seed)?;
        Ok(Text {
            config: umt5::Config::from_weights(&cursor(&source)),
            source,
            tokenizer: synth::tokenizer().to_string().into_bytes(),
        })
    }

    /// What of the text encoder does not fit, alone or beside a transformer.
    pub(in crate::avatar) fn complaints(&self, encoder: &weights::Checkpoint, of: &dit::Config) -> Vec<String> {
        let mut wrong: Vec<String> =
            misfit(encoder, &|w| umt5::Umt5::load(w, &self.config).map(drop)).into_iter().collect();
        if self.config.dim != of.text_dim {
            wrong.push(format!(
                "the text encoder is {} wide, the transformer takes {}: they do not belong together",
                self.config.dim, of.text_dim
            ));
        }
        wrong
    }
}

/// Holds a file against the network it is for, by shapes alone: what is missing or of wrong shape.
pub(in crate::avatar) fn misfit(
    c: &weights::Checkpoint,
    build: &dyn Fn(&Weights) -> model::Result<()>,
) -> Option<String> {
    let names = c.source.names().into_iter();
    let shapes = names.map(|n| (n.clone(), c.source.shape(&n).unwrap_or_default()));
    let cursor = Weights::new(Arc::new(Shapes::new(shapes)), &Device::Cpu, DType::BF16);
    match build(&cursor).and_then(|()| cursor.finish()) {
        Ok(report) => {
            if let Some(first) = report.unexpected.first() {
                let (file, count) = (c.source.origin(), report.unexpected.len());
                tracing::warn!("{file}: {count} tensors have no place, such as {first}");
            }
            None
        }
        // The shapes stand for the file.
        Err(e) => Some(c.explain(e, c.part).to_string().replace("a list of shapes", &c.source.origin())),
    }
}

/// A video autoencoder that encodes, too.
pub(in crate::avatar) fn both_ways(w: &Weights) -> model::Result<()> {
    if !w.has("encoder.conv1.weight") {
        return Err(Error::Weights("the autoencoder has no encoder (keys `encoder.*`)".into()));
    }
    WanVae::load(w).map(drop)
}

/// Opens the adapters, each with its weight.
pub(in crate::avatar) fn adapters(config: &Config) -> Result<Vec<(Arc<dyn Source>, f64)>> {
    let mut adapters = Vec::new();
    for lora in &config.loras {
        let (path, weight) = adapter(lora).map_err(AvatarError::Options)?;
        let opened = weights::open(&path).map_err(fits)?;
        if opened.part != Part::Lora {
            return Err(AvatarError::Weights(format!("{} is no adapter but: {}", path.display(), opened.part.name())));
        }
        adapters.push((opened.source, weight));
    }
    Ok(adapters)
}

/// A checkpoint's folders or files in words, with what is wrong.
pub(in crate::avatar) fn unusable(paths: &[PathBuf], what: &str) -> AvatarError {
    let names: Vec<String> = paths.iter().map(|p| p.display().to_string()).collect();
    AvatarError::Weights(format!("the checkpoint in {} cannot be used:\n  {what}", names.join(", ")))
}

/// Where the parts come from.
pub(in crate::avatar) enum Found {
    /// `random:NAME`, with its seed.
    Random(&'static Whole, u64),
    OnDisk(Vec<PathBuf>),
}

impl Found {
    pub(in crate::avatar) fn of(config: &Config) -> Result<Found> {
        match config.checkpoint.as_slice() {
            [] => Err(AvatarError::Weights(
                "no checkpoint is named: give the folder with --checkpoint or as s2v.checkpoint (it is published at \
                 huggingface.co/Wan-AI/Wan2.2-S2V-14B); random:tiny tries the machinery without one"
                    .into(),
            )),
            [one] if one.starts_with("random:") => {
                let (whole, seed) = Whole::random(&one["random:".len()..]).map_err(fits)?;
                Ok(Found::Random(whole, seed))
            }
            paths => Ok(Found::OnDisk(paths.iter().map(PathBuf::from).collect())),
        }
    }
}

/// Everything a model is made of, opened but not loaded.
pub(in crate::avatar) struct Parts {
    pub(in crate::avatar) transformer: Arc<dyn Source>,
    pub(in crate::avatar) transformer_config: dit::Config,
    pub(in crate::avatar) vae: Arc<dyn Source>,
    /// The small decoder, where one is there.
    pub(in crate::avatar) small: Option<Arc<dyn Source>>,
    pub(in crate::avatar) text: Text,
    pub(in crate::avatar) hearing: Arc<dyn Source>,
    pub(in crate::avatar) hearing_config: wav2vec2::Config,
    /// Whether a LiveAvatar adapter is among the adapters.
    pub(in crate::avatar) live: bool,
}

pub(in crate::avatar) fn fits(error: Error) -> AvatarError {
    AvatarError::Weights(error.to_string())
}

/// What a model needs.
pub const WANTED: [Part; 4] = [Part::Speech, Part::Vae21, Part::Text, Part::Hearing];

impl Parts {
    /// Finds and checks the parts by their shapes alone; nothing is loaded yet.
    pub(in crate::avatar) fn find(config: &Config) -> Result<Parts> {
        let mut parts = match Found::of(config)? {
            Found::Random(whole, seed) => Parts::random(whole, seed).map_err(fits)?,
            Found::OnDisk(paths) => Parts::on_disk(&paths)?,
        };
        let adapters = adapters(config)?;
        let live = |(source, _): &(Arc<dyn Source>, f64)| source.names().iter().any(|n| n.contains(".lora_A.default."));
        parts.live = adapters.iter().any(live);
        if !adapters.is_empty() {
            parts.transformer = Arc::new(Adapted::new(parts.transformer, adapters).map_err(fits)?);
        }
        Ok(parts)
    }

    fn random(whole: &Whole, seed: u64) -> model::Result<Parts> {
        let part = |preset: &str| synth::imagined(synth::preset(preset)?, seed);
        let hearing = whole.hearing.ok_or_else(|| Error::Config(format!("random:{} hears nothing", whole.name)))?;
        Ok(Parts {
            transformer: part(whole.transformer)?,
            transformer_config: whole.transformer_config(),
            vae: part(whole.vae)?,
            small: Some(part(synth::SMALL_DECODER)?),
            text: Text::random(whole, seed)?,
            hearing: part(hearing)?,
            hearing_config: whole.hearing_config(),
            live: false,
        })
    }

    fn on_disk(paths: &[PathBuf]) -> Result<Parts> {
        let survey = Survey::of(paths).map_err(fits)?;
        let incomplete = |what: String| unusable(paths, &what);
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
        let reads = Text::of(&survey, text);
        // All that does not fit is told at once, before anything large is read.
        let mut wrong: Vec<String> = [
            misfit(transformer, &|w| Dit::load(transformer_config.clone(), w).map(drop)),
            misfit(vae, &both_ways),
            misfit(hearing, &|w| Wav2Vec2::load(w, &hearing_config).map(drop)),
        ]
        .into_iter()
        .flatten()
        .collect();
        wrong.extend(reads.complaints(text, &transformer_config));
        if hearing_config.hidden_size != transformer_config.audio_dim {
            wrong.push(format!(
                "the audio encoder is {} wide, the transformer takes {}: they do not belong together",
                hearing_config.hidden_size, transformer_config.audio_dim
            ));
        }
        if !wrong.is_empty() {
            return Err(incomplete(wrong.join("\n  ")));
        }
        Ok(Parts {
            transformer: transformer.source.clone(),
            transformer_config,
            vae: vae.source.clone(),
            small: survey.part(Part::Taehv).map(|c| c.source.clone()),
            text: reads,
            hearing: hearing.source.clone(),
            hearing_config,
            live: false,
        })
    }
}

fn cursor(source: &Arc<dyn Source>) -> Weights {
    Weights::new(source.clone(), &Device::Cpu, DType::F32)
}

/// Sizes from the shapes, and from `config.json` what shapes do not tell, under the official names or Diffusers'.
pub(in crate::avatar) fn transformer_config(c: &weights::Checkpoint) -> model::Result<dit::Config> {
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

/// Opens the first device.
pub(in crate::avatar) fn device(config: &Config) -> Result<Device> {
    match config.places().map_err(AvatarError::Options)?.first() {
        Some(place) => opened(*place),
        None => Ok(Device::Cpu),
    }
}

/// Opens a device.
pub(super) fn opened(place: Place) -> Result<Device> {
    let cuda = |n: usize| model::kernels::card(n).map_err(|e| AvatarError::Options(e.to_string()));
    match place {
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
pub(in crate::avatar) fn precision(config: &Config, device: &Device) -> Result<DType> {
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
pub(in crate::avatar) fn watched(
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

/// Loads the video autoencoder, with the small decoder where that is wanted.
pub(in crate::avatar) fn autoencoder(
    parts: &Parts,
    settings: &Config,
    device: &Device,
    dtype: DType,
    watcher: &Watcher,
) -> model::Result<WanVae> {
    let weights = watched(&parts.vae, Part::Vae21.name(), device, dtype, watcher);
    let vae = WanVae::load(&weights)?;
    weights.finish()?;
    if !settings.small_decoder {
        return Ok(vae);
    }
    let small = parts.small.as_ref().ok_or_else(|| {
        Error::Config(format!(
            "no {} is among the checkpoint's files: name its file, too; it is published at {}",
            Part::Taehv.name(),
            Part::Taehv.published()
        ))
    })?;
    let weights = watched(small, Part::Taehv.name(), device, dtype, watcher);
    let small = Taehv::load(&weights, vae.channels())?;
    weights.finish()?;
    Ok(vae.decoded_by(small))
}

/// Loads a transformer.
pub(in crate::avatar) fn transformer(
    source: &Arc<dyn Source>,
    config: dit::Config,
    settings: &Config,
    device: &Device,
    dtype: DType,
    watcher: &Watcher,
) -> model::Result<Dit> {
    let fp8 = if settings.dtype == Precision::Fp8 { Fp8::All } else { Fp8::Off };
    let part = if config.speech() { Part::Speech } else { Part::Base };
    let weights = watched(source, part.name(), device, dtype, watcher).with_fp8(fp8);
    let dit = match settings.offload {
        Offload::None => Dit::load(config, &weights)?,
        Offload::Rings => Dit::load(config, &weights)?.parking(true),
        Offload::Blocks => Dit::load_offloaded(config, &weights, 0)?.parking(true),
    };
    weights.finish()?;
    Ok(dit)
}
