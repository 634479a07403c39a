//! Composes each room's `Config`; layers, checks and prints the whole.
//!
//! Precedence: defaults < file < environment < flags. This room reads none of them: `cli` hands over the text of the
//! file and a list of [`Change`]s, so that everything below works from one value that was complete before anything
//! started.

use crate::{avatar::s2v, cluster, engine, livekit, net, server, session, telemetry, voice};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Every setting of the service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub server: server::Config,
    pub engine: engine::Config,
    pub s2v: s2v::Config,
    pub session: session::Config,
    pub voice: voice::Config,
    pub net: net::Config,
    pub livekit: livekit::Config,
    pub cluster: cluster::Config,
    pub log: telemetry::Config,
}

/// Why a configuration cannot be used: a sentence with the key, its value and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{origin}: {why}")]
    File { origin: String, why: String },
    #[error("{origin}: there is no setting `{key}`{near}")]
    UnknownKey { origin: String, key: String, near: String },
    #[error("{origin}: {key} = {value}: {why}")]
    Value { origin: String, key: String, value: String, why: String },
    #[error("{0}")]
    Invalid(String),
}

/// One setting from the environment or the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Where it was said, for the message: `the environment variable LOQUENT__SERVER__LISTEN`.
    pub origin: String,
    /// `server.listen`
    pub key: String,
    /// As it was typed: `0.0.0.0:80`, `5`, `true`, `a,b` or TOML.
    pub value: String,
}

/// What the names of environment variables begin with; sections and keys are separated by two underscores.
pub const ENVIRONMENT_PREFIX: &str = "LOQUENT__";

/// `LOQUENT__SERVER__LISTEN` → `server.listen`; `None` for variables that are not ours.
pub fn key_of_variable(name: &str) -> Option<String> {
    name.strip_prefix(ENVIRONMENT_PREFIX).map(|rest| rest.to_ascii_lowercase().replace("__", "."))
}

impl Config {
    /// The defaults, changed by a file's text and then by `changes` in their order. Not yet validated.
    ///
    /// `file`: its name for messages, and its text.
    ///
    /// # Errors
    /// The first thing that cannot be understood, with where it was said.
    pub fn layered(file: Option<(&str, &str)>, changes: &[Change]) -> Result<Config, ConfigError> {
        let mut config = match file {
            // The parser's message has the line and points at the place.
            Some((origin, text)) => toml::from_str(text)
                .map_err(|e: toml::de::Error| ConfigError::File { origin: origin.into(), why: e.to_string() })?,
            None => Config::default(),
        };
        for change in changes {
            config = config.changed(change)?;
        }
        Ok(config)
    }

    /// With one setting changed.
    fn changed(&self, change: &Change) -> Result<Config, ConfigError> {
        let mut tree = tree(self)?;
        let unknown = || ConfigError::UnknownKey {
            origin: change.origin.clone(),
            key: change.key.clone(),
            near: nearest(&change.key),
        };
        let mut place = &mut tree;
        for part in change.key.split('.') {
            place = place.get_mut(part).ok_or_else(unknown)?;
        }
        if place.is_object() {
            return Err(unknown());
        }
        let before = place.clone();
        *place = typed(&before, &change.value);
        let wrong = |why: String| ConfigError::Value {
            origin: change.origin.clone(),
            key: change.key.clone(),
            value: change.value.clone(),
            why,
        };
        serde_json::from_value(tree).map_err(|e| wrong(e.to_string()))
    }

    /// Asks every room whether its values are usable.
    ///
    /// # Errors
    /// The first sentence.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.server.validate().map_err(ConfigError::Invalid)?;
        self.engine.validate().map_err(ConfigError::Invalid)?;
        if self.engine.sessions == 0 && !self.cluster.on() {
            let text = "engine.sessions = 0: allowed is 1 to 64; 0 is for nodes of a cluster that hand everything on";
            return Err(ConfigError::Invalid(text.into()));
        }
        self.cluster.validate().map_err(ConfigError::Invalid)?;
        self.voice.validate().map_err(ConfigError::Invalid)?;
        self.net.check().map_err(|e| ConfigError::Invalid(format!("[net] {e}")))?;
        self.s2v.validate().map_err(ConfigError::Invalid)?;
        self.livekit.check().map_err(ConfigError::Invalid)?;
        self.log.validate().map_err(|e| ConfigError::Invalid(e.to_string()))?;
        Ok(())
    }

    /// As a file, without comments; settings without a value are left out.
    ///
    /// # Errors
    /// None for any value that can be had; the type is the serialiser's.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        toml::to_string(self).map_err(|e| ConfigError::Invalid(e.to_string()))
    }

    /// Every key as `section.key`, sorted, also those without a value.
    pub fn keys() -> Vec<String> {
        let mut keys = Vec::new();
        if let Ok(Value::Object(sections)) = tree(&Config::default()) {
            for (section, values) in &sections {
                if let Value::Object(values) = values {
                    keys.extend(values.keys().map(|key| format!("{section}.{key}")));
                }
            }
        }
        keys.extend(OPTIONAL.iter().map(|k| k.to_string()));
        keys.sort();
        keys.dedup();
        keys
    }
}

/// Settings that may be absent and whose default is absence; serialising leaves them out.
const OPTIONAL: [&str; 6] =
    ["engine.size", "engine.steps", "s2v.guidance", "s2v.shift", "s2v.solver", "s2v.clip_frames"];

/// The whole as a tree in which every key exists.
fn tree(config: &Config) -> Result<Value, ConfigError> {
    let mut tree = serde_json::to_value(config).map_err(|e| ConfigError::Invalid(e.to_string()))?;
    for key in OPTIONAL {
        if let Some((section, key)) = key.split_once('.')
            && let Some(section) = tree.get_mut(section).and_then(Value::as_object_mut)
        {
            section.entry(key).or_insert(Value::Null);
        }
    }
    Ok(tree)
}

/// Reads typed text as the kind of value that stands there; if it is no such thing it stays text, and the room's own
/// type says what is wrong with it.
fn typed(before: &Value, text: &str) -> Value {
    let parsed = || {
        let document: toml::Table = toml::from_str(&format!("value = {text}")).ok()?;
        serde_json::to_value(document.get("value")?).ok()
    };
    match before {
        Value::String(_) => Value::String(text.into()),
        Value::Array(_) => parsed().filter(Value::is_array).unwrap_or_else(|| {
            // `a,b` is easier to type in a shell than `["a", "b"]`.
            text.split(',').map(str::trim).filter(|t| !t.is_empty()).map(|t| Value::String(t.into())).collect()
        }),
        _ => parsed().unwrap_or_else(|| Value::String(text.into())),
    }
}

/// ` (did you mean …?)` for the closest existing key, if one is close.
fn nearest(key: &str) -> String {
    let best = Config::keys().into_iter().map(|k| (distance(key, &k), k)).min();
    match best {
        Some((d, k)) if d <= 1 + key.len() / 4 => format!(" (did you mean `{k}`?)"),
        _ => "; `loquent config default` shows all".into(),
    }
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
