//! Which segment of speech stands where on the timeline, and how far it was played. Pure.

use super::SessionEvent;
use crate::media::MediaTime;
use std::collections::VecDeque;

struct Entry {
    segment: u64,
    /// Stretches of the timeline that hold its sound, in order.
    pieces: VecDeque<(MediaTime, MediaTime)>,
    /// Length of what was played of pieces that are gone.
    played: MediaTime,
    started: bool,
    /// No more pieces will come.
    complete: bool,
}

impl Entry {
    fn pass(&mut self, until: MediaTime) {
        while let Some((from, to)) = self.pieces.front_mut() {
            if *from >= until {
                return;
            }
            self.started = true;
            let end = (*to).min(until);
            self.played += end - *from;
            *from = end;
            if *from >= *to {
                self.pieces.pop_front();
            }
        }
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Ledger {
    entries: VecDeque<Entry>,
}

impl Ledger {
    fn entry(&mut self, segment: u64) -> &mut Entry {
        let at = self.entries.iter().position(|e| e.segment == segment).unwrap_or_else(|| {
            let (pieces, played) = (VecDeque::new(), MediaTime::ZERO);
            self.entries.push_back(Entry { segment, pieces, played, started: false, complete: false });
            self.entries.len() - 1
        });
        &mut self.entries[at]
    }

    /// Sound of a segment was put on the timeline.
    pub(super) fn said(&mut self, segment: u64, from: MediaTime, to: MediaTime) {
        if from < to {
            self.entry(segment).pieces.push_back((from, to));
        }
    }

    /// All sound of a segment is on the timeline.
    pub(super) fn complete(&mut self, segment: u64) {
        self.entry(segment).complete = true;
    }

    /// Whether something is yet to be played.
    pub(super) fn busy(&self) -> bool {
        self.entries.iter().any(|e| !e.pieces.is_empty())
    }

    /// The voice was played up to here.
    pub(super) fn played(&mut self, until: MediaTime) -> Vec<SessionEvent> {
        let mut events = Vec::new();
        self.entries.retain_mut(|entry| {
            let silent_before = !entry.started;
            entry.pass(until);
            let segment = entry.segment;
            let over = entry.complete && entry.pieces.is_empty();
            if silent_before && (entry.started || over) {
                events.push(SessionEvent::SpeakStarted { segment });
            }
            if over {
                let position = entry.played.as_duration();
                events.push(SessionEvent::SpeakEnded { segment, position, interrupted: false });
            }
            !over
        });
        events
    }

    /// Everything was cut off when the voice stood at `until`; `dropped` are segments of which not all, or nothing, had
    /// come to the timeline.
    pub(super) fn interrupt(&mut self, until: MediaTime, dropped: &[u64]) -> Vec<SessionEvent> {
        let mut events = self.played(until);
        for segment in dropped {
            self.entry(*segment);
        }
        for entry in std::mem::take(&mut self.entries) {
            let (segment, position) = (entry.segment, entry.played.as_duration());
            events.push(SessionEvent::SpeakEnded { segment, position, interrupted: true });
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn positions_are_of_what_was_played_gaps_not_counted() {
        let ms = MediaTime::from_millis;
        let mut ledger = Ledger::default();
        ledger.said(1, ms(100), ms(200));
        ledger.said(1, ms(300), ms(350));
        ledger.complete(1);
        ledger.said(2, ms(350), ms(400));
        assert_eq!(ledger.played(ms(100)), []);
        assert_eq!(ledger.played(ms(120)), [SessionEvent::SpeakStarted { segment: 1 }]);
        let ended = |segment, position, interrupted| {
            let position = Duration::from_millis(position);
            SessionEvent::SpeakEnded { segment, position, interrupted }
        };
        let started = SessionEvent::SpeakStarted { segment: 2 };
        assert_eq!(ledger.played(ms(360)), [ended(1, 150, false), started]);
        assert_eq!(ledger.interrupt(ms(380), &[2, 3]), [ended(2, 30, true), ended(3, 0, true)]);
        assert!(!ledger.busy());
    }
}
