//! What decode steps ask the system's allocator for. A binary of its own, since its allocator counts.

#![allow(clippy::print_stdout, reason = "how many, for whoever looks")]

mod common;

use std::alloc::System;
use std::sync::atomic::AtomicBool;

use batchmax_exec::{RunOptions, load_of};
use batchmax_sim::load::Schedule;
use batchmax_sim::lower::lower;
use batchmax_sim::op::DType;
use batchmax_sim::policy::{Full, Policy, Preset};
use batchmax_sim::profile::Catalog;
use common::{made_up, setup, small};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static COUNTING: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Allocations of this process until now, larger memory for the same list among them.
fn allocations() -> usize {
    let stats = COUNTING.stats();
    stats.allocations + stats.reallocations
}

/// Allocations in each step behind the prefill of prompts of these lengths, but for the first `warm` of them.
fn in_decode_steps(policy: &dyn Policy, lengths: [usize; 4], osl: u32, warm: usize) -> Vec<usize> {
    let engine = small();
    let prompts = lengths.map(|length| made_up(length, 1 + length as u32, engine.model.vocab));
    let load = load_of(&prompts, osl, Schedule::Static);
    let program = lower(&engine.model, policy, &load, setup(DType::F16)).expect("lowers");
    let (steps, decode) = program.steps();
    let mut counts = Vec::with_capacity(steps as usize);
    engine
        .run(&program, &prompts, &RunOptions::default(), &AtomicBool::new(false), &mut |_, _| {
            counts.push(allocations());
        })
        .expect("runs");
    let first = (steps - decode) as usize + warm;
    counts[first - 1..].windows(2).map(|pair| pair[1] - pair[0]).collect()
}

/// One test: others beside it would allocate, too.
#[test]
fn quiet_steps_allocate_nothing() {
    // 100 steps: new blocks every 32 tokens, a new page of angles at 256.
    for lengths in [[200; 4], [200, 180, 230, 10]] {
        let counts = in_decode_steps(&Full::default(), lengths, 100, 2);
        assert_eq!(counts.len(), 97);
        println!("full, {lengths:?}: {counts:?}");
        assert!(counts.iter().all(|n| *n == 0), "{lengths:?}: {counts:?}");
    }
    // It cuts every 32 steps, as its preset does: those steps ask for some memory, the others for none.
    let catalog = Catalog::built_in();
    let preset = Preset::parse(&catalog, "batch-max:budget=64,chunk=64").expect("a preset");
    let counts = in_decode_steps(preset.policy.as_ref(), [200; 4], 140, 40);
    println!("batch-max: {counts:?}");
    let acting: Vec<usize> = counts.iter().copied().filter(|n| *n > 0).collect();
    assert_eq!((counts.len(), acting.len()), (99, 3), "{counts:?}");
    // Of 3 layers, 4 sequences and 2 KV heads: for each head what stays, for each sequence how much, and ten lists.
    assert!(acting.iter().all(|n| *n <= 3 * (4 * 2 + 4 + 10)), "{counts:?}");
}
