//! The flow on simulated links: a video source that follows the target, a bottleneck with a queue, losses and blackouts, a
//! receiver that sends feedback, asks for lost packets and for keyframes. One millisecond per step, nothing random that is
//! not seeded.

use super::{Flow, Kind, Unit, estimator::Limits};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

const LIMITS: Limits = Limits { start: 900e3, min: 150e3, max: 2_500e3 };
const FPS_MS: u64 = 40;

#[derive(Clone, Copy, Debug)]
struct Packet {
    frame: u32,
    part: u16,
    parts: u16,
    key: bool,
    size: usize,
}

struct Link {
    /// Bits per second at a time, ms.
    rate: fn(u64) -> f64,
    /// Longest queue, ms at the current rate.
    queue_ms: f64,
    /// Each way, ms.
    delay: u64,
    loss: f64,
    blackout: std::ops::Range<u64>,
    /// Every so many ms the link pauses for 100 ms; 0 for never.
    pause_every: u64,
}

const CLEAN: Link = Link { rate: |_| 20e6, queue_ms: 300.0, delay: 20, loss: 0.0, blackout: 0..0, pause_every: 0 };

#[derive(Default)]
struct Outcome {
    /// (ms, target)
    targets: Vec<(u64, f64)>,
    /// (captured ms, delay ms) of frames that could be shown.
    frames: Vec<(u64, u64)>,
    /// One-way delay of voice packets, ms.
    voice: Vec<u64>,
    shown_at: Vec<u64>,
    keyframes: u32,
    resent: u64,
    sent_bytes: u64,
}

impl Outcome {
    fn target_at(&self, ms: u64) -> f64 {
        self.targets.iter().rev().find(|t| t.0 <= ms).map_or(0.0, |t| t.1)
    }
    fn p95(&self, from: u64) -> u64 {
        let mut delays: Vec<u64> = self.frames.iter().filter(|f| f.0 >= from).map(|f| f.1).collect();
        delays.sort_unstable();
        delays.get(delays.len() * 95 / 100).copied().unwrap_or(u64::MAX)
    }
    /// Longest time without a new picture after `from`.
    fn longest_gap(&self, from: u64) -> u64 {
        self.shown_at.windows(2).filter(|w| w[0] >= from).map(|w| w[1] - w[0]).max().unwrap_or(u64::MAX)
    }
    fn describe(&self, name: &str) {
        let mut line = String::new();
        for s in (0..self.targets.len() as u64 / 1000).step_by(2) {
            line += &format!(" {}", (self.target_at(s * 1000) / 1e3) as u64);
        }
        println!(
            "{name}: {} frames, p95 {} ms, longest gap {} ms, {} keyframes, {} resent; target every 2 s:{line}",
            self.frames.len(),
            self.p95(1000),
            self.longest_gap(1000),
            self.keyframes,
            self.resent
        );
    }
}

/// A receiver's view of the video.
#[derive(Default)]
struct Receiver {
    highest: Option<u64>,
    got: BTreeSet<u64>,
    missing: BTreeMap<u64, (u64, u32)>,
    parts: BTreeMap<u32, (BTreeSet<u16>, Packet, u64)>,
    next_frame: u32,
    need_key: bool,
    stuck_since: Option<u64>,
    feedback: Vec<(u16, u64)>,
    told: Option<u16>,
}

