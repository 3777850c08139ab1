//! `batchmax calibrate`: fits cost models to measurements that exist, and scores them.

mod check;
mod engines;
#[cfg(feature = "exec")]
mod machine;
mod points;

use anyhow::Result;

use crate::cli::{CalibrateArgs, CalibrateCommand, Global};
use crate::commands::Outcome;
use crate::setting::Places;

/// Fits or scores.
pub fn run(places: &Places, args: &CalibrateArgs, global: &Global) -> Result<Outcome> {
    match &args.command {
        Some(CalibrateCommand::Check(args)) => return check::run(places, args, global),
        Some(CalibrateCommand::Engines(args)) => return engines::run(places, args, global),
        None => {}
    }
    let is_csv =
        |p: &std::path::PathBuf| p.extension().is_some_and(|e| e.eq_ignore_ascii_case("csv"));
    if args.points.iter().any(is_csv) {
        return points::run(places, args, global);
    }
    #[cfg(feature = "exec")]
    return machine::run(places, args, global);
    #[cfg(not(feature = "exec"))]
    anyhow::bail!("this build has no executor; --points must name CSV files of kernel timings");
}
