//! Matrix products by cuBLASLt.
//!
//! `y = x Wᵀ + b`, optionally through GELU, for bf16 operands, and for e4m3 operands with one f32 scale per row of `x` and
//! per row of `W` (cuBLASLt's `OUTER_VEC_32F`, Hopper) or one for all of each, which is a little faster, and the only way
//! to a result in e4m3. For large products the library's heuristics are only a shortlist:
//! the first of a shape times its candidates on the real operands and keeps the fastest, which is worth 3–10 % here.
//!
//! Large products bring a card to its power limit, and then the kernel that takes the least energy is the fastest, not the
//! one that is so alone and at full clock. So those that are near the fastest run once more, each long enough for the
//! limit to bite.

use std::{collections::HashMap, ffi::c_void, sync::Mutex};

use candle_core::{
    DType, Tensor,
    cuda_backend::{
        WrapErr,
        cudarc::{
            cublaslt::{result, sys},
            driver::sys::CUevent_flags,
        },
    },
};

use super::{Context, WORKSPACE, address, context, empty};
use crate::model::{Error, Result};

/// Candidates that are timed.
const CANDIDATES: usize = 16;
/// So many of the fastest, and none slower than the fastest by this factor, are timed again at length.
const FINALISTS: usize = 4;
const NEAR: f32 = 1.08;
/// How long each of them runs, milliseconds; products shorter than [`SHORT`] are over before the clock changes.
const LENGTH: f32 = 25.0;
const SHORT: f32 = 0.06;
/// Products of fewer operations take what the library thinks best: there is nothing to win, and an audio encoder whose
/// window grows brings a new shape with every block.
const WORTH_TIMING: f64 = 2e10;
/// Timed runs of a candidate; the fastest counts.
const RUNS: usize = 3;

/// `CUBLAS_OP_T`.
const TRANSPOSED: i32 = 1;

/// Turns the library's status into an error of ours.
trait Checked<T> {
    fn checked(self) -> Result<T>;
}

impl<T> Checked<T> for std::result::Result<T, result::CublasError> {
    fn checked(self) -> Result<T> {
        self.map_err(|e| Error::Config(format!("cuBLASLt: {:?}", e.0)))
    }
}

/// One product.
pub struct Product<'a> {
    /// `[n, in]`, contiguous; bf16, or e4m3.
    pub x: &'a Tensor,
    /// `[out, in]`, contiguous; like `x`.
    pub weight: &'a Tensor,
    /// What a stored unit of each row of `x` `[n]` and of `weight` `[out]` is worth, f32, or one for all rows of each,
    /// `[1]` and `[1]`; exactly when they are e4m3.
    pub scales: Option<(&'a Tensor, &'a Tensor)>,
    /// `[out]`, bf16.
    pub bias: Option<&'a Tensor>,
    /// GELU, tanh approximation, of the sum.
    pub gelu: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    out: usize,
    n: usize,
    width: usize,
    operands: Operands,
    bias: bool,
    gelu: bool,
    result: Of,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Operands {
    Bf16,
    /// e4m3, a scale for each row.
    Rows,
    /// e4m3, one scale for each operand.
    Whole,
}

/// Where a result goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Of {
    /// bf16.
    Itself,
    /// bf16, added to what is there.
    Sum,
    /// e4m3.
    Stored,
}

/// The library's handle and what was chosen for which shape.
#[derive(Debug)]
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    /// None = there is no way.
    chosen: Mutex<HashMap<Key, Option<sys::cublasLtMatmulAlgo_t>>>,
}

// SAFETY: cuBLASLt's handle may be used from any thread, also at the same time (its documentation, "Thread Safety").
unsafe impl Send for Products {}
// SAFETY: see above.
unsafe impl Sync for Products {}

