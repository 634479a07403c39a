//! One stay in a room: its signalling line, how alive that is, and the way back when it is lost.

use super::{Config, LivekitError, media::Media, signal::Signal, target::Target};
use futures::{FutureExt, future::BoxFuture};
use livekit_protocol::{DisconnectReason, JoinResponse, signal_request as ask, signal_response as told};
use std::time::{Duration, Instant};

/// Time between attempts to get the signalling back: the first at once, then ever longer up to this.
pub(super) const SLOWEST_RETRY: Duration = Duration::from_secs(5);

/// Opens the signalling and waits for the welcome.
pub(super) async fn enter(
    target: &Target,
    token: &str,
    config: &Config,
) -> Result<(Signal, JoinResponse), LivekitError> {
    match Signal::open(target, token, None, config).await? {
        (signal, told::Message::Join(join)) => Ok((signal, join)),
        (_, told::Message::Leave(leave)) => Err(LivekitError::Left(reason(leave.reason))),
        _ => Err(LivekitError::Left("it did not begin with a join answer".into())),
    }
}

pub(super) fn reason(number: i32) -> String {
    DisconnectReason::try_from(number).map_or_else(|_| format!("reason {number}"), |r| r.as_str_name().to_string())
}

/// How one stay in the room ended.
pub(super) enum Over {
    End(String),
    /// To be joined anew; `worked`: media flowed.
    Again {
        why: String,
        worked: bool,
    },
}

/// The signalling connection, or the way back to it.
pub(super) enum Line {
    Up(Box<Signal>),
    Resuming(BoxFuture<'static, Result<(Signal, told::Message), LivekitError>>),
}

pub(super) struct Pulse {
    pub(super) every: Duration,
    pub(super) patience: Duration,
    pub(super) next: Instant,
    pub(super) heard: Instant,
    pub(super) rtt_ms: i64,
}

/// One stay: from a join to whatever ends it, with any number of resumes.
pub(super) struct Stay {
    /// Our participant's sid.
    pub(super) me: String,
    pub(super) line: Line,
    pub(super) down_since: Option<Instant>,
    pub(super) attempts: u32,
    pub(super) pulse: Pulse,
    pub(super) begun: Instant,
    /// When to publish even though the server's channel is not open.
    pub(super) publish_at: Instant,
    /// The publisher's path is lost.
    pub(super) interrupted: bool,
}

impl Stay {
    /// The signalling is gone: media go on, and it is asked for again.
    pub(super) fn lost(&mut self, why: &str, (target, token, config): (Target, String, Config)) {
        tracing::info!(why, attempt = self.attempts, "the signalling connection is lost; resuming");
        self.down_since.get_or_insert_with(Instant::now);
        let pause = match self.attempts {
            0 => Duration::ZERO,
            n => (Duration::from_millis(300) * 2u32.pow(n.min(5) - 1)).min(SLOWEST_RETRY),
        };
        self.attempts += 1;
        let me = self.me.clone();
        let again = async move {
            tokio::time::sleep(pause).await;
            Signal::open(&target, &token, Some(&me), &config).await
        };
        self.line = Line::Resuming(again.boxed());
    }

    /// Sends if the line is up; what is sent into a line that breaks is told again by the resume.
    pub(super) async fn send(&mut self, message: ask::Message) {
        if let Line::Up(signal) = &mut self.line
            && let Err(error) = signal.send(message).await
        {
            tracing::debug!(error, "a signalling message was not sent");
        }
    }

    pub(super) async fn restart_ice(&mut self, media: &mut Media) -> Result<(), LivekitError> {
        if let Some(offer) = media.reoffer().await? {
            self.send(ask::Message::Offer(offer)).await;
        }
        Ok(())
    }

    pub(super) async fn ping(&mut self) {
        if let Line::Up(signal) = &mut self.line {
            // A broken line is seen when it is read.
            let _ = signal.ping(self.pulse.rtt_ms).await;
        }
    }
}

pub(super) enum Step {
    Heard(Result<told::Message, String>),
    Resumed(Result<(Signal, told::Message), LivekitError>),
}

impl Line {
    pub(super) async fn step(&mut self) -> Step {
        match self {
            Line::Up(signal) => Step::Heard(signal.next().await),
            Line::Resuming(again) => Step::Resumed(again.await),
        }
    }
}
