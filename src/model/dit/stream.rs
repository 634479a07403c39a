//! The causal, block-wise form: conditioning is prefilled once, then each block of latent frames attends to itself, to
//! the last frames of its own denoising step and to the conditioning.
//!
//! Keys and values of one layer at one step live in one buffer `[conditioning | ring]` that is written in place:
//! attention always sees one contiguous run of rows, and nothing is concatenated.
//!
//! On a card the way through the blocks is recorded in a graph, one per step, when a step runs for the second time. What
//! changes from block to block lies at fixed addresses (`desk.rs`), so the same graph serves all of them.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::{
    BlockAudio, Cond, Conditioning, Dit, DropMode, KeysValues, Prediction, TextContext, Timing,
    desk::{Desk, Replay},
    trace::Trace,
};
use crate::model::{
    At, Error, Result,
    nn::{
        Memory, Residual, Slot,
        rope::{Group, Rope, Rounding},
    },
    sampler::Euler,
};

/// How much larger than the conditioning's values a block's may be before e4m3 cuts them off.
const HEADROOM: f64 = 4.0;

/// Where the reference stands in time at the start.
const REFERENCE_TIME: i64 = 30;

/// A list of noise levels with everything that depends on them alone. Shared by all streams.
#[derive(Debug)]
pub struct Schedule {
    /// The solver.
    pub euler: Euler,
    steps: Vec<Timing>,
    zero: Timing,
}

impl Schedule {
    /// Denoising steps per block.
    pub fn steps(&self) -> usize {
        self.steps.len()
    }
}

/// What a stream starts from.
pub struct Opening<'a> {
    /// `[16, 1, h, w]`.
    pub reference: &'a Tensor,
    /// `[16, frames, h, w]`, oldest first; none = the reference repeated.
    pub motion: Option<&'a Tensor>,
    /// None where the model takes no text.
    pub text: Option<Arc<TextContext>>,
}

/// One denoising step's memory.
#[derive(Debug)]
struct Ring {
    layers: Vec<Memory>,
    /// The step as a graph, where there are graphs.
    replay: Replay,
    /// Where the conditioning in the buffers was last rotated to; none = not written yet.
    conditioning: Option<Vec<Group>>,
    /// Rows of the ring itself.
    rows: usize,
}

/// Everything one face remembers in the transformer.
#[derive(Debug)]
pub struct StreamState {
    schedule: Arc<Schedule>,
    text: Option<Arc<TextContext>>,
    /// Latent frames generated so far = absolute time of the next block.
    position: usize,
    grid: (usize, usize),
    conditioning: Vec<KeysValues>,
    groups: Vec<Group>,
    rings: Vec<Option<Ring>>,
    /// `cond_encoder` plus the mask row of noisy tokens, for one block `[frames · n, dim]`.
    base: Tensor,
    /// The reference latent as patches, repeated for a block; only where the head has a gate.
    reference: Option<Tensor>,
    /// What a block's launches read, at fixed addresses; only on a card.
    desk: Option<Desk>,
    /// Whether steps become graphs.
    graphs: bool,
    /// Rotations of the block and of the conditioning that moved: the same for all steps of a block.
    tables: [Option<(Vec<Group>, Rope)>; 2],
}

impl StreamState {
    /// Whether a card's steps are recorded and replayed (they are, unless this says no). The results are the same.
    pub fn use_graphs(&mut self, yes: bool) {
        self.graphs = yes;
    }

    /// Absolute time of the next block in latent frames.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Denoising steps per block.
    pub fn steps(&self) -> usize {
        self.schedule.steps()
    }

    /// Goes to the next block; [`Dit::generate`] does this itself.
    pub fn advance(&mut self, frames: usize) {
        self.position += frames;
    }

    /// Bytes of keys and values held.
    pub fn bytes(&self) -> usize {
        let size = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        let conditioning: usize = self.conditioning.iter().map(|c| size(&c.k) + size(&c.v)).sum();
        let rings = self.rings.iter().flatten().flat_map(|r| &r.layers);
        conditioning + rings.map(Memory::bytes).sum::<usize>()
    }

