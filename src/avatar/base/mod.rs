//! The base family: text, or text and a picture, to video, with one transformer (TI2V-5B) or two experts that share the
//! noise levels between them (T2V and I2V A14B). MODEL.md §11; wan/text2video.py, image2video.py and textimage2video.py of
//! Wan-Video/Wan2.2 at 42bf4cf.
//!
//! ```text
//! noise ─► steps: t ≥ boundary → high-noise expert, else low-noise expert, each with its own guidance ─► VAE ─► frames
//! ```

mod experts;
mod film;

pub use film::{load, makes};

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::model::{
    At, Error, Result,
    dit::{Config, Dit, TextContext, Trace},
    sampler::Solver,
    vae::{Probe, WanVae},
};

/// Noise levels of the training schedule.
const LEVELS: f64 = 1000.0;
/// Channels of the mask that tells I2V which frames are given.
const MASK: usize = 4;

/// How a video is made.
#[derive(Clone, Debug, PartialEq)]
pub struct BaseSettings {
    /// Video frames, `4 k + 1`.
    pub frames: usize,
    /// Frames per second of the result.
    pub fps: u32,
    pub solver: Solver,
    pub steps: usize,
    pub shift: f64,
    /// Share of the noise levels from which on the high-noise expert is asked.
    pub boundary: f64,
    /// Guidance of the low-noise and the high-noise expert; where both are 1 or below the second pass is left out.
    pub guidance: [f64; 2],
}

impl BaseSettings {
    /// T2V-A14B (wan/configs/wan_t2v_A14B.py).
    pub fn t2v_a14b() -> Self {
        let (steps, shift, boundary, guidance) = (40, 12.0, 0.875, [3.0, 4.0]);
        Self { frames: 81, fps: 16, solver: Solver::UniPc, steps, shift, boundary, guidance }
    }

    /// I2V-A14B (wan/configs/wan_i2v_A14B.py).
    pub fn i2v_a14b() -> Self {
        Self { shift: 5.0, boundary: 0.9, guidance: [3.5, 3.5], ..Self::t2v_a14b() }
    }

    /// TI2V-5B (wan/configs/wan_ti2v_5B.py); it has one transformer, so the boundary is without effect.
    pub fn ti2v_5b() -> Self {
        Self { frames: 121, fps: 24, steps: 50, shift: 5.0, guidance: [5.0, 5.0], ..Self::t2v_a14b() }
    }

    /// Whether the high-noise expert is asked at timestep `t` (0…1000), and with which guidance.
    pub fn at(&self, t: f32) -> (bool, f64) {
        let high = f64::from(t) >= self.boundary * LEVELS;
        (high, self.guidance[usize::from(high)])
    }

    /// Latent frames.
    pub fn latent_frames(&self) -> usize {
        self.frames.saturating_sub(1) / 4 + 1
    }

    /// Refuses what cannot be made.
    pub fn check(&self) -> Result<()> {
        if self.frames % 4 != 1 || self.steps == 0 {
            return Err(Error::Config(format!(
                "a video of {} frames in {} steps cannot be made: frames must be one more than a multiple of four (81, \
                 121), and there must be a step",
                self.frames, self.steps
            )));
        }
        Ok(())
    }
}

/// One transformer and what was said to it.
#[derive(Clone)]
pub struct Expert {
    pub dit: Arc<Dit>,
    pub prompt: Arc<TextContext>,
    pub negative: Option<Arc<TextContext>>,
}

/// The transformers of a model: one, or two that share the noise levels. The noise only falls, so that who is asked
/// changes at most once in a video and one at a time needs to be in memory.
pub trait Experts {
    /// What they have in common.
    fn config(&self) -> &Config;
    /// The one for high or for low noise.
    ///
    /// # Errors
    /// It cannot be loaded.
    fn ask(&mut self, high: bool) -> Result<Expert>;
}

/// One transformer for all noise levels.
impl Experts for Expert {
    fn config(&self) -> &Config {
        self.dit.config()
    }

    fn ask(&mut self, _: bool) -> Result<Expert> {
        Ok(self.clone())
    }
}

/// What a video starts from.
pub enum Start<'a> {
    /// Words alone.
    Words,
    /// A first frame `[3, 1, height, width]` in −1..1 at the output size. I2V hears of it through extra channels; TI2V
    /// finds its latent in place, with timestep 0.
    Picture(&'a Tensor),
}

