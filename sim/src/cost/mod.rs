//! How long ops take.

pub mod calibrated;
pub mod engine;
pub mod gpu;
pub mod roofline;

use crate::op::{Family, Lanes, Op, OpKind, Phase};
use crate::program::{Block, Pass, Program, site};
use crate::timeline::{Source, Span, Timeline};
use crate::units::Seconds;

pub use calibrated::Calibrated;
pub use engine::{InSteps, UnderEngine};
pub use gpu::GpuKernels;
pub use roofline::Roofline;

/// The time of one launch, and how far to trust it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Seconds.
    pub seconds: f64,
    /// Standard deviation relative to the time.
    pub relative_stddev: f64,
    /// Where it comes from.
    pub source: Source,
}

/// Whatever can say by arithmetic how long an op takes.
pub trait CostModel: Send + Sync {
    /// One launch of `op`, `step` steps into its pass.
    fn launch(&self, op: &Op, phase: Phase, step: u32) -> Cost;

    /// Time of a step beyond its ops: scheduling on the host.
    fn step_overhead(&self, phase: Phase) -> Seconds;

    /// The same for a step of `pass`, where it depends on what the step carries.
    fn pass_overhead(&self, pass: &Pass) -> Seconds {
        self.step_overhead(pass.phase)
    }

    /// Time between the end of the prompts and the first token beside the ops, where `steps` generating steps take
    /// `decode`.
    fn first_token(&self, _decode: Seconds, _steps: f64) -> Seconds {
        Seconds(0.0)
    }

    /// Relative deviation that all times of a run share, beside those of its ops.
    fn common_stddev(&self) -> f64 {
        0.0
    }

    /// Whether what [`Self::launch`] says of a transfer is all its time, which goes on beside the other ops, instead of
    /// what a run waits for.
    fn transfers_run_beside(&self) -> bool {
        true
    }
}

/// Predicts a program: each op once where nothing grows, at the nodes of a Gauss-Legendre rule where caches grow.
#[must_use]
pub fn predict(model: &dyn CostModel, program: &Program) -> Timeline {
    let mut timeline = Timeline { common: model.common_stddev(), ..Timeline::default() };
    let (mut ops, beside) = (0, model.transfers_run_beside());
    program
        .visit_passes(|_, pass, _| ops += pass.blocks().map(|(_, b)| b.ops.len()).sum::<usize>());
    timeline.spans.reserve_exact(ops);
    let (mut seen, mut decode_steps) = (Seen::new(), 0.0);
    program.visit_passes(|pass_index, pass, times| {
        let steps = f64::from(pass.steps) * times;
        seen.at = 0;
        let first = timeline.spans.len();
        let loads = |b: &Block| b.ops.iter().any(|op| matches!(op.kind, OpKind::Load { .. }));
        let by_layer = pass.blocks().any(|(_, block)| loads(block));
        for (block_index, block) in pass.blocks() {
            let start = timeline.spans.len();
            for (op_index, op) in block.ops.iter().enumerate() {
                let cost = seen.cost(model, op, pass.phase, pass.steps);
                let launches = steps * f64::from(block.times());
                // Of an op that only some sequences need, the expectation.
                let time = Seconds(cost.seconds * launches * op.branch.share());
                timeline.spans.push(Span {
                    site: site(pass_index, pass, block_index, block, op_index as u32),
                    family: op.family(pass.phase),
                    launches,
                    time,
                    stddev: time * cost.relative_stddev,
                    source: cost.source,
                });
            }
            if beside && by_layer {
                hide_transfers(&mut timeline.spans[start..]);
            }
        }
        if beside && !by_layer {
            hide_transfers(&mut timeline.spans[first..]);
        }
        timeline.overhead[pass.phase as usize] += model.pass_overhead(pass) * steps;
        decode_steps += if pass.phase == Phase::Decode { steps } else { 0.0 };
    });
    if timeline.spans.iter().any(|span| span.site.phase == Phase::Prefill) {
        let first = model.first_token(timeline.phase(Phase::Decode), decode_steps);
        timeline.overhead[Phase::Prefill as usize] += first;
    }
    timeline
}

