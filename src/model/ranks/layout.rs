//! Which rank does what: a pure function of how long the parts take.

use std::{fmt::Write, ops::Range};

use crate::model::{Error, Result};

/// How the work is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Anywhere between two blocks of the transformer, so that all ranks have the same to do: most frames a second.
    Balanced,
    /// Between two steps only, the decoder on the last rank or its own: with five ranks the official layout.
    Steps,
    /// All ranks share each step by tokens and heads; the decoder on the last or its own: least delay.
    Sequence,
}

/// Milliseconds that the parts of a block take on one rank. Only their proportions matter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// Hearing, before the first step.
    pub hearing: f64,
    pub step: f64,
    /// Latents to pixels.
    pub decode: f64,
}

impl Costs {
    /// Measured on an H200 at 480×832 in fp8 (src/model/kernels/NOTES.md); at 704×384 the proportions differ by 3 %.
    pub const MEASURED: Costs = Costs { hearing: 11.0, step: 217.0, decode: 94.0 };
}

/// Ranks that share a stretch of a block's way through the steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    pub ranks: Range<usize>,
    /// As [`crate::model::dit::Dit::travel`] counts: step · blocks of the transformer + block.
    pub way: Range<usize>,
}

/// Who does what. Stages follow each other in the order of ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub stages: Vec<Stage>,
    /// The rank that makes pixels: one of the last stage, or one behind it.
    pub decoder: usize,
    /// Blocks of the transformer.
    pub blocks: usize,
}

impl Layout {
    /// The layout with the shortest time a block for `ranks` ranks, `steps` denoising steps and `blocks` blocks of the
    /// transformer. More ranks than can be used are left out.
    ///
    /// # Errors
    /// Nothing to lay out, or costs that are no times.
    pub fn plan(ranks: usize, steps: usize, blocks: usize, costs: &Costs, split: Split) -> Result<Layout> {
        let times = [costs.hearing, costs.step, costs.decode];
        if ranks == 0 || steps == 0 || blocks == 0 || times.iter().any(|t| !t.is_finite() || *t < 0.0) {
            return Err(Error::Config(format!(
                "{ranks} ranks for {steps} steps of {blocks} blocks that take {times:?} ms: each must be some, and times \
                 not negative"
            )));
        }
        let shapes: Vec<Layout> = match split {
            Split::Balanced => vec![Self::cut(ranks, steps * blocks, 1, blocks, costs, &[])],
            Split::Steps => vec![Self::cut(ranks, steps * blocks, blocks, blocks, costs, &[])],
            Split::Sequence => {
                let shared = |team: usize, decoder: usize| {
                    let stages = vec![Stage { ranks: 0..team, way: 0..steps * blocks }];
                    Layout { stages, decoder, blocks }
                };
                let own = (ranks > 1).then(|| shared(ranks - 1, ranks - 1));
                std::iter::once(shared(ranks, ranks - 1)).chain(own).collect()
            }
        };
        let best = shapes.into_iter().min_by(|a, b| a.period(costs).total_cmp(&b.period(costs)));
        best.ok_or_else(|| Error::Config("there is no layout".into()))
    }

    /// The same with the decoder on the last rank, which computes no steps.
    ///
    /// # Errors
    /// As [`Layout::plan`]; there is only one rank.
    pub fn with_decoder_apart(
        ranks: usize,
        steps: usize,
        blocks: usize,
        costs: &Costs,
        split: Split,
    ) -> Result<Layout> {
        let steps_alone = Costs { decode: 0.0, ..*costs };
        let mut layout = Self::plan(ranks.saturating_sub(1), steps, blocks, &steps_alone, split)?;
        layout.decoder = layout.stages.last().map_or(0, |s| s.ranks.end);
        Ok(layout)
    }

