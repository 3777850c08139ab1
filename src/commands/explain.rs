//! `batchmax explain`: the program of a configuration.

use anyhow::Result;
use batchmax_sim::explain::explain;
use batchmax_sim::load::Load;
use batchmax_sim::lower::lower;
use batchmax_sim::memory::footprint;

use crate::cli::{ConfigArgs, Global};
use crate::commands::Outcome;
use crate::report::{answer, table};
use crate::setting::{self, Places};
use batchmax_sim::policy::Preset;
use batchmax_sim::units::Bytes;

/// Needs no cost model: a program is explained before anything is timed.
pub fn run(places: &Places, args: &ConfigArgs, _global: &Global) -> Result<Outcome> {
    let model = setting::model(places, &args.model)?;
    let local = args.gpu == setting::LOCAL;
    if !local {
        places.catalog.gpu(&args.gpu)?;
    }
    let setup = setting::setup(&model, local, &args.memory)?;
    let preset = Preset::parse(&places.catalog, &args.policy)?;
    let batch = setting::batch(&args.batch)?.unwrap_or(1);
    let load = Load::uniform(
        batch,
        setting::tokens(&args.isl, "--isl")?,
        setting::tokens(&args.osl, "--osl")?,
        setting::schedule(&args.schedule)?,
    );
    let program = lower(&model, preset.policy.as_ref(), &load, setup)?;
    let memory = table::memory(&footprint(&model, &program, Bytes(0)));
    answer(&format!("{}\nmemory\n{memory}", explain(&model, &program)));
    Ok(Outcome::Answered)
}
