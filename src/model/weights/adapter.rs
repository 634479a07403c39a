//! Adapters (LoRA) of every layout, several at once with a weight each, merged while loading: `W + Σ wᵢ·sᵢ·BᵢAᵢ`.
//! A matrix that is kept quantised (GGUF blocks, 8-bit floats) is not touched: there the products stand beside it and
//! are computed with every use ([`crate::model::nn::Matrix`]), so that nothing is rounded twice.
//!
//! Layouts, told apart by names: LiveAvatar and PEFT (`lora_A`, `lora_B`, with or without `.default`, below
//! `base_model.model.` or not), ComfyUI (`diffusion_model.….lora_down`, `lora_up`, `alpha`, and whole differences as
//! `.diff`, `.diff_b`), Diffusers (its own module names), kohya (`lora_unet_blocks_0_self_attn_q`). A file without `alpha` has
//! scale 1; LiveAvatar's own (with `.default`) has alpha 64 by its `s2v_causal_sft.yaml`, which makes 0.5 at rank 128.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use candle_core::{DType, Tensor};

use super::{
    Source, Stored,
    layout::{Layout, Part, official},
};
use crate::model::{Error, Result, nn::Side};

const PREFIXES: &[&str] = &["base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer."];
const KOHYA: &str = "lora_unet_";
/// Endings of the first half; the second half's are the same with A→B, down→up.
const HALVES: &[(&str, &str)] = &[
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
];
/// LiveAvatar's alpha (liveavatar/configs/s2v_causal_sft.yaml at 9c2c38d).
const LIVE_AVATAR_ALPHA: f64 = 64.0;

#[derive(Default)]
struct Module {
    halves: [Option<String>; 2],
    alpha: Option<String>,
    named_default: bool,
}

enum Change {
    /// A, B and the whole factor.
    Product(String, String, f64),
    /// Added with a factor.
    Difference(String, f64),
    /// Takes the parameter's place.
    Replacement(String),
}

/// A base checkpoint with adapters on top.
pub struct Adapted {
    base: Arc<dyn Source>,
    adapters: Vec<Arc<dyn Source>>,
    /// Base name → changes, each with the number of its adapter.
    changes: BTreeMap<String, Vec<(usize, Change)>>,
}

/// The base's name of a module (without `.weight`), if it has one.
fn module_of(base: &dyn Source, flat: &BTreeMap<String, String>, name: &str) -> Option<String> {
    let mut bare = name;
    while let Some(rest) = PREFIXES.iter().find_map(|p| bare.strip_prefix(p)) {
        bare = rest;
    }
    if let Some(k) = bare.strip_prefix(KOHYA) {
        return flat.get(k).cloned();
    }
    let has = |m: &str| base.shape(&format!("{m}.weight")).is_some();
    let translated = official(bare, Part::Base, Layout::Diffusers, "");
    [bare.to_string(), translated].into_iter().find(|m| has(m))
}

impl Adapted {
    /// Matches adapters and weights to the base. What belongs to nothing, lacks a half or has the wrong shape is an
    /// error, because it would otherwise be lost in silence.
    pub fn new(base: Arc<dyn Source>, adapters: Vec<(Arc<dyn Source>, f64)>) -> Result<Self> {
        let names = base.names();
        let modules = names.iter().filter_map(|n| n.strip_suffix(".weight"));
        let flat: BTreeMap<String, String> = modules.map(|m| (m.replace('.', "_"), m.to_string())).collect();
        let mut changes: BTreeMap<String, Vec<(usize, Change)>> = BTreeMap::new();
        for (i, (adapter, weight)) in adapters.iter().enumerate() {
            if !weight.is_finite() {
                return Err(Error::Weights(format!("{}: {weight} is no weight", adapter.origin())));
            }
            for (name, change) in read(&*base, &flat, &**adapter, *weight)? {
                changes.entry(name).or_default().push((i, change));
            }
        }
        Ok(Adapted { base, adapters: adapters.into_iter().map(|a| a.0).collect(), changes })
    }

    /// Parameters that differ from the base.
    pub fn changed(&self) -> Vec<String> {
        self.changes.keys().cloned().collect()
    }
}

