//! Attention to keys and values that are known before the queries come, and its output projection, in one product.
//!
//! The projection is linear: what it makes of a mean of values is the mean of what it makes of each value. With `P` the
//! softmax weights of all heads side by side, `o(P V) = P · o(V)`, where `o(V)` has a row per head and value: what `o` makes
//! of the value's channels in that head. It is made once, and a use computes the weights and a product of
//! `heads · keys` columns instead of an attention and one of `dim` columns. The same numbers up to rounding.
//!
//! Keys that are all alike ([`Folded`]: a text's padding) count as one, with the logarithm of their number added to its
//! score. A head's weights sum to one, so that one's value can be taken from all the others and added as a constant: the
//! product needs no column for it, and its weight, often the largest, is not rounded.

use candle_core::{D, DType, Tensor};

use super::{Form, Linear, Matrix, Numbers, Rows};
use crate::model::{Error, Result};

/// Columns of a product in e4m3 come in so many.
const STEP: usize = 16;

/// Columns that `keys` take in a product of `heads`.
fn columns(heads: usize, keys: usize) -> usize {
    (heads * keys).next_multiple_of(STEP)
}

/// Whether a product of so many columns in place of `o`'s own is right here: not on a card in other types than its kernels
/// know, and not for numbers that are kept small (ggml blocks, e4m3 that is not multiplied as it is) where it would be kept
/// large. `most`: the part of `o`'s size that it may have.
fn fits(o: &Linear, columns: usize, most: f64) -> bool {
    let kept = matches!(o.matrix().numbers(), Numbers::Dense(_) | Numbers::Float8 { .. });
    let card = !o.device().is_cpu();
    (!card || (kept && o.matrix().dtype() == DType::BF16)) && columns as f64 <= most * o.width() as f64
}

/// Softmax weights cost a little, so not for less than a fifth of a product.
const MOST_OF_TEXT: f64 = 0.8;
/// Made anew with each block of latent frames, and zeros for the most part.
const MOST_OF_FEW: f64 = 0.25;

/// `o` of each of `values` `[groups · count, dim]` in each head as a matrix `[dim, columns]`: column (group, head, value);
/// zeros behind the last, up to a multiple of 16. In the form of `o`.
fn through(o: &Linear, values: &Tensor, heads: usize, groups: usize, bias: Option<Tensor>) -> Result<Linear> {
    let made = o.columns(&heads_apart(values, heads, groups)?)?;
    let made = Linear::new(made, bias)?;
    if o.form() == Form::Scaled { made.scaled() } else { Ok(made) }
}

fn heads_apart(values: &Tensor, heads: usize, groups: usize) -> Result<Tensor> {
    let (n, dim) = values.dims2()?;
    if heads == 0 || groups == 0 || dim % heads != 0 || n % groups != 0 {
        return Err(Error::Input(format!("values {:?} of {heads} heads in {groups} groups", values.dims())));
    }
    let all = columns(heads, n);
    #[cfg(feature = "cuda")]
    if values.device().is_cuda() && values.dtype() == DType::BF16 && (dim / heads) % 8 == 0 {
        return crate::model::kernels::cuda::weights::heads_apart(&values.contiguous()?, heads, groups, all);
    }
    let own = Tensor::eye(heads, values.dtype(), values.device())?.reshape((1, heads, 1, heads, 1))?;
    let values = values.reshape((groups, 1, n / groups, heads, dim / heads))?.broadcast_mul(&own)?;
    Ok(values.reshape((n * heads, dim))?.pad_with_zeros(0, 0, all - n * heads)?)
}

/// Attention to a sequence that ends in keys that are all alike, and the output projection.
#[derive(Debug, Clone)]
pub struct Folded {
    /// `[keys, dim]`, with the weight of the queries' RMS norm in them; on a card as its kernel reads them.
    keys: Tensor,
    /// Added to the scores, f32 `[keys]`.
    bias: Tensor,
    out: Linear,
    /// Of `out`, per head.
    columns: usize,
    heads: usize,
    eps: f64,
}

