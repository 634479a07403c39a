//! Audio tokens (`casual_audio_encoder`, the checkpoint's spelling) and their injection into the picture's tokens.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::{Config, place::Portable};
use crate::model::{
    Error, Result,
    nn::{
        Activation, CausalConv1d, Folded, Linear, Residual, Rows, attention_to_few,
        norm::{self, Affine},
    },
    weights::{Fp8, Weights},
};

/// Features of layers → tokens per latent frame.
#[derive(Debug)]
pub struct AudioEncoder {
    /// `[1, layers]`, sums to one.
    mix: Tensor,
    local: CausalConv1d,
    global: CausalConv1d,
    second: CausalConv1d,
    third: CausalConv1d,
    last: Linear,
    /// `[1, dim]`.
    padding_token: Tensor,
    dim: usize,
    tokens: usize,
    audio_dim: usize,
    plain: [Affine; 3],
}

/// What the picture listens to, one entry per latent frame.
#[derive(Debug, Clone)]
pub struct AudioTokens {
    /// `[frames · (tokens + 1), dim]`.
    pub local: Tensor,
    /// `[frames, dim]`.
    pub global: Tensor,
    /// Latent frames.
    pub frames: usize,
}

impl AudioEncoder {
    /// Official key names below `casual_audio_encoder`.
    pub fn load(weights: &Weights, c: &Config) -> Result<Self> {
        let root = weights.pp("casual_audio_encoder").with_dtype(DType::F32);
        let layers = root.shape("weights").and_then(|s| s.get(1).copied()).unwrap_or(25);
        let mix = root.get((1, layers, 1, 1), "weights")?.reshape((1, layers))?.silu()?;
        let mix = mix.broadcast_div(&mix.sum_keepdim(1)?)?;
        let e = root.pp("encoder");
        let d = c.dim;
        let unit = |n: usize| -> Result<Affine> {
            let device = weights.device();
            let (scale, shift) =
                (Tensor::ones((1, n), DType::F32, device)?, Tensor::zeros((1, n), DType::F32, device)?);
            Ok(Affine::new(scale, shift))
        };
        let quarter = d / 4;
        Ok(Self {
            mix,
            local: CausalConv1d::load(&e, "conv1_local.conv", c.audio_dim, quarter * c.num_audio_token, 1)?,
            global: CausalConv1d::load(&e, "conv1_global.conv", c.audio_dim, quarter, 1)?,
            second: CausalConv1d::load(&e, "conv2.conv", quarter, d / 2, 2)?,
            third: CausalConv1d::load(&e, "conv3.conv", d / 2, d, 2)?,
            last: e.linear("final_linear", d, d, true)?,
            padding_token: e.get((1, 1, 1, d), "padding_tokens")?.reshape((1, d))?,
            dim: d,
            tokens: c.num_audio_token,
            audio_dim: c.audio_dim,
            plain: [unit(quarter)?, unit(d / 2)?, unit(d)?],
        })
    }

    /// `features` `[layers, audio_dim, frames]`, with `pad` copies of its first frame put in front; the first `drop`
    /// results are left out.
    pub fn forward(&self, features: &Tensor, pad: usize, drop: usize) -> Result<AudioTokens> {
        let (layers, width, frames) = features.dims3()?;
        if layers != self.mix.dim(1)? || width != self.audio_dim || frames == 0 {
            return Err(Error::Input(format!(
                "audio features are [{layers}, {width}, {frames}], expected [{}, {}, at least 1]",
                self.mix.dim(1)?,
                self.audio_dim
            )));
        }
        let x = features.to_dtype(DType::F32)?.contiguous()?.reshape((layers, width * frames))?;
        let x = self.mix.matmul(&x)?.reshape((width, frames))?.t()?.contiguous()?;
        let x = if pad == 0 {
            x
        } else {
            Tensor::cat(&[&x.narrow(0, 0, 1)?.broadcast_as((pad, width))?.contiguous()?, &x], 0)?
        };
        let quarter = self.dim / 4;
        // The four local groups and the global one are five sequences through the same two layers.
        let local = self.local.forward(&x, 1)?;
        let mut parts: Vec<Tensor> = Vec::with_capacity(self.tokens + 1);
        for j in 0..self.tokens {
            parts.push(local.narrow(1, j * quarter, quarter)?.contiguous()?);
        }
        parts.push(self.global.forward(&x, 1)?);
        let sequences = parts.len();
        let mut x = self.act(&Tensor::cat(&parts, 0)?, 0)?;
        x = self.act(&self.second.forward(&x, sequences)?, 1)?;
        x = self.act(&self.third.forward(&x, sequences)?, 2)?;
        let out = x.dim(0)? / sequences;
        if out <= drop {
            return Err(Error::Input(format!("{frames} audio frames give {out} tokens, of which {drop} are dropped")));
        }
        let kept = out - drop;
        let x = x.reshape((sequences, out, self.dim))?.narrow(1, drop, kept)?;
        let global = self.last.forward(&x.get(self.tokens)?.contiguous()?)?;
        let local = x.narrow(0, 0, self.tokens)?.transpose(0, 1)?.contiguous()?;
        let padding = self.padding_token.broadcast_as((kept, 1, self.dim))?.contiguous()?;
        let local = Tensor::cat(&[&local, &padding], 1)?.reshape((kept * (self.tokens + 1), self.dim))?;
        Ok(AudioTokens { local, global, frames: kept })
    }

