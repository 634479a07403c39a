//! `/v1/sessions/{id}/recording`: MP4 files of a session, begun and ended by its token.
//!
//! | route | what |
//! | --- | --- |
//! | `POST …/recording` | begins one; 201 |
//! | `GET …/recording` | how this session's recordings stand, with their files |
//! | `DELETE …/recording` | ends the one that runs; answers when its file is complete |
//! | `GET …/recording/{file}` | a file, also while it grows; `Range` is understood |
//! | `GET /v1/recordings`, `…/{file}` | all files in the folder, for whoever runs the service |

use super::{Service, error::ApiError, sessions::Opened};
use crate::{
    codec::marks::{Mark, rfc3339},
    session::{Attachment, Handle, Recorder, RecordingSpec, RecordingStatus, SessionEvent, SessionId, SinkRole},
};
use axum::{
    Json,
    body::Body,
    extract::{Path, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::json;
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    time::SystemTime,
};
use tokio::io::{AsyncReadExt, AsyncSeekExt, SeekFrom};

/// Recordings of one session that are remembered while it lives.
const MOST: usize = 64;

struct Entry {
    recorder: Arc<Recorder>,
    /// `None` once it was ended.
    place: Option<Attachment>,
}

/// All recordings of live sessions.
#[derive(Clone, Default)]
pub(super) struct Recordings(Arc<Mutex<HashMap<SessionId, Vec<Entry>>>>);

impl Recordings {
    fn lock(&self) -> MutexGuard<'_, HashMap<SessionId, Vec<Entry>>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn told(&self, id: &SessionId) -> Vec<serde_json::Value> {
        self.lock().get(id).into_iter().flatten().map(|e| told(id, &e.recorder.status())).collect()
    }
}

fn told(id: &SessionId, status: &RecordingStatus) -> serde_json::Value {
    let url = |file: &String| json!({ "file": file, "url": format!("/v1/sessions/{}/recording/{file}", id.as_str()) });
    json!({
        "state": if status.over { "over" } else { "running" },
        "parts": status.parts.iter().map(url).collect::<Vec<_>>(),
        "bytes": status.bytes,
        "length_s": (status.length.as_secs_f64() * 1000.0).round() / 1000.0,
        "pictures_dropped": status.dropped,
        "error": status.error,
    })
}

fn folder(service: &Service) -> Result<PathBuf, ApiError> {
    match service.config.recordings_dir.as_str() {
        "" => Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "no_recordings",
            "This service makes no recordings; whoever runs it sets server.recordings_dir.",
        )),
        folder => Ok(folder.into()),
    }
}

fn already() -> ApiError {
    let text = "This session is being recorded already; end that recording first (DELETE).";
    ApiError::new(StatusCode::CONFLICT, "already_recording", text)
}

/// `POST /v1/sessions/{id}/recording`
pub(super) async fn begin(State(service): State<Arc<Service>>, Opened(handle): Opened) -> Result<Response, ApiError> {
    let folder = folder(&service)?;
    let id = handle.id().clone();
    let running = |all: &[Entry]| all.iter().any(|e| !e.recorder.status().over);
    let nth = {
        let all = service.recordings.lock();
        let own = all.get(&id).map_or(&[][..], |o| o);
        if running(own) {
            return Err(already());
        }
        if own.len() >= MOST {
            return Err(ApiError::new(
                StatusCode::CONFLICT,
                "too_many_recordings",
                format!("This session has {MOST} recordings already."),
            ));
        }
        own.len() + 1
    };
    let when = rfc3339(SystemTime::now()).replace(':', "").replace('-', "");
    let spec = RecordingSpec {
        folder,
        name: format!("{when}-{}-{nth}", id.short()),
        max_bytes: service.config.recording_max_mb << 20,
        mark: Mark { engine: service.rooms.engine_name.into(), session: id.short().into() },
    };
    let asking = handle.clone();
    let start = move || Recorder::start(spec, move || asking.keyframe());
    let recorder = tokio::task::spawn_blocking(start).await.map_err(|e| ApiError::internal(e.to_string()))?;
    let recorder = recorder.map_err(|e| {
        tracing::warn!("a recording could not begin: {e}");
        ApiError::new(StatusCode::INSUFFICIENT_STORAGE, "cannot_record", format!("The recording cannot begin: {e}."))
    })?;
    let recorder = Arc::new(recorder);
    let place = Some(handle.attach(recorder.clone(), SinkRole::Recorder));
    let answer = told(&id, &recorder.status());
    let over = {
        let mut all = service.recordings.lock();
        let own = all.entry(id.clone()).or_default();
        if running(own) {
            // Somebody was faster; this one never was.
            drop(all);
            drop(place);
            return Err(already());
        }
        own.push(Entry { recorder, place });
        own.len() == 1
    };
    if over {
        tokio::spawn(forget(service.recordings.clone(), handle));
    }
    Ok((StatusCode::CREATED, Json(answer)).into_response())
}

