//! `loquent doctor`: say in plain words what this machine can do.
//!
//! Looks, tries the ports, runs each engine for a moment. Ends with exit code 1 when the live service could not work.

use super::{
    engines::{Choice, Wanted},
    loading,
    machine::Machine,
    measure::{encoder_ms, measure},
};
use crate::{avatar::s2v, config::Config, engine, model::budget, net, server};
use std::net::{IpAddr, TcpListener, UdpSocket};

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    source: super::config_cmd::Source,
    /// Seconds of speech each engine is measured with; 0 leaves the measuring out.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(0..=600))]
    seconds: u32,
}

/// Findings that must be told again at the end.
#[derive(Default)]
struct Findings {
    problems: Vec<String>,
    hints: Vec<String>,
}

impl Findings {
    fn problem(&mut self, text: impl Into<String>) {
        self.problems.push(text.into());
    }
    fn hint(&mut self, text: impl Into<String>) {
        self.hints.push(text.into());
    }
}

pub(super) fn run(args: Args) -> anyhow::Result<()> {
    let mut findings = Findings::default();
    let machine = Machine::look();
    println!("Loquent {}\n", machine.version);
    hardware(&machine, &mut findings);
    packages(&mut findings)?;
    let loaded = args.source.load(&[]);
    let config = match &loaded {
        Ok(loaded) => loaded.config.clone(),
        Err(error) => {
            findings.problem(format!("The settings cannot be used: {error:#}"));
            Config::default()
        }
    };
    ports(&config.server, &config.net, &mut findings);
    line("Microphone", "not needed on this machine: the visitor's browser has one");
    if args.seconds > 0 {
        engines(&config, args.seconds, &machine, &mut findings);
    }
    println!();
    for hint in &findings.hints {
        println!("Hint: {hint}");
    }
    for problem in &findings.problems {
        println!("Problem: {problem}");
    }
    if findings.problems.is_empty() {
        println!("Everything the live service needs is here. Start it with `loquent serve`.");
        return Ok(());
    }
    anyhow::bail!(
        "{} of the findings above must be put right before the live service can work",
        findings.problems.len()
    )
}

fn line(what: &str, told: impl std::fmt::Display) {
    println!("{what:<12} {told}");
}

fn hardware(machine: &Machine, findings: &mut Findings) {
    line("System", &machine.system);
    let features = if machine.features.is_empty() { "no wide vectors".into() } else { machine.features.join(", ") };
    let cores = if machine.cores == 1 { "1 core".into() } else { format!("{} cores", machine.cores) };
    line("Processor", format!("{}, {cores}, {features}", machine.processor));
    if cfg!(target_arch = "x86_64") && !machine.features.contains(&"AVX2") {
        findings.hint("This processor has no AVX2; the engine will be several times slower than on one that has.");
    }
    if let (Some(all), Some(free)) = (machine.memory_mib, machine.memory_free_mib) {
        line("Memory", format!("{:.1} GiB, {:.1} GiB free", all as f64 / 1024.0, free as f64 / 1024.0));
        if free < 600 {
            findings
                .problem(format!("Only {free} MiB of memory are free and about 600 are needed; end other programs."));
        }
    }
    match machine.gpus.as_slice() {
        [] => line("GPU", "none found, and none needed: the pocket engine runs on the processor"),
        gpus => line("GPU", format!("{}; this build runs on the processor and leaves it alone", gpus.join(", "))),
    }
    if let Some(load) = machine.load.filter(|l| *l > machine.cores as f64 * 0.75) {
        findings.hint(format!("Other programs keep this machine busy (load {load:.1}); the figures are worse for it."));
    }
}

fn packages(findings: &mut Findings) -> anyhow::Result<()> {
    let took = encoder_ms()?;
    let assembler = env!("LOQUENT_H264_ASSEMBLER");
    let how = match assembler {
        "yes" => "built with its fast paths (nasm)",
        "no" => "built WITHOUT its fast paths",
        _ => "built for this processor",
    };
    line("H.264", format!("{how}; {took:.1} ms for a picture of 512×512"));
    if assembler == "no" {
        findings.hint("Install nasm, run `cargo clean --release -p openh264-sys2` and build again: pictures are encoded 2.6 times faster then.");
    }
    line("Packages", "nothing else to install: models, presenters, page and codecs are in this program");
    Ok(())
}

