//! Per-tensor e4m3: quantised operands, their factors and the product.

use candle_core::{DType, Device, Tensor};
use loquent::model::nn::fp8;

use super::text;
use crate::data::{Check, Golden};

pub fn check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    for case in 0..golden.count("cases")? {
        let mut operands = Vec::new();
        for name in ["x", "w"] {
            let q = fp8::quantise(&golden.input(&format!("{name}.{case}"))?).map_err(text)?;
            check.same(&format!("{name}q.{case}"), &q.values.to_dtype(DType::F32).map_err(text)?)?;
            check.same(&format!("{name}s.{case}"), &Tensor::new(&[q.factor], &Device::Cpu).map_err(text)?)?;
            operands.push(q);
        }
        let bias = golden.input(&format!("b.{case}"))?;
        let y = fp8::linear(&operands[0], &operands[1], Some(&bias)).map_err(text)?;
        check.same(&format!("y.{case}"), &y)?;
    }
    Ok(())
}
