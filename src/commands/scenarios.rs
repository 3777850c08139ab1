//! A CSV of scenarios in, a CSV of predictions out. A row that can't be answered says why and leaves its figures empty.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use batchmax_sim::op::DType;
use batchmax_sim::plan::{Answer, Bound, Case, LARGEST_BATCH};
use batchmax_sim::policy::Preset;
use serde::Deserialize;
use serde_json::json;

use crate::cli::{Global, MemoryArgs, WhatIfArgs};
use crate::commands::Outcome;
use crate::report::progress::Late;
use crate::report::{answer, json};
use crate::setting::{self, Hosts, Places, Wanted};

#[derive(Clone, Debug, Deserialize)]
struct Scenario {
    id: String,
    gpu: String,
    #[serde(default)]
    tp: String,
    model: String,
    #[serde(default)]
    weight_dtype: String,
    #[serde(default)]
    kv_dtype: String,
    #[serde(default)]
    engine: String,
    #[serde(default)]
    schedule: String,
    #[serde(default)]
    batch: String,
    input_len: String,
    output_len: String,
    #[serde(default)]
    prefix_hit: String,
    #[serde(default)]
    policy: String,
}

const OUTPUT: [&str; 15] = [
    "ttft_ms",
    "tpot_ms",
    "prefill_tok_s",
    "decode_tok_s",
    "output_tok_s",
    "total_tok_s",
    "peak_memory_gb",
    "kv_prefill_peak_gb",
    "kv_decode_gb",
    "max_batch",
    "bound",
    "source",
    "error",
    "refused",
    "predicted_engine",
];

/// What is said about a row.
struct Prediction {
    answer: Answer,
    engine: String,
    largest: u32,
    bound: Bound,
}

/// Answers every row.
pub fn run(places: &Places, file: &Path, args: &WhatIfArgs, global: &Global) -> Result<Outcome> {
    let named = || file.display().to_string();
    let mut reader = csv::Reader::from_path(file).with_context(named)?;
    let header = reader.headers().with_context(named)?.clone();
    for needed in ["id", "gpu", "model", "input_len", "output_len"] {
        if !header.iter().any(|h| h == needed) {
            bail!("{}:1: column \"{needed}\" is missing", file.display());
        }
    }
    let mut hosts = Hosts::default();
    let mut rows = Vec::new();
    let records: Vec<_> = reader.records().collect();
    let mut bar = Late::new(global, records.len() as u64, "predicting");
    for (index, record) in records.into_iter().enumerate() {
        let at = || format!("{}:{}", file.display(), index + 2);
        let record = record.with_context(at)?;
        let scenario: Scenario = record.deserialize(Some(&header)).with_context(at)?;
        let found = predict(places, &scenario, args, &mut hosts);
        bar.step();
        rows.push((record, scenario, found.map_err(|refusal| format!("{refusal:#}"))));
    }
    drop(bar);
    if rows.is_empty() {
        bail!("{}: no scenario below the header", file.display());
    }
    if global.json {
        let list: Vec<_> = rows
            .iter()
            .map(|(_, scenario, found)| match found {
                Ok(p) => json!({
                    "id": scenario.id, "engine": p.engine, "largest_batch": p.largest,
                    "bound": p.bound, "answer": json::answer(&p.answer), "refused": null,
                }),
                Err(why) => json!({ "id": scenario.id, "answer": null, "refused": why }),
            })
            .collect();
        answer(&json::document("scenarios", json!({ "scenarios": list })));
    } else {
        let mut writer = csv::Writer::from_writer(Vec::new());
        writer.write_record(header.iter().chain(OUTPUT))?;
        for (record, _, found) in &rows {
            let figures = match found {
                Ok(prediction) => figures(prediction),
                Err(why) => {
                    let mut figures = vec![String::new(); OUTPUT.len()];
                    figures[OUTPUT.len() - 2].clone_from(why);
                    figures
                }
            };
            writer.write_record(record.iter().map(str::to_owned).chain(figures))?;
        }
        answer(&String::from_utf8(writer.into_inner()?)?);
    }
    Ok(Outcome::Answered)
}

