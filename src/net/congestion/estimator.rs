//! The target bitrate.
//!
//! * Delay: [`Trend`] says when a queue grows; then the target drops to 0.85 of what arrived. A queue that stands (the
//!   one-way delay stays above its 10 s minimum) is drained at 0.7 of what arrives and the target returns to 0.92 of it.
//! * Growth: 8 % a second while the path's capacity is unknown, about a packet per response time near the rate at which it
//!   last overflowed; never beyond 1.5 times what actually arrives.
//! * Probes: a few packets faster than the target (padding where the media does not suffice) measure what the path takes; a
//!   success is adopted at once. That is what brings the picture back seconds after a narrow link has widened.
//! * Loss: above 10 % within a second the target shrinks by half the loss; below, loss alone changes nothing.
//! * Outage: feedback stops although packets leave. Nothing is concluded from what was lost meanwhile.

use super::{
    history::Ack,
    trend::{Trend, Usage},
};
use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Share of the arriving rate after overuse.
const BETA: f64 = 0.85;
/// While a standing queue drains.
const DRAIN: f64 = 0.7;
const RESUME: f64 = 0.92;
/// Standing queue that is drained, and the one that counts as empty.
const QUEUE_HIGH: f64 = 0.120;
const QUEUE_LOW: f64 = 0.035;
const GROWTH_PER_SECOND: f64 = 1.08;
/// A queue that grows by this much between two looks 100 ms apart is overuse without waiting for the trend.
const QUEUE_JUMP: f64 = 0.050;
/// Window over which the arriving rate is measured, for growth; and for a decrease, when older packets may have come
/// through a path that was still wide.
const RATE_WINDOW: Duration = Duration::from_millis(500);
const SHORT_WINDOW: Duration = Duration::from_millis(250);
const LOSS_WINDOW: Duration = Duration::from_millis(1000);
const HIGH_LOSS: f64 = 0.10;
/// No feedback for this long, while packets leave, is an outage.
const OUTAGE: Duration = Duration::from_millis(700);
/// Length of a probe in time.
const PROBE_SECONDS: f64 = 0.040;
const PROBE_FACTOR: f64 = 2.0;
const PROBE_GAP: Duration = Duration::from_millis(2500);
const PROBE_GAP_MAX: Duration = Duration::from_secs(6);
/// A probe whose feedback has not come by then is forgotten.
const PROBE_TIMEOUT: Duration = Duration::from_millis(1200);

/// Bits per second.
#[derive(Clone, Copy, Debug)]
pub(in crate::net) struct Limits {
    pub(in crate::net) start: f64,
    pub(in crate::net) min: f64,
    pub(in crate::net) max: f64,
}

/// A probe to send.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Probe {
    pub(super) id: u32,
    pub(super) rate: f64,
    pub(super) bytes: usize,
}

#[derive(Debug)]
struct Running {
    probe: Probe,
    began: Instant,
    /// When its last packet left; known once all have.
    sent: Option<(Instant, usize)>,
    acks: Vec<(Instant, Duration, usize)>,
    lost: usize,
}

#[derive(Debug)]
pub(super) struct Estimator {
    limits: Limits,
    target: f64,
    trend: Trend,
    arrived: VecDeque<(Duration, usize)>,
    loss: VecDeque<(Instant, i32, i32)>,
    queue: QueueDelay,
    capacity: Capacity,
    round_trip: Duration,
    changed: Option<Instant>,
    decreased: Option<Instant>,
    loss_decreased: Option<Instant>,
    /// The target to return to once the standing queue is empty.
    resume: Option<f64>,
    /// The target before that queue was seen.
    before: f64,
    /// The longest that queue has been, seconds.
    peak: f64,
    feedback: Option<Instant>,
    sent_since: u32,
    outage: Option<Instant>,
    /// Losses of packets that left before this are not counted.
    forgive_before: Option<Instant>,
    running: Option<Running>,
    next_probe: Option<Instant>,
    probe_gap: Duration,
    probes: u32,
    first_sent: Option<Instant>,
    reports: u32,
}

