//! The speech-to-video transformer: one implementation for Wan2.2-S2V-14B, LiveAvatar, the pocket model and the base
//! family. Differences are values of [`Config`].
//!
//! # Streaming (LiveAvatar, pocket)
//!
//! ```text
//! let dit = Dit::load(Config::parse(json)?, &weights.pp("dit"))?;          // weights, immutable, shared
//! let schedule = Arc::new(dit.schedule(&sampler)?);                         // per list of σ, shared
//! let mut state = dit.open(&Opening { reference: &latent, motion: None, text: None }, &schedule)?;   // one face
//! loop {
//!     let audio = dit.audio(&features)?;        // [layers, audio_dim, 4 · frames_per_block]
//!     let latent = dit.generate(&mut state, &audio, noise, None, &[])?;     // [16, frames_per_block, h, w]
//! }
//! ```
//!
//! [`StreamState`] owns everything one face remembers; dropping it is the reset. [`Dit::forward`] does one denoising
//! step for callers that spread steps over devices. Source: MODEL.md §6, §9.1 and §9.2 of the specification, after
//! `causal_model_s2v.py` of LiveAvatar and `model_s2v.py` of Wan2.2.

mod audio;
mod base;
mod block;
mod clip;
mod config;
mod desk;
mod motion;
mod place;
mod stream;
mod time;
mod trace;

use candle_core::{DType, Tensor};

pub use audio::{AudioEncoder, AudioTokens, BlockAudio, Injector, InjectorAudio};
pub use block::{Attention, Block, Head, KeysValues, Words};
pub use clip::ClipInputs;
pub use config::{Cond, Conditioning, Config, FramePack, Prediction};
pub use motion::{DropMode, FramePacker};
use place::Placed;
pub use stream::{Halfway, Opening, Schedule, StreamState};
pub use time::{BlockModulation, TimeEmbedding, Timing};
pub use trace::Trace;

use crate::model::{
    At, Error, Result,
    nn::{Activation, Linear, PatchEmbed},
    weights::{Fp8, Weights},
};

/// The text in every block; made once per prompt.
#[derive(Debug, Clone)]
pub struct TextContext {
    blocks: Vec<Words>,
    /// The embedded text `[text_len, dim]`.
    pub embedded: Tensor,
}

/// The transformer's weights.
#[derive(Debug)]
pub struct Dit {
    config: Config,
    patch: PatchEmbed,
    time: TimeEmbedding,
    text: Option<(Linear, Linear)>,
    blocks: Vec<Placed<Block>>,
    head: Head,
    speech: Option<Speech>,
    device: candle_core::Device,
    /// Whether a stream's rings wait in host memory while another step runs.
    parks: bool,
    /// See [`Dit::folding`].
    folds: bool,
}

/// What only the speech-to-video family has.
#[derive(Debug)]
struct Speech {
    cond: PatchEmbed,
    /// `[3, dim]`: noisy, reference, motion.
    mask: Tensor,
    packer: FramePacker,
    audio: AudioEncoder,
    injectors: Vec<Placed<Injector>>,
}

impl Dit {
    /// Reads the transformer below `weights` (official key names). The caller ends the load with
    /// [`Weights::finish`], which reports what was missing.
    pub fn load(config: Config, weights: &Weights) -> Result<Self> {
        Self::load_offloaded(config, weights, usize::MAX)
    }

    /// The same with only the first `resident` blocks on the device. The others, and the injectors after them, stay in
    /// host memory and travel to the device for each use, one at a time: the same numbers, less device memory.
    pub fn load_offloaded(config: Config, weights: &Weights, resident: usize) -> Result<Self> {
        config.check()?;
        let c = &config;
        let f32s = weights.with_dtype(DType::F32);
        let text = if c.text_len > 0 {
            // Left as they are, like everything that computes in f32: they run once a prompt.
            let once = weights.with_fp8(Fp8::Off);
            let first = once.linear("text_embedding.0", c.text_dim, c.dim, true)?;
            Some((first, once.linear("text_embedding.2", c.dim, c.dim, true)?))
        } else {
            None
        };
        let speech = if c.speech() {
            let injectors: Result<_> = (c.audio_inject_layers.iter().enumerate())
                .map(|(j, after)| Placed::load(weights, *after >= resident, |w| Injector::load(w, c, j)))
                .collect();
            Some(Speech {
                cond: PatchEmbed::load(weights, "cond_encoder", 16, c.dim, c.patch)?,
                mask: f32s.get((3, c.dim), "trainable_cond_mask.weight")?,
                packer: FramePacker::load(weights, c)?,
                audio: AudioEncoder::load(weights, c)?,
                injectors: injectors?,
            })
        } else {
            None
        };
        let block = |i: usize| Placed::load(&weights.pp(format!("blocks.{i}")), i >= resident, |w| Block::load(w, c));
        let blocks: Result<_> = (0..c.num_layers).map(block).collect();
        Ok(Self {
            patch: PatchEmbed::load(weights, "patch_embedding", c.in_dim, c.dim, c.patch)?,
            time: TimeEmbedding::load(weights, c)?,
            text,
            blocks: blocks?,
            head: Head::load(weights, c)?,
            speech,
            device: weights.device().clone(),
            // What is made once is more than the keys and values it stands for: not where memory is short. On the CPU it
            // is for tests; the models that run there have no text, or time.
            folds: !weights.device().is_cpu() && resident >= config.num_layers,
            config,
            parks: false,
        })
    }