fn ports(server: &server::Config, net: &net::Config, findings: &mut Findings) {
    match server.address() {
        Ok(address) => match TcpListener::bind(address) {
            Ok(_) => line("Web address", format!("{address} is free")),
            Err(e) => {
                line("Web address", format!("{address} cannot be used ({e})"));
                findings.problem(format!(
                    "{address} cannot be used ({e}); give another one: `loquent serve --listen 127.0.0.1:8090`."
                ));
            }
        },
        Err(why) => findings.problem(why),
    }
    let first = if net.port_min == 0 { vec![0] } else { (net.port_min..=net.port_max).collect::<Vec<u16>>() };
    for ip in &net.bind {
        let (free, all) = (first.iter().filter(|&&p| UdpSocket::bind((*ip, p)).is_ok()).count(), first.len());
        let range = if net.port_min == 0 {
            "any UDP port".into()
        } else {
            format!("UDP ports {}–{}", net.port_min, net.port_max)
        };
        let state = match (free, all) {
            (0, _) => "cannot be used".to_string(),
            (free, all) if free < all => format!("{free} of {all} are free"),
            _ => "free".into(),
        };
        line("Media", format!("{range} on {ip}: {state}"));
        if free == 0 {
            findings.problem(format!(
                "No media port can be opened on {ip} ({range}); see `net.bind`, `net.port_min`, `net.port_max`."
            ));
        }
        if net.ice_tcp && !first.iter().any(|&p| TcpListener::bind((*ip, p)).is_ok()) {
            findings.problem(format!("No TCP port for media can be opened on {ip}; see `net.ice_tcp`."));
        }
    }
    match own_address() {
        Some(ip) => line(
            "Network",
            format!("other machines know this one as {ip}; their browsers give a microphone only to https:// pages"),
        ),
        None => line("Network", "this machine has no address but its own: only browsers on it can connect"),
    }
}

/// The address packets to the world would leave from; nothing is sent.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    // A documentation address (RFC 5737): connecting a UDP socket only chooses a route.
    socket.connect("192.0.2.1:9").ok()?;
    socket.local_addr().ok().map(|a| a.ip()).filter(|ip| !ip.is_unspecified() && !ip.is_loopback())
}

fn engines(config: &Config, seconds: u32, machine: &Machine, findings: &mut Findings) {
    // The large engine is measured when it is set up.
    let large = !config.s2v.checkpoint.is_empty() || config.engine.generator == engine::Kind::S2v;
    for choice in [Choice::Pocket, Choice::Card].into_iter().chain(large.then_some(Choice::S2v)) {
        let chosen = choice.name() == engine_name(config.engine.generator);
        let threads = config.engine.threads;
        let wanted = Wanted {
            choice,
            threads,
            size: config.engine.size,
            weights: None,
            large: config.s2v.clone(),
            watcher: loading::shown(),
            silent: false,
        };
        match measure(&wanted, config.engine.steps, seconds) {
            Ok(m) => {
                let threads = if m.threads == 0 { machine.cores } else { m.threads.min(machine.cores) };
                // What it would be with the machine to itself: its processor time spread over its threads.
                let alone = m.processor.map_or(m.real_time_factor, |p| p / threads as f64).min(m.real_time_factor);
                let verdict = match m.real_time_factor {
                    f if f <= 0.5 => format!("good for about {} at once", people((0.8 / f) as usize)),
                    f if f < 0.9 => "real time, with little to spare".into(),
                    _ if alone < 0.6 => "too slow beside the other programs running now".into(),
                    _ => "too slow for real time here".into(),
                };
                let cost = m.processor.map_or(String::new(), |p| format!(", {:.0} % of one core", 100.0 * p));
                line(
                    "Engine",
                    format!(
                        "{}: {}×{}, {:.0} frames/s made and {} needed (real-time factor {:.2} on {threads} threads{cost}): {verdict}",
                        m.engine, m.width, m.height, m.frames_per_second, m.fps, m.real_time_factor
                    ),
                );
                let why = format!("real-time factor {:.2}, at most 0.9 works", m.real_time_factor);
                if chosen && m.real_time_factor >= 0.9 && alone < 0.6 {
                    findings.hint(format!(
                        "The {} engine is too slow at this moment ({why}); end other programs.",
                        m.engine
                    ));
                } else if chosen && m.real_time_factor >= 0.9 {
                    findings.problem(format!("The {} engine is too slow on this machine ({why}).", m.engine));
                }
            }
            Err(error) => {
                line("Engine", format!("{}: cannot be run ({error:#})", choice.name()));
                if chosen {
                    findings.problem(format!("The {} engine cannot be run: {error:#}", choice.name()));
                }
            }
        }
    }
    if large {
        devices(config, findings);
    } else {
        line("Engine", "s2v (Wan2.2-S2V, LiveAvatar, 14B): not set up; needs a checkpoint and a GPU of 48 GB or more");
    }
    for profile in &PROFILES {
        match profile.plan() {
            Ok(plan) => line("14B model", profile.told(&plan)),
            Err(why) => findings.problem(format!("config/{}.toml: {why:#}", profile.name)),
        }
    }
}

