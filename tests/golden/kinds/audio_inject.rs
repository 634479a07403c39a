//! The audio injection alone; tokens that are not noisy come back unchanged.

use candle_core::Tensor;
use loquent::model::{dit::AudioTokens, nn::Residual};

use super::{text, transformer};
use crate::data::{Check, Golden};

pub fn check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    let dit = transformer(golden, "dit", "dit", |_| {})?;
    let x = golden.input("hidden")?.squeeze(0).map_err(text)?;
    let noisy = golden.count("noisy_tokens")?;
    let local = golden.input("local")?.squeeze(0).map_err(text)?;
    let (frames, _, width) = local.dims3().map_err(text)?;
    let tokens = AudioTokens {
        local: local.reshape(((), width)).map_err(text)?,
        global: golden.input("global")?.reshape((frames, width)).map_err(text)?,
        frames,
    };
    let audio = dit.audio_from_tokens(tokens).map_err(text)?;
    for layer in golden.value("layers")?.as_array().ok_or("layers is not a list")? {
        let layer = layer.as_u64().ok_or("a layer is not a number")? as usize;
        let j = dit.config().audio_inject_layers.iter().position(|l| *l == layer).ok_or("no injector there")?;
        let injector = dit.injector(j).ok_or("no such injector")?;
        let mut heard = Residual::new(x.narrow(0, 0, noisy).and_then(|x| x.force_contiguous()).map_err(text)?);
        injector.forward(&mut heard, &audio.injectors[j], frames).map_err(text)?;
        let heard = heard.into_tokens().map_err(text)?;
        let rest = x.narrow(0, noisy, x.dim(0).map_err(text)? - noisy).map_err(text)?;
        let out = Tensor::cat(&[heard, rest], 0).map_err(text)?;
        check.same(&format!("s2v.{layer}"), &out)?;
        check.same(&format!("live.{layer}"), &out)?;
    }
    Ok(())
}
