//! The bounded edge from a peer to its session.
//!
//! | item | when the queue is nearly full | why |
//! | --- | --- | --- |
//! | speech | the newest packet is dropped, counted | a session that is 9 s behind will not catch up by more packets |
//! | target bitrate, messages | dropped, counted | the next one replaces it |
//! | connected, interrupted, keyframe requests, closed | still fit: the last `RESERVE` places are theirs | the state machine depends on them |

use crate::{edge::Counter, session::LinkEvent};
use tokio::sync::mpsc;

/// Places in the queue: 9 s of 20 ms speech packets, and the reserve.
const CAPACITY: usize = 512;
/// Places that speech, bitrates and messages may not take.
const RESERVE: usize = 48;

/// Sends events without ever waiting.
#[derive(Clone)]
pub(super) struct Events {
    tx: mpsc::Sender<LinkEvent>,
    dropped: Counter,
}

impl Events {
    pub(super) fn new() -> (Events, mpsc::Receiver<LinkEvent>) {
        let (tx, rx) = mpsc::channel(CAPACITY);
        (Events { tx, dropped: Counter::default() }, rx)
    }

    pub(super) fn send(&self, event: LinkEvent) {
        let urgent = matches!(
            event,
            LinkEvent::Connected | LinkEvent::Interrupted | LinkEvent::KeyframeRequested | LinkEvent::Closed(_)
        );
        if !urgent && self.tx.capacity() <= RESERVE {
            self.dropped.add(1);
            return;
        }
        if let Err(mpsc::error::TrySendError::Full(_)) = self.tx.try_send(event) {
            self.dropped.add(1);
        }
    }

    pub(super) fn dropped(&self) -> u64 {
        self.dropped.get()
    }

    /// Waits until the session has dropped its end.
    pub(super) async fn gone(&self) {
        self.tx.closed().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_messages_leaves_room_for_the_end() {
        let (events, mut rx) = Events::new();
        for _ in 0..2 * CAPACITY {
            events.send(LinkEvent::Message("x".into()));
        }
        assert_eq!(events.dropped(), (CAPACITY + RESERVE) as u64);
        events.send(LinkEvent::Closed("gone".into()));
        let mut last = None;
        while let Ok(event) = rx.try_recv() {
            last = Some(event);
        }
        assert!(matches!(last, Some(LinkEvent::Closed(_))));
    }
}
