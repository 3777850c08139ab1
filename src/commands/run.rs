//! `batchmax run`: text in, text out, or speed alone.

use std::path::Path;

use anyhow::{Result, anyhow, bail};
use batchmax_exec::load::Tokenizer;
use batchmax_exec::tier::TierPlace;
use batchmax_exec::{Executor, RunOptions, RunResult, Sampling, load_of};
use batchmax_sim::load::{Admission, Load};
use batchmax_sim::lower::{lower, lower_prefix};
use batchmax_sim::memory::{kv_peaks, offloaded};
use batchmax_sim::plan::{LARGEST_BATCH, largest};
use batchmax_sim::program::Program;
use batchmax_sim::units::Bytes;
use serde_json::{Value, json};

use crate::cli::{Global, RunArgs};
use crate::commands::Outcome;
use crate::commands::local::{self, Prose};
use crate::commands::target::Target;
use crate::paths::write_whole;
use crate::report::{answer, json, progress, remark, table};
use crate::setting::{self, Places};

/// Positions are dumped for these many best logits.
const DUMPED_LOGITS: usize = 50;

/// Runs and prints.
pub fn run(places: &Places, args: &RunArgs, global: &Global) -> Result<Outcome> {
    let mut target = Target::of(&args.device, global)?;
    let config = &args.config;
    target.check_gpu(&config.gpu)?;
    setting::refuse_devices(&config.placement)?;
    let model = setting::model(places, &config.model)?;
    // No more than its head is read before all is refused that can be.
    let wanted = args.weights.weights.as_str();
    let checkpoint = local::checkpoint(places, &config.model, wanted)?;
    let setup = setting::setup_here(places, target.name(), &model, &config.memory)?;
    target.check(&model, setup.weights)?;
    let part = setting::part(target.name(), &model)?;
    check_sampling(args)?;
    let most = target.memory()?;
    let preset = batchmax_sim::policy::Preset::parse(&places.catalog, &config.policy)?;
    let (isl, osl) =
        (setting::tokens(&config.isl, "--isl")?, setting::tokens(&config.osl, "--osl")?);
    let budget = match &config.memory.kv_memory {
        Some(text) => {
            Some(batchmax_sim::units::parse_bytes(text).map_err(|e| anyhow!("--kv-memory: {e}"))?)
        }
        None => None,
    };
    let tier_budget = match &args.tier_memory {
        Some(text) => Some(
            batchmax_sim::units::parse_bytes(text).map_err(|e| anyhow!("--tier-memory: {e}"))?,
        ),
        None => None,
    };
    let tier_place = match &args.tier_dir {
        Some(path) if !path.is_dir() => {
            bail!("--tier-dir {}: no such directory; hint: create it first", path.display())
        }
        Some(path) => TierPlace::Directory(path.clone()),
        None => TierPlace::Memory,
    };
    let schedule = setting::schedule(&config.schedule)?;
    let hit = setting::hit(&config.prefix_hit)?;
    let spread = setting::spread(&config.osl_spread)?;
    let limited = budget.is_some() || config.memory.memory.is_some();
    let batch = match setting::batch(&config.batch)? {
        Some(batch) => batch,
        // Nobody wants to wait for all that a whole machine can hold.
        None if !limited || args.prompt.is_some() || args.ids.is_some() => 1,
        None => {
            let why_not = |batch| {
                let load =
                    Load::uniform(batch, isl, osl, schedule).with_hit(hit).with_spread(spread);
                let program = lower(&part, preset.policy.as_ref(), &load, setup)?;
                Ok::<_, anyhow::Error>(refuse(args, most, &part, &program, budget).err())
            };
            match largest(LARGEST_BATCH, None, why_not)? {
                (0, Some(why)) => return Err(why),
                (batch, _) => batch.max(1),
            }
        }
    };
    let tokenizer = match (&checkpoint, args.prompt.is_some()) {
        (Some(checkpoint), true) => Some(checkpoint.tokenizer()?),
        _ => None,
    };
    let requests = schedule.requests(batch).unwrap_or(u32::MAX);
    let given = given_prompts(args, tokenizer.as_ref(), requests)?;
    let load = match &given {
        Some(prompts) => {
            let mut load = load_of(prompts, osl, schedule);
            // Prompts of their own lengths join by what each will need.
            let places =
                if args.ids.is_some() { setting::batch(&config.batch)? } else { Some(batch) };
            load.admission = Admission { places, kv: budget };
            load
        }
        None => Load::uniform(batch, isl, osl, schedule),
    }
    .with_hit(hit)
    .with_spread(spread);
    let program = lower(&part, preset.policy.as_ref(), &load, setup)?;
    let prefix = lower_prefix(&part, preset.policy.as_ref(), &load, setup);
    refuse(args, most, &part, &program, budget)?;
    refuse_offloaded(&program, tier_budget)?;
    local::check_prefix(prefix.as_ref(), budget)?;
    let prompts = match given {
        Some(prompts) => prompts,
        None => {
            Prose::new(places, checkpoint.as_ref(), &model)?.prompts(local::requests(&program), isl)
        }
    };
    let threads = target.threads(&config.memory)?;
    let weights =
        local::weights(places, &config.model, wanted, checkpoint.as_ref(), &model, setup, global)?;
    drop(checkpoint);
    let mut executor = target.executor(&model, weights, setup.activations, threads)?;
    let options = RunOptions {
        kv_budget: budget,
        sampling: Sampling { temperature: args.temperature, top_p: args.top_p, seed: args.seed },
        stop_tokens: match &tokenizer {
            Some(tokenizer) if !args.ignore_stop => tokenizer.stop_tokens(),
            _ => Vec::new(),
        },
        keep_details: args.dump.is_some(),
        tier_budget,
        tier_place,
        prefix,
        ..RunOptions::default()
    };
    let result = go(executor.as_mut(), &program, &prompts, &options, global)?;
    if let Some(path) = &args.dump {
        dump(path, &prompts, &result)?;
    }
    if let (Some(tokenizer), false) = (&tokenizer, global.json) {
        for sequence in &result.sequences {
            answer(tokenizer.decode(&sequence.generated)?.trim_start());
        }
        if args.chat {
            remark(global.quiet, "");
        }
    }
    let figures = figures(&program, &result);
    if global.json {
        let mut body = figures;
        let ids: Vec<_> = result.sequences.iter().map(|s| &s.generated).collect();
        body["generated"] = json!(ids);
        body["synthetic"] = json!(executor.synthetic());
        answer(&json::document("run", body));
    } else {
        let text = summary(&figures);
        if tokenizer.is_some() { remark(global.quiet, &text) } else { answer(&text) }
    }
    Ok(Outcome::Answered)
}

