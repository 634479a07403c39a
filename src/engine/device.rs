//! The device thread: opens faces, feeds them, makes the block that is due first, and sleeps until something happens.

use super::{
    Config, EngineError, Health, Seat, Seats,
    lane::{Change, INPUT_BLOCKS, Lane, LaneEvent, LaneInput, OUTPUT_BLOCKS, Speech, Track},
    stats::Meter,
};
use crate::{
    avatar::{self, AvatarError, Capabilities, Generator, OpenOptions, Stream},
    media::{AudioBlock, Geometry, MediaTime, Portrait, SPEECH_RATE},
    telemetry,
};
use futures::future::poll_fn;
use std::{
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc::SyncSender,
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot, watch};

/// Open a face; the seat travels with it.
pub(super) struct Command {
    pub(super) portrait: Portrait,
    pub(super) options: OpenOptions,
    pub(super) seat: Seat,
    pub(super) reply: oneshot::Sender<Result<Lane, EngineError>>,
}

/// The first wait before a failed engine is built anew; each further one is twice as long.
const BACK_OFF: Duration = Duration::from_secs(1);
/// How often it is looked meanwhile whether the engine was stopped.
const GLANCE: Duration = Duration::from_millis(20);
/// How often, while it works, it is looked how full its cards are.
const LOOK: Duration = Duration::from_secs(1);
/// An engine that worked for so long begins to count its failures anew.
const FORGIVEN: Duration = Duration::from_secs(600);
const STOPPED: &str = "the engine was stopped";

pub(super) struct Device {
    name: String,
    config: Config,
    commands: mpsc::Receiver<Command>,
    stop: oneshot::Receiver<()>,
    health: watch::Sender<Health>,
    meter: Arc<Meter>,
    seats: Arc<Seats>,
}

/// Why a call into the generator did not return a value.
enum Fault {
    /// This face only.
    Face(AvatarError),
    /// The device itself: a panic, or an error that says so.
    Device(String),
}

/// Calls into a generator; a panic becomes a fault of the device.
fn guarded<T>(call: impl FnOnce() -> avatar::Result<T>) -> Result<T, Fault> {
    // Whatever was touched is thrown away after a panic, so nothing half-changed is looked at again.
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error @ AvatarError::Device { .. })) => Err(Fault::Device(describe(&error))),
        Ok(Err(error)) => Err(Fault::Face(error)),
        Err(panic) => {
            let text = panic
                .downcast_ref::<&str>()
                .map(|s| s.to_string())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "no message".into());
            Err(Fault::Device(format!("the generator panicked: {text}")))
        }
    }
}

/// An error with its causes on one line.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(c) = cause {
        text.push_str(": ");
        text.push_str(&c.to_string());
        cause = c.source();
    }
    text
}

/// A stream whose panics are caught, also the one in its drop.
pub(super) struct Guarded(Option<Box<dyn Stream>>);

impl Guarded {
    fn call<T>(&mut self, f: impl FnOnce(&mut dyn Stream) -> avatar::Result<T>) -> Result<T, Fault> {
        match &mut self.0 {
            Some(stream) => guarded(|| f(stream.as_mut())),
            None => Err(Fault::Device("the stream is gone".into())),
        }
    }

    pub(super) fn under_way(&self) -> usize {
        self.0.as_ref().map_or(0, |s| s.under_way())
    }

    fn poll_ready(&mut self, cx: &mut Context) -> Poll<()> {
        self.0.as_mut().map_or(Poll::Pending, |s| s.poll_ready(cx))
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let stream = self.0.take();
        if catch_unwind(AssertUnwindSafe(|| drop(stream))).is_err() {
            tracing::error!("a stream panicked while it was dropped");
        }
    }
}

/// Turns health to failed if the thread leaves by a way nobody thought of.
struct LastWill(watch::Sender<Health>);

impl Drop for LastWill {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.send_replace(Health::Failed("the device thread panicked".into()));
        }
    }
}

