//! How fast an engine is on this machine: the pipeline of one conversation without its network, timed.
//!
//! Speech comes as fast as the engine takes it, so an engine that is at several blocks at once always has all the blocks
//! under way that it can have. Pictures are encoded on a thread of their own, as in a conversation.
//!
//! | edge | capacity | when full |
//! | --- | --- | --- |
//! | blocks → encoder | 4 | the engine waits, and the report says how long: all pictures are encoded and paid for |

use super::engines::{self, Wanted};
use crate::{
    avatar::{Generator, OpenOptions, Stream},
    codec::{H264Config, OPUS_RATE, VOICE_FRAME, VideoEncoder, VoiceEncoder, to_i420},
    media::{AudioBlock, FrameBlock, Geometry, MediaTime, Pixels, Portrait, SPEECH_RATE, StageTimes},
    model::kernels::{Card, card_facts},
};
use anyhow::{Context, bail, ensure};
use serde::Serialize;
use std::{
    collections::VecDeque,
    sync::mpsc::{SyncSender, sync_channel},
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Medians over blocks, in milliseconds, and what they amount to.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Measured {
    pub(super) engine: &'static str,
    /// Where the large engine ran, as it was told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) device: Option<String>,
    pub(super) threads: usize,
    /// Denoising steps asked for; absent = the model's own.
    pub(super) steps: Option<usize>,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) fps: u32,
    /// Length of one block.
    pub(super) block_ms: f64,
    /// Blocks before those that count, and whether after them nothing grew any more ([`Generator::settled_after`]).
    pub(super) warm_up_blocks: u64,
    pub(super) settled: bool,
    /// Blocks that count.
    pub(super) blocks: usize,
    /// Whether stages overlapped: most blocks that were under way while another was given out; 0 = one after the other.
    pub(super) overlapped: bool,
    pub(super) under_way: usize,
    /// Loading the model, and preparing a face.
    pub(super) load_ms: f64,
    pub(super) open_ms: f64,
    /// What each stage took; where they overlap, beside others, and their sum is more than a block's time.
    pub(super) features_ms: f64,
    pub(super) generation_ms: f64,
    pub(super) decode_ms: f64,
    /// Colour conversion, H.264 and Opus, on a thread of their own: no part of a block's time.
    pub(super) encode_ms: f64,
    /// How long the engine waited in all because the encoder was not done.
    pub(super) encoder_held_ms: f64,
    /// From a block's pictures to the next one's; the 95th percentile, and the longest.
    pub(super) block_p50_ms: f64,
    pub(super) block_p95_ms: f64,
    pub(super) block_most_ms: f64,
    /// From a block's last speech to its pictures, no other block being under way.
    pub(super) latency_ms: f64,
    /// The same with all blocks under way that there can be, where stages overlap: most of it is waiting for those before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) latency_full_ms: Option<f64>,
    /// The slowest denoising step against the median one, at most: what the slowest block took to generate, less as many
    /// of the fastest block's steps as it had others. Absent where the number of steps is the model's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) step_most: Option<f64>,
    /// From the order to open the very first face, everything loaded, to its first block of pictures.
    pub(super) first_block_ms: f64,
    /// The same for a face and a prompt that are known, its speech all there: what a visitor waits for. Absent where a
    /// block takes so long that nobody waits for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) known: Option<Known>,
    /// Memory of the fullest device that was free after the tenth block and is not at the end, MiB: nothing may grow while
    /// somebody speaks. Absent where the engine does not tell, or makes no twenty blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) grown_mib: Option<f64>,
    /// The card it ran on and how full it was at the end; absent on the processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) card: Option<Card>,
    /// What the transformer computes a block, and how fast: absent where nobody counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tflop: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tflop_per_s: Option<f64>,
    /// Wall time of the blocks that count over the time they show: below 1 is faster than life.
    pub(super) real_time_factor: f64,
    /// Frames of these blocks over that wall time.
    pub(super) frames_per_second: f64,
    /// Processor seconds of all threads, the encoder's included, per second shown: what it costs however busy the machine
    /// is. Absent where the system does not tell.
    pub(super) processor: Option<f64>,
}

/// Milliseconds to the first pictures of a face that was there before.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Known {
    pub(super) open_ms: f64,
    pub(super) features_ms: f64,
    pub(super) generation_ms: f64,
    pub(super) decode_ms: f64,
    /// All of it.
    pub(super) first_block_ms: f64,
}

