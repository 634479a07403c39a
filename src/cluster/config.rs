//! Settings of a node.

use serde::{Deserialize, Serialize};

/// `[cluster]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// NATS servers; empty = no cluster.
    pub nats: Vec<String>,
    /// Which cluster this is: the first word of its subjects.
    pub name: String,
    /// What all nodes know and nobody else: their messages are signed with it.
    pub secret: String,
    /// How other nodes reach this one's HTTP; empty = by the address that is listened on.
    pub address: String,
    /// Where clients reach the cluster, whichever node answers; empty = the address they used.
    pub public_url: String,
    /// How this node shows itself to the NATS server: at most one of the three.
    pub user: String,
    pub password: String,
    pub token: String,
    pub credentials_file: String,
    /// Certificate authority of the NATS server, and a certificate to show it, PEM files.
    pub tls_ca: String,
    pub tls_cert: String,
    pub tls_key: String,
}

impl Default for Config {
    fn default() -> Self {
        let none = String::new;
        Config {
            nats: Vec::new(),
            name: "loquent".into(),
            secret: none(),
            address: none(),
            public_url: none(),
            user: none(),
            password: none(),
            token: none(),
            credentials_file: none(),
            tls_ca: none(),
            tls_cert: none(),
            tls_key: none(),
        }
    }
}

/// Shortest secret, characters.
const SECRET: usize = 32;

impl Config {
    /// Whether there is a cluster at all.
    pub fn on(&self) -> bool {
        !self.nats.is_empty()
    }

    /// Says whether the values are usable.
    ///
    /// # Errors
    /// A sentence that names the key and what is allowed.
    pub fn validate(&self) -> Result<(), String> {
        if !self.on() {
            return Ok(());
        }
        let mut local = true;
        for server in &self.nats {
            let url = server.parse::<async_nats::ServerAddr>().map_err(|e| {
                format!("cluster.nats holds \"{server}\": {e}; allowed are addresses such as nats://10.0.0.1:4222 or tls://nats.example.org")
            })?;
            if url.has_user_pass() {
                return Err("cluster.nats: name and password stand in cluster.user and cluster.password, not in the \
                            address, which is logged"
                    .into());
            }
            let ip = url.host().parse::<std::net::IpAddr>();
            local &= url.host() == "localhost" || ip.is_ok_and(|ip| ip.is_loopback());
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if self.name.is_empty() || !self.name.chars().all(plain) {
            return Err(format!("cluster.name = \"{}\": allowed are letters, digits, - and _", self.name));
        }
        if self.secret.is_empty() && !local {
            return Err(
                "cluster.secret is empty: whoever reaches the NATS server could order sessions and end them. Give \
                        all nodes the same long random text, such as what `openssl rand -hex 32` prints \
                        (LOQUENT__CLUSTER__SECRET keeps it out of files)"
                    .into(),
            );
        }
        if !self.secret.is_empty() && self.secret.len() < SECRET {
            return Err(format!("cluster.secret is too short: allowed are {SECRET} characters or more"));
        }
        for (key, url) in [("address", &self.address), ("public_url", &self.public_url)] {
            let good = url.is_empty()
                || url::Url::parse(url).is_ok_and(|u| {
                    ["http", "https"].contains(&u.scheme()) && u.has_host() && ["", "/"].contains(&u.path())
                });
            if !good {
                return Err(format!(
                    "cluster.{key} = \"{url}\": allowed is an address without a path, such as http://10.0.0.5:8080"
                ));
            }
        }
        let ways = [&self.user, &self.token, &self.credentials_file].iter().filter(|v| !v.is_empty()).count();
        if ways > 1 {
            return Err("cluster: allowed is one of user (with password), token and credentials_file".into());
        }
        if self.user.is_empty() != self.password.is_empty() {
            return Err("cluster: both user and password are needed, or neither".into());
        }
        if self.tls_cert.is_empty() != self.tls_key.is_empty() {
            return Err("cluster: both tls_cert and tls_key are needed, or neither".into());
        }
        for (key, file) in [
            ("credentials_file", &self.credentials_file),
            ("tls_ca", &self.tls_ca),
            ("tls_cert", &self.tls_cert),
            ("tls_key", &self.tls_key),
        ] {
            if !file.is_empty() && !std::path::Path::new(file).is_file() {
                return Err(format!("cluster.{key} = \"{file}\": there is no such file"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_used_is_told() {
        let good = Config { nats: vec!["nats://127.0.0.1:4222".into()], ..Config::default() };
        good.validate().unwrap();
        Config::default().validate().unwrap();
        let said = |change: fn(&mut Config)| {
            let mut config = good.clone();
            change(&mut config);
            config.validate().unwrap_err()
        };
        assert!(said(|c| c.nats = vec!["nats://10.0.0.1".into()]).contains("cluster.secret is empty"));
        assert!(said(|c| c.nats = vec!["nats://a:b@127.0.0.1".into()]).contains("cluster.user"));
        assert!(said(|c| c.nats = vec!["ftp://x y".into()]).contains("cluster.nats"));
        assert!(said(|c| c.secret = "short".into()).contains("32 characters"));
        assert!(said(|c| c.name = "a.b".into()).contains("cluster.name"));
        assert!(said(|c| c.address = "10.0.0.5:8080".into()).contains("cluster.address"));
        assert!(said(|c| c.public_url = "https://a.example/live".into()).contains("cluster.public_url"));
        assert!(said(|c| c.user = "me".into()).contains("password"));
        assert!(said(|c| c.credentials_file = "/nowhere".into()).contains("no such file"));
        assert!(
            said(|c| {
                c.token = "t".into();
                c.credentials_file = "/nowhere".into();
            })
            .contains("one of")
        );
    }
}
