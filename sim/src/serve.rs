//! Whole runs of an engine: a static batch, everything queued at once, or a closed loop at a concurrency.

use crate::cost::{CostModel, GpuKernels, InSteps, predict};
use crate::engine::{DeviceFactors, Engine, Generation};
use crate::form::Length;
use crate::load::{Group, Hit, Load, Schedule};
use crate::lower::{LowerError, Setup, lower, lower_pass};
use crate::memory::kv_peaks;
use crate::op::{Family, Phase};
use crate::place::Stage;
use crate::policy::Policy;
use crate::profile::{Gpu, Model};
use crate::program::Program;
use crate::timeline::{SIGMAS_90, Source, Timeline};
use crate::units::{Bytes, Tokens};

/// How far the memory that engines keep for themselves is unknown, in batches.
const CAPACITY_SLACK: f64 = 1.15;

/// A model on devices under an engine.
#[derive(Clone, Copy)]
pub struct Deployment<'a> {
    /// One device's part of the model ([`Model::shard`]).
    pub model: &'a Model,
    /// Each device.
    pub gpu: &'a Gpu,
    /// The engine.
    pub engine: &'a Engine,
    /// Its release.
    pub generation: &'a Generation,
    /// Its kernels on the device.
    pub kernels: &'a GpuKernels,
    /// The cache policy.
    pub policy: &'a dyn Policy,
    /// Types, layout, devices to a layer.
    pub setup: Setup,
    /// Groups of devices that hold a part of the layers each.
    pub pp: u32,
    /// First tokens of each prompt that the engine holds from earlier requests.
    pub hit: Tokens,
}

/// How requests come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// `batch` equal sequences start together and all finish.
    Static {
        /// Sequences.
        batch: u32,
    },
    /// A new request for each that ends: `concurrency` are always there. `None`: as many as memory holds.
    Closed {
        /// Requests.
        concurrency: Option<u32>,
    },
}

/// Where the time of a run goes, before an engine's factors: what a fit of those factors needs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Parts {
    /// Kernels while prompts are read.
    pub prefill: Buckets,
    /// Kernels while tokens are generated.
    pub decode: Buckets,
    /// Steps that read prompts.
    pub prefill_steps: f64,
    /// Steps that generate.
    pub decode_steps: f64,
    /// Generating steps that the first token takes in engines that generate it apart; 0 where requests overlap.
    pub first_steps: f64,
    /// Sequences of all generating steps.
    pub sequence_steps: f64,
    /// Decoder layers of a step.
    pub layers: f64,
    /// Query heads per KV head.
    pub group: u32,
}

/// Kernel seconds by what an engine's factors multiply.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Buckets {
    /// Matrix products.
    pub products: f64,
    /// Attention.
    pub attention: f64,
    /// Sums over devices.
    pub sums: f64,
    /// Everything else.
    pub small: f64,
}

impl Buckets {
    fn of(timeline: &Timeline, phase: Phase) -> Self {
        let mut buckets = Self::default();
        for span in timeline.spans.iter().filter(|s| s.site.phase == phase) {
            let slot = match span.family {
                Family::Gemm => &mut buckets.products,
                Family::AttendPrefill | Family::AttendDecode => &mut buckets.attention,
                Family::Collective => &mut buckets.sums,
                _ => &mut buckets.small,
            };
            *slot += span.time.0;
        }
        buckets
    }

    fn scaled(self, by: f64) -> Self {
        Self {
            products: self.products * by,
            attention: self.attention * by,
            sums: self.sums * by,
            small: self.small * by,
        }
    }

    fn under(&self, products: f64, attention: f64, g: &Generation, device: f64, sums: f64) -> f64 {
        let own = products * self.products + attention * self.attention + g.small * self.small;
        device * own + sums * g.sums * self.sums
    }
}

impl Parts {
    /// Seconds while prompts are read.
    #[must_use]
    pub fn prefill(&self, g: &Generation, device: &DeviceFactors) -> f64 {
        // Reading shares KV heads in every release; only generating took time to learn it.
        let read = self.prefill.under(g.prefill, g.attention, g, device.prefill, device.sums)
            + self.prefill_steps * g.host_s(0.0, self.layers);
        // A prompt that rides on generating steps waits for those in any case.
        let first = if self.first_steps > 0.0 {
            self.first_steps * g.first_token_s(self.decode(g, device), self.decode_steps)
        } else {
            0.0
        };
        read + first
    }

