//! WHIP as a client (RFC 9725): carries a session to somebody else's server, and comes back when that goes away.
//!
//! One task per target: `OPTIONS` for the server's STUN and TURN (the WebRTC library gathers before it offers, which is
//! the case RFC 9725 §4.6 allows this for), `POST` of the offer along temporary redirects, media until either side ends,
//! `DELETE`. What may be cured by waiting is tried again, ever more slowly; what may not, ends it with the server's words.

use super::{IceServer, Link, Net, NetError, Reach};
use crate::session::{Handle, LinkEvent, SessionEvent, SinkRole};
use reqwest::{
    Method, Response, StatusCode, Url,
    header::{ACCEPT, CONTENT_TYPE, HeaderMap, LINK, LOCATION, RETRY_AFTER},
};
use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio_util::sync::{CancellationToken, DropGuard};

const SDP: &str = "application/sdp";
/// Longest wait for an answer to one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
const OPTIONS_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest wait from the answer to the connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
const MAX_REDIRECTS: usize = 5;
/// Largest answer read.
const MAX_ANSWER: usize = 64 * 1024;
/// First and longest pause between attempts; a server's `Retry-After` is kept within the same bounds.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// A connection that stood so long begins anew with the first pause.
const STEADY: Duration = Duration::from_secs(30);

/// Where to publish to.
#[derive(Clone)]
pub struct Target {
    pub url: Url,
    /// Bearer token; empty = none.
    pub token: String,
    /// Where it, and what it redirects to, may be.
    pub reach: Reach,
}

/// How it stands with a publication.
#[derive(Clone, Debug, PartialEq)]
pub enum PublishState {
    Connecting,
    Live,
    /// Tried again after a pause, for this reason.
    Waiting(String),
    /// Given up, for this reason.
    Failed(String),
    Stopped,
}

/// A publication as others see it.
#[derive(Clone, Debug)]
pub struct PublishStatus {
    pub state: PublishState,
    /// Since when it is in this state.
    pub since: Instant,
    pub attempts: u32,
}

/// A session on its way to another server. Dropping it ends it.
pub struct Publication {
    status: Arc<Mutex<PublishStatus>>,
    stop: CancellationToken,
    done: CancellationToken,
    _guard: DropGuard,
}

impl Publication {
    pub fn status(&self) -> PublishStatus {
        super::shared::lock(&self.status).clone()
    }

    /// Ends it; returns when the other server has been told.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.done.cancelled().await;
    }
}

