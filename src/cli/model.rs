//! `loquent model`: look into, check and convert model files.

#[derive(clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_: Args) -> anyhow::Result<()> {
    anyhow::bail!("`loquent model` is not built into this version yet")
}
