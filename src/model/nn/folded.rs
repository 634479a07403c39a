//! Attention to keys and values that are known before the queries come, and its output projection, in one product.
//!
//! The projection is linear: what it makes of a mean of values is the mean of what it makes of each value. With `P` the
//! softmax weights of all heads side by side, `o(P V) = P · o(V)`, where `o(V)` has a row per head and value: what `o` makes
//! of the value's channels in that head. It is made once, and a use computes the weights and a product of
//! `heads · keys` columns instead of an attention and one of `dim` columns. The same numbers up to rounding.
//!
//! Keys that are all alike (a text's padding) count as one, with the logarithm of their number added to its score. A head's
//! weights sum to one, so that one's value can be taken from all the others and added as a constant: the product needs no
//! column for it, and its weight, often the largest, is not rounded.

use candle_core::{D, DType, Tensor};

use super::{Form, Linear, Matrix, Numbers, Rows};
use crate::model::{Error, Result};

/// Columns of a head come in so many: what a product in e4m3 wants, and what the kernel of a card computes at once.
const STEP: usize = 16;

/// The largest part of the output projection's columns that is worth it: softmax weights cost a little, too.
const MOST: f64 = 0.8;
/// The same where it is made anew with each block of latent frames, and zeros for the most part.
const MOST_OF_FEW: f64 = 0.25;

/// Known keys and values, and the output projection.
#[derive(Debug, Clone)]
pub struct Folded {
    /// `[keys, dim]`, with the weight of the queries' RMS norm in them; on a card as its kernel reads them.
    keys: Tensor,
    /// Of `groups` equal parts of the queries each sees `count` keys of its own.
    groups: usize,
    count: usize,
    /// Added to the score of the last of them.
    last: f32,
    out: Linear,
    /// Of `out`, per head.
    columns: usize,
    heads: usize,
    eps: f64,
}

impl Folded {
    /// Whether this form is right, and pays, for a text of `known` tokens that differ and others that do not.
    pub fn pays(o: &Linear, known: usize, heads: usize) -> bool {
        known > 0 && fits(o, known + 1, heads, heads * known.next_multiple_of(STEP), MOST)
    }

    /// The same for so many keys that are made anew with each block of latent frames.
    pub fn pays_for_few(o: &Linear, keys: usize, heads: usize) -> bool {
        keys > 0 && fits(o, keys, heads, heads * keys.next_multiple_of(STEP), MOST_OF_FEW)
    }

    /// Keys `[n + 1, dim]`, normed, and values; the last one stands for `alike` of them. `weight`: of the RMS norm of the
    /// queries. `o`: the output projection.
    ///
    /// # Errors
    /// Tensors that do not fit; fewer than two keys.
    pub fn new(
        o: &Linear,
        k: &Tensor,
        v: &Tensor,
        alike: usize,
        weight: &Tensor,
        heads: usize,
        eps: f64,
    ) -> Result<Self> {
        let all = k.dim(0)?;
        if all < 2 || alike == 0 || v.dims() != k.dims() || o.width() != k.dim(1)? {
            return Err(Error::Input(format!(
                "keys {:?} and values {:?}, the last one {alike} times, before {o:?}",
                k.dims(),
                v.dims()
            )));
        }
        let n = all - 1;
        let last = v.narrow(0, n, 1)?;
        let out = through(o, &v.narrow(0, 0, n)?.broadcast_sub(&last)?, heads, Some(o.forward(&last)?.flatten_all()?))?;
        let keys = laid(k, weight)?;
        Ok(Self {
            keys,
            groups: 1,
            count: all,
            last: (alike as f32).ln(),
            columns: out.width() / heads,
            out,
            heads,
            eps,
        })
    }