/// Blocks that take longer are waited for once only, and what still grows beside them does not count.
const PATIENCE: Duration = Duration::from_secs(5);
/// What warms up whatever grows or does not.
const WARM: MediaTime = MediaTime::from_millis(1000);
/// Blocks by themselves whose median is the latency of an engine that is at several blocks otherwise.
const ALONE: usize = 3;
/// Blocks that may wait for the encoder.
const QUEUE: usize = 4;

/// A face that is spoken to.
struct Talk {
    stream: Box<dyn Stream>,
    geometry: Geometry,
    speech: Speech,
    fed: MediaTime,
    /// When the speech was complete of blocks that were not given out yet.
    complete: VecDeque<Instant>,
    /// Blocks whose speech was complete, and those given out.
    spoken: u64,
    given: u64,
    /// Most blocks under way while another was given out.
    under_way: usize,
}

/// A block, when it was given out, and how long after its last speech.
struct Given {
    block: FrameBlock,
    at: Instant,
    latency: Duration,
}

impl Talk {
    fn new(stream: Box<dyn Stream>, geometry: Geometry, speech: Speech) -> Talk {
        let complete = VecDeque::new();
        Talk { stream, geometry, speech, fed: MediaTime::ZERO, complete, spoken: 0, given: 0, under_way: 0 }
    }

    /// Speech that block `index` needs.
    fn needs(&self, index: u64) -> MediaTime {
        MediaTime::from_units(self.geometry.first_frame(index + 1) as i64, self.geometry.fps) + self.geometry.look_ahead
    }

    /// The next block, spoken for as fast as the engine takes it; `alone`: only once nothing is under way.
    fn next(&mut self, alone: bool) -> anyhow::Result<Given> {
        loop {
            if let Some(block) = self.stream.pull()? {
                let at = Instant::now();
                let spoken = self.complete.pop_front().context("the engine gave a block before its speech")?;
                self.given += 1;
                self.under_way = self.under_way.max(self.stream.under_way());
                return Ok(Given { block, at, latency: at - spoken });
            }
            let under_way = self.stream.under_way();
            if alone && under_way > 0 {
                self.wait();
                continue;
            }
            if self.fed > self.needs(self.given + under_way as u64 + 1) {
                bail!("the engine gave no block for {:.1} s of speech", self.fed.as_millis_f64() / 1000.0);
            }
            let audio = AudioBlock { at: self.fed, samples: self.speech.piece(self.fed, SPEECH_RATE as usize / 25) };
            self.fed = audio.end();
            let before = Instant::now();
            while self.needs(self.spoken) <= self.fed {
                self.complete.push_back(before);
                self.spoken += 1;
            }
            self.stream.push(&audio)?;
        }
    }

    /// Until a block is ready.
    fn wait(&mut self) {
        futures::executor::block_on(std::future::poll_fn(|cx| self.stream.poll_ready(cx)));
    }

    /// Takes what is under way.
    fn clear(&mut self) -> anyhow::Result<()> {
        while self.stream.under_way() > 0 {
            self.next(true)?;
        }
        Ok(())
    }
}

/// Opens a known face with the speech of its first block.
fn known(
    generator: &mut dyn Generator,
    portrait: &Portrait,
    options: &OpenOptions,
    speech: Speech,
) -> anyhow::Result<Known> {
    let geometry = generator.geometry_for(portrait);
    let began = Instant::now();
    let stream = generator.open(portrait, options)?;
    let open = began.elapsed();
    let Given { block, at, .. } = Talk::new(stream, geometry, speech).next(true)?;
    let StageTimes { features, generation, decode, .. } = block.stages;
    Ok(Known {
        open_ms: ms(open),
        features_ms: ms(features),
        generation_ms: ms(generation),
        decode_ms: ms(decode),
        first_block_ms: ms(at - began),
    })
}

/// Encodes blocks on a thread of its own.
struct Encoding {
    blocks: SyncSender<FrameBlock>,
    thread: JoinHandle<anyhow::Result<Vec<(u64, Duration)>>>,
}

