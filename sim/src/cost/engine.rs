//! Kernels under a serving engine: its factors on their time, its host time per step, its own deviation.

use super::{Cost, CostModel};
use crate::engine::{DeviceFactors, Generation};
use crate::op::{Family, Lane, Lanes, Op, Phase};
use crate::program::Pass;
use crate::units::{Seconds, Tokens};

/// A cost model of kernels, as an engine launches them.
pub struct UnderEngine {
    kernels: Box<dyn CostModel>,
    generation: Generation,
    /// Prompt tokens that a step takes at most.
    step_tokens: Tokens,
    /// What the engine is off by on the device.
    device: DeviceFactors,
}

impl UnderEngine {
    /// `kernels` launched by a release of an engine.
    #[must_use]
    pub fn new(
        kernels: Box<dyn CostModel>,
        generation: Generation,
        step_tokens: Tokens,
        gpu: &str,
    ) -> Self {
        let device = generation.device(gpu);
        Self { kernels, generation, step_tokens: step_tokens.max(1), device }
    }

    /// The multiple of the timed kernel's time that a launch takes.
    fn factor(&self, op: &Op, phase: Phase) -> f64 {
        let family = op.family(phase);
        let group = op.cache_heads().map_or(1, |h| h.query / h.kv.max(1));
        // Reading shares KV heads in every release; only generating took time to learn it.
        let group = if phase == Phase::Prefill { 1 } else { group };
        let device = match (family, phase) {
            (Family::Collective, _) => self.device.sums,
            (_, Phase::Prefill) => self.device.prefill,
            (_, Phase::Decode) => self.device.decode,
        };
        device * self.generation.factor(family, phase, group)
    }

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
}

impl CostModel for UnderEngine {
    fn launch(&self, op: &Op, phase: Phase, step: u32) -> Cost {
        let factor = self.factor(op, phase);
        let sliced = if phase == Phase::Prefill { self.slice(op) } else { None };
        let (cost, times) = match sliced {
            Some((part, times)) => (self.kernels.launch(&part, phase, step), times),
            None => (self.kernels.launch(op, phase, step), 1.0),
        };
        Cost { seconds: cost.seconds * factor * times, ..cost }
    }

    fn step_overhead(&self, _phase: Phase) -> Seconds {
        Seconds(self.generation.step_s)
    }

    fn pass_overhead(&self, pass: &Pass) -> Seconds {
        let g = &self.generation;
        let layers = f64::from(pass.layer_count());
        let host = g.host_s(0.0, layers);
        let embedded = pass.before.ops.first().map(|op| &op.lanes);
        let count = |of: fn(&Lanes) -> u64| embedded.map_or(0.0, |lanes| of(lanes) as f64);
        Seconds(match pass.phase {
            Phase::Prefill => host * (count(Lanes::rows) / f64::from(self.step_tokens)).max(1.0),
            Phase::Decode => host + g.sequence_s * count(Lanes::sequences),
        })
    }

    fn common_stddev(&self) -> f64 {
        self.generation.log_stddev
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::EngineFit;
    use crate::op::{DType, Heads, OpKind};
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

    fn engine() -> UnderEngine {
        let generation = Generation {
            since: 2025,
            prefill: 1.5,
            decode: 2.0,
            attention: 3.0,
            grouping: 0.5,
            first_token_decodes: false,
            small: 0.5,
            sums: 4.0,
            step_s: 1e-3,
            sequence_s: 1e-5,
            layer_s: 1e-6,
            interference: 1.0,
            devices: [("x".to_owned(), DeviceFactors { prefill: 1.1, decode: 1.2, sums: 1.3 })]
                .into(),
            log_stddev: 0.2,
            fit: EngineFit::default(),
        };
        UnderEngine::new(Box::new(PerRow), generation, 1000, "x")
    }

    fn op(sequences: u32, rows: Tokens) -> Op {
        let lane = Lane { first: 0, sequences, rows, kv: rows, keep: 0 };
        let kind = OpKind::Embed { width: 8 };
        Op { name: "embed", kind, dtype: DType::Bf16, lanes: Lanes::One(lane) }
    }

    fn pass(phase: Phase, sequences: u32, rows: Tokens) -> Pass {
        let layers = Layers { first: 0, stride: 1, count: 4 };
        Pass {
            phase,
            steps: 1,
            before: Block { layers: None, ops: vec![op(sequences, rows)] },
            layers: vec![Block { layers: Some(layers), ops: Vec::new() }],
            after_layers: Vec::new(),
            after: Block { layers: None, ops: Vec::new() },
        }
    }

    #[test]
    fn a_prefill_is_read_in_steps_and_scaled() {
        // 10 sequences of 400 rows, two to a step: five launches of 800 us; a small op, times 0.5 and the device's 1.1.
        let cost = engine().launch(&op(10, 400), Phase::Prefill, 0);
        assert!((cost.seconds - 5.0 * 800e-6 * 0.5 * 1.1).abs() < 1e-12, "{cost:?}");
        let cost = engine().launch(&op(10, 1), Phase::Decode, 0);
        assert!((cost.seconds - 10e-6 * 0.5 * 1.2).abs() < 1e-12, "{cost:?}");
    }

    #[test]
    fn each_kind_of_op_has_its_factor() {
        let seconds = |kind, phase| {
            let op = Op { kind, ..op(10, 1) };
            engine().launch(&op, phase, 0).seconds / 10e-6
        };
        let gemm = OpKind::Gemm { n: 8, k: 8, weights: DType::Bf16, accumulate: false };
        assert!((seconds(gemm, Phase::Prefill) - 1.5 * 1.1).abs() < 1e-12);
        assert!((seconds(gemm, Phase::Decode) - 2.0 * 1.2).abs() < 1e-12);
        assert!((seconds(OpKind::AllReduce { width: 8 }, Phase::Decode) - 4.0 * 1.3).abs() < 1e-12);
        // Four query heads to a KV head: 4^0.5, while tokens are generated.
        let heads = Heads { query: 8, kv: 2, dim: 8, dtype: DType::Bf16 };
        let attend = OpKind::Attend { heads, window: None };
        assert!((seconds(attend, Phase::Decode) - 3.0 * 2.0 * 1.2).abs() < 1e-12);
        assert!((seconds(attend, Phase::Prefill) - 3.0 * 1.1).abs() < 1e-12);
    }

    #[test]
    fn the_host_takes_its_time_by_step_sequence_and_layer() {
        // 1 ms + 4 layers of 1 us + 10 sequences of 10 us.
        let decode = engine().pass_overhead(&pass(Phase::Decode, 10, 1));
        assert!((decode.0 - 1.104e-3).abs() < 1e-12, "{decode:?}");
        // 4,000 rows are four steps of 1.004 ms; sequences cost nothing while prompts are read.
        let prefill = engine().pass_overhead(&pass(Phase::Prefill, 10, 400));
        assert!((prefill.0 - 4.016e-3).abs() < 1e-12, "{prefill:?}");
    }
}
