//! What the log says of the bus: a line when it goes, one when it is back, and at most one a minute between. Pure: time is
//! an argument.

use std::time::{Duration, Instant};

/// Between two lines about a bus that stays away, or that complains.
const PAUSE: Duration = Duration::from_secs(60);

/// Whether the bus is away, and what was said of it.
#[derive(Debug)]
pub(super) struct Outage {
    away: Option<Instant>,
    told: Option<Instant>,
    /// The kind of the newest failure, and why, as far as is known.
    kind: Option<String>,
    why: Option<String>,
}

impl Outage {
    /// Before the first connection.
    pub(super) fn new(now: Instant) -> Outage {
        Outage { away: Some(now), told: None, kind: None, why: None }
    }

    /// The bus is away. Returns whether that is to be said: once, until it is back.
    pub(super) fn gone(&mut self, now: Instant) -> bool {
        let first = self.away.is_none();
        if first {
            (self.away, self.told) = (Some(now), Some(now));
        }
        first
    }

    /// It could not be connected to; what exactly was wrong is known with the next try.
    pub(super) fn failed(&mut self, kind: String) {
        self.kind = Some(kind);
    }

    /// It is tried anew after what was wrong; empty where only the kind is known. Returns what is to be said.
    pub(super) fn retry(&mut self, wrong: String, now: Instant) -> Option<String> {
        let kind = self.kind.take();
        let why = if wrong.is_empty() { kind? } else { wrong };
        self.why = Some(why.clone());
        self.complains(now).then_some(why)
    }

    /// It complains. Returns whether that is to be said.
    pub(super) fn complains(&mut self, now: Instant) -> bool {
        let say = self.told.is_none_or(|told| now.saturating_duration_since(told) >= PAUSE);
        if say {
            self.told = Some(now);
        }
        say
    }

    /// It is there. Returns for how long it was away, unless that is known.
    pub(super) fn back(&mut self, now: Instant) -> Option<Duration> {
        (self.kind, self.why) = (None, None);
        self.away.take().map(|since| now.saturating_duration_since(since))
    }

    /// For how long it has been away, and why, as far as is known.
    pub(super) fn state(&self, now: Instant) -> (Option<Duration>, Option<String>) {
        (self.away.map(|since| now.saturating_duration_since(since)), self.why.clone())
    }
}

/// What to do about a failed connection, for the errors that settings cause.
pub(super) fn advice(error: &str) -> &'static str {
    let error = error.to_ascii_lowercase();
    let about = |words: &[&str]| words.iter().any(|word| error.contains(word));
    if about(&["certificate", "unknownissuer", "unknown ca"]) {
        ". Is cluster.tls_ca the authority that signed the NATS server's certificate, does that hold for this address, and \
         does the server ask for cluster.tls_cert?"
    } else if about(&["invalidcontenttype", "corrupt message"]) {
        ". The NATS server does not speak TLS, which cluster.tls_ca and cluster.tls_cert want"
    } else if about(&["authorization", "authentication"]) {
        ". NATS wants another cluster.user and cluster.password, cluster.token or cluster.credentials_file"
    } else {
        ""
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_when_it_goes_one_a_minute_and_one_when_it_is_back() {
        let t0 = Instant::now();
        let at = |s: u64| t0 + Duration::from_secs(s);
        let mut outage = Outage::new(t0);
        outage.failed("IO error".into());
        assert_eq!(outage.retry("refused".into(), at(0)), Some("refused".into()), "the first reason is told at once");
        assert_eq!(outage.retry("refused".into(), at(1)), None);
        assert_eq!((outage.back(at(2)), outage.back(at(2))), (Some(Duration::from_secs(2)), None), "once");
        assert_eq!(outage.state(at(3)), (None, None));

        assert!(outage.gone(at(100)));
        let mut tried = |s: u64| {
            outage.failed("DNS error".into());
            outage.gone(at(s)) || outage.retry(String::new(), at(s)).is_some()
        };
        assert_eq!((101..281).filter(|s| tried(*s)).collect::<Vec<_>>(), [160, 220, 280]);
        assert_eq!(outage.state(at(110)), (Some(Duration::from_secs(10)), Some("DNS error".into())));
        assert_eq!(outage.back(at(281)), Some(Duration::from_secs(181)));
        assert!(outage.gone(at(282)) && !outage.gone(at(283)), "the next time is told again");
    }
}