/// What woke the thread.
enum Woken {
    Stop,
    Open(Command),
    /// Speech for a lane, or `None`: every sender is gone.
    Heard(usize, Option<Speech>),
    /// Room for a block, or a reader that went away: a look will tell.
    Look,
}

impl Device {
    pub(super) fn new(
        name: &str,
        config: Config,
        commands: mpsc::Receiver<Command>,
        stop: oneshot::Receiver<()>,
        health: watch::Sender<Health>,
        (meter, seats): (Arc<Meter>, Arc<Seats>),
    ) -> Device {
        Device { name: name.into(), config, commands, stop, health, meter, seats }
    }

    /// The thread's whole life.
    pub(super) fn run(
        mut self,
        mut build: impl FnMut() -> avatar::Result<Box<dyn Generator>>,
        ready: SyncSender<Result<(Geometry, Capabilities), EngineError>>,
    ) {
        let _will = LastWill(self.health.clone());
        let (mut generator, geometry) = match self.build(&mut build) {
            Ok(started) => started,
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        };
        if ready.send(Ok((geometry.clone(), generator.capabilities()))).is_err() {
            return;
        }
        let mut failures = 0;
        loop {
            let (mut tracks, since) = (Vec::new(), Instant::now());
            let fault = self.serve(generator.as_mut(), &geometry, &mut tracks);
            if since.elapsed() >= FORGIVEN {
                failures = 0;
            }
            let message = fault.clone().unwrap_or_else(|| STOPPED.into());
            if let Some(fault) = &fault {
                tracing::error!(engine = self.name, "{fault}");
                self.unwell(fault, failures);
            }
            for track in tracks {
                track.end(LaneEvent::Failed(message.clone()));
            }
            self.turn_away(&message);
            // What it holds of the device must be free before another one is built.
            if catch_unwind(AssertUnwindSafe(|| drop(generator))).is_err() {
                tracing::error!(engine = self.name, "the generator panicked while it was dropped");
            }
            let again = fault.and_then(|fault| self.rebuild(&mut build, &geometry, fault, &mut failures));
            let Some(again) = again else {
                // No more faces: whoever still waits to open one is told by the closed channel.
                self.commands.close();
                return self.turn_away(&message);
            };
            generator = again;
        }
    }

    /// Builds a generator and warms it up.
    fn build(
        &self,
        build: &mut impl FnMut() -> avatar::Result<Box<dyn Generator>>,
    ) -> Result<(Box<dyn Generator>, Geometry), EngineError> {
        let name = || self.name.clone();
        let mut generator = guarded(build).map_err(|fault| match fault {
            Fault::Face(source) => EngineError::Build { name: name(), source },
            Fault::Device(message) => EngineError::WarmUp { name: name(), message },
        })?;
        match self.warm_up(generator.as_mut()) {
            Ok(geometry) => Ok((generator, geometry)),
            Err(Fault::Device(message)) => Err(EngineError::WarmUp { name: name(), message }),
            Err(Fault::Face(error)) => Err(EngineError::WarmUp { name: name(), message: describe(&error) }),
        }
    }

    /// Says what happened, and whether another try follows.
    fn unwell(&self, fault: &str, failures: u32) {
        self.health.send_replace(match failures < self.config.rebuilds {
            true => Health::Rebuilding(fault.into()),
            false => Health::Failed(fault.into()),
        });
    }

    /// Tries to build the generator anew, after ever longer waits. `None`: stopped, or failed for good.
    fn rebuild(
        &mut self,
        build: &mut impl FnMut() -> avatar::Result<Box<dyn Generator>>,
        geometry: &Geometry,
        mut fault: String,
        failures: &mut u32,
    ) -> Option<Box<dyn Generator>> {
        while *failures < self.config.rebuilds {
            let until = Instant::now() + BACK_OFF * 2u32.pow((*failures).min(6));
            *failures += 1;
            while Instant::now() < until {
                if self.stopped() {
                    return None;
                }
                self.turn_away(&fault);
                std::thread::sleep(GLANCE);
            }
            telemetry::metrics().engine_rebuilds.inc();
            match self.build(build) {
                Ok((generator, new)) if new == *geometry => {
                    tracing::info!(engine = self.name, "the engine was built anew");
                    self.health.send_replace(Health::Ready);
                    return Some(generator);
                }
                Ok(_) => fault = "built anew, it makes pictures of another shape".into(),
                Err(error) => fault = describe(&error),
            }
            tracing::error!(engine = self.name, "the engine could not be built anew: {fault}");
            self.unwell(&fault, *failures);
        }
        None
    }

