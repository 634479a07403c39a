//! Remote procedure calls of LiveKit, version 1 (packets `RpcRequest`, `RpcAck`, `RpcResponse`), both directions. Pure:
//! `now` is an argument, packets come out.
//!
//! We call one at a time and in order: what the agent is told about its speech must not overtake. A call that fails is
//! made again [`TRIES`] times in all, [`PAUSE`] apart; a method that the agent does not have is not called again.
//!
//! Source: `livekit/src/room/rpc` of livekit/rust-sdks @0b5462a; retries as in `_datastream_io.py` of livekit/agents @da6af86.

use livekit_protocol::{RpcAck, RpcError, RpcRequest, RpcResponse, data_packet::Value, rpc_response};
use std::{
    collections::{HashSet, VecDeque},
    time::{Duration, Instant},
};

/// Error codes (`RpcErrorCode` in the SDKs).
pub(super) const UNSUPPORTED_METHOD: u32 = 1400;
const PAYLOAD_TOO_LARGE: u32 = 1402;
const UNSUPPORTED_VERSION: u32 = 1404;
/// Longest payload of version 1.
const MAX_PAYLOAD: usize = 15 * 1024;
const VERSION: u32 = 1;
/// Time for the acknowledgement.
const ACK: Duration = Duration::from_secs(7);
/// Time for the answer.
const ANSWER: Duration = Duration::from_secs(10);
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_millis(100);
/// Calls waiting; the oldest leaves, counted: an agent that answers none of so many is not listening.
const MAX_WAITING: usize = 64;

/// What the agent is told.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Notice {
    Started,
    Finished { position_s: f64, interrupted: bool },
}

impl Notice {
    fn method(&self) -> &'static str {
        match self {
            Notice::Started => "lk.playback_started",
            Notice::Finished { .. } => "lk.playback_finished",
        }
    }

    /// Exactly these keys: the agent makes an object of them and fails on any other.
    fn payload(&self) -> String {
        match self {
            Notice::Started => String::new(),
            Notice::Finished { position_s, interrupted } => {
                serde_json::json!({ "playback_position": position_s, "interrupted": interrupted }).to_string()
            }
        }
    }
}

enum Phase {
    /// To be sent at the time.
    Due(Instant),
    Sent {
        id: String,
        acked: bool,
        since: Instant,
    },
}

/// Our calls to the agent.
pub(super) struct Calls {
    waiting: VecDeque<Notice>,
    now: Option<(Notice, u32, Phase)>,
    unsupported: HashSet<&'static str>,
    /// Notices that nobody took.
    pub(super) lost: u64,
}

impl Calls {
    pub(super) fn new() -> Calls {
        Calls { waiting: VecDeque::new(), now: None, unsupported: HashSet::new(), lost: 0 }
    }

    pub(super) fn tell(&mut self, notice: Notice) {
        if self.unsupported.contains(notice.method()) {
            return;
        }
        self.waiting.push_back(notice);
        if self.waiting.len() > MAX_WAITING {
            self.waiting.pop_front();
            self.lost += 1;
        }
    }

    /// What is to be sent now; `id` makes a new name for a call.
    pub(super) fn poll(&mut self, now: Instant, id: impl FnOnce() -> String) -> Option<RpcRequest> {
        if let Some((_, _, Phase::Sent { acked, since, .. })) = &self.now
            && now.saturating_duration_since(*since) >= if *acked { ANSWER } else { ACK }
        {
            let why = if *acked { "no answer came" } else { "it was not acknowledged" };
            self.failed(now, why);
        }
        if self.now.is_none() {
            let next = self.waiting.pop_front()?;
            self.now = Some((next, 0, Phase::Due(now)));
        }
        let (notice, tries, phase) = self.now.as_mut()?;
        let Phase::Due(at) = phase else { return None };
        if *at > now {
            return None;
        }
        let id = id();
        *tries += 1;
        *phase = Phase::Sent { id: id.clone(), acked: false, since: now };
        Some(RpcRequest {
            id,
            method: notice.method().into(),
            payload: notice.payload(),
            response_timeout_ms: ANSWER.as_millis() as u32,
            version: VERSION,
            ..RpcRequest::default()
        })
    }

