//! The large engine's models through `generate`, told apart by what lies in their folders: the base family, which hears
//! nothing, and several speakers in one picture.

use super::batch::{Folder, probe, said};
use loquent::codec::pose::PoseFile;
use std::process::Command;

/// The frames before encoding.
fn frames(folder: &Folder, args: &[&str]) -> Vec<u8> {
    let all = [args, &["--out", "out.mp4", "--raw-frames", "out.rgb", "--quiet", "--seed", "3"]].concat();
    let done = folder.generate(&all).output().unwrap();
    assert!(done.status.success(), "{args:?}: {}", said(&done));
    std::fs::read(folder.0.join("out.rgb")).unwrap()
}

fn refused(folder: &Folder, args: &[&str], part: &str) {
    let done = folder.generate(&[args, &["--out", "no.mp4"]].concat()).output().unwrap();
    assert!(!done.status.success() && said(&done).contains(part), "{args:?}: {}", said(&done));
    assert!(!folder.0.join("no.mp4").exists());
}

#[test]
fn a_prompt_becomes_a_silent_video_with_either_expert_loaded_in_turn() {
    let folder = Folder::new("t2v");
    folder.synth("tiny-t2v");
    let plain = ["--checkpoint", "tiny-t2v", "--size", "64x64", "--frames", "9", "--steps", "3"];
    let video = |more: &[&str]| frames(&folder, &[&plain[..], more].concat());
    let red = video(&["--prompt", "a red ball"]);
    assert_eq!(red.len(), 9 * 3 * 64 * 64);
    assert_eq!(probe(&folder.0.join("out.mp4")), "64,64,16/1,9");
    assert!(red == video(&["--prompt", "a red ball"]), "same seed, same frames");
    assert!(red != video(&["--prompt", "a blue cube"]), "the prompt matters");
    assert!(red == video(&["--prompt", "a red ball", "--offload", "blocks"]), "where blocks wait does not matter");
    // Both experts had a part in it.
    let low = folder.0.join("tiny-t2v/low_noise_model/diffusion_pytorch_model-00001-of-00001.safetensors");
    let high = folder.0.join("tiny-t2v/high_noise_model/diffusion_pytorch_model-00001-of-00001.safetensors");
    let own = std::fs::read(&low).unwrap();
    std::fs::copy(&high, &low).unwrap();
    assert!(red != video(&["--prompt", "a red ball"]), "the expert for low noise matters");
    std::fs::write(&low, own).unwrap();
    // What this model does not have, and what it lacks.
    folder.speech("in.wav", 0.5);
    refused(&folder, &[&plain[..], &["--audio", "in.wav"]].concat(), "leave out --audio");
    refused(&folder, &[&plain[..], &["--presenter", "ada"]].concat(), "words alone");
    refused(&folder, &[&plain[..], &["--mode", "clip"]].concat(), "no --mode");
    refused(&folder, &["--checkpoint", "tiny-t2v", "--frames", "10"], "multiple of four");
    std::fs::remove_dir_all(folder.0.join("tiny-t2v/low_noise_model")).unwrap();
    refused(&folder, &plain, "the transformer for low noise is absent");
}

#[test]
fn a_picture_begins_the_video_of_models_that_take_one() {
    let folder = Folder::new("i2v");
    let video = |model: &str, more: &[&str]| {
        let plain = ["--checkpoint", model, "--frames", "5", "--steps", "2", "--prompt", "x"];
        frames(&folder, &[&plain[..], more].concat())
    };
    let ada = video("random:tiny-i2v", &["--presenter", "ada", "--size", "4096"]);
    assert_eq!(ada.len(), 5 * 3 * 64 * 64);
    assert!(ada != video("random:tiny-i2v", &["--presenter", "bruno", "--size", "4096"]));
    refused(&folder, &["--checkpoint", "random:tiny-i2v", "--size", "4096"], "name one with --image");
    // TI2V takes one or none, in patches of 32.
    let (with, without) = (
        video("random:tiny-ti2v", &["--presenter", "ada", "--size", "64x64"]),
        video("random:tiny-ti2v", &["--size", "64x64"]),
    );
    assert!(with.len() == without.len() && with != without);
    assert_eq!(probe(&folder.0.join("out.mp4")), "64,64,24/1,5");
    refused(&folder, &["--checkpoint", "random:tiny-ti2v", "--size", "80x64"], "multiples of 32");
}

