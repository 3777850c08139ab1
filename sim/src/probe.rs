//! The grid of single passes that a profile times.
//!
//! A probe is one pass of a model of few layers over caches that are already filled, lowered by the same code as a whole
//! run. So kernels are timed where they will run, between the ops that will surround them, with the weights of other
//! layers in between: a kernel timed alone in a loop finds its weights in the cache and lies.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::cost::calibrated::{Key, features};
use crate::load::{Group, Load, Schedule};
use crate::lower::{Setup, lower, lower_pass};
use crate::op::{Family, Phase};
use crate::policy::{
    AnyScore, Budget, By, Chance, Cut, Evicting, Expected, Full, Lagging, LastQuery, Policy,
    Scoring,
};
use crate::profile::Model;
use crate::program::Program;
use crate::units::Tokens;

/// One pass to time.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The pass.
    pub program: Program,
    /// Tokens that every cache holds before it.
    pub resident: Tokens,
    /// Roofline-free estimate of its length, for progress bars: rows x layers x (1 + a share of the attention).
    pub weight: f64,
}

/// How large the grid may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GridLimits {
    /// Cached tokens over all sequences, at most: bounds the memory of the profile.
    pub cached_tokens: u64,
    /// Rows of a step, at most.
    pub rows: u32,
}

impl Default for GridLimits {
    fn default() -> Self {
        Self { cached_tokens: 48 * 1024, rows: 4096 }
    }
}

fn probe(
    model: &Model,
    layers: u32,
    policy: &dyn Policy,
    setup: Setup,
    phase: Phase,
    (sequences, rows, resident): (u32, Tokens, Tokens),
) -> Probe {
    let mut shallow = model.clone();
    shallow.layers = layers.min(model.layers);
    let group = Group { sequences, isl: resident + rows, osl: 2, hit: 0 };
    let load = Load::new(vec![group], Schedule::Static);
    let program = lower_pass(&shallow, policy, &load, setup, phase, rows, resident);
    let work = f64::from(sequences) * f64::from(rows) * f64::from(shallow.layers);
    Probe { program, resident, weight: work * (1.0 + f64::from(resident + rows) / 4000.0) + 20.0 }
}

/// A policy that cuts every cache of `tokens` to `keep` in this very pass.
fn cutting<S: Scoring>(by: S, keep: Tokens) -> Box<dyn Policy> {
    let whole = by.whole_prompt();
    let cut = Cut {
        budget: Budget::Tokens(keep),
        chunk: (!whole).then_some(Tokens::MAX),
        sinks: 4.min(keep / 2),
        recent: 32.min(keep / 2),
        decode: !whole,
        ..Cut::default()
    };
    Box::new(Evicting { cut, by })
}

/// One evicting policy per ranking, at a budget of `keep` tokens.
fn rankings(keep: Tokens) -> Vec<Box<dyn Policy>> {
    let mut all: Vec<_> = [By::Recency, By::KeyNorm, By::Keydiff, By::WindowSnap, By::TallySum]
        .map(|by| cutting(AnyScore { by, ..AnyScore::default() }, keep))
        .into();
    all.push(cutting(LastQuery::default(), keep));
    all.push(cutting(Chance::default(), keep));
    all.push(cutting(Lagging::default(), keep));
    all.push(cutting(Expected::default(), keep));
    all
}

/// The kernels of a program: what a profile must know to predict it.
fn kernels(program: &Program) -> BTreeSet<(Family, Key)> {
    let mut all = BTreeSet::new();
    program.visit_passes(|_, pass, _| {
        for (_, block) in pass.blocks() {
            all.extend(block.ops.iter().map(|op| (op.family(pass.phase), features(op, 0).key)));
        }
    });
    all
}

