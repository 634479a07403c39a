//! One file: speech is pushed as it is read and frames are written as they come, so memory stays flat however long the
//! file.

use super::{
    Common,
    interruption::Interruption,
    progress::Progress,
    voices::{self, Voices},
};
use crate::{
    avatar::{Generator, OpenOptions, Stream},
    cli::engines,
    codec::{
        Badge, H264Config, VOICE_FRAME, VideoEncoder, VoiceEncoder,
        audio_file::{Limits, VOICE_RATE},
        marks::Mark,
        mp4::{Mp4Spec, Mp4Writer},
        to_i420, to_rgb,
    },
    media::{FrameBlock, Geometry, MediaTime, Portrait, StageTimes},
};
use anyhow::{Context, bail};
use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// What one file is made of.
#[derive(Clone, Debug)]
pub(super) struct Task {
    /// One voice; several speakers'; none for a model that hears nothing.
    pub(super) voices: Vec<PathBuf>,
    /// Where in the picture each of several speakers is; as many as voices, or none.
    pub(super) masks: Vec<PathBuf>,
    pub(super) image: Option<PathBuf>,
    pub(super) presenter: Option<String>,
    pub(super) out: PathBuf,
    pub(super) options: OpenOptions,
    pub(super) trace: Option<PathBuf>,
    pub(super) raw_frames: Option<PathBuf>,
}

impl Task {
    /// Several speakers instead of one voice, each with a mask or none of them with one. No speakers change nothing.
    pub(super) fn cast(&mut self, speakers: Vec<(PathBuf, Option<PathBuf>)>) -> anyhow::Result<()> {
        if speakers.is_empty() {
            return Ok(());
        }
        if speakers.len() == 1 {
            bail!("one speaker is not several: give the voice as audio, without a mask");
        }
        let (voices, masks): (Vec<_>, Vec<_>) = speakers.into_iter().unzip();
        let masks: Vec<PathBuf> = masks.into_iter().flatten().collect();
        if !masks.is_empty() && masks.len() != voices.len() {
            bail!("{} speakers have {} masks; give each one, or none", voices.len(), masks.len());
        }
        (self.voices, self.masks) = (voices, masks);
        Ok(())
    }

    /// What can be told without a model: inputs that are not there, outputs that would overwrite them.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let pictures = [self.image.as_ref(), self.options.pose.as_ref()].into_iter().flatten();
        let inputs: Vec<&PathBuf> = self.voices.iter().chain(&self.masks).chain(pictures).collect();
        for given in &inputs {
            std::fs::metadata(given).with_context(|| format!("cannot open {}", given.display()))?;
        }
        for made in [Some(&self.out), self.trace.as_ref(), self.raw_frames.as_ref()].into_iter().flatten() {
            if inputs.iter().any(|given| same_file(made, given)) {
                bail!("{} is also an input and would be overwritten; choose another name", made.display());
            }
        }
        Ok(())
    }
}

/// What became of it.
pub(super) struct Made {
    pub(super) length: f64,
    pub(super) frames: u64,
    pub(super) took: Duration,
    pub(super) opening: Duration,
    /// Stage times of every block.
    pub(super) blocks: Vec<StageTimes>,
}

/// Blocks whose times are remembered for `--timings`.
const TIMED: usize = 100_000;

/// Renders one file.
pub(super) fn render(
    task: &Task,
    common: &Common,
    generator: &mut dyn Generator,
    interruption: &Interruption,
) -> anyhow::Result<Made> {
    let began = Instant::now();
    let limits = Limits { longest: Duration::from_secs(common.longest_minutes * 60), ..Limits::default() };
    let (spoken, warnings) = voices::scan(&task.voices, &limits)?;
    for warning in warnings.iter().filter(|_| !common.quiet) {
        eprintln!("warning: {warning}");
    }
    let portrait = engines::portrait(task.image.as_deref(), task.presenter.as_deref(), generator)?;
    let mut options = task.options.clone();
    options.masks = masks(task, &portrait)?;
    let geometry = generator.geometry_for(&portrait);
    let opened = Instant::now();
    let stream = generator.open(&portrait, &options)?;
    let opening = opened.elapsed();

    let length = match (generator.frames(), common.max_clips) {
        (Some(_), _) if !task.voices.is_empty() => bail!("this model hears nothing: leave the voice out"),
        (Some(frames), _) => MediaTime::from_units(frames as i64, geometry.fps),
        (None, _) if task.voices.is_empty() => bail!("name a voice with --audio"),
        (None, Some(clips)) => spoken.min(common.clips_span(&geometry, clips)),
        (None, None) => spoken,
    };
    let mut job = Job::new(task, common, stream, geometry, length)?;
    interruption.guard(job.temporaries());
    let stopped = || if interruption.asked() { bail!("interrupted; nothing was written") } else { Ok(()) };
    let mut voices = Voices::open(&task.voices, length)?;
    while let Some(stretch) = voices.read()? {
        for (speaker, speech) in stretch.speech.iter().enumerate() {
            job.stream.push_to(speaker, speech)?;
        }
        job.voice(&stretch.voice)?;
        while let Some(block) = job.stream.pull()? {
            stopped()?;
            job.block(block)?;
        }
    }
    job.stream.finish()?;
    while !job.complete() {
        stopped()?;
        let Some(block) = job.stream.pull()? else {
            bail!("the engine gave {} of {} frames; this is a fault of the engine", job.frames, job.total);
        };
        job.block(block)?;
    }
    let frames = job.total;
    let blocks = job.finish()?;
    Ok(Made { length: length.as_secs_f64(), frames, took: began.elapsed(), opening, blocks })
}