    /// Seconds while tokens are generated.
    #[must_use]
    pub fn decode(&self, g: &Generation, device: &DeviceFactors) -> f64 {
        let attention = g.attention_factor(self.group);
        self.decode.under(g.decode, attention, g, device.decode, device.sums)
            + self.decode_steps * g.host_s(0.0, self.layers)
            + self.sequence_steps * g.sequence_s
    }
}

/// A predicted run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Run {
    /// Time to first token of a request, seconds; of a static batch, until all prompts are read.
    pub ttft_s: f64,
    /// Seconds per token after the first.
    pub tpot_s: f64,
    /// Generated tokens per second.
    pub output_tok_s: f64,
    /// Prompt and generated tokens per second.
    pub total_tok_s: f64,
    /// Prompt tokens that are read (no cache holds them) per second of reading.
    pub prefill_tok_s: f64,
    /// Generated tokens per second of generating.
    pub decode_tok_s: f64,
    /// Until the last token of a batch, or of a request, seconds.
    pub e2e_s: f64,
    /// Sequences that run together.
    pub batch: f64,
    /// Sequences that memory holds.
    pub capacity: u32,
    /// Bytes of weights, caches and reserve on one device.
    pub peak_bytes: Bytes,
    /// Half width of the 90 % interval of the times, in logarithms.
    pub half_width: f64,
    /// Where the times come from.
    pub source: Source,
    /// Whether the first token waits for other requests.
    pub queued: bool,
    /// What the times are made of.
    pub parts: Parts,
}

/// Why there is no prediction.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServeError {
    /// The program can't be lowered.
    #[error(transparent)]
    Lower(#[from] LowerError),
    /// Weights alone are too large.
    #[error(
        "{weights} of weights do not fit {memory} of each device; hint: more devices or fewer bits"
    )]
    Weights {
        /// One device's weights.
        weights: Bytes,
        /// One device's memory.
        memory: Bytes,
    },
    /// Not even one sequence.
    #[error("not even one sequence fits: {needed} of caches, {free} are free")]
    NothingFits {
        /// Caches of one sequence.
        needed: Bytes,
        /// What weights and reserve leave.
        free: Bytes,
    },
}

/// How a prompt is read in a closed loop.
#[derive(Clone, Copy)]
struct Reading {
    /// Tokens that no cache holds.
    rows: Tokens,
    /// Tokens resident before the first of them.
    behind: Tokens,
    /// Tokens of a step, at most.
    chunk: Tokens,
}

impl Reading {
    fn chunks(self) -> u32 {
        self.rows.div_ceil(self.chunk).max(1)
    }
}

