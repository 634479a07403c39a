//! `cargo bench --bench pocket [-- STEPS]`: the pocket engine on this machine: 20 s of a voice through the stream, per
//! number of threads. Prints the median and 95th percentile of each stage, the real-time factor by the clock on the
//! wall and by the processor's time, and the memory held (Linux).

use loquent::{
    avatar::{OpenOptions, pocket},
    media::{AudioBlock, MediaTime},
};
use std::time::{Duration, Instant};

/// A number from a file of `/proc`, if there is one.
fn proc(file: &str, field: impl Fn(&str) -> Option<f64>) -> f64 {
    std::fs::read_to_string(file).ok().and_then(|text| field(&text)).unwrap_or(f64::NAN)
}

/// Seconds of processor time of all threads, in clock ticks of 10 ms.
fn cpu() -> f64 {
    proc("/proc/self/stat", |text| {
        let fields: Vec<&str> = text.rsplit(')').next()?.split_whitespace().collect();
        Some((fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?) / 100.0)
    })
}

/// Resident memory, MB: now or at its highest.
fn memory(key: &str) -> f64 {
    proc("/proc/self/status", |text| {
        let line = text.lines().find(|l| l.starts_with(key))?;
        Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? / 1024.0)
    })
}

fn main() {
    let steps = std::env::args().filter_map(|a| a.parse().ok()).next();
    let before = memory("VmRSS");
    for threads in [1, 2] {
        let began = Instant::now();
        let mut engine = pocket::load(threads).expect("the embedded weights");
        let loaded = began.elapsed();
        let began = Instant::now();
        let portrait = engine.sample_portrait();
        let mut stream =
            engine.open(&portrait, &OpenOptions { steps, ..OpenOptions::default() }).expect("a built-in face");
        println!("{threads} threads: loaded in {loaded:.2?}, opened in {:.2?}", began.elapsed());
        let (mut stages, mut at) = ([const { Vec::new() }; 3], MediaTime::ZERO);
        let (wall, processor) = (Instant::now(), cpu());
        for n in 0..1000usize {
            let voice = |i: usize| ((n * 320 + i) as f32 * 0.055).sin() * 0.3 * ((n / 8 % 3) as f32 / 2.0);
            let audio = AudioBlock { at, samples: (0..320).map(voice).collect() };
            at = audio.end();
            stream.push(&audio).expect("speech");
            while let Some(block) = stream.pull().expect("a block") {
                let s = block.stages;
                for (list, took) in stages.iter_mut().zip([s.features, s.generation, s.decode]) {
                    list.push(took);
                }
            }
        }
        let (wall, processor) = (wall.elapsed().as_secs_f64(), cpu() - processor);
        let shown = stages[0].len() as f64 * 0.16;
        for (name, mut list) in ["features", "generation", "decode"].into_iter().zip(stages) {
            list.sort();
            let ms = |d: Duration| d.as_secs_f64() * 1e3;
            println!(
                "  {name:<10} median {:6.1} ms, 95 % {:6.1} ms",
                ms(list[list.len() / 2]),
                ms(list[list.len() * 95 / 100])
            );
        }
        println!("  real-time factor {:.3} by the wall, {:.3} by the processor", wall / shown, processor / shown);
        println!(
            "  memory {:.0} MB more than before, at its highest {:.0} MB",
            memory("VmRSS") - before,
            memory("VmHWM")
        );
    }
}
