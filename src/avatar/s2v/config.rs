//! The settings of the 14B engine, and what the official programs take when nothing is said.

use serde::{Deserialize, Serialize};

use super::ears::Reach;
use crate::model::{
    picture,
    ranks::{Costs, Layout, Split},
    sampler::Solver,
};

/// How frames are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Block mode with a LiveAvatar adapter, else clip mode.
    Auto,
    /// Causal blocks of 12 frames (LiveAvatar).
    Block,
    /// Clips, each with the last frames of the one before (S2V).
    Clip,
}

/// Element type of the transformer and the text encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// bf16 on a GPU, f32 on the processor.
    Auto,
    F32,
    Bf16,
    F16,
    /// Matrices, attention and its keys and values in 8 bits, the rest in bf16: half the memory, 1.6 times the speed of
    /// bf16 on a Hopper card.
    Fp8,
}

/// What waits in main memory instead of the device's. The text encoder is never on the device as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Offload {
    None,
    /// Block mode: of the steps' key-value rings only that of the step at work is on the device.
    Rings,
    /// The same, and the transformer's blocks visit the device one by one.
    Blocks,
}

/// How several devices share the work of block mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Share {
    /// Each a stretch of a block's way through the steps, all the same to do; several blocks under way: most frames.
    Balanced,
    /// The same cut between steps only; the official five-GPU layout on five devices.
    Steps,
    /// All at every step at once, by tokens and heads: least delay.
    Sequence,
}

impl From<Share> for Split {
    fn from(share: Share) -> Split {
        match share {
            Share::Balanced => Split::Balanced,
            Share::Steps => Split::Steps,
            Share::Sequence => Split::Sequence,
        }
    }
}

/// What several devices send each other with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wire {
    /// NCCL, for NVIDIA cards.
    Nccl,
    /// Through main memory: needs nothing, slower.
    Memory,
}

/// From noise to a clip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SolverName {
    Unipc,
    #[serde(rename = "dpm++")]
    Dpm,
    Euler,
}

impl From<SolverName> for Solver {
    fn from(name: SolverName) -> Solver {
        match name {
            SolverName::Unipc => Solver::UniPc,
            SolverName::Dpm => Solver::Dpm,
            SolverName::Euler => Solver::Euler,
        }
    }
}

/// `sample_neg_prompt` of wan/configs/wan_s2v_14B.py (Wan-Video/Wan2.2 at 42bf4cf).
const OFFICIAL_NEGATIVE_PROMPT: &str = "画面模糊，最差质量，画面模糊，细节模糊不清，情绪激动剧烈，手快速抖动，字幕，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走";

/// Settings of the 14B engine. What is absent is the official program's for the model and mode.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Folders or files that together hold transformer, autoencoder, text encoder, tokenizer and audio encoder; of a part
    /// that is in several, the first counts. `random:tiny` and `random:14b` are made up, for tests and benchmarks.
    pub checkpoint: Vec<String>,
    /// Adapters as `PATH` or `PATH:WEIGHT`, merged while loading.
    pub loras: Vec<String>,
    pub mode: Mode,
    /// `auto`, `cpu`, `cuda` or `cuda:N`; in block mode several, as `cuda:0,cuda:1`. A card named again at the end
    /// decodes on a second stream, as `cuda:0,cuda:0`.
    pub device: String,
    /// Block mode on a single card decodes on a second stream, beside the steps of the next block.
    pub second_stream: bool,
    /// How several devices share the work.
    pub share: Share,
    /// What they send each other with.
    pub wire: Wire,
    /// Milliseconds a block takes on one device to be heard, for one step, and to be decoded: what the shares are cut by.
    /// Only the proportions matter.
    pub stage_ms: [f64; 3],
    pub dtype: Precision,
    pub offload: Offload,
    /// See [`Size::parse`].
    pub size: String,
    pub prompt: String,
    /// Clip mode with guidance only; empty = the official one.
    pub negative_prompt: String,
    /// Clip mode only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shift: Option<f64>,
    /// Clip mode only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub solver: Option<SolverName>,
    /// Frames of a clip; in block mode it sets the length of the ring.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_frames: Option<usize>,
    /// Clip mode only: begin with the picture itself.
    pub first_frame: bool,
    /// Pictures come from the small decoder (TAEHV) among the checkpoint's files instead of the autoencoder's own.
    pub small_decoder: bool,
    /// Frames of a video of the base family, which is made by `generate` alone.
    #[serde(skip)]
    pub frames: Option<usize>,
    /// What wav2vec2 hears before and beyond the frames it hears for, milliseconds.
    pub audio_context_ms: u32,
    pub audio_ahead_ms: u32,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            checkpoint: Vec::new(),
            loras: Vec::new(),
            mode: Mode::Auto,
            device: "auto".into(),
            second_stream: true,
            share: Share::Balanced,
            wire: Wire::Nccl,
            stage_ms: [Costs::MEASURED.hearing, Costs::MEASURED.step, Costs::MEASURED.decode],
            dtype: Precision::Auto,
            offload: Offload::None,
            size: "512x512".into(),
            prompt: "A person looks at the camera and speaks.".into(),
            negative_prompt: String::new(),
            guidance: None,
            shift: None,
            solver: None,
            clip_frames: None,
            first_frame: false,
            small_decoder: false,
            frames: None,
            audio_context_ms: 8000,
            audio_ahead_ms: 320,
        }
    }
}

