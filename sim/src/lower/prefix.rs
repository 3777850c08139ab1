//! Prefixes that were read earlier: what caches hold before the first step, and the program that brings them there.
//!
//! A hit is what a *finished* cache holds. The prefix is taken to have been a prompt of its own under the same policy, so
//! what is resident is what the policy leaves of it: all of it, a window, or a budget. No formula says so: the prefix is
//! lowered, and its caches are taken over.

use super::{Lowering, Sequences, Setup, header};
use crate::load::{Group, Load, Schedule};
use crate::policy::Policy;
use crate::profile::Model;
use crate::program::{Held, Node, Program};
use crate::units::Tokens;

/// The prefix of a group as a prompt of its own; its first token is thrown away.
fn alone(group: &Group) -> Group {
    Group { isl: group.hit, osl: 1, hit: 0, ..*group }
}

/// The program that reads the cached prefixes of a load, sequence by sequence, as far as it has any: what the executor runs
/// before the clock starts.
#[must_use]
pub fn lower_prefix(
    model: &Model,
    policy: &dyn Policy,
    load: &Load,
    setup: Setup,
) -> Option<Program> {
    let mut lowering = Lowering::new(model, policy, setup);
    let (mut nodes, mut groups, mut first) = (Vec::new(), Vec::new(), 0);
    for group in &load.groups {
        if group.hit > 0 {
            let mut sequences = lowering.sequences(first, &alone(group));
            lowering.prefill_staggered(&mut sequences, 1, &mut nodes);
            groups.push(alone(group));
        }
        first += group.sequences;
    }
    let load = Load::new(groups, Schedule::Staggered { prefill_batch: 1 });
    (!nodes.is_empty())
        .then(|| Program { header: header(model, policy, &load, setup, Vec::new()), nodes })
}

impl Lowering<'_> {
    /// Starts sequences behind their prefix, with the caches that it left.
    pub(super) fn take_prefix(&mut self, sequences: &mut Sequences, group: &Group) {
        let mut prefix = [self.sequences(0, &Group { sequences: 1, ..alone(group) })];
        self.prefill(&mut prefix, &mut Vec::<Node>::new());
        let [Sequences { resident, .. }] = prefix;
        sequences.shared =
            resident.iter().zip(0..).map(|(r, class)| self.shared(class, *r)).collect();
        sequences.resident = resident;
        sequences.read = group.hit;
    }

    /// Of `resident` tokens of a class, those that equal prefixes hold once: whole blocks that nobody changes.
    fn shared(&self, class: usize, resident: Tokens) -> Tokens {
        let kv = self.setup.kv;
        let changed = self.classes[class].window.is_some()
            || !self.classes[class].heads.form.is_plain()
            || self.policy.evicts();
        if kv.shares_prefix && !changed {
            resident / kv.block_tokens.max(1) * kv.block_tokens
        } else {
            0
        }
    }

    /// What the caches hold before the first step.
    pub(super) fn held(&self, all: &[Sequences]) -> Vec<Held> {
        let mut held = Vec::new();
        for s in all {
            for (index, &tokens) in s.resident.iter().enumerate() {
                if tokens > 0 {
                    let class = &self.classes[index];
                    let (layers, sequences, heads) = (class.layers.count, s.count, class.heads);
                    let shared = s.shared[index];
                    held.push(Held { layers, sequences, heads, tokens, shared });
                }
            }
        }
        held
    }
}
