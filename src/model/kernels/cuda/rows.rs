//! Doors to the kernels of `rows.cu`.

use std::ffi::c_void;

use candle_core::{DType, Tensor};

use super::{address, attention::Units, context, empty, kind, launched, rows_address};
use crate::model::{Error, Result};

const MOST_RUNS: usize = 32;

/// `struct Runs` of `common.cuh`.
#[repr(C)]
struct Runs {
    count: i32,
    end: [i32; MOST_RUNS],
}

impl Runs {
    fn new(runs: &[usize]) -> Self {
        let mut end = [0; MOST_RUNS];
        let mut at = 0;
        for (slot, n) in end.iter_mut().zip(runs) {
            at += *n as i32;
            *slot = at;
        }
        Self { count: runs.len().min(MOST_RUNS) as i32, end }
    }
}

/// `struct Lane` of `rows.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawLane {
    input: u64,
    weight: u64,
    rotate: i32,
    out: u64,
    unit: u64,
    slot: i32,
}

unsafe extern "C" {
    fn lq_row_fits(width: i32) -> i32;
    fn lq_residual_norm(
        x_kind: i32,
        out_kind: i32,
        x: u64,
        y: u64,
        gate: u64,
        gate_runs: *const Runs,
        scale: u64,
        shift: u64,
        norm_runs: *const Runs,
        eps: f32,
        out: u64,
        unit: u64,
        row_scale: u64,
        rows: i32,
        width: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lq_norm_rotate(
        out_kind: i32,
        lanes: *const RawLane,
        count: i32,
        stride: i32,
        table: u64,
        head: i32,
        offset: u64,
        eps: f32,
        rows: i32,
        width: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lq_quantise(
        gelu: i32,
        x: u64,
        out: u64,
        unit: u64,
        row_scale: u64,
        rows: i32,
        width: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lq_bounds(
        weight: u64,
        worth: u64,
        bias: u64,
        scale: u64,
        shift: u64,
        unit: u64,
        out: u64,
        runs: i32,
        outputs: i32,
        width: i32,
        stream: *mut c_void,
    ) -> i32;
    fn lq_few_keys(
        out_kind: i32,
        q: u64,
        weight: u64,
        keys: u64,
        values: u64,
        out: u64,
        row_scale: u64,
        rows: i32,
        groups: i32,
        count: i32,
        head: i32,
        width: i32,
        eps: f32,
        stream: *mut c_void,
    ) -> i32;
}

/// Whether rows of `width` elements in `runs` runs fit these kernels.
pub fn fits(width: usize, runs: usize) -> bool {
    // SAFETY: takes a number.
    i32::try_from(width).is_ok_and(|w| unsafe { lq_row_fits(w) } != 0) && (1..=MOST_RUNS).contains(&runs)
}

/// A sum waiting to be added to the residual stream: `x += y · gate`.
pub struct Sum<'a> {
    /// `[rows, width]`, bf16.
    pub y: &'a Tensor,
    /// `[runs, width]`, f32; none = 1.
    pub gate: Option<(&'a Tensor, &'a [usize])>,
}

/// A LayerNorm: `· scale + shift` of the row's run, both `[runs, width]`, f32.
pub struct Norm<'a> {
    pub scale: &'a Tensor,
    pub shift: &'a Tensor,
    pub runs: &'a [usize],
    pub eps: f64,
    /// Element type of the result: f32, bf16, or `F8E4M3`.
    pub out: DType,
    /// What a stored unit of a result in `F8E4M3` is worth, f32 `[1]`; none = each row gets a scale of its own.
    pub unit: Option<&'a Tensor>,
}

/// Adds `sum` to `x` (`[rows, width]`, f32 or bf16, **in place**), then norms `x`. Returns the normed rows and, for e4m3
/// without a given unit, what a stored unit of each row is worth.
pub fn residual_norm(x: &Tensor, sum: Option<&Sum>, norm: Option<&Norm>) -> Result<Option<(Tensor, Option<Tensor>)>> {
    let (rows, width) = x.dims2()?;
    let device = x.device();
    let c = context(device)?;
    let all = [rows];
    let f32s = |t: &Tensor, runs: &[usize]| {
        t.dims() == [runs.len(), width]
            && t.dtype() == DType::F32
            && runs.iter().sum::<usize>() == rows
            && runs.len() <= MOST_RUNS
    };
    let bad = sum.is_some_and(|s| {
        s.y.dims() != [rows, width] || s.y.dtype() != DType::BF16 || s.gate.is_some_and(|(g, r)| !f32s(g, r))
    }) || norm
        .is_some_and(|n| !f32s(n.scale, n.runs) || !f32s(n.shift, n.runs) || n.unit.is_some_and(|u| !one(u)));
    if bad || (sum.is_none() && norm.is_none()) || x.dtype() == DType::F8E4M3 {
        return Err(Error::Input(format!(
            "a residual norm of {:?} {:?} whose operands do not fit",
            x.dims(),
            x.dtype()
        )));
    }
    let out = norm.map(|n| empty(device, (rows, width), n.out)).transpose()?;
    let scales = match norm {
        Some(n) if n.out == DType::F8E4M3 && n.unit.is_none() => Some(empty(device, rows, DType::F32)?),
        _ => None,
    };
    let (y, gate) = (sum.map(|s| s.y), sum.and_then(|s| s.gate));
    let at = |t: Option<&Tensor>| t.map_or(Ok(0), address);
    let (gate_runs, norm_runs) = (Runs::new(gate.map_or(&all, |g| g.1)), Runs::new(norm.map_or(&all, |n| n.runs)));
    // SAFETY: shapes and types were checked; rows of 0 launch nothing that reads.
    let status = unsafe {
        lq_residual_norm(
            kind(x.dtype())?,
            norm.map_or(Ok(1), |n| kind(n.out))?,
            address(x)?,
            at(y)?,
            at(gate.map(|g| g.0))?,
            &gate_runs,
            at(norm.map(|n| n.scale))?,
            at(norm.map(|n| n.shift))?,
            &norm_runs,
            norm.map_or(0.0, |n| n.eps as f32),
            at(out.as_ref())?,
            at(norm.and_then(|n| n.unit))?,
            at(scales.as_ref())?,
            rows as i32,
            width as i32,
            c.stream(),
        )
    };
    launched("residual and norm", status)?;
    Ok(out.map(|o| (o, scales)))
}

/// One projection on its way to attention.
pub struct Lane<'a> {
    /// `[rows, width]`, bf16; rows may stand apart, but equally far in all lanes of a call.
    pub input: &'a Tensor,
    /// `[width]`, bf16: RMS norm over all channels times this; none = as it is.
    pub weight: Option<&'a Tensor>,
    /// Whether pairs of channels are turned.
    pub rotate: bool,
    /// `[at least rows, width]`, bf16, or `F8E4M3`; the same type in all lanes.
    pub out: &'a Tensor,
    /// What a stored unit is worth: the values' unit of a table; none = 1.
    pub unit: Option<&'a Units>,
    /// Whether rows go to `offset` and below instead of to the first rows.
    pub slot: bool,
}

