//! The worker in its room: one loop over signalling, data channels, media events and the session's events.
//!
//! Three things may break without the others: the signalling (resumed, media go on), the media (ICE restart over the
//! signalling), or all of it (a new join; the session, its face and its waiting speech stay).

use super::{
    Config, LivekitError,
    agent::Agent,
    calls::{self, Calls, Notice},
    media::{Media, tracks},
    signal::{Signal, unix_ms},
    spoken::finished,
    stay::{Line, Over, Pulse, SLOWEST_RETRY, Stay, Step, enter, reason},
    streams::{Refused, Streams},
    target::Target,
    token::Claims,
};
use crate::{
    net::Net,
    session::{Handle, LinkEvent, Reason, SessionEvent, SpeechClosed, SpeechPort},
};
use futures::future::BoxFuture;
use livekit_protocol::{
    DataChannelInfo, DataChannelReceiveState, DataPacket, JoinResponse, ParticipantInfo, SignalTarget, SyncState,
    UpdateSubscription, data_packet::Value, leave_request::Action, request_response, signal_request as ask,
    signal_response as told,
};
use prost::Message as _;
use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::broadcast;

/// Time for the server's data channel to open before we publish without it.
const HEARING: Duration = Duration::from_secs(4);
/// Packets we sent that the server may ask for again after a resume.
const KEPT_PACKETS: usize = 64;
/// Senders whose newest packet is remembered.
const SENDERS: usize = 256;
/// Messages of one visitor of the room are at most so long: 15 000 bytes of speech and what is around them.
const MAX_PACKET: usize = 64 * 1024;
/// Failed joins in a row after which a room that lets nobody publish is given up.
const REJOINS: u32 = 3;

/// What a caller gives.
#[derive(Clone, Debug)]
pub struct Invitation {
    /// `ws`, `wss`, `http` or `https`.
    pub url: String,
    /// The room's token for the worker, made by the agent.
    pub token: String,
    /// The agent's identity; else the one that the token publishes for, else the first agent in the room.
    pub agent: Option<String>,
}

/// A room that was joined; nothing is published yet. Dropping it leaves without a word.
pub struct Joined {
    config: Config,
    target: Target,
    token: String,
    claims: Claims,
    wanted: Option<String>,
    signal: Signal,
    join: JoinResponse,
}

/// Joins a room: connects, shows the token, waits for the server's welcome.
///
/// # Errors
/// Each with a sentence for the caller; [`LivekitError::is_client`] says whose fault it is.
pub async fn join(invitation: Invitation, config: &Config) -> Result<Joined, LivekitError> {
    let claims = Claims::read(&invitation.token, SystemTime::now())?;
    let target = Target::parse(&invitation.url, config)?;
    let (signal, join) = enter(&target, &invitation.token, config).await?;
    tracing::debug!(server = %target, room = claims.room, "joined a LiveKit room");
    let wanted = invitation.agent.filter(|a| !a.is_empty()).or_else(|| claims.on_behalf.clone());
    Ok(Joined { config: config.clone(), target, token: invitation.token, claims, wanted, signal, join })
}

impl std::fmt::Debug for Joined {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Joined").field("target", &self.target).field("claims", &self.claims).finish_non_exhaustive()
    }
}

impl Joined {
    /// The room's name, as the token has it.
    pub fn room(&self) -> &str {
        &self.claims.room
    }

    /// Works until the session, the room or the agent ends; ends the session in the latter cases. `width` and `height`
    /// are of the picture that is announced.
    pub async fn run(self, net: Net, handle: Handle, width: u32, height: u32) {
        let now = Instant::now();
        let Joined { config, target, token, claims, wanted, mut signal, mut join } = self;
        let mut worker = Worker {
            agent: Agent::new(wanted, &claims.identity, now),
            streams: Streams::new(config.speech_buffer_s),
            calls: Calls::new(),
            port: Arc::new(handle.speech()),
            events: handle.events(),
            size: (width, height),
            pushing: None,
            open: HashSet::new(),
            cut: HashSet::new(),
            fresh: false,
            mid: false,
            unheard: 0,
            sequence: 0,
            sent: VecDeque::new(),
            seen: BTreeMap::new(),
            config,
            target,
            token,
            net,
            handle,
        };
        let mut failures = 0;
        let why = loop {
            match worker.stay(signal, &join).await {
                Over::End(why) => break why,
                Over::Again { why, worked } => {
                    failures = if worked { 1 } else { failures + 1 };
                    if failures > REJOINS {
                        break format!("no connection to the room lasted: {why}");
                    }
                    tracing::info!(why, "the room is joined anew");
                }
            }
            match worker.rejoin().await {
                Ok(entered) => (signal, join) = entered,
                Err(why) => break why,
            }
        };
        tracing::info!(why, room = claims.room, lost_notices = worker.calls.lost, "left the LiveKit room");
        worker.handle.close(Reason::PeerLeft(why));
    }
}

