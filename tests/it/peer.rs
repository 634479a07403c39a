//! A client of our own for tests: offers a microphone, a receive-only H.264 section and the data channel, sends Opus
//! packets, and keeps everything that arrives with its arrival time. Built on the same WebRTC library as the server but
//! with the library's stock parts, so that ours are tested against something else.

use rtc::{
    interceptor::{Interceptor, Packet, Registry, Slot, StreamInfo, TaggedPacket},
    media_stream::MediaStreamTrack,
    peer_connection::{
        configuration::{interceptor_registry::register_default_interceptors, media_engine::*},
        transport::RTCIceCandidateInit,
    },
    rtcp::{payload_feedbacks::picture_loss_indication::PictureLossIndication, sender_report::SenderReport},
    rtp,
    rtp_transceiver::{RTCRtpTransceiverDirection, RTCRtpTransceiverInit, rtp_sender::*},
    sansio::Protocol,
};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::sync::watch;
use webrtc::{
    data_channel::{DataChannel, DataChannelEvent},
    media_stream::{
        track_local::{TrackLocal, static_rtp::TrackLocalStaticRTP},
        track_remote::{TrackRemote, TrackRemoteEvent},
    },
    peer_connection::*,
};

/// What has arrived so far.
#[derive(Default)]
pub(crate) struct Received {
    pub(crate) audio: Vec<(Instant, rtp::Packet)>,
    pub(crate) video: Vec<(Instant, rtp::Packet)>,
    pub(crate) reports: Vec<(Instant, SenderReport)>,
    pub(crate) messages: Vec<String>,
}

/// An access unit put together from received packets.
#[derive(Debug, PartialEq)]
pub(crate) struct Unit {
    pub(crate) timestamp: u32,
    /// Annex B.
    pub(crate) data: Vec<u8>,
    pub(crate) complete: bool,
}

pub(crate) struct Client {
    pub(crate) pc: Arc<dyn PeerConnection>,
    pub(crate) received: Arc<Mutex<Received>>,
    pub(crate) state: watch::Receiver<RTCPeerConnectionState>,
    microphone: Arc<TrackLocalStaticRTP>,
    channel: Option<Arc<dyn DataChannel>>,
    gathered: watch::Receiver<bool>,
    video: Arc<Mutex<Option<Arc<dyn TrackRemote>>>>,
}

pub(crate) const SPEECH_SSRC: u32 = 0x5eec;
const OPUS_PT: u8 = 111;

impl Client {
    /// A client on loopback that has not offered anything yet.
    pub(crate) async fn new() -> Client {
        Client::new_with(false).await
    }

    /// A client that speaks UDP or, `tcp`, only TCP.
    pub(crate) async fn new_with(tcp: bool) -> Client {
        let mut media = MediaEngine::default();
        media.register_default_codecs().unwrap();
        let received: Arc<Mutex<Received>> = Default::default();
        let registry = register_default_interceptors(Registry::new(), &mut media).unwrap().with(
            Slot::from(900),
            Tap { received: received.clone(), read: Default::default(), write: Default::default() },
        );
        let (gathered_tx, gathered) = watch::channel(false);
        let (state_tx, state) = watch::channel(RTCPeerConnectionState::New);
        let video: Arc<Mutex<Option<Arc<dyn TrackRemote>>>> = Default::default();
        let handler =
            Handler { gathered: gathered_tx, state: state_tx, received: received.clone(), video: video.clone() };
        let settings = SettingEngineBuilder::new()
            .with_include_loopback_candidate(true)
            .with_multicast_dns_mode(rtc::ice::mdns::MulticastDnsMode::Disabled)
            .with_ice_connection_attempts(Some(Duration::from_millis(20)), Some(500))
            .build();
        let pc = PeerConnectionBuilder::new()
            .with_media_engine(media)
            .with_setting_engine(settings)
            .with_interceptor_registry(registry)
            .with_handler(Arc::new(handler))
            .with_udp_addrs(if tcp { vec![] } else { vec!["127.0.0.1:0".to_string()] })
            .with_tcp_addrs(if tcp { vec!["127.0.0.1:0".to_string()] } else { vec![] })
            .build()
            .await
            .unwrap();
        let codec = RTCRtpCodec {
            mime_type: MIME_TYPE_OPUS.into(),
            clock_rate: 48_000,
            channels: 2,
            sdp_fmtp_line: "minptime=10;useinbandfec=1".into(),
            rtcp_feedback: vec![],
        };
        let microphone = Arc::new(TrackLocalStaticRTP::new(MediaStreamTrack::new(
            "mic".into(),
            "mic".into(),
            "mic".into(),
            RtpCodecKind::Audio,
            vec![RTCRtpEncodingParameters {
                rtp_coding_parameters: RTCRtpCodingParameters { ssrc: Some(SPEECH_SSRC), ..Default::default() },
                codec,
                ..Default::default()
            }],
        )));
        Client { pc: Arc::new(pc), received, state, microphone, channel: None, gathered, video }
    }

