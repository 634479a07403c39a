//! From wave to what the transformer hears: normalisation, the change of rate from 50 to 30 Hz and the per-frame
//! buckets (MODEL.md §3.1, §3.3, §3.4; wan/modules/s2v/audio_encoder.py of Wan-Video/Wan2.2 at 42bf4cf).

use candle_core::{Result, Tensor};

/// Feature frames per second that wav2vec2 is taken to give.
pub const SOURCE_RATE: f64 = 50.0;
/// `video_rate` of the official encoder; the video's own rate is another (16 or 25).
pub const FEATURE_RATE: f64 = 30.0;

/// Zero mean, unit variance over all samples handed in (population variance, 1e-7 inside the root).
pub fn normalise(samples: &[f32]) -> Vec<f32> {
    let n = samples.len().max(1) as f64;
    let mean = samples.iter().map(|&x| x as f64).sum::<f64>() / n;
    let variance = samples.iter().map(|&x| (x as f64 - mean).powi(2)).sum::<f64>() / n;
    let scale = 1.0 / (variance + 1e-7).sqrt();
    samples.iter().map(|&x| ((x as f64 - mean) * scale) as f32).collect()
}

/// Frames that `frames` frames at `from` per second become at `to` per second: truncated, in f64, in this order.
pub fn resampled_len(frames: usize, from: f64, to: f64) -> usize {
    (frames as f64 / from * to) as usize
}

/// Linear interpolation along time with aligned corners, `[layers, frames, channels]` to `[layers, n, channels]`;
/// source positions in f32 as torch computes them.
pub fn interpolate(features: &Tensor, n: usize) -> Result<Tensor> {
    let frames = features.dim(1)?;
    if n == 0 || frames == 0 {
        candle_core::bail!("{frames} feature frames cannot become {n}: the audio is too short");
    }
    let ratio = if n > 1 { (frames - 1) as f32 / (n - 1) as f32 } else { 0.0 };
    let (mut low, mut high, mut part) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..n {
        let p = i as f32 * ratio;
        let l = (p as usize).min(frames - 1);
        low.push(l as u32);
        high.push((l + 1).min(frames - 1) as u32);
        part.push(p - l as f32);
    }
    let device = features.device();
    let at = |index: Vec<u32>| features.index_select(&Tensor::new(index, device)?, 1);
    let part = Tensor::from_vec(part, (1, n, 1), device)?.to_dtype(features.dtype())?;
    let rest = part.affine(-1.0, 1.0)?;
    at(low)?.broadcast_mul(&rest)? + at(high)?.broadcast_mul(&part)?
}

/// 50 Hz states `[layers, frames, channels]` at 30 Hz.
pub fn to_feature_rate(states: &Tensor) -> Result<Tensor> {
    interpolate(states, resampled_len(states.dim(1)?, SOURCE_RATE, FEATURE_RATE))
}

/// Which source frame each of `count` frames at `target` per second shows, beginning at source frame `start`: rounded
/// half to even, within `total` frames.
pub fn sample_indices(source: f64, total: usize, target: f64, count: usize, start: usize) -> Vec<usize> {
    let begin = start as f64 / source;
    let end = begin + count as f64 / target;
    let step = (end - begin) / count.max(1) as f64;
    let last = total.saturating_sub(1);
    (0..count).map(|i| (((i as f64 * step + begin) * source).round_ties_even().max(0.0) as usize).min(last)).collect()
}

/// Frames gathered per video frame, and how many clips they fill.
pub struct Buckets {
    /// `[clips·clip_frames, layers, channels·(2m+1)]`; with one layer `[…, channels·(2m+1)]`.
    pub frames: Tensor,
    pub clips: usize,
}

/// Takes the features at `centres` with `m` neighbours on each side `stride` apart; centres behind the end are zeros.
fn gather(features: &Tensor, centres: &[usize], m: usize, stride: usize) -> Result<Tensor> {
    let (layers, frames, channels) = features.dims3()?;
    let device = features.device();
    let mut index = Vec::new();
    let within = centres.iter().take_while(|&&c| c < frames).count();
    for &c in &centres[..within] {
        for j in 0..2 * m + 1 {
            index.push((c + j * stride).saturating_sub(m * stride).min(frames - 1) as u32);
        }
    }
    let wide = channels * (2 * m + 1);
    let zeros = Tensor::zeros((layers, centres.len() - within, wide), features.dtype(), device)?;
    let joined = if within == 0 {
        zeros
    } else {
        let real = features.contiguous()?.index_select(&Tensor::new(index, device)?, 1)?;
        Tensor::cat(&[&real.reshape((layers, within, wide))?, &zeros], 1)?
    };
    let out = joined.transpose(0, 1)?.contiguous()?;
    if layers == 1 { out.squeeze(1) } else { Ok(out) }
}

/// The buckets of S2V and LiveAvatar: `[layers, T30, channels]` at 30 Hz to one embedding per video frame at `fps`, in
/// whole clips of `clip_frames`; one clip more when the audio fits exactly. `m` neighbours on each side join in.
pub fn buckets(features: &Tensor, fps: f64, clip_frames: usize, m: usize) -> Result<Buckets> {
    let frames = features.dim(1)?;
    if clip_frames == 0 || fps <= 0.0 {
        candle_core::bail!("clips of {clip_frames} frames at {fps} fps cannot be cut");
    }
    let clips = (frames as f64 / (clip_frames as f64 * (FEATURE_RATE / fps))) as usize + 1;
    let count = clips * clip_frames;
    let needed = (count as f64 / fps * FEATURE_RATE).ceil() as usize;
    let centres = sample_indices(FEATURE_RATE, needed.max(frames), fps, count, 0);
    Ok(Buckets { frames: gather(features, &centres, m, (FEATURE_RATE / fps) as usize)?, clips })
}

/// The older bucketing by a fixed stride, neighbours two apart (kept because the official module has it; S2V does not
/// use it).
pub fn buckets_by_stride(features: &Tensor, stride: usize, clip_frames: usize, m: usize) -> Result<Buckets> {
    let frames = features.dim(1)?;
    if clip_frames == 0 || stride == 0 {
        candle_core::bail!("clips of {clip_frames} frames, every {stride}-th, cannot be cut");
    }
    let clips = (frames as f64 / (clip_frames * stride) as f64) as usize + 1;
    let centres: Vec<usize> = (0..clips * clip_frames).map(|i| i * stride).collect();
    Ok(Buckets { frames: gather(features, &centres, m, 2)?, clips })
}

/// Buckets as the transformer takes them: `[layers, channels, frames]`.
pub fn as_audio_input(buckets: &Tensor) -> Result<Tensor> {
    buckets.permute((1, 2, 0))?.contiguous()
}
