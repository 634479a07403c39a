//! Rotary tables: exact, and rounded to half precision as LiveAvatar's.

use candle_core::Device;
use loquent::model::nn::rope::{Group, Rope, Rounding};

use crate::data::{Check, Golden};

pub fn check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    let head = golden.count("head_dim")?;
    let grids = golden.value("grids")?.as_array().ok_or("grids is not a list")?.clone();
    for (i, grid) in grids.iter().enumerate() {
        let groups: Vec<Group> = serde_json::from_value::<Vec<[[i64; 3]; 3]>>(grid["groups"].clone())
            .map_err(|e| e.to_string())?
            .into_iter()
            .map(|[start, end, span]| Group { start, end, span, shift: 0 })
            .collect();
        for (tag, rounding) in [("wan", Rounding::Exact), ("live", Rounding::Half)] {
            let rope = Rope::new(&groups, head, rounding, &Device::Cpu).map_err(|e| e.to_string())?;
            check.same(&format!("{tag}.cos.{i}"), &rope.cos().map_err(|e| e.to_string())?)?;
            check.same(&format!("{tag}.sin.{i}"), &rope.sin().map_err(|e| e.to_string())?)?;
        }
    }
    Ok(())
}
