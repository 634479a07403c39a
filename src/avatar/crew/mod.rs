//! Several devices behind one face: a thread for each, blocks flowing through them (MODEL.md §9.4 of the specification,
//! after liveavatar/models/wan/causal_s2v_pipeline_tpp.py of Alibaba-Quark/LiveAvatar at 9c2c38d).
//!
//! A [`Crew`] owns the threads ("ranks"). Each has a device, the networks' weights on it and its part of every face's
//! memories; a [`Layout`] says which part. A [`Line`] is one face as its owner sees it: blocks go in at one end, pictures
//! come out at the other, in order, several under way at once.
//!
//! | edge | capacity | when full |
//! | --- | --- | --- |
//! | orders → a rank | 16 | the owner waits |
//! | rank → rank | [`crate::model::ranks`] | the sender waits |
//! | pictures → owner | what may be under way | never full |
//!
//! A rank that fails or panics takes its queues with it, so nobody waits for it; the first reason is kept and every line
//! gives it as its error. A crew is not repaired: its owner starts a new one.

mod mark;
mod rank;

use std::{
    sync::{
        Arc, Mutex, OnceLock,
        mpsc::{Receiver, SyncSender, TryRecvError, sync_channel},
    },
    task::{Context, Poll},
    thread::JoinHandle,
    time::Duration,
};

use candle_core::{Device, Tensor};
use futures::task::AtomicWaker;

use super::{
    block::{BlockSettings, look},
    studio::{Film, Tools},
};
use crate::{
    media::{Pixels, StageTimes},
    model::{
        Error, Result,
        ranks::{Breaker, Layout, Link},
        sampler::Euler,
    },
};
use rank::{BlockOrder, Opening, Order, Rank};

/// Loads the networks that a rank needs; called on its thread.
pub type Build = Box<dyn FnOnce() -> Result<Tools> + Send>;
/// What the first rank hears: features `[layers, channels, 4 · frames_per_block]` on its device.
pub type Hear = Box<dyn FnOnce(&Tools) -> Result<Tensor> + Send>;
/// Sees results on their way: `x_in`, `pred`, `latents`, `frames`, with the block's number.
pub type Watch = Arc<dyn Fn(&str, u64, &Tensor) + Send + Sync>;

/// Orders that may wait before a rank.
const ORDERS: usize = 16;

/// Within this time a rank that ends has said why.
const ENDING: Duration = Duration::from_secs(2);

/// What all ranks and lines of a crew have in common.
#[derive(Default)]
struct Common {
    /// Why the crew is no more.
    fault: OnceLock<String>,
    breakers: Mutex<Vec<Breaker>>,
    /// Whoever waits for pictures; all lines of a crew are looked after by one thread.
    waker: AtomicWaker,
}

impl Common {
    fn fail(&self, why: String) {
        tracing::error!("{why}");
        // The first one is the cause; others fail because of it.
        let _ = self.fault.set(why);
        for breaker in self.breakers.lock().unwrap_or_else(|e| e.into_inner()).drain(..) {
            breaker();
        }
        self.waker.wake();
    }

    fn error(&self) -> Error {
        // A rank that panics drops what it holds before it says why.
        for _ in 0..ENDING.as_millis() {
            if self.fault.get().is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Error::Link(self.fault.get().cloned().unwrap_or_else(|| "the ranks have ended".into()))
    }
}

/// The threads of several devices. Dropping it ends them.
pub struct Crew {
    common: Arc<Common>,
    members: Vec<Member>,
}

struct Member {
    orders: Option<SyncSender<Order>>,
    thread: Option<JoinHandle<()>>,
}

impl Crew {
    /// Starts a rank for each link and waits until all have loaded.
    ///
    /// # Errors
    /// The first rank that could not; two ranks with one [`Device`] of a card: each needs a stream of its own, because a
    /// recording takes in whatever another thread sends to the same stream, and kernels share their room to work in.
    pub fn start(links: Vec<Arc<dyn Link>>, builds: Vec<Build>) -> Result<Crew> {
        let common = Arc::new(Common::default());
        common.breakers.lock().unwrap_or_else(|e| e.into_inner()).extend(links.iter().filter_map(|l| l.breaker()));
        let (ready, loaded) = sync_channel(links.len().max(1));
        let mut crew = Crew { common: common.clone(), members: Vec::new() };
        for (index, (link, build)) in links.into_iter().zip(builds).enumerate() {
            let (orders, inbox) = sync_channel(ORDERS);
            let (common, ready) = (common.clone(), ready.clone());
            let thread = std::thread::Builder::new()
                .name(format!("rank-{index}"))
                .spawn(move || Rank::live(index, link, build, inbox, common, ready))
                .map_err(|e| Error::Config(format!("a thread for rank {index} cannot be started: {e}")))?;
            crew.members.push(Member { orders: Some(orders), thread: Some(thread) });
        }
        drop(ready);
        let mut cards: Vec<Device> = Vec::new();
        for _ in 0..crew.members.len() {
            let device = loaded.recv().map_err(|_| common.error())??;
            if cards.iter().any(|c| c.same_device(&device)) {
                return Err(Error::Config("two ranks share a stream of a card: open the card anew for each".into()));
            }
            cards.extend((!device.is_cpu()).then_some(device));
        }
        Ok(crew)
    }

