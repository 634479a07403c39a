//! Ties ingest, playout, ladder and machine together: events in, [`Effect`]s out, `now` always an argument. Owns all
//! that changes in one conversation; ending it is dropping it. `play` sends on what is due, `measure` tells how it goes.

mod measure;
mod play;

use super::{
    Config, EncodedAudio, Ingest, Input, Job, Ladder, Line, LinkEvent, Machine, Made, Metrics, Output, Picture,
    Playout, Reason, SessionEvent, SpeechQueue, State, ledger::Ledger, stage::Stage,
};
use crate::{
    codec::{CodecError, VoiceEncoder, picture::cover},
    media::{AudioBlock, Epoch, Frame, FrameBlock, Geometry, I420, MediaTime, Portrait, SPEECH_RATE},
};
use measure::smooth;
use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

/// What is to be done outside.
#[derive(Debug)]
pub enum Effect {
    /// Send this voice packet; its media time is due at the instant.
    Voice(EncodedAudio, Instant),
    /// The next picture is to be a keyframe.
    Keyframe,
    /// Encode and send this picture.
    Show(Job),
    /// What waits to be encoded is of the past.
    Discard,
    /// Tell the page.
    Message(String),
    /// Tell whoever listens.
    Tell(SessionEvent),
    Entered(State),
    /// A block came; for whoever follows its way.
    Made(Made),
    /// The end.
    Close(Reason),
}

/// The longest time between two looks at the clock while a presenter is up.
const TICK: Duration = Duration::from_millis(10);
/// Speech handed to the engine at a time: 20 ms.
const HANDFUL: usize = 320;
/// Blocks the engine may have in hand: one running, one ready. What it has in hand cannot be skipped any more, and on
/// a slow engine takes several times its own length.
const IN_HAND_BLOCKS: i64 = 2;
/// When blocks come later than this share of the longest delay, only one is in hand and one waits, so that what is made
/// is of the present and can still be shown.
const LATE: f64 = 0.7;
/// Messages of the page longer than this are not read.
const LONGEST_MESSAGE: usize = 4096;
/// Time constant of averages, in blocks.
const SMOOTH: f64 = 0.1;

/// See the module.
pub struct Conversation {
    config: Config,
    geometry: Geometry,
    machine: Machine,
    ladder: Ladder,
    voice: VoiceEncoder,
    stage: Option<Stage>,
    speech: Arc<SpeechQueue>,
    hosted: bool,
    /// Interruptions of `speech` that were carried out.
    interrupts: u64,
    ledger: Ledger,
    line: Line,
    begun: Instant,
    portrait: Option<I420>,
    last_picture: Option<Frame>,
    last_at: MediaTime,
    want_keyframe: bool,
    keyframe_allowed: Instant,
    draining_until: Option<MediaTime>,
    effects: VecDeque<Effect>,
    next: Instant,
    metrics: Metrics,
    /// Held, skipped by playout before anyone listened.
    before: (u64, u64),
    congested: u64,
    /// Samples of speech the engine never got because it was too slow.
    unheard: u64,
    /// What bounds the engine's blocks a second, smoothed, milliseconds.
    pace_ms: f64,
    measured: Instant,
    /// Pictures that left for the viewer, as of the next [`Conversation::measure`].
    left: Option<u64>,
}

impl Conversation {
    /// A conversation of one peer, over when the peer is. `speech` is where others put what it is to say.
    pub fn new(
        config: &Config,
        geometry: &Geometry,
        portrait: &Portrait,
        speech: Arc<SpeechQueue>,
        now: Instant,
    ) -> Result<Self, CodecError> {
        let ladder = Ladder::new(geometry, config);
        Ok(Conversation {
            machine: Machine::new(config, now),
            voice: VoiceEncoder::new(config.voice_bitrate, config.voice_loss_percent)?,
            stage: None,
            hosted: false,
            interrupts: speech.interrupts(),
            speech,
            ledger: Ledger::default(),
            line: Line::default(),
            begun: now,
            // Only a courtesy until the presenter moves: what cannot be shown here the engine will judge.
            portrait: cover(portrait, geometry.width, geometry.height).ok(),
            last_picture: None,
            last_at: MediaTime::from_ticks(-1),
            want_keyframe: false,
            keyframe_allowed: now,
            draining_until: None,
            effects: VecDeque::new(),
            next: now,
            metrics: Metrics { nominal_fps: ladder.fps(), ..Metrics::default() },
            before: (0, 0),
            congested: 0,
            unheard: 0,
            pace_ms: 0.0,
            measured: now,
            left: None,
            config: config.clone(),
            geometry: geometry.clone(),
            ladder,
        })
    }

