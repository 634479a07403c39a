//! Who watches: one encoded stream handed to many sinks, each behind its own gate.
//!
//! A sink begins at a keyframe. One whose line holds more than [`CONGESTED`] gets no pictures until that has drained
//! and the next keyframe comes; what it misses is counted, and nobody else notices. The voice goes to everyone always.
//!
//! | edge | capacity | when full |
//! | --- | --- | --- |
//! | pictures → one of several sinks | 300 ms of its pacer | pictures dropped until the next keyframe, counted |
//! | voice → one sink | the sink's own queue | the sink drops and counts |
//!
//! While one sink alone is on the network its estimate steers the bitrate, and pictures are skipped before they are
//! encoded. With several, the configured bitrate is made, for what helps one would hurt the others.

use super::{EncodedAudio, EncodedVideo, LinkOut, LinkStats};
use crate::{avatar::MatteWish, codec::View, edge::Counter};
use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::Notify;

/// What a sink is, for the rules that differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SinkRole {
    /// The two-way page: is told states and numbers by [`LinkOut::message`].
    Peer,
    /// Watches over a network: a player, a room, another server.
    Viewer,
    /// Has no line that could be slow or would have an estimate.
    Recorder,
}

/// Pictures are held back while a sink's line needs longer than this to send what it has…
pub(super) const CONGESTED: Duration = Duration::from_millis(300);
/// …until it needs less than this.
const DRAINED: Duration = Duration::from_millis(100);
/// A slow sink's own wish for a keyframe is passed on this often at most: keyframes cost everybody.
const SLOW_SPACING: Duration = Duration::from_secs(2);

/// What the lines of all sinks mean for the one encoder.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Line {
    /// All sinks, and those besides two-way pages.
    pub sinks: usize,
    pub watched: usize,
    /// Several sinks on the network: nobody's line steers the encoder.
    pub shared: bool,
    /// Of the one sink on the network: what its pacer holds, and its estimate for everything sent to it.
    pub queue: Duration,
    pub target: Option<u32>,
}

struct Entry {
    id: u64,
    role: SinkRole,
    /// Which picture it gets; `None` = the session's.
    view: Option<View>,
    sink: Arc<dyn LinkOut>,
    /// Gets nothing before the next keyframe.
    waiting: AtomicBool,
    /// Waits because its line was slow.
    slow: AtomicBool,
    /// Its pictures that had left when they were last looked at.
    told: AtomicU64,
    asked: Mutex<Option<Instant>>,
}

/// All sinks of one session.
#[derive(Default)]
pub struct Fan {
    sinks: Mutex<Vec<Arc<Entry>>>,
    next: AtomicU64,
    keyframe: AtomicBool,
    closed: AtomicBool,
    wake: Arc<Notify>,
    /// Of sinks that asked for no view of their own.
    view: Mutex<View>,
    /// Set while a sink's view cuts the presenter out.
    matte: MatteWish,
    dropped: Counter,
    slowed: Counter,
}

/// A sink's place in a session; dropping it is leaving.
pub struct Attachment {
    fan: Arc<Fan>,
    id: u64,
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.fan.lock().retain(|e| e.id != self.id);
        self.fan.wish_matte();
        self.fan.wake.notify_one();
    }
}

