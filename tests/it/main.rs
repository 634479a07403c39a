//! Fast tests, no GPU, no browser: one binary so that candle is linked once.

mod engine;
mod codec;
mod net;
mod peer;
mod files;
mod session;
mod session_loop;
mod tidy;
