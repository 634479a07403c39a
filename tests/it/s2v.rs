//! The 14B engine in its tiny form: both modes through the `Stream` contract, whole folders, and what is said when
//! something is wrong.

use crate::{
    session::ms,
    session_loop::{Recorder, spec},
};
use candle_core::{DType, Device, Tensor};
use loquent::{
    avatar::{
        AvatarError, Generator, OpenOptions, Stream, presenters,
        s2v::{self, Config, Mode, SolverName},
    },
    codec::{
        picture::{PictureLimits, decode_portrait},
        to_i420,
    },
    engine::{self, Engine, Kind},
    media::{AudioBlock, FrameBlock, MediaTime, Pixels, Portrait, SPEECH_RATE},
    model::{
        dit::{self, Dit, Opening},
        sampler::Euler,
        weights::{
            Tensors, Weights,
            synth::{self, Whole},
        },
    },
    session::{self, Reason, Registry, SinkRole, host},
};
use std::{path::PathBuf, sync::Arc, time::Instant};

pub(crate) fn tiny(mode: Mode) -> Config {
    Config {
        checkpoint: vec!["random:tiny".into()],
        mode,
        size: "64x64".into(),
        device: "cpu".into(),
        audio_context_ms: 500,
        clip_frames: (mode == Mode::Clip).then_some(12),
        guidance: (mode == Mode::Clip).then_some(2.0),
        ..Config::default()
    }
}

pub(crate) fn load(config: &Config) -> Box<dyn Generator> {
    s2v::load(config, &[], Arc::new(|_| {})).unwrap()
}

pub(crate) fn face() -> Portrait {
    decode_portrait(presenters()[0].png, &PictureLimits::default()).unwrap()
}

pub(crate) fn speech(seconds: f32) -> Vec<f32> {
    let voice = |i: usize| {
        let t = i as f32 / SPEECH_RATE as f32;
        0.3 * (t * 130.0 * std::f32::consts::TAU).sin() * (t * 3.0).sin().abs()
    };
    (0..(seconds * SPEECH_RATE as f32) as usize).map(voice).collect()
}

pub(crate) fn options(mode: Mode) -> OpenOptions {
    OpenOptions { seed: 5, steps: Some(if mode == Mode::Clip { 2 } else { 4 }), ..OpenOptions::default() }
}

const ORIGIN: MediaTime = MediaTime::from_millis(1240);

pub(crate) fn speak(
    generator: &mut dyn Generator,
    speech: &[f32],
    cut: usize,
    options: &OpenOptions,
) -> Vec<FrameBlock> {
    let mut stream = generator.open(&face(), options).unwrap();
    let (mut out, mut at) = (Vec::new(), ORIGIN);
    let drain = |stream: &mut dyn Stream, out: &mut Vec<FrameBlock>| {
        while let Some(block) = stream.pull().unwrap() {
            out.push(block);
        }
    };
    for part in speech.chunks(cut) {
        let audio = AudioBlock { at, samples: part.to_vec() };
        at = audio.end();
        stream.push(&audio).unwrap();
        drain(stream.as_mut(), &mut out);
    }
    stream.finish().unwrap();
    drain(stream.as_mut(), &mut out);
    out
}

pub(crate) fn rgb(blocks: &[FrameBlock]) -> Vec<Arc<[u8]>> {
    blocks.iter().flat_map(|b| b.frames.iter().map(|f| f.pixels.rgb().unwrap().clone())).collect()
}

/// Frames as planes, each byte what the encoder's own conversion makes of the packed frame.
pub(crate) fn assert_planes_of(planes: &[FrameBlock], packed: &[FrameBlock]) {
    let all = |blocks: &[FrameBlock]| blocks.iter().flat_map(|b| b.frames.clone()).collect::<Vec<_>>();
    let (planes, packed) = (all(planes), all(packed));
    assert!(!planes.is_empty() && planes.len() == packed.len());
    for (got, want) in planes.iter().zip(&packed) {
        assert!(matches!(got.pixels, Pixels::I420(_)) && got.at == want.at);
        let (got, want) = (to_i420(got).unwrap(), to_i420(want).unwrap());
        assert!((&got.y, &got.u, &got.v) == (&want.y, &want.u, &want.v));
    }
}

