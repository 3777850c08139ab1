//! What must not change a result: room to spare, neighbours in the batch, chunks, threads, schedules.

mod common;

use std::sync::Arc;

use batchmax_exec::{Engine, RunResult};
use batchmax_sim::load::Schedule;
use batchmax_sim::op::DType;
use batchmax_sim::policy::{
    AdaKv, AnyScore, BatchMax, Budget, By, ClusterKv, Composed, Cut, DBudgetKv, DuoAttention,
    ExpectedAttention, Falling, FastKv, Full, H2o, Instant, Kivi, KvSharer, LagKv, Lagging, Less,
    Policy, PyramidKv, Quest, Random, RefreshKv, Snap, SnapKv, SpeCache, StreamingLlm, ThinK,
    Together, Tova,
};
use common::{made_up, run, small};

fn batch_max(by: By, budget: u32, chunk: u32) -> BatchMax {
    let cut = Cut {
        budget: Budget::Tokens(budget),
        chunk: Some(chunk),
        sinks: 4,
        recent: 16,
        slack: 8,
        decode: true,
        ..Cut::default()
    };
    BatchMax { cut, by: AnyScore { by, window: 16, pool: 5 } }
}

/// The matrix: every policy of the project, at a budget.
fn policies(budget_tokens: u32) -> Vec<Box<dyn Policy>> {
    let budget = Budget::Tokens(budget_tokens);
    let snap = |instant| SnapKv {
        cut: Cut { budget, instant, ..Cut::default() },
        by: Snap { window: 16, ..Snap::default() },
    };
    let streaming = |chunk| {
        let policy = StreamingLlm::new(budget);
        StreamingLlm { cut: Cut { chunk, slack: 8, ..policy.cut }, ..policy }
    };
    let mut all: Vec<Box<dyn Policy>> = vec![
        Box::new(snap(Instant::AfterLayer)),
        Box::new(snap(Instant::AfterPrefill)),
        Box::new(streaming(None)),
        Box::new(streaming(Some(48))),
    ];
    for by in
        [By::Recency, By::KeyNorm, By::Keydiff, By::Window, By::WindowSnap, By::Tally, By::TallySum]
    {
        all.push(Box::new(batch_max(by, budget_tokens, 48)));
        all.push(Box::new(batch_max(by, budget_tokens, 4096)));
    }
    all.push(Box::new(H2o::new(budget)));
    all.push(Box::new(Tova::new(budget)));
    let random = Random::new(budget);
    all.push(Box::new(Random { cut: Cut { recent: 16, decode: true, ..random.cut }, ..random }));
    for chunk in [None, Some(48)] {
        let by = Lagging { lag: 16 };
        all.push(Box::new(LagKv { cut: Cut { chunk, recent: 1, ..LagKv::new(budget).cut }, by }));
    }
    let expected = ExpectedAttention::new(budget);
    all.push(Box::new(ExpectedAttention { cut: Cut { recent: 16, ..expected.cut }, ..expected }));
    all
}

fn duo(sinks: u32, recent: u32, chunk: u32) -> DuoAttention {
    DuoAttention { sinks, recent, chunk, slack: 8, ..DuoAttention::default() }
}

/// Policies under which heads or layers hold different numbers of tokens, or whose results differ from full in any case.
fn uneven(budget_tokens: u32) -> Vec<Box<dyn Policy>> {
    let budget = Budget::Tokens(budget_tokens);
    let snap = Snap { window: 16, ..Snap::default() };
    let ada = AdaKv::new(budget);
    let pyramid = PyramidKv::new(budget);
    let sharer = || Arc::new(KvSharer { layers: 1, ..KvSharer::default() });
    let shared: Vec<Arc<dyn Policy>> =
        vec![sharer(), Arc::new(batch_max(By::TallySum, budget_tokens, 48))];
    vec![
        Box::new(AdaKv { by: Together(snap.clone()), ..ada }),
        Box::new(PyramidKv { by: Falling(snap), ..pyramid }),
        Box::new(FastKv { retain: 0.4, forward: 0.6, ..FastKv::default() }),
        Box::new(KvSharer { layers: 1, ..KvSharer::default() }),
        Box::new(duo(4, 40, 0)),
        Box::new(duo(4, 40, 48)),
        Box::new(Composed::new(shared).expect("goes together")),
        Box::new(Less::new(budget)),
    ]
}