    /// Keys and values of the conditioning in a layer, before rotation (for tests).
    pub fn conditioning(&self, layer: usize) -> Option<&KeysValues> {
        self.conditioning.get(layer)
    }

    /// Ring of a step and layer, keys and values without the conditioning in front (for tests).
    pub fn ring(&self, step: usize, layer: usize) -> Option<(Tensor, Tensor)> {
        let ring = self.rings.get(step)?.as_ref()?;
        ring.layers.get(layer)?.part(self.rows(), ring.rows).ok()
    }

    /// Rows of conditioning.
    fn rows(&self) -> usize {
        self.groups.iter().map(Group::tokens).sum()
    }
}

impl Dit {
    /// Prepares a list of noise levels.
    pub fn schedule(&self, euler: Euler) -> Result<Schedule> {
        let steps: Result<_> = euler.timesteps().iter().map(|t| self.timing(&[*t], 1)).collect();
        Ok(Schedule { steps: steps?, zero: self.timing(&[0.0], 1)?, euler })
    }

    /// The schedule the configuration lists for this many steps, else LiveAvatar's.
    pub fn schedule_of(&self, steps: usize) -> Result<Schedule> {
        let c = &self.config;
        match c.sigmas.get(&steps.to_string()) {
            Some(list) => self.schedule(Euler::from_sigmas(list)?),
            None if c.sigmas.is_empty() => self.schedule(Euler::live_avatar(steps, 3.0)?),
            None => Err(Error::Config(format!(
                "this model has no schedule of {steps} steps; it has {:?}",
                c.sigmas.keys().collect::<Vec<_>>()
            ))),
        }
    }

    /// Starts a stream: prefills the conditioning. Rings are made when a step first runs.
    pub fn open(&self, opening: &Opening, schedule: &Arc<Schedule>) -> Result<StreamState> {
        self.open_traced(opening, schedule, &mut Trace::off())
    }

    /// The same, with a window into the prefill.
    pub fn open_traced(&self, opening: &Opening, schedule: &Arc<Schedule>, trace: &mut Trace) -> Result<StreamState> {
        let grid = self.grid(opening.reference)?;
        let mut state = StreamState {
            schedule: schedule.clone(),
            text: opening.text.clone(),
            position: 0,
            grid,
            conditioning: Vec::new(),
            groups: Vec::new(),
            rings: (0..schedule.steps()).map(|_| None).collect(),
            base: opening.reference.clone(),
            reference: None,
            desk: None,
            graphs: true,
            tables: [None, None],
        };
        self.prefill(&mut state, opening.reference, opening.motion, trace).at(|| "prefill")?;
        Ok(state)
    }

    /// Replaces reference and motion of a running stream; the rings stay.
    pub fn recondition(&self, state: &mut StreamState, reference: &Tensor, motion: Option<&Tensor>) -> Result<()> {
        if self.grid(reference)? != state.grid {
            return Err(Error::Input("a running stream cannot change its size".into()));
        }
        self.prefill(state, reference, motion, &mut Trace::off()).at(|| "prefill")
    }

