//! Kernels under a serving engine: its factors on their time, its host time per step, its own deviation.

use super::{Cost, CostModel};
use crate::engine::{DeviceFactors, Engine, Generation};
use crate::op::{Family, Lane, Lanes, Op, Phase};
use crate::profile::Gpu;
use crate::program::{Pass, Program};
use crate::units::{Seconds, Tokens};

/// Kernels launched in an engine's steps, before its factors: the one place that says how prompts are cut into steps and
/// how groups of layers overlap, for single programs ([`UnderEngine`]) and for whole runs ([`crate::serve`]).
#[derive(Clone, Copy)]
pub struct InSteps<'a> {
    /// The kernels.
    pub kernels: &'a dyn CostModel,
    /// Prompt tokens that a step takes at most.
    pub step_tokens: Tokens,
    /// Groups of devices that hold a part of the layers each.
    pub pp: u32,
}

impl InSteps<'_> {
    /// The part of a prompt-reading launch that fits a step, and how many such parts there are. Sequences are not cut:
    /// a prompt that is longer than a step is launched whole.
    fn slice(&self, op: &Op) -> Option<(Op, f64)> {
        let Lanes::One(lane) = op.lanes else { return None };
        let together = (self.step_tokens / lane.rows.max(1)).max(1);
        if lane.sequences <= together {
            return None;
        }
        let part = Op { lanes: Lanes::One(Lane { sequences: together, ..lane }), ..op.clone() };
        Some((part, f64::from(lane.sequences) / f64::from(together)))
    }

    /// Steps that an engine needs for a launch of `rows` prompt tokens.
    fn pieces(&self, rows: u64) -> f64 {
        (rows as f64 / f64::from(self.step_tokens.max(1))).max(1.0)
    }

    /// Steps in which the prompts of a program are read.
    #[must_use]
    pub fn prompt_steps(&self, program: &Program) -> f64 {
        let mut steps = 0.0;
        program.visit_passes(|_, pass, times| {
            if pass.phase == Phase::Prefill {
                let rows = pass.before.ops.first().map_or(0, |op| op.lanes.rows());
                steps += self.pieces(rows) * times * f64::from(pass.steps);
            }
        });
        steps
    }
}

impl CostModel for InSteps<'_> {
    fn launch(&self, op: &Op, phase: Phase, step: u32) -> Cost {
        let sliced = if phase == Phase::Prefill { self.slice(op) } else { None };
        let (cost, times) = match sliced {
            Some((part, times)) => (self.kernels.launch(&part, phase, step), times),
            None => (self.kernels.launch(op, phase, step), 1.0),
        };
        // Groups of layers work on different parts of a prompt at once.
        let overlap = if phase == Phase::Prefill && self.pp > 1 {
            let (pieces, groups) = (self.pieces(op.lanes.rows()).ceil(), f64::from(self.pp));
            (pieces + groups - 1.0) / (pieces * groups)
        } else {
            1.0
        };
        Cost { seconds: cost.seconds * times * overlap, ..cost }
    }

    fn step_overhead(&self, phase: Phase) -> Seconds {
        self.kernels.step_overhead(phase)
    }

    fn transfers_run_beside(&self) -> bool {
        self.kernels.transfers_run_beside()
    }
}

/// A cost model of kernels, as an engine launches them.
pub struct UnderEngine {
    kernels: Box<dyn CostModel>,
    generation: Generation,
    device: DeviceFactors,
    step_tokens: Tokens,
    pp: u32,
    stddev: f64,
}

impl UnderEngine {
    /// `kernels` of `gpu` launched by the newest release of an engine, on `pp` groups of devices.
    #[must_use]
    pub fn new(kernels: Box<dyn CostModel>, gpu: &Gpu, engine: &Engine, pp: u32) -> Self {
        let generation = engine.generation(None).clone();
        Self {
            kernels,
            device: generation.device(&gpu.name),
            stddev: generation.stddev_on(gpu),
            generation,
            step_tokens: engine.step_tokens.max(1),
            pp: pp.max(1),
        }
    }

