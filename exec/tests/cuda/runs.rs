//! Schedules, types and failures.

use std::sync::atomic::AtomicBool;

use batchmax_exec::cuda::CudaEngine;
use batchmax_exec::tier::TierPlace;
use batchmax_exec::weights::Weights;
use batchmax_exec::{ExecError, Executor, RunOptions, Sampling};
use batchmax_kernels::cuda::DeviceInfo;
use batchmax_kernels::cuda::emulated::Settings;
use batchmax_kernels::cuda::recording::{Call, Fault, Log, Null, Recording};
use batchmax_kernels::gemm::{Packed, WeightFormat};
use batchmax_sim::load::{Group, Load, Schedule};
use batchmax_sim::lower::lower_pass;
use batchmax_sim::op::{DType, Phase};
use batchmax_sim::policy::Full;
use batchmax_sim::timeline::Timeline;

use super::common::setup;
use super::{
    Case, compare, compare_programs, device, device_with, engines, engines_of_codes, on_cpu,
    on_device, tiny,
};

#[test]
fn free_runs_give_the_same_tokens() {
    let Some(mut driver) = device() else { return };
    let model = tiny();
    let (engine, weights) = engines(&model);
    let mut cuda = CudaEngine::new(&mut driver, model, weights, DType::F32).expect("room");
    let (kv, schedule) = (DType::F16, Schedule::Static);
    let case = Case { policy: "full", prompts: &[40, 33], osl: 8, schedule, kv, tolerance: 0.01 };
    let sampled = Sampling { temperature: 0.7, top_p: 0.9, seed: 11 };
    for sampling in [Sampling::default(), sampled] {
        let options = RunOptions { sampling, ..RunOptions::default() };
        let program = case.program(&engine.model);
        let (cpu, _) = on_cpu(&engine, &case, &program, &options);
        let (gpu, _) = on_device(&mut cuda, &case, &program, &options);
        for (a, b) in gpu.sequences.iter().zip(&cpu.sequences) {
            assert_eq!(a.generated, b.generated, "{sampling:?}");
            assert!(a.gaps.iter().zip(&b.gaps).all(|(a, b)| (a - b).abs() < 0.02));
        }
    }
}

#[test]
fn schedules_and_caches_of_all_types() {
    let Some(mut driver) = device() else { return };
    let model = tiny();
    let (engine, weights) = engines(&model);
    let mut cuda = CudaEngine::new(&mut driver, model, weights, DType::F32).expect("room");
    // A brain float has 8 bits, an e4m3 4: where a last bit tips one, that much of a number changes.
    for (schedule, kv, tolerance) in [
        (Schedule::Staggered { prefill_batch: 2 }, DType::F16, 0.01),
        (Schedule::Staggered { prefill_batch: 1 }, DType::Bf16, 0.08),
        (Schedule::Static, DType::Fp8, 0.5),
    ] {
        let case = Case { policy: "full", prompts: &[40, 40, 33], osl: 5, schedule, kv, tolerance };
        compare(&engine, &mut cuda, &case);
        let policy = "snapkv:budget=50%,window=8";
        compare(&engine, &mut cuda, &Case { policy, ..case });
    }
}

/// A continuous schedule joins and leaves: `full` and an eviction, with fewer places than sequences.
#[test]
fn sequences_join_and_leave() {
    let Some(mut driver) = device() else { return };
    let model = tiny();
    let (engine, weights) = engines(&model);
    let mut cuda = CudaEngine::new(&mut driver, model, weights, DType::F32).expect("room");
    let schedule = Schedule::Continuous { turns: 2 };
    for policy in ["full", "snapkv:budget=50%,window=8", "h2o:budget=50%,slack=2"] {
        let kv = DType::F16;
        let case =
            Case { policy, prompts: &[40, 33, 52, 33], osl: 4, schedule, kv, tolerance: 0.01 };
        compare(&engine, &mut cuda, &case);
    }
}

