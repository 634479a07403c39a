//! Time by the card's own events, and its memory: for benchmarks and for predicting what fits.

use candle_core::{
    Device,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{result, sys::CUevent_flags},
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

/// Bytes of the card's memory: free, and in all.
pub fn memory(device: &Device) -> Result<(usize, usize)> {
    let Device::Cuda(device) = device else {
        return Err(Error::Input("only an NVIDIA card has memory of its own".into()));
    };
    device.cuda_stream().context().bind_to_thread().w()?;
    Ok(result::mem_get_info().w()?)
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
