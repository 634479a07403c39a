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
