//! The two ends of a lane: what a session holds and what the device thread holds.

use super::{Seat, Splice, device::Guarded};
use crate::{
    avatar::{self, OpenOptions},
    media::{AudioBlock, Epoch, FrameBlock, Geometry, MediaTime, Portrait, SPEECH_RATE},
};
use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot};

/// Messages of speech that may wait before the device; 20 ms each, that is a third of a second.
pub const INPUT_BLOCKS: usize = 16;
/// Blocks of frames that may wait for the session.
pub const OUTPUT_BLOCKS: usize = 2;

/// One face. Dropping `output`, or both halves, ends the stream and gives the slot back; dropping every
/// [`LaneInput`] alone is the same as [`LaneInput::finish`].
pub struct Lane {
    pub input: LaneInput,
    pub output: mpsc::Receiver<LaneEvent>,
}

/// What a lane says.
#[derive(Debug)]
pub enum LaneEvent {
    Block(FrameBlock),
    /// Every block of a finished stream was sent; the last event.
    Finished,
    /// The stream is lost; the text says why. The last event.
    Failed(String),
}

/// The lane is over: finished, failed or its receiver dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the lane is closed")]
pub struct LaneClosed;

/// Why [`LaneInput::try_push`] did not take a block.
#[derive(Debug, thiserror::Error)]
pub enum TryPush {
    /// The device is behind; the block comes back.
    #[error("the engine is behind and takes no more speech now")]
    Full(AudioBlock),
    #[error("the lane is closed")]
    Closed,
}

pub(super) enum Speech {
    /// When it was handed over: waiting for room counts as lag.
    Audio(AudioBlock, Instant, Epoch),
    Change(Change),
    Finish,
}

/// Another face for a lane that stands. The one that is there stays when this cannot be opened, or when nobody waits
/// for the reply any more.
pub struct Change {
    pub portrait: Portrait,
    pub options: OpenOptions,
    pub reply: oneshot::Sender<avatar::Result<()>>,
}

/// The speech half of a lane.
#[derive(Clone)]
pub struct LaneInput {
    pub(super) speech: mpsc::Sender<Speech>,
    pub(super) epoch: Arc<AtomicU32>,
}

impl LaneInput {
    /// An interruption: what was pushed in older epochs and is not yet in a block is forgotten, blocks of older epochs
    /// say so ([`FrameBlock::epoch`]), and what is pushed from here on may go on at any time. The device sees it before
    /// it begins another block.
    pub fn raise(&self, epoch: Epoch) {
        self.epoch.store(epoch.0, Ordering::Release);
    }
    /// Changes the face; what is pushed after the reply is said by the new one, and may go on at any time. Speech of
    /// which the old one made no block yet is forgotten. Gives the change back while the lane is full; a closed lane
    /// drops it.
    #[must_use = "a full lane gives the change back"]
    pub fn change(&self, change: Change) -> Option<Change> {
        match self.speech.try_send(Speech::Change(change)) {
            Err(mpsc::error::TrySendError::Full(Speech::Change(change))) => Some(change),
            _ => None,
        }
    }
    fn audio(&self, audio: AudioBlock) -> Speech {
        Speech::Audio(audio, Instant::now(), Epoch(self.epoch.load(Ordering::Acquire)))
    }
    /// Hands over speech; waits while the device is more than two blocks behind.
    pub async fn push(&self, audio: AudioBlock) -> Result<(), LaneClosed> {
        self.speech.send(self.audio(audio)).await.map_err(|_| LaneClosed)
    }
    /// Hands over speech or says at once why not.
    pub fn try_push(&self, audio: AudioBlock) -> Result<(), TryPush> {
        self.speech.try_send(self.audio(audio)).map_err(|e| match e {
            mpsc::error::TrySendError::Full(Speech::Audio(audio, ..)) => TryPush::Full(audio),
            _ => TryPush::Closed,
        })
    }
    /// Speech ended: what is held back is completed with silence, then [`LaneEvent::Finished`] comes.
    pub async fn finish(&self) {
        // A closed lane is already finished.
        let _ = self.speech.send(Speech::Finish).await;
    }
}

