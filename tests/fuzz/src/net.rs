//! Descriptions, fragments, RTCP and RTP from strangers.

#[path = "../../../src/net/clock.rs"]
mod clock;
#[path = "../../../src/net/congestion/mod.rs"]
mod congestion;
#[path = "../../../src/net/events.rs"]
mod events;
#[path = "../../../src/net/fragment.rs"]
mod fragment;
#[path = "../../../src/net/packetise.rs"]
mod packetise;
#[path = "../../../src/net/sdp.rs"]
mod sdp;
#[path = "../../../src/net/shared.rs"]
mod shared;
#[path = "../../../src/net/speech.rs"]
mod speech;
#[path = "../../../src/net/traffic.rs"]
mod traffic;

pub use loquent::net::{NetError, is_public};

use crate::{
    Cut,
    media::MediaTime,
    session::{Config, EncodedVideo, Ingest, SpeechQueue},
};
use bytes::Bytes;
use rtc::{
    interceptor::{AttributedPacket, Packet, TaggedPacket},
    rtcp, rtp,
    sansio::Protocol as _,
    shared::marshal::Unmarshal as _,
};
use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

/// Offers of every shape, answers, fragments; what is made of them must be text that is read again.
pub fn descriptions(text: &str) {
    for shape in [sdp::Shape::Live, sdp::Shape::Whip, sdp::Shape::Whep, sdp::Shape::Data] {
        if let Ok(checked) = sdp::check_offer(text, shape) {
            sdp::check_offer(&checked.text, shape).expect("a cleaned offer is an offer");
            let restarted = fragment::with_credentials(&checked.text, "abcd", "abcdefghijklmnopqrstuv", &[]);
            fragment::credentials(&restarted).expect("an offer with credentials");
        }
    }
    if let Ok(answer) = sdp::check_answer(text) {
        let public = ["203.0.113.7".parse().unwrap()];
        sdp::publish(&answer, &public);
        sdp::ask_for_small_pictures(&answer);
        fragment::fragment_of(&answer);
    }
    if let Ok(said) = fragment::parse_fragment(text) {
        assert!(said.candidates.iter().all(|c| fragment::usable(&c.1)));
    }
}

/// Feedback, pictures on their way out and the clock, in any order.
pub fn feedback(bytes: &[u8]) {
    let begun = Instant::now();
    let (events, _inbox) = events::Events::new();
    let rate = |rate| clock::RtpClock { rate, offset: 7 };
    let shared = Arc::new(shared::Shared {
        events,
        clock: clock::MediaClock::new(begun, SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 30)).into(),
        keyframes: shared::KeyframeGate::new(false).into(),
        stats: Default::default(),
        connected: true.into(),
        closed: false.into(),
        lost_out: Default::default(),
        lost_in: Default::default(),
        padding_in: Default::default(),
        target: 500_000.into(),
        audio: (1, rate(48_000)),
        video: (2, rate(90_000)),
        video_rtx: 3,
        limits: congestion::Limits { start: 500_000.0, min: 50_000.0, max: 5_000_000.0 },
    });
    let mut traffic = traffic::Traffic::new(begun, shared.clone(), 65_530);
    let mut stream = packetise::Stream::new(2, 96, rate(90_000), 65_530);
    let (mut cut, mut now, mut at) = (Cut(bytes), begun, MediaTime::ZERO);
    while !cut.done() {
        let tag = |packet| TaggedPacket { now, transport: Default::default(), message: AttributedPacket::new(packet) };
        match cut.u8() % 4 {
            0 => {
                now += Duration::from_micros(u64::from(cut.u16()) * 10);
                let _ = traffic.handle_timeout(now);
            }
            1 => {
                at += MediaTime::from_millis(40);
                let size = usize::from(cut.u16() % 6000);
                let mut data = vec![0, 0, 0, 1, if cut.u8() % 8 == 0 { 0x65 } else { 0x41 }];
                data.resize(5 + size, 0x55);
                let video = EncodedVideo {
                    at,
                    duration: MediaTime::from_millis(40),
                    keyframe: data[4] == 0x65,
                    width: 256,
                    height: 256,
                    data: data.into(),
                };
                for packet in stream.video(&video) {
                    let _ = traffic.handle_write(tag(Packet::Rtp(packet)));
                }
            }
            _ => {
                let n = usize::from(cut.u8());
                let mut raw = Bytes::copy_from_slice(cut.take(n));
                if let Ok(packets) = rtcp::packet::unmarshal(&mut raw) {
                    let _ = traffic.handle_read(tag(Packet::Rtcp(packets)));
                }
            }
        }
        while traffic.poll_write().is_some() {}
        while traffic.poll_read().is_some() {}
    }
    let stats = shared.stats();
    assert!(stats.target_bitrate >= 50_000 && stats.target_bitrate <= 5_000_000, "{stats:?}");
}

/// Packets of one input: each makes up to 65 ms of sound, all of which is resampled, at ten times the usual cost under a
/// fuzzer.
const PACKETS: usize = 100;

/// RTP as it comes from a microphone that lies about everything, into the timeline of a session.
pub fn speech(bytes: &[u8]) {
    let begun = Instant::now();
    let mut ingest = Ingest::new(&Config::default(), MediaTime::ZERO, Duration::ZERO, begun).unwrap();
    let (mut counted, queue) = (speech::SpeechIn::default(), SpeechQueue::new(Arc::default()));
    let (mut cut, mut now, mut end) = (Cut(bytes), begun, MediaTime::ZERO);
    for _ in 0..PACKETS {
        if cut.done() {
            break;
        }
        // Mostly less than a packet lasts, sometimes a pause.
        let apart = u64::from(cut.u8());
        now += Duration::from_micros(if apart < 200 { apart * 50 } else { (apart - 199) * 1000 + 9000 });
        let n = usize::from(cut.u8());
        let mut raw = Bytes::copy_from_slice(cut.take(n));
        if let Ok(packet) = rtp::Packet::unmarshal(&mut raw) {
            ingest.packet(counted.take(packet, now));
        }
        let heard = ingest.advance(&queue, now).unwrap();
        assert_eq!(heard.voice.at, end, "the timeline has no gap");
        end = heard.voice.end();
        assert!(heard.voice.samples.iter().all(|s| s.is_finite()));
    }
    let _ = (counted.lost(), counted.padding());
    let ahead = end.as_secs_f64() - now.duration_since(begun).as_secs_f64();
    assert!(ahead.abs() < 0.5, "the timeline stands {ahead} s from the clock");
}
