//! One thread per device: slots, admission, health, lanes, warm-up.
//!
//! An [`Engine`] owns a generator on a thread of its own. [`Engine::admit`] gives a [`Slot`] (the right to a face) or
//! refuses at once; [`Slot::open`] turns it into a [`Lane`]: speech in, blocks of frames out. The device thread serves
//! the lane whose block is due first, never waits for the network, and sleeps until something happens.
//!
//! | edge | capacity | when full |
//! | --- | --- | --- |
//! | commands | 8 | `open` waits |
//! | speech → lane | [`INPUT_BLOCKS`] messages, and two blocks of speech beyond what is being made | `push` waits, `try_push` says so; lag grows and is visible |
//! | frames → session | [`OUTPUT_BLOCKS`] blocks | that lane waits, the others go on |

mod device;
mod lane;
mod splice;
mod stats;

pub use lane::{Change, INPUT_BLOCKS, Lane, LaneClosed, LaneEvent, LaneInput, OUTPUT_BLOCKS, TryPush};
pub use splice::Splice;
pub use stats::{BLOCK_BUCKETS, EngineStats};

use crate::{
    avatar::{self, Capabilities, Fill, Generator, OpenOptions},
    media::{Geometry, Portrait},
};
use device::{Command, Device};
use serde::{Deserialize, Serialize};
use stats::Meter;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};
use tokio::sync::{mpsc, oneshot, watch};

/// Which generator is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The pocket model, embedded in the binary.
    Pocket,
    /// The test card: time code and level meter, no model.
    Card,
    /// The large model from a checkpoint on disk; its settings are the section `[s2v]`.
    S2v,
}

/// Settings of the engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Which generator is run: `pocket`, `card` or `s2v`.
    pub generator: Kind,
    /// Faces served at once, as far as the device's memory holds them; more people are told "full" at once. 0 only for
    /// a node that hands everything on.
    pub sessions: usize,
    /// Threads for the arithmetic; 0 = all cores. More than two help only if cores are free.
    pub threads: usize,
    /// Width and height of the pictures; absent = what suits the model and the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<usize>,
    /// Denoising steps; absent = what the model was judged best with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<usize>,
    /// How much presenters move of their own, for engines that can: 0 to 2, 1 is usual.
    pub liveliness: f32,
    /// What a refused caller is told to wait before trying again, seconds.
    pub retry_after_s: u64,
    /// Blocks made before anyone is admitted, so that the first guest does not pay for cold caches.
    pub warm_up_blocks: u64,
    /// How often in a row a failed engine is built anew before it has failed for good; 0 = never.
    pub rebuilds: u32,
}

impl Default for Config {
    fn default() -> Self {
        let generator = Kind::Pocket;
        Config {
            generator,
            sessions: 1,
            threads: 2,
            size: None,
            steps: None,
            liveliness: 1.0,
            retry_after_s: 5,
            warm_up_blocks: 3,
            rebuilds: 3,
        }
    }
}

impl Config {
    /// Says which value is wrong and what is allowed.
    ///
    /// # Errors
    /// A value outside its bounds.
    pub fn validate(&self) -> Result<(), String> {
        let within = |key: &str, value: u64, low: u64, high: u64| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            Err(format!("engine.{key} = {value}: allowed is {low} to {high}"))
        };
        within("sessions", self.sessions as u64, 0, 64)?;
        within("threads", self.threads as u64, 0, 1024)?;
        within("steps", self.steps.unwrap_or(1) as u64, 1, 100)?;
        if !(0.0..=avatar::LIVELIEST).contains(&self.liveliness) {
            return Err(format!("engine.liveliness = {}: allowed is 0 to {}", self.liveliness, avatar::LIVELIEST));
        }
        within("retry_after_s", self.retry_after_s, 1, 3600)?;
        within("warm_up_blocks", self.warm_up_blocks, 0, 1000)?;
        within("rebuilds", self.rebuilds.into(), 0, 1000)
    }
}

/// Why an engine or a lane could not be had.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("the engine `{name}` could not start its thread: {source}")]
    Thread { name: String, source: std::io::Error },
    #[error("the engine `{name}` could not be built: {source}")]
    Build { name: String, source: avatar::AvatarError },
    #[error("the engine `{name}` failed its warm-up: {message}")]
    WarmUp { name: String, message: String },
    /// The generator refused to open this face (most often: the portrait cannot be used).
    #[error(transparent)]
    Open(#[from] avatar::AvatarError),
    #[error("the engine has failed: {0}")]
    Failed(String),
}

