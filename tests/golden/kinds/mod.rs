//! One file per golden kind, or per family of kinds; each kind has `check(golden, check)`.

pub mod audio_inject;
pub mod causal_audio_encoder;
pub mod common;
pub mod dit_block;
pub mod fp8_quant;
pub mod frame_packer;
mod hearing;
pub mod la_stream;
pub mod lora_merge;
mod pictures;
mod pipelines;
pub mod rope_tables;
pub mod s2v_forward;
pub mod schedulers;
mod text;
mod video;
pub mod wan_forward;

use candle_core::Tensor;
use loquent::model::dit::{Config, Dit, Trace};

use crate::data::{Check, Golden};

/// Gives a kind's name to a check of a family.
macro_rules! named {
    ($($kind:ident => $($at:ident)::+;)*) => {
        $(pub mod $kind { pub use super::$($at)::+ as check; })*
    };
}

named! {
    audio_buckets => hearing::audio_buckets_check;
    audio_load => hearing::audio_load_check;
    image_prep => pictures::image_prep_check;
    la_e2e => pipelines::live_check;
    la_tpp => pipelines::pipelined_check;
    s2v_e2e => pipelines::s2v_check;
    umt5 => text::umt5_encoder_check;
    vae21 => video::vae_check;
    vae21_stream => video::vae_stream_check;
    vae22 => video::vae_check;
    wav2vec2_feat => hearing::wav2vec2_feat_check;
}

/// Any error as the text a check reports.
pub fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// The transformer of a golden: `config.<part>` (or the configuration itself where `part` is empty), changed by `edit`,
/// with the weights of `slot`.
pub fn transformer(golden: &Golden, part: &str, slot: &str, edit: impl FnOnce(&mut Config)) -> Result<Dit, String> {
    let value = if part.is_empty() { &golden.config } else { golden.value(part)? };
    let mut config = Config::parse_value(value.clone()).map_err(text)?;
    edit(&mut config);
    config.check().map_err(text)?;
    let weights = golden.weights(slot)?;
    let dit = Dit::load(config, &weights).map_err(text)?;
    let report = weights.finish().map_err(text)?;
    if report.unexpected.is_empty() { Ok(dit) } else { Err(format!("weights not used: {:?}", report.unexpected)) }
}

/// Runs `body` with a trace that compares what it sees with outputs named `prefix` + name.
pub fn traced<T>(
    check: &Check,
    prefix: &str,
    body: impl FnOnce(&mut Trace) -> loquent::model::Result<T>,
) -> Result<T, String> {
    let mut wrong = None;
    let mut sink = |name: &str, x: &Tensor| {
        if let Err(e) = check.same(&format!("{prefix}{name}"), x) {
            wrong.get_or_insert(e);
        }
    };
    let out = body(&mut Trace::to(&mut sink)).map_err(text)?;
    wrong.map_or(Ok(out), Err)
}
