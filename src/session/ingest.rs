//! Packets of the microphone, or speech that waits in a queue → one unbroken voice on the session's timeline.
//!
//! The timeline runs at the pace of our clock. A packet that comes in order is decoded at once; what is missing is
//! waited for 40–60 ms (adaptive), then repaired from the next packet, else concealed for at most 100 ms, fading to
//! silence. Silence runs on by itself when nothing comes, so that the presenter idles in real time. The sender's clock
//! is followed by resampling by parts per million. The delay against jitter is not kept here: playout measures how
//! late blocks are and delays the voice by that, once for everything.

use super::{Config, SpeechPacket, SpeechQueue};
use crate::{
    codec::{CodecError, DriftResampler, OPUS_RATE, Resampler, SpeechDecoder},
    media::{AudioBlock, MediaTime, Pcm, SPEECH_RATE},
};
use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

/// Step of concealment and silence: 10 ms at 48 kHz.
const STEP: usize = 480;
/// Concealment fades to silence over this many samples (100 ms); then the line is quiet.
const FADE: usize = 4800;
/// A timestamp further than this from where it should be (1 s) is a new beginning.
const JUMP: i32 = 48_000;
/// A sequence number further than this from where it should be is a new sender.
const SEQUENCE_JUMP: i64 = 500;
/// Packets waiting at most: more than a second cannot be a gap being waited for.
const WAITING: usize = 64;
/// What sounds before an interruption is in the 16 kHz filter's output for this long after it.
const RINGING: MediaTime = MediaTime::from_millis(8);
/// Where the head of the timeline should stand just after a packet that met no delay, milliseconds ahead of now.
const TARGET_LEVEL_MS: f64 = 25.0;
/// Above target by this much, packets are dropped (late speech is of no use); by the lesser, silent ones are.
const EXCESS_MS: f64 = 150.0;
const SILENT_EXCESS_MS: f64 = 30.0;
/// Window over which the least-delayed packet is looked for, seconds.
const DRIFT_WINDOW: Duration = Duration::from_secs(4);
/// Proportional and integral gain of the clock follower: ppm per ms, ppm per ms and second. Damping 0.8, settles in
/// about three minutes; an error of 200 ppm moves the head by less than 8 ms meanwhile.
const DRIFT_P: f64 = 25.0;
const DRIFT_I: f64 = 0.25;

/// Counters since the beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct IngestStats {
    /// Packets with sound that were played.
    pub played: u64,
    /// Sequence numbers that never came in time.
    pub lost: u64,
    /// Came after their place had been filled.
    pub late: u64,
    pub duplicates: u64,
    /// Padding only: no sound, but a sequence number.
    pub padding: u64,
    /// Packets rebuilt from the one that followed.
    pub repaired: u64,
    pub concealed_ms: u64,
    pub silence_ms: u64,
    /// New beginnings after a jump or a pause.
    pub resyncs: u64,
    /// Packets dropped to bring the delay back down.
    pub dropped: u64,
    /// Packets that libopus refused.
    pub damaged: u64,
    /// Correction in force, parts per million; positive: the sender's clock is slow.
    pub drift_ppm: f64,
    /// The head of the timeline ahead of now, milliseconds, after the last packet.
    pub level_ms: f64,
    /// How long a missing packet is waited for now.
    pub hold_ms: f64,
}

/// What came of a stretch of time; both parts are contiguous with what came before, and may be empty.
#[derive(Debug)]
pub struct Heard {
    /// 48 kHz, to be played to the viewer.
    pub voice: Pcm,
    /// The same at 16 kHz, for the presenter. Trails the voice by 5 ms of filter.
    pub speech: AudioBlock,
    /// Which stretches hold queued speech, and of which segment.
    pub said: Vec<(u64, MediaTime, MediaTime)>,
}

struct Sync {
    /// Extended sequence number and timestamp of what should be played next.
    sequence: i64,
    timestamp: u32,
    /// Highest sequence number seen: the anchor for extending 16 bits.
    highest: i64,
}