impl Estimator {
    pub(super) fn new(limits: Limits) -> Self {
        Estimator {
            limits,
            target: limits.start,
            trend: Trend::new(),
            arrived: VecDeque::new(),
            loss: VecDeque::new(),
            queue: QueueDelay::default(),
            capacity: Capacity::default(),
            round_trip: Duration::from_millis(100),
            changed: None,
            decreased: None,
            loss_decreased: None,
            resume: None,
            before: limits.start,
            peak: 0.0,
            feedback: None,
            sent_since: 0,
            outage: None,
            forgive_before: None,
            running: None,
            next_probe: None,
            probe_gap: PROBE_GAP,
            probes: 0,
            first_sent: None,
            reports: 0,
        }
    }

    pub(super) fn target(&self) -> f64 {
        self.target
    }

    /// A round trip through the queue as it stands now.
    pub(super) fn round_trip(&self) -> Duration {
        self.round_trip + Duration::from_secs_f64(self.queue.delay.clamp(0.0, 1.0))
    }

    /// A round trip measured by sender and receiver reports.
    pub(super) fn set_round_trip(&mut self, round_trip: Duration) {
        self.round_trip = round_trip.clamp(Duration::from_millis(1), Duration::from_secs(2));
    }

    /// A packet leaves.
    pub(super) fn sent(&mut self, now: Instant) {
        self.first_sent.get_or_insert(now);
        self.sent_since += 1;
    }

    /// Whether the path is thought dead now; call often.
    pub(super) fn outage(&mut self, now: Instant) -> bool {
        if self.outage.is_none()
            && self.sent_since >= 10
            && self.feedback.is_some_and(|at| now.saturating_duration_since(at) > OUTAGE)
        {
            self.outage = self.feedback;
            self.running = None;
        }
        self.outage.is_some()
    }

    /// What one or more feedback messages said, in order of departure. `now` is when they came.
    pub(super) fn feedback(&mut self, now: Instant, acks: &[Ack]) {
        let Some(newest) = acks.iter().filter(|a| a.arrival.is_some()).max_by_key(|a| a.departure) else { return };
        self.feedback = Some(now);
        self.sent_since = 0;
        if let Some(began) = self.outage.take() {
            // The path came back: a fresh look at delays, and no conclusions from what was lost meanwhile.
            tracing::debug!(for_ms = now.saturating_duration_since(began).as_millis() as u64, "the path is back");
            self.trend = Trend::new();
            self.arrived.clear();
            self.loss.clear();
            self.forgive_before = Some(now);
            self.changed = Some(now);
        }
        // Without reports of the peer this is the next best: it includes the receiver's feedback interval.
        if self.reports == 0 {
            let sample = now.saturating_duration_since(newest.departure);
            self.round_trip = self.round_trip.min(sample).max(Duration::from_millis(1));
        }
        let mut usage = Usage::Normal;
        let (mut lost, mut total) = (0i32, 0i32);
        for ack in acks {
            let forgiven = self.forgive_before.is_some_and(|before| ack.departure < before);
            match ack.arrival {
                Some(arrival) => {
                    let seen = self.trend.packet(ack.departure, arrival);
                    if usage != Usage::Over {
                        usage = seen;
                    }
                    self.queue.packet(now, ack.departure, arrival);
                    self.arrived.push_back((arrival, ack.size));
                    // Missing in an earlier report, here after all.
                    lost -= i32::from(ack.late && !forgiven);
                    total += i32::from(!ack.late);
                }
                None if !forgiven => {
                    lost += 1;
                    total += 1;
                }
                None => {}
            }
            self.probe_ack(ack);
        }
        self.queue.settle(now);
        self.loss.push_back((now, lost, total));
        while self.loss.front().is_some_and(|l| now.saturating_duration_since(l.0) > LOSS_WINDOW) {
            self.loss.pop_front();
        }
        self.probe_result(now);
        self.react(now, usage);
        self.on_loss(now);
        self.target = self.target.clamp(self.limits.min, self.limits.max);
    }

    /// Bits per second that arrived within the last `window`.
    fn arriving(&mut self, window: Duration) -> Option<f64> {
        let newest = self.arrived.iter().map(|a| a.0).max()?;
        while self.arrived.front().is_some_and(|a| a.0 + RATE_WINDOW < newest) {
            self.arrived.pop_front();
        }
        let recent = || self.arrived.iter().filter(|a| a.0 + window >= newest);
        let oldest = recent().map(|a| a.0).min()?;
        let span = (newest - oldest).as_secs_f64();
        // The first packet's bytes came before the span.
        let bytes: usize = recent().map(|a| a.1).sum::<usize>() - recent().find(|a| a.0 == oldest).map_or(0, |a| a.1);
        (span > 0.12).then(|| bytes as f64 * 8.0 / span)
    }

