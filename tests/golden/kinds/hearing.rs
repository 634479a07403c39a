//! wav2vec2, the change of rate, the buckets.

use candle_core::{Device, Tensor};
use loquent::{
    codec::Resampler,
    model::wav2vec2::{self, Wav2Vec2, features},
};

use super::common::{Got, Outcome, cases, compare, int, list};
use crate::data::{Check, Golden};

/// `wav2vec2_feat`.
pub fn wav2vec2_feat_check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    compare(golden, check, wav2vec2_feat(golden))
}

/// `audio_buckets`.
pub fn audio_buckets_check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    compare(golden, check, audio_buckets(golden))
}

fn wav2vec2_feat(g: &Golden) -> Outcome {
    let w = g.weights("wav2vec")?;
    let config: wav2vec2::Config = serde_json::from_value(g.config.clone())?;
    let net = Wav2Vec2::load(&w, &config)?;
    let report = w.finish()?;
    assert!(report.unexpected.is_empty(), "{:?}", report.unexpected);
    let mut got = Got::new();
    let x = features::normalise(&g.input("waveform")?.to_vec1::<f32>()?);
    assert_eq!(net.frames(x.len()), g.output("hidden_states")?.dim(1)?);
    let x = Tensor::new(x, &crate::data::device())?;
    let states = net.hidden_states(&x, &mut |name, t| {
        got.insert(format!("mid.{name}"), t.clone());
    })?;
    let all = features::to_feature_rate(&states)?;
    got.insert("feat_last".into(), all.narrow(0, all.dim(0)? - 1, 1)?);
    got.insert("feat_all_layers".into(), all);
    got.insert("hidden_states".into(), states);
    got.insert("normalized".into(), x.unsqueeze(0)?);
    Ok(got)
}

fn audio_buckets(g: &Golden) -> Outcome {
    let mut got = Got::new();
    for (i, c) in cases(g, "interp").iter().enumerate() {
        let x = g.input(&format!("interp.{i}"))?;
        let n = match c["len"].as_u64() {
            Some(n) => n as usize,
            None => features::resampled_len(x.dim(1)?, int(c, "in") as f64, int(c, "out") as f64),
        };
        got.insert(format!("interp.{i}"), features::interpolate(&x, n)?);
    }
    for (i, c) in cases(g, "fps_buckets").iter().enumerate() {
        let x = g.input(&format!("feat.{}", int(c, "feat")))?;
        let fps = c["fps"].as_f64().ok_or("fps")?;
        let b = features::buckets(&x, fps, int(c, "batch_frames"), int(c, "m"))?;
        got.insert(format!("fps_bucket.{i}"), b.frames);
        got.insert(format!("fps_bucket.{i}.num"), list([b.clips])?);
    }
    for (i, c) in cases(g, "buckets").iter().enumerate() {
        let x = g.input(&format!("feat.{}", int(c, "feat")))?;
        let b = features::buckets_by_stride(&x, int(c, "stride"), int(c, "batch_frames"), int(c, "m"))?;
        got.insert(format!("bucket.{i}"), b.frames);
        got.insert(format!("bucket.{i}.num"), list([b.clips])?);
    }
    for (i, c) in cases(g, "sample_indices").iter().enumerate() {
        let index = features::sample_indices(
            c["original_fps"].as_f64().ok_or("original_fps")?,
            int(c, "total_frames"),
            c["target_fps"].as_f64().ok_or("target_fps")?,
            int(c, "num_sample"),
            int(c, "fixed_start"),
        );
        got.insert(format!("sample_indices.{i}"), list(index)?);
    }
    Ok(got)
}

/// `audio_load`.
pub fn audio_load_check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    compare(golden, check, audio_load(golden))
}

/// The channel mean through the resampler that speech files pass.
fn audio_load(g: &Golden) -> Outcome {
    let mono = g.input("waveform")?.mean(0)?.to_vec1::<f32>()?;
    let mut resampler = Resampler::new(g.count("sample_rate")? as u32, 16_000)?;
    let mut out = resampler.push(&mono)?;
    out.extend(resampler.finish()?);
    Ok(Got::from([("mono16k".into(), Tensor::new(out, &Device::Cpu)?)]))
}
