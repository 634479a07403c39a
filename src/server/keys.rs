//! API keys: who may do what, as lines of a file or of the settings.
//!
//! A line is `ID NAME SCOPES SHA256` and then limits, if the key has its own, such as
//! `1a2b3c4d shop control,live 9f86d0… sessions=4 max_session_s=600`; `#` begins a comment. Only the hash
//! of a key is kept: keys are 256 random bits, which nobody guesses, so that one round of SHA-256 without salt gives a
//! thief of the file nothing (slow hashes are for passwords that people choose).
//!
//! A key is rotated by adding a second line, moving the callers, and taking the first line away: the file is read again
//! when it changes. A file that cannot be understood any more changes nothing; the log says so.

use super::Config;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    fmt,
    str::FromStr,
    sync::{Arc, RwLock},
    time::SystemTime,
};

/// What keys begin with, so that people and scanners of leaked secrets know one when they see it.
const PREFIX: &str = "lq_";

/// What a key allows. None of them includes another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scope {
    /// Begin, list, change and end sessions; recordings; sessions in LiveKit rooms.
    Control,
    /// Talk on the page: begin a conversation, bring a portrait.
    Live,
    /// Read `/metrics` and the status page.
    Metrics,
}

const SCOPES: [(Scope, &str); 3] = [(Scope::Control, "control"), (Scope::Live, "live"), (Scope::Metrics, "metrics")];

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = SCOPES.iter().find(|s| s.0 == *self).map_or("", |s| s.1);
        f.write_str(name)
    }
}

impl FromStr for Scope {
    type Err = String;
    fn from_str(text: &str) -> Result<Scope, String> {
        let found = SCOPES.iter().find(|s| s.1 == text).map(|s| s.0);
        found.ok_or_else(|| format!("there is no scope `{text}`; there are control, live and metrics"))
    }
}

/// One key as it is kept: not the key itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// 8 hexadecimal digits, part of the key; names it in logs.
    pub id: String,
    /// Whose it is.
    pub name: String,
    pub scopes: Vec<Scope>,
    /// Stays where it is when other nodes are told of a caller.
    #[serde(skip)]
    hash: [u8; 32],
    pub(super) allowance: Allowance,
}

/// A key's own limits, within those of the service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Allowance {
    /// Sessions at once.
    pub(super) sessions: Option<usize>,
    pub(super) max_session_s: Option<u64>,
    pub(super) idle_timeout_s: Option<u64>,
}

impl Allowance {
    fn set(&mut self, text: &str) -> Result<(), String> {
        let wrong = || {
            format!(
                "`{text}` is no limit: there are sessions=N, max_session_s=SECONDS and idle_timeout_s=SECONDS, from 1"
            )
        };
        let (name, value) = text.split_once('=').ok_or_else(wrong)?;
        let value = value.parse().ok().filter(|n: &u64| *n > 0).ok_or_else(wrong)?;
        match name {
            "sessions" => self.sessions = Some(value as usize),
            "max_session_s" => self.max_session_s = Some(value),
            "idle_timeout_s" => self.idle_timeout_s = Some(value),
            _ => return Err(wrong()),
        }
        Ok(())
    }
}

impl Key {
    /// A new key: what is kept, and the key to hand over. `limits`: such as `sessions=4`.
    ///
    /// # Errors
    /// A name with other characters than letters, digits, dashes and dots; a limit that there is not.
    pub fn generate(name: &str, scopes: &[Scope], limits: &[String]) -> Result<(Key, String), String> {
        let id = format!("{:08x}", rand::random::<u32>());
        let secret = format!("{PREFIX}{id}_{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>());
        named(name)?;
        let mut allowance = Allowance::default();
        limits.iter().try_for_each(|limit| allowance.set(limit))?;
        Ok((Key { id, name: name.into(), scopes: scopes.into(), hash: digest(&secret), allowance }, secret))
    }

    /// Its own limits, each with a space before it.
    pub fn limits(&self) -> String {
        let Allowance { sessions, max_session_s, idle_timeout_s } = self.allowance;
        let all = [
            ("sessions", sessions.map(|n| n as u64)),
            ("max_session_s", max_session_s),
            ("idle_timeout_s", idle_timeout_s),
        ];
        all.iter().filter_map(|(name, n)| n.map(|n| format!(" {name}={n}"))).collect()
    }
}

fn named(name: &str) -> Result<(), String> {
    let fine = |c: char| c.is_alphanumeric() || "-._".contains(c);
    if name.is_empty() || name.len() > 64 || !name.chars().all(fine) {
        return Err(format!("the key's name is `{name}`: allowed are 1 to 64 letters, digits, dashes and dots"));
    }
    Ok(())
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scopes: Vec<String> = self.scopes.iter().map(Scope::to_string).collect();
        write!(f, "{} {} {} ", self.id, self.name, scopes.join(","))?;
        self.hash.iter().try_for_each(|b| write!(f, "{b:02x}"))?;
        f.write_str(&self.limits())
    }
}

