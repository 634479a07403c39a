//! Data packets of a room, tokens, addresses.

#[path = "../../../src/livekit/agent.rs"]
mod agent;
#[path = "../../../src/livekit/calls.rs"]
mod calls;
#[path = "../../../src/livekit/streams.rs"]
mod streams;
#[path = "../../../src/livekit/target.rs"]
mod target;
#[path = "../../../src/livekit/token.rs"]
mod token;

pub use loquent::livekit::{Config, LivekitError};

use crate::Cut;
use livekit_protocol::{
    DataPacket, ParticipantInfo, SignalResponse, data_packet::Value, signal_response::Message as Told,
};
use prost::Message as _;
use std::time::{Duration, Instant, SystemTime};

/// Packets one after the other, each with a length before it; then all that waits is taken.
pub fn packets(bytes: &[u8]) {
    let begun = Instant::now();
    let (mut cut, mut now) = (Cut(bytes), begun);
    let (mut streams, mut calls) = (streams::Streams::new(2), calls::Calls::new());
    let mut agent = agent::Agent::new(None, "loquent", begun);
    while !cut.done() {
        let kind = cut.u8();
        now += Duration::from_millis(u64::from(kind));
        let n = usize::from(cut.u16());
        let raw = cut.take(n);
        if kind % 8 == 0 {
            if let Ok(info) = ParticipantInfo::decode(raw) {
                agent.update(&info, now);
            }
            let _ = (agent.present().map(str::len), agent.deadline(Duration::from_secs(5)));
            let _ = SignalResponse::decode(raw).map(|r| matches!(r.message, Some(Told::Join(_))));
            continue;
        }
        let Ok(packet) = DataPacket::decode(raw) else { continue };
        match packet.value {
            Some(Value::RpcRequest(request)) => {
                let answer = calls::answer(&request, kind % 2 == 0);
                if answer.clear {
                    streams.clear();
                    calls.tell(calls::Notice::Started);
                }
            }
            Some(Value::RpcAck(ack)) => calls.ack(&ack, now),
            Some(Value::RpcResponse(response)) => calls.response(&response, now),
            Some(Value::StreamHeader(header)) => drop(streams.header(&header)),
            Some(Value::StreamChunk(chunk)) => drop(streams.chunk(&chunk)),
            Some(Value::StreamTrailer(trailer)) => streams.trailer(&trailer),
            _ => {}
        }
        let _ = (calls.poll(now, || "id".into()), calls.deadline());
        if kind % 8 == 7 {
            while streams.next().is_some() {}
        }
    }
    while let Some(piece) = streams.next() {
        if let streams::Piece::Sound { rate, samples } = piece {
            assert!(rate > 0 && samples.iter().all(|s| s.is_finite()));
        }
    }
}

/// A token and an address.
pub fn words(text: &str) {
    let _ = token::Claims::read(text, SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 30));
    if let Ok(target) = target::Target::parse(text, &Config::default()) {
        target.endpoint(&[("access_token", text)]);
    }
}