fn read(
    base: &dyn Source,
    flat: &BTreeMap<String, String>,
    adapter: &dyn Source,
    weight: f64,
) -> Result<Vec<(String, Change)>> {
    let wrong = |what: String| Error::Weights(format!("{}: {what}", adapter.origin()));
    let mut modules: BTreeMap<String, Module> = BTreeMap::new();
    let mut out = Vec::new();
    let mut strangers = BTreeSet::new();
    'names: for name in adapter.names() {
        for (first, second) in HALVES {
            for (half, end) in [first, second].into_iter().enumerate() {
                if let Some(stem) = name.strip_suffix(end) {
                    match module_of(base, flat, stem) {
                        Some(m) => {
                            let m = modules.entry(m).or_default();
                            m.named_default |= end.contains(".default.");
                            m.halves[half] = Some(name.clone());
                        }
                        None => drop(strangers.insert(name.clone())),
                    }
                    continue 'names;
                }
            }
        }
        let stem = |end: &str| name.strip_suffix(end).and_then(|s| module_of(base, flat, s));
        if let Some(m) = stem(".alpha") {
            modules.entry(m).or_default().alpha = Some(name);
        } else if let Some(m) = stem(".diff") {
            out.push((format!("{m}.weight"), Change::Difference(name, weight)));
        } else if let Some(m) = stem(".diff_b") {
            out.push((format!("{m}.bias"), Change::Difference(name, weight)));
        } else {
            let mut bare = name.replace(".base_layer.", ".");
            while let Some(rest) = PREFIXES.iter().find_map(|p| bare.strip_prefix(p)) {
                bare = rest.to_string();
            }
            match base.shape(&bare) {
                Some(_) => out.push((bare, Change::Replacement(name))),
                None => drop(strangers.insert(name)),
            }
        }
    }
    if let Some(first) = strangers.first() {
        return Err(wrong(format!("{} names do not belong to the base model, such as {first}", strangers.len())));
    }
    for (module, m) in modules {
        let [Some(a), Some(b)] = m.halves else {
            return Err(wrong(format!("{module} has only a part of its adapter")));
        };
        let name = format!("{module}.weight");
        let (want, down, up) = (base.shape(&name), adapter.shape(&a), adapter.shape(&b));
        let rank = match (want.as_deref(), down.as_deref(), up.as_deref()) {
            (Some([out, width]), Some([r, w]), Some([o, r2])) if w == width && o == out && r == r2 && *r > 0 => *r,
            shapes => return Err(wrong(format!("{module} does not fit the base: {shapes:?}"))),
        };
        let alpha = match m.alpha {
            Some(name) => {
                let t = adapter.load(&name)?.to_dtype(DType::F32)?.flatten_all()?;
                f64::from(t.to_vec1::<f32>()?.first().copied().ok_or_else(|| wrong(format!("{name} is empty")))?)
            }
            None if m.named_default => LIVE_AVATAR_ALPHA,
            None => rank as f64,
        };
        out.push((name, Change::Product(a, b, weight * alpha / rank as f64)));
    }
    for (name, change) in &out {
        if let Change::Difference(n, _) | Change::Replacement(n) = change
            && base.shape(name) != adapter.shape(n)
        {
            return Err(wrong(format!("{n} is {:?}, the base has {:?}", adapter.shape(n), base.shape(name))));
        }
    }
    Ok(out)
}

impl Source for Adapted {
    fn names(&self) -> Vec<String> {
        self.base.names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.base.shape(name)
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        let Some(changes) = self.changes.get(name) else { return self.base.load(name) };
        let mut w = self.base.load(name)?;
        let stored = w.dtype();
        let wide = |i: usize, n: &str| -> Result<Tensor> { Ok(self.adapters[i].load(n)?.to_dtype(DType::F32)?) };
        for (i, change) in changes {
            if let Change::Replacement(n) = change {
                w = wide(*i, n)?;
            }
        }
        w = w.to_dtype(DType::F32)?;
        for (i, change) in changes {
            let more = match change {
                Change::Product(a, b, scale) => (wide(*i, b)?.matmul(&wide(*i, a)?)? * *scale)?,
                Change::Difference(n, scale) => (wide(*i, n)? * *scale)?,
                Change::Replacement(_) => continue,
            };
            w = (w + more)?;
        }
        // merged numbers do not fit into eight bits again
        Ok(if stored.size_in_bytes() >= 2 { w.to_dtype(stored)? } else { w })
    }