impl Encoding {
    fn start(geometry: &Geometry) -> anyhow::Result<Encoding> {
        let Geometry { width, height, fps, .. } = *geometry;
        let bitrate = 900_000;
        let mut video =
            VideoEncoder::new(H264Config { width, height, fps: fps as f32, bitrate, max_bitrate: bitrate })?;
        let mut voice = VoiceEncoder::new(32_000, 5)?;
        let (blocks, inbox) = sync_channel::<FrameBlock>(QUEUE);
        let work = move || {
            let mut times = Vec::new();
            for block in inbox {
                let before = Instant::now();
                for frame in &block.frames {
                    video.encode(&to_i420(frame)?, frame.at, false)?;
                }
                let span = MediaTime::from_units(block.frames.len() as i64, fps);
                for _ in 0..(span.units(OPUS_RATE) as usize).div_ceil(VOICE_FRAME) {
                    voice.encode(&[0.1; VOICE_FRAME])?;
                }
                times.push((block.index, before.elapsed()));
            }
            Ok(times)
        };
        Ok(Encoding { blocks, thread: std::thread::Builder::new().name("encode-bench".into()).spawn(work)? })
    }

    /// What each block took, when all are encoded.
    fn end(self) -> anyhow::Result<Vec<(u64, Duration)>> {
        drop(self.blocks);
        self.thread.join().map_err(|_| anyhow::anyhow!("the encoder's thread panicked"))?
    }
}

/// Runs made-up speech through an engine until blocks that show `seconds` were made after it had settled. Blocks before
/// are not counted.
pub(super) fn measure(wanted: &Wanted, steps: Option<usize>, seconds: u32) -> anyhow::Result<Measured> {
    let began = Instant::now();
    let mut generator = engines::load(wanted, &[])?;
    let load = began.elapsed();
    let portrait = generator.sample_portrait();
    let geometry = generator.geometry_for(&portrait);
    let Geometry { width, height, fps, .. } = geometry;
    let encoding = Encoding::start(&geometry)?;
    let (settled_after, speech) = (generator.settled_after(), Speech::new());
    let began = Instant::now();
    let options = OpenOptions { steps, planar: true, ..OpenOptions::default() };
    let stream = generator.open(&portrait, &options)?;
    let open = began.elapsed();
    let mut talk = Talk::new(stream, geometry.clone(), speech);

    let first = talk.next(true)?;
    let first_block = first.at - began;
    let mut made = MediaTime::from_units(first.block.frames.len() as i64, fps);
    // The last block that does not count, when it was given out, and what the process had spent by then. Of the encoder's
    // work as much is under way then as at the end.
    let (mut warm_up_blocks, mut from, mut used) = (1, first.at, processor_seconds());
    let mut accepted = encoding.blocks.send(first.block).is_ok();
    let mut slow = 0;
    while accepted && (warm_up_blocks < settled_after || made <= WARM) && slow < 2 {
        let given = talk.next(false)?;
        slow = if given.at - from > PATIENCE { slow + 1 } else { 0 };
        made += MediaTime::from_units(given.block.frames.len() as i64, fps);
        (warm_up_blocks, from, used) = (warm_up_blocks + 1, given.at, processor_seconds());
        accepted = encoding.blocks.send(given.block).is_ok();
    }

    let (mut features, mut generation, mut decode, mut latency, mut whole) = (vec![], vec![], vec![], vec![], vec![]);
    let least = |g: &dyn Generator| g.memory().iter().map(|f| f.free).min();
    let (mut last, mut ended, mut free, mut held, mut frames) = (from, used, None, Duration::ZERO, 0);
    while accepted && MediaTime::from_units(frames, fps) < MediaTime::from_millis(i64::from(seconds) * 1000) {
        let Given { block, at, latency: late } = talk.next(false)?;
        ended = processor_seconds();
        features.push(block.stages.features);
        generation.push(block.stages.generation);
        decode.push(block.stages.decode);
        latency.push(late);
        whole.push(at - last);
        (last, frames) = (at, frames + block.frames.len() as i64);
        if whole.len() == 10 {
            free = least(generator.as_ref());
        }
        let before = Instant::now();
        accepted = encoding.blocks.send(block).is_ok();
        held += before.elapsed();
    }
    let grown = free.zip(least(generator.as_ref())).filter(|_| whole.len() >= 20);
    let mut encode = encoding.end()?;
    ensure!(!whole.is_empty(), "the encoder ended before its time");
    encode.retain(|(index, _)| *index >= warm_up_blocks);
    let mut encode: Vec<Duration> = encode.into_iter().map(|(_, took)| took).collect();

    let overlapped = talk.under_way > 0;
    let quick = whole.iter().max().is_some_and(|longest| *longest < PATIENCE);
    let latency_full_ms = overlapped.then(|| percentile(&mut latency, 0.5));
    if overlapped {
        talk.clear()?;
        latency.clear();
        for _ in 0..if quick { ALONE } else { 1 } {
            latency.push(talk.next(true)?.latency);
        }
    }
    let Talk { stream, speech, under_way, .. } = talk;
    drop(stream);
    let known = quick.then(|| known(generator.as_mut(), &portrait, &options, speech)).transpose()?;
    let shown = frames as f64 / f64::from(fps);
    let wall = (last - from).as_secs_f64();
    let tflop = generator.tflop_per_block(&geometry, steps);
    Ok(Measured {
        engine: wanted.choice.name(),
        device: wanted.device().map(str::to_string),
        threads: wanted.threads,
        steps,
        width,
        height,
        fps,
        block_ms: geometry.block_span(1).as_millis_f64(),
        warm_up_blocks,
        settled: warm_up_blocks >= settled_after,
        blocks: whole.len(),
        overlapped,
        under_way,
        load_ms: ms(load),
        open_ms: ms(open),
        features_ms: percentile(&mut features, 0.5),
        generation_ms: percentile(&mut generation, 0.5),
        decode_ms: percentile(&mut decode, 0.5),
        encode_ms: percentile(&mut encode, 0.5),
        encoder_held_ms: ms(held),
        block_p50_ms: percentile(&mut whole, 0.5),
        block_p95_ms: percentile(&mut whole, 0.95),
        block_most_ms: percentile(&mut whole, 1.0),
        latency_ms: percentile(&mut latency, 0.5),
        latency_full_ms,
        step_most: steps.map(|n| slowest_step(&mut generation, n)),
        first_block_ms: ms(first_block),
        known,
        grown_mib: grown.map(|(free, end)| (free as f64 - end as f64) / f64::from(1 << 20)),
        card: wanted.card().and_then(card_facts),
        tflop,
        tflop_per_s: tflop.map(|t| t * 1000.0 / percentile(&mut generation, 0.5)),
        real_time_factor: wall / shown,
        frames_per_second: frames as f64 / wall,
        processor: used.zip(ended).map(|(begin, end)| (end - begin) / shown),
    })
}

