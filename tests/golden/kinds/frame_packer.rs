//! Motion tokens and where they stand.

use loquent::model::{
    dit::DropMode,
    nn::rope::{Rope, Rounding},
};

use super::{text, transformer};
use crate::data::{Check, Golden};

pub fn check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    let dit = transformer(golden, "", "dit", |_| {})?;
    let packer = dit.packer().ok_or("no packer")?;
    let cases = golden.value("cases")?.as_array().ok_or("cases is not a list")?.clone();
    for (i, case) in cases.iter().enumerate() {
        let motion = golden.input(&format!("motion.{}", case["motion"].as_u64().ok_or("motion is not a number")?))?;
        let keep = case["add_last_motion"].as_u64().ok_or("add_last_motion is not a number")? as usize;
        let mode = match case["drop_mode"].as_str() {
            Some("padd") => DropMode::Pad,
            Some("drop") => DropMode::Drop,
            other => return Err(format!("unknown drop mode {other:?}")),
        };
        let (tokens, groups) = packer.forward(&motion, keep, mode).map_err(text)?;
        let rope = Rope::new(&groups, dit.config().head(), Rounding::Exact, &crate::data::device()).map_err(text)?;
        check.same(&format!("tokens.{i}"), &tokens)?;
        check.same(&format!("rope_cos.{i}"), &rope.cos().map_err(text)?)?;
        check.same(&format!("rope_sin.{i}"), &rope.sin().map_err(text)?)?;
    }
    Ok(())
}
