//! Fits kernel surfaces to timings of GPUs and writes them, one file per device and framework.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use batchmax_sim::surface::{Library, Origin, Sample, Surface, fit_all, read_points, to_text};
use serde_json::json;

use crate::cli::{CalibrateArgs, Global, PointFilter};
use crate::commands::Outcome;
use crate::dates::today;
use crate::paths::write_whole;
use crate::report::progress::Late;
use crate::report::{answer, json, remark, table};
use crate::setting::Places;

/// Refused rows that are printed; the rest is counted.
const SHOWN_REFUSALS: usize = 5;

/// Who measured the public timings, by the first word of their `source` column.
const KNOWN_SOURCES: [(&str, &str, &str); 5] = [
    (
        "aic",
        "NVIDIA aiconfigurator-core 0.12.0, Copyright (c) 2025-2026 NVIDIA CORPORATION & AFFILIATES",
        "Apache-2.0",
    ),
    ("vidur", "microsoft/vidur 7d47513 data/profiling, Copyright (c) Microsoft Corporation", "MIT"),
    (
        "llmservingsim",
        "casys-kaist/LLMServingSim 5daddb2, Copyright (c) 2024 CASYS Lab at KAIST",
        "MIT",
    ),
    ("infersim", "alibaba/InferSim f2293da bench_data, Alibaba InferSim", "Apache-2.0"),
    (
        "llmcompass",
        "PrincetonUniversity/LLMCompass 2e015fd, Copyright (c) 2024 Princeton University",
        "BSD-3-Clause",
    ),
];

/// Fits and writes.
pub fn run(places: &Places, args: &CalibrateArgs, global: &Global) -> Result<Outcome> {
    let samples = read(places, &args.points, &args.filter, global)?;
    let date = today();
    let kernels: BTreeSet<_> = samples.iter().map(|sample| &sample.id).collect();
    let bar = RefCell::new(Late::new(global, kernels.len() as u64, "fitting kernels"));
    // Asked for once by each kernel, before it is fitted.
    let origin = |sample: &Sample| {
        bar.borrow_mut().step();
        let word = sample.source.split([':', '@']).next().unwrap_or_default();
        let known = KNOWN_SOURCES.iter().find(|(name, ..)| *name == word);
        let (source, licence) = match (&args.source, known) {
            (Some(source), _) => (source.clone(), args.licence.clone()),
            (None, Some((_, source, licence))) => ((*source).to_owned(), (*licence).to_owned()),
            (None, None) => (word.to_owned(), args.licence.clone()),
        };
        Origin { source, licence, date: date.clone() }
    };
    // The shipped surfaces are fitted from all there is; a user's few timings bend what is known.
    let known = (!args.alone).then(|| Library::new(places.catalog.clone(), Vec::new()));
    let surfaces = fit_all(&places.catalog, known.as_ref(), &samples, origin);
    drop(bar);
    let root = args.out.clone().unwrap_or_else(|| places.data_dir.join("kernels"));
    let mut files: BTreeMap<PathBuf, Vec<Surface>> = BTreeMap::new();
    for surface in &surfaces {
        let name = match surface.id.framework.as_str() {
            "-" => "memory-bound",
            other => other,
        };
        if name.contains(['/', '\\']) || name.starts_with('.') {
            bail!("framework \"{name}\" can't name a file");
        }
        let path = root.join(&surface.id.gpu).join(format!("{name}.toml"));
        files.entry(path).or_default().push(surface.clone());
    }
    for (path, surfaces) in &files {
        write_whole(path, to_text(surfaces))?;
    }
    if global.json {
        let list: Vec<_> = surfaces
            .iter()
            .map(|s| json!({ "id": s.id, "core": s.core, "errors": s.errors }))
            .collect();
        answer(&json::document(
            "calibrate",
            json!({ "surfaces": list, "files": files.keys().collect::<Vec<_>>() }),
        ));
    } else {
        let rows = surfaces.iter().map(row).collect();
        let head = ["device", "framework", "kernel", "type", "points", "median", "p95", "bias"];
        answer(&format!(
            "{}\n{} surfaces in {} files under {}; errors on keys left out of their own prediction",
            table::table(&head, rows, 4),
            surfaces.len(),
            files.len(),
            root.display()
        ));
    }
    Ok(Outcome::Answered)
}

fn row(surface: &Surface) -> Vec<String> {
    let (id, errors) = (&surface.id, &surface.errors);
    vec![
        id.gpu.clone(),
        id.framework.clone(),
        format!("{} {}", id.kernel.name(), id.variant),
        id.dtype.clone(),
        surface.points().to_string(),
        format!("{:.1} %", 100.0 * errors.median),
        format!("{:.1} %", 100.0 * errors.p95),
        table::percent(errors.bias),
    ]
}

/// All timings of `files` that `filter` lets pass; refused rows are counted and the first ones shown.
pub fn read(
    places: &Places,
    files: &[PathBuf],
    filter: &PointFilter,
    global: &Global,
) -> Result<Vec<Sample>> {
    let gpu = match &filter.gpu {
        Some(name) => Some(places.catalog.gpu(name)?.name),
        None => None,
    };
    let keep = |sample: &Sample| {
        gpu.as_ref().is_none_or(|g| *g == sample.id.gpu)
            && filter.framework.as_ref().is_none_or(|f| *f == sample.id.framework)
            && filter.dtype.as_ref().is_none_or(|d| *d == sample.id.dtype)
    };
    let mut all = Vec::new();
    for path in files {
        let (samples, refused) = read_one(places, path)?;
        for error in refused.iter().take(SHOWN_REFUSALS) {
            remark(global.quiet, &format!("refused {error}"));
        }
        if refused.len() > SHOWN_REFUSALS {
            let more = refused.len() - SHOWN_REFUSALS;
            remark(global.quiet, &format!("{}: {more} more rows refused", path.display()));
        }
        all.extend(samples.into_iter().filter(keep));
    }
    if all.is_empty() {
        bail!(
            "no usable timing in --points; hint: see the refused rows, and --gpu, --framework, --dtype"
        );
    }
    Ok(all)
}

fn read_one(
    places: &Places,
    path: &Path,
) -> Result<(Vec<Sample>, Vec<batchmax_sim::surface::PointError>)> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    read_points(&path.display().to_string(), BufReader::new(file), &places.catalog)
        .map_err(|e| anyhow!("{e}"))
}
