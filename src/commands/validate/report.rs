//! A validation as a report: predicted against measured, op by op.

use batchmax_sim::memory::kv_history;
use batchmax_sim::timeline::Comparison;

use super::{SIZES, TIMES, Trial, sizes, times};
use crate::report::figure::{Axis, Figure, Series};
use crate::report::memory::{self, Course};
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
                text: vec![memory::READ.to_owned()],
                figure: caches(trial),
                sheet: Some(Sheet::new(&SIZES, sizes(trial), 1)),
            },
        ],
        sources: vec![
            format!("Measured by one run on this machine ({processor})."),
            "Predicted from its kernel profile; the sign at the end of a row is the weakest source.".to_owned(),
        ],
        command,
    }
}

/// The caches at the measured pace; the run stops if they differ from the prediction by more than the text explains.
fn caches(trial: &Trial) -> Option<Figure> {
    let header = &trial.program.header;
    let name = |kind: &str| format!("{kind}, batch {}", header.load.batch());
    let course = |kind, timeline| {
        let moments = kv_history(&trial.program, timeline);
        Course { name: name(kind), moments }
    };
    let courses =
        [course("measured", &trial.result.timeline), course("predicted", &trial.predicted)];
    let source =
        "Bytes: the program's, which the run checks after every step. Times: mean of each pass.";
    memory::figure(&courses, None, source.to_owned())
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
        source: "Measured: one run on this machine. Predicted: from its kernel profile.".to_owned(),
    }
}
