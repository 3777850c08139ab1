//! Scores as a report: predicted against measured, run by run, and the errors by group.

use super::{BY_CLUSTER, BY_TIER, FIGURES, Scored, cells, class, groupings};
use crate::report::figure::{Axis, Figure, Series};
use crate::report::page::{Report, Section, Sheet};
use batchmax_sim::runs::Metric;

/// The report.
pub fn report(scored: &[Scored], refused: &[(String, usize)], command: String) -> Report {
    let (by_tier, by_cluster) = groupings(scored);
    let sheet = |names: &[&str], lines| {
        let head: Vec<&str> = names.iter().copied().chain(FIGURES).collect();
        Some(Sheet::new(&head, cells(lines), names.len()))
    };
    let total: usize = refused.iter().map(|(_, n)| n).sum();
    let reasons = refused.iter().map(|(why, n)| vec![n.to_string(), why.clone()]).collect();
    Report {
        title: "Published runs, predicted".to_owned(),
        verdict: vec![format!("{} runs predicted, {total} refused", scored.len())],
        sections: vec![
            Section {
                title: "By tier".to_owned(),
                text: vec!["Errors are predicted / measured - 1; coverage is that of the 90 % interval; equal: every (device, engine) cluster weighs the same.".to_owned()],
                figure: Some(figure(scored)),
                sheet: sheet(&BY_TIER, &by_tier),
            },
            Section { title: "By device and engine".to_owned(), sheet: sheet(&BY_CLUSTER, &by_cluster), ..Section::default() },
            Section { title: "Refused".to_owned(), sheet: Some(Sheet::new(&["rows", "why"], reasons, 2)), ..Section::default() },
        ],
        sources: vec!["Measured: the published runs of the file that is scored.".to_owned()],
        command,
    }
}

/// Rates only: they have one unit.
fn figure(scored: &[Scored]) -> Figure {
    let mut series: Vec<Series> = Vec::new();
    let rate = |m: Metric| {
        matches!(
            m,
            Metric::OutputTokS | Metric::TotalTokS | Metric::DecodeTokS | Metric::PrefillTokS
        )
    };
    let (mut least, mut most) = (f64::INFINITY, 0.0f64);
    for p in scored.iter().map(|s| &s.prediction).filter(|p| rate(p.metric)) {
        let name = class(p.metric).to_owned();
        let point = (p.measured, p.predicted);
        (least, most) = (least.min(p.measured), most.max(p.measured));
        match series.iter_mut().find(|s| s.name == name) {
            Some(one) => one.points.push(point),
            None => series.push(Series { name, points: vec![point], joined: false, marked: true }),
        }
    }
    let points = vec![(least, least), (most, most)];
    series.push(Series { name: "equal".to_owned(), points, joined: true, marked: false });
    Figure {
        title: "Predicted against measured rates".to_owned(),
        x: Axis::log("measured, tokens/s"),
        y: Axis::log("predicted, tokens/s"),
        series,
        source: "Measured: the published runs that are scored. Predicted: this program.".to_owned(),
    }
}
