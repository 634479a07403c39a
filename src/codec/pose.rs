//! A pose video as the large engine takes it: pictures at 16 a second, from MP4 with H.264, from a folder of pictures in the
//! order of their names, or from uncompressed video (Y4M, which every converter writes: `ffmpeg -i VIDEO pose.y4m`).

use super::colour::rgb_of;
use super::{
    movie::{Movie, Planes, is_mp4},
    picture::{PictureLimits, decode_portrait},
};
use crate::media::Portrait;
use std::{
    collections::VecDeque,
    fs::File,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

/// Pictures a second that come out.
pub const POSE_RATE: u32 = 16;
/// No side of a video is longer, no header line either.
const LONGEST: usize = 8192;

/// Why a pose cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {why}")]
pub struct PoseError {
    path: String,
    why: String,
}

/// A pose under way; pictures are read when they are asked for.
pub struct PoseFile {
    path: PathBuf,
    kind: Kind,
}

enum Kind {
    Folder(VecDeque<PathBuf>),
    Movie { movie: Box<Movie>, every: usize, read: usize },
    Video { file: BufReader<File>, width: usize, height: usize, every: usize, read: usize },
}

impl PoseFile {
    /// Opens a folder, an MP4 file (H.264) or a Y4M file (4:2:0, 8 bits).
    ///
    /// # Errors
    /// It is none of these, or is empty.
    pub fn open(path: &Path) -> Result<PoseFile, PoseError> {
        let wrong = |why: String| PoseError { path: path.display().to_string(), why };
        if path.is_dir() {
            let entries = std::fs::read_dir(path).map_err(|e| wrong(e.to_string()))?;
            let mut names: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
            let picture = |p: &PathBuf| {
                let end = p.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
                matches!(end.as_deref(), Some("png" | "jpg" | "jpeg" | "webp"))
            };
            names.retain(picture);
            names.sort();
            if names.is_empty() {
                return Err(wrong("holds no pictures (.png, .jpg, .webp)".into()));
            }
            return Ok(PoseFile { path: path.into(), kind: Kind::Folder(names.into()) });
        }
        let mut file = BufReader::new(File::open(path).map_err(|e| wrong(format!("cannot be opened: {e}")))?);
        if is_mp4(file.fill_buf().map_err(|e| wrong(e.to_string()))?) {
            let movie = Box::new(Movie::open(file.into_inner()).map_err(wrong)?);
            let every = every(movie.fps);
            return Ok(PoseFile { path: path.into(), kind: Kind::Movie { movie, every, read: 0 } });
        }
        let header = line(&mut file).map_err(|e| wrong(e.to_string()))?;
        let mut words = header.split(' ');
        if words.next() != Some("YUV4MPEG2") {
            return Err(wrong("is neither MP4 nor Y4M; convert it: ffmpeg -i VIDEO -c:v libx264 pose.mp4".into()));
        }
        let (mut width, mut height, mut fps) = (0, 0, 25.0);
        for word in words {
            let (key, value) = word.split_at(word.char_indices().nth(1).map_or(word.len(), |c| c.0));
            match key {
                "W" => width = value.parse().unwrap_or(0),
                "H" => height = value.parse().unwrap_or(0),
                "F" => {
                    let (n, d) = value.split_once(':').unwrap_or((value, "1"));
                    fps = n.parse::<f64>().unwrap_or(0.0) / d.parse::<f64>().unwrap_or(0.0);
                }
                "C" if !["420", "420jpeg", "420mpeg2", "420paldv"].contains(&value) => {
                    return Err(wrong(format!("is Y4M of kind {value}; convert it with -pix_fmt yuv420p")));
                }
                _ => {}
            }
        }
        if !(2..=LONGEST).contains(&width) || !(2..=LONGEST).contains(&height) || !(fps > 0.0 && fps < 1000.0) {
            return Err(wrong(format!("tells {width}x{height} at {fps} frames a second, which cannot be")));
        }
        let kind = Kind::Video { file, width, height, every: every(fps), read: 0 };
        Ok(PoseFile { path: path.into(), kind })
    }

    /// The next picture, `None` after the last.
    ///
    /// # Errors
    /// A picture that cannot be read, a video that ends within a frame.
    pub fn next(&mut self) -> Result<Option<Portrait>, PoseError> {
        let path = self.path.display().to_string();
        let wrong = |why: String| PoseError { path: path.clone(), why };
        match &mut self.kind {
            Kind::Folder(names) => {
                let Some(name) = names.pop_front() else { return Ok(None) };
                let limits = PictureLimits::default();
                let bytes =
                    super::audio_file::read_bytes(&name, limits.bytes as u64 + 1).map_err(|e| wrong(e.to_string()))?;
                let picture = decode_portrait(&bytes, &limits);
                picture.map(Some).map_err(|e| wrong(format!("{}: {e}", name.display())))
            }
            Kind::Movie { movie, every, read } => loop {
                let Some(Planes { width, height, bytes }) = movie.next().map_err(&wrong)? else { return Ok(None) };
                *read += 1;
                if (*read - 1) % *every == 0 {
                    return Ok(Some(colours(&bytes, width, height)));
                }
            },
            Kind::Video { file, width, height, every, read } => loop {
                if file.fill_buf().map_err(|e| wrong(e.to_string()))?.is_empty() {
                    return Ok(None);
                }
                if !line(file).map_err(|e| wrong(e.to_string()))?.starts_with("FRAME") {
                    return Err(wrong(format!("frame {read} does not begin where it should")));
                }
                let (cw, ch) = (width.div_ceil(2), height.div_ceil(2));
                let mut planes = vec![0; *width * *height + 2 * cw * ch];
                file.read_exact(&mut planes).map_err(|_| wrong(format!("ends within frame {read}")))?;
                *read += 1;
                if (*read - 1) % *every == 0 {
                    return Ok(Some(colours(&planes, *width, *height)));
                }
            },
        }
    }
}

/// Every how many pictures one is shown, of so many a second.
fn every(fps: f64) -> usize {
    (fps / f64::from(POSE_RATE)).round_ties_even().max(1.0) as usize
}

/// A line without its end; at most [`LONGEST`] bytes.
fn line(file: &mut BufReader<File>) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    file.by_ref().take(LONGEST as u64).read_until(b'\n', &mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim_end().to_string())
}

