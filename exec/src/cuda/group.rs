//! Several devices that share each layer: the same program on each over its own heads, with sums between them.
//!
//! A thread per device replays the program; they meet in its sums only. All of them have the whole embedding and head and
//! the same bits in front of it, so each knows the next tokens by itself.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};

use batchmax_kernels::cuda::Driver;
use batchmax_sim::op::{DType, OpKind};
use batchmax_sim::profile::Model;
use batchmax_sim::program::Program;
use batchmax_sim::units::Tokens;

use super::engine::CudaEngine;
use crate::clock::Clock;
use crate::engine::{Chosen, RunOptions, RunResult};
use crate::error::ExecError;
use crate::executor::Executor;
use crate::weights::{Rank, Weights};

/// A model and its weights on several devices.
pub struct CudaGroup<'d> {
    /// One device's part of the model.
    part: Model,
    /// KV heads of the whole model.
    kv_heads: u32,
    engines: Vec<CudaEngine<'d>>,
}

impl<'d> CudaGroup<'d> {
    /// Uploads each device's part of the weights. The drivers are those of devices that were opened together, in their order;
    /// `model` and `weights` are whole.
    ///
    /// # Errors
    /// When the devices can't share the model; as [`CudaEngine::new`].
    pub fn new(
        drivers: impl IntoIterator<Item = &'d mut dyn Driver>,
        model: &Model,
        weights: &Weights,
        activations: DType,
    ) -> Result<Self, ExecError> {
        let drivers: Vec<_> = drivers.into_iter().collect();
        let of = drivers.len().max(1) as u32;
        let part = model.shard_layers(of).map_err(ExecError::NotShared)?;
        let engines = drivers.into_iter().zip(0..).map(|(driver, index)| {
            let weights = weights.part(model, Rank { index, of })?;
            CudaEngine::new(driver, part.clone(), weights, activations)
        });
        let engines = engines.collect::<Result<_, ExecError>>()?;
        Ok(Self { part, kv_heads: model.kv_heads, engines })
    }

    /// [`Executor::run`], and `watch` sees the logits of every token that is chosen or forced.
    ///
    /// # Errors
    /// As [`Executor::run`].
    pub fn run_watched(
        &mut self,
        program: &Program,
        prompts: &[Vec<u32>],
        options: &RunOptions,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(u64, u64),
        watch: &mut dyn FnMut(Chosen<'_>),
    ) -> Result<RunResult, ExecError> {
        let results = self.together(
            program,
            |first| first.run_watched(program, prompts, options, stop, progress, watch),
            |other| other.run(program, prompts, options, stop, &mut |_, _| {}),
        )?;
        self.joined(results)
    }

    /// Lets the first device work in this thread and the others in threads of their own. One that fails leaves, so that
    /// none waits for it; the first error counts.
    fn together<T: Send>(
        &mut self,
        program: &Program,
        first: impl FnOnce(&mut CudaEngine<'d>) -> Result<T, ExecError>,
        other: impl Fn(&mut CudaEngine<'d>) -> Result<T, ExecError> + Sync,
    ) -> Result<Vec<T>, ExecError> {
        self.check(program)?;
        let failed = Mutex::new(None);
        let guarded = |engine: &mut CudaEngine<'d>, went: std::thread::Result<_>| match went {
            Ok(Ok(done)) => Some(done),
            Ok(Err(why)) => {
                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
                engine.leave();
                None
            }
            Err(panic) => {
                engine.leave();
                resume_unwind(panic)
            }
        };
        let Some((one, others)) = self.engines.split_first_mut() else { return Ok(Vec::new()) };
        let done: Vec<Option<T>> = std::thread::scope(|scope| {
            let (other, guarded) = (&other, &guarded);
            let threads: Vec<_> = (others.iter_mut())
                .map(|engine| {
                    scope.spawn(move || {
                        let went = catch_unwind(AssertUnwindSafe(|| other(engine)));
                        guarded(engine, went)
                    })
                })
                .collect();
            let went = catch_unwind(AssertUnwindSafe(|| first(one)));
            let mut done = vec![guarded(one, went)];
            let joined = threads.into_iter().map(|t| t.join().unwrap_or_else(|p| resume_unwind(p)));
            done.extend(joined);
            done
        });
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(why) => Err(why),
            None => Ok(done.into_iter().flatten().collect()),
        }
    }

    /// Refuses programs of one device, and what a device would decide that it can't know: what is chosen over all heads of a
    /// layer. What heads share of a budget they share with the heads of their device.
    fn check(&self, program: &Program) -> Result<(), ExecError> {
        let header = &program.header;
        let mut sums = false;
        let mut over_heads = !header.chunks.is_empty() || !header.short_heads.is_empty();
        program.visit_passes(|_, pass, _| {
            for op in pass.blocks().flat_map(|(_, block)| &block.ops) {
                sums |= matches!(op.kind, OpKind::AllReduce { .. });
                over_heads |= matches!(op.kind, OpKind::Forward { .. } | OpKind::Compare { .. });
            }
        });
        let part = if !sums {
            "a program of one device on several"
        } else if over_heads {
            "a policy that chooses over all heads of a layer on several devices"
        } else if header.maps.is_some() {
            "trained networks of all heads on several devices"
        } else {
            return Ok(());
        };
        Err(ExecError::NotExecutable { model: self.part.name.clone(), part: part.to_owned() })
    }

    /// The first device's result, with the heads of all.
    fn joined(&self, results: Vec<RunResult>) -> Result<RunResult, ExecError> {
        let mut results = results.into_iter();
        let Some(mut joined) = results.next() else { return Err(ExecError::DevicesDisagree) };
        // Neighbours have the same head where there are fewer than devices.
        let repeated = (self.engines.len() as u32 / self.kv_heads).max(1) as usize;
        for (result, rank) in results.zip(1..) {
            joined.peak_rss = joined.peak_rss.max(result.peak_rss);
            for (own, other) in joined.sequences.iter_mut().zip(result.sequences) {
                if own.generated != other.generated {
                    return Err(ExecError::DevicesDisagree);
                }
                if let (Some(own), Some(other), 0) = (&mut own.kept, other.kept, rank % repeated) {
                    own.iter_mut().zip(other).for_each(|(own, other)| own.extend(other));
                }
            }
        }
        Ok(joined)
    }
}

impl Executor for CudaGroup<'_> {
    fn model(&self) -> &Model {
        &self.part
    }

    fn synthetic(&self) -> bool {
        self.engines.iter().any(CudaEngine::synthetic)
    }

    fn run(
        &mut self,
        program: &Program,
        prompts: &[Vec<u32>],
        options: &RunOptions,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<RunResult, ExecError> {
        let results = self.together(
            program,
            |first| first.run(program, prompts, options, stop, progress),
            |other| other.run(program, prompts, options, stop, &mut |_, _| {}),
        )?;
        self.joined(results)
    }

    fn probe(&mut self, program: &Program, resident: Tokens) -> Result<Clock, ExecError> {
        let probe = |engine: &mut CudaEngine<'_>| engine.probe(program, resident);
        let clocks = self.together(program, probe, probe)?;
        clocks.into_iter().next().ok_or(ExecError::DevicesDisagree)
    }

    fn probe_cold(
        &mut self,
        program: &Program,
        resident: Tokens,
    ) -> Result<Option<Clock>, ExecError> {
        let probe = |engine: &mut CudaEngine<'_>| engine.probe_cold(program, resident);
        let clocks = self.together(program, probe, probe)?;
        Ok(clocks.into_iter().next().flatten())
    }
}
