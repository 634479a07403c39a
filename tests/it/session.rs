//! One conversation: ingest and playout in simulated minutes, then the whole loop on a real engine thread.

use bytes::Bytes;
use loquent::{
    codec::VoiceEncoder,
    media::{Frame, MediaTime, Pixels},
    session::{Config, Due, Ingest, Playout, SpeechPacket, SpeechQueue},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

pub(crate) fn ms(v: u64) -> Duration {
    Duration::from_millis(v)
}

/// A sender: its own clock (`ppm` fast), its own sound, 20 ms packets.
pub(crate) struct Sender {
    encoder: VoiceEncoder,
    begun: Instant,
    ppm: f64,
    count: u64,
    sequence: u16,
    timestamp: u32,
    phase: f64,
    pub(crate) tone: bool,
}

impl Sender {
    pub(crate) fn new(begun: Instant, ppm: f64) -> Sender {
        Sender {
            encoder: VoiceEncoder::new(32_000, 15).unwrap(),
            begun,
            ppm,
            count: 0,
            // Near both wraps on purpose.
            sequence: 65_500,
            timestamp: u32::MAX - 48_000,
            phase: 0.0,
            tone: true,
        }
    }
    /// When the next packet leaves, by a perfect clock.
    pub(crate) fn due(&self) -> Instant {
        self.begun + Duration::from_secs_f64((self.count + 1) as f64 * 0.02 / (1.0 + self.ppm * 1e-6))
    }
    /// The next packet; a steady 220 Hz tone or silence.
    pub(crate) fn next(&mut self, arrived: Instant) -> SpeechPacket {
        let samples: Vec<f32> = (0..960)
            .map(|_| {
                self.phase += 220.0 / 48_000.0;
                if self.tone { 0.3 * (self.phase * 2.0 * std::f64::consts::PI).sin() as f32 } else { 0.0 }
            })
            .collect();
        let payload = Bytes::from(self.encoder.encode(&samples).unwrap());
        let packet =
            SpeechPacket { sequence: self.sequence, timestamp: self.timestamp, payload, marker: false, arrived };
        self.skip();
        packet
    }
    /// The next packet is never made (lost on the way).
    pub(crate) fn skip(&mut self) {
        self.count += 1;
        self.sequence = self.sequence.wrapping_add(1);
        self.timestamp = self.timestamp.wrapping_add(960);
    }
    /// Nothing is sent for a while: time passes at the sender, sequence numbers do not.
    pub(crate) fn pause(&mut self, packets: u64) {
        self.count += packets;
        self.timestamp = self.timestamp.wrapping_add(960 * packets as u32);
    }
}

fn noise(seed: &mut u64) -> f64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 11) as f64 / (1u64 << 53) as f64
}

/// What ingest gave out, checked for contiguity as it comes.
struct Out {
    voice: Vec<f32>,
    speech: Vec<f32>,
    voice_end: MediaTime,
    speech_end: MediaTime,
}

impl Out {
    fn new() -> Out {
        Out { voice: vec![], speech: vec![], voice_end: MediaTime::ZERO, speech_end: MediaTime::ZERO }
    }
    fn take(&mut self, ingest: &mut Ingest, now: Instant) {
        let heard = ingest.advance(&SpeechQueue::new(Arc::default()), now).unwrap();
        assert_eq!(heard.voice.at, self.voice_end, "voice is contiguous");
        assert_eq!(heard.speech.at, self.speech_end, "speech is contiguous");
        self.voice_end = heard.voice.end();
        self.speech_end = heard.speech.end();
        self.voice.extend(heard.voice.samples);
        self.speech.extend(heard.speech.samples);
        assert!(self.voice.len() / 3 >= self.speech.len() && self.voice.len() / 3 - self.speech.len() <= 330);
    }
}

