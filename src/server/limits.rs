//! How much one caller may take: requests, connections and sessions at once, by address and by key.
//!
//! Addresses are those of the network, or what a proxy says that is on this machine or named in `server.proxies`; an IPv6
//! address stands for its /64, which is what one customer gets. This machine's own programs (loopback, not forwarded) are
//! not limited by address. Sessions are counted for the whole cluster, if there is one, the rest by each node for itself.
//!
//! | edge | capacity | when full |
//! | --- | --- | --- |
//! | requests of one address | `server.requests_per_second`, ten times that at once | 429 with `Retry-After`, counted |
//! | wrong keys of one address | 20, then one a second | 429 with `Retry-After`, counted |
//! | sessions of one address, one key | `server.sessions_per_address`, the key's `sessions` | 429 with `Retry-After`, counted |
//! | connections of one address | `server.connections_per_address` | closed at once, counted |
//! | addresses that are remembered | 10 000 | the rest share one entry |

use super::{Config, Service, access::Caller, error::ApiError, live, memory, resource::Pace};
use crate::{cluster::Node, engine::Slot, session, telemetry::metrics};
use axum::http::{HeaderMap, StatusCode};
use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

const ADDRESSES: usize = 10_000;
/// Wrong keys: (at once, per second).
const WRONG_KEYS: (f64, f64) = (20.0, 1.0);
/// Looking for entries that are worth nothing any more takes a while: not more often than this.
const SWEEP: Duration = Duration::from_secs(1);

/// What is counted of every caller.
#[derive(Clone)]
pub(super) struct Limits(Arc<Mutex<Inner>>);

struct Inner {
    /// Who else counts sessions.
    cluster: Option<Arc<Node>>,
    rate: (f64, f64),
    visitors: HashMap<IpAddr, Visitor>,
    swept: Instant,
    /// By address or key: how many sessions, how many connections.
    taken: HashMap<(What, String), usize>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum What {
    Session,
    Connection,
}

struct Visitor {
    requests: Pace,
    wrong_keys: Pace,
}

/// Something taken, given back on drop.
pub(super) struct Ticket {
    limits: Limits,
    of: (What, String),
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut inner = self.limits.lock();
        if let Some(n) = inner.taken.get_mut(&self.of) {
            *n -= 1;
            if *n == 0 {
                inner.taken.remove(&self.of);
            }
        }
        inner.tell(self.of.0);
    }
}

impl Limits {
    pub(super) fn new(config: &Config, cluster: Option<Arc<Node>>, now: Instant) -> Limits {
        let rate = f64::from(config.requests_per_second);
        let (rate, visitors, taken) = ((rate * 10.0, rate), HashMap::new(), HashMap::new());
        Limits(Arc::new(Mutex::new(Inner { cluster, rate, visitors, swept: now, taken })))
    }