pub(super) struct Worker {
    config: Config,
    target: Target,
    token: String,
    net: Net,
    handle: Handle,
    size: (u32, u32),
    agent: Agent,
    pub(super) streams: Streams,
    pub(super) calls: Calls,
    pub(super) port: Arc<SpeechPort>,
    events: broadcast::Receiver<SessionEvent>,
    /// A piece of speech on its way into the session.
    pub(super) pushing: Option<BoxFuture<'static, Result<u64, SpeechClosed>>>,
    /// Segments that the session has and has not ended.
    pub(super) open: HashSet<u64>,
    /// Those of them that the agent has cut off.
    pub(super) cut: HashSet<u64>,
    /// The segment that is being handed on has begun…
    pub(super) mid: bool,
    /// …and the session has not given it a number yet.
    pub(super) fresh: bool,
    /// Segments cut off before the session had anything of them, to be told after those it had.
    pub(super) unheard: usize,
    sequence: u32,
    sent: VecDeque<(u32, Vec<u8>)>,
    /// Newest packet by sender's sid.
    seen: BTreeMap<String, u32>,
}

impl Worker {
    /// One stay in the room.
    async fn stay(&mut self, signal: Signal, join: &JoinResponse) -> Over {
        let mut media = match Media::new(&self.net, &join.ice_servers).await {
            Ok(media) => media,
            Err(error) => return Over::End(error.to_string()),
        };
        let over = self.work(signal, join, &mut media).await;
        media.close().await;
        over
    }

    async fn work(&mut self, signal: Signal, join: &JoinResponse, media: &mut Media) -> Over {
        let now = Instant::now();
        let Some(me) = join.participant.as_ref().map(|p| p.sid.clone()) else {
            return Over::End("the server's join answer names no participant".into());
        };
        let mut stay = Stay {
            me,
            line: Line::Up(Box::new(signal)),
            down_since: None,
            attempts: 0,
            pulse: Pulse {
                every: Duration::from_secs(u64::try_from(join.ping_interval).unwrap_or(0).clamp(1, 60)),
                patience: Duration::from_secs(u64::try_from(join.ping_timeout).unwrap_or(0).clamp(3, 120)),
                next: now,
                heard: now,
                rtt_ms: 0,
            },
            begun: now,
            publish_at: if join.subscriber_primary { now + HEARING } else { now },
            interrupted: false,
        };
        // A new stay counts its packets anew.
        (self.sequence, self.seen) = (0, BTreeMap::new());
        self.sent.clear();
        self.agent.unseen(now);
        join.other_participants.iter().for_each(|info| self.agent.update(info, now));
        for track in tracks(self.size.0, self.size.1) {
            stay.send(ask::Message::AddTrack(track)).await;
        }
        loop {
            let now = Instant::now();
            if let Some(over) = self.due(&mut stay, media, now).await {
                return over;
            }
            self.feed();
            let wake = self.wake(&stay, media, now);
            let over = tokio::select! {
                data = media.data.recv() => {
                    match data {
                        Some(data) if data.opened => media.channel_opened(&data.label),
                        Some(data) => self.packet(&data.bytes, media),
                        None => {}
                    }
                    None
                }
                line = stay.line.step() => self.signalled(line, &mut stay, media).await,
                event = next(&mut media.events) => self.media(event, &mut stay, media).await,
                event = next(&mut media.subscriber_events) => match event {
                    Some(LinkEvent::Closed(why)) => Some(Over::Again { why, worked: media.is_connected() }),
                    Some(_) => None,
                    None => Some(Over::Again { why: "the data connection ended".into(), worked: media.is_connected() }),
                },
                pushed = finished(&mut self.pushing) => { self.pushed(pushed); None }
                event = self.events.recv() => self.session(event),
                () = tokio::time::sleep_until(wake.into()) => None,
            };
            match over {
                Some(over @ Over::End(_)) => {
                    if let Line::Up(signal) = &mut stay.line {
                        signal.leave().await;
                    }
                    return over;
                }
                Some(over) => return over,
                None => {}
            }
        }
    }

