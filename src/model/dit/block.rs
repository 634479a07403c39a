//! One transformer block, the text's side of it, and the head.

use candle_core::{DType, Device, Tensor};

use super::{BlockModulation, Config, place::Portable, trace::Trace};
use crate::model::{
    Error, Result,
    nn::{
        Activation, Folded, Form, Gated, Linear, Memory, Residual, Rope, Rows, Slot, attention,
        norm::{self, Affine},
    },
    ranks::Share,
    weights::{Fp8, Weights},
};

/// Projections and norms of one attention.
#[derive(Debug)]
pub struct Attention {
    inputs: Inputs,
    o: Linear,
    norm_q: Tensor,
    norm_k: Tensor,
    heads: usize,
    eps: f64,
    /// Whether keys, values and queries are e4m3.
    fp8: bool,
}

/// The three input projections. One matrix does all where queries, keys and values come from the same tokens: on the CPU
/// each product costs a wake-up of other threads, on a card a larger one fills it better.
#[derive(Debug)]
enum Inputs {
    Apart { q: Linear, k: Linear, v: Linear },
    Stacked(Linear),
}

/// Queries, keys and values as they leave their projections, `[tokens, dim]` each.
#[derive(Debug)]
pub struct Projected {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

/// What a block knows of the text.
#[derive(Debug, Clone)]
pub enum Words {
    /// Keys and values.
    Kept(Memory),
    /// Keys, and what the output projection makes of the values.
    Folded(Folded),
}

/// Keys of a sequence before their rotation, and values.
#[derive(Debug, Clone)]
pub struct KeysValues {
    /// `[tokens, dim]`, after the RMS norm.
    pub k: Tensor,
    /// `[tokens, dim]`.
    pub v: Tensor,
}

impl Attention {
    /// Official key names. `own`: queries, keys and values come from the same tokens.
    pub fn load(weights: &Weights, c: &Config, own: bool) -> Result<Self> {
        let d = c.dim;
        let [q, k, v] =
            [weights.linear("q", d, d, true)?, weights.linear("k", d, d, true)?, weights.linear("v", d, d, true)?];
        // On the CPU each product costs a wake-up of other threads, on a card a larger one fills it better.
        let stacked = if own { Linear::stacked(&[&q, &k, &v])? } else { None };
        let inputs = match stacked {
            Some(all) => Inputs::Stacked(all),
            None => Inputs::Apart { q, k, v },
        };
        let o = weights.linear("o", d, d, true)?;
        Ok(Self {
            inputs,
            norm_q: weights.get(d, "norm_q.weight")?,
            norm_k: weights.get(d, "norm_k.weight")?,
            heads: c.num_heads,
            eps: c.eps,
            // A result in e4m3 needs a matrix that takes it.
            fp8: weights.fp8() == Fp8::All && o.form() == Form::Scaled && c.head() % 16 == 0 && c.head() <= 128,
            o,
        })
    }

    fn moved(&self, device: &Device) -> Result<Self> {
        let inputs = match &self.inputs {
            Inputs::Apart { q, k, v } => {
                Inputs::Apart { q: q.moved(device)?, k: k.moved(device)?, v: v.moved(device)? }
            }
            Inputs::Stacked(all) => Inputs::Stacked(all.moved(device)?),
        };
        Ok(Self {
            inputs,
            o: self.o.moved(device)?,
            norm_q: self.norm_q.to_device(device)?,
            norm_k: self.norm_k.to_device(device)?,
            ..*self
        })
    }

    /// Whether its projections give bf16 (in e4m3 they do as well).
    pub fn computes_in_bf16(&self) -> bool {
        matches!(self.form(), Form::Scaled | Form::Plain(DType::BF16))
    }

    /// How the projections want their input.
    pub fn form(&self) -> Form {
        self.reader().form()
    }

    /// What takes the normed tokens.
    fn reader(&self) -> &Linear {
        match &self.inputs {
            Inputs::Apart { q, .. } => q,
            Inputs::Stacked(all) => all,
        }
    }

    /// All three projections of the same tokens.
    pub fn project(&self, y: &Rows) -> Result<Projected> {
        let through = |l: &Linear| l.forward_rows(y, Activation::None);
        Ok(match &self.inputs {
            Inputs::Apart { q, k, v } => Projected { q: through(q)?, k: through(k)?, v: through(v)? },
            Inputs::Stacked(all) => {
                let y = through(all)?;
                let d = y.dim(1)? / 3;
                let part = |i: usize| y.narrow(1, i * d, d);
                Projected { q: part(0)?, k: part(1)?, v: part(2)? }
            }
        })
    }

