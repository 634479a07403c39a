//! A bad network between two UDP peers on this machine, for tests: loss, delay, a bottleneck with a queue, blackouts.
//!
//! `link --to PORT [--seed N]` listens on a free port of 127.0.0.1, prints it as `port N`, and carries datagrams between
//! whoever speaks to that port and `127.0.0.1:PORT`. It obeys lines on standard input and ends when that is closed:
//!
//! ```text
//! down loss=5 delay=20 rate=700 queue=300     server → client: per cent, ms, kbit/s, ms (rate 0 = unlimited)
//! up loss=5 delay=20
//! dark 2000                                    drop everything for 2 s
//! stats                                        answers one JSON line of counters
//! ```
//!
//! A datagram's departure is decided when it arrives: a full queue drops it, else it waits for the bottleneck to be
//! free and travels its delay. Order is kept. Loss is drawn from a seeded generator.

use std::{
    collections::VecDeque,
    io::{BufRead, Write},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::{Duration, Instant},
};

/// IPv4 and UDP headers, which a bottleneck carries too.
const HEADERS: usize = 28;
/// Datagrams held in one direction; far above any queue a test asks for.
const MOST_HELD: usize = 20_000;

struct Direction {
    loss: f64,
    delay: Duration,
    /// Bits per second; 0 = unlimited.
    rate: f64,
    queue: Duration,
    dark_until: Option<Instant>,
    busy_until: Instant,
    random: u64,
    held: VecDeque<(Instant, Vec<u8>)>,
    closed: bool,
    passed: u64,
    lost: u64,
    overflowed: u64,
    bytes: u64,
}

type Shared = Arc<(Mutex<Direction>, Condvar)>;

fn direction(seed: u64) -> Shared {
    let direction = Direction {
        loss: 0.0,
        delay: Duration::ZERO,
        rate: 0.0,
        queue: Duration::from_millis(300),
        dark_until: None,
        busy_until: Instant::now(),
        random: seed | 1,
        held: VecDeque::new(),
        closed: false,
        passed: 0,
        lost: 0,
        overflowed: 0,
        bytes: 0,
    };
    Arc::new((Mutex::new(direction), Condvar::new()))
}

impl Direction {
    /// xorshift64*: enough to draw losses.
    fn draw(&mut self) -> f64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn take(&mut self, datagram: &[u8], now: Instant) {
        let dark = self.dark_until.is_some_and(|until| now < until);
        if self.draw() * 100.0 < self.loss || dark {
            self.lost += 1;
            return;
        }
        let mut leaves = now;
        if self.rate > 0.0 {
            let free = self.busy_until.max(now);
            if free - now > self.queue || self.held.len() >= MOST_HELD {
                self.overflowed += 1;
                return;
            }
            self.busy_until = free + Duration::from_secs_f64((datagram.len() + HEADERS) as f64 * 8.0 / self.rate);
            leaves = self.busy_until;
        }
        // A delay that was lowered meanwhile must not reorder.
        let arrives = (leaves + self.delay).max(self.held.back().map_or(now, |h| h.0));
        self.held.push_back((arrives, datagram.to_vec()));
        self.passed += 1;
        self.bytes += datagram.len() as u64;
    }
}

fn receive(socket: UdpSocket, shared: Shared, learn: Option<Arc<Mutex<Option<SocketAddr>>>>) {
    let mut buffer = [0; 65_536];
    loop {
        // A port nobody listens on any more answers with an error; that is no reason to stop.
        let Ok((n, from)) = socket.recv_from(&mut buffer) else {
            thread::sleep(Duration::from_millis(1));
            continue;
        };
        if let Some(learn) = &learn {
            *learn.lock().unwrap() = Some(from);
        }
        let (direction, woken) = &*shared;
        direction.lock().unwrap().take(&buffer[..n], Instant::now());
        woken.notify_one();
    }
}

fn send(shared: Shared, deliver: impl Fn(&[u8])) {
    let (direction, woken) = &*shared;
    let mut held = direction.lock().unwrap();
    while !held.closed {
        let now = Instant::now();
        match held.held.front().map(|(at, _)| *at) {
            Some(at) if at <= now => {
                let Some((_, datagram)) = held.held.pop_front() else { continue };
                drop(held);
                deliver(&datagram);
                held = direction.lock().unwrap();
            }
            Some(at) => held = woken.wait_timeout(held, at - now).unwrap().0,
            None => held = woken.wait(held).unwrap(),
        }
    }
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) {
    thread::Builder::new().name(name.into()).spawn(work).expect("a thread can be started");
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let value =
        |name: &str| args.iter().position(|a| a == name).and_then(|i| args.get(i + 1)).and_then(|v| v.parse().ok());
    let Some(to) = value("--to") else {
        eprintln!("usage: link --to PORT [--seed N]");
        std::process::exit(2);
    };
    let seed = value("--seed").unwrap_or(1u64);
    let server = SocketAddr::from((Ipv4Addr::LOCALHOST, to as u16));
    let near = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a UDP port on 127.0.0.1");
    let far = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a UDP port on 127.0.0.1");
    println!("port {}", near.local_addr().expect("bound").port());
    std::io::stdout().flush().ok();

    let client = Arc::new(Mutex::new(None));
    let (up, down) = (direction(seed.wrapping_mul(0x9E37_79B9)), direction(seed.wrapping_mul(0x85EB_CA6B)));
    {
        let (socket, shared, learn) = (near.try_clone().expect("socket"), up.clone(), client.clone());
        start("up-in", move || receive(socket, shared, Some(learn)));
        let (socket, shared) = (far.try_clone().expect("socket"), down.clone());
        start("down-in", move || receive(socket, shared, None));
        let (shared, socket) = (up.clone(), far);
        start("up-out", move || send(shared, |d| drop(socket.send_to(d, server))));
        let (shared, socket) = (down.clone(), near);
        start("down-out", move || {
            send(shared, |d| {
                let to: Option<SocketAddr> = *client.lock().unwrap();
                if let Some(to) = to {
                    drop(socket.send_to(d, to));
                }
            });
        });
    }
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        let mut words = line.split_whitespace();
        match words.next() {
            Some(way @ ("up" | "down")) => {
                let mut direction = if way == "up" { &up } else { &down }.0.lock().unwrap();
                for (key, number) in
                    words.filter_map(|w| w.split_once('=')).filter_map(|(k, v)| Some((k, v.parse().ok()?)))
                {
                    let number: f64 = number;
                    match key {
                        "loss" => direction.loss = number,
                        "delay" => direction.delay = Duration::from_secs_f64(number / 1000.0),
                        "rate" => direction.rate = number * 1000.0,
                        "queue" => direction.queue = Duration::from_secs_f64(number / 1000.0),
                        _ => eprintln!("link: no such property: {key}"),
                    }
                }
            }
            Some("dark") => {
                let ms = words.next().and_then(|w| w.parse().ok()).unwrap_or(1000);
                for direction in [&up, &down] {
                    direction.0.lock().unwrap().dark_until = Some(Instant::now() + Duration::from_millis(ms));
                }
            }
            Some("stats") => {
                let count = |shared: &Shared| {
                    let d = shared.0.lock().unwrap();
                    format!(
                        "{{\"passed\":{},\"lost\":{},\"overflowed\":{},\"bytes\":{},\"held\":{}}}",
                        d.passed,
                        d.lost,
                        d.overflowed,
                        d.bytes,
                        d.held.len()
                    )
                };
                println!("{{\"up\":{},\"down\":{}}}", count(&up), count(&down));
                std::io::stdout().flush().ok();
            }
            _ => eprintln!("link: not understood: {line}"),
        }
    }
}
