//! What a stream is conditioned on, reference and motion: prefilled once per stream, kept before rotation, and written in
//! front of each step's ring wherever it stands in time by then.

use std::{ops::Range, sync::Arc};

use candle_core::{DType, Tensor};

use super::{Opening, REFERENCE_TIME, Ring, Schedule, StreamState};
use crate::model::{
    At, Error, Result,
    dit::{Cond, Conditioning, Dit, DropMode, KeysValues, Trace, motion},
    nn::{
        Residual,
        rope::{Group, Rope},
    },
    ranks::Share,
};

impl Dit {
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
            share: None,
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
                repeated = Tensor::cat(&vec![reference; motion::FRAMES], 1)?;
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

    /// Where the conditioning stands for a block at time `p`.
    pub(super) fn conditioning_groups(&self, state: &StreamState, p: i64, distance: usize) -> Vec<Group> {
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

    /// Writes the conditioning where a step's memories do not have it yet. Only what moved since the step last ran is
    /// rotated again.
    pub(super) fn condition(
        &self,
        kept: &[KeysValues],
        ring: &mut Ring,
        groups: Vec<Group>,
        table: &mut Option<(Vec<Group>, Rope)>,
        share: Option<&Share>,
    ) -> Result<()> {
        let heads = |t: Tensor| share.map_or(Ok(t.clone()), |s| s.columns(&t, self.config.head()));
        let layers = || ring.layers.iter().zip(&kept[ring.blocks.clone()]);
        let moved = Moved::between(ring.conditioning.as_deref(), &groups);
        if let Some(m) = &moved {
            let turned = self.table(table, &groups[m.groups.clone()], Ok)?;
            for (memory, kept) in layers() {
                memory.place_keys(&heads(kept.k.narrow(0, m.row, turned.tokens())?)?, &turned, m.row)?;
            }
        }
        if ring.conditioning.is_none() {
            for (memory, kept) in layers() {
                memory.place_values(&heads(kept.v.clone())?, 0)?;
            }
        }
        ring.conditioning = Some(groups);
        Ok(())
    }
}

/// The span of conditioning groups whose positions changed.
struct Moved {
    groups: Range<usize>,
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
