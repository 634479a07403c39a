//! NVIDIA cards: what a device needs beside candle, and the doors to kernels and libraries.
//!
//! | file | what it is |
//! | --- | --- |
//! | `rows.cu`, [`rows`] | fused row-wise operations |
//! | `weights.cu`, [`weights`] | softmax weights over known keys |
//! | [`gemm`] | matrix products by cuBLASLt: bf16 with epilogues, e4m3 with a scale per row and per channel or one for each operand |
//! | `cudnn.cpp`, [`attention`] | scaled dot-product attention by cuDNN: bf16 and e4m3 |
//! | `attention.cuh`, `attention16.cu`, `attention90.cu` | the same on Hopper, in bf16, and in e4m3 over values that lie transposed |
//! | `vae.cu`, `narrow.cu`, `vae.cpp`, [`vae`] | the video autoencoder: convolutions by cuDNN, the last, and the passes between |
//! | `nccl` | what several cards send each other |
//! | [`graph`] | a sequence of launches recorded once and replayed |
//! | [`time`] | time by the card's events, memory |
//!
//! Kernels are C functions in a static library that the build script makes; they take addresses and a stream. Tensors
//! stay candle's: results are allocated on the device's own stream, so their memory is reused in stream order. All work
//! of one `Device` goes to its one stream; tensors of another `Device` of the same card must be synchronised by hand.

pub mod attention;
#[cfg(test)]
mod attention_tests;
pub mod gemm;
pub mod graph;
pub(crate) mod nccl;
pub mod rows;
#[cfg(test)]
mod tests;
pub mod time;
pub mod vae;
#[cfg(test)]
mod vae_tests;
pub mod weights;

use std::{
    collections::HashMap,
    ffi::{CStr, c_char, c_void},
    sync::{Arc, Mutex, OnceLock},
};

use candle_core::{
    CudaDevice, CudaStorage, DType, Device, Shape, Storage, Tensor,
    cuda_backend::{
        CudaDType, DeviceId, WrapErr,
        cudarc::driver::{self, DevicePtr, sys},
    },
    op::BackpropOp,
};

use crate::model::{Error, Result};

/// Bytes that a product or an attention may use beside its operands. 64 MiB is what cuBLASLt's fastest e4m3 kernels
/// asked for at the 14B model's shapes.
const WORKSPACE: usize = 64 << 20;

/// Least compute capability: bf16 matrix units.
const LEAST: (i32, i32) = (8, 0);

unsafe extern "C" {
    fn lq_cudnn_version() -> usize;
    fn lq_cudnn_error() -> *const c_char;
    fn lq_cudnn_open(stream: *mut c_void) -> *mut c_void;
    fn lq_cudnn_close(handle: *mut c_void);
}

/// What a device has beside candle's own: library handles, plans that were chosen, room to work in.
#[derive(Debug)]
pub struct Context {
    /// Compute capability, such as (9, 0).
    pub capability: (i32, i32),
    device: CudaDevice,
    cudnn: Handle,
    workspace: Tensor,
    products: gemm::Products,
    plans: Mutex<HashMap<PlanKey, Arc<Plan>>>,
}

/// What a cuDNN plan was built for: its kind and its numbers.
pub(crate) type PlanKey = (&'static str, Vec<i64>);

/// cuDNN's handle. Its functions may be called from any thread, one at a time: [`Context`] holds a lock meanwhile.
#[derive(Debug)]
struct Handle(*mut c_void);

// SAFETY: see above.
unsafe impl Send for Handle {}
// SAFETY: see above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle came from lq_cudnn_open and is dropped once.
        unsafe { lq_cudnn_close(self.0) }
    }
}

/// A built cuDNN graph.
#[derive(Debug)]
pub(crate) struct Plan(*mut c_void);

// SAFETY: a finished plan is only read.
unsafe impl Send for Plan {}
// SAFETY: see above.
unsafe impl Sync for Plan {}

