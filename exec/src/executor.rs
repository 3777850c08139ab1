//! Whatever runs programs: this machine's CPU, or a device of it.

use std::sync::atomic::AtomicBool;

use batchmax_sim::profile::Model;
use batchmax_sim::program::Program;
use batchmax_sim::units::Tokens;

use crate::clock::Clock;
use crate::engine::{Engine, RunOptions, RunResult};
use crate::error::ExecError;

/// A model with its weights where it runs.
pub trait Executor {
    /// The model.
    fn model(&self) -> &Model;

    /// Whether its weights are made up.
    fn synthetic(&self) -> bool;

    /// Replays `program` over `prompts`. `progress` sees (steps done, steps in all); `stop` ends the run early.
    ///
    /// # Errors
    /// If the program does not fit the prompts or the memory, or the device fails.
    fn run(
        &mut self,
        program: &Program,
        prompts: &[Vec<u32>],
        options: &RunOptions,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<RunResult, ExecError>;

    /// Replays a program whose caches already hold `resident` tokens per sequence: one point of a profile.
    ///
    /// # Errors
    /// As [`Self::run`].
    fn probe(&mut self, program: &Program, resident: Tokens) -> Result<Clock, ExecError>;

    /// The same where each op finds the device's cache full of something else; `None` where that is not to be had.
    ///
    /// # Errors
    /// As [`Self::run`].
    fn probe_cold(
        &mut self,
        _program: &Program,
        _resident: Tokens,
    ) -> Result<Option<Clock>, ExecError> {
        Ok(None)
    }
}

impl Executor for Engine {
    fn model(&self) -> &Model {
        &self.model
    }

    fn synthetic(&self) -> bool {
        self.weights.synthetic
    }

    fn run(
        &mut self,
        program: &Program,
        prompts: &[Vec<u32>],
        options: &RunOptions,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<RunResult, ExecError> {
        Engine::run(self, program, prompts, options, stop, progress)
    }

    fn probe(&mut self, program: &Program, resident: Tokens) -> Result<Clock, ExecError> {
        Engine::probe(self, program, resident)
    }
}
