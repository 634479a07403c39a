//! The adapter merged into the transformer.

use candle_core::{Device, Tensor};
use loquent::model::weights::{Adapted, Source};

use super::text;
use crate::data::{Check, Golden};

/// What the loader takes for alpha where a file in LiveAvatar's spelling (`.default`) does not say.
const LIVE_AVATAR_ALPHA: f64 = 64.0;

pub fn check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    let (alpha, rank) = (golden.number("alpha")?, golden.count("rank")?);
    let adapter = golden.source("lora")?;
    // The file does not carry its alpha, so the golden's comes in through the adapter's weight.
    let spelled = adapter.names().iter().any(|n| n.contains(".default."));
    let weight = if spelled { alpha / LIVE_AVATAR_ALPHA } else { alpha / rank as f64 };
    let merged = Adapted::new(golden.source("dit")?, vec![(adapter, weight)]).map_err(text)?;
    for name in golden.value("check")?.as_array().ok_or("check is not a list")? {
        let name = name.as_str().ok_or("a name is not text")?;
        check.same(&format!("merged.{name}"), &merged.load(name).map_err(text)?)?;
    }
    check.same("changed_count", &Tensor::new(&[merged.changed().len() as i64], &Device::Cpu).map_err(text)?)
}
