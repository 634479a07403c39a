//! The causal, block-wise form: conditioning is prefilled once, then each block of latent frames attends to itself, to
//! the last frames of its own denoising step and to the conditioning.
//!
//! Keys and values of one layer at one step live in one buffer `[conditioning | ring]` that is written in place:
//! attention always sees one contiguous run of rows, and nothing is concatenated.
//!
//! On a card the way through the blocks is recorded in a graph, one per step, when a step runs for the second time. What
//! changes from block to block lies at fixed addresses (`desk.rs`), so the same graph serves all of them.

mod conditioning;

use std::{ops::Range, sync::Arc};

use candle_core::{DType, Device, Tensor};

use super::{
    BlockAudio, Dit, KeysValues, Prediction, TextContext, Timing,
    desk::{Desk, Replay},
    trace::Trace,
};
use crate::model::{
    At, Error, Result,
    nn::{
        Memory, Residual, Slot,
        rope::{Group, Rope, Rounding},
    },
    ranks::{Link, Share},
    sampler::Euler,
    vae::{Probe, quiet},
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

    fn of(&self, step: usize) -> Result<&Timing> {
        self.steps.get(step).ok_or_else(|| Error::Input(format!("step {step} of a schedule of {} steps", self.steps())))
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

/// A block on its way from noise to latent.
#[derive(Debug, Clone)]
pub struct Halfway {
    /// `[16, frames, h, w]` f32, at the noise level of the step it is in.
    pub latent: Tensor,
    /// Where it stands between two of the transformer's blocks: `[tokens, dim]`.
    pub tokens: Option<Tensor>,
}

/// One denoising step's memory.
#[derive(Debug)]
struct Ring {
    /// The transformer's blocks whose keys and values these are.
    blocks: Range<usize>,
    layers: Vec<Memory>,
    /// The step as a graph, where there are graphs.
    replay: Replay,
    /// Where the conditioning in the buffers was last rotated to; none = not written yet.
    conditioning: Option<Vec<Group>>,
    /// Rows of the ring itself.
    rows: usize,
    /// Rows that the last step wrote.
    written: Range<usize>,
    /// Whether no step has run.
    fresh: bool,
}

impl Ring {
    fn park(&mut self, conditioning: usize) -> Result<()> {
        let written = [0..conditioning, self.written.clone()];
        self.layers.iter_mut().try_for_each(|m| m.park(&written))
    }

    fn come(&mut self, device: &Device) -> Result<()> {
        self.layers.iter_mut().try_for_each(|m| m.come(device))
    }
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
    /// Which tokens and heads are computed here, where several ranks share each step.
    share: Option<Share>,
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
        ring.layers.get(layer.checked_sub(ring.blocks.start)?)?.part(self.rows(), ring.rows).ok()
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
    fn table(
        &self,
        last: &mut Option<(Vec<Group>, Rope)>,
        groups: &[Group],
        part: impl FnOnce(Tensor) -> Result<Tensor>,
    ) -> Result<Rope> {
        if let Some((of, rope)) = last
            && of == groups
        {
            return Ok(rope.clone());
        }
        let rope = Rope::from_table(part(self.stream_rope(groups)?.table().clone())?)?;
        *last = Some((groups.to_vec(), rope.clone()));
        Ok(rope)
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
        let tokens = self.enter(state, x, cond)?;
        let tokens = self.through(state, tokens, step, 0..self.blocks.len(), audio, distance, trace)?;
        self.leave(state, &tokens, step, trace)
    }

    /// A block's latent as the tokens that the transformer's blocks pass on; on a rank that shares steps, its part of
    /// them.
    fn enter(&self, state: &StreamState, x: &Tensor, cond: Option<&Tensor>) -> Result<Tensor> {
        let frames = x.dims4()?.1;
        if self.grid(x)? != state.grid || frames != self.config.frames_per_block {
            return Err(Error::Input(format!(
                "a block of {:?} does not belong to this stream of {} frames a block",
                x.dims(),
                self.config.frames_per_block
            )));
        }
        let base = match cond {
            Some(cond) => {
                let speech = self.speech()?;
                let mask = speech.mask.narrow(0, 0, 1)?;
                &speech.cond.forward(cond)?.to_dtype(DType::F32)?.broadcast_add(&mask)?
            }
            None => &state.base,
        };
        let tokens = (self.patch.forward(x)?.to_dtype(DType::F32)? + base)?;
        self.own(state, tokens)?.to_dtype(self.stream_type()).map_err(Error::from)
    }

    /// The rows of a block's tokens that are computed here.
    fn own(&self, state: &StreamState, rows: Tensor) -> Result<Tensor> {
        match &state.share {
            Some(share) => share.own(&rows),
            None => Ok(rows),
        }
    }

    /// Tokens through some of the transformer's blocks at one step.
    fn through(
        &self,
        state: &mut StreamState,
        tokens: Tensor,
        step: usize,
        blocks: Range<usize>,
        audio: &BlockAudio,
        distance: usize,
        trace: &mut Trace,
    ) -> Result<Tensor> {
        let speech = self.speech()?;
        let c = &self.config;
        let frames = c.frames_per_block;
        if audio.tokens.frames != frames {
            return Err(Error::Input(format!(
                "audio of {} latent frames does not belong to a block of {frames}",
                audio.tokens.frames
            )));
        }
        let schedule = state.schedule.clone();
        let timing = schedule.of(step)?;
        let (gh, gw) = state.grid;
        let n = gh * gw;
        let rows = state.rows();
        if self.parks {
            // First away, then near: there is room for one.
            for (i, ring) in state.rings.iter_mut().enumerate().filter(|(i, _)| *i != step) {
                ring.iter_mut().try_for_each(|r| r.park(rows)).at(|| format!("ring {i}"))?;
            }
            state.rings[step].iter_mut().try_for_each(|r| r.come(&self.device)).at(|| format!("ring {step}"))?;
        }
        if state.rings[step].is_none() {
            state.rings[step] = Some(self.ring(state, blocks.clone(), rows, c.kv_frames * n)?);
        }

        let p = state.position as i64;
        let groups = self.conditioning_groups(state, p, distance);
        let share = state.share.as_ref();
        let [own, others] = &mut state.tables;
        let rope = self.table(own, &[Group::frames(p, frames, gh, gw)], |table| match share {
            Some(share) => share.own(&table),
            None => Ok(table),
        })?;
        trace.see("rope_cos", &rope.cos()?);
        trace.see("rope_sin", &rope.sin()?);
        trace.see("merged_audio_emb", &audio.tokens.local.reshape((frames, (), c.dim))?);
        trace.see("audio_emb_global", &audio.tokens.global);
        let shared;
        let audio = match share {
            Some(share) => {
                shared = audio.over(share.tokens())?;
                &shared
            }
            None => audio,
        };

        let start = state.position * n;
        let size = c.kv_frames * n;
        let slot = Slot { at: rows + start % size, keys: rows + size.min(start + frames * n), card: None };
        let runs = [tokens.dim(0)?];
        let Some(ring) = state.rings[step].as_mut().filter(|r| r.blocks == blocks) else {
            return Err(Error::Input("the stream has no ring for these blocks".into()));
        };
        ring.written = slot.at..slot.at + frames * n;
        self.condition(&state.conditioning, ring, groups, others, share)?;

        let (text, fresh) = (state.text.as_deref(), ring.fresh);
        let through = |x: Tensor, rope: &Rope, slot: &Slot, audio: &BlockAudio, trace: &mut Trace| -> Result<Tensor> {
            let mut x = Residual::new(x);
            for (i, memory) in blocks.clone().zip(&ring.layers) {
                let text = text.and_then(|t| t.blocks.get(i));
                let first = state.conditioning.get(i).filter(|_| fresh).map(|kept| &kept.v);
                trace.within(|| format!("blocks.{i}"));
                self.blocks[i]
                    .bring(&self.device)?
                    .forward(&mut x, &timing.blocks[i], &runs, text, trace, |a, y| {
                        a.remember(y, rope, memory, slot, share, first)
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
        ring.fresh = false;
        if matches!(self.device, Device::Cpu) {
            return through(tokens, &rope, &slot, audio, trace);
        }
        let desk = Desk::lay(&mut state.desk, &tokens, &rope, &slot, frames * n, audio)?;
        // What ranks say to each other is not recorded, nor what reads the host's numbers.
        let fused = self.stream_type() == DType::BF16;
        let graphs = state.graphs && fused && share.is_none() && !trace.on() && !self.travels() && !self.parks;
        ring.replay.run(&self.device, graphs, || {
            let out = through(desk.tokens.clone(), &desk.rope, &desk.slot, &desk.audio, trace)?;
            // Fused kernels sum in place; where nothing was fused (f32), the tokens are elsewhere.
            if out.id() != desk.tokens.id() {
                desk.tokens.slice_set(&out.contiguous()?, 0, 0)?;
            }
            Ok(())
        })?;
        Ok(desk.tokens.clone())
    }

    /// What the head makes of the tokens: `[16, frames, h, w]` f32.
    fn leave(&self, state: &StreamState, tokens: &Tensor, step: usize, trace: &mut Trace) -> Result<Tensor> {
        let timing = state.schedule.of(step)?;
        let ((gh, gw), frames) = (state.grid, self.config.frames_per_block);
        let reference = state.reference.clone().map(|r| self.own(state, r)).transpose()?;
        let patches = self.head.forward(tokens, &timing.head, &[tokens.dim(0)?], reference.as_ref()).at(|| "head")?;
        let patches = match &state.share {
            Some(share) => share.all(patches)?,
            None => patches,
        };
        trace.see("head", &patches);
        self.head.unpatch(&patches, frames, gh, gw)
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
        let way = self.way(state.steps());
        let begin = Halfway { latent: noise.to_dtype(DType::F32)?, tokens: None };
        let end = self.travel(state, begin, way, audio, cond, distance, &mut quiet)?;
        state.advance(self.config.frames_per_block);
        Ok(end.latent)
    }

    /// From now on this rank computes its share of every step of a stream, with the other ranks of `team`; before the
    /// first block.
    ///
    /// # Errors
    /// More ranks than heads or tokens.
    pub fn share(&self, state: &mut StreamState, link: Arc<dyn Link>, team: Range<usize>) -> Result<()> {
        let (frames, tokens) = (self.config.frames_per_block, state.grid.0 * state.grid.1);
        state.share = Some(Share::new(link, team, self.config.num_heads, frames, tokens)?);
        Ok(())
    }

    /// A block's whole way, as [`Dit::travel`] counts it.
    pub fn way(&self, steps: usize) -> Range<usize> {
        0..steps * self.blocks.len()
    }

    /// A part of a block's way from noise to latent. The way is counted in blocks of the transformer through all steps:
    /// block `i` of step `s` is `s · num_layers + i`, so that several devices can share it, cut anywhere; a step's rings
    /// are where its blocks are. `probe` sees `x_in` before and `pred` after every step that begins or ends here. Going
    /// on to the next block is the caller's.
    pub fn travel(
        &self,
        state: &mut StreamState,
        mut on: Halfway,
        way: Range<usize>,
        audio: &BlockAudio,
        cond: Option<&Tensor>,
        distance: &[usize],
        probe: Probe,
    ) -> Result<Halfway> {
        let (layers, schedule) = (self.blocks.len(), state.schedule.clone());
        let mut at = way.start;
        while at < way.end {
            let (step, first) = (at / layers, at % layers);
            let last = layers.min(first + (way.end - at));
            at += last - first;
            let rho = distance.get(step).or(distance.last()).copied().unwrap_or(REFERENCE_TIME as usize);
            let mut part = || -> Result<()> {
                let tokens = match (first, on.tokens.take()) {
                    (0, None) => {
                        probe("x_in", &on.latent);
                        self.enter(state, &on.latent, cond)?
                    }
                    (1.., Some(tokens)) => tokens,
                    _ => return Err(Error::Input(format!("a block is not at block {first} of the transformer"))),
                };
                let tokens = self.through(state, tokens, step, first..last, audio, rho, &mut Trace::off())?;
                if last < layers {
                    on.tokens = Some(tokens);
                    return Ok(());
                }
                let out = self.leave(state, &tokens, step, &mut Trace::off())?;
                probe("pred", &out);
                on.latent = match self.config.prediction {
                    Prediction::Velocity => schedule.euler.step(step, &on.latent, &out)?,
                    Prediction::Sample => schedule.euler.step_to_sample(step, &on.latent, &out)?,
                };
                Ok(())
            };
            part().at(|| format!("step {step}"))?;
        }
        Ok(on)
    }

    fn ring(&self, state: &StreamState, blocks: Range<usize>, conditioning: usize, rows: usize) -> Result<Ring> {
        let columns = state.share.as_ref().map_or(self.config.dim, |s| s.heads().len() * self.config.head());
        let mut layers = Vec::with_capacity(blocks.len());
        for (block, kept) in self.blocks[blocks.clone()].iter().zip(&state.conditioning[blocks.clone()]) {
            let memory = block.kept().own.memory(kept, (conditioning + rows, columns), HEADROOM)?;
            // Where ranks share a block, values are stored as others made them ready.
            layers.push(match (self.parks, &state.share) {
                (true, _) => memory,
                (false, Some(_)) => memory.transposed(self.config.head())?,
                (false, None) => memory.transposed(self.config.head())?.centred()?,
            });
        }
        Ok(Ring { blocks, layers, replay: Replay::default(), conditioning: None, rows, written: 0..0, fresh: true })
    }
}
