//! Bounded queues. Each names its capacity, what happens when it is full, and counts what it refused or dropped.
//!
//! | edge | capacity | when full | why |
//! | --- | --- | --- | --- |
//! | RTP in → jitter | about 200 ms | oldest leaves, counted | late speech is of no use |
//! | audio blocks → device | 1 ready + 1 running | waits; `lag` grows and is visible | speech must not lose syllables |
//! | frames → playout | about 2 blocks | device waits | memory, and no stale face after an interruption |
//! | raw frames → encoder | latest only | older raw frame leaves, counted | skip before encoding, never after |
//! | encoded → one viewer | small | ask for a keyframe, count | one slow viewer never slows another |
//! | audio → viewer | small | never dropped while connected | ears forgive less than eyes |

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering},
};
use tokio::sync::{Notify, mpsc};

/// A counter shared with whoever reports it.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A queue whose sender never waits: when full, the newest item is refused and counted.
pub fn refusing<T>(capacity: usize) -> (RefusingSender<T>, mpsc::Receiver<T>) {
    let (tx, rx) = mpsc::channel(capacity);
    (RefusingSender { tx, refused: Counter::default() }, rx)
}

pub struct RefusingSender<T> {
    tx: mpsc::Sender<T>,
    refused: Counter,
}

impl<T> Clone for RefusingSender<T> {
    fn clone(&self) -> Self {
        RefusingSender { tx: self.tx.clone(), refused: self.refused.clone() }
    }
}

/// Why a [`RefusingSender`] did not take an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    Full,
    Closed,
}

impl<T> RefusingSender<T> {
    pub fn send(&self, item: T) -> Result<(), Refused> {
        match self.tx.try_send(item) {
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.refused.add(1);
                Err(Refused::Full)
            }
            Err(mpsc::error::TrySendError::Closed(_)) => Err(Refused::Closed),
        }
    }
    pub fn refused(&self) -> &Counter {
        &self.refused
    }
    pub fn is_closed(&self) -> bool {
        self.tx.is_closed()
    }
}

/// A slot that holds the latest item only; an item not taken in time is replaced and counted.
pub struct Latest<T> {
    slot: Mutex<(Option<T>, bool)>,
    wake: Notify,
    replaced: Counter,
}

impl<T> Default for Latest<T> {
    fn default() -> Self {
        Latest { slot: Mutex::new((None, false)), wake: Notify::new(), replaced: Counter::default() }
    }
}

impl<T> Latest<T> {
    pub fn put(&self, item: T) {
        // A std mutex: held for a swap, never across an await.
        let mut slot = self.slot.lock().unwrap_or_else(|e| e.into_inner());
        if slot.0.replace(item).is_some() {
            self.replaced.add(1);
        }
        drop(slot);
        self.wake.notify_one();
    }
    /// Throws away what waits.
    pub fn clear(&self) {
        self.slot.lock().unwrap_or_else(|e| e.into_inner()).0 = None;
    }
    /// The next item; `None` once closed and empty.
    pub async fn take(&self) -> Option<T> {
        loop {
            let waiting = self.wake.notified();
            {
                let mut slot = self.slot.lock().unwrap_or_else(|e| e.into_inner());
                if let Some(item) = slot.0.take() {
                    return Some(item);
                }
                if slot.1 {
                    return None;
                }
            }
            waiting.await;
        }
    }
    pub fn close(&self) {
        self.slot.lock().unwrap_or_else(|e| e.into_inner()).1 = true;
        self.wake.notify_one();
    }
    pub fn replaced(&self) -> &Counter {
        &self.replaced
    }
}