impl Deployment<'_> {
    /// Weights on one device of the group that has most of them.
    #[must_use]
    pub fn weights(&self) -> Bytes {
        let [end, between] = self.stages();
        end.weights.max(between.weights)
    }

    /// The groups of layers of which one is the fullest: the others have room left when it has none.
    fn stages(&self) -> [Stage; 2] {
        Stage::of(self.model, self.setup, self.pp)
    }

    /// Bytes for caches on one device of the group with most weights; an error where the weights leave nothing.
    pub fn kv_budget(&self) -> Result<Bytes, ServeError> {
        let weights = self.weights();
        let free = self.engine.kv_bytes(self.gpu, weights);
        if free.0 == 0 {
            return Err(ServeError::Weights { weights, memory: self.gpu.memory_bytes });
        }
        Ok(free)
    }

    /// Bytes of all layers' caches for which every group has room.
    fn kv_room(&self) -> Result<f64, ServeError> {
        self.kv_budget()?;
        let room = |s: Stage| self.engine.kv_bytes(self.gpu, s.weights).0 as f64 / s.part;
        Ok(self.stages().map(room).into_iter().fold(f64::INFINITY, f64::min))
    }

    /// Tokens of an uncompressed cache that memory holds.
    pub fn kv_tokens(&self) -> Result<u64, ServeError> {
        let per_token = self
            .setup
            .kv
            .dtype
            .bytes(self.model.kv_elements_per_token_layer() * u64::from(self.model.layers));
        let copies = self.engine.kv_copies * per_token.0 as f64;
        Ok((self.kv_room()? / copies.max(1.0)) as u64)
    }

    /// The kernels as the engine launches them.
    fn in_steps(&self) -> InSteps<'_> {
        InSteps { kernels: self.kernels, step_tokens: self.engine.step_tokens, pp: self.pp }
    }

    fn load(&self, batch: u32, isl: Tokens, osl: Tokens) -> Load {
        Load::uniform(batch, isl, osl, Schedule::Static).with_hit(Hit::Tokens(self.hit))
    }

    fn one(&self, isl: Tokens, osl: Tokens) -> Result<Program, ServeError> {
        let load = self.load(1, isl, osl);
        Ok(lower(self.model, self.policy, &load, self.setup)?)
    }

    /// Sequences that memory holds at their peak.
    pub fn capacity(&self, isl: Tokens, osl: Tokens) -> Result<u32, ServeError> {
        let free = self.kv_room()?;
        let needed = self.caches(&self.one(isl, osl)?);
        // What a second sequence adds; less than the first took where they hold a prefix together.
        let own = if self.hit > 0 && self.setup.kv.shares_prefix {
            let load = self.load(2, isl, osl);
            self.caches(&lower(self.model, self.policy, &load, self.setup)?) - needed
        } else {
            needed
        };
        let sequences = ((free - (needed - own)) / own.max(1.0)) as u32;
        if sequences == 0 {
            let (needed, free) = (Bytes(needed as u64), Bytes(free as u64));
            return Err(ServeError::NothingFits { needed, free });
        }
        Ok(sequences)
    }

    /// Bytes of a program's caches in all groups of layers, at their peak.
    fn caches(&self, program: &Program) -> f64 {
        let peaks = kv_peaks(program);
        peaks.prefill.max(peaks.decode).0 as f64 * self.engine.kv_copies
    }

    /// Predicts a run.
    pub fn run(&self, arrival: Arrival, isl: Tokens, osl: Tokens) -> Result<Run, ServeError> {
        match arrival {
            Arrival::Static { batch } => self.static_batch(batch, isl, osl),
            Arrival::Closed { concurrency } => self.closed_loop(concurrency, isl, osl),
        }
    }

    fn static_batch(&self, batch: u32, isl: Tokens, osl: Tokens) -> Result<Run, ServeError> {
        let capacity = self.capacity(isl, osl)?;
        // More than fits runs in waves, each as large as fits. A batch that was really run and is over by less than what
        // the reserve is unsure of did fit.
        let unsure = (f64::from(capacity) * CAPACITY_SLACK) as u32;
        let limit = self.engine.most_sequences.max(1);
        let waves =
            if batch <= unsure.min(limit) { 1 } else { batch.div_ceil(capacity.min(limit)) };
        let together = batch.div_ceil(waves);
        let load = self.load(together, isl, osl);
        let program = lower(self.model, self.policy, &load, self.setup)?;
        let launched = self.in_steps();
        let timeline = predict(&launched, &program);
        let read = load.read_tokens() as f64;
        let decode_steps = f64::from(osl.saturating_sub(1));
        // An engine that generates the first token apart reads the prompt's last token there: of one token nothing is left.
        let apart = self.generation.first_token_decodes && isl == 1;
        let pieces = if apart { 0.0 } else { 1.0 };
        let parts = Parts {
            prefill: Buckets::of(&timeline, Phase::Prefill).scaled(pieces),
            decode: Buckets::of(&timeline, Phase::Decode),
            prefill_steps: pieces * launched.prompt_steps(&program),
            decode_steps,
            first_steps: 1.0,
            sequence_steps: decode_steps * f64::from(together),
            layers: f64::from(self.model.layers),
            group: self.model.group(),
        };
        let device = self.generation.device(&self.gpu.name);
        let prefill = parts.prefill(self.generation, &device);
        let decode = parts.decode(self.generation, &device);
        let waves = f64::from(waves);
        let total = waves * (prefill + decode);
        let all = f64::from(batch);
        let (input, output) = (all * f64::from(isl), all * f64::from(osl));
        Ok(Run {
            ttft_s: prefill,
            tpot_s: decode / decode_steps.max(1.0),
            output_tok_s: output / total,
            total_tok_s: (input + output) / total,
            prefill_tok_s: read / prefill,
            decode_tok_s: f64::from(together) * decode_steps / decode.max(1e-12),
            e2e_s: total,
            batch: f64::from(together),
            capacity,
            peak_bytes: self.peak(&program),
            half_width: self.half_width(&timeline),
            source: timeline.weakest_source(),
            queued: false,
            parts,
        })
    }

    fn peak(&self, program: &Program) -> Bytes {
        let caches = self.caches(program);
        let stage = Stage::fullest(self.model, self.setup, self.pp, Bytes(caches as u64));
        let held = Bytes((caches * stage.part) as u64);
        stage.weights + self.engine.reserve_bytes + held
    }

    fn half_width(&self, timeline: &Timeline) -> f64 {
        let total = timeline.total().0.max(1e-12);
        let engine = self.generation.stddev_on(self.gpu);
        SIGMAS_90 * (timeline.stddev(|_| true).0 / total).hypot(engine)
    }

    /// Steady state: `running` sequences generate; in the time that one of them takes for its answer, each of the others
    /// is replaced once, so a step carries `running / osl` prompts on average.
    fn closed_loop(
        &self,
        concurrency: Option<u32>,
        isl: Tokens,
        osl: Tokens,
    ) -> Result<Run, ServeError> {
        // Blocks are taken as a sequence grows: half of the answer on average.
        let capacity = self.capacity(isl, (osl / 2).max(1))?;
        let wanted = concurrency.unwrap_or(u32::MAX);
        let most = wanted.min(capacity).min(self.engine.most_sequences.max(1)).max(1);
        let g = self.generation;
        let device = g.device(&self.gpu.name);
        let program = self.one(isl, osl)?;
        // What is read, over what the prefix left.
        let rows = isl.saturating_sub(self.hit).max(1);
        let behind = program.header.held.iter().map(|h| h.tokens).max().unwrap_or(0);
        let reading = Reading { rows, behind, chunk: self.engine.step_tokens.min(rows).max(1) };
        let chunks = reading.chunks();
        let mut running = f64::from(most);
        let mut state = self.step(running, isl, osl, reading);
        for _ in 0..4 {
            let (step, read) = (state.decode(g, &device), state.prefill(g, &device));
            let tpot = step + g.interference * running / f64::from(osl) * read;
            // Those whose prompt is being read do not generate.
            let generating = f64::from(most) * (f64::from(osl) * tpot)
                / (f64::from(osl) * tpot + f64::from(chunks) * (step + read / f64::from(chunks)));
            if (generating - running).abs() < 0.5 {
                break;
            }
            running = generating.max(1.0);
            state = self.step(running, isl, osl, reading);
        }
        let (step, read) = (state.decode(g, &device), state.prefill(g, &device));
        let tpot = step + g.interference * running / f64::from(osl) * read;
        let output = running / tpot;
        // A request that comes in waits for the step under way and for prompts before its own: on average half of those
        // that come while one is read.
        let ahead = (running / f64::from(osl) * (read / tpot)).min(running);
        let ttft = 0.5 * step + f64::from(chunks) * step + read * (1.0 + 0.5 * ahead);
        let waiting = f64::from(wanted.min(u32::MAX / 2)) - f64::from(most);
        let queued = concurrency.is_some() && waiting > 0.0;
        let request = ttft + f64::from(osl.saturating_sub(1)) * tpot;
        let queue = if queued { waiting / f64::from(most) * request } else { 0.0 };
        let timeline = predict(self.kernels, &program);
        Ok(Run {
            ttft_s: ttft + queue,
            tpot_s: tpot,
            output_tok_s: output,
            total_tok_s: output * (f64::from(isl) + f64::from(osl)) / f64::from(osl),
            prefill_tok_s: f64::from(rows) / read,
            decode_tok_s: running / step,
            e2e_s: request + queue,
            batch: running,
            capacity,
            peak_bytes: Bytes((self.gpu.memory_bytes.0 as f64 * self.engine.memory_share) as u64),
            half_width: self.half_width(&timeline),
            source: timeline.weakest_source(),
            queued: queued || most > 1,
            parts: Parts {
                prefill: state.prefill.scaled(running / f64::from(osl)),
                decode_steps: 1.0,
                sequence_steps: running,
                ..state
            },
        })
    }

    /// One generating step of `running` sequences, and what reading one prompt adds to the steps it rides on.
    fn step(&self, running: f64, isl: Tokens, osl: Tokens, prompt: Reading) -> Parts {
        let sequences = running.round().max(1.0) as u32;
        let group =
            |sequences| Load::new(vec![Group { sequences, isl, osl, hit: 0 }], Schedule::Static);
        let resident = isl.saturating_add(osl / 2);
        let generating = lower_pass(
            self.model,
            self.policy,
            &group(sequences),
            self.setup,
            Phase::Decode,
            1,
            self.kept(resident, isl),
        );
        let decode = Buckets::of(&predict(self.kernels, &generating), Phase::Decode);
        // The chunks of a prompt, each over what was read before.
        let mut reading = Buckets::default();
        for i in 0..prompt.chunks() {
            let before = i * prompt.chunk;
            let rows = prompt.chunk.min(prompt.rows - before);
            let pass = lower_pass(
                self.model,
                self.policy,
                &group(1),
                self.setup,
                Phase::Prefill,
                rows,
                prompt.behind.saturating_add(before),
            );
            let alone = Buckets::of(&predict(self.kernels, &pass), Phase::Prefill);
            // Weights are read once for the chunk and the generating rows together: the product of both costs as many
            // rows more, not as a launch of its own.
            let shared = self.shared_products(sequences, rows);
            reading.products += (alone.products - shared).max(0.1 * alone.products);
            reading.attention += alone.attention;
            reading.sums += alone.sums;
            reading.small += alone.small;
        }
        Parts {
            prefill: reading,
            decode,
            // The chunks ride on steps that generate: their host time is counted there.
            prefill_steps: 0.0,
            decode_steps: 1.0,
            first_steps: 0.0,
            sequence_steps: running,
            layers: f64::from(self.model.layers),
            group: self.model.group(),
        }
    }

    /// Seconds that the products of `sequences` generating rows and `rows` prompt rows save when launched as one.
    fn shared_products(&self, sequences: u32, rows: Tokens) -> f64 {
        let products = |count: u32| -> f64 {
            let load = Load::uniform(count, 1, 1, Schedule::Static);
            let pass = lower_pass(self.model, self.policy, &load, self.setup, Phase::Decode, 1, 1);
            let mut sum = 0.0;
            pass.visit_passes(|_, pass, _| {
                for (_, block) in pass.blocks() {
                    for op in block.ops.iter().filter(|o| {
                        matches!(o.kind, crate::op::OpKind::Gemm { .. }) && o.name != "head"
                    }) {
                        sum += f64::from(block.times())
                            * self.kernels.launch(op, Phase::Decode, 0).seconds;
                    }
                }
            });
            sum
        };
        products(sequences) + products(rows) - products(sequences.saturating_add(rows))
    }

    /// Tokens of a cache that a policy leaves of `resident`.
    fn kept(&self, resident: Tokens, isl: Tokens) -> Tokens {
        let osl = resident.saturating_sub(isl).max(1);
        let Ok(program) = self.one(isl, osl.saturating_mul(2)) else { return resident };
        let per_token = self.setup.kv.held(
            crate::op::Heads {
                query: self.model.heads,
                kv: self.model.kv_heads,
                dim: self.model.head_dim,
                dtype: self.setup.kv.dtype,
                form: crate::form::Form::default(),
            },
            Length::settled(self.setup.kv.block_tokens),
        );
        let layer = per_token.0 as f64 / f64::from(self.setup.kv.block_tokens.max(1))
            * f64::from(self.model.layers);
        let full = f64::from(isl) + f64::from(osl) * 2.0;
        let held = kv_peaks(&program).decode.0 as f64 / layer.max(1.0);
        // The share of the decode peak that the policy keeps, applied to the average length.
        (f64::from(resident) * (held / full).min(1.0)).round().max(1.0) as Tokens
    }
}
