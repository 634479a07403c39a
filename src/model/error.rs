//! What can go wrong inside the networks, as sentences.

/// The room's error.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operation failed where the message says (stage, block index).
    #[error("{at}: {source}")]
    Op {
        /// Stage, for example `block 3` or `audio tokens`.
        at: String,
        /// What the tensor library said.
        source: candle_core::Error,
    },
    /// An operation failed; no stage known.
    #[error("tensor operation failed: {0}")]
    Candle(#[from] candle_core::Error),
    /// A weights file cannot be used: unreadable, wrong keys, wrong shapes.
    #[error("{0}")]
    Weights(String),
    /// A configuration contradicts itself or the weights.
    #[error("{0}")]
    Config(String),
    /// What the caller handed in has the wrong shape or range.
    #[error("{0}")]
    Input(String),
    /// Another rank is gone.
    #[error("{0}")]
    Link(String),
}

/// Result of this room.
pub type Result<T> = std::result::Result<T, Error>;

/// Adds the stage to an error on its way out.
pub trait At<T> {
    /// Names the place; evaluated only on failure.
    fn at<S: Into<String>>(self, place: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<Error>> At<T> for std::result::Result<T, E> {
    fn at<S: Into<String>>(self, place: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| match e.into() {
            Error::Candle(source) => Error::Op { at: place().into(), source },
            Error::Op { at, source } => Error::Op { at: format!("{}, {at}", place().into()), source },
            other => other,
        })
    }
}
