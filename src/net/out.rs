//! The sending half of a peer: access units and Opus packets in, RTP to the WebRTC driver; messages to the data channel.

use super::{
    packetise::Stream,
    shared::{Shared, lock},
};
use crate::{
    edge::Counter,
    session::{EncodedAudio, EncodedVideo, LinkOut, LinkStats},
};
use rtc::rtp;
use std::{
    sync::{Arc, Mutex, atomic::Ordering::Relaxed},
    time::Instant,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use webrtc::media_stream::track_local::{TrackLocal, static_rtp::TrackLocalStaticRTP};

/// Opus packets waiting for the driver: 2 s. Never fills while the driver lives.
const AUDIO_QUEUE: usize = 100;
/// Access units waiting for the driver. The pacer behind it holds the real queue.
const VIDEO_QUEUE: usize = 32;
/// Messages waiting for the data channel (also before it opens).
const MESSAGE_QUEUE: usize = 64;

/// Implements [`LinkOut`] for one peer.
pub(super) struct Out {
    shared: Arc<Shared>,
    /// `None`: the peer did not ask for it.
    video: Option<Mutex<Stream>>,
    audio: Option<Mutex<(Stream, bool)>>,
    video_tx: mpsc::Sender<Vec<rtp::Packet>>,
    audio_tx: mpsc::Sender<rtp::Packet>,
    message_tx: mpsc::Sender<String>,
    /// Media and messages that found their queue full or no connection.
    dropped: Counter,
    stop: CancellationToken,
}

/// The other ends of an [`Out`]'s queues.
pub(super) struct OutQueues {
    pub(super) video: mpsc::Receiver<Vec<rtp::Packet>>,
    pub(super) audio: mpsc::Receiver<rtp::Packet>,
    pub(super) messages: mpsc::Receiver<String>,
}

impl Out {
    pub(super) fn new(
        shared: Arc<Shared>,
        video: Option<Stream>,
        audio: Option<Stream>,
        stop: CancellationToken,
    ) -> (Out, OutQueues) {
        let (video_tx, video_rx) = mpsc::channel(VIDEO_QUEUE);
        let (audio_tx, audio_rx) = mpsc::channel(AUDIO_QUEUE);
        let (message_tx, messages) = mpsc::channel(MESSAGE_QUEUE);
        let out = Out {
            shared,
            video: video.map(Mutex::new),
            audio: audio.map(|audio| Mutex::new((audio, true))),
            video_tx,
            audio_tx,
            message_tx,
            dropped: Counter::default(),
            stop,
        };
        (out, OutQueues { video: video_rx, audio: audio_rx, messages })
    }
}

impl LinkOut for Out {
    fn video(&self, video: EncodedVideo, wall: Instant) {
        lock(&self.shared.clock).anchor(video.at, wall, false);
        let Some(stream) = &self.video else { return };
        if !self.shared.connected.load(Relaxed) || video.data.is_empty() {
            return;
        }
        let mut stream = lock(stream);
        // Look before packetising: a unit that is dropped must not leave a hole in the sequence numbers.
        match self.video_tx.try_reserve() {
            Ok(place) => place.send(stream.video(&video)),
            Err(_) => {
                self.dropped.add(1);
                self.shared.want_keyframe(Instant::now());
            }
        }
    }

    fn audio(&self, audio: EncodedAudio, wall: Instant) {
        lock(&self.shared.clock).anchor(audio.at, wall, true);
        let Some(stream) = &self.audio else { return };
        if !self.shared.connected.load(Relaxed) || audio.data.is_empty() {
            return;
        }
        let mut guard = lock(stream);
        let (stream, first) = &mut *guard;
        match self.audio_tx.try_reserve() {
            Ok(place) => place.send(stream.audio(&audio, std::mem::take(first))),
            Err(_) => self.dropped.add(1),
        }
    }

    fn message(&self, text: String) {
        if self.message_tx.try_send(text).is_err() {
            self.dropped.add(1);
        }
    }

    fn stats(&self) -> LinkStats {
        self.shared.stats()
    }

    fn close(&self) {
        self.stop.cancel();
    }
}

/// Carries packets to the WebRTC driver, voice first, until the driver ends. Returns why it ended.
pub(super) async fn write(
    mut video: mpsc::Receiver<Vec<rtp::Packet>>,
    mut audio: mpsc::Receiver<rtp::Packet>,
    video_track: Arc<TrackLocalStaticRTP>,
    audio_track: Arc<TrackLocalStaticRTP>,
) -> String {
    loop {
        let result = tokio::select! {
            biased;
            packet = audio.recv() => match packet {
                Some(packet) => audio_track.write_rtp(packet).await,
                None => return "the session ended".into(),
            },
            packets = video.recv() => {
                let mut result = Ok(());
                for packet in packets.into_iter().flatten() {
                    // A keyframe is many packets: let waiting voice pass between them.
                    while let Ok(voice) = audio.try_recv() {
                        result = result.and(audio_track.write_rtp(voice).await);
                    }
                    result = result.and(video_track.write_rtp(packet).await);
                    if result.is_err() {
                        break;
                    }
                }
                result
            }
        };
        if let Err(error) = result {
            return super::error::short(error);
        }
    }
}
