//! The parts put together: one outgoing flow of voice, video and retransmissions.

use super::{
    estimator::{Estimator, Limits},
    history::{Ack, History},
    pacer::{Next, Pacer},
    retransmit::Retransmit,
};
use std::time::{Duration, Instant};

/// Bytes per packet beyond RTP payload: RTP header, extension, SRTP tag.
pub(in crate::net) const OVERHEAD: usize = 12 + 8 + 10;

/// Why a packet leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::net) enum Kind {
    /// Video for the first time; `sequence` is its RTP sequence number. Numbers are given here, as packets leave, so that a
    /// queue thrown away leaves no hole for the receiver to ask about.
    Media { sequence: u16 },
    /// Video again, on the retransmission stream: because it was asked for, or as padding.
    Again { original: u16, padding: bool },
}

/// What is known of a video packet when it is queued.
#[derive(Clone, Copy, Debug)]
pub(in crate::net) struct Unit {
    /// Payload bytes.
    pub(in crate::net) size: usize,
    /// Which access unit (its RTP timestamp).
    pub(in crate::net) frame: u32,
    /// It opens a keyframe (parameter sets or the first slice).
    pub(in crate::net) opens_keyframe: bool,
}

#[derive(Clone, Debug)]
struct Item<P> {
    packet: P,
    size: usize,
    start: bool,
    /// Sequence number once sent.
    sent: Option<u16>,
}

/// What to do with a packet now.
#[derive(Debug)]
pub(in crate::net) struct Release<P> {
    pub(in crate::net) kind: Kind,
    pub(in crate::net) packet: P,
    /// Its transport-wide sequence number.
    pub(in crate::net) number: u16,
}

#[derive(Debug)]
pub(in crate::net) struct Flow<P> {
    estimator: Estimator,
    pacer: Pacer<Item<P>>,
    resend: Retransmit<(P, u16)>,
    history: History,
    sequence: u16,
    /// Frame being queued, and whether it is a keyframe.
    frame: Option<(u32, bool)>,
    /// Id of the probe being sent, and how many packets it has so far.
    probe: Option<(u32, usize)>,
    /// The peer understands retransmissions on a stream of their own, which is what padding needs.
    can_pad: bool,
    outage: bool,
    pub(in crate::net) resent: u64,
}

impl<P: Clone> Flow<P> {
    pub(in crate::net) fn new(limits: Limits, sequence: u16) -> Self {
        Flow {
            estimator: Estimator::new(limits),
            pacer: Pacer::new(limits.start),
            resend: Retransmit::new(),
            history: History::default(),
            sequence,
            frame: None,
            probe: None,
            can_pad: false,
            outage: false,
            resent: 0,
        }
    }

    pub(in crate::net) fn set_can_pad(&mut self, can_pad: bool) {
        self.can_pad = can_pad;
    }

    /// Target for everything, bits per second.
    pub(in crate::net) fn target(&self) -> f64 {
        self.estimator.target()
    }

    /// Time the pacer's queue needs.
    pub(in crate::net) fn queue(&self) -> Duration {
        self.pacer.queue()
    }

    pub(in crate::net) fn nacks_refused(&self) -> u64 {
        self.resend.refused
    }

    /// Whether video is dropped until a keyframe comes.
    pub(in crate::net) fn awaits_keyframe(&self) -> bool {
        self.pacer.awaits_keyframe()
    }

    /// Queues a video packet. True when a keyframe is needed because the queue was thrown away.
    pub(in crate::net) fn video(&mut self, unit: Unit, packet: P) -> bool {
        let same = self.frame.filter(|(frame, _)| *frame == unit.frame);
        let key = same.map_or(unit.opens_keyframe, |(_, key)| key);
        let start = same.is_none() && unit.opens_keyframe;
        self.frame = Some((unit.frame, key));
        let item = Item { packet, size: unit.size + OVERHEAD, start, sent: None };
        self.pacer.push(unit.size + OVERHEAD, key, start, item)
    }

