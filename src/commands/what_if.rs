//! `batchmax what-if`: one configuration, a sweep, or a CSV of scenarios.

use anyhow::Result;
use batchmax_sim::load::Schedule;
use batchmax_sim::memory::{Moment, kv_history};
use batchmax_sim::op::{DType, Phase};
use batchmax_sim::plan::{Answer, Bound, Case, Host, LARGEST_BATCH};
use batchmax_sim::policy::Preset;
use batchmax_sim::timeline::Timeline;
use batchmax_sim::units::Bytes;
use serde_json::json;

use crate::cli::{Global, WhatIfArgs};
use crate::commands::{Outcome, scenarios};
use crate::report::progress::Late;
use crate::report::{answer, json, table, typed};
use crate::setting::{self, Hosts, Places, Wanted};

mod report;

use report::report;

/// A prediction; `Err`: not even one sequence fits, by which limit and how many bytes.
type Found = Result<(Answer, Timeline), (Bound, Bytes)>;

/// One line of a sweep.
struct Line {
    model: String,
    gpu: String,
    engine: String,
    tp: u32,
    kv: DType,
    isl: u32,
    osl: u32,
    hit: u32,
    preset: String,
    /// `Err`: not even one sequence fits; the bytes that are missing.
    answer: Found,
    /// The caches step by step, where a report is to show them.
    moments: Vec<Moment>,
}

/// Sweeps and prints.
pub fn run(places: &Places, args: &WhatIfArgs, global: &Global) -> Result<Outcome> {
    if let Some(file) = &args.scenarios {
        return scenarios::run(places, file, args, global);
    }
    let lines = sweep(places, args, global)?;
    let any = lines.iter().any(|l| l.answer.as_ref().is_ok_and(|(a, _)| a.over.is_none()));
    let page = args.output.wants_report().then(|| report(&lines, typed()));
    if let Some(page) = &page {
        args.output.write(page)?;
    }
    if global.json {
        let list: Vec<_> = lines
            .iter()
            .map(|l| {
                let (found, missing) = match &l.answer {
                    Ok((a, _)) => (json!(json::answer(a)), json!(null)),
                    Err((bound, by)) => (json!(null), json!({ "bound": bound, "by": by })),
                };
                json!({
                    "model": l.model, "gpu": l.gpu, "engine": l.engine, "tp": l.tp,
                    "kv_dtype": l.kv, "isl": l.isl, "osl": l.osl, "prefix_hit": l.hit,
                    "preset": l.preset, "answer": found, "missing": missing,
                })
            })
            .collect();
        answer(&json::document("what-if", json!({ "answers": list })));
    } else if args.output.csv {
        answer(&csv_text(&lines)?);
    } else if let Some(page) = page.filter(|_| args.output.markdown) {
        answer(&page.markdown());
    } else if let [Line { answer: Ok((one, timeline)), model, isl, osl, hit, preset, .. }] =
        lines.as_slice()
    {
        let site = site(&lines[0]);
        let cached = if *hit > 0 { format!(" ({hit} cached)") } else { String::new() };
        let title = format!("{model} on {site} · {preset} · {isl} in{cached}, {osl} out");
        answer(&detail(one, timeline, &title));
    } else {
        answer(&format!("{}\n{}", sweep_table(&lines), table::LEGEND));
    }
    Ok(if any { Outcome::Answered } else { Outcome::No })
}

fn sweep(places: &Places, args: &WhatIfArgs, global: &Global) -> Result<Vec<Line>> {
    let presets: Vec<Preset> = setting::policies(&args.policy)
        .iter()
        .map(|p| Preset::parse(&places.catalog, p))
        .collect::<Result<_, _>>()?;
    let schedules: Vec<Schedule> =
        args.schedule.iter().map(|s| setting::schedule(s)).collect::<Result<_>>()?;
    let isls = setting::token_list(&args.isl, "--isl")?;
    let osls = setting::token_list(&args.osl, "--osl")?;
    let hit = setting::hit(&args.prefix_hit)?;
    let spread = setting::spread(&args.osl_spread)?;
    let batches = setting::batch_list(&args.batch)?;
    let (tps, kvs) =
        (setting::tp_list(args.placement.tp.as_ref())?, setting::kv_types(&args.memory)?);
    let mut hosts = Hosts::default();
    let mut lines = Vec::new();
    let places_asked = combinations(&args.gpu, &tps, &kvs, &presets, &schedules).count();
    let asked = args.model.split(',').count() * places_asked * isls.len() * osls.len();
    let mut bar = Late::new(global, (asked * batches.len()) as u64, "predicting");
    for model_name in args.model.split(',') {
        let model = setting::model(places, model_name)?;
        for (gpu, &tp, &kv, preset, &schedule) in
            combinations(&args.gpu, &tps, &kvs, &presets, &schedules)
        {
            let wanted = Wanted {
                model: &model,
                gpu,
                engine: args.placement.engine.as_deref(),
                choice: setting::choice(&args.memory, kv, tp, args.placement.pp)?,
                policies: vec![&preset.name],
                schedules: vec![schedule],
                memory: &args.memory,
            };
            let host = hosts.get(places, &wanted)?;
            let placement = &host.placement;
            for &isl in &isls {
                for &osl in &osls {
                    let policy = preset.policy.as_ref();
                    let case = Case { placement, policy, isl, osl, spread, hit, schedule };
                    for &batch in &batches {
                        let (answer, moments) =
                            one(&case, batch, host, args.output.wants_report())?;
                        bar.step();
                        lines.push(Line {
                            model: model.name.clone(),
                            gpu: placement.gpu.name.clone(),
                            engine: placement.engine_name().to_owned(),
                            tp,
                            kv: placement.setup.kv.dtype,
                            isl,
                            osl,
                            hit: hit.of(isl),
                            preset: preset.name.clone(),
                            answer,
                            moments,
                        });
                    }
                }
            }
        }
    }
    Ok(lines)
}

