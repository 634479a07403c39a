//! One peer: its connection, its handlers, its life.

use super::{
    Config, IceServer, NetError,
    clock::{MediaClock, RtpClock},
    congestion::Limits,
    data::{self, Data, DataChannelSpec, DataOut},
    error::short,
    events::Events,
    fragment,
    life::{End, Handler, Life, live},
    out::{self, Out},
    packetise::Stream,
    ports::Lease,
    sdp::{self, Checked, Shape},
    shared::{KeyframeGate, Shared, lock},
    stack::{self, h264, opus, payload_type, track},
};
use crate::session::{LinkEvent, LinkOut, LinkStats};
use futures::FutureExt;
use rand::RngExt;
use rtc::{
    peer_connection::{
        configuration::{
            RTCOfferOptions,
            media_engine::{MIME_TYPE_H264, MIME_TYPE_OPUS},
        },
        transport::RTCIceCandidateInit,
    },
    rtp_transceiver::{RTCRtpTransceiverDirection, RTCRtpTransceiverInit, rtp_sender::RtpCodecKind},
};
use std::{
    future::Future,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, atomic::AtomicBool},
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use webrtc::{
    media_stream::track_local::{TrackLocal, static_rtp::TrackLocalStaticRTP},
    peer_connection::*,
    rtp_transceiver::RtpSender,
};

/// Label of the data channel that carries our messages. The page creates it, before its offer: then the offer has the
/// application section that a later channel would need a second negotiation for.
pub const DATA_CHANNEL: &str = "loquent";
/// Longest wait for STUN and TURN servers before the answer goes out without their candidates.
const GATHER_TIMEOUT: Duration = Duration::from_secs(2);

/// A connected (or connecting) browser. Dropping it ends the connection.
pub struct Peer {
    pc: Arc<dyn PeerConnection>,
    /// The newest description of the remote side, as text, and the tag of the ICE session it began.
    remote: tokio::sync::Mutex<String>,
    etag: Mutex<String>,
    public_ips: Vec<std::net::IpAddr>,
    gathered: watch::Receiver<bool>,
    stop: CancellationToken,
    ended: watch::Receiver<bool>,
    _guard: DropGuard,
}

/// A peer, its events and its sending half. The peer ends when any of the three is dropped.
pub type Link = (Peer, mpsc::Receiver<LinkEvent>, Arc<dyn LinkOut>);

/// Opens the connection for a checked offer; also returns our answer.
pub(super) async fn answer(
    config: &Config,
    servers: &[IceServer],
    lease: Lease,
    offer: Checked,
    data: Option<mpsc::Sender<Data>>,
) -> Result<(Link, String), NetError> {
    // Parsed once before any socket is opened.
    guarded(async { RTCSessionDescription::offer(offer.text.clone()) }).await?.map_err(malformed)?;
    let servers = [&config.ice_servers[..], servers].concat();
    let mut draft = Draft::new(config, &servers, lease, (offer.shape, offer.dtls_client), data).await?;
    let negotiated = guarded(draft.negotiate(&offer)).await.and_then(|result| result);
    let (agreed, answer) = draft.or_close(negotiated).await?;
    let mut answer = sdp::publish(&answer, &config.public_ips);
    if offer.shape == Shape::Whip {
        answer = sdp::ask_for_small_pictures(&answer);
    }
    Ok((draft.begin(agreed, offer.text), answer))
}

/// A connection that we offered to somebody else's server (WHIP, RFC 9725) and that waits for the answer. Dropping it
/// closes its sockets.
pub struct Offering {
    draft: Draft,
    tracks: [Arc<dyn RtpSender>; 2],
    sdp: String,
}

/// Opens a connection that offers voice and face, nothing back. `servers` are used beside the configured ones.
/// The data channels of `channels` are opened on it, and all messages go to `data`.
pub(super) async fn offer(
    config: &Config,
    servers: &[IceServer],
    lease: Lease,
    channels: &[DataChannelSpec],
    data: Option<mpsc::Sender<Data>>,
) -> Result<(Offering, Vec<DataOut>), NetError> {
    let servers = [&config.ice_servers[..], servers].concat();
    let mut draft = Draft::new(config, &servers, lease, (Shape::Whep, false), data.clone()).await?;
    let mut outs = Vec::with_capacity(channels.len());
    if let Some(data) = data {
        for spec in channels {
            let created = data::create(&draft.pc, *spec, data.clone()).await.map_err(NetError::stack);
            outs.push(draft.or_close(created).await?);
        }
    }
    let offered = draft.offer().await.map_err(NetError::stack);
    let (tracks, sdp) = draft.or_close(offered).await?;
    let sdp = sdp::publish(&sdp, &config.public_ips);
    Ok((Offering { draft, tracks, sdp }, outs))
}

