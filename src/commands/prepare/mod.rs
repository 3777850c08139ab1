//! `batchmax prepare`: what a policy must know of a model beforehand, found by running the model. The result is a preset.

mod less;
mod sharing;

use std::collections::BTreeMap;

use anyhow::{Result, anyhow, bail};
use batchmax_exec::quality::mean;
use batchmax_exec::weights::check_executable;
use batchmax_exec::{Engine, RunOptions, load_of};
use batchmax_sim::load::Schedule;
use batchmax_sim::lower::{Setup, lower};
use batchmax_sim::policy::{DBudgetKv, DuoAttention, FastKv, Less, Preset, Request};
use batchmax_sim::profile::Model;
use batchmax_sim::profile::catalog::parse_toml;
use indicatif::ProgressBar;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::cli::{Global, PrepareArgs};
use crate::commands::quality::measure::Bench;
use crate::commands::quality::tasks::{Sample, Source};
use crate::commands::{Outcome, local};
use crate::paths::write_whole;
use crate::report::{answer, json, progress, remark};
use crate::setting::{self, Places, UNCOMPRESSED};

/// What was found: what the preset is to say, and how it was found.
struct Found {
    key: &'static str,
    value: toml::Value,
    how: String,
}

/// Finds and writes.
pub fn run(places: &Places, args: &PrepareArgs, global: &Global) -> Result<Outcome> {
    let (kind, mut table) = preset(places, &args.policy)?;
    let model = setting::model(places, &args.model)?;
    let setup = setting::exact_setup(&args.memory)?;
    check_executable(&model, setup.weights)?;
    let (usual_context, usual_samples) = usual(&kind);
    let context = setting::tokens(args.context.as_deref().unwrap_or(usual_context), "--context")?;
    let count = args.samples.unwrap_or(usual_samples);
    Preset::parse(&places.catalog, &args.policy)?.policy.check(&Request::new(
        &model,
        context,
        setup.kv.dtype,
    ))?;
    let wanted = args.weights.weights.as_str();
    let checkpoint = local::checkpoint(places, &args.model, wanted)?;
    let threads = local::threads(&args.memory)?;
    let weights =
        local::weights(places, &args.model, wanted, checkpoint.as_ref(), &model, setup, global)?;
    if weights.synthetic {
        remark(global.quiet, "made-up weights: what is found says nothing about the model");
    }
    let tokenizer = checkpoint.as_ref().map(|c| c.tokenizer()).transpose()?;
    drop(checkpoint);
    let source = Source::new(tokenizer.as_ref(), model.vocab)?;
    // What is compared with another layer's cache is plain prose, without the numbers that others are to find again.
    let (samples, excerpts) = if ["kvsharer", "less"].contains(&kind.as_str()) {
        (Vec::new(), source.excerpts(context as usize, count as usize)?)
    } else {
        (source.samples(context as usize, count as usize, 0, true)?, Vec::new())
    };
    let engine = local::engine(&model, weights, threads);
    let bar = progress::bar(global, 0, "preparing");
    let bench = Bench { engine: &engine, setup, bar: &bar };
    let found = match kind.as_str() {
        "dbudgetkv" => counts(&engine, setup, parsed(&table)?, &model, &samples, &bar)?,
        "less" => {
            let policy = Less::from_table(own(&table))?;
            less::networks(&engine, setup, &policy, &excerpts, args.out.as_deref(), &bar)?
        }
        "kvsharer" => sharing::map(&engine, setup, &parsed(&table)?, &excerpts, &bar)?,
        "duoattention" => streaming(places, &bench, parsed(&table)?, &model, &samples)?,
        _ => forwarding(places, &bench, parsed(&table)?, &model, &samples)?,
    };
    bar.finish_and_clear();
    let (key, value) = (found.key, found.value.clone());
    match value {
        // Other models' entries stay.
        toml::Value::Table(entry) => {
            let all = table.entry(key).or_insert_with(|| toml::Value::Table(toml::Table::new()));
            if let toml::Value::Table(all) = all {
                all.extend(entry);
            }
        }
        value => {
            table.insert(key.to_owned(), value);
        }
    }
    // A file of what was found says nothing of other models.
    table.remove("unsearched");
    let text = written(&kind, &model, args, (count, context), &found, &table)?;
    if let Some(path) = &args.out {
        write_whole(path, &text)?;
        remark(global.quiet, &format!("{}: a preset, --policy {0} takes it", path.display()));
    }
    if global.json {
        let body = json!({ "policy": kind, "model": model.name, "key": key, "found": found.value });
        answer(&json::document("prepare", body));
    } else if args.out.is_none() {
        answer(text.trim_end());
    } else {
        answer(&found.how);
    }
    Ok(Outcome::Answered)
}