    fn act(&self, x: &Tensor, stage: usize) -> Result<Tensor> {
        Ok(norm::layer_norm(x, &self.plain[stage], &[x.dim(0)?], 1e-6)?.silu()?)
    }
}

/// Attention of the picture's tokens to the audio tokens of their frame.
#[derive(Debug)]
pub struct Injector {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    norm_q: Tensor,
    norm_k: Tensor,
    adain: Linear,
    heads: usize,
    eps: f64,
}

/// What one injector makes of a block's audio, once for all denoising steps.
#[derive(Debug, Clone)]
pub struct InjectorAudio {
    affine: Affine,
    voice: Voice,
    /// Where it is heard among several voices, `[n, 1]` over a frame's tokens; none = everywhere.
    reach: Option<Tensor>,
    /// The other voices.
    others: Vec<InjectorAudio>,
}

#[derive(Debug, Clone)]
enum Voice {
    /// Keys and values.
    Kept(Tensor, Tensor),
    /// With the output projection in them.
    Folded(Folded),
}

impl Voice {
    fn copy(&self) -> Result<Self> {
        Ok(match self {
            Voice::Kept(k, v) => Voice::Kept(k.copy()?, v.copy()?),
            Voice::Folded(folded) => Voice::Folded(folded.copy()?),
        })
    }

    fn tensors(&self) -> Vec<&Tensor> {
        match self {
            Voice::Kept(k, v) => vec![k, v],
            Voice::Folded(folded) => folded.tensors(),
        }
    }
}

impl InjectorAudio {
    /// The same in memory of its own.
    pub(super) fn copy(&self) -> Result<Self> {
        let affine = Affine::new(self.affine.scale.copy()?, self.affine.shift.copy()?);
        let others: Result<_> = self.others.iter().map(Self::copy).collect();
        let reach = self.reach.as_ref().map(Tensor::copy).transpose()?;
        Ok(Self { affine, voice: self.voice.copy()?, reach, others: others? })
    }

    /// All that an injector reads and that changes from block to block.
    pub(super) fn tensors(&self) -> Vec<&Tensor> {
        let own = [&self.affine.scale, &self.affine.shift];
        own.into_iter().chain(self.voice.tensors()).chain(self.others.iter().flat_map(Self::tensors)).collect()
    }
}

/// Audio of one block of latent frames, ready for every injector.
#[derive(Debug, Clone)]
pub struct BlockAudio {
    /// One per injector.
    pub injectors: Vec<InjectorAudio>,
    /// The tokens it was made of.
    pub tokens: AudioTokens,
}

impl BlockAudio {
    /// Several voices at once, each with where it is heard: `[n, 1]` over the tokens of a frame, 1 or 0. What an injector
    /// makes of each voice is summed under these.
    pub fn together(voices: Vec<(BlockAudio, Tensor)>) -> Result<BlockAudio> {
        let mut voices = voices.into_iter().map(|(mut audio, reach)| {
            audio.injectors.iter_mut().for_each(|j| j.reach = Some(reach.clone()));
            audio
        });
        let Some(mut all) = voices.next() else { return Err(Error::Input("there is no voice to hear".into())) };
        for other in voices {
            if other.tokens.frames != all.tokens.frames || other.injectors.len() != all.injectors.len() {
                return Err(Error::Input("voices of different length cannot be heard at once".into()));
            }
            for (own, other) in all.injectors.iter_mut().zip(other.injectors) {
                own.others.push(other);
            }
        }
        Ok(all)
    }
}

impl BlockAudio {
    /// The same for some tokens of every frame.
    pub(super) fn over(&self, tokens: Range<usize>) -> Result<BlockAudio> {
        fn over(audio: &mut InjectorAudio, tokens: &Range<usize>) -> Result<()> {
            if let Some(reach) = &mut audio.reach {
                *reach = reach.narrow(0, tokens.start, tokens.len())?.contiguous()?;
            }
            audio.others.iter_mut().try_for_each(|other| over(other, tokens))
        }
        let mut out = self.clone();
        out.injectors.iter_mut().try_for_each(|audio| over(audio, &tokens))?;
        Ok(out)
    }
}