fn run(link: &Link, seconds: u64) -> Outcome {
    let t0 = Instant::now();
    let at = |ms: u64| t0 + Duration::from_millis(ms);
    let mut flow: Flow<Packet> = Flow::new(LIMITS, 100);
    flow.set_can_pad(true);
    let mut out = Outcome::default();
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 11) as f64 / (1u64 << 53) as f64
    };
    // In flight: (arrival ms, number, video packet and its sequence, sent ms)
    let mut flight: VecDeque<(u64, u16, Option<(u64, Packet)>, u64)> = VecDeque::new();
    let mut back: VecDeque<(u64, Vec<(u16, Option<Duration>)>, Vec<u16>, bool)> = VecDeque::new();
    let mut busy_until = 0.0f64;
    let mut receiver = Receiver { need_key: true, ..Default::default() };
    let (mut frame, mut key_wanted, mut key_asked) = (0u32, true, 0u64);
    let mut captured: BTreeMap<u32, u64> = BTreeMap::new();
    let mut extended = 100u64;
    for ms in 0..seconds * 1000 {
        let now = at(ms);
        let mut leaving: Vec<(u16, usize, Option<(u64, Packet)>)> = vec![];
        if ms % 20 == 0 {
            leaving.push((flow.voice(now, 90), 120, None));
        }
        if ms % FPS_MS == 0 {
            // An encoder that follows its target with ±20 %, minus voice; a keyframe is 20 frames' worth, at least 8 kB.
            let plain = (flow.target() - 50e3).max(80e3) * 0.9 / 8.0 * FPS_MS as f64 / 1e3 * (0.8 + 0.4 * random());
            let key = std::mem::take(&mut key_wanted);
            out.keyframes += u32::from(key);
            let bytes = if key { (plain * 8.0).clamp(8e3, 25e3) } else { plain } as usize;
            let parts = bytes.div_ceil(1130).max(1) as u16;
            captured.insert(frame, ms);
            for part in 0..parts {
                let size = (bytes / usize::from(parts)).max(20);
                let unit = Unit { size, frame, opens_keyframe: key && part == 0 };
                key_wanted |= flow.video(unit, Packet { frame, part, parts, key, size });
            }
            frame += 1;
        }
        while let Some(release) = flow.next(now) {
            let sequence = match release.kind {
                Kind::Media { sequence } => {
                    extended += u64::from(sequence.wrapping_sub(extended as u16));
                    extended
                }
                Kind::Again { original, .. } => {
                    extended.wrapping_add_signed(i64::from(original.wrapping_sub(extended as u16) as i16))
                }
            };
            leaving.push((release.number, release.packet.size + 30, Some((sequence, release.packet))));
        }
        for (number, size, video) in leaving {
            out.sent_bytes += size as u64;
            let rate = (link.rate)(ms);
            let queued = (busy_until - ms as f64).max(0.0);
            if link.blackout.contains(&ms) || random() < link.loss || queued > link.queue_ms {
                continue;
            }
            if link.pause_every > 0 && ms > 5000 && ms % link.pause_every < 100 {
                busy_until = busy_until.max((ms - ms % link.pause_every + 100) as f64);
            }
            busy_until = busy_until.max(ms as f64) + size as f64 * 8e3 / rate;
            flight.push_back((busy_until as u64 + link.delay, number, video, ms));
        }
        // The receiver.
        while flight.front().is_some_and(|p| p.0 <= ms) {
            let Some((arrival, number, video, sent)) = flight.pop_front() else { break };
            receiver.feedback.push((number, arrival));
            match video {
                None => out.voice.push(arrival - sent),
                Some((sequence, packet)) => receive(&mut receiver, sequence, packet, ms),
            }
        }
        show(&mut receiver, &captured, ms, &mut out);
        if ms % 50 == 0 {
            // Keyframe request: stuck for 1 s.
            let stuck = receiver.stuck_since.is_some_and(|s| ms - s > 1000) || (receiver.need_key && ms > 500);
            let ask = stuck && ms - key_asked > 500;
            if ask {
                key_asked = ms;
                receiver.missing.clear();
            }
            let mut nacks = vec![];
            for (sequence, (last, times)) in receiver.missing.iter_mut() {
                if ms - *last >= 2 * link.delay + 10 && *times < 10 {
                    (*last, *times) = (ms, *times + 1);
                    nacks.push(*sequence as u16);
                }
            }
            let entries = feedback(&mut receiver);
            if (!entries.is_empty() || ask || !nacks.is_empty())
                && !link.blackout.contains(&ms)
                && random() >= link.loss
            {
                back.push_back((ms + link.delay, entries, nacks, ask));
            }
        }
        while back.front().is_some_and(|b| b.0 <= ms) {
            let Some((_, entries, nacks, ask)) = back.pop_front() else { break };
            flow.reception(now, 0.0, Some(Duration::from_millis(2 * link.delay + 5)));
            key_wanted |= flow.feedback(now, entries) | ask;
            flow.nack(now, nacks);
        }
        out.targets.push((ms, flow.target()));
    }
    out.resent = flow.resent;
    out
}

fn receive(r: &mut Receiver, sequence: u64, packet: Packet, ms: u64) {
    if let Some(highest) = r.highest {
        for lost in highest + 1..sequence {
            // Asked for at the next round.
            r.missing.insert(lost, (0, 0));
        }
    }
    r.highest = Some(r.highest.map_or(sequence, |h| h.max(sequence)));
    r.missing.remove(&sequence);
    if !r.got.insert(sequence) {
        return;
    }
    let entry = r.parts.entry(packet.frame).or_insert((BTreeSet::new(), packet, ms));
    entry.0.insert(packet.part);
    entry.2 = ms;
}

/// Shows what can be decoded: frames in order, or from a complete keyframe on.
fn show(r: &mut Receiver, captured: &BTreeMap<u32, u64>, ms: u64, out: &mut Outcome) {
    loop {
        let complete = |p: &(BTreeSet<u16>, Packet, u64)| p.0.len() == usize::from(p.1.parts);
        let key = r.parts.iter().rev().find(|(f, p)| **f >= r.next_frame && p.1.key && complete(p)).map(|(f, _)| *f);
        let next = match key {
            Some(key) => Some(key),
            None if !r.need_key => r.parts.get(&r.next_frame).filter(|p| complete(p)).map(|_| r.next_frame),
            None => None,
        };
        let Some(next) = next else { break };
        r.need_key = false;
        r.stuck_since = None;
        r.next_frame = next + 1;
        r.parts.retain(|f, _| *f > next);
        out.frames.push((captured[&next], ms - captured[&next]));
        out.shown_at.push(ms);
    }
    // Something newer is here but cannot be shown.
    if r.parts.keys().any(|f| *f > r.next_frame) {
        r.stuck_since.get_or_insert(ms);
    }
}