/// Why nobody is admitted now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("every face is taken; try again in {} s", retry_after.as_secs())]
    Full { retry_after: Duration },
    /// More faces than configured for the memory of the device, as its warm-up measured it.
    #[error(
        "the memory of its device holds {fit} of the {configured} faces that are configured; try again in {} s",
        retry_after.as_secs()
    )]
    Memory { fit: usize, configured: usize, retry_after: Duration },
    #[error("the engine has failed: {0}")]
    Failed(String),
    #[error("the engine has failed and is being built anew; try again in {} s", retry_after.as_secs())]
    Rebuilding { retry_after: Duration },
    #[error("the service is closing and admits nobody any more")]
    Draining,
}

/// How the device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    Ready,
    /// It failed and is being built anew. The text says what happened.
    Rebuilding(String),
    /// For good: the engine must be built anew. The text says what happened.
    Failed(String),
}

/// A handle to a device thread. Cheap to clone; the thread ends and is joined when the last handle is dropped.
#[derive(Clone)]
pub struct Engine(Arc<Inner>);

struct Inner {
    geometry: Geometry,
    capabilities: Capabilities,
    config: Config,
    commands: mpsc::Sender<Command>,
    seats: Arc<Seats>,
    draining: AtomicBool,
    health: watch::Receiver<Health>,
    meter: Arc<Meter>,
    /// Dropped to stop the thread; lanes still open are told.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the device thread ended by a panic of its own");
        }
    }
}

impl Engine {
    /// Builds the generator on its own named thread, warms it up; returns when ready or failed. Blocks for as long as
    /// that takes: call it before anything listens, or from a blocking task. `build` is called again when the engine has
    /// failed and is built anew.
    pub fn start(
        name: &str,
        config: &Config,
        build: impl FnMut() -> avatar::Result<Box<dyn Generator>> + Send + 'static,
    ) -> Result<Engine, EngineError> {
        let (commands, command_rx) = mpsc::channel(8);
        let (stop, stop_rx) = oneshot::channel();
        let (health_tx, health) = watch::channel(Health::Ready);
        let (ready_tx, ready_rx) = std::sync::mpsc::sync_channel(1);
        let meter = Arc::new(Meter::default());
        let seats = Arc::new(Seats::new(config.sessions));
        let device = Device::new(name, config.clone(), command_rx, stop_rx, health_tx, (meter.clone(), seats.clone()));
        let thread = std::thread::Builder::new()
            .name(format!("engine-{name}"))
            .spawn(move || device.run(build, ready_tx))
            .map_err(|source| EngineError::Thread { name: name.into(), source })?;
        let (geometry, capabilities) = match ready_rx.recv() {
            Ok(Ok(told)) => told,
            Ok(Err(error)) => {
                let _ = thread.join();
                return Err(error);
            }
            Err(_) => {
                let _ = thread.join();
                let message = "its thread ended before it was ready".into();
                return Err(EngineError::WarmUp { name: name.into(), message });
            }
        };
        Ok(Engine(Arc::new(Inner {
            geometry,
            capabilities,
            config: config.clone(),
            commands,
            seats,
            draining: AtomicBool::new(false),
            health,
            meter,
            stop: Some(stop),
            thread: Some(thread),
        })))
    }

    /// Size, rate, block lengths and look-ahead of what comes out.
    pub fn geometry(&self) -> &Geometry {
        &self.0.geometry
    }

    /// What faces follow beside speech and a portrait.
    pub fn capabilities(&self) -> Capabilities {
        self.0.capabilities
    }

    /// The right to a face, or at once the reason why not.
    pub fn admit(&self) -> Result<Slot, Refusal> {
        match &*self.0.health.borrow() {
            Health::Ready => {}
            Health::Rebuilding(_) => return Err(Refusal::Rebuilding { retry_after: self.retry_after() }),
            Health::Failed(why) => return Err(Refusal::Failed(why.clone())),
        }
        if self.0.draining.load(Ordering::Acquire) {
            return Err(Refusal::Draining);
        }
        let retry_after = self.retry_after();
        let seat = Seats::take(&self.0.seats).ok_or_else(|| {
            let (fit, configured) = (self.0.seats.fit.load(Ordering::Acquire), self.0.seats.configured);
            if fit < configured {
                return Refusal::Memory { fit, configured, retry_after };
            }
            Refusal::Full { retry_after }
        })?;
        Ok(Slot { seat, commands: self.0.commands.clone(), health: self.0.health.clone() })
    }

