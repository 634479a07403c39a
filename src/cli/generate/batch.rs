//! Many files: one failure never stops the rest, what is there already is left as it is, and a summary ends it.
//!
//! A video gets its name when it is complete, so a batch that was interrupted or killed goes on where it stopped.

use super::{Args, Common, Interruption, Task, Wanted, render, tell};
use crate::{
    avatar::{AvatarError, Generator},
    cli::engines,
};
use anyhow::{Context, anyhow, bail};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader, Read, Seek, SeekFrom},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

/// One of several speakers of a line.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Speaker {
    audio: PathBuf,
    mask: Option<PathBuf>,
}

/// A line of the manifest.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    audio: Option<PathBuf>,
    #[serde(default)]
    speakers: Vec<Speaker>,
    out: Option<PathBuf>,
    image: Option<PathBuf>,
    presenter: Option<String>,
    prompt: Option<String>,
    negative_prompt: Option<String>,
    pose: Option<PathBuf>,
    seed: Option<u64>,
    steps: Option<usize>,
}

/// Longest line and most lines of a manifest.
const LONGEST_LINE: u64 = 1 << 20;
const MOST_LINES: usize = 1_000_000;

/// A task, or why a line is none; with what it is called in messages.
struct Entry {
    name: String,
    task: anyhow::Result<Task>,
}

pub(super) fn run(args: &Args, common: &Common, wanted: &Wanted) -> anyhow::Result<()> {
    if args.trace.is_some() || args.raw_frames.is_some() {
        bail!("--trace and --raw-frames are for one video, not for several");
    }
    let entries = entries(args, wanted.silent)?;
    let interruption = Interruption::watch()?;
    let prompts: Vec<String> = entries
        .iter()
        .filter_map(|e| e.task.as_ref().ok())
        .filter(|t| args.force || !complete(&t.out))
        .flat_map(|t| [t.options.prompt.clone(), t.options.negative_prompt.clone()])
        .flatten()
        .collect();
    let mut generator: Option<Box<dyn Generator>> = None;
    let (mut made, mut kept) = (0, 0);
    let mut failed: Vec<String> = Vec::new();
    let count = entries.len();
    for (i, Entry { name, task }) in entries.into_iter().enumerate() {
        if interruption.asked() {
            bail!("interrupted after {made} of {count} videos; the same command goes on from here");
        }
        let outcome = task.and_then(|task| {
            if !args.force && complete(&task.out) {
                return Ok(None);
            }
            forget_leftovers(&task.out);
            task.check()?;
            let mut engine = match generator.take() {
                Some(engine) => engine,
                None => engines::load(wanted, &prompts)?,
            };
            let done = catch_unwind(AssertUnwindSafe(|| render(&task, common, engine.as_mut(), &interruption)))
                .unwrap_or_else(|_| Err(anyhow!("the engine panicked; this is a bug")));
            // An engine whose device failed is built anew for the next file.
            let usable = match &done {
                Ok(_) => true,
                Err(e) => e.downcast_ref::<AvatarError>().is_some_and(|e| !matches!(e, AvatarError::Device { .. })),
            };
            if usable {
                generator = Some(engine);
            }
            done.map(|m| Some((task, m)))
        });
        match outcome {
            Ok(Some((task, m))) => {
                made += 1;
                if !args.quiet {
                    eprint!("[{}/{count}] ", i + 1);
                }
                tell(args, &task, &m);
            }
            Ok(None) => kept += 1,
            Err(_) if interruption.asked() => {}
            Err(e) => {
                eprintln!("[{}/{count}] {name}: {e:#}", i + 1);
                // A model that cannot be loaded will not be for the next file either.
                if e.downcast_ref::<AvatarError>().is_some_and(|e| matches!(e, AvatarError::Weights(_))) {
                    return Err(e.context("the batch ends: the model cannot be loaded"));
                }
                failed.push(name);
            }
        }
    }
    if interruption.asked() {
        bail!("interrupted after {made} of {count} videos; the same command goes on from here");
    }
    if !args.quiet || !failed.is_empty() {
        eprintln!("{made} made, {kept} were there already, {} failed", failed.len());
    }
    match failed.as_slice() {
        [] => Ok(()),
        some => bail!("{} of {count} videos failed: {}", some.len(), some.join(", ")),
    }
}

