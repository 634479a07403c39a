//! The speech-to-video transformer.