/// Lets a session's recordings go when it is over; their files are completed on the way.
async fn forget(recordings: Recordings, handle: Handle) {
    let (mut events, id) = (handle.events(), handle.id().clone());
    drop(handle);
    loop {
        match events.recv().await {
            Ok(SessionEvent::Closed(_)) | Err(tokio::sync::broadcast::error::RecvError::Closed) => break,
            _ => {}
        }
    }
    let gone = recordings.lock().remove(&id);
    let _ = tokio::task::spawn_blocking(move || drop(gone)).await;
}

/// `GET /v1/sessions/{id}/recording`
pub(super) async fn list(State(service): State<Arc<Service>>, Opened(handle): Opened) -> Result<Response, ApiError> {
    Ok(Json(json!({ "recordings": service.recordings.told(handle.id()) })).into_response())
}

/// `DELETE /v1/sessions/{id}/recording`
pub(super) async fn end(State(service): State<Arc<Service>>, Opened(handle): Opened) -> Result<Response, ApiError> {
    let running = {
        let mut all = service.recordings.lock();
        let entry = all.get_mut(handle.id()).and_then(|own| own.iter_mut().find(|e| e.place.is_some()));
        entry.map(|e| (e.place.take(), e.recorder.clone()))
    };
    let Some((place, recorder)) = running else {
        return Err(ApiError::new(StatusCode::CONFLICT, "not_recording", "This session is not being recorded."));
    };
    drop(place);
    let finish = move || {
        recorder.finish();
        recorder.status()
    };
    let status = tokio::task::spawn_blocking(finish).await.map_err(|e| ApiError::internal(e.to_string()))?;
    Ok(Json(told(handle.id(), &status)).into_response())
}

/// `GET /v1/sessions/{id}/recording/{file}`
pub(super) async fn file(
    State(service): State<Arc<Service>>,
    Opened(handle): Opened,
    Path((_, name)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let own = {
        let all = service.recordings.lock();
        all.get(handle.id()).into_iter().flatten().any(|e| e.recorder.status().parts.contains(&name))
    };
    if !own {
        return Err(no_such_file());
    }
    send(&service, &name, &headers).await
}

/// `GET /v1/recordings`
pub(super) async fn all(State(service): State<Arc<Service>>) -> Result<Response, ApiError> {
    let folder = folder(&service)?;
    let read = move || {
        let mut files = Vec::new();
        // A folder that is not there yet holds nothing.
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().to_string();
            if let (true, Ok(meta)) = (is_ours(&name), entry.metadata()) {
                files.push(json!({ "file": name, "url": format!("/v1/recordings/{name}"), "bytes": meta.len() }));
            }
        }
        files.sort_by_key(|f| f["file"].as_str().unwrap_or_default().to_string());
        files
    };
    let files = tokio::task::spawn_blocking(read).await.map_err(|e| ApiError::internal(e.to_string()))?;
    Ok(Json(json!({ "recordings": files })).into_response())
}

/// `GET /v1/recordings/{file}`
pub(super) async fn any(
    State(service): State<Arc<Service>>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    send(&service, &name, &headers).await
}

fn no_such_file() -> ApiError {
    ApiError::not_found("no_such_recording", "There is no such recording.")
}