unsafe extern "C" {
    fn lq_plan_workspace(plan: *const c_void) -> i64;
    fn lq_plan_drop(plan: *mut c_void);
    fn lq_plan_run(
        handle: *mut c_void,
        plan: *mut c_void,
        uid: *const i64,
        address: *const u64,
        count: i32,
        workspace: *mut c_void,
    ) -> i32;
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: the plan came from a builder and is dropped once.
        unsafe { lq_plan_drop(self.0) }
    }
}

/// Opens card `ordinal` on a stream of its own. Says in plain words what is missing when it cannot be used.
pub fn open(ordinal: usize) -> Result<Device> {
    let count = driver::CudaContext::device_count().map_err(|e| {
        Error::Config(format!("no NVIDIA driver answers ({e}); CUDA 13 needs driver 580 or newer, see `nvidia-smi`"))
    })?;
    if count < 1 || ordinal >= count as usize {
        return Err(Error::Config(format!("there is no NVIDIA card {ordinal}: the driver knows {count}")));
    }
    let device = CudaDevice::new_with_stream(ordinal)
        .map_err(|e| Error::Config(format!("NVIDIA card {ordinal} cannot be used: {e}")))?;
    // SAFETY: all work of this device goes to one stream (see the module).
    unsafe { device.disable_event_tracking() };
    let device = Device::Cuda(device);
    context(&device)?;
    Ok(device)
}

/// The context of a CUDA device, made at first use; refuses cards and libraries that are too old.
pub fn context(device: &Device) -> Result<Arc<Context>> {
    static ALL: OnceLock<Mutex<HashMap<DeviceId, Arc<Context>>>> = OnceLock::new();
    let Device::Cuda(device) = device else {
        return Err(Error::Input("a tensor on an NVIDIA card is expected".into()));
    };
    let mut all = ALL.get_or_init(Mutex::default).lock().unwrap_or_else(|e| e.into_inner());
    if let Some(context) = all.get(&device.id()) {
        return Ok(context.clone());
    }
    let context = Arc::new(Context::new(device)?);
    all.insert(device.id(), context.clone());
    Ok(context)
}