    fn loss_ratio(&self) -> Option<f64> {
        let (lost, total) = self.loss.iter().fold((0, 0), |(l, t), x| (l + x.1, t + x.2));
        (total >= 20).then(|| f64::from(lost.max(0)) / f64::from(total))
    }

    fn react(&mut self, now: Instant, usage: Usage) {
        let since = |then: Option<Instant>| then.map(|t| now.saturating_duration_since(t));
        let settled = since(self.decreased).is_none_or(|d| d > self.round_trip + Duration::from_millis(200));
        self.peak = if self.resume.is_some() { self.peak.max(self.queue.delay) } else { self.queue.delay };
        if let Some(resume) = self.resume {
            if self.queue.delay < QUEUE_LOW || since(self.decreased).is_some_and(|d| d > Duration::from_secs(4)) {
                // A link that is too narrow empties its queue slowly, because we still fill it. One that only paused is empty
                // at once, and what arrived meanwhile said nothing about it.
                let pause = self.round_trip.as_secs_f64() + 0.05 + self.peak;
                let paused = since(self.decreased).is_some_and(|d| d.as_secs_f64() < pause);
                self.target = self.target.max(if paused { 0.95 * self.before } else { resume });
                if paused {
                    self.capacity = Capacity::default();
                }
                self.resume = None;
                self.changed = Some(now);
                self.trend = Trend::new();
                if self.target < 0.7 * self.before {
                    // Either the link is narrower now or it only paused: find out soon.
                    self.probe_gap = PROBE_GAP;
                    self.next_probe = Some(now + Duration::from_secs(1));
                }
            } else if let Some(rate) = self.arriving(SHORT_WINDOW).filter(|_| self.queue.delay > QUEUE_LOW * 2.0) {
                // The link is still full, so what arrives now is its rate; a single look may have met a pause.
                let resume = 0.3 * resume + 0.7 * (RESUME * rate).min(self.before);
                self.resume = Some(resume);
                self.target = self.target.min(DRAIN / RESUME * resume).max(0.5 * resume);
            }
            return;
        }
        let jumped = self.queue.delay > QUEUE_JUMP && self.queue.growth > QUEUE_JUMP;
        if (self.queue.delay > QUEUE_HIGH && settled) || (jumped && usage != Usage::Under) {
            if let Some(rate) = self.arriving(SHORT_WINDOW) {
                self.capacity.overused_at(rate);
                self.before = self.target;
                self.resume = Some((RESUME * rate).min(self.target));
                self.target = self.target.min(DRAIN * rate);
                self.decreased = Some(now);
                self.changed = Some(now);
                self.put_off_probe(now);
            }
            return;
        }
        match usage {
            Usage::Over => {
                if let Some(rate) = self.arriving(SHORT_WINDOW).filter(|_| settled) {
                    self.capacity.overused_at(rate);
                    // When less is sent than the target, what arrives says little about what would.
                    let lower = if BETA * rate < self.target { BETA * rate } else { 0.95 * self.target };
                    self.target = self.target.min(lower);
                    self.decreased = Some(now);
                    self.put_off_probe(now);
                }
                self.changed = Some(now);
            }
            Usage::Under => self.changed = Some(now),
            Usage::Normal => {
                let dt = since(self.changed.replace(now)).unwrap_or_default().as_secs_f64().min(1.0);
                let lossy = self.loss_ratio().is_some_and(|l| l > 0.8 * HIGH_LOSS);
                let Some(rate) = self.arriving(RATE_WINDOW).filter(|_| !lossy && self.queue.delay < 0.06) else {
                    return;
                };
                let grown = if self.capacity.near(rate, self.target) {
                    self.target + 1200.0 * 8.0 / (self.round_trip.as_secs_f64() + 0.1) * dt
                } else {
                    self.target * GROWTH_PER_SECOND.powf(dt) + 1000.0 * dt
                };
                self.target = self.target.max(grown.min(1.5 * rate + 10_000.0));
            }
        }
    }

    fn on_loss(&mut self, now: Instant) {
        let Some(loss) = self.loss_ratio().filter(|l| *l > HIGH_LOSS) else { return };
        let wait = self.round_trip + Duration::from_millis(300);
        if self.loss_decreased.is_none_or(|at| now.saturating_duration_since(at) > wait) {
            self.target *= 1.0 - 0.5 * loss.min(0.6);
            self.loss_decreased = Some(now);
            self.put_off_probe(now);
        }
    }

