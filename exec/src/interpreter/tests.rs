//! What shows between two steps only.

use std::sync::atomic::AtomicBool;

use batchmax_sim::kv::KvLayout;
use batchmax_sim::load::Schedule;
use batchmax_sim::lower::{Setup, lower};
use batchmax_sim::op::{DType, Phase};
use batchmax_sim::policy::SpeCache;
use batchmax_sim::profile::Catalog;

use crate::clock::Clock;
use crate::engine::{Engine, RunOptions};
use crate::load_of;
use crate::weights::Weights;

fn small() -> Engine {
    let mut model = Catalog::built_in().model("smollm2-135m").expect("built in");
    model.name = "small".to_owned();
    (model.layers, model.vocab, model.hidden, model.ffn) = (3, 512, 192, 320);
    (model.heads, model.kv_heads, model.head_dim) = (6, 2, 32);
    let weights = Weights::synthetic(&model, DType::F32).expect("executable");
    Engine::new(model, weights, 2)
}

/// Logits of both rows of each generating step, where the guess is another in front of step `at`.
fn logits(engine: &Engine, at: Option<usize>) -> Vec<[Vec<f32>; 2]> {
    let setup = Setup {
        kv: KvLayout { dtype: DType::F32, block_tokens: 32, shares_prefix: false },
        weights: DType::F32,
        activations: DType::F32,
        head: DType::F32,
        tp: 1,
    };
    let prompts = [(0..200).map(|i| (i * 7919 + i * i * 31) % 512).collect::<Vec<u32>>()];
    let load = load_of(&prompts, 8, Schedule::Static);
    let policy = SpeCache { fetch: 16, ..SpeCache::default() };
    let program = lower(&engine.model, &policy, &load, setup).expect("lowers");
    let stop = AtomicBool::new(false);
    let options = RunOptions::default();
    let mut interpreter =
        engine.interpreter(&program, &prompts, &options, &stop).expect("an interpreter");
    let mut clock = Clock::new(&program, false);
    let (vocab, mut found) = (engine.model.vocab as usize, Vec::new());
    program
        .visit_steps(|view| {
            // The step that only looks ahead has one row.
            let rows = view.pass.before.ops[0].lanes_at(view.step, view.shift).rows();
            let generates = view.pass.phase == Phase::Decode && rows == 2;
            if generates && Some(found.len()) == at {
                let guess = interpreter.sequences[0].guesses.last_mut().expect("a guess");
                *guess = (*guess + 1) % 512;
            }
            interpreter.step(&view, &mut clock)?;
            if generates {
                let row = |r: usize| interpreter.slots.logits[r * vocab..(r + 1) * vocab].to_vec();
                found.push([row(0), row(1)]);
            }
            Ok::<(), crate::ExecError>(())
        })
        .expect("runs");
    found
}

/// A guess decides what is fetched for the step after, and nothing of its own step's token.
#[test]
fn a_guess_changes_no_bit_of_its_steps_token() {
    let engine = small();
    let plain = logits(&engine, None);
    assert!(plain.len() >= 6, "{} steps", plain.len());
    for at in [0, 3] {
        let other = logits(&engine, Some(at));
        for step in 0..=at {
            assert!(other[step][0] == plain[step][0], "another guess at {at} changed step {step}");
        }
        assert!(other[at][1] != plain[at][1], "the other guess at {at} was not taken");
    }
}
