//! Speech files: WAV, MP3, FLAC, Ogg (Vorbis, Opus), MP4/M4A (AAC, Opus) → mono, streaming.
//!
//! Two passes over a file: [`scan`] decodes it once and says what it is (exact length, loudness, faults), so that a
//! broken, silent or endless file is refused before anything expensive starts; [`SpeechFile`] then streams it, block
//! by block, as 16 kHz speech for the model and 48 kHz voice for the muxer, both starting at time zero. Memory does
//! not grow with the length of the file.
//!
//! Encoder priming is removed, so that sample 0 is the first sample that was recorded: MP3 by its LAME header, Vorbis
//! and Opus by their granule positions and pre-skip, AAC and Opus in MP4 by the edit list (`edits.rs`).

use super::{CodecError, Resampler, edits, guard::guarded};
use crate::media::{AudioBlock, MediaTime, Pcm, SPEECH_RATE};
use std::{
    fs::File,
    io::{Cursor, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use symphonia::core::{
    audio::GenericAudioBufferRef,
    codecs::audio::{AudioDecoder, AudioDecoderOptions, well_known::CODEC_ID_OPUS},
    errors::Error as Fault,
    formats::{FormatReader, TrackType, probe::Hint},
    io::MediaSourceStream,
};

/// Sample rate of the voice that is muxed beside the video.
pub const VOICE_RATE: u32 = 48_000;

/// Peak below which a file counts as silent: −60 dBFS.
const SILENCE_PEAK: f32 = 1e-3;

/// What a caller accepts.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Longer files are refused.
    pub longest: Duration,
    /// Shorter files are refused: there is nothing to say in them.
    pub shortest: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { longest: Duration::from_secs(4 * 3600), shortest: Duration::from_millis(20) }
    }
}

/// Why a speech file cannot be used. Every text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum AudioFileError {
    #[error("cannot open the speech file {name}: {source}")]
    Open { name: String, source: std::io::Error },
    #[error("{name} is empty (0 bytes); give a WAV, MP3, FLAC, Ogg or M4A file with speech in it")]
    Empty { name: String },
    #[error(
        "{name} is not a sound file that can be read ({why}); give WAV, MP3, FLAC, Ogg (Vorbis or Opus) or M4A (AAC)"
    )]
    Unknown { name: String, why: String },
    #[error("{name} has no sound track; give a file with speech in it")]
    NoTrack { name: String },
    #[error("{name}: {what} cannot be decoded; convert it, for example to WAV or FLAC")]
    Unsupported { name: String, what: String },
    #[error("{name} is damaged: {why}; export or convert it again")]
    Corrupt { name: String, why: String },
    #[error("{name} lasts {} and at most {} are accepted; cut it, or raise the limit", clock(*length), clock(*longest))]
    TooLong { name: String, length: Duration, longest: Duration },
    #[error("{name} holds only {ms} ms of sound; give a file with speech in it", ms = length.as_millis())]
    TooShort { name: String, length: Duration },
}

type Result<T> = std::result::Result<T, AudioFileError>;

fn clock(d: Duration) -> String {
    let s = d.as_secs();
    if s >= 3600 {
        format!("{} h {:02} min", s / 3600, s / 60 % 60)
    } else if s >= 60 {
        format!("{} min {:02} s", s / 60, s % 60)
    } else {
        format!("{:.2} s", d.as_secs_f64())
    }
}

/// Where the bytes come from. Cheap to clone; opened anew for each pass.
#[derive(Clone, Debug)]
pub enum Source {
    File(PathBuf),
    Bytes(Arc<[u8]>),
}

impl From<&Path> for Source {
    fn from(path: &Path) -> Self {
        Source::File(path.to_path_buf())
    }
}

impl From<Vec<u8>> for Source {
    fn from(bytes: Vec<u8>) -> Self {
        Source::Bytes(bytes.into())
    }
}

impl Source {
    fn name(&self) -> String {
        match self {
            Source::File(path) => path.display().to_string(),
            Source::Bytes(_) => "the uploaded sound".into(),
        }
    }