impl FromStr for Key {
    type Err = String;
    fn from_str(line: &str) -> Result<Key, String> {
        let parts: Vec<&str> = line.split_whitespace().collect();
        let [id, name, scopes, hash, limits @ ..] = &parts[..] else {
            return Err("a key is a line `ID NAME SCOPES SHA256`; `loquent key new NAME` writes one".into());
        };
        if id.len() != 8 || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(format!("the key's id is `{id}`: allowed are 8 hexadecimal digits"));
        }
        named(name)?;
        let scopes = scopes.split(',').map(str::parse).collect::<Result<_, _>>()?;
        let bad_hash = || format!("the hash of the key {id} is no SHA-256: it must have 64 hexadecimal digits");
        let mut bytes = [0; 32];
        if hash.len() != 64 || !hash.is_ascii() {
            return Err(bad_hash());
        }
        for (byte, at) in bytes.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&hash[at..at + 2], 16).map_err(|_| bad_hash())?;
        }
        let mut allowance = Allowance::default();
        limits.iter().try_for_each(|limit| allowance.set(limit))?;
        Ok(Key { id: (*id).into(), name: (*name).into(), scopes, hash: bytes, allowance })
    }
}

fn digest(text: &str) -> [u8; 32] {
    Sha256::digest(text.as_bytes()).into()
}

/// Without a hint in time of how far the two agree.
pub(super) fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    std::hint::black_box(a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b))) == 0
}

/// All lines of a text, comments left out.
///
/// # Errors
/// The first line that is none, with its number.
pub fn parse_keys(text: &str) -> Result<Vec<Key>, String> {
    let mut keys: Vec<Key> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let key: Key = line.parse().map_err(|e| format!("line {}: {e}", number + 1))?;
        if keys.iter().any(|k| k.id == key.id) {
            return Err(format!("line {}: a second key with the id {}", number + 1, key.id));
        }
        keys.push(key);
    }
    Ok(keys)
}

/// The keys in force.
pub(super) struct Keys {
    /// No key was ever configured: a service of this machine alone, open to whoever uses the machine.
    open: bool,
    fixed: Vec<String>,
    file: String,
    now: RwLock<Loaded>,
}

struct Loaded {
    keys: Result<Arc<[Key]>, String>,
    /// Of the file, to see that it changed.
    stamp: Option<(SystemTime, u64)>,
}

impl Keys {
    pub(super) fn new(config: &Config) -> Keys {
        let (fixed, file) = (config.keys.clone(), config.keys_file.clone());
        let stamp = stamp(&file);
        let keys = read(&fixed, &file);
        Keys { open: fixed.is_empty() && file.is_empty(), now: RwLock::new(Loaded { keys, stamp }), fixed, file }
    }

    pub(super) fn open(&self) -> bool {
        self.open
    }

    /// How many there are.
    ///
    /// # Errors
    /// What is wrong with the settings or the file.
    pub(super) fn count(&self) -> Result<usize, String> {
        let now = self.now.read().unwrap_or_else(|e| e.into_inner());
        now.keys.as_ref().map(|k| k.len()).map_err(Clone::clone)
    }

    /// The key that this secret is.
    pub(super) fn find(&self, secret: &str) -> Option<Key> {
        let hash = digest(secret);
        let keys = self.now.read().unwrap_or_else(|e| e.into_inner()).keys.clone().ok()?;
        keys.iter().find(|k| same(&k.hash, &hash)).cloned()
    }

