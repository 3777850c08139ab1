//! Runs programs: checks them against the budget, replays them step by step, holds every step against the predicted
//! memory, and reports what was measured.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use batchmax_kernels::threads::Threads;
use batchmax_sim::load::{Group, Load, Schedule};
use batchmax_sim::memory::{Buffers, kv_peaks, kv_shortfall, kv_spread, kv_trace, offloaded};
use batchmax_sim::op::{Lane, OpKind, Phase};
use batchmax_sim::profile::Model;
use batchmax_sim::program::Program;
use batchmax_sim::timeline::Timeline;
use batchmax_sim::units::{Bytes, Layer, Seconds, Tokens};

use crate::clock::Clock;
use crate::error::ExecError;
use crate::interpreter::{Interpreter, SequenceState, Slots};
use crate::kv_store::{KvStore, kv_format};
use crate::machine;
use crate::sampling::{Sampler, Sampling};
use crate::state_maps::StateMaps;
use crate::tier::{Tier, TierPlace, TierUse};
use crate::weights::Weights;

/// A model, its weights and the threads that run it.
pub struct Engine {
    /// The model.
    pub model: Model,
    /// Its weights.
    pub weights: Weights,
    /// The threads.
    pub threads: Threads,
}

/// How to run.
#[derive(Clone, Debug, Default)]
pub struct RunOptions {
    /// Hard limit of the caches; `None`: the predicted peak, to the byte.
    pub kv_budget: Option<Bytes>,
    /// Hard limit of slower memory, for tokens that are offloaded; `None`: none.
    pub tier_budget: Option<Bytes>,
    /// Where those tokens go.
    pub tier_place: TierPlace,
    /// The choice of tokens.
    pub sampling: Sampling,
    /// Tokens that end an answer; empty: answers have the length that was asked for.
    pub stop_tokens: Vec<u32>,
    /// Per sequence, tokens that take the place of the first ones that would be chosen (teacher forcing); positions and
    /// caches see them as if they had been. Empty: none.
    pub forced: Vec<Vec<u32>>,
    /// Prompts come again: sequence `i` has the prompt of sequence `i % n`, and only the first `n` are read, the others
    /// take over copies of what that left. Needs a staggered program that reads `n` prompts at once.
    pub read_once: Option<u32>,
    /// Keep logits and positions for a dump.
    pub keep_details: bool,
    /// Keep every launch's time.
    pub keep_samples: bool,
    /// What reads the cached prefixes before the clock starts (`batchmax_sim::lower::lower_prefix`); a program whose
    /// prompts are partly cached needs it.
    pub prefix: Option<Program>,
}

/// One sequence's outcome.
#[derive(Clone, Debug)]
pub struct SequenceResult {
    /// Generated tokens, the stop token left out.
    pub generated: Vec<u32>,
    /// Gap between the two best logits at each.
    pub gaps: Vec<f32>,
    /// Logits at the last prompt position, if details were kept.
    pub prompt_logits: Option<Vec<f32>>,
    /// Guesses at its tokens from the second on, where steps speculate.
    pub guesses: Vec<u32>,
    /// Positions of the prompt's rows that went on to the upper layers, where not all did.
    pub forwarded: Vec<Tokens>,
    /// Decode steps, from 1, and layers in which its partial cache was filled anew, in the order in which it happened.
    pub refreshed: Vec<(u32, Layer)>,
    /// Positions kept per layer and KV head after the prefill, if details were kept.
    pub kept: Option<Vec<Vec<Vec<Tokens>>>>,
}

/// A token that was chosen or forced.
#[derive(Clone, Copy, Debug)]
pub struct Chosen<'a> {
    /// Index of its sequence among the prompts.
    pub sequence: usize,
    /// Its index among the sequence's generated tokens.
    pub index: usize,
    /// Logits `[vocab]` from which it was chosen, or would have been.
    pub logits: &'a [f32],
}

/// What a run measured.
#[derive(Debug)]
pub struct RunResult {
    /// Per sequence, in the order of the prompts.
    pub sequences: Vec<SequenceResult>,
    /// Wall time of the prefill steps.
    pub prefill: Seconds,
    /// Wall time of the decode steps.
    pub decode: Seconds,
    /// Op by op.
    pub timeline: Timeline,
    /// Largest cache during the prefill, by the pool's own count.
    pub kv_prefill_peak: Bytes,
    /// The caches when the last prompt was read.
    pub kv_after_prefill: Bytes,
    /// Largest cache during the decode.
    pub kv_decode_peak: Bytes,
    /// What went to slower memory and back.
    pub tier: TierUse,
    /// Largest resident size of the process.
    pub peak_rss: Bytes,
    /// The clock, with samples where they were kept.
    pub clock: Clock,
}