    /// The byte stream, the file name's extension as a hint, and where the edit list says the sound begins.
    fn open(&self) -> Result<(MediaSourceStream<'static>, Hint, Option<edits::Edit>)> {
        let name = self.name();
        let unreadable = |source| AudioFileError::Open { name: self.name(), source };
        let mut hint = Hint::new();
        match self {
            Source::File(path) => {
                let mut file = File::open(path).map_err(unreadable)?;
                let meta = file.metadata().map_err(unreadable)?;
                if !meta.is_file() {
                    let why = if meta.is_dir() { "it is a folder" } else { "it is not a regular file" };
                    return Err(AudioFileError::Unknown { name, why: why.into() });
                }
                if meta.len() == 0 {
                    return Err(AudioFileError::Empty { name });
                }
                if let Some(extension) = path.extension().and_then(|e| e.to_str()) {
                    hint.with_extension(extension);
                }
                let edit = edits::first_sound_edit(&mut file);
                file.seek(SeekFrom::Start(0)).map_err(unreadable)?;
                Ok((MediaSourceStream::new(Box::new(file), Default::default()), hint, edit))
            }
            Source::Bytes(bytes) => {
                if bytes.is_empty() {
                    return Err(AudioFileError::Empty { name });
                }
                let edit = edits::first_sound_edit(&mut Cursor::new(bytes.clone()));
                let stream = MediaSourceStream::new(Box::new(Cursor::new(bytes.clone())), Default::default());
                Ok((stream, hint, edit))
            }
        }
    }
}

/// One of the two decoders behind a file.
enum Decoder {
    Symphonia(Box<dyn AudioDecoder>),
    /// symphonia finds Opus packets but does not decode them.
    Opus {
        decoder: opus::Decoder,
        buffer: Vec<f32>,
    },
}

/// The track of one file, decoded to mono at its own rate, priming and padding removed.
struct MonoReader {
    name: String,
    format: Box<dyn FormatReader>,
    track: u32,
    decoder: Decoder,
    rate: u32,
    /// Samples still to be dropped at the start.
    skip: u64,
    /// Samples still to be given, where an edit list says so.
    left: Option<u64>,
    packets: u64,
    bad_packets: u64,
    first_fault: Option<String>,
    truncated: bool,
    ended: bool,
}

impl MonoReader {
    fn open(source: &Source) -> Result<MonoReader> {
        let name = source.name();
        let (stream, hint, edit) = source.open()?;
        let corrupt = |why| AudioFileError::Corrupt { name: name.clone(), why };
        let probe = symphonia::default::get_probe();
        let format = guarded(|| probe.probe(&hint, stream, Default::default(), Default::default()))
            .map_err(corrupt)?
            .map_err(|fault| AudioFileError::Unknown { name: name.clone(), why: fault.to_string() })?;
        let Some(track) = format.default_track(TrackType::Audio) else {
            return Err(AudioFileError::NoTrack { name });
        };
        let Some(params) = track.codec_params.as_ref().and_then(|p| p.audio()) else {
            return Err(AudioFileError::NoTrack { name });
        };
        let unsupported = |what: String| AudioFileError::Unsupported { name: name.clone(), what };
        let mut skip = 0;
        let decoder;
        let mut rate = params.sample_rate.unwrap_or(0);
        if params.codec == CODEC_ID_OPUS {
            let head = params.extra_data.as_deref().unwrap_or_default();
            if params.channels.as_ref().is_some_and(|c| c.count() > 2) {
                return Err(unsupported("Opus with more than two channels".into()));
            }
            rate = VOICE_RATE;
            // libopus mixes a stereo packet down itself.
            let mut opus =
                opus::Decoder::new(VOICE_RATE, opus::Channels::Mono).map_err(|e| unsupported(format!("Opus ({e})")))?;
            if edit.is_none() && head.len() >= 18 {
                // OpusHead (RFC 7845 §5.1): pre-skip at 10, output gain in 1/256 dB at 16, little endian.
                skip = u64::from(u16::from_le_bytes([head[10], head[11]]));
                let gain = i32::from(i16::from_le_bytes([head[16], head[17]]));
                opus.set_gain(gain).map_err(|e| unsupported(format!("Opus ({e})")))?;
            }
            decoder = Decoder::Opus { decoder: opus, buffer: vec![0.0; 5760] };
        } else {
            let options = AudioDecoderOptions::default().gapless(true);
            let made = guarded(|| symphonia::default::get_codecs().make_audio_decoder(params, &options));
            decoder = Decoder::Symphonia(
                made.map_err(corrupt)?.map_err(|fault| unsupported(format!("its codec ({fault})")))?,
            );
        }
        // A container may leave the rate to the first packet; then it is learnt there.
        if rate != 0 && !(4_000..=384_000).contains(&rate) {
            return Err(unsupported(format!("a sample rate of {rate} Hz")));
        }
        let mut left = None;
        if let (Some(edit), true) = (edit, rate != 0) {
            let to_samples = |t: u64, scale: u32| (t as u128 * rate as u128 / scale as u128) as u64;
            skip = to_samples(edit.media_time, edit.media_scale);
            left = edit.duration.map(|(d, scale)| to_samples(d, scale));
        }
        let track = track.id;
        Ok(MonoReader {
            name,
            format,
            track,
            decoder,
            rate,
            skip,
            left,
            packets: 0,
            bad_packets: 0,
            first_fault: None,
            truncated: false,
            ended: false,
        })
    }

