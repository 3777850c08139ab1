//! `batchmax quality`: what policies lose on a loaded model, beside the bytes that they really keep.

pub mod measure;
mod report;
mod results;
pub mod tasks;

use anyhow::{Result, anyhow, bail};
use batchmax_exec::ExecError;
use batchmax_exec::quality::mean;
use batchmax_exec::weights::check_executable;
use batchmax_sim::policy::{Preset, Request};
use batchmax_sim::profile::Model;
use batchmax_sim::units::Tokens;
use serde::Serialize;

use crate::cli::{Global, QualityArgs};
use crate::commands::{Outcome, local};
use crate::paths::write_whole;
use crate::report::output::csv;
use crate::report::{answer, json, progress, remark, typed};
use crate::setting::{self, Places, UNCOMPRESSED};

use measure::Bench;
use results::{Control, Key, Results, Row};
use tasks::{CONTINUATION, CUE, NEEDLES, QUOTE, Source};

/// The policy that must be the worst.
const RANDOM: &str = "random";
/// Prompt tokens between two cuts in the chunked regime.
const CHUNK: Tokens = 256;
/// Most that rounding may make of `full` against itself, nats.
const SAME: f64 = 1e-6;
/// Least share of digits that `full` must find for the questions to mean anything.
const FOUND: f64 = 0.9;
/// Shares at which every ranking must beat chance; smaller ones are too hard for some.
const MILD: f64 = 0.25;

/// A check of the measurement itself.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gate {
    name: String,
    passed: bool,
    detail: String,
}

/// A policy at a budget, in a regime.
#[derive(Clone)]
struct Variant {
    preset: Preset,
    /// As typed, without what is varied here.
    base: String,
    budget: Option<String>,
    chunk: Option<Tokens>,
    /// Typed by the user, so that it may not be passed over.
    named: bool,
}

impl Variant {
    fn key(&self, context: Tokens) -> Key {
        Key {
            policy: self.base.clone(),
            label: self.preset.policy.label(),
            budget: self.budget.clone(),
            chunk: self.chunk,
            context,
        }
    }
}

