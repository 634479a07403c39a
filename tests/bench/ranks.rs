//! Several devices, one presenter: blocks a second in each layout against one device in the same run, from speech to
//! pictures, with random weights of the true shapes made on the devices.
//!
//! `cargo bench --features cuda --bench ranks [-- SIZES [LAYOUTS [DEVICES]]]`, for example `480x832,704x384
//! one,balanced,evened,steps,sequence cuda:0,cuda:1`. `cpu,cpu` runs a tiny model on the processor, to try the machinery.
//! `memory` among the devices makes them talk through main memory instead of NCCL, and so does a card that is named again at
//! the end: it only decodes there, on a second stream (`704x384 one,beside cuda:0,cuda:0`). The first layout should be `one`:
//! the others are planned with the times it measures; `evened` is `balanced` cut anew by what each rank took in the run
//! before. One JSON line per layout.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use candle_core::{DType, Device, Tensor};
use loquent::{
    avatar::{
        block::BlockSettings,
        crew::{Build, Crew, FaceOpening, Hear, Line, Made, Picture, Watch},
        s2v::{Ears, Reach},
        studio::{Studio, Tools},
    },
    media::SPEECH_RATE,
    model::{
        Error, Result,
        dit::{Config, Dit},
        kernels,
        ranks::{Costs, Layout, Split, connect},
        sampler::Euler,
        vae::WanVae,
        wav2vec2::Wav2Vec2,
        weights::{
            Fp8, Weights,
            synth::{Whole, imagined, preset},
        },
    },
};

const STEPS: usize = 4;
const FRAMES: usize = 12;
/// Blocks before the ring is full and everything has run once, the second prefill included, and blocks that count.
const WARM: u64 = 6;
const COUNTED: u64 = 10;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let list = |i: usize, or: &str| -> Vec<String> {
        words.get(i).map_or(or, String::as_str).split(',').map(str::to_string).collect()
    };
    let sizes: Vec<(usize, usize)> = list(0, "480x832,704x384")
        .iter()
        .filter_map(|s| s.split_once('x').and_then(|(h, w)| Some((h.parse().ok()?, w.parse().ok()?))))
        .collect();
    let layouts = list(1, "one,balanced,steps,sequence");
    let named = list(2, "cuda:0,cuda:1");
    let devices_named: Vec<&String> = named.iter().filter(|n| *n != "memory").collect();
    let again = |i: usize| devices_named[i].starts_with("cuda") && devices_named[..i].contains(&devices_named[i]);
    let direct = devices_named.len() == named.len() && !(0..devices_named.len()).any(again);
    let opened = |name: &String| match name.strip_prefix("cuda:").map(str::parse) {
        Some(Ok(card)) => kernels::card(card),
        _ => Ok(Device::Cpu),
    };
    let devices: Vec<Device> = devices_named.iter().copied().map(opened).collect::<Result<_>>()?;
    let tiny = devices[0].is_cpu();
    println!("{} devices: {}", devices.len(), named.join(","));
    let began = Instant::now();
    let links = connect(&devices, direct)?;
    println!("connected after {:.1} s", began.elapsed().as_secs_f64());
    let build = |(i, device): (usize, &Device)| -> Build {
        let (device, decodes_only) = (device.clone(), again(i));
        Box::new(move || if decodes_only { screen(&device, tiny) } else { studio(&device, tiny).map(Into::into) })
    };
    let builds: Vec<Build> = devices.iter().enumerate().map(build).collect();
    let crew = Arc::new(Crew::start(links, builds)?);
    println!("loaded after {:.1} s", began.elapsed().as_secs_f64());
    for &size in &sizes {
        let (mut costs, mut alone) = (Costs::MEASURED, None);
        let mut before: Option<(Layout, Vec<f64>, Costs)> = None;
        for name in &layouts {
            let (ranks, split) = match name.as_str() {
                "one" => (1, Split::Balanced),
                "steps" => (crew.ranks(), Split::Steps),
                "sequence" => (crew.ranks(), Split::Sequence),
                _ => (crew.ranks(), Split::Balanced),
            };
            let layout = match (name.as_str(), &before) {
                ("beside", _) => Layout::with_decoder_apart(ranks, STEPS, layers(tiny)?, &costs, Split::Steps)?,
                ("evened", Some((layout, busy, costs))) => Layout::evened(layout, busy, costs),
                _ => Layout::plan(ranks, STEPS, layers(tiny)?, &costs, split)?,
            };
            match run(&crew, size, name, layout, tiny) {
                Ok(seen) => {
                    seen.tell(name, size, &costs, alone.as_ref());
                    if split == Split::Balanced && ranks > 1 {
                        let ms = |part: &f64| part * seen.period.as_secs_f64() * 1e3;
                        before =
                            Some((seen.layout.clone(), seen.busy.iter().map(ms).collect::<Vec<f64>>(), seen.costs));
                    }
                    if alone.is_none() {
                        costs = seen.costs;
                        alone = Some(seen);
                    }
                }
                Err(e) => println!("{name} at {size:?}: {e}"),
            }
            if let Some(why) = crew.fault() {
                return Err(Error::Link(why.into()));
            }
        }
    }
    Ok(())
}