    /// When to poll again at the latest.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match &self.now {
            Some((_, _, Phase::Due(at))) => Some(*at),
            Some((_, _, Phase::Sent { acked, since, .. })) => Some(*since + if *acked { ANSWER } else { ACK }),
            None => None,
        }
    }

    #[cfg(test)]
    fn idle(&self) -> bool {
        self.now.is_none() && self.waiting.is_empty()
    }

    pub(super) fn ack(&mut self, ack: &RpcAck, now: Instant) {
        if let Some((_, _, Phase::Sent { id, acked, since })) = &mut self.now
            && *id == ack.request_id
            && !*acked
        {
            (*acked, *since) = (true, now);
        }
    }

    pub(super) fn response(&mut self, response: &RpcResponse, now: Instant) {
        let Some((notice, _, Phase::Sent { id, .. })) = &self.now else { return };
        if *id != response.request_id {
            return;
        }
        match &response.value {
            Some(rpc_response::Value::Error(error)) if error.code == UNSUPPORTED_METHOD => {
                // An agent that does not wait for the start of playback has no such method, and that is no fault.
                tracing::debug!(
                    method = notice.method(),
                    "the agent does not have this method; it is not called again"
                );
                self.unsupported.insert(notice.method());
                let gone = notice.method();
                self.waiting.retain(|n| n.method() != gone);
                self.now = None;
            }
            Some(rpc_response::Value::Error(error)) => {
                let why = format!("error {}: {}", error.code, error.message.chars().take(120).collect::<String>());
                self.failed(now, &why);
            }
            // "ok", or "reject" from an agent that does not know us: neither gets better by asking again.
            Some(_) | None => self.now = None,
        }
    }

    fn failed(&mut self, now: Instant, why: &str) {
        let Some((notice, tries, phase)) = &mut self.now else { return };
        tracing::warn!(method = notice.method(), tries = *tries, "a call to the agent failed: {why}");
        if *tries >= TRIES {
            self.lost += 1;
            self.now = None;
        } else {
            *phase = Phase::Due(now + PAUSE);
        }
    }
}

/// What to do about a request of somebody in the room.
#[derive(Debug, PartialEq)]
pub(super) struct Answer {
    /// Acknowledgement and response, in this order.
    pub(super) packets: [Value; 2],
    /// The agent wants silence.
    pub(super) clear: bool,
}

