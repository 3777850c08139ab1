//! `batchmax compare`: the main job. Plans under a cache budget, then really runs no compression, one-shot compression,
//! compression during prefill, and the control (the compressed cache at the uncompressed batch), and says how much of
//! the gain is batch and how much is shorter attention.

use anyhow::{Result, bail};
use batchmax_exec::RunOptions;
use batchmax_sim::load::{Hit, Schedule, Spread};
use batchmax_sim::metrics::Metrics;
use batchmax_sim::plan::LARGEST_BATCH;
use batchmax_sim::policy::Preset;
use batchmax_sim::timeline::{Timeline, relative_error};
use batchmax_sim::units::Bytes;
use serde_json::json;

use crate::cli::{CompareArgs, Global, MemoryArgs};
use crate::commands::local::{self, Prose, Trial};
use crate::commands::target::Target;
use crate::commands::{Outcome, profile};
use crate::report::{answer, json, remark, table};
use crate::setting::{self, Configuration, Places, Wanted};

/// The caches' budget where none is given.
const KV_MEMORY: &str = "64MB";
/// What is run, in the order of the table.
const POLICIES: [&str; 3] = ["full", "snapkv", "batch-max"];

/// One row of the comparison.
struct Row {
    name: String,
    batch: u32,
    trial: Trial,
}

/// Fetches, profiles, plans, runs, compares.
pub fn run(places: &Places, args: &CompareArgs, global: &Global) -> Result<Outcome> {
    let mut target = Target::of(&args.device, global)?;
    let memory = MemoryArgs {
        kv_memory: Some(args.memory.kv_memory.clone().unwrap_or_else(|| KV_MEMORY.to_owned())),
        ..args.memory.clone()
    };
    let model = setting::model(places, &args.model)?;
    target.check(&model, setting::setup_here(places, target.name(), &model, &memory)?.weights)?;
    prepare(places, &mut target, args, &memory, global)?;
    let (configurations, chosen) = choose(places, target.name(), args, &memory)?;
    let first = &configurations[0];
    let wanted = args.weights.weights.as_str();
    let checkpoint = local::checkpoint(places, &args.model, wanted)?;
    let prose = Prose::new(places, checkpoint.as_ref(), &model)?;
    let threads = target.threads(&memory)?;
    let weights = local::weights(
        places,
        &args.model,
        wanted,
        checkpoint.as_ref(),
        &model,
        first.host.placement.setup,
        global,
    )?;
    drop(checkpoint);
    let activations = first.host.placement.setup.activations;
    let mut executor = target.executor(&model, weights, activations, threads)?;
    let mut rows = Vec::new();
    for (configuration, (name, batch)) in configurations.iter().zip(&chosen) {
        let prompts = prose.prompts(*batch, configuration.isl);
        let program = configuration.case().program(*batch)?;
        let options = RunOptions {
            kv_budget: configuration.host.placement.limits.kv_memory,
            ..RunOptions::default()
        };
        let trial = local::trial(
            executor.as_mut(),
            configuration,
            program,
            &prompts,
            &options,
            global,
            name,
        )?;
        rows.push(Row { name: name.clone(), batch: *batch, trial });
    }
    if global.json {
        answer(&document(&rows, executor.synthetic()));
    } else {
        answer(&text(&rows, first, executor.synthetic()));
    }
    Ok(Outcome::Answered)
}

/// The default model and a profile of this machine, where they are missing.
fn prepare(
    places: &Places,
    target: &mut Target,
    args: &CompareArgs,
    memory: &MemoryArgs,
    global: &Global,
) -> Result<()> {
    let known = local::checkpoint_path(places, &args.model).is_some();
    if !known && args.weights.weights != "synthetic" && args.model == "smollm2-135m" {
        let fetched = local::fetch_default(places, global);
        if let Err(error) = fetched {
            remark(global.quiet, &format!("{error}; going on with synthetic weights"));
        }
    }
    let threads = setting::threads_on(target.name(), memory)?;
    // What was fetched says how it is stored.
    let model = setting::model(places, &args.model)?;
    let weights = setting::setup_here(places, target.name(), &model, memory)?.weights;
    if !places.kernel_profile_path(target.name(), threads, weights).exists() {
        remark(global.quiet, "this machine has no profile yet: timing its kernels, once");
        let path = places.measurements_path(target.name(), threads, weights);
        // What is compared here evicts by rankings: no kernels beyond those that every profile has.
        let wanted =
            profile::Wanted { model: &args.model, policies: &[], rounds: 1, restart: false };
        profile::measure(places, target, &wanted, memory, &path, global)?;
    }
    Ok(())
}

type Chosen = (Vec<Configuration>, Vec<(String, u32)>);