/// Policies that keep everything and read a part.
fn selecting(budget: u32) -> Vec<Box<dyn Policy>> {
    let budget = Budget::Tokens(budget);
    let quest = |per_head| Quest { budget, page: 16, per_head, newest: per_head };
    vec![
        Box::new(quest(false)),
        Box::new(quest(true)),
        Box::new(ClusterKv { budget, sinks: 4, per_cluster: 20 }),
        Box::new(RefreshKv::new(budget)),
        Box::new(RefreshKv { every: 3, similarity: 1.5, ..RefreshKv::new(budget) }),
    ]
}

/// Packed tokens of which a few come back whole.
fn speculating(fetch: u32) -> SpeCache {
    SpeCache { fetch, group: 32, residual: 32, ..SpeCache::default() }
}

/// Policies that store old tokens in fewer bits or channels.
fn shrinking(budget_tokens: u32) -> Vec<Box<dyn Policy>> {
    let kivi = |bits, residual| Kivi { bits, group: 32, residual, swapped: false };
    let think = ThinK { drop: 0.4, window: 16, recent: 32 };
    let snap = || {
        let cut = Cut { budget: Budget::Tokens(budget_tokens), ..Cut::default() };
        Arc::new(SnapKv { cut, by: Snap { window: 16, pool: 5, ..Snap::default() } })
    };
    let composed = |parts: Vec<Arc<dyn Policy>>| -> Box<dyn Policy> {
        Box::new(Composed::new(parts).expect("goes together"))
    };
    let chunked = Arc::new(batch_max(By::Keydiff, budget_tokens, 48));
    vec![
        Box::new(kivi(2, 32)),
        Box::new(kivi(4, 64)),
        Box::new(kivi(8, 0)),
        Box::new(think.clone()),
        composed(vec![snap(), Arc::new(kivi(4, 32))]),
        composed(vec![snap(), Arc::new(think.clone())]),
        composed(vec![snap(), Arc::new(think), Arc::new(kivi(2, 32))]),
        composed(vec![chunked, Arc::new(kivi(4, 32))]),
    ]
}

/// The whole matrix.
fn everything(budget: u32) -> Vec<Box<dyn Policy>> {
    let mut all = policies(budget);
    all.extend(uneven(budget));
    all.extend(selecting(budget));
    all.extend(shrinking(budget));
    all.push(Box::new(speculating(budget / 4)));
    all
}

fn prompts(lengths: &[usize]) -> Vec<Vec<u32>> {
    lengths.iter().enumerate().map(|(i, n)| made_up(*n, i as u32 + 7, 512)).collect()
}

fn outcome(result: &RunResult) -> Vec<(Vec<u32>, Vec<u32>, Vec<u32>)> {
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect();
    result
        .sequences
        .iter()
        .map(|s| {
            let logits = s.prompt_logits.as_ref().expect("kept");
            (s.generated.clone(), bits(&s.gaps), bits(logits))
        })
        .collect()
}

fn outcome_of(
    engine: &Engine,
    policy: &dyn Policy,
    lengths: &[usize],
) -> Vec<(Vec<u32>, Vec<u32>, Vec<u32>)> {
    outcome(&run(engine, policy, &prompts(lengths), 24, Schedule::Static, DType::F16))
}

#[test]
fn with_room_for_everything_every_policy_is_full_bit_for_bit() {
    let engine = small();
    let lengths = [150, 97, 33];
    let full = outcome_of(&engine, &Full::default(), &lengths);
    let roomy: Box<dyn Policy> = Box::new(duo(4, 400, 0));
    for policy in policies(400).into_iter().chain(selecting(400)).chain([roomy]) {
        // Not `assert_eq!`: nobody reads thousands of numbers.
        assert!(outcome_of(&engine, policy.as_ref(), &lengths) == full, "{}", policy.label());
    }
}

#[test]
fn a_sequence_does_not_depend_on_its_neighbours() {
    let engine = small();
    // Shares of prompts of different lengths: each sequence has its own budget and window.
    let by_prompt: [Box<dyn Policy>; 2] = [
        Box::new(H2o::new(Budget::Share(0.4))),
        Box::new(DBudgetKv { loss: 0.1, deviations: 0.0, ..DBudgetKv::default() }),
    ];
    for policy in everything(64).into_iter().chain(by_prompt) {
        let together = outcome_of(&engine, policy.as_ref(), &[150, 97, 97, 33]);
        for (i, length) in [150usize, 97, 97, 33].into_iter().enumerate() {
            let alone = prompts(&[150, 97, 97, 33])[i].clone();
            assert_eq!(alone.len(), length);
            let result = run(&engine, policy.as_ref(), &[alone], 24, Schedule::Static, DType::F16);
            assert!(outcome(&result)[0] == together[i], "{}, sequence {i}", policy.label());
        }
    }
}

