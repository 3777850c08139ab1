//! CacheBlend: where a chunk stands where it stood, and where all is computed anew, it is a prefill to the bit; and it goes
//! before a policy that chooses what decode reads.

mod common;

use std::sync::Arc;

use batchmax_exec::RunResult;
use batchmax_sim::load::Schedule;
use batchmax_sim::op::DType;
use batchmax_sim::policy::{
    AdaKv, BatchMax, Budget, CacheBlend, ClusterKv, Composed, Cut, ExpectedAttention, Full, H2o,
    KeyDiff, Kivi, Less, Policy, Quest, RefreshKv, Request, RocketKv, Snap, SnapKv, SpeCache,
    StreamingLlm, ThinK, Together, Tova,
};
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

/// What may come behind it: with a budget of so many tokens where there is one.
fn behind(budget: u32) -> Vec<Arc<dyn Policy>> {
    let budget = Budget::Tokens(budget);
    let snap = SnapKv::new(budget);
    let snap = SnapKv { by: Snap { window: 16, ..snap.by }, ..snap };
    let ada = AdaKv::new(budget);
    vec![
        Arc::new(Quest { budget, page: 16, per_head: false, newest: true }),
        Arc::new(ClusterKv { budget, sinks: 4, per_cluster: 16 }),
        Arc::new(RefreshKv::new(budget)),
        Arc::new(RocketKv { budget, answer: 12, window: 16, pool: 7 }),
        Arc::new(snap),
        Arc::new(AdaKv { by: Together(Snap { window: 16, ..ada.by.0 }), ..ada }),
        Arc::new(KeyDiff {
            cut: Cut { chunk: None, ..KeyDiff::new(budget).cut },
            ..KeyDiff::new(budget)
        }),
        Arc::new(Tova::new(budget)),
        Arc::new(StreamingLlm::new(budget)),
    ]
}

/// What may come behind it and stores tokens otherwise, or elsewhere.
fn storing() -> Vec<Arc<dyn Policy>> {
    vec![
        Arc::new(Kivi { bits: 4, group: 32, residual: 32, swapped: false }),
        Arc::new(ThinK { drop: 0.5, window: 16, recent: 16 }),
        Arc::new(SpeCache { bits: 2, group: 32, residual: 32, fetch: 16, whole: false }),
        Arc::new(SpeCache { bits: 1, group: 32, residual: 32, fetch: 16, whole: true }),
    ]
}

fn blended(recompute: f64, chunk: u32, then: &Arc<dyn Policy>) -> Composed {
    let parts = vec![Arc::new(blend(recompute, chunk)) as Arc<dyn Policy>, Arc::clone(then)];
    Composed::new(parts).expect("go together")
}

#[test]
fn behind_one_chunk_where_it_stood_others_do_what_they_do_alone() {
    let engine = small();
    let of = |policy: &dyn Policy| {
        outcome(&run(&engine, policy, &prompts(), 12, Schedule::Static, DType::F16))
    };
    for then in behind(32).iter().chain(&storing()) {
        let alone = of(then.as_ref());
        assert!(of(&blended(0.3, 200, then)) == alone, "{}", then.label());
        assert!(of(&blended(0.3, 32, then)) != alone, "{}: chunks miss something", then.label());
    }
}

#[test]
fn with_room_for_everything_others_change_nothing_of_a_blended_cache() {
    let engine = small();
    let of = |policy: &dyn Policy| {
        let result = run(&engine, policy, &prompts(), 12, Schedule::Static, DType::F16);
        let anew: Vec<Vec<u32>> = result.sequences.iter().map(|s| s.forwarded.clone()).collect();
        (outcome(&result), anew)
    };
    let (plain, anew) = of(&blend(0.2, 32));
    assert!(anew[0].len() < 150 && anew[0] != (0..150).collect::<Vec<_>>(), "{anew:?}");
    for (then, tight) in behind(512).iter().zip(&behind(32)) {
        assert!(of(&blended(0.2, 32, then)) == (plain.clone(), anew.clone()), "{}", then.label());
        let (outcome, chosen) = of(&blended(0.2, 32, tight));
        assert!(outcome != plain, "{}", tight.label());
        // What is computed anew is chosen by the chunks, whatever is ranked for the cache meanwhile.
        assert_eq!(chosen, anew, "{}", tight.label());
    }
}

#[test]
fn what_asks_for_the_queries_of_the_whole_prompt_is_refused() {
    let model = small().model.clone();
    let request = Request::new(&model, 150, DType::F16);
    let budget = Budget::Tokens(64);
    let wide = SnapKv::new(budget);
    let chunked = BatchMax::new(budget);
    let chunked = BatchMax { cut: Cut { chunk: Some(64), ..chunked.cut }, ..chunked };
    let cases: [(Arc<dyn Policy>, &str); 5] = [
        (Arc::new(H2o::new(budget)), "queries of the whole prompt"),
        (Arc::new(ExpectedAttention::new(budget)), "queries of the whole prompt"),
        (Arc::new(wide), "a window of 32 queries, and a question of 24 tokens"),
        (Arc::new(chunked), "put together at once"),
        (Arc::new(Less::new(budget)), "states are made of a prompt that is read whole"),
    ];
    for (then, why) in cases {
        let refused = blended(0.2, 32, &then).check(&request).expect_err(&then.label());
        assert!(refused.to_string().contains(why), "{}: {refused}", then.label());
        // All computed anew, nothing is missing.
        blended(1.0, 32, &then).check(&request).expect("a plain prefill");
    }
    let [quest, ..] = &behind(64)[..] else { unreachable!("there are some") };
    let refused = Composed::new(vec![Arc::clone(quest), Arc::new(blend(0.2, 32))]);
    assert!(refused.expect_err("the wrong order").to_string().contains("cacheblend+kivi"));
}
