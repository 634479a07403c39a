//! From noise to a latent. Flow matching: `x_σ = (1 − σ) x₀ + σ · noise`, the model predicts `noise − x₀`.
//!
//! Schedules are made in f64 where the official programs make them so, and stored in f32.

use candle_core::Tensor;

use crate::model::{Error, Result};

/// Shift map `σ ← sσ / (1 + (s − 1)σ)`.
fn shifted(sigma: f64, shift: f64) -> f64 {
    shift * sigma / (1.0 + (shift - 1.0) * sigma)
}

/// `n` values from `a` to `b`, both included.
fn linspace(a: f64, b: f64, n: usize) -> impl Iterator<Item = f64> {
    let step = if n > 1 { (b - a) / (n - 1) as f64 } else { 0.0 };
    (0..n).map(move |i| if i + 1 == n && n > 1 { b } else { a + i as f64 * step })
}

fn some_steps(steps: usize) -> Result<()> {
    if steps == 0 { Err(Error::Input("a sampler needs at least one step".into())) } else { Ok(()) }
}

/// Plain Euler along a list of σ.
#[derive(Debug, Clone)]
pub struct Euler {
    sigmas: Vec<f32>,
    timesteps: Vec<f32>,
}

impl Euler {
    /// LiveAvatar's list: the training range is shifted, and the chosen points are shifted again.
    pub fn live_avatar(steps: usize, shift: f64) -> Result<Self> {
        some_steps(steps)?;
        let end = |s: f64| 1000.0 * f64::from(shifted(s, shift) as f32);
        let points = linspace(end(1.0), end(f64::from(0.001f32)), steps);
        let mut sigmas: Vec<f32> = points.map(|t| shifted(t / 1000.0, shift) as f32).collect();
        let timesteps = sigmas.iter().map(|s| s * 1000.0).collect();
        sigmas.push(0.0);
        Ok(Self { sigmas, timesteps })
    }

    /// A given list, falling, without its final 0. Timesteps are 1000 σ.
    pub fn from_sigmas(list: &[f64]) -> Result<Self> {
        some_steps(list.len())?;
        if list.iter().any(|s| !(*s > 0.0 && *s <= 1.0)) || list.windows(2).any(|w| w[1] >= w[0]) {
            return Err(Error::Config(format!("noise levels must fall within (0, 1], not {list:?}")));
        }
        let mut sigmas: Vec<f32> = list.iter().map(|s| *s as f32).collect();
        let timesteps = list.iter().map(|s| (1000.0 * s) as f32).collect();
        sigmas.push(0.0);
        Ok(Self { sigmas, timesteps })
    }

    /// σ of each step and the final 0.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// What the model is told at each step.
    pub fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    fn levels(&self, step: usize) -> Result<(f32, f32)> {
        match self.sigmas.get(step..step + 2) {
            Some(s) => Ok((s[0], s[1])),
            None => Err(Error::Input(format!("step {step} of {} steps", self.timesteps.len()))),
        }
    }

    /// One step with a velocity.
    pub fn step(&self, step: usize, x: &Tensor, velocity: &Tensor) -> Result<Tensor> {
        let (now, next) = self.levels(step)?;
        Ok((x + (velocity * f64::from(next - now))?)?)
    }

    /// One step with a predicted x₀: the velocity is `(x − x₀) / σ`.
    pub fn step_to_sample(&self, step: usize, x: &Tensor, sample: &Tensor) -> Result<Tensor> {
        let (now, next) = self.levels(step)?;
        if next == 0.0 {
            return Ok(sample.clone());
        }
        Ok((x + ((x - sample)? * f64::from((next - now) / now))?)?)
    }
}

/// The solvers of the clip form; the first two of second order over predicted x₀.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Solver {
    /// UniPC, "bh2", with corrector (S2V's default).
    UniPc,
    /// DPM-Solver++ 2M, midpoint.
    Dpm,
    /// Plain Euler from σ = 1, fractional timesteps: what distillation adapters are made for.
    Euler,
}