/// An upper bound of the slowest of all steps against the median one, from what blocks of `steps` steps took.
fn slowest_step(blocks: &mut [Duration], steps: usize) -> f64 {
    let [least, median, most] = [0.0, 0.5, 1.0].map(|q| percentile(blocks, q));
    let n = steps as f64;
    (most - least * (n - 1.0) / n) / (median / n)
}

/// Milliseconds of processor time for one 512 × 512 picture in H.264, median: tells whether the encoder is the fast one.
pub(super) fn encoder_ms() -> anyhow::Result<f64> {
    let (width, height) = (512u32, 512u32);
    let config = H264Config { width, height, fps: 25.0, bitrate: 800_000, max_bitrate: 800_000 };
    let mut video = VideoEncoder::new(config)?;
    let mut times = Vec::new();
    for i in 0..50u32 {
        let mut rgb = vec![0; 3 * (width * height) as usize];
        for (n, pixel) in rgb.chunks_exact_mut(3).enumerate() {
            let (x, y) = (n as u32 % width + 3 * i, n as u32 / width + i);
            pixel.copy_from_slice(&[(x ^ y) as u8, (x / 2) as u8, (y * x / 256) as u8]);
        }
        let at = MediaTime::from_units(i64::from(i), 25);
        let frame = crate::media::Frame { at, width, height, pixels: Pixels::Rgb(rgb.into()), matte: None };
        let picture = to_i420(&frame)?;
        let before = Instant::now();
        video.encode(&picture, at, false)?;
        if i >= 5 {
            times.push(before.elapsed());
        }
    }
    Ok(percentile(&mut times, 0.5))
}

/// Processor time of this process so far, to 10 ms: user and system, fields 14 and 15 of `/proc/self/stat`.
fn processor_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is a name in parentheses that may hold spaces.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let user: f64 = fields.nth(11)?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / 100.0)
}

/// The most main memory this process has held, where the system tells.
pub(super) fn memory_peak_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1024)
}

