//! Fast tests, no GPU, no browser: one binary so that candle is linked once.

mod access;
mod base;
mod batch;
mod checkpoints;
mod codec;
mod config;
mod conformance;
mod engine;
mod files;
mod films;
mod hostile;
mod hub;
mod net;
mod peer;
mod pocket;
mod prompts;
mod quantised;
mod recording;
mod s2v;
mod server;
mod session;
mod session_loop;
mod sessions;
mod small_decoder;
mod tidy;
mod voice;
