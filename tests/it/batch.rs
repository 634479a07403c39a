//! `generate` for many files, as a user runs it: failures that stop nobody, resuming, and the large engine end to end.

use super::files::wav;
use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("loquent-batch-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub(crate) fn speech(&self, name: &str, seconds: f64) {
        let voice = |i: usize| (9000.0 * (i as f64 * 0.05).sin() * (i as f64 * 0.0007).sin()) as i16;
        let samples: Vec<i16> = (0..(seconds * 16_000.0) as usize).map(voice).collect();
        std::fs::write(self.0.join(name), wav(16_000, &samples)).unwrap();
    }

    pub(crate) fn generate(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_loquent"));
        command.arg("generate").args(args).current_dir(&self.0);
        command
    }

    /// A random model in a folder of its name.
    pub(crate) fn synth(&self, model: &str) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_loquent"));
        let made = command.args(["model", "synth", model, model]).current_dir(&self.0).output().unwrap();
        assert!(made.status.success(), "{}", said(&made));
    }

    fn names(&self, of: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.join(of)).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn said(done: &Output) -> String {
    String::from_utf8_lossy(&done.stderr).to_string()
}

/// Width, height and frames of the picture, and that ffprobe finds nothing wrong with the file.
pub(crate) fn probe(path: &Path) -> String {
    let done = Command::new("ffprobe")
        .args(["-v", "error", "-count_frames", "-select_streams", "v", "-of", "csv=p=0"])
        .args(["-show_entries", "stream=width,height,r_frame_rate,nb_read_frames"])
        .arg(path)
        .output()
        .expect("ffprobe");
    assert!(said(&done).is_empty(), "{}", said(&done));
    String::from_utf8_lossy(&done.stdout).trim().to_string()
}

#[test]
fn one_failure_stops_nobody_and_what_is_there_is_kept() {
    let folder = Folder::new("failures");
    for name in ["a.wav", "b.wav"] {
        folder.speech(name, 0.5);
    }
    std::fs::write(folder.0.join("broken.wav"), b"RIFF").unwrap();
    let lines = [
        r#"{"audio": "a.wav", "out": "out/first.mp4", "seed": 3}"#,
        r#"{"audio": "none.wav"}"#,
        r#"{"audio": "broken.wav"}"#,
        "",
        r#"{"audio": "b.wav", "colour": "red"}"#,
        r#"{"audio": "a.wav", "out": "out/first.mp4"}"#,
        r#"{"audio": "b.wav"}"#,
    ];
    std::fs::write(folder.0.join("jobs.jsonl"), lines.join("\n")).unwrap();
    let args = ["--engine", "card", "--manifest", "jobs.jsonl", "--out", "out"];
    let done = folder.generate(&args).output().unwrap();
    let text = said(&done);
    assert_eq!(done.status.code(), Some(1), "{text}");
    for part in [
        "2 made, 0 were there already, 4 failed",
        "line 2: cannot open",
        "line 3",
        "line 5",
        "colour",
        "line 6",
        "already the video of",
    ] {
        assert!(text.contains(part), "`{part}` is missing in: {text}");
    }
    assert_eq!(folder.names("out"), ["b.mp4", "first.mp4"]);
    let before = std::fs::read(folder.0.join("out/b.mp4")).unwrap();
    // Again: nothing is made twice, a spoilt file is made anew.
    std::fs::write(folder.0.join("out/first.mp4"), &before[..before.len() / 2]).unwrap();
    let text = said(&folder.generate(&args).output().unwrap());
    assert!(text.contains("1 made, 1 were there already, 4 failed"), "{text}");
    assert!(std::fs::read(folder.0.join("out/b.mp4")).unwrap() == before);
    assert_eq!(probe(&folder.0.join("out/first.mp4")), "256,256,25/1,13");
}

#[cfg(unix)]
#[test]
fn a_killed_batch_goes_on_where_it_stopped() {
    let folder = Folder::new("killed");
    folder.speech("a.wav", 0.5);
    folder.speech("b.wav", 120.0);
    folder.speech("c.wav", 0.5);
    let args = ["--engine", "card", "--audio", "a.wav", "b.wav", "c.wav", "--out", "out"];
    let mut run = folder.generate(&args).stderr(Stdio::null()).spawn().unwrap();
    let under_way = |names: Vec<String>| names.iter().any(|n| n.starts_with(".b.mp4"));
    for _ in 0..3000 {
        if folder.0.join("out").exists() && under_way(folder.names("out")) {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    // SIGKILL: nothing can be tidied up.
    run.kill().unwrap();
    run.wait().unwrap();
    let names = folder.names("out");
    assert!(
        names.contains(&"a.mp4".to_string()) && under_way(names.clone()) && !names.contains(&"b.mp4".into()),
        "{names:?}"
    );
    folder.speech("b.wav", 1.0);
    let done = folder.generate(&args).output().unwrap();
    assert!(done.status.success() && said(&done).contains("2 made, 1 were there already, 0 failed"), "{}", said(&done));
    assert_eq!(folder.names("out"), ["a.mp4", "b.mp4", "c.mp4"], "leftovers are gone too");
}

#[test]
fn the_large_engine_makes_files_from_a_folder() {
    let folder = Folder::new("large");
    folder.speech("in.wav", 1.2);
    folder.synth("tiny");
    let looked = Command::new(env!("CARGO_BIN_EXE_loquent"))
        .args(["model", "inspect", "tiny"])
        .current_dir(&folder.0)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&looked.stdout).to_string();
    assert!(told.contains("every part is there") && told.contains("tokenizer"), "{told}");
    let large = [
        "--engine",
        "s2v",
        "--checkpoint",
        "tiny",
        "--presenter",
        "ada",
        "--date",
        "2026-01-31T12:00:00Z",
        "--audio",
        "in.wav",
    ];
    let run = |more: &[&str], out: &str| {
        let done = folder.generate(&large).args(more).args(["--out", out]).output().unwrap();
        assert!(done.status.success(), "{}", said(&done));
        std::fs::read(folder.0.join(out)).unwrap()
    };
    let block = ["--mode", "block", "--size", "64x64", "--seed", "4"];
    let first = run(&block, "a.mp4");
    assert!(first == run(&block, "b.mp4"), "same seed, same bytes");
    assert_eq!(probe(&folder.0.join("a.mp4")), "64,64,25/1,30");
    let clip = [
        "--mode",
        "clip",
        "--size",
        "4096",
        "--clip-frames",
        "16",
        "--max-clips",
        "1",
        "--steps",
        "1",
        "--guidance",
        "1",
    ];
    run(&clip, "c.mp4");
    // A picture of 384×384 in an area of 4096 pixels; the first clip without its first three frames.
    assert_eq!(probe(&folder.0.join("c.mp4")), "64,64,16/1,13");
    let refused =
        folder.generate(&large).args(["--mode", "block", "--guidance", "3", "--out", "d.mp4"]).output().unwrap();
    assert!(said(&refused).contains("guidance") && refused.status.code() == Some(1), "{}", said(&refused));
    let pocket =
        folder.generate(&["--audio", "in.wav", "--prompt", "x", "--shift", "3", "--out", "d.mp4"]).output().unwrap();
    assert!(said(&pocket).contains("the pocket engine has no --prompt, --shift"), "{}", said(&pocket));
}
