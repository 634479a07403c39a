//! Who in the room is the agent we speak for, and whether it is there. Pure.

use livekit_protocol::{
    DisconnectReason, ParticipantInfo,
    participant_info::{Kind, State},
};
use std::time::{Duration, Instant};

/// The attribute of participants that publish for somebody else; these are no speakers of their own.
const ON_BEHALF: &str = "lk.publish_on_behalf";

/// See the module.
pub(super) struct Agent {
    /// The identity that was asked for, or that of the first agent seen.
    identity: Option<String>,
    ours: String,
    sid: Option<String>,
    absent_since: Instant,
    /// It said goodbye, and will not be back.
    left: bool,
}

impl Agent {
    /// `wanted`: its identity if somebody said; else the first agent in the room that publishes for itself is it.
    pub(super) fn new(wanted: Option<String>, ours: &str, now: Instant) -> Agent {
        Agent { identity: wanted, ours: ours.into(), sid: None, absent_since: now, left: false }
    }

    /// Somebody is there, has changed or has gone.
    pub(super) fn update(&mut self, info: &ParticipantInfo, now: Instant) {
        if info.identity == self.ours || info.identity.is_empty() {
            return;
        }
        let gone = info.state == i32::from(State::Disconnected);
        match &self.identity {
            Some(identity) if *identity != info.identity => {}
            Some(_) if gone => {
                // News of an older visit of the same identity does not matter.
                if self.sid.as_ref() == Some(&info.sid) {
                    self.sid = None;
                    self.absent_since = now;
                    self.left = [
                        DisconnectReason::ClientInitiated,
                        DisconnectReason::ParticipantRemoved,
                        DisconnectReason::RoomDeleted,
                        DisconnectReason::RoomClosed,
                    ]
                    .iter()
                    .any(|reason| i32::from(*reason) == info.disconnect_reason);
                }
            }
            None if gone || info.kind != i32::from(Kind::Agent) || info.attributes.contains_key(ON_BEHALF) => {}
            Some(_) | None => {
                self.identity = Some(info.identity.clone());
                self.sid = Some(info.sid.clone());
                self.left = false;
            }
        }
    }

    /// Whether anybody is there has to be told anew.
    pub(super) fn unseen(&mut self, now: Instant) {
        if self.sid.take().is_some() {
            self.absent_since = now;
        }
    }

    /// Its identity while it is there.
    pub(super) fn present(&self) -> Option<&str> {
        self.identity.as_deref().filter(|_| self.sid.is_some())
    }

    pub(super) fn is(&self, identity: &str) -> bool {
        !identity.is_empty() && self.identity.as_deref() == Some(identity)
    }

    /// When to stop waiting for it; `None` while it is there.
    pub(super) fn deadline(&self, patience: Duration) -> Option<Instant> {
        let patience = if self.left { Duration::ZERO } else { patience };
        self.sid.is_none().then(|| self.absent_since + patience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn somebody(identity: &str, kind: Kind, state: State) -> ParticipantInfo {
        ParticipantInfo {
            identity: identity.into(),
            sid: format!("PA_{identity}"),
            kind: kind.into(),
            state: state.into(),
            ..ParticipantInfo::default()
        }
    }

    #[test]
    fn the_first_agent_that_speaks_for_itself_is_it() {
        let t = Instant::now();
        let mut agent = Agent::new(None, "avatar", t);
        agent.update(&somebody("avatar", Kind::Agent, State::Active), t);
        agent.update(&somebody("human", Kind::Standard, State::Active), t);
        let mut other = somebody("other-avatar", Kind::Agent, State::Active);
        other.attributes.insert(ON_BEHALF.into(), "agent".into());
        agent.update(&other, t);
        assert_eq!(agent.present(), None);
        assert_eq!(agent.deadline(Duration::from_secs(9)), Some(t + Duration::from_secs(9)));
        agent.update(&somebody("agent", Kind::Agent, State::Active), t);
        agent.update(&somebody("second", Kind::Agent, State::Active), t);
        assert_eq!((agent.present(), agent.deadline(Duration::ZERO)), (Some("agent"), None));
        assert!(agent.is("agent") && !agent.is("second") && !agent.is(""));
    }

    #[test]
    fn an_agent_that_lost_its_way_is_waited_for_and_one_that_left_is_not() {
        let t = Instant::now();
        let patience = Duration::from_secs(20);
        let mut agent = Agent::new(Some("agent".into()), "avatar", t);
        agent.update(&somebody("someone", Kind::Agent, State::Active), t);
        assert_eq!(agent.present(), None);
        agent.update(&somebody("agent", Kind::Standard, State::Joining), t);
        assert_eq!(agent.present(), Some("agent"));
        let mut gone = somebody("agent", Kind::Standard, State::Disconnected);
        agent.update(&ParticipantInfo { sid: "PA_older".into(), ..gone.clone() }, t);
        assert_eq!(agent.present(), Some("agent"));
        agent.update(&gone, t);
        assert_eq!(agent.deadline(patience), Some(t + patience));
        agent.update(&somebody("agent", Kind::Standard, State::Active), t);
        assert_eq!(agent.deadline(patience), None);
        agent.unseen(t);
        assert_eq!((agent.present(), agent.deadline(patience)), (None, Some(t + patience)));
        agent.update(&somebody("agent", Kind::Standard, State::Active), t);
        gone.disconnect_reason = DisconnectReason::ClientInitiated.into();
        agent.update(&gone, t);
        assert_eq!(agent.deadline(patience), Some(t));
    }
}