    /// Without a peer of its own: it begins at once, and peers come and go.
    pub fn hosted(mut self, now: Instant) -> Self {
        self.machine = Machine::hosted(&self.config, now);
        self.hosted = true;
        self
    }

    pub fn state(&self) -> State {
        self.machine.state()
    }

    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The engine's lane is open: the timeline begins, with as much silence as the first block needs.
    pub fn opened(&mut self, now: Instant) -> Result<(), CodecError> {
        if self.stage.is_some() {
            return Ok(());
        }
        let span = self.geometry.frame_span();
        let ahead = self.geometry.block_span(0) + self.geometry.look_ahead + MediaTime::from_millis(10);
        // An `Instant` cannot lie before its own zero (a machine that just started).
        let (begun, lead) = match now.checked_sub(ahead.as_duration()) {
            Some(begun) => (begun, ahead.as_duration()),
            None => (now, Duration::ZERO),
        };
        // Pictures shown so far had the times since the beginning; the timeline goes on from there, on the grid.
        let elapsed = self.elapsed(now).units(self.geometry.fps) + 2;
        let origin = MediaTime::from_units(elapsed, self.geometry.fps);
        let ms = |ms: u32| Duration::from_millis(u64::from(ms));
        let expected = (ahead + self.geometry.block_span(1)).as_duration();
        let (margin, most) = (ms(self.config.playout_margin_ms), ms(self.config.playout_max_ms));
        self.stage = Some(Stage {
            ingest: Ingest::new(&self.config, origin, lead, now)?,
            playout: Playout::new(begun, origin, span, expected, margin, most),
            feed: VecDeque::new(),
            feed_at: origin,
            received: origin,
            late: false,
            patience: Stage::most_patience(&self.geometry),
            short: false,
            skips: Vec::new(),
            face_from: None,
            cut_at: None,
            origin,
            shown: false,
        });
        Ok(())
    }

    /// Something from the transport.
    pub fn link(&mut self, event: LinkEvent, now: Instant) {
        match event {
            LinkEvent::Connected => self.machine.handle(Input::LinkConnected, now),
            LinkEvent::Interrupted => self.machine.handle(Input::LinkInterrupted, now),
            LinkEvent::Closed(why) => self.machine.handle(Input::LinkClosed(why), now),
            LinkEvent::Speech(packet) => {
                let taking = !matches!(self.machine.state(), State::Draining | State::Closed);
                if let Some(stage) = self.stage.as_mut().filter(|_| taking) {
                    let waited = now.saturating_duration_since(packet.arrived).as_secs_f64() * 1e3;
                    // The filter to 16 kHz takes 5 ms more.
                    smooth(&mut self.metrics.ingest_ms, waited + 5.0, 0.02);
                    stage.ingest.packet(packet);
                }
            }
            LinkEvent::KeyframeRequested => self.want_keyframe = true,
            LinkEvent::TargetBitrate(bits) => {
                self.metrics.target_bitrate = bits;
                if !self.line.shared {
                    self.ladder.target(bits);
                }
            }
            LinkEvent::Message(text) => self.message(&text),
        }
    }

    /// An order from the service.
    pub fn order(&mut self, input: Input, now: Instant) {
        self.machine.handle(input, now);
    }

    fn message(&mut self, text: &str) {
        if text.len() > LONGEST_MESSAGE {
            return;
        }
        let Ok(message) = serde_json::from_str::<serde_json::Value>(text) else { return };
        match message.get("type").and_then(|t| t.as_str()) {
            Some("interrupt") => self.speech.interrupt(),
            Some("ping") => {
                let t = message.get("t").filter(|t| t.is_number()).cloned().unwrap_or_default();
                self.effects.push_back(Effect::Message(serde_json::json!({"type": "pong", "t": t}).to_string()));
            }
            // A newer page may say things we do not know.
            _ => {}
        }
    }

