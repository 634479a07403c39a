//! MP4 files: H.264 video beside an Opus voice, index in front, whole or not there at all.
//!
//! The file is written under a temporary name beside its target and renamed when it is complete; dropping an
//! unfinished [`Mp4Writer`] removes it. The boxes are accounted by `shiguredo_mp4`; what it leaves open is added here:
//! the edit lists that make both tracks begin at time zero and end together, the colour description, the Opus
//! pre-roll. The index (`moov`) stands before the media, in room reserved from the expected length.
//!
//! Sources: ISO/IEC 14496-12 (boxes, edit lists, sample groups), 14496-15 (avcC), "Encapsulation of Opus in ISO Base
//! Media File Format" 0.8.1 (dOps, pre-skip as an edit, `roll` groups).

use crate::media::MediaTime;
use shiguredo_mp4::{
    BoxSize, BoxType, Encode, FixedPointNumber, TrackKind, Uint,
    boxes::{
        AudioSampleEntryFields, Avc1Box, AvccBox, Brand, DopsBox, EdtsBox, ElstBox, ElstEntry, FreeBox, FtypBox,
        MoovBox, OpusBox, SampleEntry, TrakBox, UnknownBox, VisualSampleEntryFields,
    },
    mux::{Mp4FileMuxer, Mp4FileMuxerOptions, Sample},
};
use std::{
    fs::{self, File},
    io::{BufWriter, Seek, SeekFrom, Write},
    num::NonZeroU32,
    path::{Path, PathBuf},
};

/// Units per second of the video track.
const VIDEO_SCALE: u32 = 90_000;
/// Units per second of the voice track and of the movie.
const VOICE_SCALE: u32 = 48_000;
/// Media of one kind that stands together before the other's turn.
const RUN: MediaTime = MediaTime::from_millis(500);

/// Why a file could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Mp4Error {
    #[error("cannot write {path}: {source}")]
    Io { path: String, source: std::io::Error },
    #[error("the target {0} is a folder; give a file name such as video.mp4")]
    Folder(String),
    #[error("the video stream cannot be put into MP4: {0}")]
    Stream(&'static str),
    #[error("the MP4 index cannot be built: {0}")]
    Index(String),
}

type Result<T> = std::result::Result<T, Mp4Error>;

/// What the file will hold.
#[derive(Clone, Debug)]
pub struct Mp4Spec {
    pub width: u32,
    pub height: u32,
    pub fps: u32,
    /// Expected length; only reserves room for the index.
    pub expected: MediaTime,
    /// Samples at 48 kHz that the Opus encoder puts before the voice.
    pub pre_skip: u16,
}

/// Writes one file.
pub struct Mp4Writer {
    target: PathBuf,
    temporary: PathBuf,
    /// `None` once finished.
    out: Option<BufWriter<File>>,
    muxer: Mp4FileMuxer,
    spec: Mp4Spec,
    position: u64,
    reserved: u64,
    parameter_sets: Option<(Vec<u8>, Vec<u8>)>,
    video: Run,
    voice: Run,
    /// Length of everything added so far.
    video_ticks: MediaTime,
    voice_samples: u64,
}

/// Samples of one kind waiting for their turn.
#[derive(Default)]
struct Run {
    data: Vec<u8>,
    samples: Vec<(usize, MediaTime, bool)>,
    span: MediaTime,
}

impl Run {
    /// Everything but the newest `keep` samples.
    fn take_but(&mut self, keep: usize) -> Run {
        let samples = self.samples.len().saturating_sub(keep);
        let rest = self.samples.split_off(samples);
        let rest_data = self.data.split_off(self.samples.iter().map(|s| s.0).sum());
        let span = rest.iter().fold(MediaTime::ZERO, |a, s| a + s.1);
        std::mem::replace(self, Run { data: rest_data, samples: rest, span })
    }
}

