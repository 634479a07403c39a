//! One peer: its connection, its handlers, its life.

use super::{
    Config, NetError,
    clock::{MediaClock, RtpClock},
    congestion::Limits,
    error::short,
    events::Events,
    out::{self, Out},
    packetise::Stream,
    ports::Lease,
    sdp,
    shared::{Shared, lock},
    speech::SpeechIn,
    traffic::Traffic,
};
use crate::session::{LinkEvent, LinkOut};
use futures::FutureExt;
use rand::RngExt;
use rtc::{
    ice::mdns::MulticastDnsMode,
    interceptor::{NackGeneratorBuilder, ReceiverReportBuilder, Registry, Slot},
    media_stream::MediaStreamTrack,
    peer_connection::{
        configuration::{interceptor_registry::configure_twcc_receiver_only, media_engine::*},
        transport::{RTCDtlsTransportState, RTCIceCandidateInit},
    },
    rtp_transceiver::rtp_sender::*,
};
use std::{
    future::Future,
    net::SocketAddr,
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use webrtc::{
    data_channel::{DataChannel, DataChannelEvent},
    media_stream::{
        track_local::{TrackLocal, static_rtp::TrackLocalStaticRTP},
        track_remote::{TrackRemote, TrackRemoteEvent},
    },
    peer_connection::*,
    rtp_transceiver::RtpSender,
};

/// Label of the data channel that carries our messages. The page creates it, before its offer: then the offer has the
/// application section that a later channel would need a second negotiation for.
pub const DATA_CHANNEL: &str = "loquent";
/// Messages from the page longer than this are dropped.
const MAX_MESSAGE: usize = 16 * 1024;
/// Longest wait for STUN and TURN servers before the answer goes out without their candidates.
const GATHER_TIMEOUT: Duration = Duration::from_secs(2);
/// Between connectivity checks until connected; the library's default of 200 ms is most of the time to connect.
const CHECK_INTERVAL: Duration = Duration::from_millis(40);

/// A connected (or connecting) browser. Dropping it ends the connection.
pub struct Peer {
    pc: Arc<dyn PeerConnection>,
    /// The newest description of the remote side, as text, and the tag of the ICE session it began.
    remote: tokio::sync::Mutex<String>,
    etag: Mutex<String>,
    public_ips: Vec<std::net::IpAddr>,
    stop: CancellationToken,
    ended: watch::Receiver<bool>,
    _guard: DropGuard,
}

/// Opens the connection for a checked offer. Returns the peer, our answer, its events and its sending half.
pub(super) async fn open(
    config: &Config,
    lease: Lease,
    offer: String,
) -> Result<(Peer, String, mpsc::Receiver<LinkEvent>, Arc<dyn LinkOut>), NetError> {
    // Parsed once before any socket is opened.
    guarded(async { RTCSessionDescription::offer(offer.clone()) }).await?.map_err(malformed)?;
    let (events, event_rx) = Events::new();
    let random = || rand::rng().random::<u32>();
    let shared = Arc::new(Shared {
        events,
        clock: Mutex::new(MediaClock::new(Instant::now(), SystemTime::now())),
        keyframes: Default::default(),
        stats: Default::default(),
        connected: AtomicBool::new(false),
        closed: AtomicBool::new(false),
        lost_out: Default::default(),
        lost_in: Default::default(),
        padding_in: Default::default(),
        target: config.start_bitrate.into(),
        audio: (random() | 1, RtpClock { rate: 48_000, offset: random() }),
        video: (random() & !1, RtpClock { rate: 90_000, offset: random() }),
        video_rtx: random(),
        limits: Limits {
            start: config.start_bitrate.into(),
            min: config.min_bitrate.into(),
            max: config.max_bitrate.into(),
        },
    });
    let (gathered_tx, mut gathered) = watch::channel(false);
    let (end_tx, end_rx) = mpsc::channel(1);
    let handler = Arc::new(Handler {
        shared: shared.clone(),
        gathered: gathered_tx,
        end: end_tx,
        microphone: AtomicBool::new(false),
        messages: Mutex::new(None),
    });
    let pc = build(config, &lease, shared.clone(), handler.clone()).await?;
    let negotiated = guarded(negotiate(&pc, &shared, offer.clone(), &mut gathered)).await;
    let Negotiated { answer, video_track, audio_track, video_pt, audio_pt, sender } = match negotiated.and_then(|r| r) {
        Ok(done) => done,
        Err(error) => {
            let _ = pc.close().await;
            return Err(error);
        }
    };
    let stop = CancellationToken::new();
    let video = Stream::new(shared.video.0, video_pt, shared.video.1, random() as u16);
    let audio = Stream::new(shared.audio.0, audio_pt, shared.audio.1, random() as u16);
    let (out, queues) = Out::new(shared.clone(), video, audio, stop.clone());
    *lock(&handler.messages) = Some(queues.messages);
    let (ended_tx, ended) = watch::channel(false);
    tokio::spawn(live(Life {
        pc: pc.clone(),
        shared,
        stop: stop.clone(),
        end: end_rx,
        ended: ended_tx,
        sender,
        write: out::write(queues.video, queues.audio, video_track, audio_track),
        _lease: lease,
    }));
    let peer = Peer {
        pc,
        remote: tokio::sync::Mutex::new(offer),
        etag: Mutex::new(new_etag()),
        public_ips: config.public_ips.clone(),
        _guard: stop.clone().drop_guard(),
        stop,
        ended,
    };
    Ok((peer, sdp::publish(&answer, &config.public_ips), event_rx, Arc::new(out)))
}

impl Peer {
    /// Adds the candidates of a trickle fragment (RFC 8840); those we cannot use are skipped. A fragment with the
    /// credentials of another ICE session is refused.
    ///
    /// # Errors
    /// [`NetError::Malformed`], [`NetError::TooLarge`], [`NetError::Closed`].
    pub async fn trickle(&self, fragment: &str) -> Result<(), NetError> {
        let fragment = sdp::parse_fragment(fragment)?;
        self.open()?;
        let remote = self.remote.lock().await;
        let current = sdp::credentials(&remote);
        if let (Some(ufrag), Some((now, _))) = (&fragment.ufrag, &current)
            && ufrag != now
        {
            return Err(NetError::Malformed("the fragment belongs to another ICE session (its ufrag differs)".into()));
        }
        for (mid, candidate) in fragment.candidates {
            let init = RTCIceCandidateInit {
                candidate,
                sdp_mid: mid,
                sdp_mline_index: None,
                username_fragment: current.as_ref().map(|c| c.0.clone()),
                url: None,
            };
            // RFC 9725 §4.3.1: a candidate that cannot be used is skipped without a word.
            if let Err(error) = guarded(self.pc.add_ice_candidate(init)).await? {
                tracing::debug!(error = %short(error), "a trickled candidate was skipped");
            }
        }
        Ok(())
    }

    /// Restarts ICE with the credentials and candidates of a fragment; returns our fragment. On an error the old session
    /// goes on.
    ///
    /// # Errors
    /// [`NetError::Malformed`] without usable credentials, [`NetError::NotARestart`] with the old ones,
    /// [`NetError::Closed`].
    pub async fn restart(&self, fragment: &str) -> Result<String, NetError> {
        let fragment = sdp::parse_fragment(fragment)?;
        self.open()?;
        let (Some(ufrag), Some(pwd)) = (&fragment.ufrag, &fragment.pwd) else {
            return Err(NetError::Malformed("an ICE restart needs a=ice-ufrag and a=ice-pwd".into()));
        };
        let mut remote = self.remote.lock().await;
        if sdp::credentials(&remote).is_some_and(|(old, _)| old == *ufrag) {
            return Err(NetError::NotARestart);
        }
        let offer = sdp::with_credentials(&remote, ufrag, pwd, &fragment.candidates);
        // Whatever can be wrong with the text is found before the running session is touched.
        let description = guarded(async { RTCSessionDescription::offer(offer.clone()) }).await?.map_err(malformed)?;
        let answer = guarded(async {
            self.pc.set_remote_description(description).await?;
            let answer = self.pc.create_answer(None).await?;
            self.pc.set_local_description(answer).await?;
            Ok::<_, webrtc::error::Error>(self.pc.local_description().await)
        })
        .await?
        .map_err(malformed)?
        .ok_or(NetError::Closed)?;
        *remote = offer;
        *lock(&self.etag) = new_etag();
        Ok(sdp::fragment_of(&sdp::publish(&answer.sdp, &self.public_ips)))
    }

    /// The strong entity tag of the current ICE session, with quotes (RFC 9725 §4.3).
    pub fn etag(&self) -> String {
        lock(&self.etag).clone()
    }

    /// Ends the connection and waits until its sockets are closed. Idempotent.
    pub async fn close(&self) {
        self.stop.cancel();
        let mut ended = self.ended.clone();
        // An error means the task is gone, and with it the connection.
        let _ = ended.wait_for(|e| *e).await;
    }

    fn open(&self) -> Result<(), NetError> {
        if self.stop.is_cancelled() || *self.ended.borrow() { Err(NetError::Closed) } else { Ok(()) }
    }
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer").field("etag", &self.etag()).finish_non_exhaustive()
    }
}

