//! `loquent model`: look into model files, and write random ones of true shapes.

use std::{
    io::{ErrorKind, Write},
    path::PathBuf,
};

use anyhow::{Context, bail};
use clap::Subcommand;

use crate::model::weights::{
    self,
    layout::Part,
    synth::{self, PRESETS, Verdict},
};

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Say what a model file or folder is, whether it can be read, and how much memory it needs.
    Inspect {
        /// A safetensors, torch or GGUF file, or a folder that holds one model.
        path: PathBuf,
        /// List every tensor with its shape.
        #[arg(long)]
        list: bool,
    },
    /// Write a random checkpoint with a model's true names and shapes, for tests and benchmarks.
    Synth {
        /// Which model; `loquent model presets` lists them.
        preset: String,
        /// The safetensors file to write.
        out: PathBuf,
        /// The same seed gives the same file.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// List what `synth` can write.
    Presets,
}

pub(super) fn run(args: Args) -> anyhow::Result<()> {
    match args.command {
        Command::Inspect { path, list } => match inspect(&path, list) {
            Err(e) if e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe) => Ok(()),
            outcome => outcome,
        },
        Command::Synth { preset, out, seed } => synth(&preset, &out, seed),
        Command::Presets => {
            for p in PRESETS {
                println!("{:<16} {}", p.name, p.about);
            }
            Ok(())
        }
    }
}

/// Bytes as a person reads them.
fn size(bytes: u64) -> String {
    match bytes as f64 {
        b if b >= 1e9 => format!("{:.1} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b => format!("{:.1} kB", b / 1e3),
    }
}

/// Main memory of this machine in bytes, where the system tells.
fn memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemTotal:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

fn inspect(path: &std::path::Path, list: bool) -> anyhow::Result<()> {
    let c = weights::open(path)?;
    // written through a handle: a reader that went away (`| head`) ends the listing, not the program
    let mut out = std::io::stdout().lock();
    let names = c.source.names();
    let mut parameters = 0u64;
    for name in &names {
        let shape = c.source.shape(name).unwrap_or_default();
        if list {
            writeln!(out, "{name} {shape:?}")?;
        }
        parameters += shape.iter().map(|&n| n as u64).product::<u64>();
    }
    writeln!(out, "{}", c.source.origin())?;
    writeln!(out, "  what       {}", c.part.name())?;
    writeln!(out, "  format     {}, {} in {} file(s)", c.format.name(), size(c.bytes), c.files.len())?;
    writeln!(out, "  names      {}", c.layout.name())?;
    writeln!(out, "  tensors    {}, {:.3} billion parameters", names.len(), parameters as f64 / 1e9)?;
    if c.part == Part::Unknown {
        writeln!(
            out,
            "  verdict    nothing that Loquent knows; the models it runs are published at {}",
            c.part.published()
        )?;
        return Ok(());
    }
    let verdict = match synth::verdict(&c) {
        Verdict::Wrong(complaint) => complaint,
        Verdict::Complete => "complete: every tensor is there and of the right shape".into(),
        Verdict::Unchecked => "recognised, not checked: what it belongs to is not in the file".into(),
    };
    writeln!(out, "  verdict    {verdict}")?;
    let half = parameters * 2;
    writeln!(out, "  memory     {} as bf16, {} as f32", size(half), size(parameters * 4))?;
    let fits = |have: u64| if half < have / 10 * 9 { "fits" } else { "does not fit" };
    if let Some(have) = memory() {
        writeln!(out, "  this host  {} of main memory: {} as bf16", size(have), fits(have))?;
    }
    for (device, have) in [("24 GB", 24_000_000_000), ("80 GB", 80_000_000_000), ("141 GB", 141_000_000_000)] {
        writeln!(out, "  a GPU of   {device}: {} as bf16 (weights alone)", fits(have))?;
    }
    Ok(())
}

fn synth(preset: &str, out: &std::path::Path, seed: u64) -> anyhow::Result<()> {
    let Some(preset) = PRESETS.iter().find(|p| p.name == preset) else {
        let names: Vec<_> = PRESETS.iter().map(|p| p.name).collect();
        bail!("there is no preset `{preset}`; choose one of {}", names.join(", "));
    };
    let bar = indicatif::ProgressBar::new(0);
    let mut progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    synth::write(preset, out, seed, &mut progress).context("no checkpoint was written")?;
    bar.finish_and_clear();
    println!("{}: random {}", out.display(), preset.about);
    Ok(())
}
