//! Do queues on the path grow? The slope of the one-way delay over groups of packets, against a threshold that adapts.
//!
//! Packets sent within 5 ms form a group. Between groups the change of delay is (arrival gap − departure gap); its running
//! sum, smoothed, is fitted by a line over the last 20 groups. The slope, scaled by the number of groups (≤ 60) and a gain
//! of 4, is compared with a threshold in milliseconds that follows the signal slowly, so that a loss-based TCP flow on the
//! same path does not starve us.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

const BURST: Duration = Duration::from_millis(5);
const MAX_BURST: Duration = Duration::from_millis(100);
const WINDOW: usize = 20;
const SMOOTHING: f64 = 0.9;
const GAIN: f64 = 4.0;
const MAX_DELTAS: f64 = 60.0;
const OVERUSE_MS: f64 = 10.0;
const K_UP: f64 = 0.0087;
const K_DOWN: f64 = 0.039;
const MAX_ADAPT_MS: f64 = 15.0;

/// What the path does with us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) enum Usage {
    #[default]
    Normal,
    /// A queue is growing.
    Over,
    /// A queue is draining.
    Under,
}

#[derive(Clone, Copy, Debug)]
struct Group {
    first_departure: Instant,
    departure: Instant,
    first_arrival: Duration,
    arrival: Duration,
}

/// The detector.
#[derive(Debug)]
pub(super) struct Trend {
    current: Option<Group>,
    previous: Option<Group>,
    deltas: f64,
    sum: f64,
    smooth: f64,
    /// (arrival ms since the first, smoothed delay ms)
    window: VecDeque<(f64, f64)>,
    origin: Duration,
    slope: f64,
    threshold: f64,
    over_ms: f64,
    over_groups: u32,
    usage: Usage,
}

impl Trend {
    pub(super) fn new() -> Self {
        Trend {
            current: None,
            previous: None,
            deltas: 0.0,
            sum: 0.0,
            smooth: 0.0,
            window: VecDeque::with_capacity(WINDOW + 1),
            origin: Duration::ZERO,
            slope: 0.0,
            threshold: 12.5,
            over_ms: -1.0,
            over_groups: 0,
            usage: Usage::Normal,
        }
    }

    /// One packet that arrived; call in order of departure. Returns the state after it.
    pub(super) fn packet(&mut self, departure: Instant, arrival: Duration) -> Usage {
        let Some(group) = &mut self.current else {
            self.current = Some(Group { first_departure: departure, departure, first_arrival: arrival, arrival });
            return self.usage;
        };
        if departure < group.first_departure {
            return self.usage;
        }
        let gap = departure.saturating_duration_since(group.departure).as_secs_f64();
        // Packets that queued somewhere and were let go together say nothing about the queue's growth.
        let let_go_together = arrival.saturating_sub(group.arrival) <= BURST
            && arrival.as_secs_f64() - group.arrival.as_secs_f64() < gap
            && arrival.saturating_sub(group.first_arrival) < MAX_BURST;
        if departure.saturating_duration_since(group.first_departure) <= BURST || let_go_together {
            group.departure = group.departure.max(departure);
            group.arrival = group.arrival.max(arrival);
            return self.usage;
        }
        let complete =
            std::mem::replace(group, Group { first_departure: departure, departure, first_arrival: arrival, arrival });
        if let Some(previous) = self.previous.replace(complete) {
            let sent = complete.departure.saturating_duration_since(previous.departure).as_secs_f64() * 1e3;
            let came = (complete.arrival.as_secs_f64() - previous.arrival.as_secs_f64()) * 1e3;
            // A receiver's clock that jumps, or a route change with reordering: start afresh rather than believe it.
            if came < -100.0 || came > 3_000.0 {
                let threshold = self.threshold;
                *self = Trend { threshold, ..Trend::new() };
            } else {
                self.delta(sent, came, complete.arrival);
            }
        }
        self.usage
    }

