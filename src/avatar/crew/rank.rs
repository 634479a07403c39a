//! One rank: a thread, a device, the networks on it, and its part of every face.

use std::{
    any::Any,
    collections::{HashMap, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, SyncSender},
    },
    time::Instant,
};

use candle_core::{DType, Device, Tensor};

use super::{Build, Common, Hear, Made, Times, Watch, mark::Mark};
use crate::{
    avatar::{
        block::{film, prime, show},
        speakers,
        studio::{Film, Tools},
    },
    model::{
        At, Error, Result,
        dit::{self, Halfway, StreamState, TextContext},
        ranks::{Layout, Link},
        sampler::Euler,
        vae::Decoding,
    },
};

/// Prompts whose keys and values are kept: several hundred megabytes each in the large model.
const PROMPTS: usize = 2;

/// What all ranks get to open a face with. Tensors are on the processor.
pub(super) struct Opening {
    pub(super) layout: Arc<Layout>,
    pub(super) reference: Tensor,
    pub(super) motion: Tensor,
    pub(super) text: Option<(String, Tensor)>,
    pub(super) euler: Euler,
    pub(super) reach: Vec<Tensor>,
    pub(super) planar: bool,
    pub(super) watch: Option<Watch>,
    /// Taken by the decoder's rank.
    pub(super) made: Mutex<Option<SyncSender<Made>>>,
}

pub(super) struct BlockOrder {
    pub(super) face: u64,
    pub(super) number: u64,
    /// For the first rank.
    pub(super) hear: Option<Hear>,
    pub(super) noise: Tensor,
    pub(super) distance: Arc<[usize]>,
    pub(super) times: Arc<Times>,
}

/// What a rank is told. All ranks of a face get the same orders in the same sequence.
pub(super) enum Order {
    Do(Box<dyn FnOnce(&Tools) + Send>),
    Open { face: u64, opening: Arc<Opening>, reply: SyncSender<Result<()>> },
    Block(BlockOrder),
    Recondition { face: u64, reference: Tensor },
    Close { face: u64 },
}

/// A rank's part of a face.
struct Face {
    opening: Arc<Opening>,
    /// Which stage it is of, and the memories of its steps; a decoder of its own has none.
    part: Option<(usize, StreamState)>,
    /// Motion latents on this device.
    motion: Tensor,
    /// The decoder's memory, and where pictures go.
    screen: Option<(Decoding, SyncSender<Made>)>,
}

pub(super) struct Rank {
    index: usize,
    link: Arc<dyn Link>,
    tools: Tools,
    faces: HashMap<u64, Face>,
    texts: VecDeque<(String, Arc<TextContext>)>,
}

impl Rank {
    /// The thread's whole life.
    pub(super) fn live(
        index: usize,
        link: Arc<dyn Link>,
        build: Build,
        orders: Receiver<Order>,
        common: Arc<Common>,
        ready: SyncSender<Result<Device>>,
    ) {
        let built = catch_unwind(AssertUnwindSafe(build)).unwrap_or_else(|panic| Err(Error::Link(told(panic))));
        let tools = match built.at(|| format!("rank {index}")) {
            Ok(tools) => tools,
            Err(e) => {
                // The one who starts the crew waits for this.
                let _ = ready.send(Err(e));
                return;
            }
        };
        if ready.send(Ok(tools.device.clone())).is_err() {
            return;
        }
        drop(ready);
        let mut rank = Rank { index, link, tools, faces: HashMap::new(), texts: VecDeque::new() };
        let mut serve = || -> Result<()> {
            while let Ok(order) = orders.recv() {
                rank.follow(order, &common)?;
            }
            Ok(())
        };
        let end = catch_unwind(AssertUnwindSafe(&mut serve));
        // Told before the links go: whoever fails because of it comes second.
        match end {
            Ok(Ok(())) => {}
            Ok(Err(e)) => common.fail(format!("rank {index} failed: {}", described(&e))),
            Err(panic) => common.fail(format!("rank {index} {}", told(panic))),
        }
        drop(orders);
        if catch_unwind(AssertUnwindSafe(|| drop(rank))).is_err() {
            tracing::error!("rank {index} panicked while it was dropped");
        }
        common.waker.wake();
    }