#[test]
fn many_prompts_are_a_batch() {
    let folder = Folder::new("films");
    let lines =
        [r#"{"prompt": "one", "out": "a.mp4"}"#, r#"{"prompt": "two"}"#, r#"{"prompt": "x", "audio": "no.wav"}"#];
    std::fs::write(folder.0.join("jobs.jsonl"), lines.join("\n")).unwrap();
    let args = ["--checkpoint", "random:tiny-ti2v", "--size", "64x64", "--frames", "1", "--steps", "1"];
    let done = folder.generate(&[&args[..], &["--manifest", "jobs.jsonl", "--out", "out"]].concat()).output().unwrap();
    let text = said(&done);
    assert!(text.contains("2 made, 0 were there already, 1 failed") && text.contains("no.wav"), "{text}");
    assert!(folder.0.join("a.mp4").exists() && folder.0.join("out/2.mp4").exists());
}

#[test]
fn each_speaker_has_a_voice_of_its_own() {
    let folder = Folder::new("speakers");
    folder.speech("a.wav", 0.3);
    folder.speech("b.wav", 0.2);
    let silent = [0i16; 3200];
    std::fs::write(folder.0.join("silence.wav"), super::files::wav(16_000, &silent)).unwrap();
    let mask = |name: &str, from: u32, to: u32| {
        let inside = |x: u32, _: u32| image::Luma([if (from..to).contains(&x) { 255u8 } else { 0 }]);
        image::ImageBuffer::from_fn(384, 384, inside).save(folder.0.join(name)).unwrap();
    };
    mask("left.png", 0, 150);
    mask("right.png", 234, 384);
    mask("nobody.png", 0, 0);
    for mode in [["--mode", "block"], ["--mode", "clip"]] {
        let plain = ["--checkpoint", "random:tiny", "--presenter", "ada", "--size", "64x64", "--steps", "1"];
        let plain = [&plain[..], &mode, &["--clip-frames", "12", "--guidance", "1"]].concat();
        let video = |more: &[&str]| frames(&folder, &[&plain[..], more].concat());
        let both = video(&["--speaker", "a.wav:left.png", "--speaker", "b.wav:right.png"]);
        let fps = if mode[1] == "block" { 25.0 } else { 16.0 };
        assert_eq!(both.len(), (0.3f64 * fps).ceil() as usize * 3 * 64 * 64, "as long as the longest voice");
        assert!(both != video(&["--speaker", "b.wav:left.png", "--speaker", "a.wav:right.png"]), "places matter");
        if mode[1] == "block" {
            continue;
        }
        assert!(both != video(&["--speaker", "a.wav:left.png", "--speaker", "silence.wav:right.png"]));
        // Without masks: columns.
        let columns = video(&["--speaker", "a.wav", "--speaker", "b.wav"]);
        assert!(columns.len() == both.len() && columns != both);
        let two = ["--speaker", "a.wav:left.png", "--speaker", "b.wav:nobody.png"];
        refused(&folder, &[&plain[..], &two].concat(), "mask 2 shows nobody");
    }
    let tiny = ["--checkpoint", "random:tiny", "--presenter", "ada", "--size", "64x64"];
    refused(&folder, &[&tiny[..], &["--speaker", "a.wav:left.png"]].concat(), "one speaker is not several");
    refused(
        &folder,
        &[&tiny[..], &["--speaker", "a.wav", "--speaker", "b.wav:left.png"]].concat(),
        "2 speakers have 1",
    );
    refused(&folder, &["--speaker", "a.wav", "--speaker", "b.wav"], "the pocket engine has no --speaker");
}

fn ffmpeg(folder: &Folder, args: &[&str]) {
    let done = Command::new("ffmpeg").args(["-v", "error", "-y"]).args(args).current_dir(&folder.0).output().unwrap();
    assert!(done.status.success(), "ffmpeg {args:?}: {}", said(&done));
}

/// A video of coloured stripes that move; 30 a second, so that every second picture is taken.
const STRIPES: [&str; 6] = ["-f", "lavfi", "-i", "testsrc=size=98x66:rate=30:duration=1.1", "-pix_fmt", "yuv420p"];

#[test]
fn a_pose_video_is_read_as_another_decoder_reads_it() {
    let folder = Folder::new("pose");
    // High profile with B-pictures, whose order in the file is not the order in which they are shown.
    ffmpeg(&folder, &[&STRIPES[..], &["-c:v", "libx264", "-profile:v", "high", "-bf", "3", "pose.mp4"]].concat());
    ffmpeg(&folder, &["-i", "pose.mp4", "-pix_fmt", "yuv420p", "pose.y4m"]);
    let read = |name: &str| {
        let mut pose = PoseFile::open(&folder.0.join(name)).unwrap();
        let next = move || pose.next().unwrap();
        std::iter::from_fn(next).map(|p| (p.width, p.height, p.rgb)).collect::<Vec<_>>()
    };
    let (ours, theirs) = (read("pose.mp4"), read("pose.y4m"));
    assert_eq!(ours.len(), 17);
    assert!(ours == theirs, "every second picture, in the order in which they are shown, bit for bit");
    // Cut off, of another codec, fragmented, or no video at all: a sentence each.
    let says = |name: &str, part: &str| {
        let error = PoseFile::open(&folder.0.join(name)).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(part), "{name}: {error}");
    };
    let whole = std::fs::read(folder.0.join("pose.mp4")).unwrap();
    std::fs::write(folder.0.join("cut.mp4"), &whole[..whole.len() / 2]).unwrap();
    says("cut.mp4", "damaged");
    ffmpeg(&folder, &[&STRIPES[..], &["-c:v", "mpeg4", "other.mp4"]].concat());
    says("other.mp4", "another video than H.264");
    ffmpeg(&folder, &["-i", "pose.mp4", "-c", "copy", "-movflags", "frag_keyframe+empty_moov", "fragments.mp4"]);
    says("fragments.mp4", "-c copy");
    folder.speech("in.wav", 0.7);
    std::fs::copy(folder.0.join("in.wav"), folder.0.join("sound.mp4")).unwrap();
    says("sound.mp4", "neither MP4 nor Y4M");
    // And it leads the picture.
    let plain = ["--checkpoint", "random:tiny", "--presenter", "ada", "--size", "64x64", "--steps", "1"];
    let plain = [&plain[..], &["--clip-frames", "12", "--guidance", "1", "--audio", "in.wav"]].concat();
    let led = frames(&folder, &[&plain[..], &["--pose", "pose.mp4"]].concat());
    assert!(led == frames(&folder, &[&plain[..], &["--pose", "pose.y4m"]].concat()));
    assert!(led != frames(&folder, &plain), "the pose matters");
}
