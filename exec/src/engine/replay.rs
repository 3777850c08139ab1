//! A program replayed step by step, whatever runs the ops: each step is held against the predicted memory.

use std::sync::atomic::{AtomicBool, Ordering};

use batchmax_sim::memory::{kv_shortfall, kv_spread, kv_trace};
use batchmax_sim::op::Phase;
use batchmax_sim::program::{Program, StepView};
use batchmax_sim::units::{Bytes, Tokens};

use super::outcome::{Kept, finish, note_kept};
use super::{Chosen, RunOptions, RunResult};
use crate::clock::Clock;
use crate::error::ExecError;
use crate::interpreter::SequenceState;
use crate::machine;
use crate::sampling::Sampler;
use crate::tier::TierUse;

/// What runs the ops of a step and holds the caches.
pub(crate) trait Replay {
    /// Runs a step and times its ops.
    fn step(&mut self, view: &StepView<'_>, clock: &mut Clock) -> Result<(), ExecError>;
    /// The sequences.
    fn sequences(&mut self) -> &mut Vec<SequenceState>;
    /// Lets the sequence `to` go on from where `from` is.
    fn copy_sequence(&mut self, from: usize, to: usize) -> Result<(), ExecError>;
    /// Bytes that caches hold.
    fn held(&self) -> Bytes;
    /// Most bytes that they held since the start or the last reset.
    fn peak(&self) -> Bytes;
    /// Starts the peak anew.
    fn reset_peak(&mut self);
    /// Positions that a sequence has kept.
    fn kept(&mut self, sequence: usize) -> Result<Kept, ExecError>;
    /// Shows the logits of the tokens that the last step chose.
    fn show(&self, watch: &mut dyn FnMut(Chosen<'_>));
    /// Takes the buffers of another program; caches stay.
    fn take_buffers(&mut self, program: &Program) -> Result<(), ExecError>;
    /// What slower memory was used for.
    fn tier(&self) -> TierUse;
}

/// Replays a program over caches that `resident` tokens per sequence were put into: one point of a profile.
pub(crate) fn probe(
    replay: &mut dyn Replay,
    program: &Program,
    resident: Tokens,
) -> Result<Clock, ExecError> {
    for sequence in replay.sequences() {
        sequence.seen = resident;
        sequence.generated.push(1);
    }
    let mut clock = Clock::new(program, true);
    program.visit_steps(|view| replay.step(&view, &mut clock))?;
    Ok(clock)
}

/// A run before it starts.
#[derive(Clone, Copy)]
pub(crate) struct Run<'a> {
    /// What is replayed.
    pub(crate) program: &'a Program,
    /// Over which prompts.
    pub(crate) prompts: &'a [Vec<u32>],
    /// How.
    pub(crate) options: &'a RunOptions,
    /// Ends it early.
    pub(crate) stop: &'a AtomicBool,
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

impl Run<'_> {
    /// Replays the program, its prefix first if it has one.
    pub(crate) fn replay(
        &self,
        replay: &mut dyn Replay,
        progress: &mut dyn FnMut(u64, u64),
        watch: &mut dyn FnMut(Chosen<'_>),
    ) -> Result<RunResult, ExecError> {
        let Self { program, prompts, options, .. } = *self;
        let trace = kv_trace(program);
        let (spread, shortfall) = (kv_spread(program), kv_shortfall(program));
        if let Some(prefix) = &options.prefix {
            self.read_prefix(replay, prefix)?;
            replay.take_buffers(program)?;
            replay.reset_peak();
        }
        let mut clock = Clock::new(program, options.keep_samples);
        let (total, _) = program.steps();
        let (mut done, mut phase) = (0usize, Phase::Prefill);
        let mut peaks = [Bytes(0); 2];
        let mut kept: Vec<Option<Kept>> = vec![None; prompts.len()];
        let mut after_prefill = None;
        let ended = program.visit_steps(|view| {
            self.go_on()?;
            let read_before = options.read_once.is_some_and(|n| view.shift >= n);
            if view.pass.phase == Phase::Prefill && read_before {
                // Its prompts have been read.
                done += 1;
                return Ok(());
            }
            if view.pass.phase != phase {
                if let Some(n) = options.read_once {
                    for to in n as usize..prompts.len() {
                        replay.copy_sequence(to % n as usize, to)?;
                    }
                }
                note_kept(replay, options, &mut kept)?;
                if view.pass.phase == Phase::Decode {
                    after_prefill = Some(replay.held());
                }
                phase = view.pass.phase;
                replay.reset_peak();
            }
            replay.step(&view, &mut clock)?;
            replay.show(watch);
            let held = replay.held();
            peaks[phase as usize] = peaks[phase as usize].max(replay.peak());
            if held > trace[done] + spread || held + shortfall < trace[done] {
                let (step, predicted) = (done, trace[done]);
                return Err(Ended::Error(ExecError::KvMismatch { step, held, predicted }));
            }
            done += 1;
            progress(done as u64, total);
            let finished =
                |s: &SequenceState| s.generated.iter().any(|t| options.stop_tokens.contains(t));
            if !options.stop_tokens.is_empty() && replay.sequences().iter().all(finished) {
                return Err(Ended::Early);
            }
            Ok(())
        });
        match ended {
            Ok(()) | Err(Ended::Early) => {}
            Err(Ended::Error(error)) => return Err(error),
        }
        note_kept(replay, options, &mut kept)?;
        let kv_after_prefill = after_prefill.unwrap_or_else(|| replay.held());
        let sequences = std::mem::take(replay.sequences());
        Ok(RunResult {
            sequences: finish(sequences, kept, &options.stop_tokens),
            prefill: clock.phase(Phase::Prefill),
            decode: clock.phase(Phase::Decode),
            timeline: clock.timeline(program),
            kv_prefill_peak: peaks[0],
            kv_after_prefill,
            kv_decode_peak: peaks[1],
            tier: replay.tier(),
            peak_rss: machine::peak_rss(),
            clock,
        })
    }

    /// An error if the caller wants the run to end.
    pub(crate) fn go_on(&self) -> Result<(), ExecError> {
        if self.stop.load(Ordering::Relaxed) { Err(ExecError::Interrupted) } else { Ok(()) }
    }

    /// Fills the caches with the prefixes and forgets what else came of reading them; nobody times it.
    fn read_prefix(&self, replay: &mut dyn Replay, prefix: &Program) -> Result<(), ExecError> {
        replay.take_buffers(prefix)?;
        let mut clock = Clock::new(prefix, false);
        prefix.visit_steps(|view| {
            self.go_on()?;
            replay.step(&view, &mut clock)
        })?;
        for (i, sequence) in replay.sequences().iter_mut().enumerate() {
            sequence.generated.clear();
            sequence.gaps.clear();
            sequence.guesses.clear();
            sequence.prompt_logits = None;
            sequence.sampler = Sampler::new(self.options.sampling, i);
        }
        Ok(())
    }
}