/// The load of prompts of these lengths, each answered with `osl` tokens; neighbours of equal length form a group.
#[must_use]
pub fn load_of(prompts: &[Vec<u32>], osl: Tokens, schedule: Schedule) -> Load {
    let mut groups: Vec<Group> = Vec::new();
    for prompt in prompts {
        let isl = prompt.len() as Tokens;
        match groups.last_mut() {
            Some(group) if group.isl == isl => group.sequences += 1,
            _ => groups.push(Group { sequences: 1, isl, osl, hit: 0 }),
        }
    }
    Load::new(groups, schedule)
}

impl Engine {
    /// With `threads` threads.
    #[must_use]
    pub fn new(model: Model, weights: Weights, threads: usize) -> Self {
        Self { model, weights, threads: Threads::new(threads) }
    }

    /// Replays `program` over `prompts`. `progress` sees (steps done, steps in all); `stop` ends the run early.
    pub fn run(
        &self,
        program: &Program,
        prompts: &[Vec<u32>],
        options: &RunOptions,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<RunResult, ExecError> {
        self.run_watched(program, prompts, options, stop, progress, &mut |_| {})
    }

    /// The same, and `watch` sees the logits of every token that is chosen or forced, in the order in which they come.
    pub fn run_watched(
        &self,
        program: &Program,
        prompts: &[Vec<u32>],
        options: &RunOptions,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(u64, u64),
        watch: &mut dyn FnMut(Chosen<'_>),
    ) -> Result<RunResult, ExecError> {
        self.check(program, prompts, options)?;
        self.check_forced(program, prompts, options)?;
        check_read_once(program, prompts, options)?;
        let trace = kv_trace(program);
        let (spread, shortfall) = (kv_spread(program), kv_shortfall(program));
        let mut interpreter = self.interpreter(program, prompts, options, stop)?;
        if let Some(prefix) = &options.prefix {
            self.read_prefix(&mut interpreter, prefix, options, stop)?;
            interpreter.slots = Slots::new(&self.model, &Buffers::of(program));
            interpreter.kv.pool.reset_peak();
        }
        let mut clock = Clock::new(program, options.keep_samples);
        let (total, _) = program.steps();
        let (mut done, mut phase) = (0usize, Phase::Prefill);
        let mut peaks = [Bytes(0); 2];
        let mut kept: Vec<Option<Kept>> = vec![None; prompts.len()];
        let mut after_prefill = None;
        let ended = program.visit_steps(|view| {
            if stop.load(Ordering::Relaxed) {
                return Err(Ended::Error(ExecError::Interrupted));
            }
            if view.pass.phase == Phase::Prefill
                && options.read_once.is_some_and(|n| view.shift >= n)
            {
                // Its prompts have been read.
                done += 1;
                return Ok(());
            }
            if view.pass.phase != phase {
                if let Some(n) = options.read_once {
                    for to in n as usize..interpreter.sequences.len() {
                        interpreter.copy_sequence(to % n as usize, to)?;
                    }
                }
                note_kept(&interpreter, options, &mut kept);
                if view.pass.phase == Phase::Decode {
                    after_prefill = Some(interpreter.kv.held());
                }
                phase = view.pass.phase;
                interpreter.kv.pool.reset_peak();
            }
            interpreter.step(&view, &mut clock)?;
            for (sequence, index, logits) in interpreter.chosen() {
                watch(Chosen { sequence, index, logits });
            }
            let held = interpreter.kv.held();
            peaks[phase as usize] =
                peaks[phase as usize].max(Bytes(interpreter.kv.pool.peak_bytes()));
            if held > trace[done] + spread || held + shortfall < trace[done] {
                let (step, predicted) = (done, trace[done]);
                return Err(Ended::Error(ExecError::KvMismatch { step, held, predicted }));
            }
            done += 1;
            progress(done as u64, total);
            let finished =
                |s: &SequenceState| s.generated.iter().any(|t| options.stop_tokens.contains(t));
            if !options.stop_tokens.is_empty() && interpreter.sequences.iter().all(finished) {
                return Err(Ended::Early);
            }
            Ok(())
        });
        match ended {
            Ok(()) | Err(Ended::Early) => {}
            Err(Ended::Error(error)) => return Err(error),
        }
        note_kept(&interpreter, options, &mut kept);
        let kv_after_prefill = after_prefill.unwrap_or_else(|| interpreter.kv.held());
        let tier = interpreter.tier.as_ref().map(Tier::used).unwrap_or_default();
        let sequences = finish(interpreter.sequences, kept, &options.stop_tokens);
        Ok(RunResult {
            sequences,
            prefill: clock.phase(Phase::Prefill),
            decode: clock.phase(Phase::Decode),
            timeline: clock.timeline(program),
            kv_prefill_peak: peaks[0],
            kv_after_prefill,
            kv_decode_peak: peaks[1],
            tier,
            peak_rss: machine::peak_rss(),
            clock,
        })
    }

    /// Fills the caches with the prefixes and forgets what else came of reading them; nobody times it.
    fn read_prefix(
        &self,
        interpreter: &mut Interpreter<'_>,
        prefix: &Program,
        options: &RunOptions,
        stop: &AtomicBool,
    ) -> Result<(), ExecError> {
        interpreter.slots = Slots::new(&self.model, &Buffers::of(prefix));
        let mut clock = Clock::new(prefix, false);
        prefix.visit_steps(|view| {
            if stop.load(Ordering::Relaxed) {
                return Err(ExecError::Interrupted);
            }
            interpreter.step(&view, &mut clock)
        })?;
        for (i, sequence) in interpreter.sequences.iter_mut().enumerate() {
            sequence.generated.clear();
            sequence.gaps.clear();
            sequence.guesses.clear();
            sequence.prompt_logits = None;
            sequence.sampler = Sampler::new(options.sampling, i);
        }
        Ok(())
    }

    /// Replays a program whose caches already hold `resident` tokens per sequence: one point of a profile.
    pub fn probe(&self, program: &Program, resident: Tokens) -> Result<Clock, ExecError> {
        let prompts: Vec<Vec<u32>> = program
            .header
            .load
            .groups
            .iter()
            .flat_map(|g| std::iter::repeat_n(vec![1u32; g.isl as usize], g.sequences as usize))
            .collect();
        let options = RunOptions { kv_budget: Some(Bytes(u64::MAX)), ..RunOptions::default() };
        let mut interpreter =
            self.interpreter(program, &prompts, &options, &AtomicBool::new(false))?;
        let layers = layer_count(program);
        interpreter.kv.fill(layers, resident)?;
        for sequence in &mut interpreter.sequences {
            sequence.seen = resident;
            sequence.generated.push(1);
        }
        let mut clock = Clock::new(program, true);
        program.visit_steps(|view| interpreter.step(&view, &mut clock))?;
        Ok(clock)
    }

    pub(crate) fn check(
        &self,
        program: &Program,
        prompts: &[Vec<u32>],
        options: &RunOptions,
    ) -> Result<(), ExecError> {
        let load = &program.header.load;
        let expected: Vec<Tokens> = load
            .groups
            .iter()
            .flat_map(|g| std::iter::repeat_n(g.isl, g.sequences as usize))
            .collect();
        let got: Vec<Tokens> = prompts.iter().map(|p| p.len() as Tokens).collect();
        if expected != got {
            let describe = |lengths: &[Tokens]| {
                format!("{} of {} tokens in all", lengths.len(), lengths.iter().sum::<Tokens>())
            };
            return Err(ExecError::WrongPrompts {
                expected: describe(&expected),
                got: describe(&got),
            });
        }
        if load.groups.iter().any(|g| g.hit > 0) && options.prefix.is_none() {
            return Err(ExecError::MissingPrefix);
        }
        let vocab = self.model.vocab;
        match prompts.iter().flatten().find(|id| **id >= vocab) {
            Some(&id) => Err(ExecError::UnknownToken { id, vocab }),
            None => Ok(()),
        }
    }

    fn check_forced(
        &self,
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
        let vocab = self.model.vocab;
        match forced.iter().flatten().find(|id| **id >= vocab) {
            Some(&id) => Err(ExecError::UnknownToken { id, vocab }),
            None => Ok(()),
        }
    }

    pub(crate) fn interpreter(
        &self,
        program: &Program,
        prompts: &[Vec<u32>],
        options: &RunOptions,
        stop: &AtomicBool,
    ) -> Result<Interpreter<'_>, ExecError> {
        let needed = |program: &Program| {
            let peaks = kv_peaks(program);
            peaks.prefill.max(peaks.decode) + kv_spread(program)
        };
        let needed = needed(program).max(options.prefix.as_ref().map_or(Bytes(0), needed));
        let budget = options.kv_budget.unwrap_or(needed);
        if needed > budget {
            return Err(ExecError::OverBudget { needed, budget });
        }
        let away = offloaded(program).max(options.prefix.as_ref().map_or(Bytes(0), offloaded));
        if let Some(budget) = options.tier_budget.filter(|budget| away > *budget) {
            return Err(ExecError::TierFull { needed: away, budget });
        }
        let model = &self.model;
        let format =
            kv_format(program.header.kv.dtype).ok_or_else(|| ExecError::NotExecutable {
                model: model.name.clone(),
                part: format!("a cache in {} (it has f32, f16 and bf16)", program.header.kv.dtype),
            })?;
        let mut kv = KvStore::new(
            model.layers as usize,
            prompts.len(),
            model.kv_heads as usize,
            model.head_dim as usize,
            format,
            budget,
        );
        // Lists that grow with every token get their room now, not in the middle of a step.
        kv.expect_tokens(longest_cache(program));
        let groups = &program.header.load.groups;
        let most = groups.iter().map(|g| g.isl + g.osl).max().unwrap_or(0);
        self.weights.rope.prepare(most);
        let osl = groups.iter().map(|g| g.osl as usize).max().unwrap_or(0);
        let sequences = prompts
            .iter()
            .enumerate()
            .map(|(i, prompt)| SequenceState {
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
            })
            .collect();
        Ok(Interpreter {
            model,
            weights: &self.weights,
            threads: &self.threads,
            kv,
            slots: Slots::new(model, &Buffers::of(program)),
            sequences,
            keep_prompt_logits: options.keep_details,
            cache_of: program.header.cache_of.clone(),
            short_heads: program.header.short_heads.clone(),
            maps: self.state_maps(program)?,
            forwards: forwards(program),
            chunks: self.chunk_store(program, prompts, stop)?,
            chunk: 1,
            tier_place: options.tier_place.clone(),
            tier: None,
        })
    }

    /// The networks that a program needs, if it keeps states of what is dropped.
    fn state_maps(&self, program: &Program) -> Result<Option<StateMaps>, ExecError> {
        let mut state = None;
        program.visit_passes(|_, pass, _| {
            let mut ops = pass.layers.iter().flat_map(|block| &block.ops);
            state = state.or_else(|| ops.find_map(|op| op.cache_heads()?.form.state));
        });
        let Some(state) = state else { return Ok(None) };
        match &program.header.maps {
            Some(path) => StateMaps::load(Path::new(path), &self.model, state).map(Some),
            // Speed and memory are those of trained ones.
            None if self.weights.synthetic => Ok(Some(StateMaps::untrained(&self.model, state))),
            None => Err(ExecError::MissingStateMaps { model: self.model.name.clone() }),
        }
    }
}

type Kept = Vec<Vec<Vec<Tokens>>>;

/// Notes what is cached of prompts that have been read since the last time.
fn note_kept(interpreter: &Interpreter<'_>, options: &RunOptions, kept: &mut [Option<Kept>]) {
    if !options.keep_details {
        return;
    }
    for (index, (sequence, kept)) in interpreter.sequences.iter().zip(kept).enumerate() {
        if kept.is_none() && !sequence.generated.is_empty() {
            *kept = Some(interpreter.kv.kept(index));
        }
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

/// Why a walk over the steps ended before its end.
enum Ended {
    Early,
    Error(ExecError),
}

impl From<ExecError> for Ended {
    fn from(error: ExecError) -> Self {
        Self::Error(error)
    }
}

/// Layers behind which only some rows go on.
fn forwards(program: &Program) -> Vec<usize> {
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
fn longest_cache(program: &Program) -> Tokens {
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

fn layer_count(program: &Program) -> u32 {
    let mut layers = 0;
    program.visit_passes(|_, pass, _| layers = layers.max(pass.layer_count()));
    layers
}

fn finish(
    sequences: Vec<SequenceState>,
    kept: Vec<Option<Kept>>,
    stop_tokens: &[u32],
) -> Vec<SequenceResult> {
    sequences
        .into_iter()
        .zip(kept)
        .map(|(mut s, kept)| {
            if let Some(end) = s.generated.iter().position(|t| stop_tokens.contains(t)) {
                s.generated.truncate(end);
                s.gaps.truncate(end);
            }
            SequenceResult {
                generated: s.generated,
                gaps: s.gaps,
                prompt_logits: s.prompt_logits,
                refreshed: s.refreshed,
                guesses: s.guesses,
                forwarded: s.forwarded,
                kept,
            }
        })
        .collect()
}
