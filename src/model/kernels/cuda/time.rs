//! Time by the card's own events, and its memory: for benchmarks and for predicting what fits.

use candle_core::{
    Device,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaEvent, result, sys::CUevent_flags},
    },
};

use crate::model::{Error, Result};

/// Milliseconds of `runs` runs of `work`, sorted, after `warm` that do not count. Between two events on the stream, so the
/// host's own time shows only where it keeps the card waiting.
pub fn milliseconds(
    device: &Device,
    warm: usize,
    runs: usize,
    mut work: impl FnMut() -> Result<()>,
) -> Result<Vec<f32>> {
    let Device::Cuda(device) = device else {
        return Err(Error::Input("only an NVIDIA card has events".into()));
    };
    for _ in 0..warm {
        work()?;
    }
    let stream = device.cuda_stream();
    stream.synchronize().w()?;
    let mut all = Vec::with_capacity(runs);
    for _ in 0..runs {
        let from = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).w()?;
        work()?;
        let to = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).w()?;
        all.push(from.elapsed_ms(&to).w()?);
    }
    all.sort_by(f32::total_cmp);
    Ok(all)
}

/// A place in a device's stream.
pub struct Event(CudaEvent);

impl Event {
    /// Behind everything that the stream was given.
    pub fn record(device: &Device) -> Result<Self> {
        let Device::Cuda(device) = device else {
            return Err(Error::Input("only an NVIDIA card has events".into()));
        };
        Ok(Self(device.cuda_stream().record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).w()?))
    }

    /// The card's time since an earlier event of the same stream; waits for both.
    pub fn since(&self, earlier: &Event) -> Result<std::time::Duration> {
        let ms = earlier.0.elapsed_ms(&self.0).w()?;
        Ok(std::time::Duration::from_secs_f32(ms.max(0.0) / 1e3))
    }
}

/// Bytes of the card's memory: free, and in all.
pub fn memory(device: &Device) -> Result<(usize, usize)> {
    let Device::Cuda(device) = device else {
        return Err(Error::Input("only an NVIDIA card has memory of its own".into()));
    };
    device.cuda_stream().context().bind_to_thread().w()?;
    Ok(result::mem_get_info().w()?)
}

/// Bytes: free on the card or kept by this program for later use, and by how much the memory in use was above what it is
/// now, at most, since this was asked last.
pub fn room(device: &Device) -> Result<(u64, u64)> {
    use candle_core::cuda_backend::cudarc::driver::sys;
    use sys::CUmemPool_attribute as At;
    let (free, _) = memory(device)?;
    let Device::Cuda(card) = device else { return Ok((free as u64, 0)) };
    let ordinal = card.cuda_stream().context().ordinal() as i32;
    // What is freed on a stream is kept in the pool, and counts once the stream is there.
    device.synchronize()?;
    let mut pool = std::ptr::null_mut();
    let mut numbers = [0u64; 3];
    // SAFETY: out-parameters of the right types; setting the high mark to zero makes it begin anew.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&mut pool, ordinal).result().w()?;
        let kinds = [
            At::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT,
            At::CU_MEMPOOL_ATTR_USED_MEM_CURRENT,
            At::CU_MEMPOOL_ATTR_USED_MEM_HIGH,
        ];
        for (kind, number) in kinds.into_iter().zip(&mut numbers) {
            sys::cuMemPoolGetAttribute(pool, kind, (&raw mut *number).cast()).result().w()?;
        }
        let mut zero = 0u64;
        sys::cuMemPoolSetAttribute(pool, At::CU_MEMPOOL_ATTR_USED_MEM_HIGH, (&raw mut zero).cast()).result().w()?;
    }
    let [reserved, used, high] = numbers;
    Ok((free as u64 + reserved.saturating_sub(used), high.saturating_sub(used)))
}

/// What the card calls itself, and the version of its driver's CUDA (13000 is 13.0).
pub fn name(device: &Device) -> Result<(String, i32)> {
    let Device::Cuda(device) = device else {
        return Err(Error::Input("only an NVIDIA card has a name".into()));
    };
    let mut version = 0;
    // SAFETY: an out-parameter of the right type.
    unsafe { candle_core::cuda_backend::cudarc::driver::sys::cuDriverGetVersion(&mut version) }.result().w()?;
    Ok((device.cuda_stream().context().name().w()?, version))
}