    /// Keys `[groups · count, dim]`, normed, and values, each for one of `groups` equal parts of the queries.
    ///
    /// # Errors
    /// Tensors that do not fit.
    pub fn grouped(
        o: &Linear,
        k: &Tensor,
        v: &Tensor,
        groups: usize,
        weight: &Tensor,
        heads: usize,
        eps: f64,
    ) -> Result<Self> {
        let all = k.dim(0)?;
        if all == 0 || groups == 0 || all % groups != 0 || v.dims() != k.dims() || o.width() != k.dim(1)? {
            return Err(Error::Input(format!(
                "keys {:?} and values {:?} for {groups} groups before {o:?}",
                k.dims(),
                v.dims()
            )));
        }
        let out = through(o, v, heads, o.bias().cloned())?;
        let (keys, count, columns) = (laid(k, weight)?, all / groups, out.width() / heads);
        Ok(Self { keys, groups, count, last: 0.0, columns, out, heads, eps })
    }

    /// Queries `[rows, dim]`, before their RMS norm → what each value weighs, `[rows, heads · columns]`, for
    /// [`Folded::product`].
    pub fn weights(&self, q: &Tensor) -> Result<Rows> {
        let rows = q.dim(0)?;
        if rows == 0 || rows % self.groups != 0 {
            return Err(Error::Input(format!("{rows} queries cannot belong to {} groups", self.groups)));
        }
        #[cfg(feature = "cuda")]
        if q.device().is_cuda() {
            use crate::model::kernels::cuda::weights::{Seen, over};
            let seen = Seen { groups: self.groups, count: self.count, last: self.last };
            let fp8 = self.out.form() == Form::Scaled;
            let (y, units) = over(&q.contiguous()?, &self.keys, seen, self.columns, self.eps, fp8)?;
            return Ok(match units {
                Some(units) => Rows::Scaled { stored: y, units },
                None => Rows::Plain(y),
            });
        }
        let (own, unit) = (rows / self.groups, unit(q, self.eps)?);
        let part = |g: usize| -> Result<Tensor> {
            let (from, to) = (g * self.count, (g + 1) * self.count);
            let bias = (0..self.keys.dims()[0]).map(|i| match i {
                _ if i < from || i >= to => f32::NEG_INFINITY,
                _ if i + 1 == to => self.last,
                _ => 0.0,
            });
            let bias = Tensor::from_iter(bias, q.device())?;
            let p = softmax_weights(&unit.narrow(0, g * own, own)?, &self.keys, &bias, self.heads)?;
            Ok(p.narrow(2, 0, self.columns)?.contiguous()?.reshape((own, self.heads * self.columns))?)
        };
        let parts: Result<Vec<Tensor>> = (0..self.groups).map(part).collect();
        Ok(Rows::Plain(Tensor::cat(&parts?, 0)?.to_dtype(q.dtype())?))
    }

    /// What the weights go through in place of the output projection.
    pub fn product(&self) -> &Linear {
        &self.out
    }

    /// What a recorded graph reads of it.
    pub fn tensors(&self) -> Vec<&Tensor> {
        let numbers = match self.out.matrix().numbers() {
            Numbers::Dense(weight) => vec![weight],
            Numbers::Float8 { values, scale } => vec![values, scale],
            // Not made here.
            Numbers::Coded { .. } | Numbers::Blocks(_) => Vec::new(),
        };
        std::iter::once(&self.keys).chain(numbers).collect()
    }

    /// The same in memory of its own.
    pub fn copy(&self) -> Result<Self> {
        let numbers = match self.out.matrix().numbers() {
            Numbers::Dense(weight) => Numbers::Dense(weight.copy()?),
            Numbers::Float8 { values, scale } => Numbers::Float8 { values: values.copy()?, scale: scale.copy()? },
            other => other.clone(),
        };
        let matrix = Matrix::new(numbers, Vec::new(), self.out.matrix().dtype())?;
        Ok(Self { keys: self.keys.copy()?, out: Linear::of(matrix, self.out.bias().cloned())?, ..*self })
    }
}

