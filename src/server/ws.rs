//! `GET /v1/sessions/{id}/ws`: speech in and events out for programs, over one WebSocket.
//!
//! Binary messages are mono PCM16, little-endian, at the rate that `?rate=` or `set` declared. Text messages are JSON:
//!
//! | from the client | what |
//! | --- | --- |
//! | `{"type":"set","rate":24000}` (`start` is the same) | the rate of the sound that follows |
//! | `{"type":"speak_end"}` | the segment is complete |
//! | `{"type":"say","text":"…"}` | speaks a text with the configured voice, after those that wait; `error` when it cannot |
//! | `{"type":"gesture","gesture":"nod","strength":1,"seconds":2}` | what `POST …/gesture` does; `error` when it cannot |
//! | `{"type":"set","liveliness":0.5}` | how much the presenter moves of its own |
//! | `{"type":"interrupt"}` | silence now; what follows is new |
//! | `{"type":"ping","t":1}` | answered by `pong` with the same `t` |
//!
//! | to the client | what |
//! | --- | --- |
//! | `state` {state} | where the session stands; the first message |
//! | `speak_started` {segment}, `speak_ended` {segment, position, interrupted} | `position`: seconds truly played |
//! | `metrics` | once a second, as on the page's data channel, and `speech_buffered_ms` |
//! | `error` {code, message} | a message was not understood; the connection stays |
//! | `closed` {reason, message} | the session is over; the last message |
//!
//! | close code | why |
//! | --- | --- |
//! | 1000 | the session was stopped |
//! | 1001 | the service is closing |
//! | 1008 | 100 messages that could not be understood, or a client that does not read |
//! | 1009 | a message above 1 MiB |
//! | 1011 | the engine or a codec failed |
//! | 4000 | the session ended otherwise (idle, longest time…); the text is the reason |
//!
//! | edge | capacity | when full |
//! | --- | --- | --- |
//! | sound → session | `session.speech_buffer_s`, then 1 MiB here | nothing more is read: TCP makes the client wait |
//! | events → client | 256 | the oldest are missed; an `error` says how many |
//! | sockets | `server.max_connections` | 503 |
//!
//! An interruption overtakes all sound that was read. A client that sends further ahead than these bounds can use
//! `POST …/interrupt`, which nothing delays.

use super::{
    Service,
    error::ApiError,
    gesture::{self, Asked},
    sessions::Opened,
};
use crate::{
    media::{MediaTime, Pcm},
    session::{Handle, Reason, SessionEvent, SpeechClosed, SpeechPort},
    telemetry::metrics,
};
use axum::{
    extract::{
        RawQuery, State, WebSocketUpgrade,
        ws::{CloseFrame, Message, Utf8Bytes, WebSocket, rejection::WebSocketUpgradeRejection},
    },
    http::StatusCode,
    response::Response,
};
use bytes::Bytes;
use futures::future::BoxFuture;
use serde::Deserialize;
use serde_json::json;
use std::{collections::VecDeque, sync::Arc, time::Duration};
use tokio::sync::broadcast::error::RecvError;

/// Largest message.
const MAX_MESSAGE: usize = 1 << 20;
/// What is read of a message before the connection is given up: somewhat above [`MAX_MESSAGE`], because bytes that were
/// never read make the system reset the connection, and the reason would not arrive.
const READABLE: usize = 4 * MAX_MESSAGE;
const TOO_LARGE: &str = "message above 1 MiB";
/// Sound read but not yet in the session's buffer.
const AHEAD: usize = 1 << 20;
/// Messages that are not understood before the connection is given up.
const PATIENCE: u32 = 100;
/// A client that takes no message for so long is gone.
const PATIENT: Duration = Duration::from_secs(20);

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Said {
    #[serde(alias = "start")]
    Set {
        rate: Option<u32>,
        liveliness: Option<f32>,
    },
    Gesture(Asked),
    SpeakEnd,
    Interrupt,
    Say {
        text: String,
    },
    Ping {
        #[serde(default)]
        t: serde_json::Value,
    },
}

/// `GET /v1/sessions/{id}/ws`
pub(super) async fn open(
    State(service): State<Arc<Service>>,
    Opened(handle): Opened,
    RawQuery(query): RawQuery,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let upgrade = upgrade.map_err(|_| {
        let text = "This address is for WebSockets: connect to it with ws:// or wss://.";
        ApiError::new(StatusCode::UPGRADE_REQUIRED, "no_websocket", text)
    })?;
    let asked = query.as_deref().and_then(|q| q.split('&').find_map(|pair| pair.strip_prefix("rate=")));
    let rate = asked.map(|r| r.parse().ok().and_then(rate)).map(|r| r.ok_or_else(wrong_rate)).transpose()?;
    let Ok(place) = service.sockets.clone().try_acquire_owned() else {
        let text = "As many WebSockets are open as server.max_connections allows.";
        return Err(ApiError::unavailable("full", text, Duration::from_secs(5)));
    };
    Ok(upgrade.max_message_size(READABLE).max_frame_size(READABLE).on_upgrade(move |socket| async move {
        metrics().websockets.inc();
        serve(socket, service, handle, rate).await;
        metrics().websockets.dec();
        drop(place);
    }))
}

