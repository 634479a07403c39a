//! One named thread per presenter that turns pictures into H.264 and hands them to the link. It is fed by a slot that
//! holds the latest picture only: when it is slow, raw pictures are skipped, never encoded ones.

use super::{EncodedVideo, LinkOut, Rung};
use crate::{
    codec::{CodecError, H264Config, VideoEncoder, rgb_to_i420, scale_i420},
    edge::Latest,
    media::{Frame, I420, MediaTime},
};
use bytes::Bytes;
use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// A picture to encode.
#[derive(Clone, Debug)]
pub enum Picture {
    Rgb(Frame),
    Planes(I420),
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
    pub fn start(name: &str, link: Arc<dyn LinkOut>) -> std::io::Result<Encoder> {
        let shared =
            Arc::new(Shared { jobs: Latest::default(), keyframe: AtomicBool::new(false), report: Mutex::default() });
        let inner = shared.clone();
        let thread = std::thread::Builder::new().name(format!("encode-{name}")).spawn(move || work(&inner, &*link))?;
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

fn work(shared: &Shared, link: &dyn LinkOut) {
    let mut encoder: Option<VideoEncoder> = None;
    let mut failures = 0;
    while let Some(job) = futures::executor::block_on(shared.jobs.take()) {
        let begun = Instant::now();
        let keyframe = shared.keyframe.swap(false, Ordering::AcqRel);
        match encode(&mut encoder, &job, keyframe) {
            Ok(frame) => {
                failures = 0;
                let handed = Instant::now();
                let size = frame.data.len() as u64;
                let video = EncodedVideo {
                    at: job.at,
                    duration: job.duration,
                    keyframe: frame.keyframe,
                    data: Bytes::from(frame.data),
                };
                link.video(video, job.wall);
                let mut report = shared.report();
                report.frames += 1;
                report.bytes += size;
                report.encode += handed.saturating_duration_since(begun);
                if frame.keyframe {
                    report.keyframes += 1;
                    report.last_keyframe = Some(handed);
                }
                if let Some(spoken) = job.spoken
                    && report.delays.len() < MOST_DELAYS
                {
                    report.delays.push(handed.saturating_duration_since(spoken));
                }
            }
            Err(error) => {
                // A fresh encoder starts with a keyframe, which is also what the viewer then needs.
                encoder = None;
                failures += 1;
                tracing::warn!(%error, "a picture could not be encoded");
                if failures == 10 {
                    shared.report().failed = Some(error.to_string());
                    return;
                }
            }
        }
    }
}

fn encode(
    encoder: &mut Option<VideoEncoder>,
    job: &Job,
    keyframe: bool,
) -> Result<crate::codec::EncodedFrame, CodecError> {
    let full;
    let planes = match &job.picture {
        Picture::Rgb(frame) => {
            full = rgb_to_i420(frame)?;
            &full
        }
        Picture::Planes(planes) => planes,
    };
    let small;
    let (width, height) = (job.rung.width, job.rung.height);
    let planes = if (planes.width, planes.height) == (width, height) {
        planes
    } else {
        small = scale_i420(planes, width, height)?;
        &small
    };
    let fits = |e: &VideoEncoder| {
        let c = e.config();
        (c.width, c.height, c.fps) == (width, height, job.fps as f32) && c.max_bitrate >= job.bitrate
    };
    if !encoder.as_ref().is_some_and(fits) {
        *encoder = None;
    }
    let encoder = match encoder {
        Some(e) => e,
        None => {
            let (bitrate, max_bitrate) = (job.bitrate, job.max_bitrate);
            let config = H264Config { width, height, fps: job.fps as f32, bitrate, max_bitrate };
            encoder.insert(VideoEncoder::new(config)?)
        }
    };
    encoder.set_bitrate(job.bitrate);
    encoder.encode(planes, job.at, keyframe)
}
