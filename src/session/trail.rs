//! The way of each block through a session, for a trace: heard, made, encoded, handed to the sinks. Kept only where
//! somebody takes traces.

use super::encoder::Passed;
use crate::{
    media::MediaTime,
    telemetry::{Attribute, Span, Trace, Traces},
};
use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Pictures of a block that have not passed by then never will: skipped, thinned out, or nobody watches.
const OVER: Duration = Duration::from_secs(5);
/// Blocks under way at most; beyond, the oldest is told as it is.
const MOST: usize = 64;

/// A block that came from the engine.
#[derive(Clone, Debug)]
pub struct Made {
    pub index: u64,
    /// Media time of its pictures: first, and end of the last.
    pub from: MediaTime,
    pub until: MediaTime,
    /// When its first sound was heard.
    pub heard: Instant,
    pub features: Duration,
    pub generation: Duration,
    pub decode: Duration,
    pub arrived: Instant,
}

struct Block {
    made: Made,
    pictures: i64,
    encoded: Option<(Instant, Instant)>,
    sent: Option<(Instant, Instant)>,
}

/// See the module.
pub(super) struct Trail {
    session: String,
    traces: &'static Traces,
    blocks: VecDeque<Block>,
}

impl Trail {
    pub(super) fn new(session: &str, traces: &'static Traces) -> Trail {
        Trail { session: session.into(), traces, blocks: VecDeque::new() }
    }

    pub(super) fn made(&mut self, made: Made) {
        self.blocks.push_back(Block { made, pictures: 0, encoded: None, sent: None });
        if self.blocks.len() > MOST {
            self.tell();
        }
    }

    /// Pictures that were encoded and handed over; tells the blocks that are complete with them.
    pub(super) fn passed(&mut self, pictures: &[Passed], now: Instant) {
        let grown = |span: &mut Option<(Instant, Instant)>, begun, ended| {
            *span = Some((span.map_or(begun, |s| s.0), ended));
        };
        for p in pictures {
            let Some(block) = self.blocks.iter_mut().find(|b| (b.made.from..b.made.until).contains(&p.at)) else {
                continue;
            };
            block.pictures += 1;
            grown(&mut block.encoded, p.begun, p.encoded);
            grown(&mut block.sent, p.encoded, p.sent);
        }
        let newest = pictures.last().map_or(MediaTime::ZERO, |p| p.at);
        while let Some(block) = self.blocks.front() {
            let over = newest >= block.made.until || now.saturating_duration_since(block.made.arrived) > OVER;
            if !over {
                return;
            }
            self.tell();
        }
    }

    fn tell(&mut self) {
        let Some(Block { made, pictures, encoded, sent }) = self.blocks.pop_front() else { return };
        let attributes = || vec![("session.id", Attribute::Text(self.session.clone()))];
        let span = |name, (begun, ended)| Span { name, begun, ended, attributes: attributes() };
        // The engine says how long its stages took; they end when the block is there.
        let before = |end: Instant, took: Duration| end.checked_sub(took).unwrap_or(end);
        let decode = before(made.arrived, made.decode);
        let steps = before(decode, made.generation);
        let features = before(steps, made.features);
        let mut parts = vec![
            span("ingest", (made.heard.min(features), features)),
            span("features", (features, steps)),
            span("steps", (steps, decode)),
            span("decode", (decode, made.arrived)),
        ];
        parts.extend(encoded.map(|s| span("encode", s)));
        parts.extend(sent.map(|s| span("send", s)));
        let ended = sent.map_or(made.arrived, |s| s.1);
        let mut whole = span("block", (made.heard.min(features), ended));
        whole.attributes.push(("block.index", Attribute::Number(made.index as i64)));
        whole.attributes.push(("block.pictures", Attribute::Number(pictures)));
        self.traces.hand(Trace { whole, parts });
    }
}
