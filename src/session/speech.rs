//! Speech that does not come from a microphone: PCM in segments, as fast as its maker likes.
//!
//! | edge | capacity | when full |
//! | --- | --- | --- |
//! | speech → session | `session.speech_buffer_s` seconds, all ports together | [`SpeechPort::push`] waits |
//!
//! Segments are played one after the other in the order in which they began. One that runs dry gives way to the
//! microphone, or to a later one that has something to say.

use crate::{
    codec::{CodecError, OPUS_RATE, Resampler},
    media::Pcm,
};
use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::Notify;

/// What a segment must hold to begin, or to go on after it ran dry, unless it has ended: 60 ms.
const PREROLL: usize = 2880;

/// The speech cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum SpeechClosed {
    #[error("the session is over and takes no more speech")]
    Over,
    #[error("sound of {0} Hz cannot be used; allowed are 8000 to 192000")]
    Rate(u32),
    #[error(transparent)]
    Codec(#[from] CodecError),
}

struct Segment {
    id: u64,
    port: u64,
    /// 48 kHz.
    samples: VecDeque<f32>,
    ended: bool,
    running: bool,
}

#[derive(Default)]
struct Inner {
    segments: VecDeque<Segment>,
    buffered: usize,
    bound: usize,
    closed: bool,
    /// How often everything was thrown away.
    interrupts: u64,
    dropped: Vec<u64>,
    complete: Vec<u64>,
}

/// The bounded edge between ports and the session.
pub struct SpeechQueue {
    inner: Mutex<Inner>,
    next: AtomicU64,
    room: Notify,
    wake: Arc<Notify>,
}

/// Some 48 kHz speech of one segment.
pub(super) struct Taken {
    pub(super) segment: u64,
    pub(super) samples: Vec<f32>,
}