    /// Joins anew after all was lost; why not, if it cannot be.
    async fn rejoin(&mut self) -> Result<(Signal, JoinResponse), String> {
        let until = Instant::now() + Duration::from_secs(self.config.resume_timeout_s);
        let mut pause = Duration::from_millis(300);
        let (target, token, config) = self.way();
        loop {
            let attempt = enter(&target, &token, &config);
            let error = tokio::select! {
                entered = attempt => match entered {
                    Ok(entered) => return Ok(entered),
                    Err(error) => error,
                },
                why = closed(&mut self.events) => return Err(why),
            };
            if error.is_client() || Instant::now() + pause > until {
                return Err(error.to_string());
            }
            tracing::debug!(%error, "the room cannot be joined anew yet");
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(SLOWEST_RETRY);
        }
    }

    /// What the clock asks for.
    async fn due(&mut self, stay: &mut Stay, media: &mut Media, now: Instant) -> Option<Over> {
        if let Some(offer) = media.offer(now >= stay.publish_at) {
            stay.send(ask::Message::Offer(offer)).await;
        }
        if let Some(deadline) = self.agent.deadline(Duration::from_secs(self.config.agent_timeout_s))
            && now >= deadline
        {
            if let Line::Up(signal) = &mut stay.line {
                signal.leave().await;
            }
            return Some(Over::End("the agent is not in the room".into()));
        }
        if !media.is_connected() && now >= stay.begun + Duration::from_secs(self.config.join_timeout_s) {
            let why = "voice and picture could not be published in time".to_string();
            return Some(Over::Again { why, worked: false });
        }
        if let Some(since) = stay.down_since
            && now >= since + Duration::from_secs(self.config.resume_timeout_s)
        {
            return Some(Over::End("the signalling connection was lost and did not come back".into()));
        }
        if matches!(stay.line, Line::Up(_)) {
            if now >= stay.pulse.heard + stay.pulse.patience {
                stay.lost("the server does not answer pings", self.way());
            } else if now >= stay.pulse.next {
                stay.pulse.next = now + stay.pulse.every;
                stay.ping().await;
            }
        }
        if let Some(agent) = self.agent.present().map(str::to_string)
            && let Some(request) = self.calls.poll(now, || format!("{:032x}", rand::random::<u128>()))
        {
            self.send(media, &agent, Value::RpcRequest(request));
        }
        None
    }

    fn wake(&self, stay: &Stay, media: &Media, now: Instant) -> Instant {
        let seconds = Duration::from_secs;
        let up = matches!(stay.line, Line::Up(_));
        let times = [
            up.then(|| stay.pulse.next.min(stay.pulse.heard + stay.pulse.patience)),
            self.agent.deadline(seconds(self.config.agent_timeout_s)),
            self.agent.present().and(self.calls.deadline()),
            (!media.was_offered() && now < stay.publish_at).then_some(stay.publish_at),
            (!media.is_connected()).then_some(stay.begun + seconds(self.config.join_timeout_s)),
            stay.down_since.map(|since| since + seconds(self.config.resume_timeout_s)),
        ];
        times.into_iter().flatten().min().unwrap_or(now + seconds(1)).max(now)
    }

