//! The life of one conversation, decided without a clock of its own: `handle(input, now)`, then `poll(now)` until it
//! answers [`Output::Wait`]. It carries no media.
//!
//! ```text
//! Connecting → Preparing → Idle ⇄ Speaking → Draining → Closed(Reason)
//! ```

use super::Config;
use crate::media::Epoch;
use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Where a conversation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    /// The transport is not up yet; the presenter is already being prepared.
    Connecting,
    /// The transport is up, the presenter has not moved yet.
    Preparing,
    /// The presenter listens.
    Idle,
    /// The presenter speaks.
    Speaking,
    /// Nothing new is taken; what was said is played to its end.
    Draining,
    Closed,
}

impl State {
    pub const ALL: [State; 6] =
        [State::Connecting, State::Preparing, State::Idle, State::Speaking, State::Draining, State::Closed];

    /// For the page, the log and the metric label.
    pub fn label(self) -> &'static str {
        match self {
            State::Connecting => "connecting",
            State::Preparing => "preparing",
            State::Idle => "idle",
            State::Speaking => "speaking",
            State::Draining => "draining",
            State::Closed => "closed",
        }
    }
}

/// Why a conversation ended. One enum for the log line, the metric label, the HTTP answer and the page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The viewer ended it.
    Stopped,
    /// The peer closed the transport.
    PeerLeft(String),
    /// The transport never came up.
    ConnectTimeout,
    /// The transport was interrupted and did not come back.
    ConnectionLost,
    /// The engine did not prepare the presenter in time.
    PrepareTimeout,
    /// The longest allowed session.
    SessionLimit,
    /// Nobody spoke for the longest allowed time.
    IdleLimit,
    /// The service is closing.
    ServiceClosing,
    /// The engine failed; the text is for the log.
    EngineFailed(String),
    /// The engine refused the portrait; the text is for the viewer.
    PortraitRefused(String),
    /// A codec failed beyond repair; the text is for the log.
    CodecFailed(String),
    /// The task that ran the conversation was dropped.
    Abandoned,
}

impl Reason {
    /// Every label, so that a metric can show zeros.
    pub const LABELS: [&'static str; 12] = [
        "stopped",
        "peer_left",
        "connect_timeout",
        "connection_lost",
        "prepare_timeout",
        "session_limit",
        "idle_limit",
        "service_closing",
        "engine_failed",
        "portrait_refused",
        "codec_failed",
        "abandoned",
    ];

    /// For logs, metric labels and the `reason` field on the wire.
    pub fn label(&self) -> &'static str {
        match self {
            Reason::Stopped => "stopped",
            Reason::PeerLeft(_) => "peer_left",
            Reason::ConnectTimeout => "connect_timeout",
            Reason::ConnectionLost => "connection_lost",
            Reason::PrepareTimeout => "prepare_timeout",
            Reason::SessionLimit => "session_limit",
            Reason::IdleLimit => "idle_limit",
            Reason::ServiceClosing => "service_closing",
            Reason::EngineFailed(_) => "engine_failed",
            Reason::PortraitRefused(_) => "portrait_refused",
            Reason::CodecFailed(_) => "codec_failed",
            Reason::Abandoned => "abandoned",
        }
    }

    /// A sentence for the page: what happened and what to do.
    pub fn message(&self) -> String {
        match self {
            Reason::Stopped => "The conversation has ended.".into(),
            Reason::PeerLeft(_) => "The connection was closed from your side.".into(),
            Reason::ConnectTimeout => {
                "No media connection came about: a firewall may be in the way. Try another network.".into()
            }
            Reason::ConnectionLost => "The connection was lost and did not come back. Press Start to try again.".into(),
            Reason::PrepareTimeout => "The presenter took too long to get ready. Press Start to try again.".into(),
            Reason::SessionLimit => {
                "The longest allowed conversation has been reached. Press Start to begin anew.".into()
            }
            Reason::IdleLimit => {
                "Nobody spoke for a long time, so the place was given free. Press Start to begin anew.".into()
            }
            Reason::ServiceClosing => "The service is being restarted. Press Start again in a minute.".into(),
            Reason::EngineFailed(_) => "The engine that draws the presenter failed. Try again in a minute.".into(),
            Reason::PortraitRefused(why) => format!("This picture cannot be used: {why}"),
            Reason::CodecFailed(_) => "Sound or picture could not be encoded. Press Start to try again.".into(),
            Reason::Abandoned => "The conversation was ended by the service. Press Start to try again.".into(),
        }
    }

    /// The detail that belongs in the log only.
    pub fn detail(&self) -> &str {
        match self {
            Reason::PeerLeft(s) | Reason::EngineFailed(s) | Reason::PortraitRefused(s) | Reason::CodecFailed(s) => s,
            _ => "",
        }
    }

    /// What an HTTP request about this session is answered with afterwards.
    pub fn status(&self) -> u16 {
        match self {
            Reason::PortraitRefused(_) => 422,
            Reason::EngineFailed(_) | Reason::ServiceClosing | Reason::PrepareTimeout => 503,
            Reason::CodecFailed(_) | Reason::Abandoned => 500,
            _ => 410,
        }
    }
}

