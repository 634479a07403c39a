//! The pose that a face follows in clip mode (MODEL.md §8.3 of the specification; wan/speech2video.py of Wan-Video/Wan2.2
//! at 42bf4cf): pictures at 16 a second, resized and cropped in floats, frames of −1 behind their end, a clip at a time.

use std::path::Path;

use candle_core::Tensor;

use crate::{
    avatar::{
        AvatarError,
        clip::{drop_first, pose_latents},
        studio::Studio,
    },
    codec::pose::PoseFile,
    media::Portrait,
    model::{self, Error, Result},
};

pub(super) struct Pose {
    file: PoseFile,
    /// Height and width.
    size: (usize, usize),
    /// The first picture, which also stands for the frames that are lost before it.
    first: Option<Portrait>,
    /// How often it is still to come.
    again: usize,
}

impl Pose {
    /// `lost` frames of the first clip are not shown.
    pub(super) fn open(path: &Path, size: (usize, usize), lost: usize) -> std::result::Result<Pose, AvatarError> {
        let wrong = |e: crate::codec::pose::PoseError| AvatarError::Options(e.to_string());
        let mut file = PoseFile::open(path).map_err(wrong)?;
        let first = file.next().map_err(wrong)?;
        if first.is_none() {
            return Err(AvatarError::Options(format!("{}: the pose has no pictures", path.display())));
        }
        Ok(Pose { file, size, first, again: lost + 1 })
    }

    /// Latents of the next clip `[16, frames / 4, h, w]`.
    pub(super) fn clip(&mut self, studio: &Studio, frames: usize) -> Result<Tensor> {
        let mut shown = Vec::with_capacity(frames);
        let nothing = || Tensor::full(-1f32, (3, 1, self.size.0, self.size.1), studio.device());
        for _ in 0..frames {
            let read;
            let picture = if self.again > 0 {
                self.again -= 1;
                self.first.as_ref()
            } else {
                read = self.file.next().map_err(|e| Error::Input(e.to_string()))?;
                read.as_ref()
            };
            shown.push(match picture {
                Some(p) => {
                    let size = (p.width as usize, p.height as usize);
                    model::picture::prepare_float(&p.rgb, size, self.size)?.to_device(studio.device())?
                }
                None => nothing()?,
            });
        }
        drop_first(&pose_latents(studio, &Tensor::cat(&shown, 1)?)?)
    }
}
