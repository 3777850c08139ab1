//! Cached prefixes: what is resident, what is read, what memory is held once.

use batchmax_sim::kv::KvLayout;
use batchmax_sim::load::{Group, Hit, Load, Schedule};
use batchmax_sim::lower::{LowerError, Setup, lower, lower_prefix};
use batchmax_sim::memory::{kv_peaks, kv_trace};
use batchmax_sim::op::{DType, OpKind};
use batchmax_sim::policy::{Policy, Preset};
use batchmax_sim::profile::{Catalog, Model};
use batchmax_sim::program::Program;
use batchmax_sim::units::{Bytes, Tokens};
use proptest::prelude::*;

/// Bytes a token of `SmolLM2` 135M in f16: 30 layers x 2 x 3 heads x 64 channels x 2 B.
const KV: u64 = 23_040;

fn model() -> Model {
    Catalog::built_in().model("smollm2-135m").expect("built in")
}

fn setup(block_tokens: Tokens, shares_prefix: bool) -> Setup {
    Setup {
        kv: KvLayout { dtype: DType::F16, block_tokens, shares_prefix },
        weights: DType::F32,
        activations: DType::F32,
        head: DType::F32,
        tp: 1,
    }
}

fn policy(name: &str) -> std::sync::Arc<dyn Policy> {
    Preset::parse(&Catalog::built_in(), name).expect("a policy").policy
}

fn try_lower(name: &str, load: &Load, setup: Setup) -> Result<Program, LowerError> {
    lower(&model(), policy(name).as_ref(), load, setup)
}

fn program(name: &str, load: &Load, setup: Setup) -> Program {
    try_lower(name, load, setup).expect("it lowers")
}

fn uniform(batch: u32, isl: Tokens, osl: Tokens, hit: Tokens) -> Load {
    Load::uniform(batch, isl, osl, Schedule::Static).with_hit(Hit::Tokens(hit))
}

/// Rows of the first pass, and tokens that its attention sees.
fn first_pass(program: &Program) -> (u32, Tokens) {
    let mut found = None;
    program.visit_passes(|_, pass, _| {
        let attend = |op: &&batchmax_sim::op::Op| matches!(op.kind, OpKind::Attend { .. });
        let attend = pass.layers[0].ops.iter().find(attend).expect("a layer attends");
        let lane = attend.lanes.as_slice()[0];
        found.get_or_insert((lane.rows, lane.kv));
    });
    found.expect("a pass")
}

#[test]
fn a_shared_prefix_is_held_once() {
    let load = uniform(4, 100, 1, 70);
    let shared = program("full", &load, setup(16, true));
    assert_eq!(first_pass(&shared), (30, 100));
    // 70 tokens are four whole blocks that all four hold, and six tokens of a block that each has to itself; 100 tokens are
    // seven blocks: 64 + 4 x (112 - 64).
    assert_eq!(kv_peaks(&shared).prefill, Bytes((64 + 4 * 48) * KV));
    let own = program("full", &load, setup(16, false));
    assert_eq!(kv_peaks(&own).prefill, Bytes(4 * 112 * KV));
    assert_eq!(own.nodes, shared.nodes);
    assert_eq!(kv_trace(&shared), [Bytes(256 * KV)]);
}

#[test]
fn one_token_at_least_is_read() {
    let program_of = |hit| program("full", &uniform(2, 100, 3, hit), setup(32, false));
    assert_eq!(first_pass(&program_of(99)), (1, 100));
    assert_eq!(program_of(99).steps(), (3, 2));
    for hit in [100, 101] {
        let refused = try_lower("full", &uniform(2, 100, 3, hit), setup(32, false));
        let why = refused.expect_err("nothing is left to read").to_string();
        assert!(
            why.contains("leaves nothing to read of 100") && why.contains("99 at most"),
            "{why}"
        );
    }
}

#[test]
fn an_evicting_policy_keeps_what_its_budget_allows_of_a_prefix() {
    let name = "batch-max:budget=512,chunk=256,sinks=4,recent=32,slack=0";
    let evicted = program(name, &uniform(3, 2048, 2, 1500), setup(1, true));
    let [held] = evicted.header.held.as_slice() else { panic!("{:?}", evicted.header.held) };
    // No two sequences keep the same tokens for long: each has its own.
    assert_eq!((held.tokens, held.shared, held.layers, held.sequences), (512, 0, 30, 3));
    // 548 tokens are read in chunks of 256: the budget in every layer and one chunk in the layer at work.
    assert_eq!(first_pass(&evicted), (256, 768));
    assert_eq!(kv_peaks(&evicted).prefill, Bytes(3 * (512 * KV + 256 * KV / 30)));
    // A share is a share of the prefix, which was a prompt of its own.
    let quarter = program("snapkv:budget=25%", &uniform(1, 2048, 2, 1000), setup(1, false));
    assert_eq!(quarter.header.held[0].tokens, 250);
}

