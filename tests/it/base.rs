//! The base family's pipelines with tiny random networks: which expert is asked, what a picture changes.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use loquent::{
    avatar::base::{BaseSettings, Expert, Experts, Start, best_size, latents, noise, output_size},
    model::{
        dit::{Config, Dit},
        vae::{Decoding, Encoding, Kind, WanVae},
        weights::{Tensors, Weights},
    },
};

fn filled(ask: impl Fn(&Weights), seed: u64) -> Weights {
    let asked = Weights::new(Arc::new(Tensors::new([], "nothing")), &Device::Cpu, DType::F32);
    ask(&asked);
    let made: Vec<(String, Tensor)> = (asked.asked().into_iter().enumerate())
        .map(|(i, (name, shape))| {
            let shape5 = (1, 1, 1, shape.iter().product());
            let t = noise(seed * 1000 + i as u64, shape5, &Device::Cpu).unwrap().reshape(shape.as_slice()).unwrap();
            let fan: usize = shape.iter().skip(1).product();
            let gain = name.ends_with("gamma") || (name.contains("norm") && name.ends_with("weight"));
            let t = if gain { ((t * 0.1).unwrap() + 1.0).unwrap() } else { (t / (fan as f64).sqrt()).unwrap() };
            (name, t)
        })
        .collect();
    Weights::new(Arc::new(Tensors::new(made, "random")), &Device::Cpu, DType::F32)
}

fn config(model_type: &str, in_dim: usize, out_dim: usize) -> Config {
    Config {
        model_type: model_type.into(),
        in_dim,
        out_dim,
        dim: 48,
        num_heads: 2,
        num_layers: 2,
        ffn_dim: 64,
        freq_dim: 32,
        text_len: 6,
        text_dim: 16,
        audio_inject_layers: Vec::new(),
        ..Config::default()
    }
}

fn expert(config: &Config, seed: u64) -> Expert {
    let weights = filled(|w| drop(Dit::load(config.clone(), w).unwrap()), seed);
    let dit = Arc::new(Dit::load(config.clone(), &weights).unwrap());
    let words = |n: u64| {
        let states = noise(n, (1, 1, 3, 16), &Device::Cpu).unwrap().reshape((3, 16)).unwrap();
        Some(Arc::new(dit.text(&states).unwrap()))
    };
    Expert { prompt: words(1).unwrap(), negative: words(2), dit }
}

fn vae(kind: Kind) -> WanVae {
    WanVae::load(&filled(|w| drop(WanVae::build(w, kind, Some(4), 4).unwrap()), 3)).unwrap()
}

