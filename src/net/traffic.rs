//! Our place in the WebRTC library's packet chain: everything that is sent and every report received passes here. A thin
//! adapter; the decisions are made by [`Flow`] and [`MediaClock`](super::clock::MediaClock).
//!
//! It stands where the library's pacer would (everything that generates packets is above it) and does the work of its pacer,
//! NACK responder, transport-wide numbering, congestion control and sender reports. The library's numbering knows nothing
//! of retransmission streams, so retransmissions would stay unseen by the estimator; here they are numbered like the rest.

use super::{
    congestion::{Flow, Kind, Unit},
    packetise::starts_keyframe,
    shared::{Shared, lock},
};
use crate::session::LinkEvent;
use rtc::{
    interceptor::{AttributedPacket, Interceptor, Packet, StreamInfo, TaggedPacket, convert_twcc},
    rtcp::{
        self,
        payload_feedbacks::{full_intra_request::FullIntraRequest, picture_loss_indication::PictureLossIndication},
        receiver_report::ReceiverReport,
        reception_report::ReceptionReport,
        sender_report::SenderReport,
        transport_feedbacks::{transport_layer_cc::TransportLayerCc, transport_layer_nack::TransportLayerNack},
    },
    rtp,
    sansio::Protocol,
    sdp::extmap::TRANSPORT_CC_URI,
    shared::error::Error,
};
use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

/// Time between sender reports; the first follow quickly so that the receiver can align lips and voice from the start.
const REPORT_GAP: Duration = Duration::from_millis(1000);
const FIRST_REPORTS_GAP: Duration = Duration::from_millis(200);
const FIRST_REPORTS: u32 = 5;
/// A keyframe that was asked for and has not come by then is asked for again.
const KEYFRAME_PATIENCE: Duration = Duration::from_millis(600);

pub(super) struct Traffic {
    shared: Arc<Shared>,
    flow: Flow<rtp::Packet>,
    /// The newest time seen.
    now: Instant,
    /// Header extension ids of the transport-wide number on voice and video.
    numbers: (Option<u8>, Option<u8>),
    /// Payload type and next sequence number of the retransmission stream.
    rtx: Option<(u8, u16)>,
    asked: Option<Instant>,
    announced: (f64, Instant),
    resent: ResentRate,
    reports: Reports,
    read: VecDeque<TaggedPacket>,
    write: VecDeque<TaggedPacket>,
}

/// When to send sender reports, and what was sent: (packets, octets) for voice and video.
#[derive(Default)]
struct Reports {
    next: Option<Instant>,
    sent: u32,
    audio: (u32, u32),
    video: (u32, u32),
}

/// Bits per second that retransmissions take, so that the encoder can leave room for them.
struct ResentRate {
    since: Instant,
    bytes: usize,
    rate: f64,
}

impl ResentRate {
    fn add(&mut self, now: Instant, bytes: usize) {
        self.bytes += bytes;
        let span = now.saturating_duration_since(self.since).as_secs_f64();
        if span > 0.5 {
            self.rate = 0.5 * self.rate + 0.5 * self.bytes as f64 * 8.0 / span;
            (self.since, self.bytes) = (now, 0);
        }
    }
}

/// What a feedback message says: (number, arrival on the receiver's clock or `None` for missing).
///
/// The last chunk of a message is filled up with zeros beyond the packets it speaks of. The library hands these on as lost
/// packets (packets that are still under way, or were never sent), so they are cut off here.
fn entries(feedback: &TransportLayerCc) -> impl Iterator<Item = (u16, Option<Duration>)> {
    let all = convert_twcc(feedback).into_iter().take(usize::from(feedback.packet_status_count));
    // Received without a usable time counts as neither received nor lost.
    all.filter(|a| a.arrival.is_some() == a.arrived).map(|a| (a.sequence_number, a.arrival))
}

impl Traffic {
    pub(super) fn new(now: Instant, shared: Arc<Shared>, first_sequence: u16) -> Self {
        let limits = shared.limits;
        Traffic {
            shared,
            flow: Flow::new(limits, first_sequence),
            now,
            numbers: (None, None),
            rtx: None,
            asked: None,
            announced: (limits.start, now),
            resent: ResentRate { since: now, bytes: 0, rate: 0.0 },
            reports: Reports::default(),
            read: VecDeque::new(),
            write: VecDeque::new(),
        }
    }

    fn want_keyframe(&mut self, now: Instant) {
        self.asked = Some(now);
        self.shared.want_keyframe(now);
    }

    fn feedback(&mut self, now: Instant, packet: &dyn rtcp::Packet) {
        let any = packet.as_any();
        if any.is::<PictureLossIndication>() || any.is::<FullIntraRequest>() {
            self.want_keyframe(now);
        } else if let Some(report) = any.downcast_ref::<ReceiverReport>() {
            self.reception(now, &report.reports);
        } else if let Some(report) = any.downcast_ref::<SenderReport>() {
            self.reception(now, &report.reports);
        } else if let Some(nack) = any.downcast_ref::<TransportLayerNack>() {
            if nack.media_ssrc == self.shared.video.0 {
                let sequences = nack.nacks.iter().flat_map(|pair| {
                    let set = (0..16u16).filter(|bit| pair.lost_packets & (1 << bit) != 0);
                    std::iter::once(pair.packet_id).chain(set.map(|bit| pair.packet_id.wrapping_add(bit + 1)))
                });
                self.flow.nack(now, sequences);
            }
        } else if let Some(feedback) = any.downcast_ref::<TransportLayerCc>() {
            if self.flow.feedback(now, entries(feedback)) {
                self.want_keyframe(now);
            }
        }
    }

