//! The flags of the large engine (`--engine s2v`), shared by the commands that can run it.

use super::engines::Choice;
use crate::avatar::s2v::{Config, Mode, Offload, Precision, Share, Size, SolverName};
use anyhow::bail;
use serde::de::DeserializeOwned;

#[derive(clap::Args, Clone, Debug, Default)]
#[command(next_help_heading = "The large engine (--engine s2v)")]
pub(super) struct Flags {
    /// Folder or file with the model's parts; may be repeated, the first that has a part counts. random:tiny and
    /// random:14b are made up on the spot, for tests and benchmarks.
    #[arg(long, value_name = "PATH")]
    pub(super) checkpoint: Vec<String>,
    /// Adapter to merge, with its weight; may be repeated.
    #[arg(long, value_name = "PATH[:WEIGHT]")]
    lora: Vec<String>,
    /// block (LiveAvatar) or clip (S2V) [default: block with a LiveAvatar adapter, else clip].
    #[arg(long, value_parser = named::<Mode>)]
    mode: Option<Mode>,
    /// auto, cpu, cuda or cuda:N; several for block mode, as cuda:0,cuda:1; a card named again at the end decodes on a
    /// second stream, as cuda:0,cuda:0 [default: auto].
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Block mode on a single card: decode after the steps instead of beside the next block's, on a second stream.
    #[arg(long)]
    one_stream: bool,
    /// How several devices share the work: balanced, steps or sequence [default: balanced].
    #[arg(long, value_parser = named::<Share>)]
    share: Option<Share>,
    /// f32, bf16, f16 or fp8 (Hopper cards) [default: bf16 on a GPU, f32 on the processor].
    #[arg(long, value_parser = named::<Precision>)]
    dtype: Option<Precision>,
    /// Keep in main memory: rings (block mode's keys and values of the other steps), or blocks (the transformer's, too):
    /// slower, and fits smaller GPUs.
    #[arg(long, value_name = "WHAT", value_parser = named::<Offload>, num_args = 0..=1, default_missing_value = "blocks")]
    offload: Option<Offload>,
    /// 480p, 720p, WIDTHxHEIGHT, or an area such as 704*384 in the picture's proportions [default: the mode's official
    /// area]. For the pocket engine `generate` takes 256x256, 384x384 (unless told otherwise) and 512x512.
    #[arg(long, value_parser = size)]
    size: Option<String>,
    /// What the picture shows.
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// What it should not look like (clip mode with guidance) [default: the official one].
    #[arg(long, value_name = "TEXT")]
    negative_prompt: Option<String>,
    /// Classifier-free guidance; 1 or less switches it off (clip mode) [default: 4.5].
    #[arg(long, value_name = "SCALE")]
    guidance: Option<f64>,
    /// Shift of the noise levels [default: 3].
    #[arg(long)]
    shift: Option<f64>,
    /// unipc, dpm++ or euler (clip mode) [default: unipc].
    #[arg(long, value_parser = named::<SolverName>)]
    solver: Option<SolverName>,
    /// Frames of a clip, a multiple of 4; in block mode the length of the ring, a multiple of 12 [default: 80, 48].
    #[arg(long, value_name = "N")]
    clip_frames: Option<usize>,
    /// Begin with the picture itself (clip mode).
    #[arg(long)]
    first_frame: bool,
    /// Decode with the small decoder (taew2_1, TAEHV) among the checkpoint's files: several times faster, coarser.
    #[arg(long)]
    small_decoder: bool,
    /// Milliseconds of speech that the audio encoder hears before the frames it hears for.
    #[arg(long, value_name = "MS")]
    audio_context_ms: Option<u32>,
    /// And beyond them.
    #[arg(long, value_name = "MS")]
    audio_ahead_ms: Option<u32>,
}

/// Reads a name as the configuration file does; the message lists what is allowed.
fn named<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(serde_json::Value::String(text.to_ascii_lowercase())).map_err(|e| e.to_string())
}

fn size(text: &str) -> Result<String, String> {
    Size::parse(text).map(|_| text.to_string())
}

impl Flags {
    /// Names of the flags that were given.
    fn given(&self) -> Vec<&'static str> {
        let given = [
            ("--checkpoint", !self.checkpoint.is_empty()),
            ("--lora", !self.lora.is_empty()),
            ("--mode", self.mode.is_some()),
            ("--device", self.device.as_deref().is_some_and(|d| !["cpu", "auto"].contains(&d))),
            ("--one-stream", self.one_stream),
            ("--share", self.share.is_some()),
            ("--dtype", self.dtype.is_some()),
            ("--offload", self.offload.is_some()),
            ("--size", self.size.is_some()),
            ("--prompt", self.prompt.is_some()),
            ("--negative-prompt", self.negative_prompt.is_some()),
            ("--guidance", self.guidance.is_some()),
            ("--shift", self.shift.is_some()),
            ("--solver", self.solver.is_some()),
            ("--clip-frames", self.clip_frames.is_some()),
            ("--first-frame", self.first_frame),
            ("--small-decoder", self.small_decoder),
            ("--audio-context-ms", self.audio_context_ms.is_some()),
            ("--audio-ahead-ms", self.audio_ahead_ms.is_some()),
        ];
        given.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect()
    }

    /// Takes `--size` as the side of the pocket engine's square pictures.
    pub(super) fn take_square(&mut self) -> anyhow::Result<Option<usize>> {
        let Some(text) = self.size.take() else { return Ok(None) };
        match Size::parse(&text) {
            Ok(Size::Exact(width, height)) if width == height => Ok(Some(width)),
            _ => bail!("--size {text}: the pocket engine's pictures are square; say --size 384x384, for example"),
        }
    }

    /// `base` with the flags on top; for another engine than the large one, an error if any was given.
    pub(super) fn over(&self, choice: Choice, base: Config) -> anyhow::Result<Config> {
        let given = self.given();
        if choice != Choice::S2v && !given.is_empty() {
            let name = choice.name();
            bail!("the {name} engine has no {}; these belong to --engine s2v", given.join(", "));
        }
        let text = |flag: &Option<String>, base: String| flag.clone().unwrap_or(base);
        Ok(Config {
            checkpoint: if self.checkpoint.is_empty() { base.checkpoint } else { self.checkpoint.clone() },
            loras: if self.lora.is_empty() { base.loras } else { self.lora.clone() },
            mode: self.mode.unwrap_or(base.mode),
            device: text(&self.device, base.device),
            second_stream: base.second_stream && !self.one_stream,
            share: self.share.unwrap_or(base.share),
            wire: base.wire,
            stage_ms: base.stage_ms,
            dtype: self.dtype.unwrap_or(base.dtype),
            offload: self.offload.unwrap_or(base.offload),
            size: text(&self.size, base.size),
            prompt: text(&self.prompt, base.prompt),
            negative_prompt: text(&self.negative_prompt, base.negative_prompt),
            guidance: self.guidance.or(base.guidance),
            shift: self.shift.or(base.shift),
            solver: self.solver.or(base.solver),
            clip_frames: self.clip_frames.or(base.clip_frames),
            frames: base.frames,
            first_frame: self.first_frame || base.first_frame,
            small_decoder: self.small_decoder || base.small_decoder,
            audio_context_ms: self.audio_context_ms.unwrap_or(base.audio_context_ms),
            audio_ahead_ms: self.audio_ahead_ms.unwrap_or(base.audio_ahead_ms),
        })
    }
}