    /// Room for `[rows, columns]` keys and values like `kept`, in the form this attention computes in. Fewer columns than
    /// `kept` has are those of some heads.
    pub fn memory(&self, kept: &KeysValues, room: (usize, usize), headroom: f64) -> Result<Memory> {
        Memory::new(&kept.v, room, self.fp8, headroom)
    }

    /// Stores the tokens' keys and values at the slot and returns what the tokens, and everything before, tell them:
    /// attention over the memory, before the output projection. Where ranks share it, each brings some of the tokens and
    /// remembers some of the heads: tokens are gathered and heads scattered before the attention, and back after it.
    /// `first`: the values the memory begins with, if these are the first tokens that come after them; the memory's means
    /// are then theirs, for there will be most of their kind.
    pub fn remember(
        &self,
        y: &Rows,
        rope: &Rope,
        memory: &Memory,
        slot: &Slot,
        share: Option<&Share>,
        first: Option<&Tensor>,
    ) -> Result<Rows> {
        let p = self.project(y)?;
        if first.is_some() {
            memory.centre(&p.v, first)?;
        }
        let (parts, weights) = ([&p.q, &p.k, &p.v], [&self.norm_q, &self.norm_k]);
        match share {
            None => {
                let q = memory.store(parts, weights, self.eps, rope, slot)?;
                memory.attend(&q, self.heads, Some(slot))
            }
            Some(share) => {
                let parts = memory.ready(parts, weights, self.eps, rope)?;
                let [q, k, v] = share.scatter(parts, rope.head())?;
                memory.keep(&k, &v, slot.at)?;
                match memory.attend(&q, share.heads().len(), Some(slot))? {
                    Rows::Plain(y) => Ok(Rows::Plain(share.gather(&y)?)),
                    Rows::Scaled { stored, .. } | Rows::Bound { stored, .. } => memory.scaled(share.gather(&stored)?),
                }
            }
        }
    }

    /// Queries, normed and rotated.
    pub fn queries(&self, p: &Projected, rope: &Rope) -> Result<Tensor> {
        norm::rms_norm_rotate(&p.q, &self.norm_q, self.eps, rope)
    }

    /// Keys normed and rotated.
    pub fn keys(&self, p: &Projected, rope: &Rope) -> Result<Tensor> {
        norm::rms_norm_rotate(&p.k, &self.norm_k, self.eps, rope)
    }

    /// Keys normed but not rotated, and values.
    pub fn kept(&self, p: &Projected) -> Result<KeysValues> {
        Ok(KeysValues { k: norm::rms_norm(&p.k, &self.norm_k, self.eps)?, v: p.v.contiguous()? })
    }

    /// Attention of ready queries over ready keys, before the output projection.
    pub fn finish(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Rows> {
        Ok(Rows::Plain(attention(q, k, v, self.heads, 1)?))
    }

    /// A sequence's attention to itself, before the output projection.
    pub fn whole(&self, y: &Rows, rope: &Rope) -> Result<Rows> {
        let p = self.project(y)?;
        if self.fp8 {
            let rows = p.q.dim(0)?;
            // A value less its mean is twice the largest value at most.
            let memory = Memory::new(&p.v, p.v.dims2()?, true, 2.0)?.transposed(rope.head())?.centred()?;
            memory.centre(&p.v, None)?;
            let slot = Slot { at: 0, keys: rows, card: None }.on(p.q.device(), rows)?;
            let q = memory.store([&p.q, &p.k, &p.v], [&self.norm_q, &self.norm_k], self.eps, rope, &slot)?;
            return memory.attend(&q, self.heads, Some(&slot));
        }
        self.finish(&self.queries(&p, rope)?, &self.keys(&p, rope)?, &p.v.contiguous()?)
    }

    /// Keys and values of another sequence, without rotation, ready to be attended to. `alike`: so many tokens at its end
    /// are the same, and may count as one.
    fn foreign(&self, y: &Tensor, alike: usize) -> Result<Words> {
        let known = y.dim(0)?.saturating_sub(alike);
        let fold = alike > 0 && Folded::pays(&self.o, known, self.heads);
        let y = if fold { &y.narrow(0, 0, known + 1)? } else { y };
        let kv = match &self.inputs {
            Inputs::Apart { k, v, .. } => {
                KeysValues { k: norm::rms_norm(&k.forward(y)?, &self.norm_k, self.eps)?, v: v.forward(y)? }
            }
            Inputs::Stacked(_) => self.kept(&self.project(&Rows::Plain(y.clone()))?)?,
        };
        if fold {
            let folded = Folded::new(&self.o, &kv.k, &kv.v, alike, &self.norm_q, self.heads, self.eps)?;
            return Ok(Words::Folded(folded));
        }
        if !self.fp8 {
            return Ok(Words::Kept(Memory::of(kv.k, kv.v)));
        }
        let memory = self.memory(&kv, kv.k.dims2()?, 1.0)?;
        memory.place(&kv.k, &kv.v)?;
        Ok(Words::Kept(memory))
    }

    /// What the text tells the tokens, and the projection that it goes through.
    fn across<'a>(&'a self, y: &Rows, words: &'a Words) -> Result<(&'a Linear, Rows)> {
        let q = match &self.inputs {
            Inputs::Apart { q, .. } => q.forward_rows(y, Activation::None)?,
            Inputs::Stacked(_) => self.project(y)?.q,
        };
        let text = match words {
            Words::Folded(folded) => return Ok((folded.product(), folded.weights(&q)?)),
            Words::Kept(text) => text,
        };
        let q = text.queries(&q, &self.norm_q, self.eps)?;
        Ok((&self.o, text.attend(&q, self.heads, None)?))
    }
}

/// A block: self-attention, text attention where there is text, feed-forward.
#[derive(Debug)]
pub struct Block {
    /// Self-attention.
    pub own: Attention,
    text: Option<(Affine, Attention)>,
    first: Linear,
    second: Linear,
    modulation: Tensor,
    eps: f64,
}

impl Block {
    /// Block at `weights` (`blocks.i`).
    pub fn load(weights: &Weights, c: &Config) -> Result<Self> {
        let text = if c.text_len > 0 {
            let norm = weights.pp("norm3").with_dtype(DType::F32);
            let row = |name| -> Result<Tensor> { Ok(norm.get(c.dim, name)?.reshape((1, c.dim))?) };
            let attention = Attention::load(&weights.pp("cross_attn"), c, false)?;
            Some((before(Affine::new(row("weight")?, row("bias")?), attention.reader())?, attention))
        } else {
            None
        };
        Ok(Self {
            own: Attention::load(&weights.pp("self_attn"), c, true)?,
            text,
            first: {
                let first = weights.with_fp8(Fp8::Off).linear("ffn.0", c.dim, c.ffn_dim, true)?;
                if weights.fp8() == Fp8::Off { first } else { first.evenly_scaled()? }
            },
            second: weights.linear("ffn.2", c.ffn_dim, c.dim, true)?,
            modulation: weights.with_dtype(DType::F32).get((1, 6, c.dim), "modulation")?.reshape((6, c.dim))?,
            eps: c.eps,
        })
    }