impl Products {
    pub(super) fn new() -> Result<Self> {
        Ok(Self { handle: result::create_handle().checked()?, chosen: Mutex::default() })
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        // SAFETY: made in `new`, dropped once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// What describes one call to the library; freed when it goes.
struct Call {
    operation: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
    /// What may be added; bf16 whatever the result is.
    sum: sys::cublasLtMatrixLayout_t,
    /// It counts so many times.
    beta: f32,
}

impl Drop for Call {
    fn drop(&mut self) {
        // SAFETY: made in `Call::new`, dropped once.
        unsafe {
            let _ = result::destroy_matrix_layout(self.weight);
            let _ = result::destroy_matrix_layout(self.x);
            let _ = result::destroy_matrix_layout(self.y);
            let _ = result::destroy_matrix_layout(self.sum);
            let _ = result::destroy_matmul_desc(self.operation);
        }
    }
}

impl Call {
    /// cuBLASLt counts columns first, so rows of ours are its columns: it computes `yᵀ = W xᵀ`. `stored`: what a result in
    /// e4m3 is multiplied by, f32 `[1]`.
    fn new(key: Key, p: &Product, stored: Option<&Tensor>) -> Result<Self> {
        use sys::{cublasLtMatmulDescAttributes_t as At, cudaDataType_t as Type};
        let operand = if key.operands == Operands::Bf16 { Type::CUDA_R_16BF } else { Type::CUDA_R_8F_E4M3 };
        let given = if key.result == Of::Stored { Type::CUDA_R_8F_E4M3 } else { Type::CUDA_R_16BF };
        let (out, n, width) = (key.out as u64, key.n as u64, key.width as u64);
        let call = Self {
            operation: result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, Type::CUDA_R_32F)
                .checked()?,
            weight: result::create_matrix_layout(operand, width, out, width as i64).checked()?,
            x: result::create_matrix_layout(operand, width, n, width as i64).checked()?,
            y: result::create_matrix_layout(given, out, n, out as i64).checked()?,
            sum: result::create_matrix_layout(Type::CUDA_R_16BF, out, n, out as i64).checked()?,
            beta: if key.result == Of::Sum { 1.0 } else { 0.0 },
        };
        let set = |at: At, value: &[u8]| {
            // SAFETY: `value` is the attribute's type as bytes, of its size.
            unsafe { result::set_matmul_desc_attribute(call.operation, at, value.as_ptr().cast(), value.len()) }
                .checked()
        };
        set(At::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED.to_ne_bytes())?;
        use sys::cublasLtEpilogue_t as Epilogue;
        let epilogue = match (key.bias, key.gelu) {
            (false, false) => Epilogue::CUBLASLT_EPILOGUE_DEFAULT,
            (true, false) => Epilogue::CUBLASLT_EPILOGUE_BIAS,
            (false, true) => Epilogue::CUBLASLT_EPILOGUE_GELU,
            (true, true) => Epilogue::CUBLASLT_EPILOGUE_GELU_BIAS,
        };
        set(At::CUBLASLT_MATMUL_DESC_EPILOGUE, &(epilogue as u32).to_ne_bytes())?;
        if let Some(bias) = p.bias {
            set(At::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &address(bias)?.to_ne_bytes())?;
            set(At::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &(Type::CUDA_R_16BF as i32).to_ne_bytes())?;
        }
        if let Some((x, weight)) = p.scales {
            // One scale for all is the library's default.
            if key.operands == Operands::Rows {
                let rows =
                    (sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F as i32).to_ne_bytes();
                set(At::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &rows)?;
                set(At::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &rows)?;
            }
            set(At::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &address(weight)?.to_ne_bytes())?;
            set(At::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &address(x)?.to_ne_bytes())?;
            set(At::CUBLASLT_MATMUL_DESC_FAST_ACCUM, &[1])?;
        }
        if let Some(stored) = stored {
            set(At::CUBLASLT_MATMUL_DESC_D_SCALE_POINTER, &address(stored)?.to_ne_bytes())?;
        }
        Ok(call)
    }

    fn candidates(&self, handle: sys::cublasLtHandle_t) -> Result<Vec<sys::cublasLtMatmulAlgo_t>> {
        let preference = result::create_matmul_pref().checked()?;
        let mut found: Vec<sys::cublasLtMatmulHeuristicResult_t> = Vec::with_capacity(CANDIDATES);
        let mut count = 0;
        // SAFETY: `found` has room for what is asked for; the library writes the first `count`.
        let status = unsafe {
            let most = WORKSPACE;
            result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const most).cast(),
                size_of::<usize>(),
            )
            .checked()?;
            let status = sys::cublasLtMatmulAlgoGetHeuristic(
                handle,
                self.operation,
                self.weight,
                self.x,
                self.sum,
                self.y,
                preference,
                CANDIDATES as i32,
                found.as_mut_ptr(),
                &mut count,
            );
            found.set_len(count.max(0) as usize);
            let _ = result::destroy_matmul_pref(preference);
            status
        };
        if status != sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
            && status != sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED
        {
            return Err(Error::Config(format!("cuBLASLt: {status:?}")));
        }
        Ok(found
            .into_iter()
            .filter(|f| f.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS)
            .map(|f| f.algo)
            .collect())
    }

    fn run(&self, c: &Context, p: &Product, y: &Tensor, algorithm: &sys::cublasLtMatmulAlgo_t) -> Result<()> {
        let one = 1f32;
        let (one, beta): (*const c_void, *const c_void) = ((&raw const one).cast(), (&raw const self.beta).cast());
        let at = |t: &Tensor| address(t).map(|a| a as *const c_void);
        // Nothing is added where β is 0, but the library wants an address, and not the result's if their types differ.
        let sum = if y.dtype() == DType::BF16 { y } else { p.x };
        // SAFETY: the layouts describe these tensors (checked in `product`), which live until the call is queued; their
        // memory is reused in stream order.
        unsafe {
            result::matmul(
                c.products.handle,
                self.operation,
                one,
                beta,
                at(p.weight)?,
                self.weight,
                at(p.x)?,
                self.x,
                at(sum)?,
                self.sum,
                address(y)? as *mut c_void,
                self.y,
                algorithm,
                address(&c.workspace)? as *mut c_void,
                WORKSPACE,
                c.stream().cast(),
            )
        }
        .checked()?;
        Ok(())
    }
}

