//! Whole runs on a device.

use std::sync::atomic::AtomicBool;

use batchmax_kernels::blend::StoredRows;
use batchmax_kernels::cuda::{DeviceInfo, Driver, Element};
use batchmax_kernels::kv::KvFormat;
use batchmax_kernels::rope::RopeTable;
use batchmax_sim::memory::Buffers;
use batchmax_sim::op::{Choice, DType, OpKind};
use batchmax_sim::profile::Model;
use batchmax_sim::program::{Program, StepView};
use batchmax_sim::units::{Bytes, Tokens};

use super::ahead::Slower;
use super::interpreter::{Beside, Interpreter, Item, Most, Slots};
use super::kv::{Caches, KvStore, Layout, Part};
use super::memory::{Device, Kind, bytes_of, bytes_of_floats};
use super::pool::Pool;
use super::step::Timed;
use super::weights::{DeviceWeights, upload_maps};
use crate::chunks::{ChunkCache, ChunkStore, alone};
use crate::clock::Clock;
use crate::engine::{
    Chosen, Kept, Replay, Run, RunOptions, RunResult, kv_budget, kv_needed, layer_count,
    longest_cache, longest_sequence, no_such_cache, probe, probed, sequences, state_maps,
};
use crate::error::ExecError;
use crate::executor::Executor;
use crate::interpreter::SequenceState;
use crate::kv_store::kv_format;
use crate::tier::TierUse;
use crate::weights::Weights;

/// So many times a cache's size is written to fill it with something else.
const SWEEP: u64 = 2;

/// Who wants to see logits.
pub(super) type Watch<'w> = &'w mut dyn FnMut(Chosen<'_>);

/// A model and its weights on a device.
pub struct CudaEngine<'d> {
    model: Model,
    device: Device<'d>,
    weights: DeviceWeights,
    rope: RopeTable,
    synthetic: bool,
}

impl<'d> CudaEngine<'d> {
    /// Uploads weights. `activations` is the type of what goes from op to op, and of weights that are not codes: f32, f16 or
    /// bf16.
    ///
    /// # Errors
    /// If there is no such type, or what the driver said; what was taken is given back then.
    pub fn new(
        driver: &'d mut dyn Driver,
        model: Model,
        weights: Weights,
        activations: DType,
    ) -> Result<Self, ExecError> {
        let kind = match activations {
            DType::F32 => Kind::F32,
            DType::F16 => Kind::F16,
            DType::Bf16 => Kind::Bf16,
            other => {
                let part = format!("activations in {other} (it has f32, f16 and bf16)");
                return Err(ExecError::NotExecutable { model: model.name, part });
            }
        };
        for (width, name) in [(model.hidden, "residual"), (model.ffn, "feed-forward block")] {
            if !width.is_multiple_of(8) {
                let part =
                    format!("a {name} of {width} channels on a device (multiples of 8 work)");
                return Err(ExecError::NotExecutable { model: model.name, part });
            }
        }
        if weights.narrow {
            let widths = [model.hidden, model.ffn, model.heads * model.head_dim];
            check_narrow(driver.device(), &model, widths)?;
        }
        let mut device = Device::new(driver);
        let uploaded = DeviceWeights::of(&mut device, &weights, kind)?;
        // What was used on the way.
        device.release(device.mark());
        let Weights { rope, synthetic, .. } = weights;
        Ok(Self { model, device, weights: uploaded, rope, synthetic })
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Tells the devices that share its layers not to wait for it.
    pub(super) fn leave(&mut self) {
        self.device.leave();
    }

    /// [`Executor::run`], and `watch` sees the logits of every token that is chosen or forced: they are downloaded after each step.
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
        self.run_in_memory(&Run { program, prompts, options, stop }, progress, Some(watch))
    }

    /// Between ops `sweep` bytes are written.
    fn probe_in_memory(
        &mut self,
        program: &Program,
        resident: Tokens,
        sweep: u64,
    ) -> Result<Clock, ExecError> {
        let ((prompts, options), never) = (probed(program), AtomicBool::new(false));
        let run = Run { program, prompts: &prompts, options: &options, stop: &never };
        let mut interpreter = self.interpreter(&run, resident)?;
        interpreter.fill(layer_count(program) as usize, resident as usize)?;
        interpreter.sweep = sweep;
        probe(&mut interpreter, program, resident)
    }

