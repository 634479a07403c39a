//! `loquent model windows`: how near sliding windows come to a whole file, by context and look-ahead.

use super::large;
use crate::{
    avatar::s2v::{self, Ears, Normalise, Reach},
    cli::engines::Choice,
    codec::audio_file::{Limits, Source, read_speech},
    media::SPEECH_RATE,
};
use anyhow::bail;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    large: large::Flags,
    /// Speech to hear; several files are averaged.
    #[arg(long, value_name = "SPEECH", num_args = 1.., required = true)]
    audio: Vec<PathBuf>,
    /// Contexts to try, milliseconds.
    #[arg(long, value_delimiter = ',', default_value = "1000,2000,4000,8000")]
    contexts: Vec<u32>,
    /// Look-aheads to try, milliseconds.
    #[arg(long, value_delimiter = ',', default_value = "40,160,320,640,1280")]
    aheads: Vec<u32>,
    /// Video frames a second and frames asked for at a time: 25 and 12 are block mode's, 16 and 80 clip mode's.
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u32).range(1..=60))]
    fps: u32,
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(1..=200))]
    frames: u32,
    /// Use at most so many seconds of each file.
    #[arg(long, default_value_t = 12)]
    seconds: u32,
    /// Normalise every window by itself, to see what that does, instead of by everything heard so far.
    #[arg(long)]
    normalise_windows: bool,
}

/// Sums of one group of states.
#[derive(Clone, Copy, Default)]
struct Apart {
    difference: f64,
    whole: f64,
    cosine: f64,
    vectors: f64,
}

pub(super) fn run(args: Args) -> anyhow::Result<()> {
    let config = args.large.over(Choice::S2v, s2v::Config::default())?;
    let (hearing, device) = s2v::load_hearing(&config)?;
    let mut voices = Vec::new();
    for path in &args.audio {
        let (pcm, _) = read_speech(&Source::from(path.as_path()), &Limits::default())?;
        let most = (args.seconds * SPEECH_RATE) as usize;
        let speech = pcm.samples[..pcm.samples.len().min(most)].to_vec();
        if speech.len() < SPEECH_RATE as usize {
            bail!("{} is shorter than a second", path.display());
        }
        let whole = values(&s2v::whole(&hearing, &device, &speech, args.fps)?)?;
        voices.push((speech, whole));
    }
    let layers = hearing.config().num_hidden_layers;
    let third = layers.div_ceil(3).max(1);
    let groups: Vec<(String, std::ops::Range<usize>)> =
        [(0, 1), (1, 1 + third), (1 + third, 1 + 2 * third), (1 + 2 * third, layers), (layers, layers + 1)]
            .into_iter()
            .filter(|(a, b)| a < b)
            .map(|(a, b)| (if b - a == 1 { format!("{a}") } else { format!("{a}–{}", b - 1) }, a..b))
            .collect();
    println!(
        "Windows against whole files, {} s of speech, {} frames at {} a second, {} normalisation.\n\
         Relative error and mean cosine of the hidden states by group:\n",
        voices.iter().map(|v| v.0.len()).sum::<usize>() / SPEECH_RATE as usize,
        args.frames,
        args.fps,
        if args.normalise_windows { "every window's own" } else { "running" },
    );
    let head: Vec<String> = groups.iter().map(|(name, _)| format!("{name:>15}")).collect();
    println!("context  look-ahead {}", head.join(" "));
    for &context in &args.contexts {
        for &ahead in &args.aheads {
            let mut reach = Reach::from_millis(context, ahead);
            if args.normalise_windows {
                reach.normalise = Normalise::Window;
            }
            let mut sums = vec![Apart::default(); groups.len()];
            for (speech, whole) in &voices {
                let mut ears = Ears::new(reach, args.fps, 0);
                ears.push(speech);
                // Frames whose window lies within the speech: the file's end is the same for both.
                let usable = speech.len().saturating_sub(reach.ahead) as u64 * u64::from(args.fps);
                let blocks = usable / u64::from(SPEECH_RATE) / u64::from(args.frames);
                for b in 0..blocks {
                    let first = b * u64::from(args.frames);
                    let heard = values(&ears.listen(&hearing, &device, first, args.frames as usize)?)?;
                    for ((_, states), sum) in groups.iter().zip(&mut sums) {
                        for l in states.clone() {
                            compare(&heard[l], &whole[l], first as usize, sum);
                        }
                    }
                }
            }
            let cells: Vec<String> = sums
                .iter()
                .map(|s| format!("{:>7.4} {:>7.4}", (s.difference / s.whole).sqrt(), s.cosine / s.vectors))
                .collect();
            println!("{context:>7}  {ahead:>10} {}", cells.join(" "));
        }
    }
    println!(
        "\nWith made-up weights this shows the reach of the network (states, the positional convolution of 1.28 s each way,\n\
         attention that looks everywhere alike), not what a trained one listens to; run it on real weights to decide."
    );
    Ok(())
}

/// `[layers][channels][frames]`.
type Values = Vec<Vec<Vec<f32>>>;

fn values(features: &s2v::Features) -> anyhow::Result<Values> {
    Ok(s2v::numbers(features)?)
}

/// Adds the frames of `heard` against those of `whole` from `first` on.
fn compare(heard: &[Vec<f32>], whole: &[Vec<f32>], first: usize, sum: &mut Apart) {
    for frame in 0..heard.first().map_or(0, Vec::len) {
        let (mut dot, mut a2, mut b2) = (0.0f64, 0.0f64, 0.0f64);
        for (h, w) in heard.iter().zip(whole) {
            let (a, b) = (f64::from(h[frame]), f64::from(w[first + frame]));
            sum.difference += (a - b) * (a - b);
            dot += a * b;
            a2 += a * a;
            b2 += b * b;
        }
        sum.whole += b2;
        sum.cosine += dot / (a2 * b2).sqrt().max(1e-30);
        sum.vectors += 1.0;
    }
}