/// Whoever forgets to let one queue wait for the other reads what is not there yet.
#[test]
fn late_queues_and_other_orders_change_nothing() {
    for (late, order) in [(true, 0), (false, 1), (true, 7)] {
        let Some(mut driver) = device_with(Settings { late, order, ..Settings::default() }) else {
            return;
        };
        let model = tiny();
        let (engine, weights) = engines(&model);
        let mut cuda = CudaEngine::new(&mut driver, model, weights, DType::F32).expect("room");
        let (kv, schedule) = (DType::F16, Schedule::Static);
        let policy = "specache:residual=32,fetch=8";
        let case = Case { policy, prompts: &[70], osl: 4, schedule, kv, tolerance: 0.02 };
        compare(&engine, &mut cuda, &case);
    }
}

#[test]
fn slower_memory_may_be_files() {
    let Some(mut driver) = device() else { return };
    let model = tiny();
    let (_, weights) = engines(&model);
    let mut cuda = CudaEngine::new(&mut driver, model, weights, DType::F32).expect("room");
    let (kv, schedule) = (DType::F16, Schedule::Static);
    let policy = "specache:residual=32,fetch=8";
    let case = Case { policy, prompts: &[70], osl: 5, schedule, kv, tolerance: 0.0 };
    let folder = tempfile::tempdir().expect("a folder");
    let files = TierPlace::Directory(folder.path().to_path_buf());
    let of = |cuda: &mut CudaEngine<'_>, tier_place| {
        let program = case.program(cuda.model());
        on_device(cuda, &case, &program, &RunOptions { tier_place, ..RunOptions::default() })
    };
    let (pinned, a) = of(&mut cuda, TierPlace::Memory);
    let (filed, b) = of(&mut cuda, files);
    assert!(a == b, "the same logits to the bit");
    assert!(pinned.tier.fetched.0 > 0 && pinned.tier.fetched == filed.tier.fetched);
}

/// Prompts whose beginning was read before the clock starts.
#[test]
fn prefixes_are_read_first() {
    let Some(mut driver) = device() else { return };
    let model = tiny();
    let (engine, weights) = engines(&model);
    let mut cuda = CudaEngine::new(&mut driver, model, weights, DType::F32).expect("room");
    for policy in [
        "full",
        "streaming-llm:budget=40,chunk=32,slack=2",
        "batch-max:budget=40,chunk=32,recent=8,slack=2",
        "h2o:budget=40,slack=2",
        "snapkv:budget=50%,window=8",
        "kivi:residual=32",
        "quest:budget=32,page=16",
        "refreshkv:budget=25%,every=2",
        "less:budget=50%,rank=4,hidden=16",
    ] {
        for schedule in [Schedule::Static, Schedule::Staggered { prefill_batch: 1 }] {
            let kv = DType::F16;
            let case = Case { policy, prompts: &[70, 64], osl: 4, schedule, kv, tolerance: 0.01 };
            let (program, prefix) = case.behind_prefixes(&engine.model, 32);
            compare_programs(&engine, &mut cuda, &case, (&program, Some(prefix)));
        }
    }
}

#[test]
fn prompts_that_come_again_are_copied() {
    let Some(mut driver) = device() else { return };
    let model = tiny();
    let (_, weights) = engines(&model);
    let mut cuda = CudaEngine::new(&mut driver, model, weights, DType::F32).expect("room");
    let schedule = Schedule::Staggered { prefill_batch: 1 };
    for policy in [
        "full",
        "kivi:residual=32",
        "refreshkv:budget=25%,every=2",
        "less:budget=50%,rank=4,hidden=16",
    ] {
        let kv = DType::F16;
        let case = Case { policy, prompts: &[70, 70], osl: 5, schedule, kv, tolerance: 0.0 };
        let program = case.program(cuda.model());
        let one = case.prompts(cuda.model().vocab).remove(0);
        let prompts = vec![one.clone(), one];
        let options = RunOptions { read_once: Some(1), ..RunOptions::default() };
        let stop = AtomicBool::new(false);
        let result = cuda.run(&program, &prompts, &options, &stop, &mut |_, _| {}).expect(policy);
        let [a, b] = &result.sequences[..] else { panic!("two sequences") };
        assert!(a.generated == b.generated && a.gaps == b.gaps, "{policy}: not a copy");
    }
}