/// Runs packets through ingest in simulated time. `fate` says how late a packet is, or that it is lost.
fn simulate(seconds: f64, ppm: f64, mut fate: impl FnMut(u64) -> Option<Duration>) -> (Ingest, Out, Vec<f64>) {
    let begun = Instant::now();
    let mut ingest = Ingest::new(&Config::default(), MediaTime::ZERO, Duration::ZERO, begun).unwrap();
    let (mut out, mut sender, mut levels) = (Out::new(), Sender::new(begun, ppm), Vec::new());
    let mut on_the_way: Vec<(Instant, SpeechPacket)> = Vec::new();
    let (mut tick, mut index) = (begun, 0);
    while tick.duration_since(begun).as_secs_f64() < seconds {
        let next_packet = on_the_way.iter().map(|p| p.0).min();
        let next = tick.min(sender.due()).min(next_packet.unwrap_or(tick));
        if next == sender.due() {
            match fate(index) {
                Some(late) => on_the_way.push((next + late, sender.next(next + late))),
                None => sender.skip(),
            }
            index += 1;
        } else if Some(next) == next_packet {
            let i = on_the_way.iter().position(|p| p.0 == next).unwrap();
            ingest.packet(on_the_way.remove(i).1);
            out.take(&mut ingest, next);
            levels.push(ingest.stats().level_ms);
        } else {
            out.take(&mut ingest, next);
            tick += ms(10);
        }
    }
    // Wherever the head stands, it is never far from now.
    let head = out.voice_end.as_secs_f64();
    assert!((head - seconds).abs() < 0.25, "the head stands at {head} s after {seconds} s");
    (ingest, out, levels)
}

/// Places where a steady 220 Hz tone breaks: the amplitude of its second difference leaves its bound.
fn glitches(voice: &[f32]) -> usize {
    let bound = 0.3 * (2.0 * std::f32::consts::PI * 220.0 / 48_000.0).powi(2);
    let mut count = 0;
    let mut last = 0;
    for (i, w) in voice.windows(3).enumerate() {
        if (w[0] - 2.0 * w[1] + w[2]).abs() > 6.0 * bound && i > last + 480 {
            count += 1;
            last = i;
        }
    }
    count
}

#[test]
fn a_clock_that_drifts_for_five_minutes_neither_clicks_nor_adds_delay() {
    for ppm in [200.0, -300.0] {
        let mut seed = 7;
        let (ingest, out, levels) = simulate(300.0, ppm, |_| Some(Duration::from_secs_f64(0.004 * noise(&mut seed))));
        let stats = ingest.stats();
        let (low, high) = levels[50..].iter().fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
        let late = levels[levels.len() * 4 / 5..].iter().sum::<f64>() / (levels.len() / 5) as f64;
        let glitches = glitches(&out.voice[48_000..]);
        println!(
            "{ppm} ppm: level {low:.1} to {high:.1} ms, {late:.1} in the last minute, correction {:.0} ppm, {glitches} glitches, {stats:?}",
            stats.drift_ppm
        );
        assert!(low > 0.0 && high < 45.0, "the head wandered from {low:.1} to {high:.1} ms");
        assert!((late - 22.0).abs() < 6.0, "it did not settle: {late:.1} ms");
        assert!((stats.drift_ppm + ppm).abs() < 60.0, "the clock was not found: {:.0} ppm", stats.drift_ppm);
        assert_eq!((stats.lost, stats.late, stats.concealed_ms, stats.dropped, glitches), (0, 0, 0, 0, 0));
    }
}

#[test]
fn lost_packets_are_repaired_from_the_next_and_long_losses_fade_to_silence() {
    // One in ten, alone.
    let (ingest, out, _) = simulate(20.0, 0.0, |i| (i % 10 != 7).then_some(Duration::ZERO));
    let stats = ingest.stats();
    println!("{stats:?}");
    assert!((98..=100).contains(&stats.lost), "{stats:?}");
    assert_eq!(stats.repaired, stats.lost);
    assert_eq!((stats.concealed_ms, stats.late, stats.resyncs), (0, 0, 0));
    let tail = &out.voice[48_000..];
    let quietest = tail.chunks(960).map(|c| (c.iter().map(|s| s * s).sum::<f32>() / 960.0).sqrt()).fold(1.0, f32::min);
    assert!(quietest > 0.05, "a repaired stretch fell to {quietest}");
    // Half a second lost: at most 100 ms of concealment, then silence, then the voice again.
    let (ingest, out, _) = simulate(10.0, 0.0, |i| (!(250..275).contains(&i)).then_some(Duration::ZERO));
    let stats = ingest.stats();
    println!("{stats:?}");
    assert!(stats.concealed_ms <= 100 && stats.lost == 25, "{stats:?}");
    let silent = out.voice[5 * 48_000..].chunks(480).take(48).filter(|c| c.iter().all(|s| s.abs() < 1e-4)).count();
    assert!((28..=45).contains(&silent), "{silent} × 10 ms of silence in the gap");
    assert!(
        out.voice[6 * 48_000..9 * 48_000].chunks(960).all(|c| c.iter().any(|s| s.abs() > 0.1)),
        "the voice is back"
    );
}