    fn prefill(
        &self,
        state: &mut StreamState,
        reference: &Tensor,
        motion: Option<&Tensor>,
        trace: &mut Trace,
    ) -> Result<()> {
        let speech = self.speech()?;
        let c = &self.config;
        if reference.dim(1)? != 1 {
            return Err(Error::Input(format!("one reference frame is expected, not {}", reference.dim(1)?)));
        }
        let (gh, gw) = state.grid;
        let repeated;
        let motion = match motion {
            Some(m) => m,
            None => {
                repeated = Tensor::cat(&vec![reference; super::motion::FRAMES], 1)?;
                &repeated
            }
        };
        if motion.dims()[2..] != reference.dims()[2..] {
            return Err(Error::Input(format!(
                "motion {:?} and reference {:?} differ in size",
                motion.dims(),
                reference.dims()
            )));
        }
        let mask = |i: usize| speech.mask.narrow(0, i, 1);
        let (packed, packed_groups) = speech.packer.forward(motion, 2, DropMode::Pad)?;
        let own = self.patch.forward(reference)?.to_dtype(DType::F32)?;
        let x = Tensor::cat(&[&own.broadcast_add(&mask(1)?)?, &packed.broadcast_add(&mask(2)?)?], 0)?;
        let mut groups = vec![Group::frames(REFERENCE_TIME, 1, gh, gw)];
        groups.extend(packed_groups);
        let rope = self.stream_rope(&groups)?;
        trace.see("rope_cos", &rope.cos()?);
        trace.see("rope_sin", &rope.sin()?);
        let runs = [x.dim(0)?];
        let mut x = Residual::new(x.to_dtype(self.stream_type())?);
        let mut conditioning = Vec::with_capacity(self.blocks.len());
        for (i, block) in self.blocks.iter().enumerate() {
            let m = &state.schedule.zero.blocks[i];
            let text = state.text.as_ref().and_then(|t| t.blocks.get(i));
            trace.within(|| format!("blocks.{i}"));
            block
                .bring(&self.device)?
                .forward(&mut x, m, &runs, text, trace, |a, y| {
                    let p = a.project(y)?;
                    let kv = a.kept(&p)?;
                    let out = a.finish(&a.queries(&p, &rope)?, &rope.rotate(&kv.k)?, &kv.v)?;
                    conditioning.push(kv);
                    Ok(out)
                })
                .at(|| format!("block {i}"))?;
            trace.outside();
            trace.see_tokens(|| format!("blocks.{i}"), &mut x)?;
        }
        // What a block of noisy tokens starts from, and what the gate adds, change with the reference only.
        let frames = c.frames_per_block;
        let cond = match c.cond {
            Cond::Reference => reference.clone(),
            Cond::Zeros => reference.zeros_like()?,
        };
        let base = speech.cond.forward(&cond)?.to_dtype(DType::F32)?.broadcast_add(&mask(0)?)?;
        state.base = Tensor::cat(&vec![base; frames], 0)?;
        if c.reference_gate {
            state.reference = Some(Tensor::cat(&vec![self.head.patches(reference)?; frames], 0)?);
        }
        let moved = conditioning.first().map(|n| n.k.dim(0)).transpose()?
            != state.conditioning.first().map(|o| o.k.dim(0)).transpose()?;
        if moved {
            state.rings.iter_mut().for_each(|r| *r = None);
        }
        for ring in state.rings.iter_mut().flatten() {
            ring.conditioning = None;
        }
        state.conditioning = conditioning;
        state.groups = groups;
        Ok(())
    }

    /// Element type of a stream's tokens between blocks. LiveAvatar's are bf16 (MODEL.md §12 of the specification), which
    /// halves what the passes between two matrices move; where nothing else is bf16 they stay f32.
    fn stream_type(&self) -> DType {
        let bf16 = self.blocks.first().is_some_and(|b| b.kept().own.computes_in_bf16());
        if bf16 && !matches!(self.device, Device::Cpu) { DType::BF16 } else { DType::F32 }
    }

    fn stream_rope(&self, groups: &[Group]) -> Result<Rope> {
        let rounding = if self.config.rope_half { Rounding::Half } else { Rounding::Exact };
        Rope::new(groups, self.config.head(), rounding, &self.device)
    }

    /// The rotation of these groups; made when they are not those of the last time.
    fn table(&self, last: &mut Option<(Vec<Group>, Rope)>, groups: &[Group]) -> Result<Rope> {
        if let Some((of, rope)) = last
            && of == groups
        {
            return Ok(rope.clone());
        }
        let rope = self.stream_rope(groups)?;
        *last = Some((groups.to_vec(), rope.clone()));
        Ok(rope)
    }

