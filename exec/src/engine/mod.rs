//! Runs programs: checks them against the budget, replays them step by step, holds every step against the predicted
//! memory, and reports what was measured.

mod checks;
mod outcome;
mod replay;

use std::sync::atomic::AtomicBool;

use batchmax_kernels::threads::Threads;
use batchmax_sim::load::{Group, Load, Schedule};
use batchmax_sim::memory::Buffers;
use batchmax_sim::op::DType;
use batchmax_sim::profile::Model;
use batchmax_sim::program::{Program, StepView};
use batchmax_sim::timeline::Timeline;
use batchmax_sim::units::{Bytes, Layer, Seconds, Tokens};

use crate::clock::Clock;
use crate::error::ExecError;
use crate::interpreter::{Interpreter, SequenceState, Slots};
use crate::kv_store::{KvStore, kv_format};
use crate::sampling::Sampling;
use crate::tier::{Tier, TierPlace, TierUse};
use crate::weights::Weights;
pub(crate) use checks::{
    check_prompts, forwards, kv_budget, kv_needed, layer_count, longest_cache, longest_sequence,
    sequences, state_maps,
};
pub(crate) use outcome::Kept;
pub(crate) use replay::{Replay, Run, probe};

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
    /// Largest resident size of the process; on a device its memory in use at the end of the run, everybody's.
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
        let run = Run { program, prompts, options, stop };
        run.check(&self.model)?;
        let mut interpreter = self.interpreter(program, prompts, options, stop)?;
        run.replay(&mut interpreter, progress, watch)
    }

    /// Replays a program whose caches already hold `resident` tokens per sequence: one point of a profile.
    pub fn probe(&self, program: &Program, resident: Tokens) -> Result<Clock, ExecError> {
        let (prompts, options) = probed(program);
        let mut interpreter =
            self.interpreter(program, &prompts, &options, &AtomicBool::new(false))?;
        let layers = layer_count(program);
        interpreter.kv.fill(layers, resident)?;
        probe(&mut interpreter, program, resident)
    }

    pub(crate) fn interpreter(
        &self,
        program: &Program,
        prompts: &[Vec<u32>],
        options: &RunOptions,
        stop: &AtomicBool,
    ) -> Result<Interpreter<'_>, ExecError> {
        let model = &self.model;
        if self.weights.narrow {
            let part = "weights in fp8 on a CPU".to_owned();
            return Err(ExecError::NotExecutable { model: model.name.clone(), part });
        }
        let budget = kv_budget(program, options)?;
        let format = kv_format(program.header.kv.dtype)
            .ok_or_else(|| no_such_cache(model, program.header.kv.dtype, "f32, f16 and bf16"))?;
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
        self.weights.rope.prepare(longest_sequence(program));
        Ok(Interpreter {
            model,
            weights: &self.weights,
            threads: &self.threads,
            kv,
            slots: Slots::new(model, &Buffers::of(program)),
            sequences: sequences(program, prompts, options),
            keep_prompt_logits: options.keep_details,
            cache_of: program.header.cache_of.clone(),
            short_heads: program.header.short_heads.clone(),
            maps: state_maps(model, self.weights.synthetic, program)?,
            forwards: forwards(program),
            chunks: self.chunk_store(program, prompts, stop)?,
            chunk: 1,
            tier_place: options.tier_place.clone(),
            tier: None,
        })
    }
}

/// What a probe replays its program over, and how: nothing limits its caches.
pub(crate) fn probed(program: &Program) -> (Vec<Vec<u32>>, RunOptions) {
    let groups = program.header.load.groups.iter();
    let prompts =
        groups.flat_map(|g| std::iter::repeat_n(vec![1; g.isl as usize], g.sequences as usize));
    let options = RunOptions { kv_budget: Some(Bytes(u64::MAX)), ..RunOptions::default() };
    (prompts.collect(), options)
}

/// The error of a type that caches can't have.
pub(crate) fn no_such_cache(model: &Model, dtype: DType, there_are: &str) -> ExecError {
    let part = format!("a cache in {dtype} (it has {there_are})");
    ExecError::NotExecutable { model: model.name.clone(), part }
}

impl Replay for Interpreter<'_> {
    fn step(&mut self, view: &StepView<'_>, clock: &mut Clock) -> Result<(), ExecError> {
        Interpreter::step(self, view, clock)
    }

    fn sequences(&mut self) -> &mut Vec<SequenceState> {
        &mut self.sequences
    }

    fn copy_sequence(&mut self, from: usize, to: usize) -> Result<(), ExecError> {
        Interpreter::copy_sequence(self, from, to)
    }

    fn held(&self) -> Bytes {
        self.kv.held()
    }

    fn peak(&self) -> Bytes {
        Bytes(self.kv.pool.peak_bytes())
    }

    fn reset_peak(&mut self) {
        self.kv.pool.reset_peak();
    }

    fn kept(&mut self, sequence: usize) -> Result<Kept, ExecError> {
        Ok(self.kv.kept(sequence))
    }

    fn show(&self, watch: &mut dyn FnMut(Chosen<'_>)) {
        for (sequence, index, logits) in self.chosen() {
            watch(Chosen { sequence, index, logits });
        }
    }

    fn take_buffers(&mut self, program: &Program) -> Result<(), ExecError> {
        self.slots = Slots::new(self.model, &Buffers::of(program));
        Ok(())
    }

    fn tier(&self) -> TierUse {
        self.tier.as_ref().map(Tier::used).unwrap_or_default()
    }
}
