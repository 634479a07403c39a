//! The base family: T2V, I2V with its extra channels, TI2V with a timestep per token.

use candle_core::Tensor;

use super::{text, transformer};
use crate::data::{Check, Golden};

pub fn check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    let dit = transformer(golden, "", "wan", |_| {})?;
    let mut latent = golden.input("latent")?;
    if golden.has_input("y") {
        latent = Tensor::cat(&[latent, golden.input("y")?], 0).map_err(text)?;
    }
    let words = dit.text(&golden.input("context")?).map_err(text)?;
    let times = golden.input("t")?.flatten_all().and_then(|t| t.to_vec1::<f32>()).map_err(text)?;
    // Rows past the token count are meaningless in the goldens, which pad the sequence: compare the rows that exist.
    let wanted = golden.count("seq_len")?;
    let mut seen = Vec::new();
    let out = {
        let mut sink = |name: &str, x: &Tensor| seen.push((name.to_string(), x.clone()));
        dit.base(&latent, &times, &words, &mut loquent::model::dit::Trace::to(&mut sink)).map_err(text)?
    };
    for (name, x) in seen {
        if check.wants(&name) && x.dim(0).map_err(text)? == wanted {
            check.same(&name, &x)?;
        } else if check.wants(&name) {
            check.same_rows(&name, &x)?;
        }
    }
    check.same("noise_pred", &out)
}
