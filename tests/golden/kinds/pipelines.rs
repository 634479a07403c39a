//! Whole pipelines, from waveform, picture and text embeddings to frames.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use candle_core::{DType, Device, Tensor};
use loquent::{
    avatar::{
        block::{BlockSettings, Continuous, Deferred},
        clip::{self, ClipSettings, ClipStream, Words},
        crew::{Build, Crew, FaceOpening, Picture},
        studio::{Studio, Tools, Voice},
    },
    model::{
        picture,
        ranks::{Costs, Layout, Split, Stage, in_process},
        sampler::{Euler, Solver},
        vae::WanVae,
        wav2vec2::{self, Wav2Vec2},
    },
};

use super::{
    common::{Got, Outcome, compare, list},
    transformer,
};
use crate::data::{Check, Golden, device, on_own_device, precision};

/// `s2v_e2e`.
pub fn s2v_check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    compare(golden, check, s2v(golden))
}

/// `la_e2e`.
pub fn live_check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    compare(golden, check, live(golden))
}

/// `la_tpp`: the official five ranks on five threads give the recorded values, and so does one device; other cuts of the
/// same work give the same bits, or on a card, where products and convolutions are chosen by timing, on every rank anew,
/// nearly the same.
pub fn pipelined_check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    let on_one = pipelined(golden).map_err(|e| e.to_string())?;
    let ranks = on_ranks(golden).map_err(|e| e.to_string())?;
    let (official, _) = ranks.first().ok_or("no layout ran")?;
    compare(golden, check, Ok(official.clone()))?;
    let bound = match (device().is_cuda(), precision()) {
        (false, _) => 0.0,
        (true, DType::BF16) => 0.05,
        (true, _) => 0.01,
    };
    for (got, layout) in &ranks {
        for (name, value) in &on_one {
            let other = got.get(name).ok_or_else(|| format!("{layout:?} gives no {name}"))?;
            let flat = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
            let (one, other) = (flat(value).map_err(|e| e.to_string())?, flat(other).map_err(|e| e.to_string())?);
            let apart = one.iter().zip(&other).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            let largest = one.iter().fold(0f32, |m, v| m.max(v.abs()));
            if one.len() != other.len() || !(apart <= bound * largest) {
                return Err(format!("{name} of {layout:?} is {apart} (of {largest}) from what one device gives"));
            }
        }
    }
    Ok(())
}

/// The networks of a golden; motion reaches `motion_frames` pixels, a ring holds one clip.
fn studio(g: &Golden, per_block: usize) -> Result<Studio, Box<dyn std::error::Error>> {
    let motion = g.count("motion_frames")?;
    let frames = g.count("infer_frames")? / 4;
    let dit = transformer(g, "dit", "dit", |c| {
        c.motion_frames = [motion, motion.div_ceil(4)];
        c.frames_per_block = per_block;
        c.kv_frames = frames;
    })?;
    let weights = g.weights("wav2vec")?;
    let config: wav2vec2::Config = serde_json::from_value(g.value("wav2vec")?.clone())?;
    let hearing = Wav2Vec2::load(&weights, &config)?;
    weights.finish()?;
    let weights = g.weights("vae")?;
    let vae = WanVae::load(&weights)?;
    weights.finish()?;
    Ok(Studio { dit, vae, hearing })
}

/// The picture at its output size; the golden's size must be what the search finds.
fn look(g: &Golden, studio: &Studio) -> Result<Tensor, Box<dyn std::error::Error>> {
    let image = g.input("image")?;
    let (h, w, _) = image.dims3()?;
    let rgb: Vec<u8> = image.to_dtype(DType::U8)?.flatten_all()?.to_vec1()?;
    let size = picture::output_size(h, w, g.count("max_area")?)?;
    assert_eq!([size.0, size.1], [g.count("size.0")?, g.count("size.1")?], "output size");
    Ok(studio.look(&rgb, (w, h), size)?)
}

fn listen(g: &Golden, studio: &Studio) -> Result<Voice, Box<dyn std::error::Error>> {
    let fps = g.number("fps").unwrap_or(16.0);
    Ok(studio.listen(&g.input("waveform")?.to_vec1::<f32>()?, fps, g.count("infer_frames")?)?)
}