/// Measures and prints.
pub fn run(places: &Places, args: &QualityArgs, global: &Global) -> Result<Outcome> {
    let model = setting::model(places, &args.model)?;
    let setup = setting::exact_setup(&args.memory)?;
    check_executable(&model, setup.weights)?;
    let contexts = contexts(args, &model)?;
    let (samples, questions) = (args.samples as usize, args.questions as usize);
    let mut left_out = Vec::new();
    let mut variants = variants(places, args)?;
    let full = Preset::parse(&places.catalog, UNCOMPRESSED)?;
    refuse_early(&mut variants, &contexts, &model, setup.kv.dtype, &mut left_out)?;
    let wanted = args.weights.weights.as_str();
    let checkpoint = local::checkpoint(places, &args.model, wanted)?;
    let threads = local::threads(&args.memory)?;
    let weights =
        local::weights(places, &args.model, wanted, checkpoint.as_ref(), &model, setup, global)?;
    if weights.synthetic && args.summary.is_some() {
        bail!("--summary: made-up weights say nothing about {}; hint: batchmax fetch", model.name);
    }
    let tokenizer = checkpoint.as_ref().map(|c| c.tokenizer()).transpose()?;
    drop(checkpoint);
    let mut results = Results::new(
        &model.name,
        &setup.weights.to_string(),
        &setup.kv.dtype.to_string(),
        samples,
        questions,
        weights.synthetic,
    );
    if let Some(path) = &args.out {
        results = results.resumed(path)?;
    }
    let source = Source::new(tokenizer.as_ref(), model.vocab)?;
    let engine = local::engine(&model, weights, threads);
    let mut asked = Vec::new();
    for &context in &contexts {
        // A chunk that holds the whole prompt is no regime of its own.
        let missing = |v: &&Variant| {
            v.base != UNCOMPRESSED
                && v.chunk.is_none_or(|c| c < context)
                && results.row(&v.key(context)).is_none()
        };
        let todo: Vec<Variant> = variants.iter().filter(missing).cloned().collect();
        let full = results.rows.iter().any(|r| r.key == full_key(&full, context));
        let control = results.controls.iter().all(|c| c.context != context);
        let control = control && control_of(&variants).is_some();
        if !full || control || !todo.is_empty() {
            asked.push((context, todo, control));
        }
    }
    let total: usize = asked
        .iter()
        .map(|(_, todo, control)| (todo.len() + 1 + usize::from(*control)) * samples)
        .sum();
    let bar = progress::bar(global, total as u64, "measuring");
    let bench = Bench { engine: &engine, setup, bar: &bar };
    let mut unable: Vec<String> = Vec::new();
    for (context, todo, control) in asked {
        let prepared = source.samples(context as usize, samples, questions, questions > 0)?;
        bar.set_message(format!("{UNCOMPRESSED}, {context} tokens"));
        let (reference, measured) = bench.reference(full.policy.as_ref(), &prepared)?;
        let key = full_key(&full, context);
        let add = |results: &mut Results, row: Row| -> Result<()> {
            if results.row(&row.key).is_none() {
                results.rows.push(row);
            }
            args.out.as_ref().map_or(Ok(()), |path| results.write(path))
        };
        add(&mut results, Row { key, measured })?;
        if let Some(variant) = control_of(&variants).filter(|_| control) {
            let preset = roomy(places, variant, context)?;
            bar.set_message(format!("control, {context} tokens"));
            let kl = bench.divergence(preset.policy.as_ref(), &prepared, &reference)?;
            results.controls.push(Control { context, label: preset.policy.label(), kl });
            args.out.as_ref().map_or(Ok(()), |path| results.write(path))?;
        }
        for variant in &todo {
            let key = variant.key(context);
            if unable.contains(&variant.base) {
                continue;
            }
            bar.set_message(format!("{}, {context} tokens", variant.preset.name));
            let found = bench.measure(variant.preset.policy.as_ref(), &prepared, &reference);
            match found {
                Ok(measured) => add(&mut results, Row { key, measured })?,
                Err(error) => match error.downcast_ref::<ExecError>() {
                    Some(ExecError::NotExecutable { part, .. }) if !variant.named => {
                        left_out.push(format!("{}: the executor can't run {part}", variant.base));
                        unable.push(variant.base.clone());
                    }
                    Some(why @ ExecError::MissingStateMaps { .. }) if !variant.named => {
                        left_out.push(why.to_string());
                        unable.push(variant.base.clone());
                    }
                    _ => return Err(error),
                },
            }
        }
    }
    bar.finish_and_clear();
    // What the file has beside is kept there and not shown.
    let kept = Results { rows: Vec::new(), ..results.clone() };
    let mut shown = kept;
    for &context in &contexts {
        let of = |r: &&Row| {
            r.key.context == context
                && (r.key.policy == UNCOMPRESSED
                    || variants.iter().any(|v| v.key(context) == r.key))
        };
        shown.rows.extend(results.rows.iter().filter(of).cloned());
    }
    shown.controls.retain(|c| contexts.contains(&c.context));
    let gates = gates(&shown);
    if let Some(path) = &args.summary {
        write_whole(path, &summary_text(&results)?)?;
    }
    let page = args.output.wants_report();
    let page = page.then(|| report::report(&shown, &gates, &left_out, typed()));
    if let Some(page) = &page {
        args.output.write(page)?;
    }
    if global.json {
        answer(&json::document("quality", shown.document(&gates, &left_out)?));
    } else if args.output.csv {
        answer(&csv(&results::HEAD, &shown.cells())?);
    } else if let Some(page) = page.filter(|_| args.output.markdown) {
        answer(&page.markdown());
    } else {
        answer(&text(&shown, &gates, &left_out));
    }
    if gates.iter().any(|g| !g.passed) {
        remark(global.quiet, "a gate failed: the figures above are not to be trusted");
        return Ok(Outcome::No);
    }
    Ok(Outcome::Answered)
}

fn full_key(full: &Preset, context: Tokens) -> Key {
    let (policy, label) = (UNCOMPRESSED.to_owned(), full.policy.label());
    Key { policy, label, budget: None, chunk: None, context }
}

