//! A plan as text and as JSON.

use batchmax_sim::plan::{Bound, Candidate, Crossing, Marks, Objective};
use batchmax_sim::units::{Bytes, Tokens};
use serde::Serialize;
use serde_json::{Value, json};

use super::advice::{Advice, Change, Crossings};
use super::question::Question;
use super::{Plan, WORTH};
use crate::report::{json, table};
use crate::setting::{LOCAL, is_local};

/// Head, ranking, advice; the most important lines last.
pub fn text(question: &Question<'_>, plan: &Plan, marks: &[Marks], advice: &Advice) -> String {
    let mut out = format!("{}\n\n{}\n", head(question, plan), ranking(question, plan, marks));
    for left in &plan.left_out {
        out += &format!("left out: {left}\n");
    }
    if !advice.changes.is_empty() {
        let head = ["one change would make it", "", "", "", ""];
        let rows = advice.changes.iter().map(|c| change(question, c)).collect();
        out += &format!("\n{}\n", table::table(&head, rows, 1));
    }
    if let Some(crossings) = &advice.crossings {
        out += &format!("\n{}\n", pays(crossings));
    }
    out += &format!("\n{}\n", verdict(question, plan, advice));
    out
}

pub fn head(question: &Question<'_>, plan: &Plan) -> String {
    let Some(host) = plan.hosts.first() else { return String::new() };
    let placement = &host.placement;
    let mut names: Vec<&str> = plan.hosts.iter().map(|h| h.placement.gpu.name.as_str()).collect();
    names.dedup();
    let engine = match &placement.engine {
        None => String::new(),
        Some(engine) if engine.policies.iter().any(|p| p == "*") => {
            format!(
                " · engine {} (hypothetical: kernels of {}, every policy)",
                engine.name, engine.framework
            )
        }
        Some(engine) => format!(" · engine {}", engine.name),
    };
    let count =
        if question.count > 1 { format!("at most {} x ", question.count) } else { String::new() };
    let kv = placement.limits.kv_memory;
    let mut memories: Vec<String> =
        plan.hosts.iter().map(|h| h.placement.limits.memory.to_string()).collect();
    memories.dedup();
    format!(
        "{} {} on {count}{}{engine} · {} in, {} out · memory {}{}",
        question.model.name,
        placement.setup.weights,
        names.join(", "),
        question.isl,
        question.osl,
        memories.join(", "),
        kv.map_or_else(String::new, |kv| format!(", caches {kv}")),
    )
}

/// A column: its head, whether it stands left, and its cell.
type Column<'a> = (&'static str, bool, Box<dyn Fn(usize, &Candidate) -> String + 'a>);