/// See the module.
pub struct Ingest {
    decoder: SpeechDecoder,
    drift: DriftResampler,
    down: Resampler,
    /// Media time `origin` is `begun − lead` on the wall.
    begun: Instant,
    lead: Duration,
    origin: MediaTime,
    /// Samples taken by the resampler's door; the head of the timeline.
    made: u64,
    voice: Vec<f32>,
    voice_at: MediaTime,
    speech: Vec<f32>,
    speech_at: MediaTime,
    waiting: BTreeMap<i64, SpeechPacket>,
    sync: Option<Sync>,
    /// Nothing came for so long that silence runs freely; the next packet is a new beginning.
    quiet: bool,
    /// Concealed samples in a row.
    concealing: usize,
    gap_since: Option<Instant>,
    late_since: Option<Instant>,
    hold: Duration,
    hold_range: (Duration, Duration),
    fresh_late: u64,
    window: (Instant, f64, u32),
    integral: f64,
    /// Start of each packet on the timeline (samples), its length, and when it arrived; the last few seconds.
    arrivals: VecDeque<(u64, u32, Instant)>,
    activity: Activity,
    said: Vec<(u64, MediaTime, MediaTime)>,
    /// What is given out before this was interrupted: silence.
    hushed: MediaTime,
    stats: IngestStats,
}

impl Ingest {
    /// The timeline begins at `origin`, which was `lead` ago: that much silence is given out at once, so that the
    /// presenter can move before anyone speaks.
    pub fn new(config: &Config, origin: MediaTime, lead: Duration, now: Instant) -> Result<Self, CodecError> {
        let least = Duration::from_millis(u64::from(config.reorder_min_ms));
        let most = Duration::from_millis(u64::from(config.reorder_max_ms)).max(least);
        Ok(Ingest {
            decoder: SpeechDecoder::new(OPUS_RATE)?,
            drift: DriftResampler::new(OPUS_RATE)?,
            down: Resampler::new(OPUS_RATE, SPEECH_RATE)?,
            begun: now,
            lead,
            origin,
            made: 0,
            voice: Vec::new(),
            voice_at: origin,
            speech: Vec::new(),
            speech_at: origin,
            waiting: BTreeMap::new(),
            sync: None,
            quiet: true,
            concealing: 0,
            gap_since: None,
            late_since: None,
            hold: least,
            hold_range: (least, most),
            fresh_late: 0,
            window: (now, f64::MIN, 0),
            integral: 0.0,
            arrivals: VecDeque::new(),
            activity: Activity::default(),
            said: Vec::new(),
            hushed: origin,
            stats: IngestStats::default(),
        })
    }

    pub fn stats(&self) -> IngestStats {
        IngestStats { drift_ppm: self.drift.ppm(), hold_ms: self.hold.as_secs_f64() * 1e3, ..self.stats }
    }

    /// Whether someone is speaking, as of the head of the timeline.
    pub fn speaking(&self) -> bool {
        self.activity.on
    }

    /// The head of the timeline: everything before it has been given out or is about to be.
    pub fn head(&self) -> MediaTime {
        self.origin + MediaTime::from_units(self.made as i64, OPUS_RATE)
    }

    /// When the sound of this media time would have been spoken had the network taken no time: the arrival of its
    /// packet less the rest of the packet after it. `None` where no packet was played.
    pub fn spoken(&self, at: MediaTime) -> Option<Instant> {
        let sample = u64::try_from((at - self.origin).units(OPUS_RATE)).ok()?;
        let after = self.arrivals.partition_point(|(start, _, _)| *start <= sample);
        let (start, length, arrived) = *self.arrivals.get(after.checked_sub(1)?)?;
        let rest = (start + u64::from(length)).checked_sub(sample).filter(|r| *r > 0)?;
        arrived.checked_sub(MediaTime::from_units(rest as i64, OPUS_RATE).as_duration())
    }