fn s2v(g: &Golden) -> Outcome {
    let frames = g.count("infer_frames")?;
    let studio = studio(g, 1)?;
    let voice = listen(g, &studio)?;
    let picture = look(g, &studio)?;
    let settings = ClipSettings {
        clip_frames: frames,
        motion_frames: g.count("motion_frames")?,
        solver: match g.value("solver")?.as_str() {
            Some("unipc") => Solver::UniPc,
            Some("dpm++") => Solver::Dpm,
            other => return Err(format!("solver {other:?}").into()),
        },
        steps: g.count("steps")?,
        shift: g.number("shift")?,
        guidance: g.number("guide_scale")?,
        first_frame: g.value("init_first_frame")?.as_bool().ok_or("init_first_frame")?,
    };
    let words = Words {
        prompt: Arc::new(studio.dit.text(&g.input("context")?)?),
        negative: Some(Arc::new(studio.dit.text(&g.input("context_null")?)?)),
    };
    let mut got = Got::new();
    // without a pose the official program encodes a clip of −1 and multiplies it by zero
    let (_, _, h, w) = picture.dims4()?;
    let none = Tensor::full(-1f32, (3, frames, h, w), picture.device())?;
    got.insert("cond_latents".into(), clip::pose_latents(&studio, &none)?);
    let mut face = ClipStream::open(&studio, &picture, words, settings)?;
    got.insert("ref_latents".into(), face.reference().clone());
    got.insert("motion_latents.0".into(), face.motion(&studio)?);
    for r in 0..g.count("clips")?.min(voice.clips) {
        let (mut preds, mut inputs) = (Vec::new(), Vec::new());
        let part = voice.part(r * frames, frames)?;
        let noise = g.input(&format!("noise.{r}"))?;
        let shown = face.next(&studio, &part, &noise, None, &mut |name, x| match name {
            "pred" => preds.push(x.clone()),
            _ => inputs.push(x.clone()),
        })?;
        got.insert(format!("pred.{r}"), Tensor::stack(&preds, 0)?);
        got.insert(format!("latents_in.{r}"), Tensor::stack(&inputs, 0)?);
        got.insert(format!("frames.{r}"), shown);
        got.insert(format!("motion_latents.{}", r + 1), face.motion(&studio)?);
    }
    got.insert("num_repeat".into(), list([voice.clips])?);
    got.insert("audio_emb".into(), voice.features);
    Ok(got)
}

/// Every second pixel of every second row.
fn half(video: &Tensor) -> candle_core::Result<Tensor> {
    let (_, _, h, w) = video.dims4()?;
    let every = |n: usize| Tensor::new((0..n).step_by(2).map(|i| i as u32).collect::<Vec<_>>(), video.device());
    video.contiguous()?.index_select(&every(h)?, 2)?.index_select(&every(w)?, 3)
}

/// Runs of `n`, stacked.
fn stacked(all: &[Tensor], n: usize) -> candle_core::Result<Tensor> {
    let runs: Result<Vec<_>, _> = all.chunks(n).map(|c| Tensor::stack(c, 0)).collect();
    Tensor::stack(&runs?, 0)
}

fn live(g: &Golden) -> Outcome {
    let (frames, steps) = (g.count("infer_frames")?, g.count("steps")?);
    let per_block = g.count("num_frames_per_block")?;
    let blocks = frames / 4 / per_block;
    let studio = studio(g, per_block)?;
    let voice = listen(g, &studio)?;
    let picture = look(g, &studio)?;
    let online = g.value("online_decode")?.as_bool().ok_or("online_decode")?;
    let words = Arc::new(studio.dit.text(&g.input("context")?)?);
    let schedule = Arc::new(studio.dit.schedule(Euler::live_avatar(steps, 3.0)?)?);
    let settings = BlockSettings { clip_frames: frames, motion_frames: g.count("motion_frames")? };
    let mut got = Got::new();
    let times = Tensor::new(schedule.euler.timesteps(), &Device::Cpu)?.reshape((1, steps))?;
    let mut face = Deferred::open(&studio, &picture, Some(words), schedule, settings, online)?;
    got.insert("ref_latents".into(), face.reference().clone());
    let motion = face.motion().clone();
    got.insert("motion_latents_first19".into(), motion.narrow(1, 0, 19.min(motion.dim(1)?))?);
    let n = 19.min(motion.dim(1)?);
    got.insert("motion_latents_last19".into(), motion.narrow(1, motion.dim(1)? - n, n)?);
    let rho: Vec<usize> = g.input("relative_dist")?.to_vec1::<i64>()?.into_iter().map(|d| d as usize).collect();
    let rho: Vec<Vec<usize>> = rho.chunks(steps).map(<[usize]>::to_vec).collect();
    let (mut preds, mut inputs, mut shown, mut waiting) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let clips = g.count("clips")?.min(voice.clips);
    for r in 0..clips {
        let part = voice.part(r * frames, frames)?;
        let noise = g.input(&format!("noise.{r}"))?;
        let distance = rho.get(r * blocks..(r + 1) * blocks).ok_or("too few reference distances")?;
        let latents = face.clip(&studio, &part, &noise, distance, &mut |name, x| match name {
            "pred" => preds.push(x.clone()),
            _ => inputs.push(x.clone()),
        })?;
        if online && r == 0 {
            shown.push(face.show(&studio, &latents)?);
        } else {
            waiting.push(latents);
        }
    }
    for latents in waiting {
        shown.push(face.show(&studio, &latents)?);
    }
    got.insert("timesteps".into(), times.broadcast_as((clips * blocks, steps))?.contiguous()?);
    got.insert("pred".into(), stacked(&preds, steps)?);
    got.insert("x_in".into(), stacked(&inputs, steps)?);
    got.insert("frames_half".into(), half(&Tensor::cat(&shown, 1)?)?);
    for (i, f) in shown.into_iter().enumerate() {
        got.insert(format!("frames.{i}"), f);
    }
    got.insert("num_repeat".into(), list([voice.clips])?);
    got.insert("audio_emb".into(), voice.features);
    Ok(got)
}