fn new_etag() -> String {
    format!("\"{:016x}\"", rand::rng().random::<u64>())
}

fn malformed(error: impl std::fmt::Display) -> NetError {
    NetError::Malformed(short(error))
}

/// Runs a call into the WebRTC library on text from strangers; a panic in there becomes an error here.
async fn guarded<T>(call: impl Future<Output = T>) -> Result<T, NetError> {
    AssertUnwindSafe(call).catch_unwind().await.map_err(|_| {
        NetError::Malformed("the WebRTC library gave up on it; it is probably not a session description".into())
    })
}

async fn build(
    config: &Config,
    lease: &Lease,
    shared: Arc<Shared>,
    handler: Arc<Handler>,
) -> Result<Arc<dyn PeerConnection>, NetError> {
    let mut media = MediaEngine::default();
    media
        .register_codec(RTCRtpCodecParameters { rtp_codec: opus(), payload_type: 111 }, RtpCodecKind::Audio)
        .map_err(NetError::stack)?;
    media
        .register_codec(RTCRtpCodecParameters { rtp_codec: h264(), payload_type: 102 }, RtpCodecKind::Video)
        .map_err(NetError::stack)?;
    let rtx = RTCRtpCodec {
        mime_type: MIME_TYPE_RTX.into(),
        clock_rate: 90_000,
        channels: 0,
        sdp_fmtp_line: "apt=102".into(),
        rtcp_feedback: vec![],
    };
    media
        .register_codec(RTCRtpCodecParameters { rtp_codec: rtx, payload_type: 103 }, RtpCodecKind::Video)
        .map_err(NetError::stack)?;
    for (typ, parameter) in [("nack", ""), ("nack", "pli"), ("ccm", "fir")] {
        media.register_feedback(RTCPFeedback { typ: typ.into(), parameter: parameter.into() }, RtpCodecKind::Video);
    }
    let registry = configure_twcc_receiver_only(Registry::new(), &mut media)
        .map_err(NetError::stack)?
        .with(Slot::NackGenerator, NackGeneratorBuilder::new().build())
        .with(Slot::ReceiverReport, ReceiverReportBuilder::new().build())
        .with(Slot::Pacer, Traffic::new(Instant::now(), shared, rand::rng().random()));
    let settings = SettingEngineBuilder::new()
        .with_include_loopback_candidate(config.bind.iter().any(|ip| ip.is_loopback()))
        .with_multicast_dns_mode(MulticastDnsMode::Disabled)
        .with_lite(config.ice_lite)
        .with_ice_connection_attempts(Some(CHECK_INTERVAL), Some(250))
        .with_ice_timeouts(
            Some(Duration::from_millis(config.interrupted_after_ms)),
            Some(Duration::from_millis(config.failed_after_ms)),
            Some(Duration::from_millis(1000)),
        )
        .build();
    let servers = config.ice_servers.iter().map(|s| RTCIceServer {
        urls: s.urls.clone(),
        username: s.username.clone(),
        credential: s.credential.clone(),
    });
    let addresses: Vec<SocketAddr> = config.bind.iter().map(|ip| SocketAddr::new(*ip, lease.port())).collect();
    let builder = PeerConnectionBuilder::new()
        .with_configuration(RTCConfigurationBuilder::new().with_ice_servers(servers.collect()).build())
        .with_media_engine(media)
        .with_setting_engine(settings)
        .with_interceptor_registry(registry)
        .with_handler(handler)
        .with_data_channel_send_buffer_limit(256 * 1024)
        .with_tcp_addrs(if config.ice_tcp { addresses.clone() } else { vec![] })
        .with_udp_addrs(addresses);
    let pc = builder.build().await.map_err(|error| {
        // The only input left to fail on here is the sockets.
        NetError::NoPort(format!("{:?}, port {}: {}", config.bind, lease.port(), short(error)))
    })?;
    Ok(Arc::new(pc))
}

