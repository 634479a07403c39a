//! `loquent generate`: render video files from a portrait and speech files, or from a prompt with a model that hears
//! nothing. Which model a checkpoint holds is told by its content.
//!
//! The live pipeline under a virtual clock: the same generator, the same colour conversion and encoders, no network.
//! The same arguments (with `--date`, which the file tells) give the same file, bit for bit. Several files are a batch (`batch.rs`).

mod batch;
mod interruption;
mod marking;
mod progress;
mod render;
mod voices;

use super::{
    engines::{self, Choice, Wanted},
    large, loading,
    measure::{memory_peak_mib, percentile},
};
use crate::{
    avatar::{OpenOptions, base, s2v},
    media::{Geometry, MediaTime},
};
use anyhow::bail;
use interruption::Interruption;
use render::{Made, Task, render};
use std::{
    path::{Path, PathBuf},
    time::Instant,
};

#[derive(clap::Args)]
pub(super) struct Args {
    /// The face: a PNG, JPEG or WebP picture. With a model that hears nothing, the video's first frame.
    #[arg(long, value_name = "PORTRAIT", conflicts_with = "presenter")]
    image: Option<PathBuf>,
    /// The face: a built-in presenter, by its id.
    #[arg(long, value_name = "ID")]
    presenter: Option<String>,
    /// The voice: WAV, MP3, FLAC, Ogg (Vorbis, Opus) or M4A. Several give one video each, in the folder --out.
    #[arg(long, value_name = "SPEECH", num_args = 1..)]
    audio: Vec<PathBuf>,
    /// One of several speakers in the picture, with its own voice; repeated for each. The mask is a picture as large as
    /// the portrait, white where the speaker is; without masks the speakers stand from left to right in columns of equal
    /// width (large engine).
    #[arg(long, value_name = "SPEECH[:MASK]", conflicts_with = "audio")]
    speaker: Vec<String>,
    /// One JSON object a line: audio or speakers ([{"audio": …, "mask": …}, …]), and if wanted out, image, presenter, prompt,
    /// negative_prompt, pose, seed, steps. Paths are relative to the manifest.
    #[arg(long, value_name = "JOBS.jsonl", conflicts_with_all = ["audio", "speaker"])]
    manifest: Option<PathBuf>,
    /// The video to write (H.264 and Opus in MP4); for several, the folder to write them to.
    #[arg(long, value_name = "VIDEO.mp4|DIR", required_unless_present = "manifest")]
    out: Option<PathBuf>,
    /// In a batch, make videos again that are there already.
    #[arg(long)]
    force: bool,
    /// Same seed, face, voice and date give the same file, bit for bit.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Denoising steps; the model's own default when left out. More is slower.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100))]
    steps: Option<u64>,
    /// What makes the pictures [default: s2v with --checkpoint, else pocket].
    #[arg(long, value_enum)]
    engine: Option<Choice>,
    #[command(flatten)]
    large: large::Flags,
    /// A pose to follow: a video (MP4 with H.264, or Y4M), or a folder of pictures at 16 a second (large engine, clip mode).
    #[arg(long, value_name = "FILE")]
    pose: Option<PathBuf>,
    /// End after so many clips (large engine).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_clips: Option<u64>,
    /// Frames of a video of a model that hears nothing (T2V, I2V, TI2V): one more than a multiple of 4 [default: 81, 121].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=4097))]
    frames: Option<u64>,
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
    #[command(flatten)]
    marking: marking::Flags,
    /// Say where the time went: loading, opening, stages; and the most memory that was used.
    #[arg(long)]
    timings: bool,
    /// Say nothing but errors.
    #[arg(long, short)]
    quiet: bool,
}

/// What all files of a run share.
struct Common {
    bitrate: Option<u32>,
    longest_minutes: u64,
    max_clips: Option<u64>,
    /// Frames of a clip as asked for.
    clip_frames: Option<usize>,
    engine: &'static str,
    marking: marking::Flags,
    quiet: bool,
}

impl Common {
    /// The time that so many clips show.
    fn clips_span(&self, geometry: &Geometry, clips: u64) -> MediaTime {
        let lost = u64::from(geometry.block_frames - geometry.first_block_frames);
        // In clip mode a block is a clip; in block mode a clip is several blocks, 48 frames unless asked otherwise.
        let each = u64::from(geometry.block_frames).max(self.clip_frames.unwrap_or(48) as u64);
        MediaTime::from_units((each * clips).saturating_sub(lost) as i64, geometry.fps)
    }
}

impl Args {
    fn engine(&self) -> Choice {
        self.engine.unwrap_or(if self.large.checkpoint.is_empty() { Choice::Pocket } else { Choice::S2v })
    }

    fn common(&self, config: &s2v::Config) -> Common {
        Common {
            bitrate: self.bitrate,
            longest_minutes: self.longest,
            max_clips: self.max_clips,
            clip_frames: config.clip_frames,
            engine: self.engine().name(),
            marking: self.marking.clone(),
            quiet: self.quiet,
        }
    }

