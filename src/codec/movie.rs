//! Pictures out of an MP4 file: its H.264 track, picture by picture in the order in which they are shown.
//!
//! Only the index is held in memory; pictures are read and decoded when they are asked for. Edit lists are not followed,
//! and the colours are taken as BT.601, as OpenCV and decord do where a file does not say otherwise.

use openh264::{
    OpenH264API,
    decoder::{DecodeOptions, DecodedYUV, Decoder, DecoderConfig, Flush},
    formats::YUVSource,
};
use shiguredo_mp4::{
    TrackKind,
    boxes::SampleEntry,
    demux::{Input, Mp4FileDemuxer},
};
use std::{
    collections::VecDeque,
    fs::File,
    io::{Read, Seek, SeekFrom},
};

/// No index is larger: hours of video have a few megabytes.
const LARGEST_INDEX: u64 = 256 << 20;
/// No picture is larger.
const LARGEST_PICTURE: usize = 64 << 20;
/// No video has more pictures: eleven hours at 25 a second.
const MOST_PICTURES: usize = 1 << 20;

/// One picture as planes, Y then U then V, without padding; the chroma planes have half the sides, rounded up.
pub(super) struct Planes {
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) bytes: Vec<u8>,
}

/// Where an access unit stands, and the parameter sets that begin with it.
struct Sample {
    offset: u64,
    size: usize,
    sets: Option<Vec<u8>>,
}

/// A video track under way.
pub(super) struct Movie {
    file: File,
    samples: std::vec::IntoIter<Sample>,
    /// Bytes of a length in front of a NAL unit.
    prefix: usize,
    decoder: Decoder,
    /// Pictures that the decoder held back until the end.
    rest: VecDeque<Planes>,
    ended: bool,
    read: usize,
    /// Pictures a second, on average.
    pub(super) fps: f64,
}

/// Whether a file begins as MP4 does.
pub(super) fn is_mp4(head: &[u8]) -> bool {
    head.get(4..8) == Some(b"ftyp")
}

impl Movie {
    /// Reads the index.
    ///
    /// # Errors
    /// A sentence: it is damaged, fragmented, or has no H.264.
    pub(super) fn open(mut file: File) -> Result<Movie, String> {
        let damaged = |e: &dyn std::fmt::Display| format!("is damaged: {e}");
        let length = file.metadata().map_err(|e| e.to_string())?.len();
        let mut demuxer = Mp4FileDemuxer::new();
        while let Some(wanted) = demuxer.required_input() {
            let size = wanted.size.map_or(length, |n| n as u64).min(length.saturating_sub(wanted.position));
            if size > LARGEST_INDEX {
                return Err(format!("has an index of {size} bytes, which cannot be"));
            }
            let mut data = vec![0; size as usize];
            file.seek(SeekFrom::Start(wanted.position))
                .and_then(|_| file.read_exact(&mut data))
                .map_err(|e| damaged(&e))?;
            demuxer.handle_input(Input { position: wanted.position, data: &data });
        }
        let tracks = demuxer.tracks().map_err(|e| damaged(&e))?;
        let Some(track) = tracks.iter().find(|t| t.kind == TrackKind::Video).cloned() else {
            return Err("has no video track".into());
        };
        let (mut samples, mut prefix) = (Vec::new(), 4);
        while let Some(sample) = demuxer.next_sample().map_err(|e| damaged(&e))? {
            if sample.track.track_id != track.track_id {
                continue;
            }
            let sets = match sample.sample_entry {
                None => None,
                Some(SampleEntry::Avc1(entry)) => {
                    prefix = usize::from(entry.avcc_box.length_size_minus_one.get()) + 1;
                    let sets = entry.avcc_box.sps_list.iter().chain(&entry.avcc_box.pps_list);
                    Some(sets.flat_map(|set| [&[0, 0, 0, 1], set.as_slice()].concat()).collect())
                }
                Some(_) => {
                    return Err(
                        "holds another video than H.264; convert it: ffmpeg -i VIDEO -c:v libx264 pose.mp4".into()
                    );
                }
            };
            if samples.len() >= MOST_PICTURES || sample.data_size > LARGEST_PICTURE {
                return Err("is damaged: its index tells of more than a video has".into());
            }
            if sample.data_offset.saturating_add(sample.data_size as u64) > length {
                return Err(format!("ends before picture {}", samples.len()));
            }
            samples.push(Sample { offset: sample.data_offset, size: sample.data_size, sets });
        }
        if samples.is_empty() {
            return Err(
                "has no pictures in its index (a fragmented file?); rewrite it: ffmpeg -i VIDEO -c copy pose.mp4"
                    .into(),
            );
        }
        let seconds = track.duration as f64 / f64::from(track.timescale.get());
        let fps = samples.len() as f64 / seconds;
        if !(fps > 0.0 && fps < 1000.0) {
            return Err(format!("tells of {} pictures in {seconds} s, which cannot be", samples.len()));
        }
        // Pictures come out in the order in which they are shown only if the decoder may hold some back.
        let config = DecoderConfig::new().flush_after_decode(Flush::NoFlush);
        let decoder = Decoder::with_api_config(OpenH264API::from_source(), config).map_err(|e| e.to_string())?;
        let samples = samples.into_iter();
        Ok(Movie { file, samples, prefix, decoder, rest: VecDeque::new(), ended: false, read: 0, fps })
    }

