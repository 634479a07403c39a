//! Where numbers come from.
//!
//! A [`Source`] knows names, shapes and values of one checkpoint; each file format (safetensors here, others beside it)
//! and each transformation (LoRA merge, renaming) is one implementation. A [`Weights`] is a cursor into a source: it
//! carries the prefix, the device and the element type, and keeps a ledger. Constructors ask it for tensors with the
//! shape they need and go on when one is absent; [`Weights::finish`] then says everything that was wrong at once.

mod adapter;
mod archive;
mod folder;
mod gguf;
pub mod layout;
mod open;
mod pickle;
mod safetensors;
mod shapes;
pub mod synth;
mod tensors;
mod torch;

pub use adapter::Adapted;
pub use folder::Survey;
pub use gguf::Gguf;
pub use open::{Checkpoint, Format, format_of, open};
pub use safetensors::Safetensors;
pub use shapes::Shapes;
pub use tensors::Tensors;
pub use torch::Torch;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use candle_core::{DType, Device, Tensor};

use crate::model::{
    Error, Result,
    kernels::Isa,
    nn::{Linear, Matrix, Numbers, Side},
};

/// One checkpoint, read lazily.
pub trait Source: Send + Sync {
    /// All names, sorted, as the model asks for them (row scales of quantised matrices are not names of their own).
    fn names(&self) -> Vec<String>;
    /// Shape, or none if the name is absent.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;
    /// The tensor in the stored element type (quantised rows come back as f32), on the CPU.
    fn load(&self, name: &str) -> Result<Tensor>;
    /// The tensor made on `device` itself, by a source that need not read it from anywhere.
    fn made_on(&self, _name: &str, _device: &Device) -> Result<Option<Tensor>> {
        Ok(None)
    }
    /// What error messages call this checkpoint, usually its path.
    fn origin(&self) -> String;
    /// A matrix as it is stored, where that is a quantised form that is kept so in memory; on the CPU.
    fn quantised(&self, _name: &str) -> Result<Option<Stored>> {
        Ok(None)
    }
    /// Rows as stored int8 with one f32 scale each, when `name` is stored so and a kernel can use it as it is.
    fn int8_rows(&self, _name: &str) -> Option<Int8Rows> {
        None
    }
}

/// Numbers in a tensor of this shape. None where they cannot be counted, or where the strides of a tensor that is empty
/// cannot: they are products of its other axes.
fn elements(shape: &[usize]) -> Option<usize> {
    let full = shape.iter().try_fold(1usize, |n, &axis| n.checked_mul(axis.max(1)))?;
    Some(if shape.contains(&0) { 0 } else { full })
}

/// A quantised matrix and the adapters that go beside it.
pub struct Stored {
    /// The numbers.
    pub numbers: Numbers,
    /// Additions that are not merged.
    pub side: Vec<Side>,
}

/// A matrix whose row `o` is `values[o, ..] * scales[o]`.
pub struct Int8Rows {
    /// `[out, in]`, row-major.
    pub values: Vec<i8>,
    /// `[out]`.
    pub scales: Vec<f32>,
    /// Rows.
    pub out: usize,
    /// Columns.
    pub width: usize,
}

#[derive(Default)]
struct Ledger {
    used: BTreeSet<String>,
    asked: BTreeMap<String, Vec<usize>>,
    missing: BTreeSet<String>,
    misshapen: BTreeSet<String>,
}

/// What a constructor found; see [`Weights::finish`].
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Report {
    /// Tensors that were taken.
    pub used: usize,
    /// Names below the prefix that nobody asked for.
    pub unexpected: Vec<String>,
}

/// A cursor into a checkpoint. Cheap to clone; clones share the ledger.
#[derive(Clone)]
pub struct Weights {
    source: Arc<dyn Source>,
    ledger: Arc<Mutex<Ledger>>,
    prefix: String,
    device: Device,
    dtype: DType,
    isa: Isa,
    watch: Option<Watch>,
    fp8: Fp8,
}

