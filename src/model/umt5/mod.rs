//! UMT5, encoder only: prompts to embeddings (MODEL.md §4; wan/modules/t5.py of Wan-Video/Wan2.2 at 42bf4cf; weights
//! `models_t5_umt5-xxl-enc-bf16.pth` of Wan-AI/Wan2.2-S2V-14B).

pub mod clean;
mod tokenizer;

pub use tokenizer::Tokenizer;

use candle_core::{D, DType, Device, Tensor};

use crate::model::{
    Error, Result,
    nn::Linear,
    vae::{Probe, quiet},
    weights::Weights,
};

/// Sizes; the defaults are umt5-xxl's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub vocab_size: usize,
    pub dim: usize,
    pub dim_attn: usize,
    pub dim_ffn: usize,
    pub num_heads: usize,
    pub layers: usize,
    pub num_buckets: usize,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            vocab_size: 256_384,
            dim: 4096,
            dim_attn: 4096,
            dim_ffn: 10240,
            num_heads: 64,
            layers: 24,
            num_buckets: 32,
        }
    }
}

impl Config {
    /// Sizes as the file's shapes tell them; what is absent stays as published.
    pub fn from_weights(w: &Weights) -> Self {
        let mut c = Config::default();
        if let Some([vocab, dim]) = w.shape("token_embedding.weight").as_deref() {
            (c.vocab_size, c.dim) = (*vocab, *dim);
        }
        if let Some([attn, _]) = w.shape("blocks.0.attn.q.weight").as_deref() {
            c.dim_attn = *attn;
        }
        if let Some([ffn, _]) = w.shape("blocks.0.ffn.fc1.weight").as_deref() {
            c.dim_ffn = *ffn;
        }
        if let Some([buckets, heads]) = w.shape("blocks.0.pos_embedding.embedding.weight").as_deref() {
            (c.num_buckets, c.num_heads) = (*buckets, *heads);
        }
        let layers = (0..1024).take_while(|i| w.has(&format!("blocks.{i}.norm1.weight"))).count();
        if layers > 0 {
            c.layers = layers;
        }
        c
    }
}

/// Distance beyond which all positions share a bucket.
const MAX_DISTANCE: f64 = 128.0;

/// Bucket of a relative position (key − query), bidirectional; the logarithm in f32 as torch computes it.
pub fn relative_bucket(relative: i64, num_buckets: usize) -> usize {
    let side = num_buckets / 2;
    let exact = side / 2;
    let offset = if relative > 0 { side } else { 0 };
    let distance = relative.unsigned_abs() as usize;
    if distance < exact {
        return offset + distance;
    }
    let spread = (distance as f32 / exact as f32).ln() / (MAX_DISTANCE / exact as f64).ln() as f32;
    offset + (exact + (spread * (side - exact) as f32) as usize).min(side - 1)
}

/// RMS norm: statistics in f32, rounded to the weight's type before the weight.
struct Norm(Tensor);

impl Norm {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let wide = x.to_dtype(DType::F32)?;
        let scale = (wide.sqr()?.mean_keepdim(D::Minus1)? + 1e-6)?.sqrt()?.recip()?;
        wide.broadcast_mul(&scale)?.to_dtype(self.0.dtype())?.broadcast_mul(&self.0)
    }
}

struct Block {
    norm1: Norm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    /// `[buckets, heads]`.
    positions: Tensor,
    norm2: Norm,
    gate: Linear,
    fc1: Linear,
    fc2: Linear,
}

impl Block {
    fn load(w: &Weights, config: &Config, i: usize) -> Result<Self> {
        let p = |n: &str| format!("blocks.{i}.{n}");
        let norm = |n: &str| w.get(config.dim, &p(n)).map(Norm);
        let linear = |n: &str, input: usize, out: usize| w.linear(&p(n), input, out, false);
        let (d, a, f) = (config.dim, config.dim_attn, config.dim_ffn);
        Ok(Block {
            norm1: norm("norm1.weight")?,
            q: linear("attn.q", d, a)?,
            k: linear("attn.k", d, a)?,
            v: linear("attn.v", d, a)?,
            o: linear("attn.o", a, d)?,
            positions: w.get((config.num_buckets, config.num_heads), &p("pos_embedding.embedding.weight"))?,
            norm2: norm("norm2.weight")?,
            gate: linear("ffn.gate.0", d, f)?,
            fc1: linear("ffn.fc1", d, f)?,
            fc2: linear("ffn.fc2", f, d)?,
        })
    }

    /// `x` `[n, dim]` through block `i`.
    fn forward(&self, x: &Tensor, places: &Places, i: usize, heads: usize, probe: Probe) -> Result<Tensor> {
        let n = x.dim(0)?;
        let bias = self.positions.to_dtype(DType::F32)?.index_select(&places.buckets, 0)?.reshape((n, n, heads))?;
        let bias = bias.permute((2, 0, 1))?.contiguous()?;
        probe(&format!("blocks.{i}.pos_embedding"), &bias.unsqueeze(0)?);
        // masked keys get the lowest finite value instead of the bias, not on top of it
        let bias = bias.broadcast_mul(&places.open)?.broadcast_add(&places.closed)?;
        let y = self.norm1.forward(x)?;
        let split = |t: Tensor| t.reshape((n, heads, ()))?.transpose(0, 1)?.contiguous();
        let (q, k, v) = (split(self.q.forward(&y)?)?, split(self.k.forward(&y)?)?, split(self.v.forward(&y)?)?);
        let scores = (q.matmul(&k.t()?)?.to_dtype(DType::F32)? + bias)?;
        let a = candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(v.dtype())?.matmul(&v)?;
        let a = self.o.forward(&a.transpose(0, 1)?.contiguous()?.reshape((n, ()))?)?;
        probe(&format!("blocks.{i}.attn"), &a);
        let x = (x + a)?;
        let y = self.norm2.forward(&x)?;
        let f = self.fc2.forward(&(self.fc1.forward(&y)? * self.gate.forward(&y)?.gelu()?)?)?;
        probe(&format!("blocks.{i}.ffn"), &f);
        let x = (x + f)?;
        probe(&format!("blocks.{i}"), &x);
        Ok(x)
    }
}