impl Folded {
    /// Whether this form is right, and pays, for `keys` that differ and others that do not, before the projection `o`.
    pub fn pays(o: &Linear, keys: usize, heads: usize) -> bool {
        #[cfg(feature = "cuda")]
        {
            use crate::model::kernels::cuda::weights;
            let known = o.width() == heads * weights::HEAD && keys < weights::MOST;
            if o.device().is_cuda() && !known {
                return false;
            }
        }
        keys > 0 && fits(o, heads * keys.next_multiple_of(STEP), MOST_OF_TEXT)
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
        let (all, dim) = k.dims2()?;
        if all < 2 || alike == 0 || v.dims() != k.dims() || o.width() != dim || o.out() != dim {
            return Err(Error::Input(format!(
                "keys {:?} and values {:?}, the last one {alike} times, before {o:?}",
                k.dims(),
                v.dims()
            )));
        }
        let (n, device) = (all - 1, k.device());
        let (columns, room) = (n.next_multiple_of(STEP), all.next_multiple_of(STEP));
        let keys = k.to_dtype(DType::F32)?.broadcast_mul(&weight.to_dtype(DType::F32)?)?.to_dtype(k.dtype())?;
        let keys = keys.pad_with_zeros(0, 0, room - all)?;
        #[cfg(feature = "cuda")]
        let keys = if device.is_cuda() { crate::model::kernels::cuda::weights::fragments(&keys)? } else { keys };
        let bias: Vec<f32> = (0..room)
            .map(|i| match i {
                _ if i < n => 0.0,
                _ if i == n => (alike as f32).ln(),
                _ => f32::NEG_INFINITY,
            })
            .collect();
        let last = v.narrow(0, n, 1)?;
        let others = v.narrow(0, 0, n)?.broadcast_sub(&last)?.pad_with_zeros(0, 0, columns - n)?;
        let constant = o.forward(&last.contiguous()?)?.reshape(dim)?;
        let out = through(o, &others, heads, 1, Some(constant))?;
        Ok(Self { keys, bias: Tensor::from_vec(bias, room, device)?, out, columns, heads, eps })
    }

    /// Queries `[rows, dim]`, before their RMS norm → what each value weighs, `[rows, heads · columns]`.
    pub fn weights(&self, q: &Tensor) -> Result<Rows> {
        #[cfg(feature = "cuda")]
        if q.device().is_cuda() {
            let fp8 = self.out.form() == Form::Scaled;
            let over = crate::model::kernels::cuda::weights::over;
            let (y, units) = over(&q.contiguous()?, &self.keys, &self.bias, self.columns, self.eps, fp8)?;
            return Ok(match units {
                Some(units) => Rows::Scaled { stored: y, units },
                None => Rows::Plain(y),
            });
        }
        let p = softmax_weights(&unit(q, self.eps)?, &self.keys, Some(&self.bias), self.heads)?;
        let p = p.narrow(2, 0, self.columns)?.contiguous()?;
        Ok(Rows::Plain(p.reshape((q.dim(0)?, ()))?.to_dtype(q.dtype())?))
    }

    /// What the weights go through in place of the output projection.
    pub fn product(&self) -> &Linear {
        &self.out
    }
}

/// `o` of each of the few `values` `[groups · count, dim]` of every group, for [`weights_to_few`]; none where it would not
/// pay, or the kernels do not know it.
pub fn through_few(o: &Linear, values: &Tensor, heads: usize, groups: usize) -> Result<Option<Linear>> {
    let (n, dim) = values.dims2()?;
    #[cfg(feature = "cuda")]
    {
        use crate::model::kernels::cuda::rows;
        let head = dim / heads.max(1);
        let known = n <= groups * rows::FEW && rows::few_keys_takes(head) && columns(heads, n) <= rows::FEW_COLUMNS;
        if o.device().is_cuda() && !(known && rows::fits(dim, 1) && values.dtype() == DType::BF16) {
            return Ok(None);
        }
    }
    if o.width() != dim || !fits(o, columns(heads, n), MOST_OF_FEW) {
        return Ok(None);
    }
    through(o, values, heads, groups, o.bias().cloned()).map(Some)
}

/// Queries (before their RMS norm with `weight`) `[groups · a, dim]` over the few keys `[groups · count, dim]` of their
/// group: what each value weighs, in the columns of [`through_few`]; zeros where it is another group's.
pub fn weights_to_few(
    q: &Tensor,
    weight: &Tensor,
    k: &Tensor,
    heads: usize,
    groups: usize,
    eps: f64,
    form: Form,
) -> Result<Rows> {
    let ((rows, dim), (n, width)) = (q.dims2()?, k.dims2()?);
    if heads == 0 || groups == 0 || rows % groups != 0 || n % groups != 0 || n == 0 || width != dim {
        return Err(Error::Input(format!("weights of {:?} over the few keys {:?}", q.dims(), k.dims())));
    }
    let all = columns(heads, n);
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        let few = crate::model::kernels::cuda::rows::few_weights;
        let (y, units) =
            few(&q.contiguous()?, weight, &k.contiguous()?, heads, groups, all, eps, form == Form::Scaled)?;
        return Ok(match units {
            Some(units) => Rows::Scaled { stored: y, units },
            None => Rows::Plain(y),
        });
    }
    let _ = form;
    let (a, count) = (rows / groups, n / groups);
    let q = unit(q, eps)?.broadcast_mul(&weight.to_dtype(DType::F32)?)?;
    let part = |g: usize| -> Result<Tensor> {
        let p = softmax_weights(&q.narrow(0, g * a, a)?, &k.narrow(0, g * count, count)?, None, heads)?;
        let (own, before) = (heads * count, g * heads * count);
        Ok(p.reshape((a, own))?.pad_with_zeros(1, before, all - own - before)?)
    };
    let parts: Result<Vec<Tensor>> = (0..groups).map(part).collect();
    Ok(Rows::Plain(Tensor::cat(&parts?, 0)?.to_dtype(k.dtype())?))
}

