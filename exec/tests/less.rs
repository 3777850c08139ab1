//! LESS: a state that adds nothing is its eviction policy to the bit; one that does is held to the predicted byte.

mod common;

use std::sync::Arc;

use batchmax_exec::RunResult;
use batchmax_exec::state_maps::StateMaps;
use batchmax_sim::load::Schedule;
use batchmax_sim::op::DType;
use batchmax_sim::policy::{Budget, Cut, Full, H2o, Less, Policy};
use common::{made_up, run, small};

fn prompts() -> Vec<Vec<u32>> {
    [150, 97, 97, 33].into_iter().zip(7..).map(|(n, seed)| made_up(n, seed, 512)).collect()
}

fn outcome(result: &RunResult) -> Vec<(Vec<u32>, Vec<u32>, Vec<u32>)> {
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect();
    let of = |s: &batchmax_exec::engine::SequenceResult| {
        let logits = s.prompt_logits.as_ref().expect("kept");
        (s.generated.clone(), bits(&s.gaps), bits(logits))
    };
    result.sequences.iter().map(of).collect()
}

fn policies(budget: u32) -> Vec<(H2o, Less)> {
    [(None, true, 8), (None, false, 0), (Some(48), true, 0)]
        .map(|(chunk, decode, slack)| {
            let h2o = H2o::new(Budget::Tokens(budget));
            let h2o = H2o { cut: Cut { chunk, decode, slack, ..h2o.cut }, ..h2o };
            let less =
                Less { evicting: Arc::new(h2o.clone()), ..Less::new(Budget::Tokens(budget)) };
            (h2o, less)
        })
        .into()
}

#[test]
fn a_state_that_adds_nothing_is_h2o_bit_for_bit() {
    let engine = small();
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str, scale: f32| {
        let state = Less::new(Budget::Tokens(64)).state;
        let mut maps = StateMaps::untrained(&engine.model, state);
        for key in maps.layers.iter_mut().flat_map(|l| &mut l.keys) {
            key.scale.fill(scale);
            key.gate.fill(scale);
        }
        let path = folder.path().join(name);
        let bytes = maps.to_bytes(&engine.model, state, &[]).expect("a file");
        std::fs::write(&path, bytes).expect("written");
        Some(path.to_str().expect("a name").to_owned())
    };
    let (nothing, something) = (file("nothing", 0.0), file("something", 4.0));
    for (h2o, less) in policies(64) {
        let of = |policy: &dyn Policy| {
            run(&engine, policy, &prompts(), 24, Schedule::Static, DType::F16)
        };
        let alone = of(&h2o);
        let with = |maps: &Option<String>| of(&Less { maps: maps.clone(), ..less.clone() });
        let (same, other) = (with(&nothing), with(&something));
        assert!(outcome(&same) == outcome(&alone), "{}", less.label());
        assert!(outcome(&other) != outcome(&alone), "{}", less.label());
        // The states are all that is held beside: 3 layers x 2 heads x 8 x (32 + 1) floats of 4 sequences.
        let states = 4 * 3 * 2 * 8 * 33 * 4;
        assert_eq!(other.kv_decode_peak.0 - alone.kv_decode_peak.0, states);
    }
}

#[test]
fn with_room_for_everything_less_is_full() {
    let engine = small();
    let of = |policy: &dyn Policy| {
        outcome(&run(&engine, policy, &prompts(), 24, Schedule::Static, DType::F16))
    };
    let full = of(&Full::default());
    for (_, less) in policies(400) {
        assert!(of(&less) == full, "{}", less.label());
    }
}

#[test]
fn real_weights_need_trained_networks() {
    use batchmax_exec::{ExecError, RunOptions, load_of};
    use batchmax_sim::lower::lower;
    let mut engine = small();
    engine.weights.synthetic = false;
    let prompts = prompts();
    let policy = Less::new(Budget::Tokens(64));
    let load = load_of(&prompts, 4, Schedule::Static);
    let program = lower(&engine.model, &policy, &load, common::setup(DType::F16)).expect("lowers");
    let stop = std::sync::atomic::AtomicBool::new(false);
    let error = engine
        .run(&program, &prompts, &RunOptions::default(), &stop, &mut |_, _| {})
        .expect_err("no networks");
    assert!(matches!(error, ExecError::MissingStateMaps { .. }), "{error}");
}

#[test]
fn training_makes_up_for_some_of_what_eviction_loses() {
    use batchmax_exec::load_of;
    use batchmax_exec::state_training::{Training, train};
    use batchmax_sim::form::State;
    use batchmax_sim::lower::lower;
    use batchmax_sim::op::Protect;
    let engine = small();
    let excerpts: Vec<Vec<u32>> = (0..10).map(|i| made_up(96, 7 + i, 512)).collect();
    let load = load_of(&excerpts[..1], 1, Schedule::Static);
    let program = lower(&engine.model, &Full::default(), &load, common::setup(DType::F16));
    let program = program.expect("lowers");
    let training = Training {
        state: State { rank: 8, hidden: 16 },
        budget: 24,
        protect: Protect { sinks: 0, recent: 12 },
        tokens_of_state: 9,
        epochs: 4,
    };
    let stop = std::sync::atomic::AtomicBool::new(false);
    let counted = std::sync::atomic::AtomicU32::new(0);
    let learn = |excerpts: &[Vec<u32>], training: &Training| {
        let count = || {
            counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        };
        train(&engine, &program, excerpts, training, &stop, &count)
    };
    let (maps, learned) = learn(&excerpts, &training).expect("trains");
    assert_eq!((maps.layers.len(), learned.len()), (3, 3));
    assert_eq!(counted.into_inner(), 10 + 3);
    for errors in &learned {
        // Nothing stands out of made-up text, so that the mean of what was dropped helps a lot.
        assert!(errors.trained < 0.8 * errors.eviction, "{learned:?}");
        assert!(errors.equal < errors.more && errors.more < errors.eviction, "{learned:?}");
    }
    // What was trained runs, and again gives the same.
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("maps.safetensors");
    let bytes = maps.to_bytes(&engine.model, training.state, &[]).expect("a file");
    std::fs::write(&path, &bytes).expect("written");
    let less = Less::new(Budget::Tokens(64));
    let maps = Some(path.to_str().expect("a name").to_owned());
    let less = Less { state: training.state, maps, ..less };
    run(&engine, &less, &prompts(), 8, Schedule::Static, DType::F16);
    let again = train(&engine, &program, &excerpts, &training, &stop, &|| {}).expect("trains").0;
    assert!(again.to_bytes(&engine.model, training.state, &[]).expect("a file") == bytes);
    // Too little to learn from.
    for (few, budget) in [(1, 24), (10, 90)] {
        let training = Training { budget, ..training };
        let error = train(&engine, &program, &excerpts[..few], &training, &stop, &|| {});
        assert!(error.is_err_and(|e| e.to_string().contains("hint: ")), "{few} at {budget}");
    }
}
