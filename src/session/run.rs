//! The only place where a conversation meets the world: sockets' events, the engine's lane, the clock, the log.

use super::{
    ChangeError, Config, Conversation, Effect, Encoder, EncoderReport, Input, LinkEvent, LinkOut, Look, Metrics,
    Reason, SessionControl, SessionId, SinkRole, State,
    registry::{Order, Wish},
    trail::Trail,
};
use crate::{
    avatar::{self, AvatarError, OpenOptions},
    codec::marks::Mark,
    engine::{Change, EngineError, Lane, LaneEvent, Slot, TryPush},
    media::{Geometry, Portrait},
    telemetry,
};
use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot};
use tracing::Instrument;

/// What a conversation is about.
#[derive(Clone, Debug)]
pub struct SessionSpec {
    pub id: SessionId,
    pub portrait: Portrait,
    /// Name of the presenter, for the log.
    pub presenter: String,
    pub options: OpenOptions,
    /// The engine's: `engine.geometry().clone()`.
    pub geometry: Geometry,
}

/// How often metrics are told.
const MEASURE: Duration = Duration::from_secs(1);

/// Time for the closing message to leave.
const LAST_WORDS: Duration = Duration::from_millis(150);

/// The clock of the runtime, so that tests may stop it.
fn clock() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// Runs one conversation to its end: opens the face, listens, plays, encodes, closes the link and logs the one exit
/// line. Dropping the future ends it too: slot, encoder thread and registry entry go with it.
pub async fn run(
    spec: SessionSpec,
    slot: Slot,
    events: mpsc::Receiver<LinkEvent>,
    out: Arc<dyn LinkOut>,
    control: SessionControl,
    config: Config,
) -> Reason {
    let span = tracing::info_span!("session", session = spec.id.short());
    converse(spec, slot, Some(events), Some(out), control, config).instrument(span).await
}

/// Runs a session that has no peer of its own: it is driven through its [`Handle`](super::Handle) and ends by order, by
/// idling or by its longest time.
pub async fn host(spec: SessionSpec, slot: Slot, control: SessionControl, config: Config) -> Reason {
    let span = tracing::info_span!("session", session = spec.id.short());
    converse(spec, slot, None, None, control, config).instrument(span).await
}

/// What the microphone's peer tells; nothing while there is none.
async fn heard(events: &mut Option<mpsc::Receiver<LinkEvent>>) -> Option<LinkEvent> {
    match events {
        Some(events) => events.recv().await,
        None => std::future::pending().await,
    }
}