impl Context {
    fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let attribute = |which| stream.context().attribute(which).w();
        use sys::CUdevice_attribute as At;
        let capability = (
            attribute(At::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(At::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < LEAST {
            let (have, need) = (capability, LEAST);
            return Err(Error::Config(format!(
                "this card has compute capability {}.{}; {}.{} is needed (Ampere or newer)",
                have.0, have.1, need.0, need.1
            )));
        }
        // SAFETY: takes nothing, reads a constant of the library.
        let version = unsafe { lq_cudnn_version() };
        if version < 90_000 {
            return Err(Error::Config(format!("cuDNN 9 is needed; version {version} was found")));
        }
        // SAFETY: the stream outlives the handle: the device, which holds it, is kept beside it.
        let cudnn = unsafe { lq_cudnn_open(stream.cu_stream().cast()) };
        if cudnn.is_null() {
            return Err(Error::Config(format!("cuDNN cannot be started: {}", cudnn_error())));
        }
        keep_freed_memory(stream.context().ordinal())?;
        let workspace = empty(&Device::Cuda(device.clone()), WORKSPACE, DType::U8)?;
        Ok(Self {
            capability,
            device: device.clone(),
            cudnn: Handle(cudnn),
            workspace,
            products: gemm::Products::new()?,
            plans: Mutex::default(),
        })
    }

    /// Whether e4m3 products with a scale per row and channel, and e4m3 attention, run on this card: Hopper and later.
    pub fn fp8(&self) -> bool {
        self.capability >= (9, 0)
    }

    /// The stream that all work goes to.
    pub(crate) fn stream(&self) -> *mut c_void {
        self.device.cuda_stream().cu_stream().cast()
    }

    /// The plan for `key`, built by `build` (which gets the handle) when it is first asked for.
    pub(crate) fn plan(&self, key: PlanKey, build: impl FnOnce(*mut c_void) -> *mut c_void) -> Result<Arc<Plan>> {
        let mut plans = self.plans.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(plan) = plans.get(&key) {
            return Ok(plan.clone());
        }
        let plan = build(self.cudnn.0);
        if plan.is_null() {
            return Err(Error::Config(format!("cuDNN has no way to compute {} {:?}: {}", key.0, key.1, cudnn_error())));
        }
        let plan = Arc::new(Plan(plan));
        plans.insert(key, plan.clone());
        Ok(plan)
    }

    /// Runs a plan; `operands` are uid and address.
    pub(crate) fn run(&self, plan: &Plan, operands: &[(i64, u64)]) -> Result<()> {
        let (uid, address): (Vec<i64>, Vec<u64>) = operands.iter().copied().unzip();
        // SAFETY: reads one number of a finished plan.
        let wanted = unsafe { lq_plan_workspace(plan.0) } as usize;
        let more;
        let room = if wanted > WORKSPACE {
            more = empty(&Device::Cuda(self.device.clone()), wanted, DType::U8)?;
            &more
        } else {
            &self.workspace
        };
        let _one_at_a_time = self.plans.lock().unwrap_or_else(|e| e.into_inner());
        // SAFETY: plan and handle are live; addresses were given by tensors that the caller holds.
        let status = unsafe {
            lq_plan_run(
                self.cudnn.0,
                plan.0,
                uid.as_ptr(),
                address.as_ptr(),
                uid.len() as i32,
                self::address(room)? as *mut c_void,
            )
        };
        if status != 0 {
            return Err(Error::Config(format!("cuDNN failed: {}", cudnn_error())));
        }
        Ok(())
    }
}

fn cudnn_error() -> String {
    // SAFETY: the text lives until this thread's next failure.
    unsafe { CStr::from_ptr(lq_cudnn_error()) }.to_string_lossy().into_owned()
}

/// Freed memory stays with the process: giving it back to the driver at every synchronisation would cost milliseconds.
fn keep_freed_memory(ordinal: usize) -> Result<()> {
    let mut pool = std::ptr::null_mut();
    let mut all = u64::MAX;
    let which = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: out-parameters of the right types.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&mut pool, ordinal as i32).result().w()?;
        sys::cuMemPoolSetAttribute(pool, which, (&raw mut all).cast()).result().w()?;
    }
    Ok(())
}

/// Where a contiguous tensor's first element is on the card.
pub(crate) fn address(t: &Tensor) -> Result<u64> {
    let (storage, layout) = t.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::Input("a tensor on an NVIDIA card is expected".into()));
    };
    if !layout.is_contiguous() {
        return Err(Error::Input(format!("a contiguous tensor is expected, not {:?}", layout)));
    }
    address_in(storage, layout.start_offset(), t.dtype())
}

/// The same for rows that stand apart, `[rows, width]` with unit stride in a row: address and elements from row to row.
pub(crate) fn rows_address(t: &Tensor) -> Result<(u64, usize)> {
    let (storage, layout) = t.storage_and_layout();
    let (Storage::Cuda(storage), [from_row, 1]) = (&*storage, layout.stride()) else {
        return Err(Error::Input(format!("rows on an NVIDIA card are expected, not {:?}", layout)));
    };
    Ok((address_in(storage, layout.start_offset(), t.dtype())?, *from_row))
}

fn address_in(storage: &CudaStorage, offset: usize, dtype: DType) -> Result<u64> {
    fn of<T: CudaDType>(storage: &CudaStorage, offset: usize) -> Result<u64> {
        let stream = storage.device.cuda_stream();
        let (address, _guard) = storage.as_cuda_slice::<T>()?.device_ptr(&stream);
        Ok(address + (offset * size_of::<T>()) as u64)
    }
    match dtype {
        DType::F32 => of::<f32>(storage, offset),
        DType::BF16 => of::<half::bf16>(storage, offset),
        DType::U8 => of::<u8>(storage, offset),
        DType::F8E4M3 => of::<float8::F8E4M3>(storage, offset),
        DType::U32 => of::<u32>(storage, offset),
        other => Err(Error::Input(format!("kernels take f32, bf16 and bytes, not {other:?}"))),
    }
}