#[test]
fn chunks_change_nothing_while_nothing_is_dropped() {
    let engine = small();
    let whole = outcome_of(&engine, &Full::default(), &[150, 33]);
    for chunk in [1, 7, 32, 100, 149] {
        let chunked = outcome_of(&engine, &Full { chunk: Some(chunk) }, &[150, 33]);
        assert_eq!(chunked, whole, "chunks of {chunk}");
    }
}

#[test]
fn schedules_change_times_and_never_tokens() {
    let engine = small();
    for policy in everything(64) {
        let prompts = prompts(&[97, 97, 97, 97, 97]);
        let together = run(&engine, policy.as_ref(), &prompts, 12, Schedule::Static, DType::F16);
        let schedule = Schedule::Staggered { prefill_batch: 2 };
        let staggered = run(&engine, policy.as_ref(), &prompts, 12, schedule, DType::F16);
        assert_eq!(outcome(&together), outcome(&staggered), "{}", policy.label());
    }
}

#[test]
fn threads_change_nothing() {
    let one = batchmax_exec::Engine::new(
        common::small_model(),
        batchmax_exec::weights::Weights::synthetic(&common::small_model(), DType::F32)
            .expect("executable"),
        1,
    );
    let two = small();
    for policy in everything(64) {
        let lengths = [150, 97];
        assert_eq!(
            outcome_of(&one, policy.as_ref(), &lengths),
            outcome_of(&two, policy.as_ref(), &lengths),
            "{}",
            policy.label()
        );
    }
}

#[test]
fn budgets_hold_and_protected_tokens_stay() {
    let engine = small();
    for policy in policies(64) {
        let result =
            run(&engine, policy.as_ref(), &prompts(&[150, 97]), 24, Schedule::Static, DType::F16);
        for (sequence, length) in result.sequences.iter().zip([150u32, 97]) {
            for heads in sequence.kept.as_ref().expect("kept") {
                for kept in heads {
                    assert_eq!(kept.len(), 64, "{}", policy.label());
                    assert!(kept.windows(2).all(|w| w[0] < w[1]), "{}: ascending", policy.label());
                    assert_eq!(*kept.last().expect("some"), length - 1, "{}", policy.label());
                }
            }
        }
    }
}

#[test]
fn a_hard_budget_refuses_before_it_starts() {
    use batchmax_exec::{ExecError, RunOptions, load_of};
    use batchmax_sim::lower::lower;
    use batchmax_sim::memory::kv_peaks;
    use batchmax_sim::units::Bytes;
    let engine = small();
    let prompts = prompts(&[150]);
    let load = load_of(&prompts, 8, Schedule::Static);
    let program =
        lower(&engine.model, &Full::default(), &load, common::setup(DType::F16)).expect("lowers");
    let needed = kv_peaks(&program).decode;
    let options = RunOptions { kv_budget: Some(Bytes(needed.0 - 1)), ..RunOptions::default() };
    let stop = std::sync::atomic::AtomicBool::new(false);
    let error = engine
        .run(&program, &prompts, &options, &stop, &mut |_, _| {})
        .expect_err("one byte is missing");
    assert!(matches!(error, ExecError::OverBudget { .. }), "{error}");
}

#[test]
fn heads_that_share_a_budget_hold_it_together() {
    let engine = small();
    let policy = &uneven(64)[0];
    let result = run(&engine, policy.as_ref(), &prompts(&[150]), 24, Schedule::Static, DType::F16);
    let mut differ = false;
    for heads in result.sequences[0].kept.as_ref().expect("kept") {
        let counts: Vec<usize> = heads.iter().map(Vec::len).collect();
        assert_eq!(counts.iter().sum::<usize>(), 64 * heads.len());
        differ |= counts.iter().any(|c| *c != 64);
        // The window stays with every head.
        assert!(heads.iter().all(|kept| kept[kept.len() - 16..] == (134..150).collect::<Vec<_>>()));
    }
    assert!(differ, "no head has more than another");
}