fn rate(rate: u32) -> Option<u32> {
    (8_000..=192_000).contains(&rate).then_some(rate)
}

fn wrong_rate() -> ApiError {
    ApiError::bad_request("wrong_rate", "A rate is samples per second, from 8000 to 192000.")
}

/// In the order in which it came.
enum Sound {
    Pcm(Pcm, usize),
    End,
}

type Pushing<'a> = BoxFuture<'a, Result<u64, SpeechClosed>>;

/// What a message asks for besides what was done at once.
enum Then {
    Nothing,
    Reply(serde_json::Value),
    Say(String),
    Gesture(Asked),
    Liveliness(f32),
    Complain(&'static str, String),
}

struct Talk<'a> {
    handle: &'a Handle,
    rate: Option<u32>,
    waiting: VecDeque<Sound>,
    bytes: usize,
}

async fn serve(mut socket: WebSocket, service: Arc<Service>, handle: Handle, rate: Option<u32>) {
    // Texts that could not be spoken; each waits until it is told.
    let (failed, mut failures) = tokio::sync::mpsc::channel(8);
    let port = handle.speech();
    let mut events = handle.events();
    let mut talk = Talk { handle: &handle, rate, waiting: VecDeque::new(), bytes: 0 };
    let mut pushing: Option<(Pushing<'_>, usize)> = None;
    let (mut complaints, mut alive) =
        (0, tokio::time::interval(Duration::from_secs(service.config.websocket_silence_s) / 3));
    let mut silent = 0;
    let first = json!({ "type": "state", "state": handle.snapshot().state.label() });
    if !send(&mut socket, Message::text(first.to_string())).await {
        return;
    }
    loop {
        if pushing.is_none() {
            pushing = talk.next(&port);
        }
        let step = tokio::select! {
            pushed = async { match &mut pushing { Some((push, _)) => push.await, None => std::future::pending().await } } => {
                talk.bytes -= pushing.take().map_or(0, |p| p.1);
                match pushed {
                    Ok(_) => Then::Nothing,
                    // The last event says why.
                    Err(SpeechClosed::Over) => Then::Nothing,
                    Err(e) => Then::Complain("speech_refused", super::presenters::sentence(&e.to_string())),
                }
            },
            event = events.recv() => match event {
                Ok(SessionEvent::Closed(reason)) => return close(socket, &reason).await,
                Ok(event) => wire(&event).map_or(Then::Nothing, Then::Reply),
                Err(RecvError::Lagged(n)) => Then::Complain("missed", format!("{n} events were missed; read faster.")),
                Err(RecvError::Closed) => return,
            },
            message = socket.recv(), if talk.bytes < AHEAD => {
                silent = 0;
                match message {
                    Some(Ok(Message::Text(text))) if text.len() > MAX_MESSAGE => return goodbye(socket, 1009, TOO_LARGE).await,
                    Some(Ok(Message::Binary(sound))) if sound.len() > MAX_MESSAGE => return goodbye(socket, 1009, TOO_LARGE).await,
                    Some(Ok(Message::Text(text))) => talk.text(&text),
                    Some(Ok(Message::Binary(sound))) => talk.sound(&sound),
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => Then::Nothing,
                    Some(Ok(Message::Close(_))) | None => return,
                    Some(Err(e)) => {
                        let too_large = e.to_string().to_ascii_lowercase().contains("too l");
                        let (code, text) = if too_large { (1009, TOO_LARGE) } else { (1002, "not a WebSocket message") };
                        return goodbye(socket, code, text).await;
                    }
                }
            },
            Some((code, message)) = failures.recv() => Then::Complain(code, message),
            _ = alive.tick() => {
                silent += 1;
                if silent > 3 && talk.bytes < AHEAD {
                    return goodbye(socket, 1008, "nothing was heard from you").await;
                }
                if !send(&mut socket, Message::Ping(Bytes::new())).await {
                    return;
                }
                Then::Nothing
            },
        };
        // What only the service knows whether it can be done.
        let asked = match step {
            Then::Gesture(ref asked) => gesture::give(&service, &handle, asked),
            Then::Liveliness(asked) => {
                gesture::liveliness(&service, asked).map(|l| handle.direction().set_liveliness(l))
            }
            _ => Ok(()),
        };
        let step = match asked {
            Ok(()) => step,
            Err(error) => Then::Complain(error.code, error.message),
        };
        let reply = match step {
            Then::Nothing | Then::Gesture(_) | Then::Liveliness(_) => continue,
            Then::Reply(reply) => reply,
            Then::Say(text) => {
                let (service, handle, failed) = (service.clone(), handle.clone(), failed.clone());
                tokio::spawn(async move {
                    if let Err(error) = super::say::say(&service, &handle, &text).await {
                        let _ = failed.send((error.code, error.message)).await;
                    }
                });
                continue;
            }
            Then::Complain(code, message) => {
                metrics().websocket_message("refused");
                complaints += 1;
                if complaints >= PATIENCE {
                    return goodbye(socket, 1008, "too many messages that could not be understood").await;
                }
                json!({ "type": "error", "code": code, "message": message })
            }
        };
        if !send(&mut socket, Message::text(reply.to_string())).await {
            return;
        }
    }
}

impl Talk<'_> {
    fn next<'p>(&mut self, port: &'p SpeechPort) -> Option<(Pushing<'p>, usize)> {
        loop {
            match self.waiting.pop_front()? {
                Sound::End => port.end(),
                Sound::Pcm(pcm, bytes) => return Some((Box::pin(port.push(pcm)), bytes)),
            }
        }
    }

    fn sound(&mut self, bytes: &Bytes) -> Then {
        let Some(rate) = self.rate else {
            let text = "Say at which rate the sound is first: {\"type\":\"set\",\"rate\":24000}.";
            return Then::Complain("no_rate", text.into());
        };
        if bytes.len() % 2 != 0 {
            return Then::Complain("odd_bytes", "Sound is 16-bit samples: an even number of bytes.".into());
        }
        metrics().websocket_message("sound");
        let samples = bytes.chunks_exact(2).map(|b| f32::from(i16::from_le_bytes([b[0], b[1]])) / 32768.0).collect();
        self.bytes += bytes.len();
        self.waiting.push_back(Sound::Pcm(Pcm { at: MediaTime::ZERO, rate, samples }, bytes.len()));
        Then::Nothing
    }

    fn text(&mut self, text: &str) -> Then {
        let said = match serde_json::from_str(text) {
            Ok(said) => said,
            Err(e) => return Then::Complain("wrong_message", super::presenters::sentence(&e.to_string())),
        };
        metrics().websocket_message("control");
        match said {
            Said::Set { rate: None, liveliness: None } => {
                let text = "Set what? There are rate (samples per second) and liveliness.";
                return Then::Complain("wrong_message", text.into());
            }
            Said::Set { rate: asked, liveliness } => {
                if let Some(asked) = asked {
                    match rate(asked) {
                        Some(rate) => self.rate = Some(rate),
                        None => return Then::Complain("wrong_rate", wrong_rate().message),
                    }
                }
                return liveliness.map_or(Then::Nothing, Then::Liveliness);
            }
            Said::Gesture(asked) => return Then::Gesture(asked),
            Said::SpeakEnd => self.waiting.push_back(Sound::End),
            Said::Interrupt => {
                let gone: usize = self.waiting.drain(..).map(|s| if let Sound::Pcm(_, n) = s { n } else { 0 }).sum();
                self.bytes -= gone;
                self.handle.interrupt();
            }
            Said::Say { text } => return Then::Say(text),
            Said::Ping { t } => return Then::Reply(json!({ "type": "pong", "t": t })),
        }
        Then::Nothing
    }
}