    /// Streams of this model keep only the ring of the step at work on the device; the others wait in host memory, as
    /// `offload_kv_cache` does in Alibaba-Quark/LiveAvatar at 9c2c38d. The same numbers, no graphs, and every step moves
    /// two rings over the bus.
    pub fn parking(mut self, yes: bool) -> Self {
        self.parks = yes;
        self.folds &= !yes;
        self
    }

    /// Whether attention to the text and to the voice is computed with the output projection made into the values
    /// ([`crate::model::nn::Folded`]) where that pays: the same up to rounding, and the default on a card that holds
    /// everything.
    pub fn folding(mut self, yes: bool) -> Self {
        self.folds = yes;
        self
    }

    /// The configuration it was loaded with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// One of the blocks, for tests that look at it alone.
    pub fn block(&self, i: usize) -> Option<&Block> {
        self.blocks.get(i).map(Placed::kept)
    }

    /// One of the injectors, for the same.
    pub fn injector(&self, j: usize) -> Option<&Injector> {
        self.speech.as_ref()?.injectors.get(j).map(Placed::kept)
    }

    /// The packer of motion latents; absent in the base family.
    pub fn packer(&self) -> Option<&FramePacker> {
        Some(&self.speech.as_ref()?.packer)
    }

    /// The audio encoder; absent in the base family.
    pub fn audio_encoder(&self) -> Option<&AudioEncoder> {
        Some(&self.speech.as_ref()?.audio)
    }

    fn speech(&self) -> Result<&Speech> {
        self.speech.as_ref().ok_or_else(|| Error::Config("this transformer has no speech parts".into()))
    }

    /// Text states `[tokens, text_dim]` (at most `text_len`) → keys and values of every block. Rows of zeros fill up
    /// to `text_len` before the embedding, which makes them non-zero tokens that are attended to.
    pub fn text(&self, states: &Tensor) -> Result<TextContext> {
        let (first, second) =
            self.text.as_ref().ok_or_else(|| Error::Config("this transformer takes no text".into()))?;
        let (n, width) = states.dims2()?;
        if n > self.config.text_len || width != self.config.text_dim {
            return Err(Error::Input(format!(
                "text states are [{n}, {width}], expected at most [{}, {}]",
                self.config.text_len, self.config.text_dim
            )));
        }
        let zeros = Tensor::zeros((self.config.text_len - n, width), states.dtype(), states.device())?;
        let padded = Tensor::cat(&[states, &zeros], 0)?;
        let embedded = second.forward(&first.forward_with(&padded, Activation::GeluTanh)?)?;
        let alike = if self.folds { self.config.text_len - n } else { 0 };
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (i, block) in self.blocks.iter().enumerate() {
            blocks.extend(block.bring(&self.device)?.text(&embedded, alike).at(|| format!("text of block {i}"))?);
        }
        Ok(TextContext { blocks, embedded })
    }

    /// Modulations for a list of timesteps, one per run of tokens; the head sees the first `head` of them.
    pub fn timing(&self, timesteps: &[f32], head: usize) -> Result<Timing> {
        let (e, e0) = self.time.forward(timesteps)?;
        let blocks: Result<Vec<_>> = self.blocks.iter().map(|b| b.kept().modulation(&e0)).collect();
        Ok(Timing { blocks: blocks?, head: self.head.modulation(&e.narrow(0, 0, head)?)?, e0 })
    }

    /// Audio features `[layers, audio_dim, frames]` of one block or clip → what its injectors need. The features are
    /// preceded by copies of their first frame as the configuration says, so that a block has no hidden past.
    pub fn audio(&self, features: &Tensor) -> Result<BlockAudio> {
        let [pad, drop] = self.config.motion_frames;
        let tokens = self.speech()?.audio.forward(features, pad, drop).at(|| "audio tokens")?;
        self.audio_from_tokens(tokens)
    }

    /// The same from audio tokens.
    pub fn audio_from_tokens(&self, tokens: AudioTokens) -> Result<BlockAudio> {
        let injectors: Result<_> =
            self.speech()?.injectors.iter().map(|j| j.bring(&self.device)?.prepare(&tokens, self.folds)).collect();
        Ok(BlockAudio { injectors: injectors.at(|| "audio keys")?, tokens })
    }

    /// Whether parts of it travel to the device for each use.
    fn travels(&self) -> bool {
        self.blocks.iter().any(Placed::travels)
    }

    fn injector_after(&self, block: usize) -> Option<usize> {
        self.config.audio_inject_layers.iter().position(|l| *l == block)
    }

    /// Rows and columns of the patch grid of a latent.
    fn grid(&self, latent: &Tensor) -> Result<(usize, usize)> {
        let (_, _, h, w) = latent.dims4()?;
        let [_, kh, kw] = self.config.patch;
        if h % kh != 0 || w % kw != 0 || h == 0 || w == 0 {
            return Err(Error::Input(format!("a latent of {h}×{w} cannot be cut into patches of {kh}×{kw}")));
        }
        Ok((h / kh, w / kw))
    }
}
