//! One block alone, with the modulation boundary at several places.

use loquent::model::{
    dit::Trace,
    nn::{Residual, Rope},
};

use super::{text, transformer};
use crate::data::{Check, Golden};

pub fn check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    let dit = transformer(golden, "dit", "dit", |_| {})?;
    let x = golden.input("hidden")?.squeeze(0).map_err(text)?;
    let e0 = golden.input("e0")?.squeeze(0).and_then(|e| e.transpose(0, 1)?.contiguous()).map_err(text)?;
    let words = golden.input("text")?.squeeze(0).map_err(text)?;
    let rope = Rope::from_tables(&golden.input("rope_cos")?, &golden.input("rope_sin")?).map_err(text)?;
    let rows = x.dim(0).map_err(text)?;
    let list = |name: &str| -> Result<Vec<usize>, String> {
        let values = golden.value(name)?.as_array().ok_or(format!("{name} is not a list"))?;
        Ok(values.iter().filter_map(|v| v.as_u64()).map(|v| v as usize).collect())
    };
    for layer in list("layers")? {
        let block = dit.block(layer).ok_or("no such block")?;
        let m = block.modulation(&e0).map_err(text)?;
        let kv = block.text(&words, 0).map_err(text)?;
        for (i, boundary) in list("boundaries")?.into_iter().enumerate() {
            let runs = [boundary, rows - boundary];
            let mut out = Residual::new(x.copy().map_err(text)?);
            block
                .forward(&mut out, &m, &runs, kv.as_ref(), &mut Trace::off(), |a, y| a.whole(y, &rope))
                .map_err(text)?;
            check.same(&format!("block{layer}.{i}"), &out.into_tokens().map_err(text)?)?;
        }
    }
    Ok(())
}