    /// Where the conditioning stands for a block at time `p`.
    fn conditioning_groups(&self, state: &StreamState, p: i64, distance: usize) -> Vec<Group> {
        match self.config.conditioning {
            Conditioning::Following => {
                let by = p - (self.config.kv_frames as i64 - 1);
                state.groups.iter().map(|g| g.shifted(by)).collect()
            }
            Conditioning::Anchored => {
                let by = (p - (REFERENCE_TIME - distance as i64)).max(0);
                let mut groups = state.groups.clone();
                groups[0] = Group::frames(REFERENCE_TIME + by, 1, state.grid.0, state.grid.1);
                groups
            }
        }
    }

    /// One denoising step of the block at the stream's position.
    ///
    /// `x` is the noisy latent `[16, frames, h, w]`, `step` selects noise level and ring, `cond` replaces what the
    /// configuration feeds to `cond_encoder`, `distance` is ρ, how far ahead of the block the reference stays (used
    /// when anchored; 4 to 30 in training). Returns what the head predicts, `[16, frames, h, w]` f32.
    pub fn forward(
        &self,
        state: &mut StreamState,
        x: &Tensor,
        step: usize,
        audio: &BlockAudio,
        cond: Option<&Tensor>,
        distance: usize,
        trace: &mut Trace,
    ) -> Result<Tensor> {
        let speech = self.speech()?;
        let c = &self.config;
        let (_, frames, _, _) = x.dims4()?;
        if self.grid(x)? != state.grid || frames != c.frames_per_block || audio.tokens.frames != frames {
            return Err(Error::Input(format!(
                "a block of {:?} with audio of {} latent frames does not belong to this stream of {} frames a block",
                x.dims(),
                audio.tokens.frames,
                c.frames_per_block
            )));
        }
        let schedule = state.schedule.clone();
        let timing = schedule
            .steps
            .get(step)
            .ok_or_else(|| Error::Input(format!("step {step} of a schedule of {} steps", schedule.steps())))?;
        let (gh, gw) = state.grid;
        let n = gh * gw;
        let rows = state.rows();
        if state.rings[step].is_none() {
            state.rings[step] = Some(self.ring(state, rows, c.kv_frames * n)?);
        }

        let base = match cond {
            Some(cond) => {
                let mask = speech.mask.narrow(0, 0, 1)?;
                &speech.cond.forward(cond)?.to_dtype(DType::F32)?.broadcast_add(&mask)?
            }
            None => &state.base,
        };
        let tokens = (self.patch.forward(x)?.to_dtype(DType::F32)? + base)?.to_dtype(self.stream_type())?;
        let p = state.position as i64;
        let groups = self.conditioning_groups(state, p, distance);
        let [own, others] = &mut state.tables;
        let rope = self.table(own, &[Group::frames(p, frames, gh, gw)])?;
        trace.see("rope_cos", &rope.cos()?);
        trace.see("rope_sin", &rope.sin()?);
        trace.see("merged_audio_emb", &audio.tokens.local.reshape((frames, (), c.dim))?);
        trace.see("audio_emb_global", &audio.tokens.global);

        let start = state.position * n;
        let size = c.kv_frames * n;
        let slot = Slot { at: rows + start % size, keys: rows + size.min(start + frames * n), card: None };
        let runs = [frames * n];
        let Some(ring) = state.rings[step].as_mut() else {
            return Err(Error::Input("the stream has no ring".into()));
        };
        self.condition(&state.conditioning, ring, groups, others)?;

        let text = state.text.as_deref();
        let through = |x: Tensor, rope: &Rope, slot: &Slot, audio: &BlockAudio, trace: &mut Trace| -> Result<Tensor> {
            let mut x = Residual::new(x);
            for (i, block) in self.blocks.iter().enumerate() {
                let text = text.and_then(|t| t.blocks.get(i));
                trace.within(|| format!("blocks.{i}"));
                block
                    .bring(&self.device)?
                    .forward(&mut x, &timing.blocks[i], &runs, text, trace, |a, y| {
                        a.remember(y, rope, &ring.layers[i], slot)
                    })
                    .at(|| format!("block {i}"))?;
                trace.outside();
                trace.see_tokens(|| format!("blocks.{i}"), &mut x)?;
                if let Some(j) = self.injector_after(i) {
                    speech.injectors[j]
                        .bring(&self.device)?
                        .forward(&mut x, &audio.injectors[j], frames)
                        .at(|| format!("audio after block {i}"))?;
                    trace.see_tokens(|| format!("after_inject.{i}"), &mut x)?;
                }
            }
            x.into_tokens()
        };
        let tokens = if matches!(self.device, Device::Cpu) {
            through(tokens, &rope, &slot, audio, trace)?
        } else {
            let desk = Desk::lay(&mut state.desk, &tokens, &rope, &slot, audio)?;
            let graphs = state.graphs && !trace.on() && !self.travels();
            ring.replay.run(&self.device, graphs, || {
                through(desk.tokens.clone(), &desk.rope, &desk.slot, &desk.audio, trace).map(drop)
            })?;
            desk.tokens.clone()
        };
        let patches = self.head.forward(&tokens, &timing.head, &runs, state.reference.as_ref()).at(|| "head")?;
        trace.see("head", &patches);
        self.head.unpatch(&patches, frames, gh, gw)
    }