    /// The next stretch of sound, appended to `out`; `false` at the end.
    fn read(&mut self, out: &mut Vec<f32>) -> Result<bool> {
        while !self.ended {
            let packet = match guarded(|| self.format.next_packet()) {
                Ok(Ok(Some(packet))) => packet,
                Ok(Ok(None)) => break,
                Ok(Err(Fault::ResetRequired)) => {
                    return Err(AudioFileError::Unsupported {
                        name: self.name.clone(),
                        what: "a chain of several streams in one file".into(),
                    });
                }
                Ok(Err(fault)) => {
                    self.cut(fault.to_string());
                    break;
                }
                Err(why) => {
                    self.cut(why);
                    break;
                }
            };
            if packet.track_id != self.track {
                continue;
            }
            self.packets += 1;
            let before = out.len();
            if let Err(why) = self.decode(&packet, out) {
                // The gap keeps its length, so that what follows stays in time.
                out.truncate(before);
                self.bad_packets += 1;
                self.first_fault.get_or_insert(why);
                let gap = packet.dur.get().min(u64::from(self.rate.max(1)));
                out.resize(before + gap as usize, 0.0);
            }
            let new = out.len() - before;
            let dropped = self.skip.min(new as u64) as usize;
            if dropped > 0 {
                out.drain(before..before + dropped);
                self.skip -= dropped as u64;
            }
            if let Some(left) = &mut self.left {
                let kept = (out.len() - before).min(*left as usize);
                out.truncate(before + kept);
                *left -= kept as u64;
                self.ended = *left == 0;
            }
            if out.len() > before {
                return Ok(true);
            }
        }
        self.ended = true;
        if self.packets == 0 || self.bad_packets * 10 > self.packets {
            let why = match (&self.first_fault, self.packets) {
                (Some(fault), 0) => fault.clone(),
                (None, 0) => "it holds no sound data".into(),
                (fault, n) => format!(
                    "{} of {n} packets cannot be decoded ({})",
                    self.bad_packets,
                    fault.as_deref().unwrap_or("unknown fault")
                ),
            };
            return Err(AudioFileError::Corrupt { name: self.name.clone(), why });
        }
        Ok(false)
    }

    /// What came before is whole; how much is missing is for the caller to judge.
    fn cut(&mut self, why: String) {
        self.truncated = true;
        self.first_fault.get_or_insert(why);
    }

    fn resampling(&self, e: CodecError) -> AudioFileError {
        AudioFileError::Unsupported { name: self.name.clone(), what: format!("its sample rate ({e})") }
    }

    fn decode(
        &mut self,
        packet: &symphonia::core::packet::Packet,
        out: &mut Vec<f32>,
    ) -> std::result::Result<(), String> {
        match &mut self.decoder {
            Decoder::Symphonia(decoder) => {
                let decoded = guarded(|| decoder.decode(packet)).inspect_err(|_| {
                    // What a panic left of the decoder is not used again: the file ends here.
                    (self.truncated, self.ended) = (true, true);
                })?;
                let decoded = decoded.map_err(|fault| fault.to_string())?;
                let rate = decoded.spec().rate();
                if self.rate == 0 {
                    self.rate = rate;
                }
                if rate != self.rate {
                    return Err(format!("the sample rate changes from {} to {rate} Hz", self.rate));
                }
                append_mono(&decoded, out);
                Ok(())
            }
            Decoder::Opus { decoder, buffer } => {
                if packet.data.is_empty() {
                    return Err("an empty packet".into());
                }
                let n = decoder.decode_float(&packet.data, buffer, false).map_err(|e| e.to_string())?;
                let end = n.saturating_sub(packet.trim_end.get() as usize);
                out.extend_from_slice(&buffer[..end]);
                Ok(())
            }
        }
    }
}