impl Solver {
    /// Prepares `steps` steps with the pipeline's shift.
    pub fn start(self, steps: usize, shift: f64) -> Result<Sampler> {
        some_steps(steps)?;
        let first = match self {
            // The training range of this scheduler ends at the f32 value of 0.999.
            Solver::UniPc => f64::from(0.999f32),
            Solver::Dpm | Solver::Euler => 1.0,
        };
        let exact: Vec<f64> = linspace(first, 0.0, steps + 1).take(steps).map(|s| shifted(s, shift)).collect();
        let whole = |t: f64| if self == Solver::Euler { t } else { t.trunc() };
        let timesteps = exact.iter().map(|s| whole(s * 1000.0) as f32).collect();
        let mut sigmas: Vec<f32> = exact.iter().map(|s| *s as f32).collect();
        sigmas.push(0.0);
        let lambdas = sigmas.iter().map(|s| (1.0 - s).ln() - s.ln()).collect();
        Ok(Sampler { solver: self, sigmas, timesteps, lambdas, samples: Vec::new(), last: None, order: 0 })
    }
}

/// One run of a [`Solver`]: owns the history it needs.
#[derive(Debug, Clone)]
pub struct Sampler {
    solver: Solver,
    sigmas: Vec<f32>,
    timesteps: Vec<f32>,
    lambdas: Vec<f32>,
    /// Predicted x₀ of the last steps, newest last; made from the uncorrected sample.
    samples: Vec<Tensor>,
    /// The sample the last prediction started from, after correction.
    last: Option<Tensor>,
    order: usize,
}

impl Sampler {
    /// σ of each step and the final 0.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// What the model is told at each step: σ · 1000, truncated to an integer but for Euler.
    pub fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    /// The timestep of step `i`.
    pub fn timestep(&self, i: usize) -> Result<f32> {
        self.timesteps.get(i).copied().ok_or_else(|| self.no_step(i))
    }

    fn no_step(&self, i: usize) -> Error {
        Error::Input(format!(
            "step {i} of a run of {} steps, taken {} so far",
            self.timesteps.len(),
            self.samples.len()
        ))
    }

    /// From x at step `i` and the model's velocity there to x at step `i + 1`. Steps are taken in order from 0.
    pub fn step(&mut self, i: usize, x: &Tensor, velocity: &Tensor) -> Result<Tensor> {
        if i >= self.timesteps.len() || i != self.samples.len() {
            return Err(self.no_step(i));
        }
        let sample = (x - (velocity * f64::from(self.sigmas[i]))?)?;
        let next = match self.solver {
            Solver::UniPc => self.unipc(i, x, &sample)?,
            Solver::Dpm => self.dpm(i, x, &sample)?,
            Solver::Euler => (x + (velocity * f64::from(self.sigmas[i + 1] - self.sigmas[i]))?)?,
        };
        self.samples.push(sample);
        Ok(next)
    }

    /// `a·x + b·y`, coefficients in f32 as the official programs have them.
    fn mix(a: f32, x: &Tensor, b: f32, y: &Tensor) -> Result<Tensor> {
        Ok(((x * f64::from(a))? + (y * f64::from(b))?)?)
    }

    fn dpm(&self, i: usize, x: &Tensor, m: &Tensor) -> Result<Tensor> {
        let (s, l, n) = (&self.sigmas, &self.lambdas, self.timesteps.len());
        let h = l[i + 1] - l[i];
        let em = (-h).exp() - 1.0;
        let alpha = 1.0 - s[i + 1];
        let mut y = Self::mix(s[i + 1] / s[i], x, -alpha * em, m)?;
        if i > 0 && i + 1 < n {
            let before = l[i] - l[i - 1];
            // The first λ may be −∞ (σ = 1): then there is no slope to follow.
            if before.is_finite() {
                let slope = ((m - &self.samples[i - 1])? * f64::from(h / before))?;
                y = (y - (slope * f64::from(0.5 * alpha * em))?)?;
            }
        }
        Ok(y)
    }

