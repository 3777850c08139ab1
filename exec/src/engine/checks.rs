//! What is checked before a run, and what runs on any device need to know of a program.

use std::path::Path;

use batchmax_sim::load::Schedule;
use batchmax_sim::memory::{kv_peaks, kv_spread, offloaded};
use batchmax_sim::op::{Lane, OpKind};
use batchmax_sim::profile::Model;
use batchmax_sim::program::Program;
use batchmax_sim::units::{Bytes, Tokens};

use super::{Run, RunOptions};
use crate::error::ExecError;
use crate::interpreter::SequenceState;
use crate::sampling::Sampler;
use crate::state_maps::StateMaps;

impl Run<'_> {
    /// Whether prompts and options are those of the program.
    pub(crate) fn check(&self, model: &Model) -> Result<(), ExecError> {
        check_prompts(model, self.program, self.prompts, self.options)?;
        check_forced(model, self.program, self.prompts, self.options)?;
        check_read_once(self.program, self.prompts, self.options)
    }
}

/// Whether the prompts are those of the program.
pub(crate) fn check_prompts(
    model: &Model,
    program: &Program,
    prompts: &[Vec<u32>],
    options: &RunOptions,
) -> Result<(), ExecError> {
    let load = &program.header.load;
    let expected: Vec<Tokens> =
        load.groups.iter().flat_map(|g| std::iter::repeat_n(g.isl, g.sequences as usize)).collect();
    let got: Vec<Tokens> = prompts.iter().map(|p| p.len() as Tokens).collect();
    if expected != got {
        let describe = |lengths: &[Tokens]| {
            format!("{} of {} tokens in all", lengths.len(), lengths.iter().sum::<Tokens>())
        };
        return Err(ExecError::WrongPrompts { expected: describe(&expected), got: describe(&got) });
    }
    if load.groups.iter().any(|g| g.hit > 0) && options.prefix.is_none() {
        return Err(ExecError::MissingPrefix);
    }
    let vocab = model.vocab;
    match prompts.iter().flatten().find(|id| **id >= vocab) {
        Some(&id) => Err(ExecError::UnknownToken { id, vocab }),
        None => Ok(()),
    }
}

fn check_forced(
    model: &Model,
    program: &Program,
    prompts: &[Vec<u32>],
    options: &RunOptions,
) -> Result<(), ExecError> {
    let forced = &options.forced;
    if forced.is_empty() {
        return Ok(());
    }
    let groups = &program.header.load.groups;
    let osl = groups.iter().map(|g| g.osl as usize).min().unwrap_or(0);
    let longest = forced.iter().map(Vec::len).max().unwrap_or(0);
    if forced.len() != prompts.len() || longest > osl {
        return Err(ExecError::WrongForced {
            expected: format!("{} sequences of at most {osl} tokens", prompts.len()),
            got: format!("{} of at most {longest}", forced.len()),
        });
    }
    let vocab = model.vocab;
    match forced.iter().flatten().find(|id| **id >= vocab) {
        Some(&id) => Err(ExecError::UnknownToken { id, vocab }),
        None => Ok(()),
    }
}

/// Refuses copies of what was not read.
fn check_read_once(
    program: &Program,
    prompts: &[Vec<u32>],
    options: &RunOptions,
) -> Result<(), ExecError> {
    let Some(n) = options.read_once else { return Ok(()) };
    let count = n as usize;
    let wrong = |got: &str| {
        let expected =
            format!("prompts of which each is that {count} places before, read {count} at once");
        Err(ExecError::WrongPrompts { expected, got: got.to_owned() })
    };
    if count == 0 || !prompts.len().is_multiple_of(count) || program.header.load.groups.len() != 1 {
        return wrong(&format!("{} prompts", prompts.len()));
    }
    if program.header.load.schedule != (Schedule::Staggered { prefill_batch: n }) {
        return wrong(&format!("a {} schedule", program.header.load.schedule));
    }
    if offloaded(program).0 > 0 {
        return wrong("a program that offloads tokens, which are not copied");
    }
    match (count..prompts.len()).find(|i| prompts[*i] != prompts[i - count]) {
        Some(i) => wrong(&format!("another prompt at {i}")),
        None => Ok(()),
    }
}

