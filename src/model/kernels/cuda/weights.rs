//! Doors to the kernels of `weights.cu`: what each of a few known keys weighs in attention.

use std::ffi::c_void;

use candle_core::{DType, Tensor};

use super::{address, context, empty, kind, launched};
use crate::model::{Error, Result};

unsafe extern "C" {
    fn lq_weights(
        out_kind: i32,
        q: u64,
        keys: u64,
        inverse: u64,
        out: u64,
        units: u64,
        rows: i32,
        heads: i32,
        groups: i32,
        count: i32,
        last: f32,
        pairs: i32,
        columns: i32,
        eps: f32,
        stream: *mut c_void,
    ) -> i32;
    fn lq_heads_apart(values: u64, out: u64, heads: i32, count: i32, width: i32, stream: *mut c_void) -> i32;
}

/// Keys come in so many.
pub const STEP: usize = 16;

/// Most keys that [`over`] takes: seven pairs of tiles in registers.
pub const MOST: usize = 7 * STEP;

/// Channels of a head.
pub const HEAD: usize = 128;

/// Keys `[keys, heads · 128]` (bf16, a multiple of 16) in the order in which the kernel's lanes read them.
pub fn fragments(keys: &Tensor) -> Result<Tensor> {
    let (n, width) = keys.dims2()?;
    if n % STEP != 0 || width % HEAD != 0 || n > MOST || keys.dtype() != DType::BF16 {
        return Err(Error::Input(format!("keys {:?} of {:?} do not fit the kernel", keys.dims(), keys.dtype())));
    }
    // Key 16 p + 4 c + 2 t + i, head, chunk of 32 channels → head, p, t, chunk, c, i.
    let keys = keys.reshape(vec![n / STEP, 4, 2, 2, width / HEAD, HEAD / 32, 32])?;
    Ok(keys.permute(vec![4, 0, 2, 5, 1, 3, 6])?.contiguous()?.reshape((n, width))?)
}

/// Which keys a query sees: of `groups` equal parts of the rows each sees `count` keys of its own, one part's keys after the
/// other's. `last` is added to the score of the last of them.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    pub groups: usize,
    pub count: usize,
    pub last: f32,
}

/// Softmax weights of queries `[rows, heads · 128]` (bf16, before an RMS norm whose weight is in the keys) over keys that
/// [`fragments`] laid. Of each head the first `columns` keys' weights (a multiple of 16), 0 where a key is not seen:
/// `[rows, heads · columns]`, bf16, or e4m3 with row scales if `fp8`.
pub fn over(
    q: &Tensor,
    keys: &Tensor,
    seen: Seen,
    columns: usize,
    eps: f64,
    fp8: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let ((rows, width), (n, key)) = (q.dims2()?, keys.dims2()?);
    let bf16 = q.dtype() == DType::BF16 && keys.dtype() == DType::BF16;
    let fits = width % HEAD == 0 && width == key && n % STEP == 0 && n <= MOST && columns <= n && columns % STEP == 0;
    let Seen { groups, count, last } = seen;
    let parts = groups > 0 && count > 0 && rows % groups == 0 && groups * count <= n;
    if !bf16 || !fits || rows == 0 || columns == 0 || !parts {
        return Err(Error::Input(format!(
            "weights of {:?} {:?} over {:?}, {columns} of them, {seen:?}",
            q.dims(),
            q.dtype(),
            keys.dims()
        )));
    }
    let (c, device, heads) = (context(q.device())?, q.device(), width / HEAD);
    let inverse = empty(device, rows, DType::F32)?;
    let out = empty(device, (rows, heads * columns), if fp8 { DType::F8E4M3 } else { DType::BF16 })?;
    let units = if fp8 { Some(empty(device, rows, DType::F32)?) } else { None };
    // SAFETY: shapes and types were checked.
    let status = unsafe {
        lq_weights(
            kind(out.dtype())?,
            address(q)?,
            address(keys)?,
            address(&inverse)?,
            address(&out)?,
            units.as_ref().map_or(Ok(0), address)?,
            rows as i32,
            heads as i32,
            groups as i32,
            count as i32,
            last,
            (n / STEP) as i32,
            columns as i32,
            eps as f32,
            c.stream(),
        )
    };
    launched("softmax weights", status)?;
    Ok((out, units))
}

/// Values `[count, heads · head]` (bf16) with one row per head and value: its channels in that head, zeros elsewhere;
/// `[heads · count, width]`.
pub fn heads_apart(values: &Tensor, heads: usize) -> Result<Tensor> {
    let (count, width) = values.dims2()?;
    if values.dtype() != DType::BF16 {
        return Err(Error::Input(format!("values {:?} of {:?} apart by heads", values.dims(), values.dtype())));
    }
    let c = context(values.device())?;
    let out = empty(values.device(), (heads * count, width), DType::BF16)?;
    // SAFETY: shapes and types were checked here and in the launcher.
    let status = unsafe {
        lq_heads_apart(address(values)?, address(&out)?, heads as i32, count as i32, width as i32, c.stream())
    };
    launched("values apart by heads", status)?;
    Ok(out)
}