/// The ranking as cells: heads, rows, and how many columns are words.
pub fn sheet(
    question: &Question<'_>,
    plan: &Plan,
    marks: &[Marks],
) -> (Vec<&'static str>, Vec<Vec<String>>, usize) {
    let several = |of: &dyn Fn(&Candidate) -> String| {
        let mut values: Vec<String> = plan.candidates.iter().map(of).collect();
        values.sort();
        values.dedup();
        values.len() > 1
    };
    let gpu = |c: &Candidate| plan.host(c).placement.gpu.name.clone();
    let kv = |c: &Candidate| plan.host(c).placement.setup.kv.dtype.to_string();
    let devices = |c: &Candidate| {
        let placement = &plan.host(c).placement;
        let pp = if placement.pp > 1 { format!(" pp {}", placement.pp) } else { String::new() };
        format!("{} x tp {}{pp}", c.replicas, placement.setup.tp)
    };
    let found = |f: fn(&batchmax_sim::plan::Answer) -> String| {
        move |_: usize, c: &Candidate| c.answer.as_ref().map_or_else(String::new, f)
    };
    let mut columns: Vec<Column<'_>> = vec![("policy", true, Box::new(|_, c| c.preset.clone()))];
    if several(&gpu) {
        columns.push(("gpu", true, Box::new(move |_, c| gpu(c))));
    }
    if question.count > 1 {
        columns.push(("gpus", true, Box::new(move |_, c| devices(c))));
    }
    if several(&kv) {
        columns.push(("kv", true, Box::new(move |_, c| kv(c))));
    }
    columns.push(("schedule", true, Box::new(|_, c| c.schedule.to_string())));
    columns.push(("limited by", true, Box::new(|_, c| limited(c))));
    columns.push(("mostly", true, Box::new(|_, c| mostly(c))));
    columns.push(("front", true, Box::new(|i, _| front(marks[i]).to_owned())));
    columns.push(("batch", false, Box::new(found(|a| a.batch.to_string()))));
    let rate = |_: usize, c: &Candidate| c.answer.as_ref().map(|_| table::rate(c.throughput()));
    columns.push(("tokens/s", false, Box::new(move |i, c| rate(i, c).unwrap_or_default())));
    columns.push(("", false, Box::new(found(|a| table::plus_minus(a.metrics.error)))));
    if question.count > 1 || question.objective == Objective::PerGpu {
        let per_gpu = |c: &Candidate| c.answer.as_ref().map(|_| table::rate(c.per_gpu()));
        columns.push(("per GPU", false, Box::new(move |_, c| per_gpu(c).unwrap_or_default())));
    }
    if question.objective == Objective::Cost || !question.args.price.is_empty() {
        let usd = |c: &Candidate| c.usd_per_million().map(|usd| format!("{usd:.3}"));
        columns.push(("USD/M", false, Box::new(move |_, c| usd(c).unwrap_or_default())));
    }
    columns.push(("TTFT", false, Box::new(found(|a| a.metrics.ttft.to_string()))));
    columns.push(("TPOT", false, Box::new(found(|a| a.metrics.tpot.to_string()))));
    columns.push((
        "KV prefill",
        false,
        Box::new(found(|a| a.footprint.kv_prefill_peak.to_string())),
    ));
    columns.push(("KV decode", false, Box::new(found(|a| a.footprint.kv_decode_peak.to_string()))));
    columns.push(("total", false, Box::new(found(|a| a.footprint.total().to_string()))));
    columns.push(("", false, Box::new(found(|a| table::sign(a.metrics.source).to_owned()))));

    let shown = shown(question, plan, marks);
    let rows = shown.iter().map(|&i| {
        let c = &plan.candidates[i];
        columns.iter().map(|(_, _, cell)| cell(i, c)).collect()
    });
    let heads = columns.iter().map(|(head, ..)| *head).collect();
    let left = columns.iter().take_while(|(_, left, _)| *left).count();
    (heads, rows.collect(), left)
}

/// Candidates that the ranking leaves out, in words.
pub fn hidden(question: &Question<'_>, plan: &Plan, shown: usize) -> String {
    match plan.candidates.len() - shown {
        0 => String::new(),
        n if question.args.pareto => format!("{n} candidates are beaten by one of these"),
        n => format!("{n} more with other parameters are no better (all: --json)"),
    }
}

/// What the letters of the fronts say.
pub const FRONT: &str =
    "front: T no other gives more at its TPOT, M no other gives more in its memory";

fn ranking(question: &Question<'_>, plan: &Plan, marks: &[Marks]) -> String {
    let (heads, rows, left) = sheet(question, plan, marks);
    let mut more = hidden(question, plan, rows.len());
    if !more.is_empty() {
        more.insert(0, '\n');
    }
    format!("{}\n{}\n{FRONT}{more}", table::table(&heads, rows, left), table::LEGEND)
}

/// Indices of the candidates that are printed: those on a front, or the best of each policy, schedule and placement.
pub fn shown(question: &Question<'_>, plan: &Plan, marks: &[Marks]) -> Vec<usize> {
    let all = 0..plan.candidates.len();
    if question.args.pareto {
        return all.filter(|i| marks[*i].tpot || marks[*i].memory).collect();
    }
    let mut seen = Vec::new();
    all.filter(|i| {
        let c = &plan.candidates[*i];
        let key = (unsearched(question, &c.preset), c.schedule, c.host);
        let new = !seen.contains(&key);
        seen.push(key);
        new
    })
    .collect()
}

