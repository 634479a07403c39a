//! `loquent generate`: render a video file from a portrait and a speech file.

#[derive(clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_: Args) -> anyhow::Result<()> {
    anyhow::bail!("`loquent generate` is not built into this version yet")
}
