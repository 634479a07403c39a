//! Who is there, as one node knows it, and where something new goes. Pure: time and chance are arguments.
//!
//! Two random nodes with room are looked at and the freer one is asked ("the power of two choices", Mitzenmacher 2001):
//! almost as even as asking the freest of all, and, unlike that, without everybody running to the same one between two
//! beats. What was placed since a node's last beat is counted here until the next one.

use super::{
    DEAD,
    id::NodeId,
    wire::{Beat, State},
};
use rand::{Rng, RngExt};
use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

/// Nodes that are kept.
const MOST: usize = 4096;
/// A dead node is remembered so long: longer than any of its messages is believed.
const FORGOTTEN: Duration = Duration::from_secs(120);

/// What was heard of one node.
#[derive(Clone, Debug)]
pub struct Place {
    pub beat: Beat,
    pub heard: Instant,
    /// Where its HTTP is, when that is an address and no name.
    pub ip: Option<IpAddr>,
    /// Placed there since its last beat, or all of it when it refused.
    extra: usize,
    /// For whom something was asked of it since its last beat.
    asked: Vec<u64>,
}

impl Place {
    fn new(beat: Beat, heard: Instant) -> Place {
        let host = url::Url::parse(&beat.address).ok().and_then(|url| url.host().map(|host| host.to_owned()));
        let ip = match host {
            Some(url::Host::Ipv4(ip)) => Some(ip.into()),
            Some(url::Host::Ipv6(ip)) => Some(ip.into()),
            _ => None,
        };
        Place { beat, heard, ip, extra: 0, asked: Vec::new() }
    }

    fn free(&self) -> usize {
        self.beat.slots.saturating_sub(self.beat.used.saturating_add(self.extra))
    }

    fn alive(&self, now: Instant) -> bool {
        self.beat.state != State::Left && now.saturating_duration_since(self.heard) <= DEAD
    }
}

/// Whether a node can be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    Alive,
    /// It left, or was not heard for three beats.
    Dead,
    /// Not heard of, but we have not listened for long either.
    Unknown,
}

/// All nodes.
#[derive(Debug, Default)]
pub struct Table {
    nodes: HashMap<NodeId, Place>,
    /// For choosing at random.
    order: Vec<NodeId>,
    /// Since when beats can be heard.
    listening: Option<Instant>,
}

impl Table {
    /// The bus is there (again), or gone: silence while it is gone says nothing about anybody.
    pub fn listens(&mut self, since: Option<Instant>) {
        self.listening = since;
    }

    /// Whether the bus is there.
    pub fn is_listening(&self) -> bool {
        self.listening.is_some()
    }

    /// Takes a beat; false for one that is not newer than the last, or of one node too many.
    pub fn heard(&mut self, beat: Beat, now: Instant) -> bool {
        if let Some(place) = self.nodes.get_mut(&beat.node) {
            let newer = beat.sent_ms > place.beat.sent_ms;
            if newer {
                *place = Place::new(beat, now);
            }
            return newer;
        }
        if self.nodes.len() >= MOST {
            self.forget(now);
        }
        let room = self.nodes.len() < MOST;
        if room {
            self.order.push(beat.node);
            self.nodes.insert(beat.node, Place::new(beat, now));
        }
        room
    }

    /// Lets go of those that have been dead for long; says which died since they were last looked at.
    pub fn forget(&mut self, now: Instant) {
        self.nodes.retain(|_, place| now.saturating_duration_since(place.heard) < FORGOTTEN);
        self.order.retain(|id| self.nodes.contains_key(id));
    }

    pub fn standing(&self, id: NodeId, now: Instant) -> Standing {
        let Some(since) = self.listening else { return Standing::Unknown };
        let listened = now.saturating_duration_since(since) > DEAD;
        match self.nodes.get(&id) {
            Some(place) if place.alive(now) => Standing::Alive,
            Some(place) if place.beat.state == State::Left => Standing::Dead,
            _ if listened => Standing::Dead,
            _ => Standing::Unknown,
        }
    }

