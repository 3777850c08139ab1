//! Several devices that share each layer against one CPU that has all of it: the same logits, and of each head the same kept
//! tokens.

use std::sync::atomic::{AtomicBool, Ordering};

use batchmax_exec::cuda::CudaGroup;
use batchmax_exec::weights::{Rank, Weights};
use batchmax_exec::{Engine, ExecError, Executor, RunOptions, RunResult, Sampling};
use batchmax_kernels::cuda::emulated::{Emulated, Settings};
use batchmax_kernels::cuda::recording::{Call, Fault, Recording};
use batchmax_kernels::cuda::{CudaError, Driver};
use batchmax_sim::load::{Group, Load, Schedule};
use batchmax_sim::lower::{Setup, lower_pass};
use batchmax_sim::op::{DType, Family, Phase};
use batchmax_sim::policy::Full;
use batchmax_sim::profile::Model;
use batchmax_sim::program::Program;

use super::common::setup;
use super::policies::EVERY;
use super::{Case, Logits, engines, engines_of_codes, on_cpu, tiny};

/// The sums of two devices are rounded where those of one are not, beside what `policies` says of one.
const HALVES: f32 = 0.015;

/// What chooses over all heads of a layer, or knows them by their numbers.
const REFUSED: [&str; 5] = ["cacheblend", "duoattention", "fastkv", "refreshkv", "tova"];
/// What each device does by its own heads: draws by the number of a head, or shares a budget among them.
const OWN_WAY: [&str; 3] = ["adakv", "dbudgetkv", "random"];

fn is_one_of(policy: &str, names: &[&str]) -> bool {
    policy.split('+').any(|part| names.iter().any(|name| part.starts_with(name)))
}

/// Policies by which several devices do what one does: all others.
pub(super) fn shared() -> impl Iterator<Item = &'static str> {
    let all = EVERY.iter().copied().flatten().copied();
    all.filter(|policy| !is_one_of(policy, &REFUSED) && !is_one_of(policy, &OWN_WAY))
}

fn devices(count: u32) -> Option<Vec<Emulated>> {
    devices_with(Settings::default(), count)
}

fn devices_with(settings: Settings, count: u32) -> Option<Vec<Emulated>> {
    match Emulated::together(settings, count) {
        Ok(devices) => Some(devices),
        Err(CudaError::Unavailable { why }) => {
            eprintln!("SKIPPED: {why}; no run on several devices was tested");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn group<'d, D: Driver>(
    drivers: &'d mut [D],
    model: &Model,
    weights: &Weights,
    activations: DType,
) -> CudaGroup<'d> {
    let drivers = drivers.iter_mut().map(|driver| driver as &mut dyn Driver);
    CudaGroup::new(drivers, model, weights, activations).expect("room for weights")
}

fn together(kv: DType, tp: u32) -> Setup {
    Setup { tp, ..setup(kv) }
}

fn program(case: &Case<'_>, model: &Model, tp: u32) -> Program {
    let part = model.shard_layers(tp).expect("it divides");
    case.lowered_with(&part, &case.load(model.vocab), together(case.kv, tp))
}

fn run(
    group: &mut CudaGroup<'_>,
    case: &Case<'_>,
    program: &Program,
    options: &RunOptions,
) -> (RunResult, Logits) {
    let prompts = case.prompts(group.model().vocab);
    let mut logits = Vec::new();
    let mut watch = |c: batchmax_exec::Chosen<'_>| {
        logits.push(((c.sequence, c.index), c.logits.to_vec()));
    };
    let stop = AtomicBool::new(false);
    let result = group
        .run_watched(program, &prompts, options, &stop, &mut |_, _| {}, &mut watch)
        .unwrap_or_else(|e| panic!("{} on several devices: {e}", case.policy));
    (result, logits)
}

