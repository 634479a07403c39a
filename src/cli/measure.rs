//! How fast an engine is on this machine: the pipeline of one conversation without its network, timed.

use super::engines::{self, Wanted};
use crate::{
    avatar::{Generator, OpenOptions},
    codec::{H264Config, OPUS_RATE, VOICE_FRAME, VideoEncoder, VoiceEncoder, to_i420},
    media::{AudioBlock, Geometry, MediaTime, Pixels, Portrait, SPEECH_RATE, StageTimes},
    model::kernels::{Card, card_facts},
};
use serde::Serialize;
use std::time::{Duration, Instant};

/// Medians over blocks, in milliseconds, and what they amount to.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Measured {
    pub(super) engine: &'static str,
    pub(super) threads: usize,
    /// Denoising steps asked for; absent = the model's own.
    pub(super) steps: Option<usize>,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) fps: u32,
    /// Length of one block.
    pub(super) block_ms: f64,
    pub(super) blocks: usize,
    /// Loading the model, and preparing a face.
    pub(super) load_ms: f64,
    pub(super) open_ms: f64,
    pub(super) features_ms: f64,
    pub(super) generation_ms: f64,
    pub(super) decode_ms: f64,
    /// Colour conversion, H.264 and Opus.
    pub(super) encode_ms: f64,
    /// A whole block; its 95th percentile, and the slowest.
    pub(super) block_p50_ms: f64,
    pub(super) block_p95_ms: f64,
    pub(super) block_most_ms: f64,
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
    /// Time needed over time shown: below 1 is faster than life.
    pub(super) real_time_factor: f64,
    pub(super) frames_per_second: f64,
    /// Processor seconds of all threads per second shown: what it costs however busy the machine is. Absent where the
    /// system does not tell.
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

/// Blocks that take longer are waited for once only.
const PATIENCE: Duration = Duration::from_secs(5);

/// Opens a known face with the speech of its first block.
fn known(generator: &mut dyn Generator, portrait: &Portrait, options: &OpenOptions) -> anyhow::Result<Known> {
    let geometry = generator.geometry_for(portrait);
    let speech = geometry.block_span(0) + geometry.look_ahead;
    let samples = babble(MediaTime::ZERO, speech.units(SPEECH_RATE) as usize + 1);
    let began = Instant::now();
    let mut stream = generator.open(portrait, options)?;
    let open = began.elapsed();
    stream.push(&AudioBlock { at: MediaTime::ZERO, samples })?;
    stream.finish()?;
    let Some(block) = stream.pull()? else { anyhow::bail!("the engine gave no first block") };
    let first = began.elapsed();
    let StageTimes { features, generation, decode, .. } = block.stages;
    Ok(Known {
        open_ms: ms(open),
        features_ms: ms(features),
        generation_ms: ms(generation),
        decode_ms: ms(decode),
        first_block_ms: ms(first),
    })
}

