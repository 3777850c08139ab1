//! Decode steps that are started as recordings.

use std::sync::atomic::AtomicBool;

use batchmax_exec::cuda::CudaEngine;
use batchmax_exec::{Executor, RunOptions};
use batchmax_kernels::cuda::recording::{Call, Recording};
use batchmax_sim::load::Schedule;
use batchmax_sim::op::DType;

use super::runs::null;
use super::{Case, device, engines, on_device, tiny};

fn case(policy: &str, osl: u32) -> Case<'_> {
    let (kv, schedule) = (DType::F16, Schedule::Static);
    Case { policy, prompts: &[40, 33], osl, schedule, kv, tolerance: 0.0 }
}

fn recordings(calls: &[Call]) -> usize {
    calls.iter().filter(|call| matches!(call, Call::LaunchGraph { .. })).count()
}

#[test]
fn recordings_change_nothing() {
    for policy in [
        "full",
        "h2o:budget=50%,slack=2",
        "streaming-llm:budget=40,chunk=32,slack=2",
        "kivi:residual=32",
        "specache:residual=32,fetch=8",
        "refreshkv:budget=25%,every=2",
        "quest:budget=32,page=16",
    ] {
        let Some(driver) = device() else { return };
        let mut driver = Recording::new(driver);
        let log = driver.log();
        let model = tiny();
        let (_, weights) = engines(&model);
        let mut cuda = CudaEngine::new(&mut driver, model, weights, DType::F32).expect("room");
        // Those that read all of a cache every other step need twice as many for something to come again.
        let case = case(policy, if policy.starts_with("refreshkv") { 14 } else { 8 });
        // A profile wants every op of every step timed, which leaves nothing to record.
        let timed = RunOptions { keep_samples: true, ..RunOptions::default() };
        let program = case.program(cuda.model());
        let (_, expected) = on_device(&mut cuda, &case, &program, &timed);
        assert_eq!(recordings(&log.calls()), 0, "{policy}");
        let (_, found) = on_device(&mut cuda, &case, &program, &RunOptions::default());
        assert!(found == expected, "{policy}: the same logits to the bit");
        assert!(recordings(&log.calls()) > 0, "{policy}: nothing came again");
    }
}

/// All calls of a run that generates so many tokens.
fn decode(osl: u32) -> Vec<Call> {
    let mut driver = null();
    let log = driver.log();
    let model = tiny();
    let (_, weights) = engines(&model);
    let mut cuda = CudaEngine::new(&mut driver, model, weights, DType::F32).expect("room");
    let (case, stop) = (case("full", osl), AtomicBool::new(false));
    let (program, prompts) = (case.program(cuda.model()), case.prompts(cuda.model().vocab));
    let result = cuda
        .run(&program, &prompts, &RunOptions::default(), &stop, &mut |_, _| {})
        .expect("nothing fails");
    // Ops of steps that nobody timed count as those of the last step that was.
    let launches = result.timeline.spans.iter().map(|span| span.launches);
    assert_eq!(
        launches.fold(0.0, f64::max),
        f64::from(osl - 1) * f64::from(cuda.model().layers),
        "a layer's op runs once a layer and step"
    );
    log.calls()
}

#[test]
fn quiet_steps_start_a_handful_of_recordings() {
    let [short, long] = [60, 120].map(decode);
    let count = |of: fn(&Call) -> bool| {
        let [short, long] = [&short, &long].map(|calls| calls.iter().filter(|c| of(c)).count());
        (long - short) as f64 / 60.0
    };
    let kernels = count(|c| matches!(c, Call::Launch { .. } | Call::Multiply { .. }));
    let graphs = count(|c| matches!(c, Call::LaunchGraph { .. }));
    // 3 layers of 10 ops and those around them, in one step of 16; and what surrounds a block of 32 tokens that is full.
    assert!(kernels < 9.0, "{kernels} kernels a step are started one by one");
    assert!((0.5..4.0).contains(&graphs), "{graphs} recordings a step");
    let made = |calls: &[Call]| {
        let of = |like: fn(&Call) -> bool| calls.iter().filter(|c| like(c)).count();
        (of(|c| matches!(c, Call::EndCapture { .. })), of(|c| matches!(c, Call::FreeGraph { .. })))
    };
    let (recorded, freed) = made(&long);
    assert!(recorded == freed && recorded < 12, "{recorded} made, {freed} given back");
}