    /// The usual offer: microphone, receive-only video, data channel `loquent`; candidates included.
    pub(crate) async fn offer(&mut self) -> String {
        self.pc.add_track(self.microphone.clone() as Arc<dyn TrackLocal>).await.unwrap();
        let init = RTCRtpTransceiverInit {
            direction: RTCRtpTransceiverDirection::Recvonly,
            streams: vec![],
            send_encodings: vec![],
        };
        self.pc.add_transceiver_from_kind(RtpCodecKind::Video, Some(init)).await.unwrap();
        self.open_channel().await;
        self.complete_offer().await
    }

    /// A WHEP player's offer: receive-only voice and face.
    pub(crate) async fn player(&mut self) -> String {
        for kind in [RtpCodecKind::Audio, RtpCodecKind::Video] {
            let init = RTCRtpTransceiverInit {
                direction: RTCRtpTransceiverDirection::Recvonly,
                streams: vec![],
                send_encodings: vec![],
            };
            self.pc.add_transceiver_from_kind(kind, Some(init)).await.unwrap();
        }
        self.complete_offer().await
    }

    /// A WHIP publisher's offer: the microphone, nothing back.
    pub(crate) async fn publisher(&mut self) -> String {
        let init = RTCRtpTransceiverInit {
            direction: RTCRtpTransceiverDirection::Sendonly,
            streams: vec![],
            send_encodings: vec![],
        };
        self.pc.add_transceiver_from_track(self.microphone.clone() as Arc<dyn TrackLocal>, Some(init)).await.unwrap();
        self.complete_offer().await
    }

    /// Answers the other side's offer.
    pub(crate) async fn answer(&mut self, offer: &str) -> String {
        self.pc.set_remote_description(RTCSessionDescription::offer(offer.to_string()).unwrap()).await.unwrap();
        let answer = self.pc.create_answer(None).await.unwrap();
        self.pc.set_local_description(answer).await.unwrap();
        self.gathered.wait_for(|g| *g).await.unwrap();
        self.pc.local_description().await.unwrap().sdp
    }

    async fn open_channel(&mut self) {
        let channel = self.pc.create_data_channel(loquent::net::DATA_CHANNEL, None).await.unwrap();
        self.channel = Some(channel.clone());
        let received = self.received.clone();
        tokio::spawn(async move {
            while let Some(event) = channel.poll().await {
                if let DataChannelEvent::OnMessage(message) = event {
                    received.lock().unwrap().messages.push(String::from_utf8_lossy(&message.data).into_owned());
                }
            }
        });
    }

    async fn complete_offer(&mut self) -> String {
        let offer = self.pc.create_offer(None).await.unwrap();
        self.pc.set_local_description(offer).await.unwrap();
        self.gathered.wait_for(|g| *g).await.unwrap();
        self.pc.local_description().await.unwrap().sdp
    }

    pub(crate) async fn accept(&self, answer: &str) {
        self.pc.set_remote_description(RTCSessionDescription::answer(answer.to_string()).unwrap()).await.unwrap();
    }

    /// Adds one candidate line (`a=candidate:…`) of the other side.
    pub(crate) async fn candidate(&self, line: &str) {
        let init = RTCIceCandidateInit {
            candidate: line.trim_start_matches("a=").to_string(),
            sdp_mid: Some("0".into()),
            sdp_mline_index: Some(0),
            username_fragment: None,
            url: None,
        };
        self.pc.add_ice_candidate(init).await.unwrap();
    }

    /// Waits until the connection stands.
    pub(crate) async fn connected(&mut self, within: Duration) -> bool {
        let wait = self.state.wait_for(|s| *s == RTCPeerConnectionState::Connected);
        tokio::time::timeout(within, wait).await.is_ok_and(|r| r.is_ok())
    }

    /// Sends one Opus packet of 20 ms as number `n` of the microphone.
    pub(crate) async fn speak(&self, n: u32, payload: &[u8]) {
        let packet = rtp::Packet {
            header: rtp::header::Header {
                version: 2,
                payload_type: OPUS_PT,
                sequence_number: n as u16,
                timestamp: n.wrapping_mul(960),
                ssrc: SPEECH_SSRC,
                ..Default::default()
            },
            payload: payload.to_vec().into(),
        };
        let _ = self.microphone.write_rtp(packet).await;
    }

    /// Asks for a keyframe.
    pub(crate) async fn picture_loss(&self) {
        let track = self.video.lock().unwrap().clone().expect("no video yet");
        let media_ssrc = track.ssrcs().await[0];
        track.write_rtcp(vec![Box::new(PictureLossIndication { sender_ssrc: 1, media_ssrc })]).await.unwrap();
    }

    pub(crate) async fn message(&self, text: &str) {
        self.channel.as_ref().unwrap().send_text(text).await.unwrap();
    }