impl Portable for Injector {
    fn moved(&self, device: &Device) -> Result<Self> {
        Ok(Self {
            q: self.q.moved(device)?,
            k: self.k.moved(device)?,
            v: self.v.moved(device)?,
            o: self.o.moved(device)?,
            norm_q: self.norm_q.to_device(device)?,
            norm_k: self.norm_k.to_device(device)?,
            adain: self.adain.moved(device)?,
            ..*self
        })
    }
}

impl Injector {
    /// Injector `j`, official key names below `audio_injector`.
    pub fn load(weights: &Weights, c: &Config, j: usize) -> Result<Self> {
        let root = weights.pp("audio_injector");
        let at = root.pp(format!("injector.{j}"));
        let few = at.with_fp8(Fp8::Off);
        let d = c.dim;
        Ok(Self {
            q: at.linear("q", d, d, true)?,
            // These, and `adain`, see a few rows once a block: nothing is gained by quantising them.
            k: few.linear("k", d, d, true)?,
            v: few.linear("v", d, d, true)?,
            o: at.linear("o", d, d, true)?,
            norm_q: at.get(d, "norm_q.weight")?,
            norm_k: at.get(d, "norm_k.weight")?,
            adain: root.with_fp8(Fp8::Off).linear(&format!("injector_adain_layers.{j}.linear"), d, 2 * d, true)?,
            heads: c.num_heads,
            eps: c.eps,
        })
    }

    /// Shift and scale from the global vector, keys and values from the local tokens. `fold`: the output projection is
    /// made into the values where that pays.
    pub fn prepare(&self, audio: &AudioTokens, fold: bool) -> Result<InjectorAudio> {
        let m = self.adain.forward(&audio.global.silu()?)?.to_dtype(DType::F32)?;
        let d = m.dim(1)? / 2;
        let affine = Affine::new((m.narrow(1, d, d)? + 1.0)?.contiguous()?, m.narrow(1, 0, d)?.contiguous()?);
        let k = norm::rms_norm(&self.k.forward(&audio.local)?, &self.norm_k, self.eps)?;
        let v = self.v.forward(&audio.local)?;
        let voice = if fold && Folded::pays_for_few(&self.o, k.dim(0)?, self.heads) {
            Voice::Folded(Folded::grouped(&self.o, &k, &v, audio.frames, &self.norm_q, self.heads, self.eps)?)
        } else {
            Voice::Kept(k, v)
        };
        Ok(InjectorAudio { affine, voice, reach: None, others: Vec::new() })
    }

    /// Adds to `x` `[frames · n, dim]` what it heard. The LayerNorm's eps is 1e-5 here, unlike everywhere else.
    pub fn forward(&self, x: &mut Residual, audio: &InjectorAudio, frames: usize) -> Result<()> {
        let rows = x.rows();
        if frames == 0 || rows % frames != 0 {
            return Err(Error::Input(format!("{rows} tokens cannot belong to {frames} frames of audio")));
        }
        let (o, y) = self.heard(x, audio, frames)?;
        if audio.reach.is_none() && audio.others.is_empty() {
            return x.add_through(o, &y, None, None);
        }
        let mut sum = within(&o.forward_rows(&y, Activation::None)?, audio.reach.as_ref(), frames)?;
        for other in &audio.others {
            let (o, y) = self.heard(x, other, frames)?;
            sum = (sum + within(&o.forward_rows(&y, Activation::None)?, other.reach.as_ref(), frames)?)?;
        }
        x.add(sum, None)
    }

    /// What one voice tells every token, and the projection that it goes through before it is added.
    fn heard<'a>(&'a self, x: &mut Residual, audio: &'a InjectorAudio, frames: usize) -> Result<(&'a Linear, Rows)> {
        let y = x.norm(&audio.affine, &vec![x.rows() / frames; frames], 1e-5, self.q.form())?;
        let q = self.q.forward_rows(&y, Activation::None)?;
        match &audio.voice {
            Voice::Kept(k, v) => {
                let form = self.o.form();
                let y = attention_to_few(&q, &self.norm_q, k, v, self.heads, frames, self.eps, form)?;
                Ok((&self.o, y))
            }
            Voice::Folded(folded) => Ok((folded.product(), folded.weights(&q)?)),
        }
    }
}

/// `y` `[frames · n, dim]` where a voice is heard, zero elsewhere.
fn within(y: &Tensor, reach: Option<&Tensor>, frames: usize) -> Result<Tensor> {
    let Some(reach) = reach else { return Ok(y.clone()) };
    let (rows, dim) = y.dims2()?;
    if reach.dims() != [rows / frames, 1] {
        return Err(Error::Input(format!(
            "a mask of {:?} does not cover {} tokens a frame",
            reach.dims(),
            rows / frames
        )));
    }
    let y = y.reshape((frames, rows / frames, dim))?;
    Ok(y.broadcast_mul(&reach.to_dtype(y.dtype())?.unsqueeze(0)?)?.reshape((rows, dim))?)
}
