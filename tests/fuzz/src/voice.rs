//! What a speech endpoint or a command answers.

#[path = "../../../src/voice/sound.rs"]
mod sound;

pub use loquent::voice::{VoiceError, sentences};

use crate::Cut;

/// A stream of sound in pieces of any length.
pub fn stream(bytes: &[u8]) {
    let mut cut = Cut(bytes);
    let mut decoder = sound::Decoder::new(24_000);
    while !cut.done() {
        let n = usize::from(cut.u8());
        match decoder.push(cut.take(n)) {
            Ok(Some(pcm)) => assert!(pcm.rate > 0 && pcm.samples.iter().all(|s| !s.is_nan())),
            Ok(None) => {}
            Err(_) => return,
        }
    }
    decoder.heard();
}