#[test]
fn frames_may_be_planes_for_whoever_encodes_them() {
    let speech = speech(0.7);
    let mut generator = load(&tiny(Mode::Block));
    let packed = speak(generator.as_mut(), &speech, usize::MAX >> 1, &options(Mode::Block));
    let wish = OpenOptions { planar: true, ..options(Mode::Block) };
    assert_planes_of(&speak(generator.as_mut(), &speech, usize::MAX >> 1, &wish), &packed);
    // Clip mode needs its pixels again and gives them as they are.
    let wish = OpenOptions { planar: true, ..options(Mode::Clip) };
    assert!(!rgb(&speak(load(&tiny(Mode::Clip)).as_mut(), &speech, usize::MAX >> 1, &wish)).is_empty());
}

#[test]
fn both_modes_keep_the_contract_of_a_stream() {
    for (mode, fps, first, each) in [(Mode::Block, 25, 9, 12), (Mode::Clip, 16, 9, 12)] {
        let mut generator = load(&tiny(mode));
        let geometry = generator.geometry();
        assert_eq!((geometry.fps, geometry.first_block_frames, geometry.block_frames), (fps, first, each));
        assert_eq!((geometry.width, geometry.height), (64, 64));
        // Two blocks, the second not full.
        let speech = speech(14.0 / fps as f32);
        let options = options(mode);
        let whole = speak(generator.as_mut(), &speech, usize::MAX >> 1, &options);
        let frames = (speech.len() as u64 * u64::from(fps)).div_ceil(u64::from(SPEECH_RATE));
        let blocks = (0..).find(|&b| geometry.first_frame(b) >= frames).unwrap();
        assert_eq!(whole.len() as u64, blocks, "silence fills the last block and no more");
        for (b, block) in whole.iter().enumerate() {
            assert_eq!((block.index, block.frames.len() as u32), (b as u64, geometry.block(b as u64)));
            for (i, frame) in block.frames.iter().enumerate() {
                let number = geometry.first_frame(b as u64) as i64 + i as i64;
                assert_eq!(frame.at, ORIGIN + MediaTime::from_units(number, fps));
                assert_eq!(frame.pixels.rgb().unwrap().len(), 3 * 64 * 64);
            }
        }
        let shown = rgb(&whole);
        assert!(shown.windows(2).any(|p| p[0] != p[1]), "something moves");
        for cut in [160] {
            assert!(rgb(&speak(generator.as_mut(), &speech, cut, &options)) == shown, "{mode:?} cut by {cut}");
        }
        let other = OpenOptions { seed: 6, ..options };
        let first = rgb(&speak(generator.as_mut(), &speech[..1600], 9999, &other));
        assert!(first != shown[..first.len()], "the seed matters");
    }
}

#[test]
fn frames_hear_their_own_speech() {
    // A voice at 0.56 s: pictures before it (and its look-ahead and windows) are those of silence.
    let mut generator = load(&Config { audio_ahead_ms: 100, ..tiny(Mode::Block) });
    let silence = vec![0.0; SPEECH_RATE as usize * 4 / 5];
    let mut voiced = silence.clone();
    let at = SPEECH_RATE as usize * 14 / 25;
    voiced[at..].copy_from_slice(&speech(0.5)[..silence.len() - at]);
    let options = OpenOptions { steps: Some(1), ..options(Mode::Block) };
    let (quiet, loud) = (
        rgb(&speak(generator.as_mut(), &silence, 4000, &options)),
        rgb(&speak(generator.as_mut(), &voiced, 4000, &options)),
    );
    let first = quiet.iter().zip(&loud).position(|(a, b)| a != b).unwrap();
    // Block 0 shows frames 0 to 8 and hears up to frame 9 and 100 ms; block 1 shows frames 9 to 20.
    assert_eq!(first, 9, "the first block that hears the voice at frame 14 is the first that differs");
}

