//! The same networks under other names: what Diffusers, Transformers, ComfyUI and llama.cpp call the tensors, translated
//! to the official names. A file is told apart by the names it holds, never by its own name.
//!
//! Sources of the names: huggingface/diffusers `scripts/convert_wan_to_diffusers.py`; transformers `UMT5EncoderModel`;
//! llama.cpp `gguf-py` (architecture t5encoder); ComfyUI keeps the official names below a prefix.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{DType, Tensor};

use super::{Source, Stored};
use crate::model::{Error, Result, nn::Numbers};

/// Which network a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The speech-to-video transformer.
    Speech,
    /// A transformer of the base family (T2V, I2V, TI2V).
    Base,
    /// Wan 2.1's video autoencoder.
    Vae21,
    /// Wan 2.2's video autoencoder.
    Vae22,
    /// The small decoder of the TAEHV family.
    Taehv,
    /// The UMT5 text encoder.
    Text,
    /// wav2vec2.
    Hearing,
    /// An adapter.
    Lora,
    /// Something else.
    Unknown,
}

impl Part {
    /// What it is, in words.
    pub fn name(self) -> &'static str {
        match self {
            Part::Speech => "speech-to-video transformer",
            Part::Base => "video transformer without speech (Wan base family)",
            Part::Vae21 => "Wan 2.1 video autoencoder",
            Part::Vae22 => "Wan 2.2 video autoencoder",
            Part::Taehv => "small video decoder (TAEHV)",
            Part::Text => "UMT5 text encoder",
            Part::Hearing => "wav2vec2 audio encoder",
            Part::Lora => "LoRA adapter",
            Part::Unknown => "unknown",
        }
    }

    /// Where the right file is published.
    pub fn published(self) -> &'static str {
        match self {
            Part::Speech => {
                "huggingface.co/Wan-AI/Wan2.2-S2V-14B, diffusion_pytorch_model-*.safetensors with its index.json"
            }
            Part::Base => "huggingface.co/Wan-AI (Wan2.2-T2V-A14B, Wan2.2-I2V-A14B, Wan2.2-TI2V-5B)",
            Part::Vae21 => "huggingface.co/Wan-AI/Wan2.2-S2V-14B, Wan2.1_VAE.pth",
            Part::Vae22 => "huggingface.co/Wan-AI/Wan2.2-TI2V-5B, Wan2.2_VAE.pth",
            Part::Taehv => "github.com/madebyollin/taehv, taew2_1.pth",
            Part::Text => "huggingface.co/Wan-AI/Wan2.2-S2V-14B, models_t5_umt5-xxl-enc-bf16.pth",
            Part::Hearing => "huggingface.co/Wan-AI/Wan2.2-S2V-14B, folder wav2vec2-large-xlsr-53-english",
            Part::Lora => "huggingface.co/Quark-Vision/Live-Avatar, liveavatar.safetensors",
            Part::Unknown => "huggingface.co/Wan-AI/Wan2.2-S2V-14B",
        }
    }
}

/// Whose names a file uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The official ones.
    Official,
    /// The official ones below a prefix, as ComfyUI writes them.
    Prefixed,
    Diffusers,
    Transformers,
    LlamaCpp,
}

impl Layout {
    /// What it is, in words.
    pub fn name(self) -> &'static str {
        match self {
            Layout::Official => "official names",
            Layout::Prefixed => "official names below a prefix (ComfyUI)",
            Layout::Diffusers => "Diffusers",
            Layout::Transformers => "Transformers",
            Layout::LlamaCpp => "llama.cpp",
        }
    }
}

/// Prefixes that programs put in front of everything.
const PREFIXES: &[&str] = &[
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "text_encoders.umt5xxl.transformer.",
    "text_encoder.",
    "first_stage_model.",
    "vae.",
    "model.",
    "module.",
];