    /// What a refused caller is told to wait.
    pub fn retry_after(&self) -> Duration {
        Duration::from_secs(self.0.config.retry_after_s)
    }

    /// Turns to `Failed` once, and stays; to `Rebuilding` and back before that.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.0.health.clone()
    }

    /// Counters and medians for panels, metrics and `doctor`.
    pub fn stats(&self) -> EngineStats {
        self.0.meter.stats(self.0.seats.fit.load(Ordering::Acquire), self.0.seats.used.load(Ordering::Acquire))
    }

    /// Admits nobody any more; open lanes go on to their end.
    pub fn drain(&self) {
        self.0.draining.store(true, Ordering::Release);
    }
}

/// How many may have a face at once, and how many have.
struct Seats {
    configured: usize,
    /// As many of them as the device's memory holds.
    fit: AtomicUsize,
    used: AtomicUsize,
}

impl Seats {
    fn new(configured: usize) -> Seats {
        Seats { configured, fit: AtomicUsize::new(configured), used: AtomicUsize::new(0) }
    }

    /// As many as fit when one face, while it worked, made a device with `before` free have `after`: what is still free,
    /// less what work holds in passing, for more of them. The first is there already.
    fn that_fit(configured: usize, before: &[Fill], after: &[Fill]) -> usize {
        let more = |(before, after): (&Fill, &Fill)| {
            let face = before.free.saturating_sub(after.free);
            match face {
                0 => usize::MAX,
                // What passed before the face was there is loading, or another generator's.
                face => (after.free.saturating_sub(after.passing) / face) as usize,
            }
        };
        let more = before.iter().zip(after).map(more).min().unwrap_or(usize::MAX);
        configured.min(more.saturating_add(1))
    }

    fn take(seats: &Arc<Seats>) -> Option<Seat> {
        seats
            .used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
                (used < seats.fit.load(Ordering::Acquire)).then_some(used + 1)
            })
            .ok()
            .map(|_| Seat { seats: seats.clone(), _kept: None })
    }
}

/// One taken seat; given back on drop, wherever that happens, and with it whatever was to be kept as long.
pub(crate) struct Seat {
    seats: Arc<Seats>,
    _kept: Option<Box<dyn Send + Sync>>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.seats.used.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The right to a face; given back on drop.
pub struct Slot {
    seat: Seat,
    commands: mpsc::Sender<Command>,
    health: watch::Receiver<Health>,
}

impl Slot {
    /// Keeps something for as long as the seat is taken, and drops it then.
    pub fn with(mut self, kept: impl Send + Sync + 'static) -> Slot {
        self.seat._kept = Some(Box::new(kept));
        self
    }

    /// Opens a face. Work begins here, not before. If the future is dropped half-way the slot is given back.
    pub async fn open(self, portrait: Portrait, options: OpenOptions) -> Result<Lane, EngineError> {
        let (reply, answer) = oneshot::channel();
        let command = Command { portrait, options, seat: self.seat, reply };
        if self.commands.send(command).await.is_err() {
            return Err(EngineError::Failed(failure(&self.health)));
        }
        answer.await.unwrap_or_else(|_| Err(EngineError::Failed(failure(&self.health))))
    }
}

fn failure(health: &watch::Receiver<Health>) -> String {
    match &*health.borrow() {
        Health::Failed(why) | Health::Rebuilding(why) => why.clone(),
        Health::Ready => "it was stopped".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_faces_as_the_fullest_device_holds() {
        let gb = |free: u64, passing: u64| Fill { free: free << 30, passing: passing << 30 };
        let fit = |before: &[Fill], after: &[Fill]| Seats::that_fit(4, before, after);
        assert_eq!(fit(&[], &[]), 4, "memory is no limit");
        assert_eq!(fit(&[gb(140, 0)], &[gb(115, 3)]), 4, "25 each, 4 in passing");
        assert_eq!(fit(&[gb(60, 0)], &[gb(35, 3)]), 2);
        assert_eq!(fit(&[gb(60, 0)], &[gb(27, 3)]), 1, "what passes must fit beside");
        assert_eq!(fit(&[gb(60, 0)], &[gb(0, 3)]), 1);
        assert_eq!(fit(&[gb(140, 0), gb(60, 0)], &[gb(115, 3), gb(35, 3)]), 2, "the fuller of two");
        assert_eq!(fit(&[gb(60, 0)], &[gb(60, 3)]), 4, "a face that takes nothing");
    }
}
