//! What the device thread measures.

use crate::media::StageTimes;
use std::{collections::VecDeque, sync::Mutex, time::Duration};

/// Upper bounds of the block-time histogram, as a fraction of the block's own length (1 = just in time).
pub const BLOCK_BUCKETS: [f64; 11] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 0.9, 1.0, 1.1, 1.5, 2.0];

/// Blocks over which medians are taken.
const WINDOW: usize = 256;

/// A snapshot.
#[derive(Clone, Debug, Default)]
pub struct EngineStats {
    pub slots: usize,
    pub used: usize,
    /// Blocks made since the start, warm-up not counted.
    pub blocks: u64,
    /// Time to make a block over the time it shows, smoothed over about 20 blocks; warm-up gives the first value.
    pub real_time_factor: f64,
    /// Medians of the last 256 blocks.
    pub stages: StageTimes,
    pub block_median: Duration,
    pub block_p95: Duration,
    /// Blocks by their time over their length, cumulative like a Prometheus histogram, bounds [`BLOCK_BUCKETS`].
    pub block_buckets: [u64; BLOCK_BUCKETS.len()],
    /// Sum of all block times.
    pub block_time_total: Duration,
    /// From complete speech to finished block: newest and worst since the start.
    pub lag: Duration,
    pub worst_lag: Duration,
    /// Bytes free on each card that the engine uses, about a second old; empty where it uses none.
    pub cards_free: Vec<u64>,
    /// Samples of speech the device has taken.
    pub samples_in: u64,
}

#[derive(Default)]
pub(super) struct Meter(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    stats: EngineStats,
    recent: VecDeque<(Duration, StageTimes)>,
}

impl Meter {
    /// `span`: what the block shows. `lag` is `None` for warm-up blocks, which enter only the real-time factor.
    pub(super) fn block(&self, took: Duration, span: Duration, stages: StageTimes, lag: Option<Duration>) {
        let mut inner = self.lock();
        let ratio = took.as_secs_f64() / span.as_secs_f64().max(1e-9);
        let s = &mut inner.stats;
        s.real_time_factor += (ratio - s.real_time_factor) * if s.real_time_factor == 0.0 { 1.0 } else { 0.05 };
        let Some(lag) = lag else {
            // The first blocks touch cold memory: the last one of the warm-up is the one to believe.
            s.real_time_factor = ratio;
            return;
        };
        s.blocks += 1;
        s.block_time_total += took;
        s.lag = lag;
        s.worst_lag = s.worst_lag.max(lag);
        for (count, bound) in s.block_buckets.iter_mut().zip(BLOCK_BUCKETS) {
            *count += u64::from(ratio <= bound);
        }
        inner.recent.push_back((took, stages));
        if inner.recent.len() > WINDOW {
            inner.recent.pop_front();
        }
    }

    pub(super) fn cards(&self, free: Vec<u64>) {
        self.lock().stats.cards_free = free;
    }

    pub(super) fn heard(&self, samples: usize) {
        self.lock().stats.samples_in += samples as u64;
    }

    pub(super) fn stats(&self, slots: usize, used: usize) -> EngineStats {
        let inner = self.lock();
        let quantile = |q: f64, of: &dyn Fn(&(Duration, StageTimes)) -> Duration| {
            let mut all: Vec<Duration> = inner.recent.iter().map(of).collect();
            all.sort_unstable();
            all.get(((all.len() as f64 * q) as usize).min(all.len().saturating_sub(1))).copied().unwrap_or_default()
        };
        EngineStats {
            slots,
            used,
            stages: StageTimes {
                features: quantile(0.5, &|r| r.1.features),
                generation: quantile(0.5, &|r| r.1.generation),
                decode: quantile(0.5, &|r| r.1.decode),
                busiest: None,
            },
            block_median: quantile(0.5, &|r| r.0),
            block_p95: quantile(0.95, &|r| r.0),
            ..inner.stats.clone()
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_buckets_and_lag_follow_the_blocks() {
        let meter = Meter::default();
        let ms = Duration::from_millis;
        meter.block(ms(400), ms(160), StageTimes::default(), None);
        meter.block(ms(80), ms(160), StageTimes::default(), None);
        assert_eq!(meter.stats(2, 0).real_time_factor, 0.5);
        for i in 1..=101 {
            let stages = StageTimes { decode: ms(i), ..StageTimes::default() };
            meter.block(ms(2 * i), ms(160), stages, Some(ms(i)));
        }
        let s = meter.stats(2, 1);
        assert_eq!((s.slots, s.used, s.blocks), (2, 1, 101));
        assert_eq!((s.stages.decode, s.block_median), (ms(51), ms(102)));
        assert_eq!((s.lag, s.worst_lag), (ms(101), ms(101)));
        assert_eq!(s.block_buckets, [8, 16, 24, 32, 40, 60, 72, 80, 88, 101, 101]);
    }
}
