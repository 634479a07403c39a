//! `loquent config`: print, check or explain the configuration; and how every command reads it.

use crate::config::{Change, Config, key_of_variable};
use anyhow::Context as _;
use clap::Subcommand;
use std::path::{Path, PathBuf};

/// The commented file that ships with the program: every key, its default, its consequence.
const DEFAULT_FILE: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/config/loquent.toml"));

/// The file that is read when it exists and no other is named.
const USUAL_FILE: &str = "loquent.toml";

/// Where settings come from; shared by every command that needs them.
#[derive(clap::Args, Debug, Default)]
pub(super) struct Source {
    /// Configuration file [default: ./loquent.toml if there is one].
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Changes one setting, such as --set session.idle_timeout_s=60; may be repeated.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub(super) set: Vec<String>,
}

/// The settings, and a sentence that says where they came from.
pub(super) struct Loaded {
    pub(super) config: Config,
    pub(super) from: String,
}

impl Source {
    /// Defaults < file < environment (`LOQUENT__SECTION__KEY`) < flags; `flags` are a command's own. Validated.
    pub(super) fn load(&self, flags: &[Change]) -> anyhow::Result<Loaded> {
        let path = match &self.config {
            Some(path) => Some(path.clone()),
            None => Some(PathBuf::from(USUAL_FILE)).filter(|p| p.is_file()),
        };
        let file = match &path {
            Some(path) => Some((path.display().to_string(), read(path)?)),
            None => None,
        };
        let mut changes = environment();
        let from_environment = changes.len();
        changes.extend(self.sets()?);
        changes.extend_from_slice(flags);
        let config = Config::layered(file.as_ref().map(|(name, text)| (name.as_str(), text.as_str())), &changes)?;
        config.validate()?;
        let file = file.map_or_else(|| "defaults (no loquent.toml here)".into(), |(name, _)| name);
        let more = match (from_environment, changes.len() - from_environment) {
            (0, 0) => String::new(),
            (e, 0) => format!(", {e} from the environment"),
            (0, f) => format!(", {f} from flags"),
            (e, f) => format!(", {e} from the environment, {f} from flags"),
        };
        Ok(Loaded { config, from: format!("{file}{more}") })
    }

    fn sets(&self) -> anyhow::Result<Vec<Change>> {
        let one = |set: &String| {
            let (key, value) = set.split_once('=').with_context(|| {
                format!("--set {set}: allowed is SECTION.KEY=VALUE, such as --set log.filter=debug")
            })?;
            Ok(Change { origin: "--set".into(), key: key.trim().into(), value: value.trim().into() })
        };
        self.set.iter().map(one).collect()
    }
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("the configuration file {} cannot be read", path.display()))
}

/// Variables that begin with `LOQUENT__`, in the order of their names.
fn environment() -> Vec<Change> {
    let mut changes: Vec<Change> = std::env::vars_os()
        .filter_map(|(name, value)| {
            let name = name.into_string().ok()?;
            let key = key_of_variable(&name)?;
            let origin = format!("the environment variable {name}");
            Some(Change { origin, key, value: value.to_string_lossy().into_owned() })
        })
        .collect();
    changes.sort_by(|a, b| a.key.cmp(&b.key));
    changes
}

#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Print the settings in effect: defaults, then the file, the environment and flags.
    Print(Source),
    /// Say whether the settings in effect are usable.
    Check(Source),
    /// Print the commented file with every key, its default and its consequence.
    Default,
}

pub(super) fn run(args: Args) -> anyhow::Result<()> {
    match args.what {
        What::Print(source) => {
            let loaded = source.load(&[])?;
            print!("# {}\n{}", loaded.from, loaded.config.to_toml()?);
        }
        What::Check(source) => println!("The settings are usable ({}).", source.load(&[])?.from),
        What::Default => print!("{DEFAULT_FILE}"),
    }
    Ok(())
}
