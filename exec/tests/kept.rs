//! Weights from a packed file against those from the model's own, for the default model: equal in every bit, as what
//! comes of them.

mod common;

use batchmax_exec::Engine;
use batchmax_exec::load::Checkpoint;
use batchmax_exec::weights::{Keeping, Weights};
use batchmax_sim::load::Schedule;
use batchmax_sim::op::DType;
use batchmax_sim::policy::{BatchMax, Budget, Full, Policy};
use common::{Golden, default_model, ids, run};

#[test]
fn the_default_model_runs_from_a_packed_file_as_from_its_own() {
    let Some(path) = default_model() else { return };
    let checkpoint = Checkpoint::open(&path).expect("the fetched model opens");
    let folder = tempfile::tempdir().expect("a directory");
    let golden = Golden::read("golden.json");
    // Their beginnings are enough to compare bits, and go through all weights.
    let begin = |mut ids: Vec<u32>| {
        ids.truncate(96);
        ids
    };
    let prompts: Vec<_> = golden.prompts().iter().map(|p| begin(ids(&p["ids"]))).collect();
    for (dtype, head) in [(DType::Q4, DType::Q8), (DType::F32, DType::F32)] {
        let load = || {
            Weights::load_kept(&checkpoint, dtype, head, folder.path()).expect("the model loads")
        };
        let (packed, first) = load();
        assert!(matches!(first, Keeping::Written { instead: None, .. }), "{first:?}");
        let (mapped, second) = load();
        assert_eq!(second, Keeping::Found);
        for (a, b) in packed.layers.iter().zip(&mapped.layers) {
            assert!(a.qkv.panels() == b.qkv.panels() && a.down.panels() == b.down.panels());
            assert!(a.output.panels() == b.output.panels());
            assert!(a.gate_up.panels() == b.gate_up.panels());
            assert!(a.attention_norm == b.attention_norm && a.ffn_norm == b.ffn_norm);
        }
        assert!(packed.embedding.panels() == mapped.embedding.panels());
        assert_eq!(packed.bytes(), mapped.bytes());
        let engines =
            [packed, mapped].map(|weights| Engine::new(checkpoint.model().clone(), weights, 2));
        let policies: [&dyn Policy; 2] = [&Full::default(), &BatchMax::new(Budget::Tokens(64))];
        for policy in policies {
            let [a, b] = engines
                .each_ref()
                .map(|engine| run(engine, policy, &prompts, 8, Schedule::Static, DType::F16));
            for (a, b) in a.sequences.iter().zip(&b.sequences) {
                assert_eq!(a.generated, b.generated);
                let bits = |logits: &Option<Vec<f32>>| -> Vec<u32> {
                    logits.as_ref().expect("kept").iter().map(|x| x.to_bits()).collect()
                };
                assert!(bits(&a.prompt_logits) == bits(&b.prompt_logits));
                assert!(a.kept == b.kept && a.gaps == b.gaps);
            }
        }
    }
}