impl SpeechQueue {
    pub fn new(wake: Arc<Notify>) -> Arc<SpeechQueue> {
        let inner = Inner { bound: usize::MAX, ..Inner::default() };
        Arc::new(SpeechQueue { inner: Mutex::new(inner), next: AtomicU64::new(1), room: Notify::new(), wake })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A way in, with segments of its own.
    pub fn port(self: &Arc<SpeechQueue>) -> SpeechPort {
        let port = self.next.fetch_add(1, Ordering::Relaxed);
        SpeechPort { queue: self.clone(), port, resampler: Mutex::default() }
    }

    pub(super) fn bound(&self, seconds: u64) {
        self.lock().bound = (seconds.clamp(1, 3600) as usize) * OPUS_RATE as usize;
    }

    /// Speech that waits, all segments together.
    pub fn buffered(&self) -> Duration {
        Duration::from_secs_f64(self.lock().buffered as f64 / f64::from(OPUS_RATE))
    }

    /// Throws away all that waits; what is pushed from here on is new.
    pub fn interrupt(&self) {
        let mut inner = self.lock();
        inner.interrupts += 1;
        inner.buffered = 0;
        let gone: Vec<u64> = inner.segments.drain(..).map(|s| s.id).collect();
        inner.dropped.extend(gone);
        drop(inner);
        self.room.notify_waiters();
        self.wake.notify_one();
    }

    /// Nothing is taken any more.
    pub(super) fn close(&self) {
        let mut inner = self.lock();
        inner.closed = true;
        let gone: Vec<u64> = inner.segments.drain(..).map(|s| s.id).collect();
        inner.dropped.extend(gone);
        inner.buffered = 0;
        drop(inner);
        self.room.notify_waiters();
    }

    pub(super) fn interrupts(&self) -> u64 {
        self.lock().interrupts
    }

    /// Segments that an interruption threw away, and segments of which everything was taken; each is told once.
    pub(super) fn over(&self) -> (Vec<u64>, Vec<u64>) {
        let mut inner = self.lock();
        (std::mem::take(&mut inner.dropped), std::mem::take(&mut inner.complete))
    }

    /// Whether something could be taken now.
    pub(super) fn ready(&self) -> bool {
        self.lock().segments.iter().any(Segment::ready)
    }

    /// At most `most` samples of the segment whose turn it is.
    pub(super) fn take(&self, most: usize) -> Option<Taken> {
        let mut inner = self.lock();
        let at = inner.segments.iter().position(Segment::ready)?;
        let segment = &mut inner.segments[at];
        let n = most.min(segment.samples.len());
        let taken = Taken { segment: segment.id, samples: segment.samples.drain(..n).collect() };
        segment.running = !segment.samples.is_empty();
        if segment.ended && segment.samples.is_empty() {
            let id = segment.id;
            inner.segments.remove(at);
            inner.complete.push(id);
        }
        inner.buffered -= n;
        drop(inner);
        self.room.notify_waiters();
        Some(taken)
    }
}

impl Segment {
    fn ready(&self) -> bool {
        !self.samples.is_empty() && (self.running || self.ended || self.samples.len() >= PREROLL)
    }
}

/// A way to make a session speak. Dropping it ends its open segment.
pub struct SpeechPort {
    queue: Arc<SpeechQueue>,
    port: u64,
    resampler: Mutex<Option<(u32, Resampler, u64)>>,
}

impl SpeechPort {
    /// Appends to the open segment, or begins one; any rate from 8 to 192 kHz (`pcm.at` is not looked at). Waits while
    /// the buffer is full. Returns the segment's number, which its events carry. What an interruption finds waiting
    /// here is dropped like the rest.
    ///
    /// # Errors
    /// The session is over, or the rate cannot be used.
    pub async fn push(&self, pcm: Pcm) -> Result<u64, SpeechClosed> {
        if !(8_000..=192_000).contains(&pcm.rate) {
            return Err(SpeechClosed::Rate(pcm.rate));
        }
        let before = self.queue.interrupts();
        let samples = self.resample(&pcm, before)?;
        let mut rest = samples.as_slice();
        loop {
            let mut room = std::pin::pin!(self.queue.room.notified());
            room.as_mut().enable();
            {
                let mut inner = self.queue.lock();
                if inner.closed {
                    return Err(SpeechClosed::Over);
                }
                if inner.interrupts != before {
                    return Ok(0);
                }
                let open = inner.segments.iter().rposition(|s| s.port == self.port && !s.ended);
                let at = open.unwrap_or_else(|| {
                    let id = self.queue.next.fetch_add(1, Ordering::Relaxed);
                    let (port, samples) = (self.port, VecDeque::new());
                    inner.segments.push_back(Segment { id, port, samples, ended: false, running: false });
                    inner.segments.len() - 1
                });
                let n = rest.len().min(inner.bound.saturating_sub(inner.buffered));
                inner.segments[at].samples.extend(&rest[..n]);
                inner.buffered += n;
                rest = &rest[n..];
                let id = inner.segments[at].id;
                drop(inner);
                self.queue.wake.notify_one();
                if rest.is_empty() {
                    return Ok(id);
                }
            }
            room.await;
        }
    }

    /// Ends the open segment. Once its last sound was played, `SpeakEnded` says so.
    pub fn end(&self) {
        let tail = {
            let mut resampler = self.resampler.lock().unwrap_or_else(|e| e.into_inner());
            resampler.take().map(|(_, mut r, interrupts)| (r.finish().unwrap_or_default(), interrupts))
        };
        let mut inner = self.queue.lock();
        let current = inner.interrupts;
        let Some(at) = inner.segments.iter().rposition(|s| s.port == self.port && !s.ended) else { return };
        // The filter's last milliseconds go in even when the buffer is full.
        let tail = tail.filter(|t| t.1 == current).map(|t| t.0).unwrap_or_default();
        inner.buffered += tail.len();
        let segment = &mut inner.segments[at];
        segment.samples.extend(tail);
        segment.ended = true;
        if segment.samples.is_empty() {
            let id = segment.id;
            inner.segments.remove(at);
            inner.complete.push(id);
        }
        drop(inner);
        self.queue.wake.notify_one();
    }