/// A policy without the chunk that was searched unasked: of those the best stands for all.
fn unsearched(question: &Question<'_>, preset: &str) -> String {
    let typed = question.args.chunk.is_some() || question.args.policy.iter().any(|p| p == preset);
    match preset.split_once(':') {
        Some((name, parameters)) if !typed => {
            let kept: Vec<_> = parameters.split(',').filter(|p| !p.starts_with("chunk=")).collect();
            if kept.is_empty() { name.to_owned() } else { format!("{name}:{}", kept.join(",")) }
        }
        _ => preset.to_owned(),
    }
}

pub fn limited(c: &Candidate) -> String {
    let Some(a) = &c.answer else {
        let over = if c.missing.0 > 0 { format!(", over by {}", c.missing) } else { String::new() };
        return format!("× {}{over}", c.bound.name());
    };
    let peak =
        if a.footprint.kv_prefill_peak > a.footprint.kv_decode_peak { "prefill" } else { "decode" };
    match c.bound {
        Bound::Memory => format!("memory, {peak}"),
        other => other.name().to_owned(),
    }
}

pub fn mostly(c: &Candidate) -> String {
    c.mostly().map_or_else(String::new, |(phase, family, share)| {
        format!("{} {} {:.0} %", phase.name(), family, share * 100.0)
    })
}

pub fn front(marks: Marks) -> &'static str {
    match (marks.tpot, marks.memory) {
        (true, true) => "T M",
        (true, false) => "T",
        (false, true) => "M",
        (false, false) => "",
    }
}

pub fn change(question: &Question<'_>, change: &Change) -> Vec<String> {
    let c = &change.candidate;
    let batch = c.answer.as_ref().map_or(0, |a| a.batch);
    let devices = if c.gpus > 1 { format!(" on {} GPUs", c.gpus) } else { String::new() };
    let error = c.answer.as_ref().map_or(0.0, |a| a.metrics.error);
    let value = match question.objective {
        Objective::Output => format!("{} tokens/s", table::rate(c.throughput())),
        Objective::PerGpu => format!("{} tokens/s a GPU", table::rate(c.per_gpu())),
        Objective::Cost => format!("{:.3} USD/M", c.usd_per_million().unwrap_or_default()),
    };
    vec![
        change.what.clone(),
        format!("{:.2}x", change.gain),
        value,
        table::plus_minus(error),
        format!("batch {batch}{devices}"),
    ]
}

/// From where on compression pays, a line each.
pub fn pays(c: &Crossings) -> String {
    let tokens = |n: u64| n.to_string();
    let bytes = |n: u64| Bytes(n).to_string();
    let context = range(c.context, c.contexts, &tokens, " prompt tokens");
    let batch = match c.batch {
        None => "no compression does not fit one sequence".to_owned(),
        Some(Crossing::Never) => {
            format!("at no equal batch up to {}: what it buys is a larger one", c.largest)
        }
        Some(found) => {
            format!(
                "{}, both at the same",
                range(found, (1, c.largest.into()), &tokens, " sequences")
            )
        }
    };
    let of = if c.caches { " of caches" } else { " a device" };
    let memory = range(c.memory, c.memories, &bytes, of);
    format!(
        "where {} gives 5 % more than no compression on {}\n  context   {context}\n  batch     {batch}\n  memory    {memory}",
        c.policy, c.gpu
    )
}

/// Where a condition holds of what was tried, `from..=to`.
fn range(
    crossing: Crossing,
    (from, to): (u64, u64),
    number: &dyn Fn(u64) -> String,
    unit: &str,
) -> String {
    let (from, to) = (number(from), number(to));
    match crossing {
        Crossing::Always => format!("from {from} to {to}{unit}: at all that was tried"),
        Crossing::Never => format!("nowhere from {from} to {to}{unit}"),
        Crossing::From(at) => format!("from {}{unit} on (tried up to {to})", number(at)),
        Crossing::UpTo(at) => format!("up to {}{unit} (tried from {from})", number(at)),
        Crossing::Between(low, high) => format!("from {} to {}{unit}", number(low), number(high)),
    }
}

