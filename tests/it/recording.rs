//! Fragmented MP4: plays wherever it was cut off, voice and picture together, marked as computer-made.

use loquent::{
    codec::{
        H264Config, VOICE_FRAME, VideoEncoder, VoiceEncoder,
        fragments::{Disk, FragmentSpec, FragmentWriter},
        marks::{Mark, SEI_UUID},
        mp4::Mp4Error,
        to_i420,
    },
    media::{Frame, MediaTime, Pixels},
};
use std::{
    io::{Cursor, Seek, SeekFrom, Write},
    path::Path,
    process::Command,
};

const SIZE: u32 = 128;

fn spec(pre_skip: u16) -> FragmentSpec {
    let mark = Mark { engine: "card".into(), session: "01234567".into() };
    FragmentSpec { width: SIZE, height: SIZE, pre_skip, mark, when: "2026-01-31T12:00:00Z".into() }
}

/// What is written: the picture turns white, and the tone begins, at `EVENT` of a timeline on which the first picture
/// stands at `FIRST`.
const FIRST: MediaTime = MediaTime::from_millis(1007);
const EVENT: MediaTime = MediaTime::from_millis(2607);

fn picture(at: MediaTime) -> Frame {
    let level = if at >= EVENT { 230 } else { 20 };
    Frame {
        at,
        width: SIZE,
        height: SIZE,
        pixels: Pixels::Rgb(vec![level; 3 * (SIZE * SIZE) as usize].into()),
        matte: None,
    }
}

/// Writes `seconds` of it; `voice_from`: when the voice begins. The bytes, and where fragments ended.
fn record(seconds: i64, voice_from: MediaTime) -> (Vec<u8>, Vec<usize>) {
    let (disk, ends) = record_to(Torn { disk: Cursor::default(), room: usize::MAX }, seconds, voice_from);
    (disk.into_inner(), ends)
}

/// As [`record`], until the disk refuses.
fn record_to(disk: Torn, seconds: i64, voice_from: MediaTime) -> (Cursor<Vec<u8>>, Vec<usize>) {
    let mut opus = VoiceEncoder::new(64_000, 0).unwrap();
    let pre_skip = opus.look_ahead().unwrap() as u16;
    let config = H264Config { width: SIZE, height: SIZE, fps: 25.0, bitrate: 300_000, max_bitrate: 300_000 };
    let mut video = VideoEncoder::new(config).unwrap();
    let mut file = FragmentWriter::new(disk, spec(pre_skip)).unwrap();
    let mut ends = Vec::new();
    let (mut at, mut voice_at) = (FIRST, voice_from);
    let frame = MediaTime::from_units(1, 25);
    while at < FIRST + MediaTime::from_millis(1000 * seconds) {
        while voice_at <= at {
            let tone = |i: i64| {
                let t = voice_at + MediaTime::from_units(i, 48_000);
                let phase = (t - EVENT).as_secs_f64() * 1000.0 * std::f64::consts::TAU;
                if t < EVENT { 0.0 } else { 0.5 * phase.sin() as f32 }
            };
            let samples: Vec<f32> = (0..VOICE_FRAME as i64).map(tone).collect();
            file.audio(voice_at, &opus.encode(&samples).unwrap(), MediaTime::from_millis(20));
            voice_at += MediaTime::from_millis(20);
        }
        let mut unit = video.encode(&to_i420(&picture(at)).unwrap(), at, false).unwrap();
        if unit.keyframe {
            spec(0).mark.insert(&mut unit.data, "2026-01-31T12:00:00Z");
        }
        match file.video(at, &unit.data, unit.keyframe) {
            Ok(true) => ends.push(file.written() as usize),
            Ok(false) => {}
            Err(_) => return (file.into_disk().disk, ends),
        }
        at += frame;
    }
    // A disk that is full by now refuses here.
    let _ = file.finish(frame);
    (file.into_disk().disk, ends)
}

/// A disk that takes so many bytes more, in the order in which they come, and no more.
struct Torn {
    disk: Cursor<Vec<u8>>,
    room: usize,
}