impl Net {
    /// Carries `session` to `target` until it is stopped, the session ends, or the server refuses for good.
    ///
    /// # Errors
    /// [`NetError::Stack`] when no HTTP client can be made.
    pub fn publish(&self, target: Target, session: Handle) -> Result<Publication, NetError> {
        let client = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(REQUEST_TIMEOUT)
            .dns_resolver(Arc::new(target.reach.clone()))
            .no_proxy()
            .user_agent(concat!("loquent/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(NetError::stack)?;
        let status = PublishStatus { state: PublishState::Connecting, since: Instant::now(), attempts: 0 };
        let status = Arc::new(Mutex::new(status));
        let (stop, done) = (CancellationToken::new(), CancellationToken::new());
        let task = Task { net: self.clone(), client, target, session, status: status.clone(), stop: stop.clone() };
        let over = done.clone().drop_guard();
        tokio::spawn(async move {
            task.run().await;
            drop(over);
        });
        Ok(Publication { status, _guard: stop.clone().drop_guard(), stop, done })
    }
}

/// Why an attempt ended.
#[derive(Debug)]
enum Ended {
    Stopped,
    /// Trying again may help; the server's own wish for how long to wait.
    Lost(String, Option<Duration>),
    Refused(String),
}

impl From<reqwest::Error> for Ended {
    fn from(error: reqwest::Error) -> Self {
        // The innermost cause says what happened; the outer ones repeat the address.
        let mut cause: &dyn std::error::Error = &error;
        while let Some(inner) = cause.source() {
            cause = inner;
        }
        Ended::Lost(format!("the server cannot be reached: {}", super::error::short(cause)), None)
    }
}

struct Task {
    net: Net,
    client: reqwest::Client,
    target: Target,
    session: Handle,
    status: Arc<Mutex<PublishStatus>>,
    stop: CancellationToken,
}

impl Task {
    fn tell(&self, state: PublishState) {
        let mut status = super::shared::lock(&self.status);
        status.attempts += u32::from(state == PublishState::Connecting);
        (status.state, status.since) = (state, Instant::now());
    }

    async fn run(self) {
        let mut pause = PAUSE.0;
        let mut events = self.session.events();
        let stop = self.stop.clone();
        tokio::spawn(async move {
            // The session's end is ours as well, also while we wait.
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    event = events.recv() => match event {
                        Ok(SessionEvent::Closed(_)) | Err(tokio::sync::broadcast::error::RecvError::Closed) => break,
                        _ => {}
                    }
                }
            }
            stop.cancel();
        });
        loop {
            self.tell(PublishState::Connecting);
            let began = Instant::now();
            let (why, wish) = match self.attempt().await {
                Ended::Stopped => return self.tell(PublishState::Stopped),
                Ended::Refused(why) => {
                    tracing::warn!(host = self.target.url.host_str(), why, "publishing was refused");
                    return self.tell(PublishState::Failed(why));
                }
                Ended::Lost(why, wish) => (why, wish),
            };
            tracing::info!(host = self.target.url.host_str(), why, "publishing is tried again");
            pause = if began.elapsed() > STEADY { PAUSE.0 } else { pause };
            let wait = wish.map_or(pause, |w| w.clamp(PAUSE.0, PAUSE.1));
            pause = (2 * pause).min(PAUSE.1);
            self.tell(PublishState::Waiting(why));
            tokio::select! {
                () = self.stop.cancelled() => return self.tell(PublishState::Stopped),
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// One connection, from the first request to its end.
    async fn attempt(&self) -> Ended {
        let setup = async {
            let servers = self.ice_servers().await;
            let offering = self.net.offer(&servers).await.map_err(|e| Ended::Lost(e.to_string(), None))?;
            let (resource, answer) = self.offer(offering.sdp()).await?;
            Ok::<_, Ended>((resource, offering.accept(&answer).await))
        };
        // Once the offer is on its way only its answer says what to delete: so a stop waits for that, within bounds.
        let (resource, accepted) = match setup.await {
            Ok(done) => done,
            Err(_) if self.stop.is_cancelled() => return Ended::Stopped,
            Err(ended) => return ended,
        };
        let ended = match accepted {
            Ok(link) => self.carry(link).await,
            Err(error) => Ended::Refused(format!("its answer cannot be used: {error}")),
        };
        if let Err(error) = self.send(Method::DELETE, resource, None).await {
            tracing::debug!(?error, "the other server was not told that publishing ended");
        }
        ended
    }

    /// Sends media until either side ends.
    async fn carry(&self, (peer, mut events, out): Link) -> Ended {
        let mut attachment = None;
        let deadline = tokio::time::sleep(CONNECT_TIMEOUT);
        tokio::pin!(deadline);
        let ended = loop {
            tokio::select! {
                () = self.stop.cancelled() => break Ended::Stopped,
                () = &mut deadline, if attachment.is_none() => {
                    break Ended::Lost(format!("no connection within {} s", CONNECT_TIMEOUT.as_secs()), None);
                }
                event = events.recv() => match event {
                    Some(LinkEvent::Connected) if attachment.is_none() => {
                        attachment = Some(self.session.attach(out.clone(), SinkRole::Viewer));
                        self.tell(PublishState::Live);
                    }
                    Some(LinkEvent::KeyframeRequested) => self.session.keyframe(),
                    Some(LinkEvent::Closed(why)) => break Ended::Lost(why, None),
                    None => break Ended::Lost("the connection ended".into(), None),
                    Some(_) => {}
                }
            }
        };
        drop(attachment);
        peer.close().await;
        ended
    }

    async fn ice_servers(&self) -> Vec<IceServer> {
        let asked = self.request(Method::OPTIONS, self.target.url.clone()).timeout(OPTIONS_TIMEOUT).send().await;
        asked.map(|response| links(response.headers())).unwrap_or_default()
    }

    /// Posts the offer; returns the URL of the resource and the answer.
    async fn offer(&self, offer: &str) -> Result<(Url, String), Ended> {
        let mut url = self.target.url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(Method::POST, url.clone(), Some(offer)).await?;
            let status = response.status();
            let location = response.headers().get(LOCATION).and_then(|l| l.to_str().ok()).map(|l| url.join(l));
            match (status, location) {
                (StatusCode::CREATED, Some(Ok(resource))) => {
                    self.target.reach.allows(&resource).map_err(Ended::Refused)?;
                    let answer = bounded(response).await?;
                    return Ok((resource, answer));
                }
                (StatusCode::CREATED, _) => return Err(Ended::Refused("its 201 has no usable Location".into())),
                (StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT, Some(Ok(next))) => {
                    if url.scheme() == "https" && next.scheme() != "https" {
                        return Err(Ended::Refused("it redirects from https to http".into()));
                    }
                    self.target.reach.allows(&next).map_err(Ended::Refused)?;
                    url = next;
                }
                _ => return Err(refusal(response).await),
            }
        }
        Err(Ended::Refused(format!("it redirects more than {MAX_REDIRECTS} times")))
    }

    fn request(&self, method: Method, url: Url) -> reqwest::RequestBuilder {
        let request = self.client.request(method, url);
        if self.target.token.is_empty() { request } else { request.bearer_auth(&self.target.token) }
    }

    async fn send(&self, method: Method, url: Url, offer: Option<&str>) -> Result<Response, Ended> {
        let mut request = self.request(method, url);
        if let Some(offer) = offer {
            request = request.header(CONTENT_TYPE, SDP).header(ACCEPT, SDP).body(offer.to_string());
        }
        Ok(request.send().await?)
    }
}

/// A body as text, of at most [`MAX_ANSWER`] bytes.
async fn bounded(mut response: Response) -> Result<String, Ended> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > MAX_ANSWER {
            return Err(Ended::Refused("its answer is too long to be a session description".into()));
        }
        body.extend_from_slice(&chunk);
    }
    String::from_utf8(body).map_err(|_| Ended::Refused("its answer is not text".into()))
}

