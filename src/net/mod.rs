//! WebRTC: peers, SDP, ICE, tracks, data channel, congestion.
//!
//! [`Net::answer_live`] turns a browser's offer into a [`Link`]: one connection with the microphone coming in and the
//! presenter's voice (Opus) and face (H.264 constrained baseline, packetization mode 1, RTX) going out in one stream, and
//! the data channel [`DATA_CHANNEL`] that the page creates. [`Net::answer_whip`] has the first half of it,
//! [`Net::answer_whep`] the second, and [`Net::offer`] is the second towards somebody else's server. What arrives goes to
//! the session as [`LinkEvent`](crate::session::LinkEvent)s over a bounded channel; what the session sends goes through
//! [`LinkOut`](crate::session::LinkOut). Nothing else of the WebRTC library is visible outside.
//!
//! The library's own congestion control, pacer, NACK answerer and sender reports are not used; `traffic` stands in their
//! place in its packet chain and asks the pure parts in `congestion` what to do.

mod clock;
mod config;
mod congestion;
mod data;
mod error;
mod events;
mod fragment;
mod life;
mod out;
mod packetise;
mod peer;
mod ports;
mod publish;
mod reach;
mod sdp;
mod shared;
mod speech;
mod stack;
mod traffic;
mod turn;

pub use config::{Config, IceServer};
pub use data::{Data, DataChannelSpec, DataOut};
pub use error::NetError;
pub use peer::{DATA_CHANNEL, Link, Offering, Peer};
pub use publish::{Publication, PublishState, PublishStatus, Target};
pub use reach::{Reach, is_public};
pub use reqwest::Url;

use std::{sync::Arc, time::SystemTime};
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

    /// The STUN and TURN servers that visitors should use as well; credentials made now, where they are made.
    pub fn ice_servers(&self, now: SystemTime) -> Vec<IceServer> {
        self.config.ice_servers.iter().cloned().chain(turn::minted(&self.config, now)).collect()
    }

    /// Answers an SDP offer for the two-way live session (microphone in, voice and H.264 out). Returns the answer beside
    /// the link.
    ///
    /// # Errors
    /// What the offer lacks ([`NetError::is_client`]), or what this server lacks.
    pub async fn answer_live(&self, offer: &str) -> Result<(Link, String), NetError> {
        self.answer(offer, sdp::Shape::Live).await
    }

    /// Answers a WHIP publisher's offer (RFC 9725): its Opus comes in as speech, its picture, if it sends one, is taken and
    /// not looked at. Nothing can be sent to it.
    ///
    /// # Errors
    /// As [`Net::answer_live`].
    pub async fn answer_whip(&self, offer: &str) -> Result<(Link, String), NetError> {
        self.answer(offer, sdp::Shape::Whip).await
    }

    /// Answers a WHEP player's offer (draft-ietf-wish-whep-03): voice, face or both go out, by what it asks for. Its
    /// bitrate estimate is not the encoder's business: when its path is too narrow it goes without pictures until a
    /// keyframe, and asks for those ever more rarely.
    ///
    /// # Errors
    /// As [`Net::answer_live`].
    pub async fn answer_whep(&self, offer: &str) -> Result<(Link, String), NetError> {
        self.answer(offer, sdp::Shape::Whep).await
    }

    async fn answer(&self, offer: &str, shape: sdp::Shape) -> Result<(Link, String), NetError> {
        let offer = sdp::check_offer(offer, shape)?;
        peer::answer(&self.config, &[], self.ports.lease()?, offer, None).await
    }

    /// Answers an offer of data channels without media; what arrives on them goes to `data`. Whatever media the offer has
    /// is taken and not looked at. `servers` are STUN and TURN servers that the other side named.
    ///
    /// # Errors
    /// As [`Net::answer_live`].
    pub async fn answer_data(
        &self,
        offer: &str,
        servers: &[IceServer],
        data: mpsc::Sender<Data>,
    ) -> Result<(Link, String), NetError> {
        let offer = sdp::check_offer(offer, sdp::Shape::Data)?;
        peer::answer(&self.config, servers, self.ports.lease()?, offer, Some(data)).await
    }

    /// Makes an offer of voice and face for somebody else's WHIP server. `servers` are STUN and TURN servers that it named.
    ///
    /// # Errors
    /// What this server lacks.
    pub async fn offer(&self, servers: &[IceServer]) -> Result<Offering, NetError> {
        peer::offer(&self.config, servers, self.ports.lease()?, &[], None).await.map(|(offering, _)| offering)
    }

    /// As [`Net::offer`], with data channels beside voice and face; returns their sending halves in the order of
    /// `channels`. What arrives on any data channel goes to `data`.
    ///
    /// # Errors
    /// What this server lacks.
    pub async fn offer_with_data(
        &self,
        servers: &[IceServer],
        channels: &[DataChannelSpec],
        data: mpsc::Sender<Data>,
    ) -> Result<(Offering, Vec<DataOut>), NetError> {
        peer::offer(&self.config, servers, self.ports.lease()?, channels, Some(data)).await
    }
}
