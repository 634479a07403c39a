//! Reading goldens and comparing with their tolerances.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use candle_core::{DType, Device, Tensor};
use loquent::model::weights::{Safetensors, Source, Weights};
use serde_json::Value;

/// Where goldens are read from.
pub fn folder() -> PathBuf {
    match std::env::var_os("LOQUENT_GOLDENS") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data"),
    }
}

/// Where the networks run: `LOQUENT_GOLDENS_DEVICE`, `cpu` (also without the variable) or `cuda`; within [`on_own_device`],
/// what that opened.
pub fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    OWN.with_borrow(Clone::clone).unwrap_or_else(|| DEVICE.get_or_init(open).clone())
}

thread_local! {
    static OWN: RefCell<Option<Device>> = const { RefCell::new(None) };
}

fn open() -> Device {
    match std::env::var("LOQUENT_GOLDENS_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => Device::Cpu,
        Ok("cuda") => loquent::model::kernels::card(0).unwrap_or_else(|e| panic!("no CUDA device: {e}")),
        Ok(other) => panic!("LOQUENT_GOLDENS_DEVICE is {other}; cpu or cuda are expected"),
    }
}

/// Makes something on a device that nobody else works on: on a card, a stream of its own.
pub fn on_own_device<T>(make: impl FnOnce() -> T) -> T {
    OWN.set(Some(open()));
    let made = make();
    OWN.set(None);
    made
}

/// Element type of the transformers' and the text encoder's matrices: `LOQUENT_GOLDENS_DTYPE`, `f32` or `bf16`. Audio
/// encoder and video autoencoder stay f32, as in the official S2V program.
pub fn precision() -> DType {
    match std::env::var("LOQUENT_GOLDENS_DTYPE").as_deref() {
        Err(_) | Ok("f32") => DType::F32,
        Ok("bf16") => DType::BF16,
        Ok(other) => panic!("LOQUENT_GOLDENS_DTYPE is {other}; f32 or bf16 are expected"),
    }
}

/// Largest ‖got − want‖ / ‖want‖ of any output in bf16, by kind: one pass of a network, then whole pipelines, whose steps
/// feed on each other. f32 has the tolerances of the goldens.
fn bf16_limit(kind: &str) -> f64 {
    match kind {
        "s2v_e2e" | "la_e2e" | "la_tpp" | "la_stream" => 0.1,
        _ => 0.03,
    }
}

/// Whether the folder is the project's own subset.
pub fn own_subset() -> bool {
    std::env::var_os("LOQUENT_GOLDENS").is_none()
}

/// Prints even when the harness captures output, so that skipped kinds are seen.
pub fn say(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "golden: {line}");
}

/// (name, kind) of every golden in the folder, sorted. A JSON file without `kind` is not a golden.
pub fn index() -> Vec<(String, String)> {
    let dir = folder();
    let list = fs::read_dir(&dir).unwrap_or_else(|e| panic!("cannot list {}: {e}", dir.display()));
    let mut out = Vec::new();
    for path in list.filter_map(|e| Some(e.ok()?.path())).filter(|p| p.extension().is_some_and(|e| e == "json")) {
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("cannot read {}: {e}", path.display()));
        let json: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        if let Some(kind) = json["kind"].as_str() {
            out.push((path.file_stem().unwrap().to_string_lossy().into_owned(), kind.to_string()));
        }
    }
    out.sort();
    out
}

/// One golden: configuration, weights by slot, inputs, expected outputs.
pub struct Golden {
    /// File stem.
    pub name: String,
    /// `config` of the JSON.
    pub config: Value,
    json: Value,
    tensors: Safetensors,
}

impl Golden {
    /// Reads `name.json` and the files it lists.
    pub fn read(name: &str) -> Result<Self, String> {
        let path = folder().join(format!("{name}.json"));
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let json: Value = serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
        let tensors = Safetensors::open(&files(&json["files"])?).map_err(|e| e.to_string())?;
        Ok(Self { name: name.to_string(), config: json["config"].clone(), json, tensors })
    }