impl Write for Torn {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let taken = bytes.len().min(self.room);
        self.room -= taken;
        if taken == 0 && !bytes.is_empty() {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        self.disk.write(&bytes[..taken])
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Seek for Torn {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.disk.seek(to)
    }
}

impl Disk for Torn {
    fn settle(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn tool(name: &str, args: &[&str], file: &Path) -> Vec<u8> {
    let done = Command::new(name)
        .args(["-v", "error"])
        .args(args.iter().map(|a| if *a == "FILE" { file.to_str().unwrap() } else { a }))
        .output();
    let done = done.unwrap_or_else(|e| panic!("{name}: {e}; apt-get install -y ffmpeg"));
    assert!(done.status.success(), "{name}: {}", String::from_utf8_lossy(&done.stderr));
    done.stdout
}

/// When the picture turns white and when the tone begins, seconds from the beginning of the file, as ffmpeg plays it.
fn events(file: &Path) -> (f64, f64) {
    let grey =
        tool("ffmpeg", &["-i", "FILE", "-vf", "scale=1:1,format=gray", "-r", "500", "-f", "rawvideo", "-"], file);
    let white = grey.iter().position(|g| *g > 128).expect("a white picture") as f64 / 500.0;
    let sound = tool(
        "ffmpeg",
        &["-i", "FILE", "-af", "aresample=async=1:first_pts=0", "-ar", "48000", "-f", "f32le", "-"],
        file,
    );
    let samples: Vec<f32> = sound.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let tone = samples.iter().position(|s| s.abs() > 0.1).expect("a tone") as f64 / 48_000.0;
    (white, tone)
}

#[test]
fn voice_and_picture_stay_together_wherever_the_voice_begins() {
    let folder = std::env::temp_dir().join(format!("loquent-fragments-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("r.mp4");
    // Before the first picture (to be cut), just after it, and much later (silence stands for it).
    for start in [200, 997, 1011, 1990, 2500] {
        let (bytes, ends) = record(4, MediaTime::from_millis(start));
        assert!(ends.len() >= 3, "a fragment a second: {ends:?}");
        std::fs::write(&path, &bytes).unwrap();
        let (white, tone) = events(&path);
        let want = (EVENT - FIRST).as_secs_f64();
        // What is cut off in front moves both alike: ffmpeg begins its clock there.
        assert!((0.0..0.03).contains(&(white - want)), "voice from {start} ms: white at {white} s, want {want}");
        assert!((tone - white).abs() < 0.004, "voice from {start} ms: the tone begins at {tone} s, white at {white} s");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_file_that_was_cut_off_plays_to_its_last_fragment() {
    let folder = std::env::temp_dir().join(format!("loquent-cut-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("r.mp4");
    let (_, ends) = record(4, FIRST);
    for (fragments, room) in
        ends.iter().enumerate().flat_map(|(i, e)| [(i + 1, *e), (i + 1, e + 300), (i + 1, e + 1500)])
    {
        // The power goes at the end of a fragment, in the description of the next, and in its media.
        let (disk, _) = record_to(Torn { disk: Cursor::default(), room }, 4, FIRST);
        std::fs::write(&path, disk.into_inner()).unwrap();
        let count = [
            "-count_packets",
            "-select_streams",
            "v",
            "-show_entries",
            "stream=nb_read_packets",
            "-of",
            "csv=p=0",
            "FILE",
        ];
        let done = Command::new("ffprobe")
            .args(["-v", "quiet"])
            .args(count.map(|a| if a == "FILE" { path.to_str().unwrap() } else { a }))
            .output()
            .unwrap();
        let frames: usize = String::from_utf8_lossy(&done.stdout).trim().trim_end_matches(',').parse().unwrap();
        assert!(
            (24 * fragments..=26 * fragments).contains(&frames),
            "{frames} pictures after {fragments} fragments, {room} bytes"
        );
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn every_keyframe_and_the_file_say_that_it_is_computer_made() {
    let (bytes, _) = record(2, FIRST);
    let at = bytes.windows(16).position(|w| w == SEI_UUID).expect("an SEI message");
    let said = String::from_utf8_lossy(&bytes[at + 16..at + 200]).to_string();
    assert!(said.contains(r#""ai_generated":true"#) && said.contains("01234567"), "{said}");
    assert!(String::from_utf8_lossy(&bytes).contains("trainedAlgorithmicMedia"));
}

#[test]
fn a_full_disk_and_another_size_are_told_apart() {
    let config = |size| H264Config { width: size, height: size, fps: 25.0, bitrate: 300_000, max_bitrate: 300_000 };
    let mut video = VideoEncoder::new(config(SIZE)).unwrap();
    let mut file = FragmentWriter::new(Torn { disk: Cursor::default(), room: 3000 }, spec(312)).unwrap();
    let mut failed = None;
    for i in 0..200 {
        let at = MediaTime::from_units(i, 25);
        let unit = video.encode(&to_i420(&picture(at)).unwrap(), at, false).unwrap();
        if let Err(error) = file.video(at, &unit.data, unit.keyframe) {
            failed = Some(error);
            break;
        }
    }
    assert!(matches!(failed, Some(Mp4Error::Io { .. })), "{failed:?}");

    let mut file = FragmentWriter::new(Cursor::new(Vec::new()), spec(312)).unwrap();
    let unit = |size: u32, at| {
        let frame = Frame {
            width: size,
            height: size,
            pixels: Pixels::Rgb(vec![9; 3 * (size * size) as usize].into()),
            ..picture(at)
        };
        VideoEncoder::new(config(size)).unwrap().encode(&to_i420(&frame).unwrap(), at, true).unwrap().data
    };
    file.video(MediaTime::ZERO, &unit(SIZE, MediaTime::ZERO), true).unwrap();
    let later = MediaTime::from_millis(40);
    assert!(matches!(file.video(later, &unit(64, later), true), Err(Mp4Error::Changed)));
    file.finish(MediaTime::from_millis(40)).unwrap();
    assert!(!file.into_disk().into_inner().is_empty(), "what came before is whole");
}
