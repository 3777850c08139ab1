//! `batchmax plan`: the ranking, what binds each candidate, and the command that would prove the first.

use anyhow::Result;
use batchmax_sim::load::Schedule;
use batchmax_sim::plan::{Candidate, Query, Slo, plan};
use batchmax_sim::policy::Preset;
use batchmax_sim::units::parse_seconds;
use serde_json::json;

use crate::cli::{Global, PlanArgs};
use crate::commands::Outcome;
use crate::report::{answer, json, table};
use crate::setting::{self, Device, Places};

/// Plans and prints.
pub fn run(places: &Places, args: &PlanArgs, global: &Global) -> Result<Outcome> {
    let model = setting::model(places, &args.model)?;
    let device = Device::resolve(places, &args.gpu, &args.memory)?;
    let names =
        if args.policy.is_empty() { places.catalog.policy_names() } else { args.policy.clone() };
    let policies: Vec<Preset> =
        names.iter().map(|n| Preset::parse(&places.catalog, n)).collect::<Result<_, _>>()?;
    let schedules: Vec<Schedule> = if args.schedule.is_empty() {
        vec![Schedule::Static, Schedule::Staggered { prefill_batch: 1 }]
    } else {
        args.schedule.iter().map(|s| setting::schedule(s)).collect::<Result<_>>()?
    };
    let limit = |text: &Option<String>| text.as_ref().map(|t| parse_seconds(t)).transpose();
    let query = Query {
        model: &model,
        cost: device.cost.as_ref(),
        setup: setting::setup(&model, device.local, &args.memory)?,
        isl: setting::tokens(&args.isl, "--isl")?,
        osl: setting::tokens(&args.osl, "--osl")?,
        limits: setting::limits(&device.gpu, device.runtime, &args.memory)?,
        slo: Slo { ttft: limit(&args.ttft)?, tpot: limit(&args.tpot)? },
        policies: &policies,
        schedules: &schedules,
        batch: setting::batch(&args.batch)?,
    };
    let candidates = plan(&query)?;
    let fits = candidates.iter().any(|c| c.answer.is_some());
    if global.json {
        let list: Vec<_> = candidates.iter().map(json::candidate).collect();
        let body = json!({ "model": model.name, "gpu": device.gpu.name, "candidates": list });
        answer(&json::document("plan", body));
    } else {
        let head = format!(
            "{} {} on {} · {} in, {} out · memory {}{}\n",
            model.name,
            query.setup.weights,
            device.gpu.name,
            query.isl,
            query.osl,
            query.limits.memory,
            query.limits.kv_memory.map_or_else(String::new, |kv| format!(", caches {kv}")),
        );
        answer(&format!("{head}\n{}\n{}", ranking(&candidates), advice(&candidates, args)));
    }
    Ok(if fits { Outcome::Answered } else { Outcome::No })
}

fn ranking(candidates: &[Candidate]) -> String {
    let head = [
        "policy",
        "schedule",
        "limited by",
        "batch",
        "tokens/s",
        "",
        "TTFT",
        "TPOT",
        "KV prefill",
        "KV decode",
        "total",
        "",
    ];
    let rows = candidates.iter().map(|c| {
        let mut row = vec![c.preset.clone(), c.schedule.to_string()];
        match &c.answer {
            Some(a) => row.extend([
                c.bound.name().to_owned(),
                a.batch.to_string(),
                table::rate(a.metrics.output_tokens_per_s),
                table::plus_minus(a.metrics.error),
                a.metrics.ttft.to_string(),
                a.metrics.tpot.to_string(),
                a.footprint.kv_prefill_peak.to_string(),
                a.footprint.kv_decode_peak.to_string(),
                a.footprint.total().to_string(),
                table::sign(a.metrics.source).to_owned(),
            ]),
            None => row.push(format!("× {}, over by {}", c.bound.name(), c.missing)),
        }
        row
    });
    format!("{}\n{}", table::table(&head, rows.collect(), 3), table::LEGEND)
}

/// The most important lines last: what to take, and the command that proves it.
fn advice(candidates: &[Candidate], args: &PlanArgs) -> String {
    let Some((first, best)) = candidates.first().and_then(|c| Some((c, c.answer.as_ref()?))) else {
        return "nothing fits; the least missing is listed above".to_owned();
    };
    let base = candidates
        .iter()
        .filter(|c| c.policy.starts_with("full"))
        .map(Candidate::throughput)
        .fold(0.0, f64::max);
    let gain = if base > 0.0 && !first.policy.starts_with("full") {
        format!(", {:.2}x of no compression", first.throughput() / base)
    } else {
        String::new()
    };
    let kv =
        args.memory.kv_memory.as_ref().map_or_else(String::new, |kv| format!(" --kv-memory {kv}"));
    format!(
        "\n{} at batch {} under the {} schedule: {} output tokens/s{gain}\nhint: batchmax validate --model {} --policy {} --schedule {} --batch {} --isl {} --osl {}{kv}",
        first.preset,
        best.batch,
        first.schedule,
        table::rate(first.throughput()),
        args.model,
        first.policy,
        first.schedule,
        best.batch,
        args.isl,
        args.osl,
    )
}