    fn in_steps(&self) -> InSteps<'_> {
        InSteps { kernels: self.kernels.as_ref(), step_tokens: self.step_tokens, pp: self.pp }
    }

    /// The multiple of the timed kernel's time that a launch takes.
    fn factor(&self, op: &Op, phase: Phase) -> f64 {
        use Family::{
            Accumulate, Blend, Collective, Deviate, Evict, RankExpected, RankKeyNorm, RankKeydiff,
            RankLag, RankLast, RankRandom, RankRecency, RankTally, RankWindow, ReadState, Tally,
        };
        let family = op.family(phase);
        let device = match (family, phase) {
            (Collective, _) => self.device.sums,
            (_, Phase::Prefill) => self.device.prefill,
            (_, Phase::Decode) => self.device.decode,
        };
        // What a policy adds is no engine's: nobody has fused it with anything.
        if matches!(
            family,
            Tally
                | RankRecency
                | RankKeyNorm
                | RankKeydiff
                | RankWindow
                | RankTally
                | RankLast
                | RankRandom
                | RankLag
                | RankExpected
                | Evict
                | Accumulate
                | ReadState
                | Deviate
                | Blend
        ) {
            return device;
        }
        let group = op.cache_heads().map_or(1, |h| h.query / h.kv.max(1));
        // Reading shares KV heads in every release; only generating took time to learn it.
        let group = if phase == Phase::Prefill { 1 } else { group };
        device * self.generation.factor(family, phase, group)
    }
}

impl CostModel for UnderEngine {
    fn launch(&self, op: &Op, phase: Phase, step: u32) -> Cost {
        let cost = self.in_steps().launch(op, phase, step);
        Cost { seconds: cost.seconds * self.factor(op, phase), ..cost }
    }

    fn step_overhead(&self, _phase: Phase) -> Seconds {
        Seconds(self.generation.step_s)
    }

    fn pass_overhead(&self, pass: &Pass) -> Seconds {
        let layers = f64::from(pass.layer_count());
        let embedded = pass.before.ops.first().map(|op| &op.lanes);
        Seconds(match pass.phase {
            Phase::Prefill => {
                let steps = self.in_steps().pieces(embedded.map_or(0, Lanes::rows));
                self.generation.host_s(0.0, layers) * steps
            }
            Phase::Decode => {
                let sequences = embedded.map_or(0, Lanes::sequences);
                self.generation.host_s(sequences as f64, layers)
            }
        })
    }

    fn first_token(&self, decode: Seconds, steps: f64) -> Seconds {
        Seconds(self.generation.first_token_s(decode.0, steps))
    }

    fn common_stddev(&self) -> f64 {
        self.stddev
    }