    /// Answers whoever waits to open a face.
    fn turn_away(&mut self, message: &str) {
        while let Ok(command) = self.commands.try_recv() {
            let _ = command.reply.send(Err(EngineError::Failed(message.into())));
        }
    }

    /// Makes a few blocks of silence and measures them, and how many such faces the device's memory holds.
    fn warm_up(&self, generator: &mut dyn Generator) -> Result<Geometry, Fault> {
        let geometry = guarded(|| Ok(generator.geometry()))?;
        if self.config.warm_up_blocks == 0 {
            return Ok(geometry);
        }
        let options = self.fitted(OpenOptions::default());
        let before = guarded(|| Ok(generator.memory()))?;
        let stream = guarded(|| generator.open(&generator.sample_portrait(), &options))?;
        let mut stream = Guarded(Some(stream));
        let end = MediaTime::from_units(geometry.first_frame(self.config.warm_up_blocks) as i64, geometry.fps);
        let samples = vec![0.0; end.units(SPEECH_RATE).max(0) as usize];
        stream.call(|s| s.push(&AudioBlock { at: MediaTime::ZERO, samples }))?;
        stream.call(|s| s.finish())?;
        loop {
            let began = Instant::now();
            let Some(block) = stream.call(|s| s.pull())? else { break };
            let span = geometry.block_span(block.index).as_duration();
            let took = block.stages.busiest.unwrap_or_else(|| began.elapsed());
            self.meter.block(took, span, block.stages, None);
        }
        let after = guarded(|| Ok(generator.memory()))?;
        self.meter.cards(after.iter().map(|fill| fill.free).collect());
        let fit = Seats::that_fit(self.config.sessions, &before, &after);
        if fit < self.config.sessions {
            let (name, sessions) = (&self.name, self.config.sessions);
            tracing::warn!(engine = name, "memory holds {fit} of {sessions} faces: {before:?} became {after:?}");
        }
        self.seats.fit.store(fit, Ordering::Release);
        Ok(geometry)
    }

    /// Serves until stopped (`None`) or until the device fails (why).
    fn serve(&mut self, generator: &mut dyn Generator, geometry: &Geometry, tracks: &mut Vec<Track>) -> Option<String> {
        let mut looked = Instant::now();
        loop {
            if looked.elapsed() >= LOOK {
                looked = Instant::now();
                match guarded(|| Ok(generator.memory())) {
                    Ok(fills) => self.meter.cards(fills.iter().map(|fill| fill.free).collect()),
                    Err(Fault::Face(_)) => {}
                    Err(Fault::Device(fault)) => return Some(fault),
                }
            }
            while let Ok(command) = self.commands.try_recv() {
                if let Err(fault) = self.open(generator, tracks, command) {
                    return Some(fault);
                }
            }
            let mut at = 0;
            while at < tracks.len() {
                match self.feed(generator, geometry, &mut tracks[at]) {
                    Ok(true) => at += 1,
                    Ok(false) => drop(tracks.swap_remove(at)),
                    Err(Fault::Face(error)) => tracks.swap_remove(at).end(LaneEvent::Failed(describe(&error))),
                    Err(Fault::Device(fault)) => return Some(fault),
                }
            }
            let now = Instant::now();
            let due = (0..tracks.len())
                .filter(|&i| tracks[i].worth_a_pull && tracks[i].room.is_some())
                .min_by_key(|&i| tracks[i].deadline(geometry, now));
            if let Some(i) = due {
                match self.make(geometry, &mut tracks[i]) {
                    Ok(true) => {}
                    Ok(false) => tracks.swap_remove(i).end(LaneEvent::Finished),
                    Err(Fault::Face(error)) => tracks.swap_remove(i).end(LaneEvent::Failed(describe(&error))),
                    Err(Fault::Device(fault)) => return Some(fault),
                }
                if self.stopped() {
                    return None;
                }
                continue;
            }
            let fault = match self.wait(tracks) {
                Woken::Look => None,
                Woken::Stop => return None,
                Woken::Open(command) => self.open(generator, tracks, command).err(),
                Woken::Heard(i, speech) => match self.hear(generator, geometry, &mut tracks[i], speech) {
                    Ok(()) => None,
                    Err(Fault::Face(error)) => {
                        tracks.swap_remove(i).end(LaneEvent::Failed(describe(&error)));
                        None
                    }
                    Err(Fault::Device(fault)) => Some(fault),
                },
            };
            if fault.is_some() {
                return fault;
            }
        }
    }

