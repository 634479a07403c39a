//! One integer timeline. `Instant` (the wall) is a different type and never appears here.

use std::ops::{Add, AddAssign, Sub};

/// A point or span on the media timeline, in ticks of 1/720 000 s.
///
/// 48 kHz = 15 ticks, 16 kHz = 45, 90 kHz = 8, 25 fps = 28 800, 24 fps = 30 000, 16 fps = 45 000,
/// a 20 ms Opus packet = 14 400: all exact. A timestamp is given once, where speech enters, and carried.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct MediaTime(i64);

impl MediaTime {
    pub const TICKS_PER_SECOND: i64 = 720_000;
    pub const ZERO: MediaTime = MediaTime(0);

    pub const fn from_ticks(ticks: i64) -> Self {
        MediaTime(ticks)
    }
    pub const fn ticks(self) -> i64 {
        self.0
    }
    /// `count` units of a clock that runs at `per_second` (samples, RTP units, frames).
    /// Exact when `per_second` divides 720 000, else rounded toward zero.
    pub const fn from_units(count: i64, per_second: u32) -> Self {
        MediaTime((count as i128 * Self::TICKS_PER_SECOND as i128 / per_second as i128) as i64)
    }
    /// Whole units of a clock at `per_second` contained in this time (floor).
    pub const fn units(self, per_second: u32) -> i64 {
        (self.0 as i128 * per_second as i128).div_euclid(Self::TICKS_PER_SECOND as i128) as i64
    }
    pub const fn from_millis(ms: i64) -> Self {
        MediaTime(ms * (Self::TICKS_PER_SECOND / 1000))
    }
    pub fn as_secs_f64(self) -> f64 {
        self.0 as f64 / Self::TICKS_PER_SECOND as f64
    }
    pub fn as_millis_f64(self) -> f64 {
        self.as_secs_f64() * 1000.0
    }
    /// As a `Duration`; negative times become zero.
    pub fn as_duration(self) -> std::time::Duration {
        let t = self.0.max(0) as u64;
        let per = Self::TICKS_PER_SECOND as u64;
        std::time::Duration::new(t / per, ((t % per) as u128 * 1_000_000_000 / per as u128) as u32)
    }
    pub fn from_duration(d: std::time::Duration) -> Self {
        MediaTime((d.as_nanos() * Self::TICKS_PER_SECOND as u128 / 1_000_000_000) as i64)
    }
}

impl Add for MediaTime {
    type Output = MediaTime;
    fn add(self, o: MediaTime) -> MediaTime {
        MediaTime(self.0 + o.0)
    }
}
impl AddAssign for MediaTime {
    fn add_assign(&mut self, o: MediaTime) {
        self.0 += o.0;
    }
}
impl Sub for MediaTime {
    type Output = MediaTime;
    fn sub(self, o: MediaTime) -> MediaTime {
        MediaTime(self.0 - o.0)
    }
}

/// Raised by an interruption. Work done for an older epoch is dropped on arrival.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Epoch(pub u32);

impl Epoch {
    #[must_use]
    pub fn next(self) -> Epoch {
        Epoch(self.0.wrapping_add(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rate_we_use_is_exact() {
        for rate in [16_000, 48_000, 90_000, 25, 24, 16, 50] {
            assert_eq!(MediaTime::from_units(1, rate).ticks() * i64::from(rate), MediaTime::TICKS_PER_SECOND);
            assert_eq!(MediaTime::from_units(12_345, rate).units(rate), 12_345);
        }
    }

    #[test]
    fn units_floor_also_before_zero() {
        assert_eq!(MediaTime::from_ticks(-1).units(25), -1);
    }
}
