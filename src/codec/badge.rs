//! The visible mark: a small badge drawn into the picture that says it is computer-made.

use super::CodecError;
use crate::media::I420;
use serde::{Deserialize, Serialize};

/// Where the badge stands; `Off` leaves it away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BadgePlace {
    TopLeft,
    TopRight,
    BottomLeft,
    #[default]
    BottomRight,
    Off,
}

/// In which language it speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BadgeLanguage {
    /// "AI-generated"
    #[default]
    En,
    /// "AI 生成"
    Zh,
}

/// Of a picture's height: how high the badge is, and its distance from the edges.
const HEIGHT: f32 = 1.0 / 16.0;
const MARGIN: f32 = 1.0 / 48.0;
/// Smaller than this it could not be read.
const LEAST: u32 = 14;

/// The badge fitted to one size of picture.
pub struct Badge {
    width: u32,
    height: u32,
    left: usize,
    top: usize,
    columns: usize,
    /// Per pixel, row by row: how much of the picture stays (0..256), and what is added to its luma.
    stamp: Vec<(u16, u8)>,
}

impl Badge {
    /// For pictures of `width × height`; `None` when it is off.
    ///
    /// # Errors
    /// [`CodecError::Picture`] when the built-in drawing cannot be read (a broken build).
    pub fn new(
        place: BadgePlace,
        language: BadgeLanguage,
        width: u32,
        height: u32,
    ) -> Result<Option<Badge>, CodecError> {
        let png: &[u8] = match language {
            BadgeLanguage::En => include_bytes!("badge/en.png"),
            BadgeLanguage::Zh => include_bytes!("badge/zh.png"),
        };
        let (right, bottom) = match place {
            BadgePlace::TopLeft => (false, false),
            BadgePlace::TopRight => (true, false),
            BadgePlace::BottomLeft => (false, true),
            BadgePlace::BottomRight => (true, true),
            BadgePlace::Off => return Ok(None),
        };
        let drawing = image::load_from_memory_with_format(png, image::ImageFormat::Png)
            .map_err(|e| CodecError::Picture(format!("the badge's drawing: {e}")))?
            .into_luma_alpha8();
        // Even sides and places: chroma is shared by four pixels.
        let even = |v: f32| ((v / 2.0).round() as u32) * 2;
        let rows = even(height as f32 * HEIGHT).max(LEAST).min(height);
        let columns = even(rows as f32 * drawing.width() as f32 / drawing.height() as f32).min(width);
        let margin = even(height as f32 * MARGIN);
        let place = |far: bool, size: u32, own: u32| {
            let most = size - own;
            (if far { most.saturating_sub(margin) } else { margin.min(most) } / 2 * 2) as usize
        };
        let small = image::imageops::resize(&drawing, columns, rows, image::imageops::FilterType::Triangle);
        let stamp = small.pixels().map(|p| {
            let [luma, alpha] = p.0.map(f32::from);
            let covered = alpha / 255.0;
            ((256.0 * (1.0 - covered)).round() as u16, (covered * (16.0 + luma / 255.0 * 219.0)).round() as u8)
        });
        Ok(Some(Badge {
            width,
            height,
            left: place(right, width, columns),
            top: place(bottom, height, rows),
            columns: columns as usize,
            stamp: stamp.collect(),
        }))
    }

    /// Whether it was made for pictures of this size.
    pub fn fits(&self, width: u32, height: u32) -> bool {
        (self.width, self.height) == (width, height)
    }

    /// Draws it. A picture that is higher is a stacked one: its lower part, the matte, becomes opaque where the badge
    /// is.
    pub fn draw(&self, picture: &mut I420) {
        let (w, h) = (self.width as usize, self.height as usize);
        if picture.width as usize != w || (picture.height as usize) < h {
            return;
        }
        let stacked = picture.height as usize >= 2 * h;
        for (y, row) in self.stamp.chunks_exact(self.columns).enumerate() {
            let at = (self.top + y) * w + self.left;
            for (luma, (keep, add)) in picture.y[at..at + self.columns].iter_mut().zip(row) {
                *luma = ((u16::from(*luma) * keep) >> 8).saturating_add(u16::from(*add)).min(235) as u8;
            }
            if stacked {
                let at = at + w * h;
                for (matte, (keep, _)) in picture.y[at..at + self.columns].iter_mut().zip(row) {
                    *matte = (*matte).max(16 + ((219 * (256 - u32::from(*keep))) >> 8) as u8);
                }
            }
        }
        for (y, pair) in self.stamp.chunks_exact(2 * self.columns).enumerate() {
            let (upper, lower) = pair.split_at(self.columns);
            let at = (self.top / 2 + y) * (w / 2) + self.left / 2;
            for x in 0..self.columns / 2 {
                let keep: i32 = [upper[2 * x], upper[2 * x + 1], lower[2 * x], lower[2 * x + 1]]
                    .iter()
                    .map(|(keep, _)| i32::from(*keep))
                    .sum();
                for plane in [&mut picture.u, &mut picture.v] {
                    plane[at + x] = (128 + (((i32::from(plane[at + x]) - 128) * keep) >> 10)) as u8;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grey(width: u32, height: u32) -> I420 {
        let n = (width * height) as usize;
        I420 { width, height, y: vec![100; n], u: vec![90; n / 4], v: vec![170; n / 4] }
    }

    #[test]
    fn it_stands_where_it_was_told_and_can_be_read_at_every_size() {
        for (width, height) in [(16, 16), (128, 128), (256, 256), (720, 400), (480, 832)] {
            for (place, right, bottom) in [
                (BadgePlace::TopLeft, 0, 0),
                (BadgePlace::TopRight, 1, 0),
                (BadgePlace::BottomLeft, 0, 1),
                (BadgePlace::BottomRight, 1, 1),
            ] {
                let badge = Badge::new(place, BadgeLanguage::Zh, width, height).unwrap().unwrap();
                let mut picture = grey(width, height);
                badge.draw(&mut picture);
                let changed: Vec<usize> = (0..picture.y.len()).filter(|i| picture.y[*i] != 100).collect();
                let (w, h) = (width as usize, height as usize);
                let mean = |f: &dyn Fn(usize) -> usize| changed.iter().map(|i| f(*i)).sum::<usize>() / changed.len();
                if w > 100 {
                    assert_eq!((mean(&|i| i % w) * 2 / w, mean(&|i| i / w) * 2 / h), (right, bottom), "{place:?}");
                    assert!(changed.iter().any(|i| picture.y[*i] > 200) && changed.iter().any(|i| picture.y[*i] < 60));
                }
            }
        }
        assert!(Badge::new(BadgePlace::Off, BadgeLanguage::En, 256, 256).unwrap().is_none());
    }

    #[test]
    fn under_it_a_stacked_pictures_matte_is_opaque() {
        let badge = Badge::new(BadgePlace::BottomRight, BadgeLanguage::En, 256, 256).unwrap().unwrap();
        let mut picture = grey(256, 512);
        picture.y[256 * 256..].fill(16);
        badge.draw(&mut picture);
        let (colour, matte) = picture.y.split_at(256 * 256);
        assert!(colour.iter().zip(matte).all(|(c, m)| *c < 200 || *m > 200), "letters are opaque");
        assert_eq!(matte.iter().filter(|m| **m == 16).count() * 10 / matte.len(), 9);
    }
}
