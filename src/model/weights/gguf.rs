//! GGUF files as a [`Source`]: the header is read with bounds of our own, blocks are widened by candle when loaded.
//! (Format: docs/gguf.md of ggml; shapes of convolutions with more than four axes are kept under
//! `comfy.gguf.orig_shape.NAME`, as city96/ComfyUI-GGUF writes them.)

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QStorage, QTensor},
};
use memmap2::Mmap;

use super::{Source, Stored, archive::number, elements};
use crate::model::{
    Error, Result,
    nn::{Numbers, quantised},
};

struct Entry {
    kind: GgmlDType,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// One GGUF file, mapped.
pub struct Gguf {
    map: Mmap,
    tensors: BTreeMap<String, Entry>,
    architecture: Option<String>,
    origin: String,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// Arrays within arrays deeper than this are refused.
const DEEPEST: usize = 4;

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(n)?;
        let part = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(part)
    }

    fn uint(&mut self, width: usize) -> Option<usize> {
        number(self.take(width)?, 0, width)?.try_into().ok()
    }

    fn text(&mut self) -> Option<String> {
        let n = self.uint(8)?;
        Some(String::from_utf8_lossy(self.take(n)?).into_owned())
    }

    /// Passes over a value; integers, integer lists and text are handed out.
    fn value(&mut self, kind: usize, depth: usize) -> Option<Kept> {
        let width = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 => return Some(Kept::Text(self.text()?)),
            9 if depth < DEEPEST => {
                let (inner, n) = (self.uint(4)?, self.uint(8)?);
                let mut list = Vec::new();
                for _ in 0..n {
                    match self.value(inner, depth + 1)? {
                        Kept::Int(v) if list.len() < 16 => list.push(v),
                        _ => {}
                    }
                }
                return Some(Kept::List(list));
            }
            _ => return None,
        };
        let v = self.uint(width)?;
        Some(if matches!(kind, 6 | 12) { Kept::Nothing } else { Kept::Int(v) })
    }
}

enum Kept {
    Int(usize),
    List(Vec<usize>),
    Text(String),
    Nothing,
}