/// Norms, turns and stores up to three projections at once. `table` `[rows, head]`: cosines, then sines, f32. `offset`: a
/// u32 on the card, read when the kernel runs.
pub fn norm_rotate(lanes: &[Lane], table: Option<&Tensor>, offset: Option<&Tensor>, eps: f64) -> Result<()> {
    let Some(first) = lanes.first() else { return Ok(()) };
    let (rows, width) = first.input.dims2()?;
    let c = context(first.input.device())?;
    let (_, stride) = rows_address(first.input)?;
    let head = table.map_or(Ok(8), |t| t.dim(1))?;
    let mut raw = [RawLane { input: 0, weight: 0, rotate: 0, out: 0, unit: 0, slot: 0 }; 3];
    let mut bad = lanes.len() > raw.len() || width % head != 0 || stride % 8 != 0;
    bad |= table.is_some_and(|t| t.dims() != [rows, head] || t.dtype() != DType::F32);
    for (raw, lane) in raw.iter_mut().zip(lanes) {
        let (input, apart) = rows_address(lane.input)?;
        bad |= lane.input.dims() != [rows, width] || apart != stride || lane.input.dtype() != DType::BF16;
        bad |= lane.weight.is_some_and(|w| w.dims() != [width] || w.dtype() != DType::BF16);
        bad |= lane.out.dim(1)? != width || lane.out.dim(0)? < rows || lane.out.dtype() != first.out.dtype();
        bad |= (lane.rotate && table.is_none()) || (lane.slot && offset.is_none());
        *raw = RawLane {
            input,
            weight: lane.weight.map_or(Ok(0), address)?,
            rotate: i32::from(lane.rotate),
            out: address(lane.out)?,
            unit: lane.unit.map_or(Ok(0), Units::value)?,
            slot: i32::from(lane.slot),
        };
    }
    if bad {
        return Err(Error::Input(format!("projections of [{rows}, {width}] and their targets do not fit together")));
    }
    // SAFETY: shapes and types were checked; where rows go is the caller's promise (`offset` + rows within each target).
    let status = unsafe {
        lq_norm_rotate(
            kind(first.out.dtype())?,
            raw.as_ptr(),
            lanes.len() as i32,
            stride as i32,
            table.map_or(Ok(0), address)?,
            head as i32,
            offset.map_or(Ok(0), address)?,
            eps as f32,
            rows as i32,
            width as i32,
            c.stream(),
        )
    };
    launched("norm and rotation", status)
}

/// Rows of bf16 (through GELU, tanh approximation, if `gelu`) as e4m3 bytes, and what a stored unit of each is worth.
pub fn quantise(x: &Tensor, gelu: bool) -> Result<(Tensor, Tensor)> {
    let scales = empty(x.device(), x.dim(0)?, DType::F32)?;
    Ok((quantised(x, gelu, None, Some(&scales))?, scales))
}

