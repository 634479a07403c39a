//! What nodes say to each other: JSON heads, bytes behind them.

use super::{config::Config, id::NodeId};
use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Whether a node takes something new.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    #[default]
    Ready,
    /// Finishing what it has.
    Draining,
    /// Its engine failed, or is being built anew.
    Failed,
    /// It ended in order; the last beat.
    Left,
}

/// What a worker's pictures are like, for pages of nodes that make none themselves.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    pub engine: String,
    pub width: u32,
    pub height: u32,
    pub fps: u32,
    pub block_ms: f64,
    pub matte: bool,
}

/// How a node is, once a second.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Beat {
    pub node: NodeId,
    /// Milliseconds since 1970, by its own clock.
    pub sent_ms: u64,
    pub state: State,
    pub slots: usize,
    pub used: usize,
    /// Where its HTTP is, for what is too long for messages.
    pub address: String,
    pub facts: Facts,
    pub version: String,
    /// How many sessions those callers have here whose sessions are counted, by `Seal::who`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held: Vec<(u64, usize)>,
}

impl Default for NodeId {
    fn default() -> Self {
        NodeId::from_bits(0)
    }
}

/// A request, as HTTP has it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ask {
    pub method: String,
    /// Path and query.
    pub target: String,
    pub headers: Vec<(String, String)>,
    /// Who asks, as the node knows it that let the request in. Only `server` reads it.
    pub caller: serde_json::Value,
    /// Something new is asked for, which ends again when the asker does not say that it got it.
    pub claim: bool,
    /// Milliseconds the asker waits.
    pub patience_ms: u64,
    #[serde(skip)]
    pub body: Bytes,
}

/// The answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    #[serde(skip)]
    pub body: Bytes,
}

/// What a message to a node holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Letter {
    Ask(Ask),
    /// What was asked for under this number has arrived.
    Got(u128),
}

/// Longest head, bytes: that of an HTTP request is bounded by our own listener at 64 KiB.
const MAX_HEAD: usize = 256 * 1024;

/// `head` as JSON after its length, then `body`.
pub(super) fn write(head: &impl Serialize, body: &[u8]) -> serde_json::Result<Bytes> {
    let head = serde_json::to_vec(head)?;
    let mut out = BytesMut::with_capacity(4 + head.len() + body.len());
    out.put_u32(head.len() as u32);
    out.put_slice(&head);
    out.put_slice(body);
    Ok(out.freeze())
}

/// What [`write`] wrote; `None` for anything else.
pub(super) fn read<T: DeserializeOwned>(mut bytes: Bytes) -> Option<(T, Bytes)> {
    let length = u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    if length > MAX_HEAD || bytes.len() < 4 + length {
        return None;
    }
    let body = bytes.split_off(4 + length);
    Some((serde_json::from_slice(&bytes[4..]).ok()?, body))
}

/// Subjects of a cluster.
pub(super) struct Subjects {
    pub(super) beats: String,
    name: String,
}

impl Subjects {
    pub(super) fn new(config: &Config) -> Subjects {
        Subjects { beats: format!("{}.beat", config.name), name: config.name.clone() }
    }
    pub(super) fn of(&self, node: NodeId) -> String {
        format!("{}.node.{node}", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_and_bodies_come_back() {
        let ask = Ask { method: "POST".into(), target: "/v1/live".into(), claim: true, ..Ask::default() };
        let bytes = write(&Letter::Ask(ask.clone()), b"v=0").unwrap();
        assert_eq!(read::<Letter>(bytes.clone()), Some((Letter::Ask(ask), Bytes::from_static(b"v=0"))));
        for n in 0..bytes.len() - 3 {
            assert_eq!(read::<Letter>(bytes.slice(..n)), None, "{n} bytes");
        }
        assert_eq!(read::<Letter>(Bytes::from_static(&[0xff; 64])), None);
    }
}
