//! Signatures: what makes a message of the bus one of ours.
//!
//! `time (8 bytes, ms since 1970) ‖ number (16) ‖ HMAC-SHA256 (32) ‖ payload`; the HMAC covers what the message is for, the
//! time, the number and the payload. An answer is for the number of its question, so that no other answer passes for it.

use super::id::NodeId;
use bytes::{BufMut, Bytes, BytesMut};
use ring::{digest, hmac};
use std::{collections::HashMap, time::Duration};

/// How far clocks may differ, and how long a message may be on its way.
pub(super) const FRESH: Duration = Duration::from_secs(30);
const HEAD: usize = 8 + 16 + 32;
/// Numbers that are remembered.
const NUMBERS: usize = 65_536;

/// What a message is for.
#[derive(Clone, Copy)]
pub(super) enum For {
    Everybody,
    Node(NodeId),
    /// The question of this number.
    Question(u128),
}

impl For {
    fn word(self) -> String {
        match self {
            For::Everybody => "beat".into(),
            For::Node(id) => format!("node {id}"),
            For::Question(number) => format!("answer {number:032x}"),
        }
    }
}

/// Why a message is not believed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    #[error("it is no message of this cluster, or of one with another cluster.secret")]
    Foreign,
    #[error("its time differs from ours by {0} s: set the clocks by NTP")]
    Stale(u64),
}

/// The cluster's secret, ready to sign.
pub(super) struct Seal(hmac::Key);

impl Seal {
    /// `name`: of the cluster; messages of another one do not pass.
    pub(super) fn new(name: &str, secret: &str) -> Seal {
        Seal(hmac::Key::new(hmac::HMAC_SHA256, format!("loquent cluster 1\n{name}\n{secret}").as_bytes()))
    }

    /// What is signed: the payload by its digest.
    fn signed(to: For, time: u64, number: u128, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(128);
        out.put_u64(time);
        out.put_u128(number);
        out.put_slice(digest::digest(&digest::SHA256, payload).as_ref());
        out.put_slice(to.word().as_bytes());
        out
    }

    pub(super) fn close(&self, to: For, now_ms: u64, number: u128, payload: &[u8]) -> Bytes {
        let mut out = BytesMut::with_capacity(HEAD + payload.len());
        out.put_u64(now_ms);
        out.put_u128(number);
        out.put_slice(hmac::sign(&self.0, &Self::signed(to, now_ms, number, payload)).as_ref());
        out.put_slice(payload);
        out.freeze()
    }

    /// A caller by a number that says nothing to whoever does not have the secret.
    pub(super) fn who(&self, name: &str) -> u64 {
        let mac = hmac::sign(&self.0, format!("who {name}").as_bytes());
        mac.as_ref().first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
    }

    /// The number and the payload.
    pub(super) fn open(&self, to: For, now_ms: u64, mut message: Bytes) -> Result<(u128, Bytes), Broken> {
        if message.len() < HEAD {
            return Err(Broken::Foreign);
        }
        let payload = message.split_off(HEAD);
        let (time, rest) = message.split_first_chunk().ok_or(Broken::Foreign)?;
        let (number, mac) = rest.split_first_chunk().ok_or(Broken::Foreign)?;
        let (time, number) = (u64::from_be_bytes(*time), u128::from_be_bytes(*number));
        hmac::verify(&self.0, &Self::signed(to, time, number, &payload), mac).map_err(|_| Broken::Foreign)?;
        let apart = now_ms.abs_diff(time);
        if u128::from(apart) > FRESH.as_millis() {
            return Err(Broken::Stale(apart / 1000));
        }
        Ok((number, payload))
    }
}

/// Numbers that were taken: a message that is said again does nothing.
#[derive(Default)]
pub(super) struct Numbers(HashMap<u128, u64>);

/// What came of taking a number.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken {
    New,
    Again,
    Full,
}

impl Numbers {
    pub(super) fn take(&mut self, number: u128, now_ms: u64) -> Taken {
        // A message is believed from 30 s before to 30 s after its time.
        let kept = 2 * FRESH.as_millis() as u64;
        if self.0.len() >= NUMBERS {
            self.0.retain(|_, at| now_ms.saturating_sub(*at) <= kept);
        }
        if self.0.len() >= NUMBERS {
            return Taken::Full;
        }
        match self.0.insert(number, now_ms) {
            Some(before) => {
                self.0.insert(number, before.max(now_ms));
                Taken::Again
            }
            None => Taken::New,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_sealed_for_this_now_with_this_secret_opens() {
        let (ours, other) = (Seal::new("a", "secret"), Seal::new("a", "other"));
        let (one, two) = (For::Node(NodeId::from_bits(1)), For::Node(NodeId::from_bits(2)));
        let sealed = ours.close(one, 1_000_000, 7, b"payload");
        assert_eq!(ours.open(one, 1_020_000, sealed.clone()), Ok((7, Bytes::from_static(b"payload"))));
        assert_eq!(ours.open(one, 1_040_000, sealed.clone()), Err(Broken::Stale(40)));
        assert_eq!(ours.open(one, 0, sealed.clone()), Err(Broken::Stale(1000)));
        assert_eq!(ours.open(two, 1_000_000, sealed.clone()), Err(Broken::Foreign), "for another node");
        assert_eq!(ours.open(For::Question(7), 1_000_000, sealed.clone()), Err(Broken::Foreign));
        assert_eq!(other.open(one, 1_000_000, sealed.clone()), Err(Broken::Foreign));
        assert_eq!(Seal::new("b", "secret").open(one, 1_000_000, sealed.clone()), Err(Broken::Foreign));
        for i in 0..sealed.len() {
            let mut spoilt = sealed.to_vec();
            spoilt[i] ^= 1;
            assert_eq!(ours.open(one, 1_000_000, spoilt.into()), Err(Broken::Foreign), "byte {i}");
        }
        for n in 0..HEAD {
            assert_eq!(ours.open(one, 1_000_000, sealed.slice(..n)), Err(Broken::Foreign));
        }
    }

    #[test]
    fn a_number_is_taken_once_and_the_memory_is_bounded() {
        let mut numbers = Numbers::default();
        assert_eq!(numbers.take(1, 0), Taken::New);
        assert_eq!(numbers.take(1, 1), Taken::Again);
        for n in 2..=NUMBERS as u128 {
            assert_eq!(numbers.take(n, 2), Taken::New);
        }
        assert_eq!(numbers.take(1 << 100, 3), Taken::Full);
        assert_eq!(numbers.take(1 << 100, 120_000), Taken::New);
    }
}