    /// Reads the file again, if it changed or `always`; says so in the log.
    pub(super) fn reload(&self, always: bool) {
        let stamp = stamp(&self.file);
        if self.file.is_empty() || (!always && self.now.read().unwrap_or_else(|e| e.into_inner()).stamp == stamp) {
            return;
        }
        let keys = read(&self.fixed, &self.file);
        let mut now = self.now.write().unwrap_or_else(|e| e.into_inner());
        now.stamp = stamp;
        match keys {
            Ok(keys) => {
                tracing::info!(keys = keys.len(), "the keys were read again");
                now.keys = Ok(keys);
            }
            Err(why) => tracing::error!("the keys stay as they were: {why}"),
        }
    }
}

fn stamp(file: &str) -> Option<(SystemTime, u64)> {
    let data = std::fs::metadata(file).ok()?;
    Some((data.modified().ok()?, data.len()))
}

fn read(fixed: &[String], file: &str) -> Result<Arc<[Key]>, String> {
    let mut keys = parse_keys(&fixed.join("\n")).map_err(|e| format!("server.keys: {e}"))?;
    if !file.is_empty() {
        let text = std::fs::read_to_string(file).map_err(|e| {
            format!(
                "server.keys_file = \"{file}\" cannot be read: {e}. `loquent key new NAME --file {file}` begins one"
            )
        })?;
        keys.extend(parse_keys(&text).map_err(|e| format!("{file}: {e}"))?);
    }
    Ok(keys.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_kept_as_a_line_that_does_not_tell_it() {
        let (key, secret) =
            Key::generate("shop", &[Scope::Control, Scope::Live], &["sessions=2".into(), "max_session_s=60".into()])
                .unwrap();
        let line = key.to_string();
        assert!(!line.contains(&secret[12..]) && secret.len() == 3 + 8 + 1 + 64, "{line} {secret}");
        assert_eq!(line.parse::<Key>().unwrap(), key);
        assert_ne!(Key::generate("shop", &[], &[]).unwrap().1, secret);
        for (bad, why) in [
            ("1a2b3c4d shop control", "ID NAME SCOPES SHA256"),
            ("1a2b shop control 00", "8 hexadecimal"),
            ("1a2b3c4d shop fly 00", "no scope `fly`"),
            ("1a2b3c4d shop live 00", "64 hexadecimal"),
        ] {
            assert!(bad.parse::<Key>().unwrap_err().contains(why), "{bad}");
        }
        let twice = parse_keys(&format!("# mine\n\n{line} # told to bob\n{line}\n")).unwrap_err();
        assert!(twice.contains("line 4"), "{twice}");
        assert!(Key::generate("a b", &[], &[]).is_err() && Key::generate("a", &[], &["rooms=1".into()]).is_err());
    }

    #[test]
    fn a_changed_file_counts_and_a_broken_one_does_not() {
        let file = std::env::temp_dir().join(format!("loquent-keys-{}", std::process::id()));
        let (a, a_secret) = Key::generate("a", &[Scope::Live], &[]).unwrap();
        let (b, b_secret) = Key::generate("b", &[Scope::Metrics], &[]).unwrap();
        std::fs::write(&file, a.to_string()).unwrap();
        let config = Config { keys_file: file.display().to_string(), ..Config::default() };
        let keys = Keys::new(&config);
        assert!(!keys.open() && keys.find(&a_secret).is_some() && keys.find(&b_secret).is_none());
        std::fs::write(&file, format!("{a}\n{b}\n")).unwrap();
        keys.reload(false);
        assert_eq!(keys.find(&b_secret).unwrap().name, "b");
        std::fs::write(&file, "nonsense").unwrap();
        keys.reload(false);
        assert_eq!(keys.count(), Ok(2), "a broken file changes nothing");
        std::fs::write(&file, "").unwrap();
        keys.reload(true);
        assert!(keys.find(&a_secret).is_none() && !keys.open(), "an empty file lets nobody in");
        std::fs::remove_file(&file).unwrap();
        assert!(Keys::new(&config).count().unwrap_err().contains("loquent key new"));
    }
}
