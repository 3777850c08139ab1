//! The networks of `LESS`: trained on this machine, written beside the preset that names them.

use std::path::Path;

use anyhow::{Result, anyhow};
use batchmax_exec::quality::mean;
use batchmax_exec::state_training::{Learned, Training, train};
use batchmax_exec::{Engine, load_of};
use batchmax_sim::load::Schedule;
use batchmax_sim::lower::{Setup, lower};
use batchmax_sim::op::Phase;
use batchmax_sim::policy::{Full, Less, Request, Step};
use batchmax_sim::units::Tokens;
use indicatif::ProgressBar;

use super::Found;
use crate::commands::local;
use crate::paths::write_whole;

/// Walks over the excerpts.
const EPOCHS: u32 = 12;

/// Trains, writes the networks beside `out`, and says what they are worth.
pub fn networks(
    engine: &Engine,
    setup: Setup,
    policy: &Less,
    excerpts: &[Vec<u32>],
    out: Option<&Path>,
    bar: &ProgressBar,
) -> Result<Found> {
    let file = out.map(|out| out.with_extension("safetensors"));
    let Some((file, name)) = file.as_ref().and_then(|f| Some((f, f.file_name()?.to_str()?))) else {
        return Err(anyhow!("less: no --out; hint: --out FILE.toml, its networks go beside it"));
    };
    let model = &engine.model;
    let prompt = excerpts.first().map_or(0, Vec::len) as Tokens;
    let request = Request::new(model, prompt, setup.kv.dtype);
    let (budget, protect) = policy.evicting.layer_budget(&Step {
        model,
        phase: Phase::Prefill,
        layer: 0,
        layers: 1,
        prompt,
        rows: prompt,
        prompt_read: true,
        token_bytes: request.token_bytes,
    });
    let state = policy.state;
    // Of a KV head: floats against a key and a value of the cache's type.
    let state_bytes = 4 * u64::from(state.rank) * u64::from(model.head_dim + 1);
    let token_bytes = setup.kv.dtype.bytes(2 * u64::from(model.head_dim)).0;
    let training = Training {
        state,
        budget,
        protect,
        tokens_of_state: state_bytes.div_ceil(token_bytes.max(1)) as u32,
        epochs: EPOCHS,
    };
    let program =
        lower(model, &Full::default(), &load_of(&excerpts[..1], 1, Schedule::Static), setup)?;
    bar.set_length(excerpts.len() as u64 + u64::from(model.layers));
    bar.set_message("reading, then training");
    let (maps, learned) =
        train(engine, &program, excerpts, &training, local::interrupted(), &|| bar.inc(1))?;
    let how = said(&learned, &training);
    let notes = [("how", how.clone()), ("version", env!("CARGO_PKG_VERSION").to_owned())];
    write_whole(file, maps.to_bytes(model, state, &notes)?)?;
    Ok(Found { key: "maps", value: toml::Value::from(name), how })
}

fn said(learned: &[Learned], training: &Training) -> String {
    let share = |of: fn(&Learned) -> f64| {
        let shares = learned.iter().filter(|l| l.eviction > 0.0);
        100.0 * mean(&shares.map(|l| of(l) / l.eviction).collect::<Vec<f64>>())
    };
    format!(
        "held-out error of {} layers' outputs at {} tokens, of 100 for H2O alone: {:.1} with the state, {:.1} with {} tokens more, {:.1} with the {} tokens more that take its memory; {} layers gain",
        learned.len(),
        training.budget,
        share(|l| l.trained),
        share(|l| l.more),
        training.state.rank.div_ceil(2),
        share(|l| l.equal),
        training.tokens_of_state,
        learned.iter().filter(|l| l.trained < l.eviction).count(),
    )
}
