//! LiveAvatar's streaming transformer: prefill, then blocks of steps with one ring per step.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use loquent::model::{
    dit::{Opening, Trace},
    sampler::Euler,
};

use super::{text, traced, transformer};
use crate::data::{Check, Golden};

pub fn check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    let frames = golden.count("infer_frames")? / 4;
    let (per_block, steps, clips) =
        (golden.count("num_frames_per_block")?, golden.count("steps")?, golden.count("clips")?);
    let (pad, drop) = (golden.count("motion_frames")?, golden.count("lat_motion_frames")?);
    let ring = golden.count("kv_cache_frames")?;
    let dit = transformer(golden, "dit", "dit", |c| {
        c.motion_frames = [pad, drop];
        c.kv_frames = ring;
        c.frames_per_block = per_block;
    })?;
    let last = dit.config().num_layers - 1;
    let schedule = Arc::new(dit.schedule(Euler::live_avatar(steps, 3.0).map_err(text)?).map_err(text)?);
    let words = Arc::new(dit.text(&golden.input("context")?).map_err(text)?);
    let (reference, motion) = (golden.input("ref_latents")?, golden.input("motion_latents")?);
    let cond = golden.input("cond_latents")?;
    let audio = golden.input("audio_emb")?;
    let opening = Opening { reference: &reference, motion: Some(&motion), text: Some(words) };
    let mut state = traced(check, "mid.sink.", |trace| dit.open_traced(&opening, &schedule, trace))?;
    for layer in 0..=last {
        let kept = state.conditioning(layer).ok_or("no conditioning")?;
        let heads = |t: &Tensor| t.reshape((t.dim(0)?, dit.config().num_heads, dit.config().head()));
        check.same(&format!("mid.sink.cond_k.{layer}"), &heads(&kept.k).map_err(text)?)?;
        check.same(&format!("mid.sink.cond_v.{layer}"), &heads(&kept.v).map_err(text)?)?;
    }

    let distances = golden.input("relative_dist")?.to_vec1::<i64>().map_err(text)?;
    let mut distance = distances.into_iter();
    let (mut predictions, mut latents, mut inputs) = (Vec::new(), Vec::new(), Vec::new());
    let blocks = frames / per_block;
    for clip in 0..clips {
        let noise = golden.input(&format!("noise.{clip}"))?;
        let mut done = Vec::new();
        for b in 0..blocks {
            let at = b * per_block;
            let mut x = noise.narrow(1, at, per_block).map_err(text)?;
            let pose = cond.narrow(1, at, per_block).map_err(text)?;
            let heard = audio.narrow(2, (clip * frames + at) * 4, per_block * 4).map_err(text)?;
            let heard = dit.audio(&heard).map_err(text)?;
            let (mut outs, mut ins) = (Vec::new(), Vec::new());
            for step in 0..steps {
                let rho = distance.next().ok_or("too few reference distances")? as usize;
                let tag = format!("mid.b{}s{step}", clip * blocks + b);
                let out = traced(check, &format!("{tag}."), |trace| {
                    dit.forward(&mut state, &x, step, &heard, Some(&pose), rho, trace)
                })?;
                ins.push(x.clone());
                x = schedule.euler.step(step, &x, &out).map_err(text)?;
                outs.push(out);
            }
            state.advance(per_block);
            predictions.push(Tensor::stack(&outs, 0).map_err(text)?);
            inputs.push(Tensor::stack(&ins, 0).map_err(text)?);
            done.push(x);
        }
        latents.push(Tensor::cat(&done, 1).map_err(text)?);
    }
    // The recorder kept a reference to the ring, not a copy: what stands under the tag of an early forward is the ring of
    // that step after the last block.
    let tag = golden.value("kv_tag")?.as_str().ok_or("kv_tag is not text")?;
    let step: usize = tag.split_once('s').and_then(|(_, s)| s.parse().ok()).ok_or("kv_tag names no step")?;
    for layer in 0..=last {
        let (k, v) = state.ring(step, layer).ok_or("no ring")?;
        let heads = |t: Tensor| t.reshape((t.dim(0)?, dit.config().num_heads, dit.config().head()));
        check.same(&format!("mid.{tag}.kv_k.{layer}"), &heads(k).map_err(text)?)?;
        check.same(&format!("mid.{tag}.kv_v.{layer}"), &heads(v).map_err(text)?)?;
    }
    let times = Tensor::new(schedule.euler.timesteps(), &candle_core::Device::Cpu).map_err(text)?;
    let times = times.reshape((1, steps)).and_then(|t| t.broadcast_as((clips * blocks, steps))).map_err(text)?;
    check.same("timesteps", &times)?;
    check.same("pred", &Tensor::stack(&predictions, 0).map_err(text)?)?;
    check.same("x_in", &Tensor::stack(&inputs, 0).map_err(text)?)?;
    check.same("latents", &Tensor::stack(&latents, 0).map_err(text)?)?;

    // The short way through the same stream must give the same latents.
    let mut state = dit.open_traced(&opening, &schedule, &mut Trace::off()).map_err(text)?;
    let distances = golden.input("relative_dist")?.to_vec1::<i64>().map_err(text)?;
    let rho: Vec<usize> = distances[..steps].iter().map(|d| *d as usize).collect();
    let noise = golden.input("noise.0")?.narrow(1, 0, per_block).map_err(text)?;
    let heard = dit.audio(&audio.narrow(2, 0, per_block * 4).map_err(text)?).map_err(text)?;
    let short = dit.generate(&mut state, &heard, noise, None, &rho).map_err(text)?;
    let long = latents[0].narrow(1, 0, per_block).map_err(text)?;
    let pose_is_zero = cond.abs().and_then(|c| c.max_all()).and_then(|m| m.to_scalar::<f32>()).map_err(text)? == 0.0;
    let apart =
        (short - long).and_then(|d| d.abs()?.max_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()).map_err(text)?;
    if pose_is_zero && apart > 1e-5 {
        return Err(format!("generate and step-by-step forwards differ by {apart}"));
    }
    Ok(())
}