    /// Writes the conditioning where a step's memories do not have it yet. Only what moved since the step last ran is
    /// rotated again.
    fn condition(
        &self,
        kept: &[KeysValues],
        ring: &mut Ring,
        groups: Vec<Group>,
        table: &mut Option<(Vec<Group>, Rope)>,
    ) -> Result<()> {
        let moved = Moved::between(ring.conditioning.as_deref(), &groups);
        if let Some(m) = &moved {
            let turned = self.table(table, &groups[m.groups.clone()])?;
            for (memory, kept) in ring.layers.iter().zip(kept) {
                memory.place_keys(&kept.k.narrow(0, m.row, turned.tokens())?, &turned, m.row)?;
            }
        }
        if ring.conditioning.is_none() {
            for (memory, kept) in ring.layers.iter().zip(kept) {
                memory.place_values(&kept.v, 0)?;
            }
        }
        ring.conditioning = Some(groups);
        Ok(())
    }

    /// All denoising steps of one block: noise `[16, frames, h, w]` → latent of the same shape; goes to the next
    /// block. `distance` holds ρ per step (the last one repeats; empty = 30).
    pub fn generate(
        &self,
        state: &mut StreamState,
        audio: &BlockAudio,
        noise: Tensor,
        cond: Option<&Tensor>,
        distance: &[usize],
    ) -> Result<Tensor> {
        let schedule = state.schedule.clone();
        let mut x = noise.to_dtype(DType::F32)?;
        for step in 0..schedule.steps() {
            let rho = distance.get(step).or(distance.last()).copied().unwrap_or(REFERENCE_TIME as usize);
            let out =
                self.forward(state, &x, step, audio, cond, rho, &mut Trace::off()).at(|| format!("step {step}"))?;
            x = match self.config.prediction {
                Prediction::Velocity => schedule.euler.step(step, &x, &out)?,
                Prediction::Sample => schedule.euler.step_to_sample(step, &x, &out)?,
            };
        }
        state.advance(self.config.frames_per_block);
        Ok(x)
    }

    fn ring(&self, state: &StreamState, conditioning: usize, rows: usize) -> Result<Ring> {
        let mut layers = Vec::with_capacity(self.blocks.len());
        for (block, kept) in self.blocks.iter().zip(&state.conditioning) {
            layers.push(block.kept().own.memory(kept, conditioning + rows, HEADROOM)?);
        }
        Ok(Ring { layers, replay: Replay::default(), conditioning: None, rows })
    }
}

/// The span of conditioning groups whose positions changed.
struct Moved {
    groups: std::ops::Range<usize>,
    /// First row of the span.
    row: usize,
}

impl Moved {
    fn between(before: Option<&[Group]>, now: &[Group]) -> Option<Self> {
        let differs = |i: &usize| before.is_none_or(|b| b.get(*i) != Some(&now[*i]));
        let first = (0..now.len()).find(differs)?;
        let last = (0..now.len()).rfind(differs)?;
        Some(Self { groups: first..last + 1, row: now[..first].iter().map(Group::tokens).sum() })
    }
}
