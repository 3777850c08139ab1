//! The same comparisons on this machine's own GPUs, where it has some: what emulated devices can't show.

use batchmax_exec::cuda::{CudaEngine, CudaGroup};
use batchmax_exec::devices::{self, CudaError, Driver};
use batchmax_sim::load::Schedule;
use batchmax_sim::op::DType;

use super::policies::{EVERY, HALVES};
use super::{Case, compare, engines, tiny, together};

/// Devices, unless there are none.
fn real(indices: &[u32]) -> Option<Vec<Box<dyn Driver>>> {
    match devices::open(indices) {
        Ok(drivers) => Some(drivers),
        Err(why @ (CudaError::Unavailable { .. } | CudaError::NoDevice { .. })) => {
            eprintln!("SKIPPED: {why}; nothing ran on cuda:{indices:?}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn case(policy: &str) -> Case<'_> {
    let (kv, schedule) = (DType::F16, Schedule::Static);
    // As many tokens as on emulated devices: later ones differ more where a last bit has tipped a code or a choice. A GPU has its
    // own exponentials and order of sums.
    Case { policy, prompts: &[70, 97], osl: 6, schedule, kv, tolerance: 2.0 * HALVES }
}

#[test]
fn every_policy_runs_on_a_gpu() {
    let Some(mut drivers) = real(&[0]) else { return };
    let model = tiny();
    let (engine, weights) = engines(&model);
    let mut cuda =
        CudaEngine::new(drivers[0].as_mut(), model, weights, DType::F32).expect("room for weights");
    for policy in EVERY.iter().copied().flatten() {
        compare(&engine, &mut cuda, &case(policy));
    }
}

#[test]
fn two_gpus_do_what_one_cpu_does() {
    let Some(mut drivers) = real(&[0, 1]) else { return };
    let model = tiny();
    let (engine, weights) = engines(&model);
    let drivers = drivers.iter_mut().map(|driver| driver.as_mut() as &mut dyn Driver);
    let mut group = CudaGroup::new(drivers, &model, &weights, DType::F32).expect("room");
    for policy in together::shared() {
        together::compare(&engine, &mut group, &case(policy), 2);
    }
}