/// Latents of a video `[channels, T, h, w]` from noise of that shape. The probe sees `latents_in` before every step and
/// `pred` after every pass.
///
/// # Errors
/// [`Error::Config`] where transformer, start and settings do not belong together.
pub fn latents(
    experts: &mut dyn Experts,
    vae: &WanVae,
    start: &Start,
    settings: &BaseSettings,
    noise: &Tensor,
    probe: Probe,
) -> Result<Tensor> {
    settings.check()?;
    let config = experts.config().clone();
    let (channels, frames, h, w) = noise.dims4()?;
    if channels != config.out_dim || frames != settings.latent_frames() || channels != vae.channels() {
        return Err(Error::Input(format!(
            "noise {:?} does not fit {} latent frames of {} channels, or the autoencoder's {} channels",
            noise.dims(),
            settings.latent_frames(),
            config.out_dim,
            vae.channels()
        )));
    }
    // I2V has more channels in than out; TI2V gives a frame by its timestep.
    let extra = match (start, config.in_dim - config.out_dim) {
        (Start::Words, 0) => None,
        (Start::Picture(_), 0) if config.model_type != "ti2v" => {
            return Err(Error::Config("this model makes videos from words alone; it takes no picture".into()));
        }
        (Start::Picture(_), 0) => None,
        (Start::Picture(picture), n) if n == MASK + channels => Some(given(vae, picture, settings.frames)?),
        (_, n) => {
            return Err(Error::Config(format!(
                "a model with {n} channels more in than out needs a picture to start from"
            )));
        }
    };
    let first = match start {
        Start::Picture(picture) if extra.is_none() => Some(vae.encode(picture)?),
        _ => None,
    };
    if let Some(t) = extra.as_ref().or(first.as_ref())
        && t.dims()[2..] != [h, w]
    {
        return Err(Error::Input(format!("the picture's latent is {:?}, the noise {:?}", t.dims(), noise.dims())));
    }
    let [_, ph, pw] = config.patch;
    let (tokens, per_frame) = (frames * (h / ph) * (w / pw), (h / ph) * (w / pw));
    let place = |x: &Tensor| -> Result<Tensor> {
        Ok(match &first {
            Some(z) => Tensor::cat(&[&z.to_dtype(x.dtype())?, &x.narrow(1, 1, frames - 1)?], 1)?,
            None => x.clone(),
        })
    };
    let mut sampler = settings.solver.start(settings.steps, settings.shift)?;
    let mut x = place(&noise.to_dtype(DType::F32)?)?;
    for step in 0..settings.steps {
        probe("latents_in", &x);
        let t = sampler.timestep(step)?;
        let (high, guidance) = settings.at(t);
        let expert = experts.ask(high)?;
        let times = match &first {
            Some(_) => (0..tokens).map(|i| if i < per_frame { 0.0 } else { t }).collect(),
            None => vec![t],
        };
        let input = match &extra {
            Some(y) => Tensor::cat(&[&x, y], 0)?,
            None => x.clone(),
        };
        let pass = |words: &TextContext| expert.dit.base(&input, &times, words, &mut Trace::off());
        let mut v = pass(&expert.prompt).at(|| format!("step {step}"))?;
        probe("pred", &v);
        if guidance > 1.0
            && let Some(negative) = &expert.negative
        {
            let free = pass(negative).at(|| format!("step {step}"))?;
            probe("pred", &free);
            v = (&free + ((v - &free)? * guidance)?)?;
        }
        x = place(&sampler.step(step, &x, &v)?)?;
    }
    Ok(x)
}

/// What I2V is told beside the noise, `[4 + 16, T, h, w]`: a mask that is one where a frame is given (the first frame
/// counts four times, as latents hold four), and the latent of the picture followed by mid-grey.
fn given(vae: &WanVae, picture: &Tensor, frames: usize) -> Result<Tensor> {
    let (c, one, height, width) = picture.dims4()?;
    if one != 1 {
        return Err(Error::Input(format!("one picture is expected, not {one}")));
    }
    let rest = Tensor::zeros((c, frames - 1, height, width), picture.dtype(), picture.device())?;
    let latent = vae.encode(&Tensor::cat(&[picture, &rest], 1)?)?;
    let (_, t, h, w) = latent.dims4()?;
    let ones = Tensor::ones((MASK, 1, h, w), latent.dtype(), latent.device())?;
    let zeros = Tensor::zeros((MASK, t - 1, h, w), latent.dtype(), latent.device())?;
    Ok(Tensor::cat(&[&Tensor::cat(&[&ones, &zeros], 1)?, &latent], 0)?)
}

/// Output height and width of I2V for a picture and an area: the picture's aspect, in whole patches
/// (image2video.py::generate). `unit` is pixels per patch.
pub fn output_size((width, height): (usize, usize), area: usize, unit: usize) -> Result<(usize, usize)> {
    if width == 0 || height == 0 || unit == 0 {
        return Err(Error::Input(format!("a picture of {width}×{height} pixels cannot be used")));
    }
    let aspect = height as f64 / width as f64;
    let whole = |side: f64| (side / unit as f64).floor() as usize * unit;
    match (whole((area as f64 * aspect).sqrt()), whole((area as f64 / aspect).sqrt())) {
        (0, _) | (_, 0) => Err(too_small(area)),
        size => Ok(size),
    }
}

/// Output height and width of TI2V for a picture and an area: of the two ways to fill the area with whole patches, width
/// first or height first, the one nearer to the picture's aspect (wan/utils/utils.py::best_output_size).
pub fn best_size((width, height): (usize, usize), area: usize, unit: usize) -> Result<(usize, usize)> {
    let ratio = width as f64 / (height as f64).max(1.0);
    let side = |ideal: f64| (ideal / unit as f64).floor() as usize * unit;
    let across = (area as f64 * ratio).sqrt();
    let (w1, h2) = (side(across), side(area as f64 / across));
    if w1 == 0 || h2 == 0 {
        return Err(too_small(area));
    }
    let (h1, w2) = (side(area as f64 / w1 as f64), side(area as f64 / h2 as f64));
    let away = |w: usize, h: usize| {
        let r = w as f64 / h as f64;
        (ratio / r).max(r / ratio)
    };
    match away(w1, h1) < away(w2, h2) {
        _ if h1 == 0 || w2 == 0 => Err(too_small(area)),
        true => Ok((h1, w1)),
        false => Ok((h2, w2)),
    }
}

fn too_small(area: usize) -> Error {
    Error::Input(format!("an area of {area} pixels is too small for this picture"))
}

/// Standard normal noise of a video, a function of the seed alone.
pub fn noise(seed: u64, shape: (usize, usize, usize, usize), device: &Device) -> Result<Tensor> {
    let count = shape.0 * shape.1 * shape.2 * shape.3;
    Ok(Tensor::from_vec(super::noise::normal(seed, 0, count), shape, &Device::Cpu)?.to_device(device)?)
}