impl Config {
    /// Says which value is wrong and what is allowed, as far as that can be told without the model.
    ///
    /// # Errors
    /// The first wrong value.
    pub fn validate(&self) -> Result<(), String> {
        let wrong = |key: &str, value: &dyn std::fmt::Display, allowed: &str| {
            Err(format!("s2v.{key} = {value}: allowed is {allowed}"))
        };
        Size::parse(&self.size).map_err(|why| format!("s2v.size: {why}"))?;
        let places = self.places().map_err(|why| format!("s2v.device: {why}"))?;
        if places.len() > 1 && self.mode == Mode::Clip {
            return wrong("device", &self.device, "one device in clip mode; several share the work of block mode");
        }
        let last = places.len() - 1;
        if places.len() > 1 && places.contains(&Place::Auto) {
            return wrong("device", &self.device, "auto alone; several devices are named one by one");
        }
        if (0..last).any(|rank| Self::decodes_only(&places, rank)) {
            return wrong("device", &self.device, "a card named again as the last device only: it then decodes there");
        }
        if self.stage_ms.iter().any(|ms| !(0.0..=1e6).contains(ms)) || self.stage_ms[1] == 0.0 {
            let text = format!("{:?}", self.stage_ms);
            return wrong("stage_ms", &text, "three times from 0 to 1000000, the second above 0");
        }
        for lora in &self.loras {
            adapter(lora).map_err(|why| format!("s2v.loras: {why}"))?;
        }
        if let Some(g) = self.guidance.filter(|g| !(0.0..=100.0).contains(g)) {
            return wrong("guidance", &g, "0 to 100 (1 or less switches guidance off)");
        }
        if let Some(s) = self.shift.filter(|s| !(0.01..=100.0).contains(s)) {
            return wrong("shift", &s, "0.01 to 100");
        }
        if let Some(n) = self.clip_frames.filter(|n| !(4..=116).contains(n) || n % 4 != 0) {
            return wrong("clip_frames", &n, "a multiple of 4 from 4 to 116");
        }
        if self.audio_context_ms > 60_000 {
            return wrong("audio_context_ms", &self.audio_context_ms, "0 to 60000");
        }
        if self.audio_ahead_ms > 5_000 {
            return wrong("audio_ahead_ms", &self.audio_ahead_ms, "0 to 5000");
        }
        Ok(())
    }

    /// The negative prompt in effect.
    pub(super) fn negative(&self) -> &str {
        if self.negative_prompt.is_empty() { OFFICIAL_NEGATIVE_PROMPT } else { &self.negative_prompt }
    }

    /// Where the networks run.
    ///
    /// # Errors
    /// A sentence that says what is allowed.
    pub fn places(&self) -> Result<Vec<Place>, String> {
        self.device.split(',').map(Place::parse).collect()
    }

    /// Whether the device at `rank` only decodes: a card that is named again, whose second stream makes pixels beside the
    /// steps of the first.
    pub(super) fn decodes_only(places: &[Place], rank: usize) -> bool {
        matches!(places.get(rank), Some(place @ Place::Cuda(_)) if places[..rank].contains(place))
    }

