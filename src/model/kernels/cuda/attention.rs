//! Attention by cuDNN, and on Hopper by kernels of our own: e4m3 with transposed values (`attention90.cu`), bf16
//! (`attention16.cu`).

use std::ffi::c_void;

use candle_core::{DType, Device, Tensor};

use super::{address, context, empty, kind, launched, rows_address};
use crate::model::{Error, Result};

unsafe extern "C" {
    fn lq_attention_plan(
        handle: *mut c_void,
        fp8: i32,
        masked: i32,
        batch: i64,
        heads: i64,
        queries: i64,
        keys: i64,
        width: i64,
        scale: f32,
    ) -> *mut c_void;
    fn lq_attention90(
        q: u64,
        k: u64,
        v: u64,
        mean: u64,
        factors: u64,
        out: u64,
        queries: i32,
        room: i32,
        heads: i32,
        keys: u64,
        parts: u64,
        bytes: u64,
        stream: *mut c_void,
    ) -> i32;
    fn lq_attention16(
        q: u64,
        q_stride: i32,
        k: u64,
        k_stride: i32,
        v: u64,
        v_stride: i32,
        out: u64,
        queries: i32,
        room: i32,
        heads: i32,
        keys: u64,
        parts: u64,
        bytes: u64,
        stream: *mut c_void,
    ) -> i32;
    fn lq_store_transposed(
        kind: i32,
        v: u64,
        stride: i32,
        out: u64,
        room: i32,
        offset: u64,
        row: i32,
        unit: u64,
        mean: u64,
        rows: i32,
        width: i32,
        stream: *mut c_void,
    ) -> i32;
}

/// What stored units are worth when attention runs in e4m3. All on the card; a recorded graph reads them when it runs.
#[derive(Debug, Clone)]
pub struct Units {
    /// f32 `[8]`: a query's unit, a key's, a value's, a softmax value's, its inverse, what the result is multiplied by,
    /// and two places where cuDNN leaves the largest values it saw.
    pub table: Tensor,
}

/// e4m3's largest value: softmax values lie in 0…1 and are stretched over the whole range.
const LARGEST: f32 = 448.0;

impl Units {
    /// Queries and keys come from an RMS norm and are stored as they are; a value's unit is `value` (f32, one element).
    /// The result is a mean of values, so it is stored in the values' unit.
    pub fn new(value: &Tensor) -> Result<Self> {
        let device = value.device();
        let value = value.reshape(1)?;
        let fixed = |v: &[f32]| Tensor::new(v, device);
        let parts = [
            fixed(&[1.0, 1.0])?,
            value.clone(),
            fixed(&[1.0 / LARGEST, LARGEST])?,
            value.recip()?,
            fixed(&[0.0, 0.0])?,
        ];
        Ok(Self { table: Tensor::cat(&parts, 0)?.contiguous()? })
    }

    /// Where a value's unit stands.
    pub(crate) fn value(&self) -> Result<u64> {
        Ok(address(&self.table)? + 8)
    }
}