/// Half precision has 11 bits, brain floats 8, through three layers and for weights, too; the same products of a kernel for
/// tensor cores.
#[test]
fn activations_of_sixteen_bits() {
    let Some(mut driver) = device() else { return };
    let model = tiny();
    for (activations, kv, tolerance) in
        [(DType::F16, DType::F16, 0.05), (DType::Bf16, DType::Bf16, 0.4)]
    {
        let (engine, weights) = engines(&model);
        let mut cuda = CudaEngine::new(&mut driver, model.clone(), weights, activations)
            .expect("room for weights");
        let schedule = Schedule::Static;
        let case = Case { policy: "full", prompts: &[50, 33], osl: 4, schedule, kv, tolerance };
        compare(&engine, &mut cuda, &case);
    }
}

#[test]
fn weights_of_codes_are_the_numbers_that_they_stand_for() {
    let Some(mut driver) = device() else { return };
    let model = tiny();
    for dtype in [DType::Q8, DType::Q4] {
        let (engine, weights) = engines_of_codes(&model, dtype);
        let mut cuda = CudaEngine::new(&mut driver, model.clone(), weights, DType::F32)
            .expect("room for weights");
        let (kv, schedule) = (DType::F16, Schedule::Static);
        let case =
            Case { policy: "full", prompts: &[50, 33], osl: 4, schedule, kv, tolerance: 0.01 };
        compare(&engine, &mut cuda, &case);
    }
}

/// The nearest number of e4m3: four bits from 2^-6 to 448, multiples of 2^-9 below.
fn e4m3(x: f32) -> f32 {
    let size = x.abs().min(448.0);
    let step = if size < 1.0 / 64.0 { 1.0 / 512.0 } else { (size.log2().floor() - 3.0).exp2() };
    ((size / step).round_ties_even() * step).copysign(x)
}

/// Each row as e4m3 with a scale.
fn narrowed(from: &Packed) -> Packed {
    Packed::pack(from.n(), from.k(), WeightFormat::F32, |i, out| {
        from.row(i, out);
        let scale = out.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 448.0;
        out.iter_mut().for_each(|x| *x = e4m3(*x / scale) * scale);
    })
}

/// The CPU multiplies the same weights; of what it has in single precision the device rounds activations, to four bits, so by 2^-5
/// of themselves at most and 1.8 % (rms). Behind the twelve products of three layers a logit, whose size is about one, is off by 6 %,
/// and the worst of two thousand by four to six times that.
#[test]
fn weights_of_eight_bit_floats() {
    let settings = Settings { capability: (8, 9), ..Settings::default() };
    let Some(mut driver) = device_with(settings) else { return };
    let ledger = driver.ledger();
    let model = tiny();
    let (mut engine, mut weights) = engines(&model);
    for layer in &mut engine.weights.layers {
        for matrix in [&mut layer.qkv, &mut layer.output, &mut layer.gate_up, &mut layer.down] {
            *matrix = narrowed(matrix);
        }
    }
    let (kv, schedule) = (DType::F16, Schedule::Static);
    let case = Case { policy: "full", prompts: &[50, 33], osl: 4, schedule, kv, tolerance: 0.4 };
    weights.narrow = true;
    let mut cuda =
        CudaEngine::new(&mut driver, model.clone(), weights, DType::F32).expect("room for weights");
    // A byte a number and four a row, instead of four a number.
    let per_layer = [(256 + 2 * 128, 64), (64, 256), (2 * 96, 64), (64, 96)];
    let layer: u64 = per_layer.iter().map(|(n, k): &(u64, u64)| n * k + 4 * n).sum();
    let rest = 256 * 64 * 4 + 64 * 4 + 3 * 2 * 64 * 4;
    assert_eq!(ledger.live().bytes, 3 * layer + rest);
    let worst = compare(&engine, &mut cuda, &case);
    assert!(worst > 1e-3, "nothing was rounded");
    drop(cuda);
    assert_eq!(driver.leaks(), [], "given back");
}

