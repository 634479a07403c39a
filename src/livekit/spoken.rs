//! The agent's speech on its way into the session: segments that are begun, handed on, cut off, and told as finished.

use super::{calls::Notice, streams::Piece, worker::Worker};
use crate::{
    media::{MediaTime, Pcm},
    session::SpeechClosed,
};
use futures::{FutureExt, future::BoxFuture};

impl Worker {
    /// Everything that waits is thrown away.
    pub(super) fn clear(&mut self) {
        self.pushing = None;
        self.unheard += self.streams.clear() + usize::from(self.fresh);
        (self.fresh, self.mid) = (false, false);
        self.cut.extend(self.open.iter());
        // A segment that the session has nothing of is ended there without an event.
        self.port.end();
        self.tell_unheard();
    }

    /// Segments nobody heard anything of are told after those before them.
    pub(super) fn tell_unheard(&mut self) {
        if self.open.is_empty() {
            for _ in 0..std::mem::take(&mut self.unheard) {
                self.calls.tell(Notice::Finished { position_s: 0.0, interrupted: true });
            }
        }
    }

    /// Hands the next speech to the session, unless some is on its way.
    pub(super) fn feed(&mut self) {
        while self.pushing.is_none() {
            match self.streams.next() {
                Some(Piece::End) => {
                    self.port.end();
                    self.unheard += usize::from(self.fresh);
                    (self.fresh, self.mid) = (false, false);
                    self.tell_unheard();
                }
                Some(Piece::Sound { rate, samples }) => {
                    self.fresh |= !std::mem::replace(&mut self.mid, true);
                    let port = self.port.clone();
                    let pcm = Pcm { at: MediaTime::ZERO, rate, samples };
                    self.pushing = Some(async move { port.push(pcm).await }.boxed());
                }
                None => return,
            }
        }
    }

    pub(super) fn pushed(&mut self, pushed: Result<u64, SpeechClosed>) {
        self.pushing = None;
        match pushed {
            // Thrown away by an interruption that was not ours.
            Ok(0) => {}
            Ok(segment) => {
                self.fresh = false;
                self.open.insert(segment);
            }
            // The session's end is told by its event.
            Err(SpeechClosed::Over) => {}
            Err(error) => tracing::warn!(%error, "speech was dropped"),
        }
    }
}

/// Waits for the piece that is on its way; for ever when there is none.
pub(super) async fn finished(
    pushing: &mut Option<BoxFuture<'static, Result<u64, SpeechClosed>>>,
) -> Result<u64, SpeechClosed> {
    match pushing {
        Some(pushing) => pushing.await,
        None => std::future::pending().await,
    }
}