#[test]
fn what_makes_no_sense_is_refused_in_a_line() {
    let refused = |name: &str, hit| {
        let refused = try_lower(name, &uniform(1, 500, 2, hit), setup(32, false));
        refused.expect_err("refused").to_string()
    };
    let why = refused("fastkv", 100);
    assert!(why.contains("which rows of a prefix") && why.contains("hint: "), "{why}");
    let why = refused("snapkv:budget=25%", 10);
    assert!(why.contains("a cached prefix of 10 tokens: a window of 32 queries"), "{why}");
}

#[test]
fn a_sequence_that_ends_leaves_the_shared_prefix_to_others() {
    let groups = vec![
        Group { sequences: 2, isl: 100, osl: 5, hit: 32 },
        Group { sequences: 1, isl: 40, osl: 20, hit: 32 },
    ];
    let load = Load::new(groups, Schedule::Static);
    let program = program("full", &load, setup(16, true));
    // At the end the two are gone but for their prefix; the third holds 40 + 19 tokens, in four blocks.
    assert_eq!(kv_trace(&program).last(), Some(&Bytes((32 + 64) * KV)));
}

#[test]
fn the_program_of_the_prefixes_leaves_what_the_run_starts_with() {
    for name in ["full", "batch-max:budget=100,chunk=64", "snapkv:budget=30%", "kvsharer"] {
        let load = uniform(3, 400, 4, 333);
        let run = program(name, &load, setup(32, false));
        let prefix = lower_prefix(&model(), policy(name).as_ref(), &load, setup(32, false));
        let left = *kv_trace(&prefix.expect("there is a prefix")).last().expect("steps");
        let held: u64 = run.header.held.iter().map(|h| h.bytes(run.header.kv).0).sum();
        assert_eq!(left, Bytes(held), "{name}");
    }
    let none =
        lower_prefix(&model(), policy("full").as_ref(), &uniform(3, 400, 4, 0), setup(32, false));
    assert_eq!(none, None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_hit_of_nothing_is_none_and_no_hit_changes_what_is_held_at_the_end(
        name in prop::sample::select(vec![
            "full", "batch-max:budget=96,chunk=64", "batch-max:budget=50%,chunk=100",
            "snapkv:budget=25%", "streaming-llm:budget=64", "h2o:budget=64", "kvsharer",
        ]),
        (batch, osl) in (1u32..5, 1u32..40),
        (isl, hits) in (200u32..900).prop_flat_map(|isl| (Just(isl), (128..isl, 128..isl))),
        prefill_batch in prop::option::of(1u32..3),
        block in prop::sample::select(vec![1u32, 16, 32]),
    ) {
        let schedule =
            prefill_batch.map_or(Schedule::Static, |prefill_batch| Schedule::Staggered { prefill_batch });
        let at = |hit| {
            let load = Load::uniform(batch, isl, osl, schedule).with_hit(Hit::Tokens(hit));
            program(name, &load, setup(block, false))
        };
        let plain = program(name, &Load::uniform(batch, isl, osl, schedule), setup(block, false));
        prop_assert_eq!(&at(0), &plain);
        let (less, more) = (at(hits.0.min(hits.1)), at(hits.0.max(hits.1)));
        prop_assert_eq!(kv_peaks(&less).decode, kv_peaks(&plain).decode);
        prop_assert_eq!(kv_peaks(&more).decode, kv_peaks(&plain).decode);
        // The last step leaves the same, and no step holds more than the peaks say.
        let (trace, without) = (kv_trace(&more), kv_trace(&plain));
        prop_assert_eq!(trace.last(), without.last());
        let peaks = kv_peaks(&more);
        prop_assert!(trace.iter().all(|held| *held <= peaks.prefill.max(peaks.decode)));
    }

    #[test]
    fn sharing_saves_the_prefix_of_all_sequences_but_one(
        (batch, osl) in (1u32..9, 2u32..40),
        (isl, hit) in (10u32..900).prop_flat_map(|isl| (Just(isl), 0..isl)),
        block in prop::sample::select(vec![1u32, 16, 32]),
    ) {
        let at = |shares| kv_peaks(&program("full", &uniform(batch, isl, osl, hit), setup(block, shares)));
        let saved = u64::from(hit / block * block) * u64::from(batch - 1) * KV;
        prop_assert_eq!(at(true).decode + Bytes(saved), at(false).decode);
        prop_assert_eq!(at(true).prefill + Bytes(saved), at(false).prefill);
    }
}