#[test]
fn what_a_device_lacks_is_an_error() {
    let mut driver = null();
    let model = tiny();
    // Compute capability 8.0.
    let narrow =
        Weights { narrow: true, ..Weights::synthetic(&model, DType::F32).expect("executable") };
    let refused = CudaEngine::new(&mut driver, model.clone(), narrow, DType::F32).err();
    let refused = refused.expect("no products of fp8").to_string();
    assert!(refused.contains("8.9 is needed"), "{refused}");
    let weights = || Weights::synthetic(&model, DType::F32).expect("executable");
    let refused = CudaEngine::new(&mut driver, model.clone(), weights(), DType::Q4).err();
    assert!(matches!(refused, Some(ExecError::NotExecutable { .. })));
    let mut cuda =
        CudaEngine::new(&mut driver, model.clone(), weights(), DType::F32).expect("room");
    let (kv, schedule) = (DType::F32, Schedule::Static);
    let case = Case { policy: "full", prompts: &[9], osl: 2, schedule, kv, tolerance: 0.0 };
    let (program, prompts) = (case.program(&model), case.prompts(model.vocab));
    let stop = AtomicBool::new(false);
    let error = cuda
        .run(&program, &prompts, &RunOptions::default(), &stop, &mut |_, _| {})
        .expect_err("no attention over f32")
        .to_string();
    assert!(error.contains("f32") && !error.contains('\n'), "{error}");
}

/// One decode step over caches that are there, and one chunk behind them: what a profile times.
#[test]
fn probes_run_over_caches_that_nobody_read() {
    let Some(mut driver) = device() else { return };
    let model = tiny();
    let (_, weights) = engines(&model);
    let mut cuda = CudaEngine::new(&mut driver, model.clone(), weights, DType::F32).expect("room");
    for (phase, rows, resident) in [(Phase::Decode, 1, 45), (Phase::Prefill, 8, 64)] {
        let group = Group { sequences: 2, isl: resident + rows, osl: 2, hit: 0 };
        let load = Load::new(vec![group], Schedule::Static);
        let program =
            lower_pass(&model, &Full::default(), &load, setup(DType::F16), phase, rows, resident);
        let timeline = cuda.probe(&program, resident).expect("a probe").timeline(&program);
        let attention = timeline.spans.iter().find(|s| s.family.name().starts_with("attend"));
        let attention = attention.expect("a layer attends");
        assert!(attention.launches >= f64::from(model.layers) && attention.time.0 > 0.0);
        assert!(timeline.phase(phase).0 > 0.0);
        // Once more with the cache full of something else: the same ops as often.
        let cold = cuda.probe_cold(&program, resident).expect("a probe").expect("a cache");
        let cold = cold.timeline(&program);
        let launches = |t: &Timeline| t.spans.iter().map(|s| s.launches).collect::<Vec<_>>();
        assert_eq!(launches(&cold), launches(&timeline));
        assert!(cold.spans.iter().all(|s| s.launches == 0.0 || s.time.0 >= 0.0));
    }
    // Each op of a swept pass stands between two marks of its own, behind as many bytes as fill the cache twice.
    let mut driver = null();
    driver.inner().set_l2(1 << 20);
    let log = driver.log();
    let weights = Weights::synthetic(&model, DType::F32).expect("executable");
    let mut cuda = CudaEngine::new(&mut driver, model.clone(), weights, DType::F32).expect("room");
    let load = Load::new(vec![Group { sequences: 1, isl: 33, osl: 2, hit: 0 }], Schedule::Static);
    let (policy, setup) = (Full::default(), setup(DType::F16));
    let program = lower_pass(&model, &policy, &load, setup, Phase::Decode, 1, 32);
    log.clear();
    cuda.probe_cold(&program, 32).expect("a probe").expect("a cache");
    let calls = log.calls();
    let sweeps: Vec<usize> = (0..calls.len())
        .filter(|i| matches!(calls[*i], Call::Fill { bytes, .. } if bytes == 2 << 20))
        .collect();
    let mut ops = 0;
    program
        .visit_steps(|view| {
            view.pass.visit(|_, _, _, _| {
                ops += 1;
                Ok::<(), ()>(())
            })
        })
        .expect("no error");
    assert_eq!(sweeps.len(), ops);
    let next = |i: &usize| calls[i + 1..].iter().find(|call| **call != Call::Event);
    assert!(sweeps.iter().all(|i| matches!(next(i), Some(Call::Record { .. }))));
}