async fn converse(
    mut spec: SessionSpec,
    slot: Slot,
    mut events: Option<mpsc::Receiver<LinkEvent>>,
    out: Option<Arc<dyn LinkOut>>,
    mut control: SessionControl,
    config: Config,
) -> Reason {
    let begun = clock();
    let hosted = out.is_none();
    let (fan, wish) = (control.fan().clone(), control.wish());
    let _peer = out.map(|out| fan.attach(out, SinkRole::Peer));
    let closer = CloseOnDrop(fan.clone());
    let speech = control.speech().clone();
    speech.bound(config.speech_buffer_s);
    let mut conversation = match Conversation::new(&config, &spec.geometry, &spec.portrait, speech, begun) {
        Ok(conversation) if hosted => conversation.hosted(begun),
        Ok(conversation) => conversation,
        Err(error) => return finish(&spec, &control, begun, None, Reason::CodecFailed(error.to_string())),
    };
    let mark = Mark { engine: control.engine().into(), session: spec.id.short().into() };
    let look = Look { badge: config.badge, language: config.badge_language, mark };
    let encoder = match Encoder::start(spec.id.short(), fan.clone(), look) {
        Ok(encoder) => encoder,
        Err(error) => return finish(&spec, &control, begun, None, Reason::CodecFailed(error.to_string())),
    };
    spec.options.matte = fan.matte().clone();
    spec.options.direction = control.direction().clone();
    let mut face = Face::Opening(Box::pin(slot.open(spec.portrait.clone(), spec.options.clone())));
    let mut change: Option<Changing> = None;
    let mut measured = begun;
    let mut told = Told(Metrics::default());
    let mut trail = telemetry::traces().map(|traces| Trail::new(spec.id.short(), traces));
    let reason = loop {
        let now = clock();
        if let Some(newer) = control.microphone() {
            events = Some(newer);
        }
        if fan.take_keyframe_wish() {
            conversation.want_keyframe();
        }
        if now.saturating_duration_since(measured) >= MEASURE {
            measured = now;
            let report = encoder.report();
            if let Some(why) = &report.failed {
                conversation.order(Input::Close(Reason::CodecFailed(why.clone())), now);
            }
            conversation.audience(fan.len(), fan.dropped(), fan.left());
            conversation.measure(&report, encoder.replaced(), &fan.stats(), now);
            told.tell(conversation.metrics(), &report, spec.geometry.block_frames);
            if let Some(trail) = &mut trail {
                trail.passed(&report.passed, now);
            }
            control.report(conversation.state(), conversation.metrics());
        }
        if let Err(error) = conversation.advance(fan.line(), now) {
            conversation.order(Input::Close(Reason::CodecFailed(error.to_string())), now);
        }
        if let Face::Open(lane) = &face {
            lane.input.raise(conversation.epoch());
            change = change.filter(|c| !c.wish.reply.is_closed());
            if change.is_none() {
                change = control.change().map(|wish| Changing::begin(wish, &spec));
            }
            if let Some(change) = &mut change {
                change.ask = change.ask.take().and_then(|ask| lane.input.change(ask));
            }
            // While a face is being changed it gets no speech: the next one will, from where it can still be shown.
            while change.is_none()
                && let Some(speech) = conversation.next_speech()
            {
                match lane.input.try_push(speech) {
                    Ok(()) => {}
                    Err(TryPush::Full(speech)) => {
                        conversation.unread(speech);
                        break;
                    }
                    // Its last word is in the output.
                    Err(TryPush::Closed) => break,
                }
            }
        }
        if let Some(reason) = perform(&mut conversation, &encoder, &*fan, &control, &mut trail) {
            break reason;
        }
        let wake = conversation.deadline(now).min(measured + MEASURE);
        tokio::select! {
            biased;
            order = control.ordered() => {
                let input = match order {
                    Order::Close(reason) => Input::Close(reason),
                    Order::Drain(reason) => Input::Drain(reason),
                };
                conversation.order(input, clock());
            }
            event = heard(&mut events) => {
                let mut event = event.unwrap_or_else(|| {
                    if hosted {
                        events = None;
                    }
                    LinkEvent::Closed("the transport ended".into())
                });
                // And what else came meanwhile; the queue is bounded.
                loop {
                    if matches!(&event, LinkEvent::Speech(packet) if !packet.payload.is_empty()) {
                        telemetry::metrics().speech("received", 1);
                    }
                    conversation.link(event, clock());
                    match events.as_mut().map(|e| e.try_recv()) {
                        Some(Ok(next)) => event = next,
                        _ => break,
                    }
                }
            }
            () = wish.notified() => {}
            answer = changed(&mut change) => {
                let answer = answer.map(|()| conversation.face_changed(clock()));
                if let Some(Changing { wish, then, .. }) = change.take() {
                    if answer.is_ok() {
                        tracing::info!(presenter = then.presenter, "the presenter or its prompt was changed");
                        control.shows(&then.presenter);
                        spec = then;
                    }
                    // Whoever asked may be gone.
                    let _ = wish.reply.send(answer);
                }
            }
            step = face.step() => step.apply(&mut face, &mut conversation),
            () = tokio::time::sleep_until(wake.into()) => {}
        }
    };
    // The last words: what was counted until now.
    let report = encoder.report();
    conversation.audience(fan.len(), fan.dropped(), fan.left());
    conversation.measure(&report, encoder.replaced(), &fan.stats(), clock());
    told.tell(conversation.metrics(), &report, spec.geometry.block_frames);
    control.report(State::Closed, conversation.metrics());
    drop(face);
    drop(encoder);
    if !matches!(reason, Reason::PeerLeft(_)) {
        // The page is to read why before the link goes; the slot is free already.
        tokio::time::sleep(LAST_WORDS).await;
    }
    drop(closer);
    finish(&spec, &control, begun, Some(&conversation), reason)
}

/// Does what was decided; the reason when it is over.
fn perform(
    conversation: &mut Conversation,
    encoder: &Encoder,
    out: &dyn LinkOut,
    control: &SessionControl,
    trail: &mut Option<Trail>,
) -> Option<Reason> {
    while let Some(effect) = conversation.effect() {
        match effect {
            Effect::Voice(audio, wall) => out.audio(audio, wall),
            Effect::Discard => encoder.discard(),
            Effect::Keyframe => encoder.want_keyframe(),
            Effect::Show(job) => encoder.put(job),
            Effect::Made(made) => {
                if let Some(trail) = trail {
                    trail.made(made);
                }
            }
            Effect::Message(text) => out.message(text),
            Effect::Tell(event) => control.tell(event),
            Effect::Entered(state) => {
                tracing::debug!(state = state.label(), "entered");
                control.report(state, conversation.metrics());
            }
            Effect::Close(reason) => return Some(reason),
        }
    }
    None
}

