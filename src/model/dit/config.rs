//! Numbers of one transformer. The official `config.json`, the pocket model's metadata and a golden's configuration all
//! read into this; what they do not name has the 14B model's value.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::model::{Error, Result};

/// How the conditioning tokens (reference, motion) move in time as blocks go by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Conditioning {
    /// Motion stays where it was; the reference stays at 30 until the block comes near, then ρ ahead of it.
    Anchored,
    /// Everything keeps a constant distance to the block.
    Following,
}

/// What `cond_encoder` is fed when the caller gives nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cond {
    /// Zeros; the encoder's bias still adds.
    Zeros,
    /// The reference latent, for every frame.
    Reference,
}

/// What the head predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Prediction {
    /// noise − x₀.
    Velocity,
    /// x₀.
    Sample,
}

/// What FramePack packs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FramePack {
    /// The last 19 motion latents, by kernels that span 1, 2 and 4 of them.
    Motion,
    /// A still: the kernels span one frame, which stands for all (their sum over time is what is stored).
    Still,
}

/// Configuration of the transformer.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct Config {
    /// `s2v`, or `t2v`, `i2v`, `ti2v` for the base family.
    pub model_type: String,
    /// Width.
    pub dim: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Width of the feed-forward layer.
    pub ffn_dim: usize,
    /// Width of the time sinusoid.
    pub freq_dim: usize,
    /// Latent channels in.
    pub in_dim: usize,
    /// Latent channels out.
    pub out_dim: usize,
    /// Patch: frames, rows, columns.
    pub patch: [usize; 3],
    /// Of LayerNorms and RMS norms.
    pub eps: f64,
    /// Text tokens; 0 = no text at all.
    pub text_len: usize,
    /// Width of text states.
    pub text_dim: usize,
    /// Width of audio features.
    pub audio_dim: usize,
    /// Audio tokens per latent frame, before the padding token.
    pub num_audio_token: usize,
    /// Blocks after which audio is injected.
    pub audio_inject_layers: Vec<usize>,
    /// Audio frames that are copied in front of a block, and audio tokens that are dropped in front.
    pub motion_frames: [usize; 2],
    /// Ring length in latent frames, the block included.
    pub kv_frames: usize,
    /// Latent frames per block.
    pub frames_per_block: usize,
    /// See [`Conditioning`].
    pub conditioning: Conditioning,
    /// Rotary tables of the streaming form rounded to half precision.
    pub rope_half: bool,
    /// See [`Cond`].
    pub cond: Cond,
    /// See [`Prediction`].
    pub prediction: Prediction,
    /// Whether a gate adds the reference latent to the result.
    pub reference_gate: bool,
    /// See [`FramePack`].
    pub framepack: FramePack,
    /// σ lists by number of steps; empty = the sampler's own.
    pub sigmas: BTreeMap<String, Vec<f64>>,
    /// Steps unless the caller says otherwise.
    pub default_steps: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            model_type: "s2v".into(),
            dim: 5120,
            num_heads: 40,
            num_layers: 40,
            ffn_dim: 13824,
            freq_dim: 256,
            in_dim: 16,
            out_dim: 16,
            patch: [1, 2, 2],
            eps: 1e-6,
            text_len: 512,
            text_dim: 4096,
            audio_dim: 1024,
            num_audio_token: 4,
            audio_inject_layers: vec![0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39],
            motion_frames: [73, 19],
            kv_frames: 12,
            frames_per_block: 3,
            conditioning: Conditioning::Anchored,
            rope_half: true,
            cond: Cond::Zeros,
            prediction: Prediction::Velocity,
            reference_gate: false,
            framepack: FramePack::Motion,
            sigmas: BTreeMap::new(),
            default_steps: 4,
        }
    }
}

impl Config {
    /// Reads JSON text; unknown names are passed over.
    pub fn parse(text: &str) -> Result<Self> {
        Self::parse_value(serde_json::from_str(text).map_err(unreadable)?)
    }

    /// The same from parsed JSON.
    pub fn parse_value(value: serde_json::Value) -> Result<Self> {
        let config: Self = serde_json::from_value(value).map_err(unreadable)?;
        config.check()?;
        Ok(config)
    }

    /// Whether audio, reference and motion exist (S2V), or not (the base family).
    pub fn speech(&self) -> bool {
        self.model_type == "s2v"
    }

    /// Head width.
    pub fn head(&self) -> usize {
        self.dim / self.num_heads.max(1)
    }

    /// 10¹² floating-point operations of the blocks for one forward of `queries` tokens that look at `keys`, with audio
    /// where there is some: products and attention, as MODEL.md §13 of the specification counts them.
    pub fn tflop(&self, queries: usize, keys: usize) -> f64 {
        let [q, k, d, f, text] = [queries, keys, self.dim, self.ffn_dim, self.text_len].map(|n| n as f64);
        let products = 2.0 * q * (6.0 * d * d + 2.0 * d * f) + if text > 0.0 { 0.0 } else { -4.0 * q * d * d };
        let attention = 4.0 * q * (k + text) * d;
        let audio = 2.0 * q * 2.0 * d * d * self.audio_inject_layers.len() as f64;
        (self.num_layers as f64 * (products + attention) + audio) / 1e12
    }

    /// Refuses what the code cannot compute.
    pub fn check(&self) -> Result<()> {
        let wrong = |what: String| Err(Error::Config(what));
        if self.dim == 0 || self.num_heads == 0 || self.dim % self.num_heads != 0 || self.head() % 2 != 0 {
            return wrong(format!("width {} cannot be split into {} even heads", self.dim, self.num_heads));
        }
        if self.patch[0] != 1
            || self.patch[1] == 0
            || self.patch[2] == 0
            || self.freq_dim == 0
            || self.freq_dim % 2 != 0
        {
            return wrong(format!("patch {:?} or freq_dim {} is not supported", self.patch, self.freq_dim));
        }
        if self.speech() && (self.dim % 4 != 0 || self.num_audio_token == 0) {
            return wrong(format!(
                "width {} with {} audio tokens a frame: the audio encoder needs a width divisible by four and a token",
                self.dim, self.num_audio_token
            ));
        }
        if self.audio_inject_layers.iter().any(|l| *l >= self.num_layers) && self.speech() {
            return wrong(format!(
                "audio is injected after {:?}, but there are {} blocks",
                self.audio_inject_layers, self.num_layers
            ));
        }
        if self.frames_per_block == 0 || self.kv_frames % self.frames_per_block != 0 {
            return wrong(format!(
                "a ring of {} frames does not hold whole blocks of {}",
                self.kv_frames, self.frames_per_block
            ));
        }
        Ok(())
    }
}

fn unreadable(e: serde_json::Error) -> Error {
    Error::Config(format!("the transformer's configuration cannot be read: {e}"))
}
