//! A CSV of scenarios in, a CSV of predictions out. A row that can't be answered says why and leaves its figures empty.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use batchmax_sim::load::Schedule;
use batchmax_sim::plan::{Case, LARGEST_BATCH};
use batchmax_sim::policy::Preset;
use serde::Deserialize;

use crate::cli::{Global, MemoryArgs};
use crate::commands::Outcome;
use crate::report::answer;
use crate::setting::{self, Device, Places};

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
    policy: String,
}

const OUTPUT: [&str; 14] = [
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
];

/// Answers every row.
pub fn run(places: &Places, file: &Path, memory: &MemoryArgs, _global: &Global) -> Result<Outcome> {
    let mut reader = csv::Reader::from_path(file).with_context(|| format!("{}", file.display()))?;
    let header = reader.headers()?.clone();
    for needed in ["id", "gpu", "model", "input_len", "output_len"] {
        if !header.iter().any(|h| h == needed) {
            bail!("{}:1: column \"{needed}\" is missing", file.display());
        }
    }
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(header.iter().chain(OUTPUT))?;
    let mut devices: HashMap<String, Device> = HashMap::new();
    let mut rows = 0;
    for (index, record) in reader.records().enumerate() {
        let at = || format!("{}:{}", file.display(), index + 2);
        let record = record.with_context(at)?;
        let scenario: Scenario = record.deserialize(Some(&header)).with_context(at)?;
        let figures = match predict(places, &scenario, memory, &mut devices) {
            Ok(figures) => figures,
            Err(refusal) => {
                let mut figures = vec![String::new(); OUTPUT.len()];
                if let Some(last) = figures.last_mut() {
                    *last = format!("{refusal:#}");
                }
                figures
            }
        };
        writer.write_record(record.iter().map(str::to_owned).chain(figures))?;
        rows += 1;
    }
    if rows == 0 {
        bail!("{}: no scenario below the header", file.display());
    }
    answer(&String::from_utf8(writer.into_inner()?)?);
    Ok(Outcome::Answered)
}

fn predict(
    places: &Places,
    scenario: &Scenario,
    memory: &MemoryArgs,
    devices: &mut HashMap<String, Device>,
) -> Result<Vec<String>> {
    if !matches!(scenario.tp.as_str(), "" | "1") {
        bail!("tp {}: several devices are not predicted yet", scenario.tp);
    }
    if !matches!(scenario.engine.as_str(), "" | "batchmax") {
        bail!("engine {}: only batchmax is described yet", scenario.engine);
    }
    if scenario.id.is_empty() {
        bail!("the id is empty");
    }
    let given = |text: &String, default: &str| {
        if text.is_empty() { default.to_owned() } else { text.clone() }
    };
    let memory = MemoryArgs {
        weight_dtype: (!scenario.weight_dtype.is_empty()).then(|| scenario.weight_dtype.clone()),
        kv_dtype: (!scenario.kv_dtype.is_empty()).then(|| scenario.kv_dtype.clone()),
        ..memory.clone()
    };
    if !devices.contains_key(&scenario.gpu) {
        devices.insert(scenario.gpu.clone(), Device::resolve(places, &scenario.gpu, &memory)?);
    }
    let device = devices.get(&scenario.gpu).ok_or_else(|| anyhow!("no device"))?;
    let model = setting::model(places, &scenario.model)?;
    let preset = Preset::parse(&places.catalog, &given(&scenario.policy, "full"))?;
    let schedule: Schedule = setting::schedule(&given(&scenario.schedule, "static"))?;
    let case = Case {
        model: &model,
        policy: preset.policy.as_ref(),
        setup: setting::setup(&model, device.local, &memory)?,
        isl: setting::tokens(&scenario.input_len, "input_len")?,
        osl: setting::tokens(&scenario.output_len, "output_len")?,
        schedule,
        limits: setting::limits(&device.gpu, device.runtime, &memory)?,
    };
    let (largest, over) = case.largest_batch(LARGEST_BATCH)?;
    let batch = setting::batch(&given(&scenario.batch, "max"))?.unwrap_or(largest);
    if batch > largest {
        bail!("batch {batch} does not fit: {largest} sequences do ({})", over.bound.name());
    }
    if batch == 0 {
        bail!("not even one sequence fits: over by {} ({})", over.by, over.bound.name());
    }
    let a = case.answer(batch, device.cost.as_ref())?;
    let gb = |bytes: batchmax_sim::units::Bytes| (bytes.0 as f64 / 1e9).to_string();
    let m = &a.metrics;
    Ok(vec![
        (m.ttft.0 * 1e3).to_string(),
        (m.tpot.0 * 1e3).to_string(),
        m.prefill_tokens_per_s.to_string(),
        m.decode_tokens_per_s.to_string(),
        m.output_tokens_per_s.to_string(),
        m.total_tokens_per_s.to_string(),
        gb(a.footprint.total()),
        gb(a.footprint.kv_prefill_peak),
        gb(a.footprint.kv_decode_peak),
        largest.to_string(),
        over.bound.name().to_owned(),
        m.source.name().to_owned(),
        m.error.to_string(),
        String::new(),
    ])
}
