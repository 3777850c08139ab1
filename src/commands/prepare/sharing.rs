//! Which layers `KVSharer` lets read which lower ones.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use batchmax_exec::observe::Seen;
use batchmax_exec::sharing::{MeanCaches, cosine, search};
use batchmax_exec::{Engine, load_of};
use batchmax_sim::load::Schedule;
use batchmax_sim::lower::{Setup, lower};
use batchmax_sim::policy::{Full, KvSharer, Policy};
use batchmax_sim::units::Layer;
use indicatif::ProgressBar;

use super::Found;
use crate::commands::local;

/// The cosine of the hidden states that a pair must leave, as in the paper.
const THRESHOLD: f64 = 0.5;

/// Searches a map of at least as many layers as the preset shares, and of a third of the model.
pub fn map(
    engine: &Engine,
    setup: Setup,
    policy: &KvSharer,
    excerpts: &[Vec<u32>],
    bar: &ProgressBar,
) -> Result<Found> {
    let model = &engine.model;
    let tokens = excerpts.first().map_or(1, Vec::len);
    let states = |policy: &dyn Policy, caches: &mut Option<MeanCaches>| -> Result<Vec<f32>> {
        let program = lower(model, policy, &load_of(excerpts, 1, Schedule::Static), setup)?;
        let mut states = Vec::new();
        engine.observe(&program, excerpts, local::interrupted(), &mut |seen| match seen {
            Seen::Qkv { layer, rows } => {
                if let Some(caches) = caches {
                    caches.add(layer, rows);
                }
            }
            Seen::Hidden(rows) => states.extend_from_slice(rows),
        })?;
        Ok(states)
    };
    let most = policy.layers.max(model.layers / 3);
    bar.set_length(u64::from(most) + 2);
    bar.set_message("caches of all layers");
    let mut caches = Some(MeanCaches::new(model, tokens));
    let full = states(&Full::default(), &mut caches)?;
    bar.inc(1);
    let numbers = tokens * model.hidden as usize;
    let judge = |layers: u32, map: Vec<(Layer, Layer)>| -> Result<f64> {
        let maps = if map.is_empty() {
            BTreeMap::new()
        } else {
            BTreeMap::from([(model.name.clone(), map)])
        };
        let shared = states(&KvSharer { layers, maps, unsearched: false }, &mut None)?;
        bar.inc(1);
        Ok(cosine(&full, &shared, numbers))
    };
    let unsearched = judge(policy.layers, Vec::new())?;
    let pairs = caches.map(|c| c.pairs()).unwrap_or_default();
    let trials = search(&pairs, most as usize, THRESHOLD, &mut |taken| {
        if let Some((layer, source)) = taken.last() {
            bar.set_message(format!("layer {layer} reads {source}"));
        }
        judge(taken.len() as u32, taken.to_vec())
    })?;
    let taken: Vec<_> = trials.iter().filter(|t| t.taken).collect();
    if taken.len() < policy.layers as usize {
        bail!(
            "only {} layers of {} can share with a cosine above {THRESHOLD}; hint: kvsharer:layers={}",
            taken.len(),
            model.name,
            taken.len()
        );
    }
    let at = |count: usize| taken.get(count.wrapping_sub(1)).map_or(1.0, |t| t.cosine);
    let how = format!(
        "{} pairs tried, {} taken: the cosine of the last hidden states is {:.4} with {} of them ({unsearched:.4} unsearched), {:.4} with all",
        trials.len(),
        taken.len(),
        at(policy.layers as usize),
        policy.layers,
        at(taken.len()),
    );
    let map: Vec<(Layer, Layer)> = taken.iter().map(|t| (t.pair.layer, t.pair.source)).collect();
    let value = toml::Value::try_from(BTreeMap::from([(model.name.clone(), map)]))?;
    Ok(Found { key: "maps", value, how })
}