/// Something like speech: a buzz whose pitch and loudness move, with pauses. Made before anything is timed.
struct Speech(Vec<f32>);

impl Speech {
    /// Seconds after which it begins again.
    const CYCLE: usize = 16;

    fn new() -> Speech {
        let sample = |i: usize| {
            let t = i as f32 / SPEECH_RATE as f32;
            let loud = (0.6 + 0.4 * (t * 19.0).sin()) * f32::from(u8::from(t % 2.0 < 1.5));
            let phase = (t * 130.0 + (t * 2.0).sin()) * std::f32::consts::TAU;
            0.2 * loud * (phase.sin() + 0.5 * (2.0 * phase).sin() + 0.3 * (5.0 * phase).sin())
        };
        Speech((0..Self::CYCLE * SPEECH_RATE as usize).map(sample).collect())
    }

    /// `n` samples from `at` on.
    fn piece(&self, at: MediaTime, n: usize) -> Vec<f32> {
        let first = at.units(SPEECH_RATE) as usize;
        (first..first + n).map(|i| self.0[i % self.0.len()]).collect()
    }
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1000.0
}

pub(super) fn percentile(values: &mut [Duration], q: f64) -> f64 {
    values.sort_unstable();
    values.get(((values.len() as f64 * q) as usize).min(values.len().saturating_sub(1))).map_or(0.0, |d| ms(*d))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::avatar;
    use std::task::{Context, Poll};

    #[test]
    fn one_slow_step_is_told_from_a_slow_block() {
        let mut blocks = [400, 400, 404, 401, 520].map(Duration::from_millis);
        let most = slowest_step(&mut blocks, 4);
        assert!((most - (520.0 - 300.0) / 100.25).abs() < 1e-9, "{most}");
        assert!((slowest_step(&mut [Duration::from_millis(100); 3], 4) - 1.0).abs() < 1e-9);
    }

    /// Makes a block of a frame for each piece of speech, and gives it when `depth` are under way, or when it is waited for.
    struct Slow {
        depth: usize,
        begun: u64,
        given: u64,
        waited: bool,
        mute: bool,
    }

    impl Stream for Slow {
        fn push(&mut self, _: &AudioBlock) -> avatar::Result<()> {
            self.begun += u64::from(!self.mute);
            Ok(())
        }
        fn pull(&mut self) -> avatar::Result<Option<FrameBlock>> {
            let full = self.under_way() > 0 && self.under_way() >= self.depth;
            if !full && !std::mem::take(&mut self.waited) {
                return Ok(None);
            }
            let index = self.given;
            self.given += 1;
            let (epoch, frames, controls) = (crate::media::Epoch::default(), Vec::new(), Vec::new());
            Ok(Some(FrameBlock { epoch, index, frames, stages: StageTimes::default(), controls }))
        }
        fn under_way(&self) -> usize {
            (self.begun - self.given) as usize
        }
        fn poll_ready(&mut self, _: &mut Context) -> Poll<()> {
            self.waited = true;
            Poll::Ready(())
        }
        fn finish(&mut self) -> avatar::Result<()> {
            Ok(())
        }
    }

    fn talk(depth: usize, mute: bool) -> Talk {
        let geometry = Geometry {
            width: 16,
            height: 16,
            fps: 25,
            first_block_frames: 1,
            block_frames: 1,
            look_ahead: MediaTime::ZERO,
            matte: false,
        };
        Talk::new(Box::new(Slow { depth, begun: 0, given: 0, waited: false, mute }), geometry, Speech::new())
    }

    #[test]
    fn the_line_is_kept_full_and_emptied_for_a_block_alone() {
        let mut talk = talk(3, false);
        let alone = talk.next(true).unwrap();
        assert_eq!((alone.block.index, talk.under_way), (0, 0));
        for index in 1..9 {
            assert_eq!(talk.next(false).unwrap().block.index, index);
            assert_eq!(talk.stream.under_way(), 2);
        }
        talk.clear().unwrap();
        assert_eq!((talk.given, talk.spoken), (11, 11));
        assert_eq!((talk.next(true).unwrap().block.index, talk.stream.under_way()), (11, 0));
        assert_eq!(talk.under_way, 2);
    }

    #[test]
    fn an_engine_that_gives_no_block_is_not_waited_for_for_ever() {
        let error = talk(1, true).next(false).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("gave no block"), "{error}");
    }
}
