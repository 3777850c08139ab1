//! `batchmax explain`: the program of a configuration.

use anyhow::Result;
use batchmax_sim::explain::{explain, shape};
use batchmax_sim::load::Load;
use batchmax_sim::lower::lower;
use batchmax_sim::memory::{Footprint, footprint};
use batchmax_sim::op::Op;
use batchmax_sim::policy::Preset;
use batchmax_sim::program::Program;
use batchmax_sim::units::Bytes;
use serde_json::{Value, json};

use crate::cli::{ConfigArgs, Global};
use crate::commands::Outcome;
use crate::report::{answer, json, table};
use crate::setting::{self, Places, Wanted};

/// Needs no cost model: a program is explained before anything is timed.
pub fn run(places: &Places, args: &ConfigArgs, global: &Global) -> Result<Outcome> {
    let model = setting::model(places, &args.model)?;
    let preset = Preset::parse(&places.catalog, &args.policy)?;
    let schedule = setting::schedule(&args.schedule)?;
    let wanted = Wanted::of(args, &model, &preset, schedule)?;
    let placement = if args.gpu == setting::LOCAL {
        setting::refuse_devices(&args.placement)?;
        None
    } else {
        Some(wanted.placement(places)?)
    };
    let (model, setup) = match &placement {
        Some(placement) => (placement.model.clone(), placement.setup),
        None => (model.clone(), setting::setup_here(places, setting::LOCAL, &model, &args.memory)?),
    };
    let batch = setting::batch(&args.batch)?.unwrap_or(1);
    let load = Load::uniform(
        batch,
        setting::tokens(&args.isl, "--isl")?,
        setting::tokens(&args.osl, "--osl")?,
        schedule,
    )
    .with_hit(setting::hit(&args.prefix_hit)?)
    .with_spread(setting::spread(&args.osl_spread)?);
    let program = lower(&model, preset.policy.as_ref(), &load, setup)?;
    let memory = match &placement {
        Some(placement) => placement.footprint(&program),
        None => footprint(&model, &program, Bytes(0)),
    };
    if global.json {
        answer(&document(&program, &memory));
    } else {
        answer(&format!("{}\nmemory\n{}", explain(&model, &program), table::memory(&memory)));
    }
    Ok(Outcome::Answered)
}

/// The listing as data: sizes are of the first step of a pass and of one layer, as in the text.
fn document(program: &Program, memory: &Footprint) -> String {
    let mut passes = Vec::new();
    program.visit_passes(|index, pass, times| {
        let blocks: Vec<_> = pass
            .blocks()
            .filter(|(_, block)| !block.ops.is_empty())
            .map(|(_, block)| {
                let ops: Vec<_> = block.ops.iter().map(|op| operation(op, pass.steps > 1)).collect();
                json!({ "times": block.times(), "ops": ops })
            })
            .collect();
        passes.push(json!({
            "pass": index, "phase": pass.phase.name(), "steps": pass.steps, "times": times, "blocks": blocks,
        }));
    });
    let header = &program.header;
    let body = json!({
        "model": header.model,
        "policy": header.policy,
        "schedule": header.load.schedule.to_string(),
        "batch": header.load.batch(),
        "requests": header.load.sequences(),
        "prefix_hit": header.load.groups.first().map_or(0, |g| g.hit),
        "passes": passes,
        "memory": json::footprint(memory),
    });
    json::document("explain", body)
}

fn operation(op: &Op, growing: bool) -> Value {
    let work = op.work(0);
    json!({ "op": op.name, "shape": shape(op, growing), "flops": work.flops, "bytes": work.bytes() })
}
