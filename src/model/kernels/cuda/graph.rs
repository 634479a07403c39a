//! Launches recorded once and replayed: the host's part of a transformer step shrinks from milliseconds to one call.

use candle_core::{
    Device,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaGraph, sys},
    },
};

use crate::model::{Error, Result};

/// A recorded sequence of launches. It reads and writes the same memory at every replay.
pub struct Graph(CudaGraph);

// SAFETY: a graph is launched by one owner at a time; the driver allows that from any thread.
unsafe impl Send for Graph {}
// SAFETY: launching needs `&mut self`.
unsafe impl Sync for Graph {}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Graph")
    }
}

impl Graph {
    /// Records what `work` launches on the device's stream, without running it. `work` must have run once before (plans
    /// are chosen then), and may neither upload nor read back: what it needs lies on the card and stays where it is. Work
    /// that does so all the same (candle's own operations upload shapes) is refused, not recorded.
    pub fn record(device: &Device, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let Device::Cuda(device) = device else {
            return Err(Error::Input("only an NVIDIA card records graphs".into()));
        };
        let stream = device.cuda_stream();
        // While this lives, candle refuses to record an upload; without it the graph would read the host's memory later.
        let _refuse_uploads = device.enable_cuda_graph_htod_cache();
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
        let done = work();
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
        done?;
        let graph = graph.w()?.ok_or_else(|| Error::Config("the recorded graph is empty".into()))?;
        graph.upload().w()?;
        Ok(Self(graph))
    }

    /// Queues a replay.
    pub fn launch(&mut self) -> Result<()> {
        Ok(self.0.launch().w()?)
    }
}
