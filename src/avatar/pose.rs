//! A pose video that leads the body in clip mode (MODEL.md §8.3; wan/speech2video.py::read_last_n_frames and
//! load_pose_cond of Wan-Video/Wan2.2 at 42bf4cf): sampled at the model's rate, fitted to the output size, cut into clips,
//! and encoded. Beyond its end follow frames of −1.

use candle_core::{Device, Tensor};

use super::{
    clip::{drop_first, pose_latents},
    studio::Studio,
};
use crate::model::{Error, Result, picture};

/// Which frames of a video of `count` frames at `fps` are shown at `rate`: every n-th, n the rounded ratio, at least 1.
pub fn sampled(count: usize, fps: f64, rate: f64) -> impl Iterator<Item = usize> {
    let every = if fps.is_finite() && rate > 0.0 { (fps / rate).round_ties_even().max(1.0) } else { 1.0 };
    (0..count).step_by(every as usize)
}

/// Interleaved 8-bit RGB of `size` (width, height) fitted to `output` (height, width): `[3, 1, height, width]` in −1..1,
/// resized and cropped in floats; what the picture does not cover is mid-grey.
pub fn fitted(rgb: &[u8], size: (usize, usize), output: (usize, usize)) -> Result<Tensor> {
    picture::prepare_float(rgb, size, output)
}

/// The pose latents `[16, T, h, w]` of clip `index` from all sampled and fitted frames; a clip beyond the video's end is
/// one of −1 throughout.
///
/// # Errors
/// [`Error::Input`] where frames differ in size or there are none.
pub fn latents(studio: &Studio, frames: &[Tensor], index: usize, clip_frames: usize) -> Result<Tensor> {
    drop_first(&pose_latents(studio, &clip(frames, index, clip_frames)?.to_device(studio.device())?)?)
}

/// The pixels of clip `index`, `[3, clip_frames, height, width]`.
pub fn clip(frames: &[Tensor], index: usize, clip_frames: usize) -> Result<Tensor> {
    let Some(first) = frames.first() else { return Err(Error::Input("the pose video has no frames".into())) };
    if let Some(other) = frames.iter().find(|f| f.dims() != first.dims()) {
        return Err(Error::Input(format!("pose frames of {:?} and {:?} are mixed", first.dims(), other.dims())));
    }
    let from = (index * clip_frames).min(frames.len());
    let there = &frames[from..(from + clip_frames).min(frames.len())];
    let (c, _, h, w) = first.dims4()?;
    let rest = Tensor::full(-1f32, (c, clip_frames - there.len(), h, w), &Device::Cpu)?;
    let parts: Vec<&Tensor> = there.iter().chain((rest.dim(1)? > 0).then_some(&rest)).collect();
    Ok(Tensor::cat(&parts, 1)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grey(v: u8) -> Tensor {
        fitted(&vec![v; 40 * 20 * 3], (40, 20), (64, 64)).unwrap()
    }

    #[test]
    fn frames_are_taken_at_the_models_rate() {
        assert_eq!(sampled(10, 30.0, 16.0).collect::<Vec<_>>(), [0, 2, 4, 6, 8]);
        assert_eq!(sampled(4, 16.0, 16.0).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(sampled(3, 10.0, 16.0).count(), 3);
        assert_eq!(sampled(3, f64::NAN, 16.0).count(), 3);
    }

    #[test]
    fn clips_follow_each_other_and_end_in_minus_one() {
        let frames: Vec<Tensor> = (0..6).map(|i| grey(i * 50)).collect();
        let value = |t: &Tensor, i: usize| {
            t.get(0).unwrap().get(i).unwrap().get(0).unwrap().get(0).unwrap().to_scalar::<f32>().unwrap()
        };
        let (one, two, three) =
            (clip(&frames, 0, 4).unwrap(), clip(&frames, 1, 4).unwrap(), clip(&frames, 2, 4).unwrap());
        assert_eq!(one.dims(), [3, 4, 64, 64]);
        assert!((value(&one, 3) - (150.0 / 127.5 - 1.0)).abs() < 1e-5);
        assert!((value(&two, 1) - (250.0 / 127.5 - 1.0)).abs() < 1e-5);
        assert_eq!((value(&two, 2), value(&two, 3), value(&three, 0)), (-1.0, -1.0, -1.0));
        assert!(clip(&[], 0, 4).is_err());
    }

    #[test]
    fn what_a_frame_does_not_cover_is_mid_grey() {
        // the short side is fitted, so an elongated output leaves bars
        let t = fitted(&vec![255; 30 * 30 * 3], (30, 30), (64, 128)).unwrap();
        let row = t.get(0).unwrap().get(0).unwrap().get(32).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!((row[0], row[127]), (0.0, 0.0));
        assert!((row[64] - 1.0).abs() < 1e-5);
    }
}
