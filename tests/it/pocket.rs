//! The pocket model against numbers recorded from its PyTorch form, and the engine made of it.

use candle_core::{DType, Device, Tensor};
use loquent::{
    avatar::{
        Act, AvatarError, Generator, Gesture, OpenOptions, Stream,
        pocket::{self, design::Design},
        presenters,
    },
    codec::picture::{PictureLimits, decode_portrait},
    media::{AudioBlock, FrameBlock, MediaTime, Portrait, SPEECH_RATE},
    model::{
        audio::{AHEAD, AudioConfig, AudioNet, FEATURES, HOP, Mel, MelState},
        dit::{self, Dit, Opening},
        kernels::{Isa, Pool},
        vae::patch::{Decoder, Encoder, Grid, Memory},
        weights::{Safetensors, Source, Weights},
    },
};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};

const BLOCK: usize = 2560;

fn file(name: &str) -> String {
    format!("{}/pocket/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Width and height at which portraits are encoded.
const REFERENCE: usize = 384;

/// The shipped decoder's fine part for pictures of 256, 384 or 512.
fn grid(size: usize) -> Grid {
    Grid { name: size.to_string(), factor: size / 128, blocks: 3, matte: true }
}

fn parity() -> Safetensors {
    Safetensors::open(&[file("parity.safetensors")]).unwrap()
}

fn weights() -> Arc<Safetensors> {
    let shards = [file("pocket-00001-of-00002.safetensors"), file("pocket-00002-of-00002.safetensors")];
    Arc::new(Safetensors::open(&shards).unwrap())
}

fn cursor(source: &Arc<Safetensors>) -> Weights {
    Weights::new(source.clone(), &Device::Cpu, DType::F32)
}

fn values(s: &Safetensors, name: &str) -> Vec<f32> {
    s.load(name).unwrap().to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn bytes(s: &Safetensors, name: &str) -> Vec<u8> {
    s.load(name).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest difference.
fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn what_it_hears_agrees_with_the_recording_however_the_speech_is_cut() {
    let (parity, source) = (parity(), weights());
    let mel = Mel::new(&values(&source, "audio.mel_filters"));
    let config = AudioConfig { dilation: vec![1, 1, 2, 2, 4, 8, 16, 2], ahead: vec![1, 1, 1, 1, 1, 0, 0, 0] };
    assert_eq!(config.look_ahead() * HOP + AHEAD, 2016, "126 ms");
    let net = AudioNet::load(&cursor(&source).pp("audio"), Isa::best(), &config).unwrap();
    let wave = values(&parity, "waveform");
    let hear = |cut: usize| {
        let (mut mels, mut state) = (MelState::default(), net.start());
        let (mut frames, mut features) = (Vec::new(), Vec::new());
        let mut take = |part: &[f32]| {
            let new = mel.push(&mut mels, part);
            features.extend(net.push(&mut state, &new));
            frames.extend(new);
        };
        wave.chunks(cut).for_each(&mut take);
        take(&[0.0; AHEAD]);
        features.extend(net.finish(&mut state));
        (frames, features)
    };
    let (frames, features) = hear(wave.len());
    assert_eq!(features.len() / FEATURES, wave.len() / 640);
    assert!(apart(&frames, &values(&parity, "mel")) < 1e-5);
    assert!(apart(&features, &values(&parity, "features")) < 1e-4);
    assert!(apart(&net.visemes(&features), &values(&parity, "visemes")) < 1e-4);
    for cut in [1, 160, 333, 640, BLOCK, 7001] {
        assert!(hear(cut) == (frames.clone(), features.clone()), "cut by {cut}");
    }
}

#[test]
fn what_it_draws_agrees_with_the_recording_on_every_instruction_set() {
    let (parity, source) = (parity(), weights());
    let planar = bytes(&parity, "reference");
    let rgb: Vec<u8> = (0..planar.len()).map(|i| planar[i % 3 * REFERENCE * REFERENCE + i / 3]).collect();
    let recorded = bytes(&parity, "frames");
    let recorded_mattes = bytes(&parity, "matte");
    assert_eq!(recorded_mattes.len(), 2 * 65_536);
    for isa in Isa::available() {
        let encoder = Encoder::load(&cursor(&source).pp("vae.encoder"), isa, 6).unwrap();
        let decoder = Decoder::load(&cursor(&source).pp("vae.decoder"), isa, &grid(256)).unwrap();
        let mut seen: Option<Vec<Arc<[u8]>>> = None;
        for threads in [1, 2] {
            let pool = Pool::new(threads);
            let z = encoder.encode(&pool, [&rgb; 4], REFERENCE, REFERENCE);
            assert!(apart(&z, &values(&parity, "reference_latent")) < 1e-4);
            let (latents, mut memory) = (values(&parity, "x0.steps2"), Memory::new(&decoder, 32, 32));
            let two = latents.chunks_exact(16_384).take(2);
            let mut mattes = Vec::new();
            let draw = |z| {
                let frames = decoder.decode(&pool, z, &mut memory);
                mattes.push(decoder.mattes(&pool, &memory).unwrap()[3].clone());
                frames
            };
            let shown: Vec<_> = two.flat_map(draw).collect();
            let theirs = recorded_mattes.iter();
            let apart = mattes.iter().flat_map(|m| m.iter()).zip(theirs).map(|(a, b)| a.abs_diff(*b)).max();
            assert!(apart <= Some(2), "{isa:?}: mattes are {apart:?} apart");
            for (k, frame) in [(0, &shown[3]), (1, &shown[7])] {
                let theirs = |i: usize| recorded[k * 196_608 + i % 3 * 65_536 + i / 3];
                assert!(frame.iter().enumerate().all(|(i, v)| v.abs_diff(theirs(i)) <= 1), "{isa:?}, frame {k}");
            }
            assert!(seen.get_or_insert_with(|| shown.clone()) == &shown, "threads change nothing");
        }
    }
}

#[test]
fn larger_pictures_agree_with_the_recording() {
    let (parity, source, pool) = (parity(), weights(), Pool::new(2));
    for size in [384, 512] {
        let decoder = Decoder::load(&cursor(&source).pp("vae.decoder"), Isa::best(), &grid(size)).unwrap();
        let (latents, mut memory) = (values(&parity, "x0.steps2"), Memory::new(&decoder, 32, 32));
        let mut shown = Vec::new();
        for z in latents.chunks_exact(16_384).take(2) {
            shown = decoder.decode(&pool, z, &mut memory).into_iter().collect();
        }
        let matte = decoder.mattes(&pool, &memory).unwrap()[3].clone();
        // Of the last frame 128 × 128 pixels are recorded, the mouth's.
        let (colours, cover) = (bytes(&parity, &format!("frame.{size}")), bytes(&parity, &format!("matte.{size}")));
        let at = |i: usize| (size / 2 + i / 128) * size + size / 2 - 64 + i % 128;
        for i in 0..128 * 128 {
            let worst = (0..3).map(|c| shown[3][3 * at(i) + c].abs_diff(colours[c * 16_384 + i])).max();
            assert!(worst <= Some(1) && matte[at(i)].abs_diff(cover[i]) <= 2, "{size}, pixel {i}: {worst:?}");
        }
    }
}

/// Latents of the recorded speech, block by block.
fn imagined(source: &Arc<Safetensors>, isa: Isa, steps: usize) -> Vec<Vec<f32>> {
    let parity = parity();
    let config = dit::Config::parse(source.metadata("config").unwrap()).unwrap();
    let dit = Dit::load(config, &cursor(source).with_isa(isa).pp("dit")).unwrap();
    let (features, controls) = (values(&parity, "features"), values(&parity, "controls"));
    let (scale, noise) = (values(source, "control_scale"), values(&parity, "noise"));
    let latent = |v: &[f32]| Tensor::from_slice(v, (16, 1, 32, 32), &Device::Cpu).unwrap();
    let reference = latent(&values(&parity, "reference_latent"));
    let schedule = Arc::new(dit.schedule_of(steps).unwrap());
    let opening = Opening { reference: &reference, motion: None, text: None };
    let mut state = dit.open(&opening, &schedule).unwrap();
    let one = |(b, noise): (usize, &[f32])| {
        let audio: Vec<f32> = (0..202 * 4)
            .map(|i| (i / 4, 4 * b + i % 4))
            .map(|(c, f)| if c < 192 { features[f * 192 + c] } else { controls[f * 10 + c - 192] * scale[c - 192] })
            .collect();
        let audio = dit.audio(&Tensor::from_vec(audio, (1, 202, 4), &Device::Cpu).unwrap()).unwrap();
        let z = dit.generate(&mut state, &audio, latent(noise), None, &[]).unwrap();
        z.flatten_all().unwrap().to_vec1().unwrap()
    };
    noise.chunks_exact(16_384).enumerate().map(one).collect()
}

#[test]
fn what_it_imagines_agrees_with_the_recording() {
    let (parity, source) = (parity(), weights());
    for steps in [1, 2] {
        let want = values(&parity, &format!("x0.steps{steps}"));
        for (b, (z, want)) in imagined(&source, Isa::best(), steps).iter().zip(want.chunks_exact(16_384)).enumerate() {
            assert!(apart(z, want) < 1e-3, "{steps} steps, block {b}: {}", apart(z, want));
        }
    }
}

/// What bf16 in the processor's matrix units costs: the pictures of the whole chain against those in f32.
#[test]
fn matrix_units_cost_nothing_that_is_seen() {
    let source = weights();
    let draw = |isa: Isa| -> Vec<Arc<[u8]>> {
        let decoder = Decoder::load(&cursor(&source).pp("vae.decoder"), isa, &grid(256)).unwrap();
        let (pool, mut memory) = (Pool::new(2), Memory::new(&decoder, 32, 32));
        imagined(&source, isa, 2).iter().flat_map(|z| decoder.decode(&pool, z, &mut memory)).collect()
    };
    let (exact, swift) = (draw(Isa::best()), draw(Isa::swift()));
    let mut least = f64::INFINITY;
    for (a, b) in exact.iter().zip(&swift) {
        let square: f64 = a.iter().zip(b.iter()).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum();
        least = least.min(10.0 * (255.0 * 255.0 * a.len() as f64 / square.max(1e-9)).log10());
    }
    println!("{:?} against {:?}: at least {least:.1} dB over {} pictures", Isa::swift(), Isa::best(), exact.len());
    assert!(least > 40.0, "{least:.1} dB");
}

/// One engine for the tests below: loading takes a while.
fn engine() -> MutexGuard<'static, Box<dyn Generator>> {
    static ENGINE: LazyLock<Mutex<Box<dyn Generator>>> = LazyLock::new(|| Mutex::new(pocket::load(2).unwrap()));
    ENGINE.lock().unwrap_or_else(|e| e.into_inner())
}

fn drain(stream: &mut dyn Stream, out: &mut Vec<FrameBlock>) {
    while let Some(block) = stream.pull().unwrap() {
        out.push(block);
    }
}

fn speak(engine: &mut dyn Generator, speech: &[f32], cut: &[usize], options: &OpenOptions) -> Vec<FrameBlock> {
    let portrait = engine.sample_portrait();
    let mut stream = engine.open(&portrait, options).unwrap();
    let (mut out, mut at, mut rest, mut turn) = (Vec::new(), MediaTime::from_millis(20), speech, 0);
    while !rest.is_empty() {
        let (part, after) = rest.split_at(cut[turn % cut.len()].min(rest.len()));
        let audio = AudioBlock { at, samples: part.to_vec() };
        (rest, at, turn) = (after, audio.end(), turn + 1);
        stream.push(&audio).unwrap();
        if turn % 3 != 0 {
            drain(stream.as_mut(), &mut out);
        }
    }
    stream.finish().unwrap();
    drain(stream.as_mut(), &mut out);
    out
}

fn speech(samples: usize) -> Vec<f32> {
    (0..samples).map(|i| (i as f32 * 0.07).sin() * (i as f32 / 5000.0).fract() * 0.4).collect()
}

fn same(a: &[FrameBlock], b: &[FrameBlock]) -> bool {
    let frames = |b: &[FrameBlock]| b.iter().flat_map(|b| b.frames.clone()).collect::<Vec<_>>();
    let equal = frames(a).iter().zip(&frames(b)).all(|(x, y)| x.at == y.at && x.pixels == y.pixels);
    a.len() == b.len() && equal && a.iter().zip(b).all(|(a, b)| a.index == b.index && a.controls == b.controls)
}

#[test]
fn however_the_speech_is_cut_the_face_is_the_same_and_the_seed_matters() {
    let mut engine = engine();
    let speech = speech(SPEECH_RATE as usize / 2 + 777);
    let options = OpenOptions::default();
    let whole = speak(engine.as_mut(), &speech, &[speech.len()], &options);
    assert_eq!(whole.len(), speech.len().div_ceil(BLOCK), "the last block is padded with silence");
    assert!(whole.iter().all(|b| b.frames.len() == 4 && b.controls.len() == 4));
    assert_eq!(whole[1].frames[0].at, MediaTime::from_millis(20 + 160));
    for cut in [&[160][..], &[BLOCK], &[4576, 1], &[1, 999, 3000]] {
        assert!(same(&speak(engine.as_mut(), &speech, cut, &options), &whole), "cut by {cut:?}");
    }
    let other = speak(engine.as_mut(), &speech, &[4000], &OpenOptions { seed: 2, ..options.clone() });
    assert!(!same(&other, &whole));
}

#[test]
fn a_gesture_is_seen_in_the_controls_and_in_the_picture() {
    let mut engine = engine();
    let silence = vec![0.0; 8 * BLOCK];
    let still = speak(engine.as_mut(), &silence, &[silence.len()], &OpenOptions::default());
    let options = OpenOptions::default();
    options.direction.give(Gesture { act: Act::LookLeft, strength: 1.0, seconds: 5.0 });
    let looking = speak(engine.as_mut(), &silence, &[silence.len()], &options);
    let last = |blocks: &[FrameBlock]| {
        blocks.last().map(|b| (b.controls[3][6], b.frames[3].pixels.rgb().unwrap().clone())).unwrap()
    };
    let ((before, plain), (gaze, turned)) = (last(&still), last(&looking));
    assert!(gaze < before - 0.4, "{before} {gaze}");
    // The eyes' rows: where pupils are, dark pixels move to the left.
    let dark = |rgb: &[u8]| {
        let rows = (96..116).flat_map(|y| (70..186).map(move |x| (x, y)));
        let all: Vec<usize> = rows.filter(|(x, y)| rgb[3 * (y * 256 + x)] < 70).map(|(x, _)| x).collect();
        all.iter().sum::<usize>() as f64 / all.len().max(1) as f64
    };
    assert!(dark(&turned) < dark(&plain) - 1.0, "{} {}", dark(&plain), dark(&turned));
}

#[test]
fn a_matte_comes_when_it_is_asked_for_and_changes_no_colour() {
    let mut engine = engine();
    assert!(engine.geometry().matte);
    let speech = speech(3 * BLOCK);
    let without = speak(engine.as_mut(), &speech, &[BLOCK], &OpenOptions::default());
    assert!(without.iter().flat_map(|b| &b.frames).all(|f| f.matte.is_none()));
    let options = OpenOptions::default();
    options.matte.set(true);
    let with = speak(engine.as_mut(), &speech, &[BLOCK], &options);
    assert!(same(&with, &without));
    for frame in with.iter().flat_map(|b| &b.frames) {
        let matte = frame.matte.as_ref().unwrap();
        let at = |x: usize, y: usize| matte[y * 256 + x];
        assert_eq!(matte.len(), 65_536);
        assert!(at(4, 4) < 4 && at(251, 60) < 4, "the background");
        assert!(at(128, 120) > 250 && at(128, 250) > 250, "face and shoulders");
    }
    // Nothing shines through eyes, teeth, glasses.
    for presenter in presenters() {
        let portrait = decode_portrait(presenter.png, &PictureLimits::default()).unwrap();
        let mut stream = engine.open(&portrait, &options).unwrap();
        stream.push(&AudioBlock { at: MediaTime::ZERO, samples: speech.clone() }).unwrap();
        let mut blocks = Vec::new();
        drain(stream.as_mut(), &mut blocks);
        assert!(!blocks.is_empty());
        for frame in blocks.iter().flat_map(|b| &b.frames) {
            let matte = frame.matte.as_ref().unwrap();
            let face = (80..155).flat_map(|y| (92..164).map(move |x| y * 256 + x));
            assert!(face.map(|i| matte[i]).min() > Some(250), "{}", presenter.id);
        }
    }
}

#[test]
fn silence_storms_and_broken_samples_never_panic() {
    let mut engine = engine();
    let storms: [(&str, fn(usize) -> f32); 5] = [
        ("silence", |_| 0.0),
        ("not numbers", |i| if i % 3 == 0 { f32::NAN } else { f32::INFINITY }),
        ("clipped", |i| if i / 40 % 2 == 0 { 1e30 } else { -1e30 }),
        ("tiny", |_| 1e-42),
        ("clicks", |i| if i % 4000 == 0 { 1.0 } else { 0.0 }),
    ];
    for (what, storm) in storms {
        let audio: Vec<f32> = (0..2 * BLOCK).map(storm).collect();
        let blocks = speak(engine.as_mut(), &audio, &[640], &OpenOptions { steps: Some(1), ..OpenOptions::default() });
        assert_eq!(blocks.len(), 2, "{what}");
        // A face, not a flat or saturated field.
        for frame in blocks.iter().flat_map(|b| &b.frames) {
            let mean = frame.pixels.rgb().unwrap().iter().map(|v| f64::from(*v)).sum::<f64>()
                / frame.pixels.rgb().unwrap().len() as f64;
            assert!((20.0..235.0).contains(&mean), "{what}: {mean}");
        }
    }
    assert!(speak(engine.as_mut(), &[], &[1], &OpenOptions::default()).is_empty(), "nothing said, nothing shown");
}

#[test]
fn designed_presenters_are_accepted() {
    let mut engine = engine();
    for seed in 1..=24 {
        let portrait = Design::new(seed).draw(256);
        engine.open(&portrait, &OpenOptions::default()).map(drop).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    }
}

#[test]
fn a_size_that_the_model_has_not_is_refused_in_words() {
    let how = pocket::Loading { size: Some(300), ..pocket::Loading::on(1) };
    let error = pocket::load_as(&how).map(drop).unwrap_err().to_string();
    assert!(error.contains("300×300") && error.contains("256"), "{error}");
}

#[test]
fn presenters_are_accepted_and_what_it_cannot_draw_is_refused_in_words() {
    let mut engine = engine();
    for p in presenters() {
        let portrait = decode_portrait(p.png, &PictureLimits::default()).unwrap();
        engine.open(&portrait, &OpenOptions::default()).map(drop).unwrap_or_else(|e| panic!("{}: {e}", p.id));
    }
    let ada = engine.sample_portrait();
    let n = ada.width as usize;
    let drawn = |f: &dyn Fn(usize, usize, usize) -> u8| {
        let rgb: Vec<u8> = (0..3 * n * n).map(|i| f(i / 3 % n, i / 3 / n, i % 3)).collect();
        Portrait { width: ada.width, height: ada.height, rgb: rgb.into() }
    };
    let pixel = |x: usize, y: usize, c: usize| ada.rgb[3 * (y % n * n + x % n) + c];
    let strange = [
        ("noise", drawn(&|x, y, c| ((3 * (y * n + x) + c).wrapping_mul(2_654_435_761) >> 13) as u8)),
        ("a flat field", drawn(&|_, _, _| 128)),
        ("a face at the edge", drawn(&|x, y, c| pixel(x + n / 4, y, c))),
        ("upside down", drawn(&|x, y, c| pixel(x, n - 1 - y, c))),
        ("far too near", drawn(&|x, y, c| pixel(n / 4 + x / 2, n / 4 + y / 2, c))),
    ];
    for (what, picture) in strange {
        let refused = engine.open(&picture, &OpenOptions::default()).map(drop);
        assert!(
            matches!(&refused, Err(AvatarError::Portrait(t)) if t.contains("choose") && t.contains("design:")),
            "{what}: {refused:?}"
        );
    }
    let portrait = engine.sample_portrait();
    let refused = engine.open(&portrait, &OpenOptions { steps: Some(9), ..OpenOptions::default() });
    assert!(matches!(refused.map(drop), Err(AvatarError::Options(_))));
}