/// The largest batch of each policy, and the control.
fn choose(
    places: &Places,
    device: &str,
    args: &CompareArgs,
    memory: &MemoryArgs,
) -> Result<Chosen> {
    let mut configurations = Vec::new();
    let mut chosen = Vec::new();
    let resolve = |policy: &str| -> Result<Configuration> {
        let model = setting::model(places, &args.model)?;
        let kv = setting::kv_types(memory)?.first().copied().flatten();
        let wanted = Wanted {
            model: &model,
            gpu: device,
            engine: None,
            choice: setting::choice(memory, kv, 1, 1)?,
            policies: Vec::new(),
            schedules: Vec::new(),
            memory,
        };
        Ok(Configuration {
            host: wanted.host(places)?,
            preset: Preset::parse(&places.catalog, policy)?,
            isl: setting::tokens(&args.isl, "--isl")?,
            osl: setting::tokens(&args.osl, "--osl")?,
            spread: Spread::default(),
            hit: Hit::default(),
            batch: None,
            schedule: Schedule::Static,
        })
    };
    for policy in POLICIES {
        let configuration = resolve(policy)?;
        let (batch, over) = configuration.case().largest_batch(LARGEST_BATCH)?;
        if batch == 0 {
            bail!(
                "{policy}: not even one sequence fits, over by {} ({}); hint: raise --kv-memory or shorten --isl",
                over.by,
                over.bound.name()
            );
        }
        configurations.push(configuration);
        chosen.push((policy.to_owned(), batch));
    }
    let uncompressed = chosen[0].1;
    configurations.push(resolve(POLICIES[2])?);
    chosen.push((format!("{}, batch of full", POLICIES[2]), uncompressed));
    Ok((configurations, chosen))
}

fn measured_rate(trial: &Trial) -> f64 {
    let outputs: usize = trial.result.sequences.iter().map(|s| s.generated.len()).sum();
    outputs as f64 / (trial.result.prefill + trial.result.decode).0
}

fn predicted_rate(trial: &Trial) -> f64 {
    Metrics::of(&trial.program, &trial.predicted).output_tokens_per_s
}

fn text(rows: &[Row], first: &Configuration, synthetic: bool) -> String {
    let head = [
        "policy",
        "batch",
        "prefill",
        "decode",
        "tokens/s",
        "predicted",
        "error",
        "speedup",
        "predicted",
        "KV peak",
        "of",
    ];
    let base = &rows[0].trial;
    let line = |row: &Row| {
        let (t, r) = (&row.trial, &row.trial.result);
        let (measured, predicted) = (measured_rate(t), predicted_rate(t));
        let kv_peak = r.kv_prefill_peak.max(r.kv_decode_peak);
        vec![
            row.name.clone(),
            row.batch.to_string(),
            r.prefill.to_string(),
            r.decode.to_string(),
            table::rate(measured),
            table::rate(predicted),
            table::percent(relative_error(predicted, measured)),
            format!("{:.2}x", measured / measured_rate(base)),
            format!("{:.2}x", predicted / predicted_rate(base)),
            kv_peak.to_string(),
            first.host.placement.limits.kv_memory.unwrap_or(Bytes(0)).to_string(),
        ]
    };
    let weights = if synthetic { "synthetic weights" } else { "real weights and text" };
    format!(
        "{} {} · {} in, {} out · caches in {} · {} schedule · {weights}\n\n{}\n\n{}",
        first.model().name,
        first.host.placement.setup.weights,
        first.isl,
        first.osl,
        first.host.placement.limits.kv_memory.unwrap_or(Bytes(0)),
        first.schedule,
        table::table(&head, rows.iter().map(line).collect(), 1),
        gain(rows),
    )
}

/// The gain, split: at the batch of `full` only attention got shorter; the rest is batch.
fn gain(rows: &[Row]) -> String {
    let [full, _, compressed, control] = rows else { return String::new() };
    let whole = measured_rate(&compressed.trial) / measured_rate(&full.trial);
    let attention = measured_rate(&control.trial) / measured_rate(&full.trial);
    let share = if whole > 1.0 { (attention.ln() / whole.ln()).clamp(0.0, 1.0) } else { 0.0 };
    format!(
        "{} gives {whole:.2}x the output tokens per second of full: {attention:.2}x from shorter attention at batch {}, {:.2}x from batch {}\n({:.0} % and {:.0} % of the gain, by logarithm)",
        compressed.name,
        full.batch,
        whole / attention,
        compressed.batch,
        share * 100.0,
        (1.0 - share) * 100.0,
    )
}

fn document(rows: &[Row], synthetic: bool) -> String {
    let list: Vec<_> = rows
        .iter()
        .map(|row| {
            let timeline: &Timeline = &row.trial.predicted;
            json!({
                "name": row.name,
                "batch": row.batch,
                "measured": crate::commands::run::figures(&row.trial.program, &row.trial.result),
                "predicted": json::metrics(&Metrics::of(&row.trial.program, timeline)),
            })
        })
        .collect();
    json::document("compare", json!({ "rows": list, "synthetic": synthetic }))
}