/// The one exit line.
fn finish(
    spec: &SessionSpec,
    control: &SessionControl,
    begun: Instant,
    conversation: Option<&Conversation>,
    reason: Reason,
) -> Reason {
    control.ended(&reason);
    let m = conversation.map(|c| c.metrics().clone()).unwrap_or_default();
    let duration_s = (clock().saturating_duration_since(begun).as_secs_f64() * 10.0).round() / 10.0;
    tracing::info!(
        reason = reason.label(),
        detail = reason.detail(),
        presenter = spec.presenter,
        duration_s,
        blocks = m.blocks,
        blocks_skipped = m.blocks_skipped,
        worst_lag_ms = m.worst_lag_ms.round(),
        frames_sent = m.frames_sent,
        frames_held = m.frames_held,
        frames_skipped = m.frames_skipped,
        lost_in = m.lost_in,
        lost_out = m.lost_out,
        "session ended"
    );
    reason
}

/// What of a conversation's counters the process's metrics already have.
struct Told(Metrics);

impl Told {
    /// Adds what was counted since the last time.
    fn tell(&mut self, now: &Metrics, report: &EncoderReport, block_frames: u32) {
        let (all, then) = (telemetry::metrics(), &self.0);
        // A counter that was set back to zero by an interruption counts from there.
        let more = |new: u64, old: u64| if new >= old { new - old } else { new };
        all.frame("sent", more(now.frames_sent, then.frames_sent));
        all.frame("held", more(now.frames_held, then.frames_held));
        all.frame("skipped", more(now.frames_skipped, then.frames_skipped));
        all.speech("lost", more(now.lost_in, then.lost_in));
        all.speech("recovered", more(now.repaired_in, then.repaired_in));
        all.speech("late", more(now.late_in, then.late_in));
        all.speech("padding", more(now.padding_in, then.padding_in));
        // Concealed sound is measured in time; a packet of Chromium holds 20 ms.
        all.speech("concealed", more(now.concealed_in_ms / 20, then.concealed_in_ms / 20));
        for delay in &report.delays {
            all.delay_seconds.observe(delay.as_secs_f64());
        }
        if report.frames > 0 {
            all.stage("encode", report.encode * block_frames / report.frames as u32);
        }
        self.0 = now.clone();
    }
}

/// Ends the link however the conversation ends.
struct CloseOnDrop(Arc<dyn LinkOut>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A change of face on its way.
struct Changing {
    wish: Wish,
    /// What the session is about once it is carried out.
    then: SessionSpec,
    /// Until the lane took it.
    ask: Option<Change>,
    answer: oneshot::Receiver<avatar::Result<()>>,
}

impl Changing {
    fn begin(mut wish: Wish, spec: &SessionSpec) -> Changing {
        let mut then = spec.clone();
        if let Some((presenter, portrait)) = wish.face.take() {
            (then.presenter, then.portrait) = (presenter, portrait);
        }
        then.options.prompt = wish.prompt.take().or(then.options.prompt);
        let (reply, answer) = oneshot::channel();
        let ask = Change { portrait: then.portrait.clone(), options: then.options.clone(), reply };
        Changing { wish, then, ask: Some(ask), answer }
    }
}

/// What the engine says to the change that is on its way; nothing while there is none.
async fn changed(change: &mut Option<Changing>) -> Result<(), ChangeError> {
    match change {
        Some(change) => match (&mut change.answer).await {
            Ok(answer) => answer.map_err(ChangeError::Refused),
            Err(_) => Err(ChangeError::Overtaken),
        },
        None => std::future::pending().await,
    }
}

type Opening = Pin<Box<dyn Future<Output = Result<Lane, EngineError>> + Send>>;

/// The engine's side of a conversation.
enum Face {
    Opening(Opening),
    Open(Lane),
    Over,
}

enum Step {
    Opened(Result<Lane, EngineError>),
    Said(Option<LaneEvent>),
}

impl Face {
    async fn step(&mut self) -> Step {
        match self {
            Face::Opening(opening) => Step::Opened(opening.await),
            Face::Open(lane) => Step::Said(lane.output.recv().await),
            Face::Over => std::future::pending().await,
        }
    }
}

impl Step {
    fn apply(self, face: &mut Face, conversation: &mut Conversation) {
        let now = clock();
        let failed = match self {
            Step::Opened(Ok(lane)) => {
                *face = Face::Open(lane);
                match conversation.opened(now) {
                    Ok(()) => return,
                    Err(error) => Reason::CodecFailed(error.to_string()),
                }
            }
            Step::Opened(Err(EngineError::Open(AvatarError::Portrait(why)))) => Reason::PortraitRefused(why),
            Step::Opened(Err(error)) => Reason::EngineFailed(error.to_string()),
            Step::Said(Some(LaneEvent::Block(block))) => return conversation.block(block, now),
            Step::Said(Some(LaneEvent::Failed(why))) => Reason::EngineFailed(why),
            Step::Said(Some(LaneEvent::Finished)) => Reason::EngineFailed("it ended the stream by itself".into()),
            Step::Said(None) => Reason::EngineFailed("it was stopped".into()),
        };
        *face = Face::Over;
        conversation.order(Input::Close(failed), now);
    }
}
