//! Who is talking now, and how those who left ended. Shared by the server (listing, closing, draining, metrics) and
//! the sessions (which enter, report and leave by being dropped).

use super::{
    Attachment, Fan, LinkEvent, LinkOut, Metrics, Reason, SessionEvent, SinkRole, SpeechPort, SpeechQueue, State,
};
use crate::{
    avatar::{AvatarError, Direction},
    codec::View,
    media::Portrait,
};
use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};
use tokio::sync::{Notify, broadcast, mpsc, oneshot, watch};

/// Events that a slow listener may be behind before it misses the oldest.
const EVENTS: usize = 256;

/// Names a session in URLs: 128 random bits as hex, not to be guessed.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(Arc<str>);

impl SessionId {
    pub fn random() -> Self {
        SessionId(format!("{:032x}", rand::random::<u128>()).into())
    }
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for SessionId {
    fn from(s: &str) -> Self {
        SessionId(s.into())
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whoever reads a log must not be able to end the session: the first 8 digits name it well enough.
        f.write_str(self.short())
    }
}

impl SessionId {
    /// Enough to find it in a log, too little to address it.
    pub fn short(&self) -> &str {
        self.0.get(..8).unwrap_or(&self.0)
    }
}

/// How a session is asked to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Close(Reason),
    Drain(Reason),
}

/// What is to be shown from now on, and where to say whether it is.
pub(super) struct Wish {
    pub(super) face: Option<(String, Portrait)>,
    pub(super) prompt: Option<String>,
    pub(super) reply: oneshot::Sender<Result<(), ChangeError>>,
}

/// Why a session shows what it showed before.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    #[error(transparent)]
    Refused(AvatarError),
    #[error("the session ended, or a newer change came first")]
    Overtaken,
}

struct Shared {
    id: SessionId,
    presenter: Mutex<String>,
    since: Instant,
    order: watch::Sender<Option<Order>>,
    /// Rouses the session's task.
    wake: Arc<Notify>,
    fan: Arc<Fan>,
    speech: Arc<SpeechQueue>,
    events: broadcast::Sender<SessionEvent>,
    /// A microphone that is to be heard from now on.
    microphone: Mutex<Option<mpsc::Receiver<LinkEvent>>>,
    wish: Mutex<Option<Wish>>,
    /// What the presenter is told to do, whichever it is.
    direction: Direction,
    now: Mutex<(State, Metrics, Option<Reason>)>,
}

/// One session as others see it.
#[derive(Clone, Debug)]
pub struct Snapshot {
    pub id: SessionId,
    pub presenter: String,
    pub state: State,
    pub since: Instant,
    pub metrics: Metrics,
}