    /// How many sessions each caller has here whose sessions are counted.
    pub(super) fn sessions(&self) -> Vec<(String, usize)> {
        let inner = self.lock();
        let sessions = inner.taken.iter().filter(|((what, _), _)| *what == What::Session);
        sessions.map(|((_, who), n)| (who.clone(), *n)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Counts a request.
    ///
    /// # Errors
    /// 429 for one too many.
    pub(super) fn request(&self, address: Option<IpAddr>, now: Instant) -> Result<(), ApiError> {
        let Some(address) = address else { return Ok(()) };
        let mut inner = self.lock();
        if inner.rate.1 == 0.0 {
            return Ok(());
        }
        inner.visitor(address, now).requests.take(now).inspect_err(|_| metrics().refused("requests"))
    }

    /// Counts a wrong key.
    ///
    /// # Errors
    /// 429 for one too many.
    pub(super) fn wrong_key(&self, address: Option<IpAddr>, now: Instant) -> Result<(), ApiError> {
        metrics().refused("wrong_key");
        let Some(address) = address else { return Ok(()) };
        self.lock().visitor(address, now).wrong_keys.take(now)
    }

    /// One more connection of this address, or `None`.
    pub(super) fn connection(&self, address: IpAddr, most: usize) -> Option<Ticket> {
        self.take(What::Connection, prefix(address).to_string(), most)
    }

    fn take(&self, what: What, who: String, most: usize) -> Option<Ticket> {
        let (mut inner, of) = (self.lock(), (what, who));
        let had = inner.taken.get(&of).copied().unwrap_or(0);
        if had >= most {
            return None;
        }
        inner.taken.insert(of.clone(), had + 1);
        inner.tell(what);
        Some(Ticket { limits: self.clone(), of })
    }
}

impl Inner {
    /// Other nodes count these sessions, too, and hear of them at once.
    fn tell(&self, what: What) {
        if let (What::Session, Some(cluster)) = (what, &self.cluster) {
            cluster.changed();
        }
    }

    fn visitor(&mut self, address: IpAddr, now: Instant) -> &mut Visitor {
        let mut address = prefix(address);
        if self.visitors.len() >= ADDRESSES && !self.visitors.contains_key(&address) {
            if now.saturating_duration_since(self.swept) >= SWEEP {
                self.swept = now;
                self.visitors.retain(|_, v| !(v.requests.rested(now) && v.wrong_keys.rested(now)));
            }
            if self.visitors.len() >= ADDRESSES {
                address = Ipv6Addr::UNSPECIFIED.into();
            }
        }
        let rate = self.rate;
        self.visitors
            .entry(address)
            .or_insert_with(|| Visitor { requests: Pace::new(rate, now), wrong_keys: Pace::new(WRONG_KEYS, now) })
    }
}

/// What one customer has: an IPv4 address, or 64 bits of an IPv6 one.
fn prefix(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

/// Whom a request comes from, for counting: `None` for this machine's own programs.
pub(super) fn address(config: &Config, peer: Option<IpAddr>, headers: &HeaderMap) -> Option<IpAddr> {
    let peer = peer?.to_canonical();
    // What this machine's own programs say is believed: a proxy among them must not make everybody one of them.
    let proxy = |ip: &IpAddr| ip.is_loopback() || config.proxies.contains(ip);
    let named = || {
        let all = headers.get_all("x-forwarded-for").iter().filter_map(|v| v.to_str().ok());
        let all: Vec<IpAddr> = all.flat_map(|v| v.split(',')).filter_map(|a| a.trim().parse().ok()).collect();
        // From the right: what stands further left was written by whoever asked.
        all.into_iter().rev().map(|ip| ip.to_canonical()).find(|ip| !proxy(ip))
    };
    let address = if proxy(&peer) { named().unwrap_or(peer) } else { peer };
    (!address.is_loopback()).then_some(address)
}

/// By what this caller's sessions are counted, and how many there may be at once, in the whole cluster.
pub(super) fn counted(service: &Service, caller: &Caller) -> Option<(String, usize)> {
    match (&caller.key, caller.address, service.config.sessions_per_address) {
        // A key's sessions are its own business: a backend begins those of all its users from one address.
        (Some(key), ..) => key.allowance.sessions.map(|most| (key.id.clone(), most)),
        (None, Some(address), most @ 1..) => Some((prefix(address).to_string(), most)),
        _ => None,
    }
}

/// The refusal of one session too many.
pub(super) fn too_many(caller: &Caller, most: usize, retry_after: Duration) -> ApiError {
    metrics().refused("sessions");
    let whose = if caller.key.is_some() { "This key" } else { "Your address" };
    let text = format!("{whose} has {most} sessions, and may have no more at once. End one, or come later.");
    let mut error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, "too_many_sessions", text);
    error.retry_after = Some(retry_after);
    error
}

/// A place on the engine for this caller, with its ticket inside: both are given back together.
///
/// # Errors
/// 429 when the caller has as many sessions as it may; 503 when all places are taken.
pub(super) fn place(service: &Service, caller: &Caller) -> Result<Slot, ApiError> {
    let retry = service.rooms.engine.retry_after();
    let ticket = counted(service, caller).map(|(who, most)| {
        let elsewhere = service.rooms.cluster.as_ref().map_or(0, |cluster| cluster.held_elsewhere(&who));
        let ticket = service.limits.take(What::Session, who, most.saturating_sub(elsewhere));
        ticket.ok_or_else(|| too_many(caller, most, retry))
    });
    let ticket = ticket.transpose()?;
    let reserve = service.config.memory_reserve_mb.saturating_mul(1 << 20);
    if reserve > 0 && memory::available().is_some_and(|left| left < reserve) {
        metrics().refused("memory");
        tracing::warn!("a session was refused: less memory is free than server.memory_reserve_mb");
        let text = "There is not enough memory for one session more just now.";
        return Err(ApiError::unavailable("no_memory", text, retry));
    }
    let slot = service.rooms.engine.admit().map_err(|refusal| {
        metrics().refused("full");
        live::refused(refusal)
    })?;
    Ok(match ticket {
        Some(ticket) => slot.with(ticket),
        None => slot,
    })
}

/// A session's settings within what its caller's key allows.
pub(super) fn bounded(mut config: session::Config, caller: &Caller) -> session::Config {
    // Zero stands for no limit, so the smaller of two is not always the smaller number.
    let least = |a: u64, b: Option<u64>| match b {
        Some(b) if a == 0 || b < a => b,
        _ => a,
    };
    if let Some(key) = &caller.key {
        config.max_session_s = least(config.max_session_s, key.allowance.max_session_s);
        config.idle_timeout_s = least(config.idle_timeout_s, key.allowance.idle_timeout_s);
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_has_its_own_pace_and_the_memory_is_bounded() {
        let t0 = Instant::now();
        let limits = Limits::new(&Config { requests_per_second: 1, ..Config::default() }, None, t0);
        let ok = |a: &str, s: u64| limits.request(Some(ip(a)), t0 + Duration::from_secs(s)).is_ok();
        assert!((0..10).all(|_| ok("192.0.2.1", 0)) && !ok("192.0.2.1", 0), "ten at once");
        assert!(ok("192.0.2.2", 0), "another address is not concerned");
        assert!((0..10).all(|_| ok("2001:db8::1", 0)) && !ok("2001:db8::ffff:1", 0), "one customer");
        assert!(ok("192.0.2.1", 1) && !ok("192.0.2.1", 1), "one a second");
        let refused = limits.request(Some(ip("192.0.2.1")), t0 + Duration::from_secs(1)).unwrap_err();
        assert_eq!(
            (refused.status, refused.retry_after),
            (StatusCode::TOO_MANY_REQUESTS, Some(Duration::from_secs(1)))
        );
        // A flood of addresses takes no more memory than was said, and goes with time.
        for i in 0..3 * ADDRESSES as u32 {
            let _ = limits.request(Some(IpAddr::from(std::net::Ipv4Addr::from(i + (10 << 24)))), t0);
        }
        assert!(limits.lock().visitors.len() <= ADDRESSES + 1);
        assert!(ok("198.51.100.1", 60));
        assert!(limits.lock().visitors.len() < 10);
    }

    #[test]
    fn tickets_come_back() {
        let limits = Limits::new(&Config::default(), None, Instant::now());
        let (a, b) = (limits.connection(ip("192.0.2.1"), 2), limits.connection(ip("::ffff:192.0.2.1"), 2));
        assert!(a.is_some() && b.is_some() && limits.connection(ip("192.0.2.1"), 2).is_none());
        drop(a);
        assert!(limits.connection(ip("192.0.2.1"), 2).is_some());
        drop(b);
        assert!(limits.connection(ip("192.0.2.1"), 0).is_none());
        assert!(limits.lock().taken.is_empty());
    }

    #[test]
    fn only_named_proxies_are_believed() {
        let config = Config { proxies: vec![ip("10.0.0.1")], ..Config::default() };
        let from = |peer: &str, said: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in said {
                headers.append("x-forwarded-for", value.parse().unwrap());
            }
            address(&config, Some(ip(peer)), &headers)
        };
        assert_eq!(from("192.0.2.9", &["203.0.113.5"]), Some(ip("192.0.2.9")), "a stranger says what it likes");
        assert_eq!(from("127.0.0.1", &["1.1.1.1, 203.0.113.5"]), Some(ip("203.0.113.5")), "the rightmost");
        assert_eq!(from("127.0.0.1", &["203.0.113.5", "10.0.0.1"]), Some(ip("203.0.113.5")), "two proxies");
        assert_eq!(from("127.0.0.1", &[]), None, "this machine");
        assert_eq!(from("127.0.0.1", &["nonsense"]), None);
    }
}