    /// Input `in.<name>` as stored (f32, integers i64).
    pub fn input(&self, name: &str) -> Result<Tensor, String> {
        self.tensors.load(&format!("in.{name}")).and_then(|t| Ok(t.to_device(&device())?)).map_err(|e| e.to_string())
    }

    /// Whether the golden has this input.
    pub fn has_input(&self, name: &str) -> bool {
        self.tensors.shape(&format!("in.{name}")).is_some()
    }

    /// Expected `out.<name>`, for constants that a golden gives as outputs.
    pub fn output(&self, name: &str) -> Result<Tensor, String> {
        self.tensors.load(&format!("out.{name}")).map_err(|e| e.to_string())
    }

    /// Names of all outputs, without `out.`.
    pub fn outputs(&self) -> Vec<String> {
        self.tensors.names().into_iter().filter_map(|n| n.strip_prefix("out.").map(String::from)).collect()
    }

    /// The checkpoint of a slot on the device, as [`precision`] says.
    pub fn weights(&self, slot: &str) -> Result<Weights, String> {
        let dtype = if matches!(slot, "dit" | "wan" | "t5") { precision() } else { DType::F32 };
        Ok(Weights::new(self.source(slot)?, &device(), dtype))
    }

    /// The checkpoint of a slot.
    pub fn source(&self, slot: &str) -> Result<Arc<Safetensors>, String> {
        Ok(Arc::new(Safetensors::open(&files(&self.json["weights"][slot])?).map_err(|e| e.to_string())?))
    }

    /// A number of the configuration, by dotted path.
    pub fn number(&self, path: &str) -> Result<f64, String> {
        self.value(path)?.as_f64().ok_or_else(|| format!("config.{path} is not a number"))
    }

    /// A count of the configuration, by dotted path.
    pub fn count(&self, path: &str) -> Result<usize, String> {
        self.value(path)?.as_u64().map(|v| v as usize).ok_or_else(|| format!("config.{path} is not a count"))
    }

    /// Anything of the configuration, by dotted path.
    pub fn value(&self, path: &str) -> Result<&Value, String> {
        let mut v = &self.config;
        for part in path.split('.') {
            v = match part.parse::<usize>() {
                Ok(i) if v.is_array() => &v[i],
                _ => &v[part],
            };
        }
        if v.is_null() { Err(format!("config.{path} is absent")) } else { Ok(v) }
    }
}

fn files(list: &Value) -> Result<Vec<PathBuf>, String> {
    let list = list.as_array().ok_or("the golden names no files")?;
    list.iter().map(|f| f.as_str().map(|f| folder().join(f)).ok_or_else(|| "file name is not text".into())).collect()
}

/// Collects comparisons of one golden.
pub struct Check<'a> {
    golden: &'a Golden,
    seen: RefCell<BTreeSet<String>>,
    worst: RefCell<BTreeMap<String, f64>>,
    failures: RefCell<Vec<String>>,
}

impl<'a> Check<'a> {
    /// Nothing compared yet.
    pub fn new(golden: &'a Golden) -> Self {
        Self { golden, seen: RefCell::default(), worst: RefCell::default(), failures: RefCell::default() }
    }

    /// Whether the golden expects this output.
    pub fn wants(&self, name: &str) -> bool {
        self.golden.tensors.shape(&format!("out.{name}")).is_some()
    }

    /// Compares `got` with `out.<name>`; a name that this set leaves out is passed over. Element count and, up to axes
    /// of size one, shape must agree.
    pub fn same(&self, name: &str, got: &Tensor) -> Result<(), String> {
        if !self.wants(name) {
            return Ok(());
        }
        self.compare(name, got, &self.golden.output(name)?)
    }