impl Offering {
    /// The offer, candidates included.
    pub fn sdp(&self) -> &str {
        &self.sdp
    }

    /// Takes the other side's answer; the connection then comes up by itself.
    ///
    /// # Errors
    /// [`NetError::Malformed`], and [`NetError::NoOpus`] or [`NetError::NoH264`] when the answer does not take both.
    pub async fn accept(self, answer: &str) -> Result<Link, NetError> {
        let Offering { draft, tracks: [face, voice], .. } = self;
        let answer = sdp::check_answer(answer)?;
        let accepted = guarded(async {
            let description = RTCSessionDescription::answer(answer.clone()).map_err(malformed)?;
            draft.pc.set_remote_description(description).await.map_err(malformed)?;
            Ok(Agreed {
                video: Some(payload_type(&face, MIME_TYPE_H264).await.ok_or(NetError::NoH264)?),
                audio: Some(payload_type(&voice, MIME_TYPE_OPUS).await.ok_or(NetError::NoOpus)?),
                end: End::Sends(voice),
            })
        })
        .await
        .and_then(|result| result);
        let agreed = draft.or_close(accepted).await?;
        Ok(draft.begin(agreed, answer))
    }
}

impl std::fmt::Debug for Offering {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Offering").finish_non_exhaustive()
    }
}

/// What was agreed on: payload types of what we send, and by what to see the other side leave.
struct Agreed {
    video: Option<u8>,
    audio: Option<u8>,
    end: End,
}

/// A connection that is being negotiated.
struct Draft {
    pc: Arc<dyn PeerConnection>,
    shared: Arc<Shared>,
    handler: Arc<Handler>,
    events: mpsc::Receiver<LinkEvent>,
    gathered: watch::Receiver<bool>,
    end: mpsc::Receiver<String>,
    face: Arc<TrackLocalStaticRTP>,
    voice: Arc<TrackLocalStaticRTP>,
    public_ips: Vec<std::net::IpAddr>,
    lease: Lease,
}

impl Draft {
    async fn new(
        config: &Config,
        servers: &[IceServer],
        lease: Lease,
        (shape, dtls_client): (Shape, bool),
        data: Option<mpsc::Sender<Data>>,
    ) -> Result<Draft, NetError> {
        let (events, event_rx) = Events::new();
        let random = || rand::rng().random::<u32>();
        // Nobody encodes for one viewer among many: its estimate only decides when it must go without, so it begins with
        // the benefit of the doubt.
        let passive = shape == Shape::Whep;
        let start = if passive { config.max_bitrate.min(2 * config.start_bitrate) } else { config.start_bitrate };
        let shared = Arc::new(Shared {
            events,
            clock: Mutex::new(MediaClock::new(Instant::now(), SystemTime::now())),
            keyframes: Mutex::new(KeyframeGate::new(passive)),
            stats: Mutex::new(LinkStats { sent_pictures: Some(0), ..LinkStats::default() }),
            connected: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            lost_out: Default::default(),
            lost_in: Default::default(),
            padding_in: Default::default(),
            target: start.into(),
            audio: (random() | 1, RtpClock { rate: 48_000, offset: random() }),
            video: (random() & !1, RtpClock { rate: 90_000, offset: random() }),
            video_rtx: random(),
            limits: Limits { start: start.into(), min: config.min_bitrate.into(), max: config.max_bitrate.into() },
        });
        let (gathered_tx, gathered) = watch::channel(false);
        let (end_tx, end) = mpsc::channel(1);
        let handler = Arc::new(Handler {
            shared: shared.clone(),
            gathered: gathered_tx,
            end: end_tx,
            microphone: Arc::new(AtomicBool::new(matches!(shape, Shape::Whep | Shape::Data))),
            data,
            messages: Mutex::new(None),
        });
        let pc = stack::build(config, servers, &lease, (shape, dtls_client), shared.clone(), handler.clone()).await?;
        Ok(Draft {
            pc,
            face: track(RtpCodecKind::Video, h264(), shared.video.0, Some(shared.video_rtx)),
            voice: track(RtpCodecKind::Audio, opus(), shared.audio.0, None),
            shared,
            handler,
            events: event_rx,
            gathered,
            end,
            public_ips: config.public_ips.clone(),
            lease,
        })
    }