#[test]
fn disorder_and_jitter_within_the_wait_lose_nothing() {
    let mut seed = 3;
    let (ingest, out, _) = simulate(60.0, 0.0, |_| Some(Duration::from_secs_f64(0.035 * noise(&mut seed))));
    let stats = ingest.stats();
    println!("{stats:?}");
    assert_eq!((stats.lost, stats.late, stats.dropped), (0, 0, 0), "{stats:?}");
    assert!(stats.concealed_ms == 0 && glitches(&out.voice[48_000..]) == 0, "{stats:?}");
    // Beyond it: late ones are counted and the wait grows, but never beyond its bound.
    let (ingest, ..) = simulate(60.0, 0.0, |i| Some(if i % 20 == 5 { ms(75) } else { ms(0) }));
    let stats = ingest.stats();
    println!("{stats:?}");
    assert!(stats.late > 50 && stats.hold_ms > 55.0 && stats.hold_ms <= 60.0, "{stats:?}");
}

#[test]
fn duplicates_padding_restarts_and_nonsense_are_survived() {
    let begun = Instant::now();
    let mut ingest = Ingest::new(&Config::default(), MediaTime::ZERO, Duration::ZERO, begun).unwrap();
    let (mut out, mut sender) = (Out::new(), Sender::new(begun, 0.0));
    let mut now = begun;
    for i in 0..500u64 {
        now = sender.due();
        let packet = sender.next(now);
        ingest.packet(packet.clone());
        if i % 5 == 0 {
            ingest.packet(packet.clone());
        }
        if i % 7 == 0 {
            // Padding takes a sequence number and no time.
            let padding = SpeechPacket { sequence: sender.sequence, payload: Bytes::new(), ..packet };
            sender.sequence = sender.sequence.wrapping_add(1);
            ingest.packet(padding);
        }
        out.take(&mut ingest, now);
    }
    let stats = ingest.stats();
    assert_eq!((stats.played, stats.lost, stats.padding, stats.resyncs), (500, 0, 72, 0), "{stats:?}");
    // A duplicate is either seen while waiting or comes after its turn.
    assert_eq!(stats.duplicates + stats.late, 100, "{stats:?}");
    assert_eq!(glitches(&out.voice[48_000..]), 0);
    // The sender begins anew: other numbers, other times.
    (sender.sequence, sender.timestamp) = (20_000, 123);
    for _ in 0..100 {
        now = sender.due();
        let packet = sender.next(now);
        ingest.packet(packet);
        out.take(&mut ingest, now);
    }
    assert_eq!(ingest.stats().played, 600, "{:?}", ingest.stats());
    // The timestamp alone jumps.
    sender.timestamp = sender.timestamp.wrapping_add(1 << 30);
    for _ in 0..100 {
        now = sender.due();
        let packet = sender.next(now);
        ingest.packet(packet);
        out.take(&mut ingest, now);
    }
    assert_eq!(ingest.stats().played, 700, "{:?}", ingest.stats());
    // Nonsense: any numbers, any bytes.
    let mut seed = 11;
    for _ in 0..20_000 {
        now += Duration::from_secs_f64(0.01 * noise(&mut seed));
        let length = (noise(&mut seed) * 60.0) as usize;
        let payload: Vec<u8> = (0..length).map(|_| (noise(&mut seed) * 256.0) as u8).collect();
        ingest.packet(SpeechPacket {
            sequence: (noise(&mut seed) * 65_536.0) as u16,
            timestamp: (noise(&mut seed) * 4e9) as u32,
            payload: payload.into(),
            marker: false,
            arrived: now,
        });
        out.take(&mut ingest, now);
    }
    let ahead = out.voice_end.as_secs_f64() - now.duration_since(begun).as_secs_f64();
    assert!(ahead.abs() < 0.5, "nonsense moved the timeline by {ahead} s");
    assert!(out.voice.iter().all(|s| s.is_finite() && s.abs() <= 1.0));
}

/// A loss, and timestamps that claim almost a second for it, fifty times a second: found by fuzzing.
#[test]
fn what_a_sender_says_is_missing_does_not_carry_the_timeline_away() {
    let begun = Instant::now();
    let mut ingest = Ingest::new(&Config::default(), MediaTime::ZERO, Duration::ZERO, begun).unwrap();
    let queue = SpeechQueue::new(Arc::default());
    let (mut sender, mut made) = (Sender::new(begun, 0.0), 0);
    for step in 1..=100 {
        let now = begun + ms(20 * step);
        ingest.packet(sender.next(now));
        sender.skip();
        sender.pause(44);
        made += ingest.advance(&queue, now).unwrap().voice.samples.len();
        let ahead = ingest.head().as_secs_f64() - (now - begun).as_secs_f64();
        assert!(ahead.abs() < 0.3, "after {step} packets the timeline stands {ahead} s from the clock");
    }
    assert!(made < 48_000 * 5 / 2, "{made} samples of two seconds");
}

