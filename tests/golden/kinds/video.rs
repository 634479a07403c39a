//! The Wan video autoencoders: whole, in chunks, with intermediate results.

use candle_core::{D, Device, Tensor};
use loquent::model::vae::{Decoding, Encoding, WanVae};

use super::common::{Got, Outcome, cases, compare};
use crate::data::{Check, Golden};

/// `vae21` and `vae22`.
pub fn vae_check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    compare(golden, check, vae(golden))
}

/// `vae21_stream`.
pub fn vae_stream_check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    compare(golden, check, vae_stream(golden))
}

fn vae(g: &Golden) -> Outcome {
    let w = g.weights("vae")?;
    let vae = WanVae::load(&w)?;
    let report = w.finish()?;
    assert!(report.unexpected.is_empty(), "{:?}", report.unexpected);
    let mut got = Got::new();
    let (mean, inverse) = vae.statistics()?;
    got.insert("std".into(), inverse.recip()?);
    got.insert("mean".into(), mean);
    got.insert("inv_std".into(), inverse);
    let mid = g.config["mid_case"].as_u64().unwrap_or(0);
    for i in 0..g.count("encodes")? {
        let mut seen = Got::new();
        let mut probe = |name: &str, x: &Tensor| {
            let x = x.transpose(0, 1).and_then(|x| x.unsqueeze(0)).expect("a video");
            seen.insert(format!("mid.enc.{name}"), x);
        };
        let z = vae.encode_probed(&mut Encoding::default(), &g.input(&format!("video.{i}"))?, &mut probe)?;
        got.insert(format!("latent.{i}"), z.ok_or("no latents")?);
        if i as u64 == mid {
            got.append(&mut seen);
        }
    }
    for i in 0..g.count("decodes")? {
        let mut seen = Got::new();
        let mut probe = |name: &str, x: &Tensor| {
            let x = x.transpose(0, 1).and_then(|x| x.unsqueeze(0)).expect("a video");
            seen.insert(format!("mid.dec.{name}"), x);
        };
        let frames = vae.decode_probed(&mut Decoding::default(), &g.input(&format!("z.{i}"))?, &mut probe)?;
        got.insert(format!("frames.{i}"), frames);
        if i == 0 {
            got.append(&mut seen);
        }
    }
    Ok(got)
}

fn difference(a: &Tensor, b: &Tensor) -> Result<f32, candle_core::Error> {
    (a - b)?.abs()?.flatten_all()?.max(D::Minus1)?.to_scalar::<f32>()
}

fn vae_stream(g: &Golden) -> Outcome {
    let vae = WanVae::load(&g.weights("vae")?)?;
    let (z, video) = (g.input("z")?, g.input("video")?);
    let mut got = Got::new();
    let mut state = Decoding::default();
    let (mut at, mut frames) = (0, Vec::new());
    for (i, n) in cases(g, "decode_chunks").iter().enumerate() {
        let n = n.as_u64().ok_or("chunk")? as usize;
        let part = vae.decode_next(&mut state, &z.narrow(1, at, n)?)?;
        at += n;
        got.insert(format!("frames.{i}"), part.clone());
        frames.push(part);
    }
    let whole = vae.decode(&z)?;
    let apart = difference(&whole, &Tensor::cat(&frames, 1)?)?;
    assert_eq!(apart, 0.0, "streamed decoding must equal one pass bit for bit");
    got.insert("one_pass_max_diff".into(), Tensor::new(&[apart], &Device::Cpu)?);
    let mut state = Encoding::default();
    let mut at = 0;
    for (i, n) in cases(g, "encode_chunks").iter().enumerate() {
        let n = n.as_u64().ok_or("chunk")? as usize;
        let part = vae.encode_next(&mut state, &video.narrow(1, at, n)?)?;
        at += n;
        got.insert(format!("latent.{i}"), part.ok_or("no latents")?);
    }
    let whole = vae.encode(&video)?;
    // any other cut gives the same, bit for bit
    let mut state = Encoding::default();
    let parts: Vec<Tensor> = (0..video.dim(1)?)
        .filter_map(|i| vae.encode_next(&mut state, &video.narrow(1, i, 1).expect("a frame")).expect("latents"))
        .collect();
    assert_eq!(difference(&whole, &Tensor::cat(&parts, 1)?)?, 0.0, "streamed encoding must equal one pass bit for bit");
    got.insert("latent_one_pass".into(), whole);
    Ok(got)
}
