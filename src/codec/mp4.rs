//! MP4 files: H.264 video, beside an Opus voice if there is one, index in front, whole or not there at all.
//!
//! The file is written under a temporary name beside its target and renamed when it is complete; dropping an
//! unfinished [`Mp4Writer`] removes it. The boxes are accounted by `shiguredo_mp4`; what it leaves open is added here:
//! the edit lists that make both tracks begin at time zero and end together, the colour description, the Opus
//! pre-roll. The index (`moov`) stands before the media, in room reserved from the expected length.
//!
//! Sources: ISO/IEC 14496-12 (boxes, edit lists, sample groups), 14496-15 (avcC), "Encapsulation of Opus in ISO Base
//! Media File Format" 0.8.1 (dOps, pre-skip as an edit, `roll` groups).

use super::{
    marks::Mark,
    tracks::{Parameters, VIDEO_SCALE, VOICE_SCALE, unknown, voice_entry},
};
use crate::media::MediaTime;
use shiguredo_mp4::{
    Encode, FixedPointNumber, TrackKind,
    boxes::{Brand, EdtsBox, ElstBox, ElstEntry, FreeBox, FtypBox, MoovBox, SampleEntry, TrakBox},
    mux::{Mp4FileMuxer, Mp4FileMuxerOptions, Sample},
};
use std::{
    fs::{self, File},
    io::{BufWriter, Seek, SeekFrom, Write},
    num::NonZeroU32,
    path::{Path, PathBuf},
};

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
    #[error("the video stream cannot be put into MP4: its parameter sets change")]
    Changed,
    #[error("the MP4 index cannot be built: {0}")]
    Index(String),
    /// A limit that was set, not the disk's.
    #[error("{0}")]
    Full(String),
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
    /// Samples at 48 kHz that the Opus encoder puts before the voice; `None`: a video without sound.
    pub pre_skip: Option<u16>,
    /// Who made it, and when (RFC 3339): written as XMP.
    pub mark: Mark,
    pub when: String,
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
    parameters: Parameters,
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
            parameters: Parameters::default(),
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
    /// [`Mp4Error::Stream`] when the first unit carries no parameter sets, [`Mp4Error::Changed`] when later ones change
    /// them.
    pub fn add_video(&mut self, access_unit: &[u8], duration: MediaTime, keyframe: bool) -> Result<()> {
        let before = self.video.data.len();
        self.parameters.take(access_unit, &mut self.video.data)?;
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

    fn pre_skip(&self) -> u16 {
        self.spec.pre_skip.unwrap_or(0)
    }

    fn flush_video(&mut self, keep: usize) -> Result<()> {
        let run = self.video.take_but(keep);
        let entry = self.parameters.entry(self.spec.width, self.spec.height)?;
        self.flush(TrackKind::Video, VIDEO_SCALE, entry, &run)
    }

    fn flush_voice(&mut self, keep: usize) -> Result<()> {
        let run = self.voice.take_but(keep);
        let entry = voice_entry(self.pre_skip());
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
        let silent = if self.spec.pre_skip.is_none() { heard } else { 0 };
        let voice = self.voice_samples + silent;
        let Some(padding) = voice.checked_sub(heard + u64::from(self.pre_skip())) else {
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
        complete(&mut moov, heard, self.pre_skip(), length);
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
        tail.extend(self.spec.mark.xmp_box(&self.spec.when));
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