    /// The signalling has said something, has broken, or has come back.
    async fn signalled(&mut self, step: Step, stay: &mut Stay, media: &mut Media) -> Option<Over> {
        let now = Instant::now();
        let message = match step {
            Step::Heard(Ok(message)) => message,
            Step::Heard(Err(why)) => {
                stay.lost(&why, self.way());
                return None;
            }
            Step::Resumed(Ok((signal, first))) => {
                stay.line = Line::Up(Box::new(signal));
                (stay.pulse.heard, stay.pulse.next) = (now, now + stay.pulse.every);
                first
            }
            Step::Resumed(Err(error)) if error.is_client() => return Some(Over::End(error.to_string())),
            Step::Resumed(Err(error)) => {
                stay.lost(&error.to_string(), self.way());
                return None;
            }
        };
        stay.pulse.heard = now;
        let worked = media.is_connected();
        let done: Result<(), LivekitError> = match message {
            told::Message::Answer(answer) => media.answered(answer).await,
            told::Message::Offer(offer) => match media.offered(offer).await {
                Ok(answer) => {
                    stay.send(ask::Message::Answer(answer)).await;
                    Ok(())
                }
                Err(error) => Err(error),
            },
            told::Message::Trickle(trickle) => {
                let subscriber = trickle.target == i32::from(SignalTarget::Subscriber);
                media.candidate(&trickle.candidate_init, subscriber).await
            }
            told::Message::TrackPublished(track) => {
                media.track_published(track);
                Ok(())
            }
            told::Message::Update(update) => {
                update.participants.iter().for_each(|info: &ParticipantInfo| self.agent.update(info, now));
                Ok(())
            }
            told::Message::PongResp(pong) => {
                stay.pulse.rtt_ms = (unix_ms() - pong.last_ping_timestamp).clamp(0, 60_000);
                Ok(())
            }
            told::Message::RefreshToken(token) => {
                self.token = token;
                Ok(())
            }
            told::Message::Reconnect(answer) => {
                (stay.down_since, stay.attempts) = (None, 0);
                // Everybody who is still there is told next.
                self.agent.unseen(now);
                tracing::info!("the signalling connection was resumed");
                stay.send(ask::Message::SyncState(self.sync(media))).await;
                // What the server has not seen; what it has it knows by its number.
                self.sent.iter().filter(|(n, _)| *n > answer.last_message_seq).for_each(|(_, packet)| {
                    media.send(packet.clone());
                });
                if stay.interrupted { stay.restart_ice(media).await } else { Ok(()) }
            }
            told::Message::Join(_) => {
                return Some(Over::Again { why: "the server does not know us any more".into(), worked });
            }
            told::Message::Leave(leave) => {
                let why = reason(leave.reason);
                return match Action::try_from(leave.action) {
                    Ok(Action::Resume) => {
                        stay.lost(&format!("the server asked to resume ({why})"), self.way());
                        None
                    }
                    Ok(Action::Reconnect) => Some(Over::Again { why, worked }),
                    _ => Some(Over::End(format!("the server ended it: {why}"))),
                };
            }
            told::Message::RequestResponse(answer) if answer.reason != 0 => {
                let what =
                    request_response::Reason::try_from(answer.reason).map(|r| r.as_str_name()).unwrap_or("error");
                // Of what we ask only tracks can be refused.
                match answer.request {
                    Some(request_response::Request::AddTrack(_)) => {
                        return Some(Over::End(format!(
                            "the room does not let the worker publish ({what}): {}",
                            answer.message
                        )));
                    }
                    _ => tracing::debug!(what, "the server refused a request"),
                }
                Ok(())
            }
            _ => Ok(()),
        };
        match done {
            Ok(()) => None,
            Err(error) => Some(Over::Again { why: error.to_string(), worked }),
        }
    }

    /// What the signalling needs to come back.
    fn way(&self) -> (Target, String, Config) {
        (self.target.clone(), self.token.clone(), self.config.clone())
    }

    /// What the server needs to know after a resume.
    fn sync(&self, media: &Media) -> SyncState {
        let info = |label: &str, target: SignalTarget| DataChannelInfo {
            label: label.into(),
            target: target.into(),
            ..DataChannelInfo::default()
        };
        let (offer, answer) = media.subscribed.clone().unzip();
        let states =
            self.seen.iter().map(|(sid, n)| DataChannelReceiveState { publisher_sid: sid.clone(), last_seq: *n });
        SyncState {
            answer,
            offer,
            subscription: Some(UpdateSubscription { subscribe: true, ..UpdateSubscription::default() }),
            publish_tracks: media.published().to_vec(),
            data_channels: vec![
                info("_lossy", SignalTarget::Publisher),
                info("_reliable", SignalTarget::Publisher),
                info("_lossy", SignalTarget::Subscriber),
                info("_reliable", SignalTarget::Subscriber),
            ],
            datachannel_receive_states: states.collect(),
            ..SyncState::default()
        }
    }

    /// The publisher's connection.
    async fn media(&mut self, event: Option<LinkEvent>, stay: &mut Stay, media: &mut Media) -> Option<Over> {
        let worked = media.is_connected();
        match event {
            Some(LinkEvent::Connected) => {
                stay.interrupted = false;
                media.connected(&self.handle);
            }
            Some(LinkEvent::Interrupted) => {
                stay.interrupted = true;
                if matches!(stay.line, Line::Up(_))
                    && let Err(error) = stay.restart_ice(media).await
                {
                    return Some(Over::Again { why: error.to_string(), worked });
                }
            }
            Some(LinkEvent::KeyframeRequested) => self.handle.keyframe(),
            Some(LinkEvent::Closed(why)) => return Some(Over::Again { why, worked }),
            None => return Some(Over::Again { why: "the media connection ended".into(), worked }),
            Some(LinkEvent::Speech(_) | LinkEvent::TargetBitrate(_) | LinkEvent::Message(_)) => {}
        }
        None
    }

