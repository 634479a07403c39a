//! `loquent bench`: measure the engine on this machine.

#[derive(clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_: Args) -> anyhow::Result<()> {
    anyhow::bail!("`loquent bench` is not built into this version yet")
}