fn transformer(tiny: bool) -> Result<Config> {
    Ok(if tiny { Config { num_heads: 8, ..Whole::named("tiny")?.transformer_config() } } else { Config::default() })
}

fn layers(tiny: bool) -> Result<usize> {
    Ok(transformer(tiny)?.num_layers)
}

/// The same numbers on every device: the same seed, and all asked for in the same order.
fn studio(device: &Device, tiny: bool) -> Result<Studio> {
    if !tiny {
        device.set_seed(20261124)?;
    }
    let whole = Whole::named(if tiny { "tiny" } else { "14b" })?;
    let dtype = if tiny { DType::F32 } else { DType::BF16 };
    let weights = |name: &str, dtype| -> Result<Weights> {
        let weights = Weights::new(imagined(preset(name)?, 7)?, device, dtype);
        Ok(if kernels::fp8(device) && !tiny { weights.with_fp8(Fp8::All) } else { weights })
    };
    let hearing = if tiny { "wav2vec2-tiny" } else { "wav2vec2-large" };
    Ok(Studio {
        dit: Dit::load(transformer(tiny)?, &weights(whole.transformer, dtype)?)?,
        vae: WanVae::load(&weights(whole.vae, dtype)?)?,
        hearing: Wav2Vec2::load(&weights(hearing, dtype)?.with_fp8(Fp8::Off), &whole.hearing_config())?,
    })
}

/// What makes pixels only.
fn screen(device: &Device, tiny: bool) -> Result<Tools> {
    let whole = Whole::named(if tiny { "tiny" } else { "14b" })?;
    let dtype = if tiny { DType::F32 } else { DType::BF16 };
    let vae = WanVae::load(&Weights::new(imagined(preset(whole.vae)?, 7)?, device, dtype))?;
    Ok(Tools { device: device.clone(), dit: None, vae: Some(vae.into()), hearing: None })
}

/// What a layout gave.
struct Seen {
    layout: Layout,
    costs: Costs,
    open: Duration,
    /// Speech to pictures of the very first block, and of blocks that come alone later.
    first: Duration,
    alone: Duration,
    /// Blocks that count, and the time from the first to the last of them.
    period: Duration,
    /// Time at work over that time, by rank.
    busy: Vec<f64>,
    latents: BTreeMap<u64, Tensor>,
}