/// The mean of all channels: speech recorded on one side only loses 6 dB but nothing else.
fn append_mono(decoded: &GenericAudioBufferRef<'_>, out: &mut Vec<f32>) {
    let channels = decoded.spec().channels().count().max(1);
    let mut interleaved: Vec<f32> = Vec::new();
    decoded.copy_to_vec_interleaved(&mut interleaved);
    let scale = 1.0 / channels as f32;
    out.extend(interleaved.chunks_exact(channels).map(|c| {
        let mean = c.iter().sum::<f32>() * scale;
        // Float files may hold anything.
        if mean.is_finite() { mean.clamp(-4.0, 4.0) } else { 0.0 }
    }));
}

/// What a whole pass over a file found.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Exact length of the decoded sound.
    pub length: MediaTime,
    /// Samples per second of the file itself.
    pub rate: u32,
    /// Mono samples at `rate`.
    pub samples: u64,
    /// Largest absolute sample, 0..1 and above when clipped.
    pub peak: f32,
    /// Root mean square over the whole file.
    pub rms: f32,
    /// Sentences for the person: silent, truncated, damaged packets replaced.
    pub warnings: Vec<String>,
}

impl Summary {
    pub fn is_silent(&self) -> bool {
        self.peak < SILENCE_PEAK
    }
}

/// Decodes the whole file once, keeping nothing.
///
/// # Errors
/// Everything that makes the file unusable; see [`AudioFileError`]. A silent file is no error but a warning.
pub fn scan(source: &Source, limits: &Limits) -> Result<Summary> {
    let mut reader = MonoReader::open(source)?;
    let name = reader.name.clone();
    let (mut samples, mut peak, mut energy) = (0u64, 0f32, 0f64);
    let mut block = Vec::new();
    loop {
        block.clear();
        if !reader.read(&mut block)? {
            break;
        }
        samples += block.len() as u64;
        for &s in &block {
            peak = peak.max(s.abs());
            energy += f64::from(s) * f64::from(s);
        }
        let length = Duration::from_secs_f64(samples as f64 / f64::from(reader.rate));
        if length > limits.longest {
            // The header may know how long the rest is; only what was decoded is believed.
            let told = reader.format.default_track(TrackType::Audio).and_then(|t| t.num_frames).unwrap_or(0);
            let length = length.max(Duration::from_secs(told / u64::from(reader.rate)));
            return Err(AudioFileError::TooLong { name, length, longest: limits.longest });
        }
    }
    let rate = reader.rate.max(1);
    let length = Duration::from_secs_f64(samples as f64 / f64::from(rate));
    if length < limits.shortest {
        return Err(AudioFileError::TooShort { name, length });
    }
    let mut warnings = Vec::new();
    if reader.truncated {
        let why = reader.first_fault.as_deref().unwrap_or("the data stops");
        warnings.push(format!("{name} ends early ({why}); the {} before that are used", clock(length)));
    }
    if reader.bad_packets > 0 {
        let (bad, all) = (reader.bad_packets, reader.packets);
        warnings.push(format!("{bad} of {all} packets of {name} are damaged; silence stands in for them"));
    }
    let rms = (energy / samples.max(1) as f64).sqrt() as f32;
    let summary = Summary { length: exact(samples, rate), rate, samples, peak, rms, warnings };
    if summary.is_silent() {
        let mut summary = summary;
        let peak = if peak > 0.0 {
            format!("its loudest sample is {:.0} dBFS", 20.0 * peak.log10())
        } else {
            "every sample is zero".into()
        };
        summary.warnings.push(format!("{name} is silent ({peak}); the presenter will not speak"));
        return Ok(summary);
    }
    Ok(summary)
}

