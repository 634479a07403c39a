//! Who may use which route: the one place where it is decided, before a handler runs.
//!
//! Every route names its [`Right`] in [`super::Service::router`]. Before that comes where a request comes from: pages of
//! other sites must be named in `server.cors_origins` before they change anything, and while there is no key the
//! service answers only to the names of this machine, so that no page of another site can reach it by a name of its
//! own (DNS rebinding), nor a proxy show it to the world by mistake.

use super::{
    Service,
    config::Visitors,
    error::ApiError,
    keys::{Key, Scope},
    limits,
};
use crate::{net::IceServer, telemetry::metrics};
use axum::{
    Router,
    http::{HeaderMap, Method, StatusCode, header, request},
    routing::MethodRouter,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Instant, SystemTime},
};

/// What a caller must have. `OPTIONS` needs nothing anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Right {
    /// Pages, documents, health.
    Anyone,
    /// The scope `live`, or nothing with `server.visitors = "anyone"`. `GET` (nothing to see) is anyone's.
    Visitor,
    /// The scope `control`.
    Control,
    /// The scope `metrics`.
    Metrics,
    /// The session's token, which the handler checks where it looks the session up.
    Session,
    /// The connection's own address: 128 random bits, told to nobody but whoever made it.
    Connection,
}

/// A router in which every route has its right.
pub(super) struct Routes {
    router: Router<Arc<Service>>,
    rights: Rights,
}

/// By the route's pattern.
pub(super) type Rights = HashMap<&'static str, Right>;

impl Routes {
    pub(super) fn new() -> Routes {
        Routes { router: Router::new(), rights: HashMap::new() }
    }

    pub(super) fn route(mut self, path: &'static str, right: Right, methods: MethodRouter<Arc<Service>>) -> Routes {
        self.rights.insert(path, right);
        self.router = self.router.route(path, methods);
        self
    }

    pub(super) fn done(self) -> (Router<Arc<Service>>, Rights) {
        (self.router, self.rights)
    }
}

/// Who asks, as far as it is known.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Caller {
    /// The key that was shown, if the route wanted one.
    pub(super) key: Option<Key>,
    /// `None`: this machine's own.
    pub(super) address: Option<IpAddr>,
}

/// Lets a request through to its handler, or says why not. `route`: its pattern, `None` where there is none.
pub(super) fn admit(service: &Service, route: Option<&str>, request: &request::Parts) -> Result<Caller, ApiError> {
    let (headers, now) = (&request.headers, Instant::now());
    let peer = request.extensions.get::<SocketAddr>().map(SocketAddr::ip);
    // What another node says of its visitors is believed, as what this machine's own programs say.
    let node = |ip: IpAddr| service.rooms.cluster.as_ref().is_some_and(|cluster| cluster.is_node(ip.to_canonical()));
    let peer = peer.map(|ip| if node(ip) { Ipv4Addr::LOCALHOST.into() } else { ip });
    let address = limits::address(&service.config, peer, headers);
    let nobody = Caller { key: None, address };
    service.limits.request(address, now)?;
    this_machine(service, headers)?;
    same_site(service, &request.method, headers)?;
    // What has no route has no handler either: it becomes a 404.
    let Some(route) = route else { return Ok(nobody) };
    let Some(right) = service.rights.get().and_then(|rights| rights.get(route)) else {
        tracing::error!(route, "a route without a right; this is a bug");
        return Err(ApiError::internal("The server does not know who may do this."));
    };
    if request.method == Method::OPTIONS || service.keys.open() {
        return Ok(nobody);
    }
    let looks = [Method::GET, Method::HEAD].contains(&request.method);
    let scope = match right {
        Right::Anyone | Right::Session | Right::Connection => return Ok(nobody),
        Right::Visitor if looks || service.config.visitors == Visitors::Anyone => return Ok(nobody),
        Right::Visitor => Scope::Live,
        Right::Control => Scope::Control,
        Right::Metrics => Scope::Metrics,
    };
    let key = match key(service, headers) {
        Ok(key) => key,
        Err(error) if error.code == "no_key" => return Err(error),
        Err(error) => return service.limits.wrong_key(address, now).and(Err(error)),
    };
    if !key.scopes.contains(&scope) {
        metrics().refused("wrong_scope");
        tracing::warn!(key = key.id, name = key.name, route, "a key without the scope {scope} was refused");
        let text = format!("This key may not do that: it lacks the scope `{scope}`.");
        return Err(ApiError::new(StatusCode::FORBIDDEN, "wrong_scope", text));
    }
    Ok(Caller { key: Some(key), address })
}