fn settings(of: BaseSettings, steps: usize) -> BaseSettings {
    BaseSettings { frames: 9, steps, ..of }
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Two experts in memory, and who was asked.
struct Pair {
    low: Expert,
    high: Expert,
    asked: Vec<bool>,
}

impl Experts for Pair {
    fn config(&self) -> &Config {
        self.low.dit.config()
    }

    fn ask(&mut self, high: bool) -> loquent::model::Result<Expert> {
        self.asked.push(high);
        Ok(if high { self.high.clone() } else { self.low.clone() })
    }
}

#[test]
fn experts_share_the_noise_levels_at_the_boundary() {
    let c = config("t2v", 16, 16);
    let s = BaseSettings::t2v_a14b();
    for (t, high, guidance) in [(999.0, true, 4.0), (875.0, true, 4.0), (874.0, false, 3.0), (1.0, false, 3.0)] {
        assert_eq!(s.at(t), (high, guidance), "t {t}");
    }
    // both experts have a part in a video, the one for high noise first, and passes are two per step
    let vae = vae(Kind::Wan21);
    let start = noise(9, (16, 3, 4, 6), &Device::Cpu).unwrap();
    let mut passes = 0;
    let mut run = |experts: &mut dyn Experts| {
        let s = settings(BaseSettings::t2v_a14b(), 4);
        let mut probe = |name: &str, _: &Tensor| passes += usize::from(name == "pred");
        values(&latents(experts, &vae, &Start::Words, &s, &start, &mut probe).unwrap())
    };
    let mut both = Pair { low: expert(&c, 1), high: expert(&c, 2), asked: Vec::new() };
    let mixed = run(&mut both);
    let (only_low, only_high) = (run(&mut both.low), run(&mut both.high));
    assert!(mixed != only_low && mixed != only_high && mixed.iter().all(|v| v.is_finite()));
    // shift 12 keeps the first of four steps above 0.875 for long
    assert!(both.asked.is_sorted_by(|a, b| a >= b) && both.asked[0] && !both.asked[3], "{:?}", both.asked);
    assert_eq!(passes, 3 * 4 * 2);
}

#[test]
fn i2v_hears_of_its_picture_and_needs_one() {
    let mut e = expert(&config("i2v", 36, 16), 4);
    let vae = vae(Kind::Wan21);
    let s = settings(BaseSettings::i2v_a14b(), 2);
    let start = noise(9, (16, 3, 4, 6), &Device::Cpu).unwrap();
    let picture = |v: f64| (Tensor::ones((3, 1, 32, 48), DType::F32, &Device::Cpu).unwrap() * v).unwrap();
    let mut run = |p: &Tensor| values(&latents(&mut e, &vae, &Start::Picture(p), &s, &start, &mut |_, _| {}).unwrap());
    assert_ne!(run(&picture(0.5)), run(&picture(-0.5)));
    let none = latents(&mut e, &vae, &Start::Words, &s, &start, &mut |_, _| {}).unwrap_err().to_string();
    assert!(none.contains("needs a picture"), "{none}");
}

#[test]
fn ti2v_keeps_the_given_frame_and_decodes() {
    let vae = vae(Kind::Wan22);
    let mut e = expert(&config("ti2v", 48, 48), 5);
    let s = settings(BaseSettings::ti2v_5b(), 2);
    let start = noise(9, (48, 3, 4, 2), &Device::Cpu).unwrap();
    let picture = noise(3, (3, 1, 64, 32), &Device::Cpu).unwrap().tanh().unwrap();
    let x = latents(&mut e, &vae, &Start::Picture(&picture), &s, &start, &mut |_, _| {}).unwrap();
    assert_eq!(values(&x.narrow(1, 0, 1).unwrap()), values(&vae.encode(&picture).unwrap()));
    assert_eq!(vae.decode(&x).unwrap().dims(), [3, 9, 64, 32]);
    let free = latents(&mut e, &vae, &Start::Words, &s, &start, &mut |_, _| {}).unwrap();
    assert_ne!(values(&free), values(&x));
    let wrong = BaseSettings { frames: 10, ..s };
    assert!(latents(&mut e, &vae, &Start::Words, &wrong, &start, &mut |_, _| {}).is_err());
}

#[test]
fn sizes_keep_the_aspect_in_whole_patches() {
    assert_eq!(output_size((1280, 720), 720 * 1280, 16).unwrap(), (720, 1280));
    assert_eq!(output_size((1000, 1000), 480 * 832, 16).unwrap(), (624, 624));
    assert_eq!(output_size((1280, 704), 704 * 1280, 32).unwrap(), (704, 1280));
    // wan/utils/utils.py::best_output_size of the same arguments
    assert_eq!(best_size((1280, 704), 704 * 1280, 32).unwrap(), (704, 1280));
    assert_eq!(best_size((1000, 1000), 704 * 1280, 32).unwrap(), (928, 960));
    assert_eq!(best_size((300, 500), 704 * 1280, 32).unwrap(), (1216, 736));
    assert!(best_size((5, 5), 10, 32).is_err());
    assert!(output_size((0, 5), 1000, 16).is_err() && output_size((5, 5), 10, 16).is_err());
}

/// `[3, frames, 64, 32]` in −1..1.
fn video(frames: usize) -> Tensor {
    noise(7, (3, frames, 64, 32), &Device::Cpu).unwrap().tanh().unwrap()
}

#[test]
fn both_autoencoders_stream_as_they_run_in_one_pass() {
    for kind in [Kind::Wan21, Kind::Wan22] {
        let vae = vae(kind);
        let scale = vae.scale();
        let z = noise(8, (vae.channels(), 6, 64 / scale, 32 / scale), &Device::Cpu).unwrap();
        let whole = values(&vae.decode(&z).unwrap());
        for cuts in [vec![1; 6], vec![2, 3, 1], vec![5, 1]] {
            let (mut state, mut at, mut parts) = (Decoding::default(), 0, Vec::new());
            for n in cuts {
                parts.push(vae.decode_next(&mut state, &z.narrow(1, at, n).unwrap()).unwrap());
                at += n;
            }
            assert!(values(&Tensor::cat(&parts, 1).unwrap()) == whole, "{kind:?} decodes in pieces as in one");
        }
        let video = video(17);
        let whole = values(&vae.encode(&video).unwrap());
        for cuts in [vec![1; 17], vec![5, 4, 8], vec![3, 7, 2, 5]] {
            let (mut state, mut at, mut parts) = (Encoding::default(), 0, Vec::new());
            for n in cuts {
                parts.extend(vae.encode_next(&mut state, &video.narrow(1, at, n).unwrap()).unwrap());
                at += n;
            }
            assert!(values(&Tensor::cat(&parts, 1).unwrap()) == whole, "{kind:?} encodes in pieces as in one");
        }
    }
}
