//! A sweep as a report: one plot along what varies, and the table.

use super::{HEAD, Line, cells, site};
use crate::report::figure::{Axis, Figure, Series};
use crate::report::memory::{self, Course};
use crate::report::page::{Report, Section, Sheet};
use crate::report::table;

/// An axis: its name and a line's place on it.
type AxisOf = (&'static str, fn(&Line) -> f64);
/// A word about a line, with the axis that it belongs to.
type Word<'a> = (usize, &'a dyn Fn(&Line) -> String);

/// What a sweep can vary, with the name of its axis.
const AXES: [AxisOf; 4] = [
    ("prompt, tokens", |l| f64::from(l.isl)),
    ("batch, sequences", |l| l.answer.as_ref().map_or(0.0, |(a, _)| f64::from(a.batch))),
    ("output, tokens", |l| f64::from(l.osl)),
    ("GPUs that share a layer", |l| f64::from(l.tp)),
];

/// The report.
pub fn report(lines: &[Line], command: String) -> Report {
    let sheet = Sheet::new(&HEAD, lines.iter().map(cells).collect(), 4);
    let figure = figure(lines);
    let fits = lines.iter().filter(|l| l.answer.as_ref().is_ok_and(|(a, _)| a.over.is_none()));
    let best = fits.clone().filter_map(|l| Some((l, l.answer.as_ref().ok()?)));
    let rate = |l: &(&Line, &(batchmax_sim::plan::Answer, batchmax_sim::timeline::Timeline))| {
        l.1.0.metrics.output_tokens_per_s
    };
    let best = best.max_by(|a, b| rate(a).total_cmp(&rate(b)));
    let mut verdict = vec![format!("{} of {} configurations fit", fits.count(), lines.len())];
    verdict.extend(best.map(|(line, (a, _))| {
        format!(
            "the most: {} on {} at batch {}, {} in, {} out: {} output tokens/s {}",
            line.preset,
            site(line),
            a.batch,
            line.isl,
            line.osl,
            table::rate(a.metrics.output_tokens_per_s),
            table::plus_minus(a.metrics.error)
        )
    }));
    Report {
        title: "What if".to_owned(),
        verdict,
        sections: vec![Section {
            title: "Sweep".to_owned(),
            text: vec![table::LEGEND.to_owned()],
            figure,
            sheet: Some(sheet),
        }]
        .into_iter()
        .chain(Some(caches(lines)).filter(|s| s.figure.is_some()))
        .collect(),
        sources: vec![
            "Times are predictions; the sign at the end of a row is their weakest source."
                .to_owned(),
            "±: half width of the 90 % interval of the total time.".to_owned(),
        ],
        command,
    }
}

/// Throughput along the first quantity that has several values; a series for each combination of the others.
fn figure(lines: &[Line]) -> Option<Figure> {
    let varies = |of: &fn(&Line) -> f64| {
        let mut values: Vec<f64> = lines.iter().map(of).filter(|v| *v > 0.0).collect();
        values.sort_by(f64::total_cmp);
        values.dedup();
        values.len() > 1
    };
    // Where the batch is the largest that fits it follows from the others.
    let axis = AXES.iter().position(|(_, of)| varies(of))?;
    let axis = if axis == 0 { 0 } else { axis };
    let (label, x) = AXES[axis];
    let mut series: Vec<Series> = Vec::new();
    for line in lines {
        let Ok((answer, _)) = &line.answer else { continue };
        if answer.over.is_some() {
            continue;
        }
        let name = name(lines, line, axis);
        let point = (x(line), answer.metrics.output_tokens_per_s);
        match series.iter_mut().find(|s| s.name == name) {
            Some(known) => known.points.push(point),
            None => series.push(Series { name, points: vec![point], joined: true, marked: true }),
        }
    }
    for one in &mut series {
        one.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    let title = format!("Throughput against {label}");
    let (x, y) = (Axis::log(label), Axis::linear("output, tokens/s"));
    Some(Figure { title, x, y, series, source: source(lines) })
}

/// The weakest source of the predictions.
fn source(lines: &[Line]) -> String {
    let answers = lines.iter().filter_map(|l| l.answer.as_ref().ok());
    format!("Predictions; {}", table::weakest(answers.map(|(a, _)| a.metrics.source)))
}

/// The caches of the fastest lines of the first few policies.
fn caches(lines: &[Line]) -> Section {
    const MOST: usize = 3;
    let rate = |l: &Line| l.answer.as_ref().map_or(0.0, |(a, _)| a.metrics.output_tokens_per_s);
    let fits = |l: &&Line| l.answer.as_ref().is_ok_and(|(a, _)| a.over.is_none());
    let mut ranked: Vec<&Line> = lines.iter().filter(fits).collect();
    ranked.sort_by(|a, b| rate(b).total_cmp(&rate(a)));
    let mut chosen: Vec<&Line> = Vec::new();
    for line in ranked {
        if chosen.len() < MOST && chosen.iter().all(|c| c.preset != line.preset) {
            chosen.push(line);
        }
    }
    let course = |l: &&Line| {
        let batch = l.answer.as_ref().map_or(0, |(a, _)| a.batch);
        let name = format!("{} on {}, {} in, batch {batch}", l.preset, site(l), l.isl);
        Course { name, moments: l.moments.clone() }
    };
    let courses: Vec<Course> = chosen.iter().map(course).collect();
    let figure = memory::figure(&courses, None, source(lines));
    let title = "Caches over time, where each policy is fastest".to_owned();
    Section { title, text: vec![memory::READ.to_owned()], figure, sheet: None }
}

/// What tells a line from the others beside the axis.
fn name(lines: &[Line], line: &Line, axis: usize) -> String {
    let parts: [Word<'_>; 8] = [
        (9, &|l| l.model.clone()),
        (9, &|l| site(l)),
        (9, &|l| l.preset.clone()),
        (9, &|l| l.kv.name().to_owned()),
        (9, &|l| l.answer.as_ref().map_or_else(|_| String::new(), |(a, _)| a.schedule.to_string())),
        (0, &|l| format!("{} in", l.isl)),
        (2, &|l| format!("{} out", l.osl)),
        (1, &|l| match &l.answer {
            Ok((a, _)) if axis != 0 => format!("batch {}", a.batch),
            _ => String::new(),
        }),
    ];
    let mut words = Vec::new();
    for (of, text) in parts.iter().filter(|(of, _)| *of != axis) {
        let own = text(line);
        let differs = lines.iter().any(|l| l.answer.is_ok() && text(l) != own);
        // A batch that follows from the axis tells nothing apart.
        if differs && !own.is_empty() && *of != 1 {
            words.push(own);
        }
    }
    if words.is_empty() { line.preset.clone() } else { words.join(", ") }
}
