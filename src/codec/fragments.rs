//! Fragmented MP4: what was written plays, wherever the writing stopped.
//!
//! Head (`ftyp`, `moov` without samples, XMP) and then one `moof` + `mdat` for each [`FRAGMENT`] of picture and voice.
//! Both tracks begin with the first keyframe: what the voice said before is cut off by its edit list, and if the voice
//! begins later, packets of silence stand for it, so that the two stay together to the sample.
//!
//! Sources: ISO/IEC 14496-12 (movie fragments, edit lists), 14496-15, "Encapsulation of Opus in ISO Base Media File
//! Format" 0.8.1. The boxes are accounted by `shiguredo_mp4`.

use super::{
    marks::Mark,
    mp4::Mp4Error,
    tracks::{Parameters, VIDEO_SCALE, VOICE_SCALE, voice_entry},
};
use crate::media::MediaTime;
use shiguredo_mp4::{
    Decode, Encode, FixedPointNumber, TrackKind,
    boxes::{EdtsBox, ElstBox, ElstEntry, FtypBox, HdlrBox, MoovBox, SampleEntry},
    mux::{Fmp4SegmentMuxer, Sample},
};
use std::{
    fs::File,
    io::{Cursor, Seek, SeekFrom, Write},
    num::NonZeroU32,
};

/// Media in one fragment, and so what a crash costs at most (besides what the system had not yet put on the disk).
pub const FRAGMENT: MediaTime = MediaTime::from_millis(1000);

/// Opus silence for one channel: 20, 10, 5 and 2.5 ms (RFC 6716 §3.1: CELT, full band, one frame; then an empty frame).
const SILENCES: [(MediaTime, [u8; 3]); 4] = [
    (PACKET, [0xf8, 0xff, 0xfe]),
    (MediaTime::from_units(1, 100), [0xf0, 0xff, 0xfe]),
    (MediaTime::from_units(1, 200), [0xe8, 0xff, 0xfe]),
    (MediaTime::from_units(1, 400), [0xe0, 0xff, 0xfe]),
];
const PACKET: MediaTime = MediaTime::from_millis(20);

type Result<T> = std::result::Result<T, Mp4Error>;

/// What the file will hold.
#[derive(Clone, Debug)]
pub struct FragmentSpec {
    pub width: u32,
    pub height: u32,
    /// Samples at 48 kHz that the Opus encoder puts before the voice.
    pub pre_skip: u16,
    pub mark: Mark,
    /// When it is made, RFC 3339.
    pub when: String,
}

/// One sample whose end is known when the next begins.
struct Held {
    at: MediaTime,
    size: usize,
    keyframe: bool,
}

/// Samples of one track for the next fragment.
#[derive(Default)]
struct Track {
    data: Vec<u8>,
    samples: Vec<(usize, MediaTime, bool)>,
    held: Option<Held>,
}

impl Track {
    /// Begins a sample; the one before ends here.
    fn next(&mut self, held: Held) {
        self.end(held.at);
        self.held = Some(held);
    }

    fn end(&mut self, at: MediaTime) {
        if let Some(before) = self.held.take() {
            self.samples.push((before.size, at - before.at, before.keyframe));
        }
    }

    fn span(&self) -> MediaTime {
        self.samples.iter().fold(MediaTime::ZERO, |a, s| a + s.1)
    }
}

/// Where a file is written.
pub trait Disk: Write + Seek {
    /// Returns when what was written so far would survive a power cut.
    ///
    /// # Errors
    /// The system's.
    fn settle(&mut self) -> std::io::Result<()>;
}

impl Disk for File {
    fn settle(&mut self) -> std::io::Result<()> {
        self.sync_data()
    }
}