/// Queries `[batch · a, dim]` over keys and values `[batch · b, dim]`, heads side by side; like the queries.
///
/// `units`: operands and result are e4m3 bytes. `valid`: u32 `[2, batch]` on the card, how many queries and how many
/// keys of each group count; the others are not looked at.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    batch: usize,
    valid: Option<&Tensor>,
    units: Option<&Units>,
) -> Result<Tensor> {
    let ((queries, dim), (keys, _)) = (q.dims2()?, k.dims2()?);
    let dtype = if units.is_some() { DType::F8E4M3 } else { DType::BF16 };
    if [q, k, v].iter().any(|t| t.dtype() != dtype) || k.dims() != v.dims() || k.dim(1)? != dim {
        return Err(Error::Input(format!(
            "attention of {:?} {:?} over {:?} {:?}",
            q.dims(),
            q.dtype(),
            k.dims(),
            k.dtype()
        )));
    }
    let c = context(q.device())?;
    let width = dim / heads;
    if units.is_none() && keys / batch >= MANY && has_own(q.device(), width)? {
        return attention_rows(q, k, v, heads, batch, valid);
    }
    let numbers = [batch, heads, queries / batch, keys / batch, width].map(|n| n as i64);
    let [b, h, nq, nk, w] = numbers;
    let (fp8, masked) = (i32::from(units.is_some()), i32::from(valid.is_some()));
    let key = ("attention", [&[i64::from(fp8), i64::from(masked)], &numbers[..]].concat());
    let plan = c.plan(key, |handle| {
        // SAFETY: the handle is live; everything else is a number.
        unsafe { lq_attention_plan(handle, fp8, masked, b, h, nq, nk, w, 1.0 / (width as f32).sqrt()) }
    })?;
    let out = empty(q.device(), (queries, dim), dtype)?;
    let mut operands = vec![(1, address(q)?), (2, address(k)?), (3, address(v)?), (4, address(&out)?)];
    if let Some(valid) = valid {
        let at = address(valid)?;
        operands.extend([(5, at), (6, at + 4 * batch as u64)]);
    }
    if let Some(units) = units {
        let at = address(&units.table)?;
        operands.extend((0..8).map(|i| (7 + i as i64, at + 4 * i)));
    }
    c.run(&plan, &operands)?;
    Ok(out)
}

/// Keys from which on [`attention_rows`] runs where it can; fewer are left to cuDNN.
const MANY: usize = 1024;

/// Whether [`attention_rows`] and [`attention_transposed`] run on this card with heads of this width: Hopper, 128.
pub fn has_own(device: &Device, head: usize) -> Result<bool> {
    Ok(head == 128 && context(device)?.capability == (9, 0))
}

/// [`attention`] in bf16 by the kernel of our own; rows may stand apart. Of `valid` only the numbers of keys are looked at;
/// keys and values behind them are read, and must not be NaN.
pub fn attention_rows(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    batch: usize,
    valid: Option<&Tensor>,
) -> Result<Tensor> {
    let ((queries, dim), (keys, width)) = (q.dims2()?, k.dims2()?);
    let even = batch > 0 && queries % batch == 0 && keys % batch == 0 && queries >= batch && keys >= batch;
    let fit = even && dim == heads * 128 && width == dim && v.dims() == k.dims();
    let bf16 = [q, k, v].iter().all(|t| t.dtype() == DType::BF16);
    if !fit || !bf16 || valid.is_some_and(|t| t.dims().iter().product::<usize>() != 2 * batch) {
        return Err(Error::Input(format!(
            "attention of {:?} {:?} with {heads} heads over keys {:?} and values {:?} in {batch} groups",
            q.dims(),
            q.dtype(),
            k.dims(),
            v.dims()
        )));
    }
    let c = context(q.device())?;
    let out = empty(q.device(), (queries, dim), DType::BF16)?;
    let (rows, room) = (queries / batch, keys / batch);
    let [(q, from_q), (k, from_k), (v, from_v)] = [rows_address(q)?, rows_address(k)?, rows_address(v)?];
    let at = |first: u64, rows: usize, stride: usize| first + (rows * stride * 2) as u64;
    for group in 0..batch {
        let counted = valid.map_or(Ok(0), |t| Ok::<_, Error>(address(t)? + 4 * (batch + group) as u64))?;
        // SAFETY: shapes and types were checked, the number of keys is cut to what there is; the workspace is used in the
        // order of the stream.
        let status = unsafe {
            lq_attention16(
                at(q, group * rows, from_q),
                from_q as i32,
                at(k, group * room, from_k),
                from_k as i32,
                at(v, group * room, from_v),
                from_v as i32,
                at(address(&out)?, group * rows, dim),
                rows as i32,
                room as i32,
                heads as i32,
                counted,
                address(&c.workspace)?,
                c.workspace.elem_count() as u64,
                c.stream(),
            )
        };
        launched("attention", status)?;
    }
    Ok(out)
}

