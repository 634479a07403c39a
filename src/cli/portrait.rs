//! `loquent portrait`: design presenters for the pocket engine.

use super::engines;
use crate::{
    avatar::pocket::design::{Design, TRAITS, nearest},
    codec::picture::encode_png,
};
use anyhow::{Context, anyhow, bail};
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Args {
    /// The look: a seed and traits, such as 7,skin=brown,hair=bob. What is not named comes from the seed.
    #[arg(value_name = "LOOK", required_unless_present_any = ["traits", "like"])]
    look: Option<String>,
    /// Where to write the picture (PNG); `generate --image` and the page's upload take it.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Width and height of the picture.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(64..=2048))]
    size: u32,
    /// Begin with the designed look that is most like this picture.
    #[arg(long, value_name = "PICTURE", conflicts_with = "look")]
    like: Option<PathBuf>,
    /// List the traits and what each can be.
    #[arg(long)]
    traits: bool,
}

pub(super) fn run(args: Args) -> anyhow::Result<()> {
    if args.traits {
        for (name, choices) in TRAITS {
            println!("{name:<12} {}", choices.join(", "));
        }
        return Ok(());
    }
    let design: Design = match (&args.look, &args.like) {
        (Some(look), _) => look.parse().map_err(|e: String| anyhow!(e))?,
        (None, Some(picture)) => nearest(&engines::picture(picture)?)?,
        (None, None) => bail!("name a look, or --like and a picture"),
    };
    println!("{design}");
    if let Some(out) = &args.out {
        let png = encode_png(&design.draw(args.size))?;
        std::fs::write(out, png).with_context(|| format!("{} cannot be written", out.display()))?;
    }
    Ok(())
}
