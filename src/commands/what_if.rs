//! `batchmax what-if`: one configuration, a sweep, or a CSV of scenarios.

use anyhow::Result;
use batchmax_sim::load::Schedule;
use batchmax_sim::op::Phase;
use batchmax_sim::plan::{Answer, Bound, Case, LARGEST_BATCH};
use batchmax_sim::policy::Preset;
use batchmax_sim::timeline::SIGMAS_90;
use serde_json::json;

use crate::cli::{Global, WhatIfArgs};
use crate::commands::{Outcome, scenarios};
use crate::report::{answer, json, table};
use crate::setting::{self, Device, Places};

/// One line of a sweep.
struct Line {
    model: String,
    gpu: String,
    isl: u32,
    osl: u32,
    preset: String,
    /// `None`: not even one sequence fits; the bytes that are missing.
    answer: Result<Answer, (Bound, batchmax_sim::units::Bytes)>,
}

/// Sweeps and prints.
pub fn run(places: &Places, args: &WhatIfArgs, global: &Global) -> Result<Outcome> {
    if let Some(file) = &args.scenarios {
        return scenarios::run(places, file, &args.memory, global);
    }
    let lines = sweep(places, args)?;
    let any = lines.iter().any(|l| l.answer.as_ref().is_ok_and(|a| a.over.is_none()));
    if global.json {
        let list: Vec<_> = lines
            .iter()
            .map(|l| {
                let (found, missing) = match &l.answer {
                    Ok(a) => (json::answer(a), json!(null)),
                    Err((bound, by)) => (json!(null), json!({ "bound": bound, "by": by })),
                };
                json!({
                    "model": l.model, "gpu": l.gpu, "isl": l.isl, "osl": l.osl,
                    "preset": l.preset, "answer": found, "missing": missing,
                })
            })
            .collect();
        answer(&json::document("what-if", json!({ "answers": list })));
    } else if args.csv {
        answer(&csv_text(&lines)?);
    } else if let [Line { answer: Ok(one), model, gpu, isl, osl, preset }] = lines.as_slice() {
        answer(&detail(one, &format!("{model} on {gpu} · {preset} · {isl} in, {osl} out")));
    } else {
        answer(&format!("{}\n{}", sweep_table(&lines), table::LEGEND));
    }
    Ok(if any { Outcome::Answered } else { Outcome::No })
}

fn sweep(places: &Places, args: &WhatIfArgs) -> Result<Vec<Line>> {
    let presets: Vec<Preset> =
        args.policy.iter().map(|p| Preset::parse(&places.catalog, p)).collect::<Result<_, _>>()?;
    let schedules: Vec<Schedule> =
        args.schedule.iter().map(|s| setting::schedule(s)).collect::<Result<_>>()?;
    let isls = setting::token_list(&args.isl, "--isl")?;
    let osls = setting::token_list(&args.osl, "--osl")?;
    let batches: Vec<Option<u32>> = if args.batch == "max" {
        vec![None]
    } else {
        setting::token_list(&args.batch, "--batch")?.into_iter().map(Some).collect()
    };
    let mut lines = Vec::new();
    for model_name in args.model.split(',') {
        let model = setting::model(places, model_name)?;
        for gpu_name in args.gpu.split(',') {
            let device = Device::resolve(places, gpu_name, &args.memory)?;
            let setup = setting::setup(&model, device.local, &args.memory)?;
            let limits = setting::limits(&device.gpu, device.runtime, &args.memory)?;
            for preset in &presets {
                for &schedule in &schedules {
                    for &isl in &isls {
                        for &osl in &osls {
                            let policy = preset.policy.as_ref();
                            let case =
                                Case { model: &model, policy, setup, isl, osl, schedule, limits };
                            for &batch in &batches {
                                lines.push(Line {
                                    model: model.name.clone(),
                                    gpu: device.gpu.name.clone(),
                                    isl,
                                    osl,
                                    preset: preset.name.clone(),
                                    answer: one(&case, batch, &device)?,
                                });
                            }
                        }
                    }
                }
            }
        }
    }
    Ok(lines)
}

fn one(
    case: &Case<'_>,
    batch: Option<u32>,
    device: &Device,
) -> Result<Result<Answer, (Bound, batchmax_sim::units::Bytes)>> {
    let batch = match batch {
        Some(batch) => batch,
        None => match case.largest_batch(LARGEST_BATCH)? {
            (0, over) => return Ok(Err((over.bound, over.by))),
            (batch, _) => batch,
        },
    };
    Ok(Ok(case.answer(batch, device.cost.as_ref())?))
}