fn run(crew: &Arc<Crew>, (h, w): (usize, usize), name: &str, layout: Layout, tiny: bool) -> Result<Seen> {
    let began = Instant::now();
    let c = transformer(tiny)?;
    let latents: Arc<Mutex<BTreeMap<u64, Tensor>>> = Arc::default();
    let into = latents.clone();
    let watch: Watch = Arc::new(move |name: &str, block, x: &Tensor| {
        // Only what is compared leaves the device: a copy of frames would be as long as a tenth of a block.
        if name == "latents"
            && [0, 3, 9].contains(&block)
            && let Ok(x) = x.to_device(&Device::Cpu)
        {
            into.lock().unwrap_or_else(|e| e.into_inner()).insert(block, x);
        }
    });
    // The same for all layouts: noise and text are functions of their place.
    let wave = |shape: &[usize], phase: f64| -> Result<Tensor> {
        let count = shape.iter().product::<usize>();
        let value = |i: usize| (((i as f64 * 12.9898 + phase * 78.233).sin() * 43_758.545).fract() * 3.4) as f32;
        Ok(Tensor::from_vec((0..count).map(value).collect::<Vec<_>>(), shape, &Device::Cpu)?)
    };
    let ranks = layout.ranks();
    let mut line = crew.open(FaceOpening {
        layout: layout.clone(),
        picture: Picture::New((wave(&[3, 1, h, w], 0.5)? / 3.4)?),
        text: Some((format!("{name} {h} {w}"), wave(&[c.text_len.min(64), c.text_dim], 0.25)?)),
        euler: Euler::live_avatar(STEPS, 3.0)?,
        settings: BlockSettings::default(),
        reach: Vec::new(),
        planar: true,
        watch: Some(watch),
    })?;
    let open = began.elapsed();
    let ears = Arc::new(Mutex::new(Ears::new(Reach::from_millis(8000, 320), 25, 3 * SPEECH_RATE as usize / 25)));
    let mut number = 0;
    let mut submit = |line: &mut Line| -> Result<()> {
        let (ears, at) = (ears.clone(), number);
        ears.lock()
            .unwrap_or_else(|e| e.into_inner())
            .push(&(0..FRAMES * SPEECH_RATE as usize / 25).map(|i| (i as f32 * 0.05).sin() * 0.3).collect::<Vec<_>>());
        let hear: Hear = Box::new(move |tools: &Tools| {
            let mut ears = ears.lock().unwrap_or_else(|e| e.into_inner());
            ears.listen(tools.hearing()?, &tools.device, at * FRAMES as u64, FRAMES)
        });
        number += 1;
        line.submit(hear, wave(&[c.in_dim, 3, h / 8, w / 8], at as f64)?, &[30, 12, 21, 7])
    };
    let gone = || Error::Link("no block came".into());
    let next = |line: &mut Line| -> Result<Made> { line.next(true)?.ok_or_else(gone) };
    let begun = Instant::now();
    submit(&mut line)?;
    next(&mut line)?;
    let first = begun.elapsed();
    let mut made = Vec::new();
    for _ in 1..WARM + COUNTED {
        while line.full() {
            made.push((next(&mut line)?, Instant::now()));
        }
        submit(&mut line)?;
    }
    while line.under_way() > 0 {
        made.push((next(&mut line)?, Instant::now()));
    }
    let counted = &made[WARM as usize - 1..];
    let (from, to) = (made[WARM as usize - 2].1, counted[counted.len() - 1].1);
    let busy = |rank: usize| counted.iter().map(|(m, _)| m.times.busy(rank)).sum::<Duration>().as_secs_f64();
    let busy = (0..ranks).map(|rank| busy(rank) / (to - from).as_secs_f64()).collect();
    let mut stages = [0.0f64; 3];
    for (m, _) in counted {
        let s = m.times.stages();
        for (sum, part) in stages.iter_mut().zip([s.features, s.generation, s.decode]) {
            *sum += part.as_secs_f64() * 1e3 / counted.len() as f64;
        }
    }
    let mut alone = Duration::MAX;
    for _ in 0..3 {
        let begun = Instant::now();
        submit(&mut line)?;
        next(&mut line)?;
        alone = alone.min(begun.elapsed());
    }
    drop(line);
    let latents = std::mem::take(&mut *latents.lock().unwrap_or_else(|e| e.into_inner()));
    let costs = Costs { hearing: stages[0], step: stages[1] / STEPS as f64, decode: stages[2] };
    Ok(Seen { layout, costs, open, first, alone, period: (to - from) / counted.len() as u32, busy, latents })
}

impl Seen {
    fn tell(&self, name: &str, (h, w): (usize, usize), planned: &Costs, one: Option<&Seen>) {
        let ms = |d: Duration| (d.as_secs_f64() * 1e4).round() / 10.0;
        let fps = |s: &Seen| FRAMES as f64 / s.period.as_secs_f64();
        // ‖a − b‖ / ‖b‖ of a block's latents.
        let apart = |block: u64| -> Option<f64> {
            let (a, b) = (self.latents.get(&block)?, one?.latents.get(&block)?);
            let norm = |t: &Tensor| t.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>();
            let d = (a - b).and_then(|d| norm(&d)).ok()?;
            Some((d / norm(b).ok()?).sqrt())
        };
        println!(
            "{}",
            serde_json::json!({
                "layout": name, "size": format!("{h}x{w}"), "fps": fps(self), "ms_a_block": ms(self.period),
                "times_one": one.map(|o| fps(self) / fps(o)), "ms_alone": ms(self.alone), "ms_first": ms(self.first),
                "ms_open": ms(self.open), "busy": self.busy, "hearing": self.costs.hearing, "step": self.costs.step,
                "decode": self.costs.decode, "planned_ms": self.layout.period(planned),
                "apart": [apart(0), apart(3), apart(9)],
            })
        );
        self.layout.describe(planned).iter().for_each(|line| println!("  {line}"));
    }
}
