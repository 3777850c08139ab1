//! One pass: the ops of every class of layers, with what the policy says in them.

use super::{Active, Lowering, Sequences, lane};
use crate::form::Length;
use crate::kv::Verb;
use crate::op::{Lanes, Op, OpKind, Phase};
use crate::program::{Block, Node, Pass};
use crate::units::Tokens;

/// One class of layers in a pass.
struct Emitted {
    block: Block,
    /// Cache work after the whole pass.
    late: Block,
    /// Tokens that stay per active sequence.
    stay: Vec<Tokens>,
}

impl Lowering<'_> {
    /// Appends one pass of `steps` steps and moves the caches on.
    pub(super) fn emit(
        &mut self,
        all: &mut [Sequences],
        active: &[Active],
        phase: Phase,
        steps: u32,
        release: bool,
        nodes: &mut Vec<Node>,
    ) {
        let embedded = self.lanes(all, active, &|_, a| (a.rows, Length::settled(0)));
        let embed = self.op("embed", OpKind::Embed { width: self.model.hidden }, embedded);
        let before = Block { layers: None, ops: vec![embed] };
        let mut layers = Vec::with_capacity(self.classes.len());
        let mut after_layers = Vec::new();
        let mut stay: Vec<Vec<Tokens>> = Vec::with_capacity(self.classes.len());
        for class in 0..self.classes.len() {
            let emitted = self.class(all, active, phase, release, class);
            layers.push(emitted.block);
            stay.push(emitted.stay);
            if !emitted.late.ops.is_empty() {
                after_layers.push(emitted.late);
            }
        }
        let after = Block { layers: None, ops: self.head(all, active) };
        let pass = Pass { phase, steps, before, layers, after_layers, after };
        nodes.push(Node::Pass(Box::new(pass)));
        for (class, stays) in stay.iter().enumerate() {
            for (a, left) in active.iter().zip(stays) {
                let grown = if self.classes[class].reads.is_some() {
                    0
                } else {
                    a.rows.saturating_mul(steps - 1)
                };
                all[a.index].resident[class] = left.saturating_add(grown);
            }
        }
    }

    /// Lanes of the active sequences with their rows and the cache before the op.
    fn lanes(
        &self,
        all: &[Sequences],
        active: &[Active],
        of: &dyn Fn(&Sequences, &Active) -> (Tokens, Length),
    ) -> Lanes {
        let lanes: Vec<_> = (active.iter())
            .map(|a| {
                let s = &all[a.index];
                let (rows, length) = of(s, a);
                lane(s, rows, length, 0)
            })
            .collect();
        Lanes::new(&lanes)
    }

    fn class(
        &mut self,
        all: &[Sequences],
        active: &[Active],
        phase: Phase,
        release: bool,
        class: usize,
    ) -> Emitted {
        let mut verbs = std::mem::take(&mut self.verbs);
        let heads = self.classes[class].heads;
        // A class without caches attends over those it reads, which hold this step's tokens already.
        let cache = self.classes[class].reads.unwrap_or(class);
        let rows_of = |s: &Sequences, a: &Active| self.rows(s, a, phase, class);
        let rows = self.lanes(all, active, &|s, a| (rows_of(s, a), Length::settled(0)));
        let appended =
            self.lanes(all, active, &|s, a| (rows_of(s, a), Length::settled(s.resident[class])));
        let seen = self.lanes(all, active, &|s, a| {
            let rows = rows_of(s, a);
            (rows, Length::with_new(s.resident[cache].saturating_add(rows), rows))
        });
        let (mut spoken, mut late) = (Vec::new(), Vec::new());
        let mut stay = Vec::with_capacity(active.len());
        let has_cache = self.classes[class].reads.is_none();
        for a in active {
            let s = &all[a.index];
            if !has_cache {
                stay.push(0);
                continue;
            }
            let step = self.step(s, a, phase, class);
            let tokens = s.resident[class].saturating_add(step.rows);
            let (left, split) = self.hooks(&step, class, tokens, &mut verbs);
            stay.push(left);
            self.merge(&mut spoken, &verbs[..split], s, step.rows);
            self.merge(&mut late, &verbs[split..], s, step.rows);
            if release && s.generated + 1 == s.osl {
                let (kind, length) = (OpKind::Release { heads }, Length::settled(left));
                let verb = Verb { name: "release", kind, length, keep: s.shared[class] };
                self.merge(&mut late, &[verb], s, step.rows);
            }
        }
        self.verbs = verbs;
        let at = Some(self.classes[class].layers);
        let mut ops = self.layer(&rows, class, appended, seen, spoken);
        ops.extend(self.forward(all, active, phase, class));
        Emitted { block: Block { layers: at, ops }, late: Block { layers: at, ops: late }, stay }
    }

    /// Behind the layer after which only some rows go on: their choice.
    fn forward(
        &self,
        all: &[Sequences],
        active: &[Active],
        phase: Phase,
        class: usize,
    ) -> Option<Op> {
        if phase == Phase::Decode {
            return None;
        }
        let mut recent = 0;
        let lanes: Vec<_> = (active.iter())
            .filter_map(|a| {
                let s = &all[a.index];
                let forwards = self.policy.forwards(s.isl, self.model)?;
                let here = self.classes[class].layers.first == forwards.after;
                recent = forwards.recent;
                (here && a.rows == s.isl && forwards.rows < a.rows)
                    .then(|| lane(s, a.rows, Length::settled(0), forwards.rows))
            })
            .collect();
        let kind = OpKind::Forward { width: self.model.hidden, recent };
        (!lanes.is_empty()).then(|| self.op("forward", kind, Lanes::new(&lanes)))
    }

    /// Adds one lane's verbs to the ops of its layer, joining it to equal verbs of other lanes in order.
    fn merge(&self, ops: &mut Vec<Op>, verbs: &[Verb], s: &Sequences, rows: Tokens) {
        let mut cursor = 0;
        for verb in verbs {
            let lane = lane(s, rows, verb.length, verb.keep);
            match ops[cursor..].iter().position(|op| op.kind == verb.kind) {
                Some(found) => {
                    ops[cursor + found].lanes.push(lane);
                    cursor += found + 1;
                }
                None => {
                    ops.insert(cursor, self.op(verb.name, verb.kind, Lanes::One(lane)));
                    cursor += 1;
                }
            }
        }
    }
}