    pub(super) fn run_in_memory(
        &mut self,
        run: &Run<'_>,
        progress: &mut dyn FnMut(u64, u64),
        watch: Option<Watch<'_>>,
    ) -> Result<RunResult, ExecError> {
        run.check(&self.model)?;
        let mark = self.device.mark();
        let result = self.replay(run, progress, watch);
        self.device.release(mark);
        result
    }

    fn replay(
        &mut self,
        run: &Run<'_>,
        progress: &mut dyn FnMut(u64, u64),
        watch: Option<Watch<'_>>,
    ) -> Result<RunResult, ExecError> {
        let chunks = ChunkStore::fill(run.program, run.prompts, &mut |ids| {
            let mark = self.device.mark();
            let read = self.read_chunk(run, ids);
            self.device.release(mark);
            read
        })?;
        let mut interpreter = self.interpreter(run, 0)?;
        interpreter.chunks = chunks;
        interpreter.watched = watch.is_some();
        let mut result = run.replay(&mut interpreter, progress, watch.unwrap_or(&mut |_| {}))?;
        // All of it was taken before the first step, but for scratch buffers, which stay.
        let memory = interpreter.device.driver()?.memory()?;
        result.peak_rss = Bytes(memory.total.saturating_sub(memory.free));
        Ok(result)
    }

    /// Reads a chunk of text alone.
    fn read_chunk(&mut self, run: &Run<'_>, ids: &[u32]) -> Result<ChunkCache, ExecError> {
        let (prompts, options) = ([ids.to_vec()], RunOptions::default());
        let program = alone(run.program, ids.len())?;
        let own = Run { program, prompts: &prompts, options: &options, stop: run.stop };
        let format = self.format(program)?;
        let mut interpreter = self.interpreter(&own, 0)?;
        let mut clock = Clock::new(program, false);
        program.visit_steps(|view| {
            own.go_on()?;
            interpreter.step(&view, &mut clock)
        })?;
        (0..interpreter.kv.main.layers())
            .map(|layer| interpreter.stored_rows(format, layer))
            .collect()
    }

    fn format(&self, program: &Program) -> Result<KvFormat, ExecError> {
        let dtype = program.header.kv.dtype;
        match kv_format(dtype) {
            // Attention on the device has no kernels for caches in single precision.
            Some(format) if format != KvFormat::F32 => Ok(format),
            _ => Err(no_such_cache(&self.model, dtype, "f16, bf16 and fp8 on a CUDA device")),
        }
    }

    /// For a run over caches that will be given `resident` tokens each before it starts.
    fn interpreter<'a>(
        &'a mut self,
        run: &Run<'_>,
        resident: Tokens,
    ) -> Result<Interpreter<'a, 'd>, ExecError> {
        let Run { program, prompts, options, .. } = *run;
        let format = self.format(program)?;
        let (model, kind) = (&self.model, self.weights.kind);
        let budget = kv_budget(program, options)?;
        let mut needed = kv_needed(program, options);
        let programs = || options.prefix.iter().chain([program]);
        let mut wanted = Wanted::default();
        let mut layout = Layout::new(format, model.head_dim as usize, model.kv_heads as usize);
        programs().for_each(|program| wanted.see(program, &mut layout));
        let tokens = programs().map(longest_cache).max().unwrap_or(0).max(wanted.tokens);
        let longest = longest_sequence(program);
        let tokens = if wanted.ragged { tokens.max(longest) } else { tokens };
        let shape = (model.layers as usize, prompts.len());
        let more = more_than_counted(&layout, needed, shape, tokens as usize);
        let blocks =
            u64::from(resident).div_ceil(32) * 2 * (shape.0 * shape.1 * layout.kv_heads) as u64;
        needed += Bytes(blocks * layout.bytes(Part::KeysWhole).0);
        let device = &mut self.device;
        let pool = Pool::new(device, (budget.0, needed.0), more)?;
        let main = Caches::new(device, &pool, layout, shape, tokens as usize)?;
        let mut buffers = Buffers::default();
        for program in programs() {
            let own = Buffers::of(program);
            buffers.rows = buffers.rows.max(own.rows);
            buffers.sampled = buffers.sampled.max(own.sampled);
        }
        let turns = upload_turns(device, &self.rope, longest)?;
        let maps = match state_maps(model, self.synthetic, program)? {
            Some(maps) => upload_maps(device, &maps)?,
            None => Vec::new(),
        };
        let slots = Slots::new(device, model, &buffers, kind)?;
        Ok(Interpreter {
            device,
            model,
            weights: &self.weights,
            rope: &self.rope,
            turns,
            kv: KvStore { pool, main, parts: None },
            slots,
            sequences: sequences(program, prompts, options),
            keep_prompt_logits: options.keep_details,
            watched: false,
            cache_of: program.header.cache_of.clone(),
            short_heads: program.header.short_heads.clone(),
            maps,
            deferred: wanted.deferred,
            most: wanted.most,
            beside: Beside::default(),
            chunks: ChunkStore::default(),
            chunk: 1,
            stale: Vec::new(),
            slower: Slower::new(options.tier_place.clone()),
            advanced: Vec::new(),
            timed: Timed::default(),
            sweep: 0,
        })
    }
}