fn exact(samples: u64, rate: u32) -> MediaTime {
    MediaTime::from_units(samples as i64, rate)
}

/// A file as two streams in step: speech for the model and voice for the muxer.
pub struct SpeechFile {
    reader: MonoReader,
    speech: Resampler,
    voice: Resampler,
    speech_given: u64,
    voice_given: u64,
    native: Vec<f32>,
    finished: bool,
}

/// The same stretch of a file at both rates (their lengths may differ by the resamplers' delays).
#[derive(Debug)]
pub struct SpeechPart {
    /// 16 kHz; contiguous with the part before.
    pub speech: AudioBlock,
    /// 48 kHz; contiguous with the part before.
    pub voice: Pcm,
}

impl SpeechFile {
    /// # Errors
    /// As [`scan`], which should have run before: it checks lengths, this does not.
    pub fn open(source: &Source) -> Result<SpeechFile> {
        let mut reader = MonoReader::open(source)?;
        let mut native = Vec::new();
        // One packet ahead: some containers tell the rate only there.
        let more = reader.read(&mut native)?;
        if reader.rate == 0 {
            return Err(AudioFileError::Corrupt { name: reader.name, why: "it holds no sound data".into() });
        }
        let speech = Resampler::new(reader.rate, SPEECH_RATE).map_err(|e| reader.resampling(e))?;
        let voice = Resampler::new(reader.rate, VOICE_RATE).map_err(|e| reader.resampling(e))?;
        if !more {
            reader.ended = true;
        }
        Ok(SpeechFile { reader, speech, voice, speech_given: 0, voice_given: 0, native, finished: false })
    }

    /// The next part, about a tenth of a second or more; `None` at the end. All parts together hold exactly
    /// `round(samples · 16000 / rate)` and `round(samples · 48000 / rate)` samples.
    ///
    /// # Errors
    /// [`AudioFileError::Corrupt`] when the file changed since it was scanned.
    pub fn read(&mut self) -> Result<Option<SpeechPart>> {
        if self.finished {
            return Ok(None);
        }
        let enough = self.reader.rate as usize / 10;
        let mut more = true;
        while more && self.native.len() < enough {
            more = self.reader.read(&mut self.native)?;
        }
        let fault = |e| self.reader.resampling(e);
        let mut speech = self.speech.push(&self.native).map_err(fault)?;
        let mut voice = self.voice.push(&self.native).map_err(fault)?;
        self.native.clear();
        if !more {
            speech.extend(self.speech.finish().map_err(fault)?);
            voice.extend(self.voice.finish().map_err(fault)?);
            self.finished = true;
        }
        let part = SpeechPart {
            speech: AudioBlock { at: exact(self.speech_given, SPEECH_RATE), samples: speech },
            voice: Pcm { at: exact(self.voice_given, VOICE_RATE), rate: VOICE_RATE, samples: voice },
        };
        self.speech_given += part.speech.samples.len() as u64;
        self.voice_given += part.voice.samples.len() as u64;
        Ok(Some(part))
    }
}

/// Reads a whole file as 16 kHz speech. For short files and uploads; long ones are streamed by [`SpeechFile`].
///
/// # Errors
/// See [`scan`].
pub fn read_speech(source: &Source, limits: &Limits) -> Result<(Pcm, Summary)> {
    let summary = scan(source, limits)?;
    let mut file = SpeechFile::open(source)?;
    let mut samples = Vec::with_capacity(summary.length.units(SPEECH_RATE) as usize + 1);
    while let Some(part) = file.read()? {
        samples.extend_from_slice(&part.speech.samples);
    }
    Ok((Pcm { at: MediaTime::ZERO, rate: SPEECH_RATE, samples }, summary))
}

/// Reads at most `limit` bytes of a file; for callers that want [`Source::Bytes`].
///
/// # Errors
/// [`AudioFileError::Open`] when the file cannot be read or holds more.
pub fn read_bytes(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let unreadable = |source| AudioFileError::Open { name: path.display().to_string(), source };
    let mut bytes = Vec::new();
    File::open(path).map_err(unreadable)?.take(limit + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > limit {
        let source = std::io::Error::other(format!("it holds more than {limit} bytes"));
        return Err(unreadable(source));
    }
    Ok(bytes)
}
