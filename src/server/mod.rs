//! axum: API, page, WHIP-shaped route, health, metrics, shutdown.
//!
//! | route | what |
//! | --- | --- |
//! | `GET /` and the page's files | the page |
//! | `GET /v1/info` | what the page needs before it starts |
//! | `GET /v1/openapi.json` | all of this for machines |
//! | `POST /v1/live?presenter=ID` | an SDP offer → 201, answer, `Location`, `ETag` |
//! | `PATCH`, `DELETE /v1/live/{id}` | trickle or ICE restart; the end |
//! | `POST`, `GET /v1/sessions`; `GET`, `PATCH`, `DELETE /v1/sessions/{id}` | sessions of programs |
//! | `POST /v1/sessions/{id}/token`, `…/interrupt`, `…/live` | a new token; silence now; a two-way page joins |
//! | `POST /v1/sessions/{id}/gesture` | look, smile, nod… (`gesture.rs`) |
//! | `GET /v1/sessions/{id}/ws` | a WebSocket: speech in, events out |
//! | `POST /v1/sessions/{id}/whip`, `…/whep` | a publisher's or a player's offer (`whip.rs`) |
//! | `POST /v1/sessions/{id}/publish` | on to another WHIP server (`publish.rs`) |
//! | `POST /v1/sessions/{id}/say` | text in, spoken by the configured voice |
//! | `POST`, `GET`, `DELETE /v1/sessions/{id}/recording`, `GET …/{file}` | MP4 files of a session |
//! | `GET /v1/recordings`, `…/{file}` | all recordings |
//! | `POST /v1/livekit`, `/v1/session` | a session in a LiveKit room, as agents' plugins ask for one → 201, `session_id` |
//! | `GET /v1/presenters`, `/v1/presenters/{id}.png` | who can be shown |
//! | `GET /v1/design`, `/v1/design/{look}.png` | traits of designed presenters, and what they look like (`design.rs`) |
//! | `POST /v1/portraits` | a picture of one's own → an id for `presenter=portrait:{id}` |
//! | `GET /v1/status` | how it is, for the page `/status` |
//! | `GET /healthz`, `/readyz`, `/metrics` | for machines |
//!
//! Errors are JSON: `{"error":{"code","message"}}`; a refusal (503) also carries `reason` and `message` at the top.

mod access;
mod config;
mod design;
mod error;
mod gesture;
mod guard;
mod health;
mod info;
mod keys;
mod limits;
mod listen;
mod live;
mod livekit;
mod memory;
mod openapi;
mod pages;
mod portraits;
mod presenters;
mod publish;
mod recording;
mod resource;
mod say;
mod sessions;
mod spread;
mod status;
mod tls;
mod tunnel;
mod whip;
mod ws;

pub use config::{Config, EngineFailure, Visitors};
pub use keys::{Key, Scope, parse_keys};
pub use presenters::Presenter;

use crate::{
    cluster::Node,
    engine::Engine,
    net::Net,
    session::{self, Registry, SessionId},
    voice::Voice,
};
use access::{Right::*, Routes};
use axum::{
    Router,
    body::{Body, Bytes},
    extract::DefaultBodyLimit,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware,
    routing::{MethodRouter, get, patch, post},
};
use error::ApiError;
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;

/// Pictures decoded at once; one of the largest takes a few hundred megabytes for a moment.
const DECODERS: usize = 2;

/// What the service is made of.
pub struct Rooms {
    pub engine: Engine,
    /// `pocket` or `card`; the page says different things about them.
    pub engine_name: &'static str,
    pub net: Net,
    pub sessions: Registry,
    pub session_config: session::Config,
    pub livekit: crate::livekit::Config,
    /// Denoising steps; `None` takes the model's default.
    pub steps: Option<usize>,
    pub presenters: Vec<Presenter>,
    /// What speaks the text of `say`.
    pub voice: Voice,
    /// This process among others; `None` when it is alone.
    pub cluster: Option<Arc<Node>>,
}

/// Everything the routes share.
pub struct Service {
    config: Config,
    rooms: Rooms,
    peers: resource::Peers,
    sessions: sessions::Sessions,
    recordings: recording::Recordings,
    sayings: say::Sayings,
    /// Places for WebSockets, which leave the count of connections when they begin.
    sockets: Arc<Semaphore>,
    /// New WHIP and WHEP connections: how fast, and how many at once.
    offers: Mutex<resource::Pace>,
    connections: Arc<Semaphore>,
    publications: publish::Publications,
    portraits: portraits::Portraits,
    decoders: Semaphore,
    /// Presenters that may be drawn at once.
    easel: Semaphore,
    draining: AtomicBool,
    /// What each route wants, known once the router is there.
    rights: OnceLock<access::Rights>,
    keys: keys::Keys,
    limits: limits::Limits,
    tls: Result<Option<tls::Tls>, String>,
    began: Instant,
}

