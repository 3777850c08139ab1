//! A plan as a report: ranking, throughput against batch, the front, what one change would buy.

use anyhow::Result;
use batchmax_sim::memory::kv_history;
use batchmax_sim::plan::{Candidate, Marks};

use super::{Advice, Plan, Question, curves, show};
use crate::report::figure::{Axis, Figure, Series};
use crate::report::memory::{self, Course};
use crate::report::output::csv;
use crate::report::page::{Report, Section, Sheet};
use crate::report::table;

/// The report.
pub fn report(
    question: &Question<'_>,
    plan: &Plan,
    marks: &[Marks],
    advice: &Advice,
    command: String,
) -> Result<Report> {
    let lines = |text: String| text.lines().map(str::to_owned).collect::<Vec<String>>();
    let (head, rows, left) = show::sheet(question, plan, marks);
    let mut text = vec![table::LEGEND.to_owned(), show::FRONT.to_owned()];
    text.extend(Some(show::hidden(question, plan, rows.len())).filter(|t| !t.is_empty()));
    text.extend(plan.left_out.iter().map(|l| format!("left out: {l}")));
    let mut sections = vec![Section {
        title: "Candidates".to_owned(),
        text,
        figure: None,
        sheet: Some(Sheet::new(&head, rows, left)),
    }];
    if let Some(recommended) = advice.recommended {
        sections.insert(0, by_batch(question, plan, recommended)?);
        sections.insert(1, caches(question, plan, recommended)?);
    }
    sections.push(front(plan, marks));
    if !advice.changes.is_empty() {
        let rows = advice.changes.iter().map(|c| show::change(question, c)).collect();
        let head = ["one change", "gain", "then", "", ""];
        let sheet = Some(Sheet::new(&head, rows, 1));
        let title = "What one change would make of it".to_owned();
        sections.push(Section { title, sheet, ..Section::default() });
    }
    if let Some(crossings) = &advice.crossings {
        let title = "Where compression pays".to_owned();
        sections.push(Section { title, text: lines(show::pays(crossings)), ..Section::default() });
    }
    Ok(Report {
        title: show::head(question, plan),
        verdict: lines(show::verdict(question, plan, advice)),
        sections,
        sources: sources(plan),
        command,
    })
}

fn by_batch(question: &Question<'_>, plan: &Plan, selected: usize) -> Result<Section> {
    let found = curves(question, plan, selected)?;
    let text = found.iter().map(|c| {
        let (batch, rate) = c.points.last().copied().unwrap_or_default();
        let rate = table::rate(rate);
        format!(
            "{}: {rate} tokens/s at its largest batch, {batch}; limit: {}",
            c.preset,
            c.bound.name()
        )
    });
    let series = found.iter().map(|c| Series {
        name: c.preset.clone(),
        points: c.points.iter().map(|(b, r)| (f64::from(*b), *r)).collect(),
        joined: true,
        marked: true,
    });
    Ok(Section {
        title: "Throughput against batch, up to the largest that fits".to_owned(),
        text: text.collect(),
        figure: Some(Figure {
            title: "Throughput against batch".to_owned(),
            x: Axis::log("batch, sequences"),
            y: Axis::linear("output, tokens/s"),
            series: series.collect(),
            source: source(plan),
        }),
        sheet: None,
    })
}

/// The caches of what is recommended and of no compression, each at its largest batch.
fn caches(question: &Question<'_>, plan: &Plan, selected: usize) -> Result<Section> {
    let fits = |c: &&Candidate| c.answer.is_some();
    let plain = plan.candidates.iter().filter(fits).find(|c| !c.compresses);
    let chosen: Vec<&Candidate> = plan.candidates.get(selected).filter(fits).into_iter().collect();
    let plain = plain.filter(|p| chosen.iter().all(|c| c.preset != p.preset));
    let (mut courses, mut room) = (Vec::new(), None);
    for c in chosen.into_iter().chain(plain) {
        let Some(answer) = &c.answer else { continue };
        let host = plan.host(c);
        let preset = question.preset(&c.preset)?;
        let case = question.case(&host.placement, preset.policy.as_ref(), c.schedule);
        let program = case.program(answer.batch)?;
        let (_, timeline) = case.answer_of(&program, host.cost.as_ref());
        let name = format!("{}, batch {}, {}", c.preset, answer.batch, c.schedule);
        courses.push(Course { name, moments: kv_history(&program, &timeline) });
        room.get_or_insert(memory::room(&host.placement.limits, &answer.footprint));
    }
    Ok(Section {
        title: "Caches over time".to_owned(),
        text: vec![memory::READ.to_owned()],
        figure: memory::figure(&courses, room, source(plan)),
        sheet: None,
    })
}

