//! WHIP in and WHEP out (RFC 9725, draft-ietf-wish-whep-03): who speaks to a session, and who watches it.
//!
//! | route | what |
//! | --- | --- |
//! | `POST /v1/sessions/{id}/whip` | a publisher's offer: its voice is the session's microphone; a newer publisher takes over |
//! | `POST /v1/sessions/{id}/whep` | a player's offer: the presenter's voice and face; `?view=` for another background |
//! | `PATCH`, `DELETE …/whip/{connection}`, `…/whep/{connection}` | as for every connection: [`resource`] |
//! | `POST /whip/{id}`, `/whep/{id}` | 307 to the above: short enough to be typed |

use super::{
    Service,
    error::ApiError,
    resource,
    sessions::{self, Opened},
};
use crate::{
    codec::View,
    net::Link,
    session::{Handle, LinkEvent, LinkOut, SessionId, SinkRole, State as Life},
};
use axum::{
    body::Body,
    extract::{OriginalUri, Path, RawQuery, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

/// New connections of all sessions together: (at once, per second).
pub(super) const OFFERS: (f64, f64) = (100.0, 20.0);
/// A player that comes while the presenter is being prepared waits so long before it is told to come again.
const PREPARING: Duration = Duration::from_secs(3);
const COME_AGAIN: Duration = Duration::from_secs(2);
/// Longest wait from the answer to the connection.
const CONNECT: Duration = Duration::from_secs(20);
/// Speech packets on their way from a publisher to the session: 1 s. When full, the peer's own queue fills, and then it
/// drops and counts.
const SPEECH: usize = 50;

/// `POST /v1/sessions/{id}/whip`
pub(super) async fn publish(
    State(service): State<Arc<Service>>,
    Opened(handle): Opened,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let (offer, permit) = admitted(&service, &headers, body).await?;
    let (link, answer) = service.rooms.net.answer_whip(&offer).await.map_err(resource::net_error)?;
    Ok(begin(&service, "whip", handle.id(), link, answer, permit, |media| listen(media, handle.clone())))
}

/// `POST /v1/sessions/{id}/whep`
pub(super) async fn play(
    State(service): State<Arc<Service>>,
    Opened(handle): Opened,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let (offer, permit) = admitted(&service, &headers, body).await?;
    let asked = query.as_deref().and_then(|q| q.split('&').find_map(|pair| pair.strip_prefix("view=")));
    let view = asked.map(|v| sessions::background(&service, v)).transpose()?;
    if tokio::time::timeout(PREPARING, live(&handle)).await.is_err() {
        let mut error = ApiError::new(
            StatusCode::CONFLICT,
            "not_live",
            "The presenter is not there yet, or is leaving. Try again in a moment.",
        );
        error.retry_after = Some(COME_AGAIN);
        return Err(error);
    }
    let (link, answer) = service.rooms.net.answer_whep(&offer).await.map_err(resource::net_error)?;
    Ok(begin(&service, "whep", handle.id(), link, answer, permit, |media| watch(media, handle.clone(), view)))
}

/// `POST /whip/{id}`, `/whep/{id}`. 307 keeps the method and the body (RFC 9725 §4.5).
pub(super) async fn moved(OriginalUri(uri): OriginalUri, Path(id): Path<String>) -> Result<Response, ApiError> {
    if !id.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return Err(ApiError::not_found("no_such_session", "This session has ended, or never was."));
    }
    let kind = if uri.path().starts_with("/whip/") { "whip" } else { "whep" };
    let query = uri.query().map(|q| format!("?{q}")).unwrap_or_default();
    let to = format!("/v1/sessions/{id}/{kind}{query}");
    Ok((StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, to)]).into_response())
}

/// `GET` and `HEAD` where offers are posted: no content, and a type that says what may be posted, so that players find
/// out what this is (draft-ietf-wish-whep-03 §4.1).
pub(super) async fn nothing() -> Response {
    (StatusCode::OK, [(header::CONTENT_TYPE, resource::SDP)]).into_response()
}