    /// A packet that is not paced (voice) leaves now; returns its transport-wide number.
    pub(in crate::net) fn voice(&mut self, now: Instant, size: usize) -> u16 {
        self.estimator.sent(now);
        self.history.depart(now, size + OVERHEAD, None)
    }

    /// The receiver asks for video packets again.
    pub(in crate::net) fn nack(&mut self, now: Instant, sequences: impl IntoIterator<Item = u16>) {
        let backed_up = self.pacer.queue() > Duration::from_millis(200);
        let round_trip = self.estimator.round_trip();
        let target = self.estimator.target();
        for (size, (packet, sequence)) in self.resend.request(now, sequences, round_trip, target, backed_up) {
            self.pacer.push_first(size, Item { packet, size, start: false, sent: Some(sequence) });
        }
    }

    /// Transport-wide feedback: numbers and arrivals on the receiver's clock. True when a keyframe is needed because the
    /// path came back from an outage.
    pub(in crate::net) fn feedback(
        &mut self,
        now: Instant,
        entries: impl IntoIterator<Item = (u16, Option<Duration>)>,
    ) -> bool {
        let mut acks: Vec<Ack> =
            entries.into_iter().filter_map(|(number, arrival)| self.history.resolve(number, arrival)).collect();
        acks.sort_by_key(|a| a.departure);
        self.estimator.feedback(now, &acks);
        self.pacer.set_target(self.estimator.target());
        self.watch(now)
    }

    /// A receiver report about one of our streams.
    pub(in crate::net) fn reception(&mut self, now: Instant, loss: f64, round_trip: Option<Duration>) {
        if let Some(round_trip) = round_trip {
            self.estimator.set_round_trip(round_trip);
        }
        self.estimator.reception(now, loss);
        self.pacer.set_target(self.estimator.target());
    }

    /// Looks for the beginning and end of an outage. True when it ended.
    fn watch(&mut self, now: Instant) -> bool {
        let outage = self.estimator.outage(now);
        let ended = self.outage && !outage;
        if outage != self.outage {
            self.pacer.suspend(outage);
            self.probe = None;
            self.outage = outage;
        }
        ended
    }

    /// The next packet that leaves now.
    pub(in crate::net) fn next(&mut self, now: Instant) -> Option<Release<P>> {
        self.watch(now);
        if self.can_pad
            && self.probe.is_none()
            && let Some(probe) = self.estimator.probe(now)
        {
            self.pacer.probe(probe.rate, probe.bytes);
            self.probe = Some((probe.id, 0));
        }
        let (item, padding) = match self.pacer.next(now) {
            Next::Send(item) => (item, false),
            Next::Pad => match self.resend.padding() {
                Some((size, (packet, sequence))) => {
                    self.pacer.left(now, size);
                    (Item { packet, size, start: false, sent: Some(sequence) }, true)
                }
                None => {
                    self.pacer.cancel_probe();
                    self.finish_probe(now);
                    return None;
                }
            },
            Next::Wait(_) | Next::Idle => return None,
        };
        self.estimator.sent(now);
        let probe = self.probe.map(|(id, _)| id);
        if let Some((_, packets)) = &mut self.probe {
            *packets += 1;
        }
        let number = self.history.depart(now, item.size, probe);
        if !self.pacer.probing() {
            self.finish_probe(now);
        }
        let kind = match item.sent {
            Some(original) => {
                self.resent += u64::from(!padding);
                Kind::Again { original, padding }
            }
            None => {
                let sequence = self.sequence;
                self.sequence = self.sequence.wrapping_add(1);
                self.resend.keep(now, sequence, item.size + 2, (item.packet.clone(), sequence), item.start);
                return Some(Release { kind: Kind::Media { sequence }, packet: item.packet, number });
            }
        };
        Some(Release { kind, packet: item.packet, number })
    }

    fn finish_probe(&mut self, now: Instant) {
        if let Some((_, packets)) = self.probe.take() {
            self.estimator.probe_sent(now, packets);
        }
    }

    /// When to call [`Self::next`] again.
    pub(in crate::net) fn due(&self, now: Instant) -> Option<Instant> {
        [self.pacer.due(now), self.estimator.due(now)].into_iter().flatten().min()
    }
}