    /// The next picture; `None` after the last.
    ///
    /// # Errors
    /// A sentence: a picture that cannot be read or decoded.
    pub(super) fn next(&mut self) -> Result<Option<Planes>, String> {
        while let Some(sample) = self.samples.next() {
            let mut bytes = vec![0; sample.size];
            let at = SeekFrom::Start(sample.offset);
            self.file.seek(at).and_then(|_| self.file.read_exact(&mut bytes)).map_err(|e| e.to_string())?;
            let (read, prefix) = (self.read, self.prefix);
            self.read += 1;
            let mut unit = sample.sets.unwrap_or_default();
            annex_b(&bytes, prefix, &mut unit).ok_or_else(|| format!("picture {read} is damaged"))?;
            let shown = self.decoder.decode_with_options(&unit, DecodeOptions::new());
            if let Some(yuv) = shown.map_err(|e| format!("picture {read} cannot be decoded: {e}"))? {
                return Ok(Some(planes(&yuv)));
            }
        }
        if !std::mem::replace(&mut self.ended, true) {
            let rest =
                self.decoder.flush_remaining().map_err(|e| format!("the last pictures cannot be decoded: {e}"))?;
            self.rest = rest.iter().map(planes).collect();
        }
        Ok(self.rest.pop_front())
    }
}

/// NAL units with lengths in front as a byte stream with start codes; `None`: they do not fill the sample.
fn annex_b(mut sample: &[u8], prefix: usize, out: &mut Vec<u8>) -> Option<()> {
    while !sample.is_empty() {
        let (length, rest) = sample.split_at_checked(prefix)?;
        let length = length.iter().fold(0usize, |n, b| n << 8 | usize::from(*b));
        let (unit, rest) = rest.split_at_checked(length)?;
        out.extend([0, 0, 0, 1]);
        out.extend_from_slice(unit);
        sample = rest;
    }
    Some(())
}

fn planes(yuv: &DecodedYUV) -> Planes {
    let (width, height) = yuv.dimensions();
    let (cw, ch) = (width.div_ceil(2), height.div_ceil(2));
    let (sy, su, sv) = yuv.strides();
    let mut bytes = Vec::with_capacity(width * height + 2 * cw * ch);
    for (plane, stride, w, h) in [(yuv.y(), sy, width, height), (yuv.u(), su, cw, ch), (yuv.v(), sv, cw, ch)] {
        for row in plane.chunks(stride.max(1)).take(h) {
            bytes.extend_from_slice(&row[..w.min(row.len())]);
        }
    }
    Planes { width, height, bytes }
}
