//! Scaled dot-product attention without a mask.

use candle_core::{D, DType, Device, Tensor};

use super::{Form, Rows, norm};
use crate::model::{Error, Result, kernels::dit_attention};

/// Queries `[groups · a, dim]`, keys and values `[groups · b, dim]`, heads side by side in the channels; every group
/// of queries sees only its own group of keys. Scale `1/√(dim/heads)`, softmax in f32. Result like the queries.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, groups: usize) -> Result<Tensor> {
    let ((rows, dim), (keys, width)) = (q.dims2()?, k.dims2()?);
    let bad =
        heads == 0 || groups == 0 || dim % heads.max(1) != 0 || rows % groups.max(1) != 0 || keys % groups.max(1) != 0;
    if bad || width != dim || v.dims() != k.dims() || keys == 0 {
        return Err(Error::Input(format!(
            "attention of queries {:?} over keys {:?}, values {:?} with {heads} heads in {groups} groups",
            q.dims(),
            k.dims(),
            v.dims()
        )));
    }
    if matches!(q.device(), Device::Cpu) && [q, k, v].iter().all(|t| t.dtype() == DType::F32) {
        return Ok(dit_attention::attention(&q.contiguous()?, &k.contiguous()?, &v.contiguous()?, heads, groups)?);
    }
    #[cfg(feature = "cuda")]
    if matches!(q.device(), Device::Cuda(_)) && q.dtype() == DType::BF16 && super::memory::cuda_takes(q, heads) {
        let like = |t: &Tensor| t.to_dtype(DType::BF16)?.contiguous();
        return crate::model::kernels::cuda::attention::attention(
            &like(q)?,
            &like(k)?,
            &like(v)?,
            heads,
            groups,
            None,
            None,
        );
    }
    plain(q, k, v, heads, groups)
}

/// Queries (before their RMS norm with `weight`) `[groups · a, dim]` over the few keys and values of their group, as
/// [`attention`]; the result in the form its reader wants.
#[allow(clippy::too_many_arguments)]
pub fn attention_to_few(
    q: &Tensor,
    weight: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    groups: usize,
    eps: f64,
    form: Form,
) -> Result<Rows> {
    #[cfg(feature = "cuda")]
    {
        use crate::model::kernels::cuda::rows;
        let bf16 = [q, weight, k, v].iter().all(|t| t.dtype() == DType::BF16);
        let few = k.dim(0)? <= groups * rows::FEW && rows::few_keys_takes(q.dim(1)? / heads.max(1));
        if matches!(q.device(), Device::Cuda(_)) && bf16 && few && rows::fits(q.dim(1)?, 1) {
            let like = |t: &Tensor| t.contiguous();
            let (y, units) =
                rows::few_keys(&like(q)?, weight, &like(k)?, &like(v)?, heads, groups, eps, form == Form::Scaled)?;
            return Ok(match units {
                Some(units) => Rows::Scaled { stored: y, units },
                None => Rows::Plain(y),
            });
        }
    }
    let y = attention(&norm::rms_norm(q, weight, eps)?, k, v, heads, groups)?;
    Ok(match form {
        Form::Plain(_) => Rows::Plain(y),
        Form::Scaled => super::linear::scaled(&y, false)?,
    })
}

/// The same in plain tensor operations: any device, any element type.
pub fn plain(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, groups: usize) -> Result<Tensor> {
    let (rows, dim) = q.dims2()?;
    let head = dim / heads;
    let split = |t: &Tensor| -> candle_core::Result<Tensor> {
        t.reshape((groups, t.dim(0)? / groups, heads, head))?.transpose(1, 2)?.contiguous()
    };
    let (qs, ks, vs) = (split(q)?, split(&k.to_dtype(q.dtype())?)?, split(&v.to_dtype(q.dtype())?)?);
    let scores = (qs.matmul(&ks.transpose(2, 3)?.contiguous()?)?.to_dtype(DType::F32)? * (1.0 / (head as f64).sqrt()))?;
    let scores = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let scores = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?.to_dtype(q.dtype())?;
    Ok(scores.matmul(&vs)?.transpose(1, 2)?.contiguous()?.reshape((rows, dim))?)
}
