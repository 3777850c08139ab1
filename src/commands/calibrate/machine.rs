//! Fits the CPU cost models to what `batchmax profile` measured.

use anyhow::{Result, anyhow, bail};
use batchmax_exec::profile::Measurements;
use serde_json::json;

use crate::cli::{CalibrateArgs, Global, MemoryArgs};
use crate::commands::{Outcome, profile};
use crate::report::{answer, json};
use crate::setting::{self, LOCAL, Places};

/// Fits and prints.
pub fn run(places: &Places, args: &CalibrateArgs, global: &Global) -> Result<Outcome> {
    let memory = MemoryArgs {
        memory: None,
        kv_memory: None,
        weight_dtype: None,
        kv_dtype: None,
        threads: args.threads,
    };
    let path = match args.points.as_slice() {
        [one] => one.clone(),
        [_, second, ..] => bail!(
            "--points {}: one file of `batchmax profile` at a time; timings of GPUs are CSV",
            second.display()
        ),
        [] => {
            let threads = setting::threads(&memory)?;
            places.newest_measurements(LOCAL, threads).ok_or_else(|| {
                anyhow!(
                    "no measurements of this machine with {threads} threads; hint: batchmax profile measures it"
                )
            })?
        }
    };
    let text = std::fs::read_to_string(&path).map_err(|e| {
        anyhow!("{}: {e}; hint: batchmax profile measures this machine", path.display())
    })?;
    let measurements: Measurements = serde_json::from_str(&text).map_err(|e| {
        anyhow!("{}: {e}; hint: batchmax profile writes such a file", path.display())
    })?;
    let sound = |x: f64| x.is_finite() && x > 0.0;
    if let Some((family, point)) = measurements.points.iter().find(|(_, p)| !sound(p.seconds)) {
        return Err(anyhow!(
            "{}: a {} point takes {} seconds; times are positive",
            path.display(),
            family.name(),
            point.seconds
        ));
    }
    let fitted = profile::store(places, &measurements, None)?;
    if global.json {
        answer(&json::document("profile", json!({ "profile": fitted })));
    } else {
        answer(&profile::summary(&fitted));
    }
    Ok(Outcome::Answered)
}
