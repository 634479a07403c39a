//! Which UDP ports of the configured range are in use by our peers.

use super::{Config, NetError};
use rand::RngExt;
use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{Arc, Mutex},
};

/// Hands out one port at a time; a peer keeps its [`Lease`] as long as its sockets.
#[derive(Clone, Debug)]
pub(super) struct Ports {
    range: Option<(u16, u16)>,
    bind: Vec<IpAddr>,
    used: Arc<Mutex<HashSet<u16>>>,
}

#[derive(Debug)]
pub(super) struct Lease {
    port: u16,
    used: Arc<Mutex<HashSet<u16>>>,
}

impl Ports {
    pub(super) fn new(config: &Config) -> Self {
        let range = (config.port_min > 0).then_some((config.port_min, config.port_max));
        Ports { range, bind: config.bind.clone(), used: Default::default() }
    }

    /// A free port (0 when the system shall choose), the same on every address. Ports are tried from a random one on, so
    /// that a port just freed is not reused at once: a late packet of an old peer must not meet a new one.
    ///
    /// # Errors
    /// [`NetError::NoPort`] when every port of the range is in use by us or by others.
    pub(super) fn lease(&self) -> Result<Lease, NetError> {
        let Some((min, max)) = self.range else { return Ok(Lease { port: 0, used: self.used.clone() }) };
        let count = u32::from(max - min) + 1;
        let start = rand::rng().random_range(0..count);
        for step in 0..count {
            let port = min + ((start + step) % count) as u16;
            let mut used = self.used.lock().unwrap_or_else(|e| e.into_inner());
            if !used.contains(&port) && self.bind.iter().all(|ip| UdpSocket::bind(SocketAddr::new(*ip, port)).is_ok()) {
                used.insert(port);
                return Ok(Lease { port, used: self.used.clone() });
            }
        }
        Err(NetError::NoPort(format!("ports {min}…{max}")))
    }
}

impl Lease {
    pub(super) fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.used.lock().unwrap_or_else(|e| e.into_inner()).remove(&self.port);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_bounded_and_ports_come_back() {
        let free = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config =
            Config { bind: vec!["127.0.0.1".parse().unwrap()], port_min: free, port_max: free, ..Config::default() };
        let ports = Ports::new(&config);
        let lease = ports.lease().unwrap();
        assert_eq!(lease.port(), free);
        assert!(matches!(ports.lease(), Err(NetError::NoPort(_))));
        drop(lease);
        assert_eq!(ports.lease().unwrap().port(), free);
        let taken = UdpSocket::bind(("127.0.0.1", free)).unwrap();
        assert!(ports.lease().is_err(), "a port that another program holds is not free");
        drop(taken);
    }
}