/// Who does what, where several devices share a face.
fn devices(config: &Config, findings: &mut Findings) {
    let places = match config.s2v.places() {
        Ok(places) if places.len() > 1 => places,
        _ => return,
    };
    let (steps, costs) = (config.engine.steps.unwrap_or(4), config.s2v.costs());
    // As many blocks as the 14B model has; a smaller one is cut in the same proportions.
    match config.s2v.layout(steps, 40) {
        Ok(layout) => {
            for (text, place) in layout.describe(&costs).into_iter().zip(config.s2v.device.split(',')) {
                line("Devices", format!("{}: {text}", place.trim()));
            }
            let (period, delay) = (layout.period(&costs), layout.delay(&costs));
            let card = |place: &s2v::Place| -> f64 {
                let loads = layout.loads(&costs).into_iter().zip(&places);
                loads.filter(|(_, other)| *other == place).map(|(load, _)| load).sum()
            };
            let fullest = places.iter().filter(|p| matches!(p, s2v::Place::Cuda(_))).map(card).fold(0.0, f64::max);
            if fullest > period {
                line(
                    "Devices",
                    format!(
                        "two streams of one card share it: up to {fullest:.0} ms a block, if neither fills gaps of the other"
                    ),
                );
            }
            line(
                "Devices",
                format!(
                    "by s2v.stage_ms a block every {period:.0} ms, {:.1} frames/s, {delay:.0} ms after its speech",
                    12_000.0 / period
                ),
            );
            if layout.ranks() < places.len() {
                findings.hint(format!(
                    "Only {} of the {} devices in s2v.device are used with s2v.share = {:?}; \"balanced\" uses all.",
                    layout.ranks(),
                    places.len(),
                    config.s2v.share
                ));
            }
        }
        Err(why) => findings.problem(why),
    }
}

/// A file of `config/` for the 14B model.
struct Profile {
    name: &'static str,
    text: &'static str,
    /// As its transformer is to be stored.
    weights: budget::Stored,
    /// Memory of the cards it is for.
    gb: f64,
    measured: &'static str,
}

const PROFILES: [Profile; 5] = [
    Profile {
        name: "s2v-quality",
        text: include_str!("../../config/s2v-quality.toml"),
        weights: budget::Stored::Fp8,
        gb: 80.0,
        measured: "not measured",
    },
    Profile {
        name: "s2v-live",
        text: include_str!("../../config/s2v-live.toml"),
        weights: budget::Stored::Fp8,
        gb: 80.0,
        measured: "25.0 for nine minutes on an H200, 2026-11-27",
    },
    Profile {
        name: "s2v-live-portrait",
        text: include_str!("../../config/s2v-live-portrait.toml"),
        weights: budget::Stored::Fp8,
        gb: 80.0,
        measured: "25.0 for a minute on an H200, 2026-11-27",
    },
    Profile {
        name: "s2v-48gb",
        text: include_str!("../../config/s2v-48gb.toml"),
        weights: budget::Stored::Q8,
        gb: 48.0,
        measured: "not measured",
    },
    Profile {
        name: "s2v-24gb",
        text: include_str!("../../config/s2v-24gb.toml"),
        weights: budget::Stored::Q4,
        gb: 24.0,
        measured: "not measured",
    },
];

impl Profile {
    fn plan(&self) -> anyhow::Result<budget::Plan> {
        let config = Config::layered(Some((self.name, self.text)), &[])?;
        config.validate()?;
        let s2v::Size::Exact(width, height) = s2v::Size::parse(&config.s2v.size).map_err(anyhow::Error::msg)? else {
            anyhow::bail!("s2v.size is no exact size");
        };
        let offload = config.s2v.offload;
        Ok(budget::Plan {
            height,
            width,
            weights: self.weights,
            fp8_memory: config.s2v.dtype == s2v::Precision::Fp8,
            steps: config.engine.steps.unwrap_or(4),
            ring: config.s2v.clip_frames.unwrap_or(48) / 4,
            sessions: config.engine.sessions,
            resident: if offload == s2v::Offload::Blocks { 0 } else { usize::MAX },
            parked: offload != s2v::Offload::None,
            small_decoder: config.s2v.small_decoder,
        })
    }

    /// What it needs, where it fits, and what to expect of it.
    fn told(&self, plan: &budget::Plan) -> String {
        let need = plan.need();
        let fits = if need.fits(self.gb) { "fits" } else { "does not fit" };
        format!(
            "config/{}.toml: {}×{}, {} steps, ring of {}: {:.0} GB (weights {:.0}, memories {:.0}, decoder {:.1}, working {:.0}), \
             {fits} {:.0} GB; {:.0} frames/s predicted on an H200 ({})",
            self.name,
            plan.width,
            plan.height,
            plan.steps,
            plan.ring,
            need.total(),
            need.weights,
            need.memories,
            need.decoders,
            need.working,
            self.gb,
            plan.frames_per_second(&budget::H200),
            self.measured
        )
    }
}

fn people(n: usize) -> String {
    if n <= 1 { "1 conversation".into() } else { format!("{n} conversations") }
}

fn engine_name(kind: engine::Kind) -> &'static str {
    match kind {
        engine::Kind::Pocket => "pocket",
        engine::Kind::Card => "card",
        engine::Kind::S2v => "s2v",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_fit_the_cards_they_are_for_and_those_for_an_h200_keep_up_with_speech() {
        for profile in &PROFILES {
            let plan = profile.plan().unwrap();
            assert!(plan.need().fits(profile.gb), "{}: {:?}", profile.name, plan.need());
            if profile.gb == 80.0 {
                assert!(plan.frames_per_second(&budget::H200) >= 25.0, "{}", profile.told(&plan));
            }
        }
    }
}
