//! Where a room is: the address an agent gave, checked before anything is sent there.
//!
//! Whoever may start a worker could otherwise make this machine knock on doors of its own network (server-side request
//! forgery). Names are resolved once, every address is judged, and the connection goes to the judged address.

use super::{Config, LivekitError};
use crate::net::is_public;
use std::net::SocketAddr;
use url::{Host, Url};

/// A LiveKit server that may be connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// `ws://` or `wss://`, path without `/rtc`, no query.
    url: Url,
}

impl Target {
    /// Reads `ws`, `wss`, `http` or `https` URLs; the last two are mapped as LiveKit's SDKs do.
    ///
    /// # Errors
    /// [`LivekitError::Url`] says what is wrong with it, [`LivekitError::Host`] that the operator did not list it.
    pub(super) fn parse(text: &str, config: &Config) -> Result<Target, LivekitError> {
        let wrong = |why: &str| LivekitError::Url(why.into());
        let mut url = Url::parse(text.trim()).map_err(|e| LivekitError::Url(e.to_string()))?;
        let scheme = match url.scheme() {
            "ws" | "http" => "ws",
            "wss" | "https" => "wss",
            other => return Err(LivekitError::Url(format!("`{other}:` is none of ws, wss, http and https"))),
        };
        // All four are "special" schemes with a host, so the change is always allowed.
        if url.set_scheme(scheme).is_err() || url.host().is_none() {
            return Err(wrong("it names no host"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(wrong("a name or password in it is not used; the token says who joins"));
        }
        url.set_query(None);
        url.set_fragment(None);
        let target = Target { url };
        if !config.hosts.is_empty() && !target.listed(config) {
            return Err(LivekitError::Host(target.host()));
        }
        Ok(target)
    }

    fn host(&self) -> String {
        self.url.host_str().unwrap_or_default().trim_matches(['[', ']']).to_ascii_lowercase()
    }

    /// Whether the operator named this host: exactly, or by a parent domain (`.example.org`).
    fn listed(&self, config: &Config) -> bool {
        let host = self.host();
        config.hosts.iter().map(|h| h.to_ascii_lowercase()).any(|h| match h.strip_prefix('.') {
            Some(parent) => host.strip_suffix(parent).is_some_and(|head| head.ends_with('.')),
            None => host == h,
        })
    }

    /// Addresses that may be connected to; the name is resolved here and nowhere else.
    ///
    /// # Errors
    /// [`LivekitError::Unreachable`] when the name is unknown, [`LivekitError::Private`] when all its addresses are inside.
    pub(super) async fn addresses(&self, config: &Config) -> Result<Vec<SocketAddr>, LivekitError> {
        let port = self.url.port_or_known_default().unwrap_or(443);
        let found: Vec<SocketAddr> = match self.url.host() {
            Some(Host::Ipv4(ip)) => vec![SocketAddr::new(ip.into(), port)],
            Some(Host::Ipv6(ip)) => vec![SocketAddr::new(ip.into(), port)],
            Some(Host::Domain(name)) => tokio::net::lookup_host((name, port))
                .await
                .map_err(|e| LivekitError::Unreachable { host: self.host(), why: e.to_string() })?
                .collect(),
            None => vec![],
        };
        if found.is_empty() {
            return Err(LivekitError::Unreachable { host: self.host(), why: "its name has no address".into() });
        }
        let allowed = config.allow_private || self.listed(config);
        let usable: Vec<SocketAddr> = found.into_iter().filter(|a| allowed || is_public(a.ip())).collect();
        if usable.is_empty() { Err(LivekitError::Private(self.host())) } else { Ok(usable) }
    }

    /// The signalling endpoint with these query parameters.
    pub(super) fn endpoint(&self, query: &[(&str, &str)]) -> Url {
        let mut url = self.url.clone();
        let path = format!("{}/rtc", url.path().trim_end_matches('/'));
        url.set_path(&path);
        url.query_pairs_mut().extend_pairs(query);
        url
    }

    pub(super) fn tls(&self) -> bool {
        self.url.scheme() == "wss"
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}", self.url.scheme(), self.url.authority())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Target, LivekitError> {
        Target::parse(text, &Config::default())
    }

    #[test]
    fn http_becomes_ws_and_the_path_is_kept() {
        let end = |text: &str| parse(text).unwrap().endpoint(&[("protocol", "17"), ("sdk", "a b")]).to_string();
        assert_eq!(end("https://x.livekit.cloud"), "wss://x.livekit.cloud/rtc?protocol=17&sdk=a+b");
        assert_eq!(end("http://h:7880/lk/?a=b#c"), "ws://h:7880/lk/rtc?protocol=17&sdk=a+b");
        assert_eq!(end("wss://h"), "wss://h/rtc?protocol=17&sdk=a+b");
    }

    #[test]
    fn what_is_no_server_is_refused_with_a_reason() {
        for (text, word) in [
            ("", "relative"),
            ("livekit", "relative"),
            ("file:///etc/passwd", "file:"),
            ("gopher://h/1", "gopher:"),
            ("ws://", "host"),
            ("wss://user:pass@h", "password"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[tokio::test]
    async fn inside_addresses_need_the_operators_word() {
        let inside = [
            "ws://127.0.0.1:1",
            "ws://10.0.0.1",
            "ws://192.168.1.1",
            "ws://172.16.0.1",
            "ws://169.254.169.254",
            "ws://0.0.0.0",
            "ws://100.64.0.1",
            "ws://[::1]",
            "ws://[fd00::1]",
            "ws://[fe80::1]",
            "ws://[::ffff:127.0.0.1]",
            "ws://[64:ff9b::7f00:1]",
            "ws://[2002:7f00:1::]",
            "ws://2130706433",
            "ws://0x7f.1",
            "ws://localhost",
        ];
        let (closed, open) = (Config::default(), Config { allow_private: true, ..Config::default() });
        for text in inside {
            let target = parse(text).unwrap();
            assert!(matches!(target.addresses(&closed).await, Err(LivekitError::Private(_))), "{text}");
            assert!(target.addresses(&open).await.is_ok(), "{text}");
        }
        for text in ["ws://8.8.8.8", "ws://[2606:4700::1111]"] {
            assert!(parse(text).unwrap().addresses(&closed).await.is_ok(), "{text}");
        }
    }

    #[tokio::test]
    async fn a_list_admits_its_hosts_only_and_these_wherever_they_are() {
        let config = Config { hosts: vec!["127.0.0.1".into(), ".livekit.cloud".into()], ..Config::default() };
        assert!(Target::parse("ws://127.0.0.1:9", &config).unwrap().addresses(&config).await.is_ok());
        assert!(Target::parse("wss://a.LiveKit.cloud", &config).is_ok());
        for text in ["wss://livekit.cloud.evil.org", "wss://evillivekit.cloud", "ws://127.0.0.2"] {
            assert!(matches!(Target::parse(text, &config), Err(LivekitError::Host(_))), "{text}");
        }
    }
}
