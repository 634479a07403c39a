//! `loquent serve`: the live service.

#[derive(clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_: Args) -> anyhow::Result<()> {
    anyhow::bail!("`loquent serve` is not built into this version yet")
}
