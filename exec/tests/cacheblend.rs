//! CacheBlend: where a chunk stands where it stood, and where all is computed anew, it is a prefill to the bit; and it goes
//! before a policy that chooses what decode reads.

mod common;

use std::sync::Arc;

use batchmax_exec::RunResult;
use batchmax_sim::load::Schedule;
use batchmax_sim::op::DType;
use batchmax_sim::policy::{Budget, CacheBlend, Composed, Full, Policy, Quest};
use common::{made_up, run, small};

fn outcome(result: &RunResult) -> Vec<(Vec<u32>, Vec<u32>, Vec<u32>)> {
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect();
    let of = |s: &batchmax_exec::engine::SequenceResult| {
        let logits = s.prompt_logits.as_ref().expect("kept");
        (s.generated.clone(), bits(&s.gaps), bits(logits))
    };
    result.sequences.iter().map(of).collect()
}

fn blend(recompute: f64, chunk: u32) -> CacheBlend {
    CacheBlend { recompute, suffix: 24, chunk, check: 1 }
}

fn prompts() -> Vec<Vec<u32>> {
    [150, 97, 97, 40].into_iter().zip(7..).map(|(n, seed)| made_up(n, seed, 512)).collect()
}

#[test]
fn a_chunk_that_stands_where_it_stood_changes_no_bit() {
    let engine = small();
    for kv in [DType::F32, DType::F16, DType::Bf16] {
        let of = |policy: &dyn Policy, schedule| {
            outcome(&run(&engine, policy, &prompts(), 12, schedule, kv))
        };
        let full = of(&Full::default(), Schedule::Static);
        for recompute in [0.0, 0.3, 1.0] {
            // One chunk, at the start.
            for schedule in [Schedule::Static, Schedule::Staggered { prefill_batch: 1 }] {
                let blended = of(&blend(recompute, 200), schedule);
                assert!(blended == full, "{kv} {recompute} {schedule}");
            }
        }
        // Several: what they did not see of each other is missing.
        let apart = of(&blend(0.0, 32), Schedule::Static);
        assert!(apart != full, "{kv}");
        assert!(of(&blend(1.0, 32), Schedule::Static) == full, "{kv}");
    }
}

#[test]
fn decode_may_choose_what_it_reads_of_a_blended_cache() {
    let engine = small();
    let quest =
        |budget| Quest { budget: Budget::Tokens(budget), page: 16, per_head: false, newest: true };
    let with = |budget| {
        Composed::new(vec![Arc::new(blend(0.2, 32)), Arc::new(quest(budget))]).expect("go together")
    };
    let of = |policy: &dyn Policy| {
        outcome(&run(&engine, policy, &prompts(), 12, Schedule::Static, DType::F16))
    };
    assert!(of(&with(512)) == of(&blend(0.2, 32)), "a budget for everything");
    assert!(of(&with(32)) != of(&blend(0.2, 32)));
    let refused = Composed::new(vec![Arc::new(quest(64)), Arc::new(blend(0.2, 32))]);
    assert!(refused.expect_err("the wrong order").to_string().contains("cacheblend+quest"));
}