impl Service {
    /// Puts the rooms together; nothing listens yet.
    pub fn new(config: Config, rooms: Rooms) -> Arc<Service> {
        let ttl = Duration::from_secs(config.portrait_ttl_s);
        Arc::new(Service {
            portraits: portraits::Portraits::new(config.portraits_kept, ttl),
            decoders: Semaphore::new(DECODERS),
            easel: Semaphore::new(1),
            draining: AtomicBool::new(false),
            rights: OnceLock::new(),
            keys: keys::Keys::new(&config),
            began: Instant::now(),
            tls: tls::Tls::new(&config),
            limits: limits::Limits::new(&config, rooms.cluster.clone(), Instant::now()),
            peers: resource::Peers::default(),
            sessions: sessions::Sessions::default(),
            recordings: recording::Recordings::default(),
            sayings: say::Sayings::default(),
            sockets: Arc::new(Semaphore::new(config.max_connections)),
            offers: Mutex::new(resource::Pace::new(whip::OFFERS, Instant::now())),
            connections: Arc::new(Semaphore::new(config.connections_max)),
            publications: publish::Publications::default(),
            rooms,
            config,
        })
    }

    /// Admits nobody any more; `/readyz` turns to 503. Conversations go on until they are ended.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        self.rooms.engine.drain();
        if let Some(cluster) = &self.rooms.cluster {
            cluster.changed();
        }
    }

    /// A session, for programs that hold the service itself.
    pub fn session(&self, id: &SessionId) -> Option<session::Handle> {
        self.rooms.sessions.get(id)
    }

    /// Reads the files of keys and certificates again if they changed, or `always`; takes no time worth mentioning.
    pub fn reload(&self, always: bool) {
        self.keys.reload(always);
        if let Ok(Some(tls)) = &self.tls {
            tls.reload(always);
        }
    }

    /// A new id that cannot be guessed, and that says where in a cluster what it names lives.
    fn unguessable(&self) -> String {
        match &self.rooms.cluster {
            Some(cluster) => cluster.id().unguessable(),
            None => SessionId::random().to_string(),
        }
    }

    fn presenter(&self, id: &str) -> Option<&Presenter> {
        self.rooms.presenters.iter().find(|p| p.id == id)
    }

    fn allows_origin(&self, origin: &HeaderValue) -> bool {
        self.config.cors_origins.iter().any(|o| o == "*" || o.as_bytes() == origin.as_bytes())
    }

    /// All routes, as the world reaches them, and as other nodes do, who let their callers in themselves.
    fn router(self: &Arc<Self>) -> (Router, Router) {
        let one =
            patch(resource::patch).delete(resource::delete).options(resource::options_of_one).get(resource::nothing);
        let offers = |route: MethodRouter<Arc<Service>>| route.options(resource::options).get(whip::nothing);
        let (routes, rights) = Routes::new()
            .route("/", Anyone, get(pages::index))
            .route("/{file}", Anyone, get(pages::file))
            .route("/v1/info", Anyone, get(info::info))
            .route("/v1/openapi.json", Anyone, get(openapi::document))
            .route("/v1/live", Visitor, post(live::offer).options(resource::options).get(resource::nothing))
            .route("/v1/live/{id}", Connection, one.clone())
            .route("/v1/sessions", Control, post(sessions::begin).get(sessions::list))
            .route("/v1/sessions/{id}", Control, get(sessions::one).patch(sessions::change).delete(sessions::end))
            .route("/v1/sessions/{id}/token", Control, post(sessions::token))
            .route("/v1/sessions/{id}/interrupt", Session, post(sessions::interrupt))
            .route("/v1/sessions/{id}/gesture", Session, post(gesture::route))
            .route(
                "/v1/sessions/{id}/live",
                Session,
                post(sessions::join).options(resource::options).get(resource::nothing),
            )
            .route("/v1/sessions/{id}/ws", Session, get(ws::open))
            .route("/v1/sessions/{id}/whip", Session, offers(post(whip::publish)))
            .route("/v1/sessions/{id}/whep", Session, offers(post(whip::play)))
            .route("/v1/sessions/{id}/whip/{connection}", Connection, one.clone())
            .route("/v1/sessions/{id}/whep/{connection}", Connection, one)
            .route("/whip/{id}", Anyone, offers(post(whip::moved)))
            .route("/whep/{id}", Anyone, offers(post(whip::moved)))
            .route("/v1/sessions/{id}/publish", Session, post(publish::begin).get(publish::list))
            .route("/v1/sessions/{id}/publish/{publication}", Session, get(publish::one).delete(publish::end))
            .route("/v1/sessions/{id}/say", Session, post(say::route))
            .route(
                "/v1/sessions/{id}/recording",
                Session,
                post(recording::begin).get(recording::list).delete(recording::end),
            )
            .route("/v1/sessions/{id}/recording/{file}", Session, get(recording::file))
            .route("/v1/recordings", Control, get(recording::all))
            .route("/v1/recordings/{file}", Control, get(recording::any))
            .route("/v1/livekit", Control, post(livekit::start).layer(DefaultBodyLimit::disable()))
            .route("/v1/livekit/v1/sessions", Control, post(livekit::start).layer(DefaultBodyLimit::disable()))
            .route("/v1/livekit/v1/session", Control, post(livekit::start).layer(DefaultBodyLimit::disable()))
            .route("/v1/session", Control, post(livekit::start).layer(DefaultBodyLimit::disable()))
            .route("/v1/presenters", Anyone, get(presenters::list))
            .route("/v1/presenters/{file}", Anyone, get(presenters::picture))
            .route("/v1/design", Anyone, get(design::traits))
            .route("/v1/design/{file}", Anyone, get(design::picture))
            .route("/v1/portraits", Visitor, post(presenters::upload))
            .route("/healthz", Anyone, get(health::healthz))
            .route("/readyz", Anyone, get(health::readyz))
            .route("/v1/status", Metrics, get(status::status))
            .route("/metrics", Metrics, get(health::prometheus))
            .done();
        let _ = self.rights.set(rights);
        let inner =
            routes.fallback(guard::no_route).method_not_allowed_fallback(guard::no_method).with_state(self.clone());
        (inner.clone().layer(middleware::from_fn_with_state(self.clone(), guard::outer)), inner)
    }
}