    /// The block's modulation for `e0` `[runs, 6, dim]`.
    pub fn modulation(&self, e0: &Tensor) -> Result<BlockModulation> {
        let m = BlockModulation::new(&self.modulation.to_device(e0.device())?, e0)?;
        let gated = [self.own.o.gated(&m.attention_gate)?, self.second.gated(&m.feed_forward_gate)?];
        let feed_forward = before(m.feed_forward, &self.first)?;
        let hidden = if self.second.form() == Form::Scaled { self.first.unit_after(&feed_forward)? } else { None };
        Ok(BlockModulation { attention: before(m.attention, self.own.reader())?, feed_forward, gated, hidden, ..m })
    }

    /// The text for this block, from embedded text `[tokens, dim]`; none where there is no text. `alike`: so many tokens
    /// at its end are the same and may count as one; 0 = each is looked at.
    pub fn text(&self, embedded: &Tensor, alike: usize) -> Result<Option<Words>> {
        self.text.as_ref().map(|(_, a)| a.foreign(embedded, alike)).transpose()
    }

    /// The tokens of `x` `[tokens, dim]` through the block. `attend` is given the modulated input and returns the
    /// self-attention's result before its output projection: the three forms (whole sequence, prefill, ring) differ only
    /// there.
    pub fn forward(
        &self,
        x: &mut Residual,
        m: &BlockModulation,
        runs: &[usize],
        text: Option<&Words>,
        trace: &mut Trace,
        attend: impl FnOnce(&Attention, &Rows) -> Result<Rows>,
    ) -> Result<()> {
        // Who looks sees what is added; else the product that makes it may add it.
        type Gate<'a> = (&'a Tensor, &'a Option<Gated>);
        let add = |x: &mut Residual, name, o: &Linear, y: &Rows, gate: Option<Gate>, trace: &mut Trace| {
            let (gate, gated) = (gate.map(|g| (g.0, runs)), gate.and_then(|g| g.1.as_ref()));
            if !trace.on() {
                return x.add_through(o, y, gate, gated);
            }
            let y = o.forward_rows(y, Activation::None)?;
            trace.see(name, &y);
            x.add(y, gate)
        };
        let [attention_gated, feed_forward_gated] = &m.gated;
        let y = attend(&self.own, &x.norm(&m.attention, runs, self.eps, self.own.form())?)?;
        add(x, "self_attn", &self.own.o, &y, Some((&m.attention_gate, attention_gated)), trace)?;
        match (&self.text, text) {
            (Some((affine, attention)), Some(text)) => {
                let y = x.norm(affine, &[x.rows()], self.eps, attention.form())?;
                if trace.on() {
                    trace.see("norm3", &y.plain()?);
                }
                let (o, y) = attention.across(&y, text)?;
                add(x, "cross_attn", o, &y, None, trace)?;
            }
            (Some(_), None) => return Err(Error::Input("this model needs a text; none was given".into())),
            (None, _) => {}
        }
        let y = x.norm(&m.feed_forward, runs, self.eps, self.first.form())?;
        let y = self.first.forward_to_gelu(&y, self.second.form(), m.hidden.as_ref())?;
        add(x, "ffn", &self.second, &y, Some((&m.feed_forward_gate, feed_forward_gated)), trace)
    }
}

/// A norm before `reader`: with a unit for its results, where that takes e4m3. Bounds of the rows are known.
fn before(norm: Affine, reader: &Linear) -> Result<Affine> {
    if reader.form() == Form::Scaled { norm.bounded() } else { Ok(norm) }
}

impl Portable for Block {
    fn moved(&self, device: &Device) -> Result<Self> {
        let text = self.text.as_ref().map(|(norm, a)| -> Result<_> { Ok((norm.moved(device)?, a.moved(device)?)) });
        Ok(Self {
            own: self.own.moved(device)?,
            text: text.transpose()?,
            first: self.first.moved(device)?,
            second: self.second.moved(device)?,
            modulation: self.modulation.to_device(device)?,
            eps: self.eps,
        })
    }
}

/// The last layer: tokens to patches of latents.
#[derive(Debug)]
pub struct Head {
    head: Linear,
    gate: Option<Linear>,
    modulation: Tensor,
    eps: f64,
    patch: [usize; 3],
    channels: usize,
}

impl Head {
    /// Official key names below `head`, and `head.gate` where the configuration has one.
    pub fn load(weights: &Weights, c: &Config) -> Result<Self> {
        let at = weights.pp("head").with_dtype(DType::F32);
        let boxes = c.patch.iter().product::<usize>();
        Ok(Self {
            head: at.linear("head", c.dim, boxes * c.out_dim, true)?,
            gate: if c.reference_gate { Some(at.linear("gate", c.dim, c.out_dim, true)?) } else { None },
            modulation: at.get((1, 2, c.dim), "modulation")?.reshape((2, c.dim))?,
            eps: c.eps,
            patch: c.patch,
            channels: c.out_dim,
        })
    }