/// Names by which a network and a layout are told apart.
const SIGNS: &[(&str, Part, Layout)] = &[
    ("blocks.0.self_attn.q.weight", Part::Base, Layout::Official),
    ("blocks.0.attn1.to_q.weight", Part::Base, Layout::Diffusers),
    ("decoder.upsamples.0.upsamples.0.residual.2.weight", Part::Vae22, Layout::Official),
    ("decoder.upsamples.0.residual.2.weight", Part::Vae21, Layout::Official),
    ("decoder.up_blocks.0.upsampler.resample.1.weight", Part::Vae22, Layout::Diffusers),
    ("decoder.up_blocks.0.upsamplers.0.resample.1.weight", Part::Vae21, Layout::Diffusers),
    ("blocks.0.attn.q.weight", Part::Text, Layout::Official),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", Part::Text, Layout::Transformers),
    ("enc.blk.0.attn_q.weight", Part::Text, Layout::LlamaCpp),
    ("wav2vec2.feature_projection.projection.weight", Part::Hearing, Layout::Official),
    ("feature_projection.projection.weight", Part::Hearing, Layout::Official),
    ("decoder.1.weight", Part::Taehv, Layout::Official),
];

/// Endings of the matrices of adapters.
pub(super) const ADAPTER_ENDS: &[&str] =
    &[".lora_A.default.weight", ".lora_A.weight", ".lora_down.weight", ".lora.down.weight", ".lora_A"];

/// Part, layout and prefix of a list of names.
pub fn recognise(names: &[String]) -> (Part, Layout, &'static str) {
    if names.iter().any(|n| ADAPTER_ENDS.iter().any(|e| n.ends_with(e))) {
        return (Part::Lora, Layout::Official, "");
    }
    let has = |n: &str| names.binary_search_by(|x| x.as_str().cmp(n)).is_ok();
    for prefix in PREFIXES {
        for (sign, part, layout) in SIGNS {
            if has(&format!("{prefix}{sign}")) {
                let speech = *part == Part::Base && has(&format!("{prefix}casual_audio_encoder.weights"));
                let part = if speech { Part::Speech } else { *part };
                let layout = match layout {
                    Layout::Official if !prefix.is_empty() => Layout::Prefixed,
                    other => *other,
                };
                return (part, layout, prefix);
            }
        }
    }
    (Part::Unknown, Layout::Official, "")
}

/// Replaces the parts of a dotted name that stand in `table`, longest name first as listed.
fn replaced(name: &str, table: &[(&str, &str)]) -> String {
    let dotted = format!(".{name}.");
    let mut out = dotted;
    for (from, to) in table {
        out = out.replace(&format!(".{from}."), &format!(".{to}."));
    }
    out.trim_matches('.').to_string()
}

const TRANSFORMER: &[(&str, &str)] = &[
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("attn1.to_q", "self_attn.q"),
    ("attn1.to_k", "self_attn.k"),
    ("attn1.to_v", "self_attn.v"),
    ("attn1.to_out.0", "self_attn.o"),
    ("attn2.to_q", "cross_attn.q"),
    ("attn2.to_k", "cross_attn.k"),
    ("attn2.to_v", "cross_attn.v"),
    ("attn2.to_out.0", "cross_attn.o"),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    // the official model calls its norms in the order 1, 3, 2
    ("norm2", "norm3"),
];

const TEXT: &[(&str, &str)] = &[
    ("encoder.embed_tokens", "token_embedding"),
    ("shared", "token_embedding"),
    ("encoder.block", "blocks"),
    ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
    ("layer.0.SelfAttention", "attn"),
    ("layer.0.layer_norm", "norm1"),
    ("layer.1.layer_norm", "norm2"),
    ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
    ("layer.1.DenseReluDense.wi_1", "ffn.fc1"),
    ("layer.1.DenseReluDense.wo", "ffn.fc2"),
    ("encoder.final_layer_norm", "norm"),
];