/// Whether a device multiplies e4m3, in matrices of these widths.
fn check_narrow(device: &DeviceInfo, model: &Model, widths: [u32; 3]) -> Result<(), ExecError> {
    let ((major, minor), oldest) = (device.capability, Element::Fp8.multiplied_from());
    let part = if device.capability < oldest {
        let (from, on) = oldest;
        format!("weights in fp8 on compute capability {major}.{minor} ({from}.{on} is needed)")
    } else if let Some(width) = widths.into_iter().find(|width| !width.is_multiple_of(16)) {
        format!("weights in fp8 with rows of {width} (multiples of 16 work)")
    } else {
        return Ok(());
    };
    Err(ExecError::NotExecutable { model: model.name.clone(), part })
}

/// What programs need beside what their headers say.
#[derive(Default)]
struct Wanted {
    most: Most,
    /// Tokens of caches that are filled at once.
    tokens: Tokens,
    /// Heads of a layer may hold more than its lanes say.
    ragged: bool,
    /// Evictions wait for the end of a pass.
    deferred: bool,
}

impl Wanted {
    fn see(&mut self, program: &Program, layout: &mut Layout) {
        program.visit_passes(|_, pass, _| {
            let evicts = |kind: &OpKind| matches!(kind, OpKind::Evict { .. });
            let mut late = pass.after_layers.iter().flat_map(|block| &block.ops);
            self.deferred |= late.any(|op| evicts(&op.kind));
            for op in pass.blocks().flat_map(|(_, block)| &block.ops) {
                if let Some(heads) = op.cache_heads() {
                    layout.add(&heads.form);
                }
                let keep = op.lanes.as_slice().iter().map(|l| l.keep).max().unwrap_or(0);
                match op.kind {
                    OpKind::Blend { .. } => self.tokens = self.tokens.max(keep),
                    OpKind::Cluster { .. } => self.most.clusters = self.most.clusters.max(keep),
                    OpKind::Evict { choice, .. } => {
                        self.ragged |= !matches!(choice, Choice::PerHead);
                    }
                    OpKind::Refresh { .. }
                    | OpKind::AppendPart { .. }
                    | OpKind::AttendAhead { .. }
                    | OpKind::Foresee { .. } => self.most.part = self.most.part.max(keep),
                    _ => {}
                }
            }
        });
    }
}

/// Bytes that caches may take on the device beyond what they count: ends of halves, and what stands twice while a cache of
/// several forms is moved or packed. An eighth more is for stretches that are too short for a half of another size.
fn more_than_counted(
    layout: &Layout,
    needed: Bytes,
    (layers, sequences): (usize, usize),
    tokens: usize,
) -> u64 {
    let heads = (layers * sequences * layout.kv_heads) as u64;
    let states = if layout.state > 0 { 64 * heads } else { 0 };
    if layout.is_plain() {
        return states;
    }
    let blocks = tokens.div_ceil(32) + 2;
    let twice = (layout.kv_heads * blocks * 32 * layout.token_bytes()) as u64;
    let parts = [Part::KeysPacked, Part::ValuesPacked, Part::KeysPruned];
    // The form whose halves exceed their count most says by how much all might.
    let share = parts.iter().map(|part| layout.bytes(*part));
    let excess = share.map(|(counted, taken)| {
        (taken.next_multiple_of(64) - counted) as f64 / counted.max(1) as f64
    });
    let excess = excess.fold(0.0, f64::max);
    states + twice + (needed.0 as f64 * (excess + 0.125)) as u64
}

