//! JSON for programs. Every answer carries `schema_version`; names end in their unit.

use batchmax_sim::memory::Footprint;
use batchmax_sim::metrics::Metrics;
use batchmax_sim::op::{DType, Phase};
use batchmax_sim::place::Placement;
use batchmax_sim::plan::{Answer, Bound, Candidate, Marks};
use batchmax_sim::timeline::Comparison;
use batchmax_sim::units::{Bytes, Seconds};
use serde::Serialize;
use serde_json::{Value, json};

/// Raised whenever a field changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 1;

/// A document of a kind.
pub fn document(kind: &str, mut body: Value) -> String {
    if let Some(map) = body.as_object_mut() {
        map.insert("schema_version".into(), SCHEMA_VERSION.into());
        map.insert("kind".into(), kind.into());
    }
    pretty(&body)
}

/// Indented by two. What is printed by the thousand is written straight from its fields: as values it would be a tree of
/// maps that takes longer than the search.
pub fn pretty(body: &impl Serialize) -> String {
    serde_json::to_string_pretty(body).unwrap_or_default()
}

/// Memory, bytes. Here and below fields are in the order of the alphabet, as in maps.
#[derive(Serialize)]
pub struct Memory {
    activations_bytes: Bytes,
    away_bytes: Bytes,
    bookkeeping_bytes: Bytes,
    kv_decode_peak_bytes: Bytes,
    kv_prefill_peak_bytes: Bytes,
    kv_spread_bytes: Bytes,
    runtime_bytes: Bytes,
    total_bytes: Bytes,
    weights_bytes: Bytes,
}

/// Memory, bytes.
pub fn footprint(f: &Footprint) -> Memory {
    Memory {
        activations_bytes: f.activations,
        away_bytes: f.away,
        bookkeeping_bytes: f.bookkeeping,
        kv_decode_peak_bytes: f.kv_decode_peak,
        kv_prefill_peak_bytes: f.kv_prefill_peak,
        kv_spread_bytes: f.kv_spread,
        runtime_bytes: f.runtime,
        total_bytes: f.total(),
        weights_bytes: f.weights,
    }
}

/// Times and rates.
#[derive(Serialize)]
pub struct Rates {
    decode_tok_s: f64,
    error: f64,
    output_tok_s: f64,
    prefill_tok_s: f64,
    source: &'static str,
    total_s: Seconds,
    total_tok_s: f64,
    tpot_s: Seconds,
    ttft_s: Seconds,
}

/// Times and rates.
pub fn metrics(m: &Metrics) -> Rates {
    Rates {
        decode_tok_s: m.decode_tokens_per_s,
        error: m.error,
        output_tok_s: m.output_tokens_per_s,
        prefill_tok_s: m.prefill_tokens_per_s,
        source: m.source.name(),
        total_s: m.total,
        total_tok_s: m.total_tokens_per_s,
        tpot_s: m.tpot,
        ttft_s: m.ttft,
    }
}

/// One prediction.
#[derive(Serialize)]
pub struct Prediction<'a> {
    batch: u32,
    fits: bool,
    memory: Memory,
    metrics: Rates,
    over: Option<Limit>,
    policy: &'a str,
    schedule: String,
}

#[derive(Serialize)]
struct Limit {
    bound: Bound,
    by: Bytes,
}

/// One prediction.
pub fn answer(a: &Answer) -> Prediction<'_> {
    Prediction {
        batch: a.batch,
        fits: a.over.is_none(),
        memory: footprint(&a.footprint),
        metrics: metrics(&a.metrics),
        over: a.over.map(|over| Limit { bound: over.bound, by: over.by }),
        policy: &a.policy,
        schedule: a.schedule.to_string(),
    }
}

/// One row of a plan.
#[derive(Serialize)]
pub struct Row<'a> {
    answer: Option<Prediction<'a>>,
    bound: Bound,
    engine: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    front_memory: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    front_tpot: Option<bool>,
    gpu: &'a str,
    gpus: u32,
    kv_dtype: DType,
    missing_bytes: Bytes,
    mostly: Option<Part>,
    output_tok_s: f64,
    output_tok_s_per_gpu: f64,
    policy: &'a str,
    pp: u32,
    preset: &'a str,
    replicas: u32,
    schedule: String,
    tp: u32,
    usd_per_million_output_tokens: Option<f64>,
    weight_dtype: DType,
}

/// A part of a run's time.
#[derive(Serialize)]
struct Part {
    op: &'static str,
    phase: &'static str,
    share: f64,
}

/// One row of a plan, with the fronts it is on where that is said.
pub fn candidate<'a>(c: &'a Candidate, placement: &'a Placement, marks: Option<&Marks>) -> Row<'a> {
    let part = |(phase, op, share): (Phase, _, _)| Part { op, phase: phase.name(), share };
    Row {
        answer: c.answer.as_ref().map(answer),
        bound: c.bound,
        engine: placement.engine_name(),
        front_memory: marks.map(|m| m.memory),
        front_tpot: marks.map(|m| m.tpot),
        gpu: &placement.gpu.name,
        gpus: c.gpus,
        kv_dtype: placement.setup.kv.dtype,
        missing_bytes: c.missing,
        mostly: c.mostly().map(part),
        output_tok_s: c.throughput(),
        output_tok_s_per_gpu: c.per_gpu(),
        policy: &c.policy,
        pp: placement.pp,
        preset: &c.preset,
        replicas: c.replicas,
        schedule: c.schedule.to_string(),
        tp: placement.setup.tp,
        usd_per_million_output_tokens: c.usd_per_million(),
        weight_dtype: placement.setup.weights,
    }
}

/// Prediction beside measurement.
pub fn comparison(c: &Comparison) -> Value {
    let unmatched: Vec<String> = c.unmatched.iter().map(|s| format!("{s:?}")).collect();
    json!({ "rows": c.rows, "unmatched": unmatched })
}