    /// From `e` `[runs, dim]`.
    pub fn modulation(&self, e: &Tensor) -> Result<Affine> {
        let row = |i: usize| self.modulation.narrow(0, i, 1);
        Ok(Affine::new((e.broadcast_add(&row(1)?)? + 1.0)?, e.broadcast_add(&row(0)?)?))
    }

    /// `x` `[frames · gh · gw, dim]` → patches `[tokens, kh · kw · channels]`, channel fastest. `reference` is the
    /// reference latent in the same form ([`Head::patches`]), for the gate.
    pub fn forward(&self, x: &Tensor, affine: &Affine, runs: &[usize], reference: Option<&Tensor>) -> Result<Tensor> {
        let y = norm::layer_norm(x, affine, runs, self.eps)?;
        let out = self.head.forward(&y)?;
        let (Some(gate), Some(reference)) = (&self.gate, reference) else { return Ok(out) };
        let (tokens, width) = out.dims2()?;
        let gate = gate.forward(&y)?.reshape((tokens, 1, self.channels))?;
        let shape = (tokens, width / self.channels, self.channels);
        let added = reference.reshape(shape)?.broadcast_mul(&gate)?;
        Ok((out.reshape(shape)? + added)?.reshape((tokens, width))?)
    }

    /// Patches → latent `[channels, frames, h, w]`.
    pub fn unpatch(&self, x: &Tensor, frames: usize, gh: usize, gw: usize) -> Result<Tensor> {
        let ([_, kh, kw], c) = (self.patch, self.channels);
        let x = x.reshape(vec![frames, gh, gw, kh, kw, c])?.permute(vec![5, 0, 1, 3, 2, 4])?;
        Ok(x.contiguous()?.reshape((c, frames, gh * kh, gw * kw))?)
    }

    /// Latent `[channels, frames, h, w]` → patches, the inverse of [`Head::unpatch`].
    pub fn patches(&self, x: &Tensor) -> Result<Tensor> {
        let ([_, kh, kw], (c, frames, h, w)) = (self.patch, x.dims4()?);
        let (gh, gw) = (h / kh, w / kw);
        let x = x.reshape(vec![c, frames, gh, kh, gw, kw])?.permute(vec![1, 2, 4, 3, 5, 0])?;
        Ok(x.contiguous()?.reshape((frames * gh * gw, kh * kw * c))?)
    }
}
