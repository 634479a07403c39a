//! `.pth` and `.bin` files of torch as a [`Source`].

use std::{collections::BTreeMap, ops::Range};

use candle_core::{Device, Tensor};
use memmap2::Mmap;

use super::{
    Source, archive, elements,
    pickle::{self, Pickled},
};
use crate::model::{Error, Result};

/// One torch checkpoint, mapped.
pub struct Torch {
    map: Mmap,
    storages: BTreeMap<String, Range<usize>>,
    tensors: BTreeMap<String, Pickled>,
    origin: String,
}

/// Bytes that `t` needs of its storage, counted from the storage's begin; none if that overflows.
fn reach(t: &Pickled) -> Option<usize> {
    if t.shape.len() != t.stride.len() {
        return None;
    }
    let count = elements(&t.shape)?;
    let mut last = t.offset;
    for (&n, &s) in t.shape.iter().zip(&t.stride) {
        last = last.checked_add(n.saturating_sub(1).checked_mul(s)?)?;
    }
    // a stride of zero would give more numbers than there are bytes
    let elements = if count == 0 { 0 } else { last.checked_add(1)?.max(count) };
    elements.checked_mul(t.dtype.size_in_bytes())
}

impl Torch {
    /// Reads the directory and the pickle; numbers stay in the file.
    pub(super) fn open(map: Mmap, origin: &str) -> Result<Self> {
        let wrong = |why: String| Error::Weights(format!("{origin}: {why}"));
        let entries = archive::entries(&map).map_err(wrong)?;
        let pickle = entries.keys().find(|n| n.ends_with("/data.pkl") || *n == "data.pkl").cloned();
        let pickle = pickle.ok_or_else(|| wrong("this archive was not written by torch.save (no data.pkl)".into()))?;
        let root = pickle.trim_end_matches("data.pkl").to_string();
        if let Some(order) = entries.get(&format!("{root}byteorder"))
            && &map[order.clone()] == b"big"
        {
            return Err(wrong("its numbers are big-endian, which is not read".into()));
        }
        let list = pickle::tensors(&map[entries[&pickle].clone()]).map_err(wrong)?;
        let prefix = format!("{root}data/");
        let storages: BTreeMap<String, Range<usize>> =
            entries.into_iter().filter_map(|(n, r)| Some((n.strip_prefix(&prefix)?.to_string(), r))).collect();
        let mut tensors = BTreeMap::new();
        for (name, t) in list {
            let have = storages.get(&*t.storage).map(|r| r.len());
            match (have, reach(&t)) {
                (Some(have), Some(need)) if need <= have => {}
                (None, _) => return Err(wrong(format!("the numbers of {name} are not in the archive"))),
                _ => return Err(wrong(format!("{name} reaches beyond its numbers; the file is damaged"))),
            }
            tensors.insert(name.to_string(), t);
        }
        Ok(Torch { map, storages, tensors, origin: origin.to_string() })
    }
}

impl Source for Torch {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|t| t.shape.clone())
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        let t = self.tensors.get(name).ok_or_else(|| Error::Weights(format!("{}: no tensor {name}", self.origin)))?;
        let bytes = &self.map[self.storages[&*t.storage].clone()];
        let size = t.dtype.size_in_bytes();
        let count: usize = t.shape.iter().product();
        let mut dense = 1;
        let contiguous = t.shape.iter().zip(&t.stride).rev().all(|(&n, &s)| {
            let fits = n <= 1 || s == dense;
            dense *= n;
            fits
        });
        let start = t.offset * size;
        if contiguous {
            return Ok(Tensor::from_raw_buffer(&bytes[start..start + count * size], t.dtype, &t.shape, &Device::Cpu)?);
        }
        let mut out = Vec::with_capacity(count * size);
        let mut index = vec![0usize; t.shape.len()];
        for _ in 0..count {
            let element = t.offset + index.iter().zip(&t.stride).map(|(i, s)| i * s).sum::<usize>();
            out.extend_from_slice(&bytes[element * size..(element + 1) * size]);
            for (i, n) in index.iter_mut().zip(&t.shape).rev() {
                *i += 1;
                if *i < *n {
                    break;
                }
                *i = 0;
            }
        }
        Ok(Tensor::from_raw_buffer(&out, t.dtype, &t.shape, &Device::Cpu)?)
    }

    fn origin(&self) -> String {
        self.origin.clone()
    }
}
