//! Binary messages on data channels, for protocols that bring their own (LiveKit rooms).
//!
//! | edge | capacity | when full |
//! | --- | --- | --- |
//! | channels → whoever asked for them | the caller's queue | the channel waits, and with it the sender |
//! | we → one channel, also before it opens | [`QUEUE`] messages | the newest is refused |

use super::error::short;
use bytes::{Bytes, BytesMut};
use rtc::data_channel::RTCDataChannelInit;
use std::sync::Arc;
use tokio::sync::mpsc;
use webrtc::{
    data_channel::{DataChannel, DataChannelEvent},
    peer_connection::PeerConnection,
};

/// Messages waiting for a channel.
const QUEUE: usize = 256;

/// One message that came in.
#[derive(Clone, Debug)]
pub struct Data {
    /// The channel's.
    pub label: Arc<str>,
    pub bytes: Bytes,
    /// No message yet: the other side has opened the channel.
    pub opened: bool,
}

/// A data channel to open.
#[derive(Clone, Copy, Debug)]
pub struct DataChannelSpec {
    pub label: &'static str,
    /// In order and repeated until it arrives; else neither.
    pub reliable: bool,
}

/// The sending half of a channel. The channel lives until its connection ends.
#[derive(Clone, Debug)]
pub struct DataOut(mpsc::Sender<Bytes>);

impl DataOut {
    /// Sends a message, in a moment if the channel is not open yet. `false` when too many wait or the connection is over.
    pub fn send(&self, message: impl Into<Bytes>) -> bool {
        self.0.try_send(message.into()).is_ok()
    }
}

/// Opens a channel on a connection that has not been negotiated yet. What arrives on it goes to `into` as well.
pub(super) async fn create(
    pc: &Arc<dyn PeerConnection>,
    spec: DataChannelSpec,
    into: mpsc::Sender<Data>,
) -> Result<DataOut, webrtc::error::Error> {
    let init = RTCDataChannelInit {
        ordered: spec.reliable,
        max_retransmits: (!spec.reliable).then_some(0),
        ..RTCDataChannelInit::default()
    };
    let channel = pc.create_data_channel(spec.label, Some(init)).await?;
    let (tx, rx) = mpsc::channel(QUEUE);
    tokio::spawn(carry(channel, Some(rx), into));
    Ok(DataOut(tx))
}

/// Listens to a channel that the other side opened.
pub(super) fn listen(channel: Arc<dyn DataChannel>, into: mpsc::Sender<Data>) {
    tokio::spawn(carry(channel, None, into));
}

async fn carry(channel: Arc<dyn DataChannel>, mut out: Option<mpsc::Receiver<Bytes>>, into: mpsc::Sender<Data>) {
    let label: Arc<str> = channel.label().await.unwrap_or_default().into();
    if out.is_none() && into.send(Data { label: label.clone(), bytes: Bytes::new(), opened: true }).await.is_err() {
        return;
    }
    let mut open = false;
    loop {
        let next = async {
            match &mut out {
                Some(out) if open => out.recv().await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            event = channel.poll() => match event {
                Some(DataChannelEvent::OnOpen) => open = true,
                Some(DataChannelEvent::OnMessage(message)) if !message.is_string => {
                    let data = Data { label: label.clone(), bytes: message.data.freeze(), opened: false };
                    if into.send(data).await.is_err() {
                        return;
                    }
                }
                Some(DataChannelEvent::OnClose) | None => return,
                Some(_) => {}
            },
            message = next => match message {
                Some(message) => if let Err(error) = channel.try_send(BytesMut::from(&message[..])).await {
                    tracing::debug!(label = &*label, error = %short(error), "a data channel message was dropped");
                },
                // Nobody will send any more, but what comes in is still wanted.
                None => out = None,
            },
        }
    }
}
