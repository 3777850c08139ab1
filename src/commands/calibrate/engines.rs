//! `batchmax calibrate engines`: what a step costs beside its kernels, from published runs.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use batchmax_sim::engine::{EngineFit, Generation};
use batchmax_sim::engine_fit::fit_all;
use batchmax_sim::runs::Predictor;
use batchmax_sim::surface::Library;
use serde_json::json;

use crate::cli::{EnginesArgs, Global};
use crate::commands::score::Files;
use crate::commands::{Outcome, score};
use crate::dates::today;
use crate::paths::write_whole;
use crate::report::progress::Late;
use crate::report::{answer, json, table};
use crate::setting::Places;

type Fitted = BTreeMap<(String, u32), Generation>;

/// Fits and writes.
pub fn run(places: &Places, args: &EnginesArgs, global: &Global) -> Result<Outcome> {
    let Files { rows, tiers, without, .. } = Files::read(&args.files)?;
    let library = Library::new(places.catalog.clone(), places.own_surfaces()?);
    let mut predictor = Predictor::new(&places.catalog, &library);
    let understood = score::understand(places, &rows, &without);
    // The overheads decide how many requests of a closed loop generate at a time: two rounds settle it.
    let mut bar = Late::new(global, 2 * rows.len() as u64, "fitting engines");
    let mut observe = |fitted: Option<&Fitted>| {
        score::observe(&rows, &understood, &mut predictor, &tiers, fitted, &mut || bar.step())
    };
    let first = fit_all(&observe(None));
    let fitted = fit_all(&observe(Some(&first)));
    drop(bar);
    if fitted.is_empty() {
        bail!("{}: no run that an engine could be fitted to", args.files.runs.display());
    }
    let root = args.out.clone().unwrap_or_else(|| places.data_dir.join("engines"));
    let (mut table_rows, mut list) = (Vec::new(), Vec::new());
    let mut engines: Vec<&String> = fitted.keys().map(|(engine, _)| engine).collect();
    engines.dedup();
    for name in engines {
        let mut engine = places.catalog.engine(name)?;
        for generation in &mut engine.generations {
            let Some(new) = fitted.get(&(name.clone(), generation.since)) else { continue };
            *generation = rounded(new);
            let f = new.fit;
            let percent = |x: f64| format!("{:.1} %", 100.0 * x);
            table_rows.push(vec![
                name.clone(),
                new.since.to_string(),
                f.rows.to_string(),
                format!("{:.2}", new.prefill),
                format!("{:.2}", new.decode),
                format!("{:.2}", new.attention),
                format!("{:.2}", new.grouping),
                format!("{:.2}", new.small),
                format!("{:.2}", new.sums),
                format!("{:.2} ms", new.step_s * 1e3),
                format!("{:.0} us", new.sequence_s * 1e6),
                format!("{:.0} us", new.layer_s * 1e6),
                format!("{:.2}", new.interference),
                percent(f.median),
                percent(f.p90),
                percent(f.held_out_median),
                percent(f.held_out_p90),
            ]);
            list.push(json!({ "engine": name, "generation": new }));
        }
        engine.source = format!(
            "speed fitted to published runs on {}; memory share, block size and limits are the \
             engine's documented defaults",
            today()
        );
        write_whole(&root.join(format!("{name}.toml")), &toml::to_string(&engine)?)?;
    }
    if global.json {
        answer(&json::document("calibrate-engines", json!({ "generations": list })));
    } else {
        let head = [
            "engine",
            "since",
            "runs",
            "prefill",
            "decode",
            "attention",
            "grouping",
            "small",
            "sums",
            "step",
            "sequence",
            "layer",
            "interference",
            "median",
            "p90",
            "held out",
            "p90",
        ];
        answer(&table::table(&head, table_rows, 1));
    }
    Ok(Outcome::Answered)
}

/// Four significant digits: more are noise, and make no readable diff.
fn rounded(g: &Generation) -> Generation {
    let four = |x: f64| format!("{x:.3e}").parse().unwrap_or(x);
    Generation {
        prefill: four(g.prefill),
        decode: four(g.decode),
        attention: four(g.attention),
        grouping: four(g.grouping),
        small: four(g.small),
        sums: four(g.sums),
        step_s: four(g.step_s),
        sequence_s: four(g.sequence_s),
        layer_s: four(g.layer_s),
        interference: four(g.interference),
        log_stddev: four(g.log_stddev),
        fit: EngineFit {
            median: four(g.fit.median),
            p90: four(g.fit.p90),
            held_out_median: four(g.fit.held_out_median),
            held_out_p90: four(g.fit.held_out_p90),
            ..g.fit
        },
        ..g.clone()
    }
}
