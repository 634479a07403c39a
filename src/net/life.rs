//! A peer's life on its own: what it hears from the driver, and by what its end is seen.

use super::{
    DATA_CHANNEL, NetError,
    data::{self, Data},
    error::short,
    peer::guarded,
    ports::Lease,
    shared::{Shared, lock},
    speech::SpeechIn,
};
use crate::session::LinkEvent;
use rtc::{
    peer_connection::{configuration::media_engine::MIME_TYPE_OPUS, transport::RTCDtlsTransportState},
    rtp_transceiver::rtp_sender::RtpCodecKind,
};
use std::{
    future::Future,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use webrtc::{
    data_channel::{DataChannel, DataChannelEvent},
    media_stream::track_remote::{TrackRemote, TrackRemoteEvent},
    peer_connection::*,
    rtp_transceiver::RtpSender,
};

/// Messages from the page longer than this are dropped.
const MAX_MESSAGE: usize = 16 * 1024;

/// What a peer's task owns.
pub(super) struct Life<W> {
    pub(super) pc: Arc<dyn PeerConnection>,
    pub(super) shared: Arc<Shared>,
    pub(super) stop: CancellationToken,
    pub(super) end: mpsc::Receiver<String>,
    pub(super) ended: watch::Sender<bool>,
    pub(super) other: End,
    pub(super) write: W,
    pub(super) _lease: Lease,
}

/// Lives as long as the peer: ends when it is closed here or there, when the session drops its events or its sending
/// half, or when the WebRTC driver dies (also by a panic over a hostile packet).
pub(super) async fn live(mut life: Life<impl Future<Output = String>>) {
    let shared = life.shared.clone();
    let reason = tokio::select! {
        () = life.stop.cancelled() => "closed by this server".to_string(),
        () = shared.events.gone() => "the session ended".to_string(),
        reason = life.end.recv() => reason.unwrap_or_else(|| "the WebRTC driver ended".into()),
        () = life.other.left() => "the peer left".into(),
        reason = life.write => reason,
    };
    life.stop.cancel();
    shared.connected.store(false, Relaxed);
    shared.closed.store(true, Relaxed);
    if let Ok(Err(error)) | Err(error) = guarded(life.pc.close()).await.map(|r| r.map_err(NetError::stack)) {
        tracing::debug!(%error, "closing a peer");
    }
    shared.events.send(LinkEvent::Closed(reason));
    let _ = life.ended.send(true);
}

/// By what the other side's goodbye is seen.
pub(super) enum End {
    Sends(Arc<dyn RtpSender>),
    /// A receiver exists only once its first packet has come; until then silence alone tells.
    Receives(Arc<dyn PeerConnection>),
}

impl End {
    /// Waits until the peer has said goodbye (DTLS close_notify: a closed tab does, a lost network does not). The
    /// library has no event for it, only a state.
    async fn left(self) {
        let mut ticks = tokio::time::interval(Duration::from_millis(250));
        loop {
            ticks.tick().await;
            let transport = match &self {
                End::Sends(sender) => sender.transport().await,
                End::Receives(pc) => match pc.get_receivers().await.first() {
                    Some(receiver) => receiver.transport().await,
                    None => continue,
                },
            };
            let state = match transport {
                Ok(Some(transport)) => transport.state().await.ok(),
                _ => None,
            };
            if let Some(RTCDtlsTransportState::Closed | RTCDtlsTransportState::Failed) = state {
                return;
            }
        }
    }
}

/// Called on the driver's own task: nothing in here waits.
pub(super) struct Handler {
    pub(super) shared: Arc<Shared>,
    pub(super) gathered: watch::Sender<bool>,
    pub(super) end: mpsc::Sender<String>,
    /// A track is heard already, or none is wanted.
    pub(super) microphone: Arc<AtomicBool>,
    pub(super) messages: Mutex<Option<mpsc::Receiver<String>>>,
    /// Where messages of all data channels go, when they are not the page's.
    pub(super) data: Option<mpsc::Sender<Data>>,
}

#[async_trait::async_trait]
impl PeerConnectionEventHandler for Handler {
    async fn on_ice_gathering_state_change(&self, state: RTCIceGatheringState) {
        if state == RTCIceGatheringState::Complete {
            let _ = self.gathered.send(true);
        }
    }

    async fn on_connection_state_change(&self, state: RTCPeerConnectionState) {
        match state {
            RTCPeerConnectionState::Connected => {
                self.shared.connected.store(true, Relaxed);
                self.shared.events.send(LinkEvent::Connected);
            }
            RTCPeerConnectionState::Disconnected => self.shared.events.send(LinkEvent::Interrupted),
            RTCPeerConnectionState::Failed => {
                let _ = self.end.try_send("the connection failed: no answer to connectivity checks".into());
            }
            RTCPeerConnectionState::Closed => {
                let _ = self.end.try_send("the peer closed the connection".into());
            }
            _ => {}
        }
    }

    async fn on_track(&self, track: Arc<dyn TrackRemote>) {
        let kind = track.kind().await;
        let (shared, microphone) = (self.shared.clone(), self.microphone.clone());
        tokio::spawn(async move {
            // The first voice of which a packet comes is the microphone (some peers announce a track that stays empty);
            // everything else is taken and not looked at.
            let (mut heard, mut deaf): (Option<SpeechIn>, bool) = (None, false);
            while let Some(event) = track.poll().await {
                match event {
                    TrackRemoteEvent::OnRtpPacket(packet) => {
                        if heard.is_none() && !deaf {
                            // The library does not name the kind of a track that its offer gave no SSRC (GStreamer's).
                            deaf = match kind {
                                RtpCodecKind::Audio => false,
                                RtpCodecKind::Video => true,
                                _ => match track.codec(packet.header.ssrc).await {
                                    Some(codec) => !codec.mime_type.eq_ignore_ascii_case(MIME_TYPE_OPUS),
                                    None => true,
                                },
                            };
                            deaf |= !deaf && microphone.swap(true, Relaxed);
                            heard = (!deaf).then(SpeechIn::default);
                        }
                        let Some(speech) = &mut heard else { continue };
                        let packet = speech.take(packet, Instant::now());
                        shared.lost_in.store(speech.lost(), Relaxed);
                        shared.padding_in.store(speech.padding(), Relaxed);
                        shared.events.send(LinkEvent::Speech(packet));
                    }
                    TrackRemoteEvent::OnEnded => break,
                    _ => {}
                }
            }
        });
    }

    async fn on_data_channel(&self, channel: Arc<dyn DataChannel>) {
        if let Some(data) = &self.data {
            return data::listen(channel, data.clone());
        }
        let ours = channel.label().await.is_ok_and(|label| label == DATA_CHANNEL);
        let Some(messages) = lock(&self.messages).take_if(|_| ours) else { return };
        tokio::spawn(converse(channel, messages, self.shared.clone()));
    }
}

/// Carries messages both ways until the channel closes.
async fn converse(channel: Arc<dyn DataChannel>, mut messages: mpsc::Receiver<String>, shared: Arc<Shared>) {
    let mut open = false;
    loop {
        tokio::select! {
            event = channel.poll() => match event {
                Some(DataChannelEvent::OnOpen) => open = true,
                Some(DataChannelEvent::OnMessage(message)) => {
                    open = true;
                    if message.is_string && message.data.len() <= MAX_MESSAGE
                        && let Ok(text) = String::from_utf8(message.data.to_vec())
                    {
                        shared.events.send(LinkEvent::Message(text));
                    }
                }
                Some(DataChannelEvent::OnClose) | None => return,
                Some(_) => {}
            },
            text = messages.recv(), if open => match text {
                // A page that does not read loses messages, not its connection.
                Some(text) => if let Err(error) = channel.try_send_text(&text).await {
                    tracing::debug!(error = %short(error), "a data channel message was dropped");
                },
                None => return,
            },
        }
    }
}