    /// The living, in no particular order.
    pub fn alive(&self, now: Instant) -> impl Iterator<Item = &Place> {
        self.nodes.values().filter(move |place| place.alive(now))
    }

    /// Those that are remembered, the dead too.
    pub fn all(&self) -> impl Iterator<Item = &Place> {
        self.nodes.values()
    }

    pub fn get(&self, id: NodeId) -> Option<&Place> {
        self.nodes.get(&id)
    }

    /// Whom to ask for a place: the freer (by share of its places) of two random ready nodes with room that were not
    /// `tried`.
    pub fn choose(&self, tried: &[NodeId], now: Instant, random: &mut impl Rng) -> Option<NodeId> {
        let with_room = |id: &&NodeId| {
            self.nodes.get(id).is_some_and(|p| p.beat.state == State::Ready && p.free() > 0 && p.alive(now))
                && !tried.contains(id)
        };
        // Most of the time two draws find two; only a nearly full cluster is searched.
        let mut draw = || {
            for _ in 0..8 {
                let id = &self.order[random.random_range(0..self.order.len())];
                if with_room(&id) {
                    return Some(*id);
                }
            }
            let all: Vec<NodeId> = self.order.iter().filter(with_room).copied().collect();
            (!all.is_empty()).then(|| all[random.random_range(0..all.len())])
        };
        if self.order.is_empty() {
            return None;
        }
        let (a, mut b) = (draw()?, draw()?);
        // Two of few nodes are the same more often than is good for the balance.
        for _ in 0..4 {
            b = if a == b { draw()? } else { b };
        }
        let share = |id: NodeId| self.nodes.get(&id).map_or(0.0, |p| p.free() as f64 / p.beat.slots as f64);
        Some(if share(b) > share(a) { b } else { a })
    }

    /// How many sessions a caller has at living nodes, as they said, and as was asked of them since; `but` one.
    pub fn held(&self, who: u64, but: Option<NodeId>, now: Instant) -> usize {
        let at = |place: &Place| {
            let said = place.beat.held.iter().filter(|held| held.0 == who).map(|held| held.1).sum::<usize>();
            said + place.asked.iter().filter(|asked| **asked == who).count()
        };
        self.alive(now).filter(|place| Some(place.beat.node) != but).map(at).sum()
    }

    /// A session for this caller is being asked of it.
    pub fn asked(&mut self, id: NodeId, who: u64) {
        if let Some(place) = self.nodes.get_mut(&id) {
            place.asked.push(who);
        }
    }

    /// It was not begun.
    pub fn denied(&mut self, id: NodeId, who: u64) {
        if let Some(place) = self.nodes.get_mut(&id)
            && let Some(at) = place.asked.iter().position(|asked| *asked == who)
        {
            place.asked.swap_remove(at);
        }
    }

    /// Something was placed there.
    pub fn placed(&mut self, id: NodeId) {
        if let Some(place) = self.nodes.get_mut(&id) {
            place.extra += 1;
        }
    }