/// What to take, and how to go on.
pub fn verdict(question: &Question<'_>, plan: &Plan, advice: &Advice) -> String {
    let Some(best) = advice.recommended.map(|i| &plan.candidates[i]) else {
        return "nothing fits; the least missing is listed above".to_owned();
    };
    let Some(answer) = &best.answer else { return String::new() };
    let compression = match advice.gain {
        Some(gain) if gain < WORTH => {
            format!("compression does not pay here, {}\n", table::percent(gain - 1.0))
        }
        _ => String::new(),
    };
    let gain = match advice.gain {
        Some(gain) if best.compresses => format!(", {gain:.2}x of no compression"),
        _ if advice.only_compressed => "; no compression does not fit".to_owned(),
        _ => String::new(),
    };
    let placement = &plan.host(best).placement;
    let place = if question.is_local() {
        String::new()
    } else if best.gpus > 1 {
        format!(
            " on {} x {} ({} x tp {})",
            best.gpus, placement.gpu.name, best.replicas, placement.setup.tp
        )
    } else {
        format!(" on {}", placement.gpu.name)
    };
    let near: Vec<&str> = near(plan, best, question.objective);
    let near = match near.as_slice() {
        names if names.is_empty() || !best.compresses => String::new(),
        names => format!("within 2 % of it: {}\n", names.join(", ")),
    };
    let quality = match &question.quality {
        _ if !best.compresses => String::new(),
        None => "what a policy drops changes the answers: quality is not predicted\n".to_owned(),
        Some(quality) => measured(question, best, &quality.name),
    };
    let most = placement.engine.as_ref().map_or(u32::MAX, |e| e.most_sequences);
    let limit = if best.bound == Bound::Sequences {
        format!(
            "{} runs {most} sequences together unless told otherwise\n",
            placement.engine_name()
        )
    } else {
        String::new()
    };
    format!(
        "{compression}{near}{quality}{limit}{} at batch {} under the {} schedule{place}: {} output tokens/s {}{gain}\n{}",
        best.preset,
        answer.batch,
        best.schedule,
        table::rate(best.throughput()),
        table::plus_minus(answer.metrics.error),
        next_step(question, plan, best, answer.batch),
    )
}

/// What the best candidate was measured to lose, at worst.
fn measured(question: &Question<'_>, best: &Candidate, model: &str) -> String {
    let lost = question.preset(&best.preset).ok().and_then(|p| question.lost(p.policy.as_ref()));
    let Some(lost) = lost else { return String::new() };
    let recall = lost.recall.map_or_else(String::new, |r| format!(", recall {r:.2}"));
    format!("{} loses at most KL {:.3}{recall}, measured on {model}\n", best.preset, lost.kl)
}

/// Other policies that are as good as the best within what no prediction can tell apart.
fn near<'a>(plan: &'a Plan, best: &Candidate, objective: Objective) -> Vec<&'a str> {
    let kind = |c: &'a Candidate| c.preset.split(':').next().unwrap_or_default();
    let mut names = Vec::new();
    for c in &plan.candidates {
        let same = best.preset.split(':').next() == Some(kind(c));
        let close = c.value(objective) >= 0.98 * best.value(objective);
        if close && !same && c.answer.is_some() && !names.contains(&kind(c)) {
            names.push(kind(c));
        }
    }
    names
}

