//! Portraits: PNG, JPEG or WebP bytes → an upright RGB [`Portrait`].
//!
//! Sizes are read from the header and checked before anything is decoded, so a small file that unfolds into gigabytes
//! is refused for the price of its header. EXIF orientation is applied, transparency is laid on white, and a picture
//! larger than any engine uses is made smaller here once instead of being carried around.

use super::{CodecError, guard::guarded, scale_i420, to_i420};
use crate::media::{Frame, I420, MediaTime, Pixels, Portrait};
use image::{
    DynamicImage, ImageDecoder, ImageEncoder, ImageError, ImageFormat, ImageReader, Rgb, RgbImage, imageops::FilterType,
};
use std::io::Cursor;

/// Most bytes that a picture may take as its decoder gives it: 50 million pixels of four channels fit at 8 bits, not at
/// 16.
const MOST_DECODED: u64 = 256 << 20;

/// Most bytes of a PNG's profiles and comments, unfolded: what the decoder allows by itself.
const MOST_BESIDE: u64 = 64 << 20;

/// What a caller accepts.
#[derive(Clone, Debug)]
pub struct PictureLimits {
    /// Largest file, in bytes.
    pub bytes: usize,
    /// Largest picture, in pixels. Whatever this is, a picture that takes more than 256 MiB when decoded is refused.
    pub pixels: u64,
    /// Smallest usable side, in pixels.
    pub smallest_side: u32,
    /// Longer sides are reduced to this.
    pub longest_side: u32,
}

impl Default for PictureLimits {
    fn default() -> Self {
        PictureLimits { bytes: 20 << 20, pixels: 50_000_000, smallest_side: 64, longest_side: 2048 }
    }
}

/// Why a picture cannot be used. Every text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum PictureError {
    #[error("the picture is empty (0 bytes); give a PNG, JPEG or WebP file")]
    Empty,
    #[error("the picture has {} MB and at most {} MB are accepted; make it smaller", megabytes(*bytes), megabytes(*most))]
    TooManyBytes { bytes: usize, most: usize },
    #[error("this is not a picture that can be read; give a PNG, JPEG or WebP file")]
    Unknown,
    #[error("{0} pictures are not accepted; save it as PNG, JPEG or WebP")]
    Format(&'static str),
    #[error(
        "the picture has {width} × {height} pixels and at most {} million are accepted; make it smaller",
        most / 1_000_000
    )]
    TooManyPixels { width: u32, height: u32, most: u64 },
    #[error(
        "the picture has {width} × {height} pixels, which take {} MB, and at most {} MB are accepted; save it with 8 bits \
         a channel, or make it smaller",
        megabytes(*bytes), megabytes(MOST_DECODED as usize)
    )]
    TooDeep { width: u32, height: u32, bytes: usize },
    #[error("the picture has only {width} × {height} pixels; give one of at least {least} × {least}")]
    TooSmall { width: u32, height: u32, least: u32 },
    #[error("the picture is extremely narrow ({width} × {height} pixels); crop it around the face")]
    TooNarrow { width: u32, height: u32 },
    #[error("the picture is damaged ({0}); save or export it again")]
    Corrupt(String),
}

fn megabytes(n: usize) -> String {
    format!("{:.1}", n as f64 / (1 << 20) as f64)
}

