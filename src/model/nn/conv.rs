//! Convolutions: over pictures, and those that are matrices in disguise, patches (kernel = stride) and short causal
//! kernels in time.

use candle_core::Tensor;
#[cfg(feature = "cuda")]
use candle_core::{DType, Device};

use super::Linear;
use crate::model::{Error, Result, weights::Weights};

/// Pictures `[n, in, height, width]` convolved with `kernel` `[out, in, side, side]`.
pub fn convolve(x: &Tensor, kernel: &Tensor, padding: usize, stride: usize) -> candle_core::Result<Tensor> {
    // candle's own kernel for cards is a hundred times slower than cuDNN's.
    #[cfg(feature = "cuda")]
    if matches!(x.device(), Device::Cuda(_)) && x.dtype() == DType::F32 && kernel.dtype() == DType::F32 {
        return crate::model::kernels::cuda::vae::convolve(x, kernel, padding, stride)
            .map_err(candle_core::Error::wrap);
    }
    x.conv2d(kernel, padding, stride, 1, 1)
}

/// A 3-D convolution whose kernel is its stride: cuts `[c, T, h, w]` into boxes and maps each to a token.
#[derive(Debug, Clone)]
pub struct PatchEmbed {
    linear: Linear,
    kernel: [usize; 3],
    channels: usize,
}

impl PatchEmbed {
    /// `name.weight` `[dim, channels, kt, kh, kw]`, `name.bias` `[dim]`.
    pub fn load(weights: &Weights, name: &str, channels: usize, dim: usize, kernel: [usize; 3]) -> Result<Self> {
        let at = weights.pp(name);
        let [kt, kh, kw] = kernel;
        let weight = at.get((dim, channels, kt, kh, kw), "weight")?.reshape((dim, channels * kt * kh * kw))?;
        Ok(Self { linear: Linear::new(weight.contiguous()?, Some(at.get(dim, "bias")?))?, kernel, channels })
    }

    /// `[channels, T, h, w]` → `[T/kt · h/kh · w/kw, dim]` in the order frame, row, column. A remainder that fills no
    /// box is dropped.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (c, t, h, w) = x.dims4()?;
        if c != self.channels {
            return Err(Error::Input(format!("a latent with {} channels is expected, not {c}", self.channels)));
        }
        let [kt, kh, kw] = self.kernel;
        let (nt, nh, nw) = (t / kt, h / kh, w / kw);
        let x = x.narrow(1, 0, nt * kt)?.narrow(2, 0, nh * kh)?.narrow(3, 0, nw * kw)?.contiguous()?;
        let x = x.reshape(vec![c, nt, kt, nh, kh, nw, kw])?.permute(vec![1, 3, 5, 0, 2, 4, 6])?;
        self.linear.forward(&x.contiguous()?.reshape((nt * nh * nw, c * kt * kh * kw))?)
    }
}

/// A convolution in time with kernel 3 that looks back only; before its first sample it sees copies of it.
#[derive(Debug, Clone)]
pub struct CausalConv1d {
    linear: Linear,
    stride: usize,
}

impl CausalConv1d {
    /// `name.weight` `[out, channels, 3]`, `name.bias` `[out]`.
    pub fn load(weights: &Weights, name: &str, channels: usize, out: usize, stride: usize) -> Result<Self> {
        let at = weights.pp(name);
        // Tap-major columns, so that a row of the unfolded input is three samples one after the other.
        let weight =
            at.get((out, channels, 3), "weight")?.permute((0, 2, 1))?.contiguous()?.reshape((out, 3 * channels))?;
        Ok(Self { linear: Linear::new(weight, Some(at.get(out, "bias")?))?, stride })
    }

    /// `sequences` sequences one below the other, `[sequences · T, channels]` → `[sequences · ceil(T / stride), out]`.
    pub fn forward(&self, x: &Tensor, sequences: usize) -> Result<Tensor> {
        let (rows, c) = x.dims2()?;
        if sequences == 0 || rows == 0 || rows % sequences != 0 {
            return Err(Error::Input(format!("{rows} samples are not {sequences} sequences")));
        }
        let t = rows / sequences;
        let mut windows = Vec::with_capacity(sequences * t.div_ceil(self.stride));
        for s in 0..sequences {
            let x = x.narrow(0, s * t, t)?;
            let first = x.narrow(0, 0, 1)?;
            let x = Tensor::cat(&[&first, &first, &x], 0)?;
            for i in (0..t).step_by(self.stride) {
                windows.push(x.narrow(0, i, 3)?.reshape((1, 3 * c))?);
            }
        }
        self.linear.forward(&Tensor::cat(&windows, 0)?)
    }
}