/// An event as the client reads it.
fn wire(event: &SessionEvent) -> Option<serde_json::Value> {
    Some(match event {
        SessionEvent::State(state) => json!({ "type": "state", "state": state.label() }),
        SessionEvent::SpeakStarted { segment } => json!({ "type": "speak_started", "segment": segment }),
        SessionEvent::SpeakEnded { segment, position, interrupted } => {
            let position = (position.as_secs_f64() * 1000.0).round() / 1000.0;
            json!({ "type": "speak_ended", "segment": segment, "position": position, "interrupted": interrupted })
        }
        SessionEvent::Metrics(m) => m.wire(),
        SessionEvent::Closed(_) => return None,
    })
}

/// False: the client is gone, or does not read.
async fn send(socket: &mut WebSocket, message: Message) -> bool {
    matches!(tokio::time::timeout(PATIENT, socket.send(message)).await, Ok(Ok(())))
}

/// The session is over: says why, twice.
async fn close(mut socket: WebSocket, reason: &Reason) {
    let told = json!({ "type": "closed", "reason": reason.label(), "message": reason.message() });
    if send(&mut socket, Message::text(told.to_string())).await {
        let code = match reason {
            Reason::Stopped => 1000,
            Reason::ServiceClosing => 1001,
            Reason::EngineFailed(_) | Reason::CodecFailed(_) | Reason::Abandoned => 1011,
            _ => 4000,
        };
        goodbye(socket, code, reason.label()).await;
    }
}

async fn goodbye(mut socket: WebSocket, code: u16, why: &'static str) {
    send(&mut socket, Message::Close(Some(CloseFrame { code, reason: Utf8Bytes::from_static(why) }))).await;
    // The other side answers with a close of its own; what it sent before may be read away.
    let rest = async { while matches!(socket.recv().await, Some(Ok(_))) {} };
    let _ = tokio::time::timeout(Duration::from_secs(1), rest).await;
}
