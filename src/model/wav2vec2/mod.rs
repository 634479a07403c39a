//! wav2vec2-large-xlsr-53, the stable-layer-norm variant, with every hidden state (MODEL.md §3.2; transformers 4.51.3,
//! `Wav2Vec2Model`; weights of `wav2vec2-large-xlsr-53-english/` in Wan-AI/Wan2.2-S2V-14B).

pub mod features;

use candle_core::{D, Module, Tensor};
use serde::Deserialize;

use crate::model::{Error, Result, nn::Linear, vae::Probe, weights::Weights};

/// The fields of the folder's `config.json` that shape the network; absent ones take xlsr-53's values.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct Config {
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub conv_dim: Vec<usize>,
    pub conv_kernel: Vec<usize>,
    pub conv_stride: Vec<usize>,
    pub num_conv_pos_embeddings: usize,
    pub num_conv_pos_embedding_groups: usize,
    pub layer_norm_eps: f64,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            hidden_size: 1024,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            intermediate_size: 4096,
            conv_dim: vec![512; 7],
            conv_kernel: vec![10, 3, 3, 3, 3, 2, 2],
            conv_stride: vec![5, 2, 2, 2, 2, 2, 2],
            num_conv_pos_embeddings: 128,
            num_conv_pos_embedding_groups: 16,
            layer_norm_eps: 1e-5,
        }
    }
}

impl Config {
    /// Refuses sizes that contradict each other.
    fn check(&self) -> Result<()> {
        let n = self.conv_dim.len();
        let whole = |a: usize, b: usize| b > 0 && a % b == 0;
        if n == 0 || self.conv_kernel.len() != n || self.conv_stride.len() != n || self.conv_stride.contains(&0) {
            return Err(Error::Config(
                "wav2vec2 config.json: conv_dim, conv_kernel and conv_stride must have the same length, strides above 0"
                    .into(),
            ));
        }
        if !whole(self.hidden_size, self.num_attention_heads)
            || !whole(self.hidden_size, self.num_conv_pos_embedding_groups)
        {
            return Err(Error::Config(format!(
                "wav2vec2 config.json: hidden_size {} must be divisible by num_attention_heads {} and \
                 num_conv_pos_embedding_groups {}",
                self.hidden_size, self.num_attention_heads, self.num_conv_pos_embedding_groups
            )));
        }
        Ok(())
    }
}

/// Scores of one attention are computed for so many (head, query, key) triples at a time; more queries are chunked.
const SCORES_AT_ONCE: usize = 1 << 26;

struct Norm(candle_nn::LayerNorm);

impl Norm {
    fn load(w: &Weights, name: &str, width: usize, eps: f64) -> Result<Self> {
        let w = w.pp(name);
        Ok(Norm(candle_nn::LayerNorm::new(w.get(width, "weight")?, w.get(width, "bias")?, eps)))
    }

    /// Over the last axis.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.0.forward(&x.contiguous()?)?)
    }
}

struct Conv {
    kernel: Tensor,
    bias: Tensor,
    norm: Norm,
    stride: usize,
}

struct Layer {
    norm: Norm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    final_norm: Norm,
    up: Linear,
    down: Linear,
}

/// The network. Immutable.
pub struct Wav2Vec2 {
    convs: Vec<Conv>,
    projection_norm: Norm,
    projection: Linear,
    position: (Tensor, Tensor),
    layers: Vec<Layer>,
    norm: Norm,
    config: Config,
}

