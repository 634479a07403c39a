//! What a room token says (RFC 7519; claims of LiveKit's access tokens). The signature is the server's business: only it
//! has the secret. Reading the claims here lets a wrong token be answered with a sentence before anything is connected.

use super::LivekitError;
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::Deserialize;
use std::{collections::HashMap, time::SystemTime};

/// Tokens longer than this are refused; those of LiveKit have less than 2 KiB.
const MAX_BYTES: usize = 16 * 1024;
/// The attribute by which a worker says for whom it publishes: the agent's identity.
const ON_BEHALF: &str = "lk.publish_on_behalf";

/// The claims that matter here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Claims {
    pub(super) identity: String,
    pub(super) room: String,
    /// The agent for which the worker publishes.
    pub(super) on_behalf: Option<String>,
}

#[derive(Deserialize)]
struct Wire {
    sub: Option<String>,
    exp: Option<f64>,
    nbf: Option<f64>,
    #[serde(default)]
    video: Grants,
    #[serde(default)]
    attributes: HashMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Grants {
    room_join: bool,
    room: String,
    can_publish: Option<bool>,
    can_publish_data: Option<bool>,
}

impl Claims {
    /// Reads a token.
    ///
    /// # Errors
    /// [`LivekitError::Token`] with what it lacks.
    pub(super) fn read(token: &str, now: SystemTime) -> Result<Claims, LivekitError> {
        let wrong = |why: &str| LivekitError::Token(why.into());
        if token.len() > MAX_BYTES {
            return Err(wrong("it is longer than 16 KiB"));
        }
        let mut parts = token.split('.');
        let (Some(_), Some(claims), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
            return Err(wrong("it is not three parts with dots between them"));
        };
        if !token.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.=".contains(&b)) {
            return Err(wrong("it has characters that no token has"));
        }
        let claims = BASE64_URL_SAFE_NO_PAD
            .decode(claims.trim_end_matches('='))
            .map_err(|_| wrong("its middle part is not base64url"))?;
        let wire: Wire = serde_json::from_slice(&claims).map_err(|e| LivekitError::Token(e.to_string()))?;
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        if wire.exp.is_some_and(|exp| exp < now) {
            return Err(wrong("it has expired; make a new one"));
        }
        // Clocks differ by a little.
        if wire.nbf.is_some_and(|nbf| nbf > now + 60.0) {
            return Err(wrong("it is not valid yet; compare the clocks"));
        }
        if !wire.video.room_join || wire.video.room.is_empty() {
            return Err(wrong("it does not grant roomJoin for a room"));
        }
        if wire.video.can_publish == Some(false) || wire.video.can_publish_data == Some(false) {
            return Err(wrong("it forbids to publish (canPublish and canPublishData are needed)"));
        }
        let identity = wire.sub.filter(|s| !s.is_empty()).ok_or_else(|| wrong("it names no identity (sub)"))?;
        let on_behalf = wire.attributes.get(ON_BEHALF).filter(|a| !a.is_empty()).cloned();
        Ok(Claims { identity, room: wire.video.room, on_behalf })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn token(claims: &str) -> String {
        format!("e30.{}.c2ln", BASE64_URL_SAFE_NO_PAD.encode(claims))
    }

    #[test]
    fn the_claims_that_matter_are_read() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let text = token(
            r#"{"sub":"bey-avatar-agent","exp":1800000100,"nbf":1799999999,"kind":"agent","extra":[1],
                "video":{"roomJoin":true,"room":"r1"},"attributes":{"lk.publish_on_behalf":"agent-1"}}"#,
        );
        let claims = Claims::read(&text, now).unwrap();
        assert_eq!((claims.identity.as_str(), claims.room.as_str()), ("bey-avatar-agent", "r1"));
        assert_eq!(claims.on_behalf.as_deref(), Some("agent-1"));
        for (text, word) in [
            ("".into(), "three parts"),
            ("a.b".into(), "three parts"),
            ("a.!.c".into(), "characters"),
            ("a.b.c".into(), "base64url"),
            ("x".repeat(20_000), "16 KiB"),
            (token("[]"), "invalid"),
            (token(r#"{"sub":"a","exp":5,"video":{"roomJoin":true,"room":"r"}}"#), "expired"),
            (token(r#"{"sub":"a","nbf":1900000000,"video":{"roomJoin":true,"room":"r"}}"#), "not valid yet"),
            (token(r#"{"sub":"a","video":{"room":"r"}}"#), "roomJoin"),
            (token(r#"{"video":{"roomJoin":true,"room":"r"}}"#), "identity"),
            (token(r#"{"sub":"a","video":{"roomJoin":true,"room":"r","canPublish":false}}"#), "canPublish"),
        ] {
            let error = Claims::read(&text, now).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