/// What stands behind `Bearer`.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// The key that a request shows; the other headers are those of agents' avatar plugins.
fn key(service: &Service, headers: &HeaderMap) -> Result<Key, ApiError> {
    let other = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
    let shown = bearer(headers).or_else(|| other("x-api-key")).or_else(|| other("api-secret")).ok_or_else(|| {
        let text = "This service wants a key: Authorization: Bearer KEY; for the page, open /#key=KEY. Whoever runs it \
                    makes one with `loquent key new`.";
        ApiError::new(StatusCode::UNAUTHORIZED, "no_key", text)
    })?;
    service.keys.find(shown).ok_or_else(|| {
        let text = "This key is not known here; it may have been taken back.";
        ApiError::new(StatusCode::UNAUTHORIZED, "wrong_key", text)
    })
}

/// The ICE servers that this caller may know: those with credentials only for whoever may talk, or shows a session's
/// token, because a relay costs whoever runs it.
pub(super) fn ice_servers(service: &Service, headers: &HeaderMap) -> Vec<IceServer> {
    let all = service.rooms.net.ice_servers(SystemTime::now());
    let open = service.keys.open() || service.config.visitors == Visitors::Anyone;
    let known = || {
        let shown = bearer(headers)?;
        let key = service.keys.find(shown).is_some_and(|key| key.scopes.contains(&Scope::Live));
        (key || service.sessions.knows(shown, Instant::now())).then_some(())
    };
    match open || known().is_some() {
        true => all,
        false => all.into_iter().filter(|server| server.credential.is_empty()).collect(),
    }
}

/// Without keys, only names of this machine are answered.
fn this_machine(service: &Service, headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(host) = headers.get(header::HOST).filter(|_| service.keys.open()) else { return Ok(()) };
    let name = host.to_str().map(without_port).unwrap_or_default();
    let local = name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    if local {
        return Ok(());
    }
    metrics().refused("wrong_host");
    let text = "This service has no key and therefore serves only its own machine, as localhost or 127.0.0.1. To serve \
                others, make a key: loquent key new NAME --file keys, and set server.keys_file.";
    Err(ApiError::new(StatusCode::MISDIRECTED_REQUEST, "wrong_host", text))
}

/// `[::1]:80` → `::1`, `a.example:80` → `a.example`.
fn without_port(host: &str) -> &str {
    match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    }
}

/// What changes something, and what opens a WebSocket, comes from this site's own pages or from a site that is named.
/// Programs send no `Origin`.
fn same_site(service: &Service, method: &Method, headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
    let looks = [Method::GET, Method::HEAD, Method::OPTIONS].contains(method) && !headers.contains_key(header::UPGRADE);
    if looks || service.allows_origin(origin) {
        return Ok(());
    }
    let (origin, host) = (origin.to_str().unwrap_or_default(), headers.get(header::HOST));
    let host = host.and_then(|h| h.to_str().ok()).unwrap_or_default();
    // A proxy speaks http to us for a page that came by https: names and ports are compared, usual ports left out.
    let own = origin.split_once("://").is_some_and(|(scheme, site)| {
        let usual = if scheme == "https" { ":443" } else { ":80" };
        let bare = |text: &str| text.strip_suffix(usual).unwrap_or(text).to_ascii_lowercase();
        !site.is_empty() && bare(site) == bare(host)
    });
    if own {
        return Ok(());
    }
    metrics().refused("wrong_origin");
    let text = "Pages of other sites may do this only when server.cors_origins names their site. If this is the service's \
                own page behind a proxy, let the proxy keep the Host header.";
    Err(ApiError::new(StatusCode::FORBIDDEN, "origin_not_allowed", text))
}