impl Mp4Writer {
    /// Opens the temporary file beside `target`.
    ///
    /// # Errors
    /// [`Mp4Error::Io`] when the folder cannot be written.
    pub fn create(target: &Path, spec: Mp4Spec) -> Result<Mp4Writer> {
        if target.is_dir() {
            return Err(Mp4Error::Folder(target.display().to_string()));
        }
        let temporary = temporary_name(target);
        let io = |source| Mp4Error::Io { path: temporary.display().to_string(), source };
        let reserved = reserve(&spec);
        let options = Mp4FileMuxerOptions { reserved_moov_box_size: reserved, ..Default::default() };
        let muxer = Mp4FileMuxer::with_options(options).map_err(|e| Mp4Error::Index(e.to_string()))?;
        let file = File::create(&temporary).map_err(io)?;
        let head = muxer.initial_boxes_bytes().to_vec();
        let mut writer = Mp4Writer {
            target: target.to_path_buf(),
            temporary: temporary.clone(),
            out: Some(BufWriter::with_capacity(1 << 18, file)),
            muxer,
            spec,
            position: head.len() as u64,
            reserved: 0,
            parameter_sets: None,
            video: Run::default(),
            voice: Run::default(),
            video_ticks: MediaTime::ZERO,
            voice_samples: 0,
        };
        // The media box header is the last 16 bytes of the head.
        writer.reserved = writer.position - 16;
        writer.write(&head)?;
        Ok(writer)
    }

    /// The unfinished file, for whoever must remove it when the process is told to stop at once.
    pub fn temporary(&self) -> &Path {
        &self.temporary
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let path = &self.temporary;
        let io = |source| Mp4Error::Io { path: path.display().to_string(), source };
        match &mut self.out {
            Some(out) => out.write_all(bytes).map_err(io),
            None => Err(io(std::io::Error::other("the file is already finished"))),
        }
    }

    /// Appends one access unit (Annex B, baseline: decoding order is display order) that is shown for `duration`.
    ///
    /// # Errors
    /// [`Mp4Error::Stream`] when the first unit carries no parameter sets or later ones change them.
    pub fn add_video(&mut self, access_unit: &[u8], duration: MediaTime, keyframe: bool) -> Result<()> {
        let before = self.video.data.len();
        for unit in nal_units(access_unit) {
            match unit[0] & 0x1f {
                // Parameter sets stand in the sample description.
                kind @ (7 | 8) => {
                    let known = match (kind, &self.parameter_sets) {
                        (7, Some((sps, _))) => Some(sps),
                        (8, Some((_, pps))) if !pps.is_empty() => Some(pps),
                        _ => None,
                    };
                    match (known, kind) {
                        (Some(known), _) if known != unit => return Err(Mp4Error::Stream("its parameter sets change")),
                        (Some(_), _) => {}
                        (None, 7) => self.parameter_sets = Some((unit.to_vec(), Vec::new())),
                        (None, _) => match &mut self.parameter_sets {
                            Some((_, pps)) => *pps = unit.to_vec(),
                            None => return Err(Mp4Error::Stream("a picture parameter set stands alone")),
                        },
                    }
                }
                9 => {}
                _ => {
                    self.video.data.extend_from_slice(&(unit.len() as u32).to_be_bytes());
                    self.video.data.extend_from_slice(unit);
                }
            }
        }
        if !self.parameter_sets.as_ref().is_some_and(|(sps, pps)| sps.len() >= 4 && !pps.is_empty()) {
            return Err(Mp4Error::Stream("it does not begin with parameter sets"));
        }
        let size = self.video.data.len() - before;
        self.video.samples.push((size, duration, keyframe));
        self.video.span += duration;
        self.video_ticks += duration;
        if self.video.span >= RUN {
            // The newest picture stays: the last one of all is cut to the voice.
            self.flush_video(1)?;
        }
        Ok(())
    }

    /// Appends one Opus packet that decodes to `samples` at 48 kHz.
    ///
    /// # Errors
    /// [`Mp4Error::Io`].
    pub fn add_audio(&mut self, packet: &[u8], samples: u32) -> Result<()> {
        let span = MediaTime::from_units(i64::from(samples), VOICE_SCALE);
        self.voice.data.extend_from_slice(packet);
        self.voice.samples.push((packet.len(), span, true));
        self.voice.span += span;
        self.voice_samples += u64::from(samples);
        if self.voice.span >= RUN {
            // The last packet of all is cut to the voice, too.
            self.flush_voice(1)?;
        }
        Ok(())
    }