/// Computes a product: `[n, out]`, bf16.
pub fn product(p: &Product) -> Result<Tensor> {
    let key = key(p, Of::Itself)?;
    fresh(p, key, None)?.ok_or_else(|| Error::Config(format!("cuBLASLt has no way to compute {key:?}")))
}

/// The same in e4m3, times `factor` (f32 `[1]`), which must leave nothing beyond 448; for operands with one scale each. None
/// where the library cannot.
pub fn stored_product(p: &Product, factor: &Tensor) -> Result<Option<Tensor>> {
    let key = key(p, Of::Stored)?;
    if key.operands != Operands::Whole || factor.dims() != [1] || factor.dtype() != DType::F32 {
        return Err(Error::Input(format!("a product of {key:?} times {:?} {:?}", factor.dims(), factor.dtype())));
    }
    fresh(p, key, Some(factor))
}

fn fresh(p: &Product, key: Key, stored: Option<&Tensor>) -> Result<Option<Tensor>> {
    let (c, call) = (context(p.x.device())?, Call::new(key, p, stored)?);
    let y = empty(p.x.device(), (key.n, key.out), if stored.is_some() { DType::F8E4M3 } else { DType::BF16 })?;
    let Some(way) = algorithm(&c, &call, p, key, || Ok(y.clone()))? else { return Ok(None) };
    call.run(&c, p, &y, &way)?;
    Ok(Some(y))
}

/// Adds a product to `y` (`[n, out]`, bf16, contiguous), in place: one rounding, and no pass over memory for the sum.
/// False, and nothing is done, where the library cannot.
pub fn add_product(p: &Product, y: &Tensor) -> Result<bool> {
    let key = key(p, Of::Sum)?;
    if y.dims() != [key.n, key.out] || y.dtype() != DType::BF16 {
        return Err(Error::Input(format!("a product of {key:?} added to {:?} {:?}", y.dims(), y.dtype())));
    }
    let (c, call) = (context(p.x.device())?, Call::new(key, p, None)?);
    // Candidates are timed on a sum of their own.
    let way = algorithm(&c, &call, p, key, || Ok(Tensor::zeros(y.shape(), DType::BF16, y.device())?))?;
    way.map_or(Ok(false), |way| call.run(&c, p, y, &way).map(|()| true))
}