#[test]
fn a_prompt_changes_the_picture_and_is_read_when_it_comes() {
    let mut generator = load(&Config { clip_frames: Some(4), ..tiny(Mode::Clip) });
    let speech = speech(0.05);
    let plain = options(Mode::Clip);
    let said = |p: &str| OpenOptions { prompt: Some(p.into()), ..options(Mode::Clip) };
    let first = rgb(&speak(generator.as_mut(), &speech, 8000, &plain));
    let other = rgb(&speak(generator.as_mut(), &speech, 8000, &said("an old man in a red coat")));
    assert!(first != other);
    let default = Config::default().prompt;
    assert!(first == rgb(&speak(generator.as_mut(), &speech, 8000, &said(&default))));
}

#[test]
fn what_a_mode_does_not_have_is_said() {
    let refused = |config: Config, part: &str| match s2v::load(&config, &[], Arc::new(|_| {})) {
        Err(AvatarError::Options(text)) => assert!(text.contains(part), "{text}"),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("was taken: {config:?}"),
    };
    refused(Config { guidance: Some(4.0), ..tiny(Mode::Block) }, "guidance");
    refused(Config { solver: Some(SolverName::Unipc), ..tiny(Mode::Block) }, "solver");
    refused(Config { first_frame: true, ..tiny(Mode::Block) }, "first-frame");
    refused(Config { clip_frames: Some(16), ..tiny(Mode::Block) }, "multiple of 12");
    refused(Config { clip_frames: Some(15), ..tiny(Mode::Clip) }, "multiple of 4");
    refused(Config { device: "tpu".into(), ..tiny(Mode::Clip) }, "cuda");
    refused(Config { size: "63x64".into(), ..tiny(Mode::Clip) }, "multiples of 16");
}