/// Bytes that caches hold at most, by prediction.
pub(crate) fn kv_needed(program: &Program, options: &RunOptions) -> Bytes {
    let needed = |program: &Program| {
        let peaks = kv_peaks(program);
        peaks.prefill.max(peaks.decode) + kv_spread(program)
    };
    needed(program).max(options.prefix.as_ref().map_or(Bytes(0), needed))
}

/// The budget of the caches: what the options say, or what is needed.
pub(crate) fn kv_budget(program: &Program, options: &RunOptions) -> Result<Bytes, ExecError> {
    let needed = kv_needed(program, options);
    let budget = options.kv_budget.unwrap_or(needed);
    if needed > budget {
        return Err(ExecError::OverBudget { needed, budget });
    }
    let away = offloaded(program).max(options.prefix.as_ref().map_or(Bytes(0), offloaded));
    match options.tier_budget.filter(|budget| away > *budget) {
        Some(budget) => Err(ExecError::TierFull { needed: away, budget }),
        None => Ok(budget),
    }
}

/// Tokens of the longest sequence, its answer included.
pub(crate) fn longest_sequence(program: &Program) -> Tokens {
    let groups = &program.header.load.groups;
    groups.iter().map(|g| g.isl + g.osl).max().unwrap_or(0)
}

/// The sequences before the first step.
pub(crate) fn sequences(
    program: &Program,
    prompts: &[Vec<u32>],
    options: &RunOptions,
) -> Vec<SequenceState> {
    let groups = &program.header.load.groups;
    let osl = groups.iter().map(|g| g.osl as usize).max().unwrap_or(0);
    let of = |(i, prompt): (usize, &Vec<u32>)| SequenceState {
        prompt: prompt.clone(),
        seen: 0,
        step: 0,
        forced: options.forced.get(i).cloned().unwrap_or_default(),
        generated: Vec::with_capacity(osl),
        refreshed: Vec::new(),
        guesses: Vec::new(),
        forwarded: Vec::new(),
        gaps: Vec::with_capacity(osl),
        sampler: Sampler::new(options.sampling, i),
        prompt_logits: None,
    };
    prompts.iter().enumerate().map(of).collect()
}

/// The networks that a program needs, if it keeps states of what is dropped.
pub(crate) fn state_maps(
    model: &Model,
    synthetic: bool,
    program: &Program,
) -> Result<Option<StateMaps>, ExecError> {
    let mut state = None;
    program.visit_passes(|_, pass, _| {
        let mut ops = pass.layers.iter().flat_map(|block| &block.ops);
        state = state.or_else(|| ops.find_map(|op| op.cache_heads()?.form.state));
    });
    let Some(state) = state else { return Ok(None) };
    match &program.header.maps {
        Some(path) => StateMaps::load(Path::new(path), model, state).map(Some),
        // Speed and memory are those of trained ones.
        None if synthetic => Ok(Some(StateMaps::untrained(model, state))),
        None => Err(ExecError::MissingStateMaps { model: model.name.clone() }),
    }
}

/// Layers behind which only some rows go on.
pub(crate) fn forwards(program: &Program) -> Vec<usize> {
    let mut found = Vec::new();
    program.visit_passes(|_, pass, _| {
        for block in &pass.layers {
            if block.ops.iter().any(|op| matches!(op.kind, OpKind::Forward { .. })) {
                found.extend(block.layers.map(|l| l.first as usize));
            }
        }
    });
    found
}

/// Tokens of the longest cache of a KV head.
pub(crate) fn longest_cache(program: &Program) -> Tokens {
    let mut longest = 0;
    program.visit_passes(|_, pass, _| {
        let ops = pass.layers.iter().flat_map(|block| &block.ops);
        for op in ops.filter(|op| matches!(op.kind, OpKind::Append { .. })) {
            let grown = |lane: &Lane| lane.length(pass.steps).tokens;
            longest = op.lanes.as_slice().iter().map(grown).fold(longest, Tokens::max);
        }
    });
    longest
}

pub(crate) fn layer_count(program: &Program) -> u32 {
    let mut layers = 0;
    program.visit_passes(|_, pass, _| layers = layers.max(pass.layer_count()));
    layers
}
