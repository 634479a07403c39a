//! One process in the cluster: asks others, answers them, and finds places.

use super::{
    BEAT,
    config::Config,
    id::NodeId,
    outage::Outage,
    seal::{Broken, For, Numbers, Seal, Taken},
    table::{Place, Standing, Table},
    wire::{self, Ask, Beat, Facts, Letter, Reply, State, Subjects},
};
use crate::telemetry::metrics;
use async_nats::{Client, Message, client::RequestErrorKind, connection};
use bytes::Bytes;
use futures::future::{BoxFuture, join_all};
use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::{Notify, Semaphore, oneshot};

/// Asks that are answered at once.
const ANSWERED: usize = 256;
/// Nodes asked for one place before the caller is told that there is none.
const TRIES: usize = 8;
/// How long an asker may take to say that it got what it asked for.
const CLAIMED: Duration = Duration::from_secs(10);
/// How often a question that waits looks whether it is worth waiting.
const LOOK: Duration = Duration::from_millis(250);
/// What a message has besides a body.
const OVERHEAD: usize = 64 * 1024;

/// What a node is for: the service itself.
pub trait Local: Send + Sync + 'static {
    /// State, places, places taken, and what its pictures are like.
    fn report(&self) -> (State, usize, usize, Facts);
    /// How many sessions those callers have here whose sessions are counted.
    fn held(&self) -> Vec<(String, usize)>;
    /// Answers a request that another node let in, as if it had come here.
    fn answer(self: Arc<Self>, ask: Ask) -> BoxFuture<'static, Reply>;
    /// Ends what an [`Ask`] with `claim` began, unless somebody uses it.
    fn undo(&self, reply: &Reply);
}

/// Why there is no cluster.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("cluster.credentials_file = \"{file}\" cannot be used: {source}")]
    Credentials { file: String, source: std::io::Error },
    #[error("the connection to NATS cannot be set up: {0}")]
    Options(String),
}

/// Why a node did not answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    #[error("the bus cannot be reached")]
    Unreachable,
    #[error("the node has left or is dead")]
    Gone,
    #[error("the node cannot be reached just now")]
    Absent,
    #[error("the node did not answer in time")]
    Late,
    #[error("the request is larger than the {0} bytes that a message may have")]
    TooLarge(usize),
    #[error("every place of every node is taken")]
    Full,
    #[error("the caller has as many sessions as it may, all nodes together")]
    TooMany,
    #[error("nobody is there who makes pictures")]
    Nobody,
}

/// How the connection to the bus is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bus {
    pub reachable: bool,
    /// For how long it has been away.
    pub away: Option<Duration>,
    /// Why, as far as is known.
    pub why: Option<String>,
}

