//! Names of nodes, and of whatever lives on one.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Digits of a node's id.
const DIGITS: usize = 12;
/// Digits of an id without its node: 128 bits.
const OWN: usize = 32;

/// One process, from its start to its end: 48 random bits. A process that is started anew is another node, so that
/// sessions of the one before are known to be gone.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(u64);

impl NodeId {
    /// Of these bits; the upper 16 are not used.
    pub fn from_bits(bits: u64) -> NodeId {
        NodeId(bits & ((1 << (4 * DIGITS)) - 1))
    }

    pub fn random() -> NodeId {
        NodeId::from_bits(rand::random())
    }

    /// A new id of something that lives here: 128 random bits, then the node, all in hexadecimal digits.
    pub fn unguessable(self) -> String {
        format!("{:032x}{self}", rand::random::<u128>())
    }

    /// Where something lives; `None` for ids that name no node.
    pub fn of(id: &str) -> Option<NodeId> {
        let plain = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if id.len() != OWN + DIGITS || !id.bytes().all(plain) {
            return None;
        }
        u64::from_str_radix(&id[OWN..], 16).ok().map(NodeId)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:012x}", self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_says_where_it_lives() {
        let node = NodeId::from_bits(0xffff_0000_0000_002a);
        assert_eq!(node.to_string(), "00000000002a");
        assert_eq!(NodeId::of(&node.unguessable()), Some(node));
        assert_ne!(node.unguessable(), node.unguessable());
        for other in ["", "00000000002a", &"f".repeat(32), &"F".repeat(44), &"é".repeat(22), &"0".repeat(45)] {
            assert_eq!(NodeId::of(other), None, "{other}");
        }
    }
}
