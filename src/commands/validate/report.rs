//! A validation as a report: predicted against measured, op by op.

use batchmax_sim::timeline::Comparison;

use super::{SIZES, TIMES, Trial, sizes, times};
use crate::report::figure::{Axis, Figure, Series};
use crate::report::page::{Report, Section, Sheet};
use crate::report::table;

/// The report; `said` is what is printed, whose last lines are the verdict.
pub fn report(
    trial: &Trial,
    comparison: &Comparison,
    said: &str,
    processor: &str,
    command: String,
) -> Report {
    let mut verdict: Vec<String> =
        said.lines().rev().take_while(|l| !l.is_empty()).map(str::to_owned).collect();
    verdict.reverse();
    let header = &trial.program.header;
    Report {
        title: format!(
            "{}, {}, batch {}, {} schedule: predicted and run",
            header.model,
            header.policy,
            header.load.batch(),
            header.load.schedule
        ),
        verdict,
        sections: vec![
            Section {
                title: "Times".to_owned(),
                text: vec![table::LEGEND.to_owned()],
                figure: Some(figure(comparison)),
                sheet: Some(Sheet::new(&TIMES, times(trial, comparison), 2)),
            },
            Section {
                title: "Memory".to_owned(),
                sheet: Some(Sheet::new(&SIZES, sizes(trial), 1)),
                ..Section::default()
            },
        ],
        sources: vec![
            format!("Measured by one run on this machine ({processor})."),
            "Predicted from its kernel profile; the sign at the end of a row is the weakest source.".to_owned(),
        ],
        command,
    }
}

fn figure(comparison: &Comparison) -> Figure {
    let point = |r: &batchmax_sim::timeline::Row| (r.measured.0, r.predicted.0);
    let mut series: Vec<Series> = Vec::new();
    let known = comparison.rows.iter().filter(|r| r.measured.0 > 0.0 && r.predicted.0 > 0.0);
    for row in known.clone() {
        let name = row.phase.name().to_owned();
        match series.iter_mut().find(|s| s.name == name) {
            Some(one) => one.points.push(point(row)),
            None => {
                let points = vec![point(row)];
                series.push(Series { name, points, joined: false, marked: true });
            }
        }
    }
    let least = known.clone().map(|r| r.measured.0).fold(f64::INFINITY, f64::min);
    let most = known.map(|r| r.measured.0).fold(0.0, f64::max);
    let points = vec![(least, least), (most, most)];
    series.push(Series { name: "equal".to_owned(), points, joined: true, marked: false });
    Figure {
        title: "Predicted against measured, by kernel family".to_owned(),
        x: Axis::log("measured, s"),
        y: Axis::log("predicted, s"),
        series,
    }
}
