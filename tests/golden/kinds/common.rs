//! What the kinds share: results gathered by name, then compared with everything the golden holds.

use std::{collections::BTreeMap, error::Error};

use candle_core::{Device, Tensor};
use serde_json::Value;

use crate::data::{Check, Golden};

/// Results by output name, without `out.`.
pub type Got = BTreeMap<String, Tensor>;
/// What a kind computed, or why it could not.
pub type Outcome = Result<Got, Box<dyn Error>>;

/// Compares all results; an expected output that was not computed fails.
pub fn compare(golden: &Golden, check: &mut Check, got: Outcome) -> Result<(), String> {
    let got = got.map_err(|e| e.to_string())?;
    for (name, tensor) in &got {
        check.same(name, tensor)?;
    }
    let absent: Vec<String> = golden.outputs().into_iter().filter(|n| !got.contains_key(n)).collect();
    if absent.is_empty() { Ok(()) } else { Err(format!("not computed: {}", absent.join(", "))) }
}

/// A list of the configuration; empty when absent.
pub fn cases<'a>(g: &'a Golden, key: &str) -> &'a [Value] {
    g.config[key].as_array().map_or(&[], Vec::as_slice)
}

/// A count in a case of the configuration.
pub fn int(v: &Value, key: &str) -> usize {
    v[key].as_u64().unwrap_or_else(|| panic!("`{key}` is not a count in {v}")) as usize
}

/// Counts as an i64 tensor.
pub fn list(v: impl IntoIterator<Item = usize>) -> candle_core::Result<Tensor> {
    Tensor::new(v.into_iter().map(|n| n as i64).collect::<Vec<_>>(), &Device::Cpu)
}