/// This process.
pub struct Node {
    pub(super) config: Config,
    id: NodeId,
    pub(super) seal: Seal,
    pub(super) subjects: Subjects,
    pub(super) client: OnceLock<Client>,
    pub(super) local: Mutex<Option<Arc<dyn Local>>>,
    /// Where this node's HTTP is.
    pub(super) address: OnceLock<String>,
    pub(super) table: Mutex<Table>,
    pub(super) outage: Mutex<Outage>,
    numbers: Mutex<Numbers>,
    claims: Mutex<HashMap<u128, oneshot::Sender<()>>>,
    places: Arc<Semaphore>,
    /// How it is has changed: say so now.
    pub(super) changed: Notify,
    /// Time of the newest beat.
    beaten: AtomicU64,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Node {
    /// A node that is nowhere yet: [`Node::run`] connects it.
    pub fn new(config: Config) -> Arc<Node> {
        Arc::new(Node {
            id: NodeId::random(),
            seal: Seal::new(&config.name, &config.secret),
            subjects: Subjects::new(&config),
            client: OnceLock::new(),
            local: Mutex::default(),
            address: OnceLock::new(),
            table: Mutex::default(),
            outage: Mutex::new(Outage::new(Instant::now())),
            numbers: Mutex::default(),
            claims: Mutex::default(),
            places: Arc::new(Semaphore::new(ANSWERED)),
            changed: Notify::new(),
            beaten: AtomicU64::new(0),
            config,
        })
    }

    fn local(&self) -> Option<Arc<dyn Local>> {
        lock(&self.local).clone()
    }

    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Where clients reach the cluster; empty where they are.
    pub fn public_url(&self) -> &str {
        self.config.public_url.trim_end_matches('/')
    }

    /// How this node is has changed: the others are told at once, not at the next beat.
    pub fn changed(&self) {
        self.changed.notify_one();
    }

    /// Whether others can be asked: the bus is there, and brings us our own beats.
    pub fn reachable(&self) -> bool {
        let connected = self.client.get().is_some_and(|c| c.connection_state() == connection::State::Connected);
        let standing = lock(&self.table).standing(self.id, Instant::now());
        connected && standing != Standing::Dead && lock(&self.table).is_listening()
    }

    /// How the bus is, for whoever runs the service.
    pub fn bus(&self) -> Bus {
        let (away, why) = lock(&self.outage).state(Instant::now());
        Bus { reachable: self.reachable(), away, why }
    }

    /// Every node that is remembered, the dead of the last two minutes too, in the order of their ids.
    pub fn known(&self) -> Vec<(Place, Standing)> {
        let (table, now) = (lock(&self.table), Instant::now());
        let mut all: Vec<_> = table.all().map(|p| (p.clone(), table.standing(p.beat.node, now))).collect();
        all.sort_by_key(|(place, _)| place.beat.node);
        all
    }

    /// Where things with this node in their id are.
    pub fn standing(&self, id: NodeId) -> Standing {
        lock(&self.table).standing(id, Instant::now())
    }

    /// The living nodes.
    pub fn nodes(&self) -> Vec<Place> {
        lock(&self.table).alive(Instant::now()).cloned().collect()
    }

    /// Where a living node's HTTP is.
    pub fn address_of(&self, id: NodeId) -> Option<String> {
        let table = lock(&self.table);
        table.get(id).map(|place| place.beat.address.clone()).filter(|address| !address.is_empty())
    }

    /// Whether a node is at this address: what it says of its visitors is believed.
    pub fn is_node(&self, ip: IpAddr) -> bool {
        lock(&self.table).alive(Instant::now()).any(|place| place.ip == Some(ip))
    }

    /// What workers' pictures are like, from any of them.
    pub fn facts(&self) -> Option<Facts> {
        let table = lock(&self.table);
        table.alive(Instant::now()).find(|place| place.beat.slots > 0).map(|place| place.beat.facts.clone())
    }

    /// Asks one node.
    ///
    /// # Errors
    /// Why there is no answer. After [`Unanswered::Late`] the request may still have been served.
    pub async fn ask(&self, id: NodeId, ask: Ask, patience: Duration) -> Result<Reply, Unanswered> {
        let answer = self.ask_as(id, ask, patience).await;
        metrics().cluster_ask(match &answer {
            Ok(_) => "answered",
            Err(Unanswered::Unreachable) => "unreachable",
            Err(Unanswered::Late) => "late",
            Err(_) => "absent",
        });
        answer
    }

    async fn ask_as(&self, id: NodeId, mut ask: Ask, patience: Duration) -> Result<Reply, Unanswered> {
        if id == self.id {
            let local = self.local().ok_or(Unanswered::Absent)?;
            ask.claim = false;
            return Ok(local.answer(ask).await);
        }
        let client = self.client.get().filter(|_| self.reachable()).ok_or(Unanswered::Unreachable)?;
        let most = client.max_payload().saturating_sub(OVERHEAD);
        if ask.body.len() > most {
            return Err(Unanswered::TooLarge(most));
        }
        let body = std::mem::take(&mut ask.body);
        let claim = ask.claim;
        ask.patience_ms = patience.as_millis() as u64;
        let letter = wire::write(&Letter::Ask(ask), &body).map_err(|_| Unanswered::Absent)?;
        let (number, to) = (rand::random(), self.subjects.of(id));
        let sealed = self.seal.close(For::Node(id), now_ms(), number, &letter);
        let request = async_nats::Request::new().payload(sealed).timeout(Some(patience));
        let answer = client.send_request(to, request);
        let message = tokio::select! {
            answer = answer => answer.map_err(|e| match e.kind() {
                RequestErrorKind::TimedOut => Unanswered::Late,
                _ if self.standing(id) == Standing::Dead => Unanswered::Gone,
                _ => Unanswered::Absent,
            })?,
            why = self.lost(id) => return Err(why),
        };
        let opened = self.seal.open(For::Question(number), now_ms(), message.payload);
        let (_, payload) = opened.map_err(|why| self.complain("an answer", &why)).map_err(|()| Unanswered::Late)?;
        let (mut reply, body) = wire::read::<Reply>(payload).ok_or(Unanswered::Late)?;
        reply.body = body;
        if claim && reply.status == 201 {
            // Lost, it is missed after a while, and what was begun ends if nobody uses it.
            self.send(id, &Letter::Got(number)).await;
        }
        Ok(reply)
    }

    /// Waits until there is no answer to be expected from a node.
    async fn lost(&self, id: NodeId) -> Unanswered {
        loop {
            tokio::time::sleep(LOOK).await;
            if !self.reachable() {
                return Unanswered::Unreachable;
            }
            if self.standing(id) == Standing::Dead {
                return Unanswered::Gone;
            }
        }
    }

    async fn send(&self, id: NodeId, letter: &Letter) {
        if let (Some(client), Ok(letter)) = (self.client.get(), wire::write(letter, b"")) {
            let sealed = self.seal.close(For::Node(id), now_ms(), rand::random(), &letter);
            if let Err(e) = client.publish(self.subjects.of(id), sealed).await {
                tracing::debug!("a message to a node could not be sent: {e}");
            }
        }
    }

    /// Asks everybody who lives and makes pictures; whoever does not answer in time is left out.
    pub async fn everybody(&self, ask: &Ask, patience: Duration) -> Vec<Reply> {
        let others = self.nodes().into_iter().filter(|p| p.beat.slots > 0 && p.beat.node != self.id);
        let asked = others.map(|place| self.ask(place.beat.node, ask.clone(), patience));
        join_all(asked).await.into_iter().flatten().collect()
    }

    /// How many sessions a caller has at other nodes, as far as they were heard of.
    pub fn held_elsewhere(&self, who: &str) -> usize {
        lock(&self.table).held(self.seal.who(who), Some(self.id), Instant::now())
    }

    /// Has something new begun wherever there is room, for a caller who may have so many sessions in the whole cluster. A
    /// 503 that comes back is the last refusal.
    ///
    /// # Errors
    /// Why nobody could be asked.
    pub async fn place(
        &self,
        mut ask: Ask,
        patience: Duration,
        caller: Option<&(String, usize)>,
    ) -> Result<Reply, Unanswered> {
        let local = self.local().ok_or(Unanswered::Nobody)?;
        let own = local.report().1 > 0;
        if !self.reachable() {
            // Alone: what we have ourselves is all there is.
            return if own { Ok(local.answer(ask).await) } else { Err(Unanswered::Unreachable) };
        }
        ask.claim = true;
        let until = Instant::now() + patience;
        let counted = caller.map(|(name, most)| (self.seal.who(name), *most));
        let (mut tried, mut last) = (Vec::new(), None);
        while tried.len() < TRIES {
            let now = Instant::now();
            let id = {
                let mut table = lock(&self.table);
                if counted.is_some_and(|(who, most)| table.held(who, None, now) >= most) {
                    return Err(Unanswered::TooMany);
                }
                let Some(id) = table.choose(&tried, now, &mut rand::rng()) else { break };
                if let Some((who, _)) = counted {
                    table.asked(id, who);
                }
                id
            };
            tried.push(id);
            let answer = self.ask(id, ask.clone(), until.saturating_duration_since(now)).await;
            // One that is late may have begun it.
            if let Some((who, _)) = counted
                && !matches!(&answer, Ok(Reply { status: 201, .. }) | Err(Unanswered::Late))
            {
                lock(&self.table).denied(id, who);
            }
            match answer {
                Ok(reply) if reply.status == 503 => last = Some(reply),
                Ok(reply) => {
                    if reply.status == 201 {
                        lock(&self.table).placed(id);
                        metrics().cluster_placement(if id == self.id { "own" } else { "other" });
                    }
                    return Ok(reply);
                }
                // Not asked elsewhere: it may have been served, and somebody waits for it.
                Err(why @ (Unanswered::Late | Unanswered::TooLarge(_))) => return Err(why),
                Err(Unanswered::Unreachable) if own => return Ok(local.answer(ask).await),
                Err(Unanswered::Unreachable) => return Err(Unanswered::Unreachable),
                Err(_) => {}
            }
            lock(&self.table).refused(id);
        }
        // Before our first beat is back we are not in the table ourselves.
        if own && self.standing(self.id) == Standing::Unknown {
            return Ok(local.answer(ask).await);
        }
        metrics().cluster_placement("nobody");
        last.ok_or_else(|| match self.nodes().iter().any(|p| p.beat.slots > 0 && p.beat.state == State::Ready) {
            true => Unanswered::Full,
            false => Unanswered::Nobody,
        })
    }

    /// Answers a message to this node.
    pub(super) fn hear(self: &Arc<Self>, message: Message) {
        let now = now_ms();
        let (number, payload) = match self.seal.open(For::Node(self.id), now, message.payload) {
            Ok(opened) => opened,
            Err(why) => return self.complain("a message to this node", &why),
        };
        let taken = lock(&self.numbers).take(number, now);
        if taken == Taken::Again {
            metrics().cluster_message("again");
            return tracing::warn!("a message of the bus was said twice; somebody repeats what they overheard");
        }
        let Some((letter, body)) = wire::read::<Letter>(payload) else {
            return tracing::warn!("a message of the bus was not understood: a node of another version?");
        };
        let mut ask = match letter {
            Letter::Got(asked) => {
                if let Some(claim) = lock(&self.claims).remove(&asked) {
                    let _ = claim.send(());
                }
                return;
            }
            Letter::Ask(ask) => ask,
        };
        let Some(reply_to) = message.reply else { return };
        ask.body = body;
        let place = self.places.clone().try_acquire_owned().ok().filter(|_| taken == Taken::New);
        let node = self.clone();
        tokio::spawn(async move {
            let (Some(local), claim) = (node.local(), ask.claim) else { return };
            let reply = match &place {
                Some(_) => {
                    let patience = Duration::from_millis(ask.patience_ms);
                    // Whoever asked is not there any more; the handler is dropped, as when a client leaves.
                    let Ok(reply) = tokio::time::timeout(patience, local.clone().answer(ask)).await else { return };
                    reply
                }
                None => busy(),
            };
            let sealed = wire::write(&reply, &reply.body)
                .map(|r| node.seal.close(For::Question(number), now_ms(), rand::random(), &r));
            let claimed = (claim && reply.status == 201).then(|| node.claim(number));
            let Some(client) = node.client.get() else { return };
            let sent = match sealed {
                Ok(sealed) => client.publish(reply_to, sealed).await.map_err(|e| e.to_string()),
                Err(e) => Err(e.to_string()),
            };
            if let Err(e) = sent {
                tracing::warn!("an answer to another node could not be sent: {e}");
            }
            drop(place);
            if let Some(claimed) = claimed {
                if !matches!(tokio::time::timeout(CLAIMED, claimed).await, Ok(Ok(()))) {
                    lock(&node.claims).remove(&number);
                    tracing::warn!(
                        "a session was begun for another node, which never got to know; it ends unless it is used"
                    );
                    local.undo(&reply);
                }
            }
        });
    }

    /// Waits until no ask is being answered.
    pub(super) async fn answered(&self) {
        let _ = self.places.acquire_many(ANSWERED as u32).await;
    }

    fn claim(&self, number: u128) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        lock(&self.claims).insert(number, sender);
        receiver
    }