fn pipelined(g: &Golden) -> Outcome {
    let (frames, steps) = (g.count("infer_frames")?, g.count("steps")?);
    let per_block = g.count("num_frames_per_block")?;
    let blocks = frames / 4 / per_block;
    let studio = studio(g, per_block)?;
    let voice = listen(g, &studio)?;
    let picture = look(g, &studio)?;
    let words = Arc::new(studio.dit.text(&g.input("context")?)?);
    let schedule = Arc::new(studio.dit.schedule(Euler::live_avatar(steps, 3.0)?)?);
    let settings = BlockSettings { clip_frames: frames, motion_frames: g.count("motion_frames")? };
    let mut face = Continuous::open(&studio, &picture, Some(words), schedule, &settings)?;
    let mut got = Got::new();
    got.insert("ref_latents".into(), face.reference().clone());
    got.insert("motion_latents".into(), face.motion().clone());
    // [step, block]
    let distance = g.input("relative_dist")?.to_vec2::<i64>()?;
    let (mut preds, mut inputs, mut latents, mut shown) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for r in 0..g.count("clips")?.min(voice.clips) {
        let noise = g.input(&format!("noise.{r}"))?;
        for b in 0..blocks {
            let number = r * blocks + b;
            let part = voice.part(number * per_block * 4, per_block * 4)?;
            let rho: Vec<usize> = distance.iter().map(|d| d[number] as usize).collect();
            let noise = noise.narrow(1, b * per_block, per_block)?;
            let out = face.next(&studio, &part, &noise, &rho, &mut |name, x| match name {
                "pred" => preds.push(x.clone()),
                _ => inputs.push(x.clone()),
            })?;
            latents.push(out.latents);
            shown.push(out.frames);
        }
    }
    told(got, voice, (&preds, &inputs), steps, &latents, &shown)
}

/// What is compared of a pipelined run.
fn told(
    mut got: Got,
    voice: Voice,
    (preds, inputs): (&[Tensor], &[Tensor]),
    steps: usize,
    latents: &[Tensor],
    shown: &[Tensor],
) -> Outcome {
    got.insert("pred".into(), stacked(preds, steps)?);
    got.insert("x_in".into(), stacked(inputs, steps)?);
    got.insert("ref_latents_new".into(), latents[0].narrow(1, 0, 1)?);
    got.insert("block_latents".into(), Tensor::stack(latents, 0)?);
    got.insert("frames_half".into(), half(&Tensor::cat(shown, 1)?)?);
    got.insert("frames_first_block".into(), shown[0].clone());
    got.insert("num_repeat".into(), list([voice.clips])?);
    got.insert("audio_emb".into(), voice.features);
    Ok(got)
}