    /// Products go beside quantised numbers, exactly; whole differences and replacements are merged instead, and the
    /// matrix is then no longer quantised.
    fn quantised(&self, name: &str) -> Result<Option<Stored>> {
        let changes = self.changes.get(name).map_or(&[][..], Vec::as_slice);
        if changes.iter().any(|(_, c)| !matches!(c, Change::Product(..))) {
            return Ok(None);
        }
        let Some(mut stored) = self.base.quantised(name)? else { return Ok(None) };
        for (i, change) in changes {
            let Change::Product(a, b, scale) = change else { continue };
            let up = (self.adapters[*i].load(b)?.to_dtype(DType::F32)? * *scale)?;
            stored.side.push(Side { down: self.adapters[*i].load(a)?, up });
        }
        Ok(Some(stored))
    }

    fn origin(&self) -> String {
        let names: Vec<String> = self.adapters.iter().map(|a| a.origin()).collect();
        format!("{} with {}", self.base.origin(), names.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::weights::Tensors;
    use candle_core::Device;

    fn source(list: &[(&str, &[usize], f32)]) -> Arc<dyn Source> {
        let make = |s: &[usize], v: f32| Tensor::full(v, s, &Device::Cpu).unwrap();
        Arc::new(Tensors::new(list.iter().map(|(n, s, v)| (n.to_string(), make(s, *v))), "test"))
    }

    fn base() -> Arc<dyn Source> {
        source(&[("blocks.0.self_attn.q.weight", &[2, 3], 1.0), ("blocks.0.self_attn.q.bias", &[2], 1.0)])
    }

    fn first(s: &Adapted, name: &str) -> f32 {
        s.load(name).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()[0]
    }

    #[test]
    fn every_layout_means_the_same() {
        let q = "blocks.0.self_attn.q";
        let files: Vec<(Vec<(String, Vec<usize>, f32)>, f32)> = [
            ("base_model.model.", q, ".lora_A.weight", ".lora_B.weight", None, 3.0),
            ("", q, ".lora_A.default.weight", ".lora_B.default.weight", None, 1.0 + 64.0),
            ("diffusion_model.", q, ".lora_down.weight", ".lora_up.weight", Some(0.5), 1.5),
            ("transformer.", "blocks.0.attn1.to_q", ".lora_A.weight", ".lora_B.weight", None, 3.0),
            ("lora_unet_", "blocks_0_self_attn_q", ".lora_down.weight", ".lora_up.weight", Some(2.0), 3.0),
        ]
        .map(|(p, m, a, b, alpha, want)| {
            let mut list = vec![(format!("{p}{m}{a}"), vec![2, 3], 1.0f32), (format!("{p}{m}{b}"), vec![2, 2], 1.0f32)];
            list.extend(alpha.map(|v| (format!("{p}{m}.alpha"), vec![], v)));
            (list, want)
        })
        .into();
        for (list, want) in files {
            let list: Vec<(&str, &[usize], f32)> = list.iter().map(|(n, s, v)| (&**n, &**s, *v)).collect();
            let merged = Adapted::new(base(), vec![(source(&list), 1.0)]).unwrap();
            assert_eq!(first(&merged, "blocks.0.self_attn.q.weight"), want, "{list:?}");
            assert_eq!(merged.changed(), ["blocks.0.self_attn.q.weight"]);
        }
    }

    #[test]
    fn several_add_up_with_their_weights() {
        let one = || {
            source(&[
                ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", &[1, 3], 1.0),
                ("diffusion_model.blocks.0.self_attn.q.lora_B.weight", &[2, 1], 1.0),
                ("diffusion_model.blocks.0.self_attn.q.diff_b", &[2], 4.0),
            ])
        };
        let merged = Adapted::new(base(), vec![(one(), 0.5), (one(), 2.0)]).unwrap();
        assert_eq!(first(&merged, "blocks.0.self_attn.q.weight"), 3.5);
        assert_eq!(first(&merged, "blocks.0.self_attn.q.bias"), 11.0);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let q = "blocks.0.self_attn.q";
        for list in [
            vec![(format!("{q}.lora_A.weight"), vec![1, 3])],
            vec![("blocks.9.q.lora_A.weight".into(), vec![1, 3]), ("blocks.9.q.lora_B.weight".into(), vec![2, 1])],
            vec![(format!("{q}.lora_A.weight"), vec![1, 4]), (format!("{q}.lora_B.weight"), vec![2, 1])],
            vec![(format!("{q}.diff"), vec![3, 2])],
        ] {
            let list: Vec<(&str, &[usize], f32)> = list.iter().map(|(n, s)| (n.as_str(), s.as_slice(), 1.0)).collect();
            assert!(Adapted::new(base(), vec![(source(&list), 1.0)]).is_err(), "{list:?}");
        }
    }
}
