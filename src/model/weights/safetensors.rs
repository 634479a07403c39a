//! Safetensors by memory map or from bytes in the binary; any number of shards; int8 rows.
//!
//! A matrix may be stored as `X.weight` (I8) with `X.weight_scale` (f32, one per row of the first axis): it is then
//! handed out as f32, or as it is through [`Source::int8_rows`].

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    path::Path,
};

use ::safetensors::{Dtype, SafeTensors};
use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;

use super::{Int8Rows, Source, Stored, elements};
use crate::model::{Error, Result, nn::Numbers};

enum Bytes {
    Map(Mmap),
    Static(&'static [u8]),
    Owned(Vec<u8>),
}

impl Bytes {
    fn get(&self) -> &[u8] {
        match self {
            Bytes::Map(m) => m,
            Bytes::Static(s) => s,
            Bytes::Owned(v) => v,
        }
    }
}

struct Entry {
    shard: usize,
    start: usize,
    end: usize,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// One or several safetensors files.
pub struct Safetensors {
    shards: Vec<Bytes>,
    entries: BTreeMap<String, Entry>,
    metadata: HashMap<String, String>,
    origin: String,
}

impl Safetensors {
    /// Maps the files; a name that occurs twice is an error.
    pub fn open<P: AsRef<Path>>(paths: &[P]) -> Result<Self> {
        let origin = paths.iter().map(|p| p.as_ref().display().to_string()).collect::<Vec<_>>().join(", ");
        let mut shards = Vec::new();
        for path in paths {
            let path = path.as_ref();
            let file = File::open(path).map_err(|e| Error::Weights(format!("cannot open {}: {e}", path.display())))?;
            // SAFETY: the map is read-only; a file that another program truncates meanwhile would fault, which is the
            // usual contract of mapped weights: checkpoints are replaced by renaming, not edited in place.
            let map = unsafe { Mmap::map(&file) };
            shards.push(Bytes::Map(map.map_err(|e| Error::Weights(format!("cannot map {}: {e}", path.display())))?));
        }
        Self::build(shards, origin)
    }

    /// Weights that are part of the binary.
    pub fn from_static(bytes: &'static [u8], origin: &str) -> Result<Self> {
        Self::build(vec![Bytes::Static(bytes)], origin.to_string())
    }

    /// Several shards read by the caller.
    pub fn from_vecs(shards: Vec<Vec<u8>>, origin: &str) -> Result<Self> {
        Self::build(shards.into_iter().map(Bytes::Owned).collect(), origin.to_string())
    }

    /// Weights read by the caller.
    pub fn from_vec(bytes: Vec<u8>, origin: &str) -> Result<Self> {
        Self::build(vec![Bytes::Owned(bytes)], origin.to_string())
    }

    fn build(shards: Vec<Bytes>, origin: String) -> Result<Self> {
        let mut entries = BTreeMap::new();
        let mut metadata = HashMap::new();
        for (shard, bytes) in shards.iter().enumerate() {
            let bytes = bytes.get();
            let (header, meta) = SafeTensors::read_metadata(bytes)
                .map_err(|e| Error::Weights(format!("{origin}: not a safetensors file: {e}")))?;
            let base = header + 8;
            if let Some(m) = meta.metadata() {
                metadata.extend(m.clone());
            }
            for (name, info) in meta.tensors() {
                let (start, end) = (base + info.data_offsets.0, base + info.data_offsets.1);
                if end > bytes.len() || start > end || elements(&info.shape).is_none() {
                    return Err(Error::Weights(format!("{origin}: {name} lies outside the file; it is truncated")));
                }
                let entry = Entry { shard, start, end, dtype: info.dtype, shape: info.shape.clone() };
                if entries.insert(name.clone(), entry).is_some() {
                    return Err(Error::Weights(format!("{origin}: {name} occurs in two files")));
                }
            }
        }
        Ok(Self { shards, entries, metadata, origin })
    }

    /// The free text of the header; of several files the last one wins.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    fn data(&self, e: &Entry) -> &[u8] {
        &self.shards[e.shard].get()[e.start..e.end]
    }