    /// The task of one voice, or of none.
    fn task(&self, audio: Option<PathBuf>, out: PathBuf) -> Task {
        Task {
            voices: audio.into_iter().collect(),
            masks: Vec::new(),
            image: self.image.clone(),
            presenter: self.presenter.clone(),
            out,
            options: OpenOptions {
                seed: self.seed,
                steps: self.steps.map(|n| n as usize),
                pose: self.pose.clone(),
                // Raw frames are wanted as they were made.
                planar: self.raw_frames.is_none(),
                ..OpenOptions::default()
            },
            trace: self.trace.clone(),
            raw_frames: self.raw_frames.clone(),
        }
    }
}

pub(super) fn run(mut args: Args) -> anyhow::Result<()> {
    let engine = args.engine();
    let square = if engine == Choice::Pocket { args.large.take_square()? } else { None };
    let official = s2v::Config { size: "official".into(), ..s2v::Config::default() };
    let mut config = args.large.over(engine, official)?;
    config.frames = args.frames.map(|n| n as usize);
    let given = [
        ("--max-clips", args.max_clips.is_some()),
        ("--pose", args.pose.is_some()),
        ("--speaker", !args.speaker.is_empty()),
    ];
    let given: Vec<&str> = given.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect();
    let silent = engine == Choice::S2v && base::makes(&config)?;
    let frames = args.frames.is_some().then_some("--frames");
    if engine != Choice::S2v && (!given.is_empty() || frames.is_some()) {
        let given: Vec<&str> = given.into_iter().chain(frames).collect();
        bail!("the {} engine has no {}; these belong to --engine s2v", engine.name(), given.join(", "));
    }
    if silent && (!given.is_empty() || !args.audio.is_empty()) {
        bail!(
            "this model hears nothing and makes one video from --prompt: leave out {}",
            [&["--audio"], &given[..]].concat().join(", ")
        );
    }
    let common = args.common(&config);
    if !args.quiet {
        args.marking.warn();
    }
    let watcher = if args.quiet { loading::unwatched() } else { loading::shown() };
    let wanted =
        Wanted { choice: engine, threads: args.threads, size: square, weights: None, large: config, watcher, silent };
    let several = args.manifest.is_some()
        || args.audio.len() > 1
        || args.out.as_ref().is_some_and(|out| out.as_os_str().to_string_lossy().ends_with('/'));
    if several {
        return batch::run(&args, &common, &wanted);
    }
    let Some(out) = &args.out else { bail!("name a video with --out") };
    if !silent && args.audio.is_empty() && args.speaker.is_empty() {
        bail!("name a voice with --audio, or several with --speaker");
    }
    let mut task = args.task(args.audio.first().cloned(), out.clone());
    task.cast(args.speaker.iter().map(|text| speaker(text)).collect())?;
    // A voice or a picture that cannot be read is told before a large model is loaded.
    task.check()?;
    let began = Instant::now();
    let mut generator = engines::load(&wanted, &[])?;
    let loaded = began.elapsed();
    let made = render(&task, &common, generator.as_mut(), &Interruption::watch()?)?;
    tell(&args, &task, &made);
    if args.timings {
        eprintln!("loaded in {:.1} s, face opened in {:.2} s", loaded.as_secs_f64(), made.opening.as_secs_f64());
        timings(&made);
    }
    Ok(())
}

/// `SPEECH` or `SPEECH:MASK`.
fn speaker(text: &str) -> (PathBuf, Option<PathBuf>) {
    match text.rsplit_once(':') {
        // A colon may be part of a path.
        Some((speech, mask)) if !speech.is_empty() && !Path::new(text).exists() => (speech.into(), Some(mask.into())),
        _ => (text.into(), None),
    }
}

/// One line about a file.
fn tell(args: &Args, task: &Task, made: &Made) {
    if !args.quiet {
        let took = made.took.as_secs_f64();
        eprintln!(
            "{}: {:.2} s, {} frames, made in {took:.1} s (real-time factor {:.2})",
            task.out.display(),
            made.length,
            made.frames,
            took / made.length
        );
    }
}

/// Medians of the stages, the first block apart (it pays for cold caches), and memory.
fn timings(made: &Made) {
    for (name, blocks) in [
        ("first block", &made.blocks[..made.blocks.len().min(1)]),
        ("later blocks", made.blocks.get(1..).unwrap_or(&[])),
    ] {
        if blocks.is_empty() {
            continue;
        }
        let median = |stage: fn(&crate::media::StageTimes) -> std::time::Duration| {
            percentile(&mut blocks.iter().map(stage).collect::<Vec<_>>(), 0.5)
        };
        eprintln!(
            "{name}: features {:.1} ms, generation {:.1} ms, decode {:.1} ms",
            median(|s| s.features),
            median(|s| s.generation),
            median(|s| s.decode)
        );
    }
    if let Some(mib) = memory_peak_mib() {
        eprintln!("main memory at most {mib} MiB");
    }
}