    fn stopped(&mut self) -> bool {
        !matches!(self.stop.try_recv(), Err(oneshot::error::TryRecvError::Empty))
    }

    /// With what the configuration says. Whoever takes an engine's frames encodes them.
    fn fitted(&self, options: OpenOptions) -> OpenOptions {
        options.direction.usually(self.config.liveliness);
        OpenOptions { steps: options.steps.or(self.config.steps), planar: true, ..options }
    }

    /// Opens a face and answers. `Err`: the device failed.
    fn open(&self, generator: &mut dyn Generator, tracks: &mut Vec<Track>, command: Command) -> Result<(), String> {
        let Command { portrait, options, seat, reply } = command;
        if reply.is_closed() {
            return Ok(());
        }
        let options = self.fitted(options);
        match guarded(|| generator.open(&portrait, &options)) {
            Ok(stream) => {
                let (speech, input) = mpsc::channel(INPUT_BLOCKS);
                // One place more than blocks may wait: it is kept for the last event.
                let (output, events) = mpsc::channel(OUTPUT_BLOCKS + 1);
                let epoch = Arc::<AtomicU32>::default();
                let track = Track::new(Guarded(Some(stream)), input, output, epoch.clone(), seat);
                if reply.send(Ok(Lane { input: LaneInput { speech, epoch }, output: events })).is_ok() {
                    tracks.push(track);
                }
                Ok(())
            }
            Err(Fault::Face(error)) => {
                drop(seat);
                let _ = reply.send(Err(EngineError::Open(error)));
                Ok(())
            }
            Err(Fault::Device(fault)) => {
                drop(seat);
                let _ = reply.send(Err(EngineError::Failed(fault.clone())));
                Err(fault)
            }
        }
    }

    /// Takes what waits for a lane. `Ok(false)`: its reader is gone, the lane is over.
    fn feed(&self, generator: &mut dyn Generator, geometry: &Geometry, track: &mut Track) -> Result<bool, Fault> {
        if track.output.is_closed() {
            return Ok(false);
        }
        self.interrupt(geometry, track)?;
        if track.room.is_none() {
            track.room = track.output.clone().try_reserve_owned().ok();
        }
        while track.hungry() {
            match track.input.try_recv() {
                Ok(speech) => self.hear(generator, geometry, track, Some(speech))?,
                Err(mpsc::error::TryRecvError::Disconnected) => self.hear(generator, geometry, track, None)?,
                Err(mpsc::error::TryRecvError::Empty) => break,
            }
        }
        Ok(true)
    }

    /// Begins a new epoch if one was raised.
    fn interrupt(&self, geometry: &Geometry, track: &mut Track) -> Result<(), Fault> {
        if let Some(epoch) = track.raised() {
            let forgot = track.stream.call(|s| Ok(s.cut()))?;
            track.raise(geometry, epoch, forgot);
        }
        Ok(())
    }