/// Rows divided by their root mean square, f32.
fn unit(x: &Tensor, eps: f64) -> Result<Tensor> {
    let x = x.to_dtype(DType::F32)?;
    Ok(x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?)?)
}

/// Softmax weights of ready queries `[rows, dim]` (f32), `[rows, heads, keys]`.
fn softmax_weights(q: &Tensor, k: &Tensor, bias: Option<&Tensor>, heads: usize) -> Result<Tensor> {
    let head = q.dim(1)? / heads;
    let split = |t: &Tensor| -> candle_core::Result<Tensor> {
        t.to_dtype(DType::F32)?.contiguous()?.reshape((t.dim(0)?, heads, head))?.transpose(0, 1)?.contiguous()
    };
    let scores = (split(q)?.matmul(&split(k)?.transpose(1, 2)?.contiguous()?)? / (head as f64).sqrt())?;
    let scores = match bias {
        Some(bias) => scores.broadcast_add(bias)?,
        None => scores,
    };
    let p = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    Ok(p.broadcast_div(&p.sum_keepdim(D::Minus1)?)?.transpose(0, 1)?.contiguous()?)
}

/// What a recorded graph reads of such a matrix: it changes from block to block.
pub fn read_of(made: &Linear) -> Vec<&Tensor> {
    match made.matrix().numbers() {
        Numbers::Dense(weight) => vec![weight],
        Numbers::Float8 { values, scale } => vec![values, scale],
        Numbers::Coded { codes, scale, .. } => vec![codes, scale],
        Numbers::Blocks(_) => Vec::new(),
    }
}

/// The same matrix in memory of its own.
pub fn copy_of(made: &Linear) -> Result<Linear> {
    let numbers = match made.matrix().numbers() {
        Numbers::Dense(weight) => Numbers::Dense(weight.copy()?),
        Numbers::Float8 { values, scale } => Numbers::Float8 { values: values.copy()?, scale: scale.copy()? },
        other => other.clone(),
    };
    Linear::of(Matrix::new(numbers, Vec::new(), made.matrix().dtype())?, made.bias().cloned())
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
        assert!(Folded::pays(&o, 12, 1) && !Folded::pays(&o, 12, 2) && !Folded::pays(&o, 0, 1));
    }

    #[test]
    fn weights_of_few_keys_times_projected_values_are_their_attention() {
        for (groups, n, count, heads, head) in [(1, 1, 1, 1, 64), (3, 11, 5, 2, 64), (2, 5, 4, 4, 40)] {
            let dim = heads * head;
            let (o, weight) = (projection(dim), random(&[dim], 1.0));
            let (q, k) = (random(&[groups * n, dim], 2.0), random(&[groups * count, dim], 1.0));
            let v = random(&[groups * count, dim], 1.0);
            let plain = Form::Plain(DType::F32);
            let attended = attention_to_few(&q, &weight, &k, &v, heads, groups, 1e-6, plain).unwrap();
            let want = o.forward_rows(&attended, Activation::None).unwrap();
            let made = through_few(&o, &v, heads, groups).unwrap().expect("it pays");
            let p = weights_to_few(&q, &weight, &k, heads, groups, 1e-6, plain).unwrap();
            let error = apart(&made.forward_rows(&p, Activation::None).unwrap(), &want);
            assert!(error < 1e-5, "{groups}·{n} over {count}, {heads}·{head}: {error}");
            assert!(through_few(&o, &v, dim, groups).unwrap().is_none(), "more columns than pay");
            for (a, b) in read_of(&made).into_iter().zip(read_of(&copy_of(&made).unwrap())) {
                assert!(a.id() != b.id() && a.to_vec2::<f32>().unwrap() == b.to_vec2::<f32>().unwrap());
            }
        }
    }
}