/// Whether a product of so many columns in place of `o`'s own is right here: not on a card in other types and sizes than its
/// kernel knows, and not for numbers that are kept small (ggml blocks, e4m3 that is not multiplied as it is) where it would
/// be kept large. `most`: the part of `o`'s size that it may have.
fn fits(o: &Linear, keys: usize, heads: usize, columns: usize, most: f64) -> bool {
    #[cfg(feature = "cuda")]
    if o.device().is_cuda() {
        use crate::model::kernels::cuda::weights;
        let kept = matches!(o.matrix().numbers(), Numbers::Dense(_) | Numbers::Float8 { .. });
        let known = o.matrix().dtype() == DType::BF16 && o.width() == heads * weights::HEAD && keys <= weights::MOST;
        if !kept || !known {
            return false;
        }
    }
    let _ = (keys, heads);
    columns as f64 <= most * o.width() as f64
}

/// Keys with `weight` in them, and zeros up to a multiple of 16.
fn laid(k: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let n = k.dim(0)?;
    let keys = k.broadcast_mul(&weight.to_dtype(k.dtype())?)?.pad_with_zeros(0, 0, n.next_multiple_of(STEP) - n)?;
    #[cfg(feature = "cuda")]
    if keys.device().is_cuda() {
        return crate::model::kernels::cuda::weights::fragments(&keys);
    }
    Ok(keys)
}

/// `o` of each of `values` `[n, dim]` in each head as a matrix `[dim, heads · columns]`; zeros behind the last value of a
/// head, up to a multiple of 16. In the form of `o`.
fn through(o: &Linear, values: &Tensor, heads: usize, bias: Option<Tensor>) -> Result<Linear> {
    let n = values.dim(0)?;
    let values = values.pad_with_zeros(0, 0, n.next_multiple_of(STEP) - n)?;
    let made = Linear::new(o.columns(&heads_apart(&values, heads)?)?, bias)?;
    if o.form() == Form::Scaled { made.scaled() } else { Ok(made) }
}

fn heads_apart(values: &Tensor, heads: usize) -> Result<Tensor> {
    let (n, dim) = values.dims2()?;
    if heads == 0 || dim % heads != 0 {
        return Err(Error::Input(format!("values {:?} cannot be {heads} heads", values.dims())));
    }
    #[cfg(feature = "cuda")]
    if values.device().is_cuda() && values.dtype() == DType::BF16 {
        return crate::model::kernels::cuda::weights::heads_apart(&values.contiguous()?, heads);
    }
    // Not by `Tensor::eye`: it compares, and candle's comparisons of all types would be 200 kB of the program.
    let own = (0..heads * heads).map(|i| f32::from(u8::from(i % (heads + 1) == 0))).collect();
    let own = Tensor::from_vec(own, (heads, 1, heads, 1), values.device())?.to_dtype(values.dtype())?;
    let values = values.reshape((1, n, heads, dim / heads))?.broadcast_mul(&own)?;
    Ok(values.reshape((n * heads, dim))?)
}

/// Rows divided by their root mean square, f32.
fn unit(x: &Tensor, eps: f64) -> Result<Tensor> {
    let x = x.to_dtype(DType::F32)?;
    Ok(x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?)?)
}

