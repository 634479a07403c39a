//! What a viewer is shown of a frame: all of it, the presenter with a soft matte below, or the presenter before a flat
//! colour.
//!
//! H.264 in calls knows no transparency. A *stacked* picture carries it all the same: colour above, matte below in
//! luma, twice as high. The colour is the presenter's alone: where the background shines through, the presenter's own
//! colour is continued outward, so that neither chroma at half size nor quantisation lets background in at the edge.

use super::{CodecError, to_i420, to_rgb};
use crate::media::{Frame, I420, Pixels};
use std::{fmt, str::FromStr};

/// See the module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum View {
    #[default]
    Plain,
    Stacked,
    Colour([u8; 3]),
}

impl View {
    /// Needs frames with a matte.
    pub fn cuts_out(self) -> bool {
        self != View::Plain
    }

    /// Height of its pictures for frames of `height`.
    pub fn height(self, height: u32) -> u32 {
        if self == View::Stacked { 2 * height } else { height }
    }
}

/// `plain`, `stacked`, `green`, `blue`, `magenta`, `black`, `white` or `#RRGGBB`.
impl FromStr for View {
    type Err = String;
    fn from_str(s: &str) -> Result<View, String> {
        let colour = match s {
            "plain" => return Ok(View::Plain),
            "stacked" | "transparent" => return Ok(View::Stacked),
            "green" => [0, 177, 64],
            "blue" => [0, 71, 187],
            "magenta" => [255, 0, 255],
            "black" => [0, 0, 0],
            "white" => [255, 255, 255],
            _ => {
                let digits = s.strip_prefix('#').filter(|d| d.len() == 6 && d.bytes().all(|b| b.is_ascii_hexdigit()));
                let value = digits.and_then(|d| u32::from_str_radix(d, 16).ok());
                let Some(value) = value else {
                    return Err(format!(
                        "There is no view \"{s}\"; allowed are plain, stacked (or transparent), green, blue, magenta, black, \
                         white, or a colour such as #00b140"
                    ));
                };
                [(value >> 16) as u8, (value >> 8) as u8, value as u8]
            }
        };
        Ok(View::Colour(colour))
    }
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            View::Plain => f.write_str("plain"),
            View::Stacked => f.write_str("stacked"),
            View::Colour([r, g, b]) => write!(f, "#{r:02x}{g:02x}{b:02x}"),
        }
    }
}

/// A frame as this view's encoder wants it. A frame without a matte is not shown in a stacked view (fully transparent)
/// nor before a colour: a background that flashes up would be worse than a moment of nothing.
///
/// # Errors
/// [`CodecError::Picture`] for a buffer of the wrong length or odd sides.
pub fn view_of(frame: &Frame, view: View) -> Result<I420, CodecError> {
    let matte = match (&frame.matte, view) {
        (_, View::Plain) => return to_i420(frame),
        (None, view) => return nothing(frame.width, frame.height, view),
        (Some(matte), _) => matte,
    };
    let pixels = (frame.width * frame.height) as usize;
    if matte.len() != pixels {
        return Err(CodecError::Picture(format!("a matte of {} bytes does not fit {pixels} pixels", matte.len())));
    }
    let mut rgb = continued(&to_rgb(frame)?, matte, frame.width as usize, frame.height as usize);
    if let View::Colour(colour) = view {
        for (px, &m) in rgb.chunks_exact_mut(3).zip(matte.iter()) {
            for (c, &behind) in px.iter_mut().zip(&colour) {
                *c = mix(*c, behind, m);
            }
        }
    }
    let mut picture = to_i420(&Frame { pixels: Pixels::Rgb(rgb.into()), matte: None, ..frame.clone() })?;
    if view == View::Stacked {
        stack(&mut picture, matte.iter().copied());
    }
    Ok(picture)
}

/// Nobody there: transparent, or the flat colour.
///
/// # Errors
/// As [`view_of`].
pub fn nothing(width: u32, height: u32, view: View) -> Result<I420, CodecError> {
    let pixels = (width * height) as usize;
    let colour = if let View::Colour(colour) = view { colour } else { [0; 3] };
    let rgb: Vec<u8> = colour.into_iter().cycle().take(3 * pixels).collect();
    let frame = Frame { at: Default::default(), width, height, pixels: Pixels::Rgb(rgb.into()), matte: None };
    let mut picture = to_i420(&frame)?;
    if view == View::Stacked {
        stack(&mut picture, std::iter::repeat_n(0, pixels));
    }
    Ok(picture)
}

/// Puts the matte below, in luma (limited range), without colour.
fn stack(picture: &mut I420, matte: impl Iterator<Item = u8>) {
    picture.y.extend(matte.map(|m| (16 + (u32::from(m) * 219 + 127) / 255) as u8));
    for plane in [&mut picture.u, &mut picture.v] {
        plane.resize(2 * plane.len(), 128);
    }
    picture.height *= 2;
}

fn mix(front: u8, behind: u8, matte: u8) -> u8 {
    let (f, b, m) = (u32::from(front), u32::from(behind), u32::from(matte));
    ((f * m + b * (255 - m) + 127) / 255) as u8
}

/// From here on a pixel is the presenter's own.
const OWN: u8 = 250;

