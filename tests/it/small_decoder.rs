//! The small decoder against the program it stands for: `tests/data/taehv.safetensors` holds random weights of narrow
//! layers, latents and the frames that madebyollin/taehv (taehv.py, commit in the file's metadata) made of them in torch.

use std::{path::Path, sync::Arc};

use candle_core::{DType, Device};
use loquent::model::{
    taehv::{Small, Taehv},
    weights::{Safetensors, Source, Weights},
};

#[test]
fn it_gives_what_the_reference_gave() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/taehv.safetensors");
    let file = Arc::new(Safetensors::open(&[path]).unwrap());
    let (z, want) = (file.load("in.z").unwrap(), file.load("out.frames").unwrap());
    let net = Taehv::load(&Weights::new(file, &Device::Cpu, DType::F32), 16).unwrap();
    let got = net.decode_next(&mut Small::default(), &z).unwrap();
    // the reference's pixels are 0..1
    let want = want.affine(2.0, -1.0).unwrap();
    assert_eq!(got.dims(), want.dims());
    let apart = (got - want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(apart < 1e-4, "{apart}");
}
