//! One named thread per presenter that turns pictures into H.264 and hands them to the sinks. It is fed by a slot that
//! holds the latest picture only: when it is slow, raw pictures are skipped, never encoded ones.
//!
//! Each [`View`] that has a sink is encoded once; that is one nearly always. Every picture wears the badge, every
//! keyframe the mark that says who made it.

use super::{EncodedVideo, Fan, Rung};
use crate::{
    codec::{
        Badge, BadgeLanguage, BadgePlace, CodecError, EncodedFrame, H264Config, VideoEncoder, View,
        marks::{Mark, rfc3339},
        nothing, scale_i420, view_of,
    },
    edge::Latest,
    media::{Frame, I420, MediaTime},
};
use bytes::Bytes;
use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

/// A picture to encode.
#[derive(Clone, Debug)]
pub enum Picture {
    Rgb(Frame),
    Planes(I420),
}

/// What every picture of a session carries.
#[derive(Clone, Debug, Default)]
pub struct Look {
    pub badge: BadgePlace,
    pub language: BadgeLanguage,
    pub mark: Mark,
}

/// One order for the encoder.
#[derive(Clone, Debug)]
pub struct Job {
    pub picture: Picture,
    pub at: MediaTime,
    pub duration: MediaTime,
    /// When media time `at` is due.
    pub wall: Instant,
    pub rung: Rung,
    pub fps: f64,
    pub bitrate: u32,
    pub max_bitrate: u32,
    /// When the sound that this picture shows was spoken, if it came from a microphone.
    pub spoken: Option<Instant>,
}

/// What the thread measured since it was last asked, and sums.
#[derive(Clone, Debug, Default)]
pub struct EncoderReport {
    pub frames: u64,
    pub keyframes: u64,
    pub bytes: u64,
    pub encode: Duration,
    /// From spoken to handed over.
    pub delays: Vec<Duration>,
    /// Set once, when encoding failed beyond repair.
    pub failed: Option<String>,
    pub last_keyframe: Option<Instant>,
    /// When pictures passed; of one view.
    pub passed: Vec<Passed>,
}

/// A picture on its way.
#[derive(Clone, Copy, Debug)]
pub struct Passed {
    pub at: MediaTime,
    /// The encoder took it up, had it done, had handed it to all sinks.
    pub begun: Instant,
    pub encoded: Instant,
    pub sent: Instant,
}

struct Shared {
    jobs: Latest<Job>,
    keyframe: AtomicBool,
    report: Mutex<EncoderReport>,
}

impl Shared {
    fn report(&self) -> MutexGuard<'_, EncoderReport> {
        self.report.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The thread; dropping it ends and joins it.
pub struct Encoder {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Delays kept between two reports: ten seconds at 25 fps, then the report is not being read.
const MOST_DELAYS: usize = 250;

impl Encoder {
    pub fn start(name: &str, fan: Arc<Fan>, look: Look) -> std::io::Result<Encoder> {
        let shared =
            Arc::new(Shared { jobs: Latest::default(), keyframe: AtomicBool::new(false), report: Mutex::default() });
        let inner = shared.clone();
        let thread =
            std::thread::Builder::new().name(format!("encode-{name}")).spawn(move || run(&inner, &fan, &look))?;
        Ok(Encoder { shared, thread: Some(thread) })
    }

    /// Encodes this next; a picture still waiting is replaced and counted.
    pub fn put(&self, job: Job) {
        self.shared.jobs.put(job);
    }

    /// The picture that waits is of the past: it is not encoded.
    pub fn discard(&self) {
        self.shared.jobs.clear();
    }

    /// The next picture will be a keyframe.
    pub fn want_keyframe(&self) {
        self.shared.keyframe.store(true, Ordering::Release);
    }

    /// Pictures replaced before they were encoded.
    pub fn replaced(&self) -> u64 {
        self.shared.jobs.replaced().get()
    }