fn opus() -> RTCRtpCodec {
    RTCRtpCodec {
        mime_type: MIME_TYPE_OPUS.into(),
        clock_rate: 48_000,
        channels: 2,
        sdp_fmtp_line: "minptime=10;useinbandfec=1".into(),
        rtcp_feedback: vec![],
    }
}

fn h264() -> RTCRtpCodec {
    RTCRtpCodec {
        mime_type: MIME_TYPE_H264.into(),
        clock_rate: 90_000,
        channels: 0,
        sdp_fmtp_line: "level-asymmetry-allowed=1;packetization-mode=1;profile-level-id=42e01f".into(),
        rtcp_feedback: vec![],
    }
}

fn track(kind: RtpCodecKind, codec: RTCRtpCodec, ssrc: u32, rtx: Option<u32>) -> Arc<TrackLocalStaticRTP> {
    let name = if kind == RtpCodecKind::Audio { "voice" } else { "face" };
    let coding = RTCRtpCodingParameters {
        ssrc: Some(ssrc),
        rtx: rtx.map(|ssrc| RTCRtpRtxParameters { ssrc }),
        ..Default::default()
    };
    // One stream for both: the browser then plays them in step.
    Arc::new(TrackLocalStaticRTP::new(MediaStreamTrack::new(
        "presenter".into(),
        name.into(),
        name.into(),
        kind,
        vec![RTCRtpEncodingParameters { rtp_coding_parameters: coding, codec, ..Default::default() }],
    )))
}