/// Answers a call to us. `from_agent`: the caller is the participant we speak for.
pub(super) fn answer(request: &RpcRequest, from_agent: bool) -> Answer {
    let error = |code: u32, message: &str| {
        rpc_response::Value::Error(RpcError { code, message: message.into(), data: String::new() })
    };
    let mut clear = false;
    let value = if request.payload.len() > MAX_PAYLOAD {
        error(PAYLOAD_TOO_LARGE, "Request payload too large")
    } else if request.version != VERSION || !request.compressed_payload.is_empty() {
        error(UNSUPPORTED_VERSION, "Unsupported RPC version")
    } else if request.method == "lk.clear_buffer" {
        clear = from_agent;
        rpc_response::Value::Payload(if from_agent { "ok" } else { "reject" }.into())
    } else {
        error(UNSUPPORTED_METHOD, "Method not supported at destination")
    };
    let id = request.id.clone();
    let response = RpcResponse { request_id: id.clone(), value: Some(value) };
    Answer { packets: [Value::RpcAck(RpcAck { request_id: id }), Value::RpcResponse(response)], clear }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(position_s: f64) -> Notice {
        Notice::Finished { position_s, interrupted: false }
    }

    fn ok(id: &str) -> RpcResponse {
        RpcResponse { request_id: id.into(), value: Some(rpc_response::Value::Payload("ok".into())) }
    }

    fn refused(id: &str, code: u32) -> RpcResponse {
        let value = rpc_response::Value::Error(RpcError { code, message: "no".into(), data: String::new() });
        RpcResponse { request_id: id.into(), value: Some(value) }
    }

    #[test]
    fn notices_go_out_one_after_the_other_with_exactly_the_keys_the_agent_knows() {
        let t = Instant::now();
        let mut calls = Calls::new();
        calls.tell(Notice::Started);
        calls.tell(finished(1.25));
        let first = calls.poll(t, || "a".into()).unwrap();
        assert_eq!((first.method.as_str(), first.payload.as_str(), first.version), ("lk.playback_started", "", 1));
        assert!(calls.poll(t, || "x".into()).is_none(), "one at a time");
        calls.response(&ok("other"), t);
        assert!(calls.poll(t, || "x".into()).is_none(), "an answer to nothing");
        calls.ack(&RpcAck { request_id: "a".into() }, t);
        calls.response(&ok("a"), t);
        let second = calls.poll(t, || "b".into()).unwrap();
        assert_eq!(second.method, "lk.playback_finished");
        assert_eq!(second.payload, r#"{"interrupted":false,"playback_position":1.25}"#);
        calls.response(&ok("b"), t);
        assert!(calls.idle() && calls.deadline().is_none());
    }

    #[test]
    fn a_failed_call_is_made_three_times_a_tenth_of_a_second_apart() {
        let t = Instant::now();
        let mut calls = Calls::new();
        calls.tell(finished(1.0));
        for n in 0..3 {
            let at = t + n * PAUSE;
            let id = n.to_string();
            assert!(calls.poll(at, || id.clone()).is_some(), "{n}");
            calls.response(&refused(&id, 1500), at);
            assert!(calls.poll(at, || "x".into()).is_none());
        }
        assert!(calls.idle());
        assert_eq!(calls.lost, 1);
        // Nobody acknowledges.
        calls.tell(finished(2.0));
        assert!(calls.poll(t, || "d".into()).is_some());
        assert_eq!(calls.deadline(), Some(t + ACK));
        assert!(calls.poll(t + ACK, || "e".into()).is_none());
        assert!(calls.poll(t + ACK + PAUSE, || "e".into()).is_some());
        calls.ack(&RpcAck { request_id: "e".into() }, t + ACK + PAUSE);
        assert_eq!(calls.deadline(), Some(t + ACK + PAUSE + ANSWER));
    }

    #[test]
    fn a_method_the_agent_does_not_have_is_not_called_again() {
        let t = Instant::now();
        let mut calls = Calls::new();
        calls.tell(Notice::Started);
        calls.tell(finished(1.0));
        calls.tell(Notice::Started);
        calls.poll(t, || "a".into()).unwrap();
        calls.response(&refused("a", UNSUPPORTED_METHOD), t);
        calls.tell(Notice::Started);
        assert_eq!(calls.poll(t, || "b".into()).unwrap().method, "lk.playback_finished");
        calls.response(&ok("b"), t);
        assert!(calls.poll(t, || "c".into()).is_none() && calls.idle());
        assert_eq!(calls.lost, 0);
    }

    #[test]
    fn requests_are_answered_by_who_asks_and_for_what() {
        let ask = |method: &str, version: u32, payload: String, from_agent: bool| {
            let request =
                RpcRequest { id: "7".into(), method: method.into(), version, payload, ..RpcRequest::default() };
            let answer = answer(&request, from_agent);
            let [Value::RpcAck(ack), Value::RpcResponse(response)] = answer.packets else { panic!() };
            assert_eq!((ack.request_id.as_str(), response.request_id.as_str()), ("7", "7"));
            let told = match response.value.unwrap() {
                rpc_response::Value::Payload(text) => text,
                rpc_response::Value::Error(error) => error.code.to_string(),
                other => panic!("{other:?}"),
            };
            (told, answer.clear)
        };
        assert_eq!(ask("lk.clear_buffer", 1, String::new(), true), ("ok".into(), true));
        assert_eq!(ask("lk.clear_buffer", 1, String::new(), false), ("reject".into(), false));
        assert_eq!(ask("lk.dance", 1, String::new(), true), ("1400".into(), false));
        assert_eq!(ask("lk.clear_buffer", 2, String::new(), true), ("1404".into(), false));
        assert_eq!(ask("lk.clear_buffer", 1, "x".repeat(15_361), true), ("1402".into(), false));
    }
}