/// Uploads the angles of positions; the pairs of a head.
fn upload_turns(
    device: &mut Device<'_>,
    rope: &RopeTable,
    positions: Tokens,
) -> Result<(batchmax_kernels::cuda::Address, u32), ExecError> {
    let mut numbers = Vec::new();
    for position in 0..positions.min(rope.max_position() as Tokens) {
        let (cos, sin) = rope.angles(position);
        numbers.extend_from_slice(cos);
        numbers.extend_from_slice(sin);
    }
    let at = device.alloc_of(&bytes_of_floats(&numbers))?;
    Ok((at, (rope.rotary_dim() / 2) as u32))
}

impl Executor for CudaEngine<'_> {
    fn model(&self) -> &Model {
        &self.model
    }

    fn synthetic(&self) -> bool {
        self.synthetic
    }

    fn run(
        &mut self,
        program: &Program,
        prompts: &[Vec<u32>],
        options: &RunOptions,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<RunResult, ExecError> {
        self.run_in_memory(&Run { program, prompts, options, stop }, progress, None)
    }

    fn probe(&mut self, program: &Program, resident: Tokens) -> Result<Clock, ExecError> {
        let mark = self.device.mark();
        let clock = self.probe_in_memory(program, resident, 0);
        self.device.release(mark);
        clock
    }

    fn probe_cold(
        &mut self,
        program: &Program,
        resident: Tokens,
    ) -> Result<Option<Clock>, ExecError> {
        let cache = self.device.driver()?.device().l2;
        if cache == 0 {
            return Ok(None);
        }
        let mark = self.device.mark();
        let clock = self.probe_in_memory(program, resident, SWEEP * cache);
        self.device.release(mark);
        clock.map(Some)
    }
}

impl Interpreter<'_, '_> {
    /// Gives the caches of the first `layers` layers `tokens` made-up tokens each, so that a profile can time an op over a long
    /// cache without reading a prompt.
    fn fill(&mut self, layers: usize, tokens: usize) -> Result<(), ExecError> {
        /// A small number in every format, not zero and no infinity.
        const BYTE: u8 = 0x38;
        let (pool, main) = (&mut self.kv.pool, &mut self.kv.main);
        let bytes = pool.left();
        self.device.fill(pool.at(), BYTE, bytes)?;
        let mut positions = vec![0; main.plane()];
        for of_head in positions.chunks_mut(main.stride) {
            of_head.iter_mut().zip(0..tokens as u32).for_each(|(at, position)| *at = position);
        }
        for layer in 0..layers {
            for index in 0..main.per_layer() {
                main.reserve(pool, layer, index, tokens)?;
                main.change(layer, index).tokens = tokens;
            }
            self.device.upload(main.positions_at(layer), &bytes_of(&positions))?;
        }
        Ok(())
    }

    /// What the only sequence has cached in a layer: a row has the keys of all heads, then their values.
    fn stored_rows(&mut self, format: KvFormat, layer: usize) -> Result<StoredRows, ExecError> {
        let (kv_heads, dim) = (self.model.kv_heads as usize, self.model.head_dim as usize);
        let tokens = self.kv.main.heads(layer, 0)[0].tokens;
        let item = Item {
            sequence: 0,
            first: 0,
            rows: tokens,
            seen: tokens as u32,
            lane: batchmax_sim::op::Lane::default(),
        };
        let items = self.put_items("stored-items", vec![item])?;
        let (rows, _) = self.rows_out(&items, layer)?;
        let half = dim * format.bytes();
        let all = self.device.download(rows, kv_heads * tokens * 2 * half)?;
        let mut bytes = Vec::with_capacity(all.len());
        for token in 0..tokens {
            for side in 0..2 {
                for head in 0..kv_heads {
                    let from = ((head * tokens + token) * 2 + side) * half;
                    bytes.extend_from_slice(&all[from..from + half]);
                }
            }
        }
        Ok(StoredRows::from_bytes(format, 2 * kv_heads * dim, &bytes))
    }
}

impl Replay for Interpreter<'_, '_> {
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
        Bytes(self.kv.pool.peak())
    }

    fn reset_peak(&mut self) {
        self.kv.pool.reset_peak();
    }

    fn kept(&mut self, sequence: usize) -> Result<Kept, ExecError> {
        Ok(self.kv.kept(self.device, sequence)?)
    }

    fn show(&self, watch: &mut dyn FnMut(Chosen<'_>)) {
        Interpreter::show(self, watch);
    }

    fn take_buffers(&mut self, _: &Program) -> Result<(), ExecError> {
        // They are large enough for the prefix and for the program.
        Ok(())
    }

    fn tier(&self) -> TierUse {
        self.slower.used()
    }
}