    /// The same with the decoder on a second stream of the only card there is: in block mode where nothing waits in main
    /// memory, unless it is switched off. None where it stays as it is. `card`: whether the only device is one.
    pub(super) fn beside(&self, card: bool, block: bool) -> Option<Config> {
        let n = match self.places().ok()?[..] {
            [Place::Cuda(n)] => n,
            [Place::Auto] => 0,
            _ => return None,
        };
        let wanted = card && block && self.second_stream && self.offload == Offload::None;
        wanted.then(|| Config { device: format!("cuda:{n},cuda:{n}"), ..self.clone() })
    }

    /// Who does what where several devices share a face, for `steps` steps of a transformer of `blocks` blocks.
    ///
    /// # Errors
    /// A sentence that says what is wrong.
    pub fn layout(&self, steps: usize, blocks: usize) -> Result<Layout, String> {
        let places = self.places()?;
        let (ranks, costs, split) = (places.len(), self.costs(), self.share.into());
        let apart = Self::decodes_only(&places, ranks - 1);
        let plan = if apart { Layout::with_decoder_apart } else { Layout::plan };
        plan(ranks, steps, blocks, &costs, split).map_err(|e| e.to_string())
    }

    /// How long a block's parts take on one device.
    pub fn costs(&self) -> Costs {
        let [hearing, step, decode] = self.stage_ms;
        Costs { hearing, step, decode }
    }

    pub(super) fn reach(&self) -> Reach {
        Reach::from_millis(self.audio_context_ms, self.audio_ahead_ms)
    }
}

/// How large the picture becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// At most so many pixels, in the proportions of the portrait, as the official programs do it.
    Area(usize),
    /// Width and height; the portrait is cropped.
    Exact(usize, usize),
    /// The official area of the mode.
    Official,
}

impl Size {
    /// `480p`, `720p`, an area (`270336`, or `704*384` as the official programs write it), an exact size (`832x480`), or
    /// `official`.
    ///
    /// # Errors
    /// A sentence that says what is allowed.
    pub fn parse(text: &str) -> Result<Size, String> {
        let wrong = || {
            format!(
                "`{text}` is no size; allowed are 480p, 720p, WIDTHxHEIGHT such as 832x480, an area such as 704*384 or \
                 270336, and official"
            )
        };
        let number = |t: &str| t.trim().parse::<usize>().ok().filter(|n| (1..=1 << 24).contains(n));
        let area = |a: usize| match a {
            4096..=16_777_216 => Ok(Size::Area(a)),
            _ => Err(format!("an area of {a} pixels: allowed is 4096 to 16777216")),
        };
        match text.trim().to_ascii_lowercase().as_str() {
            "official" => Ok(Size::Official),
            "480p" => Ok(Size::Area(480 * 832)),
            "720p" => Ok(Size::Area(720 * 1280)),
            t => {
                if let Some((w, h)) = t.split_once('*') {
                    return area(number(w).ok_or_else(wrong)?.saturating_mul(number(h).ok_or_else(wrong)?));
                }
                let Some((w, h)) = t.split_once(['x', '×']) else {
                    return area(number(t).ok_or_else(wrong)?);
                };
                let (w, h) = (number(w).ok_or_else(wrong)?, number(h).ok_or_else(wrong)?);
                let side = |n: usize| (64..=4096).contains(&n) && n % 16 == 0;
                if side(w) && side(h) {
                    return Ok(Size::Exact(w, h));
                }
                Err(format!("{w}x{h}: sides are multiples of 16 from 64 to 4096"))
            }
        }
    }

    /// Height and width for a picture of this size. `official`: the mode's area.
    pub(super) fn of(self, (width, height): (usize, usize), official: usize) -> crate::model::Result<(usize, usize)> {
        match self {
            Size::Exact(w, h) => Ok((h, w)),
            Size::Area(area) => picture::output_size(height, width, area),
            Size::Official => picture::output_size(height, width, official),
        }
    }
}

/// Where the networks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The first GPU when this build can use one and there is one, else the processor.
    Auto,
    Cpu,
    Cuda(usize),
}