/// Names that we give: no path can be made of them.
fn is_ours(name: &str) -> bool {
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'));
    plain && !name.starts_with('.') && name.ends_with(".mp4") && !name.contains("..")
}

async fn send(service: &Service, name: &str, headers: &HeaderMap) -> Result<Response, ApiError> {
    let folder = folder(service)?;
    if !is_ours(name) {
        return Err(no_such_file());
    }
    let mut file = tokio::fs::File::open(folder.join(name)).await.map_err(|_| no_such_file())?;
    let size = file.metadata().await.map_err(|e| ApiError::internal(e.to_string()))?.len();
    let range = headers.get(header::RANGE).and_then(|v| v.to_str().ok()).and_then(|v| range(v, size));
    let (first, last, status) = match range {
        Some(Ok((first, last))) => (first, last, StatusCode::PARTIAL_CONTENT),
        Some(Err(())) => {
            let sizes = [(header::CONTENT_RANGE, format!("bytes */{size}"))];
            return Ok((StatusCode::RANGE_NOT_SATISFIABLE, sizes).into_response());
        }
        None => (0, size.saturating_sub(1), StatusCode::OK),
    };
    file.seek(SeekFrom::Start(first)).await.map_err(|e| ApiError::internal(e.to_string()))?;
    let length = if size == 0 { 0 } else { last - first + 1 };
    let body = Body::from_stream(tokio_util::io::ReaderStream::new(file.take(length)));
    let mut response = (status, body).into_response();
    let put = [
        (header::CONTENT_TYPE, "video/mp4".to_string()),
        (header::CONTENT_LENGTH, length.to_string()),
        (header::ACCEPT_RANGES, "bytes".to_string()),
        (header::CONTENT_DISPOSITION, format!("inline; filename=\"{name}\"")),
    ];
    for (key, value) in put {
        if let Ok(value) = value.parse() {
            response.headers_mut().insert(key, value);
        }
    }
    if status == StatusCode::PARTIAL_CONTENT
        && let Ok(value) = format!("bytes {first}-{last}/{size}").parse()
    {
        response.headers_mut().insert(header::CONTENT_RANGE, value);
    }
    Ok(response)
}

/// `bytes=A-B`, `bytes=A-` or `bytes=-N` of a file of `size` bytes: first and last byte. `None`: not understood, so the
/// whole file is sent (RFC 9110 §14.2); `Err`: outside the file.
fn range(text: &str, size: u64) -> Option<Result<(u64, u64), ()>> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let number = |s: &str| s.parse::<u64>().ok();
    let (first, last) = match (first, last) {
        ("", n) => (size.saturating_sub(number(n)?), size.saturating_sub(1)),
        (a, "") => (number(a)?, size.saturating_sub(1)),
        (a, b) => (number(a)?, number(b)?.min(size.saturating_sub(1))),
    };
    Some(if first >= size || last < first { Err(()) } else { Ok((first, last)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_players_write_them() {
        assert_eq!(range("bytes=0-", 100), Some(Ok((0, 99))));
        assert_eq!(range("bytes=10-19", 100), Some(Ok((10, 19))));
        assert_eq!(range("bytes=90-500", 100), Some(Ok((90, 99))));
        assert_eq!(range("bytes=-10", 100), Some(Ok((90, 99))));
        assert_eq!(range("bytes=100-", 100), Some(Err(())));
        assert_eq!(range("bytes=0-", 0), Some(Err(())));
        for odd in ["bytes=a-b", "items=0-1", "bytes=0-1,5-6", ""] {
            assert_eq!(range(odd, 100), None, "{odd}");
        }
    }

    #[test]
    fn no_name_leads_out_of_the_folder() {
        assert!(is_ours("20260131T120000Z-01234567-1.mp4") && is_ours("20260131T120000Z-01234567-1.2.mp4"));
        for bad in ["../x.mp4", "..mp4", ".x.mp4", "a/b.mp4", "a\\b.mp4", "x.mp4.part", "", "x%2fy.mp4"] {
            assert!(!is_ours(bad), "{bad}");
        }
    }
}
