//! The engines a command can be pointed at, and where their faces come from.

use crate::{
    avatar::{self, Generator},
    codec::picture::{PictureLimits, decode_portrait},
    media::Portrait,
};
use anyhow::{Context, bail};
use std::path::Path;

/// What makes the pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Choice {
    /// The embedded model; runs in real time on two processor cores.
    Pocket,
    /// A test card with a time code and a level meter; no model.
    Card,
}

impl Choice {
    pub(super) fn name(self) -> &'static str {
        match self {
            Choice::Pocket => "pocket",
            Choice::Card => "card",
        }
    }
}

/// Loads an engine's generator onto the calling thread. `threads` 0 = all cores.
pub(super) fn load(choice: Choice, threads: usize) -> anyhow::Result<Box<dyn Generator>> {
    match choice {
        Choice::Pocket => Ok(avatar::pocket::load(threads)?),
        Choice::Card => Ok(avatar::test_card()),
    }
}

/// The face a command was given, or the engine's own sample.
pub(super) fn portrait(
    image: Option<&Path>,
    presenter: Option<&str>,
    generator: &dyn Generator,
) -> anyhow::Result<Portrait> {
    let limits = PictureLimits::default();
    if let Some(path) = image {
        let bytes = crate::codec::audio_file::read_bytes(path, limits.bytes as u64 + 1)?;
        return decode_portrait(&bytes, &limits).with_context(|| path.display().to_string());
    }
    let Some(id) = presenter else { return Ok(generator.sample_portrait()) };
    let Some(found) = avatar::presenters().iter().find(|p| p.id == id) else {
        let ids: Vec<&str> = avatar::presenters().iter().map(|p| p.id).collect();
        bail!("there is no presenter `{id}`; there are {}", ids.join(", "));
    };
    decode_portrait(found.png, &limits).with_context(|| format!("presenter {id}"))
}
