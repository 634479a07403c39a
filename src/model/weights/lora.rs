//! Low-rank adapters merged while loading: `W + scale · B·A`, once, before any quantisation.
//!
//! LiveAvatar's file is one: rank 128, alpha 64, so scale 0.5. Names may carry `base_model.model.` (decided on the
//! first name) and may or may not carry `.default`. A name without `lora_` that is a parameter of the base replaces it;
//! for an adapted layer it is spelled with `.base_layer.`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use candle_core::{DType, Tensor};

use super::Source;
use crate::model::{Error, Result};

const PREFIX: &str = "base_model.model.";

/// A base checkpoint with an adapter on top.
pub struct Lora {
    base: Arc<dyn Source>,
    adapter: Arc<dyn Source>,
    scale: f64,
    /// Base name → (A, B) in the adapter.
    pairs: BTreeMap<String, (String, String)>,
    /// Base name → name in the adapter.
    replaced: BTreeMap<String, String>,
}

impl Lora {
    /// Matches the adapter to the base; a layer with only one half, of the wrong shape or unknown to the base is an
    /// error, because it would otherwise be lost in silence.
    pub fn new(base: Arc<dyn Source>, adapter: Arc<dyn Source>, alpha: f64, rank: usize) -> Result<Self> {
        let wrong = |what: String| Err(Error::Weights(format!("{}: {what}", adapter.origin())));
        let names = adapter.names();
        let prefix = if names.first().is_some_and(|n| n.starts_with(PREFIX)) { PREFIX } else { "" };
        let mut halves: BTreeMap<String, [Option<String>; 2]> = BTreeMap::new();
        let (mut replaced, mut unknown) = (BTreeMap::new(), BTreeSet::new());
        for name in &names {
            let bare = name.strip_prefix(prefix).unwrap_or(name);
            let half = [".lora_A.", ".lora_B."].iter().position(|h| bare.contains(h));
            if let Some(half) = half {
                let module = bare.split(".lora_").next().unwrap_or_default();
                halves.entry(format!("{module}.weight")).or_default()[half] = Some(name.clone());
            } else {
                let target = bare.replace(".base_layer.", ".");
                match base.shape(&target) {
                    Some(s) if Some(&s) == adapter.shape(name).as_ref() => {
                        replaced.insert(target, name.clone());
                    }
                    _ => {
                        unknown.insert(name.clone());
                    }
                }
            }
        }
        let mut pairs = BTreeMap::new();
        for (target, half) in halves {
            let (Some(a), Some(b)) = (&half[0], &half[1]) else {
                return wrong(format!("{target} has only one half of its adapter"));
            };
            let shapes = (adapter.shape(a).unwrap_or_default(), adapter.shape(b).unwrap_or_default());
            match (base.shape(&target).as_deref(), &shapes.0[..], &shapes.1[..]) {
                (Some([out, width]), [r, w], [o, r2]) if w == width && o == out && r == r2 => {
                    if *r != rank {
                        return wrong(format!("{target} has rank {r}, expected {rank}"));
                    }
                    pairs.insert(target, (a.clone(), b.clone()));
                }
                (None, ..) => {
                    unknown.insert(target);
                }
                (Some(s), ..) => return wrong(format!("{target} is {s:?}, its adapter {shapes:?}")),
            }
        }
        if let Some(first) = unknown.first() {
            return wrong(format!("{} names do not belong to the base, such as {first}", unknown.len()));
        }
        if rank == 0 || !alpha.is_finite() {
            return wrong(format!("rank {rank} and alpha {alpha} make no scale"));
        }
        Ok(Self { base, adapter, scale: alpha / rank as f64, pairs, replaced })
    }

    /// Parameters that differ from the base.
    pub fn changed(&self) -> Vec<String> {
        self.pairs.keys().chain(self.replaced.keys()).cloned().collect::<BTreeSet<_>>().into_iter().collect()
    }
}

impl Source for Lora {
    fn names(&self) -> Vec<String> {
        self.base.names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.base.shape(name)
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        let w = match self.replaced.get(name) {
            Some(other) => self.adapter.load(other)?,
            None => self.base.load(name)?,
        };
        let Some((a, b)) = self.pairs.get(name) else { return Ok(w) };
        let product =
            self.adapter.load(b)?.to_dtype(DType::F32)?.matmul(&self.adapter.load(a)?.to_dtype(DType::F32)?)?;
        let merged = (w.to_dtype(DType::F32)? + (product * self.scale)?)?;
        Ok(merged.to_dtype(w.dtype())?)
    }

    fn origin(&self) -> String {
        format!("{} with {}", self.base.origin(), self.adapter.origin())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::model::weights::Tensors;

    fn source(list: &[(&str, &[usize])]) -> Arc<dyn Source> {
        let make = |s: &[usize]| Tensor::ones(s, DType::F32, &Device::Cpu).unwrap();
        Arc::new(Tensors::new(list.iter().map(|(n, s)| (n.to_string(), make(s))), "test"))
    }

    #[test]
    fn prefix_replacement_and_merge() {
        let base = source(&[("a.q.weight", &[2, 3]), ("a.q.bias", &[2]), ("b.weight", &[4])]);
        let lora = source(&[
            ("base_model.model.a.q.lora_A.weight", &[1, 3]),
            ("base_model.model.a.q.lora_B.weight", &[2, 1]),
            ("base_model.model.a.q.base_layer.bias", &[2]),
        ]);
        let merged = Lora::new(base, lora, 0.5, 1).unwrap();
        assert_eq!(merged.changed(), ["a.q.bias", "a.q.weight"]);
        assert_eq!(merged.load("a.q.weight").unwrap().to_vec2::<f32>().unwrap(), vec![vec![1.5; 3]; 2]);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let base = || source(&[("a.q.weight", &[2, 3])]);
        let half = source(&[("a.q.lora_A.default.weight", &[1, 3])]);
        assert!(Lora::new(base(), half, 1.0, 1).is_err());
        let stranger = source(&[("x.q.lora_A.weight", &[1, 3]), ("x.q.lora_B.weight", &[2, 1])]);
        assert!(Lora::new(base(), stranger, 1.0, 1).is_err());
    }
}