    /// Takes a beat.
    pub(super) fn hear_beat(&self, message: Message) {
        let opened = self.seal.open(For::Everybody, now_ms(), message.payload);
        let beat = match opened.map(|(_, payload)| wire::read::<Beat>(payload)) {
            Ok(Some((beat, _))) => beat,
            Ok(None) => return tracing::warn!("a beat was not understood: a node of another version?"),
            Err(why) => return self.complain("a beat", &why),
        };
        let (id, left) = (beat.node, beat.state == State::Left);
        let now = Instant::now();
        let mut table = lock(&self.table);
        if id == self.id && !table.is_listening() {
            table.listens(Some(now));
            self.back(now);
        }
        let known = table.standing(id, now) == Standing::Alive;
        if table.heard(beat, now) {
            match (known, left) {
                (false, false) => tracing::info!(node = %id, "a node is there"),
                (true, true) => tracing::info!(node = %id, "a node has left"),
                _ => {}
            }
        }
    }

    fn complain(&self, what: &str, why: &Broken) {
        metrics().cluster_message("foreign");
        tracing::warn!("{what} is not believed: {why}");
    }

    /// Says how this node is.
    pub(super) async fn beat(&self, client: &Client, left: bool) {
        let Some(local) = self.local() else { return };
        let (state, slots, used, facts) = local.report();
        // Of two beats in one millisecond the second is the newer one all the same.
        let sent_ms = now_ms().max(self.beaten.load(Ordering::Relaxed) + 1);
        self.beaten.store(sent_ms, Ordering::Relaxed);
        let beat = Beat {
            node: self.id,
            sent_ms,
            state: if left { State::Left } else { state },
            slots,
            used,
            address: self.address.get().cloned().unwrap_or_default(),
            facts,
            version: env!("CARGO_PKG_VERSION").into(),
            held: local.held().into_iter().map(|(name, n)| (self.seal.who(&name), n)).collect(),
        };
        let Ok(payload) = wire::write(&beat, b"") else { return };
        let sealed = self.seal.close(For::Everybody, beat.sent_ms, rand::random(), &payload);
        let sent = tokio::time::timeout(BEAT, client.publish(self.subjects.beats.clone(), sealed)).await;
        if let Ok(Err(e)) = sent {
            tracing::debug!("a beat could not be sent: {e}");
        }
    }
}

fn busy() -> Reply {
    let body =
        r#"{"error":{"code":"busy","message":"This node answers as many others as it can. Try again in a moment."}}"#;
    Reply {
        status: 503,
        headers: vec![("content-type".into(), "application/json".into()), ("retry-after".into(), "1".into())],
        body: Bytes::from_static(body.as_bytes()),
    }
}