    fn hear(
        &self,
        generator: &mut dyn Generator,
        geometry: &Geometry,
        track: &mut Track,
        speech: Option<Speech>,
    ) -> Result<(), Fault> {
        match speech {
            Some(Speech::Audio(audio, handed_over, epoch)) => {
                self.interrupt(geometry, track)?;
                if epoch != track.splice.epoch() {
                    return Ok(());
                }
                let audio = track.splice.audio(audio);
                track.stream.call(|s| s.push(&audio))?;
                self.meter.heard(audio.samples.len());
                track.heard(geometry, handed_over);
            }
            Some(Speech::Change(Change { portrait, options, reply })) => {
                if reply.is_closed() {
                    return Ok(());
                }
                let options = self.fitted(options);
                let opened = guarded(|| generator.open(&portrait, &options)).map(|stream| Guarded(Some(stream)));
                match opened {
                    Ok(stream) => {
                        // Nobody waits for it any more: the face that is there stays.
                        if reply.send(Ok(())).is_ok() {
                            track.replace(stream);
                        }
                    }
                    Err(Fault::Face(error)) => drop(reply.send(Err(error))),
                    Err(fault) => return Err(fault),
                }
            }
            Some(Speech::Finish) | None => {
                track.stream.call(|s| s.finish())?;
                track.input.close();
                track.finishing = true;
                track.worth_a_pull = true;
            }
        }
        Ok(())
    }

    /// Makes the next block of a lane that has room. `Ok(false)`: the stream is complete.
    fn make(&self, geometry: &Geometry, track: &mut Track) -> Result<bool, Fault> {
        let began = Instant::now();
        let Some(mut block) = track.stream.call(|s| s.pull())? else {
            match track.stream.under_way() {
                0 => track.nothing_yet(),
                _ => track.worth_a_pull = false,
            }
            return Ok(!track.finishing);
        };
        let now = Instant::now();
        let span = geometry.block_span(block.index).as_duration();
        let took = block.stages.busiest.unwrap_or(now - began);
        self.meter.block(took, span, block.stages, Some(track.made(now)));
        let metrics = telemetry::metrics();
        metrics.stage("features", block.stages.features);
        metrics.stage("generation", block.stages.generation);
        metrics.stage("decode", block.stages.decode);
        metrics.stage("total", took);
        track.splice.block(&mut block);
        if let Some(permit) = track.room.take() {
            permit.send(LaneEvent::Block(block));
        }
        Ok(true)
    }

    /// Sleeps until a command, speech, room, a closed reader or the stop comes.
    fn wait(&mut self, tracks: &mut [Track]) -> Woken {
        let mut looks: Vec<Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
        for track in tracks.iter() {
            let output = track.output.clone();
            looks.push(Box::pin(async move { output.closed().await }));
            if track.room.is_none() {
                let output = track.output.clone();
                // The place is taken by the next look; here it is only waited for.
                looks.push(Box::pin(async move { drop(output.reserve().await) }));
            }
        }
        futures::executor::block_on(poll_fn(|cx| {
            if Pin::new(&mut self.stop).poll(cx).is_ready() {
                return Poll::Ready(Woken::Stop);
            }
            if let Poll::Ready(Some(command)) = self.commands.poll_recv(cx) {
                return Poll::Ready(Woken::Open(command));
            }
            for (i, track) in tracks.iter_mut().enumerate() {
                if track.hungry()
                    && let Poll::Ready(speech) = track.input.poll_recv(cx)
                {
                    return Poll::Ready(Woken::Heard(i, speech));
                }
            }
            for track in tracks.iter_mut().filter(|t| t.room.is_some()) {
                if track.stream.poll_ready(cx).is_ready() {
                    track.worth_a_pull = true;
                    return Poll::Ready(Woken::Look);
                }
            }
            if looks.iter_mut().any(|look| look.as_mut().poll(cx).is_ready()) {
                return Poll::Ready(Woken::Look);
            }
            Poll::Pending
        }))
    }
}