    fn flush_video(&mut self, keep: usize) -> Result<()> {
        let run = self.video.take_but(keep);
        let entry = self.video_entry()?;
        self.flush(TrackKind::Video, VIDEO_SCALE, entry, &run)
    }

    fn flush_voice(&mut self, keep: usize) -> Result<()> {
        let run = self.voice.take_but(keep);
        let entry = SampleEntry::Opus(OpusBox {
            audio: AudioSampleEntryFields {
                data_reference_index: AudioSampleEntryFields::DEFAULT_DATA_REFERENCE_INDEX,
                channelcount: 1,
                samplesize: AudioSampleEntryFields::DEFAULT_SAMPLESIZE,
                samplerate: FixedPointNumber::new(VOICE_SCALE as u16, 0),
            },
            dops_box: DopsBox {
                output_channel_count: 1,
                pre_skip: self.spec.pre_skip,
                input_sample_rate: VOICE_SCALE,
                output_gain: 0,
            },
            unknown_boxes: vec![],
        });
        self.flush(TrackKind::Audio, VOICE_SCALE, entry, &run)
    }

    fn flush(&mut self, track_kind: TrackKind, scale: u32, entry: SampleEntry, run: &Run) -> Result<()> {
        let mut entry = Some(entry);
        for &(data_size, span, keyframe) in &run.samples {
            let sample = Sample {
                track_kind,
                sample_entry: entry.take(),
                keyframe,
                timescale: NonZeroU32::new(scale).unwrap_or(NonZeroU32::MIN),
                duration: span.units(scale).max(0) as u32,
                composition_time_offset: None,
                data_offset: self.position,
                data_size,
            };
            self.muxer.append_sample(&sample).map_err(|e| Mp4Error::Index(e.to_string()))?;
            self.position += data_size as u64;
        }
        self.write(&run.data)
    }

    fn video_entry(&self) -> Result<SampleEntry> {
        let Some((sps, pps)) = &self.parameter_sets else {
            return Err(Mp4Error::Stream("it does not begin with parameter sets"));
        };
        // H.264 A.2: these profiles carry extra fields in avcC, which are not written here.
        if matches!(sps[1], 100 | 110 | 122 | 144 | 244) {
            return Err(Mp4Error::Stream("its profile is above Main"));
        }
        let visual = VisualSampleEntryFields {
            data_reference_index: VisualSampleEntryFields::DEFAULT_DATA_REFERENCE_INDEX,
            width: self.spec.width as u16,
            height: self.spec.height as u16,
            horizresolution: VisualSampleEntryFields::DEFAULT_HORIZRESOLUTION,
            vertresolution: VisualSampleEntryFields::DEFAULT_VERTRESOLUTION,
            frame_count: VisualSampleEntryFields::DEFAULT_FRAME_COUNT,
            compressorname: VisualSampleEntryFields::NULL_COMPRESSORNAME,
            depth: VisualSampleEntryFields::DEFAULT_DEPTH,
        };
        let avcc_box = AvccBox {
            avc_profile_indication: sps[1],
            profile_compatibility: sps[2],
            avc_level_indication: sps[3],
            length_size_minus_one: Uint::new(3),
            sps_list: vec![sps.clone()],
            pps_list: vec![pps.clone()],
            chroma_format: None,
            bit_depth_luma_minus8: None,
            bit_depth_chroma_minus8: None,
            sps_ext_list: vec![],
        };
        // BT.601 throughout, limited range: the same as the stream itself says.
        let colour = unknown(*b"colr", b"nclx\x00\x06\x00\x06\x00\x06\x00".to_vec());
        Ok(SampleEntry::Avc1(Avc1Box { visual, avcc_box, unknown_boxes: vec![colour] }))
    }

