//! What a model makes of prompts on the way: the rows that attention works on, and the last hidden states. Policies are
//! prepared from these.

use std::sync::atomic::{AtomicBool, Ordering};

use batchmax_sim::op::{OpKind, Phase};
use batchmax_sim::program::Program;
use batchmax_sim::units::Layer;

use crate::clock::Clock;
use crate::engine::{Engine, RunOptions, check_prompts};
use crate::error::ExecError;

/// Rows of a step, sequence after sequence.
#[derive(Clone, Copy, Debug)]
pub enum Seen<'a> {
    /// Queries, keys and values of a layer, rotated: `[rows][qkv width]`. Keys and values of a layer that reads another's
    /// cache mean nothing.
    Qkv {
        /// The layer.
        layer: Layer,
        /// The rows.
        rows: &'a [f32],
    },
    /// Hidden states behind the last norm: `[rows][hidden]`.
    Hidden(&'a [f32]),
}

impl Engine {
    /// Reads `prompts` by `program` and shows what comes about; nothing is generated.
    ///
    /// # Errors
    /// As [`Engine::run`].
    pub fn observe(
        &self,
        program: &Program,
        prompts: &[Vec<u32>],
        stop: &AtomicBool,
        see: &mut dyn FnMut(Seen<'_>),
    ) -> Result<(), ExecError> {
        let options = RunOptions::default();
        check_prompts(&self.model, program, prompts, &options)?;
        let mut interpreter = self.interpreter(program, prompts, &options, stop)?;
        let mut clock = Clock::new(program, false);
        program.visit_steps(|view| {
            if stop.load(Ordering::Relaxed) {
                return Err(ExecError::Interrupted);
            }
            if view.pass.phase == Phase::Decode {
                return Ok(());
            }
            interpreter.step_seen(&view, &mut clock, &mut |slots, op, layer| {
                if let (OpKind::Attend { .. }, Some(layer)) = (op.kind, layer) {
                    see(Seen::Qkv { layer, rows: slots.qkv_rows() });
                }
            })?;
            see(Seen::Hidden(&interpreter.last_states()));
            Ok(())
        })
    }
}