/// What computes in e4m3 where the card can (Hopper and later); elsewhere this changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fp8 {
    /// Nothing.
    #[default]
    Off,
    /// Matrix products: a scale per row of the activations and per row of the weights. Behind a norm one unit that holds for
    /// every input does for all activations, and one for the matrix where the result is e4m3, too.
    Linears,
    /// Attention and its keys and values as well.
    All,
}

/// Told the number of parameters of every tensor that was loaded.
pub type Watch = Arc<dyn Fn(usize) + Send + Sync>;

impl Weights {
    /// Starts at the root of `source`; tensors go to `device` as `dtype`.
    pub fn new(source: Arc<dyn Source>, device: &Device, dtype: DType) -> Self {
        Self {
            source,
            ledger: Arc::default(),
            prefix: String::new(),
            device: device.clone(),
            dtype,
            isa: Isa::best(),
            watch: None,
            fp8: Fp8::Off,
        }
    }

    /// The same place with somebody who is told what was loaded.
    pub fn watched(self, watch: Watch) -> Self {
        Self { watch: Some(watch), ..self }
    }

    /// Tells whoever watches that `parameters` more are loaded.
    pub fn saw(&self, parameters: usize) {
        if let Some(watch) = &self.watch {
            watch(parameters);
        }
    }

    /// Goes down one name (dots allowed).
    pub fn pp(&self, name: impl AsRef<str>) -> Self {
        let mut next = self.clone();
        next.prefix = self.full(name.as_ref());
        next
    }

    /// The same place with another element type: norms and modulation stay f32 where matrices are bf16.
    pub fn with_dtype(&self, dtype: DType) -> Self {
        Self { dtype, ..self.clone() }
    }

    /// The same place; matrices compute with these instructions where they run on the CPU.
    pub fn with_isa(&self, isa: Isa) -> Self {
        Self { isa, ..self.clone() }
    }

    /// The same place with matrices and attention in e4m3 as `fp8` says. A matrix is quantised on the card as soon as it
    /// is read, so neither the host nor the card holds more than one in full.
    pub fn with_fp8(&self, fp8: Fp8) -> Self {
        Self { fp8, ..self.clone() }
    }

    /// What computes in e4m3.
    pub fn fp8(&self) -> Fp8 {
        self.fp8
    }

    /// The same place with tensors kept on `device`, from where they travel for each use.
    pub fn kept_on(&self, device: &Device) -> Self {
        Self { device: device.clone(), ..self.clone() }
    }

    /// Where tensors go.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Element type of loaded tensors.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Full name of `name` below this place.
    pub fn full(&self, name: &str) -> String {
        match (self.prefix.is_empty(), name.is_empty()) {
            (true, _) => name.to_string(),
            (_, true) => self.prefix.clone(),
            _ => format!("{}.{name}", self.prefix),
        }
    }

    /// Whether the checkpoint has `name`.
    pub fn has(&self, name: &str) -> bool {
        self.source.shape(&self.full(name)).is_some()
    }

