//! Pictures that were seen before: their latents are kept, so that a face that is opened again begins sooner. Encoding the
//! motion context of 73 frames is the longest part of opening one.

use std::{
    collections::VecDeque,
    hash::{DefaultHasher, Hash, Hasher},
};

use candle_core::Tensor;

use crate::media::Portrait;

/// Pictures remembered; some megabytes each.
const REMEMBERED: usize = 16;

/// A picture and the size it is seen at: 128 bits of its bytes instead of the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key([u64; 2], (usize, usize));

impl Key {
    pub(super) fn of(portrait: &Portrait, size: (usize, usize)) -> Key {
        let half = |salt: u8| {
            let mut hasher = DefaultHasher::new();
            (salt, portrait.width, portrait.height, &portrait.rgb[..]).hash(&mut hasher);
            hasher.finish()
        };
        Key([half(1), half(2)], size)
    }
}

/// Reference latent `[16, 1, h, w]` and motion latents `[16, frames, h, w]` by picture, the newest first.
#[derive(Default)]
pub(super) struct Album(VecDeque<(Key, (Tensor, Tensor))>);

impl Album {
    /// What is known of a picture.
    pub(super) fn find(&mut self, key: Key) -> Option<(Tensor, Tensor)> {
        let at = self.0.iter().position(|(k, _)| *k == key)?;
        let found = self.0.remove(at)?;
        self.0.push_front(found.clone());
        Some(found.1)
    }

    pub(super) fn keep(&mut self, key: Key, looked: (Tensor, Tensor)) {
        self.0.push_front((key, looked));
        self.0.truncate(REMEMBERED);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn a_picture_is_known_by_its_bytes_and_size_and_old_ones_are_forgotten() {
        let portrait = |v: u8| Portrait { width: 2, height: 1, rgb: vec![v; 6].into() };
        let looked = || {
            let t = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
            (t.clone(), t)
        };
        let mut album = Album::default();
        let first = Key::of(&portrait(0), (64, 64));
        assert_eq!(first, Key::of(&portrait(0), (64, 64)));
        assert_ne!(first, Key::of(&portrait(0), (64, 80)));
        album.keep(first, looked());
        for v in 1..REMEMBERED as u8 {
            album.keep(Key::of(&portrait(v), (64, 64)), looked());
        }
        assert!(album.find(first).is_some(), "and so it is the newest");
        album.keep(Key::of(&portrait(99), (64, 64)), looked());
        assert!(album.find(first).is_some());
        assert!(album.find(Key::of(&portrait(1), (64, 64))).is_none());
    }
}
