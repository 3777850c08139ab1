//! Continuous schedules: who joins when, what they hold, and that nobody is forgotten.

use batchmax_sim::kv::KvLayout;
use batchmax_sim::load::{Group, Load, Schedule};
use batchmax_sim::lower::{LowerError, Setup, lower};
use batchmax_sim::memory::{kv_peaks, kv_trace};
use batchmax_sim::metrics::Metrics;
use batchmax_sim::op::{DType, OpKind, Phase};
use batchmax_sim::policy::{Policy, Preset};
use batchmax_sim::profile::{Catalog, Model};
use batchmax_sim::program::Program;
use batchmax_sim::timeline::{Source, Span, Timeline};
use batchmax_sim::units::{Bytes, Seconds};
use proptest::prelude::*;

/// Bytes of a cached token in f16: 30 layers, 3 KV heads of 64, keys and values.
const KV: u64 = 30 * 3 * 64 * 2 * 2;
const CONTINUOUS: Schedule = Schedule::Continuous { turns: 4 };

fn smollm() -> Model {
    Catalog::built_in().model("smollm2-135m").expect("built in")
}

fn setup() -> Setup {
    Setup {
        kv: KvLayout { dtype: DType::F16, block_tokens: 1, shares_prefix: false },
        weights: DType::F32,
        activations: DType::F32,
        head: DType::F32,
        tp: 1,
    }
}

fn preset(text: &str) -> Preset {
    Preset::parse(&Catalog::built_in(), text).expect("a policy")
}

fn program(policy: &dyn Policy, load: &Load) -> Program {
    lower(&smollm(), policy, load, setup()).expect("lowers")
}

fn ragged(lengths: &[(u32, u32)], places: Option<u32>, kv: Option<Bytes>) -> Load {
    let group = |&(isl, osl)| Group { sequences: 1, isl, osl, hit: 0 };
    let mut load = Load::new(lengths.iter().map(group).collect(), CONTINUOUS);
    (load.admission.places, load.admission.kv) = (places, kv);
    load
}

/// Phase and sequences of every step.
fn steps(program: &Program) -> Vec<(Phase, Vec<u32>)> {
    let mut all = Vec::new();
    let walked: Result<(), ()> = program.visit_steps(|view| {
        let lanes = view.pass.before.ops[0].lanes_at(view.step, view.shift);
        all.push((view.pass.phase, lanes.indices().collect()));
        Ok(())
    });
    walked.expect("no error");
    all
}

#[test]
fn a_request_joins_when_another_has_its_answer() {
    use Phase::{Decode, Prefill};
    let load = ragged(&[(8, 5), (8, 2), (8, 4)], Some(2), None);
    let program = program(preset("full").policy.as_ref(), &load);
    let both = |a, b| (Decode, vec![a, b]);
    assert_eq!(
        steps(&program),
        [
            (Prefill, vec![0]),
            (Prefill, vec![1]),
            // Its second and last token.
            both(0, 1),
            (Prefill, vec![2]),
            // Three more for either: both end here.
            both(0, 2),
            both(0, 2),
            both(0, 2),
        ]
    );
    let tokens: Vec<u64> = kv_trace(&program).iter().map(|b| b.0 / KV).collect();
    assert_eq!(tokens, [8, 16, 9, 17, 19, 21, 23]);
    // Sequence 1 holds 9 tokens until the end of its last step.
    assert_eq!(kv_peaks(&program).decode, Bytes(23 * KV));
}

#[test]
fn answers_of_one_token_give_their_memory_back_at_once() {
    let load = ragged(&[(8, 1), (6, 3), (4, 1)], Some(1), None);
    let program = program(preset("full").policy.as_ref(), &load);
    let tokens: Vec<u64> = kv_trace(&program).iter().map(|b| b.0 / KV).collect();
    assert_eq!(tokens, [0, 6, 7, 0, 4]);
}

#[test]
fn one_turn_is_a_staggered_batch() {
    for policy in ["full", "batch-max:budget=64,chunk=32", "refreshkv", "specache"] {
        let preset = preset(policy);
        let continuous = Load::uniform(3, 200, 20, Schedule::Continuous { turns: 1 });
        let staggered = Load::uniform(3, 200, 20, Schedule::Staggered { prefill_batch: 1 });
        let [a, b] = [continuous, staggered].map(|l| program(preset.policy.as_ref(), &l));
        assert_eq!(a.nodes, b.nodes, "{policy}");
    }
}