/// Runs `seconds` of made-up speech through an engine. The first second warms it up and is not counted.
pub(super) fn measure(wanted: &Wanted, steps: Option<usize>, seconds: u32) -> anyhow::Result<Measured> {
    let began = Instant::now();
    let mut generator = engines::load(wanted, &[])?;
    let load = began.elapsed();
    let portrait = generator.sample_portrait();
    let geometry = generator.geometry_for(&portrait);
    let Geometry { width, height, fps, .. } = geometry;
    let began = Instant::now();
    let options = OpenOptions { steps, planar: true, ..OpenOptions::default() };
    let mut stream = generator.open(&portrait, &options)?;
    let open = began.elapsed();
    let bitrate = 900_000;
    let mut video = VideoEncoder::new(H264Config { width, height, fps: fps as f32, bitrate, max_bitrate: bitrate })?;
    let mut voice = VoiceEncoder::new(32_000, 5)?;

    let (mut features, mut generation, mut decode, mut encode, mut whole) = (vec![], vec![], vec![], vec![], vec![]);
    let mut fed = MediaTime::ZERO;
    let mut end = MediaTime::from_millis(i64::from(seconds + 1) * 1000);
    // Two blocks at least, or there is nothing to count.
    end = end.max(MediaTime::from_units(geometry.first_frame(2) as i64, fps) + geometry.look_ahead);
    let mut spent = Duration::ZERO;
    let mut shown = MediaTime::ZERO;
    let mut made = MediaTime::ZERO;
    let mut used = None;
    let mut first = None;
    let mut free = None;
    let least = |g: &dyn Generator| g.memory().iter().map(|f| f.free).min();
    while fed < end {
        let audio = AudioBlock { at: fed, samples: babble(fed, SPEECH_RATE as usize / 25) };
        fed = audio.end();
        let before = Instant::now();
        stream.push(&audio)?;
        // What pushing costs belongs to the block that it completes.
        let mut pushed = before.elapsed();
        loop {
            let before = Instant::now();
            let Some(block) = stream.pull()? else { break };
            let pulled = before.elapsed();
            first.get_or_insert(open + pushed + pulled);
            let before = Instant::now();
            for frame in &block.frames {
                video.encode(&to_i420(frame)?, frame.at, false)?;
            }
            let span = MediaTime::from_units(block.frames.len() as i64, fps);
            for _ in 0..(span.units(OPUS_RATE) as usize).div_ceil(VOICE_FRAME) {
                voice.encode(&[0.1; VOICE_FRAME])?;
            }
            let encoded = before.elapsed();
            made += span;
            // At least one block warms up, however long blocks are.
            if made <= MediaTime::from_millis(1000) || block.index == 0 {
                pushed = Duration::ZERO;
                used = processor_seconds();
                continue;
            }
            let took = pushed + pulled + encoded;
            spent += took;
            shown += span;
            features.push(block.stages.features);
            generation.push(block.stages.generation);
            decode.push(block.stages.decode);
            encode.push(encoded);
            whole.push(took);
            pushed = Duration::ZERO;
            if whole.len() == 10 {
                free = least(generator.as_ref());
            }
        }
        spent += pushed;
    }
    anyhow::ensure!(!whole.is_empty(), "the engine gave no block for {seconds} s of speech");
    let ended = least(generator.as_ref()).filter(|_| whole.len() >= 20);
    let grown_mib = free.zip(ended).map(|(free, ended)| (free as f64 - ended as f64) / f64::from(1 << 20));
    drop(stream);
    let quick = whole.iter().max().is_some_and(|longest| *longest < PATIENCE);
    let known = quick.then(|| known(generator.as_mut(), &portrait, &options)).transpose()?;
    let factor = spent.as_secs_f64() / shown.as_secs_f64();
    let tflop = generator.tflop_per_block(&geometry, steps);
    let processor = processor_seconds().zip(used).map(|(end, begin)| (end - begin) / shown.as_secs_f64());
    Ok(Measured {
        engine: wanted.choice.name(),
        threads: wanted.threads,
        steps,
        width,
        height,
        fps,
        block_ms: geometry.block_span(1).as_millis_f64(),
        blocks: whole.len(),
        load_ms: ms(load),
        open_ms: ms(open),
        features_ms: percentile(&mut features, 0.5),
        generation_ms: percentile(&mut generation, 0.5),
        decode_ms: percentile(&mut decode, 0.5),
        encode_ms: percentile(&mut encode, 0.5),
        block_p50_ms: percentile(&mut whole, 0.5),
        block_p95_ms: percentile(&mut whole, 0.95),
        block_most_ms: percentile(&mut whole, 1.0),
        step_most: steps.map(|n| slowest_step(&mut generation, n)),
        first_block_ms: first.map_or(0.0, ms),
        known,
        grown_mib,
        card: wanted.card().and_then(card_facts),
        tflop,
        tflop_per_s: tflop.map(|t| t * 1000.0 / percentile(&mut generation, 0.5)),
        real_time_factor: factor,
        frames_per_second: f64::from(fps) / factor,
        processor,
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

/// Something like speech: a buzz whose pitch and loudness move, with pauses.
fn babble(at: MediaTime, n: usize) -> Vec<f32> {
    let first = at.units(SPEECH_RATE);
    (0..n as i64)
        .map(|i| {
            let t = (first + i) as f32 / SPEECH_RATE as f32;
            let loud = (0.6 + 0.4 * (t * 19.0).sin()) * f32::from(u8::from(t % 2.0 < 1.5));
            let phase = (t * 130.0 + (t * 2.0).sin()) * std::f32::consts::TAU;
            0.2 * loud * (phase.sin() + 0.5 * (2.0 * phase).sin() + 0.3 * (5.0 * phase).sin())
        })
        .collect()
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
    use super::slowest_step;
    use std::time::Duration;

    #[test]
    fn one_slow_step_is_told_from_a_slow_block() {
        let mut blocks = [400, 400, 404, 401, 520].map(Duration::from_millis);
        let most = slowest_step(&mut blocks, 4);
        assert!((most - (520.0 - 300.0) / 100.25).abs() < 1e-9, "{most}");
        assert!((slowest_step(&mut [Duration::from_millis(100); 3], 4) - 1.0).abs() < 1e-9);
    }
}