    /// Completes the file: both tracks end at `length`, the index is written, the file gets its name.
    ///
    /// # Errors
    /// [`Mp4Error::Stream`] when there is no video or the voice is shorter than `length`; [`Mp4Error::Io`].
    pub fn finish(mut self, length: MediaTime) -> Result<()> {
        let Some(last) = self.video.samples.last_mut() else {
            return Err(Mp4Error::Stream("it has no pictures"));
        };
        let start_of_last = self.video_ticks - last.1;
        if length <= start_of_last {
            return Err(Mp4Error::Stream("it is longer than the voice"));
        }
        last.1 = length - start_of_last;
        self.flush_video(0)?;
        let heard = length.units(VOICE_SCALE).max(0) as u64;
        let Some(padding) = self.voice_samples.checked_sub(heard + u64::from(self.spec.pre_skip)) else {
            return Err(Mp4Error::Stream("its voice is shorter than the video"));
        };
        if let Some(last) = self.voice.samples.last_mut() {
            let padding = MediaTime::from_units(padding as i64, VOICE_SCALE);
            if padding >= last.1 {
                return Err(Mp4Error::Stream("its voice is longer than the video"));
            }
            last.1 = last.1 - padding;
            self.flush_voice(0)?;
        }
        let index = |e: &dyn std::fmt::Display| Mp4Error::Index(e.to_string());
        let done = self.muxer.finalize().map_err(|e| index(&e))?;
        let mut moov = done.moov_box().clone();
        let media_head = done.offset_and_bytes_pairs().last().map(|(at, bytes)| (at, bytes.to_vec()));
        complete(&mut moov, heard, self.spec.pre_skip, length);
        let moov = moov.encode_to_vec().map_err(|e| index(&e))?;
        let brands = vec![Brand::ISOM, Brand::ISO2, Brand::AVC1, Brand::MP41];
        let ftyp = FtypBox { major_brand: Brand::ISOM, minor_version: 512, compatible_brands: brands };
        let ftyp = ftyp.encode_to_vec().map_err(|e| index(&e))?;
        let room = (self.reserved as usize).saturating_sub(ftyp.len());
        let free = |n: usize| FreeBox { payload: vec![0; n - 8] }.encode_to_vec().map_err(|e| index(&e));
        let mut head = ftyp;
        let mut tail = Vec::new();
        if moov.len() == room || moov.len() + 8 <= room {
            head.extend_from_slice(&moov);
            if moov.len() < room {
                head.extend(free(room - moov.len())?);
            }
        } else {
            // More samples than the expected length promised: still a legal file, with its index at the end.
            head.extend(free(room)?);
            tail = moov;
        }
        self.write(&tail)?;
        let io = |path: &Path, source| Mp4Error::Io { path: path.display().to_string(), source };
        let Some(mut out) = self.out.take() else {
            return Err(io(&self.temporary, std::io::Error::other("the file is already finished")));
        };
        let wrote = (|| {
            out.seek(SeekFrom::Start(0))?;
            out.write_all(&head)?;
            if let Some((at, bytes)) = media_head {
                out.seek(SeekFrom::Start(at))?;
                out.write_all(&bytes)?;
            }
            out.flush()?;
            // Complete on the disk before it gets the name people trust.
            out.get_ref().sync_all()
        })();
        drop(out);
        let wrote = wrote.map_err(|e| io(&self.temporary, e));
        let named = wrote.and_then(|()| fs::rename(&self.temporary, &self.target).map_err(|e| io(&self.target, e)));
        if named.is_err() {
            let _ = fs::remove_file(&self.temporary);
        }
        named
    }
}