/// The same with one unit for all rows, f32 `[1]`: what is beyond 448 of them becomes 448.
pub fn quantise_by(x: &Tensor, gelu: bool, unit: &Tensor) -> Result<Tensor> {
    quantised(x, gelu, Some(unit), None)
}

/// One number on the card.
fn one(t: &Tensor) -> bool {
    t.dims() == [1] && t.dtype() == DType::F32
}

fn quantised(x: &Tensor, gelu: bool, unit: Option<&Tensor>, scales: Option<&Tensor>) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    if x.dtype() != DType::BF16 || unit.is_some_and(|u| !one(u)) {
        return Err(Error::Input(format!("rows of bf16 are quantised, not {:?}, by one f32 or each", x.dtype())));
    }
    let c = context(x.device())?;
    let out = empty(x.device(), (rows, width), DType::F8E4M3)?;
    // SAFETY: shapes and types were checked.
    let status = unsafe {
        lq_quantise(
            i32::from(gelu),
            address(x)?,
            address(&out)?,
            unit.map_or(Ok(0), address)?,
            scales.map_or(Ok(0), address)?,
            rows as i32,
            width as i32,
            c.stream(),
        )
    };
    launched("quantisation", status)?;
    Ok(out)
}

/// The largest size that each result of an e4m3 matrix (`[out, width]`, what its rows are worth `[out]`, bias `[out]` in
/// bf16) can have for a row that left a LayerNorm with `scale` and `shift` (`[runs, width]`, f32) and was rounded to e4m3
/// with `unit` (f32 `[1]`): f32 `[runs, out]`. See [`crate::model::nn::fp8::bounds`], its twin.
pub fn bounds(
    (weight, worth): (&Tensor, &Tensor),
    bias: Option<&Tensor>,
    scale: &Tensor,
    shift: &Tensor,
    unit: &Tensor,
) -> Result<Tensor> {
    let ((outputs, width), (runs, columns)) = (weight.dims2()?, scale.dims2()?);
    let f32s = [worth, scale, shift].iter().all(|t| t.dtype() == DType::F32);
    if columns != width
        || shift.dims() != scale.dims()
        || weight.dtype() != DType::F8E4M3
        || worth.dims() != [outputs]
        || bias.is_some_and(|b| b.dims() != [outputs] || b.dtype() != DType::BF16)
        || !f32s
        || !one(unit)
    {
        return Err(Error::Input(format!("bounds of {:?} after a norm of {:?}", weight.dims(), scale.dims())));
    }
    let c = context(weight.device())?;
    let out = empty(weight.device(), (runs, outputs), DType::F32)?;
    // SAFETY: shapes and types were checked here and in the launcher.
    let status = unsafe {
        lq_bounds(
            address(weight)?,
            address(worth)?,
            bias.map_or(Ok(0), address)?,
            address(scale)?,
            address(shift)?,
            address(unit)?,
            address(&out)?,
            runs as i32,
            outputs as i32,
            width as i32,
            c.stream(),
        )
    };
    launched("bounds of a product", status)?;
    Ok(out)
}

/// Queries `[groups · n, width]` (bf16, before their RMS norm) over the few keys and values `[groups · count, width]` of
/// their group. Result bf16, or e4m3 with row scales if `fp8`.
pub fn few_keys(
    q: &Tensor,
    weight: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    heads: usize,
    groups: usize,
    eps: f64,
    fp8: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let ((rows, width), (all, _)) = (q.dims2()?, keys.dims2()?);
    let bf16 = [q, weight, keys, values].iter().all(|t| t.dtype() == DType::BF16);
    if !bf16
        || keys.dims() != values.dims()
        || keys.dim(1)? != width
        || weight.dims() != [width]
        || all % groups.max(1) != 0
    {
        return Err(Error::Input(format!("attention of {:?} over the few keys {:?}", q.dims(), keys.dims())));
    }
    let c = context(q.device())?;
    let out = empty(q.device(), (rows, width), if fp8 { DType::F8E4M3 } else { DType::BF16 })?;
    let scales = if fp8 { Some(empty(q.device(), rows, DType::F32)?) } else { None };
    // SAFETY: shapes and types were checked here and in the launcher.
    let status = unsafe {
        lq_few_keys(
            kind(out.dtype())?,
            address(q)?,
            address(weight)?,
            address(keys)?,
            address(values)?,
            address(&out)?,
            scales.as_ref().map_or(Ok(0), address)?,
            rows as i32,
            groups as i32,
            (all / groups) as i32,
            (width / heads) as i32,
            width as i32,
            eps as f32,
            c.stream(),
        )
    };
    launched("attention to few keys", status)?;
    Ok((out, scales))
}

/// Most keys of a group that [`few_keys`] takes.
pub const FEW: usize = 8;

/// Whether [`few_keys`] takes heads of this width: the lanes that share one are a power of two of a warp.
pub fn few_keys_takes(head: usize) -> bool {
    head % 8 == 0 && (head / 8).is_power_of_two() && head <= 256
}
