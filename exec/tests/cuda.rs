//! The CUDA engine over kernels that run on the CPU against the CPU engine: same tokens, logits, kept positions and bytes.
#![allow(clippy::print_stderr, reason = "a skipped test says so")]

mod common;
#[path = "cuda/policies.rs"]
mod policies;
#[path = "cuda/real.rs"]
mod real;
#[path = "cuda/recorded.rs"]
mod recorded;
#[path = "cuda/runs.rs"]
mod runs;
#[path = "cuda/together.rs"]
mod together;

use std::sync::atomic::AtomicBool;

use batchmax_exec::cuda::CudaEngine;
use batchmax_exec::engine::RunResult;
use batchmax_exec::weights::Weights;
use batchmax_exec::{Engine, RunOptions, load_of};
use batchmax_kernels::cuda::CudaError;
use batchmax_kernels::cuda::emulated::{Emulated, Settings};
use batchmax_kernels::gemm::{Packed, WeightFormat};
use batchmax_sim::load::{Hit, Load, Schedule};
use batchmax_sim::lower::{Setup, lower, lower_prefix};
use batchmax_sim::op::DType;
use batchmax_sim::policy::Preset;
use batchmax_sim::profile::{Catalog, Model};
use batchmax_sim::program::Program;
use common::{made_up, setup, small_model};

/// A device, unless there is no compiler.
pub(crate) fn device() -> Option<Emulated> {
    device_with(Settings::default())
}

/// A device that does its work otherwise.
pub(crate) fn device_with(settings: Settings) -> Option<Emulated> {
    match Emulated::new(settings) {
        Ok(device) => Some(device),
        Err(CudaError::Unavailable { why }) => {
            eprintln!("SKIPPED: {why}; no CUDA run was tested");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// A model that the kernels' fibers get through.
pub(crate) fn tiny() -> Model {
    let mut model = small_model();
    "tiny".clone_into(&mut model.name);
    (model.layers, model.vocab, model.hidden, model.ffn) = (3, 256, 64, 96);
    (model.heads, model.kv_heads, model.head_dim) = (4, 2, 64);
    model
}

/// What is run.
pub(crate) struct Case<'a> {
    pub(crate) policy: &'a str,
    pub(crate) prompts: &'a [usize],
    pub(crate) osl: u32,
    pub(crate) schedule: Schedule,
    pub(crate) kv: DType,
    /// Largest difference of a logit.
    pub(crate) tolerance: f32,
}

impl Case<'_> {
    pub(crate) fn prompts(&self, vocab: u32) -> Vec<Vec<u32>> {
        self.prompts.iter().zip(5..).map(|(n, seed)| made_up(*n, seed, vocab)).collect()
    }

    pub(crate) fn load(&self, vocab: u32) -> Load {
        let mut load = load_of(&self.prompts(vocab), self.osl, self.schedule);
        if matches!(self.schedule, Schedule::Continuous { .. }) {
            load.admission.places = Some(2);
        }
        load
    }

    fn preset(&self) -> Preset {
        let catalog = Catalog::built_in();
        Preset::parse(&catalog, self.policy).unwrap_or_else(|e| panic!("{}: {e}", self.policy))
    }

    pub(crate) fn program(&self, model: &Model) -> Program {
        self.lowered(model, &self.load(model.vocab))
    }

    fn lowered(&self, model: &Model, load: &Load) -> Program {
        self.lowered_with(model, load, setup(self.kv))
    }

    pub(crate) fn lowered_with(&self, model: &Model, load: &Load, setup: Setup) -> Program {
        lower(model, self.preset().policy.as_ref(), load, setup)
            .unwrap_or_else(|e| panic!("{}: {e}", self.policy))
    }

    /// The program over prompts whose first `hit` tokens are cached, and the one that brings them there.
    pub(crate) fn behind_prefixes(&self, model: &Model, hit: u32) -> (Program, Program) {
        let load = self.load(model.vocab).with_hit(Hit::Tokens(hit));
        let policy = self.preset().policy;
        let prefix = lower_prefix(model, policy.as_ref(), &load, setup(self.kv));
        (self.lowered(model, &load), prefix.expect("prompts have prefixes"))
    }
}

/// Logits by sequence and index of the token that was chosen from them.
pub(crate) type Logits = Vec<((usize, usize), Vec<f32>)>;

/// On the CPU.
pub(crate) fn on_cpu(
    engine: &Engine,
    case: &Case<'_>,
    program: &Program,
    options: &RunOptions,
) -> (RunResult, Logits) {
    let prompts = case.prompts(engine.model.vocab);
    let mut logits = Vec::new();
    let mut watch = |c: batchmax_exec::Chosen<'_>| {
        logits.push(((c.sequence, c.index), c.logits.to_vec()));
    };
    let stop = AtomicBool::new(false);
    let result = engine
        .run_watched(program, &prompts, options, &stop, &mut |_, _| {}, &mut watch)
        .unwrap_or_else(|e| panic!("{} on the CPU: {e}", case.policy));
    (result, logits)
}