pub(super) fn null() -> Recording<Null> {
    Recording::new(Null::new(DeviceInfo {
        name: "none".into(),
        index: 0,
        capability: (8, 0),
        memory: 1 << 32,
        multiprocessors: 1,
        l2: 0,
        driver: 0,
    }))
}

/// Weights, a run, and what it came to.
fn whole(driver: &mut Recording<Null>, case: &Case<'_>) -> Result<(), ExecError> {
    let model = tiny();
    let weights = Weights::synthetic(&model, DType::F32)?;
    let (program, prompts) = (case.program(&model), case.prompts(model.vocab));
    let mut cuda = CudaEngine::new(driver, model, weights, DType::F32)?;
    let (options, stop) = (RunOptions::default(), AtomicBool::new(false));
    cuda.run(&program, &prompts, &options, &stop, &mut |_, _| {}).map(drop)
}

#[test]
fn a_failure_at_any_call_gives_everything_back() {
    for policy in ["full", "snapkv:budget=50%,window=8", "refreshkv:budget=25%,every=2"] {
        let (kv, schedule) = (DType::F16, Schedule::Static);
        let case = Case { policy, prompts: &[40, 33], osl: 6, schedule, kv, tolerance: 0.0 };
        let mut driver = null();
        whole(&mut driver, &case).expect(policy);
        let recorded = |call: &Call| matches!(call, Call::LaunchGraph { .. });
        let records = driver.log().calls().iter().any(recorded);
        assert!(records || policy.starts_with("refreshkv"), "{policy}: nothing is recorded");
        let frees = |call: &Call| {
            matches!(call, Call::Free { .. } | Call::FreePinned { .. } | Call::FreeGraph { .. })
        };
        let calls: Vec<bool> = driver.log().calls().iter().map(frees).collect();
        assert!(calls.len() > 300, "{policy}: {} calls", calls.len());
        for (n, frees) in calls.iter().enumerate() {
            let fault = [Fault::OutOfMemory, Fault::Refused, Fault::Lost][n % 3];
            let mut driver = null();
            driver.log().fail_after(n, fault);
            let result = whole(&mut driver, &case);
            // What is given back at the end may fail without harm to the result.
            if !frees {
                let error = result.expect_err("the call failed");
                assert!(matches!(error, ExecError::Cuda(_)), "{policy}, call {n}: {error}");
            }
            assert_eq!(driver.inner().used(), 0, "{policy}: call {n} of {} leaks", calls.len());
        }
    }
}

/// How often a run took memory and made marks.
fn taken(log: &Log) -> (usize, usize) {
    let count = |of: fn(&Call) -> bool| log.calls().iter().filter(|call| of(call)).count();
    (count(|c| matches!(c, Call::Alloc { .. })), count(|c| matches!(c, Call::Event)))
}

#[test]
fn a_thousand_steps_take_no_more_than_a_hundred() {
    for policy in ["full", "streaming-llm:budget=40,chunk=32,slack=2"] {
        let of = |osl| {
            let (kv, schedule) = (DType::F16, Schedule::Static);
            let case = Case { policy, prompts: &[40], osl, schedule, kv, tolerance: 0.0 };
            let mut driver = null();
            whole(&mut driver, &case).expect(policy);
            assert_eq!(driver.inner().used(), 0, "{policy}: leaks");
            taken(&driver.log())
        };
        let ((short, marks), (long, more_marks)) = (of(100), of(1000));
        assert_eq!(marks, more_marks, "{policy}: marks");
        // Scratch space for the parts of long caches is taken anew as it grows, a quarter more each time.
        assert!(long <= short + 4, "{policy}: {long} after {short}");
    }
}
