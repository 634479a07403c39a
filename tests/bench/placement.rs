//! `cargo bench --bench placement [-- WORKERS SESSIONS FRONTS]`: where sessions go in a large cluster, simulated with the
//! very `cluster::Table` that nodes use. Time and chance are seeded, so that every run is the same.
//!
//! Every worker has places for as many sessions as make the whole 80 % full. Fronts know what beats told them, which are
//! a second apart and up to 50 ms late; sessions arrive over 100 s at random fronts and stay. A worker that is asked and
//! has no room refuses, and the next is asked, as in `cluster::Node::place`. Then a tenth of the workers dies, and their
//! sessions come again within five seconds. Prints what one choice takes, how many asks one session takes, and how even the
//! load is. Fails if a session finds no place while there is one, or if the fullest worker has over twice the mean.

use loquent::cluster::{BEAT, Beat, NodeId, State, Table};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// As `cluster::Node::place`.
const TRIES: usize = 8;

struct Worker {
    id: NodeId,
    used: usize,
    alive: bool,
    /// When in each second it beats.
    phase: Duration,
}

struct World {
    workers: Vec<Worker>,
    index: HashMap<NodeId, usize>,
    fronts: Vec<Table>,
    places: usize,
    random: ChaCha8Rng,
    begin: Instant,
    chosen: Vec<Duration>,
    asks: Vec<usize>,
    lost: usize,
}

impl World {
    fn beats(&mut self, now: Duration) {
        for worker in self.workers.iter().filter(|w| w.alive) {
            // All beats of this step of 50 ms are heard at its end.
            let since = (now.as_millis() as u64 + 1000 - worker.phase.as_millis() as u64) % BEAT.as_millis() as u64;
            if since >= 50 {
                continue;
            }
            let beat = Beat {
                node: worker.id,
                sent_ms: 1 + now.as_millis() as u64,
                state: State::Ready,
                slots: self.places,
                used: worker.used,
                ..Beat::default()
            };
            for front in &mut self.fronts {
                front.heard(beat.clone(), self.begin + now);
            }
        }
    }

    fn place(&mut self, now: Duration) {
        let front = self.random.random_range(0..self.fronts.len());
        let mut tried = Vec::new();
        while tried.len() < TRIES {
            let began = Instant::now();
            let Some(id) = self.fronts[front].choose(&tried, self.begin + now, &mut self.random) else { break };
            self.chosen.push(began.elapsed());
            tried.push(id);
            let worker = &mut self.workers[self.index[&id]];
            if worker.alive && worker.used < self.places {
                worker.used += 1;
                self.fronts[front].placed(id);
                self.asks.push(tried.len());
                return;
            }
            self.fronts[front].refused(id);
        }
        self.lost += 1;
    }

    fn report(&mut self, what: &str) -> f64 {
        let used: Vec<usize> = self.workers.iter().filter(|w| w.alive).map(|w| w.used).collect();
        let all: usize = used.iter().sum();
        let mean = all as f64 / used.len() as f64;
        let (max, min) = (used.iter().max().copied().unwrap_or(0), used.iter().min().copied().unwrap_or(0));
        let spread = (used.iter().map(|u| (*u as f64 - mean).powi(2)).sum::<f64>() / used.len() as f64).sqrt();
        self.chosen.sort();
        let at = |p: f64| self.chosen[((self.chosen.len() - 1) as f64 * p) as usize].as_nanos() as f64 / 1e3;
        let asks = self.asks.iter().sum::<usize>() as f64 / self.asks.len() as f64;
        println!(
            "{what}: {} workers, {all} sessions, a choice p50 {:.1} µs, p99 {:.1} µs, longest {:.1} µs; asks for a session \
             {asks:.3}, most {}; load mean {mean:.2}, most {max}, least {min}, most/mean {:.3}, standard deviation {spread:.2}; \
             without a place {}",
            used.len(),
            at(0.5),
            at(0.99),
            at(1.0),
            self.asks.iter().max().copied().unwrap_or(0),
            max as f64 / mean,
            self.lost
        );
        self.chosen.clear();
        self.asks.clear();
        max as f64 / mean
    }
}

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let get = |i: usize, default: usize| numbers.get(i).copied().unwrap_or(default);
    let (workers, sessions, fronts) = (get(0, 1000), get(1, 10_000), get(2, 20));
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let workers: Vec<Worker> = (0..workers)
        .map(|n| Worker {
            id: NodeId::from_bits(n as u64 + 1),
            used: 0,
            alive: true,
            phase: Duration::from_millis(random.random_range(0..20) * 50),
        })
        .collect();
    let index = workers.iter().enumerate().map(|(n, w)| (w.id, n)).collect();
    let places = (sessions as f64 / workers.len() as f64 / 0.8).ceil() as usize;
    let begin = Instant::now();
    let fronts = (0..fronts).map(|_| Table::default()).collect();
    let mut world =
        World { workers, index, fronts, places, random, begin, chosen: Vec::new(), asks: Vec::new(), lost: 0 };
    let step = Duration::from_millis(50);
    let mut now = Duration::ZERO;
    for _ in 0..20 {
        world.beats(now);
        now += step;
    }
    let (steps, mut begun) = (2000, 0);
    for n in 1..=steps {
        world.beats(now);
        while begun < sessions * n / steps {
            world.place(now);
            begun += 1;
        }
        now += step;
    }
    let first = world.report("all at their places");
    let dying = world.workers.len() / 10;
    let mut again = 0;
    for worker in &mut world.workers[..dying] {
        worker.alive = false;
        again += worker.used;
    }
    for n in 1..=100 {
        world.beats(now);
        for _ in again * (n - 1) / 100..again * n / 100 {
            world.place(now);
        }
        now += step;
    }
    let then = world.report("a tenth died, its sessions came again");
    assert_eq!(world.lost, 0, "sessions without a place while there were some");
    assert!(first < 2.0 && then < 2.0, "the fullest has over twice the mean");
}