    /// Ranks.
    pub fn ranks(&self) -> usize {
        self.members.len()
    }

    /// Why it is no more; none while it lives.
    pub fn fault(&self) -> Option<&str> {
        self.common.fault.get().map(String::as_str)
    }

    fn order(&self, rank: usize, order: Order) -> Result<()> {
        let orders = self.members.get(rank).and_then(|m| m.orders.as_ref());
        let orders = orders.ok_or_else(|| Error::Config(format!("there is no rank {rank}")))?;
        orders.send(order).map_err(|_| self.common.error())
    }

    /// Does something on a rank's thread, between blocks, and waits for it. Its error is the answer; the rank lives on.
    ///
    /// # Errors
    /// What `work` says, or why the crew is no more.
    pub fn on<T: Send + 'static>(
        &self,
        rank: usize,
        work: impl FnOnce(&Tools) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = sync_channel(1);
        let work = move |tools: &Tools| {
            // Whoever asked may be gone.
            let _ = reply.send(work(tools));
        };
        self.order(rank, Order::Do(Box::new(work)))?;
        answer.recv().map_err(|_| self.common.error())?
    }

    /// Opens a face: what [`super::block::Continuous::open`] does, each rank for its part.
    ///
    /// # Errors
    /// A layout that this crew cannot run, or what a rank says.
    pub fn open(self: &Arc<Self>, face: FaceOpening) -> Result<Line> {
        let FaceOpening { layout, picture, text, euler, settings, reach, planar, watch } = face;
        layout.check(euler.timesteps().len())?;
        if layout.ranks() > self.ranks() {
            return Err(Error::Config(format!("{} ranks are asked for, there are {}", layout.ranks(), self.ranks())));
        }
        let decoder = layout.decoder;
        let per_block = self.on(0, |tools| Ok(tools.dit()?.config().frames_per_block))?;
        let blocks_per_clip = settings.blocks(per_block)? as u64;
        let (reference, motion) = match picture {
            Picture::Known { reference, motion } => (reference, motion),
            Picture::New(picture) => {
                let picture = picture.to_device(&Device::Cpu)?;
                self.on(decoder, move |tools| {
                    let picture = picture.to_device(&tools.device)?;
                    let (reference, motion) = look(tools.vae()?, &picture, settings.motion_frames)?;
                    let home = |t: Tensor| t.to_device(&Device::Cpu);
                    Ok((home(reference)?, home(motion)?))
                })?
            }
        };
        // One on each stage and with the decoder, and one that waits.
        let stages = layout.stages.len();
        let depth = stages + usize::from(layout.stage_of(decoder).is_none()) + 1;
        let (made, pictures) = sync_channel(depth);
        let (layout, made) = (Arc::new(layout), Mutex::new(Some(made)));
        let opening = Arc::new(Opening { layout, reference, motion, text, euler, reach, planar, watch, made });
        let id = unique();
        let line = Line {
            crew: self.clone(),
            id,
            opening: opening.clone(),
            pictures,
            waiting: None,
            depth,
            blocks_per_clip,
            submitted: 0,
            delivered: 0,
            own: None,
        };
        let (reply, answers) = sync_channel(self.ranks());
        for rank in 0..opening.layout.ranks() {
            self.order(rank, Order::Open { face: id, opening: opening.clone(), reply: reply.clone() })?;
        }
        drop(reply);
        for _ in 0..opening.layout.ranks() {
            answers.recv().map_err(|_| self.common.error())??;
        }
        Ok(line)
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.members.iter_mut().for_each(|m| drop(m.orders.take()));
        for thread in self.members.iter_mut().filter_map(|m| m.thread.take()) {
            if thread.join().is_err() {
                tracing::error!("a rank's thread ended by a panic of its own");
            }
        }
    }
}

fn unique() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

/// Whom a face shows.
pub enum Picture {
    /// `[3, 1, height, width]` in −1..1 at the output size.
    New(Tensor),
    /// What a line before gave as its [`Line::reference`] and [`Line::motion`], on the processor.
    Known { reference: Tensor, motion: Tensor },
}

/// What a face on a crew is opened with.
pub struct FaceOpening {
    pub layout: Layout,
    pub picture: Picture,
    /// The prompt, and its states `[tokens, text_dim]`.
    pub text: Option<(String, Tensor)>,
    pub euler: Euler,
    pub settings: BlockSettings,
    /// Where each of several speakers is heard ([`super::speakers::reach`]); empty for one. Their features come one after
    /// the other along the layers.
    pub reach: Vec<Tensor>,
    /// Pictures may be planes ([`Pixels::I420`]); nobody watches `frames` then.
    pub planar: bool,
    pub watch: Option<Watch>,
}

/// How long each rank was at work on a block, and what the stages took.
#[derive(Debug, Default)]
pub struct Times {
    spans: Mutex<Vec<(usize, Duration)>>,
    stages: Mutex<StageTimes>,
}