impl Wav2Vec2 {
    /// Reads the official keys, with the prefix `wav2vec2.` or without; the positional convolution's weight norm in
    /// either of torch's two spellings. `lm_head.*` and `masked_spec_embed` are not used.
    pub fn load(w: &Weights, config: &Config) -> Result<Self> {
        config.check()?;
        let eps = config.layer_norm_eps;
        let root = match w.has("wav2vec2.feature_projection.projection.weight") {
            true => w.pp("wav2vec2"),
            false => w.clone(),
        };
        for unused in ["lm_head", "masked_spec_embed"] {
            w.ignore(unused);
            root.ignore(unused);
        }
        let mut convs = Vec::new();
        let mut input = 1;
        for (i, ((&stride, &kernel), &out)) in
            config.conv_stride.iter().zip(&config.conv_kernel).zip(&config.conv_dim).enumerate()
        {
            let w = root.pp(format!("feature_extractor.conv_layers.{i}"));
            convs.push(Conv {
                kernel: w.get((out, input, kernel), "conv.weight")?,
                bias: w.get(out, "conv.bias")?,
                norm: Norm::load(&w, "layer_norm", out, eps)?,
                stride,
            });
            input = out;
        }
        let (d, taps, groups) =
            (config.hidden_size, config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups);
        let p = root.pp("encoder.pos_conv_embed.conv");
        let (g, v) = match p.has("weight_g") {
            true => ("weight_g", "weight_v"),
            false => ("parametrizations.weight.original0", "parametrizations.weight.original1"),
        };
        let (g, v) = (p.get((1, 1, taps), g)?, p.get((d, d / groups, taps), v)?);
        let length = v.sqr()?.sum_keepdim((0, 1))?.sqrt()?;
        let position = (v.broadcast_mul(&g.broadcast_div(&length)?)?, p.get(d, "bias")?);
        let mut layers = Vec::new();
        for i in 0..config.num_hidden_layers {
            let w = root.pp(format!("encoder.layers.{i}"));
            let f = config.intermediate_size;
            layers.push(Layer {
                norm: Norm::load(&w, "layer_norm", d, eps)?,
                query: w.linear("attention.q_proj", d, d, true)?,
                key: w.linear("attention.k_proj", d, d, true)?,
                value: w.linear("attention.v_proj", d, d, true)?,
                out: w.linear("attention.out_proj", d, d, true)?,
                final_norm: Norm::load(&w, "final_layer_norm", d, eps)?,
                up: w.linear("feed_forward.intermediate_dense", d, f, true)?,
                down: w.linear("feed_forward.output_dense", f, d, true)?,
            });
        }
        Ok(Wav2Vec2 {
            convs,
            projection_norm: Norm::load(&root, "feature_projection.layer_norm", input, eps)?,
            projection: root.linear("feature_projection.projection", input, d, true)?,
            position,
            layers,
            norm: Norm::load(&root, "encoder.layer_norm", d, eps)?,
            config: config.clone(),
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Feature frames that `samples` samples give: repeated (n − kernel)/stride + 1.
    pub fn frames(&self, samples: usize) -> usize {
        self.config
            .conv_kernel
            .iter()
            .zip(&self.config.conv_stride)
            .fold(samples, |n, (&k, &s)| if n < k { 0 } else { (n - k) / s + 1 })
    }

    /// All hidden states `[layers + 1, frames, hidden]` of normalised 16 kHz samples `[n]`: state 0 before the first
    /// layer, only the last one layer-normed.
    pub fn hidden_states(&self, samples: &Tensor, probe: Probe) -> Result<Tensor> {
        if self.frames(samples.elem_count()) == 0 {
            return Err(Error::Input(format!("{} samples are too few for one wav2vec2 frame", samples.elem_count())));
        }
        let mut y = samples.to_dtype(self.position.1.dtype())?.reshape((1, 1, ()))?;
        for (i, c) in self.convs.iter().enumerate() {
            let z = y.conv1d(&c.kernel, 0, c.stride, 1, 1)?.transpose(1, 2)?.broadcast_add(&c.bias)?;
            y = c.norm.forward(&z)?.gelu_erf()?.transpose(1, 2)?.contiguous()?;
            probe(&format!("feature_extractor.conv_layers.{i}"), &y);
        }
        let x = self.projection.forward(&self.projection_norm.forward(&y.squeeze(0)?.t()?)?)?;
        probe("feature_projection", &x.unsqueeze(0)?);
        let kernel = self.position.0.dim(D::Minus1)?;
        let wide = x.t()?.contiguous()?.unsqueeze(0)?;
        let p = wide.conv1d(&self.position.0, kernel / 2, 1, 1, self.config.num_conv_pos_embedding_groups)?;
        let p = p.narrow(2, 0, x.dim(0)?)?.squeeze(0)?.t()?.broadcast_add(&self.position.1)?.gelu_erf()?;
        probe("encoder.pos_conv_embed", &p.unsqueeze(0)?);
        let mut x = (x + p)?;
        let mut states = vec![x.clone()];
        for (i, layer) in self.layers.iter().enumerate() {
            x = self.layer(layer, &x)?;
            states.push(if i + 1 == self.layers.len() { self.norm.forward(&x)? } else { x.clone() });
        }
        Ok(Tensor::stack(&states, 0)?)
    }

    fn layer(&self, l: &Layer, x: &Tensor) -> Result<Tensor> {
        let n = l.norm.forward(x)?;
        let (t, width) = n.dims2()?;
        let heads = self.config.num_attention_heads;
        let split = |y: Tensor| y.reshape((t, heads, width / heads))?.transpose(0, 1)?.contiguous();
        let scale = 1.0 / ((width / heads) as f64).sqrt();
        let (q, k, v) =
            (split((l.query.forward(&n)? * scale)?)?, split(l.key.forward(&n)?)?, split(l.value.forward(&n)?)?);
        let k = k.transpose(1, 2)?;
        let step = (SCORES_AT_ONCE / (heads * t)).clamp(1, t);
        let mut parts = Vec::new();
        for at in (0..t).step_by(step) {
            let q = q.narrow(1, at, step.min(t - at))?;
            parts.push(candle_nn::ops::softmax_last_dim(&q.contiguous()?.matmul(&k)?)?.matmul(&v)?);
        }
        let a = Tensor::cat(&parts, 1)?.transpose(0, 1)?.contiguous()?.reshape((t, width))?;
        let x = (x + l.out.forward(&a)?)?;
        let n = l.final_norm.forward(&x)?;
        Ok((&x + l.down.forward(&l.up.forward(&n)?.gelu_erf()?)?)?)
    }
}