/// A whole short run of a shallow model: for policies whose caches no filling can imitate.
fn short_run(
    model: &Model,
    policy: &dyn Policy,
    setup: Setup,
    (sequences, isl): (u32, Tokens),
) -> Option<Probe> {
    let group = Group { sequences, isl, osl: 5, hit: 0 };
    let load = Load::new(vec![group], Schedule::Static);
    let program = lower(model, policy, &load, setup).ok()?;
    let work = f64::from(sequences) * f64::from(isl) * f64::from(model.layers);
    Some(Probe { program, resident: 0, weight: work * (1.0 + f64::from(isl) / 4000.0) + 20.0 })
}

/// The default grid for a model's shapes: decode over batch and cache, prefill over chunk and prefix, evictions of every
/// score, and short runs of those `policies` that use a kernel which no other probe meets. A policy that can't serve
/// the model, or only longer prompts than a profile reads, is passed over.
#[must_use]
pub fn grid(
    model: &Model,
    setup: Setup,
    limits: GridLimits,
    policies: &[Arc<dyn Policy>],
) -> Vec<Probe> {
    let mut probes = shared(model, setup, limits);
    let mut known: BTreeSet<_> = probes.iter().flat_map(|p| kernels(&p.program)).collect();
    // Maps of layers are of the whole model; a shallow one has none.
    let shallow =
        Model { name: "shallow".to_owned(), layers: model.layers.min(8), ..model.clone() };
    for policy in policies {
        let policy = policy.as_ref();
        let runs: Vec<Probe> = [(1, 512), (4, 512), (1, 2048), (2, 1024), (8, 256)]
            .into_iter()
            .filter(|(sequences, isl)| {
                u64::from(*sequences) * u64::from(*isl) <= limits.cached_tokens
                    && sequences * isl <= limits.rows
                    && isl + 5 < model.context
            })
            .filter_map(|at| short_run(&shallow, policy, setup, at))
            .collect();
        let met: BTreeSet<_> = runs.iter().flat_map(|p| kernels(&p.program)).collect();
        if !met.is_subset(&known) {
            known.extend(met);
            probes.extend(runs);
        }
    }
    probes
}

/// Two passes of the whole model whose kernels a profile has timed at these very sizes, one while reading, one while
/// generating: timed again, they say at which pace the machine runs now.
#[must_use]
pub fn yardsticks(model: &Model, setup: Setup) -> [Probe; 2] {
    let of = |phase, at| probe(model, model.layers, &Full::default(), setup, phase, at);
    [of(Phase::Prefill, (1, 512, 0)), of(Phase::Decode, (4, 1, 383))]
}

