//! One forward of the clip form.

use loquent::model::dit::ClipInputs;

use super::{text, traced, transformer};
use crate::data::{Check, Golden};

pub fn check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    let window = [golden.count("motion_frames.0")?, golden.count("motion_frames.1")?];
    let dit = transformer(golden, "dit", "dit", |c| c.motion_frames = window)?;
    let latent = golden.input("latent")?;
    let (reference, motion, cond) =
        (golden.input("ref_latents")?, golden.input("motion_latents")?, golden.input("cond_states")?);
    let words = dit.text(&golden.input("context")?).map_err(text)?;
    check.same("mid.text_embedding", &words.embedded)?;
    let audio = dit.audio(&golden.input("audio_input")?).map_err(text)?;
    let width = dit.config().dim;
    check.same("merged_audio_emb", &audio.tokens.local.reshape((audio.tokens.frames, (), width)).map_err(text)?)?;
    check.same("audio_emb_global", &audio.tokens.global)?;
    let drop = golden.value("drop_motion_frames")?.as_bool().ok_or("drop_motion_frames is not a flag")?;
    let inputs = ClipInputs {
        latent: &latent,
        timestep: golden.input("t")?.to_vec1::<f32>().map_err(text)?[0],
        text: Some(&words),
        reference: &reference,
        motion: (!drop).then_some(&motion),
        keep_last_motion: golden.count("add_last_motion")?,
        cond: Some(&cond),
        audio: &audio,
    };
    let out = traced(check, "", |trace| dit.clip(&inputs, trace))?;
    check.same("noise_pred", &out)
}