impl Place {
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    ///
    /// # Errors
    /// A sentence that says what is allowed.
    pub fn parse(text: &str) -> Result<Place, String> {
        match text.trim().to_ascii_lowercase().as_str() {
            "" | "auto" => Ok(Place::Auto),
            "cpu" => Ok(Place::Cpu),
            "cuda" => Ok(Place::Cuda(0)),
            t => t
                .strip_prefix("cuda:")
                .and_then(|n| n.parse().ok())
                .filter(|n| *n < 64)
                .map(Place::Cuda)
                .ok_or_else(|| format!("`{text}` is no device; allowed are auto, cpu, cuda and cuda:0, cuda:1…")),
        }
    }
}

/// `PATH` or `PATH:WEIGHT`.
///
/// # Errors
/// A weight that is no number.
pub fn adapter(text: &str) -> Result<(std::path::PathBuf, f64), String> {
    match text.rsplit_once(':') {
        Some((path, weight)) if !path.is_empty() => match weight.trim().parse::<f64>() {
            Ok(weight) if weight.is_finite() && weight.abs() <= 100.0 => Ok((path.into(), weight)),
            Ok(weight) => Err(format!("`{text}`: {weight} is no weight; allowed is −100 to 100")),
            // A colon may be part of a path.
            Err(_) if weight.contains('/') || std::path::Path::new(text).exists() => Ok((text.into(), 1.0)),
            Err(_) => Err(format!("`{text}`: `{weight}` is no number; allowed is PATH or PATH:WEIGHT")),
        },
        _ if text.is_empty() => Err("an adapter needs a path".into()),
        _ => Ok((text.into(), 1.0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, size) in [
            ("480p", Size::Area(399_360)),
            ("720P", Size::Area(921_600)),
            ("832x480", Size::Exact(832, 480)),
            ("64×128", Size::Exact(64, 128)),
            ("704*384", Size::Area(270_336)),
            (" 270336 ", Size::Area(270_336)),
            ("official", Size::Official),
        ] {
            assert_eq!(Size::parse(text), Ok(size), "{text}");
        }
        for text in ["", "p", "480", "100x100", "0x0", "x", "99999999999x64", "1*1", "4096*99999999"] {
            assert!(Size::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_adapter_may_have_a_weight_behind_its_path() {
        assert_eq!(adapter("a/b.safetensors").unwrap(), ("a/b.safetensors".into(), 1.0));
        assert_eq!(adapter("a/b.safetensors:0.5").unwrap(), ("a/b.safetensors".into(), 0.5));
        assert_eq!(adapter("C:/b").unwrap(), ("C:/b".into(), 1.0));
        for text in ["", "a:heavy", "a:nan", "a:1e9"] {
            assert!(adapter(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_single_card_decodes_on_a_second_stream_in_block_mode() {
        let on = |device: &str| Config { device: device.into(), ..Config::default() };
        let beside = |c: Config, card, block| c.beside(card, block).map(|c| c.device);
        assert_eq!(beside(on("cuda"), true, true).as_deref(), Some("cuda:0,cuda:0"));
        assert_eq!(beside(on("cuda:3"), true, true).as_deref(), Some("cuda:3,cuda:3"));
        assert_eq!(beside(on("auto"), true, true).as_deref(), Some("cuda:0,cuda:0"));
        let made = on("cuda:3").beside(true, true).unwrap();
        assert!(made.validate().is_ok() && made.layout(4, 40).is_ok_and(|l| (l.stages.len(), l.decoder) == (1, 1)));
        // The processor, clips, several devices, what waits in main memory, and who wants it so.
        assert_eq!(beside(on("auto"), false, true), None);
        assert_eq!(beside(on("cuda"), true, false), None);
        assert_eq!(beside(on("cuda:0,cuda:1"), true, true), None);
        assert_eq!(beside(Config { offload: Offload::Rings, ..on("cuda") }, true, true), None);
        assert_eq!(beside(Config { second_stream: false, ..on("cuda") }, true, true), None);
    }

    #[test]
    fn devices_have_names() {
        assert_eq!(Place::parse("CUDA:3"), Ok(Place::Cuda(3)));
        assert!(Place::parse("cuda:x").is_err() && Place::parse("tpu").is_err());
    }
}