    /// On an error the sockets are closed before anybody is told.
    async fn or_close<T>(&self, result: Result<T, NetError>) -> Result<T, NetError> {
        if result.is_err() {
            let _ = self.pc.close().await;
        }
        result
    }

    async fn negotiate(&mut self, offer: &Checked) -> Result<(Agreed, String), NetError> {
        let pc = &self.pc;
        let description = RTCSessionDescription::offer(offer.text.clone()).map_err(malformed)?;
        pc.set_remote_description(description).await.map_err(malformed)?;
        // After the remote description, so that the tracks attach to the offered sections. What fails up to the answer
        // fails for what the offer says: the same calls succeed for every sound one.
        let add = async |wanted: bool, track: &Arc<TrackLocalStaticRTP>| match wanted {
            true => pc.add_track(track.clone() as Arc<dyn TrackLocal>).await.map(Some).map_err(malformed),
            false => Ok(None),
        };
        let video = add(offer.face, &self.face).await?;
        let audio = add(offer.voice, &self.voice).await?;
        let answer = pc.create_answer(None).await.map_err(malformed)?;
        pc.set_local_description(answer).await.map_err(malformed)?;
        let answer = self.gathered().await.ok_or(NetError::Closed)?;
        // The payload types are the browser's, not ours; and what is not in there was not agreed on.
        let agreed = Agreed {
            video: match &video {
                Some(sender) => Some(payload_type(sender, MIME_TYPE_H264).await.ok_or(NetError::NoH264)?),
                None => None,
            },
            audio: match &audio {
                Some(sender) => Some(payload_type(sender, MIME_TYPE_OPUS).await.ok_or(NetError::NoOpus)?),
                None => None,
            },
            end: match audio.or(video) {
                Some(sender) => End::Sends(sender),
                None => End::Receives(self.pc.clone()),
            },
        };
        Ok((agreed, answer))
    }

    async fn offer(&mut self) -> Result<([Arc<dyn RtpSender>; 2], String), webrtc::error::Error> {
        let voice = self.send_only(&self.voice).await?;
        let face = self.send_only(&self.face).await?;
        let offer = self.pc.create_offer(None).await?;
        self.pc.set_local_description(offer).await?;
        let sdp = self.gathered().await.ok_or(webrtc::error::Error::ErrConnectionClosed)?;
        Ok(([face, voice], sdp))
    }

    async fn send_only(&self, track: &Arc<TrackLocalStaticRTP>) -> Result<Arc<dyn RtpSender>, webrtc::error::Error> {
        let init = RTCRtpTransceiverInit {
            direction: RTCRtpTransceiverDirection::Sendonly,
            streams: vec![],
            send_encodings: vec![],
        };
        let transceiver = self.pc.add_transceiver_from_track(track.clone() as Arc<dyn TrackLocal>, Some(init)).await?;
        transceiver.sender().await?.ok_or(webrtc::error::Error::ErrConnectionClosed)
    }

    /// Our description once candidates are known.
    async fn gathered(&mut self) -> Option<String> {
        if tokio::time::timeout(GATHER_TIMEOUT, self.gathered.wait_for(|g| *g)).await.is_err() {
            tracing::warn!("ICE servers did not answer in {GATHER_TIMEOUT:?}; going on without their candidates");
        }
        self.pc.local_description().await.map(|d| d.sdp)
    }

