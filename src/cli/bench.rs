//! `loquent bench`: measure the engine on this machine.

use super::{
    engines::{Choice, Wanted},
    large, loading,
    machine::Machine,
    measure::{Measured, measure},
};
use crate::avatar::s2v;
use anyhow::Context;
use serde::Serialize;

#[derive(clap::Args)]
pub(super) struct Args {
    /// What is measured.
    #[arg(long, value_enum, default_value_t = Choice::Pocket)]
    engine: Choice,
    #[command(flatten)]
    large: large::Flags,
    /// Thread counts to try, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    threads: Vec<usize>,
    /// Widths and heights of the pocket engine's pictures to try, separated by commas; the model's own when left out.
    #[arg(long, value_delimiter = ',')]
    sizes: Vec<usize>,
    /// Weights of the pocket engine to measure instead of the program's own.
    #[arg(long, value_name = "FILE")]
    weights: Option<std::path::PathBuf>,
    /// Denoising steps to try, separated by commas; the model's own when left out.
    #[arg(long, value_delimiter = ',')]
    steps: Vec<usize>,
    /// Seconds of video that count in each measurement, after what the engine needs to settle.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// A command that measures something else on the same machine right afterwards; what it prints as lines of JSON is
    /// added to the report. For example "python3 tests/bench/peer.py 704x384 fp8".
    #[arg(long, value_name = "COMMAND")]
    peer: Option<String>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// Blocks from this length on are clips.
const CLIP_MS: f64 = 2000.0;

#[derive(Serialize)]
struct Report {
    machine: Machine,
    runs: Vec<Measured>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<Vec<serde_json::Value>>,
}

/// Runs another program's measurement and collects its lines of JSON.
fn listen_to(command: &str) -> anyhow::Result<Vec<serde_json::Value>> {
    let run = std::process::Command::new("sh").args(["-c", command]).stderr(std::process::Stdio::inherit()).output();
    let run = run.with_context(|| format!("--peer {command}"))?;
    anyhow::ensure!(run.status.success(), "--peer {command}: it ended with {}", run.status);
    let text = String::from_utf8_lossy(&run.stdout);
    let lines: Vec<_> = text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    anyhow::ensure!(!lines.is_empty(), "--peer {command}: it printed no line of JSON");
    Ok(lines)
}

pub(super) fn run(args: Args) -> anyhow::Result<()> {
    let steps: Vec<Option<usize>> =
        if args.steps.is_empty() { vec![None] } else { args.steps.iter().copied().map(Some).collect() };
    let large = args.large.over(args.engine, s2v::Config::default())?;
    // The large model takes no count of threads.
    let threads = if args.engine == Choice::S2v { vec![0] } else { args.threads };
    let mut runs = Vec::new();
    let sizes: Vec<Option<usize>> =
        if args.sizes.is_empty() { vec![None] } else { args.sizes.iter().copied().map(Some).collect() };
    for (&size, &threads) in sizes.iter().flat_map(|size| threads.iter().map(move |threads| (size, threads))) {
        let wanted = Wanted {
            choice: args.engine,
            threads,
            size,
            weights: args.weights.clone(),
            large: large.clone(),
            watcher: loading::shown(),
            silent: false,
        };
        for &steps in &steps {
            runs.push(measure(&wanted, steps, args.seconds)?);
        }
    }
    let peer = args.peer.as_deref().map(listen_to).transpose()?;
    let report = Report { machine: Machine::look(), runs, peer };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    let Machine { processor, cores, features, load, version, .. } = &report.machine;
    println!("Loquent {version} on {processor}, {cores} cores, {}", features.join(", "));
    if let Some(load) = load.filter(|l| *l > 0.5) {
        println!("Other work is going on (load {load:.1}): times are longer than they need be.");
    }
    println!();
    println!(
        "engine  size  threads  steps  features  generation  decode  encode |  block p50    p95  of {:>4} ms  latency | real-time factor  frames/s  processor",
        report.runs.first().map_or(0.0, |r| r.block_ms).round()
    );
    for r in &report.runs {
        let steps = r.steps.map_or("own".into(), |n| n.to_string());
        println!(
            "{:<6}  {:>4}  {:>7}  {:>5}  {:>8.1}  {:>10.1}  {:>6.1}  {:>6.1} |  {:>9.1}  {:>5.1}              {:>7.1} | {:>16.3}  {:>8.1}  {:>7}%",
            r.engine,
            r.width,
            r.threads,
            steps,
            r.features_ms,
            r.generation_ms,
            r.decode_ms,
            r.encode_ms,
            r.block_p50_ms,
            r.block_p95_ms,
            r.latency_ms,
            r.real_time_factor,
            r.frames_per_second,
            r.processor.map_or("–".into(), |p| format!("{:.0}", 100.0 * p))
        );
    }
    for r in &report.runs {
        let speed = r.tflop.zip(r.tflop_per_s).map(|(t, s)| format!("; {t:.1} TFLOP a block at {s:.0} TFLOP/s"));
        let card = r.card.as_ref().map(|c| {
            let gib = |b: u64| b as f64 / (1u64 << 30) as f64;
            format!("; {}, CUDA {}, {:.1} of {:.0} GiB in use", c.name, c.cuda, gib(c.used), gib(c.memory))
        });
        println!(
            "\n{} {}×{}{}: loaded in {:.1} s, first block after {:.0} ms, slowest block {:.1} ms{}{}",
            r.engine,
            r.width,
            r.height,
            r.device.as_ref().map_or(String::new(), |d| format!(" on {d}")),
            r.load_ms / 1000.0,
            r.first_block_ms,
            r.block_most_ms,
            speed.unwrap_or_default(),
            card.unwrap_or_default()
        );
        println!("{}", r.way());
        if r.encoder_held_ms > 0.01 * r.block_p50_ms * r.blocks as f64 {
            println!("the engine waited {:.0} ms for the encoder, which the frames a second show", r.encoder_held_ms);
        }
        if let Some(k) = &r.known {
            println!(
                "known face and prompt: first pictures after {:.0} ms (opening {:.0}, hearing {:.0}, generation {:.0}, decoding {:.0})",
                k.first_block_ms, k.open_ms, k.features_ms, k.generation_ms, k.decode_ms
            );
        }
        if r.blocks >= 20 {
            let grown = r.grown_mib.map_or(String::new(), |g| format!("{g:+.0} MiB of the device since the tenth, "));
            let worst = r.block_most_ms / r.block_p50_ms;
            println!(
                "{} blocks: {grown}slowest {worst:.2} × the median{}",
                r.blocks,
                r.step_most.map_or(String::new(), |s| format!(", no step above {s:.2} × the median step"))
            );
        }
        if r.block_ms >= CLIP_MS {
            let (shown, took) = (r.block_ms / 1000.0, r.block_p50_ms / 1000.0);
            println!("a whole clip of {shown:.1} s takes {took:.1} s, encoding not included");
        }
    }
    for line in report.peer.iter().flatten() {
        println!("peer: {line}");
    }
    println!(
        "\nMedians per block in milliseconds. Block: from its pictures to the next one's; latency: from its last speech to\n\
         its pictures. Encoding goes on beside it. Real-time factor and frames/s are wall time; a factor of 0.5 leaves half\n\
         of the time to others; processor: of one core, encoding included, which other programs do not change."
    );
    Ok(())
}

impl Measured {
    /// How the blocks that count were made, in words.
    fn way(&self) -> String {
        let warm = match self.settled {
            true => format!("{} blocks after {} to warm up", self.blocks, self.warm_up_blocks),
            false => format!("{} blocks after {}, what it hears still growing", self.blocks, self.warm_up_blocks),
        };
        match self.latency_full_ms {
            Some(full) => format!(
                "{warm}; stages overlapped, {} more blocks under way; {full:.0} ms from speech to pictures then",
                self.under_way
            ),
            None => format!("{warm}; stages one after the other"),
        }
    }
}