fn key(p: &Product, result: Of) -> Result<Key> {
    let ((n, width), (out, depth)) = (p.x.dims2()?, p.weight.dims2()?);
    let dtype = if p.scales.is_some() { DType::F8E4M3 } else { DType::BF16 };
    // A matrix of one row that is e4m3 would be no multiple of 16, so one scale is for all rows.
    let operands = match p.scales {
        None => Operands::Bf16,
        Some((_, weight)) if weight.dims() == [1] => Operands::Whole,
        Some(_) => Operands::Rows,
    };
    let rows = if operands == Operands::Whole { (1, 1) } else { (n, out) };
    let fits = |s: &Tensor, rows: usize| s.dims() == [rows] && s.dtype() == DType::F32;
    if width != depth
        || p.x.dtype() != dtype
        || p.weight.dtype() != dtype
        || p.bias.is_some_and(|b| b.dims() != [out] || b.dtype() != DType::BF16)
        || p.scales.is_some_and(|(x, w)| !fits(x, rows.0) || !fits(w, rows.1))
    {
        return Err(Error::Input(format!(
            "a product of {:?} {:?} and {:?} {:?}",
            p.x.dims(),
            p.x.dtype(),
            p.weight.dims(),
            p.weight.dtype()
        )));
    }
    Ok(Key { out, n, width, operands, bias: p.bias.is_some(), gelu: p.gelu, result })
}

/// What was chosen for this shape; chosen now when it is new, writing to what `y` gives.
fn algorithm(
    c: &Context,
    call: &Call,
    p: &Product,
    key: Key,
    y: impl FnOnce() -> Result<Tensor>,
) -> Result<Option<sys::cublasLtMatmulAlgo_t>> {
    let known = c.products.chosen.lock().unwrap_or_else(|e| e.into_inner()).get(&key).copied();
    if let Some(algorithm) = known {
        return Ok(algorithm);
    }
    let chosen = choose(c, call, p, &y()?, key)?;
    c.products.chosen.lock().unwrap_or_else(|e| e.into_inner()).insert(key, chosen);
    Ok(chosen)
}

/// Whether cuBLASLt can compute a product like this one.
pub fn possible(p: &Product) -> Result<bool> {
    let key = key(p, Of::Itself)?;
    Ok(!Call::new(key, p, None)?.candidates(context(p.x.device())?.products.handle)?.is_empty())
}

fn choose(c: &Context, call: &Call, p: &Product, y: &Tensor, key: Key) -> Result<Option<sys::cublasLtMatmulAlgo_t>> {
    let candidates = call.candidates(c.products.handle)?;
    let stream = c.device.cuda_stream();
    let idle = candle_core::cuda_backend::cudarc::driver::sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let Some(first) = candidates.first().copied() else { return Ok(None) };
    let operations = 2.0 * key.out as f64 * key.n as f64 * key.width as f64;
    if operations < WORTH_TIMING || stream.capture_status().is_ok_and(|s| s != idle) {
        return Ok(Some(first));
    }
    // Milliseconds of `times` runs, queued together; infinite where the candidate cannot do it.
    let timed = |algorithm: &sys::cublasLtMatmulAlgo_t, times: usize| -> Result<f32> {
        let from = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).w()?;
        for _ in 0..times {
            if call.run(c, p, y, algorithm).is_err() {
                return Ok(f32::INFINITY);
            }
        }
        let to = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).w()?;
        from.elapsed_ms(&to).w().map_err(Error::from)
    };
    let mut found = Vec::with_capacity(candidates.len());
    for algorithm in candidates {
        let mut fastest = f32::INFINITY;
        for run in 0..=RUNS {
            let took = timed(&algorithm, 1)?;
            // The first one loads the kernel.
            if run > 0 {
                fastest = fastest.min(took);
            }
        }
        found.push((fastest, algorithm));
    }
    found.sort_by(|a, b| a.0.total_cmp(&b.0));
    let alone = found.first().map_or(f32::INFINITY, |f| f.0);
    if alone.is_infinite() {
        return Ok(None);
    }
    found.retain(|f| f.0 <= alone * NEAR);
    found.truncate(FINALISTS);
    if alone < SHORT || found.len() < 2 {
        return Ok(found.first().map(|f| f.1));
    }
    let times = (LENGTH / alone).ceil() as usize;
    // The card gets warm before it counts.
    timed(&found[0].1, times)?;
    let mut best = (f32::INFINITY, found[0].1);
    for (_, algorithm) in &found {
        let took = timed(algorithm, times)? / times as f32;
        if took < best.0 {
            best = (took, *algorithm);
        }
    }
    Ok(Some(best.1))
}
