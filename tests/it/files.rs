//! Speech files, portraits and MP4: every format, aligned from the first sample, and a sentence for every fault.
//!
//! `data/tone.*` hold one second: 0.4 s of silence, then a 1 kHz tone that begins at exactly 0.400 s, written by
//! ffmpeg from one WAV. Encoder priming that is not removed shows as a late onset.

use loquent::{
    codec::audio_file::{AudioFileError, Limits, Source, SpeechFile, read_speech, scan},
    media::MediaTime,
};
use std::{
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

fn data(name: &str) -> Source {
    Source::from(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/data").join(name).as_path())
}

/// A WAV file of 16-bit mono samples.
pub(crate) fn wav(rate: u32, samples: &[i16]) -> Vec<u8> {
    let size = samples.len() as u32 * 2;
    let mut out = Vec::with_capacity(44 + samples.len() * 2);
    out.extend(b"RIFF");
    out.extend((36 + size).to_le_bytes());
    out.extend(b"WAVEfmt \x10\0\0\0\x01\0\x01\0");
    out.extend(rate.to_le_bytes());
    out.extend((rate * 2).to_le_bytes());
    out.extend(b"\x02\0\x10\0data");
    out.extend(size.to_le_bytes());
    samples.iter().for_each(|s| out.extend(s.to_le_bytes()));
    out
}

/// The tone of the fixtures at any rate.
fn tone(rate: u32, seconds: f64) -> Vec<i16> {
    (0..(f64::from(rate) * seconds) as usize)
        .map(|i| {
            let t = i as f64 / f64::from(rate) - 0.4;
            if t < 0.0 { 0 } else { (16_000.0 * (std::f64::consts::TAU * 1000.0 * t).sin()) as i16 }
        })
        .collect()
}

/// Milliseconds at which a tone of amplitude 0.49 reaches a fifth of it.
fn onset_ms(samples: &[f32], rate: u32) -> f64 {
    let first = samples.iter().position(|s| s.abs() > 0.1).expect("the tone is there");
    first as f64 * 1000.0 / f64::from(rate)
}

fn both(source: &Source) -> (Vec<f32>, Vec<f32>) {
    let mut file = SpeechFile::open(source).unwrap();
    let (mut speech, mut voice) = (Vec::new(), Vec::new());
    while let Some(part) = file.read().unwrap() {
        assert_eq!(part.speech.at, MediaTime::from_units(speech.len() as i64, 16_000));
        assert_eq!(part.voice.at, MediaTime::from_units(voice.len() as i64, 48_000));
        speech.extend(part.speech.samples);
        voice.extend(part.voice.samples);
    }
    (speech, voice)
}

#[test]
fn every_format_begins_where_the_recording_began() {
    let mut sources: Vec<(String, Source, f64)> = [
        ("tone.flac", 0.0),
        ("tone.mp3", 1.0),
        ("tone.m4a", 1.0),
        ("tone.ogg", 1.0),
        ("tone.opus", 1.0),
        ("tone-opus.mp4", 1.0),
    ]
    .map(|(name, slack)| (name.to_string(), data(name), slack))
    .into();
    for rate in [8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000] {
        sources.push((format!("wav {rate}"), Source::from(wav(rate, &tone(rate, 1.0))), 0.0));
    }
    for (name, source, slack) in sources {
        let summary = scan(&source, &Limits::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let length = summary.length.as_millis_f64();
        assert!((length - 1000.0).abs() <= slack, "{name}: {length} ms");
        assert!(summary.warnings.is_empty(), "{name}: {:?}", summary.warnings);
        assert!((0.4..0.6).contains(&summary.peak), "{name}: peak {}", summary.peak);
        let (speech, voice) = both(&source);
        assert_eq!(speech.len() as i64, (length * 16.0).round() as i64, "{name}");
        assert_eq!(voice.len() as i64, (length * 48.0).round() as i64, "{name}");
        // The sine needs 0.03 ms to a fifth of its peak; codecs smear a little, filters ring a little.
        for (samples, rate) in [(&speech, 16_000), (&voice, 48_000)] {
            let at = onset_ms(samples, rate);
            assert!((at - 400.0).abs() < 2.0, "{name} at {rate} Hz: onset at {at} ms");
        }
    }
}

#[test]
fn resampling_keeps_the_tone() {
    let (speech, voice) = both(&Source::from(wav(44_100, &tone(44_100, 1.0))));
    for (samples, rate) in [(speech, 16_000.0), (voice, 48_000.0)] {
        // Correlate the steady part with the ideal tone: phase and level both count.
        let range = (rate * 0.5) as usize..(rate * 0.9) as usize;
        let (mut dot, mut own, mut ideal) = (0.0, 0.0, 0.0);
        for i in range {
            let want = (std::f64::consts::TAU * 1000.0 * (i as f64 / rate - 0.4)).sin() * 16_000.0 / 32_768.0;
            let got = f64::from(samples[i]);
            (dot, own, ideal) = (dot + want * got, own + got * got, ideal + want * want);
        }
        assert!(dot / (own * ideal).sqrt() > 0.9999, "r = {}", dot / (own * ideal).sqrt());
        assert!((own / ideal).sqrt() > 0.99 && (own / ideal).sqrt() < 1.01);
    }
}

#[test]
fn faults_are_sentences() {
    let folder = std::env::temp_dir().join(format!("loquent-files-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        std::fs::write(&path, bytes).unwrap();
        Source::from(path.as_path())
    };
    let said = |source: &Source| scan(source, &Limits::default()).unwrap_err().to_string();
    assert!(said(&Source::from(folder.join("none.wav").as_path())).contains("cannot open"));
    assert!(said(&Source::from(folder.as_path())).contains("folder"));
    assert!(said(&file("empty.wav", b"")).contains("empty"));
    assert!(said(&file("text.wav", &b"just some text ".repeat(100))).contains("not a sound file"));
    assert!(said(&file("picture.mp3", &[0x89, b'P', b'N', b'G', 13, 10, 26, 10].repeat(50))).contains("sound file"));
    assert!(said(&file("short.wav", &wav(16_000, &[5; 100]))).contains("only 6 ms"));
    // A good header over noise.
    let mp3 = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/data/tone.mp3")).unwrap();
    let mut noise = mp3.clone();
    let mut x = 1u32;
    noise.iter_mut().skip(200).for_each(|b| {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *b = (x >> 24) as u8;
    });
    let text = said(&file("noise.mp3", &noise));
    assert!(text.contains("damaged") || text.contains("not a sound file") || text.contains("only"), "{text}");
    // Too long is told by the limit.
    let limits = Limits { longest: Duration::from_millis(500), ..Default::default() };
    let error = scan(&data("tone.mp3"), &limits).unwrap_err();
    assert!(matches!(error, AudioFileError::TooLong { .. }), "{error}");
    assert!(error.to_string().contains("at most 0.50 s"), "{error}");
    // Silence is legal, and told.
    let summary = scan(&Source::from(wav(16_000, &[0; 16_000])), &Limits::default()).unwrap();
    assert!(summary.is_silent() && summary.warnings[0].contains("silent"), "{:?}", summary.warnings);
    // A file cut in the middle gives what is there, and says so.
    let flac = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/data/tone.flac")).unwrap();
    let cut = Source::from(flac[..flac.len() * 3 / 4].to_vec());
    let summary = scan(&cut, &Limits::default()).unwrap();
    assert!(summary.length < MediaTime::from_millis(990));
    assert!(!summary.warnings.is_empty(), "a truncated file must be told");
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn uploads_are_read_like_files() {
    let (pcm, summary) = read_speech(&Source::from(wav(24_000, &tone(24_000, 0.7))), &Limits::default()).unwrap();
    assert_eq!((pcm.rate, pcm.samples.len(), summary.rate), (16_000, 11_200, 24_000));
}

/// A folder of its own for one test, removed at the end.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("loquent-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> =
            std::fs::read_dir(&self.0).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn generate(folder: &Folder) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loquent"));
    command.args(["generate", "--engine", "card"]).current_dir(&folder.0);
    command
}

/// Kind and body of each box at the top of a file.
fn boxes(mut bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut out = Vec::new();
    while bytes.len() >= 8 {
        let short = u32::from_be_bytes(bytes[..4].try_into().unwrap()) as usize;
        let (size, head) =
            if short == 1 { (u64::from_be_bytes(bytes[8..16].try_into().unwrap()) as usize, 16) } else { (short, 8) };
        out.push((String::from_utf8_lossy(&bytes[4..8]).into(), bytes[head..size].to_vec()));
        bytes = &bytes[size..];
    }
    assert!(bytes.is_empty());
    out
}

#[test]
fn generate_writes_a_file_that_is_aligned_from_the_first_frame_and_reproducible() {
    let folder = Folder::new("generate");
    // Not a whole number of frames: 1.013 s.
    std::fs::write(folder.0.join("in.wav"), wav(44_100, &tone(44_100, 1.013))).unwrap();
    for out in ["a", "b"] {
        let args = [
            "--audio",
            "in.wav",
            "--out",
            &format!("{out}.mp4"),
            "--seed",
            "7",
            "--trace",
            &format!("{out}.jsonl"),
            "--raw-frames",
            &format!("{out}.rgb"),
            "--date",
            "2026-01-31T12:00:00Z",
        ]
        .map(String::from);
        let done = generate(&folder).args(args).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
    assert_eq!(folder.names(), ["a.jsonl", "a.mp4", "a.rgb", "b.jsonl", "b.mp4", "b.rgb", "in.wav"]);
    let read = |name: &str| std::fs::read(folder.0.join(name)).unwrap();
    for kind in ["mp4", "rgb", "jsonl"] {
        assert!(read(&format!("a.{kind}")) == read(&format!("b.{kind}")), "{kind} differs between two equal runs");
    }
    let kinds: Vec<String> = boxes(&read("a.mp4")).into_iter().map(|b| b.0).collect();
    assert_eq!(kinds, ["ftyp", "moov", "free", "mdat", "uuid"], "the index stands in front");
    // The marks: XMP in the file, a message in the stream.
    let bytes = read("a.mp4");
    let xmp = String::from_utf8_lossy(&boxes(&bytes)[4].1[16..]).to_string();
    for word in ["trainedAlgorithmicMedia", "2026-01-31T12:00:00Z", "Loquent", "(card)"] {
        assert!(xmp.contains(word), "{word} is not in {xmp}");
    }
    let media = boxes(&bytes)[3].1.clone();
    let sei = media.windows(16).position(|w| w == loquent::codec::marks::SEI_UUID).expect("an SEI message");
    let said = String::from_utf8_lossy(&media[sei + 16..][..160]).to_string();
    assert!(said.starts_with('{') && said.contains(r#""ai_generated":true"#) && said.contains("2026-01-31"), "{said}");
    // The voice: as long as the speech to the sample, and begins where it began.
    let voice = Source::from(folder.0.join("a.mp4").as_path());
    let summary = scan(&voice, &Limits::default()).unwrap();
    assert!((summary.length.as_millis_f64() - 1013.0).abs() < 0.05, "{} ms", summary.length.as_millis_f64());
    let (_, samples) = both(&voice);
    let at = onset_ms(&samples, 48_000);
    assert!((at - 400.0).abs() < 1.0, "the voice begins at {at} ms");
    // The picture: 26 frames, and the level meter of the test card rises in frame 10 (400 to 440 ms).
    let rgb = read("a.rgb");
    let frame = 256 * 256 * 3;
    assert_eq!(rgb.len(), 26 * frame);
    let meter = |i: usize| rgb[i * frame + 3 * (100 * 256 + 26) + 1] > 150;
    assert_eq!((0..26).position(meter), Some(10));
    let trace = String::from_utf8(read("a.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = trace.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!((lines.len(), &lines[10]["frame"], &lines[10]["at_ms"]), (26, &10.into(), &400.0.into()));
}

#[test]
fn generate_says_what_is_wrong_and_leaves_nothing_behind() {
    let folder = Folder::new("generate-faults");
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.0.join(name), bytes).unwrap();
    write("in.wav", &wav(16_000, &tone(16_000, 0.5)));
    write("empty.wav", b"");
    write("noise.png", b"not a picture");
    std::fs::create_dir(folder.0.join("dir")).unwrap();
    for (args, word) in [
        (vec!["--audio", "none.wav", "--out", "o.mp4"], "cannot open"),
        (vec!["--audio", "empty.wav", "--out", "o.mp4"], "empty"),
        (vec!["--audio", "in.wav", "--out", "in.wav"], "overwritten"),
        (vec!["--audio", "in.wav", "--out", "dir"], "folder"),
        (vec!["--audio", "in.wav", "--out", "nowhere/o.mp4"], "cannot write"),
        (vec!["--audio", "in.wav", "--out", "o.mp4", "--image", "noise.png"], "not a picture"),
        (vec!["--audio", "in.wav", "--out", "o.mp4", "--longest", "0"], "at most"),
        (vec!["--audio", "in.wav", "--out", "o.mp4", "--presenter", "nobody"], "nobody"),
    ] {
        let done = generate(&folder).args(&args).output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr).to_string();
        assert_eq!(done.status.code(), Some(1), "{args:?}: {said}");
        assert!(said.contains(word) && !said.contains("panicked"), "{args:?}: {said}");
    }
    assert_eq!(folder.names(), ["dir", "empty.wav", "in.wav", "noise.png"]);
}

#[test]
fn pocket_pictures_have_the_size_that_was_asked_for() {
    let folder = Folder::new("generate-size");
    std::fs::write(folder.0.join("in.wav"), wav(16_000, &tone(16_000, 0.4))).unwrap();
    let run = |size: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_loquent"));
        command.current_dir(&folder.0).args(["generate", "--presenter", "ada", "--audio", "in.wav", "--size", size]);
        command.args(["--out", "o.mp4", "--raw-frames", "f.rgb"]).output().unwrap()
    };
    let done = run("384x384");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(std::fs::metadata(folder.0.join("f.rgb")).unwrap().len(), 10 * 3 * 384 * 384);
    for (size, word) in [("640x384", "square"), ("320x320", "384")] {
        let said = String::from_utf8_lossy(&run(size).stderr).to_string();
        assert!(said.contains(word) && !said.contains("panicked"), "{size}: {said}");
    }
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_leaves_no_broken_file() {
    let folder = Folder::new("generate-stop");
    std::fs::write(folder.0.join("in.wav"), wav(16_000, &tone(16_000, 600.0))).unwrap();
    std::fs::write(folder.0.join("o.mp4"), b"what was there before").unwrap();
    let mut run = generate(&folder)
        .args(["--audio", "in.wav", "--out", "o.mp4", "--trace", "t.jsonl"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Once the temporary file is there, the work has begun.
    let begun = std::time::Instant::now();
    while !folder.names().iter().any(|n| n.ends_with(".part")) {
        assert!(begun.elapsed() < Duration::from_secs(20), "the run never began");
        assert!(run.try_wait().unwrap().is_none(), "the run ended before it could be interrupted");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(150));
    let stopped = Command::new("kill").args(["-INT", &run.id().to_string()]).status().unwrap();
    assert!(stopped.success());
    let done = run.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(!done.status.success() && said.contains("interrupted"), "{said}");
    assert_eq!(folder.names(), ["in.wav", "o.mp4"]);
    assert_eq!(std::fs::read(folder.0.join("o.mp4")).unwrap(), b"what was there before");
}
