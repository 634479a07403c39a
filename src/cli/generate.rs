//! `loquent generate`: render a video file from a portrait and a speech file.
//!
//! The live pipeline under a virtual clock: the same generator, the same colour conversion and encoders, no network.
//! Speech is pushed as it is read and frames are written as they come, so memory stays flat however long the file.
//! The same arguments (with `--date`, which the file tells) give the same file, bit for bit.

use super::engines::{self, Choice};
use crate::{
    avatar::{OpenOptions, Stream},
    codec::{
        Badge, BadgeLanguage, BadgePlace, H264Config, VOICE_FRAME, VideoEncoder, VoiceEncoder,
        audio_file::{self, Limits, Source, SpeechFile, Summary, VOICE_RATE},
        marks::{self, Mark},
        mp4::{Mp4Spec, Mp4Writer},
        rgb_to_i420,
    },
    media::{FrameBlock, Geometry, MediaTime},
};
use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    fs::File,
    io::{BufWriter, IsTerminal, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

#[derive(clap::Args)]
pub(super) struct Args {
    /// The face: a PNG, JPEG or WebP picture.
    #[arg(long, value_name = "PORTRAIT", conflicts_with = "presenter")]
    image: Option<PathBuf>,
    /// The face: a built-in presenter, by its id.
    #[arg(long, value_name = "ID")]
    presenter: Option<String>,
    /// The voice: WAV, MP3, FLAC, Ogg (Vorbis, Opus) or M4A.
    #[arg(long, value_name = "SPEECH")]
    audio: PathBuf,
    /// The video to write: H.264 and Opus in MP4.
    #[arg(long, value_name = "VIDEO.mp4")]
    out: PathBuf,
    /// Same seed, face, voice and date give the same file, bit for bit.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Denoising steps; the model's own default when left out. More is slower.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100))]
    steps: Option<u64>,
    /// What makes the pictures.
    #[arg(long, value_enum, default_value_t = Choice::Pocket)]
    engine: Choice,
    /// Processor threads for the model; 0 = all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Bits per second of the video; chosen by its size when left out.
    #[arg(long)]
    bitrate: Option<u32>,
    /// Refuse speech longer than this many minutes.
    #[arg(long, default_value_t = 240)]
    longest: u64,
    /// Also write one JSON line per frame: its index, time and control values.
    #[arg(long, value_name = "T.jsonl")]
    trace: Option<PathBuf>,
    /// Also write the frames before encoding: RGB, 8 bits, row by row, one after another.
    #[arg(long, value_name = "F.rgb")]
    raw_frames: Option<PathBuf>,
    /// Where the badge stands that says the picture is computer-made.
    #[arg(long, value_enum, default_value_t = Place::BottomRight)]
    badge: Place,
    /// What the badge is written in.
    #[arg(long, value_enum, default_value_t = Language::En)]
    badge_language: Language,
    /// When the file says it was made, such as 2026-01-31T12:00:00Z; the present moment when left out.
    #[arg(long, value_name = "RFC3339", value_parser = date)]
    date: Option<String>,
    /// Say nothing but errors.
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Place {
    TopLeft,
    TopRight,
    BottomLeft,
    BottomRight,
    Off,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Language {
    En,
    Zh,
}

impl Args {
    fn badge(&self, width: u32, height: u32) -> anyhow::Result<Option<Badge>> {
        let place = match self.badge {
            Place::TopLeft => BadgePlace::TopLeft,
            Place::TopRight => BadgePlace::TopRight,
            Place::BottomLeft => BadgePlace::BottomLeft,
            Place::BottomRight => BadgePlace::BottomRight,
            Place::Off => BadgePlace::Off,
        };
        let language = match self.badge_language {
            Language::En => BadgeLanguage::En,
            Language::Zh => BadgeLanguage::Zh,
        };
        Ok(Badge::new(place, language, width, height)?)
    }
}

/// A moment in UTC as it stands in the file.
fn date(text: &str) -> Result<String, String> {
    let shape = text.bytes().map(|b| if b.is_ascii_digit() { b'0' } else { b }).collect::<Vec<u8>>();
    if shape == b"0000-00-00T00:00:00Z" {
        return Ok(text.into());
    }
    Err("give it in UTC to the second, such as 2026-01-31T12:00:00Z".into())
}

pub(super) fn run(args: Args) -> anyhow::Result<()> {
    let began = Instant::now();
    for made in [Some(&args.out), args.trace.as_ref(), args.raw_frames.as_ref()].into_iter().flatten() {
        for given in [Some(&args.audio), args.image.as_ref()].into_iter().flatten() {
            if same_file(made, given) {
                bail!("{} is also an input and would be overwritten; choose another name", made.display());
            }
        }
    }
    if args.badge == Place::Off && !args.quiet {
        eprintln!(
            "warning: without the badge nobody can see that the picture is computer-made; many countries ask whoever \
             publishes it to say so"
        );
    }
    let source = Source::from(args.audio.as_path());
    let limits = Limits { longest: Duration::from_secs(args.longest * 60), ..Limits::default() };
    let summary = audio_file::scan(&source, &limits)?;
    for warning in summary.warnings.iter().filter(|_| !args.quiet) {
        eprintln!("warning: {warning}");
    }
    let mut generator = engines::load(args.engine, args.threads)?;
    let geometry = generator.geometry();
    let portrait = engines::portrait(args.image.as_deref(), args.presenter.as_deref(), generator.as_ref())?;
    let options = OpenOptions { seed: args.seed, steps: args.steps.map(|n| n as usize), ..OpenOptions::default() };
    let stream = generator.open(&portrait, &options)?;

    let mut job = Job::new(&args, stream, geometry, &summary)?;
    let stop = watch_for_interruption(job.temporaries())?;
    let mut speech = SpeechFile::open(&source)?;
    while let Some(part) = speech.read()? {
        job.stream.push(&part.speech)?;
        job.voice(&part.voice.samples)?;
        while let Some(block) = job.stream.pull()? {
            if stop.load(Ordering::Relaxed) {
                bail!("interrupted; nothing was written");
            }
            job.block(block)?;
        }
    }
    job.stream.finish()?;
    while !job.complete() {
        if stop.load(Ordering::Relaxed) {
            bail!("interrupted; nothing was written");
        }
        let Some(block) = job.stream.pull()? else {
            bail!("the engine gave {} of {} frames; this is a fault of the engine", job.frames, job.total);
        };
        job.block(block)?;
    }
    let frames = job.total;
    job.finish()?;
    if !args.quiet {
        let (took, length) = (began.elapsed().as_secs_f64(), summary.length.as_secs_f64());
        eprintln!(
            "{}: {length:.2} s, {frames} frames, made in {took:.1} s (real-time factor {:.2})",
            args.out.display(),
            took / length
        );
    }
    Ok(())
}

/// Everything that is written to, and how far it is.
struct Job {
    stream: Box<dyn Stream>,
    geometry: Geometry,
    video: VideoEncoder,
    opus: VoiceEncoder,
    file: Mp4Writer,
    trace: Option<PartFile>,
    raw: Option<PartFile>,
    /// 48 kHz voice that does not fill a packet yet.
    waiting: Vec<f32>,
    voice_samples: u64,
    pre_skip: usize,
    frames: u64,
    total: u64,
    badge: Option<Badge>,
    mark: Mark,
    when: String,
    progress: Progress,
}

/// Frames between keyframes: what seeking in the file costs at most.
const KEYFRAME_EVERY: u64 = 100;

impl Job {
    fn new(args: &Args, stream: Box<dyn Stream>, geometry: Geometry, summary: &Summary) -> anyhow::Result<Job> {
        let Geometry { width, height, fps, .. } = geometry;
        // A fifth of a bit per pixel is clean for a head before a still background.
        let bitrate = args.bitrate.unwrap_or(((width * height * fps) as f32 * 0.2) as u32).max(100_000);
        let video = VideoEncoder::new(H264Config {
            width,
            height,
            fps: fps as f32,
            bitrate,
            max_bitrate: bitrate.max(bitrate / 2 * 3),
        })?;
        let mut opus = VoiceEncoder::new(64_000, 0)?;
        let pre_skip = opus.look_ahead()?;
        let total = frames_of(summary.length, fps);
        let mark = Mark { engine: args.engine.name().into(), session: String::new() };
        let when = args.date.clone().unwrap_or_else(|| marks::rfc3339(SystemTime::now()));
        let spec = Mp4Spec {
            width,
            height,
            fps,
            expected: summary.length,
            pre_skip: pre_skip as u16,
            mark: mark.clone(),
            when: when.clone(),
        };
        Ok(Job {
            stream,
            geometry,
            video,
            opus,
            file: Mp4Writer::create(&args.out, spec)?,
            trace: args.trace.as_deref().map(PartFile::create).transpose()?,
            raw: args.raw_frames.as_deref().map(PartFile::create).transpose()?,
            waiting: Vec::new(),
            voice_samples: 0,
            pre_skip,
            frames: 0,
            total,
            badge: args.badge(width, height)?,
            mark,
            when,
            progress: Progress::new(total, fps, args.quiet),
        })
    }

    fn temporaries(&self) -> Vec<PathBuf> {
        let parts = [&self.trace, &self.raw].into_iter().flatten().map(|p| p.temporary.clone());
        parts.chain([self.file.temporary().to_path_buf()]).collect()
    }

    fn complete(&self) -> bool {
        self.frames == self.total
    }

    fn voice(&mut self, samples: &[f32]) -> anyhow::Result<()> {
        self.voice_samples += samples.len() as u64;
        self.waiting.extend_from_slice(samples);
        self.packets()
    }

    fn packets(&mut self) -> anyhow::Result<()> {
        let whole = self.waiting.len() / VOICE_FRAME * VOICE_FRAME;
        for frame in self.waiting[..whole].chunks_exact(VOICE_FRAME) {
            self.file.add_audio(&self.opus.encode(frame)?, VOICE_FRAME as u32)?;
        }
        self.waiting.drain(..whole);
        Ok(())
    }

    fn block(&mut self, block: FrameBlock) -> anyhow::Result<()> {
        let span = self.geometry.frame_span();
        for (i, frame) in block.frames.iter().enumerate() {
            if self.complete() {
                // The last block is padded with silence beyond the speech.
                break;
            }
            if let Some(trace) = &mut self.trace {
                let controls = block.controls.get(i).map_or(&[][..], |c| &c[..]);
                let line = serde_json::json!({ "frame": self.frames, "at_ms": frame.at.as_millis_f64(), "controls": controls });
                trace.write(format!("{line}\n").as_bytes())?;
            }
            if let Some(raw) = &mut self.raw {
                raw.write(&frame.rgb)?;
            }
            let mut picture = rgb_to_i420(frame)?;
            if let Some(badge) = &self.badge {
                badge.draw(&mut picture);
            }
            let mut encoded = self.video.encode(&picture, frame.at, self.frames.is_multiple_of(KEYFRAME_EVERY))?;
            if encoded.keyframe {
                self.mark.insert(&mut encoded.data, &self.when);
            }
            self.file.add_video(&encoded.data, span, encoded.keyframe)?;
            self.frames += 1;
            self.progress.at(self.frames);
        }
        Ok(())
    }

    fn finish(mut self) -> anyhow::Result<()> {
        // The encoder's look-ahead comes out behind the voice.
        let padding = vec![0.0; self.pre_skip];
        self.waiting.extend(padding);
        self.waiting.resize(self.waiting.len().next_multiple_of(VOICE_FRAME), 0.0);
        self.packets()?;
        let length = MediaTime::from_units(self.voice_samples as i64, VOICE_RATE);
        self.file.finish(length)?;
        for part in [self.trace, self.raw].into_iter().flatten() {
            part.finish()?;
        }
        self.progress.done();
        Ok(())
    }
}

/// Frames that cover a length: the last one may show less than its whole time.
fn frames_of(length: MediaTime, fps: u32) -> u64 {
    let whole = length.units(fps).max(0);
    let rest = length > MediaTime::from_units(whole, fps);
    whole as u64 + u64::from(rest)
}

fn same_file(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    }
}

/// A file that gets its name when it is complete.
struct PartFile {
    target: PathBuf,
    temporary: PathBuf,
    out: Option<BufWriter<File>>,
}

impl PartFile {
    fn create(target: &Path) -> anyhow::Result<PartFile> {
        let name = target.file_name().with_context(|| format!("{} names no file", target.display()))?;
        let temporary = target.with_file_name(format!(".{}.{}.part", name.to_string_lossy(), std::process::id()));
        let file = File::create(&temporary).with_context(|| format!("cannot write {}", temporary.display()))?;
        Ok(PartFile { target: target.into(), temporary, out: Some(BufWriter::new(file)) })
    }
    fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let Some(out) = &mut self.out else { return Ok(()) };
        out.write_all(bytes).with_context(|| format!("cannot write {}", self.temporary.display()))
    }
    fn finish(mut self) -> anyhow::Result<()> {
        if let Some(out) = &mut self.out {
            out.flush().with_context(|| format!("cannot write {}", self.temporary.display()))?;
        }
        std::fs::rename(&self.temporary, &self.target)
            .with_context(|| format!("cannot write {}", self.target.display()))?;
        self.out = None;
        Ok(())
    }
}

impl Drop for PartFile {
    fn drop(&mut self) {
        if self.out.take().is_some() {
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// Sets the returned flag on Ctrl-C or a termination signal, so that the work stops at the next block and unwinds. If
/// it has not within two seconds (one block may take long), or on a second signal, the temporary files are removed here
/// and the process ends.
fn watch_for_interruption(temporaries: Vec<PathBuf>) -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let work = async move {
        let Ok(mut terminate) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) else {
            return;
        };
        tokio::select! { _ = tokio::signal::ctrl_c() => {}, _ = terminate.recv() => {} }
        flag.store(true, Ordering::Relaxed);
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {},
            _ = terminate.recv() => {},
            () = tokio::time::sleep(Duration::from_secs(2)) => {},
        }
        for path in &temporaries {
            let _ = std::fs::remove_file(path);
        }
        eprintln!("loquent: interrupted; nothing was written");
        std::process::exit(130);
    };
    std::thread::Builder::new().name("interruption".into()).spawn(move || runtime.block_on(work))?;
    Ok(stop)
}

/// A bar with the remaining time on a terminal; a line now and then elsewhere.
enum Progress {
    Quiet,
    Bar(ProgressBar),
    Lines { total: u64, fps: u32, began: Instant, next: Instant },
}

impl Progress {
    fn new(total: u64, fps: u32, quiet: bool) -> Progress {
        if quiet {
            return Progress::Quiet;
        }
        if !std::io::stderr().is_terminal() {
            let now = Instant::now();
            return Progress::Lines { total, fps, began: now, next: now + Duration::from_secs(2) };
        }
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        let template = "{bar:32} {pos}/{len} frames, {per_sec}, {elapsed} gone, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Progress::Bar(bar)
    }

    fn at(&mut self, frames: u64) {
        match self {
            Progress::Quiet => {}
            Progress::Bar(bar) => bar.set_position(frames),
            Progress::Lines { total, fps, began, next } => {
                let now = Instant::now();
                if now >= *next && frames > 0 {
                    let took = now - *began;
                    let left = took.mul_f64((*total - frames) as f64 / frames as f64);
                    let shown = frames as f64 / f64::from((*fps).max(1));
                    eprintln!(
                        "{frames}/{total} frames ({shown:.1} s of video), about {:.0} s left",
                        left.as_secs_f64()
                    );
                    *next = now + Duration::from_secs(5);
                }
            }
        }
    }

    fn done(&self) {
        if let Progress::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_cover_the_whole_voice() {
        assert_eq!(frames_of(MediaTime::from_millis(1000), 25), 25);
        assert_eq!(frames_of(MediaTime::from_units(48_001, 48_000), 25), 26);
        assert_eq!(frames_of(MediaTime::from_millis(1), 25), 1);
    }
}
