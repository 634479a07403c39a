//! `loquent doctor`: say in plain words what this machine can do.

#[derive(clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_: Args) -> anyhow::Result<()> {
    anyhow::bail!("`loquent doctor` is not built into this version yet")
}