#[test]
fn upper_layers_see_what_goes_on_and_nothing_else() {
    let engine = small();
    let policy = FastKv { retain: 1.0, forward: 0.5, window: 8, pool: 7, after: Some(1) };
    let kept = |policy: &dyn Policy| {
        let result = run(&engine, policy, &prompts(&[150]), 8, Schedule::Static, DType::F16);
        result.sequences[0].kept.clone().expect("kept")
    };
    let kept = kept(&policy);
    for head in kept[0].iter().chain(&kept[1]) {
        assert_eq!(*head, (0..150).collect::<Vec<_>>());
    }
    for head in &kept[2] {
        // Half of the rows, the same for all heads, the window among them, at their original positions.
        assert_eq!((head.len(), head), (75, &kept[2][0]));
        assert_eq!(head[67..], (142..150).collect::<Vec<_>>());
    }
    // Nothing left out: nothing changed.
    let all = FastKv { retain: 1.0, forward: 1.0, ..policy };
    let full = outcome_of(&engine, &Full::default(), &[150, 97]);
    assert_eq!(outcome_of(&engine, &all, &[150, 97]), full);
}

#[test]
fn fastkv_that_forwards_everything_is_snapkv() {
    let engine = small();
    // A quarter of 160 and of 96 tokens, whole numbers both.
    let fast = FastKv { retain: 0.25, forward: 1.0, window: 8, pool: 7, after: Some(1) };
    let snap = SnapKv::new(Budget::Share(0.25));
    let snap = SnapKv { by: Snap { window: 8, pool: 7, ..Snap::default() }, ..snap };
    assert_eq!(outcome_of(&engine, &fast, &[160, 96]), outcome_of(&engine, &snap, &[160, 96]));
    let full = outcome_of(&engine, &Full::default(), &[160, 96]);
    assert_ne!(outcome_of(&engine, &fast, &[160, 96]), full);
}

#[test]
fn layers_that_share_hold_nothing() {
    let engine = small();
    let policy = KvSharer { layers: 1, ..KvSharer::default() };
    let result = run(&engine, &policy, &prompts(&[150]), 8, Schedule::Static, DType::F16);
    let full = run(&engine, &Full::default(), &prompts(&[150]), 8, Schedule::Static, DType::F16);
    let kept = result.sequences[0].kept.as_ref().expect("kept");
    assert!(kept[2].iter().all(Vec::is_empty) && kept[1].iter().all(|h| h.len() == 150));
    assert_eq!(result.kv_decode_peak.0 * 3, full.kv_decode_peak.0 * 2);
    let none = KvSharer { layers: 0, ..policy };
    assert_eq!(outcome_of(&engine, &none, &[150]), outcome_of(&engine, &Full::default(), &[150]));
}

#[test]
fn nothing_is_packed_inside_the_residual() {
    let engine = small();
    let full = outcome_of(&engine, &Full::default(), &[150, 97]);
    let roomy = Kivi { bits: 2, group: 32, residual: 256, swapped: false };
    assert!(outcome_of(&engine, &roomy, &[150, 97]) == full);
    let whole = ThinK { drop: 0.0, window: 16, recent: 0 };
    assert!(outcome_of(&engine, &whole, &[150, 97]) == full);
}

#[test]
fn streaming_heads_hold_their_sinks_and_newest_tokens() {
    let engine = small();
    let policy = duo(4, 40, 0);
    let program_of =
        |osl| run(&engine, &policy, &prompts(&[150]), osl, Schedule::Static, DType::F16);
    // One token comes from the prompt's own pass: what is kept is what that left.
    let kept = program_of(1).sequences[0].kept.clone().expect("kept");
    // 44 and, of the 106 beyond, what is left over of rounds of 9.
    let newest: Vec<u32> = (0..4).chain(150 - 47..150).collect();
    for (layer, heads) in kept.iter().enumerate() {
        let short = policy.short_heads(layer as u32, &engine.model);
        assert!(!short.is_empty());
        for (head, positions) in heads.iter().enumerate() {
            if short.contains(&(head as u32)) {
                assert_eq!(*positions, newest, "layer {layer}, head {head}");
            } else {
                assert_eq!(positions.len(), 150);
            }
        }
    }
}

#[test]
fn a_partial_cache_that_is_filled_at_every_step_is_full_bit_for_bit() {
    let engine = small();
    let full = outcome_of(&engine, &Full::default(), &[150, 97]);
    let policy = RefreshKv { every: 1, similarity: 1.01, ..RefreshKv::new(Budget::Tokens(20)) };
    assert!(outcome_of(&engine, &policy, &[150, 97]) == full);
}

