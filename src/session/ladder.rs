//! Bitrate → size, rate and bitrate of the picture. Steps down after a few seconds of too little, up again after
//! longer and with more to spare, so that it does not flutter.

use super::Config;
use crate::media::Geometry;
use std::time::{Duration, Instant};

/// What the encoder is asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rung {
    pub width: u32,
    pub height: u32,
    /// Every n-th picture is sent.
    pub every: u32,
}

/// Too little for this long: one step down.
const DOWN_AFTER: Duration = Duration::from_secs(3);
/// Enough for the step above for this long: one step up. A step that had to be taken back doubles it.
const UP_AFTER: Duration = Duration::from_secs(8);
const UP_AFTER_MOST: Duration = Duration::from_secs(60);
/// Bits per pixel below which a talking face looks bad, and what the step above needs to be tried.
const TOO_FEW_BITS: f64 = 0.045;
const ENOUGH_BITS: f64 = 0.065;
/// Bits per pixel above which nothing is gained.
const PLENTY_BITS: f64 = 0.5;
/// Below this share of the bitrate the encoder is not short of bits.
const PRESSED: f64 = 0.7;
/// Packets per second times header bytes of the voice (RTP, UDP, IP, DTLS tag), in bits.
const VOICE_OVERHEAD: u32 = 50 * 54 * 8;
/// Share of the rest that headers of the pictures and repairs take.
const VIDEO_SHARE: f64 = 0.90;

/// See the module.
#[derive(Clone, Debug)]
pub struct Ladder {
    rungs: Vec<Rung>,
    fps: f64,
    at: usize,
    poor_since: Option<Instant>,
    rich_since: Option<Instant>,
    up_after: Duration,
    stepped_up: Option<Instant>,
    voice: u32,
    least: u32,
    most: u32,
    bitrate: u32,
    /// Bits per second the encoder really made; a face at rest needs little, and then little is enough.
    used: Option<u64>,
}

impl Ladder {
    pub fn new(geometry: &Geometry, config: &Config) -> Self {
        let (w, h) = (geometry.width, geometry.height);
        // 4:2:0 in whole macroblocks of 16 where the size allows it.
        let scaled = |num: u32, den: u32| {
            let side = |s: u32| ((s * num / den) / 16 * 16).max(16).min(s);
            (side(w), side(h))
        };
        let mut rungs = vec![Rung { width: w, height: h, every: 1 }, Rung { width: w, height: h, every: 2 }];
        for (num, den) in [(3, 4), (5, 8)] {
            let (width, height) = scaled(num, den);
            rungs.push(Rung { width, height, every: 2 });
        }
        let fps = f64::from(geometry.fps);
        let by_size = f64::from(w * h) * fps * PLENTY_BITS;
        let most = if config.video_max_bitrate > 0 { config.video_max_bitrate } else { by_size as u32 };
        let least = config.video_min_bitrate.max(20_000);
        let most = most.max(least);
        Ladder {
            rungs,
            fps,
            at: 0,
            poor_since: None,
            rich_since: None,
            up_after: UP_AFTER,
            stepped_up: None,
            voice: config.voice_bitrate + VOICE_OVERHEAD,
            least,
            most,
            bitrate: most,
            used: None,
        }
    }

    pub fn rung(&self) -> Rung {
        self.rungs[self.at]
    }

    /// Bits per second for the pictures now.
    pub fn bitrate(&self) -> u32 {
        self.bitrate
    }

    /// The highest bitrate that will ever be asked for.
    pub fn most(&self) -> u32 {
        self.most
    }

    /// Pictures per second now.
    pub fn fps(&self) -> f64 {
        self.fps / f64::from(self.rung().every)
    }

    /// Several lines and nobody's estimate: the most that is configured.
    pub fn unbound(&mut self) {
        self.bitrate = self.most;
    }

    /// A new estimate for everything that is sent, bits per second.
    pub fn target(&mut self, total: u32) {
        let rest = f64::from(total.saturating_sub(self.voice)) * VIDEO_SHARE;
        self.bitrate = (rest as u32).clamp(self.least, self.most);
    }

