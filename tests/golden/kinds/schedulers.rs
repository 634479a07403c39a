//! Every sampler's levels, timesteps and trajectory through `v(x, t) = a·x + b·t/1000 + c·bias`.

use candle_core::{Device, Tensor};
use loquent::model::sampler::{Euler, FlowMatch, Solver, TRAINING_SIGMA_MIN};

use super::text;
use crate::data::{Check, Golden};

struct Field {
    a: f64,
    b: f64,
    c: f64,
    bias: Tensor,
}

impl Field {
    fn velocity(&self, x: &Tensor, t: f32) -> Result<Tensor, String> {
        let v = || ((x * self.a)? + self.b * (f64::from(t) / 1000.0))?.broadcast_add(&(&self.bias * self.c)?);
        v().map_err(text)
    }

    fn run(
        &self,
        x: &Tensor,
        timesteps: &[f32],
        mut step: impl FnMut(usize, &Tensor, &Tensor) -> loquent::model::Result<Tensor>,
    ) -> Result<Tensor, String> {
        let (mut x, mut path) = (x.clone(), Vec::new());
        for (i, t) in timesteps.iter().enumerate() {
            x = step(i, &x, &self.velocity(&x, *t)?).map_err(text)?;
            path.push(x.clone());
        }
        Tensor::stack(&path, 0).map_err(text)
    }
}

fn list(values: &[f32]) -> Result<Tensor, String> {
    Tensor::new(values, &Device::Cpu).map_err(text)
}

pub fn check(golden: &Golden, check: &mut Check) -> Result<(), String> {
    let (x, bias) = (golden.input("x")?, golden.input("bias")?);
    let cases = golden.value("cases")?.as_array().ok_or("cases is not a list")?.clone();
    for (i, case) in cases.iter().enumerate() {
        let number = |key: &str| case[key].as_f64().ok_or(format!("{key} is not a number"));
        let steps = case["steps"].as_u64().ok_or("steps is not a count")? as usize;
        let shift = number("shift")?;
        let field = Field { a: number("a")?, b: number("b")?, c: number("c")?, bias: bias.clone() };
        for (tag, solver) in [("unipc", Solver::UniPc), ("dpmpp", Solver::Dpm)] {
            let mut sampler = solver.start(steps, shift).map_err(text)?;
            let timesteps = sampler.timesteps().to_vec();
            check.same(&format!("{tag}.{i}.timesteps"), &list(&timesteps)?)?;
            check.same(&format!("{tag}.{i}.sigmas"), &list(sampler.sigmas())?)?;
            let path = field.run(&x, &timesteps, |i, x, v| sampler.step(i, x, v))?;
            check.same(&format!("{tag}.{i}.traj"), &path)?;
        }
        let euler = Euler::live_avatar(steps, shift).map_err(text)?;
        check.same(&format!("euler.{i}.timesteps"), &list(euler.timesteps())?)?;
        check.same(&format!("euler.{i}.sigmas"), &list(euler.sigmas())?)?;
        let path = field.run(&x, euler.timesteps(), |i, x, v| euler.step(i, x, v))?;
        check.same(&format!("euler.{i}.traj"), &path)?;
        for (tag, end, extra) in [("omni", TRAINING_SIGMA_MIN, false), ("omni_extra", 0.0, true)] {
            let flow = FlowMatch::new(steps, shift, end, extra).map_err(text)?;
            check.same(&format!("{tag}.{i}.timesteps"), &list(flow.timesteps())?)?;
            check.same(&format!("{tag}.{i}.sigmas"), &list(flow.sigmas())?)?;
            let path = field.run(&x, flow.timesteps(), |i, x, v| flow.step(flow.timesteps()[i], x, v))?;
            check.same(&format!("{tag}.{i}.traj"), &path)?;
            let noisy = flow.add_noise(&x, &bias, flow.timesteps()[steps / 2]).map_err(text)?;
            check.same(&format!("{tag}.{i}.add_noise"), &noisy)?;
        }
        // LiveAvatar's own solver serves block after block: the step index starts anew, so each block that the golden
        // recorded (all through the first case's field) is the same path.
        if i == 0 {
            let live = Euler::live_avatar(4, 3.0).map_err(text)?;
            check.same("live.timesteps", &list(live.timesteps())?)?;
            check.same("live.sigmas", &list(live.sigmas())?)?;
            for block in (0..).take_while(|b| check.wants(&format!("live.{b}.traj"))) {
                let path = field.run(&x, live.timesteps(), |i, x, v| live.step(i, x, v))?;
                check.same(&format!("live.{block}.traj"), &path)?;
            }
        }
    }
    Ok(())
}
