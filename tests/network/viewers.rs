//! Many WHEP players in one light process, for load tests: `viewers --url URL [--token T] [--count N] [--seconds S]`
//! `[--via link] [--cycles N]`.
//!
//! Each player offers voice and face, connects, and puts the packets together: an access unit counts when all its packets
//! came and every unit since a keyframe did, which is what a decoder could show. The first player's stream is decoded.
//! `--via link` puts the first player behind a bad network (`tests/network/link.rs`): prints the server's media port as
//! `via PORT`, and reads the link's port as a line. `--cycles N`: N players come and go one after the other, and nothing else. Ends with one line of JSON; times in milliseconds.

use openh264::{decoder::Decoder, formats::YUVSource};
use rtc::{
    interceptor::{NackGeneratorBuilder, ReceiverReportBuilder, Registry, Slot},
    peer_connection::configuration::{interceptor_registry::configure_twcc_receiver_only, media_engine::*},
    rtcp::payload_feedbacks::picture_loss_indication::PictureLossIndication,
    rtp,
    rtp_transceiver::{RTCRtpTransceiverDirection, RTCRtpTransceiverInit, rtp_sender::*},
};
use serde_json::json;
use std::{
    collections::BTreeMap,
    io::BufRead,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::sync::watch;
use webrtc::{
    media_stream::track_remote::{TrackRemote, TrackRemoteEvent},
    peer_connection::*,
};

/// How long a hole is waited for before it is taken for a loss.
const PATIENCE: Duration = Duration::from_millis(400);

/// What one player saw.
#[derive(Default)]
struct Seen {
    first: Option<Instant>,
    /// When each showable unit was complete.
    units: Vec<Instant>,
    keyframes: usize,
    /// Complete units that could not be shown because one before them was missing.
    orphans: usize,
    packets_lost: u64,
    out_of_order: u64,
    audio: u64,
    decoded: u64,
    undecodable: u64,
}

/// RTP in any order → access units in order.
#[derive(Default)]
struct Assembly {
    waiting: BTreeMap<u64, rtp::Packet>,
    highest: u64,
    next: Option<u64>,
    hole: Option<Instant>,
    unit: Vec<u8>,
    whole: bool,
    key: bool,
    decodable: bool,
}

/// A finished access unit.
struct Unit {
    data: Vec<u8>,
    key: bool,
    whole: bool,
}

impl Assembly {
    fn push(&mut self, packet: rtp::Packet, seen: &mut Seen) -> Vec<Unit> {
        let number = packet.header.sequence_number;
        let extended = match self.next {
            None => 0x1_0000 + u64::from(number),
            Some(_) => self.highest.wrapping_add_signed(i64::from(number.wrapping_sub(self.highest as u16) as i16)),
        };
        if self.next.is_none() {
            (self.next, self.whole) = (Some(extended), true);
        }
        seen.out_of_order += u64::from(extended < self.highest);
        self.highest = self.highest.max(extended);
        if Some(extended) >= self.next {
            self.waiting.insert(extended, packet);
        }
        let mut units = vec![];
        while let Some((&first, _)) = self.waiting.first_key_value() {
            let next = self.next.unwrap_or(first);
            if first != next {
                if self.hole.get_or_insert_with(Instant::now).elapsed() < PATIENCE {
                    break;
                }
                seen.packets_lost += first - next;
                self.whole = false;
            }
            self.hole = None;
            let packet = self.waiting.remove(&first).expect("it is the first");
            self.next = Some(first + 1);
            self.take(&packet.payload);
            if packet.header.marker {
                units.push(Unit { data: std::mem::take(&mut self.unit), key: self.key, whole: self.whole });
                (self.key, self.whole) = (false, true);
            }
        }
        units
    }

    /// RFC 6184, packetization mode 1.
    fn take(&mut self, payload: &[u8]) {
        let start = [0u8, 0, 0, 1];
        match payload {
            [first, rest @ ..] if first & 0x1f == 24 => {
                let mut rest = rest;
                while let [a, b, tail @ ..] = rest {
                    let n = usize::from(u16::from_be_bytes([*a, *b])).min(tail.len());
                    self.unit.extend(start.iter().chain(&tail[..n]));
                    rest = &tail[n..];
                }
            }
            [first, fu, rest @ ..] if first & 0x1f == 28 => {
                self.key |= fu & 0x1f == 5;
                if fu & 0x80 != 0 {
                    self.unit.extend(start);
                    self.unit.push((first & 0x60) | (fu & 0x1f));
                }
                self.unit.extend(rest);
            }
            [first, ..] => {
                self.key |= first & 0x1f == 5;
                self.unit.extend(start.iter().chain(payload));
            }
            [] => {}
        }
    }
}

struct Handler {
    seen: Arc<Mutex<Seen>>,
    decode: bool,
    gathered: watch::Sender<bool>,
    state: watch::Sender<RTCPeerConnectionState>,
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
        let (seen, decode) = (self.seen.clone(), self.decode);
        tokio::spawn(async move {
            let mut assembly = Assembly::default();
            let mut decoder = decode.then(|| Decoder::new().expect("an H.264 decoder"));
            let mut asked = Instant::now();
            while let Some(event) = track.poll().await {
                let TrackRemoteEvent::OnRtpPacket(packet) = event else { continue };
                let mut wish = false;
                {
                    let mut seen = seen.lock().unwrap();
                    if !video {
                        seen.audio += 1;
                        continue;
                    }
                    seen.first.get_or_insert_with(Instant::now);
                    for unit in assembly.push(packet, &mut seen) {
                        assembly.decodable = unit.whole && (unit.key || assembly.decodable);
                        if !assembly.decodable {
                            seen.orphans += 1;
                            wish = true;
                            continue;
                        }
                        seen.keyframes += usize::from(unit.key);
                        seen.units.push(Instant::now());
                        if let Some(decoder) = &mut decoder {
                            match decoder.decode(&unit.data) {
                                Ok(Some(picture)) if picture.dimensions().0 > 0 => seen.decoded += 1,
                                Ok(_) => {}
                                Err(_) => seen.undecodable += 1,
                            }
                        }
                    }
                }
                if wish && asked.elapsed() > Duration::from_millis(500) {
                    asked = Instant::now();
                    if let Some(media_ssrc) = track.ssrcs().await.first().copied() {
                        let pli = PictureLossIndication { sender_ssrc: 1, media_ssrc };
                        let _ = track.write_rtcp(vec![Box::new(pli)]).await;
                    }
                }
            }
        });
    }
}

