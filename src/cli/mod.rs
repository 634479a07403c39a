//! The commands. The only room with `anyhow`, the environment and exit codes.
//!
//! Each command is one file with an `Args` struct (clap) and `run(args) -> anyhow::Result<()>`; this file only chooses
//! among them. Errors are printed here, once, as sentences.

mod bench;
mod config_cmd;
mod doctor;
mod engines;
mod generate;
mod key;
mod large;
mod loading;
mod machine;
mod measure;
mod model;
mod portrait;
mod serve;
mod windows;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// The whole command line.
#[derive(Parser)]
#[command(
    name = "loquent",
    version,
    about = "Speech in, a speaking presenter out, live.",
    after_help = "Start with `loquent serve`, open the printed address and press Start.",
    arg_required_else_help = true
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the live service: a page, its API, and the engine behind them.
    Serve(serve::Args),
    /// Render a video file from a portrait and a speech file.
    Generate(generate::Args),
    /// Measure the engine on this machine.
    Bench(bench::Args),
    /// Say in plain words what this machine can do.
    Doctor(doctor::Args),
    /// Print, check or explain the configuration.
    Config(config_cmd::Args),
    /// Make and list API keys.
    Key(key::Args),
    /// Design presenters by seed and traits, and find the one that is most like a picture.
    Portrait(portrait::Args),
    /// Look into, check and convert model files.
    Model(model::Args),
}

/// Parses the command line, runs the command, prints its error.
///
/// Exit codes: 0 done; 1 the command failed (its error is on stderr); 2 the command line is wrong (clap).
pub fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Serve(args) => serve::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Config(args) => config_cmd::run(args),
        Command::Key(args) => key::run(args),
        Command::Model(args) => model::run(args),
        Command::Portrait(args) => portrait::run(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The alternate form joins the causes with colons: one line, the outermost sentence first.
            eprintln!("loquent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Command, CommandFactory};
    use std::collections::BTreeSet;

    #[test]
    fn no_flag_has_two_meanings() {
        fn look(command: &Command) {
            let mut seen = BTreeSet::new();
            for argument in command.get_arguments() {
                assert!(seen.insert(argument.get_id().to_string()), "{}: {}", command.get_name(), argument.get_id());
            }
            command.get_subcommands().for_each(look);
        }
        look(&Cli::command());
    }
}