    /// The negotiation is over: the peer lives.
    fn begin(self, agreed: Agreed, remote: String) -> Link {
        let Draft { pc, shared, handler, events, gathered, end, face, voice, public_ips, lease } = self;
        let stop = CancellationToken::new();
        let stream = |of: &(u32, RtpClock), payload_type: Option<u8>| {
            payload_type.map(|pt| Stream::new(of.0, pt, of.1, rand::rng().random::<u16>()))
        };
        let (video, audio) = (stream(&shared.video, agreed.video), stream(&shared.audio, agreed.audio));
        let (out, queues) = Out::new(shared.clone(), video, audio, stop.clone());
        *lock(&handler.messages) = Some(queues.messages);
        let (ended_tx, ended) = watch::channel(false);
        tokio::spawn(live(Life {
            pc: pc.clone(),
            shared,
            stop: stop.clone(),
            end,
            ended: ended_tx,
            other: agreed.end,
            write: out::write(queues.video, queues.audio, face, voice),
            _lease: lease,
        }));
        let peer = Peer {
            pc,
            remote: tokio::sync::Mutex::new(remote),
            etag: Mutex::new(new_etag()),
            public_ips,
            gathered,
            _guard: stop.clone().drop_guard(),
            stop,
            ended,
        };
        (peer, events, Arc::new(out))
    }
}

impl Peer {
    /// Adds the candidates of a trickle fragment (RFC 8840); those we cannot use are skipped. A fragment with the
    /// credentials of another ICE session is refused.
    ///
    /// # Errors
    /// [`NetError::Malformed`], [`NetError::TooLarge`], [`NetError::Closed`].
    pub async fn trickle(&self, fragment: &str) -> Result<(), NetError> {
        let fragment = fragment::parse_fragment(fragment)?;
        self.open()?;
        let remote = self.remote.lock().await;
        let current = fragment::credentials(&remote);
        if let (Some(ufrag), Some((now, _))) = (&fragment.ufrag, &current)
            && ufrag != now
        {
            return Err(NetError::Malformed("the fragment belongs to another ICE session (its ufrag differs)".into()));
        }
        for (mid, candidate) in fragment.candidates {
            self.add(candidate, mid, current.as_ref().map(|c| c.0.clone())).await?;
        }
        Ok(())
    }

    /// Whether a fragment brings other credentials than the current ones, which makes it a restart (RFC 9725 §4.3.3).
    pub async fn is_restart(&self, fragment: &str) -> bool {
        let new = fragment::parse_fragment(fragment).ok().and_then(|f| f.ufrag.zip(f.pwd));
        let current = fragment::credentials(&*self.remote.lock().await);
        new.zip(current).is_some_and(|(new, current)| new.0 != current.0)
    }

    /// Restarts ICE with the credentials and candidates of a fragment; returns our fragment. On an error the old session
    /// goes on.
    ///
    /// # Errors
    /// [`NetError::Malformed`] without usable credentials, [`NetError::NotARestart`] with the old ones,
    /// [`NetError::Closed`].
    pub async fn restart(&self, fragment: &str) -> Result<String, NetError> {
        let fragment = fragment::parse_fragment(fragment)?;
        self.open()?;
        let (Some(ufrag), Some(pwd)) = (&fragment.ufrag, &fragment.pwd) else {
            return Err(NetError::Malformed("an ICE restart needs a=ice-ufrag and a=ice-pwd".into()));
        };
        let mut remote = self.remote.lock().await;
        if fragment::credentials(&remote).is_some_and(|(old, _)| old == *ufrag) {
            return Err(NetError::NotARestart);
        }
        let offer = fragment::with_credentials(&remote, ufrag, pwd, &fragment.candidates);
        let answer = self.answer_again(&offer).await?;
        *remote = offer;
        *lock(&self.etag) = new_etag();
        Ok(fragment::fragment_of(&answer))
    }

    /// Answers a further offer of the other side for this connection: an ICE restart, more sections.
    ///
    /// # Errors
    /// [`NetError::Malformed`], [`NetError::TooLarge`], [`NetError::Closed`].
    pub async fn renegotiate(&self, offer: &str) -> Result<String, NetError> {
        self.open()?;
        let offer = sdp::check_answer(offer)?;
        let mut remote = self.remote.lock().await;
        let answer = self.answer_again(&offer).await?;
        *remote = offer;
        Ok(answer)
    }