struct Negotiated {
    answer: String,
    video_track: Arc<TrackLocalStaticRTP>,
    audio_track: Arc<TrackLocalStaticRTP>,
    video_pt: u8,
    audio_pt: u8,
    sender: Arc<dyn RtpSender>,
}

async fn negotiate(
    pc: &Arc<dyn PeerConnection>,
    shared: &Shared,
    offer: String,
    gathered: &mut watch::Receiver<bool>,
) -> Result<Negotiated, NetError> {
    let description = RTCSessionDescription::offer(offer).map_err(malformed)?;
    pc.set_remote_description(description).await.map_err(malformed)?;
    // After the remote description, so that the tracks attach to the offered sections.
    let video = track(RtpCodecKind::Video, h264(), shared.video.0, Some(shared.video_rtx));
    let audio = track(RtpCodecKind::Audio, opus(), shared.audio.0, None);
    // What fails up to the answer fails for what the offer says: the same calls succeed for every sound one.
    let video_sender = pc.add_track(video.clone() as Arc<dyn TrackLocal>).await.map_err(malformed)?;
    let audio_sender = pc.add_track(audio.clone() as Arc<dyn TrackLocal>).await.map_err(malformed)?;
    let answer = pc.create_answer(None).await.map_err(malformed)?;
    pc.set_local_description(answer).await.map_err(malformed)?;
    if tokio::time::timeout(GATHER_TIMEOUT, gathered.wait_for(|g| *g)).await.is_err() {
        tracing::warn!("ICE servers did not answer in {GATHER_TIMEOUT:?}; answering without their candidates");
    }
    let answer = pc.local_description().await.ok_or(NetError::Closed)?.sdp;
    // The payload types are the browser's, not ours; and what is not in there was not agreed on.
    let video_pt = payload_type(&video_sender, MIME_TYPE_H264).await.ok_or(NetError::NoH264)?;
    let audio_pt = payload_type(&audio_sender, MIME_TYPE_OPUS).await.ok_or(NetError::NoOpus)?;
    Ok(Negotiated { answer, video_track: video, audio_track: audio, video_pt, audio_pt, sender: audio_sender })
}

async fn payload_type(sender: &Arc<dyn RtpSender>, mime: &str) -> Option<u8> {
    let parameters = sender.get_parameters().await.ok()?;
    let codecs = &parameters.rtp_parameters.codecs;
    codecs.iter().find(|c| c.rtp_codec.mime_type.eq_ignore_ascii_case(mime)).map(|c| c.payload_type)
}

/// What a peer's task owns.
struct Life<W> {
    pc: Arc<dyn PeerConnection>,
    shared: Arc<Shared>,
    stop: CancellationToken,
    end: mpsc::Receiver<String>,
    ended: watch::Sender<bool>,
    sender: Arc<dyn RtpSender>,
    write: W,
    _lease: Lease,
}

