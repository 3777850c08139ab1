//! JSON for programs. Every answer carries `schema_version`; names end in their unit.

use batchmax_sim::memory::Footprint;
use batchmax_sim::metrics::Metrics;
use batchmax_sim::place::Placement;
use batchmax_sim::plan::{Answer, Candidate};
use batchmax_sim::timeline::Comparison;
use serde_json::{Value, json};

/// Raised whenever a field changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 1;

/// A document of a kind.
pub fn document(kind: &str, mut body: Value) -> String {
    if let Some(map) = body.as_object_mut() {
        map.insert("schema_version".into(), SCHEMA_VERSION.into());
        map.insert("kind".into(), kind.into());
    }
    format!("{body:#}")
}

/// Memory, bytes.
pub fn footprint(f: &Footprint) -> Value {
    json!({
        "weights_bytes": f.weights,
        "kv_prefill_peak_bytes": f.kv_prefill_peak,
        "kv_decode_peak_bytes": f.kv_decode_peak,
        "kv_spread_bytes": f.kv_spread,
        "activations_bytes": f.activations,
        "bookkeeping_bytes": f.bookkeeping,
        "runtime_bytes": f.runtime,
        "total_bytes": f.total(),
    })
}

/// Times and rates.
pub fn metrics(m: &Metrics) -> Value {
    json!({
        "ttft_s": m.ttft,
        "tpot_s": m.tpot,
        "total_s": m.total,
        "prefill_tok_s": m.prefill_tokens_per_s,
        "decode_tok_s": m.decode_tokens_per_s,
        "output_tok_s": m.output_tokens_per_s,
        "total_tok_s": m.total_tokens_per_s,
        "error": m.error,
        "source": m.source.name(),
    })
}

/// One prediction.
pub fn answer(a: &Answer) -> Value {
    json!({
        "policy": a.policy,
        "schedule": a.schedule.to_string(),
        "batch": a.batch,
        "fits": a.over.is_none(),
        "over": a.over,
        "metrics": metrics(&a.metrics),
        "memory": footprint(&a.footprint),
    })
}

/// One row of a plan.
pub fn candidate(c: &Candidate, placement: &Placement) -> Value {
    json!({
        "gpu": placement.gpu.name,
        "engine": placement.engine_name(),
        "tp": placement.setup.tp,
        "pp": placement.pp,
        "replicas": c.replicas,
        "gpus": c.gpus,
        "weight_dtype": placement.setup.weights,
        "kv_dtype": placement.setup.kv.dtype,
        "output_tok_s": c.throughput(),
        "output_tok_s_per_gpu": c.per_gpu(),
        "usd_per_million_output_tokens": c.usd_per_million(),
        "mostly": c.mostly().map(|(phase, family, share)| {
            json!({ "phase": phase.name(), "op": family, "share": share })
        }),
        "preset": c.preset,
        "policy": c.policy,
        "schedule": c.schedule.to_string(),
        "bound": c.bound,
        "missing_bytes": c.missing,
        "answer": c.answer.as_ref().map(answer),
    })
}

/// Prediction beside measurement.
pub fn comparison(c: &Comparison) -> Value {
    let unmatched: Vec<String> = c.unmatched.iter().map(|s| format!("{s:?}")).collect();
    json!({ "rows": c.rows, "unmatched": unmatched })
}