/// What every policy shares, and the rankings.
fn shared(model: &Model, setup: Setup, limits: GridLimits) -> Vec<Probe> {
    let full = Full::default();
    let mut probes = Vec::new();
    let fits = |sequences: u32, kv: u32| {
        u64::from(sequences) * u64::from(kv) <= limits.cached_tokens && kv < model.context
    };
    // Enough layers that the weights of one pass leave no trace in the caches before the next one needs them.
    let deep = 12;
    for batch in [1, 2, 3, 4, 5, 6, 8, 11, 16, 23, 32] {
        for kv in [1u32, 127, 383, 767, 1535, 2303, 4095] {
            if fits(batch, kv + 1) {
                probes.push(probe(model, deep, &full, setup, Phase::Decode, (batch, 1, kv)));
            }
        }
    }
    for rows in [16u32, 48, 128, 256, 512, 1024, 2048] {
        for prefix in [0u32, 256, 512, 1024, 2048] {
            if rows <= limits.rows && rows + prefix <= 3072 && fits(1, rows + prefix) {
                let layers = (8192 / rows).clamp(2, deep);
                probes.push(probe(model, layers, &full, setup, Phase::Prefill, (1, rows, prefix)));
            }
        }
    }
    for (sequences, rows, prefix) in
        [(2, 256, 512), (4, 256, 512), (8, 256, 256), (4, 512, 0), (2, 2048, 0)]
    {
        if sequences * rows <= limits.rows && fits(sequences, rows + prefix) {
            probes.push(probe(model, 3, &full, setup, Phase::Prefill, (sequences, rows, prefix)));
        }
    }
    // In decode a cache some tokens over its budget, in prefill one chunk over it, or a whole prompt. What ranks by a whole
    // prompt is met in no other case.
    for (sequences, kv, over) in [
        (1, 128, 1),
        (1, 512, 32),
        (1, 1024, 32),
        (2, 512, 32),
        (5, 512, 32),
        (8, 256, 32),
        (16, 512, 1),
        (16, 128, 32),
        (5, 1024, 1),
    ] {
        if fits(sequences, kv + over) {
            for policy in rankings(kv).iter().filter(|p| p.acts_in_decode()) {
                let at = (sequences, 1, kv + over - 1);
                probes.push(probe(model, 4, policy.as_ref(), setup, Phase::Decode, at));
            }
        }
    }
    for (sequences, keep, rows) in [
        (1, 128, 128),
        (1, 256, 256),
        (1, 512, 256),
        (1, 1024, 256),
        (4, 512, 256),
        (8, 128, 128),
        (1, 512, 64),
    ] {
        if fits(sequences, keep + rows) {
            for policy in rankings(keep).iter().filter(|p| p.prefill_chunk().is_some()) {
                let at = (sequences, rows, keep);
                probes.push(probe(model, 3, policy.as_ref(), setup, Phase::Prefill, at));
            }
        }
    }
    for (sequences, rows, keep) in [(1, 512, 128), (1, 1024, 256), (1, 2048, 512), (2, 1024, 512)] {
        if fits(sequences, rows) {
            for policy in rankings(keep) {
                let at = (sequences, rows, 0);
                probes.push(probe(model, 2, policy.as_ref(), setup, Phase::Prefill, at));
            }
        }
    }
    probes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::DType;
    use crate::policy::{Kivi, SnapKv};
    use crate::profile::Catalog;

    fn setup() -> Setup {
        Setup {
            kv: crate::kv::KvLayout { dtype: DType::F16, block_tokens: 32, shares_prefix: false },
            weights: DType::F32,
            activations: DType::F32,
            head: DType::F32,
            tp: 1,
        }
    }

    #[test]
    fn yardsticks_are_points_of_the_grid() {
        let model = Catalog::built_in().model("smollm2-135m").expect("built in");
        let at = |probe: &Probe| {
            let mut all = Vec::new();
            probe.program.visit_passes(|_, pass, _| {
                for (_, block) in pass.blocks() {
                    all.extend(block.ops.iter().map(|op| {
                        let features = features(op, 0);
                        format!(
                            "{:?} {:?} {:?}",
                            op.family(pass.phase),
                            features.key,
                            features.parts
                        )
                    }));
                }
            });
            all.sort();
            all
        };
        let timed: BTreeSet<String> =
            grid(&model, setup(), GridLimits::default(), &[]).iter().flat_map(at).collect();
        for yardstick in yardsticks(&model, setup()) {
            assert!(at(&yardstick).iter().all(|point| timed.contains(point)));
        }
    }

    #[test]
    fn policies_with_kernels_of_their_own_are_run_and_no_others() {
        let model = Catalog::built_in().model("smollm2-135m").expect("built in");
        let setup = setup();
        let count = |policies: &[Arc<dyn Policy>]| {
            grid(&model, setup, GridLimits::default(), policies).len()
        };
        let shared = count(&[]);
        let kivi = |bits| Arc::new(Kivi { bits, group: 32, residual: 32, swapped: false });
        let snap = Arc::new(SnapKv::new(Budget::Share(0.25)));
        assert_eq!(count(&[Arc::new(Full::default()), snap]), shared);
        // Five runs for each number of bits, once.
        assert_eq!(count(&[kivi(4), kivi(4)]), shared + 5);
        assert_eq!(count(&[kivi(4), kivi(2)]), shared + 10);
    }
}