    /// Takes what was measured since the last call.
    pub fn report(&self) -> EncoderReport {
        std::mem::take(&mut *self.shared.report())
    }
}

impl Drop for Encoder {
    fn drop(&mut self) {
        self.shared.jobs.close();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("an encoder thread ended by a panic");
        }
    }
}

/// What one view needs from picture to picture.
#[derive(Default)]
struct Desk {
    encoder: Option<VideoEncoder>,
    badge: Option<Badge>,
    failures: u32,
}

/// The thread's whole life. A panic is a failure that the session sees: it must not go on without pictures.
fn run(shared: &Shared, fan: &Fan, look: &Look) {
    if catch_unwind(AssertUnwindSafe(|| work(shared, fan, look))).is_err() {
        tracing::error!("an encoder thread panicked; this is a bug");
        shared.report().failed = Some("the encoder's thread panicked".into());
    }
}

fn work(shared: &Shared, fan: &Fan, look: &Look) {
    let mut desks: BTreeMap<View, Desk> = BTreeMap::new();
    while let Some(job) = futures::executor::block_on(shared.jobs.take()) {
        let keyframe = shared.keyframe.swap(false, Ordering::AcqRel);
        let views = fan.views();
        desks.retain(|view, _| views.contains(view));
        for (nth, view) in views.into_iter().enumerate() {
            let begun = Instant::now();
            let desk = desks.entry(view).or_default();
            match encode(desk, &job, view, keyframe, look) {
                Ok((frame, [width, height])) => {
                    desk.failures = 0;
                    let handed = Instant::now();
                    let video = EncodedVideo {
                        at: job.at,
                        duration: job.duration,
                        keyframe: frame.keyframe,
                        width,
                        height,
                        data: Bytes::from(frame.data),
                    };
                    fan.show(view, &video, job.wall);
                    let sent = Instant::now();
                    let mut report = shared.report();
                    report.bytes += video.data.len() as u64;
                    report.encode += handed.saturating_duration_since(begun);
                    if frame.keyframe {
                        report.keyframes += 1;
                        report.last_keyframe = Some(handed);
                    }
                    // A picture counts once, however many views of it there are.
                    if nth > 0 {
                        continue;
                    }
                    report.frames += 1;
                    if report.passed.len() < MOST_DELAYS {
                        report.passed.push(Passed { at: job.at, begun, encoded: handed, sent });
                    }
                    if let Some(spoken) = job.spoken
                        && report.delays.len() < MOST_DELAYS
                    {
                        report.delays.push(handed.saturating_duration_since(spoken));
                    }
                }
                Err(error) => {
                    // A fresh encoder starts with a keyframe, which is also what the viewer then needs.
                    desk.encoder = None;
                    desk.failures += 1;
                    tracing::warn!(%error, "a picture could not be encoded");
                    if desk.failures == 10 {
                        shared.report().failed = Some(error.to_string());
                        return;
                    }
                }
            }
        }
    }
}

/// The access unit and its size in pixels.
fn encode(
    desk: &mut Desk,
    job: &Job,
    view: View,
    keyframe: bool,
    look: &Look,
) -> Result<(EncodedFrame, [u32; 2]), CodecError> {
    let full;
    let planes = match &job.picture {
        Picture::Rgb(frame) => {
            full = view_of(frame, view)?;
            &full
        }
        Picture::Planes(planes) if view == View::Plain => planes,
        // Nobody knows what of a portrait is background.
        Picture::Planes(planes) => {
            full = nothing(planes.width, planes.height, view)?;
            &full
        }
    };
    let (width, height) = (job.rung.width, view.height(job.rung.height));
    let mut small = if (planes.width, planes.height) == (width, height) {
        planes.clone()
    } else {
        scale_i420(planes, width, height)?
    };
    if !desk.badge.as_ref().is_some_and(|b| b.fits(width, job.rung.height)) {
        desk.badge = Badge::new(look.badge, look.language, width, job.rung.height)?;
    }
    // Where nobody is there is nothing to be marked.
    if let Some(badge) = desk.badge.as_ref().filter(|_| view == View::Plain || matches!(job.picture, Picture::Rgb(_))) {
        badge.draw(&mut small);
    }
    // The matte costs about a third more.
    let share = |bits: u32| if view == View::Stacked { bits.saturating_add(bits / 3) } else { bits };
    let (bitrate, max_bitrate) = (share(job.bitrate), share(job.max_bitrate));
    let fits = |e: &VideoEncoder| {
        let c = e.config();
        (c.width, c.height, c.fps) == (width, height, job.fps as f32) && c.max_bitrate >= bitrate
    };
    if !desk.encoder.as_ref().is_some_and(fits) {
        desk.encoder = None;
    }
    let encoder = match &mut desk.encoder {
        Some(e) => e,
        None => {
            let config = H264Config { width, height, fps: job.fps as f32, bitrate, max_bitrate };
            desk.encoder.insert(VideoEncoder::new(config)?)
        }
    };
    encoder.set_bitrate(bitrate);
    let mut frame = encoder.encode(&small, job.at, keyframe)?;
    if frame.keyframe {
        look.mark.insert(&mut frame.data, &rfc3339(SystemTime::now()));
    }
    Ok((frame, [width, height]))
}
