//! What an operator can set about WebRTC.

use super::NetError;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr};

/// WebRTC settings. Everything is read once, before the first peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Addresses to receive media on; each peer opens one UDP socket on each of them. `0.0.0.0` and `::` stand for
    /// every interface that is up (without loopback).
    pub bind: Vec<IpAddr>,
    /// First UDP (and ICE-TCP) port that may be used; 0 leaves the choice to the system. Behind a firewall open the
    /// range; its size bounds how many peers can be connected at once.
    pub port_min: u16,
    /// Last port that may be used, inclusive.
    pub port_max: u16,
    /// Also listens for ICE over TCP (passive), for networks that block UDP. One listener per peer and address.
    pub ice_tcp: bool,
    /// Answers connectivity checks only and never sends its own: right for a server with a public address, wrong
    /// behind NAT.
    pub ice_lite: bool,
    /// Addresses under which the world reaches this server when they differ from `bind` (one-to-one NAT, port
    /// mapping that keeps port numbers). They replace the private addresses of the same family in the answer.
    pub public_ips: Vec<IpAddr>,
    /// STUN and TURN servers this server itself uses (`stun:` and `turn:` over UDP).
    pub ice_servers: Vec<IceServer>,
    /// TURN servers that take time-limited credentials made from `turn_secret`; handed to visitors only.
    pub turn_urls: Vec<String>,
    /// What those servers share with this one (coturn's `static-auth-secret`).
    pub turn_secret: String,
    /// How long credentials hold, seconds.
    pub turn_ttl_s: u64,
    /// Bits per second that a new peer begins with, all media together.
    pub start_bitrate: u32,
    /// The estimate never goes below this, bits per second.
    pub min_bitrate: u32,
    /// The estimate never goes above this, bits per second.
    pub max_bitrate: u32,
    /// Silence on the path after which a peer counts as interrupted, milliseconds.
    pub interrupted_after_ms: u64,
    /// Further silence after which an interrupted peer is given up, milliseconds.
    pub failed_after_ms: u64,
}

/// One STUN or TURN server.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IceServer {
    /// `stun:host:port` or `turn:host:port`.
    pub urls: Vec<String>,
    /// For TURN.
    pub username: String,
    /// For TURN.
    pub credential: String,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            bind: vec![IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::LOCALHOST)],
            port_min: 0,
            port_max: 0,
            ice_tcp: false,
            ice_lite: false,
            public_ips: vec![],
            ice_servers: vec![],
            turn_urls: vec![],
            turn_secret: String::new(),
            turn_ttl_s: 7200,
            start_bitrate: 900_000,
            min_bitrate: 150_000,
            max_bitrate: 2_500_000,
            interrupted_after_ms: 3_000,
            failed_after_ms: 8_000,
        }
    }
}

impl Config {
    /// Refuses settings that cannot work, with a sentence that says which and why.
    pub fn check(&self) -> Result<(), NetError> {
        let wrong = |what: String| Err(NetError::Config(what));
        if self.bind.is_empty() {
            return wrong("`bind` is empty; name at least one address such as 0.0.0.0".into());
        }
        if (self.port_min == 0) != (self.port_max == 0) {
            return wrong("set both `port_min` and `port_max`, or neither".into());
        }
        if self.port_min > self.port_max {
            return wrong(format!("`port_min` {} is above `port_max` {}", self.port_min, self.port_max));
        }
        if !(30_000..=self.start_bitrate).contains(&self.min_bitrate) || self.start_bitrate > self.max_bitrate {
            return wrong(format!(
                "bitrates must rise: 30000 ≤ min_bitrate {} ≤ start_bitrate {} ≤ max_bitrate {}",
                self.min_bitrate, self.start_bitrate, self.max_bitrate
            ));
        }
        if self.interrupted_after_ms < 500 || self.failed_after_ms < 500 {
            return wrong("`interrupted_after_ms` and `failed_after_ms` must be at least 500".into());
        }
        if let Some(url) = self.turn_urls.iter().find(|u| !u.starts_with("turn:") && !u.starts_with("turns:")) {
            return wrong(format!("`turn_urls` holds `{url}`, which must begin with turn: or turns:"));
        }
        if !self.turn_urls.is_empty() && (self.turn_secret.is_empty() || self.turn_ttl_s < 60) {
            return wrong("`turn_urls` needs a `turn_secret`, and a `turn_ttl_s` of at least 60".into());
        }
        for server in &self.ice_servers {
            for url in &server.urls {
                if !["stun:", "turn:"].iter().any(|scheme| url.starts_with(scheme)) {
                    return wrong(format!("ICE server `{url}` must begin with stun: or turn:"));
                }
                if url.starts_with("turn:") && (server.username.is_empty() || server.credential.is_empty()) {
                    return wrong(format!("TURN server `{url}` needs a username and a credential"));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_accepted_and_nonsense_is_not() {
        assert!(Config::default().check().is_ok());
        let bad: [fn(&mut Config); 6] = [
            |c| c.bind.clear(),
            |c| c.port_min = 4000,
            |c| (c.port_min, c.port_max) = (4000, 3000),
            |c| c.start_bitrate = 100_000,
            |c| c.ice_servers.push(IceServer { urls: vec!["http://x".into()], ..Default::default() }),
            |c| c.ice_servers.push(IceServer { urls: vec!["turn:x".into()], ..Default::default() }),
        ];
        for change in bad {
            let mut config = Config::default();
            change(&mut config);
            assert!(config.check().is_err(), "{config:?}");
        }
    }
}
