//! Partial caches beside the full ones: when they are filled, what reads them.

use super::{Active, Lowering, Sequences, lane};
use crate::form::Length;
use crate::op::{Branch, Lane, Lanes, Op, OpKind, Phase, Score};
use crate::policy::{Cosine, Refreshing};
use crate::units::Tokens;

/// Whether a step compares queries, and so may fill partial caches anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparing {
    Never,
    Now,
    /// The step stands for many, of which some do.
    Averaged,
}

impl Lowering<'_> {
    /// The steps from here on in which the same sequences compare, with those noted in `active`.
    pub(super) fn compare(&self, all: &[Sequences], active: &mut [Active]) -> u32 {
        let mut alike = u32::MAX;
        for a in active {
            let s = &all[a.index];
            let Some(Refreshing { every, .. }) = self.policy.refreshes(s.isl, self.model) else {
                continue;
            };
            let (comparing, steps) = match s.generated % every {
                0 => (Comparing::Now, 1),
                since => (Comparing::Never, every - since),
            };
            a.comparing = comparing;
            alike = alike.min(steps);
        }
        alike
    }

    /// The lanes of sequences with a partial cache, each with its tokens.
    fn beside(
        &self,
        all: &[Sequences],
        active: &[Active],
        of: &dyn Fn(&Sequences, &Active) -> (Tokens, Length),
    ) -> Option<(Refreshing, Lanes)> {
        let mut first = None;
        let lanes: Vec<Lane> = (active.iter())
            .filter_map(|a| {
                let s = &all[a.index];
                let refreshing = self.policy.refreshes(s.isl, self.model)?;
                // Nothing is generated that would read it.
                if s.osl == 1 || !a.prompt_read {
                    return None;
                }
                first.get_or_insert(refreshing);
                let (rows, length) = of(s, a);
                Some(lane(s, rows, length, refreshing.tokens))
            })
            .collect();
        first.map(|refreshing| (refreshing, Lanes::new(&lanes)))
    }

    /// Fills partial caches from the attention of the newest query.
    fn fill(
        &self,
        refreshing: Refreshing,
        class: usize,
        lanes: &Lanes,
        branch: Branch,
        first: bool,
    ) -> [Op; 2] {
        let heads = self.classes[class].heads;
        let by = Score::NewestAttention { pool: refreshing.pool };
        let rank = self.op("rank", OpKind::Rank { heads, by }, lanes.clone());
        let refresh = self.op("refresh", OpKind::Refresh { heads, first }, lanes.clone());
        [rank, refresh].map(|op| Op { branch, ..op })
    }

    /// The comparison of queries, which notes the first one.
    fn note(&self, cosine: Cosine, class: usize, lanes: &Lanes) -> Op {
        let kind = OpKind::Compare { heads: self.classes[class].heads, below: cosine.thousandths };
        self.op("compare", kind, lanes.clone())
    }

    /// At the end of a prompt: partial caches are filled for the first time. The ops belong behind the attention.
    pub(super) fn first_fill(&self, all: &[Sequences], active: &[Active], class: usize) -> Vec<Op> {
        let whole = |s: &Sequences, a: &Active| {
            let added = self.added(s, a, Phase::Prefill, class);
            let length = Length::with_new(s.resident[class].saturating_add(added), added);
            (self.rows(s, a, Phase::Prefill, class), length)
        };
        let Some((refreshing, lanes)) = self.beside(all, active, &whole) else {
            return Vec::new();
        };
        let mut ops: Vec<Op> =
            refreshing.below.map(|cosine| self.note(cosine, class, &lanes)).into_iter().collect();
        ops.extend(self.fill(refreshing, class, &lanes, Branch::All, true));
        ops
    }

    /// The attention of a decode step with partial caches: first of sequences that compare, then of the others.
    pub(super) fn attend_part(
        &self,
        all: &[Sequences],
        active: &[Active],
        class: usize,
    ) -> Option<Vec<Op>> {
        let (never, comparing): (Vec<Active>, Vec<Active>) =
            active.iter().copied().partition(|a| a.comparing == Comparing::Never);
        let parts = [comparing, never].map(|part| self.attend_part_alike(all, &part, class));
        parts.iter().any(Option::is_some).then(|| parts.into_iter().flatten().flatten().collect())
    }

    /// The same where all compare, or none.
    fn attend_part_alike(
        &self,
        all: &[Sequences],
        active: &[Active],
        class: usize,
    ) -> Option<Vec<Op>> {
        let heads = self.classes[class].heads;
        let whole = |s: &Sequences, a: &Active| {
            (a.rows, Length::with_new(s.resident[class].saturating_add(a.rows), a.rows))
        };
        let (refreshing, lanes) = self.beside(all, active, &whole)?;
        let every = refreshing.every.max(1);
        let expected = refreshing.below.map_or(1000, |c| c.share);
        let share = match active.first().map(|a| a.comparing) {
            Some(Comparing::Now) => Some(expected),
            Some(Comparing::Averaged) => Some(expected / every),
            _ => None,
        };
        let mut ops = vec![self.op("append_part", OpKind::AppendPart { heads }, lanes.clone())];
        let attend_part = self.op("attend_part", OpKind::AttendPart { heads }, lanes.clone());
        let Some(share) = share else {
            ops.push(attend_part);
            return Some(ops);
        };
        ops.extend(refreshing.below.map(|cosine| self.note(cosine, class, &lanes)));
        // A step that stands for many is one of both kinds even where nothing depends on a comparison.
        let always = refreshing.below.is_none() && share == 1000;
        let stale = if always { Branch::All } else { Branch::Stale { share } };
        let attend = OpKind::Attend { heads, window: None };
        let seen = self.lanes(all, active, |s, a| whole(s, a));
        ops.push(Op { branch: stale, ..self.op("attend", attend, seen) });
        ops.extend(self.fill(refreshing, class, &lanes, stale, false));
        if !always {
            let branch = Branch::Fresh { share: 1000u32.saturating_sub(share) };
            ops.push(Op { branch, ..attend_part });
        }
        Some(ops)
    }

    /// Queries that are compared before their rotation are compared there.
    pub(super) fn compare_early(&self, all: &[Sequences], active: &[Active], ops: &mut Vec<Op>) {
        let of =
            active.first().and_then(|a| self.policy.refreshes(all[a.index].isl, self.model)?.below);
        if of.is_none_or(|cosine| !cosine.before_rope) {
            return;
        }
        let place = |name: &str| ops.iter().position(|op| op.name == name);
        if let (Some(from), Some(to)) = (place("compare"), place("rope"))
            && to < from
        {
            let op = ops.remove(from);
            ops.insert(to, op);
        }
    }
}