    /// Takes one packet as it came, in any order. Call [`Ingest::advance`] afterwards.
    pub fn packet(&mut self, packet: SpeechPacket) {
        let sequence = match &mut self.sync {
            None => i64::from(packet.sequence),
            Some(sync) => {
                let step = packet.sequence.wrapping_sub(sync.highest as u16) as i16;
                let sequence = sync.highest + i64::from(step);
                if (sequence - sync.sequence).abs() > SEQUENCE_JUMP {
                    // Another sender, or one that began anew.
                    self.stats.resyncs += 1;
                    self.waiting.clear();
                    self.sync = None;
                    i64::from(packet.sequence)
                } else {
                    sync.highest = sync.highest.max(sequence);
                    if sequence < sync.sequence {
                        // Its place was filled. Waiting longer would have helped: remember.
                        self.stats.late += 1;
                        self.fresh_late += 1;
                        return;
                    }
                    sequence
                }
            }
        };
        if self.sync.is_none() {
            self.quiet = true;
        }
        if self.waiting.contains_key(&sequence) {
            self.stats.duplicates += 1;
            return;
        }
        self.waiting.insert(sequence, packet);
        if self.waiting.len() > WAITING {
            self.waiting.pop_first();
            self.stats.dropped += 1;
        }
    }

    /// Brings the timeline to `now` and gives what came of it. What waits in `queue` is the voice, else the microphone.
    pub fn advance(&mut self, queue: &SpeechQueue, now: Instant) -> Result<Heard, CodecError> {
        while self.speak(queue, now)? || self.step(now)? {}
        self.follow(now)?;
        while self.arrivals.front().is_some_and(|(.., at)| now.saturating_duration_since(*at).as_secs() >= 8) {
            self.arrivals.pop_front();
        }
        let hush = |samples: &mut [f32], at: MediaTime, rate: u32| {
            let old = (self.hushed - at).units(rate).clamp(0, samples.len() as i64) as usize;
            samples[..old].fill(0.0);
        };
        hush(&mut self.voice, self.voice_at, OPUS_RATE);
        // The filter to 16 kHz rings on for a while, and a mouth would answer.
        hush(&mut self.speech, self.speech_at - RINGING, SPEECH_RATE);
        let voice = Pcm { at: self.voice_at, rate: OPUS_RATE, samples: std::mem::take(&mut self.voice) };
        self.voice_at = voice.end();
        let speech = AudioBlock { at: self.speech_at, samples: std::mem::take(&mut self.speech) };
        self.speech_at = speech.end();
        Ok(Heard { voice, speech, said: std::mem::take(&mut self.said) })
    }

    /// Silence now: what the filters still hold is not given out, and whoever speaks must be heard anew.
    pub fn hush(&mut self) {
        let held = self.drift.pending() + self.drift.delay();
        self.hushed = self.head() + MediaTime::from_units(held as i64, OPUS_RATE);
        self.activity = Activity { floor: self.activity.floor, ..Activity::default() };
    }

    /// Milliseconds by which the head of the timeline is ahead of now.
    fn level(&self, now: Instant) -> f64 {
        let elapsed = now.saturating_duration_since(self.begun) + self.lead;
        self.made as f64 / 48.0 - elapsed.as_secs_f64() * 1e3
    }

    /// One step of queued speech, if it is its turn and its time. The microphone's packets are not heard meanwhile.
    fn speak(&mut self, queue: &SpeechQueue, now: Instant) -> Result<bool, CodecError> {
        if !queue.ready() {
            return Ok(false);
        }
        self.waiting.clear();
        (self.sync, self.quiet) = (None, true);
        if self.level(now) >= 0.0 {
            return Ok(false);
        }
        let Some(mut taken) = queue.take(STEP) else { return Ok(false) };
        let from = self.head();
        let length = MediaTime::from_units(taken.samples.len() as i64, OPUS_RATE);
        // The rest of a step, after the last word, is silence.
        taken.samples.resize(STEP, 0.0);
        self.append(&taken.samples)?;
        self.said.push((taken.segment, from, self.head().min(from + length)));
        Ok(true)
    }