impl Disk for Cursor<Vec<u8>> {
    fn settle(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Writes one file to `W`, fragment by fragment.
pub struct FragmentWriter<W: Disk> {
    out: W,
    spec: FragmentSpec,
    muxer: Fmp4SegmentMuxer,
    parameters: Parameters,
    video: Track,
    voice: Track,
    /// When the first keyframe is shown: the file's beginning.
    origin: Option<MediaTime>,
    /// The newest packet while there is no picture yet: the first picture may fall into it.
    recent: Option<(MediaTime, Vec<u8>, MediaTime)>,
    /// The end of the last packet, and what of the first one belongs to the time before the file.
    voice_end: Option<MediaTime>,
    before: MediaTime,
    begun: bool,
    written: u64,
    length: MediaTime,
}

impl<W: Disk> FragmentWriter<W> {
    /// Nothing is written before the first second is complete.
    ///
    /// # Errors
    /// [`Mp4Error::Index`].
    pub fn new(out: W, spec: FragmentSpec) -> Result<FragmentWriter<W>> {
        Ok(FragmentWriter {
            out,
            spec,
            muxer: Fmp4SegmentMuxer::new().map_err(index)?,
            parameters: Parameters::default(),
            video: Track::default(),
            voice: Track::default(),
            origin: None,
            recent: None,
            voice_end: None,
            before: MediaTime::ZERO,
            begun: false,
            written: 0,
            length: MediaTime::ZERO,
        })
    }

    /// The file as it is, without what is not written yet.
    pub fn into_disk(self) -> W {
        self.out
    }

    /// Bytes given to the file so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// From the first picture to the newest.
    pub fn length(&self) -> MediaTime {
        self.length
    }

    /// Appends one access unit (Annex B). What comes before the first keyframe, or does not rise in time, is left out.
    /// `true`: a fragment was written.
    ///
    /// # Errors
    /// [`Mp4Error::Changed`] when its parameter sets are others: it belongs into a new file. [`Mp4Error::Io`].
    pub fn video(&mut self, at: MediaTime, access_unit: &[u8], keyframe: bool) -> Result<bool> {
        if self.origin.is_none() && !keyframe || self.video.held.as_ref().is_some_and(|h| h.at >= at) {
            return Ok(false);
        }
        // What is complete without this unit leaves first, so that an error here costs nothing of it.
        let flushed = self.video.span() + PACKET >= FRAGMENT && self.flush()?;
        let before = self.video.data.len();
        self.parameters.take(access_unit, &mut self.video.data)?;
        let origin = *self.origin.get_or_insert(at);
        self.length = at - origin;
        self.video.next(Held { at, size: self.video.data.len() - before, keyframe });
        if let Some((at, packet, duration)) = self.recent.take() {
            self.audio(at, &packet, duration);
        }
        Ok(flushed)
    }

    /// Appends one Opus packet of `duration`.
    pub fn audio(&mut self, at: MediaTime, packet: &[u8], duration: MediaTime) {
        let Some(origin) = self.origin else {
            self.recent = Some((at, packet.to_vec(), duration));
            return;
        };
        if at + duration <= origin || self.voice_end.is_some_and(|end| at < end) {
            return;
        }
        let mut end = self.voice_end.unwrap_or_else(|| {
            self.before = origin - at.min(origin);
            at.min(origin)
        });
        // Gaps are filled; what is less than the shortest silence makes the packet before it longer.
        for (span, silence) in SILENCES {
            while at - end >= span {
                self.packet(end, &silence, span);
                end += span;
            }
        }
        self.packet(at, packet, duration);
    }

    fn packet(&mut self, at: MediaTime, packet: &[u8], duration: MediaTime) {
        self.voice.data.extend_from_slice(packet);
        self.voice.next(Held { at, size: packet.len(), keyframe: true });
        self.voice_end = Some(at + duration);
    }

    /// Writes what is complete. `true`: something was.
    fn flush(&mut self) -> Result<bool> {
        let Some(origin) = self.origin.filter(|_| !self.video.samples.is_empty()) else { return Ok(false) };
        if !self.begun && self.voice.samples.is_empty() {
            if self.voice.held.is_some() {
                // The next packet completes this one.
                return Ok(false);
            }
            // No voice has come yet: the head must name its track all the same.
            self.packet(origin, &SILENCES[0].1, PACKET);
            self.packet(origin + PACKET, &SILENCES[0].1, PACKET);
        }
        let (video, voice) = (std::mem::take(&mut self.video), std::mem::take(&mut self.voice));
        let mut payload = Vec::with_capacity(video.data.len() + voice.data.len());
        let mut samples = Vec::new();
        for (kind, scale, track, rest) in [
            (TrackKind::Video, VIDEO_SCALE, video, &mut self.video),
            (TrackKind::Audio, VOICE_SCALE, voice, &mut self.voice),
        ] {
            let mut entry = match kind {
                TrackKind::Video => Some(self.parameters.entry(self.spec.width, self.spec.height)?),
                TrackKind::Audio => Some(voice_entry(self.spec.pre_skip)),
            };
            let whole: usize = track.samples.iter().map(|s| s.0).sum();
            for (data_size, span, keyframe) in &track.samples {
                samples.push(sample(kind, scale, entry.take(), *data_size, *span, *keyframe, payload.len()));
                payload.resize(payload.len() + data_size, 0);
            }
            let start = payload.len() - whole;
            payload[start..].copy_from_slice(&track.data[..whole]);
            rest.data = track.data[whole..].to_vec();
            rest.held = track.held;
        }
        let segment = self.muxer.create_media_segment_metadata(&samples).map_err(index)?;
        if !self.begun {
            self.begun = true;
            let head = self.head()?;
            self.write(&head)?;
        }
        // The first word of the fragment is written when everything else of it is on the disk: a reader of a file that
        // was cut off anywhere finds whole fragments, then zeros, which end it.
        let commit = segment.len().min(8);
        self.out.seek(SeekFrom::Start(self.written + commit as u64)).map_err(failed)?;
        self.out.write_all(&segment[commit..]).map_err(failed)?;
        self.out.write_all(&payload).map_err(failed)?;
        self.out.settle().map_err(failed)?;
        self.out.seek(SeekFrom::Start(self.written)).map_err(failed)?;
        self.out.write_all(&segment[..commit]).map_err(failed)?;
        self.written += (segment.len() + payload.len()) as u64;
        self.out.seek(SeekFrom::Start(self.written)).map_err(failed)?;
        Ok(true)
    }

    /// `ftyp`, `moov` with edit lists, XMP.
    fn head(&self) -> Result<Vec<u8>> {
        let bytes = self.muxer.init_segment_bytes().map_err(index)?;
        let (_, first) = FtypBox::decode(&bytes).map_err(index)?;
        let (mut moov, _) = MoovBox::decode(&bytes[first..]).map_err(index)?;
        if let Some(mvex) = &mut moov.mvex_box {
            // The length is not known, and zero would be a lie.
            mvex.mehd_box = None;
        }
        for trak in &mut moov.trak_boxes {
            if trak.mdia_box.hdlr_box.handler_type == HdlrBox::HANDLER_TYPE_SOUN {
                let media_time = i64::from(self.spec.pre_skip) + self.before.units(VOICE_SCALE);
                let entry = ElstEntry { edit_duration: 0, media_time, media_rate: FixedPointNumber::new(1, 0) };
                let elst_box = Some(ElstBox { entries: vec![entry] });
                trak.edts_box = Some(EdtsBox { elst_box, unknown_boxes: vec![] });
            }
        }
        let mut head = bytes[..first].to_vec();
        head.extend(moov.encode_to_vec().map_err(index)?);
        head.extend(self.spec.mark.xmp_box(&self.spec.when));
        Ok(head)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(failed)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Writes the rest; the last picture is shown for `last`.
    ///
    /// # Errors
    /// [`Mp4Error::Stream`] when there was no picture; [`Mp4Error::Io`].
    pub fn finish(&mut self, last: MediaTime) -> Result<()> {
        let Some(at) = self.video.held.as_ref().map(|h| h.at) else {
            return Err(Mp4Error::Stream("it has no pictures"));
        };
        self.video.end(at + last);
        if let Some(end) = self.voice_end {
            self.voice.end(end);
        }
        self.flush().map(drop)
    }
}

fn sample(
    track_kind: TrackKind,
    scale: u32,
    sample_entry: Option<SampleEntry>,
    data_size: usize,
    span: MediaTime,
    keyframe: bool,
    data_offset: usize,
) -> Sample {
    Sample {
        track_kind,
        sample_entry,
        keyframe,
        timescale: NonZeroU32::new(scale).unwrap_or(NonZeroU32::MIN),
        duration: span.units(scale).max(0) as u32,
        composition_time_offset: None,
        data_offset: data_offset as u64,
        data_size,
    }
}

fn index(error: impl std::fmt::Display) -> Mp4Error {
    Mp4Error::Index(error.to_string())
}

fn failed(source: std::io::Error) -> Mp4Error {
    Mp4Error::Io { path: "the recording".into(), source }
}