/// What comes before the offer is looked at: the pace, its type, a place.
async fn admitted(
    service: &Service,
    headers: &HeaderMap,
    body: Body,
) -> Result<(String, OwnedSemaphorePermit), ApiError> {
    service.offers.lock().unwrap_or_else(|e| e.into_inner()).take(Instant::now())?;
    let offer = resource::offer(headers, body).await?;
    let permit = service.connections.clone().try_acquire_owned().map_err(|_| {
        let why = "As many connections stand as server.connections_max allows.";
        ApiError::unavailable("full", why, Duration::from_secs(5))
    })?;
    Ok((offer, permit))
}

/// A connection's events and sending half.
type Media = (mpsc::Receiver<LinkEvent>, Arc<dyn LinkOut>);

/// Lists the connection, starts its task, and tells the caller.
fn begin<F: Future<Output = ()> + Send + 'static>(
    service: &Service,
    kind: &str,
    id: &SessionId,
    (peer, events, out): Link,
    answer: String,
    permit: OwnedSemaphorePermit,
    task: impl FnOnce(Media) -> F,
) -> Response {
    let path = format!("/v1/sessions/{}/{kind}/{:032x}", id.as_str(), rand::random::<u128>());
    let etag = peer.etag();
    let peer = Arc::new(peer);
    let listed = service.peers.enter(&path, &peer, None);
    let task = task((events, out));
    tokio::spawn(async move {
        task.await;
        peer.close().await;
        drop((listed, permit));
    });
    resource::created(service, &path, &etag, answer)
}

/// Waits until a presenter is there.
async fn live(handle: &Handle) {
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    loop {
        ticks.tick().await;
        if matches!(handle.snapshot().state, Life::Idle | Life::Speaking) {
            return;
        }
    }
}

/// The next event; `None` at the end, or when the connection does not come up in time.
async fn next(events: &mut mpsc::Receiver<LinkEvent>, connected: &mut bool, deadline: Instant) -> Option<LinkEvent> {
    let event = match *connected {
        true => events.recv().await,
        false => tokio::time::timeout_at(deadline.into(), events.recv()).await.unwrap_or_default(),
    };
    *connected |= matches!(event, Some(LinkEvent::Connected));
    event.filter(|event| !matches!(event, LinkEvent::Closed(_)))
}

/// Hands a publisher's voice to the session, from when its connection stands until either ends.
async fn listen((mut events, _out): Media, handle: Handle) {
    let (mut connected, deadline) = (false, Instant::now() + CONNECT);
    let mut speech: Option<mpsc::Sender<LinkEvent>> = None;
    loop {
        let over = async {
            match &speech {
                Some(speech) => speech.closed().await,
                None => std::future::pending().await,
            }
        };
        let event = tokio::select! {
            event = next(&mut events, &mut connected, deadline) => event,
            // The session is over, or another publisher took over.
            () = over => None,
        };
        match (event, &speech) {
            (Some(LinkEvent::Connected), None) => {
                let (sender, receiver) = mpsc::channel(SPEECH);
                handle.listen(receiver);
                speech = Some(sender);
            }
            (Some(event @ LinkEvent::Speech(_)), Some(speech)) => {
                // An error is seen in the next round.
                let _ = speech.send(event).await;
            }
            (Some(_), _) => {}
            (None, _) => return,
        }
    }
}

/// Shows the session to a player until either ends.
async fn watch((mut events, out): Media, handle: Handle, view: Option<View>) {
    let (mut connected, deadline) = (false, Instant::now() + CONNECT);
    let mut place = None;
    while let Some(event) = next(&mut events, &mut connected, deadline).await {
        match event {
            LinkEvent::Connected => {
                place.get_or_insert_with(|| match view {
                    Some(view) => handle.attach_as(out.clone(), SinkRole::Viewer, view),
                    None => handle.attach(out.clone(), SinkRole::Viewer),
                });
            }
            LinkEvent::KeyframeRequested => handle.keyframe(),
            _ => {}
        }
    }
}