fn kind(n: usize) -> Option<GgmlDType> {
    Some(match n {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

/// Bytes of `count` elements, if they fill whole blocks.
fn bytes_of(kind: GgmlDType, count: usize) -> Option<usize> {
    (count % kind.block_size() == 0).then(|| (count / kind.block_size()).checked_mul(kind.type_size())).flatten()
}

impl Gguf {
    /// Reads the header; blocks stay in the file.
    pub(super) fn open(map: Mmap, origin: &str) -> Result<Self> {
        let wrong = |why: &str| Error::Weights(format!("{origin}: {why}"));
        let broken = || wrong("the GGUF header is damaged or the file incomplete");
        let mut r = Reader { bytes: &map, at: 4 };
        let version = r.uint(4).ok_or_else(broken)?;
        if !(2..=3).contains(&version) {
            return Err(wrong(&format!("GGUF version {version} is not read (2 and 3 are)")));
        }
        let (tensors, values) = (r.uint(8).ok_or_else(broken)?, r.uint(8).ok_or_else(broken)?);
        let mut alignment = 32;
        let mut architecture = None;
        let mut shapes = BTreeMap::new();
        for _ in 0..values {
            let key = r.text().ok_or_else(broken)?;
            let kind = r.uint(4).ok_or_else(broken)?;
            match (r.value(kind, 0).ok_or_else(broken)?, key.as_str()) {
                (Kept::Int(n), "general.alignment") if n > 0 && n <= 1 << 20 => alignment = n,
                (Kept::Text(t), "general.architecture") => architecture = Some(t),
                (Kept::List(shape), key) => {
                    if let Some(name) = key.strip_prefix("comfy.gguf.orig_shape.") {
                        shapes.insert(name.to_string(), shape);
                    }
                }
                _ => {}
            }
        }
        let mut found = Vec::new();
        for _ in 0..tensors {
            let name = r.text().ok_or_else(broken)?;
            let axes = r.uint(4).filter(|&n| n <= 8).ok_or_else(broken)?;
            let mut shape = (0..axes).map(|_| r.uint(8)).collect::<Option<Vec<_>>>().ok_or_else(broken)?;
            shape.reverse();
            let number = r.uint(4).ok_or_else(broken)?;
            let offset = r.uint(8).ok_or_else(broken)?;
            let kind = kind(number)
                .ok_or_else(|| wrong(&format!("{name} has quantisation type {number}, which is not read")))?;
            found.push((name, shape, kind, offset));
        }
        let base = r.at.next_multiple_of(alignment);
        let mut out = BTreeMap::new();
        for (name, shape, kind, offset) in found {
            let count = elements(&shape);
            let place = || {
                let count = count?;
                let start = base.checked_add(offset)?;
                let end = start.checked_add(bytes_of(kind, count)?)?;
                (end <= map.len()).then_some((start, end, count))
            };
            let (start, end, count) =
                place().ok_or_else(|| wrong(&format!("{name} lies outside the file; it is truncated or damaged")))?;
            let shape = match shapes.remove(&name) {
                Some(s) if elements(&s) == Some(count) => s,
                _ => shape,
            };
            out.insert(name, Entry { kind, shape, start, end });
        }
        Ok(Gguf { map, tensors: out, architecture, origin: origin.to_string() })
    }

    /// `general.architecture` of the header.
    pub fn architecture(&self) -> Option<&str> {
        self.architecture.as_deref()
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.tensors.get(name).ok_or_else(|| Error::Weights(format!("{}: no tensor {name}", self.origin)))
    }

    /// The tensor's blocks, copied out of the file.
    fn blocks(&self, e: &Entry) -> Result<QTensor> {
        let bytes = &self.map[e.start..e.end];
        // candle reads blocks through typed pointers, which must be aligned; odd files are copied to where they are
        let mut aligned: Vec<u64> = Vec::new();
        let bytes = if bytes.as_ptr().align_offset(8) == 0 {
            bytes
        } else {
            aligned.resize(bytes.len().div_ceil(8), 0);
            for (word, part) in aligned.iter_mut().zip(bytes.chunks(8)) {
                let mut full = [0; 8];
                full[..part.len()].copy_from_slice(part);
                *word = u64::from_ne_bytes(full);
            }
            // SAFETY: `aligned` owns at least `bytes.len()` initialised bytes, and u8 has no alignment.
            unsafe { std::slice::from_raw_parts(aligned.as_ptr().cast::<u8>(), bytes.len()) }
        };
        let storage = QStorage::from_data(Cow::Borrowed(bytes), &Device::Cpu, e.kind)?;
        Ok(QTensor::new(storage, e.shape.clone())?)
    }

    /// How many tensors are stored in which type.
    pub fn kinds(&self) -> BTreeMap<String, usize> {
        let mut out = BTreeMap::new();
        for e in self.tensors.values() {
            *out.entry(format!("{:?}", e.kind)).or_default() += 1;
        }
        out
    }
}

impl Source for Gguf {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|e| e.shape.clone())
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        let e = self.entry(name)?;
        let plain = match e.kind {
            GgmlDType::F32 => Some(candle_core::DType::F32),
            GgmlDType::F16 => Some(candle_core::DType::F16),
            GgmlDType::BF16 => Some(candle_core::DType::BF16),
            _ => None,
        };
        match plain {
            Some(dtype) => Ok(Tensor::from_raw_buffer(&self.map[e.start..e.end], dtype, &e.shape, &Device::Cpu)?),
            None => Ok(self.blocks(e)?.dequantize(&Device::Cpu)?),
        }
    }

    fn quantised(&self, name: &str) -> Result<Option<Stored>> {
        let e = self.entry(name)?;
        if !quantised(e.kind) || e.shape.len() != 2 || e.shape[1] % e.kind.block_size() != 0 {
            return Ok(None);
        }
        Ok(Some(Stored { numbers: Numbers::Blocks(Arc::new(self.blocks(e)?)), side: Vec::new() }))
    }

    fn origin(&self) -> String {
        self.origin.clone()
    }
}