    /// A receiver report's loss (0…1), for peers without transport-wide feedback: then loss is all we know.
    pub(super) fn reception(&mut self, now: Instant, loss: f64) {
        self.reports += 1;
        if self.feedback.is_some()
            || self.changed.is_some_and(|at| now.saturating_duration_since(at) < Duration::from_millis(800))
        {
            return;
        }
        self.changed = Some(now);
        let factor = if loss > HIGH_LOSS {
            1.0 - 0.5 * loss
        } else if loss < 0.02 {
            1.05
        } else {
            1.0
        };
        self.target = (self.target * factor).clamp(self.limits.min, self.limits.max);
    }

    /// A probe to begin now, if it is time for one.
    pub(super) fn probe(&mut self, now: Instant) -> Option<Probe> {
        if let Some(running) = &self.running {
            if now.saturating_duration_since(running.began) < PROBE_TIMEOUT {
                return None;
            }
            self.running = None;
            self.put_off_probe(now);
        }
        let first = self.first_sent?;
        let due = *self.next_probe.get_or_insert(first + Duration::from_millis(400));
        let calm = self.feedback.is_some()
            && self.outage.is_none()
            && self.resume.is_none()
            && self.queue.delay < QUEUE_LOW
            && self.loss_ratio().is_none_or(|l| l < HIGH_LOSS);
        if now < due || !calm || self.target > 0.9 * self.limits.max {
            return None;
        }
        // A sender that does not use its target gains nothing from a higher one.
        if self.probes > 0 && self.arriving(RATE_WINDOW).is_none_or(|rate| rate < 0.5 * self.target) {
            return None;
        }
        self.probes += 1;
        let rate = (self.target * PROBE_FACTOR).min(1.1 * self.limits.max);
        let probe = Probe { id: self.probes, rate, bytes: ((rate * PROBE_SECONDS / 8.0) as usize).max(6_000) };
        self.running = Some(Running { probe, began: now, sent: None, acks: vec![], lost: 0 });
        Some(probe)
    }

    /// All packets of the running probe have left.
    pub(super) fn probe_sent(&mut self, now: Instant, packets: usize) {
        if let Some(running) = &mut self.running {
            running.sent = Some((now, packets));
        }
    }

    /// When [`Self::probe`] or [`Self::outage`] should be asked next.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        let outage = self.feedback.filter(|_| self.outage.is_none()).map(|at| at + OUTAGE);
        // What is due but not yet possible is looked at again soon, not at once.
        let soon = now + Duration::from_millis(20);
        let later = |at: Instant| if at <= now { soon } else { at };
        [self.next_probe.filter(|_| self.running.is_none()), outage].into_iter().flatten().map(later).min()
    }

    fn put_off_probe(&mut self, now: Instant) {
        self.running = None;
        self.next_probe = Some(now + self.probe_gap);
    }

    fn probe_ack(&mut self, ack: &Ack) {
        let Some(running) = self.running.as_mut().filter(|r| ack.probe == Some(r.probe.id)) else { return };
        match ack.arrival {
            Some(arrival) => running.acks.push((ack.departure, arrival, ack.size)),
            None => running.lost += 1,
        }
    }

    fn probe_result(&mut self, now: Instant) {
        let Some(running) = &self.running else { return };
        let Some((_, packets)) = running.sent else { return };
        if running.acks.len() + running.lost < packets {
            return;
        }
        let measured = measure(&running.acks).filter(|_| running.acks.len() * 5 >= packets * 4);
        let wanted = running.probe.rate;
        let initial = running.probe.id == 1;
        self.running = None;
        self.next_probe = Some(now + self.probe_gap);
        let Some((sent, came)) = measured else {
            self.probe_gap = (self.probe_gap * 3 / 2).min(PROBE_GAP_MAX);
            return;
        };
        // Arriving slower than it left: that is the link's own rate; stay a little below it.
        let limited = came < 0.9 * sent;
        let found = if limited { 0.95 * came } else { came.min(sent) };
        tracing::debug!(kbps = (found / 1e3) as u64, limited, target = (self.target / 1e3) as u64, "a probe's result");
        if found > self.target {
            if found > 1.15 * self.target {
                self.probe_gap = PROBE_GAP;
            }
            self.capacity = Capacity::default();
            self.target = found.min(self.limits.max);
            self.changed = Some(now);
            if !limited && found > 0.8 * wanted {
                // The end is not in sight: look further at once.
                self.next_probe = Some(now);
            }
        } else {
            if initial && limited {
                self.target = found;
            }
            self.probe_gap = (self.probe_gap * 3 / 2).min(PROBE_GAP_MAX);
        }
    }
}

