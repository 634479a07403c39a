//! The adapter merged into the transformer.

use candle_core::{Device, Tensor};
use loquent::model::weights::{Lora, Source};

use super::text;
use crate::data::{Check, Golden};

pub fn check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    let (alpha, rank) = (golden.number("alpha")?, golden.count("rank")?);
    let lora = Lora::new(golden.source("dit")?, golden.source("lora")?, alpha, rank).map_err(text)?;
    for name in golden.value("check")?.as_array().ok_or("check is not a list")? {
        let name = name.as_str().ok_or("a name is not text")?;
        check.same(&format!("merged.{name}"), &lora.load(name).map_err(text)?)?;
    }
    check.same("changed_count", &Tensor::new(&[lora.changed().len() as i64], &Device::Cpu).map_err(text)?)
}
