//! LiveKit's two peer connections: the publisher, which we offer (voice, picture, our data channels), and the
//! subscriber, which the server offers (its data channels; we subscribe to nobody's media).

use super::LivekitError;
use crate::{
    net::{Data, DataChannelSpec, DataOut, IceServer, Net, NetError, Offering, Peer},
    session::{Attachment, Handle, LinkEvent, LinkOut, SinkRole},
};
use livekit_protocol::{
    AddTrackRequest, AudioTrackFeature, IceServer as WireServer, SessionDescription, TrackPublishedResponse,
    TrackSource, TrackType, VideoLayer, VideoQuality,
};
use serde::Deserialize;
use std::sync::Arc;
use tokio::sync::mpsc;

/// The channels that every participant opens.
const CHANNELS: [DataChannelSpec; 2] =
    [DataChannelSpec { label: "_reliable", reliable: true }, DataChannelSpec { label: "_lossy", reliable: false }];
/// Messages of the data channels on their way to the worker, which never waits: 4 MB of speech.
const QUEUE: usize = 256;
/// Candidates kept for a connection that is not there yet.
const MAX_CANDIDATES: usize = 32;
/// Names of our tracks in the offer, by which the server finds what was announced.
const VOICE: &str = "voice";
const FACE: &str = "face";

/// A candidate as it is trickled: JSON of the browsers' `RTCIceCandidateInit`.
#[derive(Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Candidate {
    candidate: String,
    sdp_mid: Option<String>,
}

enum Publisher {
    /// Waits until the server knows both tracks, then for its answer.
    Offering(Box<Offering>),
    Open(Peer),
}

/// See the module. Dropping it closes both connections and detaches from the session.
pub(super) struct Media {
    net: Net,
    servers: Vec<IceServer>,
    publisher: Option<Publisher>,
    published: Vec<TrackPublishedResponse>,
    offer_id: u32,
    /// Our first offer was sent.
    offered: bool,
    /// The server has opened its reliable channel: what the agent sends arrives.
    hearing: bool,
    early: Vec<Candidate>,
    out: Option<Arc<dyn LinkOut>>,
    pub(super) events: Option<mpsc::Receiver<LinkEvent>>,
    attachment: Option<Attachment>,
    reliable: DataOut,
    _lossy: Option<DataOut>,
    subscriber: Option<(Peer, Arc<dyn LinkOut>)>,
    pub(super) subscriber_events: Option<mpsc::Receiver<LinkEvent>>,
    early_subscriber: Vec<Candidate>,
    /// The newest offer for the subscriber and our answer.
    pub(super) subscribed: Option<(SessionDescription, SessionDescription)>,
    data_in: mpsc::Sender<Data>,
    pub(super) data: mpsc::Receiver<Data>,
}

/// What of the server's ICE servers is of use: relays over UDP. Its own address is known, so nobody need tell us ours.
fn relays(servers: &[WireServer]) -> Vec<IceServer> {
    let usable = |s: &WireServer| {
        let urls: Vec<String> = s
            .urls
            .iter()
            .filter(|u| u.starts_with("turn:") && !u.contains("transport=tcp"))
            .take(2)
            .map(|u| u.split('?').next().unwrap_or(u).to_string())
            .collect();
        let whole = !urls.is_empty() && !s.username.is_empty() && !s.credential.is_empty();
        whole.then(|| IceServer { urls, username: s.username.clone(), credential: s.credential.clone() })
    };
    servers.iter().filter_map(usable).take(2).collect()
}

/// What we announce: one voice, one picture of one layer. The track's kind of codec the server reads from the offer.
pub(super) fn tracks(width: u32, height: u32) -> [AddTrackRequest; 2] {
    let layer = VideoLayer { quality: VideoQuality::High.into(), width, height, ..VideoLayer::default() };
    [
        AddTrackRequest {
            cid: VOICE.into(),
            name: "avatar_audio".into(),
            r#type: TrackType::Audio.into(),
            source: TrackSource::Microphone.into(),
            // Sound never stops, silence included: it is the clock of the lips.
            audio_features: vec![AudioTrackFeature::TfNoDtx.into()],
            disable_red: true,
            ..AddTrackRequest::default()
        },
        AddTrackRequest {
            cid: FACE.into(),
            name: "avatar_video".into(),
            r#type: TrackType::Video.into(),
            source: TrackSource::Camera.into(),
            width,
            height,
            layers: vec![layer],
            ..AddTrackRequest::default()
        },
    ]
}

impl Media {
    pub(super) async fn new(net: &Net, servers: &[WireServer]) -> Result<Media, LivekitError> {
        let servers = relays(servers);
        let (data_in, data) = mpsc::channel(QUEUE);
        let (offering, outs) = net.offer_with_data(&servers, &CHANNELS, data_in.clone()).await?;
        let mut outs = outs.into_iter();
        let reliable = outs.next().ok_or(NetError::Closed)?;
        Ok(Media {
            net: net.clone(),
            servers,
            publisher: Some(Publisher::Offering(Box::new(offering))),
            published: Vec::new(),
            offer_id: 1,
            offered: false,
            hearing: false,
            early: Vec::new(),
            out: None,
            events: None,
            attachment: None,
            reliable,
            _lossy: outs.next(),
            subscriber: None,
            subscriber_events: None,
            early_subscriber: Vec::new(),
            subscribed: None,
            data_in,
            data,
        })
    }

    /// The server knows one of our tracks.
    pub(super) fn track_published(&mut self, track: TrackPublishedResponse) {
        if [VOICE, FACE].contains(&track.cid.as_str()) && !self.published.iter().any(|p| p.cid == track.cid) {
            self.published.push(track);
        }
    }