    fn reception(&mut self, now: Instant, reports: &[ReceptionReport]) {
        for report in reports {
            let ours = [self.shared.audio.0, self.shared.video.0].contains(&report.ssrc);
            if !ours {
                continue;
            }
            let round_trip = lock(&self.shared.clock).round_trip(now, report.last_sender_report, report.delay);
            let mut stats = lock(&self.shared.stats);
            if let Some(rtt) = round_trip {
                stats.round_trip = Some(stats.round_trip.map_or(rtt, |old| (old * 3 + rtt) / 4));
            }
            let smoothed = stats.round_trip;
            // 24 bits, signed: duplicates can make it negative.
            let total = i64::from((report.total_lost << 8) as i32 >> 8).max(0) as u64;
            let slot = if report.ssrc == self.shared.video.0 { 1 } else { 0 };
            self.shared.lost_out[slot].store(total, Relaxed);
            drop(stats);
            if slot == 1 {
                self.flow.reception(now, f64::from(report.fraction_lost) / 256.0, smoothed);
            }
        }
    }

    /// Lets go what is due, and tells the session what has changed.
    fn pump(&mut self, now: Instant) {
        self.now = self.now.max(now);
        while let Some(release) = self.flow.next(now) {
            let mut packet = release.packet;
            match release.kind {
                Kind::Media { sequence } => {
                    packet.header.sequence_number = sequence;
                    self.count(now, true, packet.payload.len());
                    if packet.header.marker {
                        *lock(&self.shared.stats).sent_pictures.get_or_insert(0) += 1;
                    }
                }
                Kind::Again { original, padding } => {
                    if let Some((payload_type, next)) = &mut self.rtx {
                        let mut payload = Vec::with_capacity(2 + packet.payload.len());
                        payload.extend_from_slice(&original.to_be_bytes());
                        payload.extend_from_slice(&packet.payload);
                        packet.header.ssrc = self.shared.video_rtx;
                        packet.header.payload_type = *payload_type;
                        packet.header.sequence_number = *next;
                        *next = next.wrapping_add(1);
                        packet.payload = payload.into();
                    } else {
                        // A peer without RTX gets the packet as it was.
                        packet.header.sequence_number = original;
                    }
                    if !padding {
                        self.resent.add(now, packet.payload.len());
                    }
                }
            }
            self.send(now, packet, self.numbers.1, release.number);
        }
        self.resent.add(now, 0);
        self.tell(now);
    }

    fn send(&mut self, now: Instant, mut packet: rtp::Packet, extension: Option<u8>, number: u16) {
        if let Some(id) = extension {
            // Fails only for ids that negotiation does not give.
            let _ = packet.header.set_extension(id, bytes::Bytes::copy_from_slice(&number.to_be_bytes()));
        }
        let message = AttributedPacket::new(Packet::Rtp(packet));
        self.write.push_back(TaggedPacket { now, transport: Default::default(), message });
    }

    fn tell(&mut self, now: Instant) {
        let target = self.flow.target();
        self.shared.target.store(target as u32, Relaxed);
        {
            let mut stats = lock(&self.shared.stats);
            stats.retransmitted = self.flow.resent;
            stats.nacks_refused = self.flow.nacks_refused();
            stats.pacer_queue = self.flow.queue();
        }
        let media = (target - self.resent.rate).max(0.6 * target);
        let change = media / self.announced.0;
        let age = now.saturating_duration_since(self.announced.1);
        if change < 0.97 || change > 1.05 || (age > Duration::from_secs(1) && (change - 1.0).abs() > 0.005) {
            self.announced = (media, now);
            self.shared.events.send(LinkEvent::TargetBitrate(media as u32));
        }
    }

    fn count(&mut self, now: Instant, video: bool, octets: usize) {
        let count = if video { &mut self.reports.video } else { &mut self.reports.audio };
        *count = (count.0.wrapping_add(1), count.1.wrapping_add(octets as u32));
        self.reports.next.get_or_insert(now + Duration::from_millis(20));
        let mut stats = lock(&self.shared.stats);
        stats.sent_packets += 1;
        stats.sent_bytes += octets as u64;
    }

    fn report(&mut self, now: Instant) {
        if self.reports.next.is_none_or(|next| next > now) {
            return;
        }
        self.reports.sent += 1;
        let gap = if self.reports.sent < FIRST_REPORTS { FIRST_REPORTS_GAP } else { REPORT_GAP };
        self.reports.next = Some(now + gap);
        let clock = lock(&self.shared.clock);
        let streams = [(self.shared.audio, self.reports.audio), (self.shared.video, self.reports.video)];
        for ((ssrc, rtp), sent) in streams.into_iter().filter(|(_, sent)| sent.0 > 0) {
            if let Some(report) = clock.report(now, ssrc, rtp, sent) {
                let message = AttributedPacket::new(Packet::Rtcp(vec![Box::new(report)]));
                self.write.push_back(TaggedPacket { now, transport: Default::default(), message });
            }
        }
    }
}