const LLAMA_TEXT: &[(&str, &str)] = &[
    ("token_embd", "token_embedding"),
    ("enc.blk", "blocks"),
    ("enc.output_norm", "norm"),
    ("attn_norm", "norm1"),
    ("attn_q", "attn.q"),
    ("attn_k", "attn.k"),
    ("attn_v", "attn.v"),
    ("attn_o", "attn.o"),
    ("attn_rel_b", "pos_embedding.embedding"),
    ("ffn_norm", "norm2"),
    ("ffn_gate", "ffn.gate.0"),
    ("ffn_up", "ffn.fc1"),
    ("ffn_down", "ffn.fc2"),
];

const VAE: &[(&str, &str)] = &[
    ("quant_conv", "conv1"),
    ("post_quant_conv", "conv2"),
    ("conv_in", "conv1"),
    ("norm_out", "head.0"),
    ("conv_out", "head.2"),
    ("mid_block.resnets.0", "middle.0"),
    ("mid_block.attentions.0", "middle.1"),
    ("mid_block.resnets.1", "middle.2"),
];

const RESIDUAL: &[(&str, &str)] = &[
    ("norm1", "residual.0"),
    ("conv1", "residual.2"),
    ("norm2", "residual.3"),
    ("conv2", "residual.6"),
    ("conv_shortcut", "shortcut"),
];

fn vae(name: &str, part: Part) -> String {
    let pieces: Vec<&str> = name.split('.').collect();
    let number = |i: usize| pieces.get(i).and_then(|p| p.parse::<usize>().ok());
    let (side, blocks) = (pieces.first().copied().unwrap_or(""), pieces.get(1).copied().unwrap_or(""));
    let path = match blocks {
        "down_blocks" => "downsamples",
        "up_blocks" => "upsamples",
        "mid_block" => {
            let new = replaced(name, VAE);
            return match new.split_once(".middle.0.").or(new.split_once(".middle.2.")) {
                Some((_, inner)) => new.replace(inner, &replaced(inner, RESIDUAL)),
                None => new,
            };
        }
        _ => return replaced(name, VAE),
    };
    let Some(level) = number(2) else { return name.to_string() };
    let (layer, rest) = match (pieces.get(3).copied(), part) {
        (Some("resnets"), _) => (number(4), 5),
        (Some("upsamplers"), _) => (Some(3), 5),
        (Some("upsampler"), _) => (Some(3), 4),
        (Some("downsampler"), _) => (Some(2), 4),
        _ => (None, 3),
    };
    let inner = pieces.get(rest..).map(|p| p.join(".")).unwrap_or_default();
    let inner = replaced(&inner, RESIDUAL);
    match (part, layer) {
        (Part::Vae22, Some(layer)) => format!("{side}.{path}.{level}.{path}.{layer}.{inner}"),
        (_, Some(layer)) => format!("{side}.{path}.{}.{inner}", level * 4 + layer),
        (_, None) => format!("{side}.{path}.{level}.{inner}"),
    }
}

/// The official name of a stored one.
pub fn official(name: &str, part: Part, layout: Layout, prefix: &str) -> String {
    let name = name.strip_prefix(prefix).unwrap_or(name);
    match (layout, part) {
        (Layout::Official | Layout::Prefixed, _) => name.to_string(),
        (Layout::Diffusers, Part::Vae21 | Part::Vae22) => vae(name, part),
        (Layout::Diffusers, _) if name == "scale_shift_table" => "head.modulation".into(),
        (Layout::Diffusers, _) => match name.strip_suffix(".scale_shift_table") {
            Some(block) => format!("{block}.modulation"),
            None => replaced(name, TRANSFORMER),
        },
        (Layout::Transformers, _) => replaced(name, TEXT),
        (Layout::LlamaCpp, _) => replaced(name, LLAMA_TEXT),
    }
}

