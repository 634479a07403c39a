//! Keeps the arrows of `src/lib.rs` and the invariants that a text search can see.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

fn sources() -> Vec<(PathBuf, String)> {
    fn walk(dir: &Path, out: &mut Vec<(PathBuf, String)>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                out.push((path, text));
            }
        }
    }
    let mut out = Vec::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut out);
    out.sort();
    out
}

/// First path component below `src`, without `.rs`.
fn room(path: &Path) -> String {
    let below = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap();
    below.components().next().unwrap().as_os_str().to_string_lossy().trim_end_matches(".rs").to_string()
}

/// Source with `//` comments removed, so that prose may name anything.
fn code(text: &str) -> String {
    text.lines().map(|l| if l.trim_start().starts_with("//") { "" } else { l }).collect::<Vec<_>>().join("\n")
}

/// The table of `src/lib.rs`, read from it: room → rooms it may use.
fn arrows() -> BTreeMap<String, Option<Vec<String>>> {
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let mut map = BTreeMap::new();
    for line in lib.lines().filter(|l| l.starts_with("//! | [`")) {
        let cells: Vec<&str> = line.trim_start_matches("//! |").split('|').map(str::trim).collect();
        let name = cells[0].trim_matches(['[', ']', '`']).to_string();
        let may = match cells[2] {
            "everything" | "their `Config` types" => None,
            s if s.starts_with('(') => Some(vec![]),
            s => Some(s.split(',').map(|r| r.trim().to_string()).collect()),
        };
        map.insert(name, may);
    }
    map
}

#[test]
fn rooms_use_only_rooms_their_arrow_allows() {
    let arrows = arrows();
    assert!(arrows.len() >= 12, "the table of src/lib.rs was not found: {arrows:?}");
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let here = room(&path);
        let Some(Some(allowed)) = arrows.get(&here) else { continue };
        for part in code(&text).split("crate::").skip(1) {
            let used: Vec<String> = if let Some(list) = part.strip_prefix('{') {
                list.split('}')
                    .next()
                    .unwrap()
                    .split(',')
                    .map(|s| s.trim().split("::").next().unwrap().to_string())
                    .collect()
            } else {
                vec![part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()]
            };
            for u in used {
                if arrows.contains_key(&u) && u != here && !allowed.contains(&u) {
                    wrong.push(format!("{}: {here} may not use {u}", path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn libraries_stay_in_their_rooms() {
    let homes: &[(&str, &[&str])] = &[
        ("candle_", &["model", "avatar"]),
        ("webrtc::", &["net"]),
        ("rtc::", &["net"]),
        ("axum::", &["server"]),
        ("async_nats::", &["cluster"]),
        ("livekit_protocol", &["livekit"]),
        ("tokio_tungstenite", &["livekit"]),
        ("opus::", &["codec"]),
        ("openh264::", &["codec"]),
        ("openh264_sys2", &["codec", "build"]),
        ("rubato::", &["codec"]),
        ("anyhow::", &["cli", "main"]),
        ("std::env::", &["cli", "main", "build"]),
    ];
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let here = room(&path);
        for line in code(&text).lines() {
            // A place for a test's files is no setting.
            let line = line.replace("std::env::temp_dir", "");
            for (library, rooms) in homes {
                let Some(at) = line.find(library) else { continue };
                let before = line[..at].chars().next_back();
                if !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':' || c == '"')
                    && !rooms.contains(&here.as_str())
                {
                    wrong.push(format!("{}: `{library}` outside {rooms:?}: {}", path.display(), line.trim()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn model_and_media_know_no_clock_and_nobody_spawns_unnamed_or_unbounded() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let here = room(&path);
        let body = code(&text);
        let body = body.split("#[cfg(test)]").next().unwrap();
        let mut ban = |word: &str, why: &str| {
            if body.contains(word) {
                wrong.push(format!("{}: `{word}`: {why}", path.display()));
            }
        };
        ban("unbounded_channel", "queues are bounded; see edge.rs");
        ban("std::sync::mpsc::channel(", "unbounded; use sync_channel or tokio's");
        ban("thread::spawn(", "name the thread: thread::Builder");
        if ["model", "media"].contains(&here.as_str()) {
            ban("Instant::now", "no clock in this room");
            ban("SystemTime::now", "no clock in this room");
            ban("tokio::", "no tokio in this room");
        }
        if path.ends_with("session/machine.rs") || path.ends_with("session/playout.rs") {
            ban("Instant::now", "time is an argument here");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_file_says_what_it_is() {
    for (path, text) in sources() {
        assert!(text.starts_with("//!"), "{} must open with a //! line", path.display());
        assert!(!text.lines().any(|l| l.ends_with(' ')), "{} has trailing spaces", path.display());
    }
}