impl Protocol<TaggedPacket, TaggedPacket, ()> for Traffic {
    type Rout = TaggedPacket;
    type Wout = TaggedPacket;
    type Eout = ();
    type Error = Error;
    type Time = Instant;

    fn handle_read(&mut self, msg: TaggedPacket) -> Result<(), Error> {
        if let Packet::Rtcp(packets) = &msg.message.packet {
            for packet in packets {
                self.feedback(msg.now, packet.as_ref());
            }
            self.pump(msg.now);
        }
        self.read.push_back(msg);
        Ok(())
    }

    fn poll_read(&mut self) -> Option<TaggedPacket> {
        self.read.pop_front()
    }

    fn handle_write(&mut self, msg: TaggedPacket) -> Result<(), Error> {
        let now = msg.now;
        match msg.message.packet {
            Packet::Rtp(packet) if packet.header.ssrc == self.shared.audio.0 => {
                let size = packet.payload.len();
                self.count(now, false, size);
                let number = self.flow.voice(now, size);
                self.send(now, packet, self.numbers.0, number);
            }
            Packet::Rtp(packet) if packet.header.ssrc == self.shared.video.0 => {
                let unit = Unit {
                    size: packet.payload.len(),
                    frame: packet.header.timestamp,
                    opens_keyframe: starts_keyframe(&packet.payload),
                };
                let flushed = self.flow.video(unit, packet);
                let impatient = self.flow.awaits_keyframe()
                    && self.asked.is_none_or(|at| now.saturating_duration_since(at) > KEYFRAME_PATIENCE);
                if flushed || impatient {
                    self.want_keyframe(now);
                }
            }
            packet => {
                let message = AttributedPacket { packet, attributes: msg.message.attributes };
                self.write.push_back(TaggedPacket { message, ..msg });
                return Ok(());
            }
        }
        self.pump(now);
        Ok(())
    }

    fn poll_write(&mut self) -> Option<TaggedPacket> {
        self.write.pop_front()
    }

    fn handle_timeout(&mut self, now: Instant) -> Result<(), Error> {
        self.pump(now);
        self.report(now);
        let shared = self.shared.clone();
        shared.pass_keyframe_request(&mut lock(&shared.keyframes), now);
        Ok(())
    }

    fn poll_timeout(&mut self) -> Option<Instant> {
        let keyframe = lock(&self.shared.keyframes).due();
        [self.reports.next, keyframe, self.flow.due(self.now)].into_iter().flatten().min()
    }
}

impl Interceptor for Traffic {
    fn bind_local_stream(&mut self, info: &StreamInfo) {
        let number = info.rtp_header_extensions.iter().find(|e| e.uri == TRANSPORT_CC_URI);
        let number = number.and_then(|e| u8::try_from(e.id).ok()).filter(|id| *id != 0);
        if info.ssrc == self.shared.audio.0 {
            self.numbers.0 = number;
        } else if info.ssrc == self.shared.video.0 {
            self.numbers.1 = number;
            if let (Some(_), Some(payload_type)) = (info.ssrc_rtx, info.payload_type_rtx) {
                let next = self.rtx.map_or(0, |(_, next)| next);
                self.rtx = Some((payload_type, next));
                self.flow.set_can_pad(number.is_some());
            }
        }
    }
    fn unbind_local_stream(&mut self, _info: &StreamInfo) {}
    fn bind_remote_stream(&mut self, _info: &StreamInfo) {}
    fn unbind_remote_stream(&mut self, _info: &StreamInfo) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use rtc::rtcp::transport_feedbacks::transport_layer_cc::{
        PacketStatusChunk, RecvDelta, StatusChunkTypeTcc, StatusVectorChunk, SymbolSizeTypeTcc, SymbolTypeTcc,
    };

    #[test]
    fn padding_of_the_last_chunk_is_not_loss() {
        let mut symbol_list = vec![SymbolTypeTcc::PacketReceivedSmallDelta, SymbolTypeTcc::PacketNotReceived];
        symbol_list.resize(14, SymbolTypeTcc::PacketNotReceived);
        let feedback = TransportLayerCc {
            base_sequence_number: 7,
            packet_status_count: 2,
            packet_chunks: vec![PacketStatusChunk::StatusVectorChunk(StatusVectorChunk {
                type_tcc: StatusChunkTypeTcc::StatusVectorChunk,
                symbol_size: SymbolSizeTypeTcc::OneBit,
                symbol_list,
            })],
            recv_deltas: vec![RecvDelta { type_tcc_packet: SymbolTypeTcc::PacketReceivedSmallDelta, delta: 250 }],
            ..Default::default()
        };
        let entries: Vec<_> = entries(&feedback).collect();
        assert_eq!(entries, [(7, Some(Duration::from_micros(250))), (8, None)]);
    }
}
