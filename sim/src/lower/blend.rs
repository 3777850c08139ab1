//! Caches put together from those of chunks that were read alone (`CacheBlend`): which rows go on is decided at one layer,
//! the layers above take all other tokens over.

use super::{Active, Lowering, Sequences, Setup, lane, lower};
use crate::form::Length;
use crate::load::{Group, Load, Schedule};
use crate::op::{Lane, Lanes, Op, OpKind, Phase};
use crate::policy::{Full, Policy, Reusing};
use crate::profile::Model;
use crate::program::Program;
use crate::units::Tokens;

/// Programs that read a chunk of each length that prompts of `load` have: alone, uncompressed.
pub(super) fn chunks(
    model: &Model,
    policy: &dyn Policy,
    load: &Load,
    setup: Setup,
) -> Vec<Program> {
    let mut lengths: Vec<Tokens> = Vec::new();
    for reused in load.groups.iter().filter_map(|g| policy.reuses(g.isl, model)) {
        let (whole, rest) = (reused.tokens / reused.chunk, reused.tokens % reused.chunk);
        lengths.extend((whole > 0).then_some(reused.chunk));
        lengths.extend((rest > 0).then_some(rest));
    }
    lengths.sort_unstable();
    lengths.dedup();
    let alone =
        |isl| Load::new(vec![Group { sequences: 1, isl, osl: 1, hit: 0 }], Schedule::Static);
    // Nothing about a plain prompt is refused.
    (lengths.into_iter())
        .filter_map(|isl| lower(model, &Full::default(), &alone(isl), setup).ok())
        .collect()
}

impl Lowering<'_> {
    fn reused(&self, s: &Sequences, a: &Active, phase: Phase) -> Option<Reusing> {
        let whole = phase == Phase::Prefill && a.rows == s.isl;
        self.policy.reuses(s.isl, self.model).filter(|_| whole)
    }

    /// What a class of layers takes over, if it stands above the layer that decides.
    pub(super) fn blended(
        &self,
        s: &Sequences,
        a: &Active,
        phase: Phase,
        class: usize,
    ) -> Option<Reusing> {
        let after = self.policy.forwards(s.isl, self.model)?.after;
        let above = self.classes[class].layers.first > after;
        self.reused(s, a, phase).filter(|_| above)
    }

    /// What is brought from the store for `active`.
    fn load(&self, all: &[Sequences], active: &[(&Active, Reusing)], class: usize) -> Option<Op> {
        let (_, first) = active.first()?;
        let lanes: Vec<Lane> = (active.iter())
            .map(|(a, reused)| {
                let s = &all[a.index];
                lane(s, reused.tokens, Length::settled(s.isl), s.isl)
            })
            .collect();
        let kind = OpKind::Load { heads: self.classes[class].heads, chunk: first.chunk };
        Some(self.op("load", kind, Lanes::new(&lanes)))
    }

    /// Above the layer that decides: caches are put together, and the rows that went on attend where they stand.
    pub(super) fn blend(
        &self,
        all: &[Sequences],
        active: &[Active],
        phase: Phase,
        class: usize,
        ops: &mut Vec<Op>,
    ) {
        let reused: Vec<(&Active, Reusing)> = (active.iter())
            .filter_map(|a| Some((a, self.blended(&all[a.index], a, phase, class)?)))
            .collect();
        let Some(load) = self.load(all, &reused, class) else { return };
        let heads = self.classes[class].heads;
        let rows = |a: &Active| self.rows(&all[a.index], a, phase, class);
        let blended: Lanes = (reused.iter())
            .map(|(a, _)| lane(&all[a.index], rows(a), Length::settled(0), all[a.index].isl))
            .collect();
        let attended: Lanes = (reused.iter())
            .map(|(a, reused)| {
                let s = &all[a.index];
                lane(s, rows(a), Length::with_new(s.isl, s.isl), s.isl - reused.tokens)
            })
            .collect();
        ops.push(load);
        ops.push(self.op("blend", OpKind::Blend { heads }, blended));
        ops.push(self.op("attend", OpKind::AttendRows { heads }, attended));
        if self.policy.prefetches(self.model).is_some() {
            let whole: Lanes = (reused.iter())
                .map(|(a, _)| {
                    let s = &all[a.index];
                    lane(s, s.isl, Length::with_new(s.isl, s.isl), 0)
                })
                .collect();
            ops.push(self.op("offload", OpKind::Offload { heads }, whole));
        }
    }

    /// At the layer that decides: how far values are from the stored ones.
    pub(super) fn deviate(
        &self,
        all: &[Sequences],
        active: &[Active],
        phase: Phase,
        class: usize,
        ops: &mut Vec<Op>,
    ) {
        let here = |s: &Sequences| {
            let forwards = self.policy.forwards(s.isl, self.model);
            forwards.is_some_and(|f| f.after == self.classes[class].layers.first)
        };
        let reused: Vec<(&Active, Reusing)> = (active.iter())
            .filter(|a| here(&all[a.index]))
            .filter_map(|a| Some((a, self.reused(&all[a.index], a, phase)?)))
            .collect();
        let Some(load) = self.load(all, &reused, class) else { return };
        let lanes = load.lanes.clone();
        ops.push(load);
        let kind = OpKind::Deviate { heads: self.classes[class].heads };
        ops.push(self.op("deviate", kind, lanes));
    }
}