    /// What the encoder made of it in the last second, bits per second.
    pub fn used(&mut self, bits: u64) {
        self.used = Some(bits);
    }

    fn bits_per_pixel(&self, rung: usize) -> f64 {
        let r = self.rungs[rung];
        f64::from(self.bitrate) * f64::from(r.every) / (f64::from(r.width * r.height) * self.fps)
    }

    /// To be called about once a second or oftener; whether the rung changed.
    pub fn settle(&mut self, now: Instant) -> bool {
        let pressed = self.used.is_none_or(|used| used as f64 > PRESSED * f64::from(self.bitrate));
        let poor = pressed && self.bits_per_pixel(self.at) < TOO_FEW_BITS && self.at + 1 < self.rungs.len();
        let rich = self.at > 0 && self.bits_per_pixel(self.at - 1) >= ENOUGH_BITS;
        let since = |was: Option<Instant>, is: bool| if is { Some(was.unwrap_or(now)) } else { None };
        self.poor_since = since(self.poor_since, poor);
        self.rich_since = since(self.rich_since, rich);
        let lasted =
            |since: Option<Instant>, long: Duration| since.is_some_and(|s| now.saturating_duration_since(s) >= long);
        if lasted(self.poor_since, DOWN_AFTER) {
            // A step up that did not hold: wait longer before the next.
            let taken_back = self.stepped_up.take().is_some_and(|t| now.saturating_duration_since(t) < 3 * UP_AFTER);
            self.up_after = if taken_back { (2 * self.up_after).min(UP_AFTER_MOST) } else { UP_AFTER };
            self.at += 1;
        } else if lasted(self.rich_since, self.up_after) {
            self.stepped_up = Some(now);
            self.at -= 1;
        } else {
            return false;
        }
        self.poor_since = None;
        self.rich_since = None;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::MediaTime;

    fn ladder() -> Ladder {
        let geometry = Geometry {
            width: 256,
            height: 256,
            fps: 25,
            first_block_frames: 4,
            block_frames: 4,
            look_ahead: MediaTime::from_millis(126),
            matte: false,
        };
        Ladder::new(&geometry, &Config::default())
    }

    #[test]
    fn steps_down_rate_first_then_size_and_back_up_slowly() {
        let (mut l, t, s) = (ladder(), Instant::now(), Duration::from_secs);
        let mut seen = Vec::new();
        for k in 0..20 {
            l.target(110_000);
            if l.settle(t + s(k)) {
                seen.push((k, l.rung().width, l.rung().every));
            }
        }
        assert_eq!(seen, [(3, 256, 2)], "60 kbit/s: half the rate is enough at {:.3}", l.bits_per_pixel(1));
        l.bitrate = 20_000;
        for k in 20..40 {
            if l.settle(t + s(k)) {
                seen.push((k, l.rung().width, l.rung().every));
            }
        }
        assert_eq!(seen[1..], [(23, 192, 2), (27, 160, 2)]);
        for k in 40..80 {
            l.target(900_000);
            if l.settle(t + s(k)) {
                seen.push((k, l.rung().width, l.rung().every));
            }
        }
        assert_eq!(seen[3..], [(48, 192, 2), (57, 256, 2), (66, 256, 1)]);
        assert_eq!(l.rung(), Rung { width: 256, height: 256, every: 1 });
        assert!(l.bitrate() <= l.most());
    }

    #[test]
    fn little_is_enough_for_who_needs_little() {
        let (mut l, t) = (ladder(), Instant::now());
        l.target(110_000);
        l.used(20_000);
        assert!((0..20).all(|k| !l.settle(t + Duration::from_secs(k))));
        l.used(55_000);
        assert!((20..30).any(|k| l.settle(t + Duration::from_secs(k))));
    }

    #[test]
    fn a_short_dip_changes_nothing_but_the_bitrate() {
        let (mut l, t) = (ladder(), Instant::now());
        for k in 0..100u64 {
            l.target(if k % 25 < 20 { 60_000 } else { 700_000 });
            assert!(!l.settle(t + Duration::from_millis(100 * k)));
        }
    }
}