    /// An error is the end of the rank.
    fn follow(&mut self, order: Order, common: &Common) -> Result<()> {
        match order {
            Order::Do(work) => work(&self.tools),
            Order::Open { face, opening, reply } => {
                let opened = self.open(opening).map(|f| drop(self.faces.insert(face, f)));
                // Whoever asked may be gone; it then closes the face.
                let _ = reply.send(opened);
            }
            Order::Block(order) => {
                let number = order.number;
                self.block(order, common).at(|| format!("block {number}"))?;
            }
            Order::Recondition { face, reference } => {
                if let Some(Face { part: Some((_, state)), motion, .. }) = self.faces.get_mut(&face) {
                    let reference = reference.to_device(&self.tools.device)?;
                    self.tools.dit()?.recondition(state, &reference, Some(motion))?;
                }
            }
            Order::Close { face } => drop(self.faces.remove(&face)),
        }
        Ok(())
    }

    fn open(&mut self, opening: Arc<Opening>) -> Result<Face> {
        let device = self.tools.device.clone();
        let (reference, motion) = (opening.reference.to_device(&device)?, opening.motion.to_device(&device)?);
        let layout = &opening.layout;
        let part = match layout.stage_of(self.index) {
            Some(stage) => {
                let text = opening.text.as_ref().map(|(prompt, states)| self.read(prompt, states)).transpose()?;
                let dit = self.tools.dit()?;
                let schedule = Arc::new(dit.schedule(opening.euler.clone())?);
                let opening = dit::Opening { reference: &reference, motion: Some(&motion), text };
                let mut state = dit.open(&opening, &schedule)?;
                let team = layout.stages[stage].ranks.clone();
                if team.len() > 1 {
                    dit.share(&mut state, self.link.clone(), team)?;
                }
                Some((stage, state))
            }
            None => None,
        };
        let screen = match layout.decoder == self.index {
            true => {
                let made = opening.made.lock().unwrap_or_else(|e| e.into_inner()).take();
                let made = made.ok_or_else(|| Error::Input("a face was opened twice".into()))?;
                Some((prime(self.tools.vae()?, &motion)?, made))
            }
            false => None,
        };
        Ok(Face { part, motion, screen, opening })
    }

    /// A prompt's states as this rank's transformer reads them.
    fn read(&mut self, prompt: &str, states: &Tensor) -> Result<Arc<TextContext>> {
        if let Some((_, context)) = self.texts.iter().find(|(p, _)| p == prompt) {
            return Ok(context.clone());
        }
        let context = Arc::new(self.tools.dit()?.text(&states.to_device(&self.tools.device)?)?);
        self.texts.push_back((prompt.into(), context.clone()));
        if self.texts.len() > PROMPTS {
            self.texts.pop_front();
        }
        Ok(context)
    }