#[test]
fn a_muted_or_absent_microphone_is_silence_at_the_pace_of_the_clock() {
    let begun = Instant::now();
    let lead = ms(300);
    let mut ingest = Ingest::new(&Config::default(), MediaTime::ZERO, lead, begun).unwrap();
    let mut out = Out::new();
    out.take(&mut ingest, begun);
    assert!((out.voice_end.as_millis_f64() - 300.0).abs() <= 10.0, "the lead comes at once: {:?}", out.voice_end);
    let mut sender = Sender::new(begun, 0.0);
    let mut played = 0;
    for tick in 0..3000u64 {
        let now = begun + ms(tick * 10);
        // Speaks for 5 s, muted for 5 s, and so on.
        let muted = tick / 500 % 2 == 0;
        while sender.due() <= now {
            if muted {
                sender.pause(1);
            } else {
                let due = sender.due();
                ingest.packet(sender.next(due));
                played += 1;
            }
        }
        out.take(&mut ingest, now);
        let ahead = out.voice_end.as_millis_f64() - (tick * 10 + 300) as f64;
        assert!((-70.0..=45.0).contains(&ahead), "tick {tick}: {ahead:.1} ms ahead");
        let into = tick % 500;
        if into == 100 {
            assert_eq!(ingest.speaking(), !muted, "one second into tick {tick}");
        }
    }
    let stats = ingest.stats();
    println!("{stats:?}");
    assert_eq!((stats.played, stats.lost, stats.late), (played, 0, 0), "{stats:?}");
    assert!(stats.silence_ms > 14_000 && stats.concealed_ms <= 300, "{stats:?}");
}

fn frame(at: MediaTime) -> Frame {
    Frame { at, width: 2, height: 2, pixels: Pixels::Rgb(vec![0; 12].into()), matte: None }
}

/// Plays `blocks` of 4 frames whose lateness beyond their speech is `late(k)`; returns stats and what left when.
struct Played {
    playout: Playout,
    frames: Vec<(MediaTime, Instant, Instant)>,
    voices: Vec<(MediaTime, Instant, Instant)>,
    begun: Instant,
    delays: Vec<Duration>,
}

fn play(seconds: u64, loud: bool, late: impl Fn(u64) -> Duration) -> Played {
    let begun = Instant::now();
    let span = MediaTime::from_units(1, 25);
    let mut playout = Playout::new(begun, MediaTime::ZERO, span, ms(400), ms(10), ms(2000));
    let (mut frames, mut voices, mut delays) = (vec![], vec![], vec![]);
    let (mut next_block, mut now) = (0u64, begun);
    let pcm = |k: u64| loquent::media::Pcm {
        at: MediaTime::from_millis(10 * k as i64),
        rate: 48_000,
        samples: (0..480).map(|i| if loud { 0.1 * (i as f32 * 0.05).sin() } else { 0.0 }).collect(),
    };
    for tick in 0..seconds * 100 {
        let at = begun + ms(tick * 10);
        // All that is due until this tick, at its own time.
        loop {
            while let Some(due) = playout.poll(now) {
                match due {
                    Due::Frame { frame, wall, .. } => frames.push((frame.at, now, wall)),
                    Due::Voice { at, wall, .. } => voices.push((at, now, wall)),
                    Due::Held { .. } => {}
                }
            }
            // A block is complete 160 + 126 ms after its start, and made `late` after that.
            let block_at = begun + ms(next_block * 160 + 286) + late(next_block);
            let next = playout.deadline().min(block_at).max(now);
            if next > at {
                break;
            }
            now = next;
            if block_at <= now {
                let first = MediaTime::from_units(4 * next_block as i64, 25);
                let block = (0..4).map(|i| frame(first + MediaTime::from_units(i, 25))).collect();
                playout.block(block, now);
                next_block += 1;
            }
        }
        now = at;
        playout.voice(&pcm(tick));
        if tick == 200 {
            playout.listen(now);
        }
        delays.push(playout.stats().delay);
    }
    Played { playout, frames, voices, begun, delays }
}

