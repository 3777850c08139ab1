//! Rows that speculate on the next token, so that the step after can be prepared for.

use super::refresh::Comparing;
use super::{Active, Lowering, Sequences, lane};
use crate::form::Length;
use crate::op::{Lane, Lanes, Op, OpKind, Phase};
use crate::program::Node;
use crate::units::Tokens;

impl Lowering<'_> {
    /// Rows that speculate in a decode step.
    pub(super) fn ahead(&self) -> Tokens {
        Tokens::from(self.policy.prefetches(self.model).is_some())
    }

    /// Before the first decode step: the first tokens go through the layers once to see what comes after them.
    pub(super) fn look_ahead(&mut self, all: &mut [Sequences], nodes: &mut Vec<Node>) {
        let ahead = self.ahead();
        let active: Vec<Active> = (all.iter().enumerate())
            .filter(|(_, s)| s.generated < s.osl)
            .map(|(index, _)| Active {
                index,
                rows: 0,
                prompt_read: true,
                comparing: Comparing::Never,
                ahead,
            })
            .collect();
        if ahead > 0 && !active.is_empty() {
            self.emit(all, &active, Phase::Decode, 1, false, nodes);
        }
    }

    /// Lanes of the step's own rows over the caches that hold them.
    fn over_caches(
        &self,
        all: &[Sequences],
        active: &[Active],
        class: usize,
        keep: Tokens,
    ) -> Lanes {
        let of = |a: &Active| -> Lane {
            let s = &all[a.index];
            let tokens = s.resident[class].saturating_add(a.rows);
            lane(s, a.rows, Length::with_new(tokens, a.rows), keep)
        };
        Lanes::new(&active.iter().map(of).collect::<Vec<_>>())
    }

    /// Tokens go to slower memory as long as they are whole: the ops belong right behind the attention.
    pub(super) fn offload(&self, all: &[Sequences], active: &[Active], class: usize) -> Option<Op> {
        self.policy.prefetches(self.model)?;
        // The first look ahead brings nothing new.
        if active.iter().all(|a| a.rows == 0) {
            return None;
        }
        let heads = self.classes[class].heads;
        let lanes = self.over_caches(all, active, class, 0);
        Some(self.op("offload", OpKind::Offload { heads }, lanes))
    }

    /// The attention of a decode step with a row that speculates, and what it fetches for the next.
    pub(super) fn attend_ahead(
        &self,
        all: &[Sequences],
        active: &[Active],
        class: usize,
    ) -> Option<Vec<Op>> {
        let prefetching = self.policy.prefetches(self.model)?;
        let heads = self.classes[class].heads;
        let lanes = self.over_caches(all, active, class, prefetching.tokens);
        let foresee = OpKind::Foresee { heads, whole: prefetching.whole };
        let mut ops = vec![
            self.op("attend_ahead", OpKind::AttendAhead { heads }, lanes.clone()),
            self.op("foresee", foresee, lanes.clone()),
            self.op("fetch", OpKind::Fetch { heads }, lanes),
        ];
        // First to slower memory, then back: what is fetched may be new.
        if let Some(offload) = self.offload(all, active, class) {
            ops.insert(2, offload);
        }
        Some(ops)
    }
}
