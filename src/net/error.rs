//! What can go wrong between an offer and a connection, as sentences for whoever sent the offer.

/// Errors of this room. Those that the client caused answer true to [`NetError::is_client`].
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("the WebRTC settings cannot work: {0}")]
    Config(String),
    #[error("the session description has {0} bytes; at most {max} are accepted", max = super::sdp::MAX_BYTES)]
    TooLarge(usize),
    #[error("the session description is malformed: {0}")]
    Malformed(String),
    #[error(
        "the offer has no audio section that sends (sendrecv or sendonly); add the microphone track before creating \
         the offer"
    )]
    NoMicrophone,
    #[error("the offer has no video section that receives; add a video transceiver with direction recvonly")]
    NoVideo,
    #[error("the offer's audio section does not list Opus (opus/48000/2), the only voice codec spoken here")]
    NoOpus,
    #[error(
        "the offer's video section does not list H.264 constrained baseline with packetization-mode=1 \
         (profile-level-id 42e01f or similar), the only video codec spoken here"
    )]
    NoH264,
    #[error("the offer has neither an audio nor a video section to play something in")]
    NothingToSend,
    #[error("the offer asks for what is not possible here: {0}")]
    Unsupported(String),
    #[error(
        "no UDP port is free on {0}; widen `port_min`…`port_max` or close sessions (each connected peer uses one port)"
    )]
    NoPort(String),
    #[error("the fragment's ufrag and pwd are those in use already; an ICE restart needs new ones")]
    NotARestart,
    #[error("this peer has been closed; make a new offer")]
    Closed,
    #[error("the WebRTC stack failed: {0}")]
    Stack(String),
}

impl NetError {
    /// Whether the client's input was at fault (4xx), not this server (5xx).
    pub fn is_client(&self) -> bool {
        !matches!(self, NetError::Config(_) | NetError::NoPort(_) | NetError::Stack(_))
    }

    /// An error of the WebRTC library, shortened: some of its messages print whole packets.
    pub(super) fn stack(error: impl std::fmt::Display) -> Self {
        NetError::Stack(short(error))
    }
}

/// The first 200 characters of a message, on one line.
pub(super) fn short(message: impl std::fmt::Display) -> String {
    message.to_string().chars().take(200).map(|c| if c.is_control() { ' ' } else { c }).collect()
}