/// On the device.
pub(crate) fn on_device(
    engine: &mut CudaEngine<'_>,
    case: &Case<'_>,
    program: &Program,
    options: &RunOptions,
) -> (RunResult, Logits) {
    let prompts = case.prompts(engine.model().vocab);
    let mut logits = Vec::new();
    let mut watch = |c: batchmax_exec::Chosen<'_>| {
        logits.push(((c.sequence, c.index), c.logits.to_vec()));
    };
    let stop = AtomicBool::new(false);
    let result = engine
        .run_watched(program, &prompts, options, &stop, &mut |_, _| {}, &mut watch)
        .unwrap_or_else(|e| panic!("{} on the device: {e}", case.policy));
    (result, logits)
}

fn best(logits: &[f32]) -> (usize, f32) {
    let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).expect("some");
    let others = logits.iter().enumerate().filter(|(i, _)| *i != best).map(|(_, x)| *x);
    (best, logits[best] - others.fold(f32::NEG_INFINITY, f32::max))
}

/// Runs a case on both, the device with the CPU's tokens, and compares all that can be seen. The worst logit's difference.
pub(crate) fn compare(engine: &Engine, device: &mut CudaEngine<'_>, case: &Case<'_>) -> f32 {
    compare_programs(engine, device, case, (&case.program(&engine.model), None))
}

/// The same over a program, behind one that fills the caches.
pub(crate) fn compare_programs(
    engine: &Engine,
    device: &mut CudaEngine<'_>,
    case: &Case<'_>,
    (program, prefix): (&Program, Option<Program>),
) -> f32 {
    let what = format!("{} {} {:?}", case.policy, case.schedule, case.prompts);
    let options = RunOptions { keep_details: true, prefix, ..RunOptions::default() };
    let (cpu, expected) = on_cpu(engine, case, program, &options);
    let forced = cpu.sequences.iter().map(|s| s.generated.clone()).collect();
    let (gpu, found) = on_device(device, case, program, &RunOptions { forced, ..options });
    assert_eq!(found.len(), expected.len(), "{what}: tokens");
    let mut worst = 0.0f32;
    for ((place, found), (other, expected)) in found.iter().zip(&expected) {
        assert_eq!(place, other, "{what}");
        let far = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far <= case.tolerance, "{what}, token {place:?}: a logit is {far} off");
        worst = worst.max(far);
        let ((token, _), (wanted, gap)) = (best(found), best(expected));
        assert!(token == wanted || gap <= 2.0 * far, "{what}: another token at {place:?}");
    }
    for (i, (a, b)) in gpu.sequences.iter().zip(&cpu.sequences).enumerate() {
        assert_eq!(a.kept, b.kept, "{what}: kept of {i}");
        assert_eq!(a.forwarded, b.forwarded, "{what}: rows that went on of {i}");
        assert_eq!(a.refreshed, b.refreshed, "{what}: refreshed of {i}");
        assert_eq!(a.guesses, b.guesses, "{what}: guesses of {i}");
    }
    // Both hold what is predicted after every step, or they would have stopped.
    assert_eq!(gpu.kv_prefill_peak, cpu.kv_prefill_peak, "{what}");
    assert_eq!(gpu.kv_decode_peak, cpu.kv_decode_peak, "{what}");
    assert_eq!(gpu.kv_after_prefill, cpu.kv_after_prefill, "{what}");
    assert_eq!(gpu.tier.stored, cpu.tier.stored, "{what}");
    assert_eq!(gpu.tier.fetched, cpu.tier.fetched, "{what}");
    assert_eq!(gpu.tier.peak, cpu.tier.peak, "{what}");
    assert!(gpu.timeline.spans.len() == cpu.timeline.spans.len(), "{what}: spans");
    worst
}

/// Codes as the numbers that they stand for.
fn numbers(codes: &Packed) -> Packed {
    Packed::pack(codes.n(), codes.k(), WeightFormat::F32, |i, out| codes.row(i, out))
}

/// Weights of codes, and the CPU's engine with the same numbers in single precision.
pub(crate) fn engines_of_codes(model: &Model, dtype: DType) -> (Engine, Weights) {
    let coded = || Weights::synthetic(model, dtype).expect("executable");
    let mut plain = coded();
    plain.embedding = numbers(&plain.embedding);
    plain.head = plain.head.as_ref().map(numbers);
    for layer in &mut plain.layers {
        for matrix in [&mut layer.qkv, &mut layer.output, &mut layer.gate_up, &mut layer.down] {
            *matrix = numbers(matrix);
        }
    }
    (Engine::new(model.clone(), plain, 1), coded())
}

/// The CPU's engine and weights for a device.
pub(crate) fn engines(model: &Model) -> (Engine, Weights) {
    let weights = || Weights::synthetic(model, DType::F32).expect("executable");
    (Engine::new(model.clone(), weights(), 1), weights())
}