/// The command that proves the answer here, or that shows it op by op where this machine can't run it.
fn next_step(question: &Question<'_>, plan: &Plan, best: &Candidate, batch: u32) -> String {
    let args = question.args;
    let placement = &plan.host(best).placement;
    let mut flags = format!(
        " --policy {} --schedule {} --batch {batch} --isl {} --osl {}",
        best.preset, best.schedule, args.isl, args.osl
    );
    if args.prefix_hit != "0" {
        flags += &format!(" --prefix-hit {}", args.prefix_hit);
    }
    if args.osl_spread != "0" {
        flags += &format!(" --osl-spread {}", args.osl_spread);
    }
    let memory = &args.memory;
    for (flag, value) in [
        ("memory", memory.memory.clone()),
        ("kv-memory", memory.kv_memory.clone()),
        ("weight-dtype", memory.weight_dtype.clone()),
        ("kv-dtype", memory.kv_dtype.as_ref().map(|_| placement.setup.kv.dtype.to_string())),
        ("threads", memory.threads.map(|t| t.to_string())),
    ] {
        if let Some(value) = value {
            flags += &format!(" --{flag} {value}");
        }
    }
    if is_local(&placement.gpu.name) {
        let device = if placement.gpu.name == LOCAL { "" } else { " --device cuda" };
        return format!("hint: batchmax validate --model {}{device}{flags}", args.model);
    }
    let mut shared = String::new();
    if placement.setup.tp > 1 {
        shared += &format!(" --tp {}", placement.setup.tp);
    }
    if placement.pp > 1 {
        shared += &format!(" --pp {}", placement.pp);
    }
    format!(
        "batchmax runs on this machine only: batchmax validate --policy {} tries the policy there, not the speed of {}\nhint: batchmax what-if --model {} --gpu {} --engine {}{shared}{flags}",
        best.preset,
        placement.gpu.name,
        args.model,
        question.typed_gpu(&placement.gpu.name),
        args.placement.engine.as_deref().unwrap_or(placement.engine_name()),
    )
}

/// All of it as data.
pub fn document(question: &Question<'_>, plan: &Plan, marks: &[Marks], advice: &Advice) -> String {
    let row = |c, marks| json::candidate(c, &plan.host(c).placement, marks);
    let pairs = plan.candidates.iter().zip(marks);
    let shown = pairs.filter(|(_, m)| !question.args.pareto || m.tpot || m.memory);
    let changes = advice
        .changes
        .iter()
        .map(|c| {
            json!({
                "change": c.what, "gain": c.gain, "gpus": c.candidate.gpus,
                "output_tok_s": c.candidate.throughput(),
                "usd_per_million_output_tokens": c.candidate.usd_per_million(),
                "batch": c.candidate.answer.as_ref().map(|a| a.batch),
                "error": c.candidate.answer.as_ref().map(|a| a.metrics.error),
            })
        })
        .collect();
    let crossings = advice.crossings.as_ref().map(|c| {
        json!({
            "policy": c.policy, "gpu": c.gpu, "context_tokens": crossing(c.context), "memory_of_caches": c.caches,
            "equal_batch": c.batch.map(crossing), "memory_bytes": crossing(c.memory),
        })
    });
    let first = plan.hosts.first().map(|h| &h.placement);
    json::pretty(&Document {
        candidates: shown.map(|(c, m)| row(c, Some(m))).collect(),
        changes,
        compression_gain: advice.gain,
        compression_pays: advice.only_compressed || advice.gain.is_some_and(|g| g >= WORTH),
        crossings,
        engine: first.map(|p| p.engine_name()),
        gpu: first.map(|p| p.gpu.name.as_str()),
        gpus: question.count,
        isl: question.isl,
        kind: "plan",
        left_out: &plan.left_out,
        model: &question.model.name,
        objective: question.objective,
        osl: question.osl,
        prefix_hit: question.hit.of(question.isl),
        recommended: advice.recommended.map(|i| row(&plan.candidates[i], None)),
        schema_version: json::SCHEMA_VERSION,
    })
}

/// A plan as JSON, fields in the order of the alphabet.
#[derive(Serialize)]
struct Document<'a> {
    candidates: Vec<json::Row<'a>>,
    changes: Vec<Value>,
    compression_gain: Option<f64>,
    compression_pays: bool,
    crossings: Option<Value>,
    engine: Option<&'a str>,
    gpu: Option<&'a str>,
    gpus: u32,
    isl: Tokens,
    kind: &'static str,
    left_out: &'a [String],
    model: &'a str,
    objective: Objective,
    osl: Tokens,
    prefix_hit: Tokens,
    recommended: Option<json::Row<'a>>,
    schema_version: u32,
}

fn crossing(crossing: Crossing) -> Value {
    match crossing {
        Crossing::Always => json!({ "pays": "always" }),
        Crossing::Never => json!({ "pays": "never" }),
        Crossing::From(at) => json!({ "pays": "from", "from": at }),
        Crossing::UpTo(at) => json!({ "pays": "up-to", "to": at }),
        Crossing::Between(low, high) => json!({ "pays": "between", "from": low, "to": high }),
    }
}
