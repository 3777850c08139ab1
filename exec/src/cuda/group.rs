//! Several devices that share each layer: the same program on each over its own heads, with sums between them.
//!
//! A thread per device replays the program; they meet in its sums only. All of them have the whole embedding and head and
//! the same bits in front of it, so each knows the next tokens by itself.

use std::panic::resume_unwind;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};

use batchmax_kernels::cuda::Driver;
use batchmax_sim::op::{DType, OpKind, Score};
use batchmax_sim::profile::Model;
use batchmax_sim::program::Program;
use batchmax_sim::units::Tokens;

use super::engine::{CudaEngine, Watch};
use crate::clock::Clock;
use crate::engine::{Chosen, Run, RunOptions, RunResult};
use crate::error::ExecError;
use crate::executor::Executor;
use crate::weights::{Rank, Weights};

/// A model and its weights on several devices.
pub struct CudaGroup<'d> {
    /// One device's part of the model.
    part: Model,
    /// KV heads of the whole model.
    kv_heads: u32,
    first: CudaEngine<'d>,
    others: Vec<CudaEngine<'d>>,
}

/// A device at work: however that ends, unless it is done, the others are told not to wait for it.
struct Working<'e, 'd> {
    engine: &'e mut CudaEngine<'d>,
    done: bool,
}

impl Drop for Working<'_, '_> {
    fn drop(&mut self) {
        if !self.done {
            self.engine.leave();
        }
    }
}

/// Lets a device work; `None` where that failed, and why in `failed`, if it is the first.
fn worked<'d, T>(
    engine: &mut CudaEngine<'d>,
    failed: &Mutex<Option<ExecError>>,
    work: impl FnOnce(&mut CudaEngine<'d>) -> Result<T, ExecError>,
) -> Option<T> {
    let mut working = Working { engine, done: false };
    match work(working.engine) {
        Ok(done) => {
            working.done = true;
            Some(done)
        }
        Err(why) => {
            failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
            None
        }
    }
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
        let mut others = engines.collect::<Result<Vec<_>, ExecError>>()?;
        if others.is_empty() {
            return Err(ExecError::NotShared("no devices to share layers".to_owned()));
        }
        let first = others.remove(0);
        Ok(Self { part, kv_heads: model.kv_heads, first, others })
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
        self.run_together(&Run { program, prompts, options, stop }, progress, Some(watch))
    }

    /// The first device's result, with the heads of all.
    fn run_together(
        &mut self,
        run: &Run<'_>,
        progress: &mut dyn FnMut(u64, u64),
        watch: Option<Watch<'_>>,
    ) -> Result<RunResult, ExecError> {
        let (mut joined, others) = self.together(
            run.program,
            |first| first.run_in_memory(run, progress, watch),
            |other| other.run_in_memory(run, &mut |_, _| {}, None),
        )?;
        // Neighbours have the same head where there are fewer than devices.
        let repeated = ((self.others.len() + 1) / self.kv_heads as usize).max(1);
        for (result, rank) in others.into_iter().zip(1..) {
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

    /// Lets the first device work in this thread and the others in threads of their own; what came of each. One that fails
    /// holds up none, and the first error counts.
    fn together<T: Send>(
        &mut self,
        program: &Program,
        first: impl FnOnce(&mut CudaEngine<'d>) -> Result<T, ExecError>,
        other: impl Fn(&mut CudaEngine<'d>) -> Result<T, ExecError> + Sync,
    ) -> Result<(T, Vec<T>), ExecError> {
        self.check(program)?;
        let failed = Mutex::new(None);
        let done: Option<(T, Vec<T>)> = std::thread::scope(|scope| {
            let (other, failed) = (&other, &failed);
            let others = self.others.iter_mut();
            let threads: Vec<_> =
                others.map(|engine| scope.spawn(move || worked(engine, failed, other))).collect();
            let one = worked(&mut self.first, failed, first);
            let joined = threads.into_iter().map(|t| t.join().unwrap_or_else(|p| resume_unwind(p)));
            let rest: Option<Vec<T>> = joined.collect::<Vec<_>>().into_iter().collect();
            one.zip(rest)
        });
        let why = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.ok_or_else(|| why.unwrap_or(ExecError::DevicesDisagree))
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
                over_heads |= matches!(
                    op.kind,
                    OpKind::Forward { .. }
                        | OpKind::Compare { .. }
                        | OpKind::Rank { by: Score::LastAttention, .. }
                );
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
}

impl Executor for CudaGroup<'_> {
    fn model(&self) -> &Model {
        &self.part
    }

    fn synthetic(&self) -> bool {
        self.first.synthetic()
    }

    fn run(
        &mut self,
        program: &Program,
        prompts: &[Vec<u32>],
        options: &RunOptions,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<RunResult, ExecError> {
        self.run_together(&Run { program, prompts, options, stop }, progress, None)
    }

    fn probe(&mut self, program: &Program, resident: Tokens) -> Result<Clock, ExecError> {
        let probe = |engine: &mut CudaEngine<'_>| engine.probe(program, resident);
        Ok(self.together(program, probe, probe)?.0)
    }

    fn probe_cold(
        &mut self,
        program: &Program,
        resident: Tokens,
    ) -> Result<Option<Clock>, ExecError> {
        let probe = |engine: &mut CudaEngine<'_>| engine.probe_cold(program, resident);
        Ok(self.together(program, probe, probe)?.0)
    }
}
