//! One pass: the ops of every class of layers, with what the policy says in them.

use super::classes::Class;
use super::{Active, Lowering, Sequences, lane};
use crate::form::Length;
use crate::kv::Verb;
use crate::op::{Lane, Lanes, Op, OpKind, Phase, Pick};
use crate::program::{Block, Node, Pass};
use crate::units::Tokens;

/// Rounds of k-means, as in `ClusterKV`'s code.
const CLUSTER_ROUNDS: u32 = 20;

/// One class of layers in a pass.
struct Emitted {
    block: Block,
    /// Cache work after the whole pass.
    late: Block,
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
        let embedded = self.lanes(all, active, |_, a| (a.rows + a.ahead, Length::settled(0)));
        let embed = self.op("embed", OpKind::Embed { width: self.model.hidden }, embedded);
        let before = Block { layers: None, ops: vec![embed] };
        let mut layers = Vec::with_capacity(self.classes.len());
        let mut after_layers = Vec::new();
        self.stay.clear();
        for class in 0..self.classes.len() {
            let emitted = self.class(all, active, phase, release, class);
            layers.push(emitted.block);
            if !emitted.late.ops.is_empty() {
                after_layers.push(emitted.late);
            }
        }
        let after = Block { layers: None, ops: self.head(all, active) };
        let ahead = active.first().map_or(0, |a| a.ahead);
        let pass = Pass { phase, steps, ahead, before, layers, after_layers, after };
        nodes.push(Node::Pass(Box::new(pass)));
        for (class, stays) in self.stay.chunks_exact(active.len().max(1)).enumerate() {
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
    pub(super) fn lanes(
        &self,
        all: &[Sequences],
        active: &[Active],
        of: impl Fn(&Sequences, &Active) -> (Tokens, Length),
    ) -> Lanes {
        active
            .iter()
            .map(|a| {
                let s = &all[a.index];
                let (rows, length) = of(s, a);
                lane(s, rows, length, 0)
            })
            .collect()
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
        let rows = self.lanes(all, active, |s, a| (rows_of(s, a) + a.ahead, Length::settled(0)));
        let (apart, together): (Vec<Active>, Vec<Active>) = (active.iter().copied())
            .partition(|a| self.blended(&all[a.index], a, phase, class).is_some());
        let appended =
            self.lanes(all, &together, |s, a| (rows_of(s, a), Length::settled(s.resident[class])));
        let seen = self.lanes(all, &together, |s, a| {
            let rows = rows_of(s, a);
            (rows, Length::with_new(s.resident[cache].saturating_add(rows), rows))
        });
        let (mut spoken, mut late) = (std::mem::take(&mut self.spoken), Vec::new());
        let has_cache = self.classes[class].reads.is_none();
        for a in active {
            let s = &all[a.index];
            if !has_cache {
                self.stay.push(0);
                continue;
            }
            let step = self.step(s, a, phase, class);
            let added = self.added(s, a, phase, class);
            let tokens = s.resident[class].saturating_add(added);
            let (left, split) = self.hooks(&step, class, (tokens, added), &mut verbs);
            self.stay.push(left);
            self.merge(&mut spoken, &verbs[..split], s, step.rows);
            self.merge(&mut late, &verbs[split..], s, step.rows);
            if release && a.prompt_read && s.generated + 1 == s.osl {
                let (kind, length) = (OpKind::Release { heads }, Length::settled(left));
                let verb = Verb { name: "release", kind, length, keep: s.shared[class] };
                self.merge(&mut late, &[verb], s, step.rows);
                let fetched = self.policy.prefetches(self.model).map(|p| p.tokens);
                let copied = self.policy.refreshes(s.isl, self.model).map(|r| r.tokens);
                // Beside an answer of one token there was no partial cache.
                if let Some(keep) = fetched.or(copied).filter(|_| s.osl > 1) {
                    let kind = OpKind::ReleasePart { heads };
                    let verb = Verb { name: "release_part", kind, length, keep };
                    self.merge(&mut late, &[verb], s, step.rows);
                }
            }
        }
        self.verbs = verbs;
        let at = Some(self.classes[class].layers);
        let stay = &self.stay[self.stay.len() - active.len()..];
        spoken.extend(self.index(all, active, phase, class, stay));
        if phase == Phase::Prefill {
            spoken.extend(self.first_fill(all, active, class));
        }
        // Last: rows go on by these scores, and rankings for the cache would take their place.
        self.deviate(all, active, phase, class, &mut spoken);
        let attend = |ops: &mut Vec<Op>| {
            if !seen.as_slice().is_empty() {
                self.attend(all, &together, phase, class, seen, ops);
            }
            self.blend(all, &apart, phase, class, ops);
        };
        let mut ops = self.layer(&rows, class, appended, attend, &mut spoken);
        self.compare_early(all, active, &mut ops);
        if together.iter().all(|a| a.rows == 0) {
            ops.retain(|op| !matches!(op.kind, OpKind::Append { .. }));
        }
        ops.extend(self.forward(all, active, phase, class));
        self.spoken = spoken;
        Emitted { block: Block { layers: at, ops }, late: Block { layers: at, ops: late } }
    }

    /// The attention of a class: over its caches, or over what a decode step chooses of them.
    fn attend(
        &self,
        all: &[Sequences],
        active: &[Active],
        phase: Phase,
        class: usize,
        seen: Lanes,
        ops: &mut Vec<Op>,
    ) {
        let Class { heads, window, layers, .. } = self.classes[class];
        if phase == Phase::Decode {
            let otherwise = self.attend_part(all, active, class);
            if let Some(part) = otherwise.or_else(|| self.attend_ahead(all, active, class)) {
                ops.extend(part);
                return;
            }
        }
        let reading = |a: &Active| {
            let s = &all[a.index];
            self.policy.reads(layers.first, s.isl, self.model).map(|r| (r, s.isl))
        };
        let Some((first, _)) = active.first().and_then(reading).filter(|_| phase == Phase::Decode)
        else {
            ops.push(self.op("attend", OpKind::Attend { heads, window }, seen));
            ops.extend(self.offload(all, active, class));
            return;
        };
        let by = first.by;
        let lanes: Lanes = (seen.as_slice().iter().zip(active))
            .map(|(lane, a)| {
                let (tokens, isl) = reading(a).map_or((lane.kv, 0), |(r, isl)| (r.tokens, isl));
                // Clusters are made of the prompt.
                let keep = by.chosen(tokens, lane.kv.saturating_sub(isl));
                // Later steps of the pass may read more than the first one has.
                Lane { keep, ..*lane }
            })
            .collect();
        if let Pick::Bounds { page, .. } | Pick::Shares { page, .. } = by {
            ops.push(self.op("index", OpKind::Index { heads, page }, lanes.clone()));
        }
        ops.push(self.op("select", OpKind::Select { heads, by }, lanes.clone()));
        ops.push(self.op("attend", OpKind::AttendChosen { heads, by }, lanes));
    }

    /// At the end of a prompt: what later steps choose by.
    fn index(
        &self,
        all: &[Sequences],
        active: &[Active],
        phase: Phase,
        class: usize,
        stay: &[Tokens],
    ) -> Option<Op> {
        let Class { heads, layers, .. } = self.classes[class];
        if phase == Phase::Decode {
            return None;
        }
        let mut kind = None;
        let lanes: Vec<Lane> = (active.iter().zip(stay))
            .filter_map(|(a, stay)| {
                let s = &all[a.index];
                let reading = self.policy.reads(layers.first, s.isl, self.model)?;
                if !a.prompt_read {
                    return None;
                }
                let (made, keep) = match reading.by {
                    Pick::Bounds { page, .. } | Pick::Shares { page, .. } => {
                        (OpKind::Index { heads, page }, 0)
                    }
                    Pick::Clusters { sinks, per_cluster } => {
                        let clustered = stay.saturating_sub(sinks);
                        let kind = OpKind::Cluster { heads, sinks, rounds: CLUSTER_ROUNDS };
                        (kind, (s.isl / per_cluster.max(1)).clamp(1, clustered.max(1)))
                    }
                };
                kind = Some(made);
                // An index is built of all that stays.
                Some(lane(s, *stay, Length::settled(*stay), keep))
            })
            .collect();
        kind.map(|kind| self.op("index", kind, Lanes::new(&lanes)))
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