/// The same on five threads, a device each (on a card five streams): the official layout first, then others.
fn on_ranks(g: &Golden) -> Result<Vec<(Got, Layout)>, Box<dyn std::error::Error>> {
    let (frames, steps) = (g.count("infer_frames")?, g.count("steps")?);
    let per_block = g.count("num_frames_per_block")?;
    let blocks = frames / 4 / per_block;
    let first = studio(g, per_block)?;
    let (voice, picture, layers) = (listen(g, &first)?, look(g, &first)?, first.dit.config().num_layers);
    let home = |t: &Tensor| t.to_device(&Device::Cpu);
    let (features, clips_heard, picture) = (home(&voice.features)?, voice.clips, home(&picture)?);
    let voice = Voice { features, clips: clips_heard };
    let teams: Result<Vec<Tools>, _> = (0..5).map(|_| on_own_device(|| Ok(studio(g, per_block)?.into()))).collect();
    let teams = teams.map_err(|e: Box<dyn std::error::Error>| e)?;
    let devices: Vec<Device> = teams.iter().map(|t| t.device.clone()).collect();
    let builds = teams.into_iter().map(|tools| Box::new(move || Ok(tools)) as Build).collect();
    let crew = Arc::new(Crew::start(in_process(&devices), builds)?);
    let settings = BlockSettings { clip_frames: frames, motion_frames: g.count("motion_frames")? };
    let distance = g.input("relative_dist")?.to_vec2::<i64>()?;
    let clips = g.count("clips")?.min(voice.clips);
    let stage = |rank: usize, way| Stage { ranks: rank..rank + 1, way };
    let whole = steps * layers;
    let plan = |ranks, split| Layout::plan(ranks, steps, layers, &Costs::MEASURED, split);
    let cut = |at: &[usize], decoder| {
        let ends = at.iter().copied().chain([whole]);
        let begins = [0].into_iter().chain(at.iter().copied());
        let stages = begins.zip(ends).enumerate().map(|(rank, (from, to))| stage(rank, from..to)).collect();
        Layout { stages, decoder, blocks: layers }
    };
    let layouts = [
        plan(5, Split::Steps)?,
        plan(1, Split::Steps)?,
        plan(2, Split::Balanced)?,
        plan(3, Split::Balanced)?,
        plan(4, Split::Steps)?,
        // uneven, in the middle of a step, the decoder with the last stage or on a rank of its own
        cut(&[layers + 1], 2),
        cut(&[1, whole - 1], 2),
        cut(&[2 * layers, 3 * layers], 3),
    ];
    assert_eq!(layouts[0].ranks(), 5);
    let mut all = Vec::new();
    for layout in layouts {
        let seen: Arc<Mutex<BTreeMap<(String, u64), Vec<Tensor>>>> = Arc::default();
        let watch = seen.clone();
        let mut line = crew.open(FaceOpening {
            layout: layout.clone(),
            picture: Picture::New(picture.clone()),
            text: Some(("recorded".into(), home(&g.input("context")?)?)),
            euler: Euler::live_avatar(steps, 3.0)?,
            settings: settings.clone(),
            reach: Vec::new(),
            planar: false,
            watch: Some(Arc::new(move |name: &str, block, x: &Tensor| {
                let x = x.to_device(&Device::Cpu).expect("a tensor comes home");
                watch.lock().unwrap().entry((name.into(), block)).or_default().push(x);
            })),
        })?;
        let mut got = Got::new();
        got.insert("ref_latents".into(), line.reference().clone());
        got.insert("motion_latents".into(), line.motion().clone());
        let mut most = 0;
        for number in 0..clips * blocks {
            if line.full() {
                line.next(true)?.ok_or("nothing under way")?;
            }
            let noise = home(&g.input(&format!("noise.{}", number / blocks))?)?;
            let part = voice.part(number * per_block * 4, per_block * 4)?;
            let rho: Vec<usize> = distance.iter().map(|d| d[number] as usize).collect();
            line.submit(
                Box::new(move |tools| Ok(part.to_device(&tools.device)?)),
                noise.narrow(1, number % blocks * per_block, per_block)?,
                &rho,
            )?;
            most = most.max(line.under_way());
        }
        while line.next(true)?.is_some() {}
        assert!(most > layout.stages.len().min(blocks - 1), "blocks were under way at once");
        drop(line);
        let seen = seen.lock().unwrap();
        let of = |name: &str| -> Vec<Tensor> {
            seen.iter().filter(|((n, _), _)| n == name).flat_map(|(_, all)| all.clone()).collect()
        };
        let voice = Voice { features: voice.features.clone(), clips: voice.clips };
        let got = told(got, voice, (&of("pred"), &of("x_in")), steps, &of("latents"), &of("frames"))?;
        all.push((got, layout));
    }
    Ok(all)
}
