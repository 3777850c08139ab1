//! `batchmax import`: data that others measured, in the two CSV layouts of this project: points (one kernel call a row)
//! and runs (one metric a row).
//!
//! Input is not trusted: a file that is not what it should be is an error of one line; a row that is not is left out and
//! counted. Outputs appear whole or not at all.

#[cfg(feature = "import-parquet")]
mod aiconfigurator;
mod aiconfigurator_runs;
#[cfg(feature = "import-parquet")]
mod aiconfigurator_tables;
mod batchmax_profile;
mod batchmax_validate;
mod output;
mod package;
#[cfg(feature = "import-parquet")]
mod parquet_columns;
mod points;
mod runs;
mod sheet;
mod summary;
mod vidur;
mod vllm_bench;
mod vllm_log;

use std::path::Path;

use anyhow::{Result, bail};
use batchmax_sim::profile::Catalog;
use serde_json::json;

use crate::cli::Global;
use crate::cli::import::{ImportArgs, ImportFrom, PackageArgs};
use crate::commands::Outcome;
use crate::report::progress::Turning;
use crate::report::{answer, json, remark};
use crate::setting::Places;

use summary::Summary;

/// Imports.
pub fn run(places: &Places, args: &ImportArgs, global: &Global) -> Result<Outcome> {
    let dir = match &args.out {
        Some(dir) => dir.clone(),
        None => places.data_dir.join("imports").join(args.from.name()),
    };
    let catalog = &places.catalog;
    let mut summary = Summary::default();
    let turning = Turning::new(global, "reading");
    match &args.from {
        ImportFrom::Aiconfigurator(from) => aiconfigurator(catalog, from, &dir, &mut summary)?,
        ImportFrom::AiconfiguratorRuns(from) => {
            aiconfigurator_runs::import(catalog, from, &dir, &mut summary)?;
        }
        ImportFrom::Vidur(from) => vidur::import(catalog, from, &dir, &mut summary)?,
        ImportFrom::VllmLog(from) => vllm_log::import(catalog, from, &dir, &mut summary)?,
        ImportFrom::VllmBench(from) => vllm_bench::import(catalog, from, &dir, &mut summary)?,
        ImportFrom::BatchmaxProfile(from) => {
            batchmax_profile::import(catalog, from, &dir, &mut summary)?;
        }
        ImportFrom::BatchmaxValidate(from) => {
            batchmax_validate::import(catalog, from, &dir, &mut summary)?;
        }
    }
    drop(turning);
    for line in summary.lines() {
        remark(global.quiet, &line);
    }
    if summary.files.is_empty() {
        bail!("no row could be imported{}", summary.chief_reason());
    }
    if global.json {
        let body = json!({ "files": summary.files, "left_out": summary.left_out() });
        answer(&json::document("import", body));
    } else {
        for file in &summary.files {
            answer(&format!("{}: {} rows", file.path.display(), file.rows));
        }
    }
    Ok(Outcome::Answered)
}

#[cfg(feature = "import-parquet")]
fn aiconfigurator(
    catalog: &Catalog,
    from: &PackageArgs,
    dir: &Path,
    summary: &mut Summary,
) -> Result<()> {
    aiconfigurator::import(catalog, from, dir, summary)
}

#[cfg(not(feature = "import-parquet"))]
fn aiconfigurator(
    _catalog: &Catalog,
    from: &PackageArgs,
    _dir: &Path,
    _summary: &mut Summary,
) -> Result<()> {
    bail!(
        "{}: this build reads no Parquet files; hint: cargo build --release --features import-parquet",
        from.package.display()
    )
}

#[cfg(all(test, not(feature = "import-parquet")))]
mod tests {
    use super::*;

    #[test]
    fn a_build_without_parquet_says_how_to_get_it() {
        let from = PackageArgs { package: "x.whl".into(), gpu: None };
        let error =
            aiconfigurator(&Catalog::built_in(), &from, Path::new("out"), &mut Summary::default());
        let error = error.expect_err("refused").to_string();
        assert!(error.contains("--features import-parquet") && !error.contains('\n'), "{error}");
    }
}