/// What happened to a conversation.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    LinkConnected,
    LinkInterrupted,
    LinkClosed(String),
    /// The first generated picture is there.
    Prepared,
    /// Voice activity began or ended.
    Voice(bool),
    /// The viewer asks for silence now.
    Interrupt,
    /// End at once.
    Close(Reason),
    /// Take nothing new, play to the end, then close.
    Drain(Reason),
    /// Everything said was played.
    Drained,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// The state changed; tell the page.
    Entered(State),
    /// Media can flow (again): show a picture at once, as a keyframe.
    Show,
    /// Media cannot flow for now.
    Hide,
    /// Drop what is in flight; it belongs to an older epoch.
    Raise(Epoch),
    /// Take no more speech, play what there is, then say [`Input::Drained`].
    BeginDraining,
    /// The end.
    Close(Reason),
    /// Nothing to do; come back then, or at the next input.
    Wait(Instant),
}

/// See the module.
#[derive(Debug)]
pub struct Machine {
    state: State,
    limits: Limits,
    begun: Instant,
    entered: Instant,
    /// Lives without a peer of its own; peers come and go.
    hosted: bool,
    connected: bool,
    prepared: bool,
    voice: bool,
    interrupted_since: Option<Instant>,
    quiet_since: Instant,
    drain_reason: Option<Reason>,
    epoch: Epoch,
    outputs: VecDeque<Output>,
}

#[derive(Clone, Copy, Debug)]
struct Limits {
    connect: Duration,
    prepare: Duration,
    interrupted: Duration,
    drain: Duration,
    session: Option<Duration>,
    idle: Option<Duration>,
}

impl Machine {
    pub fn new(config: &Config, now: Instant) -> Self {
        // Ten years at most: beyond, an `Instant` could overflow.
        let seconds = |s: u64| Duration::from_secs(s.min(315_360_000));
        let unless_off = |s: u64| (s > 0).then(|| seconds(s));
        Machine {
            state: State::Connecting,
            limits: Limits {
                connect: seconds(config.connect_timeout_s),
                prepare: seconds(config.prepare_timeout_s),
                interrupted: seconds(config.interrupted_timeout_s),
                drain: seconds(config.drain_timeout_s),
                session: unless_off(config.max_session_s),
                idle: unless_off(config.idle_timeout_s),
            },
            begun: now,
            entered: now,
            hosted: false,
            connected: false,
            prepared: false,
            voice: false,
            interrupted_since: None,
            quiet_since: now,
            drain_reason: None,
            epoch: Epoch::default(),
            outputs: VecDeque::new(),
        }
    }

    /// A conversation that needs no peer: it prepares at once, and no peer's coming or going ends it.
    pub fn hosted(config: &Config, now: Instant) -> Self {
        let mut machine = Machine { hosted: true, connected: true, ..Machine::new(config, now) };
        machine.enter(State::Preparing, now);
        machine
    }

    pub fn state(&self) -> State {
        self.state
    }

    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether media can flow to the peer.
    pub fn flowing(&self) -> bool {
        self.connected && self.interrupted_since.is_none() && self.state != State::Closed
    }