    /// The same kind of layout, cut anew so that ranks that were seen at work for `busy` milliseconds a block all are as
    /// long: cards of one kind differ by a percent or two. `costs`: what hearing and decoding took. Itself where ranks
    /// share steps, or what was seen makes no sense.
    pub fn evened(&self, busy: &[f64], costs: &Costs) -> Layout {
        let alone = self.stages.iter().all(|s| s.ranks.len() == 1) && busy.len() == self.ranks();
        let pace = |(rank, stage): (usize, &Stage)| {
            let hearing = if rank == 0 { costs.hearing } else { 0.0 };
            let decode = if rank == self.decoder { costs.decode } else { 0.0 };
            (busy[rank] - hearing - decode) / stage.way.len() as f64 * self.blocks as f64 / costs.step
        };
        if !alone || costs.step <= 0.0 {
            return self.clone();
        }
        let paces: Vec<f64> = self.stages.iter().enumerate().map(pace).collect();
        if self.decoder >= self.stages.len() || paces.iter().any(|p| !(0.5..2.0).contains(p)) {
            return self.clone();
        }
        let units = self.stages.last().map_or(0, |s| s.way.end);
        Self::cut(self.stages.len(), units, 1, self.blocks, costs, &paces)
    }

    /// One rank after the other, cut at multiples of `grain`: the least time such that every rank, filled in turn, stays
    /// within it, found by halving. `paces`: how many times as long a step takes on each rank; those not named, once.
    fn cut(ranks: usize, units: usize, grain: usize, blocks: usize, costs: &Costs, paces: &[f64]) -> Layout {
        let unit = |rank: usize| costs.step / blocks as f64 * paces.get(rank).copied().unwrap_or(1.0);
        let slowest = (0..ranks).map(unit).fold(0.0, f64::max);
        let fill = |limit: f64| -> Option<Vec<Range<usize>>> {
            let (mut ways, mut at) = (Vec::new(), 0);
            while at < units && ways.len() < ranks {
                let room = limit - if at == 0 { costs.hearing } else { 0.0 };
                let fits = ((room + 1e-9) / unit(ways.len())).clamp(0.0, units as f64) as usize / grain * grain;
                if fits == 0 {
                    return None;
                }
                ways.push(at..units.min(at + fits));
                at = units.min(at + fits);
            }
            let last = ways.last()?;
            let with = last.len() as f64 * unit(ways.len() - 1)
                + if last.start == 0 { costs.hearing } else { 0.0 }
                + costs.decode;
            let fits = with <= limit + 1e-9 || (ways.len() < ranks && costs.decode <= limit + 1e-9);
            (at == units && fits).then_some(ways)
        };
        let total = costs.hearing + units as f64 * slowest + costs.decode;
        let (mut low, mut high) = (0.0, total);
        // Sixty halvings: far below what any clock tells.
        for _ in 0..60 {
            let middle = (low + high) / 2.0;
            if fill(middle).is_some() { high = middle } else { low = middle }
        }
        let ways = fill(high).unwrap_or_else(|| vec![0..units]);
        let last = ways.len() - 1;
        let stages: Vec<Stage> = ways.into_iter().enumerate().map(|(i, way)| Stage { ranks: i..i + 1, way }).collect();
        let mut layout = Layout { stages, decoder: last, blocks };
        // It did not fit beside the last steps.
        let steps = layout.stages[last].way.len() as f64 * unit(last);
        let with = steps + if last == 0 { costs.hearing } else { 0.0 } + costs.decode;
        if with > high + 1e-6 && last + 1 < ranks {
            layout.decoder = last + 1;
        }
        layout
    }

    /// Ranks in use.
    pub fn ranks(&self) -> usize {
        self.stages.last().map_or(0, |s| s.ranks.end).max(self.decoder + 1)
    }

    /// The stage of a rank; none for a decoder of its own.
    pub fn stage_of(&self, rank: usize) -> Option<usize> {
        self.stages.iter().position(|s| s.ranks.contains(&rank))
    }

    /// Milliseconds of a block on each rank.
    pub fn loads(&self, costs: &Costs) -> Vec<f64> {
        let load = |rank: usize| {
            let stage = self.stages.iter().find(|s| s.ranks.contains(&rank));
            let steps = stage.map_or(0.0, |s| s.way.len() as f64 / self.blocks as f64 / s.ranks.len() as f64);
            let hearing = if rank == 0 { costs.hearing } else { 0.0 };
            hearing + steps * costs.step + if rank == self.decoder { costs.decode } else { 0.0 }
        };
        (0..self.ranks()).map(load).collect()
    }

