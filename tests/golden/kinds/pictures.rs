//! Size search and preparation of the reference picture.

use candle_core::DType;
use loquent::model::picture;

use super::common::{Got, Outcome, cases, compare, int, list};
use crate::data::{Check, Golden};

/// `image_prep`.
pub fn image_prep_check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    compare(golden, check, image_prep(golden))
}

fn image_prep(g: &Golden) -> Outcome {
    let mut got = Got::new();
    for (i, c) in cases(g, "sizes").iter().enumerate() {
        let (h, w) = picture::output_size(int(c, "h"), int(c, "w"), int(c, "area"))?;
        got.insert(format!("size.{i}"), list([h, w])?);
    }
    for (i, c) in cases(g, "images").iter().enumerate() {
        let image = g.input(&format!("image.{i}"))?;
        let (h, w, _) = image.dims3()?;
        let rgb: Vec<u8> = image.to_dtype(DType::U8)?.flatten_all()?.to_vec1()?;
        let size = picture::output_size(h, w, int(c, "area"))?;
        got.insert(format!("pixels.{i}"), picture::prepare(&rgb, (w, h), size)?.squeeze(1)?);
    }
    Ok(got)
}