/// Transfers run beside everything else of their step, or, where a layer can't begin without what it takes over, of a layer:
/// what counts of them is what the rest does not cover.
fn hide_transfers(spans: &mut [Span]) {
    let sum = |spans: &[Span], transfers: bool| -> f64 {
        let counted = spans.iter().filter(|s| (s.family == Family::Transfer) == transfers);
        counted.map(|s| s.time.0).sum()
    };
    let (transfers, others) = (sum(spans, true), sum(spans, false));
    if transfers > 0.0 {
        let seen = ((transfers - others) / transfers).max(0.0);
        for span in spans.iter_mut().filter(|s| s.family == Family::Transfer) {
            span.time = span.time * seen;
            span.stddev = span.stddev * seen;
        }
    }
}

/// Costs of launches that depend on their rows alone: the chunks of a prompt repeat them.
struct Seen<'p> {
    costs: Vec<(&'p OpKind, u64, Phase, Cost)>,
    /// Which of those each launch of the pass before had: passes repeat their launches in order.
    before: Vec<usize>,
    /// Launches of this pass so far.
    at: usize,
}

impl<'p> Seen<'p> {
    fn new() -> Self {
        // A decoder's launches while prompts are read, of their rest, and while tokens are generated.
        Self { costs: Vec::with_capacity(40), before: Vec::with_capacity(20), at: 0 }
    }

    fn cost(&mut self, model: &dyn CostModel, op: &'p Op, phase: Phase, steps: u32) -> Cost {
        let Lanes::One(lane) = &op.lanes else { return mean_cost(model, op, phase, steps) };
        if op.touches_cache() {
            return mean_cost(model, op, phase, steps);
        }
        let rows = u64::from(lane.sequences) * u64::from(lane.rows);
        let same = |(kind, r, p, _): &(&OpKind, u64, Phase, Cost)| {
            *r == rows && *p == phase && **kind == op.kind
        };
        let at = self.at;
        self.at += 1;
        let before = self.before.get(at).filter(|b| same(&self.costs[**b])).copied();
        let found = match before.or_else(|| self.costs.iter().position(same)) {
            Some(found) => found,
            None => {
                self.costs.push((&op.kind, rows, phase, mean_cost(model, op, phase, steps)));
                self.costs.len() - 1
            }
        };
        match self.before.get_mut(at) {
            Some(before) => *before = found,
            None => self.before.push(found),
        }
        self.costs[found].3
    }
}

/// The mean over the steps of a pass.
fn mean_cost(model: &dyn CostModel, op: &Op, phase: Phase, steps: u32) -> Cost {
    if steps == 1 || !op.touches_cache() {
        return model.launch(op, phase, 0);
    }
    if steps == 2 {
        return combine(&[(0.5, model.launch(op, phase, 0)), (0.5, model.launch(op, phase, 1))]);
    }
    // Three-point Gauss-Legendre on [-0.5, steps - 0.5]: exact for work that is affine in the cache, close for the rest.
    let half = f64::from(steps) / 2.0;
    let node = |x: f64| ((half * (1.0 + x) - 0.5).round().max(0.0) as u32).min(steps - 1);
    let reach = 0.6f64.sqrt();
    combine(&[
        (5.0 / 18.0, model.launch(op, phase, node(-reach))),
        (8.0 / 18.0, model.launch(op, phase, node(0.0))),
        (5.0 / 18.0, model.launch(op, phase, node(reach))),
    ])
}

fn combine(parts: &[(f64, Cost)]) -> Cost {
    let seconds: f64 = parts.iter().map(|(w, c)| w * c.seconds).sum();
    let spread: f64 = parts.iter().map(|(w, c)| w * c.seconds * c.relative_stddev).sum();
    Cost {
        seconds,
        relative_stddev: if seconds > 0.0 { spread / seconds } else { 0.0 },
        source: parts.iter().map(|(_, c)| c.source).max().unwrap_or_default(),
    }
}
