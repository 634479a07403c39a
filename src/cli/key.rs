//! `loquent key`: makes and lists API keys. A key is shown once; its file keeps the hash.

use crate::server::{Key, Scope, parse_keys};
use anyhow::{Context as _, anyhow, bail};
use clap::Subcommand;
use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
};

#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Make a key and print it; its file gets the hash. Without --file the line for server.keys is printed as well.
    New {
        /// Whose it is, for lists and logs.
        name: String,
        /// What it allows: control (sessions, recordings), live (talk on the page), metrics.
        #[arg(long, value_delimiter = ',', default_value = "control,live,metrics")]
        scopes: Vec<Scope>,
        /// A limit of its own, such as sessions=4, max_session_s=600 or idle_timeout_s=60; may be repeated.
        #[arg(long = "limit", value_name = "NAME=N")]
        limits: Vec<String>,
        /// The file to add it to (server.keys_file); made when it is not there, for its owner's eyes only.
        #[arg(long, value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// List the keys of a file: id, name, scopes.
    List {
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
    },
}

pub(super) fn run(args: Args) -> anyhow::Result<()> {
    match args.what {
        What::New { name, scopes, limits, file } => {
            let (key, secret) = Key::generate(&name, &scopes, &limits).map_err(|e| anyhow!(e))?;
            if let Some(path) = &file {
                let mut all = OpenOptions::new()
                    .read(true)
                    .append(true)
                    .create(true)
                    .mode(0o600)
                    .open(path)
                    .with_context(|| format!("{} cannot be written", path.display()))?;
                let text = text(&mut all, path)?;
                // The file may have been written by hand, without a last line break.
                let gap = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
                writeln!(all, "{gap}{key}").with_context(|| format!("{} cannot be written", path.display()))?;
                eprintln!("Added to {}. This is the key; it is shown only now:", path.display());
            } else {
                eprintln!("For server.keys: \"{key}\". This is the key; it is shown only now:");
            }
            println!("{secret}");
        }
        What::List { file } => {
            let mut all = match File::open(&file) {
                Ok(all) => all,
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    bail!("there is no {}; `loquent key new NAME --file {}` begins one", file.display(), file.display())
                }
                Err(e) => return Err(e).with_context(|| format!("{} cannot be read", file.display())),
            };
            for key in parse_keys(&text(&mut all, &file)?).map_err(|e| anyhow!("{}: {e}", file.display()))? {
                let scopes: Vec<String> = key.scopes.iter().map(Scope::to_string).collect();
                println!("{}  {}  {}{}", key.id, key.name, scopes.join(","), key.limits());
            }
        }
    }
    Ok(())
}

fn text(file: &mut File, path: &std::path::Path) -> anyhow::Result<String> {
    let mut text = String::new();
    file.read_to_string(&mut text).with_context(|| format!("{} cannot be read", path.display()))?;
    Ok(text)
}