/// Prompt tokens of an excerpt and how many excerpts, where nothing else is asked for.
fn usual(kind: &str) -> (&'static str, u32) {
    match kind {
        // As in the paper.
        "kvsharer" => ("64", 30),
        // Most of the novel.
        "less" => ("512", 32),
        _ => ("1k", 4),
    }
}

/// The kind of a preset and its table, with what was typed.
fn preset(places: &Places, text: &str) -> Result<(String, toml::Table)> {
    let (name, typed) = text.split_once(':').unwrap_or((text, ""));
    let (origin, source) = places.catalog.policy_text(name)?;
    let mut table: toml::Table = parse_toml(&origin, &source)?;
    let kind = match table.remove("kind") {
        Some(toml::Value::String(kind)) => kind,
        _ => bail!("{origin}: kind: missing"),
    };
    if !["dbudgetkv", "duoattention", "fastkv", "kvsharer", "less"].contains(&kind.as_str()) {
        bail!(
            "{name} needs no preparation; hint: prepare finds what dbudgetkv, duoattention, fastkv, kvsharer and less need"
        );
    }
    for pair in typed.split(',').filter(|p| !p.is_empty()) {
        let (key, typed) =
            pair.split_once('=').ok_or_else(|| anyhow!("{pair}: expected key=value"))?;
        let value =
            format!("v = {typed}").parse::<toml::Table>().ok().and_then(|mut t| t.remove("v"));
        let typed = || toml::Value::from(typed.trim());
        table.insert(key.trim().to_owned(), value.unwrap_or_else(typed));
    }
    Ok((kind, table))
}

/// The policy of a preset's table.
fn parsed<P: DeserializeOwned>(table: &toml::Table) -> Result<P> {
    Ok(toml::Value::Table(own(table)).try_into()?)
}

/// What of a preset's table is the policy's.
fn own(table: &toml::Table) -> toml::Table {
    let mut table = table.clone();
    table.remove("paper");
    table.remove("about");
    table
}

/// The tokens that each layer keeps, as shares of the prompt: mean and standard deviation over the samples.
fn counts(
    engine: &Engine,
    setup: Setup,
    policy: DBudgetKv,
    model: &Model,
    samples: &[Sample],
    bar: &ProgressBar,
) -> Result<Found> {
    // Nothing is known yet, so that everything may stay.
    let policy = DBudgetKv { kept: BTreeMap::new(), ..policy };
    bar.set_length(samples.len() as u64);
    let mut shares: Vec<Vec<f64>> = vec![Vec::new(); model.layers as usize];
    for sample in samples {
        let prompts = [sample.prompt.clone()];
        let program = lower(model, &policy, &load_of(&prompts, 1, Schedule::Static), setup)?;
        let options = RunOptions { keep_details: true, ..RunOptions::default() };
        let stop = local::interrupted();
        let result = engine.run(&program, &prompts, &options, stop, &mut |_, _| bar.tick())?;
        let kept = result.sequences[0].kept.as_ref().ok_or_else(|| anyhow!("nothing was kept"))?;
        for (shares, heads) in shares.iter_mut().zip(kept) {
            shares.push(heads.first().map_or(0, Vec::len) as f64 / sample.prompt.len() as f64);
        }
        bar.inc(1);
    }
    let rounded = |x: f64| (x * 1000.0).round() / 1000.0;
    let means: Vec<f64> = shares.iter().map(|s| mean(s)).collect();
    let deviation = |(shares, mean): (&Vec<f64>, &f64)| {
        let squares: f64 = shares.iter().map(|s| (s - mean) * (s - mean)).sum();
        (squares / (shares.len() as f64 - 1.0).max(1.0)).sqrt()
    };
    let deviations: Vec<f64> = shares.iter().zip(&means).map(deviation).map(rounded).collect();
    let how = format!(
        "at a loss of {} layers keep {:.1} % of a prompt, {:.1} % the least, {:.1} % the most",
        policy.loss,
        100.0 * mean(&means),
        100.0 * means.iter().copied().fold(1.0, f64::min),
        100.0 * means.iter().copied().fold(0.0, f64::max),
    );
    let means: Vec<f64> = means.into_iter().map(rounded).collect();
    let entry = toml::Table::from_iter([
        ("mean".to_owned(), toml::Value::from(means)),
        ("deviation".to_owned(), toml::Value::from(deviations)),
    ]);
    let entry = toml::Table::from_iter([(model.name.clone(), toml::Value::Table(entry))]);
    Ok(Found { key: "kept", value: toml::Value::Table(entry), how })
}