/// The weakest source of the predictions, in a line.
fn source(plan: &Plan) -> String {
    let answers = plan.candidates.iter().filter_map(|c| c.answer.as_ref());
    let weakest = table::weakest(answers.map(|a| a.metrics.source));
    let places: Vec<&str> = plan.hosts.iter().map(|h| h.placement.gpu.name.as_str()).collect();
    let mut distinct = places;
    distinct.dedup();
    format!("Predictions for {}; {weakest}", distinct.join(", "))
}

fn front(plan: &Plan, marks: &[Marks]) -> Section {
    let point = |c: &Candidate| c.answer.as_ref().map(|a| (a.metrics.tpot.0 * 1e3, c.throughput()));
    let of = |on: bool| {
        let pairs = plan.candidates.iter().zip(marks).filter(|(_, m)| m.tpot == on);
        pairs.filter_map(|(c, _)| point(c)).collect::<Vec<_>>()
    };
    let mut first = of(true);
    first.sort_by(|a, b| a.0.total_cmp(&b.0));
    let kind =
        |name: &str, points, joined| Series { name: name.to_owned(), points, joined, marked: true };
    Section {
        title: "Throughput against time per token".to_owned(),
        text: vec![
            "Each point is a candidate at its largest batch; --pareto searches smaller ones too."
                .to_owned(),
        ],
        figure: Some(Figure {
            title: "Throughput against time per token".to_owned(),
            x: Axis::log("time per output token, ms"),
            y: Axis::linear("output, tokens/s"),
            series: vec![kind("on the front", first, true), kind("beaten", of(false), false)],
            source: source(plan),
        }),
        sheet: None,
    }
}

/// Where the numbers come from.
fn sources(plan: &Plan) -> Vec<String> {
    let mut lines = Vec::new();
    for host in &plan.hosts {
        let gpu = &host.placement.gpu;
        let line = format!("{}: {}; data sheet: {}", gpu.name, gpu.label, gpu.source);
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    let mut found: Vec<&str> = Vec::new();
    for answer in plan.candidates.iter().filter_map(|c| c.answer.as_ref()) {
        let name = answer.metrics.source.name();
        if !found.contains(&name) {
            found.push(name);
        }
    }
    lines.push(format!(
        "Times are predictions; the weakest source of each is beside it ({}).",
        found.join(", ")
    ));
    lines.push("±: half width of the 90 % interval of the total time.".to_owned());
    lines
}

/// All candidates as CSV, names as in JSON.
pub fn csv_text(plan: &Plan, marks: &[Marks]) -> Result<String> {
    let head = [
        "preset",
        "policy",
        "schedule",
        "gpu",
        "engine",
        "tp",
        "pp",
        "replicas",
        "kv_dtype",
        "weight_dtype",
        "fits",
        "bound",
        "missing_bytes",
        "batch",
        "output_tok_s",
        "error",
        "source",
        "ttft_s",
        "tpot_s",
        "total_s",
        "kv_prefill_peak_bytes",
        "kv_decode_peak_bytes",
        "total_bytes",
        "usd_per_million_output_tokens",
        "front_tpot",
        "front_memory",
    ];
    let rows = plan.candidates.iter().zip(marks).map(|(c, marks)| {
        let place = &plan.host(c).placement;
        let of = |f: &dyn Fn(&batchmax_sim::plan::Answer) -> String| {
            c.answer.as_ref().map_or_else(String::new, f)
        };
        vec![
            c.preset.clone(),
            c.policy.clone(),
            c.schedule.to_string(),
            place.gpu.name.clone(),
            place.engine_name().to_owned(),
            place.setup.tp.to_string(),
            place.pp.to_string(),
            c.replicas.to_string(),
            place.setup.kv.dtype.to_string(),
            place.setup.weights.to_string(),
            c.answer.is_some().to_string(),
            c.bound.name().to_owned(),
            c.missing.0.to_string(),
            of(&|a| a.batch.to_string()),
            of(&|_| c.throughput().to_string()),
            of(&|a| a.metrics.error.to_string()),
            of(&|a| a.metrics.source.name().to_owned()),
            of(&|a| a.metrics.ttft.0.to_string()),
            of(&|a| a.metrics.tpot.0.to_string()),
            of(&|a| a.metrics.total.0.to_string()),
            of(&|a| a.footprint.kv_prefill_peak.0.to_string()),
            of(&|a| a.footprint.kv_decode_peak.0.to_string()),
            of(&|a| a.footprint.total().0.to_string()),
            c.usd_per_million().map_or_else(String::new, |usd| usd.to_string()),
            marks.tpot.to_string(),
            marks.memory.to_string(),
        ]
    });
    csv(&head, &rows.collect::<Vec<_>>())
}