/// (rate it left at, rate it came at) of a packet train.
fn measure(acks: &[(Instant, Duration, usize)]) -> Option<(f64, f64)> {
    if acks.len() < 5 {
        return None;
    }
    let bytes: usize = acks.iter().map(|a| a.2).sum();
    let (first_out, last_out) = (acks.iter().min_by_key(|a| a.0)?, acks.iter().max_by_key(|a| a.0)?);
    let (first_in, last_in) = (acks.iter().min_by_key(|a| a.1)?, acks.iter().max_by_key(|a| a.1)?);
    let out = (last_out.0 - first_out.0).as_secs_f64();
    let span = (last_in.1 - first_in.1).as_secs_f64();
    if out < 0.005 || span < 0.005 || span > 1.0 {
        return None;
    }
    Some(((bytes - last_out.2) as f64 * 8.0 / out, (bytes - first_in.2) as f64 * 8.0 / span))
}

/// The one-way delay above its minimum of the last 10…20 s.
#[derive(Debug, Default)]
struct QueueDelay {
    origin: Option<(Instant, f64)>,
    /// Minima of this and the last period.
    minima: [f64; 2],
    turned: Option<Instant>,
    /// The newest packets of the batch: their smallest delay is the queue, the rest is jitter.
    newest: VecDeque<f64>,
    delay: f64,
    /// (when, delay) of the looks of the last 150 ms.
    looks: VecDeque<(Instant, f64)>,
    growth: f64,
}

impl QueueDelay {
    fn packet(&mut self, now: Instant, departure: Instant, arrival: Duration) {
        let (origin, first) = *self.origin.get_or_insert((departure, arrival.as_secs_f64()));
        let left = match departure.checked_duration_since(origin) {
            Some(after) => after.as_secs_f64(),
            None => -(origin - departure).as_secs_f64(),
        };
        let delay = arrival.as_secs_f64() - first - left;
        if self.turned.is_none() {
            self.minima = [delay; 2];
        }
        if self.turned.is_none_or(|t| now.saturating_duration_since(t) > Duration::from_secs(10)) {
            self.turned = Some(now);
            self.minima = [delay, self.minima[0]];
        }
        self.minima[0] = self.minima[0].min(delay);
        if self.newest.len() == 4 {
            self.newest.pop_front();
        }
        self.newest.push_back(delay);
    }

    /// The batch is complete.
    fn settle(&mut self, now: Instant) {
        let Some(least) = self.newest.iter().copied().reduce(f64::min) else { return };
        self.delay = least - self.minima[0].min(self.minima[1]);
        while self.looks.front().is_some_and(|l| now.saturating_duration_since(l.0) > Duration::from_millis(150)) {
            self.looks.pop_front();
        }
        self.growth = self.looks.front().map_or(0.0, |l| self.delay - l.1);
        self.looks.push_back((now, self.delay));
    }
}

/// The rate at which the path overflowed, with its spread.
#[derive(Debug, Default)]
struct Capacity {
    mean: Option<f64>,
    /// Variance over mean, kbit/s.
    deviation: f64,
}

impl Capacity {
    fn overused_at(&mut self, rate: f64) {
        let mean = match self.mean {
            Some(mean) if (rate - mean).abs() <= self.spread(mean) * 3.0 => 0.95 * mean + 0.05 * rate,
            _ => {
                self.deviation = 0.4;
                rate
            }
        };
        let error = (mean - rate) / 1e3;
        self.deviation = (0.95 * self.deviation + 0.05 * error * error / (mean / 1e3).max(1.0)).clamp(0.4, 2.5);
        self.mean = Some(mean);
    }

    fn spread(&self, mean: f64) -> f64 {
        (self.deviation * mean / 1e3).sqrt() * 1e3
    }

    /// Whether to grow carefully. A rate well above what overflowed once says that the path has changed.
    fn near(&mut self, rate: f64, target: f64) -> bool {
        let Some(mean) = self.mean else { return false };
        let spread = 3.0 * self.spread(mean);
        if rate > mean + spread {
            self.mean = None;
            return false;
        }
        target > mean - spread
    }
}
