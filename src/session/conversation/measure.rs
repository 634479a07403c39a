//! What a conversation measures of itself, about once a second.

use super::{Conversation, Effect};
use crate::session::{LinkStats, SessionEvent, encoder::EncoderReport};
use std::{sync::Arc, time::Instant};

impl Conversation {
    /// Who watches, and the pictures that left for the viewer since the last call where that is known, as of the next
    /// [`Conversation::measure`].
    pub fn audience(&mut self, sinks: usize, (dropped, slowed): (u64, u64), left: Option<u64>) {
        self.left = left;
        let m = &mut self.metrics;
        (m.sinks, m.sink_pictures_dropped, m.sinks_slowed) = (sinks as u64, dropped, slowed);
    }

    /// About once a second: folds in what the encoder and the link measured, tells the page.
    pub fn measure(&mut self, report: &EncoderReport, replaced: u64, link: &LinkStats, now: Instant) {
        let seconds = now.saturating_duration_since(self.measured).as_secs_f64().max(1e-3);
        self.measured = now;
        let rung = self.ladder.rung();
        let m = &mut self.metrics;
        // What was encoded may yet wait, or be dropped, before the viewer's line.
        let sent = self.left.take().unwrap_or(report.frames);
        m.fps = sent as f64 / seconds;
        m.bitrate = (report.bytes as f64 * 8.0 / seconds) as u64;
        m.frames_sent += sent;
        self.ladder.used(m.bitrate);
        if report.frames > 0 {
            smooth(&mut m.encode_ms, report.encode.as_secs_f64() * 1e3 / report.frames as f64, 0.3);
        }
        let mut delays = report.delays.clone();
        delays.sort_unstable();
        let trip = link.round_trip.unwrap_or_default();
        m.delay_server_ms = delays.get(delays.len() / 2).map(|d| d.as_secs_f64() * 1e3);
        m.delay_ms = m.delay_server_ms.map(|d| d + (trip + link.pacer_queue).as_secs_f64() * 1e3);
        m.round_trip_ms = link.round_trip.map(|d| d.as_secs_f64() * 1e3);
        m.lost_out = link.lost_out;
        (m.width, m.height, m.nominal_fps) = (rung.width, rung.height, self.ladder.fps());
        let span = self.geometry.block_span(1).as_secs_f64() * 1e3;
        let frames = f64::from(self.geometry.block_frames);
        // The engine and the encoder work side by side.
        m.real_time_factor = self.pace_ms.max(frames * m.encode_ms) / span;
        if let Some(stage) = &self.stage {
            let (i, p) = (stage.ingest.stats(), stage.playout.stats());
            m.frames_held = p.held.saturating_sub(self.before.0);
            m.frames_skipped = p.skipped.saturating_sub(self.before.1) + self.congested + replaced;
            m.playout_delay_ms = p.delay.as_secs_f64() * 1e3;
            (m.lost_in, m.repaired_in, m.concealed_in_ms) = (i.lost, i.repaired, i.concealed_ms);
            (m.late_in, m.padding_in, m.drift_ppm) = (i.late + i.dropped, i.padding, i.drift_ppm);
        }
        m.interruptions = self.interrupts;
        m.speech_buffered_ms = self.speech.buffered().as_secs_f64() * 1e3;
        if self.machine.flowing() {
            self.effects.push_back(Effect::Message(self.metrics.wire().to_string()));
        }
        self.effects.push_back(Effect::Tell(SessionEvent::Metrics(Arc::new(self.metrics.clone()))));
    }
}

/// Draws a mean towards a new value by `share`; a mean of 0 has seen none yet.
pub(super) fn smooth(mean: &mut f64, new: f64, share: f64) {
    *mean = if *mean == 0.0 { new } else { *mean + share * (new - *mean) };
}