    fn transfers_run_beside(&self) -> bool {
        self.kernels.transfers_run_beside()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{Branch, DType, Heads, OpKind, Score};
    use crate::profile::Catalog;
    use crate::program::{Block, Layers};
    use crate::timeline::Source;

    /// A microsecond a row.
    struct PerRow;
    impl CostModel for PerRow {
        fn launch(&self, op: &Op, _phase: Phase, _step: u32) -> Cost {
            let seconds = op.lanes.rows() as f64 * 1e-6;
            Cost { seconds, relative_stddev: 0.1, source: Source::Measured }
        }
        fn step_overhead(&self, _phase: Phase) -> Seconds {
            Seconds(1.0)
        }
    }

    fn engine(pp: u32) -> UnderEngine {
        let catalog = Catalog::built_in();
        let vllm = catalog.engine("vllm").expect("built in");
        let device = DeviceFactors { prefill: 1.5, decode: 2.0, sums: 1.3 };
        let generation = Generation {
            since: 2025,
            prefill: 1.5,
            decode: 2.0,
            attention: 3.0,
            grouping: 0.5,
            small: 0.5,
            sums: 4.0,
            step_s: 1e-3,
            sequence_s: 1e-5,
            layer_s: 1e-6,
            devices: [("h100-sxm".to_owned(), device)].into(),
            log_stddev: 0.2,
            ..vllm.generation(None).clone()
        };
        let engine = Engine { step_tokens: 1000, generations: vec![generation], ..vllm };
        let gpu = catalog.gpu("h100-sxm").expect("built in");
        UnderEngine::new(Box::new(PerRow), &gpu, &engine, pp)
    }

    fn op(sequences: u32, rows: Tokens) -> Op {
        let lane = Lane { sequences, rows, kv: rows, ..Lane::default() };
        let kind = OpKind::Embed { width: 8 };
        Op { name: "embed", kind, dtype: DType::Bf16, lanes: Lanes::One(lane), branch: Branch::All }
    }

    fn pass(phase: Phase, sequences: u32, rows: Tokens) -> Pass {
        let layers = Layers { first: 0, stride: 1, count: 4 };
        Pass {
            phase,
            steps: 1,
            ahead: 0,
            before: Block { layers: None, ops: vec![op(sequences, rows)] },
            layers: vec![Block { layers: Some(layers), ops: Vec::new() }],
            after_layers: Vec::new(),
            after: Block { layers: None, ops: Vec::new() },
        }
    }

    #[test]
    fn a_prefill_is_read_in_steps_and_scaled() {
        // 10 sequences of 400 rows, two to a step: five launches of 800 us, small ops of a half on a device of 1.5.
        let cost = engine(1).launch(&op(10, 400), Phase::Prefill, 0);
        assert!((cost.seconds - 5.0 * 800e-6 * 0.75).abs() < 1e-12, "{cost:?}");
        let cost = engine(1).launch(&op(10, 1), Phase::Decode, 0);
        assert!((cost.seconds - 10e-6).abs() < 1e-12, "{cost:?}");
        // Two groups of layers share four pieces: five turns of half a piece's time.
        let cost = engine(2).launch(&op(10, 400), Phase::Prefill, 0);
        assert!((cost.seconds - 4000e-6 * 0.75 * 5.0 / 8.0).abs() < 1e-12, "{cost:?}");
        assert!((engine(1).common_stddev() - 0.2).abs() < 1e-12);
    }

    #[test]
    fn each_kind_of_op_has_its_factor() {
        let seconds = |kind, phase| {
            let op = Op { kind, ..op(10, 1) };
            engine(1).launch(&op, phase, 0).seconds / 10e-6
        };
        let is = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-12, "{found}");
        let gemm = OpKind::Gemm { n: 8, k: 8, weights: DType::Bf16, accumulate: false };
        is(seconds(gemm, Phase::Prefill), 1.5 * 1.5);
        is(seconds(gemm, Phase::Decode), 2.0 * 2.0);
        is(seconds(OpKind::AllReduce { width: 8 }, Phase::Decode), 4.0 * 1.3);
        // Four query heads to a KV head: 4^0.5, while tokens are generated.
        let heads = Heads { query: 8, kv: 2, dim: 8, dtype: DType::Bf16, form: Default::default() };
        let attend = OpKind::Attend { heads, window: None };
        is(seconds(attend, Phase::Decode), 3.0 * 2.0 * 2.0);
        is(seconds(attend, Phase::Prefill), 3.0 * 1.5);
        // Ranking is the policy's own.
        let rank = OpKind::Rank { heads, by: Score::KeyNorm };
        is(seconds(rank, Phase::Decode), 2.0);
    }

    #[test]
    fn the_host_takes_its_time_by_step_sequence_and_layer() {
        // 1 ms + 4 layers of 1 us + 10 sequences of 10 us.
        let decode = engine(1).pass_overhead(&pass(Phase::Decode, 10, 1));
        assert!((decode.0 - 1.104e-3).abs() < 1e-12, "{decode:?}");
        // 4,000 rows are four steps of 1.004 ms; sequences cost nothing while prompts are read.
        let prefill = engine(1).pass_overhead(&pass(Phase::Prefill, 10, 400));
        assert!((prefill.0 - 4.016e-3).abs() < 1e-12, "{prefill:?}");
    }
}
