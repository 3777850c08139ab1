//! Every policy that ships: lowered, run, held to what was predicted, site by site.

mod common;

use std::sync::atomic::AtomicBool;

use batchmax_exec::weights::Weights;
use batchmax_exec::{Engine, RunOptions};
use batchmax_sim::cost::predict;
use batchmax_sim::cost::roofline::{Efficiency, Roofline};
use batchmax_sim::load::{Group, Load, Schedule};
use batchmax_sim::lower::lower;
use batchmax_sim::memory::{Footprint, footprint};
use batchmax_sim::op::DType;
use batchmax_sim::policy::Preset;
use batchmax_sim::profile::Catalog;
use batchmax_sim::timeline::compare;
use batchmax_sim::units::Bytes;
use common::{made_up, setup, small_model};

#[test]
fn every_preset_runs_and_holds_what_is_predicted() {
    // Deep enough that four layers can read others' caches.
    let mut model = small_model();
    model.layers = 9;
    model.name = "small".to_owned();
    let weights = Weights::synthetic(&model, DType::F32).expect("executable");
    let engine = Engine::new(model, weights, 2);
    let catalog = Catalog::built_in();
    let device = catalog.gpu("h100-sxm").expect("built in");
    let cost = Roofline::new(device, Efficiency::default());
    // Two sequences of 600 tokens and one of 450: budgets of a quarter hold windows of 64.
    let groups =
        [(2, 600), (1, 450)].map(|(sequences, isl)| Group { sequences, isl, osl: 40, hit: 0 });
    let load = Load::new(groups.to_vec(), Schedule::Static);
    let prompts = [600, 600, 450].map(|n| made_up(n, n as u32 + 3, 512));
    let names = catalog.policy_names();
    assert!(names.len() > 20, "{names:?}");
    for name in names {
        let preset = Preset::parse(&catalog, &name).expect("a preset");
        let program = lower(&engine.model, preset.policy.as_ref(), &load, setup(DType::F16))
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        let options = RunOptions::default();
        let stop = AtomicBool::new(false);
        let result = engine
            .run(&program, &prompts, &options, &stop, &mut |_, _| {})
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        let footprint: Footprint = footprint(&engine.model, &program, Bytes(0));
        for (predicted, held) in [
            (footprint.kv_prefill_peak, result.kv_prefill_peak),
            (footprint.kv_decode_peak, result.kv_decode_peak),
        ] {
            assert!(footprint.allows(predicted, held), "{name}: {held} for {predicted}");
        }
        let comparison = compare(&predict(&cost, &program), &result.timeline);
        assert_eq!(comparison.unmatched, [], "{name}");
        assert!(result.sequences.iter().all(|s| s.generated.len() == 40), "{name}");
    }
}