fn scratch(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("loquent-s2v-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

#[test]
fn a_folder_is_complete_or_one_message_says_what_is_not() {
    let folder = scratch("folder");
    synth::write_folder(Whole::named("tiny").unwrap(), &folder, 3, &mut |_, _| {}).unwrap();
    let config = Config { checkpoint: vec![folder.display().to_string()], ..tiny(Mode::Block) };
    let mut generator = load(&config);
    assert_eq!(speak(generator.as_mut(), &speech(0.3), 8000, &options(Mode::Block)).len(), 1);

    let says = |parts: &[&str]| match s2v::load(&config, &[], Arc::new(|_| {})) {
        Err(AvatarError::Weights(text)) => {
            for part in parts {
                assert!(text.contains(part), "`{part}` is missing in: {text}");
            }
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("was taken"),
    };
    // Parts that are absent are told together, each with its place of publication.
    let away = scratch("away");
    let hide = |name: &str| std::fs::rename(folder.join(name), away.join(name.replace('/', "_"))).unwrap();
    hide("Wan2.1_VAE.safetensors");
    hide("google/umt5-xxl/tokenizer.json");
    says(&[
        "no Wan 2.1 video autoencoder",
        "Wan2.1_VAE.pth",
        "no tokenizer",
        "google/umt5-xxl",
        "found: speech-to-video",
    ]);
    // A part of another model is told apart from an absent one.
    synth::write(synth::preset("wan21-vae-tiny").unwrap(), &folder.join("vae.safetensors"), 1, &mut |_, _| {}).unwrap();
    std::fs::write(folder.join("google/umt5-xxl/tokenizer.json"), synth::tokenizer().to_string()).unwrap();
    let text = folder.join("models_t5_umt5-xxl-enc-bf16.safetensors");
    let bytes = std::fs::read(&text).unwrap();
    std::fs::write(&text, &bytes[..bytes.len() / 2]).unwrap();
    says(&["no UMT5 text encoder", "not readable", "models_t5"]);
    // A shard that the index names and that is not there.
    std::fs::write(&text, &bytes).unwrap();
    hide("diffusion_pytorch_model-00001-of-00001.safetensors");
    says(&["no speech-to-video transformer", "00001-of-00001", "download"]);
    for folder in [folder, away] {
        std::fs::remove_dir_all(folder).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_shows_what_the_large_engine_makes() {
    let settings =
        engine::Config { generator: Kind::S2v, warm_up_blocks: 1, steps: Some(1), ..engine::Config::default() };
    let start = move || Engine::start("s2v", &settings, || s2v::load(&tiny(Mode::Block), &[], Arc::new(|_| {})));
    let engine = tokio::task::spawn_blocking(start).await.unwrap().unwrap();
    let registry = Registry::new();
    let spec = session::SessionSpec { portrait: face(), ..spec(&engine) };
    let control = registry.enter(spec.id.clone(), "test", Instant::now());
    let handle = registry.get(&spec.id).unwrap();
    let task = tokio::spawn(host(spec, engine.admit().unwrap(), control, session::Config::default()));
    let sink = Arc::new(Recorder::default());
    let watching = handle.attach(sink.clone(), SinkRole::Viewer);
    for _ in 0..1200 {
        if handle.snapshot().metrics.blocks >= 3 && sink.videos.lock().unwrap().len() > 12 {
            break;
        }
        tokio::time::sleep(ms(100)).await;
    }
    let blocks = handle.snapshot().metrics.blocks;
    handle.close(Reason::Stopped);
    assert_eq!(task.await.unwrap(), Reason::Stopped);
    drop(watching);
    let videos = sink.videos.lock().unwrap();
    assert!(blocks >= 3 && videos.len() > 12, "{blocks} blocks, {} pictures", videos.len());
    assert!(videos[0].0.keyframe && videos.windows(2).all(|v| v[1].0.at > v[0].0.at));
}

#[test]
fn thousands_of_blocks_leave_a_state_as_large_as_it_was() {
    let config = dit::Config {
        dim: 32,
        num_heads: 1,
        num_layers: 2,
        ffn_dim: 64,
        freq_dim: 32,
        text_dim: 8,
        text_len: 4,
        audio_dim: 8,
        audio_inject_layers: vec![0],
        ..dit::Config::default()
    };
    let empty = Weights::new(Arc::new(Tensors::new([], "shapes")), &Device::Cpu, DType::F32);
    Dit::load(config.clone(), &empty).unwrap();
    let wave =
        |n: usize| Tensor::from_vec((0..n).map(|i| (i as f32 * 0.7).sin() * 0.2).collect::<Vec<_>>(), n, &Device::Cpu);
    let filled = empty.asked().into_iter().map(|(name, shape)| {
        let count = shape.iter().product();
        (name, wave(count).unwrap().reshape(shape).unwrap())
    });
    let weights = Weights::new(Arc::new(Tensors::new(filled, "waves")), &Device::Cpu, DType::F32);
    let dit = Dit::load(config, &weights).unwrap();
    weights.finish().unwrap();
    let schedule = Arc::new(dit.schedule(Euler::live_avatar(1, 3.0).unwrap()).unwrap());
    let text = Some(Arc::new(dit.text(&wave(16).unwrap().reshape((2, 8)).unwrap()).unwrap()));
    let reference = wave(16 * 64).unwrap().reshape((16, 1, 8, 8)).unwrap();
    let opening = Opening { reference: &reference, motion: None, text };
    let mut state = dit.open(&opening, &schedule).unwrap();
    let heard = wave(25 * 8 * 12).unwrap().reshape((25, 8, 12)).unwrap();
    let noise = wave(16 * 3 * 64).unwrap().reshape((16, 3, 8, 8)).unwrap();
    let mut before = None;
    for block in 0..3000 {
        let audio = dit.audio(&heard).unwrap();
        let latents = dit.generate(&mut state, &audio, noise.clone(), None, &[17]).unwrap();
        if block % 500 == 499 {
            let sum = latents.abs().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(sum.is_finite() && sum > 0.0, "block {block}");
            assert_eq!(state.bytes(), *before.get_or_insert(state.bytes()), "block {block}");
        }
    }
    assert_eq!(state.position(), 9000);
}
