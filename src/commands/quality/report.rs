//! Measured quality as a report: loss against the bytes that are kept.

use super::Gate;
use super::results::{HEAD, Results};
use crate::report::figure::{Axis, Figure, Series};
use crate::report::page::{Report, Section, Sheet};

/// The report.
pub fn report(results: &Results, gates: &[Gate], left_out: &[String], command: String) -> Report {
    let mut series: Vec<Series> = Vec::new();
    for row in &results.rows {
        let kl = &row.measured.kl;
        let mean = kl.iter().sum::<f64>() / kl.len().max(1) as f64;
        let point = (row.measured.kv_bytes_per_token, mean);
        match series.iter_mut().find(|s| s.name == row.key.policy) {
            Some(one) => one.points.push(point),
            None => {
                let (name, points) = (row.key.policy.clone(), vec![point]);
                series.push(Series { name, points, joined: false, marked: true });
            }
        }
    }
    let figure = Figure {
        title: "Loss against bytes".to_owned(),
        x: Axis::log("cache bytes a prompt token"),
        y: Axis::log("KL(full || policy), nats"),
        series,
        source: format!("Measured on {}, {} samples; means.", results.model, results.samples),
    };
    let verdict = gates.iter().map(|g| {
        format!("gate {}: {} ({})", if g.passed { "passed" } else { "FAILED" }, g.name, g.detail)
    });
    let mut text: Vec<String> = left_out.iter().map(|l| format!("left out: {l}")).collect();
    text.push("KL in nats over 64 tokens, quote 36 tokens; intervals are paired bootstraps over the samples, 90 %.".to_owned());
    Report {
        title: format!("What policies lose on {}", results.model),
        verdict: verdict.collect(),
        sections: vec![Section {
            title: "Loss against the bytes that are kept".to_owned(),
            text,
            figure: Some(figure),
            sheet: Some(Sheet::new(&HEAD, results.cells(), 3)),
        }],
        sources: vec![format!(
            "Measured on {} in {}, caches in {}, {} samples{}.",
            results.model,
            results.weights,
            results.cache,
            results.samples,
            if results.synthetic { "; synthetic weights: formats only" } else { "" }
        )],
        command,
    }
}