/// Who may look where, for one prompt.
struct Places {
    /// Position bucket of every (query, key).
    buckets: Tensor,
    /// `[1, 1, n]`: 1 for real keys, 0 for padding.
    open: Tensor,
    /// 0 for real keys, the lowest finite value for padding.
    closed: Tensor,
}

impl Places {
    /// Checks ids and mask of a prompt.
    fn of(ids: &[u32], mask: &[bool], config: &Config, device: &Device) -> Result<Self> {
        let n = ids.len();
        if n == 0 || mask.len() != n {
            return Err(Error::Input(format!(
                "a prompt of {n} tokens with a mask of {} cannot be encoded",
                mask.len()
            )));
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= config.vocab_size) {
            return Err(Error::Input(format!(
                "token {id} is outside the vocabulary of {} rows: tokenizer and text encoder do not belong together",
                config.vocab_size
            )));
        }
        let buckets: Vec<u32> = (0..n as i64)
            .flat_map(|q| (0..n as i64).map(move |k| k - q))
            .map(|r| relative_bucket(r, config.num_buckets) as u32)
            .collect();
        let row = |real: f32, padding: f32| {
            let values: Vec<f32> = mask.iter().map(|&m| if m { real } else { padding }).collect();
            Tensor::from_vec(values, (1, 1, n), device)
        };
        Ok(Places { buckets: Tensor::new(buckets, device)?, open: row(1.0, 0.0)?, closed: row(0.0, f32::MIN)? })
    }
}

/// The encoder. Immutable.
pub struct Umt5 {
    embedding: Tensor,
    blocks: Vec<Block>,
    norm: Norm,
    config: Config,
}

fn check(config: &Config) -> Result<()> {
    if config.num_heads == 0 || config.dim_attn % config.num_heads != 0 || config.num_buckets < 4 {
        return Err(Error::Config(format!(
            "UMT5: {} attention channels cannot be split over {} heads with {} position buckets",
            config.dim_attn, config.num_heads, config.num_buckets
        )));
    }
    Ok(())
}

fn embedding(w: &Weights, config: &Config) -> Result<Tensor> {
    w.get((config.vocab_size, config.dim), "token_embedding.weight")
}

impl Umt5 {
    /// Reads the official keys.
    pub fn load(w: &Weights, config: &Config) -> Result<Self> {
        check(config)?;
        let blocks: Result<_> = (0..config.layers).map(|i| Block::load(w, config, i)).collect();
        let norm = Norm(w.get(config.dim, "norm.weight")?);
        Ok(Umt5 { embedding: embedding(w, config)?, blocks: blocks?, norm, config: config.clone() })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Embeddings `[L, dim]` of `L` ids; `mask` (1 = real, same length) keeps padding from being attended to. Official
    /// callers keep only the first Σ mask rows; handing in just the real ids gives the same rows.
    pub fn encode(&self, ids: &[u32], mask: &[bool], probe: Probe) -> Result<Tensor> {
        let device = self.embedding.device();
        let places = Places::of(ids, mask, &self.config, device)?;
        let mut x = self.embedding.index_select(&Tensor::new(ids, device)?, 0)?;
        for (i, b) in self.blocks.iter().enumerate() {
            x = b.forward(&x, &places, i, self.config.num_heads, probe)?;
        }
        Ok(self.norm.forward(&x)?)
    }
}

/// Embeddings `[L, dim]` of prompts of `L` ids each, by an encoder that is never in memory as a whole: one block after
/// another is loaded, used for all prompts and dropped. For prompts that are encoded once.
pub fn encode_passing(w: &Weights, config: &Config, prompts: &[Vec<u32>]) -> Result<Vec<Tensor>> {
    check(config)?;
    let device = w.device();
    let mut places = Vec::new();
    for ids in prompts {
        places.push(Places::of(ids, &vec![true; ids.len()], config, device)?);
    }
    let rows = embedding(w, config)?;
    let start = |ids: &Vec<u32>| Ok(rows.index_select(&Tensor::new(ids.as_slice(), device)?, 0)?);
    let mut states = prompts.iter().map(start).collect::<Result<Vec<Tensor>>>()?;
    drop(rows);
    for i in 0..config.layers {
        let block = Block::load(w, config, i)?;
        for (x, places) in states.iter_mut().zip(&places) {
            *x = block.forward(x, places, i, config.num_heads, &mut quiet)?;
        }
    }
    let norm = Norm(w.get(config.dim, "norm.weight")?);
    w.finish()?;
    states.iter().map(|x| Ok(norm.forward(x)?)).collect()
}
