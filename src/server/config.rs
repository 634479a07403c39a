//! Settings of the HTTP side.

use serde::{Deserialize, Serialize};
use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// `[server]`: addresses, limits, time-outs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where HTTP listens.
    pub listen: String,
    /// A file with API keys, one a line; empty = none. `keys.rs` says what a line is.
    pub keys_file: String,
    /// The same lines, here.
    pub keys: Vec<String>,
    /// Who may talk on the page once there are keys.
    pub visitors: Visitors,
    /// Serves the page from this folder instead of from the program; empty = from the program.
    pub web_dir: String,
    /// Origins of other sites whose pages may call the API; empty = this site only.
    pub cors_origins: Vec<String>,
    /// Connections open at once; more are closed at once.
    pub max_connections: usize,
    /// WHIP publishers and WHEP players connected at once, of all sessions; more are told to come again.
    pub connections_max: usize,
    /// Sessions at once of one address that shows no key; 0 = as many as there are places.
    pub sessions_per_address: usize,
    /// Requests a second of one address, ten times as many at once; 0 = no limit.
    pub requests_per_second: u32,
    /// HTTP connections open at once of one address.
    pub connections_per_address: usize,
    /// Proxies whose `X-Forwarded-For` is believed.
    pub proxies: Vec<IpAddr>,
    /// Hosts that sessions may be published to; "*" = every one with a public address, empty = none.
    pub publish_hosts: Vec<String>,
    /// Time a client has to send a request's head; also how long an idle connection is kept.
    pub header_timeout_s: u64,
    /// Time after which a WebSocket that nothing is heard from, not even answers to pings, is gone.
    pub websocket_silence_s: u64,
    /// Time a request may take from its head to its answer.
    pub request_timeout_s: u64,
    /// Largest picture that may be uploaded.
    pub portrait_max_mb: usize,
    /// Pictures kept at once; the oldest leaves.
    pub portraits_kept: usize,
    /// How long an uploaded picture is kept after it was last used.
    pub portrait_ttl_s: u64,
    /// How long a session's token opens it to new connections.
    pub session_token_ttl_s: u64,
    /// Where recordings are written; empty = none are made.
    pub recordings_dir: String,
    /// Largest recording; 0 = no limit.
    pub recording_max_mb: u64,
    /// How long conversations may take to end after the service was told to stop.
    pub drain_timeout_s: u64,
    /// How long conversations go on undisturbed before that.
    pub drain_wait_s: u64,
    /// Memory that must be free for a session to be admitted; 0 = never looked at.
    pub memory_reserve_mb: u64,
    /// Certificate chain and key, PEM files; empty = plain HTTP.
    pub tls_cert: String,
    pub tls_key: String,
    /// What to do when the engine has failed.
    pub engine_failure: EngineFailure,
}

/// What the service does when its engine has failed for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineFailure {
    /// The process ends with exit code 1, so that whatever started it starts it anew.
    Exit,
    /// The process stays, refuses sessions and answers `/readyz` with 503, so that somebody can look.
    Stay,
}

/// Who may begin a conversation on the page of a service that has keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Visitors {
    /// Whoever has a key with the scope `live`.
    Key,
    /// Whoever reaches it.
    Anyone,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: "127.0.0.1:8080".into(),
            keys_file: String::new(),
            keys: Vec::new(),
            visitors: Visitors::Key,
            web_dir: String::new(),
            cors_origins: Vec::new(),
            max_connections: 256,
            connections_max: 100,
            publish_hosts: vec!["*".into()],
            sessions_per_address: 4,
            requests_per_second: 50,
            connections_per_address: 64,
            proxies: Vec::new(),
            header_timeout_s: 10,
            websocket_silence_s: 60,
            request_timeout_s: 20,
            portrait_max_mb: 10,
            portraits_kept: 16,
            portrait_ttl_s: 1800,
            session_token_ttl_s: 3600,
            recordings_dir: String::new(),
            recording_max_mb: 4000,
            drain_timeout_s: 5,
            drain_wait_s: 0,
            memory_reserve_mb: 300,
            tls_cert: String::new(),
            tls_key: String::new(),
            engine_failure: EngineFailure::Exit,
        }
    }
}

