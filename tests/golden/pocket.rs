//! The pocket model's transformer against the numbers its training program wrote beside the weights.

use std::{path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use loquent::model::{
    dit::{Config, Dit, Opening},
    kernels::Pool,
    weights::{Safetensors, Source, Weights},
};

const LARGEST_DIFFERENCE: f32 = 2e-3;

struct Pocket {
    dit: Dit,
    parity: Safetensors,
    control_scale: Tensor,
}

fn pocket() -> Pocket {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("pocket");
    let list = std::fs::read_dir(&folder).expect("the folder of the pocket model");
    let mut shards: Vec<_> = list.map(|e| e.unwrap().path()).collect();
    shards.retain(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("pocket-")));
    shards.sort();
    let file = Safetensors::open(&shards).unwrap();
    let config = Config::parse(file.metadata("config").expect("the weights carry their configuration")).unwrap();
    let weights = Weights::new(Arc::new(file), &Device::Cpu, DType::F32);
    let dit = Dit::load(config, &weights.pp("dit")).unwrap();
    let report = weights.pp("dit").finish().unwrap();
    assert!(report.unexpected.is_empty(), "not used: {:?}", report.unexpected);
    let control_scale = weights.get(10, "control_scale").unwrap();
    Pocket { dit, parity: Safetensors::open(&[folder.join("parity.safetensors")]).unwrap(), control_scale }
}

impl Pocket {
    fn read(&self, name: &str) -> Tensor {
        self.parity.load(name).unwrap().to_dtype(DType::F32).unwrap()
    }

    /// All blocks' latents `[blocks, 16, h, w]`.
    fn latents(&self, steps: usize) -> Tensor {
        let controls = self.read("controls").broadcast_mul(&self.control_scale).unwrap();
        let audio = Tensor::cat(&[self.read("features"), controls], 1).unwrap();
        let reference = self.read("reference_latent").unsqueeze(1).unwrap();
        let schedule = Arc::new(self.dit.schedule_of(steps).unwrap());
        let opening = Opening { reference: &reference, motion: None, text: None };
        let mut state = self.dit.open(&opening, &schedule).unwrap();
        let noise = self.read("noise");
        let one = |b: usize| {
            let features = audio.narrow(0, 4 * b, 4).unwrap().t().unwrap().unsqueeze(0).unwrap();
            let heard = self.dit.audio(&features).unwrap();
            let x = noise.get(b).unwrap().unsqueeze(1).unwrap();
            self.dit.generate(&mut state, &heard, x, None, &[]).unwrap().squeeze(1).unwrap()
        };
        Tensor::stack(&(0..noise.dim(0).unwrap()).map(one).collect::<Vec<_>>(), 0).unwrap()
    }
}

fn apart(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

#[test]
fn pocket_transformer_agrees_with_its_training_program() {
    let pocket = pocket();
    for steps in [1, 2] {
        let d = apart(&pocket.latents(steps), &pocket.read(&format!("x0.steps{steps}")));
        crate::data::say(&format!("pocket: latents of {steps} steps differ by at most {d:.1e}"));
        assert!(d < LARGEST_DIFFERENCE, "{steps} steps: {d}");
    }
}

#[test]
fn pocket_streams_repeat_exactly_whatever_the_number_of_threads() {
    let pocket = pocket();
    let first = pocket.latents(2);
    for threads in [1, 2, 3] {
        Pool::share(threads);
        assert_eq!(apart(&first, &pocket.latents(2)), 0.0, "{threads} threads");
    }
}