    pub fn handle(&mut self, input: Input, now: Instant) {
        if self.state == State::Closed {
            return;
        }
        match input {
            // A peer that comes (back) needs a picture; its absence is no concern.
            Input::LinkConnected if self.hosted => self.outputs.push_back(Output::Show),
            Input::LinkInterrupted | Input::LinkClosed(_) if self.hosted => {}
            Input::LinkConnected => {
                let again = self.interrupted_since.take().is_some();
                if !self.connected || again {
                    self.connected = true;
                    self.outputs.push_back(Output::Show);
                }
                if self.state == State::Connecting {
                    self.quiet_since = now;
                    self.enter(if self.prepared { self.talking() } else { State::Preparing }, now);
                }
            }
            Input::LinkInterrupted => {
                if self.connected && self.interrupted_since.is_none() {
                    self.interrupted_since = Some(now);
                    self.outputs.push_back(Output::Hide);
                }
            }
            Input::LinkClosed(why) => {
                // A drain that loses its listener has done its work.
                let reason = self.drain_reason.take().unwrap_or(Reason::PeerLeft(why));
                self.close(reason, now);
            }
            Input::Prepared => {
                self.prepared = true;
                if self.state == State::Preparing {
                    self.enter(self.talking(), now);
                }
            }
            Input::Voice(on) => {
                self.voice = on;
                self.quiet_since = now;
                if matches!(self.state, State::Idle | State::Speaking) && self.state != self.talking() {
                    self.enter(self.talking(), now);
                }
            }
            Input::Interrupt => {
                if matches!(self.state, State::Idle | State::Speaking) {
                    self.epoch = self.epoch.next();
                    self.voice = false;
                    self.quiet_since = now;
                    self.outputs.push_back(Output::Raise(self.epoch));
                    if self.state == State::Speaking {
                        self.enter(State::Idle, now);
                    }
                }
            }
            Input::Close(reason) => self.close(reason, now),
            Input::Drain(reason) => match self.state {
                State::Draining => {}
                // Nobody has seen anything yet: nothing to play out.
                State::Connecting | State::Preparing => self.close(reason, now),
                _ => {
                    self.drain_reason = Some(reason);
                    self.enter(State::Draining, now);
                    self.outputs.push_back(Output::BeginDraining);
                }
            },
            Input::Drained => {
                if self.state == State::Draining {
                    let reason = self.drain_reason.take().unwrap_or(Reason::Stopped);
                    self.close(reason, now);
                }
            }
        }
    }

    /// The next thing to do; [`Output::Wait`] when there is nothing until then.
    pub fn poll(&mut self, now: Instant) -> Output {
        if let Some(output) = self.outputs.pop_front() {
            return output;
        }
        if self.state == State::Closed {
            return Output::Wait(now + Duration::from_secs(3600));
        }
        let mut next = now + Duration::from_secs(3600);
        let mut due: Option<(Instant, Reason)> = None;
        for (at, reason) in self.deadlines() {
            next = next.min(at);
            if at <= now && due.as_ref().is_none_or(|d| at < d.0) {
                due = Some((at, reason));
            }
        }
        match due {
            None => Output::Wait(next),
            Some((_, reason)) => {
                self.close(reason, now);
                self.outputs.pop_front().unwrap_or(Output::Wait(now))
            }
        }
    }

    /// What ends this state if nothing else does.
    fn deadlines(&self) -> Vec<(Instant, Reason)> {
        let mut all = Vec::with_capacity(4);
        match self.state {
            State::Connecting => all.push((self.entered + self.limits.connect, Reason::ConnectTimeout)),
            State::Preparing => all.push((self.entered + self.limits.prepare, Reason::PrepareTimeout)),
            State::Draining => {
                let reason = self.drain_reason.clone().unwrap_or(Reason::Stopped);
                all.push((self.entered + self.limits.drain, reason));
            }
            State::Idle => {
                if let Some(idle) = self.limits.idle {
                    all.push((self.quiet_since + idle, Reason::IdleLimit));
                }
            }
            State::Speaking | State::Closed => {}
        }
        if let Some(since) = self.interrupted_since {
            all.push((since + self.limits.interrupted, Reason::ConnectionLost));
        }
        if let Some(session) = self.limits.session
            && self.state != State::Draining
        {
            all.push((self.begun + session, Reason::SessionLimit));
        }
        all
    }

    fn talking(&self) -> State {
        if self.voice { State::Speaking } else { State::Idle }
    }

    fn enter(&mut self, state: State, now: Instant) {
        self.state = state;
        self.entered = now;
        self.outputs.push_back(Output::Entered(state));
    }