/// Runs a case on both, the devices with the CPU's tokens.
pub(super) fn compare(engine: &Engine, group: &mut CudaGroup<'_>, case: &Case<'_>, tp: u32) {
    let what = format!("{} {} on {tp}", case.policy, case.schedule);
    let options = RunOptions { keep_details: true, ..RunOptions::default() };
    let (cpu, expected) = on_cpu(engine, case, &case.program(&engine.model), &options);
    let forced = cpu.sequences.iter().map(|s| s.generated.clone()).collect();
    let options = RunOptions { forced, ..options };
    let (gpus, found) = run(group, case, &program(case, &engine.model, tp), &options);
    assert_eq!(found.len(), expected.len(), "{what}: tokens");
    for ((place, found), (other, expected)) in found.iter().zip(&expected) {
        assert_eq!(place, other, "{what}");
        let far = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far <= case.tolerance, "{what}, token {place:?}: a logit is {far} off");
    }
    for (i, (a, b)) in gpus.sequences.iter().zip(&cpu.sequences).enumerate() {
        assert_eq!(a.kept, b.kept, "{what}: kept of {i}");
        assert_eq!(a.guesses, b.guesses, "{what}: guesses of {i}");
    }
    // A device has its heads' part of the caches, and neighbours have the same head where there are fewer than devices.
    let parts = u64::from(tp.min(engine.model.kv_heads));
    assert_eq!(gpus.kv_prefill_peak.0 * parts, cpu.kv_prefill_peak.0, "{what}");
    assert_eq!(gpus.kv_decode_peak.0 * parts, cpu.kv_decode_peak.0, "{what}");
    let sums = gpus.timeline.spans.iter().filter(|s| s.family == Family::Collective);
    assert!(sums.map(|s| s.launches).sum::<f64>() > 0.0, "{what}: sums are timed");
}

fn all(policies: &[&str], tp: u32) {
    let Some(mut drivers) = devices(tp) else { return };
    let model = tiny();
    let (engine, weights) = engines(&model);
    {
        let mut group = group(&mut drivers, &model, &weights, DType::F32);
        for policy in policies {
            let (kv, schedule) = (DType::F16, Schedule::Static);
            let prompts = &[70, 97];
            let case = Case { policy, prompts, osl: 5, schedule, kv, tolerance: HALVES };
            compare(&engine, &mut group, &case, tp);
        }
    }
    drivers.iter().for_each(|driver| assert_eq!(driver.leaks(), [], "given back"));
}

#[test]
fn two_devices_do_what_one_does() {
    all(&shared().collect::<Vec<_>>(), 2);
}

#[test]
fn more_devices_than_heads_have_the_same_ones() {
    all(&["full", "streaming-llm:budget=40,chunk=32,slack=2", "knorm:budget=50%,recent=8"], 4);
}

#[test]
fn schedules_types_and_free_runs() {
    let Some(mut drivers) = devices(2) else { return };
    let model = tiny();
    let (engine, weights) = engines(&model);
    let mut group = group(&mut drivers, &model, &weights, DType::F32);
    for (schedule, kv, tolerance) in [
        (Schedule::Staggered { prefill_batch: 2 }, DType::F16, HALVES),
        (Schedule::Continuous { turns: 2 }, DType::F16, HALVES),
        (Schedule::Static, DType::Fp8, 0.5),
    ] {
        let policy = "snapkv:budget=50%,window=8";
        let case = Case { policy, prompts: &[40, 40, 33], osl: 5, schedule, kv, tolerance };
        compare(&engine, &mut group, &case, 2);
    }
    let (kv, schedule) = (DType::F16, Schedule::Static);
    let case = Case { policy: "full", prompts: &[40, 33], osl: 8, schedule, kv, tolerance: 0.0 };
    let sampled = Sampling { temperature: 0.7, top_p: 0.9, seed: 11 };
    for sampling in [Sampling::default(), sampled] {
        let options = RunOptions { sampling, ..RunOptions::default() };
        let (cpu, _) = on_cpu(&engine, &case, &case.program(&model), &options);
        let (gpus, _) = run(&mut group, &case, &program(&case, &model, 2), &options);
        for (a, b) in gpus.sequences.iter().zip(&cpu.sequences) {
            assert_eq!(a.generated, b.generated, "{sampling:?}");
        }
    }
}