    /// It had no room, or was not there: not asked again before its next beat.
    pub fn refused(&mut self, id: NodeId) {
        if let Some(place) = self.nodes.get_mut(&id) {
            place.extra = usize::MAX;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    fn beat(node: u64, used: usize, sent_ms: u64) -> Beat {
        Beat { node: NodeId::from_bits(node), slots: 10, used, sent_ms, ..Beat::default() }
    }

    fn secs(s: f64) -> Duration {
        Duration::from_secs_f64(s)
    }

    #[test]
    fn three_missed_beats_are_death_and_silence_of_the_bus_is_not() {
        let (mut table, t0) = (Table::default(), Instant::now());
        let id = NodeId::from_bits(1);
        assert_eq!(table.standing(id, t0), Standing::Unknown, "no bus");
        table.listens(Some(t0));
        assert_eq!(table.standing(id, t0 + secs(1.0)), Standing::Unknown, "it may not have spoken yet");
        assert_eq!(table.standing(id, t0 + secs(4.0)), Standing::Dead);
        assert!(table.heard(beat(1, 0, 1), t0 + secs(5.0)));
        assert!(!table.heard(beat(1, 5, 1), t0 + secs(6.0)), "an old beat said again");
        assert_eq!(table.standing(id, t0 + secs(8.4)), Standing::Alive);
        assert_eq!(table.standing(id, t0 + secs(8.6)), Standing::Dead);
        // The bus is gone for a while and comes back: everybody has three beats to be heard again.
        table.listens(None);
        assert_eq!(table.standing(id, t0 + secs(20.0)), Standing::Unknown);
        table.listens(Some(t0 + secs(21.0)));
        assert_eq!(table.standing(id, t0 + secs(22.0)), Standing::Unknown);
        assert!(table.heard(beat(1, 0, 2), t0 + secs(22.0)));
        assert_eq!(table.standing(id, t0 + secs(23.0)), Standing::Alive);
        // It says goodbye.
        assert!(table.heard(Beat { state: State::Left, ..beat(1, 0, 3) }, t0 + secs(23.0)));
        assert_eq!(table.standing(id, t0 + secs(23.0)), Standing::Dead);
        table.forget(t0 + secs(200.0));
        assert!(table.get(id).is_none());
    }

    #[test]
    fn the_freer_of_two_and_nobody_without_room() {
        let (mut table, t0) = (Table::default(), Instant::now());
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        assert_eq!(table.choose(&[], t0, &mut random), None);
        table.heard(beat(1, 9, 1), t0);
        table.heard(beat(2, 2, 1), t0);
        table.heard(Beat { state: State::Draining, ..beat(3, 0, 1) }, t0);
        table.heard(Beat { slots: 0, ..beat(4, 0, 1) }, t0);
        let (one, two) = (NodeId::from_bits(1), NodeId::from_bits(2));
        let asked: Vec<NodeId> = (0..100).filter_map(|_| table.choose(&[], t0, &mut random)).collect();
        let freer = asked.iter().filter(|id| **id == two).count();
        assert!(asked.iter().all(|id| [one, two].contains(id)) && freer > 90, "{freer} of 100");
        assert_eq!(table.choose(&[two], t0, &mut random), Some(one));
        table.placed(one);
        assert_eq!(table.choose(&[two], t0, &mut random), None, "its last place was taken since its beat");
        table.refused(two);
        assert_eq!(table.choose(&[], t0, &mut random), None);
        table.heard(beat(2, 3, 2), t0);
        assert_eq!(table.choose(&[], t0, &mut random), Some(two), "its next beat says that there is room");
        assert_eq!(table.choose(&[], t0 + secs(4.0), &mut random), None, "nobody was heard");
    }

    #[test]
    fn sessions_of_a_caller_are_counted_once_wherever_they_are() {
        let (mut table, t0) = (Table::default(), Instant::now());
        let (one, two) = (NodeId::from_bits(1), NodeId::from_bits(2));
        table.heard(Beat { held: vec![(7, 2), (8, 1)], ..beat(1, 3, 1) }, t0);
        table.heard(beat(2, 0, 1), t0);
        assert_eq!((table.held(7, None, t0), table.held(7, Some(one), t0), table.held(9, None, t0)), (2, 0, 0));
        [7, 8, 7].into_iter().for_each(|who| table.asked(two, who));
        table.denied(two, 7);
        assert_eq!((table.held(7, None, t0), table.held(8, None, t0)), (3, 2), "asked, and not yet heard of");
        table.heard(Beat { held: vec![(7, 1)], ..beat(2, 1, 2) }, t0);
        assert_eq!((table.held(7, None, t0), table.held(8, None, t0)), (3, 1), "its beat knows better");
        table.denied(two, 7);
        assert_eq!(table.held(7, None, t0), 3);
        assert_eq!(table.held(7, None, t0 + secs(4.0)), 0, "sessions of the dead are gone");
    }
}