fn predict(
    places: &Places,
    scenario: &Scenario,
    args: &WhatIfArgs,
    hosts: &mut Hosts,
) -> Result<Prediction> {
    if scenario.id.is_empty() {
        bail!("the id is empty");
    }
    // A column that is empty leaves the word to the flag.
    let given = |text: &String, flag: Option<&String>| {
        if text.is_empty() { flag.cloned() } else { Some(text.clone()) }
    };
    let word = |text: &String, default: &str| given(text, None).unwrap_or_else(|| default.into());
    let memory = MemoryArgs {
        weight_dtype: given(&scenario.weight_dtype, args.memory.weight_dtype.as_ref()),
        ..args.memory.clone()
    };
    let kv: Option<DType> = given(&scenario.kv_dtype, args.memory.kv_dtype.as_ref())
        .map(|text| text.parse().map_err(|e| anyhow!("kv_dtype: {e}")))
        .transpose()?;
    let tp = given(&scenario.tp, args.placement.tp.as_ref());
    let tp: u32 = match tp.as_deref().unwrap_or("1").parse() {
        Ok(tp) if (1..=1024).contains(&tp) => tp,
        _ => bail!("tp {}: expected a number of GPUs from 1 to 1024", scenario.tp),
    };
    let engine = given(&scenario.engine, args.placement.engine.as_ref());
    let model = setting::model(places, &scenario.model)?;
    let preset = Preset::parse(&places.catalog, &word(&scenario.policy, setting::UNCOMPRESSED))?;
    let schedule = setting::schedule(&word(&scenario.schedule, "static"))?;
    let wanted = Wanted {
        model: &model,
        gpu: &scenario.gpu,
        engine: engine.as_deref(),
        choice: setting::choice(&memory, kv, tp, args.placement.pp)?,
        policies: vec![&preset.name],
        schedules: vec![schedule],
        memory: &memory,
    };
    let host = hosts.get(places, &wanted)?;
    let case = Case {
        placement: &host.placement,
        policy: preset.policy.as_ref(),
        isl: setting::tokens(&scenario.input_len, "input_len")?,
        osl: setting::tokens(&scenario.output_len, "output_len")?,
        spread: setting::spread(&args.osl_spread)?,
        hit: setting::hit(&word(&scenario.prefix_hit, &args.prefix_hit))?,
        schedule,
    };
    let (largest, over) = case.largest_batch(LARGEST_BATCH)?;
    let batch = setting::batch(&word(&scenario.batch, "max"))?.unwrap_or(largest);
    if largest == 0 {
        bail!("not even one sequence fits: over by {} ({})", over.by, over.bound.name());
    }
    if batch > largest {
        bail!("batch {batch} does not fit: {largest} sequences do ({})", over.bound.name());
    }
    Ok(Prediction {
        answer: case.answer(batch, host.cost.as_ref())?,
        engine: host.placement.engine_name().to_owned(),
        largest,
        bound: over.bound,
    })
}

fn figures(prediction: &Prediction) -> Vec<String> {
    let gb = |bytes: batchmax_sim::units::Bytes| (bytes.0 as f64 / 1e9).to_string();
    let a = &prediction.answer;
    let m = &a.metrics;
    vec![
        (m.ttft.0 * 1e3).to_string(),
        (m.tpot.0 * 1e3).to_string(),
        m.prefill_tokens_per_s.to_string(),
        m.decode_tokens_per_s.to_string(),
        m.output_tokens_per_s.to_string(),
        m.total_tokens_per_s.to_string(),
        gb(a.footprint.total()),
        gb(a.footprint.kv_prefill_peak),
        gb(a.footprint.kv_decode_peak),
        prediction.largest.to_string(),
        prediction.bound.name().to_owned(),
        m.source.name().to_owned(),
        m.error.to_string(),
        String::new(),
        prediction.engine.clone(),
    ]
}