    fn compare(&self, name: &str, got: &Tensor, want: &Tensor) -> Result<(), String> {
        self.seen.borrow_mut().insert(name.to_string());
        let bare = |t: &Tensor| t.dims().iter().copied().filter(|d| *d != 1).collect::<Vec<_>>();
        if bare(got) != bare(want) {
            self.failures.borrow_mut().push(format!("{name}: shape {:?}, expected {:?}", got.dims(), want.dims()));
            return Ok(());
        }
        let entry = &self.golden.json["tensors"][format!("out.{name}")];
        let number = |key: &str| entry[key].as_f64().ok_or(format!("out.{name} has no {key}"));
        // Integer tensors of some goldens carry no largest value; then it is taken from the tensor.
        let (got, want) = (flat(got)?, flat(want)?);
        let largest = number("max_abs").unwrap_or_else(|_| want.iter().fold(0.0, |m, v| v.abs().max(m)));
        let limit = number("atol")? + number("rtol")? * largest;
        if precision() != DType::F32 {
            let square = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
            let away: Vec<f64> = got.iter().zip(&want).map(|(g, w)| g - w).collect();
            let distance = square(&away) / square(&want).max(f64::MIN_POSITIVE);
            let limit = bf16_limit(self.golden.json["kind"].as_str().unwrap_or(""));
            // NaN must not pass by comparing false.
            if !(distance <= limit || square(&away) == 0.0) {
                let text = format!("{name}: relative distance {distance:.3e}, allowed {limit:.3e}");
                self.failures.borrow_mut().push(text);
            }
            self.worst.borrow_mut().insert(name.to_string(), distance / limit);
            return Ok(());
        }
        let mut worst = 0.0f64;
        for (g, w) in got.iter().zip(&want) {
            let d = if g == w { 0.0 } else { (g - w).abs() };
            // NaN must not win by comparing false.
            worst = if d.is_nan() { f64::INFINITY } else { worst.max(d) };
        }
        if worst > limit {
            let text = format!("{name}: differs by {worst:.3e}, allowed {limit:.3e} (largest value {largest:.3e})");
            self.failures.borrow_mut().push(text);
        }
        self.worst.borrow_mut().insert(name.to_string(), worst / limit.max(f64::MIN_POSITIVE));
        Ok(())
    }

    /// Compares the first rows only: for sequences that the official program pads with meaningless rows.
    pub fn same_rows(&self, name: &str, got: &Tensor) -> Result<(), String> {
        let want = self.golden.output(name)?;
        let rows = got.dim(0).map_err(|e| e.to_string())?;
        let axis = want.rank() - got.rank();
        let want = want.narrow(axis, 0, rows).map_err(|e| e.to_string())?;
        self.compare(name, got, &want)
    }

    /// One line about the golden, or why it failed. A golden of which nothing was compared fails.
    pub fn finish(self) -> Result<String, String> {
        let failures = self.failures.into_inner();
        if !failures.is_empty() {
            return Err(failures.join("; "));
        }
        let seen = self.seen.into_inner();
        if seen.is_empty() {
            return Err("nothing was compared".into());
        }
        let left: Vec<String> = self.golden.outputs().into_iter().filter(|n| !seen.contains(n)).collect();
        let worst = self.worst.into_inner();
        let (at, ratio) =
            worst.iter().max_by(|a, b| a.1.total_cmp(b.1)).map(|(n, r)| (n.as_str(), *r)).unwrap_or(("-", 0.0));
        let left = if left.is_empty() { String::new() } else { format!("; not compared: {}", left.join(", ")) };
        Ok(format!(
            "{}: {} outputs agree, worst {:.0} % of its tolerance ({at}){left}",
            self.golden.name,
            seen.len(),
            ratio * 100.0
        ))
    }
}

fn flat(t: &Tensor) -> Result<Vec<f64>, String> {
    let read = || t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    read().map_err(|e| e.to_string())
}