/// The device's half.
pub(super) struct Track {
    pub(super) stream: Guarded,
    pub(super) input: mpsc::Receiver<Speech>,
    pub(super) output: mpsc::Sender<LaneEvent>,
    /// Room kept from the start for the last event, so that a reader who does not read still learns the end.
    pub(super) last_word: Option<mpsc::OwnedPermit<LaneEvent>>,
    /// Room for the next block, once had.
    pub(super) room: Option<mpsc::OwnedPermit<LaneEvent>>,
    /// The next block is complete in the stream as far as we know: worth a `pull`.
    pub(super) worth_a_pull: bool,
    pub(super) finishing: bool,
    pub(super) splice: Splice,
    epoch: Arc<AtomicU32>,
    next: u64,
    opened_at: Option<Instant>,
    /// When the speech for block `next`, `next + 1`… was complete.
    complete_since: VecDeque<Instant>,
    /// Returned on drop.
    _seat: Seat,
}

impl Track {
    pub(super) fn new(
        stream: Guarded,
        input: mpsc::Receiver<Speech>,
        output: mpsc::Sender<LaneEvent>,
        epoch: Arc<AtomicU32>,
        seat: Seat,
    ) -> Track {
        let last_word = output.clone().try_reserve_owned().ok();
        Track {
            stream,
            input,
            output,
            last_word,
            room: None,
            worth_a_pull: false,
            finishing: false,
            splice: Splice::default(),
            epoch,
            next: 0,
            opened_at: None,
            complete_since: VecDeque::new(),
            _seat: seat,
        }
    }

    /// Whether more speech is taken now: at most two complete blocks wait in the stream, beside those that are made.
    pub(super) fn hungry(&self) -> bool {
        !self.finishing && self.complete_since.len() < 2 + self.stream.under_way()
    }

    /// The epoch that was raised, if it is newer than the one at work.
    pub(super) fn raised(&self) -> Option<Epoch> {
        let epoch = Epoch(self.epoch.load(Ordering::Acquire));
        (epoch != self.splice.epoch()).then_some(epoch)
    }

    /// A new epoch begins with the next block; `forgot` is what the stream said to [`Stream::cut`].
    ///
    /// [`Stream::cut`]: crate::avatar::Stream::cut
    pub(super) fn raise(&mut self, geometry: &Geometry, epoch: Epoch, forgot: bool) {
        let made = MediaTime::from_units(geometry.first_frame(self.next) as i64, geometry.fps);
        self.splice.raise(epoch, forgot.then_some(made.units(SPEECH_RATE) as u64));
        if forgot {
            self.nothing_yet();
            self.opened_at = None;
        }
    }

    /// Another face takes over; its stream begins with the speech that comes next.
    pub(super) fn replace(&mut self, stream: Guarded) {
        self.stream = stream;
        self.splice = Splice::begun(self.splice.epoch());
        self.next = 0;
        self.opened_at = None;
        self.nothing_yet();
    }

    /// More speech was pushed into the stream.
    pub(super) fn heard(&mut self, geometry: &Geometry, handed_over: Instant) {
        let made = MediaTime::from_units(geometry.first_frame(self.next) as i64, geometry.fps).as_duration();
        self.opened_at.get_or_insert(handed_over.checked_sub(made).unwrap_or(handed_over));
        let have = MediaTime::from_units(self.splice.samples() as i64, SPEECH_RATE);
        loop {
            let block = self.next + self.complete_since.len() as u64;
            let end = MediaTime::from_units(geometry.first_frame(block + 1) as i64, geometry.fps);
            if end + geometry.look_ahead > have {
                break;
            }
            self.complete_since.push_back(handed_over);
        }
        self.worth_a_pull = true;
    }

    /// When the next block is due: one block after its speech was complete; a file that is fed faster than it plays
    /// is due by its own timeline, so that it never stands in the way of a live voice.
    pub(super) fn deadline(&self, geometry: &Geometry, now: Instant) -> Instant {
        let span = geometry.block_span(self.next).as_duration();
        let played = MediaTime::from_units(geometry.first_frame(self.next + 1) as i64, geometry.fps);
        let by_feed = self.complete_since.front().copied().unwrap_or(now) + span;
        let by_play = self.opened_at.unwrap_or(now) + (played + geometry.look_ahead).as_duration() + span;
        by_feed.max(by_play)
    }

    /// The next block was made; returns how long its complete speech waited for it.
    pub(super) fn made(&mut self, now: Instant) -> Duration {
        self.next += 1;
        self.complete_since.pop_front().map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    /// The stream asked for more: what was believed complete is not.
    pub(super) fn nothing_yet(&mut self) {
        self.worth_a_pull = false;
        self.complete_since.clear();
    }

    /// Sends the last event; the lane is to be dropped after it.
    pub(super) fn end(mut self, event: LaneEvent) {
        if let Some(permit) = self.last_word.take() {
            permit.send(event);
        }
    }
}