/// A picture of a stream.
fn colours(planes: &[u8], width: usize, height: usize) -> Portrait {
    Portrait { width: width as u32, height: height as u32, rgb: rgb_of(planes, width, height).into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        codec::to_i420,
        media::{Frame, MediaTime, Pixels},
    };

    #[test]
    fn a_video_comes_out_at_sixteen_a_second_in_its_colours() {
        let path = std::env::temp_dir().join(format!("loquent-pose-{}.y4m", std::process::id()));
        let mut bytes = b"YUV4MPEG2 W4 H4 F30:1 Ip C420jpeg\n".to_vec();
        for i in 0..5u8 {
            let rgb: Vec<u8> = (0..16).flat_map(|_| [200, 40 * i, 30]).collect();
            let frame =
                Frame { at: MediaTime::ZERO, width: 4, height: 4, pixels: Pixels::Rgb(rgb.into()), matte: None };
            let planes = to_i420(&frame).unwrap();
            bytes.extend(b"FRAME\n");
            bytes.extend([planes.y, planes.u, planes.v].concat());
        }
        std::fs::write(&path, &bytes).unwrap();
        let mut pose = PoseFile::open(&path).unwrap();
        for i in [0u8, 2, 4] {
            let picture = pose.next().unwrap().unwrap();
            for (got, want) in picture.rgb[..3].iter().zip([200, 40 * i, 30]) {
                assert!(got.abs_diff(want) <= 3, "{:?}", &picture.rgb[..3]);
            }
        }
        assert!(pose.next().unwrap().is_none());
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let mut cut = PoseFile::open(&path).unwrap();
        let _ = (cut.next().unwrap(), cut.next().unwrap());
        assert!(cut.next().is_err());
        for bad in [&b"RIFF"[..], b"YUV4MPEG2 W0 H4\n", b"YUV4MPEG2 W4 H4 C444\n", b"YUV4MPEG2 W4 H4 F0:0\n", b""] {
            std::fs::write(&path, bad).unwrap();
            assert!(PoseFile::open(&path).is_err());
        }
        std::fs::remove_file(path).unwrap();
    }
}