/// Which card a device is.
pub(crate) fn ordinal(device: &Device) -> Result<i32> {
    match device {
        Device::Cuda(device) => Ok(device.cuda_stream().context().ordinal() as i32),
        _ => Err(Error::Input("an NVIDIA card is expected".into())),
    }
}

/// Some columns of `[rows, width]` on a card, contiguous: one copy by the driver, whatever the element type.
pub(crate) fn columns(x: &Tensor, which: std::ops::Range<usize>) -> Result<Tensor> {
    let ((rows, width), size) = (x.dims2()?, x.dtype().size_in_bytes());
    let (from, apart) = rows_address(x)?;
    if which.end > width || which.is_empty() {
        return Err(Error::Input(format!("columns {which:?} of {width}")));
    }
    let out = empty(x.device(), (rows, which.len()), x.dtype())?;
    let Device::Cuda(device) = x.device() else {
        return Err(Error::Input("a tensor on an NVIDIA card is expected".into()));
    };
    let card = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
    let copy = sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: card,
        srcHost: std::ptr::null(),
        srcDevice: from + (which.start * size) as u64,
        srcArray: std::ptr::null_mut(),
        srcPitch: apart * size,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: card,
        dstHost: std::ptr::null_mut(),
        dstDevice: address(&out)?,
        dstArray: std::ptr::null_mut(),
        dstPitch: which.len() * size,
        WidthInBytes: which.len() * size,
        Height: rows,
    };
    // SAFETY: both sides are as large as said; the order is that of the device's stream.
    unsafe { sys::cuMemcpy2DAsync_v2(&copy, device.cuda_stream().cu_stream()) }.result().w()?;
    Ok(out)
}

/// Memory for a result, not written yet.
pub(crate) fn empty(device: &Device, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    fn of<T: CudaDType + driver::DeviceRepr>(device: &CudaDevice, n: usize) -> Result<CudaStorage> {
        // SAFETY: whoever asked writes every element before anyone reads.
        #[cfg_attr(not(test), allow(unused_mut))]
        let mut slice = unsafe { device.alloc::<T>(n) }?;
        // Tests see NaN (in every type) where nobody wrote.
        #[cfg(test)]
        poison(device, &mut slice)?;
        Ok(CudaStorage::wrap_cuda_slice(slice, device.clone()))
    }
    let shape = shape.into();
    let Device::Cuda(device) = device else {
        return Err(Error::Input("a result on an NVIDIA card is expected".into()));
    };
    let n = shape.elem_count();
    let storage = match dtype {
        DType::F32 => of::<f32>(device, n),
        DType::BF16 => of::<half::bf16>(device, n),
        DType::U8 => of::<u8>(device, n),
        DType::F8E4M3 => of::<float8::F8E4M3>(device, n),
        DType::U32 => of::<u32>(device, n),
        other => Err(Error::Input(format!("kernels give f32, bf16 and bytes, not {other:?}"))),
    }?;
    Ok(Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false))
}

#[cfg(test)]
fn poison<T>(device: &CudaDevice, slice: &mut driver::CudaSlice<T>) -> Result<()> {
    use driver::DevicePtrMut;
    let (stream, bytes) = (device.cuda_stream(), slice.num_bytes());
    let (address, _guard) = slice.device_ptr_mut(&stream);
    // SAFETY: fills exactly this allocation.
    unsafe { sys::cuMemsetD8Async(address, 0xff, bytes, stream.cu_stream()) }.result().w()?;
    Ok(())
}

/// Element types as the kernels name them.
pub(crate) fn kind(dtype: DType) -> Result<i32> {
    match dtype {
        DType::F32 => Ok(0),
        DType::BF16 => Ok(1),
        DType::F8E4M3 => Ok(2),
        other => Err(Error::Input(format!("kernels take f32, bf16 and e4m3, not {other:?}"))),
    }
}

/// Turns what a launcher returned into a result.
pub(crate) fn launched(what: &str, status: i32) -> Result<()> {
    if status == 0 { Ok(()) } else { Err(Error::Config(format!("{what}: CUDA error {status} at launch"))) }
}