type Combination<'a> = (&'a str, &'a u32, &'a Option<DType>, &'a Preset, &'a Schedule);

fn combinations<'a>(
    gpus: &'a str,
    tps: &'a [u32],
    kvs: &'a [Option<DType>],
    presets: &'a [Preset],
    schedules: &'a [Schedule],
) -> impl Iterator<Item = Combination<'a>> {
    gpus.split(',').flat_map(move |gpu| {
        tps.iter().flat_map(move |tp| {
            kvs.iter().flat_map(move |kv| {
                presets.iter().flat_map(move |preset| {
                    schedules.iter().map(move |schedule| (gpu, tp, kv, preset, schedule))
                })
            })
        })
    })
}

/// Where a line runs: `h100-sxm`, `2 x h100-sxm · vllm`.
fn site(line: &Line) -> String {
    let count = if line.tp > 1 { format!("{} x ", line.tp) } else { String::new() };
    let engine =
        if setting::is_local(&line.gpu) { String::new() } else { format!(" · {}", line.engine) };
    format!("{count}{}{engine}", line.gpu)
}

fn one(
    case: &Case<'_>,
    batch: Option<u32>,
    host: &Host,
    watched: bool,
) -> Result<(Found, Vec<Moment>)> {
    let batch = match batch {
        Some(batch) => batch,
        None => match case.largest_batch(LARGEST_BATCH)? {
            (0, over) => return Ok((Err((over.bound, over.by)), Vec::new())),
            (batch, _) => batch,
        },
    };
    let program = case.program(batch)?;
    let (answer, timeline) = case.answer_of(&program, host.cost.as_ref());
    let moments = if watched { kv_history(&program, &timeline) } else { Vec::new() };
    Ok((Ok((answer, timeline)), moments))
}

fn cells(line: &Line) -> Vec<String> {
    let mut row = vec![
        line.model.clone(),
        site(line),
        line.preset.clone(),
        line.kv.name().to_owned(),
        line.isl.to_string(),
        line.osl.to_string(),
    ];
    match &line.answer {
        Ok((a, _)) => {
            let verdict = a.over.map_or_else(|| "fits".to_owned(), |over| over.to_string());
            row.extend([
                a.batch.to_string(),
                a.schedule.to_string(),
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
            row.resize(14, String::new());
            row.push(format!("× over by {by} ({})", bound.name()));
        }
    }
    row
}

const HEAD: [&str; 16] = [
    "model",
    "gpu",
    "policy",
    "kv",
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
    table::table(&HEAD, lines.iter().map(cells).collect(), 4)
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
        "engine",
        "tp",
        "kv_dtype",
        "prefix_hit",
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
            Ok((a, _)) => row.extend([
                a.batch.to_string(),
                a.schedule.to_string(),
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
        row.extend([
            line.engine.clone(),
            line.tp.to_string(),
            line.kv.name().to_owned(),
            line.hit.to_string(),
        ]);
        writer.write_record(&row)?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

/// One configuration in full.
fn detail(a: &Answer, timeline: &Timeline, title: &str) -> String {
    let m = &a.metrics;
    let spread = |phase: Phase| table::plus_minus(timeline.half_width(Some(phase)));
    let mut rows = Vec::new();
    for ((phase, family), (time, source)) in timeline.by_family() {
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
    let verdict = a.over.map_or_else(|| "fits".to_owned(), |over| format!("does not fit: {over}"));
    format!(
        "{title} · batch {} · {} schedule\n\n{}\n\nmemory\n{}\n{verdict}\n\n  output      {} tokens/s {}\n  TTFT        {} {}\n  TPOT        {} {}\n  total       {} {}\n{}",
        a.batch,
        a.schedule,
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
