//! The words every room speaks: time, sound, pictures. Uses `std` only.
//!
//! Nothing here does I/O, reads a clock or knows a codec.

mod picture;
mod sound;
mod time;

pub use picture::{Frame, FrameBlock, Geometry, I420, Pixels, Portrait, StageTimes};
pub use sound::{AudioBlock, Pcm, SPEECH_RATE};
pub use time::{Epoch, MediaTime};