impl Config {
    /// The listening address.
    ///
    /// # Errors
    /// Text that is no address; the sentence says what one looks like.
    pub fn address(&self) -> Result<SocketAddr, String> {
        let listen = self.listen.replace("localhost", "127.0.0.1");
        listen.parse().map_err(|_| {
            format!(
                "server.listen = \"{}\": allowed is IP:port, such as 127.0.0.1:8080, [::1]:8080 or 0.0.0.0:8080",
                self.listen
            )
        })
    }

    /// Refuses an address that other machines can reach while there is no key.
    ///
    /// # Errors
    /// A sentence that says how to set a key.
    pub(super) fn reachable(&self, address: SocketAddr, keys: usize) -> Result<(), String> {
        if address.ip().is_loopback() || keys > 0 {
            return Ok(());
        }
        Err(format!(
            "server.listen = \"{}\" can be reached from other machines, and there is no key: whoever reaches it could \
             use this service. Make one with `loquent key new NAME --file keys` and say --set server.keys_file=keys. \
             Browsers give microphones only to HTTPS pages, so also give it a certificate (server.tls_cert) or put a TLS proxy in front of it. For this machine \
             alone, use 127.0.0.1:{}",
            self.listen,
            address.port()
        ))
    }

    /// Says whether the values are usable.
    ///
    /// # Errors
    /// A sentence that names the key, its value and what is allowed.
    pub fn validate(&self) -> Result<(), String> {
        let keys = super::keys::Keys::new(self).count()?;
        self.reachable(self.address()?, keys)?;
        let at_least_one: [(&str, u64); 9] = [
            ("connections_per_address", self.connections_per_address as u64),
            ("max_connections", self.max_connections as u64),
            ("header_timeout_s", self.header_timeout_s),
            ("websocket_silence_s", self.websocket_silence_s),
            ("request_timeout_s", self.request_timeout_s),
            ("portrait_max_mb", self.portrait_max_mb as u64),
            ("portraits_kept", self.portraits_kept as u64),
            ("portrait_ttl_s", self.portrait_ttl_s),
            ("session_token_ttl_s", self.session_token_ttl_s),
        ];
        for (key, value) in at_least_one {
            if value == 0 {
                return Err(format!("server.{key} = 0: allowed is 1 or more"));
            }
        }
        super::tls::Tls::new(self)?;
        if self.drain_wait_s > 86_400 {
            return Err(format!("server.drain_wait_s = {}: allowed is 0 to 86400", self.drain_wait_s));
        }
        if self.portrait_max_mb > 100 {
            return Err(format!("server.portrait_max_mb = {}: allowed is 1 to 100", self.portrait_max_mb));
        }
        if self.drain_timeout_s > 3600 {
            return Err(format!("server.drain_timeout_s = {}: allowed is 0 to 3600", self.drain_timeout_s));
        }
        for origin in &self.cors_origins {
            let plain = origin.strip_prefix("https://").or_else(|| origin.strip_prefix("http://"));
            let good = origin == "*"
                || plain.is_some_and(|host| !host.is_empty() && host.is_ascii() && !host.contains(['/', ' ', '*']));
            if !good {
                return Err(format!(
                    "server.cors_origins holds \"{origin}\": allowed are origins such as https://app.example.org (no \
                     path, no slash at the end), or \"*\" for every site"
                ));
            }
        }
        if !self.web_dir.is_empty() && !std::path::Path::new(&self.web_dir).join("index.html").is_file() {
            return Err(format!(
                "server.web_dir = \"{}\": allowed is a folder that holds index.html (or \"\" for the built-in page)",
                self.web_dir
            ));
        }
        Ok(())
    }

    pub(super) fn header_timeout(&self) -> Duration {
        Duration::from_secs(self.header_timeout_s)
    }
    pub(super) fn request_timeout(&self) -> Duration {
        Duration::from_secs(self.request_timeout_s)
    }
}
