//! What lies in a folder of checkpoints: which networks, in which files, and what is absent. Files are told apart by
//! their content, so that the official folder, a Diffusers folder and a ComfyUI `models` folder are all read the same
//! way.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use super::{Checkpoint, layout::Part, open::open_files};
use crate::model::{Error, Result};

/// Folders within folders deeper than this are not looked into.
const DEEPEST: usize = 4;
/// No tokenizer is larger.
const TOKENIZER_LIMIT: u64 = 256 << 20;
const ENDINGS: &[&str] = &[".safetensors", ".gguf", ".pth", ".pt", ".bin"];

/// Networks that were found, in the order in which paths were given and names sort.
#[derive(Default)]
pub struct Survey {
    pub found: Vec<Checkpoint>,
    /// The text of the prompt tokenizer's `tokenizer.json`.
    pub tokenizer: Option<(PathBuf, Vec<u8>)>,
    /// Weight files that could not be opened, each with the reason.
    pub broken: Vec<String>,
}

impl Survey {
    /// Looks into folders and files. A path that does not exist is an error; everything else is told in the survey.
    pub fn of(paths: &[PathBuf]) -> Result<Self> {
        let mut survey = Survey::default();
        for path in paths {
            if !path.exists() {
                return Err(Error::Weights(format!("there is nothing at {}", path.display())));
            }
            match path.is_dir() {
                true => survey.folder(path, 0)?,
                false => survey.file(path),
            }
        }
        Ok(survey)
    }

    fn folder(&mut self, folder: &Path, depth: usize) -> Result<()> {
        let wrong = |e: std::io::Error| Error::Weights(format!("{} cannot be listed: {e}", folder.display()));
        let mut paths = Vec::new();
        for entry in fs::read_dir(folder).map_err(wrong)? {
            paths.push(entry.map_err(wrong)?.path());
        }
        paths.retain(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| !n.starts_with('.')));
        paths.sort();
        let mut shards = BTreeSet::new();
        for index in paths.iter().filter(|p| name(p).ends_with(".safetensors.index.json")) {
            match super::open::shards(folder, index) {
                Ok(files) => {
                    shards.extend(files.iter().cloned());
                    self.take(open_files(files));
                }
                Err(e) => self.broken.push(e.to_string()),
            }
        }
        for path in &paths {
            if path.is_dir() {
                if depth < DEEPEST {
                    self.folder(path, depth + 1)?;
                }
            } else if !shards.contains(path) {
                self.file(path);
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path) {
        if name(path) == "tokenizer.json" {
            self.tokenizer(path);
        } else if ENDINGS.iter().any(|e| name(path).ends_with(e)) {
            self.take(open_files(vec![path.to_path_buf()]));
        }
    }

    /// The prompt tokenizer is a unigram model; the one of an audio encoder is not.
    fn tokenizer(&mut self, path: &Path) {
        if self.tokenizer.is_some() || fs::metadata(path).is_ok_and(|m| m.len() > TOKENIZER_LIMIT) {
            return;
        }
        let Ok(text) = fs::read(path) else {
            self.broken.push(format!("{} cannot be read", path.display()));
            return;
        };
        #[derive(serde::Deserialize)]
        struct Model {
            #[serde(rename = "type")]
            kind: Option<String>,
        }
        #[derive(serde::Deserialize)]
        struct File {
            model: Option<Model>,
        }
        match serde_json::from_slice::<File>(&text) {
            Ok(File { model: Some(Model { kind: Some(kind) }) }) if kind != "Unigram" => {}
            Ok(_) => self.tokenizer = Some((path.to_path_buf(), text)),
            Err(e) => self.broken.push(format!("{} is no tokenizer: {e}", path.display())),
        }
    }

    fn take(&mut self, opened: Result<Checkpoint>) {
        match opened {
            Ok(c) => self.found.push(c),
            Err(e) => self.broken.push(e.to_string()),
        }
    }

    /// The file that holds a part. Of the same part in several files of one folder, safetensors count before others;
    /// else the first.
    pub fn part(&self, part: Part) -> Option<&Checkpoint> {
        let first = self.found.iter().find(|c| c.part == part)?;
        let folder = |c: &Checkpoint| c.files.first().and_then(|f| f.parent()).map(Path::to_path_buf);
        let safe =
            |c: &&Checkpoint| c.part == part && c.format == super::Format::Safetensors && folder(c) == folder(first);
        Some(self.found.iter().find(safe).unwrap_or(first))
    }

    /// One message that lists what of `wanted` is absent and where it is published; none when all is there.
    pub fn lack(&self, wanted: &[Part], tokenizer: bool) -> Option<String> {
        let mut lines: Vec<String> = Vec::new();
        for &part in wanted.iter().filter(|p| self.part(**p).is_none()) {
            lines.push(format!("no {}: it is published at {}", part.name(), part.published()));
        }
        if tokenizer && self.tokenizer.is_none() {
            lines.push(
                "no tokenizer of the text encoder: it is published at huggingface.co/Wan-AI/Wan2.2-S2V-14B, \
                 google/umt5-xxl/tokenizer.json"
                    .into(),
            );
        }
        if lines.is_empty() {
            return None;
        }
        let there: Vec<String> = self
            .found
            .iter()
            .map(|c| format!("{} ({})", c.part.name(), c.files.first().map_or("", |f| name(f))))
            .collect();
        if !there.is_empty() {
            lines.push(format!("found: {}", there.join(", ")));
        }
        lines.extend(self.broken.iter().map(|b| format!("not readable: {b}")));
        Some(lines.join("\n  "))
    }
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|n| n.to_str()).unwrap_or_default()
}

impl Checkpoint {
    /// A JSON file beside the weights, if there is one that can be read.
    pub fn beside(&self, file: &str) -> Option<serde_json::Value> {
        let path = self.files.first()?.parent()?.join(file);
        if fs::metadata(&path).ok()?.len() > 16 << 20 {
            return None;
        }
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }
}