    /// The other side has opened a channel.
    pub(super) fn channel_opened(&mut self, label: &str) {
        self.hearing |= label == CHANNELS[0].label;
    }

    /// Our offer, once: when the server knows both tracks, and we hear. Agents speak as soon as they see our picture,
    /// and what they say before the server's channel is open is lost. `now`: not hearing is no reason to wait.
    pub(super) fn offer(&mut self, now: bool) -> Option<SessionDescription> {
        let Some(Publisher::Offering(offering)) = &self.publisher else { return None };
        if self.offered || self.published.len() < 2 || !(self.hearing || now) {
            return None;
        }
        let offer = self.description("offer", offering.sdp());
        self.offered = true;
        Some(offer)
    }

    pub(super) fn was_offered(&self) -> bool {
        self.offered
    }

    fn description(&self, kind: &str, sdp: &str) -> SessionDescription {
        SessionDescription { r#type: kind.into(), sdp: sdp.into(), id: self.offer_id, ..SessionDescription::default() }
    }

    /// The server's answer to our offer.
    pub(super) async fn answered(&mut self, answer: SessionDescription) -> Result<(), LivekitError> {
        if answer.id != 0 && answer.id != self.offer_id {
            return Ok(());
        }
        match self.publisher.take() {
            Some(Publisher::Offering(offering)) => {
                let (peer, events, out) = offering.accept(&answer.sdp).await?;
                for candidate in self.early.drain(..) {
                    peer.candidate(&candidate.candidate, candidate.sdp_mid).await?;
                }
                self.publisher = Some(Publisher::Open(peer));
                (self.events, self.out) = (Some(events), Some(out));
            }
            Some(Publisher::Open(peer)) => {
                let accepted = peer.accept(&answer.sdp).await;
                self.publisher = Some(Publisher::Open(peer));
                accepted?;
            }
            None => {}
        }
        Ok(())
    }

    /// The publisher's connection stands: the session is shown and heard there.
    pub(super) fn connected(&mut self, handle: &Handle) {
        if let (None, Some(out)) = (&self.attachment, &self.out) {
            self.attachment = Some(handle.attach(out.clone(), SinkRole::Viewer));
        }
    }

    pub(super) fn is_connected(&self) -> bool {
        self.attachment.is_some()
    }

    /// A new offer for the publisher, whose path was lost.
    pub(super) async fn reoffer(&mut self) -> Result<Option<SessionDescription>, LivekitError> {
        let Some(Publisher::Open(peer)) = &self.publisher else { return Ok(None) };
        let sdp = peer.reoffer().await?;
        self.offer_id += 1;
        Ok(Some(self.description("offer", &sdp)))
    }

    /// The server offers what it has for us; our answer.
    pub(super) async fn offered(&mut self, offer: SessionDescription) -> Result<SessionDescription, LivekitError> {
        let sdp = match &self.subscriber {
            Some((peer, ..)) => peer.renegotiate(&offer.sdp).await?,
            None => {
                let ((peer, events, out), sdp) =
                    self.net.answer_data(&offer.sdp, &self.servers, self.data_in.clone()).await?;
                for candidate in self.early_subscriber.drain(..) {
                    peer.candidate(&candidate.candidate, candidate.sdp_mid).await?;
                }
                (self.subscriber, self.subscriber_events) = (Some((peer, out)), Some(events));
                sdp
            }
        };
        let answer = SessionDescription { r#type: "answer".into(), sdp, id: offer.id, ..SessionDescription::default() };
        self.subscribed = Some((offer, answer.clone()));
        Ok(answer)
    }

    /// A trickled candidate; one that cannot be read or used is skipped.
    pub(super) async fn candidate(&mut self, json: &str, subscriber: bool) -> Result<(), LivekitError> {
        let Ok(candidate) = serde_json::from_str::<Candidate>(json) else { return Ok(()) };
        let (peer, early) = match subscriber {
            true => (self.subscriber.as_ref().map(|link| &link.0), &mut self.early_subscriber),
            false => match &self.publisher {
                Some(Publisher::Open(peer)) => (Some(peer), &mut self.early),
                _ => (None, &mut self.early),
            },
        };
        match peer {
            Some(peer) => peer.candidate(&candidate.candidate, candidate.sdp_mid).await?,
            None if early.len() < MAX_CANDIDATES => early.push(candidate),
            None => {}
        }
        Ok(())
    }

    /// Sends on the reliable channel.
    pub(super) fn send(&self, packet: Vec<u8>) -> bool {
        self.reliable.send(packet)
    }

    pub(super) fn published(&self) -> &[TrackPublishedResponse] {
        &self.published
    }

    /// Closes both connections and waits until their sockets are closed.
    pub(super) async fn close(self) {
        drop(self.attachment);
        if let Some(Publisher::Open(peer)) = &self.publisher {
            peer.close().await;
        }
        if let Some((peer, ..)) = &self.subscriber {
            peer.close().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_the_servers_only_relays_over_udp_are_asked() {
        let server = |urls: &[&str], name: &str| WireServer {
            urls: urls.iter().map(|u| u.to_string()).collect(),
            username: name.into(),
            credential: "c".into(),
        };
        let found = relays(&[
            server(&["stun:a"], ""),
            server(&["turn:b:3478?transport=udp", "turns:b:443?transport=tcp", "turn:b?transport=tcp"], "u"),
            server(&["turn:c"], ""),
        ]);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].urls, ["turn:b:3478"]);
    }
}
