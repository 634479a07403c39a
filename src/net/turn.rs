//! Credentials for a TURN server that both sides know a secret of, as coturn checks them with `use-auth-secret`
//! (draft-uberti-behave-turn-rest-00): the name is the time until which they hold, the password its HMAC.

use super::{Config, IceServer};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use ring::hmac;
use std::time::{Duration, SystemTime};

/// The configured TURN servers with credentials that hold from `now` for `turn_ttl_s`; `None` without a secret.
pub(super) fn minted(config: &Config, now: SystemTime) -> Option<IceServer> {
    if config.turn_urls.is_empty() {
        return None;
    }
    let until = now + Duration::from_secs(config.turn_ttl_s);
    let until = until.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    // What follows the time is free; coturn's logs and quotas then tell visitors apart.
    let username = format!("{until}:{:08x}", rand::random::<u32>());
    // SHA-1 is what the scheme prescribes; as an HMAC it is not broken.
    let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, config.turn_secret.as_bytes());
    let credential = BASE64_STANDARD.encode(hmac::sign(&key, username.as_bytes()));
    Some(IceServer { urls: config.turn_urls.clone(), username, credential })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_hold_for_their_time_and_are_the_hmac_of_their_name() {
        let config = Config {
            turn_urls: vec!["turn:turn.example.net".into()],
            turn_secret: "north".into(),
            turn_ttl_s: 600,
            ..Config::default()
        };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let server = minted(&config, now).unwrap();
        let (until, name) = server.username.split_once(':').unwrap();
        assert_eq!((until, name.len()), ("1800000600", 8));
        let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, b"north");
        let password = BASE64_STANDARD.decode(&server.credential).unwrap();
        assert_eq!(password.len(), 20);
        hmac::verify(&key, server.username.as_bytes(), &password).unwrap();
        assert!(minted(&Config::default(), now).is_none());
    }
}