    /// This rank's part of a block: take it over, do it, hand it on.
    fn block(&mut self, mut order: BlockOrder, common: &Common) -> Result<()> {
        let hear = order.hear.take();
        let Rank { index, link, tools, faces, .. } = self;
        let (me, device) = (*index, tools.device.clone());
        let Some(face) = faces.get_mut(&order.face) else { return Ok(()) };
        let layout = face.opening.layout.clone();
        let last = layout.stages.len() - 1;
        let latents = match &mut face.part {
            Some((stage, state)) => {
                let leader = layout.stages[*stage].ranks.start;
                let (features, on, hearing) = take_over(tools, link.as_ref(), &layout, *stage, &order, hear)?;
                let began = Mark::now(&device)?;
                let watch = face.opening.watch.as_ref().filter(|_| me == leader);
                let mut probe = |name: &str, x: &Tensor| {
                    if let Some(watch) = watch {
                        watch(name, order.number, x);
                    }
                };
                let dit = tools.dit()?;
                let audio = speakers::hear(dit, &features, &face.opening.reach)?;
                let way = layout.stages[*stage].way.clone();
                let on = dit.travel(state, on, way, &audio, None, &order.distance, &mut probe)?;
                state.advance(dit.config().frames_per_block);
                let ended = Mark::now(&device)?;
                // Nothing waited for the device until here: its work is handed in while it does what came before.
                device.synchronize()?;
                if let Some(heard) = hearing {
                    let took = began.since(&heard)?;
                    order.times.stage(|s| s.features = took);
                    order.times.span(me, took);
                }
                let took = ended.since(&began)?;
                order.times.span(me, took);
                if me == leader {
                    order.times.stage(|s| s.generation += took);
                    if let Some(next) = layout.stages.get(*stage + 1) {
                        for rank in next.ranks.clone() {
                            let parcel = [Some(features.clone()), Some(on.latent.clone()), on.tokens.clone()];
                            link.send(rank, parcel.into_iter().flatten().collect())?;
                        }
                    } else if layout.stage_of(layout.decoder).is_none() {
                        link.send(layout.decoder, vec![on.latent.contiguous()?])?;
                    }
                }
                on.latent
            }
            None => one(link.receive(layout.stages[last].ranks.start)?)?,
        };
        let Some((decoding, made)) = &mut face.screen else { return Ok(()) };
        device.synchronize()?;
        let began = Instant::now();
        let (vae, first) = (tools.vae()?, order.number == 0);
        let mut seen = None;
        let film = match &face.opening.watch {
            Some(_) if !face.opening.planar => Film::packed(seen.insert(show(vae, decoding, &latents, first)?))?,
            _ => film(vae, decoding, &latents, first, face.opening.planar)?,
        };
        let took = began.elapsed();
        order.times.span(me, took);
        order.times.stage(|s| s.decode = took);
        if let Some(watch) = &face.opening.watch {
            watch("latents", order.number, &latents);
            if let Some(frames) = &seen {
                watch("frames", order.number, frames);
            }
        }
        let own = (order.number == 0).then(|| latents.narrow(1, 0, 1)?.to_device(&Device::Cpu));
        let block = Made { number: order.number, film, times: order.times, own: own.transpose()? };
        // A face whose owner is gone is closed by the next order.
        let _ = made.send(block);
        common.waker.wake();
        Ok(())
    }
}

/// Audio features of a block, the block where this stage takes it over, and when it began to listen if it does.
fn take_over(
    tools: &Tools,
    link: &dyn Link,
    layout: &Layout,
    stage: usize,
    order: &BlockOrder,
    hear: Option<Hear>,
) -> Result<(Tensor, Halfway, Option<Mark>)> {
    let ranks = layout.stages[stage].ranks.clone();
    if stage > 0 {
        let parcel = link.receive(layout.stages[stage - 1].ranks.start)?;
        let mut parcel = parcel.into_iter();
        let (Some(features), Some(latent)) = (parcel.next(), parcel.next()) else {
            return Err(Error::Link("a parcel came with too few tensors".into()));
        };
        return Ok((features, Halfway { latent, tokens: parcel.next() }, None));
    }
    let (features, began) = match hear {
        Some(hear) => {
            let began = Mark::now(&tools.device)?;
            let features = hear(tools)?.contiguous()?;
            for other in ranks.skip(1) {
                link.send(other, vec![features.clone()])?;
            }
            (features, Some(began))
        }
        None => (one(link.receive(ranks.start)?)?, None),
    };
    let latent = order.noise.to_device(&tools.device)?.to_dtype(DType::F32)?;
    Ok((features, Halfway { latent, tokens: None }, began))
}

fn one(mut parcel: Vec<Tensor>) -> Result<Tensor> {
    parcel.pop().ok_or_else(|| Error::Link("a parcel came empty".into()))
}

fn told(panic: Box<dyn Any + Send>) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| s.to_string()).or_else(|| panic.downcast_ref::<String>().cloned());
    format!("panicked: {}", text.unwrap_or_else(|| "no message".into()))
}

/// An error with its causes on one line.
fn described(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(c) = cause {
        text.push_str(": ");
        text.push_str(&c.to_string());
        cause = c.source();
    }
    text
}