    fn scale_name(&self, name: &str) -> Option<String> {
        let e = self.entries.get(name)?;
        let scale = format!("{name}_scale");
        (e.dtype == Dtype::I8 && self.entries.contains_key(&scale)).then_some(scale)
    }

    fn scales(&self, name: &str, rows: usize) -> Result<Vec<f32>> {
        let e = self.entries.get(name).ok_or_else(|| Error::Weights(format!("{}: no tensor {name}", self.origin)))?;
        let t = raw(self.data(e), e, name, &self.origin)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        if t.len() != rows {
            return Err(Error::Weights(format!("{}: {name} has {} scales for {rows} rows", self.origin, t.len())));
        }
        Ok(t)
    }
}

fn raw(data: &[u8], e: &Entry, name: &str, origin: &str) -> Result<Tensor> {
    let dtype = match e.dtype {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::F64 => DType::F64,
        Dtype::I64 => DType::I64,
        Dtype::I32 => DType::I32,
        Dtype::I16 => DType::I16,
        Dtype::U32 => DType::U32,
        Dtype::U8 | Dtype::BOOL => DType::U8,
        Dtype::F8_E4M3 => DType::F8E4M3,
        // the upper byte of an f16
        Dtype::F8_E5M2 => {
            let v: Vec<half::f16> = data.iter().map(|b| half::f16::from_bits(u16::from(*b) << 8)).collect();
            return Ok(Tensor::from_vec(v, e.shape.clone(), &Device::Cpu)?);
        }
        Dtype::I8 => {
            let v: Vec<f32> = data.iter().map(|b| *b as i8 as f32).collect();
            return Ok(Tensor::from_vec(v, e.shape.clone(), &Device::Cpu)?);
        }
        other => return Err(Error::Weights(format!("{origin}: {name} has element type {other:?}, which is not read"))),
    };
    Ok(Tensor::from_raw_buffer(data, dtype, &e.shape, &Device::Cpu)?)
}

impl Source for Safetensors {
    fn names(&self) -> Vec<String> {
        let scale = |n: &str| n.strip_suffix("_scale").is_some_and(|base| self.scale_name(base).is_some());
        self.entries.keys().filter(|n| !scale(n)).cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.entries.get(name).map(|e| e.shape.clone())
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        let e = self.entries.get(name).ok_or_else(|| Error::Weights(format!("{}: no tensor {name}", self.origin)))?;
        let Some(scale) = self.scale_name(name) else { return raw(self.data(e), e, name, &self.origin) };
        let rows = e.shape.first().copied().unwrap_or(1).max(1);
        let scales = self.scales(&scale, rows)?;
        let width = self.data(e).len() / rows;
        let mut out = Vec::with_capacity(rows * width);
        for (row, s) in self.data(e).chunks_exact(width.max(1)).zip(&scales) {
            out.extend(row.iter().map(|b| *b as i8 as f32 * s));
        }
        Ok(Tensor::from_vec(out, e.shape.clone(), &Device::Cpu)?)
    }

    fn origin(&self) -> String {
        self.origin.clone()
    }

    fn quantised(&self, name: &str) -> Result<Option<Stored>> {
        match self.entries.get(name) {
            Some(e) if e.dtype == Dtype::F8_E4M3 && e.shape.len() == 2 => {
                let values = raw(self.data(e), e, name, &self.origin)?;
                let scale = Tensor::ones(1, DType::F32, &Device::Cpu)?;
                Ok(Some(Stored { numbers: Numbers::Float8 { values, scale }, side: Vec::new() }))
            }
            _ => Ok(None),
        }
    }

    fn int8_rows(&self, name: &str) -> Option<Int8Rows> {
        let scale = self.scale_name(name)?;
        let e = self.entries.get(name)?;
        let out = *e.shape.first()?;
        let scales = self.scales(&scale, out).ok()?;
        let values: Vec<i8> = self.data(e).iter().map(|b| *b as i8).collect();
        Some(Int8Rows { width: values.len() / out.max(1), values, scales, out })
    }
}