impl Drop for Mp4Writer {
    fn drop(&mut self) {
        if self.out.take().is_some() {
            // Nothing can be done about a failure here, and the name says what the file is.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// `folder/.name.PID.part`: hidden, beside the target (same file system), not shared by two runs.
fn temporary_name(target: &Path) -> PathBuf {
    let name = target.file_name().map_or_else(|| "video".into(), |n| n.to_string_lossy().into_owned());
    target.with_file_name(format!(".{name}.{}.part", std::process::id()))
}

/// Room for the index: sample sizes, chunk offsets and counts, sync samples, and the fixed boxes.
fn reserve(spec: &Mp4Spec) -> usize {
    let seconds = spec.expected.as_secs_f64().max(0.0) + 2.0;
    let samples = seconds * f64::from(spec.fps + 50) * 4.0;
    let chunks = seconds / RUN.as_secs_f64() * 2.0 * (12.0 + 8.0);
    // A keyframe a second is far more than is made.
    let keyframes = seconds * 4.0;
    (samples + chunks + keyframes) as usize + 8192
}

/// Edit lists, exact durations on the movie's time scale, and the Opus pre-roll group.
fn complete(moov: &mut MoovBox, heard: u64, pre_skip: u16, length: MediaTime) {
    moov.mvhd_box.timescale = NonZeroU32::new(VOICE_SCALE).unwrap_or(NonZeroU32::MIN);
    moov.mvhd_box.duration = heard;
    for trak in &mut moov.trak_boxes {
        trak.tkhd_box.duration = heard;
        let voice = is_voice(trak);
        let media_time = if voice { i64::from(pre_skip) } else { 0 };
        let entry = ElstEntry { edit_duration: heard, media_time, media_rate: FixedPointNumber::new(1, 0) };
        trak.edts_box = Some(EdtsBox { elst_box: Some(ElstBox { entries: vec![entry] }), unknown_boxes: vec![] });
        if voice {
            let samples = match trak.mdia_box.minf_box.stbl_box.stsz_box.clone() {
                shiguredo_mp4::boxes::StszBox::Fixed { sample_count, .. } => sample_count,
                shiguredo_mp4::boxes::StszBox::Variable { entry_sizes } => entry_sizes.len() as u32,
            };
            // 80 ms of decoding before a seek target makes Opus exact: −4 packets of 20 ms.
            let mut sgpd = vec![1, 0, 0, 0];
            sgpd.extend(b"roll");
            sgpd.extend([0, 0, 0, 2, 0, 0, 0, 1, 0xff, 0xfc]);
            let mut sbgp = vec![0, 0, 0, 0];
            sbgp.extend(b"roll");
            sbgp.extend(1u32.to_be_bytes());
            sbgp.extend(samples.to_be_bytes());
            sbgp.extend(1u32.to_be_bytes());
            let stbl = &mut trak.mdia_box.minf_box.stbl_box;
            stbl.unknown_boxes.push(unknown(*b"sgpd", sgpd));
            stbl.unknown_boxes.push(unknown(*b"sbgp", sbgp));
        } else {
            trak.mdia_box.mdhd_box.duration = length.units(VIDEO_SCALE).max(0) as u64;
        }
    }
}

fn is_voice(trak: &TrakBox) -> bool {
    trak.mdia_box.hdlr_box.handler_type == shiguredo_mp4::boxes::HdlrBox::HANDLER_TYPE_SOUN
}

fn unknown(kind: [u8; 4], payload: Vec<u8>) -> UnknownBox {
    UnknownBox {
        box_type: BoxType::Normal(kind),
        box_size: BoxSize::with_payload_size(BoxType::Normal(kind), payload.len() as u64),
        payload,
    }
}

/// The NAL units of an Annex B byte stream, without start codes; empty ones are left out.
fn nal_units(stream: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut starts = Vec::new();
    let mut i = 0;
    while i + 3 <= stream.len() {
        if stream[i..i + 3] == [0, 0, 1] {
            starts.push(i);
            i += 3;
        } else {
            i += 1;
        }
    }
    let ends: Vec<usize> = starts.iter().skip(1).copied().chain([stream.len()]).collect();
    starts.into_iter().zip(ends).filter_map(move |(start, end)| {
        let unit = &stream[start + 3..end];
        // Zeros before the next start code belong to it.
        let unit = &unit[..unit.iter().rposition(|&b| b != 0).map_or(0, |p| p + 1)];
        (!unit.is_empty()).then_some(unit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nal_units_are_cut_at_both_kinds_of_start_code() {
        let stream = [0, 0, 0, 1, 0x67, 1, 2, 0, 0, 1, 0x68, 9, 0, 0, 0, 1, 0x65, 0, 0, 3, 7];
        let units: Vec<&[u8]> = nal_units(&stream).collect();
        assert_eq!(units, [&[0x67, 1, 2][..], &[0x68, 9], &[0x65, 0, 0, 3, 7]]);
        assert_eq!(nal_units(&[0, 0, 1]).count(), 0);
        assert_eq!(nal_units(&[]).count(), 0);
    }
}