    /// A block from the engine.
    pub fn block(&mut self, mut block: FrameBlock, now: Instant) {
        let Some(stage) = &mut self.stage else { return };
        if block.epoch != self.machine.epoch() {
            self.metrics.blocks_stale += 1;
            return;
        }
        let span = self.geometry.block_span(block.index);
        if let Some(last) = block.frames.last() {
            stage.received = stage.received.max(last.at + self.geometry.frame_span());
        }
        for frame in &mut block.frames {
            frame.at = stage.media(frame.at);
        }
        if let (Some(first), Some(last)) = (block.frames.first(), block.frames.last()) {
            self.effects.push_back(Effect::Made(Made {
                index: block.index,
                from: first.at,
                until: last.at + self.geometry.frame_span(),
                heard: stage.playout.bare(first.at),
                features: block.stages.features,
                generation: block.stages.generation,
                decode: block.stages.decode,
                arrived: now,
            }));
        }
        let needed = stage.playout.block(block.frames, now);
        let bound = f64::from(self.config.playout_max_ms) / 1e3 * LATE;
        stage.came(&self.geometry);
        stage.late = needed.as_secs_f64() > if stage.late { bound * 0.6 } else { bound };
        let lag = needed.saturating_sub((span + self.geometry.look_ahead).as_duration()).as_secs_f64() * 1e3;
        let m = &mut self.metrics;
        m.blocks += 1;
        m.lag_ms = lag;
        if m.blocks > 2 {
            m.worst_lag_ms = m.worst_lag_ms.max(lag);
        }
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        smooth(&mut m.features_ms, ms(block.stages.features), SMOOTH);
        smooth(&mut m.generation_ms, ms(block.stages.generation), SMOOTH);
        smooth(&mut m.decode_ms, ms(block.stages.decode), SMOOTH);
        let way = block.stages.features + block.stages.generation + block.stages.decode;
        smooth(&mut self.pace_ms, ms(block.stages.busiest.unwrap_or(way)), SMOOTH);
        self.machine.handle(Input::Prepared, now);
    }

    /// What belongs to an older one is of no use any more.
    pub fn epoch(&self) -> Epoch {
        self.machine.epoch()
    }

    /// Speech for the engine's lane, 20 ms at a time.
    pub fn next_speech(&mut self) -> Option<AudioBlock> {
        let stage = self.stage.as_mut()?;
        if !stage.reached_face() {
            return None;
        }
        let longest = self.geometry.block_span(0).max(self.geometry.block_span(1));
        let blocks = if stage.late { 1 } else { IN_HAND_BLOCKS };
        // 40 ms more, for the filters an engine may have.
        let most =
            self.geometry.look_ahead + MediaTime::from_ticks(longest.ticks() * blocks) + MediaTime::from_millis(40);
        if stage.feed_at - stage.received >= most {
            return None;
        }
        if stage.feed.is_empty() {
            // It keeps up.
            stage.patience = Stage::most_patience(&self.geometry);
            return None;
        }
        let n = stage.feed.len().min(HANDFUL);
        let block = AudioBlock { at: stage.feed_at, samples: stage.feed.drain(..n).collect() };
        stage.feed_at = block.end();
        Some(block)
    }

    /// The engine has changed the face; the speech that [`Conversation::next_speech`] gives next is the new one's.
    pub fn face_changed(&mut self, now: Instant) {
        let (making, span, fps) = (self.making(), self.geometry.frame_span(), self.geometry.fps);
        if let Some(stage) = &mut self.stage {
            stage.change_face(making, span, fps, now);
        }
    }

    /// How long a block takes to make, as measured.
    fn making(&self) -> Duration {
        let m = &self.metrics;
        Duration::from_secs_f64((m.features_ms + m.generation_ms + m.decode_ms) / 1e3)
    }

    /// The lane was full: the last handful comes back.
    pub fn unread(&mut self, block: AudioBlock) {
        let Some(stage) = &mut self.stage else { return };
        if block.end() == stage.feed_at {
            stage.feed_at = block.at;
            for s in block.samples.into_iter().rev() {
                stage.feed.push_front(s);
            }
        }
    }

    /// Brings everything to `now`; take the effects afterwards. `line` is what the sinks' lines allow.
    pub fn advance(&mut self, line: Line, now: Instant) -> Result<(), CodecError> {
        let before = self.flowing();
        self.line = line;
        if !before && self.flowing() {
            self.begin_showing(now);
        }
        match line.target {
            _ if line.shared => self.ladder.unbound(),
            Some(bits) => self.ladder.target(bits),
            None => {}
        }
        self.ladder.settle(now);
        self.cut(now);
        self.hear(now)?;
        self.decide(now);
        self.play(now)?;
        self.decide(now);
        Ok(())
    }

