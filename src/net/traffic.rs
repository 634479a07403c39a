//! Our place in the WebRTC library's packet chain: everything sent and every report received passes here.

use super::shared::{Shared, lock};
use rtc::{
    interceptor::{AttributedPacket, Interceptor, Packet, StreamInfo, TaggedPacket},
    rtcp::{
        self,
        payload_feedbacks::{full_intra_request::FullIntraRequest, picture_loss_indication::PictureLossIndication},
        receiver_report::ReceiverReport,
        reception_report::ReceptionReport,
        sender_report::SenderReport,
    },
    sansio::Protocol,
    shared::error::Error,
};
use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

/// Time between sender reports; the first follow quickly so that the receiver can align lips and voice from the start.
const REPORT_GAP: Duration = Duration::from_millis(1000);
const FIRST_REPORTS_GAP: Duration = Duration::from_millis(200);
const FIRST_REPORTS: u32 = 5;

pub(super) struct Traffic {
    shared: Arc<Shared>,
    reports: Reports,
    read: VecDeque<TaggedPacket>,
    write: VecDeque<TaggedPacket>,
}

/// When to send sender reports, and what was sent: (packets, octets) for audio and video.
#[derive(Default)]
struct Reports {
    next: Option<Instant>,
    sent: u32,
    audio: (u32, u32),
    video: (u32, u32),
}

impl Traffic {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Traffic { shared, reports: Reports::default(), read: VecDeque::new(), write: VecDeque::new() }
    }

    fn feedback(&mut self, now: Instant, packet: &dyn rtcp::Packet) {
        let any = packet.as_any();
        if any.is::<PictureLossIndication>() || any.is::<FullIntraRequest>() {
            self.shared.want_keyframe(now);
        } else if let Some(report) = any.downcast_ref::<ReceiverReport>() {
            self.reception(now, &report.reports);
        } else if let Some(report) = any.downcast_ref::<SenderReport>() {
            self.reception(now, &report.reports);
        }
    }

    fn reception(&mut self, now: Instant, reports: &[ReceptionReport]) {
        for report in reports {
            let round_trip = lock(&self.shared.clock).round_trip(now, report.last_sender_report, report.delay);
            let mut stats = lock(&self.shared.stats);
            if let Some(rtt) = round_trip {
                stats.round_trip = Some(stats.round_trip.map_or(rtt, |old| (old * 3 + rtt) / 4));
            }
        }
    }

    fn sent(&mut self, now: Instant, ssrc: u32, octets: usize) {
        let count = if ssrc == self.shared.audio.0 {
            &mut self.reports.audio
        } else if ssrc == self.shared.video.0 {
            &mut self.reports.video
        } else {
            return;
        };
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
                self.write.push_back(TaggedPacket {
                    now,
                    transport: Default::default(),
                    message: AttributedPacket::new(Packet::Rtcp(vec![Box::new(report)])),
                });
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
        }
        self.read.push_back(msg);
        Ok(())
    }

    fn poll_read(&mut self) -> Option<TaggedPacket> {
        self.read.pop_front()
    }

    fn handle_write(&mut self, msg: TaggedPacket) -> Result<(), Error> {
        if let Packet::Rtp(packet) = &msg.message.packet {
            self.sent(msg.now, packet.header.ssrc, packet.payload.len());
        }
        self.write.push_back(msg);
        Ok(())
    }

    fn poll_write(&mut self) -> Option<TaggedPacket> {
        self.write.pop_front()
    }

    fn handle_timeout(&mut self, now: Instant) -> Result<(), Error> {
        self.report(now);
        let shared = self.shared.clone();
        shared.pass_keyframe_request(&mut lock(&shared.keyframes), now);
        Ok(())
    }

    fn poll_timeout(&mut self) -> Option<Instant> {
        [self.reports.next, lock(&self.shared.keyframes).due()].into_iter().flatten().min()
    }
}

impl Interceptor for Traffic {
    fn bind_local_stream(&mut self, _info: &StreamInfo) {}
    fn unbind_local_stream(&mut self, _info: &StreamInfo) {}
    fn bind_remote_stream(&mut self, _info: &StreamInfo) {}
    fn unbind_remote_stream(&mut self, _info: &StreamInfo) {}
}
