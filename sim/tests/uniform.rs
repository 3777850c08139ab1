//! Equal sequences that are lowered once are those that are lowered each time.

use batchmax_sim::load::{Hit, Load, Schedule};
use batchmax_sim::lower::{LowerError, Uniform, lower};
use batchmax_sim::place::{Choice, Placement};
use batchmax_sim::policy::Preset;
use batchmax_sim::profile::Catalog;

const SCHEDULES: [Schedule; 4] = [
    Schedule::Static,
    Schedule::Staggered { prefill_batch: 1 },
    Schedule::Staggered { prefill_batch: 3 },
    Schedule::Staggered { prefill_batch: 64 },
];

#[test]
fn a_batch_only_counts_the_sequences() {
    let catalog = Catalog::built_in();
    let (gpu, engine) = (catalog.gpu("h100-sxm"), catalog.engine("batchmax"));
    let (gpu, engine) = (gpu.expect("built in"), engine.expect("built in"));
    let mut compared = 0;
    for model in ["llama-3.1-8b", "gemma-2-2b"] {
        let model = catalog.model(model).expect("built in");
        let placement = Placement::new(&model, &gpu, &engine, Choice::default());
        let placement = placement.expect("it can be placed");
        let mut names = catalog.policy_names();
        names.extend(["batch-max:chunk=300,budget=700", "snapkv+kivi"].map(str::to_owned));
        for name in names {
            let policy = Preset::parse(&catalog, &name).expect("built in").policy;
            for schedule in SCHEDULES {
                for (osl, hit) in [(1, 0), (300, 0), (300, 900)] {
                    let load = |batch| {
                        let load = Load::uniform(batch, 2500, osl, schedule);
                        load.with_hit(Hit::Tokens(hit))
                    };
                    let setup = placement.setup;
                    let Ok(mut programs) = Uniform::new(&model, policy.as_ref(), &load(1), setup)
                    else {
                        continue;
                    };
                    for batch in [2, 1, 3, 4, 5, 7, 64, 6, 200, 1] {
                        let each = lower(&model, policy.as_ref(), &load(batch), setup);
                        let program = programs.at(batch).expect("a batch");
                        assert_eq!(Ok(program), each.as_ref(), "{name} {schedule} {batch}");
                        compared += 1;
                    }
                    assert_eq!(programs.at(0), Err(LowerError::EmptyLoad));
                }
            }
        }
    }
    assert!(compared > 3000, "{compared}");
}