    pub fn effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When [`Conversation::advance`] must be called at the latest.
    pub fn deadline(&self, now: Instant) -> Instant {
        match &self.stage {
            Some(stage) => self.next.min(stage.playout.deadline()).min(now + TICK),
            None => self.next,
        }
    }

    fn elapsed(&self, now: Instant) -> MediaTime {
        MediaTime::from_duration(now.saturating_duration_since(self.begun))
    }

    /// Somebody is there to be sent something.
    fn flowing(&self) -> bool {
        if self.hosted { self.line.sinks > 0 } else { self.machine.flowing() || self.line.watched > 0 }
    }

    /// Carries out an interruption before anything newer is heard.
    fn cut(&mut self, now: Instant) {
        let interrupts = self.speech.interrupts();
        if interrupts != self.interrupts {
            self.interrupts = interrupts;
            self.cut_off();
            self.machine.handle(Input::Interrupt, now);
            self.decide(now);
        }
    }

    /// Tells how far every segment came that will not be played further.
    fn cut_off(&mut self) {
        let until = self.stage.as_ref().map_or(MediaTime::ZERO, |s| s.playout.voice_at());
        let (dropped, complete) = self.speech.over();
        complete.iter().for_each(|segment| self.ledger.complete(*segment));
        let events = self.ledger.interrupt(until, &dropped);
        self.effects.extend(events.into_iter().map(Effect::Tell));
    }

    fn hear(&mut self, now: Instant) -> Result<(), CodecError> {
        let Some(stage) = &mut self.stage else { return Ok(()) };
        let heard = stage.ingest.advance(&self.speech, now)?;
        heard.said.iter().for_each(|(segment, from, to)| self.ledger.said(*segment, *from, *to));
        self.speech.over().1.iter().for_each(|segment| self.ledger.complete(*segment));
        stage.playout.voice(&heard.voice);
        stage.feed.extend(&heard.speech.samples);
        self.unheard += stage.keep_up(&self.geometry) as u64;
        self.metrics.blocks_skipped = self.unheard / self.geometry.block_span(1).units(SPEECH_RATE).max(1) as u64;
        let speaking = stage.ingest.speaking() || self.ledger.busy();
        if speaking != (self.machine.state() == State::Speaking) {
            self.machine.handle(Input::Voice(speaking), now);
        }
        Ok(())
    }

    fn decide(&mut self, now: Instant) {
        if let (Some(until), Some(stage)) = (self.draining_until, &self.stage)
            && stage.playout.played(until)
        {
            self.draining_until = None;
            self.machine.handle(Input::Drained, now);
        }
        loop {
            match self.machine.poll(now) {
                Output::Wait(at) => {
                    self.next = at;
                    return;
                }
                Output::Entered(state) => {
                    let text = serde_json::json!({"type": "state", "state": state.label()}).to_string();
                    self.effects.push_back(Effect::Message(text));
                    self.effects.push_back(Effect::Tell(SessionEvent::State(state)));
                    self.effects.push_back(Effect::Entered(state));
                }
                Output::Show => {
                    self.begin_showing(now);
                    self.want_keyframe = true;
                    self.keyframe_allowed = now;
                    if !self.stage.as_ref().is_some_and(|s| s.shown) {
                        self.show_portrait(now);
                    } else if let Some(frame) = self.last_picture.clone() {
                        // The next one is due within a frame's time, but a black screen is never worth it.
                        self.show(Picture::Rgb(frame), self.last_at, now, now);
                    }
                }
                Output::Hide => {}
                Output::Raise(_) => {
                    let (making, span, fps) = (self.making(), self.geometry.frame_span(), self.geometry.fps);
                    if let Some(stage) = &mut self.stage {
                        stage.begin_anew(making, span, fps, now);
                    }
                    self.effects.push_back(Effect::Discard);
                }
                Output::BeginDraining => {
                    self.speech.close();
                    let head = self.stage.as_ref().map(|s| s.ingest.head());
                    self.draining_until = Some(head.unwrap_or_default());
                }
                Output::Close(reason) => {
                    self.speech.close();
                    self.cut_off();
                    let text = serde_json::json!({
                        "type": "closed",
                        "reason": reason.label(),
                        "message": reason.message(),
                    });
                    self.effects.push_back(Effect::Message(text.to_string()));
                    self.effects.push_back(Effect::Tell(SessionEvent::Closed(reason.clone())));
                    self.effects.push_back(Effect::Close(reason));
                }
            }
        }
    }
}
