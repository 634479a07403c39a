//! Settings of LiveKit workers.

use serde::{Deserialize, Serialize};

/// `[livekit]`: which rooms may be joined, and how long things may take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Hosts whose rooms may be joined, by name or by parent domain (`.livekit.cloud`); empty = any public host. A host
    /// named here may have a private address.
    pub hosts: Vec<String>,
    /// Also connect to hosts with private, loopback and link-local addresses.
    pub allow_private: bool,
    /// Seconds to reach a server and to publish in its room.
    pub join_timeout_s: u64,
    /// Seconds to get a lost signalling connection back before the worker gives up.
    pub resume_timeout_s: u64,
    /// Seconds the agent may be away before the worker leaves.
    pub agent_timeout_s: u64,
    /// Speech the agent may send ahead, seconds; more is dropped.
    pub speech_buffer_s: u64,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            hosts: vec![],
            allow_private: false,
            join_timeout_s: 10,
            resume_timeout_s: 30,
            agent_timeout_s: 20,
            speech_buffer_s: 600,
        }
    }
}

impl Config {
    /// Refuses settings that cannot work.
    ///
    /// # Errors
    /// A sentence with the key and what is allowed.
    pub fn check(&self) -> Result<(), String> {
        let spans = [
            ("join_timeout_s", self.join_timeout_s, 1, 60),
            ("resume_timeout_s", self.resume_timeout_s, 1, 600),
            ("agent_timeout_s", self.agent_timeout_s, 1, 3600),
            ("speech_buffer_s", self.speech_buffer_s, 10, 3600),
        ];
        for (key, value, least, most) in spans {
            if !(least..=most).contains(&value) {
                return Err(format!("livekit.{key} = {value}: allowed is {least} to {most}"));
            }
        }
        match self
            .hosts
            .iter()
            .find(|h| h.is_empty() || h.contains(['/', ':', ' ', '*']) && h.parse::<std::net::IpAddr>().is_err())
        {
            Some(host) => {
                Err(format!("livekit.hosts: `{host}` is no host name; give names without scheme, port or `*`"))
            }
            None => Ok(()),
        }
    }
}