fn contexts(args: &QualityArgs, model: &Model) -> Result<Vec<Tokens>> {
    let contexts = setting::token_list(&args.context, "--context")?;
    let behind = CONTINUATION + 1 + CUE + QUOTE;
    for &context in &contexts {
        if (context as usize) < 2 * (CUE + QUOTE) {
            bail!("--context {context}: at least {} tokens are needed", 2 * (CUE + QUOTE));
        }
        if context as usize + behind > model.context as usize {
            bail!(
                "--context {context}: with {behind} tokens behind it is longer than {} reads, {}",
                model.name,
                model.context
            );
        }
    }
    Ok(contexts)
}

/// Every policy at every budget in every regime, where it has such parameters and they were not typed with it.
fn variants(places: &Places, args: &QualityArgs) -> Result<Vec<Variant>> {
    let catalog = &places.catalog;
    let named = !args.policy.is_empty();
    let names = if named { setting::policies(&args.policy) } else { catalog.policy_names() };
    let budgets: Vec<String> = args.budget.split(',').map(|b| b.trim().to_owned()).collect();
    let mut found: Vec<Variant> = Vec::new();
    for name in &names {
        let preset = Preset::parse(catalog, name)?;
        let label = preset.policy.label();
        let typed = name.split_once(':').map_or("", |(_, t)| t);
        let composed = name.contains('+');
        let with = |key: &str, value: &str, text: &str| {
            format!("{text}{}{key}={value}", if text.contains(':') { ',' } else { ':' })
        };
        let takes = |key: &str, value: &str| {
            !composed
                && !typed.contains(&format!("{key}="))
                && Preset::parse(catalog, &with(key, value, name)).is_ok()
        };
        let own_budget = || {
            let (_, rest) = label.split_once("budget=")?;
            rest.split([',', '+']).next().map(str::to_owned)
        };
        let budgets: Vec<Option<String>> = if label.contains("budget=") && takes("budget", "50%") {
            budgets.iter().cloned().map(Some).collect()
        } else {
            vec![own_budget()]
        };
        let chunks: Vec<Option<Tokens>> = if preset.policy.compresses() && takes("chunk", "0") {
            [Some(0)].into_iter().chain(args.chunked.then_some(Some(CHUNK))).collect()
        } else {
            vec![None]
        };
        for budget in &budgets {
            for chunk in &chunks {
                let mut text = name.clone();
                if let Some(budget) = budget.as_ref().filter(|_| takes("budget", "50%")) {
                    text = with("budget", budget, &text);
                }
                if let Some(chunk) = chunk {
                    text = with("chunk", &chunk.to_string(), &text);
                }
                let mut preset = Preset::parse(catalog, &text)?;
                preset.name = text;
                let chunk = preset.policy.prefill_chunk();
                let (base, budget) = (name.clone(), budget.clone());
                let same = |v: &Variant| v.preset.policy.label() == preset.policy.label();
                if !found.iter().any(same) {
                    found.push(Variant { preset, base, budget, chunk, named });
                }
            }
        }
    }
    Ok(found)
}

/// Refuses what no context can serve before weights are read; passes over it where it was not typed.
fn refuse_early(
    variants: &mut Vec<Variant>,
    contexts: &[Tokens],
    model: &Model,
    cache: batchmax_sim::op::DType,
    left_out: &mut Vec<String>,
) -> Result<()> {
    let mut wrong = None;
    variants.retain(|variant| {
        let refused = contexts.iter().find_map(|context| {
            let request = Request::new(model, *context, cache);
            variant.preset.policy.check(&request).err()
        });
        match refused {
            Some(why) if variant.named => {
                wrong.get_or_insert(why);
                false
            }
            Some(why) => {
                left_out.push(format!("{}: {}", variant.preset.name, why.problem));
                false
            }
            None => true,
        }
    });
    match wrong {
        Some(why) => Err(why.into()),
        None => Ok(()),
    }
}

/// The variant whose path `full` is sent through: a budget, and chunks if any is measured.
fn control_of(variants: &[Variant]) -> Option<&Variant> {
    let mut able = variants.iter().filter(|v| v.budget.is_some() && !v.base.contains(['+', ':']));
    let first = able.next()?;
    Some(able.find(|v| v.chunk.is_some()).filter(|_| first.chunk.is_none()).unwrap_or(first))
}