    fn unipc(&mut self, i: usize, x: &Tensor, m: &Tensor) -> Result<Tensor> {
        let (s, l, n) = (&self.sigmas, &self.lambdas, self.timesteps.len());
        let x = match (&self.last, i) {
            (Some(last), 1..) => {
                let hh = l[i - 1] - l[i];
                let phi = hh.exp_m1();
                let m0 = &self.samples[i - 1];
                let fresh = (m - m0)?;
                let correction = if self.order < 2 {
                    (fresh * 0.5)?
                } else {
                    let r = (l[i - 2] - l[i - 1]) / -hh;
                    let b1 = (phi / hh - 1.0) / phi;
                    let b2 = ((phi / hh - 1.0) / hh - 0.5) * 2.0 / phi;
                    // [[1, 1], [r, 1]] · ρ = [b1, b2]
                    let rho0 = (b1 - b2) / (1.0 - r);
                    let rho1 = b1 - rho0;
                    Self::mix(rho0 / r, &(&self.samples[i - 2] - m0)?, rho1, &fresh)?
                };
                Self::mix(s[i] / s[i - 1], last, -(1.0 - s[i]) * phi, &(m0 + correction)?)?
            }
            _ => x.clone(),
        };
        let order = 2.min(n - i).min(i + 1);
        let h = l[i + 1] - l[i];
        let phi = (-h).exp_m1();
        let alpha = 1.0 - s[i + 1];
        let mut y = Self::mix(s[i + 1] / s[i], &x, -alpha * phi, m)?;
        if order == 2 {
            let r = (l[i - 1] - l[i]) / h;
            let slope = ((&self.samples[i - 1] - m)? * f64::from(alpha * phi * 0.5 / r))?;
            y = (y - slope)?;
        }
        self.order = order;
        self.last = Some(x);
        Ok(y)
    }
}

/// The end of LiveAvatar's training range before the shift.
pub const TRAINING_SIGMA_MIN: f64 = 0.003 / 1.002;

/// The flow-match schedule of LiveAvatar's training (and of its noise augmentation).
#[derive(Debug, Clone)]
pub struct FlowMatch {
    sigmas: Vec<f32>,
    timesteps: Vec<f32>,
}

impl FlowMatch {
    /// `steps` points from 1 to `sigma_min`, shifted; with `extra` one point more is laid out and the last left away.
    pub fn new(steps: usize, shift: f64, sigma_min: f64, extra: bool) -> Result<Self> {
        some_steps(steps)?;
        let points = linspace(1.0, sigma_min, steps + usize::from(extra));
        let sigmas: Vec<f32> = points.take(steps).map(|s| shifted(s, shift) as f32).collect();
        let timesteps = sigmas.iter().map(|s| s * 1000.0).collect();
        Ok(Self { sigmas, timesteps })
    }

    /// σ of each step; no final 0.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// 1000 σ.
    pub fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    fn nearest(&self, timestep: f32) -> usize {
        let away = |i: &usize| (self.timesteps[*i] - timestep).abs();
        (0..self.timesteps.len()).min_by(|a, b| away(a).total_cmp(&away(b))).unwrap_or(0)
    }

    /// From the level nearest to `timestep` to the next one, or to 0 after the last.
    pub fn step(&self, timestep: f32, x: &Tensor, velocity: &Tensor) -> Result<Tensor> {
        let i = self.nearest(timestep);
        let next = self.sigmas.get(i + 1).copied().unwrap_or(0.0);
        Ok((x + (velocity * f64::from(next - self.sigmas[i]))?)?)
    }

    /// `(1 − σ) x + σ · noise` at the level nearest to `timestep`.
    pub fn add_noise(&self, x: &Tensor, noise: &Tensor, timestep: f32) -> Result<Tensor> {
        let sigma = self.sigmas[self.nearest(timestep)];
        Ok(((x * f64::from(1.0 - sigma))?.broadcast_add(&(noise * f64::from(sigma))?))?)
    }
}