    async fn answer_again(&self, offer: &str) -> Result<String, NetError> {
        // Whatever can be wrong with the text is found before the running session is touched.
        let description = guarded(async { RTCSessionDescription::offer(offer.into()) }).await?.map_err(malformed)?;
        let answer = guarded(async {
            self.pc.set_remote_description(description).await?;
            let answer = self.pc.create_answer(None).await?;
            self.pc.set_local_description(answer).await?;
            Ok::<_, webrtc::error::Error>(self.pc.local_description().await)
        })
        .await?
        .map_err(malformed)?
        .ok_or(NetError::Closed)?;
        Ok(sdp::publish(&answer.sdp, &self.public_ips))
    }

    /// Makes a new offer with an ICE restart, for a connection that we offered; [`Peer::accept`] takes its answer.
    ///
    /// # Errors
    /// [`NetError::Stack`], [`NetError::Closed`].
    pub async fn reoffer(&self) -> Result<String, NetError> {
        self.open()?;
        let mut gathered = self.gathered.clone();
        gathered.mark_unchanged();
        let options = RTCOfferOptions { ice_restart: true };
        let offer = self.pc.create_offer(Some(options)).await.map_err(NetError::stack)?;
        self.pc.set_local_description(offer).await.map_err(NetError::stack)?;
        let _ = tokio::time::timeout(GATHER_TIMEOUT, gathered.changed()).await;
        let offer = self.pc.local_description().await.ok_or(NetError::Closed)?;
        Ok(sdp::publish(&offer.sdp, &self.public_ips))
    }

    /// Takes the answer to [`Peer::reoffer`].
    ///
    /// # Errors
    /// [`NetError::Malformed`], [`NetError::TooLarge`], [`NetError::Closed`].
    pub async fn accept(&self, answer: &str) -> Result<(), NetError> {
        self.open()?;
        let answer = sdp::check_answer(answer)?;
        let mut remote = self.remote.lock().await;
        guarded(async {
            let description = RTCSessionDescription::answer(answer.clone())?;
            self.pc.set_remote_description(description).await
        })
        .await?
        .map_err(malformed)?;
        *remote = answer;
        Ok(())
    }

    /// Adds one candidate (`candidate:…`); one that cannot be used is skipped.
    ///
    /// # Errors
    /// [`NetError::Closed`].
    pub async fn candidate(&self, candidate: &str, mid: Option<String>) -> Result<(), NetError> {
        self.open()?;
        if fragment::usable(candidate) {
            self.add(candidate.into(), mid, None).await?;
        }
        Ok(())
    }

    async fn add(&self, candidate: String, mid: Option<String>, ufrag: Option<String>) -> Result<(), NetError> {
        let init =
            RTCIceCandidateInit { candidate, sdp_mid: mid, sdp_mline_index: None, username_fragment: ufrag, url: None };
        // RFC 9725 §4.3.1: a candidate that cannot be used is skipped without a word.
        if let Err(error) = guarded(self.pc.add_ice_candidate(init)).await? {
            tracing::debug!(error = %short(error), "a trickled candidate was skipped");
        }
        Ok(())
    }

    /// The strong entity tag of the current ICE session, with quotes (RFC 9725 §4.3).
    pub fn etag(&self) -> String {
        lock(&self.etag).clone()
    }

    /// Ends the connection and waits until its sockets are closed. Idempotent.
    pub async fn close(&self) {
        self.stop.cancel();
        self.ended().await;
    }

    /// Waits until the connection is over and its sockets are closed.
    pub async fn ended(&self) {
        let mut ended = self.ended.clone();
        // An error means the task is gone, and with it the connection.
        let _ = ended.wait_for(|e| *e).await;
    }

    fn open(&self) -> Result<(), NetError> {
        if self.stop.is_cancelled() || *self.ended.borrow() { Err(NetError::Closed) } else { Ok(()) }
    }
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer").field("etag", &self.etag()).finish_non_exhaustive()
    }
}

fn new_etag() -> String {
    format!("\"{:016x}\"", rand::rng().random::<u64>())
}

fn malformed(error: impl std::fmt::Display) -> NetError {
    NetError::Malformed(short(error))
}

/// Runs a call into the WebRTC library on text from strangers; a panic in there becomes an error here.
pub(super) async fn guarded<T>(call: impl Future<Output = T>) -> Result<T, NetError> {
    AssertUnwindSafe(call).catch_unwind().await.map_err(|_| {
        NetError::Malformed("the WebRTC library gave up on it; it is probably not a session description".into())
    })
}
