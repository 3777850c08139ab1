//! `batchmax calibrate check`: fitted kernels against timings.

use anyhow::Result;
use batchmax_sim::surface::{Library, Report, Score, check, check_held_out};
use serde_json::{Value, json};

use super::points;
use crate::cli::{CheckArgs, Global};
use crate::commands::Outcome;
use crate::report::progress::Turning;
use crate::report::{answer, json, table};
use crate::setting::Places;

/// Scores.
pub fn run(places: &Places, args: &CheckArgs, global: &Global) -> Result<Outcome> {
    let samples = points::read(places, &args.points, &args.filter, global)?;
    let turning = Turning::new(global, "checking kernels");
    let report = match args.hold_out {
        Some(part) => check_held_out(&places.catalog, &samples, part),
        None => check(&Library::new(places.catalog.clone(), places.own_surfaces()?), &samples),
    };
    drop(turning);
    if global.json {
        let groups: Vec<Value> = report
            .groups
            .iter()
            .map(|(group, score)| {
                let mut entry = json!(score);
                if let Some(map) = entry.as_object_mut() {
                    map.insert("op".to_owned(), json!(group.op));
                    map.insert("gpu".to_owned(), json!(group.gpu));
                    map.insert("framework".to_owned(), json!(group.framework));
                    map.insert("dtype".to_owned(), json!(group.dtype));
                }
                entry
            })
            .collect();
        answer(&json::document(
            "calibrate-check",
            json!({ "total": report.total, "groups": groups, "unanswered": report.unanswered }),
        ));
    } else {
        answer(&text(&report));
    }
    Ok(Outcome::Answered)
}

fn text(report: &Report) -> String {
    let head = [
        "op",
        "device",
        "framework",
        "type",
        "n",
        "median",
        "p90",
        "p95",
        "bias",
        "weighted",
        "coverage",
    ];
    let line = |names: [String; 4], s: &Score| {
        let mut row = names.to_vec();
        row.push(s.n.to_string());
        row.extend([s.median, s.p90, s.p95].map(|e| format!("{:.1} %", 100.0 * e)));
        row.push(table::percent(s.bias));
        row.push(format!("{:.1} %", 100.0 * s.time_weighted));
        row.push(format!("{:.0} %", 100.0 * s.coverage));
        row
    };
    let mut rows: Vec<Vec<String>> = report
        .groups
        .iter()
        .map(|(g, s)| {
            let names =
                [g.op.name().to_owned(), g.gpu.clone(), g.framework.clone(), g.dtype.clone()];
            line(names, s)
        })
        .collect();
    let none = || String::new();
    rows.push(line(["total".to_owned(), none(), none(), none()], &report.total));
    format!(
        "{}\nerrors relative to the measured time; weighted: of points above 50 us, by their time; \
         coverage of the 90 % interval; {} points unanswered",
        table::table(&head, rows, 4),
        report.unanswered
    )
}
