//! Which hosts this machine may be made to connect to by whoever holds a session's token.
//!
//! Such a caller could otherwise make it knock on doors of its own network (server-side request forgery). Hosts that the
//! operator named are reached wherever they are; `*` stands for every host, at its public addresses only. That is judged
//! where names become addresses, so that a name cannot mean one thing when it is checked and another when it is used.

use reqwest::{
    Url,
    dns::{Addrs, Name, Resolve, Resolving},
};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

/// Hosts that may be reached.
#[derive(Clone, Debug, Default)]
pub struct Reach(Arc<[String]>);

impl Reach {
    /// `hosts`: names and addresses, `*` for every one with a public address; none of them: nowhere.
    pub fn new(hosts: &[String]) -> Reach {
        Reach(hosts.iter().map(|h| h.trim_matches(['[', ']']).to_ascii_lowercase()).collect())
    }

    fn named(&self, host: &str) -> bool {
        self.0.iter().any(|h| h != "*" && *h == host)
    }

    /// Whether this address may be asked, as far as can be told before its name is looked up.
    ///
    /// # Errors
    /// A sentence without its full stop, for whoever gave the address.
    pub fn allows(&self, url: &Url) -> Result<(), String> {
        let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']).to_ascii_lowercase();
        if self.named(&host) {
            return Ok(());
        }
        if !self.0.iter().any(|h| h == "*") {
            return Err(format!("this service may not connect to {host}; server.publish_hosts names where it may"));
        }
        match host.parse::<IpAddr>() {
            Ok(ip) if !is_public(ip) => Err(inside(&host)),
            _ => Ok(()),
        }
    }
}

fn inside(host: &str) -> String {
    format!("{host} is no public address; if it is meant, whoever runs the service names it in server.publish_hosts")
}

/// Looks names up, and keeps the addresses that may be used.
impl Resolve for Reach {
    fn resolve(&self, name: Name) -> Resolving {
        let host = name.as_str().to_ascii_lowercase();
        let named = self.named(&host);
        Box::pin(async move {
            let found = tokio::net::lookup_host((host.as_str(), 0)).await?;
            let usable: Vec<SocketAddr> = found.filter(|a| named || is_public(a.ip())).collect();
            if usable.is_empty() {
                return Err(inside(&host).into());
            }
            Ok(Box::new(usable.into_iter()) as Addrs)
        })
    }
}

/// Whether an address belongs to the open Internet (IANA's special-purpose registries, without what is routed globally).
pub fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => public_v4(ip),
        IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
            Some(ip) => public_v4(ip),
            None => public_v6(ip),
        },
    }
}

fn public_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    !(ip.is_private()
        || ip.is_loopback()
        || ip.is_link_local()
        || ip.is_multicast()
        || ip.is_documentation()
        || a == 0
        || a >= 240
        || (a == 100 && (64..128).contains(&b))
        || (a == 192 && b == 0 && c == 0)
        || (a == 198 && (b & 0xfe) == 18))
}

fn public_v6(ip: Ipv6Addr) -> bool {
    let [first, second, ..] = ip.segments();
    // 2000::/3 is what is given out; the tunnels in it (Teredo, 6to4) and NAT64 lead to IPv4 addresses of any kind.
    (first & 0xe000) == 0x2000 && first != 0x2002 && !(first == 0x2001 && (second == 0 || second == 0xdb8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inside_addresses_are_reached_only_when_they_are_named() {
        let url = |text: &str| text.parse::<Url>().unwrap();
        let (all, one) =
            (Reach::new(&["*".into()]), Reach::new(&["10.0.0.7".into(), "Media.example.org".into(), "::1".into()]));
        for inside in
            ["http://127.0.0.1:1/", "http://10.0.0.7/", "http://[::1]/", "http://0x7f.1/", "http://169.254.169.254/"]
        {
            assert!(all.allows(&url(inside)).unwrap_err().contains("public"), "{inside}");
        }
        for outside in ["https://media.example.org/whip", "http://8.8.8.8/", "http://[2606:4700::1111]/"] {
            assert!(all.allows(&url(outside)).is_ok(), "{outside}");
        }
        for named in ["http://10.0.0.7/", "https://MEDIA.example.org/", "http://[::1]:8/"] {
            assert!(one.allows(&url(named)).is_ok(), "{named}");
        }
        for other in ["http://10.0.0.8/", "https://example.org/", "https://x.media.example.org/"] {
            assert!(one.allows(&url(other)).unwrap_err().contains("publish_hosts"), "{other}");
        }
        assert!(Reach::new(&[]).allows(&url("http://8.8.8.8/")).is_err());
    }

    #[tokio::test]
    async fn a_name_that_leads_inside_is_not_followed() {
        let ask = |reach: Reach| {
            let name = "localhost".parse::<Name>();
            async move { reach.resolve(name.unwrap()).await.map(Iterator::count) }
        };
        assert!(ask(Reach::new(&["*".into()])).await.unwrap_err().to_string().contains("public"));
        assert!(ask(Reach::new(&["localhost".into()])).await.unwrap() > 0);
    }
}
