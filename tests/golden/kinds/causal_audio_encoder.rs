//! Audio tokens from features of all layers.

use candle_core::Tensor;

use super::{text, transformer};
use crate::data::{Check, Golden};

pub fn check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    let dit = transformer(golden, "", "dit", |_| {})?;
    let encoder = dit.audio_encoder().ok_or("no audio encoder")?;
    for case in 0..golden.count("cases")? {
        let features = golden.input(&format!("features.{case}"))?;
        let (mut local, mut global) = (Vec::new(), Vec::new());
        for i in 0..features.dim(0).map_err(text)? {
            let tokens = encoder.forward(&features.get(i).map_err(text)?, 0, 0).map_err(text)?;
            let width = dit.config().dim;
            local.push(tokens.local.reshape((tokens.frames, (), width)).map_err(text)?);
            global.push(tokens.global);
        }
        check.same(&format!("local.{case}"), &Tensor::stack(&local, 0).map_err(text)?)?;
        check.same(&format!("global.{case}"), &Tensor::stack(&global, 0).map_err(text)?)?;
    }
    Ok(())
}