    pub(crate) async fn close(&self) {
        self.pc.close().await.unwrap();
    }

    /// The access units received so far, in order of their timestamps.
    pub(crate) fn units(&self) -> Vec<Unit> {
        let received = self.received.lock().unwrap();
        let mut packets: Vec<&rtp::Packet> = received.video.iter().map(|(_, p)| p).collect();
        let first = packets.first().map_or(0, |p| p.header.sequence_number);
        packets.sort_by_key(|p| p.header.sequence_number.wrapping_sub(first) as i16);
        packets.dedup_by_key(|p| p.header.sequence_number);
        let mut units: Vec<Unit> = Vec::new();
        let mut last = None;
        for p in packets {
            let gap =
                last.replace(p.header.sequence_number).is_some_and(|l| p.header.sequence_number != l.wrapping_add(1));
            if units.last().is_none_or(|u| u.timestamp != p.header.timestamp) {
                units.push(Unit { timestamp: p.header.timestamp, data: vec![], complete: false });
            }
            let unit = units.last_mut().unwrap();
            if gap {
                unit.data.clear();
            }
            let start = [0u8, 0, 0, 1];
            match p.payload.first().map(|b| b & 0x1f) {
                Some(24) => {
                    let mut rest = &p.payload[1..];
                    while let [a, b, tail @ ..] = rest {
                        let n = usize::from(u16::from_be_bytes([*a, *b])).min(tail.len());
                        unit.data.extend(start.iter().chain(&tail[..n]));
                        rest = &tail[n..];
                    }
                }
                Some(28) if p.payload.len() > 2 => {
                    if p.payload[1] & 0x80 != 0 {
                        unit.data.extend(start);
                        unit.data.push((p.payload[0] & 0x60) | (p.payload[1] & 0x1f));
                    }
                    unit.data.extend(&p.payload[2..]);
                }
                Some(_) => unit.data.extend(start.iter().chain(&p.payload[..])),
                None => {}
            }
            unit.complete |= p.header.marker;
        }
        units
    }
}

struct Handler {
    gathered: watch::Sender<bool>,
    state: watch::Sender<RTCPeerConnectionState>,
    received: Arc<Mutex<Received>>,
    video: Arc<Mutex<Option<Arc<dyn TrackRemote>>>>,
}

#[async_trait::async_trait]
impl PeerConnectionEventHandler for Handler {
    async fn on_ice_gathering_state_change(&self, state: RTCIceGatheringState) {
        if state == RTCIceGatheringState::Complete {
            let _ = self.gathered.send(true);
        }
    }

    async fn on_connection_state_change(&self, state: RTCPeerConnectionState) {
        let _ = self.state.send(state);
    }

    async fn on_track(&self, track: Arc<dyn TrackRemote>) {
        let video = track.kind().await == RtpCodecKind::Video;
        if video {
            *self.video.lock().unwrap() = Some(track.clone());
        }
        let received = self.received.clone();
        tokio::spawn(async move {
            while let Some(event) = track.poll().await {
                if let TrackRemoteEvent::OnRtpPacket(packet) = event {
                    let mut received = received.lock().unwrap();
                    let list = if video { &mut received.video } else { &mut received.audio };
                    list.push((Instant::now(), packet));
                }
            }
        });
    }
}

/// Keeps sender reports as they come from the wire.
struct Tap {
    received: Arc<Mutex<Received>>,
    read: VecDeque<TaggedPacket>,
    write: VecDeque<TaggedPacket>,
}

impl Protocol<TaggedPacket, TaggedPacket, ()> for Tap {
    type Rout = TaggedPacket;
    type Wout = TaggedPacket;
    type Eout = ();
    type Error = rtc::shared::error::Error;
    type Time = Instant;

    fn handle_read(&mut self, msg: TaggedPacket) -> Result<(), Self::Error> {
        if let Packet::Rtcp(packets) = &msg.message.packet {
            for packet in packets {
                if let Some(report) = packet.as_any().downcast_ref::<SenderReport>() {
                    self.received.lock().unwrap().reports.push((msg.now, report.clone()));
                }
            }
        }
        self.read.push_back(msg);
        Ok(())
    }
    fn poll_read(&mut self) -> Option<TaggedPacket> {
        self.read.pop_front()
    }
    fn handle_write(&mut self, msg: TaggedPacket) -> Result<(), Self::Error> {
        self.write.push_back(msg);
        Ok(())
    }
    fn poll_write(&mut self) -> Option<TaggedPacket> {
        self.write.pop_front()
    }
}

impl Interceptor for Tap {
    fn bind_local_stream(&mut self, _: &StreamInfo) {}
    fn unbind_local_stream(&mut self, _: &StreamInfo) {}
    fn bind_remote_stream(&mut self, _: &StreamInfo) {}
    fn unbind_remote_stream(&mut self, _: &StreamInfo) {}
}