    /// Shape as stored, to derive sizes that no configuration names.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.source.shape(&self.full(name))
    }

    /// Notes in the ledger that `full` is wanted in this shape; whether it is there in this shape.
    fn note(&self, full: &str, shape: &[usize]) -> bool {
        let found = self.source.shape(full);
        let mut ledger = self.ledger.lock().unwrap_or_else(|e| e.into_inner());
        ledger.used.insert(full.to_string());
        ledger.asked.insert(full.to_string(), shape.to_vec());
        match found.as_deref() {
            Some(s) if s == shape => return true,
            Some(s) => ledger.misshapen.insert(format!("{full} is {s:?}, expected {shape:?}")),
            None => ledger.missing.insert(full.to_string()),
        };
        false
    }

    /// The tensor, on the device, as this place's element type. Absent or misshapen: noted in the ledger, and zeros
    /// (which take no memory) stand in, so that one load reports all problems.
    pub fn get(&self, shape: impl Into<candle_core::Shape>, name: &str) -> Result<Tensor> {
        let shape = shape.into();
        let full = self.full(name);
        if !self.note(&full, shape.dims()) {
            return Ok(Tensor::zeros((), self.dtype, &self.device)?.broadcast_as(shape)?);
        }
        let t = match self.source.made_on(&full, &self.device)? {
            Some(made) => made,
            None => self.source.load(&full)?,
        };
        // Convert on the CPU only when that makes the transfer smaller, or where candle's cards cannot (e4m3).
        let wide = t.dtype().size_in_bytes() > self.dtype.size_in_bytes() || t.dtype() == DType::F8E4M3;
        let t = if wide { t.to_dtype(self.dtype)? } else { t };
        let t = t.to_device(&self.device)?.to_dtype(self.dtype)?;
        self.saw(t.elem_count());
        Ok(t)
    }

    /// `name.weight` `[out, in]` and, if `bias`, `name.bias` `[out]`. What is stored quantised stays so.
    pub fn linear(&self, name: &str, width: usize, out: usize, bias: bool) -> Result<Linear> {
        let at = self.pp(name);
        let full = at.full("weight");
        let stored =
            if at.shape("weight").as_deref() == Some(&[out, width]) { self.source.quantised(&full)? } else { None };
        let matrix = match stored {
            Some(stored) => {
                self.note(&full, &[out, width]);
                self.saw(out * width);
                Matrix::new(stored.numbers, stored.side, self.dtype)?.moved(&self.device, self.dtype)?
            }
            None => Matrix::plain(at.get((out, width), "weight")?)?,
        };
        let bias = if bias { Some(at.get(out, "bias")?) } else { None };
        let linear = Linear::of(matrix, bias)?.with_isa(self.isa);
        if self.fp8 == Fp8::Off { Ok(linear) } else { linear.scaled() }
    }

    /// Marks everything below this place as known but unused here.
    pub fn ignore(&self, name: &str) {
        let full = self.full(name);
        let mut ledger = self.ledger.lock().unwrap_or_else(|e| e.into_inner());
        for n in self.source.names() {
            if n == full || n.starts_with(&format!("{full}.")) {
                ledger.used.insert(n);
            }
        }
    }

    /// Every name that was asked for, with the shape it was expected in: from an empty source, a network's whole listing.
    pub fn asked(&self) -> BTreeMap<String, Vec<usize>> {
        self.ledger.lock().unwrap_or_else(|e| e.into_inner()).asked.clone()
    }

    /// Ends a load. Fails, naming them, if tensors were missing or misshapen; otherwise tells what was left over below
    /// this place.
    pub fn finish(&self) -> Result<Report> {
        let ledger = self.ledger.lock().unwrap_or_else(|e| e.into_inner());
        let unexpected: Vec<String> = self
            .source
            .names()
            .into_iter()
            .filter(|n| self.prefix.is_empty() || n.starts_with(&format!("{}.", self.prefix)))
            .filter(|n| !ledger.used.contains(n))
            .collect();
        if ledger.missing.is_empty() && ledger.misshapen.is_empty() {
            return Ok(Report { used: ledger.used.len(), unexpected });
        }
        let mut text = format!("the weights in {} do not fit this model", self.source.origin());
        for (what, list) in [("missing", &ledger.missing), ("wrong shape", &ledger.misshapen)] {
            if !list.is_empty() {
                let few: Vec<&str> = list.iter().take(8).map(String::as_str).collect();
                let more = if list.len() > few.len() {
                    format!(" and {} more", list.len() - few.len())
                } else {
                    String::new()
                };
                text += &format!("; {what}: {}{more}", few.join(", "));
            }
        }
        if !unexpected.is_empty() {
            let few: Vec<&str> = unexpected.iter().take(4).map(String::as_str).collect();
            text += &format!(
                "; the file has {} tensors that were not asked for, such as {}",
                unexpected.len(),
                few.join(", ")
            );
        }
        Err(Error::Weights(text))
    }
}