/// Transport-wide feedback since the last.
fn feedback(r: &mut Receiver) -> Vec<(u16, Option<Duration>)> {
    let Some(last) = r.feedback.iter().map(|f| f.0).max_by_key(|n| n.wrapping_sub(r.told.unwrap_or(0)) as i16) else {
        return vec![];
    };
    let from = r.told.map_or(0, |t| t.wrapping_add(1));
    let came: BTreeMap<u16, u64> = r.feedback.drain(..).collect();
    let count = last.wrapping_sub(from).wrapping_add(1);
    r.told = Some(last);
    (0..count.min(5000))
        .map(|n| from.wrapping_add(n))
        .map(|n| (n, came.get(&n).map(|ms| Duration::from_millis(*ms))))
        .collect()
}

#[test]
fn a_wide_link_is_used_and_nothing_freezes() {
    let out = run(&CLEAN, 40);
    out.describe("20 Mbit/s");
    assert!(out.target_at(15_000) > 2_200e3, "{}", out.target_at(15_000));
    assert!(out.p95(1000) < 80 && out.longest_gap(1000) <= 120);
    assert_eq!(out.keyframes, 1);
}

#[test]
fn a_narrow_link_with_a_deep_queue_keeps_its_delay_low() {
    let out = run(&Link { rate: |_| 700e3, ..CLEAN }, 60);
    out.describe("700 kbit/s");
    assert!(out.p95(0) <= 400, "{}", out.p95(0));
    assert!(out.longest_gap(0) <= 500, "{}", out.longest_gap(0));
    let mean = out.sent_bytes as f64 * 8.0 / 60.0;
    assert!(mean > 480e3, "only {mean} bit/s used");
}

#[test]
fn after_a_step_down_and_up_the_rate_is_back_within_15_seconds() {
    let out = run(&Link { rate: |ms| if (20_000..40_000).contains(&ms) { 500e3 } else { 2_000e3 }, ..CLEAN }, 70);
    out.describe("2000-500-2000");
    assert!(out.target_at(19_000) > 1_400e3);
    assert!(out.target_at(30_000) < 550e3);
    let back = out.targets.iter().find(|t| t.0 > 40_000 && t.1 > 1_500e3).map(|t| t.0 - 40_000);
    println!("back above 1500 kbit/s after {back:?} ms");
    assert!(back.is_some_and(|b| b < 15_000), "{back:?}");
    assert!(out.longest_gap(1000) <= 500, "{}", out.longest_gap(1000));
    assert!(out.p95(1000) <= 400);
}

#[test]
fn random_loss_does_not_collapse_the_rate() {
    let out = run(&Link { loss: 0.05, ..CLEAN }, 60);
    out.describe("5 % loss");
    assert!(out.target_at(30_000) > 900e3 && out.target_at(59_000) > 900e3);
    let freezes = out.shown_at.windows(2).filter(|w| w[1] - w[0] > 300).count();
    assert!(freezes <= 1, "{freezes} freezes in a minute");
}

#[test]
fn a_blackout_is_over_within_a_second_of_its_end() {
    let out = run(&Link { rate: |_| 2_000e3, blackout: 20_000..22_000, ..CLEAN }, 40);
    out.describe("2 s blackout");
    let back = out.shown_at.iter().find(|ms| **ms > 20_200).unwrap();
    println!("picture back {} ms after the end", back - 22_000);
    assert!((22_000..23_000).contains(back));
    assert!(out.target_at(25_000) > 700e3);
}

#[test]
fn a_very_narrow_link_still_carries_voice() {
    let out = run(&Link { rate: |_| 250e3, ..CLEAN }, 60);
    out.describe("250 kbit/s");
    let mut voice = out.voice.clone();
    voice.sort_unstable();
    assert!(voice.len() > 2800, "{} of 3000 voice packets", voice.len());
    assert!(voice[voice.len() * 95 / 100] < 400);
}

#[test]
fn a_link_that_pauses_now_and_then_is_not_taken_for_a_narrow_one() {
    let out = run(&Link { rate: |_| 4_000e3, pause_every: 4_000, ..CLEAN }, 60);
    out.describe("pauses of 100 ms");
    let late: Vec<f64> = out.targets.iter().filter(|t| t.0 > 20_000).map(|t| t.1).collect();
    let mean = late.iter().sum::<f64>() / late.len() as f64;
    assert!(mean > 1_700e3, "mean target {mean}");
    assert!(out.longest_gap(1000) < 300);
}