/// The norm behind a block adds to the residual, not the product; biases go with their rows.
#[test]
fn norms_behind_blocks_and_biases() {
    let Some(mut drivers) = devices(2) else { return };
    let mut model = tiny();
    (model.post_norms, model.attention_bias, model.qk_norm) = (true, true, true);
    let (mut engine, mut weights) = engines(&model);
    for weights in [&mut engine.weights, &mut weights] {
        for bias in weights.layers.iter_mut().filter_map(|layer| layer.qkv_bias.as_mut()) {
            bias.iter_mut().zip(0..).for_each(|(x, i)| *x = (i % 7) as f32 * 0.05 - 0.1);
        }
    }
    let mut group = group(&mut drivers, &model, &weights, DType::F32);
    let (kv, schedule) = (DType::F16, Schedule::Static);
    let case = Case { policy: "full", prompts: &[40, 33], osl: 4, schedule, kv, tolerance: HALVES };
    compare(&engine, &mut group, &case, 2);
}

#[test]
fn codes_are_shared_in_whole_blocks() {
    let Some(mut drivers) = devices(2) else { return };
    let mut model = tiny();
    model.ffn = 128;
    for dtype in [DType::Q8, DType::Q4] {
        let (engine, weights) = engines_of_codes(&model, dtype);
        let mut group = group(&mut drivers, &model, &weights, DType::F32);
        let (kv, schedule) = (DType::F16, Schedule::Static);
        let case =
            Case { policy: "full", prompts: &[50, 33], osl: 4, schedule, kv, tolerance: HALVES };
        compare(&engine, &mut group, &case, 2);
    }
    // 96 channels are three blocks.
    let torn = Weights::synthetic(&tiny(), DType::Q4).expect("executable");
    let error = torn.part(&tiny(), Rank { index: 0, of: 2 }).err().expect("half a block");
    assert!(error.to_string().contains("codes of 32"), "{error}");
}

/// Queues that work late, other orders of threads: sums still wait for what they add up.
#[test]
fn late_queues_and_other_orders_change_nothing() {
    for (late, order) in [(true, 0), (false, 7)] {
        let settings = Settings { late, order, ..Settings::default() };
        let Some(mut drivers) = devices_with(settings, 2) else { return };
        let model = tiny();
        let (engine, weights) = engines(&model);
        let mut group = group(&mut drivers, &model, &weights, DType::F32);
        let (kv, schedule) = (DType::F16, Schedule::Static);
        let policy = "specache:residual=32,fetch=8";
        let case = Case { policy, prompts: &[70], osl: 4, schedule, kv, tolerance: HALVES };
        compare(&engine, &mut group, &case, 2);
    }
}

#[test]
fn what_devices_cannot_share_is_refused() {
    let Some(mut drivers) = devices(2) else { return };
    let model = tiny();
    let (_, weights) = engines(&model);
    let three = Weights::part(&weights, &model, Rank { index: 0, of: 3 }).err().expect("4 heads");
    assert!(three.to_string().contains("heads"), "{three}");
    let mut group = group(&mut drivers, &model, &weights, DType::F32);
    let stop = AtomicBool::new(false);
    let refused = EVERY.iter().copied().flatten().filter(|policy| is_one_of(policy, &REFUSED));
    for (policy, tp) in refused.map(|policy| (*policy, 2)).chain([("full", 1)]) {
        let (kv, schedule) = (DType::F16, Schedule::Static);
        let case = Case { policy, prompts: &[70], osl: 4, schedule, kv, tolerance: 0.0 };
        let program = program(&case, &model, tp);
        let (prompts, options) = (case.prompts(model.vocab), RunOptions::default());
        let error = group.run(&program, &prompts, &options, &stop, &mut |_, _| {});
        let error = error.expect_err(policy);
        assert!(matches!(error, ExecError::NotExecutable { .. }), "{policy}: {error}");
    }
}