/// Lives as long as the peer: ends when it is closed here or there, when the session drops its events or its sending
/// half, or when the WebRTC driver dies (also by a panic over a hostile packet).
async fn live(mut life: Life<impl Future<Output = String>>) {
    let shared = life.shared.clone();
    let reason = tokio::select! {
        () = life.stop.cancelled() => "closed by this server".to_string(),
        () = shared.events.gone() => "the session ended".to_string(),
        reason = life.end.recv() => reason.unwrap_or_else(|| "the WebRTC driver ended".into()),
        () = left(life.sender) => "the peer left".into(),
        reason = life.write => reason,
    };
    life.stop.cancel();
    shared.connected.store(false, Relaxed);
    shared.closed.store(true, Relaxed);
    if let Ok(Err(error)) | Err(error) = guarded(life.pc.close()).await.map(|r| r.map_err(NetError::stack)) {
        tracing::debug!(%error, "closing a peer");
    }
    shared.events.send(LinkEvent::Closed(reason));
    let _ = life.ended.send(true);
}

/// Waits until the peer has said goodbye (DTLS close_notify: a closed tab does, a lost network does not). The library has
/// no event for it, only a state.
async fn left(sender: Arc<dyn RtpSender>) {
    let mut ticks = tokio::time::interval(Duration::from_millis(250));
    loop {
        ticks.tick().await;
        if let Ok(Some(transport)) = sender.transport().await
            && let Ok(RTCDtlsTransportState::Closed | RTCDtlsTransportState::Failed) = transport.state().await
        {
            return;
        }
    }
}

/// Called on the driver's own task: nothing in here waits.
struct Handler {
    shared: Arc<Shared>,
    gathered: watch::Sender<bool>,
    end: mpsc::Sender<String>,
    microphone: AtomicBool,
    messages: Mutex<Option<mpsc::Receiver<String>>>,
}

#[async_trait::async_trait]
impl PeerConnectionEventHandler for Handler {
    async fn on_ice_gathering_state_change(&self, state: RTCIceGatheringState) {
        if state == RTCIceGatheringState::Complete {
            let _ = self.gathered.send(true);
        }
    }

    async fn on_connection_state_change(&self, state: RTCPeerConnectionState) {
        match state {
            RTCPeerConnectionState::Connected => {
                self.shared.connected.store(true, Relaxed);
                self.shared.events.send(LinkEvent::Connected);
            }
            RTCPeerConnectionState::Disconnected => self.shared.events.send(LinkEvent::Interrupted),
            RTCPeerConnectionState::Failed => {
                let _ = self.end.try_send("the connection failed: no answer to connectivity checks".into());
            }
            RTCPeerConnectionState::Closed => {
                let _ = self.end.try_send("the peer closed the connection".into());
            }
            _ => {}
        }
    }

    async fn on_track(&self, track: Arc<dyn TrackRemote>) {
        let shared = self.shared.clone();
        if track.kind().await != RtpCodecKind::Audio || self.microphone.swap(true, Relaxed) {
            return;
        }
        tokio::spawn(async move {
            let mut speech = SpeechIn::default();
            while let Some(event) = track.poll().await {
                match event {
                    TrackRemoteEvent::OnRtpPacket(packet) => {
                        let packet = speech.take(packet, Instant::now());
                        shared.lost_in.store(speech.lost(), Relaxed);
                        shared.padding_in.store(speech.padding(), Relaxed);
                        shared.events.send(LinkEvent::Speech(packet));
                    }
                    TrackRemoteEvent::OnEnded => break,
                    _ => {}
                }
            }
        });
    }

    async fn on_data_channel(&self, channel: Arc<dyn DataChannel>) {
        let ours = channel.label().await.is_ok_and(|label| label == DATA_CHANNEL);
        let Some(messages) = lock(&self.messages).take_if(|_| ours) else { return };
        tokio::spawn(converse(channel, messages, self.shared.clone()));
    }
}

/// Carries messages both ways until the channel closes.
async fn converse(channel: Arc<dyn DataChannel>, mut messages: mpsc::Receiver<String>, shared: Arc<Shared>) {
    let mut open = false;
    loop {
        tokio::select! {
            event = channel.poll() => match event {
                Some(DataChannelEvent::OnOpen) => open = true,
                Some(DataChannelEvent::OnMessage(message)) => {
                    open = true;
                    if message.is_string && message.data.len() <= MAX_MESSAGE
                        && let Ok(text) = String::from_utf8(message.data.to_vec())
                    {
                        shared.events.send(LinkEvent::Message(text));
                    }
                }
                Some(DataChannelEvent::OnClose) | None => return,
                Some(_) => {}
            },
            text = messages.recv(), if open => match text {
                // A page that does not read loses messages, not its connection.
                Some(text) => if let Err(error) = channel.try_send_text(&text).await {
                    tracing::debug!(error = %short(error), "a data channel message was dropped");
                },
                None => return,
            },
        }
    }
}