fn offsets(p: &Played) -> f64 {
    // Lips against voice at the same media time, milliseconds; the worst.
    let mut worst = 0.0f64;
    let mut v = 0;
    for (at, left, _) in &p.frames {
        while v + 1 < p.voices.len() && p.voices[v + 1].0 <= *at {
            v += 1;
        }
        let (voice_at, voice_left, _) = p.voices[v];
        let voice_there = voice_left.duration_since(p.begun).as_secs_f64() + (*at - voice_at).as_secs_f64();
        worst = worst.max((left.duration_since(p.begun).as_secs_f64() - voice_there).abs() * 1e3);
    }
    worst
}

#[test]
fn steady_blocks_play_every_frame_in_time_with_the_least_delay() {
    let p = play(60, true, |k| ms(60 + k * 7 % 20));
    let s = p.playout.stats();
    println!("{s:?}, worst offset {:.2} ms", offsets(&p));
    assert!(p.frames.len() >= 1480, "{}", p.frames.len());
    assert_eq!((s.held, s.skipped, s.voice_gaps), (0, 0, 0));
    // 286 ms of block and look-ahead, 79 of making, 10 of margin.
    assert!((s.delay.as_millis() as i64 - 375).abs() <= 12, "{:?}", s.delay);
    assert!(offsets(&p) < 2.0);
}

#[test]
fn one_stall_holds_pictures_never_the_voice_and_is_forgotten() {
    let p = play(90, true, |k| if (120..124).contains(&k) { ms(700 - (k - 120) * 160) } else { ms(70) });
    let s = p.playout.stats();
    let longest = p.delays[300..].iter().max().unwrap();
    println!("{s:?}, longest delay {longest:?}");
    assert!(s.held >= 10 && s.held <= 20 && s.skipped <= s.held && s.voice_gaps == 0, "{s:?}");
    assert!(*longest < ms(390), "one stall must not delay everything after it: {longest:?}");
    // The voice left every 20 ms throughout.
    let widest = p.voices[120..].windows(2).map(|w| w[1].1 - w[0].1).max().unwrap();
    assert!(widest <= ms(21), "{widest:?}");
}

#[test]
fn delay_grows_with_lateness_that_stays_and_shrinks_when_it_goes() {
    // From 20 to 60 s every third block is 150 ms later.
    let late = |k: u64| if (125..375).contains(&k) && k % 3 == 0 { ms(220) } else { ms(70) };
    for loud in [true, false] {
        let p = play(180, loud, late);
        let s = p.playout.stats();
        let at = |seconds: usize| p.delays[seconds * 100].as_millis() as i64;
        println!("loud {loud}: {} at 15 s, {} at 50 s, {} at 180 s; {s:?}", at(15), at(50), at(179));
        assert!((at(15) - 366).abs() < 15 && (at(50) - 516).abs() < 15, "{} {}", at(15), at(50));
        assert!(at(179) < if loud { 516 } else { 400 }, "{}", at(179));
        // Held only while it adapted: a few seconds' worth.
        assert!(s.held < 80, "{s:?}");
        assert!(offsets(&p) < 60.0, "{}", offsets(&p));
        let (fastest, slowest) =
            p.voices[200..].windows(2).map(|w| w[1].1 - w[0].1).fold((ms(99), ms(0)), |(a, b), d| (a.min(d), b.max(d)));
        if loud {
            assert!(fastest >= ms(19) && slowest <= ms(22), "{fastest:?} {slowest:?}");
        }
    }
}

#[test]
fn an_interruption_silences_what_is_in_flight() {
    let begun = Instant::now();
    let mut p = Playout::new(begun, MediaTime::ZERO, MediaTime::from_units(1, 25), ms(400), ms(10), ms(2000));
    let pcm = loquent::media::Pcm { at: MediaTime::ZERO, rate: 48_000, samples: vec![0.5; 24_000] };
    p.voice(&pcm);
    p.block((0..4).map(|i| frame(MediaTime::from_units(i, 25))).collect(), begun + ms(300));
    p.listen(begun + ms(300));
    p.interrupt(MediaTime::from_millis(500), MediaTime::from_millis(500));
    p.block((4..16).map(|i| frame(MediaTime::from_units(i, 25))).collect(), begun + ms(310));
    let (mut voice, mut frames) = (vec![], vec![]);
    for t in 0..1000 {
        while let Some(due) = p.poll(begun + ms(t)) {
            match due {
                Due::Voice { samples, .. } => voice.extend(samples),
                Due::Frame { frame, .. } => frames.push(frame.at.units(25)),
                Due::Held { .. } => {}
            }
        }
    }
    assert!(voice[..24_000][240..].iter().all(|s| *s == 0.0), "silent after 5 ms");
    assert_eq!(frames, [13, 14, 15], "only pictures from 500 ms on");
}