/// The same policy with room for everything.
fn roomy(places: &Places, variant: &Variant, context: Tokens) -> Result<Preset> {
    let all = context as usize + CONTINUATION + 1 + CUE + QUOTE;
    let chunk = variant.chunk.unwrap_or(0);
    let text = format!("{}:budget={all},chunk={chunk}", variant.base);
    Preset::parse(&places.catalog, &text).or_else(|_| {
        Preset::parse(&places.catalog, &format!("{}:budget={all}", variant.base))
            .map_err(|e| anyhow!(e))
    })
}

/// Checks of the measurement.
fn gates(results: &Results) -> Vec<Gate> {
    let mut gates = Vec::new();
    let mut gate = |name: &str, passed: bool, detail: String| {
        gates.push(Gate { name: name.to_owned(), passed, detail });
    };
    for control in &results.controls {
        let worst = control.kl.iter().copied().fold(0.0, f64::max);
        gate(
            "full through the path of a policy",
            worst < SAME,
            format!(
                "{} tokens, {}: KL {worst:.1e}, under {SAME:.0e}",
                control.context, control.label
            ),
        );
    }
    for row in results.rows.iter().filter(|r| r.key.policy == UNCOMPRESSED) {
        if let Some(digits) = &row.measured.digits {
            let found = mean(digits);
            let detail =
                format!("{} tokens: {found:.2} of the digits, at least {FOUND}", row.key.context);
            gate("full finds the hidden numbers", found >= FOUND, detail);
        }
    }
    for random in results.rows.iter().filter(|r| r.key.policy == RANDOM) {
        let key = &random.key;
        let share = key.budget.as_deref().and_then(|b| b.strip_suffix('%')?.parse::<f64>().ok());
        if share.is_none_or(|s| s / 100.0 < MILD || s >= 100.0) {
            continue;
        }
        let worst = mean(&random.measured.kl);
        let better = results.rows.iter().filter(|r| {
            let k = &r.key;
            (&k.budget, k.chunk, k.context) == (&key.budget, key.chunk, key.context)
                && mean(&r.measured.kl) > worst
        });
        let better: Vec<&str> = better.map(|r| r.key.policy.as_str()).collect();
        let at = format!(
            "{} tokens, {}, {}",
            key.context,
            key.budget.as_deref().unwrap_or("-"),
            key.regime()
        );
        let detail = if better.is_empty() {
            format!("{at}: KL {worst:.3}")
        } else {
            format!("{at}: KL {worst:.3}; worse: {}", better.join(", "))
        };
        gate("random loses the most", better.is_empty(), detail);
    }
    gates
}

fn summary_text(results: &Results) -> Result<String> {
    Ok(format!("{SCHEMA}\n{}", toml::to_string(&results.summary())?))
}

/// What stands above the data of a description.
const SCHEMA: &str = "\
# What policies lose on this model: written by batchmax quality --summary, read by plan --max-kl and --min-recall.
# row: policy = its label without budget and chunk; budget = share of the prompt that stays, absent where there is none;
# chunk = prompt tokens between two cuts, absent where the prompt is read whole; context = prompt tokens;
# kv_bytes_per_token = bytes of cache per prompt token after the prefill, as held; kl, kl_low, kl_high = KL(full || policy) of
# the next token over 64 tokens, nats, with its 90 % bootstrap interval over the samples; top1 = share of next tokens that are
# those of full; recall = share of the digits of hidden numbers that would be chosen behind the true ones, asked for after the
# compression; answer_nll = of their tokens, nats; copy_top1, copy_nll = of 36 tokens quoted after 12.";

fn text(results: &Results, gates: &[Gate], left_out: &[String]) -> String {
    let weights = if results.synthetic {
        "synthetic weights and tokens: formats only"
    } else {
        "real weights and text"
    };
    let mut out = format!(
        "{} {} · caches in {} · {} samples, {} of {NEEDLES} hidden numbers asked for · {weights}\n\n{}\n",
        results.model,
        results.weights,
        results.cache,
        results.samples,
        results.questions,
        results.table()
    );
    for left in left_out {
        out += &format!("left out: {left}\n");
    }
    out += "\nKL in nats over 64 tokens, quote 36 tokens; intervals are paired bootstraps over the samples, 90 %\n";
    for gate in gates {
        let verdict = if gate.passed { "passed" } else { "FAILED" };
        out += &format!("gate {verdict}: {} ({})\n", gate.name, gate.detail);
    }
    out
}