/// What a status other than 201 means. Codes are read by their hundred, except those that ask for patience.
async fn refusal(response: Response) -> Ended {
    let status = response.status();
    let after = response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok()?.trim().parse().ok());
    let words = bounded(response).await.unwrap_or_default();
    let why = format!("the server answered {status} {}", super::error::short(words)).trim_end().to_string();
    let patience =
        [StatusCode::REQUEST_TIMEOUT, StatusCode::CONFLICT, StatusCode::TOO_EARLY, StatusCode::TOO_MANY_REQUESTS];
    if status.is_server_error() || patience.contains(&status) {
        Ended::Lost(why, after.map(Duration::from_secs))
    } else {
        Ended::Refused(why)
    }
}

/// The STUN and TURN servers in `Link` headers with `rel="ice-server"` that we can use (RFC 9725 §4.6).
fn links(headers: &HeaderMap) -> Vec<IceServer> {
    let values = headers.get_all(LINK).iter().filter_map(|v| v.to_str().ok());
    values.flat_map(split_links).filter_map(link).take(8).collect()
}

/// One header may hold several links; commas within `<…>` or quotes do not part them (RFC 8288 §3).
fn split_links(value: &str) -> Vec<&str> {
    split_outside(value, ',')
}

fn split_outside(value: &str, at: char) -> Vec<&str> {
    let (mut parts, mut start, mut quoted, mut angled, mut escaped) = (vec![], 0, false, false, false);
    for (n, c) in value.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '<' if !quoted => angled = true,
            '>' if !quoted => angled = false,
            c if c == at && !quoted && !angled => {
                parts.push(value[start..n].trim());
                start = n + c.len_utf8();
            }
            _ => {}
        }
    }
    parts.push(value[start..].trim());
    parts
}

fn link(text: &str) -> Option<IceServer> {
    let (url, parameters) = text.strip_prefix('<')?.split_once('>')?;
    let mut server = IceServer { urls: vec![url.to_string()], ..IceServer::default() };
    let mut ice = false;
    for parameter in split_outside(parameters, ';').into_iter().filter(|p| !p.is_empty()) {
        let (name, value) = parameter.split_once('=')?;
        let value = value.trim().trim_matches('"').replace("\\\"", "\"").replace("\\\\", "\\");
        match name.trim().to_ascii_lowercase().as_str() {
            "rel" => ice = value == "ice-server",
            "username" => server.username = value,
            "credential" => server.credential = value,
            _ => {}
        }
    }
    let usable = url.starts_with("stun:") || (url.starts_with("turn:") && !server.username.is_empty());
    (ice && usable).then_some(server)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ice_servers_are_read_from_links() {
        let mut headers = HeaderMap::new();
        let value = "<stun:s.example.net>; rel=\"ice-server\", \
             <turn:t.example.net?transport=udp>; rel=\"ice-server\"; username=\"u,;\"; credential=\"a\\\"b\"; \
             credential-type=\"password\"";
        headers.append(LINK, value.parse().unwrap());
        headers.append(LINK, "<https://x>; rel=\"urn:ietf:params:whip:ext:x\"".parse().unwrap());
        headers.append(LINK, "<turns:t.example.net>; rel=ice-server; username=u; credential=c".parse().unwrap());
        headers.append(LINK, "nonsense".parse().unwrap());
        let servers = links(&headers);
        assert_eq!(servers.len(), 2, "{servers:?}");
        assert_eq!(servers[0].urls, ["stun:s.example.net"]);
        assert_eq!((servers[1].username.as_str(), servers[1].credential.as_str()), ("u,;", "a\"b"));
    }
}