/// The picture with the presenter's colours continued into everything that is not wholly presenter: each pixel takes
/// the mean of the nearest own pixels, found over a pyramid of halved pictures (pull, then push).
fn continued(rgb: &[u8], matte: &[u8], width: usize, height: usize) -> Vec<u8> {
    /// `[r, g, b, weight]`, colours times weight.
    struct Level {
        width: usize,
        height: usize,
        px: Vec<[f32; 4]>,
    }
    let own = |(c, &m): (&[u8], &u8)| {
        if m >= OWN { [f32::from(c[0]), f32::from(c[1]), f32::from(c[2]), 1.0] } else { [0.0; 4] }
    };
    let px = rgb.chunks_exact(3).zip(matte).map(own).collect();
    let mut levels = vec![Level { width, height, px }];
    while let Some(last) = levels.last().filter(|l| l.width > 1 || l.height > 1) {
        let (w, h) = (last.width.div_ceil(2), last.height.div_ceil(2));
        let mut px = vec![[0.0f32; 4]; w * h];
        for (y, row) in last.px.chunks_exact(last.width).enumerate() {
            let to = &mut px[y / 2 * w..][..w];
            for (x, from) in row.iter().enumerate() {
                to[x / 2].iter_mut().zip(from).for_each(|(t, f)| *t += f);
            }
        }
        // A weight above one says no more than one: the nearest count, not the most.
        for p in px.iter_mut().filter(|p| p[3] > 1.0) {
            let weight = p[3];
            p.iter_mut().for_each(|v| *v /= weight);
        }
        levels.push(Level { width: w, height: h, px });
    }
    for i in (0..levels.len().saturating_sub(1)).rev() {
        let (fine, coarse) = levels.split_at_mut(i + 1);
        let (Some(fine), Some(coarse)) = (fine.last_mut(), coarse.first()) else { continue };
        let w = fine.width;
        for (y, row) in fine.px.chunks_exact_mut(w).enumerate() {
            let from = &coarse.px[y / 2 * coarse.width..][..coarse.width];
            for (x, p) in row.iter_mut().enumerate().filter(|(_, p)| p[3] < 1.0) {
                let missing = 1.0 - p[3];
                p.iter_mut().zip(&from[x / 2]).for_each(|(v, c)| *v += missing * c);
            }
        }
    }
    levels[0].px.iter().flat_map(|p| [p[0], p[1], p[2]].map(|v| (v + 0.5) as u8)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::MediaTime;

    /// A red disc before blue, its edge mixed over some pixels.
    fn disc() -> Frame {
        let (mut rgb, mut matte) = (Vec::new(), Vec::new());
        for i in 0..64 * 64 {
            let radius = ((i % 64) as f32 - 31.5).hypot((i / 64) as f32 - 31.5);
            let m = ((22.0 - radius) / 5.0).clamp(0.0, 1.0);
            matte.push((m * 255.0) as u8);
            rgb.extend([(200.0 * m + 20.0 * (1.0 - m)) as u8, 30, (20.0 * m + 220.0 * (1.0 - m)) as u8]);
        }
        Frame { at: MediaTime::ZERO, width: 64, height: 64, pixels: Pixels::Rgb(rgb.into()), matte: Some(matte.into()) }
    }

    #[test]
    fn a_stacked_picture_has_the_matte_below_and_no_background_in_its_colours() {
        let frame = disc();
        let picture = view_of(&frame, View::Stacked).unwrap();
        assert_eq!((picture.height, picture.y.len(), picture.u.len()), (128, 8192, 2048));
        let matte = frame.matte.clone().unwrap();
        for (luma, m) in picture.y[4096..].iter().zip(matte.iter()) {
            assert!((f32::from(*luma) - 16.0 - f32::from(*m) * 219.0 / 255.0).abs() <= 0.6);
        }
        assert!(picture.u[1024..].iter().chain(&picture.v[1024..]).all(|c| *c == 128));
        // Red has little blue-difference: background would raise it.
        let red = view_of(
            &Frame { pixels: Pixels::Rgb([200, 30, 20].repeat(4096).into()), matte: None, ..frame },
            View::Plain,
        )
        .unwrap();
        assert!(picture.u[..1024].iter().zip(&red.u).all(|(a, b)| a.abs_diff(*b) <= 2));
    }

    #[test]
    fn before_a_colour_edges_mix_with_it_and_a_missing_matte_shows_nothing() {
        let frame = disc();
        let picture = view_of(&frame, View::Colour([0, 177, 64])).unwrap();
        let plain = nothing(64, 64, View::Colour([0, 177, 64])).unwrap();
        assert_eq!((picture.y[0], picture.u[0], picture.v[0]), (plain.y[0], plain.u[0], plain.v[0]));
        let hidden = Frame { matte: None, ..frame.clone() };
        assert_eq!(view_of(&hidden, View::Colour([0, 177, 64])).unwrap().y, plain.y);
        assert!(view_of(&hidden, View::Stacked).unwrap().y[4096..].iter().all(|m| *m == 16));
        let broken = Frame { matte: Some(vec![0; 3].into()), ..frame };
        assert!(view_of(&broken, View::Stacked).is_err());
    }

    #[test]
    fn views_have_names() {
        for name in ["plain", "stacked", "green", "#0a0b0c", "transparent"] {
            let view: View = name.parse().unwrap();
            assert_eq!(view.to_string().parse::<View>().unwrap(), view);
        }
        for wrong in ["", "Green", "#12345", "#12345g", "+12345"] {
            assert!(wrong.parse::<View>().is_err(), "{wrong}");
        }
    }
}
