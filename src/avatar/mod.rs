//! Speech in, faces out: the [`Generator`] trait and its implementations.
//!
//! Push audio, pull frames. Weights are shared and immutable; everything one face remembers lives in its [`Stream`]
//! and dies with it. How audio is cut never changes the frames.

pub mod base;
pub mod block;
pub mod clip;
pub mod crew;
mod direction;
mod embedded;
mod intake;
mod intonation;
mod liveliness;
mod noise;
pub mod pocket;
pub mod s2v;
pub mod speakers;
pub mod studio;
mod test_card;

pub use direction::{Act, Direction, Gesture, LIVELIEST, LONGEST_S};
pub use embedded::{Presenter, presenters};
pub use intake::Intake;
pub use intonation::Tone;
pub use liveliness::{BOUNDS, Controls, Liveliness};
pub use test_card::test_card;

use crate::media::{AudioBlock, FrameBlock, Geometry, Portrait};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

/// Why a face could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AvatarError {
    /// The caller's picture cannot be used; the text says why and what to do.
    #[error("{0}")]
    Portrait(String),
    /// An option the model does not have; the text says which it has.
    #[error("{0}")]
    Options(String),
    /// Audio that does not continue where the stream stands.
    #[error("audio at {got_ms:.1} ms does not continue the stream, which stands at {want_ms:.1} ms")]
    Discontinuous { got_ms: f64, want_ms: f64 },
    /// Audio after the end of speech was announced.
    #[error("the stream was finished; no more speech can be added")]
    Ended,
    /// The weights do not fit the engine; the text lists what is missing or misshapen.
    #[error("{0}")]
    Weights(String),
    /// The device failed; the engine must be rebuilt.
    #[error("block {block}, {stage}: {source}")]
    Device {
        block: u64,
        stage: &'static str,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

pub type Result<T> = std::result::Result<T, AvatarError>;

/// What a face is opened with.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Same seed, portrait and audio give the same frames, bit for bit.
    pub seed: u64,
    /// Denoising steps; `None` takes the model's default.
    pub steps: Option<usize>,
    /// What the picture shows, for models that read; `None` takes the configured one.
    pub prompt: Option<String>,
    /// What it should not look like, for models with guidance; `None` takes the configured one.
    pub negative_prompt: Option<String>,
    /// A pose to follow ([`crate::codec::pose`]), for models that can: its picture k belongs to frame k.
    pub pose: Option<std::path::PathBuf>,
    /// Several speakers, for models that can: a mask each over the portrait, white where the speaker is. Speech of
    /// speaker k comes by [`Stream::push_to`].
    pub masks: Vec<Portrait>,
    /// Frames may be planes ([`crate::media::Pixels::I420`]) where that costs less: for whoever encodes them next.
    pub planar: bool,
    /// Whether frames shall come with a matte, as far as the engine has one ([`Geometry::matte`]).
    pub matte: MatteWish,
    /// How lively the face is and what it is told to do, for models that can.
    pub direction: Direction,
}

/// A wish that may change while a face speaks: a matte costs time, so it is made only while somebody looks at it.
#[derive(Clone, Debug, Default)]
pub struct MatteWish(Arc<AtomicBool>);

impl MatteWish {
    pub fn set(&self, wanted: bool) {
        self.0.store(wanted, Ordering::Relaxed);
    }
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            seed: 1,
            steps: None,
            prompt: None,
            negative_prompt: None,
            pose: None,
            masks: Vec::new(),
            planar: false,
            matte: MatteWish::default(),
            direction: Direction::default(),
        }
    }
}

/// How full a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Bytes that nobody holds, those this program keeps for later use included.
    pub free: u64,
    /// Bytes that work in passing held at most beyond what is held now, since this was asked last.
    pub passing: u64,
}

/// What a model's faces follow beside speech and a portrait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// [`OpenOptions::direction`]: gestures, and how lively they are.
    pub direction: bool,
    /// [`OpenOptions::prompt`].
    pub prompt: bool,
    /// Its presenters are such as [`pocket::design`] draws: any picture has a nearest look among them.
    pub design: bool,
}

/// A loaded model that can give faces. Lives on its device's thread.
pub trait Generator: Send {
    fn geometry(&self) -> Geometry;
    /// Geometry of the face this picture would give: another one where the model follows a picture's proportions.
    fn geometry_for(&self, _portrait: &Portrait) -> Geometry {
        self.geometry()
    }
    /// Frames of a video of a model that hears nothing and makes one video by itself; `None`: as many as the speech is
    /// long.
    fn frames(&self) -> Option<u64> {
        None
    }
    /// Prepares a face (encodes the portrait, fills the conditioning caches).
    fn open(&mut self, portrait: &Portrait, options: &OpenOptions) -> Result<Box<dyn Stream>>;
    /// 10¹² floating-point operations of the transformer for one full block of this shape, ring or clip full; none where
    /// nobody counted.
    fn tflop_per_block(&self, _geometry: &Geometry, _steps: Option<usize>) -> Option<f64> {
        None
    }
    /// Blocks of a face after which nothing grows any more of what it hears and remembers, so that all further ones are
    /// work of the same shapes: what is measured before is not what a conversation gets.
    fn settled_after(&self) -> u64 {
        1
    }
    /// How full each device is whose memory limits how many faces there can be; none where it does not.
    fn memory(&self) -> Vec<Fill> {
        Vec::new()
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }
    /// A picture this generator surely accepts: for warm-up and for measuring. Mid-grey unless a model knows better.
    fn sample_portrait(&self) -> Portrait {
        let Geometry { width, height, .. } = self.geometry();
        Portrait { width, height, rgb: vec![128; 3 * width as usize * height as usize].into() }
    }
}

/// One face. Frame k shows the speech of `[k/fps, (k+1)/fps)` since the first pushed sample, whose time it inherits.
pub trait Stream: Send {
    /// Appends speech; never computes more than features that are cheap.
    fn push(&mut self, audio: &AudioBlock) -> Result<()>;
    /// Appends speech of one of several speakers ([`OpenOptions::masks`]), counted from zero. A block is made when all
    /// speakers' speech for it is here.
    ///
    /// # Errors
    /// There are not so many speakers.
    fn push_to(&mut self, speaker: usize, audio: &AudioBlock) -> Result<()> {
        match speaker {
            0 => self.push(audio),
            _ => Err(AvatarError::Options("this face has one speaker".into())),
        }
    }
    /// The next block, or `None`: more audio, please.
    fn pull(&mut self) -> Result<Option<FrameBlock>>;
    /// Blocks that are being made though `pull` gave none: other devices are at work on them. While speech goes on, `pull`
    /// does not wait for them.
    fn under_way(&self) -> usize {
        0
    }
    /// Ready when one of them is, or when they will never be: `pull` will tell.
    fn poll_ready(&mut self, _cx: &mut Context) -> Poll<()> {
        Poll::Pending
    }
    /// An interruption: forgets speech of which no block was made, so that what is pushed next, continuing in time from
    /// the start of the next block, is all that block shows. The face stays as it is. `false`: this stream cannot.
    fn cut(&mut self) -> bool {
        false
    }
    /// Speech ended: what is held back for look-ahead may be completed with silence. The last block is padded with
    /// silence to its full length.
    fn finish(&mut self) -> Result<()>;
}