/// The masks of several speakers over the picture: as given, or columns of equal width from left to right.
fn masks(task: &Task, portrait: &Portrait) -> anyhow::Result<Vec<Portrait>> {
    let count = task.voices.len();
    if count < 2 {
        return Ok(Vec::new());
    }
    if !task.masks.is_empty() {
        return task.masks.iter().map(|path| engines::picture(path)).collect();
    }
    let (w, h) = (portrait.width as usize, portrait.height as usize);
    let column = |k: usize| {
        let own = |i: usize| (k * w / count..(k + 1) * w / count).contains(&(i / 3 % w.max(1)));
        let rgb: Vec<u8> = (0..3 * w * h).map(|i| if own(i) { 255 } else { 0 }).collect();
        Portrait { rgb: rgb.into(), ..*portrait }
    };
    Ok((0..count).map(column).collect())
}

/// Everything that is written to, and how far it is.
struct Job {
    stream: Box<dyn Stream>,
    geometry: Geometry,
    video: VideoEncoder,
    /// `None`: no voice.
    opus: Option<VoiceEncoder>,
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
    blocks: Vec<StageTimes>,
}

/// Frames between keyframes: what seeking in the file costs at most.
const KEYFRAME_EVERY: u64 = 100;

impl Job {
    fn new(
        task: &Task,
        common: &Common,
        stream: Box<dyn Stream>,
        geometry: Geometry,
        length: MediaTime,
    ) -> anyhow::Result<Job> {
        let Geometry { width, height, fps, .. } = geometry;
        // A fifth of a bit per pixel is clean for a head before a still background.
        let bitrate = common.bitrate.unwrap_or(((width * height * fps) as f32 * 0.2) as u32).max(100_000);
        let video = VideoEncoder::new(H264Config {
            width,
            height,
            fps: fps as f32,
            bitrate,
            max_bitrate: bitrate.max(bitrate / 2 * 3),
        })?;
        let silent = task.voices.is_empty();
        let mut opus = if silent { None } else { Some(VoiceEncoder::new(64_000, 0)?) };
        let pre_skip = opus.as_mut().map(VoiceEncoder::look_ahead).transpose()?;
        let total = frames_of(length, fps);
        let mark = Mark { engine: common.engine.into(), session: String::new() };
        let when = common.marking.when();
        let spec = Mp4Spec {
            width,
            height,
            fps,
            expected: length,
            pre_skip: pre_skip.map(|n| n as u16),
            mark: mark.clone(),
            when: when.clone(),
        };
        Ok(Job {
            stream,
            geometry,
            video,
            opus,
            file: Mp4Writer::create(&task.out, spec)?,
            trace: task.trace.as_deref().map(PartFile::create).transpose()?,
            raw: task.raw_frames.as_deref().map(PartFile::create).transpose()?,
            waiting: Vec::new(),
            voice_samples: 0,
            pre_skip: pre_skip.unwrap_or(0),
            frames: 0,
            total,
            badge: common.marking.badge(width, height)?,
            mark,
            when,
            progress: Progress::new(total, fps, common.quiet),
            blocks: Vec::new(),
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
        let Some(opus) = &mut self.opus else { return Ok(()) };
        let whole = self.waiting.len() / VOICE_FRAME * VOICE_FRAME;
        for frame in self.waiting[..whole].chunks_exact(VOICE_FRAME) {
            self.file.add_audio(&opus.encode(frame)?, VOICE_FRAME as u32)?;
        }
        self.waiting.drain(..whole);
        Ok(())
    }

    fn block(&mut self, block: FrameBlock) -> anyhow::Result<()> {
        let span = self.geometry.frame_span();
        if self.blocks.len() < TIMED {
            self.blocks.push(block.stages);
        }
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
                raw.write(&to_rgb(frame)?)?;
            }
            let mut picture = to_i420(frame)?;
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

    fn finish(mut self) -> anyhow::Result<Vec<StageTimes>> {
        // The encoder's look-ahead comes out behind the voice.
        let padding = vec![0.0; self.pre_skip];
        self.waiting.extend(padding);
        self.waiting.resize(self.waiting.len().next_multiple_of(VOICE_FRAME), 0.0);
        self.packets()?;
        let length = match &self.opus {
            Some(_) => MediaTime::from_units(self.voice_samples as i64, VOICE_RATE),
            None => MediaTime::from_units(self.total as i64, self.geometry.fps),
        };
        self.file.finish(length)?;
        for part in [self.trace, self.raw].into_iter().flatten() {
            part.finish()?;
        }
        self.progress.done();
        Ok(self.blocks)
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