/// A source under official names, with the scales of 8-bit floats applied.
pub struct Official {
    inner: Arc<dyn Source>,
    /// Official name → stored name.
    names: BTreeMap<String, String>,
    /// Stored name → stored name of its scale.
    scales: BTreeMap<String, String>,
}

/// Names that describe others, or the file, and are not weights.
fn describes(name: &str) -> bool {
    name.ends_with(".scale_weight")
        || name.ends_with(".scale_input")
        || name.ends_with(".input_scale")
        || name.ends_with(".comfy_quant")
        || name.ends_with("scaled_fp8")
        || name.ends_with("spiece_model")
}

impl Official {
    /// Wraps `inner`; also tells what it is.
    pub fn new(inner: Arc<dyn Source>) -> Result<(Self, Part, Layout)> {
        let mut stored = inner.names();
        stored.sort();
        let (part, layout, prefix) = recognise(&stored);
        let mut names = BTreeMap::new();
        let mut scales = BTreeMap::new();
        for name in &stored {
            let scale_of = |owner: &String| {
                let (n, of) = (inner.shape(name)?.iter().product::<usize>(), inner.shape(owner)?);
                (n == 1 || of.first() == Some(&n)).then_some(())
            };
            let owner = name
                .strip_suffix(".scale_weight")
                .map(|n| format!("{n}.weight"))
                .or_else(|| name.strip_suffix("_scale").filter(|n| n.ends_with(".weight")).map(String::from))
                .filter(|owner| scale_of(owner).is_some());
            match owner {
                Some(owner) => {
                    scales.insert(owner, name.clone());
                }
                _ if describes(name) => {}
                _ => {
                    let new = official(name, part, layout, prefix);
                    // the word embedding stands twice in some files
                    let twice = names.contains_key(&new) && new == "token_embedding.weight";
                    if !twice && names.insert(new.clone(), name.clone()).is_some() {
                        return Err(Error::Weights(format!("{}: two tensors mean {new}", inner.origin())));
                    }
                }
            }
        }
        Ok((Official { inner, names, scales }, part, layout))
    }

    /// What a stored matrix is multiplied with, `[1]` or one per row.
    fn scale(&self, stored: &str) -> Result<Option<Tensor>> {
        let Some(name) = self.scales.get(stored) else { return Ok(None) };
        let scale = self.inner.load(name)?.to_dtype(DType::F32)?.flatten_all()?;
        let rows = self.inner.shape(stored).and_then(|s| s.first().copied()).unwrap_or(1);
        match scale.elem_count() {
            n if n == 1 || n == rows => Ok(Some(scale)),
            n => Err(Error::Weights(format!("{}: {name} has {n} scales for {rows} rows", self.inner.origin()))),
        }
    }

    fn stored(&self, name: &str) -> Result<&String> {
        self.names.get(name).ok_or_else(|| Error::Weights(format!("{}: no tensor {name}", self.inner.origin())))
    }
}

impl Source for Official {
    fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.inner.shape(self.names.get(name)?)
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        let stored = self.stored(name)?;
        let t = self.inner.load(stored)?;
        let Some(scale) = self.scale(stored)? else { return Ok(t) };
        // one for all, or one per row
        let mut axes = vec![1; t.rank()];
        axes[0] = scale.elem_count();
        Ok(t.to_dtype(DType::F32)?.broadcast_mul(&scale.reshape(axes)?)?)
    }

    fn quantised(&self, name: &str) -> Result<Option<Stored>> {
        let stored = self.stored(name)?;
        let Some(mut found) = self.inner.quantised(stored)? else { return Ok(None) };
        if let (Numbers::Float8 { scale, .. }, Some(own)) = (&mut found.numbers, self.scale(stored)?) {
            *scale = own;
        }
        Ok(Some(found))
    }

    fn origin(&self) -> String {
        self.inner.origin()
    }

    fn int8_rows(&self, name: &str) -> Option<super::Int8Rows> {
        self.inner.int8_rows(self.names.get(name)?)
    }
}