    fn delta(&mut self, sent_ms: f64, came_ms: f64, arrival: Duration) {
        if self.deltas == 0.0 {
            self.origin = arrival;
        }
        self.deltas += 1.0;
        self.sum += came_ms - sent_ms;
        self.smooth = SMOOTHING * self.smooth + (1.0 - SMOOTHING) * self.sum;
        self.window.push_back(((arrival.as_secs_f64() - self.origin.as_secs_f64()) * 1e3, self.smooth));
        if self.window.len() > WINDOW {
            self.window.pop_front();
        }
        let slope = if self.window.len() == WINDOW { fit(&self.window).unwrap_or(self.slope) } else { self.slope };
        let signal = self.deltas.min(MAX_DELTAS) * slope * GAIN;
        if signal > self.threshold {
            self.over_ms = if self.over_ms < 0.0 { sent_ms / 2.0 } else { self.over_ms + sent_ms };
            self.over_groups += 1;
            if self.over_ms > OVERUSE_MS && self.over_groups > 1 && slope >= self.slope {
                self.over_ms = 0.0;
                self.over_groups = 0;
                self.usage = Usage::Over;
            }
        } else {
            self.over_ms = -1.0;
            self.over_groups = 0;
            self.usage = if signal < -self.threshold { Usage::Under } else { Usage::Normal };
        }
        self.slope = slope;
        // A spike far above the threshold is no reason to move it.
        if signal.abs() <= self.threshold + MAX_ADAPT_MS {
            let k = if signal.abs() < self.threshold { K_DOWN } else { K_UP };
            self.threshold += k * (signal.abs() - self.threshold) * came_ms.clamp(0.0, 100.0);
            self.threshold = self.threshold.clamp(6.0, 600.0);
        }
    }
}

/// Slope of the least-squares line.
fn fit(points: &VecDeque<(f64, f64)>) -> Option<f64> {
    let n = points.len() as f64;
    let (x, y) = points.iter().fold((0.0, 0.0), |(x, y), p| (x + p.0 / n, y + p.1 / n));
    let (over, under) = points.iter().fold((0.0, 0.0), |(a, b), p| (a + (p.0 - x) * (p.1 - y), b + (p.0 - x).powi(2)));
    (under > 0.0).then(|| over / under)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Packets every 10 ms whose delay grows by `growth` ms each; returns when the detector said what, in ms.
    fn run(growth: impl Fn(u64) -> f64, packets: u64) -> Vec<(u64, Usage)> {
        let t0 = Instant::now();
        let mut trend = Trend::new();
        let mut delay = 20.0;
        (0..packets)
            .map(|n| {
                delay += growth(n);
                let arrival = Duration::from_secs_f64((n as f64 * 10.0 + delay) / 1e3);
                (n * 10, trend.packet(t0 + Duration::from_millis(n * 10), arrival))
            })
            .collect()
    }

    #[test]
    fn a_steady_path_is_normal_even_with_jitter() {
        assert!(run(|_| 0.0, 1000).iter().all(|(_, u)| *u == Usage::Normal));
        // ±2 ms of jitter that does not add up.
        let jitter = |n: u64| if n % 2 == 0 { 2.0 } else { -2.0 };
        assert!(run(jitter, 1000).iter().all(|(_, u)| *u != Usage::Over));
    }

    #[test]
    fn an_overload_of_a_quarter_is_seen_within_half_a_second() {
        let out = run(|n| if n < 100 { 0.0 } else { 2.5 }, 300);
        let first = out.iter().find(|(_, u)| *u == Usage::Over).expect("overuse is seen").0;
        assert!((1000..1500).contains(&first), "{first}");
        let drained = run(|n| if n < 100 { 2.0 } else { -1.5 }, 200);
        assert!(drained.iter().any(|(_, u)| *u == Usage::Under));
    }

    #[test]
    fn clocks_that_jump_are_not_believed() {
        let t0 = Instant::now();
        let mut trend = Trend::new();
        for n in 0..200u64 {
            let jump = if n < 100 { 50_000 } else { 0 };
            let usage = trend.packet(t0 + Duration::from_millis(n * 10), Duration::from_millis(n * 10 + jump));
            assert_eq!(usage, Usage::Normal);
        }
    }
}