/// Lets each KV head stream alone; those whose streaming is noticed least stream.
fn streaming(
    places: &Places,
    bench: &Bench<'_>,
    policy: DuoAttention,
    model: &Model,
    samples: &[Sample],
) -> Result<Found> {
    let full = Preset::parse(&places.catalog, UNCOMPRESSED)?;
    let heads: Vec<(usize, u32)> = (0..model.layers as usize)
        .flat_map(|layer| (0..model.kv_heads).map(move |head| (layer, head)))
        .collect();
    bench.bar.set_length(((heads.len() + 1) * samples.len()) as u64);
    let (reference, _) = bench.reference(full.policy.as_ref(), samples)?;
    let of = |chosen: &[(usize, u32)]| {
        let mut layers = vec![Vec::new(); model.layers as usize];
        chosen.iter().for_each(|(layer, head)| layers[*layer].push(*head));
        layers.iter_mut().for_each(|heads: &mut Vec<u32>| heads.sort_unstable());
        let streaming = BTreeMap::from([(model.name.clone(), layers)]);
        DuoAttention { streaming, ..policy.clone() }
    };
    let mut noticed = Vec::with_capacity(heads.len());
    for head in heads {
        bench.bar.set_message(format!("layer {}, KV head {}", head.0, head.1));
        let kl = mean(&bench.divergence(&of(&[head]), samples, &reference)?);
        noticed.push((kl, head));
    }
    noticed.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let count = (noticed.len() as f64 * (1.0 - policy.retrieval)).round() as usize;
    let chosen: Vec<_> = noticed[..count].iter().map(|(_, head)| *head).collect();
    let together = mean(&bench.divergence(&of(&chosen), samples, &reference)?);
    let unprepared = mean(&bench.divergence(
        &DuoAttention { streaming: BTreeMap::new(), ..policy.clone() },
        samples,
        &reference,
    )?);
    let how = format!(
        "{count} of {} KV heads stream: KL {together:.4} nats on the text they were found with ({unprepared:.4} for as many unprepared ones), alone {:.5} at most, the others up to {:.4}",
        noticed.len(),
        noticed[..count].last().map_or(0.0, |n| n.0),
        noticed.last().map_or(0.0, |n| n.0),
    );
    let layers = of(&chosen).streaming.remove(&model.name).unwrap_or_default();
    let value = toml::Value::try_from(BTreeMap::from([(model.name.clone(), layers)]))?;
    Ok(Found { key: "streaming", value, how })
}

/// Drops rows behind each layer of the lower half in turn, and nothing else; the layer where it is noticed least.
fn forwarding(
    places: &Places,
    bench: &Bench<'_>,
    policy: FastKv,
    model: &Model,
    samples: &[Sample],
) -> Result<Found> {
    let full = Preset::parse(&places.catalog, UNCOMPRESSED)?;
    let layers = 1..(model.layers / 2).max(2);
    bench.bar.set_length((u64::from(layers.end) * samples.len() as u64).max(1));
    let (reference, _) = bench.reference(full.policy.as_ref(), samples)?;
    let mut best: Option<(f64, u32)> = None;
    for after in layers {
        bench.bar.set_message(format!("layer {after}"));
        // Every layer keeps all that it reads, so that the rows alone are judged.
        let policy = FastKv { after: Some(after), retain: 1.0, ..policy.clone() };
        let kl = mean(&bench.divergence(&policy, samples, &reference)?);
        if best.is_none_or(|(least, _)| kl < least) {
            best = Some((kl, after));
        }
    }
    let (kl, after) = best.ok_or_else(|| anyhow!("{} has too few layers", model.name))?;
    let how = format!(
        "rows go behind layer {after}, counted from 0: KL {kl:.4} nats, the least of the lower half"
    );
    Ok(Found { key: "after", value: toml::Value::Integer(i64::from(after)), how })
}

fn written(
    kind: &str,
    model: &Model,
    args: &PrepareArgs,
    (samples, context): (u32, u32),
    found: &Found,
    table: &toml::Table,
) -> Result<String> {
    let head = format!(
        "# Written by batchmax prepare {} on {}, version {}: {} excerpts of {} tokens of one novel, {}.\n# {}.\n",
        args.policy,
        crate::dates::today(),
        env!("CARGO_PKG_VERSION"),
        samples,
        context,
        model.name,
        found.how,
    );
    Ok(format!("{head}kind = \"{kind}\"\n{}", toml::to_string(table)?))
}