#[test]
fn sequences_refresh_for_themselves() {
    let engine = small();
    let policy = RefreshKv { every: 2, similarity: 0.9, ..RefreshKv::new(Budget::Tokens(20)) };
    let run_of = |prompts: &[Vec<u32>]| {
        run(&engine, &policy, prompts, 24, Schedule::Static, DType::F16).sequences
    };
    let prompts = prompts(&[150, 97, 97, 33]);
    let together = run_of(&prompts);
    let mut some = 0;
    for (prompt, together) in prompts.into_iter().zip(&together) {
        let alone = &run_of(&[prompt])[0];
        assert_eq!(alone.refreshed, together.refreshed);
        assert_eq!(alone.generated, together.generated);
        some += alone.refreshed.len();
    }
    // Eleven comparisons of three layers in four sequences: some are stale and some are not.
    assert!(some > 0 && some < 4 * 3 * 11, "{some}");
}

#[test]
fn packed_tokens_that_all_come_back_whole_are_the_full_cache() {
    let engine = small();
    let full =
        run(&engine, &Full::default(), &prompts(&[150, 97]), 24, Schedule::Static, DType::F16);
    let policy = speculating(400);
    let all = run(&engine, &policy, &prompts(&[150, 97]), 24, Schedule::Static, DType::F16);
    for (ours, full) in all.sequences.iter().zip(&full.sequences) {
        // The softmax is joined from two parts, so the last bits differ.
        let sure = full.gaps.iter().position(|gap| *gap < 1e-3).unwrap_or(24);
        assert!(sure > 4, "a made-up model that knows nothing");
        assert_eq!(ours.generated[..sure], full.generated[..sure]);
        for (a, b) in ours.gaps[..sure].iter().zip(&full.gaps) {
            assert!((a - b).abs() < 1e-3, "{a} for {b}");
        }
        assert_eq!(ours.guesses.len(), 24);
    }
    // 8-bit codes that nobody replaces are another matter.
    let few = SpeCache { fetch: 1, ..policy };
    let few = run(&engine, &few, &prompts(&[150, 97]), 24, Schedule::Static, DType::F16);
    assert!(few.sequences[0].gaps != all.sequences[0].gaps);
    // Every token of every layer went away once, but for the last one, which no step reads.
    let token = 3 * 2 * 2 * 32 * 2;
    assert_eq!(all.tier.peak.0, (150 + 23 + 97 + 23) * token);
    assert!(all.tier.fetched.0 > few.tier.fetched.0 && few.tier.fetched.0 > 0);
}

#[test]
fn a_file_serves_as_well_as_memory_and_a_full_one_refuses_before_it_starts() {
    let engine = small();
    let directory = tempfile::tempdir().expect("a directory");
    let load = batchmax_exec::load_of(&prompts(&[150, 97]), 24, Schedule::Static);
    let program = |policy: &dyn Policy| {
        batchmax_sim::lower::lower(&engine.model, policy, &load, common::setup(DType::F16))
            .expect("lowers")
    };
    let stop = std::sync::atomic::AtomicBool::new(false);
    let run_with = |policy: &SpeCache, options: &batchmax_exec::RunOptions| {
        engine.run(&program(policy), &prompts(&[150, 97]), options, &stop, &mut |_, _| {})
    };
    // 16 tokens at a time.
    let policy = speculating(16);
    let memory = run_with(&policy, &batchmax_exec::RunOptions::default()).expect("runs");
    let place = batchmax_exec::tier::TierPlace::Directory(directory.path().to_path_buf());
    let options = batchmax_exec::RunOptions { tier_place: place, ..Default::default() };
    let file = run_with(&policy, &options).expect("runs");
    assert_eq!(outcome_tokens(&memory), outcome_tokens(&file));
    // One byte too few: refused before any work.
    let needed = batchmax_sim::memory::offloaded(&program(&policy));
    assert_eq!(needed, memory.tier.peak);
    let less = batchmax_sim::units::Bytes(needed.0 - 1);
    let options = batchmax_exec::RunOptions { tier_budget: Some(less), ..Default::default() };
    let error = run_with(&policy, &options).expect_err("one byte is missing");
    assert!(matches!(error, batchmax_exec::ExecError::TierFull { .. }), "{error}");
    assert!(!error.to_string().contains('\n'));
}

fn outcome_tokens(result: &RunResult) -> Vec<Vec<u32>> {
    result.sequences.iter().map(|s| s.generated.clone()).collect()
}