/// Decodes a portrait.
///
/// # Errors
/// See [`PictureError`].
pub fn decode_portrait(bytes: &[u8], limits: &PictureLimits) -> Result<Portrait, PictureError> {
    if bytes.is_empty() {
        return Err(PictureError::Empty);
    }
    if bytes.len() > limits.bytes {
        return Err(PictureError::TooManyBytes { bytes: bytes.len(), most: limits.bytes });
    }
    let format = match image::guess_format(bytes) {
        Ok(format @ (ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP)) => format,
        Ok(ImageFormat::Gif) => return Err(PictureError::Format("GIF")),
        Ok(ImageFormat::Bmp) => return Err(PictureError::Format("BMP")),
        Ok(ImageFormat::Tiff) => return Err(PictureError::Format("TIFF")),
        Ok(ImageFormat::Avif) => return Err(PictureError::Format("AVIF")),
        Ok(_) => return Err(PictureError::Format("such")),
        Err(_) if bytes.get(4..8) == Some(b"ftyp") => return Err(PictureError::Format("HEIC")),
        Err(_) => return Err(PictureError::Unknown),
    };
    let corrupt = |e: ImageError| PictureError::Corrupt(plain(&e));
    if format == ImageFormat::Png && !whole_palette(bytes) {
        return Err(PictureError::Corrupt("its palette ends within a colour".into()));
    }
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut allowed = image::Limits::no_limits();
    // Counts for PNG alone, and there for everything but the pixels.
    allowed.max_alloc = Some(MOST_BESIDE);
    reader.limits(allowed);
    let mut decoder = guarded(|| reader.into_decoder()).map_err(PictureError::Corrupt)?.map_err(corrupt)?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > limits.pixels {
        return Err(PictureError::TooManyPixels { width, height, most: limits.pixels });
    }
    let bytes = decoder.total_bytes();
    if bytes > MOST_DECODED {
        return Err(PictureError::TooDeep { width, height, bytes: bytes as usize });
    }
    if width.min(height) < limits.smallest_side {
        return Err(PictureError::TooSmall { width, height, least: limits.smallest_side });
    }
    if width.max(height) / width.min(height).max(1) > 8 {
        return Err(PictureError::TooNarrow { width, height });
    }
    // A broken EXIF block is no reason to refuse a good picture.
    let orientation = decoder.orientation().unwrap_or(image::metadata::Orientation::NoTransforms);
    let mut picture =
        guarded(|| DynamicImage::from_decoder(decoder)).map_err(PictureError::Corrupt)?.map_err(corrupt)?;
    let longest = width.max(height);
    if longest > limits.longest_side {
        // At least two pixels survive: the aspect ratio is bounded above.
        let scaled = |side: u32| (u64::from(side) * u64::from(limits.longest_side)).div_ceil(u64::from(longest)) as u32;
        picture = flatten(picture).resize_exact(scaled(width), scaled(height), FilterType::Triangle);
    }
    picture.apply_orientation(orientation);
    let rgb = flatten(picture).into_rgb8();
    let (width, height) = rgb.dimensions();
    Ok(Portrait { width, height, rgb: rgb.into_raw().into() })
}

/// Whether the palette of a PNG, if it has one, is of whole colours: the decoder (png 0.18.1) panics where it is not.
fn whole_palette(png: &[u8]) -> bool {
    let mut rest = png.get(8..).unwrap_or_default();
    while let [a, b, c, d, kind @ ..] = rest {
        let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
        if kind.starts_with(b"PLTE") {
            return length.is_multiple_of(3);
        }
        // Length, kind, data, checksum.
        rest = rest.get(length.saturating_add(12)..).unwrap_or_default();
    }
    true
}

/// A portrait as a PNG file.
///
/// # Errors
/// Pixels that are not as many as the size says.
pub fn encode_png(portrait: &Portrait) -> Result<Vec<u8>, PictureError> {
    let mut png = Vec::new();
    let encoder = image::codecs::png::PngEncoder::new(&mut png);
    encoder
        .write_image(&portrait.rgb, portrait.width, portrait.height, image::ExtendedColorType::Rgb8)
        .map_err(|e| PictureError::Corrupt(plain(&e)))?;
    Ok(png)
}

/// Lays transparent pixels on white.
fn flatten(picture: DynamicImage) -> DynamicImage {
    if !picture.color().has_alpha() {
        return picture;
    }
    let rgba = picture.into_rgba8();
    let mut rgb = RgbImage::new(rgba.width(), rgba.height());
    for (from, to) in rgba.pixels().zip(rgb.pixels_mut()) {
        let [r, g, b, a] = from.0.map(u32::from);
        let over = |c: u32| ((c * a + 255 * (255 - a) + 127) / 255) as u8;
        *to = Rgb([over(r), over(g), over(b)]);
    }
    DynamicImage::ImageRgb8(rgb)
}

/// One line of a decoder's complaint.
fn plain(error: &ImageError) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or("unknown fault");
    line.chars().take(160).collect()
}

