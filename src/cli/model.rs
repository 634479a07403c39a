//! `loquent model`: look into model files, and write random ones of true shapes.

use std::{
    io::{ErrorKind, Write},
    path::PathBuf,
};

use anyhow::{Context, bail};
use clap::Subcommand;

use crate::avatar::s2v;
use crate::model::weights::{
    self, Source, Survey,
    layout::Part,
    synth::{self, PRESETS, Verdict, WHOLES},
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
    /// Measure how near sliding windows of speech come to whole files.
    Windows(super::windows::Args),
    /// Write a random checkpoint with a model's true names and shapes, for tests and benchmarks.
    Synth {
        /// Which model; `loquent model presets` lists them.
        preset: String,
        /// The safetensors file to write, or the folder for a whole model.
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
            for w in WHOLES {
                println!("{:<16} {}", w.name, w.about);
            }
            Ok(())
        }
        Command::Windows(args) => super::windows::run(args),
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

/// Devices by their memory.
const DEVICES: [(&str, u64); 3] = [("24 GB", 24_000_000_000), ("80 GB", 80_000_000_000), ("141 GB", 141_000_000_000)];

/// Parameters of a checkpoint.
fn parameters(source: &dyn Source) -> u64 {
    below(source, "")
}

/// Parameters whose names begin so.
fn below(source: &dyn Source, prefix: &str) -> u64 {
    let count = |n: &String| source.shape(n).unwrap_or_default().iter().map(|&n| n as u64).product::<u64>();
    source.names().iter().filter(|n| n.starts_with(prefix)).map(count).sum()
}

/// A folder with several networks: what is there, what is absent, what it needs.
fn inspect_folder(path: &std::path::Path, survey: &Survey) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}: a folder with {} networks", path.display(), survey.found.len())?;
    for c in &survey.found {
        let verdict = match synth::verdict(c) {
            Verdict::Wrong(complaint) => complaint,
            Verdict::Complete => "complete".into(),
            Verdict::Unchecked => "not checked alone".into(),
        };
        let file = c.files.first().and_then(|f| f.strip_prefix(path).ok()).unwrap_or(std::path::Path::new(""));
        writeln!(
            out,
            "  {:<12} {}, {}, {}, {} in {} file(s): {verdict}",
            c.part.name().split(' ').next_back().unwrap_or_default(),
            file.display(),
            c.format.name(),
            c.layout.name(),
            size(c.bytes),
            c.files.len()
        )?;
    }
    match &survey.tokenizer {
        Some((file, _)) => writeln!(out, "  tokenizer    {}", file.strip_prefix(path).unwrap_or(file).display())?,
        None => writeln!(out, "  tokenizer    absent")?,
    }
    match survey.lack(&s2v::WANTED, true) {
        Some(lack) => writeln!(out, "  verdict      not a whole model:\n  {lack}")?,
        None => writeln!(out, "  verdict      every part is there; `generate --engine s2v --checkpoint` takes it")?,
    }
    let bytes = |part: Part, width: u64| survey.part(part).map_or(0, |c| parameters(&*c.source) * width);
    let Some(transformer) = survey.part(Part::Speech) else { return Ok(()) };
    // The text encoder passes block by block; autoencoder and audio encoder are small.
    let small = bytes(Part::Vae21, 4) + bytes(Part::Hearing, 4);
    let whole = bytes(Part::Speech, 2) + small;
    let in_blocks = 2 * below(&*transformer.source, "blocks.");
    let dim =
        transformer.source.shape("blocks.0.self_attn.q.weight").and_then(|s| s.first().copied()).unwrap_or(0) as u64;
    let has = |i: &u64| transformer.source.shape(&format!("blocks.{i}.self_attn.q.weight")).is_some();
    let layers = (0..4096).take_while(has).count() as u64;
    // Block mode at 704×384: four rings of 12 latent frames of 1056 tokens, each behind 2640 of conditioning.
    let rings = 4 * layers * 2 * (12 * 1056 + 2640) * dim * 2;
    writeln!(
        out,
        "  memory       {} of weights as bf16, {} without the {layers} blocks",
        size(whole),
        size(whole - in_blocks)
    )?;
    writeln!(out, "               {} of keys and values in block mode at 704x384", size(rings))?;
    if let Some(have) = memory() {
        let fits = if in_blocks < have / 10 * 9 { "fit" } else { "do not fit" };
        writeln!(out, "  this host    {} of main memory: offloaded blocks {fits}", size(have))?;
    }
    for (device, have) in DEVICES {
        let fits = |need: u64| if need < have / 10 * 9 { "fits" } else { "does not fit" };
        writeln!(
            out,
            "  a GPU of     {device}: clip mode {}, block mode {}; with --offload, clip mode {}, block mode {} (without working memory)",
            fits(whole),
            fits(whole + rings),
            fits(whole - in_blocks),
            fits(whole - in_blocks + rings)
        )?;
    }
    Ok(())
}

fn inspect(path: &std::path::Path, list: bool) -> anyhow::Result<()> {
    if path.is_dir() && !list {
        let survey = Survey::of(&[path.to_path_buf()])?;
        if survey.found.len() > 1 || survey.tokenizer.is_some() {
            return inspect_folder(path, &survey);
        }
    }
    let c = weights::open(path)?;
    // written through a handle: a reader that went away (`| head`) ends the listing, not the program
    let mut out = std::io::stdout().lock();
    let names = c.source.names();
    for name in names.iter().filter(|_| list) {
        writeln!(out, "{name} {:?}", c.source.shape(name).unwrap_or_default())?;
    }
    let parameters = parameters(&*c.source);
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
    for (device, have) in DEVICES {
        writeln!(out, "  a GPU of   {device}: {} as bf16 (weights alone)", fits(have))?;
    }
    Ok(())
}

fn synth(name: &str, out: &std::path::Path, seed: u64) -> anyhow::Result<()> {
    let bar = indicatif::ProgressBar::new(0);
    let mut progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let about = match WHOLES.iter().find(|w| w.name == name) {
        Some(whole) => {
            synth::write_folder(whole, out, seed, &mut progress).context("no checkpoint was written")?;
            whole.about
        }
        None => {
            let Some(preset) = PRESETS.iter().find(|p| p.name == name) else {
                let names: Vec<_> = PRESETS.iter().map(|p| p.name).chain(WHOLES.iter().map(|w| w.name)).collect();
                bail!("there is no preset `{name}`; choose one of {}", names.join(", "));
            };
            synth::write(preset, out, seed, &mut progress).context("no checkpoint was written")?;
            preset.about
        }
    };
    bar.finish_and_clear();
    println!("{}: random {about}", out.display());
    Ok(())
}