#[test]
fn bytes_decide_who_joins() {
    // Each needs 8 + 4 - 1 tokens at its worst.
    let lengths = [(8, 4); 5];
    let room = |tokens: u64| {
        let load = ragged(&lengths, None, Some(Bytes(tokens * KV)));
        let steps = steps(&program(preset("full").policy.as_ref(), &load));
        steps.iter().map(|(_, sequences)| sequences.len()).max().expect("steps")
    };
    assert_eq!((room(10), room(11), room(21), room(22), room(55), room(1000)), (1, 1, 1, 2, 5, 5));
}

#[test]
fn a_cached_prefix_is_refused() {
    let mut load = Load::uniform(2, 100, 5, CONTINUOUS);
    load.groups[0].hit = 50;
    let refused = lower(&smollm(), preset("full").policy.as_ref(), &load, setup());
    assert_eq!(refused.expect_err("refused"), LowerError::HitWhileWaiting);
}

#[test]
fn waiting_counts_in_the_time_between_tokens_and_not_in_the_first() {
    let load = ragged(&[(8, 5), (8, 2), (8, 4)], Some(2), None);
    let program = program(preset("full").policy.as_ref(), &load);
    // Reading takes 10 s a prompt, generating 1 s a step.
    let mut timeline = Timeline::default();
    program.visit_passes(|index, pass, times| {
        let each = if pass.phase == Phase::Prefill { 10.0 } else { 1.0 };
        let op = &pass.before.ops[0];
        timeline.spans.push(Span {
            site: batchmax_sim::program::site(index, pass, 0, &pass.before, 0),
            family: op.family(pass.phase),
            launches: times,
            time: Seconds(each * times * f64::from(pass.steps)),
            stddev: Seconds(0.0),
            source: Source::Run,
        });
    });
    let metrics = Metrics::of(&program, &timeline);
    // The second was read behind the first; the third began when the second had left, at 21 s.
    assert_eq!(metrics.ttft, Seconds(20.0));
    // First tokens at 10, 20 and 31 s, last ones at 34, 21 and 34 s; 4 + 1 + 3 gaps.
    let expected = (24.0 + 1.0 + 3.0) / 8.0;
    assert!((metrics.tpot.0 - expected).abs() < 1e-9, "{metrics:?}");
    assert!((metrics.total.0 - 34.0).abs() < 1e-9);
}

const POLICIES: [&str; 7] = [
    "full",
    "batch-max:budget=24,chunk=16",
    "snapkv:budget=25%",
    "kivi",
    "specache",
    "refreshkv",
    "quest",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn everyone_is_served_in_order_and_within_limits(
        lengths in prop::collection::vec((1u32..200, 1u32..40), 1..9),
        places in prop::option::of(1u32..5),
        tokens in prop::option::of(240u64..900),
        policy in prop::sample::select(POLICIES.to_vec()),
    ) {
        let budget = tokens.map(|t| Bytes(t * KV));
        let load = ragged(&lengths, places, budget);
        let preset = preset(policy);
        let Ok(program) = lower(&smollm(), preset.policy.as_ref(), &load, setup()) else {
            // A policy may need longer prompts.
            return Ok(());
        };
        let (mut read, mut tokens) = (vec![0; lengths.len()], vec![0; lengths.len()]);
        let mut order = Vec::new();
        let walked: Result<(), ()> = program.visit_steps(|view| {
            let pass = view.pass;
            let lanes = pass.before.ops[0].lanes_at(view.step, view.shift);
            for lane in lanes.as_slice().iter().filter(|_| pass.phase == Phase::Prefill) {
                for s in lane.first..lane.first + lane.sequences {
                    read[s as usize] += lane.rows;
                    order.push(s);
                }
            }
            let sampled = pass.after.ops.iter().find(|op| matches!(op.kind, OpKind::Sample { .. }));
            for op in sampled.into_iter().filter(|_| !pass.only_speculates()) {
                op.lanes_at(view.step, view.shift).indices().for_each(|s| tokens[s as usize] += 1);
            }
            assert!(lanes.sequences() <= u64::from(places.unwrap_or(u32::MAX)));
            Ok(())
        });
        walked.expect("no error");
        prop_assert_eq!(read, lengths.iter().map(|l| l.0).collect::<Vec<_>>());
        prop_assert_eq!(tokens, lengths.iter().map(|l| l.1).collect::<Vec<_>>());
        prop_assert!(order.is_sorted(), "{:?}", order);
        // Every one of them fits alone: no budget here is smaller than the longest whole prompt with its answer.
        let peaks = kv_peaks(&program);
        if let Some(budget) = budget {
            prop_assert!(peaks.prefill.max(peaks.decode) <= budget, "{:?} over {}", peaks, budget);
        }
    }
}