    fn close(&mut self, reason: Reason, now: Instant) {
        self.enter(State::Closed, now);
        self.outputs.push_back(Output::Close(reason));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(m: &mut Machine, now: Instant) -> Vec<Output> {
        let mut all = Vec::new();
        loop {
            match m.poll(now) {
                Output::Wait(_) => return all,
                o => all.push(o),
            }
        }
    }

    fn talking(config: &Config, t: Instant) -> Machine {
        let mut m = Machine::new(config, t);
        m.handle(Input::LinkConnected, t);
        assert_eq!(drain(&mut m, t), [Output::Show, Output::Entered(State::Preparing)]);
        m.handle(Input::Prepared, t);
        assert_eq!(drain(&mut m, t), [Output::Entered(State::Idle)]);
        m
    }

    #[test]
    fn a_whole_life() {
        let (t, s) = (Instant::now(), Duration::from_secs);
        let mut m = talking(&Config::default(), t);
        m.handle(Input::Voice(true), t + s(1));
        assert_eq!(drain(&mut m, t + s(1)), [Output::Entered(State::Speaking)]);
        m.handle(Input::Interrupt, t + s(2));
        assert_eq!(drain(&mut m, t + s(2)), [Output::Raise(Epoch(1)), Output::Entered(State::Idle)]);
        m.handle(Input::Drain(Reason::ServiceClosing), t + s(3));
        assert_eq!(drain(&mut m, t + s(3)), [Output::Entered(State::Draining), Output::BeginDraining]);
        m.handle(Input::Drained, t + s(4));
        let end = [Output::Entered(State::Closed), Output::Close(Reason::ServiceClosing)];
        assert_eq!(drain(&mut m, t + s(4)), end);
        m.handle(Input::LinkConnected, t + s(5));
        assert!(drain(&mut m, t + s(5)).is_empty(), "closed is closed");
    }

    #[test]
    fn prepared_before_connected_goes_straight_to_idle() {
        let t = Instant::now();
        let mut m = Machine::new(&Config::default(), t);
        m.handle(Input::Prepared, t);
        assert!(drain(&mut m, t).is_empty());
        m.handle(Input::LinkConnected, t);
        assert_eq!(drain(&mut m, t), [Output::Show, Output::Entered(State::Idle)]);
    }

    #[test]
    fn every_state_ends_by_itself() {
        let (t, ms) = (Instant::now(), Duration::from_millis(1));
        let config = Config { max_session_s: 100, idle_timeout_s: 10, ..Config::default() };
        let ends = |m: &mut Machine, at: Instant, reason: Reason| {
            assert!(drain(m, at - ms).is_empty(), "{reason:?} came too early");
            assert_eq!(drain(m, at), [Output::Entered(State::Closed), Output::Close(reason)]);
        };
        let s = Duration::from_secs;
        ends(&mut Machine::new(&config, t), t + s(config.connect_timeout_s), Reason::ConnectTimeout);
        let mut m = Machine::new(&config, t);
        m.handle(Input::LinkConnected, t);
        drain(&mut m, t);
        ends(&mut m, t + s(config.prepare_timeout_s), Reason::PrepareTimeout);
        ends(&mut talking(&config, t), t + s(10), Reason::IdleLimit);
        let mut m = talking(&config, t);
        m.handle(Input::Voice(true), t);
        drain(&mut m, t);
        ends(&mut m, t + s(100), Reason::SessionLimit);
        let mut m = talking(&config, t);
        m.handle(Input::Voice(true), t);
        m.handle(Input::LinkInterrupted, t + s(3));
        assert_eq!(drain(&mut m, t + s(3)), [Output::Entered(State::Speaking), Output::Hide]);
        assert!(!m.flowing());
        ends(&mut m, t + s(3 + config.interrupted_timeout_s), Reason::ConnectionLost);
        let mut m = talking(&config, t);
        m.handle(Input::Drain(Reason::Stopped), t);
        drain(&mut m, t);
        ends(&mut m, t + s(config.drain_timeout_s), Reason::Stopped);
    }

    #[test]
    fn an_interruption_that_heals_shows_again() {
        let (t, s) = (Instant::now(), Duration::from_secs);
        let mut m = talking(&Config::default(), t);
        m.handle(Input::LinkInterrupted, t);
        m.handle(Input::LinkConnected, t + s(5));
        assert_eq!(drain(&mut m, t + s(5)), [Output::Hide, Output::Show]);
        assert!(m.flowing());
        assert!(drain(&mut m, t + s(30)).is_empty());
    }

    #[test]
    fn labels_are_complete() {
        let all = [
            Reason::Stopped,
            Reason::PeerLeft(String::new()),
            Reason::ConnectTimeout,
            Reason::ConnectionLost,
            Reason::PrepareTimeout,
            Reason::SessionLimit,
            Reason::IdleLimit,
            Reason::ServiceClosing,
            Reason::EngineFailed(String::new()),
            Reason::PortraitRefused(String::new()),
            Reason::CodecFailed(String::new()),
            Reason::Abandoned,
        ];
        assert_eq!(all.each_ref().map(Reason::label), Reason::LABELS);
        assert!(all.iter().all(|r| r.message().ends_with(['.', ' ', ':']) && r.status() >= 400));
    }
}