    /// One thing; false when there is nothing to do before more comes or time passes.
    fn step(&mut self, now: Instant) -> Result<bool, CodecError> {
        let level = self.level(now);
        let hold_ms = self.hold.as_secs_f64() * 1e3;
        let first = self.waiting.first_key_value().map(|(s, p)| (*s, p.arrived));
        if self.quiet {
            let Some((sequence, arrived)) = first else {
                if level < 0.0 {
                    self.silence(STEP)?;
                    return Ok(true);
                }
                return Ok(false);
            };
            return self.begin(sequence, arrived, level);
        }
        let Some(sync) = &self.sync else {
            self.quiet = true;
            return Ok(true);
        };
        match first {
            Some((sequence, _)) if sequence <= sync.sequence => {
                self.gap_since = None;
                if let Some((_, packet)) = self.waiting.pop_first() {
                    if sequence < sync.sequence {
                        self.stats.late += 1;
                    } else {
                        self.take(packet, level)?;
                    }
                }
                Ok(true)
            }
            Some((_, arrived)) => {
                let since = *self.gap_since.get_or_insert(arrived);
                if level >= -hold_ms && now.saturating_duration_since(since) < self.hold {
                    return Ok(false);
                }
                self.concede(level)?;
                Ok(true)
            }
            None if level < -hold_ms => {
                self.conceal(STEP)?;
                if let Some(sync) = &mut self.sync {
                    sync.timestamp = sync.timestamp.wrapping_add(STEP as u32);
                }
                if self.concealing >= FADE {
                    self.quiet = true;
                }
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// First packet, or first after a pause: wherever it says it is, it is now. The head is at most 10 ms off here.
    fn begin(&mut self, sequence: i64, arrived: Instant, level: f64) -> Result<bool, CodecError> {
        if level < 0.0 {
            self.silence(STEP)?;
            return Ok(true);
        }
        let Some(packet) = self.waiting.get(&sequence) else { return Ok(false) };
        let timestamp = packet.timestamp;
        let mut highest = self.waiting.last_key_value().map_or(sequence, |(s, _)| *s);
        if let Some(sync) = &self.sync {
            self.stats.lost += u64::try_from(sequence - sync.sequence).unwrap_or(0);
            highest = highest.max(sync.highest);
            self.stats.resyncs += 1;
        }
        self.sync = Some(Sync { sequence, timestamp, highest });
        self.quiet = false;
        self.concealing = 0;
        self.late_since = None;
        self.gap_since = None;
        self.window = (arrived, f64::MIN, 0);
        Ok(true)
    }

    /// The packet whose turn it is by sequence.
    fn take(&mut self, packet: SpeechPacket, level: f64) -> Result<(), CodecError> {
        let Some(sync) = &mut self.sync else { return Ok(()) };
        sync.sequence += 1;
        if packet.payload.is_empty() {
            self.stats.padding += 1;
            return Ok(());
        }
        let Ok(length) = self.decoder.samples_in(&packet.payload) else {
            self.stats.damaged += 1;
            return Ok(());
        };
        let ahead = packet.timestamp.wrapping_sub(sync.timestamp) as i32;
        if ahead.unsigned_abs() > JUMP as u32 {
            self.stats.resyncs += 1;
            sync.timestamp = packet.timestamp;
        } else if ahead > 0 {
            // The sender paused (DTX, or padding took its sequence numbers): silence of that length, on the grid of
            // our steps; the rest of a step is below hearing.
            let missing = ahead as usize;
            sync.timestamp = packet.timestamp;
            if (missing as f64) < room(level) {
                self.bridge(missing)?;
            }
        } else if ahead < 0 && ahead + (length as i32) <= 0 {
            // Its time was filled while we waited.
            let since = *self.late_since.get_or_insert(packet.arrived);
            if packet.arrived.saturating_duration_since(since) < Duration::from_millis(200) {
                self.stats.late += 1;
                self.fresh_late += 1;
                return Ok(());
            }
            // Everything is late for good: the way has become longer. From here on this is on time.
            self.stats.resyncs += 1;
            sync.timestamp = packet.timestamp;
        }
        self.late_since = None;
        self.play(packet)
    }

    /// Decodes and appends the packet; the timeline stands at its start, or inside it.
    fn play(&mut self, packet: SpeechPacket) -> Result<(), CodecError> {
        let Some(sync) = &mut self.sync else { return Ok(()) };
        let decoded = match self.decoder.decode(&packet.payload) {
            Ok(decoded) => decoded,
            Err(_) => {
                self.stats.damaged += 1;
                return Ok(());
            }
        };
        let past = (sync.timestamp.wrapping_sub(packet.timestamp) as i32).max(0) as usize;
        sync.timestamp = packet.timestamp.wrapping_add(decoded.len() as u32);
        let samples = &decoded[past.min(decoded.len())..];
        self.stats.played += 1;
        let level = self.level(packet.arrived);
        let excess = level - TARGET_LEVEL_MS;
        if excess > EXCESS_MS || (excess > SILENT_EXCESS_MS && rms(samples) < 0.003) {
            self.stats.dropped += 1;
            return Ok(());
        }
        self.concealing = 0;
        self.arrivals.push_back((self.made, samples.len() as u32, packet.arrived));
        self.append(samples)?;
        let level = self.level(packet.arrived);
        self.stats.level_ms = level;
        self.window.1 = self.window.1.max(level);
        self.window.2 += 1;
        Ok(())
    }

    /// Gives up on what is missing before the first waiting packet.
    fn concede(&mut self, level: f64) -> Result<(), CodecError> {
        self.gap_since = None;
        let Some((&sequence, packet)) = self.waiting.first_key_value() else { return Ok(()) };
        let Some(sync) = &mut self.sync else { return Ok(()) };
        let (payload, timestamp) = (packet.payload.clone(), packet.timestamp);
        self.stats.lost += (sequence - sync.sequence) as u64;
        sync.sequence = sequence;
        let missing = timestamp.wrapping_sub(sync.timestamp) as i32;
        if missing <= 0 || missing > JUMP || payload.is_empty() {
            // Padding was lost, or what was lost is already filled, or it is a jump (`take` sees to that).
            return Ok(());
        }
        sync.timestamp = timestamp;
        if missing as f64 >= room(level) {
            return Ok(());
        }
        // The copy inside the next packet covers one packet of its own length.
        let copy = self.decoder.samples_in(&payload).unwrap_or(0).min(missing as usize) / 120 * 120;
        let before = missing as usize - copy;
        self.bridge(before)?;
        if copy > 0 {
            match self.decoder.fec(&payload, copy) {
                Ok(repaired) => {
                    self.stats.repaired += 1;
                    self.concealing = 0;
                    self.append(&repaired)?;
                }
                Err(_) => self.bridge(copy)?,
            }
        }
        Ok(())
    }

    /// Fills `samples`: concealment that fades, then silence.
    fn bridge(&mut self, samples: usize) -> Result<(), CodecError> {
        let mut left = samples;
        while left > 0 {
            let n = left.min(STEP);
            if n == STEP && self.concealing < FADE {
                self.conceal(STEP)?;
            } else {
                self.silence(n)?;
            }
            left -= n;
        }
        Ok(())
    }

    fn conceal(&mut self, samples: usize) -> Result<(), CodecError> {
        let mut made = self.decoder.conceal(samples)?;
        for (i, s) in made.iter_mut().enumerate() {
            *s *= 1.0 - ((self.concealing + i) as f32 / FADE as f32).min(1.0);
        }
        self.concealing += samples;
        self.stats.concealed_ms += (samples / 48) as u64;
        self.append(&made)
    }

    fn silence(&mut self, samples: usize) -> Result<(), CodecError> {
        self.stats.silence_ms += (samples / 48) as u64;
        self.append(&vec![0.0; samples])
    }

    fn append(&mut self, samples: &[f32]) -> Result<(), CodecError> {
        self.activity.hear(samples);
        let mut voice = self.drift.push(samples)?;
        // The filter may overshoot a sound that fills the range.
        voice.iter_mut().for_each(|s| *s = s.clamp(-1.0, 1.0));
        self.speech.extend(self.down.push(&voice)?);
        self.made += voice.len() as u64;
        self.voice.extend(voice);
        Ok(())
    }

    /// Follows the sender's clock, and adapts how long a missing packet is waited for.
    fn follow(&mut self, now: Instant) -> Result<(), CodecError> {
        if now.saturating_duration_since(self.window.0) < DRIFT_WINDOW {
            return Ok(());
        }
        let (_, best, packets) = std::mem::replace(&mut self.window, (now, f64::MIN, 0));
        let (least, most) = self.hold_range;
        let step = Duration::from_millis(5);
        self.hold = if std::mem::take(&mut self.fresh_late) > 0 {
            self.hold + step * 2
        } else {
            self.hold.saturating_sub(step / 5)
        };
        self.hold = self.hold.clamp(least, most);
        // Pauses and trickles say nothing about a clock.
        if packets < 50 {
            return Ok(());
        }
        let error = best - TARGET_LEVEL_MS;
        self.integral = (self.integral + DRIFT_I * error * DRIFT_WINDOW.as_secs_f64()).clamp(-600.0, 600.0);
        // Ahead: the sender's clock is fast, make fewer samples of its.
        self.drift.set_ppm(-(DRIFT_P * error + self.integral).clamp(-1500.0, 1500.0))
    }
}

/// Samples that may be filled in where the head is so many milliseconds ahead of now: what a sender says is missing must not
/// carry the timeline away from the clock.
fn room(level: f64) -> f64 {
    48.0 * (EXCESS_MS - level.max(0.0))
}

fn rms(samples: &[f32]) -> f32 {
    if samples.is_empty() {
        return 0.0;
    }
    (samples.iter().map(|s| s * s).sum::<f32>() / samples.len() as f32).sqrt()
}

/// Is someone speaking? Loudness against a floor that follows the room; opens after 40 ms, closes after 500.
#[derive(Debug)]
struct Activity {
    on: bool,
    floor: f32,
    /// Samples loud, or quiet, in a row.
    loud: usize,
    quiet: usize,
    /// Energy and length of the 10 ms being gathered.
    gathered: (f32, usize),
}

impl Default for Activity {
    fn default() -> Self {
        Activity { on: false, floor: 0.002, loud: 0, quiet: 0, gathered: (0.0, 0) }
    }
}

impl Activity {
    fn hear(&mut self, samples: &[f32]) {
        for s in samples {
            self.gathered.0 += s * s;
            self.gathered.1 += 1;
            if self.gathered.1 == STEP {
                let level = (self.gathered.0 / STEP as f32).sqrt();
                self.gathered = (0.0, 0);
                self.decide(level);
            }
        }
    }

    fn decide(&mut self, level: f32) {
        // The floor falls fast and rises slowly (doubling in about 7 s): a hum becomes floor, a voice does not.
        self.floor = if level < self.floor { 0.9 * self.floor + 0.1 * level } else { self.floor * 1.001 };
        self.floor = self.floor.clamp(0.0005, 0.02);
        let open = (4.0 * self.floor).max(0.006);
        if level > if self.on { open * 0.6 } else { open } {
            self.loud += STEP;
            self.quiet = 0;
        } else {
            self.quiet += STEP;
            self.loud = 0;
        }
        if self.loud >= 4 * STEP {
            self.on = true;
        } else if self.quiet >= 50 * STEP {
            self.on = false;
        }
    }
}