fn refuse(
    args: &RunArgs,
    most: Bytes,
    model: &batchmax_sim::profile::Model,
    program: &Program,
    budget: Option<Bytes>,
) -> Result<()> {
    let footprint = batchmax_sim::memory::footprint(model, program, Bytes(0));
    let memory = match &args.config.memory.memory {
        Some(text) => {
            batchmax_sim::units::parse_bytes(text).map_err(|e| anyhow!("--memory: {e}"))?
        }
        None => most,
    };
    if footprint.weights > memory {
        bail!(
            "the weights alone take {}, the memory is {memory}; hint: raise --memory, or --weight-dtype bf16",
            footprint.weights
        );
    }
    if footprint.most() > memory {
        bail!(
            "the run takes {}, the memory is {memory}; hint: a smaller --batch, or a policy with a smaller budget",
            footprint.most()
        );
    }
    let peaks = kv_peaks(program);
    let needed = peaks.prefill.max(peaks.decode) + footprint.kv_spread;
    match budget {
        Some(budget) if needed > budget => bail!(
            "the caches need {needed} at their peak, --kv-memory is {budget}; hint: a smaller --batch, or a policy with a smaller budget or chunk"
        ),
        _ => Ok(()),
    }
}

/// What is offloaded has a limit of its own.
fn refuse_offloaded(program: &Program, budget: Option<Bytes>) -> Result<()> {
    let needed = offloaded(program);
    match budget {
        Some(budget) if needed > budget => bail!(
            "offloaded tokens need {needed} of slower memory, --tier-memory is {budget}; hint: a smaller --batch or a shorter prompt"
        ),
        _ => Ok(()),
    }
}

fn go(
    executor: &mut dyn Executor,
    program: &Program,
    prompts: &[Vec<u32>],
    options: &RunOptions,
    global: &Global,
) -> Result<RunResult> {
    let (steps, _) = program.steps();
    let bar = progress::bar(global, steps, "running");
    let result = executor.run(program, prompts, options, local::interrupted(), &mut |done, _| {
        if done % 16 == 0 {
            bar.set_position(done);
        }
    });
    bar.finish_and_clear();
    Ok(result?)
}

/// The prompts that were typed, as ids; `None`: prompts of --isl tokens are to be made up.
fn given_prompts(
    args: &RunArgs,
    tokenizer: Option<&Tokenizer>,
    batch: u32,
) -> Result<Option<Vec<Vec<u32>>>> {
    if let Some(path) = &args.ids {
        return Ok(Some(read_ids(path)?));
    }
    let Some(text) = &args.prompt else { return Ok(None) };
    let tokenizer = tokenizer.ok_or_else(|| {
        anyhow!(
            "--prompt needs the model's tokeniser; hint: batchmax fetch, or token ids with --ids"
        )
    })?;
    let text = if args.chat {
        tokenizer.chat(text).ok_or_else(|| {
            anyhow!("--chat: this model's chat template is not known; hint: leave --chat out")
        })?
    } else {
        text.clone()
    };
    let ids = tokenizer.encode(&text, true)?;
    if ids.is_empty() {
        bail!("--prompt: the prompt has no tokens");
    }
    Ok(Some(vec![ids; batch as usize]))
}