/// Softmax weights of ready queries `[rows, dim]` (f32), `[rows, heads, keys]`; `bias` `[keys]` is added to the scores.
fn softmax_weights(q: &Tensor, k: &Tensor, bias: &Tensor, heads: usize) -> Result<Tensor> {
    let head = q.dim(1)? / heads;
    let split = |t: &Tensor| -> candle_core::Result<Tensor> {
        t.to_dtype(DType::F32)?.contiguous()?.reshape((t.dim(0)?, heads, head))?.transpose(0, 1)?.contiguous()
    };
    let scores = (split(q)?.matmul(&split(k)?.transpose(1, 2)?.contiguous()?)? / (head as f64).sqrt())?;
    let scores = scores.broadcast_add(bias)?;
    let p = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    Ok(p.broadcast_div(&p.sum_keepdim(D::Minus1)?)?.transpose(0, 1)?.contiguous()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::nn::{Activation, attention, attention_to_few, norm};
    use candle_core::Device;

    fn random(shape: &[usize], deviation: f32) -> Tensor {
        Tensor::randn(0f32, deviation, shape, &Device::Cpu).unwrap()
    }

    fn apart(a: &Tensor, b: &Tensor) -> f32 {
        let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        assert_eq!(a.dims(), b.dims());
        norm(&(a - b).unwrap()) / norm(b)
    }

    fn projection(dim: usize) -> Linear {
        Linear::new(random(&[dim, dim], (dim as f32).sqrt().recip()), Some(random(&[dim], 0.5))).unwrap()
    }

    #[test]
    fn keys_that_are_alike_count_as_one() {
        for (heads, head, rows, n, alike) in
            [(1, 64, 1, 1, 1), (3, 32, 7, 5, 3), (2, 64, 19, 16, 40), (4, 64, 5, 40, 472)]
        {
            let dim = heads * head;
            let (o, weight) = (projection(dim), random(&[dim], 1.0));
            let (q, k, v) = (random(&[rows, dim], 2.0), random(&[n + 1, dim], 1.0), random(&[n + 1, dim], 1.0));
            let all = |t: &Tensor| {
                let last = t.narrow(0, n, 1).unwrap().broadcast_as((alike - 1, dim)).unwrap();
                if alike == 1 { t.clone() } else { Tensor::cat(&[t, &last.contiguous().unwrap()], 0).unwrap() }
            };
            let normed = norm::rms_norm(&q, &weight, 1e-6).unwrap();
            let want = o.forward(&attention(&normed, &all(&k), &all(&v), heads, 1).unwrap()).unwrap();
            let folded = Folded::new(&o, &k, &v, alike, &weight, heads, 1e-6).unwrap();
            let got = folded.product().forward_rows(&folded.weights(&q).unwrap(), Activation::None).unwrap();
            let error = apart(&got, &want);
            assert!(error < 1e-5, "{heads}·{head}, {n} and {alike}: {error}");
        }
        let (o, k) = (projection(32), random(&[2, 32], 1.0));
        assert!(Folded::new(&o, &k, &k, 0, &k.get(0).unwrap(), 2, 1e-6).is_err(), "nothing is alike");
        assert!(Folded::pays(&o, 12, 1) && !Folded::pays(&o, 17, 1) && !Folded::pays(&o, 0, 1));
    }

    #[test]
    fn every_group_sees_its_own_keys() {
        for (groups, n, count, heads, head) in [(1, 1, 1, 1, 64), (3, 11, 5, 2, 64), (2, 5, 4, 4, 40)] {
            let dim = heads * head;
            let (o, weight) = (projection(dim), random(&[dim], 1.0));
            let (q, k) = (random(&[groups * n, dim], 2.0), random(&[groups * count, dim], 1.0));
            let v = random(&[groups * count, dim], 1.0);
            let plain = Form::Plain(DType::F32);
            let attended = attention_to_few(&q, &weight, &k, &v, heads, groups, 1e-6, plain).unwrap();
            let want = o.forward_rows(&attended, Activation::None).unwrap();
            let folded = Folded::grouped(&o, &k, &v, groups, &weight, heads, 1e-6).unwrap();
            let copy = folded.copy().unwrap();
            for (a, b) in folded.tensors().into_iter().zip(copy.tensors()) {
                assert!(a.id() != b.id() && a.to_vec2::<f32>().unwrap() == b.to_vec2::<f32>().unwrap());
            }
            let got = copy.product().forward_rows(&copy.weights(&q).unwrap(), Activation::None).unwrap();
            let error = apart(&got, &want);
            assert!(error < 1e-5, "{groups}·{n} over {count}, {heads}·{head}: {error}");
            assert!(groups == 1 || copy.weights(&q.narrow(0, 1, groups * n - 1).unwrap()).is_err(), "half a group");
        }
        let o = projection(256);
        assert!(Folded::pays_for_few(&o, 15, 4) && !Folded::pays_for_few(&o, 17, 4) && !Folded::pays_for_few(&o, 0, 1));
        let k = random(&[5, 256], 1.0);
        assert!(Folded::grouped(&o, &k, &k, 2, &k.get(0).unwrap(), 4, 1e-6).is_err(), "5 keys for 2 groups");
    }
}
