//! `POST /v1/sessions/{id}/say`: text in, spoken by the configured voice. The WebSocket's `say` comes here too.
//!
//! | edge | capacity | when full |
//! | --- | --- | --- |
//! | texts → one session | `voice.queue` | refused with 429 |
//!
//! One task a session speaks its texts in their order. An interruption, by whatever way, ends the one being spoken and
//! drops those that wait.

use super::{
    Service,
    error::ApiError,
    sessions::{Opened, Sent},
};
use crate::{
    session::{Handle, SessionEvent, SessionId, SpeechPort},
    voice::{Speech, VoiceError},
};
use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use serde_json::json;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::sync::{broadcast::error::RecvError, mpsc, oneshot};

/// How long a caller waits for the first sound before it is only told that the text was taken.
const FIRST_SOUND: Duration = Duration::from_secs(10);
/// How soon an interruption is noticed between two pieces of sound.
const LOOK: Duration = Duration::from_millis(40);

struct Saying {
    speech: Speech,
    /// Interruptions when it was taken.
    interrupts: u64,
    /// Told the segment's number with the first sound, or why there is none.
    begun: oneshot::Sender<Result<u64, String>>,
}

/// Texts that wait, by session.
#[derive(Clone, Default)]
pub(super) struct Sayings(Arc<Mutex<HashMap<SessionId, Queue>>>);

#[derive(Clone)]
struct Queue {
    texts: mpsc::Sender<Saying>,
    /// Texts that wait, and the one being spoken.
    left: Arc<AtomicUsize>,
}

impl Sayings {
    fn lock(&self) -> MutexGuard<'_, HashMap<SessionId, Queue>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn queue(&self, handle: &Handle, capacity: usize) -> Queue {
        let mut all = self.lock();
        if let Some(queue) = all.get(handle.id()).filter(|q| !q.texts.is_closed()) {
            return queue.clone();
        }
        let (texts, waiting) = mpsc::channel(capacity);
        let queue = Queue { texts, left: Arc::default() };
        all.insert(handle.id().clone(), queue.clone());
        tokio::spawn(speak(self.clone(), handle.clone(), waiting, queue.left.clone()));
        queue
    }
}

/// Speaks what comes until the session is over.
async fn speak(sayings: Sayings, handle: Handle, mut texts: mpsc::Receiver<Saying>, left: Arc<AtomicUsize>) {
    let mut events = handle.events();
    loop {
        tokio::select! {
            text = texts.recv() => match text {
                Some(text) => {
                    one(&handle, text).await;
                    left.fetch_sub(1, Ordering::AcqRel);
                }
                None => break,
            },
            event = events.recv() => match event {
                Ok(SessionEvent::Closed(_)) | Err(RecvError::Closed) => break,
                _ => {}
            },
        }
    }
    sayings.lock().remove(handle.id());
}

async fn one(handle: &Handle, saying: Saying) {
    let Saying { mut speech, interrupts, begun } = saying;
    let mut begun = Some(begun);
    let mut tell = |word: Result<u64, String>| {
        if let Some(begun) = begun.take() {
            let _ = begun.send(word);
        }
    };
    let port: SpeechPort = handle.speech();
    let stopped = async || {
        while handle.interrupts() == interrupts {
            tokio::time::sleep(LOOK).await;
        }
    };
    let work = async {
        while let Some(piece) = speech.next().await {
            // An interruption between the piece's coming and its push: nothing of it may be heard.
            if handle.interrupts() != interrupts {
                return Err("it was interrupted".to_string());
            }
            match port.push(piece.map_err(|e| e.to_string())?).await.map_err(|e| e.to_string())? {
                // It waited, and an interruption let it go.
                0 => return Err("it was interrupted".to_string()),
                segment => tell(Ok(segment)),
            }
        }
        Ok(())
    };
    let ended = tokio::select! {
        done = work => done,
        () = stopped() => Err("it was interrupted".to_string()),
    };
    port.end();
    if let Err(why) = ended {
        tracing::info!(session = handle.id().short(), "a text was not spoken to its end: {why}");
        tell(Err(why));
    }
}

/// How a text was taken.
pub(super) enum Said {
    /// Its first sound is with the session; the segment's number is in `speak_started` and `speak_ended`.
    Speaking { segment: u64, sentences: usize },
    /// It waits for those before it, or for its voice.
    Waiting { sentences: usize },
}

/// Makes a session say something.
///
/// # Errors
/// A text that cannot be spoken, a full queue (429), a voice that fails (502).
pub(super) async fn say(service: &Service, handle: &Handle, text: &str) -> Result<Said, ApiError> {
    let voice = &service.rooms.voice;
    let speech = voice.speak(text).map_err(|e| match e {
        VoiceError::Off => ApiError::new(StatusCode::FORBIDDEN, "no_voice", sentence(&e)),
        VoiceError::TooLong { .. } => ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "text_too_long", sentence(&e)),
        _ => ApiError::unusable("no_text", sentence(&e)),
    })?;
    let sentences = speech.left();
    let queue = service.sayings.queue(handle, voice.config().queue);
    let (begun, word) = oneshot::channel();
    let before = queue.left.fetch_add(1, Ordering::AcqRel);
    let sent = queue.texts.try_send(Saying { speech, interrupts: handle.interrupts(), begun });
    if sent.is_err() {
        queue.left.fetch_sub(1, Ordering::AcqRel);
    }
    sent.map_err(|e| match e {
        mpsc::error::TrySendError::Full(_) => ApiError::new(
            StatusCode::TOO_MANY_REQUESTS,
            "too_many_texts",
            format!("There are {} texts waiting; wait until one was spoken, or interrupt.", voice.config().queue),
        ),
        mpsc::error::TrySendError::Closed(_) => ApiError::not_found("no_such_session", "The session is over."),
    })?;
    if before > 0 {
        return Ok(Said::Waiting { sentences });
    }
    match tokio::time::timeout(FIRST_SOUND, word).await {
        Ok(Ok(Ok(segment))) => Ok(Said::Speaking { segment, sentences }),
        Ok(Ok(Err(why))) => {
            Err(ApiError::new(StatusCode::BAD_GATEWAY, "voice_failed", format!("The text was not spoken: {why}.")))
        }
        Ok(Err(_)) | Err(_) => Ok(Said::Waiting { sentences }),
    }
}

/// With a capital and a full stop.
fn sentence(error: &VoiceError) -> String {
    super::presenters::sentence(&error.to_string())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    text: String,
    /// First silences what is being said.
    #[serde(default)]
    interrupt: bool,
}

/// `POST /v1/sessions/{id}/say`
pub(super) async fn route(
    State(service): State<Arc<Service>>,
    Opened(handle): Opened,
    Sent(Wanted { text, interrupt }): Sent<Wanted>,
) -> Result<Response, ApiError> {
    if interrupt {
        handle.interrupt();
    }
    Ok(match say(&service, &handle, &text).await? {
        Said::Speaking { segment, sentences } => {
            (StatusCode::OK, Json(json!({ "state": "speaking", "segment": segment, "sentences": sentences })))
        }
        Said::Waiting { sentences } => {
            (StatusCode::ACCEPTED, Json(json!({ "state": "waiting", "sentences": sentences })))
        }
    }
    .into_response())
}