/// The list of what is to be made; with a `silent` model lines need no voice. A line that is wrong becomes an entry that fails.
fn entries(args: &Args, silent: bool) -> anyhow::Result<Vec<Entry>> {
    let folder = args.out.clone();
    if let Some(folder) = &folder {
        std::fs::create_dir_all(folder).with_context(|| format!("the folder {} cannot be made", folder.display()))?;
    }
    let named = |audio: &Path, folder: &Path| {
        let stem = audio.file_stem().map_or_else(|| "video".into(), |s| s.to_string_lossy().into_owned());
        folder.join(format!("{stem}.mp4"))
    };
    let mut list = Vec::new();
    let mut targets: BTreeMap<PathBuf, String> = BTreeMap::new();
    let mut add = |name: String, task: anyhow::Result<Task>| {
        let task = task.and_then(|task| match targets.get(&task.out) {
            Some(other) => Err(anyhow!("{} is already the video of {other}; give it another name", task.out.display())),
            None => {
                targets.insert(task.out.clone(), name.clone());
                Ok(task)
            }
        });
        list.push(Entry { name, task });
    };
    let Some(manifest) = &args.manifest else {
        if !args.speaker.is_empty() {
            bail!("--speaker is for one video: name its file with --out; several videos with speakers take a manifest");
        }
        let Some(folder) = &folder else { bail!("name the folder for the videos with --out") };
        for audio in &args.audio {
            add(audio.display().to_string(), Ok(args.task(Some(audio.clone()), named(audio, folder))));
        }
        return Ok(list);
    };
    let file = File::open(manifest).with_context(|| format!("cannot open {}", manifest.display()))?;
    let beside = manifest.parent().unwrap_or(Path::new("")).to_path_buf();
    let mut reader = BufReader::new(file);
    for number in 1.. {
        let mut text = String::new();
        let read = reader.by_ref().take(LONGEST_LINE).read_line(&mut text);
        if read.with_context(|| format!("{}, line {number} cannot be read", manifest.display()))? == 0 {
            break;
        }
        if text.trim().is_empty() {
            continue;
        }
        if number > MOST_LINES || text.len() as u64 == LONGEST_LINE {
            bail!("{}, line {number}: too long for a manifest", manifest.display());
        }
        let task = serde_json::from_str::<Line>(&text).map_err(anyhow::Error::from).and_then(|line| {
            let voice = line.audio.as_ref().or(line.speakers.first().map(|s| &s.audio));
            let out = match (&line.out, &folder, voice) {
                (Some(out), ..) => beside.join(out),
                (None, Some(folder), Some(voice)) => named(voice, folder),
                (None, Some(folder), None) => folder.join(format!("{number}.mp4")),
                (None, None, _) => bail!("neither the line nor --out says where the video goes"),
            };
            if line.audio.is_some() && !line.speakers.is_empty() {
                bail!("the line has audio and speakers; give one of them");
            }
            if voice.is_none() && !silent {
                bail!("the line has no audio");
            }
            let mut task = args.task(line.audio.map(|audio| beside.join(audio)), out);
            let joined = |s: Speaker| (beside.join(s.audio), s.mask.map(|m| beside.join(m)));
            task.cast(line.speakers.into_iter().map(joined).collect())?;
            if line.image.is_some() || line.presenter.is_some() {
                (task.image, task.presenter) = (line.image.map(|i| beside.join(i)), line.presenter);
            }
            task.options.seed = line.seed.unwrap_or(task.options.seed);
            task.options.steps = line.steps.or(task.options.steps);
            task.options.pose = line.pose.map(|p| beside.join(p)).or(task.options.pose);
            task.options.prompt = line.prompt;
            task.options.negative_prompt = line.negative_prompt;
            Ok(task)
        });
        add(format!("{} line {number}", manifest.display()), task);
    }
    if list.is_empty() {
        bail!("{} has no lines", manifest.display());
    }
    Ok(list)
}

/// Whether a whole MP4 file stands there: its boxes follow each other to its very end, an index among them.
fn complete(path: &Path) -> bool {
    let look = || -> std::io::Result<bool> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let (mut at, mut index) = (0, false);
        while at < length {
            let mut head = [0; 16];
            file.seek(SeekFrom::Start(at))?;
            file.read_exact(&mut head[..8])?;
            let word = |b: &[u8]| b.iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
            let size = match word(&head[..4]) {
                1 => {
                    file.read_exact(&mut head[8..])?;
                    word(&head[8..])
                }
                0 => length - at,
                n => n,
            };
            if size < 8 {
                return Ok(false);
            }
            index |= &head[4..8] == b"moov";
            at = at.saturating_add(size);
        }
        Ok(index && at == length)
    };
    look().unwrap_or(false)
}

/// Removes what a killed run left beside a target: hidden parts whose process is gone.
fn forget_leftovers(out: &Path) {
    let Some(name) = out.file_name().map(|n| format!(".{}.", n.to_string_lossy())) else { return };
    let folder = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let file = entry.file_name().to_string_lossy().into_owned();
        let process =
            file.strip_prefix(&name).and_then(|r| r.strip_suffix(".part")).and_then(|p| p.parse::<u32>().ok());
        if let Some(process) = process
            && Path::new("/proc/self").exists()
            && !Path::new(&format!("/proc/{process}")).exists()
        {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_file_is_not_complete() {
        let folder = std::env::temp_dir().join(format!("loquent-batch-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("a.mp4");
        let boxes =
            [&[0, 0, 0, 12][..], b"ftypisom", &[0, 0, 0, 8], b"moov", &[0, 0, 0, 10], b"mdat", &[1, 2]].concat();
        for n in 0..=boxes.len() {
            std::fs::write(&path, &boxes[..n]).unwrap();
            // Cut between boxes it looks whole from its index on; the writer never leaves such a file under its name.
            assert_eq!(complete(&path), n == 20 || n == boxes.len(), "{n} bytes");
        }
        assert!(!complete(&folder) && !complete(&folder.join("none")));
        std::fs::remove_dir_all(folder).unwrap();
    }
}