/// The portrait cut to a frame's shape about its middle, as the encoder wants it.
///
/// # Errors
/// [`CodecError::Picture`] for one without pixels.
pub fn cover(portrait: &Portrait, width: u32, height: u32) -> Result<I420, CodecError> {
    let (w, h) = (portrait.width as usize, portrait.height as usize);
    if w < 2 || h < 2 || portrait.rgb.len() != 3 * w * h || width == 0 || height == 0 {
        return Err(CodecError::Picture("the portrait has no pixels".into()));
    }
    let (want_w, want_h) = (width as usize, height as usize);
    // The largest rectangle of the wanted shape, with even sides.
    let (mut cut_w, mut cut_h) = (w, w * want_h / want_w);
    if cut_h > h {
        (cut_w, cut_h) = (h * want_w / want_h, h);
    }
    let (cut_w, cut_h) = ((cut_w / 2 * 2).max(2).min(w), (cut_h / 2 * 2).max(2).min(h));
    let (left, top) = ((w - cut_w) / 2, (h - cut_h) / 2);
    let mut rgb = Vec::with_capacity(3 * cut_w * cut_h);
    for y in 0..cut_h {
        let start = 3 * ((top + y) * w + left);
        rgb.extend_from_slice(&portrait.rgb[start..start + 3 * cut_w]);
    }
    let frame = Frame {
        at: MediaTime::ZERO,
        width: cut_w as u32,
        height: cut_h as u32,
        pixels: Pixels::Rgb(rgb.into()),
        matte: None,
    };
    scale_i420(&to_i420(&frame)?, width, height)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_palette_that_ends_within_a_colour_is_refused() {
        let png = include_bytes!("../../tests/it/data/palette.png");
        let error = decode_portrait(png, &PictureLimits { smallest_side: 16, ..PictureLimits::default() }).unwrap_err();
        assert!(matches!(&error, PictureError::Corrupt(why) if why.contains("palette")), "{error}");
    }

    fn png(picture: &DynamicImage) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        picture.write_to(&mut bytes, ImageFormat::Png).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn transparency_lies_on_white_and_size_is_kept() {
        let mut rgba = image::RgbaImage::new(80, 64);
        rgba.put_pixel(0, 0, image::Rgba([10, 20, 30, 255]));
        rgba.put_pixel(1, 0, image::Rgba([0, 0, 0, 128]));
        let p = decode_portrait(&png(&rgba.into()), &PictureLimits::default()).unwrap();
        assert_eq!((p.width, p.height), (80, 64));
        assert_eq!(&p.rgb[..9], &[10, 20, 30, 127, 127, 127, 255, 255, 255]);
    }

    #[test]
    fn large_pictures_are_reduced_and_bombs_refused_by_their_header() {
        let big = DynamicImage::new_rgb8(3000, 1500);
        let bytes = png(&big);
        let p = decode_portrait(&bytes, &PictureLimits::default()).unwrap();
        assert_eq!((p.width, p.height), (2048, 1024));
        let limits = PictureLimits { pixels: 1_000_000, ..Default::default() };
        assert!(matches!(decode_portrait(&bytes, &limits), Err(PictureError::TooManyPixels { .. })));
        // A header that promises 65 000 × 65 000 pixels over no data at all.
        let mut bomb = bytes;
        bomb[16..20].copy_from_slice(&65_000u32.to_be_bytes());
        bomb[20..24].copy_from_slice(&65_000u32.to_be_bytes());
        assert!(decode_portrait(&bomb, &PictureLimits::default()).is_err());
    }

    #[test]
    fn small_narrow_and_foreign_pictures_get_a_sentence() {
        let limits = PictureLimits::default();
        for (bytes, word) in [
            (png(&DynamicImage::new_rgb8(20, 20)), "at least 64"),
            (png(&DynamicImage::new_rgb8(1000, 100)), "crop"),
            (b"GIF89a\x10\0\x10\0".to_vec(), "GIF"),
            (b"\0\0\0\x18ftypheic\0\0\0\0".to_vec(), "accepted"),
            (b"hello".to_vec(), "not a picture"),
            (vec![], "empty"),
        ] {
            let said = decode_portrait(&bytes, &limits).unwrap_err().to_string();
            assert!(said.contains(word), "{said}");
        }
    }
}