/// A bound listener, not yet answering.
pub struct Server {
    listener: TcpListener,
    service: Arc<Service>,
}

/// Why the server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("{0}")]
    Config(String),
    #[error("{address} cannot be listened on: {source}. Another program may use it; choose another with --listen")]
    Bind { address: SocketAddr, source: std::io::Error },
}

impl Server {
    /// Takes the configured address.
    ///
    /// # Errors
    /// An address that is not allowed or not free.
    pub async fn bind(service: Arc<Service>) -> Result<Server, ServerError> {
        let address = service.config.address().map_err(ServerError::Config)?;
        service.tls.as_ref().map_err(|e| ServerError::Config(e.clone()))?;
        let keys = service.keys.count().map_err(ServerError::Config)?;
        service.config.reachable(address, keys).map_err(ServerError::Config)?;
        let listener = TcpListener::bind(address).await.map_err(|source| ServerError::Bind { address, source })?;
        Ok(Server { listener, service })
    }

    /// Where it listens, with the port that port 0 became.
    ///
    /// # Errors
    /// The system's, if the socket is gone.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let (app, inner) = self.service.router();
        let http = self.local_addr();
        let node = async {
            if let (Some(cluster), Ok(http)) = (&self.service.rooms.cluster, http) {
                let local = Arc::new(spread::Doors { service: self.service.clone(), inner });
                if let Err(e) = cluster.clone().run(local, http, stop.clone()).await {
                    tracing::error!("this node stays alone: {e}");
                }
            }
        };
        let local = listen::serve(self.listener, app, &self.service, stop.clone(), Duration::from_secs(1));
        tokio::join!(local, node);
    }
}

/// The media type of a request's body, lower case, without parameters.
fn media_type(headers: &HeaderMap) -> String {
    let value = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// A whole body of at most `most` bytes.
///
/// # Errors
/// 413 with `too_large()` as its sentence; 400 when the client stopped half-way.
async fn read_body(body: Body, most: usize, too_large: impl Fn() -> String) -> Result<Bytes, ApiError> {
    let refused = || ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", too_large());
    // Declared sizes are refused before a byte is read.
    if http_body_size(&body) > most as u64 {
        return Err(refused());
    }
    axum::body::to_bytes(body, most).await.map_err(|e| {
        let mut source = std::error::Error::source(&e);
        while let Some(s) = source {
            if s.to_string().contains("length limit exceeded") {
                return refused();
            }
            source = s.source();
        }
        ApiError::bad_request("incomplete_body", "The request's body ended before it was complete.")
    })
}

fn http_body_size(body: &Body) -> u64 {
    hyper::body::Body::size_hint(body).lower()
}
