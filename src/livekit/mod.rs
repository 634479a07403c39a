//! LiveKit rooms: a worker that joins one as an avatar, so that an agent's voice gets a face there.
//!
//! [`join`] opens the signalling connection with the token that the agent made, and [`Joined::run`] does the work: it
//! publishes voice and picture at once (agents wait for the picture before they send any speech), takes speech as byte
//! streams, answers the agent's calls and tells it what was played, until the session, the room or the agent ends.
//! Media and data channels go through [`crate::net`]; what is shown and played comes from a session's
//! [`Handle`](crate::session::Handle).
//!
//! | part | what |
//! | --- | --- |
//! | `target`, `token` | what a caller gave: where, who; checked before anything is sent |
//! | `signal` | protobuf messages over a WebSocket |
//! | `media` | the two peer connections of LiveKit: one that publishes, one that subscribes (data channels) |
//! | `streams`, `calls` | pure: speech out of byte streams; remote procedure calls |
//! | `agent` | pure: who in the room is the agent, and is it there |
//! | `worker` | ties them together; resumes and rejoins |
//!
//! The protocol is that of `voice/avatar` in livekit/agents @da6af86, over `livekit_rtc.proto` and `livekit_models.proto`
//! of livekit/protocol @d74e7cd.

mod agent;
mod calls;
mod config;
mod media;
mod signal;
mod spoken;
mod stay;
mod streams;
mod target;
mod token;
mod worker;

pub use config::Config;
pub use worker::{Invitation, Joined, join};

/// Why a room cannot be joined, or was left.
#[derive(Debug, thiserror::Error)]
pub enum LivekitError {
    #[error("the LiveKit URL cannot be used: {0}")]
    Url(String),
    #[error("{0} is not among the LiveKit hosts that this service may join; the operator lists them in livekit.hosts")]
    Host(String),
    #[error(
        "{0} has a private address, and this service may join public hosts only; the operator can list it in livekit.hosts \
         or set livekit.allow_private"
    )]
    Private(String),
    #[error("the LiveKit token cannot be used: {0}")]
    Token(String),
    #[error("{host} cannot be reached: {why}")]
    Unreachable { host: String, why: String },
    #[error("the LiveKit server refused to let the worker in (status {status}): {why}")]
    Refused { status: u16, why: String },
    #[error("the LiveKit server ended the connection: {0}")]
    Left(String),
    #[error(transparent)]
    Net(#[from] crate::net::NetError),
}

impl LivekitError {
    /// Whether what the caller gave was at fault, not a server.
    pub fn is_client(&self) -> bool {
        match self {
            LivekitError::Url(_) | LivekitError::Host(_) | LivekitError::Private(_) | LivekitError::Token(_) => true,
            LivekitError::Refused { status, .. } => [401, 403].contains(status),
            LivekitError::Unreachable { .. } | LivekitError::Left(_) | LivekitError::Net(_) => false,
        }
    }
}