    /// Speech that waits in the session, all ports together.
    pub fn buffered(&self) -> Duration {
        self.queue.buffered()
    }

    fn resample(&self, pcm: &Pcm, interrupts: u64) -> Result<Vec<f32>, CodecError> {
        let clean = |s: &f32| if s.is_finite() { s.clamp(-1.0, 1.0) } else { 0.0 };
        let samples: Vec<f32> = pcm.samples.iter().map(clean).collect();
        let mut resampler = self.resampler.lock().unwrap_or_else(|e| e.into_inner());
        // Another rate, or what came before was thrown away: begin anew.
        if !resampler.as_ref().is_some_and(|r| (r.0, r.2) == (pcm.rate, interrupts)) {
            *resampler = Some((pcm.rate, Resampler::new(pcm.rate, OPUS_RATE)?, interrupts));
        }
        let Some((_, inner, _)) = resampler.as_mut() else { return Ok(samples) };
        inner.push(&samples)
    }
}

impl Drop for SpeechPort {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::MediaTime;

    fn pcm(rate: u32, ms: usize) -> Pcm {
        Pcm { at: MediaTime::ZERO, rate, samples: vec![0.5; rate as usize * ms / 1000] }
    }

    #[tokio::test]
    async fn a_full_buffer_makes_the_speaker_wait_and_an_interruption_lets_go() {
        let queue = SpeechQueue::new(Arc::default());
        queue.bound(1);
        let port = queue.port();
        let first = port.push(pcm(48_000, 900)).await.unwrap();
        let mut waiting = std::pin::pin!(port.push(pcm(48_000, 300)));
        assert!(futures::poll!(waiting.as_mut()).is_pending());
        assert_eq!(queue.buffered(), Duration::from_secs(1));
        for _ in 0..20 {
            assert_eq!(queue.take(480).unwrap().segment, first);
        }
        assert_eq!(waiting.await.unwrap(), first);
        let mut waiting = std::pin::pin!(port.push(pcm(48_000, 300)));
        assert!(futures::poll!(waiting.as_mut()).is_pending());
        queue.interrupt();
        waiting.await.unwrap();
        assert_eq!((queue.buffered(), queue.over().0), (Duration::ZERO, vec![first]));
        let second = port.push(pcm(48_000, 10)).await.unwrap();
        assert_ne!(first, second);
        assert!(queue.take(480).is_none(), "too little to begin with");
        port.end();
        assert_eq!(queue.take(4800).unwrap().samples.len(), 480);
        assert_eq!(queue.over().1, [second]);
        queue.close();
        assert!(matches!(port.push(pcm(16_000, 10)).await, Err(SpeechClosed::Over)));
    }

    #[tokio::test]
    async fn any_rate_lasts_as_long_as_it_did() {
        for rate in [8_000, 16_000, 22_050, 24_000, 44_100, 48_000] {
            let queue = SpeechQueue::new(Arc::default());
            let port = queue.port();
            for _ in 0..50 {
                port.push(pcm(rate, 20)).await.unwrap();
            }
            port.end();
            let mut length = 0;
            while let Some(taken) = queue.take(480) {
                length += taken.samples.len();
            }
            assert!(length.abs_diff(48_000) <= 48_000 * 20 / rate as usize, "{rate}: {length}");
        }
    }

    #[tokio::test]
    async fn a_segment_that_runs_dry_gives_way() {
        let queue = SpeechQueue::new(Arc::default());
        let (a, b) = (queue.port(), queue.port());
        let first = a.push(pcm(48_000, 100)).await.unwrap();
        let second = b.push(pcm(48_000, 100)).await.unwrap();
        assert_eq!(queue.take(9999).unwrap().segment, first);
        assert_eq!(queue.take(480).unwrap().segment, second);
        a.push(pcm(48_000, 100)).await.unwrap();
        assert_eq!(queue.take(480).unwrap().segment, first);
    }
}
