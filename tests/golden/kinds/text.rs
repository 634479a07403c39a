//! The UMT5 encoder.

use candle_core::Tensor;
use loquent::model::{
    umt5::{self, Umt5},
    vae::quiet,
};

use super::common::{Got, Outcome, compare, list};
use crate::data::{Check, Golden};

/// `umt5`.
pub fn umt5_encoder_check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    compare(golden, check, umt5_encoder(golden))
}

fn umt5_encoder(g: &Golden) -> Outcome {
    let w = g.weights("t5")?;
    let config = umt5::Config {
        vocab_size: g.count("vocab_size")?,
        dim: g.count("dim")?,
        dim_attn: g.count("dim_attn")?,
        dim_ffn: g.count("dim_ffn")?,
        num_heads: g.count("num_heads")?,
        layers: g.count("layers")?,
        num_buckets: g.count("num_buckets")?,
    };
    assert_eq!(umt5::Config::from_weights(&w), config, "sizes read off the file");
    let net = Umt5::load(&w, &config)?;
    let report = w.finish()?;
    assert!(report.unexpected.is_empty(), "{:?}", report.unexpected);
    let span = g.count("bucket_span")? as i64;
    let mut got = Got::new();
    let buckets = list((-span..=span).map(|r| umt5::relative_bucket(r, config.num_buckets)))?;
    got.insert("relative_buckets".into(), buckets.unsqueeze(0)?);
    let (ids, masks) = (g.input("ids")?.to_vec2::<i64>()?, g.input("mask")?.to_vec2::<i64>()?);
    let mut mids: std::collections::BTreeMap<String, Vec<Tensor>> = Default::default();
    let mut rows = Vec::new();
    for (i, (ids, mask)) in ids.iter().zip(&masks).enumerate() {
        let ids: Vec<u32> = ids.iter().map(|&v| v as u32).collect();
        let mask: Vec<bool> = mask.iter().map(|&m| m != 0).collect();
        let out =
            net.encode(&ids, &mask, &mut |name, t| mids.entry(format!("mid.{name}")).or_default().push(t.clone()))?;
        // what a caller does: only the real tokens, and nothing to cut
        let real = mask.iter().filter(|&&m| m).count();
        got.insert(format!("trimmed.{i}"), net.encode(&ids[..real], &vec![true; real], &mut quiet)?);
        rows.push(out);
    }
    got.insert("embeddings".into(), Tensor::stack(&rows, 0)?);
    for (name, values) in mids {
        let value = if name.ends_with("pos_embedding") { values[0].clone() } else { Tensor::stack(&values, 0)? };
        got.insert(name, value);
    }
    Ok(got)
}