impl Times {
    fn span(&self, rank: usize, took: Duration) {
        self.spans.lock().unwrap_or_else(|e| e.into_inner()).push((rank, took));
    }

    fn stage(&self, note: impl FnOnce(&mut StageTimes)) {
        note(&mut self.stages.lock().unwrap_or_else(|e| e.into_inner()));
    }

    /// What hearing, all steps and decoding took, waiting not counted.
    pub fn stages(&self) -> StageTimes {
        *self.stages.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What the stages took, and how long the busiest of `ranks` was at the block.
    pub fn told(&self, ranks: usize) -> StageTimes {
        StageTimes { busiest: (0..ranks).map(|rank| self.busy(rank)).max(), ..self.stages() }
    }

    /// How long a rank was at work on the block.
    pub fn busy(&self, rank: usize) -> Duration {
        let spans = self.spans.lock().unwrap_or_else(|e| e.into_inner());
        spans.iter().filter(|s| s.0 == rank).map(|s| s.1).sum()
    }
}

/// A block of pictures.
pub struct Made {
    /// From 0.
    pub number: u64,
    /// Cut apart by whoever takes them, not by a rank that has more to do.
    film: Film,
    pub times: Arc<Times>,
    /// The first latent frame of the first block.
    own: Option<Tensor>,
}

impl Made {
    /// One per frame.
    pub fn pictures(&self) -> Vec<Pixels> {
        self.film.cut()
    }
}

/// A face on a crew.
pub struct Line {
    crew: Arc<Crew>,
    id: u64,
    opening: Arc<Opening>,
    pictures: Receiver<Made>,
    /// Looked at already, not yet taken.
    waiting: Option<Made>,
    depth: usize,
    blocks_per_clip: u64,
    submitted: u64,
    delivered: u64,
    /// The first generated latent frame, which becomes the reference when the second clip begins.
    own: Option<Tensor>,
}

impl Line {
    /// Which rank does what for this face.
    pub fn layout(&self) -> &Layout {
        &self.opening.layout
    }

    /// Latent of the picture `[16, 1, h, w]`, on the processor.
    pub fn reference(&self) -> &Tensor {
        &self.opening.reference
    }

    /// Latents of the picture repeated `[16, frames, h, w]`, on the processor.
    pub fn motion(&self) -> &Tensor {
        &self.opening.motion
    }

    /// Blocks that were submitted and not taken yet.
    pub fn under_way(&self) -> usize {
        (self.submitted - self.delivered) as usize
    }

    /// Whether a block must be taken before the next can be submitted.
    pub fn full(&self) -> bool {
        self.under_way() >= self.depth || (self.submitted == self.blocks_per_clip && self.own.is_none())
    }

    /// Sends the next block on its way: what it hears, its noise `[16, frames_per_block, h, w]`, ρ per step. `full` must
    /// be false.
    ///
    /// # Errors
    /// The crew is no more.
    pub fn submit(&mut self, hear: Hear, noise: Tensor, distance: &[usize]) -> Result<()> {
        if self.full() {
            return Err(Error::Input("the line is full: take a block first".into()));
        }
        let ranks = self.opening.layout.ranks();
        if self.submitted == self.blocks_per_clip
            && let Some(own) = &self.own
        {
            for rank in 0..ranks {
                self.crew.order(rank, Order::Recondition { face: self.id, reference: own.clone() })?;
            }
        }
        let times = Arc::new(Times::default());
        let mut hear = Some(hear);
        for rank in 0..ranks {
            let order = BlockOrder {
                face: self.id,
                number: self.submitted,
                hear: hear.take(),
                noise: noise.clone(),
                distance: distance.into(),
                times: times.clone(),
            };
            self.crew.order(rank, Order::Block(order))?;
        }
        self.submitted += 1;
        Ok(())
    }

    /// The next block of pictures, if one is ready; with `wait`, when it is.
    ///
    /// # Errors
    /// Why the crew is no more.
    pub fn next(&mut self, wait: bool) -> Result<Option<Made>> {
        if self.under_way() == 0 {
            return Ok(None);
        }
        let made = match self.waiting.take() {
            Some(made) => made,
            None if wait => self.pictures.recv().map_err(|_| self.crew.common.error())?,
            None => match self.pictures.try_recv() {
                Ok(made) => made,
                Err(TryRecvError::Empty) if self.crew.fault().is_none() => return Ok(None),
                Err(_) => return Err(self.crew.common.error()),
            },
        };
        self.delivered += 1;
        if let Some(own) = &made.own {
            self.own = Some(own.clone());
        }
        Ok(Some(made))
    }

    /// Ready when [`Line::next`] has something to say without waiting.
    pub fn poll(&mut self, cx: &mut Context) -> Poll<()> {
        if self.under_way() == 0 {
            return Poll::Pending;
        }
        self.crew.common.waker.register(cx.waker());
        if self.waiting.is_none() {
            self.waiting = self.pictures.try_recv().ok();
        }
        if self.waiting.is_some() || self.crew.fault().is_some() { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        for rank in 0..self.opening.layout.ranks() {
            // A crew that is no more has forgotten the face already.
            let _ = self.crew.order(rank, Order::Close { face: self.id });
        }
    }
}
