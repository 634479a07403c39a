//! Pictures as they travel between rooms.

use super::{Epoch, MediaTime};
use std::{sync::Arc, time::Duration};

/// The bytes of a picture, row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pixels {
    /// Packed, `3 * width * height` bytes.
    Rgb(Arc<[u8]>),
    /// Planar, colours as [`I420`] has them: Y, then U, then V, `width * height * 3/2` bytes.
    I420(Arc<[u8]>),
}

impl Pixels {
    /// The bytes if they are packed RGB.
    pub fn rgb(&self) -> Option<&Arc<[u8]>> {
        match self {
            Pixels::Rgb(bytes) => Some(bytes),
            Pixels::I420(_) => None,
        }
    }
}

/// One video frame of 8 bits a value.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Start of the time this frame shows.
    pub at: MediaTime,
    pub width: u32,
    pub height: u32,
    pub pixels: Pixels,
    /// How much the presenter covers the background, `width * height` bytes, 255 where nothing of it is seen. Only from
    /// engines that know it, and only while somebody asks for it.
    pub matte: Option<Arc<[u8]>>,
}

/// Planar YUV 4:2:0, BT.601 limited range (what H.264 decoders in browsers assume for such sizes).
#[derive(Clone, Debug)]
pub struct I420 {
    pub width: u32,
    pub height: u32,
    pub y: Vec<u8>,
    pub u: Vec<u8>,
    pub v: Vec<u8>,
}

/// What a generator gives back for one block of speech.
#[derive(Clone, Debug)]
pub struct FrameBlock {
    pub epoch: Epoch,
    /// 0, 1, 2… within its stream.
    pub index: u64,
    pub frames: Vec<Frame>,
    pub stages: StageTimes,
    /// Control values per frame (order and units: `pocket/README.md`); empty where the engine has none.
    pub controls: Vec<[f32; 10]>,
}

/// Where the time of one block went.
#[derive(Clone, Copy, Debug, Default)]
pub struct StageTimes {
    pub features: Duration,
    pub generation: Duration,
    pub decode: Duration,
    /// Where several devices share the work and are at several blocks at once: how long the busiest was at this one.
    pub busiest: Option<Duration>,
}

/// The shape of what a generator makes and needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Geometry {
    pub width: u32,
    pub height: u32,
    /// Frames per second.
    pub fps: u32,
    /// Frames in block 0 (shorter for a causal VAE) and in every later block.
    pub first_block_frames: u32,
    pub block_frames: u32,
    /// Speech needed beyond a block's own end before the block can be made.
    pub look_ahead: MediaTime,
    /// Frames can come with a matte.
    pub matte: bool,
}

impl Geometry {
    /// Frames in block `index`.
    pub fn block(&self, index: u64) -> u32 {
        if index == 0 { self.first_block_frames } else { self.block_frames }
    }
    /// Index of the first frame of block `index` in the stream.
    pub fn first_frame(&self, index: u64) -> u64 {
        if index == 0 { 0 } else { u64::from(self.first_block_frames) + (index - 1) * u64::from(self.block_frames) }
    }
    /// Length of block `index` on the timeline.
    pub fn block_span(&self, index: u64) -> MediaTime {
        MediaTime::from_units(i64::from(self.block(index)), self.fps)
    }
    pub fn frame_span(&self) -> MediaTime {
        MediaTime::from_units(1, self.fps)
    }
}

/// A reference picture, upright, packed RGB of any size; the generator crops and scales.
#[derive(Clone, Debug)]
pub struct Portrait {
    pub width: u32,
    pub height: u32,
    pub rgb: Arc<[u8]>,
}