struct Player {
    pc: Arc<dyn PeerConnection>,
    seen: Arc<Mutex<Seen>>,
    state: watch::Receiver<RTCPeerConnectionState>,
    resource: reqwest::Url,
}

async fn connect(client: &reqwest::Client, url: &reqwest::Url, token: &str, decode: bool, via: bool) -> Player {
    // Nothing but what is looked at, so that other servers send that as well.
    let mut media = MediaEngine::default();
    let codec = |mime: &str, clock_rate, channels, fmtp: &str| RTCRtpCodec {
        mime_type: mime.into(),
        clock_rate,
        channels,
        sdp_fmtp_line: fmtp.into(),
        rtcp_feedback: vec![],
    };
    let h264 = "level-asymmetry-allowed=1;packetization-mode=1;profile-level-id=42e01f";
    for (rtp_codec, payload_type, kind) in [
        (codec(MIME_TYPE_OPUS, 48_000, 2, "minptime=10;useinbandfec=1"), 111, RtpCodecKind::Audio),
        (codec(MIME_TYPE_H264, 90_000, 0, h264), 102, RtpCodecKind::Video),
        (codec(MIME_TYPE_RTX, 90_000, 0, "apt=102"), 103, RtpCodecKind::Video),
    ] {
        media.register_codec(RTCRtpCodecParameters { rtp_codec, payload_type }, kind).unwrap();
    }
    let registry = configure_twcc_receiver_only(Registry::new(), &mut media)
        .unwrap()
        .with(Slot::NackGenerator, NackGeneratorBuilder::new().build())
        .with(Slot::ReceiverReport, ReceiverReportBuilder::new().build());
    for (typ, parameter) in [("nack", ""), ("nack", "pli")] {
        media.register_feedback(RTCPFeedback { typ: typ.into(), parameter: parameter.into() }, RtpCodecKind::Video);
    }
    let seen = Arc::new(Mutex::new(Seen::default()));
    let (gathered_tx, mut gathered) = watch::channel(false);
    let (state_tx, state) = watch::channel(RTCPeerConnectionState::New);
    let settings = SettingEngineBuilder::new()
        .with_include_loopback_candidate(true)
        .with_multicast_dns_mode(rtc::ice::mdns::MulticastDnsMode::Disabled)
        .build();
    let pc: Arc<dyn PeerConnection> = Arc::new(
        PeerConnectionBuilder::new()
            .with_media_engine(media)
            .with_setting_engine(settings)
            .with_interceptor_registry(registry)
            .with_handler(Arc::new(Handler { seen: seen.clone(), decode, gathered: gathered_tx, state: state_tx }))
            .with_udp_addrs(vec!["127.0.0.1:0".to_string()])
            .build()
            .await
            .unwrap(),
    );
    for kind in [RtpCodecKind::Audio, RtpCodecKind::Video] {
        let direction = RTCRtpTransceiverDirection::Recvonly;
        let init = RTCRtpTransceiverInit { direction, streams: vec![], send_encodings: vec![] };
        pc.add_transceiver_from_kind(kind, Some(init)).await.unwrap();
    }
    let offer = pc.create_offer(None).await.unwrap();
    pc.set_local_description(offer).await.unwrap();
    gathered.wait_for(|g| *g).await.unwrap();
    let mut offer = pc.local_description().await.unwrap().sdp;
    if via {
        // The server must not reach us past the link.
        offer = offer.lines().filter(|l| !l.starts_with("a=candidate")).map(|l| format!("{l}\r\n")).collect();
    }
    let request = client.post(url.clone()).header("content-type", "application/sdp").bearer_auth(token).body(offer);
    let response = request.send().await.expect("the server answers");
    let status = response.status();
    let location = response.headers().get("location").map(|l| l.to_str().unwrap().to_string());
    let mut answer = response.text().await.unwrap();
    assert!(status == 201, "{status}: {answer}");
    if via {
        let line = answer.lines().find(|l| l.starts_with("a=candidate:") && l.contains(" udp ")).expect("a candidate");
        let port = line.split(' ').nth(5).unwrap().to_string();
        println!("via {port}");
        let mut other = String::new();
        std::io::stdin().lock().read_line(&mut other).unwrap();
        answer = answer.replace(&format!(" 127.0.0.1 {port} "), &format!(" 127.0.0.1 {} ", other.trim()));
    }
    pc.set_remote_description(RTCSessionDescription::answer(answer).unwrap()).await.unwrap();
    Player { pc, seen, state, resource: url.join(&location.expect("a Location")).unwrap() }
}

fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<f64> =
        stat.rsplit(") ").next().unwrap_or("").split(' ').map(|f| f.parse().unwrap_or(0.0)).collect();
    (fields[11] + fields[12]) / 100.0
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let mut arguments = BTreeMap::new();
    let mut words = std::env::args().skip(1);
    while let (Some(name), Some(value)) = (words.next(), words.next()) {
        arguments.insert(name, value);
    }
    let get = |name: &str, default: &str| arguments.get(name).cloned().unwrap_or_else(|| default.into());
    let url: reqwest::Url = get("--url", "").parse().expect("--url http://…/whep");
    let (token, count) = (get("--token", ""), get("--count", "1").parse::<usize>().unwrap());
    let seconds: f64 = get("--seconds", "10").parse().unwrap();
    let via = arguments.contains_key("--via");
    let client = reqwest::Client::new();
    for n in 0..get("--cycles", "0").parse().unwrap() {
        let mut player = connect(&client, &url, &token, false, false).await;
        let wait = player.state.wait_for(|s| *s == RTCPeerConnectionState::Connected);
        assert!(tokio::time::timeout(Duration::from_secs(20), wait).await.is_ok(), "a player did not connect");
        if n % 2 == 0 {
            let _ = client.delete(player.resource.clone()).bearer_auth(&token).send().await;
        }
        let _ = player.pc.close().await;
    }
    if arguments.contains_key("--cycles") {
        return;
    }
    let mut players = vec![];
    for n in 0..count {
        players.push(connect(&client, &url, &token, n == 0, via && n == 0).await);
    }
    for player in &mut players {
        let wait = player.state.wait_for(|s| *s == RTCPeerConnectionState::Connected);
        assert!(tokio::time::timeout(Duration::from_secs(20), wait).await.is_ok(), "a player did not connect");
    }
    println!("connected");
    // Everybody's first keyframe is past.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (began, used) = (Instant::now(), cpu());
    let audio: Vec<u64> = players.iter().map(|p| p.seen.lock().unwrap().audio).collect();
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
    let (ended, used) = (Instant::now(), cpu() - used);
    let span = (ended - began).as_secs_f64();
    let told: Vec<_> = players
        .iter()
        .zip(audio)
        .map(|(player, audio)| {
            let seen = player.seen.lock().unwrap();
            let within: Vec<Instant> = seen.units.iter().copied().filter(|at| *at >= began && *at <= ended).collect();
            let gaps = within.windows(2).map(|w| w[1] - w[0]);
            json!({
                "fps": (within.len() as f64 / span * 100.0).round() / 100.0,
                "longest_gap_ms": gaps.max().unwrap_or(ended - began).as_millis() as u64,
                "keyframes": seen.keyframes, "orphans": seen.orphans, "lost": seen.packets_lost,
                "out_of_order": seen.out_of_order, "decoded": seen.decoded, "undecodable": seen.undecodable,
                "voice_per_s": ((seen.audio - audio) as f64 / span * 10.0).round() / 10.0,
            })
        })
        .collect();
    for player in &players {
        let _ = client.delete(player.resource.clone()).bearer_auth(&token).send().await;
        let _ = player.pc.close().await;
    }
    println!("{}", json!({ "seconds": span, "own_cpu_percent": used / span * 100.0, "viewers": told }));
}
