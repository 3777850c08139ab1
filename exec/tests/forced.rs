//! Forced tokens: a run that is told what it would have chosen is the same run, and one that is told otherwise is the run
//! of the longer prompt.

mod common;

use std::sync::atomic::AtomicBool;

use batchmax_exec::{Chosen, Engine, ExecError, RunOptions, load_of};
use batchmax_sim::load::Schedule;
use batchmax_sim::lower::lower;
use batchmax_sim::op::DType;
use batchmax_sim::policy::{Budget, ClusterKv, Full, H2o, Kivi, Policy, RefreshKv, SnapKv, ThinK};
use batchmax_sim::units::Bytes;
use common::{made_up, setup, small};

/// Generated tokens, logits [sequence][token][vocab] and the caches' bytes after the prefill.
type Path = (Vec<Vec<u32>>, Vec<Vec<Vec<f32>>>, Bytes);

fn watched(
    engine: &Engine,
    policy: &dyn Policy,
    prompts: &[Vec<u32>],
    osl: u32,
    forced: Vec<Vec<u32>>,
) -> Result<Path, ExecError> {
    let load = load_of(prompts, osl, Schedule::Static);
    let program = lower(&engine.model, policy, &load, setup(DType::F32)).expect("lowers");
    let mut logits = vec![Vec::new(); prompts.len()];
    let options = RunOptions { forced, ..RunOptions::default() };
    let stop = AtomicBool::new(false);
    let mut watch = |chosen: Chosen<'_>| {
        assert_eq!(chosen.index, logits[chosen.sequence].len(), "tokens come in order");
        logits[chosen.sequence].push(chosen.logits.to_vec());
    };
    let result =
        engine.run_watched(&program, prompts, &options, &stop, &mut |_, _| {}, &mut watch)?;
    let generated = result.sequences.into_iter().map(|s| s.generated).collect();
    Ok((generated, logits, result.kv_after_prefill))
}

#[test]
fn forcing_what_would_be_chosen_changes_no_bit() {
    let engine = small();
    let prompts = [made_up(96, 1, 512), made_up(96, 2, 512), made_up(70, 3, 512)];
    let budget = Budget::Tokens(48);
    let policies: [&dyn Policy; 3] = [&Full::default(), &SnapKv::new(budget), &H2o::new(budget)];
    for policy in policies {
        let (free, logits, bytes) =
            watched(&engine, policy, &prompts, 20, Vec::new()).expect("runs");
        assert!(logits.iter().all(|l| l.len() == 20));
        let (forced, same, same_bytes) =
            watched(&engine, policy, &prompts, 20, free.clone()).expect("runs");
        assert_eq!((forced, same_bytes), (free.clone(), bytes));
        assert!(same == logits, "{}", policy.label());
        // A part that is forced is followed by what would have followed.
        let part: Vec<Vec<u32>> = free.iter().map(|f| f[..7].to_vec()).collect();
        let (rest, same, _) = watched(&engine, policy, &prompts, 20, part).expect("runs");
        assert!(rest == free && same == logits, "{}", policy.label());
    }
}

#[test]
fn forced_tokens_count_as_seen() {
    let engine = small();
    let whole = made_up(60, 5, 512);
    let (prompt, rest) = whole.split_at(40);
    let full = Full::default();
    let (generated, logits, bytes) =
        watched(&engine, &full, &[prompt.to_vec()], 21, vec![rest.to_vec()]).expect("runs");
    assert_eq!(generated[0][..20], *rest);
    // The last logits are those of the prompt with the forced tokens; decoding adds in another order than reading.
    let (_, longer, more) =
        watched(&engine, &full, std::slice::from_ref(&whole), 1, Vec::new()).expect("runs");
    let apart = logits[0][20].iter().zip(&longer[0][0]).map(|(a, b)| (a - b).abs());
    let apart = apart.fold(0.0, f32::max);
    assert!(apart < 2e-5, "logits differ by {apart}");
    // 40 and 60 tokens are two blocks of 32 each.
    assert_eq!(bytes, more);
    assert_eq!(bytes.0, 3 * 2 * 2 * 32 * 4 * 64);
}

#[test]
fn tokens_that_can_not_be_forced_are_refused() {
    let engine = small();
    let prompts = [made_up(32, 1, 512), made_up(32, 2, 512)];
    for (forced, part) in [
        (vec![vec![1]], "2 sequences of at most 4 tokens"),
        (vec![vec![1; 5], vec![1]], "at most 5"),
        (vec![vec![1], vec![512]], "token id 512"),
    ] {
        let error = watched(&engine, &Full::default(), &prompts, 4, forced).expect_err("refused");
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn prompts_read_once_go_on_as_if_each_had_been_read() {
    let engine = small();
    let unique = [made_up(150, 1, 512), made_up(150, 2, 512)];
    let prompts: Vec<Vec<u32>> = unique.iter().cycle().take(6).cloned().collect();
    let forced: Vec<Vec<u32>> = (0..6).map(|i| made_up(9, 20 + i, 512)).collect();
    let schedule = Schedule::Staggered { prefill_batch: 2 };
    let policies: [Box<dyn Policy>; 6] = [
        Box::new(Full::default()),
        Box::new(H2o::new(Budget::Tokens(64))),
        Box::new(Kivi { bits: 4, group: 32, residual: 32, swapped: false }),
        Box::new(ThinK { drop: 0.4, window: 16, recent: 32 }),
        Box::new(RefreshKv { every: 3, ..RefreshKv::new(Budget::Tokens(40)) }),
        Box::new(ClusterKv { budget: Budget::Tokens(64), sinks: 4, per_cluster: 20 }),
    ];
    for policy in policies {
        let load = load_of(&prompts, 12, schedule);
        let program = lower(&engine.model, policy.as_ref(), &load, setup(DType::F16)).expect("ok");
        let run = |read_once| {
            let options = RunOptions { forced: forced.clone(), read_once, ..Default::default() };
            let stop = AtomicBool::new(false);
            let mut logits = Vec::new();
            let watch = &mut |c: Chosen<'_>| {
                if c.index > 0 {
                    logits.push((c.sequence, c.index, c.logits.to_vec()));
                }
            };
            let result = engine
                .run_watched(&program, &prompts, &options, &stop, &mut |_, _| {}, watch)
                .expect("runs");
            let generated: Vec<_> = result.sequences.into_iter().map(|s| s.generated).collect();
            (generated, logits, result.kv_after_prefill, result.kv_decode_peak)
        };
        assert!(run(Some(2)) == run(None), "{}", policy.label());
    }
    let load = load_of(&prompts, 12, Schedule::Static);
    let program = lower(&engine.model, &Full::default(), &load, setup(DType::F16)).expect("ok");
    let options = RunOptions { read_once: Some(2), ..Default::default() };
    let refused = engine.run(&program, &prompts, &options, &AtomicBool::new(false), &mut |_, _| {});
    let message = refused.expect_err("not staggered").to_string();
    assert!(message.contains("a static schedule"), "{message}");
}
