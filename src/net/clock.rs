//! Media time, RTP timestamps and NTP: one mapping for both streams, so that what has one media time is played at one
//! moment however long the pacer held either of them.

use crate::media::MediaTime;
use rtc::rtcp::sender_report::SenderReport;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Seconds from 1900 (NTP) to 1970 (Unix).
const NTP_OFFSET: u64 = 2_208_988_800;

/// One outgoing stream's RTP clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct RtpClock {
    /// Units per second: 90 000 for video, 48 000 for Opus.
    pub(super) rate: u32,
    /// The random timestamp of media time zero (RFC 3550 §5.1).
    pub(super) offset: u32,
}

impl RtpClock {
    /// RTP timestamp of a media time.
    pub(super) fn timestamp(self, at: MediaTime) -> u32 {
        self.offset.wrapping_add(at.units(self.rate) as u32)
    }
}

/// When media time is due on the wall, as the session said last; and the wall as NTP.
#[derive(Debug)]
pub(super) struct MediaClock {
    base: (Instant, Duration),
    anchor: Option<(MediaTime, Instant)>,
    by_audio: bool,
}

impl MediaClock {
    /// `now` and `unix` are the same moment.
    pub(super) fn new(now: Instant, unix: SystemTime) -> Self {
        MediaClock { base: (now, unix.duration_since(UNIX_EPOCH).unwrap_or_default()), anchor: None, by_audio: false }
    }

    /// Media time `at` is due at `wall`. The voice is the clock: once audio has spoken, video's word is not taken.
    pub(super) fn anchor(&mut self, at: MediaTime, wall: Instant, audio: bool) {
        if audio || !self.by_audio {
            self.anchor = Some((at, wall));
            self.by_audio |= audio;
        }
    }

    /// NTP timestamp (32.32 bits) of an instant.
    pub(super) fn ntp(&self, at: Instant) -> u64 {
        let unix = match at.checked_duration_since(self.base.0) {
            Some(after) => self.base.1 + after,
            None => self.base.1.saturating_sub(self.base.0 - at),
        };
        ((unix.as_secs() + NTP_OFFSET) << 32) | ((u64::from(unix.subsec_nanos()) << 32) / 1_000_000_000)
    }

    /// Media time due at `now`; `None` before the first anchor.
    pub(super) fn media(&self, now: Instant) -> Option<MediaTime> {
        let (at, wall) = self.anchor?;
        Some(match now.checked_duration_since(wall) {
            Some(after) => at + MediaTime::from_duration(after),
            None => at - MediaTime::from_duration(wall - now),
        })
    }

    /// A sender report for one stream; `None` before the first anchor.
    pub(super) fn report(&self, now: Instant, ssrc: u32, clock: RtpClock, sent: (u32, u32)) -> Option<SenderReport> {
        Some(SenderReport {
            ssrc,
            ntp_time: self.ntp(now),
            rtp_time: clock.timestamp(self.media(now)?),
            packet_count: sent.0,
            octet_count: sent.1,
            ..Default::default()
        })
    }

    /// Round trip told by a receiver report: `last_sr` are the middle 32 bits of the NTP time of our report it answers,
    /// `delay` how long the peer held it, both in units of 1/65536 s.
    pub(super) fn round_trip(&self, now: Instant, last_sr: u32, delay: u32) -> Option<Duration> {
        if last_sr == 0 {
            return None;
        }
        let units = ((self.ntp(now) >> 16) as u32).wrapping_sub(last_sr).wrapping_sub(delay);
        // A peer that rounds its delay up gives a tiny negative value; anything above 10 s is nonsense too.
        (units < 10 << 16).then(|| Duration::from_secs_f64(f64::from(units) / 65536.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn audio_and_video_of_one_media_time_get_one_wall_time() {
        let t0 = Instant::now();
        let mut clock = MediaClock::new(t0, UNIX_EPOCH + Duration::from_secs(1_700_000_000));
        assert!(clock.report(t0, 1, RtpClock { rate: 90_000, offset: 0 }, (0, 0)).is_none());
        let video = RtpClock { rate: 90_000, offset: u32::MAX - 5 };
        let audio = RtpClock { rate: 48_000, offset: 77 };
        clock.anchor(MediaTime::from_millis(1000), t0 + Duration::from_millis(500), false);
        clock.anchor(MediaTime::from_millis(1020), t0 + Duration::from_millis(520), true);
        // Video that is late on the wall does not move the mapping once audio rules it.
        clock.anchor(MediaTime::from_millis(1000), t0 + Duration::from_millis(900), false);
        let now = t0 + Duration::from_millis(2520);
        let v = clock.report(now, 1, video, (3, 4)).unwrap();
        let a = clock.report(now, 2, audio, (5, 6)).unwrap();
        assert_eq!(v.ntp_time, a.ntp_time);
        assert_eq!(v.rtp_time, video.timestamp(MediaTime::from_millis(3020)));
        assert_eq!(a.rtp_time, audio.timestamp(MediaTime::from_millis(3020)));
        assert_eq!((v.packet_count, v.octet_count), (3, 4));
        // Before the anchor's wall as well.
        assert_eq!(clock.media(t0), Some(MediaTime::from_millis(500)));
    }

    #[test]
    fn ntp_and_round_trip() {
        let t0 = Instant::now();
        let clock = MediaClock::new(t0, UNIX_EPOCH + Duration::from_millis(1_500));
        assert_eq!(clock.ntp(t0), ((NTP_OFFSET + 1) << 32) | (1 << 31));
        let sent = (clock.ntp(t0) >> 16) as u32;
        let now = t0 + Duration::from_millis(250);
        let rtt = clock.round_trip(now, sent, 65536 / 10).unwrap();
        assert!((rtt.as_secs_f64() - 0.150).abs() < 0.001, "{rtt:?}");
        assert_eq!(clock.round_trip(now, 0, 0), None);
        assert_eq!(clock.round_trip(t0, sent, 65536), None);
    }
}
