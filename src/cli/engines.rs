//! The engines a command can be pointed at, and where their faces come from.

use crate::{
    avatar::{
        self, Generator, base,
        pocket::{self, Loading},
        s2v,
    },
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
    /// The large model (Wan2.2-S2V, LiveAvatar; for `generate` the base family, too) from a checkpoint on disk.
    S2v,
}

/// Width and height of the pocket engine's pictures, unless somebody chose one; and where a machine is too slow for that.
pub(super) const SIZE: usize = 384;
pub(super) const SMALL: usize = 256;

/// An engine and what it is loaded with.
#[derive(Clone)]
pub(super) struct Wanted {
    pub(super) choice: Choice,
    /// For the arithmetic; 0 = all cores.
    pub(super) threads: usize,
    /// Width and height of the pocket engine's pictures; none = [`SIZE`], with `weights` what these say.
    pub(super) size: Option<usize>,
    /// Weights of the pocket engine in files of their own.
    pub(super) weights: Option<std::path::PathBuf>,
    /// Used by the large engine only.
    pub(super) large: s2v::Config,
    pub(super) watcher: s2v::Watcher,
    /// Whether the large model is one that hears nothing ([`base::makes`]).
    pub(super) silent: bool,
}

impl Wanted {
    /// Where the large engine runs, in the words of its setting.
    pub(super) fn device(&self) -> Option<&str> {
        (self.choice == Choice::S2v).then_some(&self.large.device)
    }

    /// The card that it runs on, the first of several, as far as that is said; `auto` counts as the first of the machine.
    pub(super) fn card(&self) -> Option<usize> {
        match (self.choice, self.large.places().ok()?.first()) {
            (Choice::S2v, Some(s2v::Place::Cuda(n))) => Some(*n),
            (Choice::S2v, Some(s2v::Place::Auto)) => Some(0),
            _ => None,
        }
    }
}

impl Choice {
    pub(super) fn name(self) -> &'static str {
        match self {
            Choice::Pocket => "pocket",
            Choice::Card => "card",
            Choice::S2v => "s2v",
        }
    }
}

/// Loads an engine's generator onto the calling thread. `prompts`: what will be asked for, beside the configured one.
pub(super) fn load(wanted: &Wanted, prompts: &[String]) -> anyhow::Result<Box<dyn Generator>> {
    match wanted.choice {
        Choice::Pocket => {
            let how = |size| Loading { size, ..Loading::on(wanted.threads) };
            match &wanted.weights {
                Some(file) => Ok(pocket::load_files(&[file], &how(wanted.size))?),
                None => Ok(pocket::load_as(&how(wanted.size.or(Some(SIZE))))?),
            }
        }
        Choice::Card => Ok(avatar::test_card()),
        Choice::S2v if wanted.silent => Ok(base::load(&wanted.large, prompts, wanted.watcher.clone())?),
        Choice::S2v => Ok(s2v::load(&wanted.large, prompts, wanted.watcher.clone())?),
    }
}

/// The face a command was given, or the engine's own sample.
pub(super) fn portrait(
    image: Option<&Path>,
    presenter: Option<&str>,
    generator: &dyn Generator,
) -> anyhow::Result<Portrait> {
    if let Some(path) = image {
        return picture(path);
    }
    let Some(id) = presenter else { return Ok(generator.sample_portrait()) };
    let Some(found) = avatar::presenters().iter().find(|p| p.id == id) else {
        let ids: Vec<&str> = avatar::presenters().iter().map(|p| p.id).collect();
        bail!("there is no presenter `{id}`; there are {}", ids.join(", "));
    };
    decode_portrait(found.png, &PictureLimits::default()).with_context(|| format!("presenter {id}"))
}

/// A picture file.
pub(super) fn picture(path: &Path) -> anyhow::Result<Portrait> {
    let limits = PictureLimits::default();
    let bytes = crate::codec::audio_file::read_bytes(path, limits.bytes as u64 + 1)?;
    decode_portrait(&bytes, &limits).with_context(|| path.display().to_string())
}
