//! WebRTC: peers, SDP, ICE, tracks, data channel, congestion.
//!
//! [`Net::answer_live`] turns a browser's offer into a [`Peer`]: one connection with the microphone coming in and the
//! presenter's voice (Opus) and face (H.264 constrained baseline, packetization mode 1, RTX) going out in one stream, and
//! the data channel [`DATA_CHANNEL`] that the page creates. What arrives goes to the session as
//! [`LinkEvent`](crate::session::LinkEvent)s over a bounded channel; what the session sends goes through
//! [`LinkOut`](crate::session::LinkOut). Nothing else of the WebRTC library is visible outside.
//!
//! The library's own congestion control, pacer, NACK answerer and sender reports are not used; `traffic` stands in their
//! place in its packet chain and asks the pure parts in `congestion` what to do.

mod clock;
mod config;
mod congestion;
mod error;
mod events;
mod out;
mod packetise;
mod peer;
mod ports;
mod sdp;
mod shared;
mod speech;
mod traffic;

pub use config::{Config, IceServer};
pub use error::NetError;
pub use peer::{DATA_CHANNEL, Peer};

use crate::session::{LinkEvent, LinkOut};
use std::sync::Arc;
use tokio::sync::mpsc;

/// The way to make peers.
#[derive(Clone, Debug)]
pub struct Net {
    config: Arc<Config>,
    ports: ports::Ports,
}

impl Net {
    /// # Errors
    /// [`NetError::Config`] says which setting cannot work.
    pub fn new(config: Config) -> Result<Net, NetError> {
        config.check()?;
        Ok(Net { ports: ports::Ports::new(&config), config: Arc::new(config) })
    }

    /// The STUN and TURN servers that browsers should use as well.
    pub fn ice_servers(&self) -> &[IceServer] {
        &self.config.ice_servers
    }

    /// Answers an SDP offer for the two-way live session (microphone in, voice and H.264 out). Returns the peer, the
    /// answer, the peer's events and its sending half. The peer ends when any of the three is dropped.
    ///
    /// # Errors
    /// What the offer lacks ([`NetError::is_client`]), or what this server lacks.
    pub async fn answer_live(
        &self,
        offer: &str,
    ) -> Result<(Peer, String, mpsc::Receiver<LinkEvent>, Arc<dyn LinkOut>), NetError> {
        let offer = sdp::check_offer(offer)?;
        peer::open(&self.config, self.ports.lease()?, offer).await
    }
}
