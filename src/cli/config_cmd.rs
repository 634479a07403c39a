//! `loquent config`: print, check or explain the configuration.

#[derive(clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_: Args) -> anyhow::Result<()> {
    anyhow::bail!("`loquent config` is not built into this version yet")
}