/// A device that fails holds up none, whichever it is and wherever it fails, and its error is the one that is said.
#[test]
fn a_device_that_fails_lets_the_others_go() {
    let Some(_) = devices(1) else { return };
    let model = tiny();
    let (_, weights) = engines(&model);
    let (kv, schedule) = (DType::F16, Schedule::Static);
    let case = Case { policy: "full", prompts: &[20], osl: 4, schedule, kv, tolerance: 0.0 };
    let program = program(&case, &model, 2);
    let prompts = case.prompts(model.vocab);
    let stop = AtomicBool::new(false);
    let sums = |call: &Call| matches!(call, Call::AllReduce { .. });
    let launches = |call: &Call| matches!(call, Call::Launch { .. });
    for (rank, after, fault) in
        [(0, 0, Fault::Refused), (1, 7, Fault::Lost), (0, 11, Fault::Lost), (1, 3, Fault::Refused)]
    {
        for filter in [sums, launches] {
            let devices = devices(2).expect("there are devices");
            let ledgers: Vec<_> = devices.iter().map(Emulated::ledger).collect();
            let mut drivers: Vec<_> = devices.into_iter().map(Recording::new).collect();
            {
                let log = drivers[rank].log();
                let mut group = group(&mut drivers, &model, &weights, DType::F32);
                log.fail_matching(filter, after, fault);
                let options = RunOptions::default();
                let error = group.run(&program, &prompts, &options, &stop, &mut |_, _| {});
                let error = error.expect_err("a device failed").to_string();
                assert!(error.contains("test"), "rank {rank}, call {after}: {error}");
                // What devices do together is over; the reason is said again.
                let error = group.run(&program, &prompts, &options, &stop, &mut |_, _| {});
                error.expect_err("the devices have parted");
            }
            drop(drivers);
            for ledger in ledgers {
                assert_eq!(ledger.live().leaked, Vec::<u64>::new(), "rank {rank}, call {after}");
            }
        }
    }
}

#[test]
fn who_wants_to_stop_stops_all() {
    let Some(mut drivers) = devices(2) else { return };
    let model = tiny();
    let (_, weights) = engines(&model);
    let mut group = group(&mut drivers, &model, &weights, DType::F32);
    let (kv, schedule) = (DType::F16, Schedule::Static);
    let case = Case { policy: "full", prompts: &[20], osl: 50, schedule, kv, tolerance: 0.0 };
    let program = program(&case, &model, 2);
    let stop = AtomicBool::new(false);
    let mut progress = |done: u64, _| stop.store(done >= 3, Ordering::Relaxed);
    let (prompts, options) = (case.prompts(model.vocab), RunOptions::default());
    let stopped = group.run(&program, &prompts, &options, &stop, &mut progress);
    assert!(matches!(stopped, Err(ExecError::Interrupted)), "{stopped:?}");
}

#[test]
fn probes_time_sums() {
    let Some(mut drivers) = devices(2) else { return };
    let model = tiny();
    let (_, weights) = engines(&model);
    let mut group = group(&mut drivers, &model, &weights, DType::F32);
    let part = model.shard_layers(2).expect("it divides");
    let group_of = Group { sequences: 2, isl: 46, osl: 2, hit: 0 };
    let load = Load::new(vec![group_of], Schedule::Static);
    let setup = together(DType::F16, 2);
    let program = lower_pass(&part, &Full::default(), &load, setup, Phase::Decode, 1, 45);
    let timeline = group.probe(&program, 45).expect("a probe").timeline(&program);
    let sums = timeline.spans.iter().filter(|s| s.family == Family::Collective);
    let launches: f64 = sums.map(|s| s.launches).sum();
    assert!(launches >= f64::from(2 * model.layers), "{launches} sums");
}