/// Queries `[n, dim]` over keys `[room, dim]` and values `[dim, room]` that [`store_transposed`] wrote, e4m3, heads of 128
/// side by side; like the queries, values in their unit. Room is a multiple of 16. `valid`: u32 `[2]` on the card, of which
/// the second says how many keys count, one at least; keys and values behind them are read, and must not be NaN. `centre`:
/// what was taken from the values when they were stored, and what each row of the result is multiplied by (f32 `[n]`).
pub fn attention_transposed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    valid: &Tensor,
    centre: Option<(&Tensor, &Tensor)>,
) -> Result<Tensor> {
    let ((queries, dim), (room, width)) = (q.dims2()?, k.dims2()?);
    let fit = dim == heads * 128 && width == dim && v.dims() == [dim, room] && room % 16 == 0;
    let (mean, factors) = centre.unzip();
    let fit = fit && vector(mean, dim) && vector(factors, queries);
    if !fit || [q, k, v].iter().any(|t| t.dtype() != DType::F8E4M3) || valid.dims() != [2] {
        return Err(Error::Input(format!(
            "attention of {:?} {:?} with {heads} heads over keys {:?} and transposed values {:?}",
            q.dims(),
            q.dtype(),
            k.dims(),
            v.dims()
        )));
    }
    let c = context(q.device())?;
    let out = empty(q.device(), (queries, dim), DType::F8E4M3)?;
    // SAFETY: shapes and types were checked, the number of keys is cut to what there is; the workspace is used in the order
    // of the stream.
    let status = unsafe {
        lq_attention90(
            address(q)?,
            address(k)?,
            address(v)?,
            mean.map_or(Ok(0), address)?,
            factors.map_or(Ok(0), address)?,
            address(&out)?,
            queries as i32,
            room as i32,
            heads as i32,
            address(valid)? + 4,
            address(&c.workspace)?,
            c.workspace.elem_count() as u64,
            c.stream(),
        )
    };
    launched("attention", status)?;
    Ok(out)
}

/// Whether these, if there are any, are `n` numbers in f32.
fn vector(x: Option<&Tensor>, n: usize) -> bool {
    x.is_none_or(|x| x.dims() == [n] && x.dtype() == DType::F32)
}

/// Stores values `[rows, width]` (rows may stand apart; bf16, or e4m3 in `units` already) as keys `row` (and what `offset`, a
/// u32 on the card, says when the kernel runs) and on of `out` `[width, room]`, e4m3 in `units`. The order within is that of
/// the copies and products of [`attention_transposed`]: by head, 16 keys, channel, and then keys, key 8h + 2c + b of the 16
/// at 4c + 2h + b. `mean`: what is taken from bf16 values first, f32 `[width]` in `units`.
pub fn store_transposed(
    v: &Tensor,
    out: &Tensor,
    offset: Option<&Tensor>,
    row: usize,
    units: &Units,
    mean: Option<&Tensor>,
) -> Result<()> {
    let ((rows, width), (target, room)) = (v.dims2()?, out.dims2()?);
    let (input, stride) = rows_address(v)?;
    let types = v.dtype() == DType::BF16 || (v.dtype() == DType::F8E4M3 && mean.is_none());
    let types = types && out.dtype() == DType::F8E4M3 && vector(mean, width);
    if !types || target != width || width % 128 != 0 || stride % 8 != 0 || room % 16 != 0 || row + rows > room {
        return Err(Error::Input(format!(
            "values {:?} {:?} from row {row} on, transposed into {:?}",
            v.dims(),
            v.dtype(),
            out.dims()
        )));
    }
    let c = context(v.device())?;
    // SAFETY: shapes and types were checked; that `offset` leaves the rows within the target is the caller's promise.
    let status = unsafe {
        lq_store_transposed(
            kind(v.dtype())?,
            input,
            stride as i32,
            address(out)?,
            room as i32,
            offset.map_or(Ok(0), address)?,
            row as i32,
            units.value()?,
            mean.map_or(Ok(0), address)?,
            rows as i32,
            width as i32,
            c.stream(),
        )
    };
    launched("transposed values", status)
}