fn check_sampling(args: &RunArgs) -> Result<()> {
    if !(args.temperature.is_finite() && args.temperature >= 0.0) {
        bail!("--temperature {}: expected 0 (greedy) or a positive number", args.temperature);
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        bail!("--top-p {}: expected a probability over 0 and up to 1", args.top_p);
    }
    Ok(())
}

fn read_ids(path: &Path) -> Result<Vec<Vec<u32>>> {
    let problem = |e: &dyn std::fmt::Display| {
        anyhow!("{}: {e}; hint: a JSON list of lists of token ids", path.display())
    };
    let text = std::fs::read_to_string(path).map_err(|e| problem(&e))?;
    let ids: Vec<Vec<u32>> = serde_json::from_str(&text).map_err(|e| problem(&e))?;
    if ids.is_empty() || ids.iter().any(Vec::is_empty) {
        return Err(problem(&"a prompt without tokens"));
    }
    Ok(ids)
}

/// What a run measured, as JSON.
pub fn figures(program: &Program, result: &RunResult) -> Value {
    let load = &program.header.load;
    let outputs: usize = result.sequences.iter().map(|s| s.generated.len()).sum();
    let (prefill, decode) = (result.prefill.0, result.decode.0);
    let decoded = outputs.saturating_sub(result.sequences.len());
    let rate = |tokens: f64, seconds: f64| if seconds > 0.0 { tokens / seconds } else { 0.0 };
    json!({
        "batch": load.batch(),
        "requests": load.sequences(),
        "policy": program.header.policy,
        "prefill_s": prefill,
        "decode_s": decode,
        "prefill_tok_s": rate(load.input_tokens() as f64, prefill),
        "decode_tok_s": rate(decoded as f64, decode),
        "output_tok_s": rate(outputs as f64, prefill + decode),
        "kv_peak_bytes": result.kv_prefill_peak.max(result.kv_decode_peak),
        "kv_prefill_peak_bytes": result.kv_prefill_peak,
        "kv_decode_peak_bytes": result.kv_decode_peak,
        "offloaded_bytes": result.tier.peak,
        "fetched_bytes": result.tier.fetched,
        "tier_s": result.tier.busy,
        "tier_wait_s": result.tier.waited,
        "peak_rss_bytes": result.peak_rss,
    })
}

fn summary(figures: &Value) -> String {
    let number = |key: &str| figures[key].as_f64().unwrap_or(0.0);
    let bytes = |key: &str| Bytes(figures[key].as_u64().unwrap_or(0));
    let moved = Bytes(bytes("offloaded_bytes").0 + bytes("fetched_bytes").0);
    let tier = if moved.0 == 0 {
        String::new()
    } else {
        format!(
            "\n  offloaded   {:>11}   {} fetched in {:.2} s beside, {:.2} s waited",
            bytes("offloaded_bytes"),
            bytes("fetched_bytes"),
            number("tier_s"),
            number("tier_wait_s"),
        )
    };
    format!(
        "batch {}{} · {}\n  prefill     {:>9.2} s   {:>8} tokens/s\n  decode      {:>9.2} s   {:>8} tokens/s\n  output                    {:>8} tokens/s\n  kv peak     {:>11}\n  process     {:>11}{tier}",
        figures["batch"],
        if figures["requests"] == figures["batch"] {
            String::new()
        } else {
            format!(" ({} requests)", figures["requests"])
        },
        figures["policy"].as_str().unwrap_or(""),
        number("prefill_s"),
        table::rate(number("prefill_tok_s")),
        number("decode_s"),
        table::rate(number("decode_tok_s")),
        table::rate(number("output_tok_s")),
        bytes("kv_peak_bytes"),
        bytes("peak_rss_bytes"),
    )
}

/// Logits, tokens and kept positions in the layout of the golden values.
fn dump(path: &Path, prompts: &[Vec<u32>], result: &RunResult) -> Result<()> {
    let list: Vec<Value> = prompts
        .iter()
        .zip(&result.sequences)
        .map(|(ids, sequence)| {
            let logits = sequence.prompt_logits.as_deref().unwrap_or(&[]);
            let count = logits.len().max(1) as f64;
            let mean = logits.iter().map(|l| f64::from(*l)).sum::<f64>() / count;
            let variance = logits.iter().map(|l| (f64::from(*l) - mean).powi(2)).sum::<f64>()
                / (count - 1.0).max(1.0);
            let mut order: Vec<u32> = (0..logits.len() as u32).collect();
            order
                .sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
            order.truncate(DUMPED_LOGITS);
            let best: Vec<f32> = order.iter().map(|i| logits[*i as usize]).collect();
            json!({
                "len": ids.len(),
                "ids": ids,
                "top50_ids": order,
                "top50_logits": best,
                "logits_mean": mean,
                "logits_std": variance.sqrt(),
                "generated": sequence.generated,
                "greedy_gap": sequence.gaps,
                "kept": sequence.kept,
            })
        })
        .collect();
    write_whole(path, &serde_json::to_string(&json!({ "prompts": list }))?)
}