fn cells(line: &Line) -> Vec<String> {
    let mut row = vec![
        line.model.clone(),
        line.gpu.clone(),
        line.preset.clone(),
        line.isl.to_string(),
        line.osl.to_string(),
    ];
    match &line.answer {
        Ok(a) => {
            let verdict = a.over.map_or_else(
                || "fits".to_owned(),
                |over| format!("over by {} ({})", over.by, over.bound.name()),
            );
            row.extend([
                a.batch.to_string(),
                a.program.header.load.schedule.to_string(),
                table::rate(a.metrics.output_tokens_per_s),
                table::plus_minus(a.metrics.error),
                a.metrics.ttft.to_string(),
                a.metrics.tpot.to_string(),
                a.footprint.kv_prefill_peak.to_string(),
                a.footprint.kv_decode_peak.to_string(),
                verdict,
                table::sign(a.metrics.source).to_owned(),
            ]);
        }
        Err((bound, by)) => {
            row.resize(13, String::new());
            row.push(format!("× over by {by} ({})", bound.name()));
        }
    }
    row
}

const HEAD: [&str; 15] = [
    "model",
    "gpu",
    "policy",
    "in",
    "out",
    "batch",
    "schedule",
    "tokens/s",
    "",
    "TTFT",
    "TPOT",
    "KV prefill",
    "KV decode",
    "verdict",
    "",
];

fn sweep_table(lines: &[Line]) -> String {
    table::table(&HEAD, lines.iter().map(cells).collect(), 3)
}

fn csv_text(lines: &[Line]) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record([
        "model",
        "gpu",
        "preset",
        "isl",
        "osl",
        "batch",
        "schedule",
        "ttft_s",
        "tpot_s",
        "output_tok_s",
        "error",
        "source",
        "kv_prefill_peak_bytes",
        "kv_decode_peak_bytes",
        "total_bytes",
        "fits",
    ])?;
    for line in lines {
        let mut row = vec![
            line.model.clone(),
            line.gpu.clone(),
            line.preset.clone(),
            line.isl.to_string(),
            line.osl.to_string(),
        ];
        match &line.answer {
            Ok(a) => row.extend([
                a.batch.to_string(),
                a.program.header.load.schedule.to_string(),
                a.metrics.ttft.0.to_string(),
                a.metrics.tpot.0.to_string(),
                a.metrics.output_tokens_per_s.to_string(),
                a.metrics.error.to_string(),
                a.metrics.source.name().to_owned(),
                a.footprint.kv_prefill_peak.0.to_string(),
                a.footprint.kv_decode_peak.0.to_string(),
                a.footprint.total().0.to_string(),
                a.over.is_none().to_string(),
            ]),
            Err(_) => row.resize(16, String::new()),
        }
        writer.write_record(&row)?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

/// One configuration in full.
fn detail(a: &Answer, title: &str) -> String {
    let m = &a.metrics;
    let spread = |phase: Phase| {
        let time = a.timeline.phase(phase).0;
        let sigma = a.timeline.stddev(|s| s.site.phase == phase).0;
        table::plus_minus(if time > 0.0 { SIGMAS_90 * sigma / time } else { 0.0 })
    };
    let mut rows = Vec::new();
    for ((phase, family), (time, source)) in a.timeline.by_family() {
        if time.0 > 0.002 * m.total.0 {
            rows.push(vec![
                phase.name().to_owned(),
                family.name().to_owned(),
                time.to_string(),
                format!("{:.1} %", 100.0 * time.0 / m.total.0),
                table::sign(source).to_owned(),
            ]);
        }
    }
    let verdict = a.over.map_or_else(
        || "fits".to_owned(),
        |over| format!("does not fit: over by {} ({})", over.by, over.bound.name()),
    );
    format!(
        "{title} · batch {} · {} schedule\n\n{}\n\nmemory\n{}\n{verdict}\n\n  output      {} tokens/s {}\n  TTFT        {} {}\n  TPOT        {} {}\n  total       {} {}\n{}",
        a.batch,
        a.program.header.load.schedule,
        table::table(&["phase", "op", "time", "share", ""], rows, 2),
        table::memory(&a.footprint),
        table::rate(m.output_tokens_per_s),
        table::plus_minus(m.error),
        m.ttft,
        spread(Phase::Prefill),
        m.tpot,
        spread(Phase::Decode),
        m.total,
        table::plus_minus(m.error),
        table::LEGEND,
    )
}