    /// Milliseconds from block to block when every rank is always at work.
    pub fn period(&self, costs: &Costs) -> f64 {
        self.loads(costs).into_iter().fold(0.0, f64::max)
    }

    /// Milliseconds from speech to pixels of one block.
    pub fn delay(&self, costs: &Costs) -> f64 {
        let steps = |s: &Stage| s.way.len() as f64 / self.blocks as f64 / s.ranks.len() as f64 * costs.step;
        costs.hearing + self.stages.iter().map(steps).sum::<f64>() + costs.decode
    }

    /// Whether stages are what a run can be made of: they follow each other, a shared stage is whole steps, and the
    /// decoder is where latents come out.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self, steps: usize) -> Result<()> {
        let wrong = |what: &str| Err(Error::Config(format!("a layout {what}: {self:?}")));
        let (mut rank, mut at) = (0, 0);
        for s in &self.stages {
            if s.ranks.start != rank || s.way.start != at || s.ranks.is_empty() || s.way.is_empty() {
                return wrong("whose stages do not follow each other");
            }
            if s.ranks.len() > 1 && (s.way.start % self.blocks != 0 || s.way.end % self.blocks != 0) {
                return wrong("that shares parts of a step");
            }
            (rank, at) = (s.ranks.end, s.way.end);
        }
        if at != steps * self.blocks || at == 0 {
            return wrong("that does not do all steps");
        }
        match self.stages.last() {
            Some(last) if last.ranks.contains(&self.decoder) || self.decoder == last.ranks.end => Ok(()),
            _ => wrong("whose decoder is not behind the last step"),
        }
    }

    /// One line a rank: what it does and how long that takes.
    pub fn describe(&self, costs: &Costs) -> Vec<String> {
        let steps = |n: usize| (n as f64 / self.blocks as f64 * 100.0).round() / 100.0;
        let loads = self.loads(costs);
        let line = |(rank, load): (usize, &f64)| {
            let mut text = String::new();
            if let Some(s) = self.stages.iter().find(|s| s.ranks.contains(&rank)) {
                let (from, to) = (steps(s.way.start), steps(s.way.end));
                let _ = match s.ranks.len() {
                    1 => write!(text, "steps {from} to {to}"),
                    n => write!(text, "1/{n} of steps {from} to {to}"),
                };
            }
            if rank == self.decoder {
                text += if text.is_empty() { "decoder" } else { ", decoder" };
            }
            format!("rank {rank}: {text}, {load:.0} ms a block")
        };
        loads.iter().enumerate().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(ranks: usize, split: Split) -> Layout {
        let layout = Layout::plan(ranks, 4, 40, &Costs::MEASURED, split).unwrap();
        layout.check(4).unwrap();
        layout
    }

    #[test]
    fn balanced_layouts_give_every_rank_the_same() {
        let total = Costs::MEASURED.hearing + 4.0 * Costs::MEASURED.step + Costs::MEASURED.decode;
        for ranks in [1, 2, 3, 4, 5, 8] {
            let layout = plan(ranks, Split::Balanced);
            assert_eq!(layout.ranks(), ranks);
            let period = layout.period(&Costs::MEASURED);
            // A block of the transformer is the least that can be moved.
            assert!(period <= total / ranks as f64 + Costs::MEASURED.step / 40.0, "{ranks}: {period}");
            assert!((layout.delay(&Costs::MEASURED) - total).abs() < 1e-6);
        }
        // Two cards: 87 or 88 of 160 blocks on the first.
        assert!((86..=88).contains(&plan(2, Split::Balanced).stages[0].way.len()));
    }

    #[test]
    fn whole_steps_over_five_ranks_are_the_official_layout() {
        let official = plan(5, Split::Steps);
        let ways: Vec<_> = official.stages.iter().map(|s| s.way.clone()).collect();
        assert_eq!(ways, [0..40, 40..80, 80..120, 120..160]);
        assert_eq!(official.decoder, 4);
        let two = plan(2, Split::Steps);
        assert_eq!((two.stages[0].way.clone(), two.decoder), (0..80, 1));
        let eight = plan(8, Split::Steps);
        assert_eq!(eight.ranks(), 5, "steps cannot be cut further");
        let one = plan(1, Split::Steps);
        assert_eq!((one.stages.len(), one.decoder), (1, 0));
    }

    #[test]
    fn a_shared_sequence_has_its_decoder_where_it_costs_least() {
        let at = |ranks| {
            let layout = plan(ranks, Split::Sequence);
            (layout.stages[0].ranks.len(), layout.decoder)
        };
        assert_eq!([1, 2, 4, 5, 8].map(at), [(1, 0), (2, 1), (3, 3), (4, 4), (7, 7)]);
    }

    #[test]
    fn a_decoder_that_takes_longer_than_all_else_is_alone() {
        let costs = Costs { hearing: 0.0, step: 10.0, decode: 100.0 };
        for split in [Split::Balanced, Split::Steps] {
            let layout = Layout::plan(3, 4, 10, &costs, split).unwrap();
            layout.check(4).unwrap();
            assert_eq!(layout.loads(&costs).last(), Some(&100.0), "{layout:?}");
        }
        assert!(Layout::plan(0, 4, 10, &costs, Split::Steps).is_err());
        assert!(Layout::plan(2, 4, 10, &Costs { step: f64::NAN, ..costs }, Split::Steps).is_err());
    }

    #[test]
    fn a_decoder_of_its_own_has_no_steps() {
        for (ranks, split, stages) in [(2, Split::Balanced, 1), (3, Split::Balanced, 2), (3, Split::Sequence, 1)] {
            let layout = Layout::with_decoder_apart(ranks, 4, 40, &Costs::MEASURED, split).unwrap();
            layout.check(4).unwrap();
            assert_eq!((layout.stages.len(), layout.decoder), (stages, ranks - 1), "{split:?}");
            assert_eq!(layout.stage_of(ranks - 1), None);
        }
        assert!(Layout::with_decoder_apart(1, 4, 40, &Costs::MEASURED, Split::Steps).is_err());
    }

    #[test]
    fn ranks_are_evened_by_what_they_were_seen_to_take() {
        // Two cards at 704×384: the second is 3 % slower.
        let costs = Costs { hearing: 18.0, step: 124.0, decode: 70.0 };
        let layout = Layout::plan(2, 4, 40, &costs, Split::Balanced).unwrap();
        let slower = |l: &Layout| {
            let unit = costs.step / 40.0;
            let own = [l.stages[0].way.len() as f64 * unit, l.stages[1].way.len() as f64 * unit * 1.03];
            vec![costs.hearing + own[0], own[1] + costs.decode]
        };
        let before = slower(&layout);
        let evened = layout.evened(&before, &costs);
        evened.check(4).unwrap();
        let after = slower(&evened);
        assert!(evened.stages[0].way.len() > layout.stages[0].way.len(), "{evened:?}");
        assert!(after.iter().fold(0.0, |a: f64, b| a.max(*b)) < before[1], "{before:?} {after:?}");
        assert!((after[0] - after[1]).abs() <= 2.0 * costs.step / 40.0, "{after:?}");
        // What was seen agrees with the plan, or is nonsense: nothing changes.
        assert_eq!(layout.evened(&layout.loads(&costs), &costs), layout);
        assert_eq!(layout.evened(&[0.0, 9e9], &costs), layout);
        let shared = Layout::plan(2, 4, 40, &costs, Split::Sequence).unwrap();
        assert_eq!(shared.evened(&[300.0, 300.0], &costs), shared);
    }

    #[test]
    fn layouts_that_cannot_run_are_refused() {
        let stage = |ranks, way| Stage { ranks, way };
        let layout = |stages, decoder| Layout { stages, decoder, blocks: 10 };
        assert!(layout(vec![stage(0..2, 0..20), stage(2..4, 20..40)], 4).check(4).is_ok());
        assert!(layout(vec![stage(0..2, 0..15), stage(2..3, 15..40)], 2).check(4).is_err());
        assert!(layout(vec![stage(0..1, 0..40)], 2).check(4).is_err());
        assert!(layout(vec![stage(0..1, 0..30)], 0).check(4).is_err());
        assert!(layout(vec![stage(0..1, 0..20), stage(2..3, 20..40)], 2).check(4).is_err());
    }
}
