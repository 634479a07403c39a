//! Opens whatever lies at a path: a folder in the Hugging Face layout, a single file of any format. Told apart by the
//! first bytes and the names within, never by the file's name.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
};

use memmap2::Mmap;

use super::{
    Gguf, Safetensors, Source, Torch,
    layout::{Layout, Official, Part},
};
use crate::model::{Error, Result};

/// How the numbers are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Safetensors,
    Torch,
    Gguf,
}

impl Format {
    /// What it is, in words.
    pub fn name(self) -> &'static str {
        match self {
            Format::Safetensors => "safetensors",
            Format::Torch => "torch archive (pickle, read as data)",
            Format::Gguf => "GGUF",
        }
    }
}

/// An opened checkpoint under official names.
pub struct Checkpoint {
    pub source: Arc<dyn Source>,
    pub format: Format,
    pub part: Part,
    pub layout: Layout,
    pub files: Vec<PathBuf>,
    /// Bytes of all files.
    pub bytes: u64,
}

impl Checkpoint {
    /// Adds to a complaint about the weights where the right file is published.
    pub fn explain(&self, error: Error, wanted: Part) -> Error {
        match error {
            Error::Weights(text) => {
                let held = match self.part {
                    p if p == wanted => String::new(),
                    p => format!(" (this file holds: {})", p.name()),
                };
                Error::Weights(format!("{text}{held}; the {} is published at {}", wanted.name(), wanted.published()))
            }
            other => other,
        }
    }
}

fn wrong(path: &Path, why: impl std::fmt::Display) -> Error {
    Error::Weights(format!("{}: {why}", path.display()))
}

/// Opens a file or folder.
pub fn open(path: &Path) -> Result<Checkpoint> {
    open_files(if path.is_dir() { files_of(path)? } else { vec![path.to_path_buf()] })
}

/// Opens one file, or all shards of one network.
pub(super) fn open_files(files: Vec<PathBuf>) -> Result<Checkpoint> {
    let mut bytes = 0;
    for file in &files {
        bytes += fs::metadata(file).map_err(|e| wrong(file, format!("cannot be read: {e}")))?.len();
    }
    let (inner, format): (Arc<dyn Source>, Format) = match files.as_slice() {
        [file] => {
            let map = map(file)?;
            let origin = file.display().to_string();
            match format_of(&map) {
                Some(Format::Torch) => (Arc::new(Torch::open(map, &origin)?), Format::Torch),
                Some(Format::Gguf) => (Arc::new(Gguf::open(map, &origin)?), Format::Gguf),
                Some(Format::Safetensors) => (Arc::new(Safetensors::open(&files)?), Format::Safetensors),
                None => return Err(wrong(file, unknown(&map))),
            }
        }
        _ => (Arc::new(Safetensors::open(&files)?), Format::Safetensors),
    };
    let (source, part, layout) = Official::new(inner)?;
    Ok(Checkpoint { source: Arc::new(source), format, part, layout, files, bytes })
}

fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(|e| wrong(path, format!("cannot be opened: {e}")))?;
    // SAFETY: the map is read-only; a file that another program truncates meanwhile would fault, which is the usual
    // contract of mapped weights: checkpoints are replaced by renaming, not edited in place.
    unsafe { Mmap::map(&file) }.map_err(|e| wrong(path, format!("cannot be mapped: {e}")))
}

/// By the first bytes.
pub fn format_of(bytes: &[u8]) -> Option<Format> {
    if bytes.starts_with(b"PK\x03\x04") {
        return Some(Format::Torch);
    }
    if bytes.starts_with(b"GGUF") {
        return Some(Format::Gguf);
    }
    let header = bytes.get(..8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes)?;
    let fits = header >= 2 && header <= bytes.len().saturating_sub(8) as u64;
    (fits && bytes[8] == b'{').then_some(Format::Safetensors)
}

fn unknown(bytes: &[u8]) -> &'static str {
    if bytes.starts_with(b"version https://git-lfs") {
        "this is a Git LFS pointer, not the file itself; fetch it with `git lfs pull` or download it again"
    } else if bytes.starts_with(&[0x80]) {
        "this is a bare pickle from a torch before 1.6; convert it to safetensors"
    } else if bytes.first() == Some(&b'<') {
        "this is a web page, not a model; the download went wrong"
    } else {
        "this is neither safetensors, a torch archive nor GGUF, or it is cut off at the beginning"
    }
}

/// The weight files of a folder: those of its index, or the only one there is.
fn files_of(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(|e| wrong(folder, format!("cannot be listed: {e}")))? {
        let entry = entry.map_err(|e| wrong(folder, format!("cannot be listed: {e}")))?;
        names.push(entry.path());
    }
    names.sort();
    let ending = |end: &str| -> Vec<&PathBuf> {
        names.iter().filter(|p| p.to_string_lossy().ends_with(end) && p.is_file()).collect()
    };
    if let [index] = ending(".safetensors.index.json")[..] {
        return shards(folder, index);
    }
    for end in [".safetensors", ".gguf", ".pth", ".bin", ".pt"] {
        match ending(end)[..] {
            [] => {}
            [one] => return Ok(vec![one.clone()]),
            ref many => {
                let list: Vec<_> = many.iter().filter_map(|p| p.file_name()?.to_str()).take(8).collect();
                return Err(wrong(
                    folder,
                    format!("holds several weight files and no index; name one: {}", list.join(", ")),
                ));
            }
        }
    }
    Err(wrong(folder, "holds no weights (.safetensors, .gguf, .pth, .bin)"))
}

/// An index lists which shard holds which tensor; it is small.
const INDEX_LIMIT: u64 = 64 << 20;

pub(super) fn shards(folder: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let size = fs::metadata(index).map_err(|e| wrong(index, e))?.len();
    if size > INDEX_LIMIT {
        return Err(wrong(index, format!("has {size} bytes; no index is that large")));
    }
    let text = fs::read_to_string(index).map_err(|e| wrong(index, format!("cannot be read: {e}")))?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|e| wrong(index, format!("is no JSON: {e}")))?;
    let map = json["weight_map"].as_object().ok_or_else(|| wrong(index, "has no weight_map"))?;
    let names: BTreeSet<&str> = map.values().filter_map(|v| v.as_str()).collect();
    let outside = |n: &&&str| n.contains(['/', '\\']) || n.starts_with('.');
    if let Some(name) = names.iter().find(outside) {
        return Err(wrong(index, format!("names a shard outside its folder: {name}")));
    }
    let paths: Vec<PathBuf> = names.iter().map(|n| folder.join(n)).collect();
    let missing: Vec<_> = paths.iter().filter(|p| !p.is_file()).map(|p| p.display().to_string()).collect();
    match (paths.is_empty(), missing.is_empty()) {
        (true, _) => Err(wrong(index, "names no shards")),
        (_, false) => Err(wrong(index, format!("these shards are missing; download them: {}", missing.join(", ")))),
        _ => Ok(paths),
    }
}