    /// A packet of somebody in the room.
    fn packet(&mut self, bytes: &[u8], media: &Media) {
        if bytes.len() > MAX_PACKET {
            return tracing::debug!(bytes = bytes.len(), "a data packet is too long and was dropped");
        }
        let Ok(packet) = DataPacket::decode(bytes) else {
            return tracing::debug!("a data packet cannot be read and was dropped");
        };
        if packet.sequence > 0 && !packet.participant_sid.is_empty() {
            if self.seen.len() >= SENDERS && !self.seen.contains_key(&packet.participant_sid) {
                self.seen.pop_first();
            }
            let newest = self.seen.entry(packet.participant_sid.clone()).or_default();
            if packet.sequence <= *newest {
                return;
            }
            *newest = packet.sequence;
        }
        let (from, now) = (packet.participant_identity, Instant::now());
        let from_agent = self.agent.is(&from);
        match packet.value {
            Some(Value::RpcRequest(request)) => {
                let answer = calls::answer(&request, from_agent);
                for part in answer.packets {
                    self.send(media, &from, part);
                }
                if answer.clear {
                    self.handle.interrupt();
                    self.clear();
                }
            }
            // Speech and answers of others than the agent are not for us.
            _ if !from_agent => {}
            Some(Value::RpcAck(ack)) => self.calls.ack(&ack, now),
            Some(Value::RpcResponse(response)) => self.calls.response(&response, now),
            Some(Value::StreamHeader(header)) => match self.streams.header(&header) {
                Ok(_) | Err(Refused::Twice) => {}
                Err(why) => {
                    tracing::warn!("a stream of speech was refused: {why}");
                    // The agent counts it as spoken until it is told otherwise.
                    self.unheard += 1;
                    self.tell_unheard();
                }
            },
            Some(Value::StreamChunk(chunk)) => {
                if let Err(why) = self.streams.chunk(&chunk) {
                    tracing::warn!("speech was dropped: {why}");
                }
            }
            Some(Value::StreamTrailer(trailer)) => self.streams.trailer(&trailer),
            _ => {}
        }
    }

    fn send(&mut self, media: &Media, to: &str, value: Value) {
        self.sequence += 1;
        let packet = DataPacket {
            destination_identities: vec![to.into()],
            sequence: self.sequence,
            value: Some(value),
            ..DataPacket::default()
        };
        let bytes = packet.encode_to_vec();
        self.sent.push_back((self.sequence, bytes.clone()));
        if self.sent.len() > KEPT_PACKETS {
            self.sent.pop_front();
        }
        if !media.send(bytes) {
            tracing::warn!("the data channel is full; a packet was dropped");
        }
    }

    fn session(&mut self, event: Result<SessionEvent, broadcast::error::RecvError>) -> Option<Over> {
        match event {
            Ok(SessionEvent::SpeakStarted { segment }) if self.open.contains(&segment) => {
                self.calls.tell(Notice::Started)
            }
            Ok(SessionEvent::SpeakEnded { segment, position, interrupted }) if self.open.remove(&segment) => {
                self.calls.tell(Notice::Finished { position_s: position.as_secs_f64(), interrupted });
                let ours = self.cut.remove(&segment);
                if interrupted && !ours {
                    // Somebody else interrupted: the rest of what was being said is not to come after all.
                    self.clear();
                }
                self.tell_unheard();
            }
            Ok(SessionEvent::Closed(reason)) => {
                return Some(Over::End(format!("the session ended: {}", reason.label())));
            }
            Err(broadcast::error::RecvError::Closed) => return Some(Over::End("the session ended".into())),
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                tracing::warn!(missed, "events of the session were missed")
            }
            Ok(_) => {}
        }
        None
    }
}

async fn next(events: &mut Option<tokio::sync::mpsc::Receiver<LinkEvent>>) -> Option<LinkEvent> {
    match events {
        Some(events) => events.recv().await,
        None => std::future::pending().await,
    }
}

/// Waits for the session's end; why.
async fn closed(events: &mut broadcast::Receiver<SessionEvent>) -> String {
    loop {
        match events.recv().await {
            Ok(SessionEvent::Closed(reason)) => return format!("the session ended: {}", reason.label()),
            Err(broadcast::error::RecvError::Closed) => return "the session ended".into(),
            _ => {}
        }
    }
}
