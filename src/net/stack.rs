//! A connection of the WebRTC library as we want it: codecs, packet chain, sockets; and its tracks.

use super::{
    Config, IceServer, NetError, error::short, life::Handler, ports::Lease, sdp::Shape, shared::Shared,
    traffic::Traffic,
};
use rand::RngExt;
use rtc::{
    ice::mdns::MulticastDnsMode,
    interceptor::{NackGeneratorBuilder, ReceiverReportBuilder, Registry, Slot},
    media_stream::MediaStreamTrack,
    peer_connection::{
        configuration::{interceptor_registry::configure_twcc_receiver_only, media_engine::*},
        transport::RTCDtlsRole,
    },
    rtp_transceiver::rtp_sender::*,
};
use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use webrtc::{
    media_stream::track_local::static_rtp::TrackLocalStaticRTP, peer_connection::*, rtp_transceiver::RtpSender,
};

/// Between connectivity checks until connected; the library's default of 200 ms is most of the time to connect.
const CHECK_INTERVAL: Duration = Duration::from_millis(40);

/// Opens the sockets of one connection. `servers` are the STUN and TURN servers to use; `dtls_client`: the other side is a
/// DTLS client only.
pub(super) async fn build(
    config: &Config,
    servers: &[IceServer],
    lease: &Lease,
    (shape, dtls_client): (Shape, bool),
    shared: Arc<Shared>,
    handler: Arc<Handler>,
) -> Result<Arc<dyn PeerConnection>, NetError> {
    let mut media = MediaEngine::default();
    if shape == Shape::Whip {
        // A publisher's picture is not looked at, so it may be coded in whatever the library can name.
        media.register_default_codecs().map_err(NetError::stack)?;
    } else {
        let rtx = RTCRtpCodec {
            mime_type: MIME_TYPE_RTX.into(),
            clock_rate: 90_000,
            channels: 0,
            sdp_fmtp_line: "apt=102".into(),
            rtcp_feedback: vec![],
        };
        let ours =
            [(opus(), 111, RtpCodecKind::Audio), (h264(), 102, RtpCodecKind::Video), (rtx, 103, RtpCodecKind::Video)];
        for (rtp_codec, payload_type, kind) in ours {
            let codec = RTCRtpCodecParameters { rtp_codec, payload_type };
            media.register_codec(codec, kind).map_err(NetError::stack)?;
        }
    }
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
        // Unspecified becomes the client's part, as JSEP wants it of whoever answers.
        .with_answering_dtls_role(if dtls_client { RTCDtlsRole::Server } else { RTCDtlsRole::Unspecified })
        .with_ice_connection_attempts(Some(CHECK_INTERVAL), Some(250))
        .with_ice_timeouts(
            Some(Duration::from_millis(config.interrupted_after_ms)),
            Some(Duration::from_millis(config.failed_after_ms)),
            Some(Duration::from_millis(1000)),
        )
        .build();
    let servers = servers.iter().map(|s| RTCIceServer {
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

pub(super) fn opus() -> RTCRtpCodec {
    RTCRtpCodec {
        mime_type: MIME_TYPE_OPUS.into(),
        clock_rate: 48_000,
        channels: 2,
        sdp_fmtp_line: "minptime=10;useinbandfec=1".into(),
        rtcp_feedback: vec![],
    }
}

pub(super) fn h264() -> RTCRtpCodec {
    RTCRtpCodec {
        mime_type: MIME_TYPE_H264.into(),
        clock_rate: 90_000,
        channels: 0,
        sdp_fmtp_line: "level-asymmetry-allowed=1;packetization-mode=1;profile-level-id=42e01f".into(),
        rtcp_feedback: vec![],
    }
}

pub(super) fn track(kind: RtpCodecKind, codec: RTCRtpCodec, ssrc: u32, rtx: Option<u32>) -> Arc<TrackLocalStaticRTP> {
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

/// The payload type agreed on for `mime`.
pub(super) async fn payload_type(sender: &Arc<dyn RtpSender>, mime: &str) -> Option<u8> {
    let parameters = sender.get_parameters().await.ok()?;
    let codecs = &parameters.rtp_parameters.codecs;
    codecs.iter().find(|c| c.rtp_codec.mime_type.eq_ignore_ascii_case(mime)).map(|c| c.payload_type)
}