/// Sums over sessions that are over and sessions that live.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Live sessions in each state (every state but `Closed`).
    pub by_state: Vec<(&'static str, usize)>,
    /// Ended sessions by reason, since the start.
    pub by_reason: Vec<(&'static str, u64)>,
    pub started: u64,
    pub blocks: u64,
    pub frames_sent: u64,
    pub frames_held: u64,
    pub frames_skipped: u64,
    pub lost_in: u64,
    pub lost_out: u64,
    pub sink_pictures_dropped: u64,
    pub sinks_slowed: u64,
    pub interruptions: u64,
}

#[derive(Default)]
struct Inner {
    live: BTreeMap<SessionId, Arc<Shared>>,
    ended: BTreeMap<&'static str, u64>,
    started: u64,
    past: Counts,
}

/// All sessions of the service. Cheap to clone.
#[derive(Clone)]
pub struct Registry {
    /// Name of what makes the pictures, for the mark in them.
    engine: &'static str,
    inner: Arc<Mutex<Inner>>,
    alive: Arc<watch::Sender<usize>>,
}

impl Default for Registry {
    fn default() -> Self {
        Registry { engine: "", inner: Arc::default(), alive: Arc::new(watch::Sender::new(0)) }
    }
}

impl Registry {
    pub fn new() -> Self {
        Registry::default()
    }

    /// Of a service that runs this engine.
    pub fn of(engine: &'static str) -> Self {
        Registry { engine, ..Registry::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// Enters a session; what comes back goes into [`super::run`]. Dropping it takes the session off the list.
    pub fn enter(&self, id: SessionId, presenter: &str, now: Instant) -> SessionControl {
        let wake = Arc::new(Notify::new());
        let shared = Arc::new(Shared {
            id: id.clone(),
            presenter: Mutex::new(presenter.to_string()),
            since: now,
            order: watch::Sender::new(None),
            fan: Fan::new(wake.clone()),
            speech: SpeechQueue::new(wake.clone()),
            events: broadcast::Sender::new(EVENTS),
            microphone: Mutex::default(),
            wish: Mutex::default(),
            direction: Direction::default(),
            wake,
            now: Mutex::new((State::Connecting, Metrics::default(), None)),
        });
        let order = shared.order.subscribe();
        let mut inner = self.lock();
        inner.started += 1;
        inner.live.insert(id, shared.clone());
        self.alive.send_replace(inner.live.len());
        SessionControl { shared, order, registry: self.clone() }
    }

    pub fn get(&self, id: &SessionId) -> Option<Handle> {
        self.lock().live.get(id).cloned().map(Handle)
    }

    pub fn snapshots(&self) -> Vec<Snapshot> {
        self.handles().iter().map(Handle::snapshot).collect()
    }

    fn handles(&self) -> Vec<Handle> {
        self.lock().live.values().cloned().map(Handle).collect()
    }

    pub fn len(&self) -> usize {
        self.lock().live.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Asks everyone to play out and leave.
    pub fn drain_all(&self, reason: &Reason) {
        self.handles().iter().for_each(|h| h.drain(reason.clone()));
    }

    /// Ends everyone at once.
    pub fn close_all(&self, reason: &Reason) {
        self.handles().iter().for_each(|h| h.close(reason.clone()));
    }

    /// Waits until nobody is left, at most so long; whether it is so.
    pub async fn emptied(&self, within: Duration) -> bool {
        let mut alive = self.alive.subscribe();
        tokio::time::timeout(within, alive.wait_for(|n| *n == 0)).await.is_ok_and(|r| r.is_ok())
    }

    pub fn counts(&self) -> Counts {
        let snapshots = self.snapshots();
        let inner = self.lock();
        let mut all = inner.past.clone();
        all.started = inner.started;
        all.by_state =
            State::ALL[..5].iter().map(|s| (s.label(), snapshots.iter().filter(|x| x.state == *s).count())).collect();
        all.by_reason = Reason::LABELS.iter().map(|l| (*l, inner.ended.get(l).copied().unwrap_or(0))).collect();
        snapshots.iter().for_each(|s| all.add(&s.metrics));
        all
    }
}

impl Counts {
    fn add(&mut self, m: &Metrics) {
        self.blocks += m.blocks;
        self.frames_sent += m.frames_sent;
        self.frames_held += m.frames_held;
        self.frames_skipped += m.frames_skipped;
        self.lost_in += m.lost_in;
        self.lost_out += m.lost_out;
        self.sink_pictures_dropped += m.sink_pictures_dropped;
        self.sinks_slowed += m.sinks_slowed;
        self.interruptions += m.interruptions;
    }
}

/// A live session, from outside: who watches, who speaks, what happens, the end.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    pub fn id(&self) -> &SessionId {
        &self.0.id
    }
    pub fn snapshot(&self) -> Snapshot {
        let now = self.0.lock();
        Snapshot {
            id: self.0.id.clone(),
            presenter: lock(&self.0.presenter).clone(),
            state: now.0,
            since: self.0.since,
            metrics: now.1.clone(),
        }
    }
    /// Lets a sink watch and hear until the attachment is dropped; the first picture it gets is a keyframe. Attach when
    /// the sink's connection stands.
    #[must_use = "dropping the attachment detaches the sink"]
    pub fn attach(&self, sink: Arc<dyn LinkOut>, role: SinkRole) -> Attachment {
        self.0.fan.attach(sink, role)
    }
    /// As [`Handle::attach`], for another view of the presenter than the whole picture.
    #[must_use = "dropping the attachment detaches the sink"]
    pub fn attach_as(&self, sink: Arc<dyn LinkOut>, role: SinkRole, view: View) -> Attachment {
        self.0.fan.attach_as(sink, role, view)
    }
    /// What sinks get that asked for no view of their own.
    pub fn set_view(&self, view: View) {
        self.0.fan.set_view(view);
    }
    /// Interruptions so far.
    pub fn interrupts(&self) -> u64 {
        self.0.speech.interrupts()
    }
    /// A sink needs a keyframe. Requests within `keyframe_spacing_ms` become one.
    pub fn keyframe(&self) {
        self.0.fan.want_keyframe();
    }
    /// A way to make it speak; each has segments of its own.
    pub fn speech(&self) -> SpeechPort {
        self.0.speech.port()
    }
    /// Hears a peer's microphone from now on; the one heard before, if any, is let go (its receiver is dropped). In a
    /// session that has its own peer this replaces the peer: when the events end, so does the session.
    pub fn listen(&self, events: mpsc::Receiver<LinkEvent>) {
        *lock(&self.0.microphone) = Some(events);
        self.0.wake.notify_one();
    }
    /// Shows another presenter (name and picture), or follows another prompt; the voice goes on meanwhile. A newer
    /// change takes the place of one that has not begun. Giving this up gives the change up.
    ///
    /// # Errors
    /// What the engine says to the picture or the prompt; nothing has changed then.
    pub async fn change(&self, face: Option<(String, Portrait)>, prompt: Option<String>) -> Result<(), ChangeError> {
        let (reply, answer) = oneshot::channel();
        *lock(&self.0.wish) = Some(Wish { face, prompt, reply });
        self.0.wake.notify_one();
        answer.await.unwrap_or(Err(ChangeError::Overtaken))
    }
    /// What the presenter does besides speaking.
    pub fn direction(&self) -> &Direction {
        &self.0.direction
    }
    /// Silence now: queued speech is dropped and told as interrupted, and no picture of it is shown any more. What is
    /// pushed after this returns is heard.
    pub fn interrupt(&self) {
        self.0.speech.interrupt();
    }
    /// What happens from now on. A listener that is more than 256 events behind misses the oldest.
    pub fn events(&self) -> broadcast::Receiver<SessionEvent> {
        self.0.events.subscribe()
    }
    /// Sinks now.
    pub fn sinks(&self) -> usize {
        self.0.fan.len()
    }
    /// Ends it at once. The first order counts, except that closing overrules draining.
    pub fn close(&self, reason: Reason) {
        self.0.order.send_if_modified(|order| {
            let new = !matches!(order, Some(Order::Close(_)));
            if new {
                *order = Some(Order::Close(reason));
            }
            new
        });
    }
    /// Lets it play out what was said, then ends it.
    pub fn drain(&self, reason: Reason) {
        self.0.order.send_if_modified(|order| {
            let new = order.is_none();
            if new {
                *order = Some(Order::Drain(reason));
            }
            new
        });
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, (State, Metrics, Option<Reason>)> {
        lock(&self.now)
    }
}

/// Held for a look or a swap only, never across an await.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// The session's own end: orders come in, state and metrics go out. Leaves the registry on drop.
pub struct SessionControl {
    shared: Arc<Shared>,
    order: watch::Receiver<Option<Order>>,
    registry: Registry,
}

impl SessionControl {
    pub fn id(&self) -> &SessionId {
        &self.shared.id
    }
    pub(super) fn engine(&self) -> &'static str {
        self.registry.engine
    }
    /// The next order; never returns if none comes.
    pub(super) async fn ordered(&mut self) -> Order {
        // The sender lives in `shared`, which we hold: it cannot close.
        if self.order.changed().await.is_ok()
            && let Some(order) = self.order.borrow_and_update().clone()
        {
            return order;
        }
        std::future::pending().await
    }
    /// Rouses the session when something was asked for through a [`Handle`].
    pub(super) fn wish(&self) -> Arc<Notify> {
        self.shared.wake.clone()
    }
    pub(super) fn fan(&self) -> &Arc<Fan> {
        &self.shared.fan
    }
    pub(super) fn speech(&self) -> &Arc<SpeechQueue> {
        &self.shared.speech
    }
    pub(super) fn microphone(&self) -> Option<mpsc::Receiver<LinkEvent>> {
        lock(&self.shared.microphone).take()
    }
    pub(super) fn change(&self) -> Option<Wish> {
        lock(&self.shared.wish).take()
    }
    pub(super) fn direction(&self) -> &Direction {
        &self.shared.direction
    }
    pub(super) fn shows(&self, presenter: &str) {
        *lock(&self.shared.presenter) = presenter.to_string();
    }
    pub(super) fn tell(&self, event: SessionEvent) {
        // Nobody need listen.
        let _ = self.shared.events.send(event);
    }
    pub(super) fn report(&self, state: State, metrics: &Metrics) {
        let mut now = self.shared.lock();
        now.0 = state;
        now.1.clone_from(metrics);
    }
    pub(super) fn ended(&self, reason: &Reason) {
        self.shared.lock().2 = Some(reason.clone());
    }
}

impl Drop for SessionControl {
    fn drop(&mut self) {
        self.shared.speech.close();
        self.shared.fan.close();
        drop(self.change());
        let (metrics, reason) = {
            let now = self.shared.lock();
            (now.1.clone(), now.2.clone().unwrap_or(Reason::Abandoned))
        };
        let mut inner = self.registry.lock();
        // Another session of the same name would be a different entry.
        if inner.live.get(&self.shared.id).is_some_and(|s| Arc::ptr_eq(s, &self.shared)) {
            inner.live.remove(&self.shared.id);
        }
        *inner.ended.entry(reason.label()).or_default() += 1;
        inner.past.add(&metrics);
        let left = inner.live.len();
        drop(inner);
        self.registry.alive.send_replace(left);
    }
}