impl Fan {
    pub(super) fn new(wake: Arc<Notify>) -> Arc<Fan> {
        Arc::new(Fan { wake, ..Fan::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Entry>>> {
        // Held to copy or change the list, never while a sink is called.
        self.sinks.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes a sink on; it begins with the next keyframe, which is asked for. A session that is over closes it at once.
    pub fn attach(self: &Arc<Fan>, sink: Arc<dyn LinkOut>, role: SinkRole) -> Attachment {
        self.enter(sink, role, None)
    }

    /// As [`Fan::attach`], for another view of the presenter than the whole picture.
    pub fn attach_as(self: &Arc<Fan>, sink: Arc<dyn LinkOut>, role: SinkRole, view: View) -> Attachment {
        self.enter(sink, role, Some(view))
    }

    fn enter(self: &Arc<Fan>, sink: Arc<dyn LinkOut>, role: SinkRole, view: Option<View>) -> Attachment {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (waiting, slow) = (AtomicBool::new(true), AtomicBool::new(false));
        let told = AtomicU64::new(sink.stats().sent_pictures.unwrap_or_default());
        self.lock().push(Arc::new(Entry {
            id,
            role,
            view,
            sink: sink.clone(),
            waiting,
            slow,
            told,
            asked: Mutex::default(),
        }));
        if self.closed.load(Ordering::Acquire) {
            sink.close();
        }
        self.wish_matte();
        self.want_keyframe();
        Attachment { fan: self.clone(), id }
    }

    /// Somebody cannot decode. Requests that come together become one keyframe.
    pub fn want_keyframe(&self) {
        self.keyframe.store(true, Ordering::Release);
        self.wake.notify_one();
    }

    pub(super) fn take_keyframe_wish(&self) -> bool {
        self.keyframe.swap(false, Ordering::AcqRel)
    }

    /// The views that are looked at; the plain one while nobody looks.
    pub(super) fn views(&self) -> BTreeSet<View> {
        let mut views: BTreeSet<View> = self.sinks().iter().map(|e| self.view_of(e)).collect();
        if views.is_empty() {
            views.insert(View::Plain);
        }
        views
    }

    fn view_of(&self, entry: &Entry) -> View {
        let usual = *self.view.lock().unwrap_or_else(|e| e.into_inner());
        match entry.view {
            Some(view) => view,
            // Only a player that takes matte and colour apart can do something with such a picture.
            None if usual == View::Stacked && entry.role != SinkRole::Viewer => View::Plain,
            None => usual,
        }
    }

    /// What sinks get that asked for no view of their own, from the next keyframe on.
    pub fn set_view(&self, view: View) {
        *self.view.lock().unwrap_or_else(|e| e.into_inner()) = view;
        self.sinks().iter().filter(|e| e.view.is_none()).for_each(|e| e.waiting.store(true, Ordering::Release));
        self.wish_matte();
        self.want_keyframe();
    }

    fn wish_matte(&self) {
        self.matte.set(self.views().iter().any(|v| v.cuts_out()));
    }

    /// What the face is opened with, so that it makes mattes while they are looked at.
    pub(super) fn matte(&self) -> &MatteWish {
        &self.matte
    }

    /// Gives a picture to the sinks of its view.
    pub(super) fn show(&self, view: View, video: &EncodedVideo, wall: Instant) {
        let sinks = self.sinks();
        let alone = sinks.iter().filter(|e| e.role != SinkRole::Recorder).count() <= 1;
        for entry in sinks.iter().filter(|e| self.view_of(e) == view) {
            if entry.admits(video.keyframe, alone, wall, self) {
                entry.sink.video(video.clone(), wall);
            } else {
                self.dropped.add(1);
            }
        }
    }

    /// Sinks now.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Pictures that slow or joining sinks did not get, and how often a sink became slow; since the session began.
    pub fn dropped(&self) -> (u64, u64) {
        (self.dropped.get(), self.slowed.get())
    }

    /// Pictures that have left since the last call for the viewer whose numbers are [`LinkOut::stats`]; `None` when
    /// nobody has a line, or one that counts.
    pub(super) fn left(&self) -> Option<u64> {
        let sinks = self.sinks();
        let id = lead(&sinks)?.id;
        let mut left = None;
        for entry in &sinks {
            let Some(sent) = entry.sink.stats().sent_pictures else { continue };
            let before = entry.told.swap(sent, Ordering::Relaxed);
            if entry.id == id {
                left = Some(sent.saturating_sub(before));
            }
        }
        left
    }

    pub(super) fn line(&self) -> Line {
        let sinks = self.lock();
        let watched = sinks.iter().filter(|e| e.role != SinkRole::Peer).count();
        let mut network = sinks.iter().filter(|e| e.role != SinkRole::Recorder);
        let count = sinks.len();
        let (first, shared) = (network.next().cloned(), network.next().is_some());
        drop(sinks);
        match first {
            Some(entry) if !shared => {
                let stats = entry.sink.stats();
                let target = Some(stats.target_bitrate).filter(|t| *t > 0);
                Line { sinks: count, watched, shared, queue: stats.pacer_queue, target }
            }
            _ => Line { sinks: count, watched, shared, ..Line::default() },
        }
    }

    fn sinks(&self) -> Vec<Arc<Entry>> {
        self.lock().clone()
    }
}

impl Entry {
    /// Whether this sink gets the picture.
    fn admits(&self, keyframe: bool, alone: bool, now: Instant, fan: &Fan) -> bool {
        let queue =
            if alone || self.role == SinkRole::Recorder { Duration::ZERO } else { self.sink.stats().pacer_queue };
        if queue > CONGESTED {
            if !self.waiting.swap(true, Ordering::AcqRel) {
                self.slow.store(true, Ordering::Release);
                fan.slowed.add(1);
            }
            return false;
        }
        if !self.waiting.load(Ordering::Acquire) {
            return true;
        }
        if keyframe {
            self.waiting.store(false, Ordering::Release);
            self.slow.store(false, Ordering::Release);
            return true;
        }
        if self.slow.load(Ordering::Acquire) && queue < DRAINED {
            let mut asked = self.asked.lock().unwrap_or_else(|e| e.into_inner());
            if asked.is_none_or(|at| now.saturating_duration_since(at) >= SLOW_SPACING) {
                *asked = Some(now);
                fan.want_keyframe();
            }
        }
        false
    }
}

/// The two-way page, else whoever watches over a network for longest.
fn lead(sinks: &[Arc<Entry>]) -> Option<&Arc<Entry>> {
    let network = |e: &&Arc<Entry>| e.role != SinkRole::Recorder;
    sinks.iter().find(|e| e.role == SinkRole::Peer).or_else(|| sinks.iter().find(network))
}

/// The encoder and the session speak to all sinks as if they were one.
impl LinkOut for Fan {
    fn video(&self, video: EncodedVideo, wall: Instant) {
        self.show(View::Plain, &video, wall);
    }

    fn audio(&self, audio: EncodedAudio, wall: Instant) {
        self.sinks().iter().for_each(|e| e.sink.audio(audio.clone(), wall));
    }

    /// For two-way pages only.
    fn message(&self, text: String) {
        let sinks = self.sinks();
        sinks.iter().filter(|e| e.role == SinkRole::Peer).for_each(|e| e.sink.message(text.clone()));
    }

    /// Of the two-way page, else of whoever watches for longest.
    fn stats(&self) -> LinkStats {
        lead(&self.sinks()).map(|e| e.sink.stats()).unwrap_or_default()
    }

    fn close(&self) {
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        self.sinks().iter().for_each(|e| e.sink.close());
    }
}
