//! A model placed on devices under an engine: what is on each device, in which types, within which memory.

use crate::cost::{CostModel, GpuKernels, Roofline, UnderEngine, roofline::Efficiency};
use crate::engine::Engine;
use crate::load::Schedule;
use crate::lower::Setup;
use crate::memory::{Buffers, Footprint, footprint_with};
use crate::op::{Branch, DType, Lane, Lanes, Op, OpKind, Phase};
use crate::plan::Limits;
use crate::profile::{Gpu, Model};
use crate::program::Program;
use crate::surface::Library;
use crate::timeline::Source;
use crate::units::Bytes;

/// What each device holds, and within what.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// Each device.
    pub gpu: Gpu,
    /// The engine; `None` is this project's own executor.
    pub engine: Option<Engine>,
    /// One device's part of each layer ([`Model::shard`]).
    pub model: Model,
    /// Types, layout, devices that share a layer.
    pub setup: Setup,
    /// Groups of devices that hold a part of the layers each.
    pub pp: u32,
    /// Memory of each device.
    pub limits: Limits,
}

/// What a user may choose about a placement.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Type of the weights; the model's own where none is given.
    pub weights: Option<DType>,
    /// Type of the cache; bf16 where none is given.
    pub kv: Option<DType>,
    /// Devices that share each layer.
    pub tp: u32,
    /// Groups of devices that hold a part of the layers each.
    pub pp: u32,
    /// Memory of each device; the engine's share of it where none is given.
    pub memory: Option<Bytes>,
    /// Memory of the caches of each device.
    pub kv_memory: Option<Bytes>,
}

impl Default for Choice {
    fn default() -> Self {
        Self { weights: None, kv: None, tp: 1, pp: 1, memory: None, kv_memory: None }
    }
}

impl Placement {
    /// `whole` on devices of a kind under an engine.
    ///
    /// # Errors
    /// Where the devices can't share the model, or the engine can't run the types: one line that says why.
    pub fn new(whole: &Model, gpu: &Gpu, engine: &Engine, choice: Choice) -> Result<Self, String> {
        let weights = choice.weights.unwrap_or(whole.weight_dtype);
        let follows = engine.kv_follows_weights && weights == DType::Fp8;
        let kv = choice.kv.unwrap_or(if follows { DType::Fp8 } else { DType::Bf16 });
        for (what, dtype, known) in
            [("weights", weights, &engine.weight_dtypes), ("caches", kv, &engine.kv_dtypes)]
        {
            if !known.contains(&dtype) {
                let names: Vec<_> = known.iter().map(|d| d.name()).collect();
                return Err(format!(
                    "{} has no {what} in {dtype} (it has {})",
                    engine.name,
                    names.join(", ")
                ));
            }
        }
        if choice.pp > whole.layers {
            return Err(format!(
                "{} groups of devices can't share the {1} layers of {2}; hint: at most {1} groups",
                choice.pp, whole.layers, whole.name
            ));
        }
        let share = Bytes((gpu.memory_bytes.0 as f64 * engine.memory_share) as u64);
        Ok(Self {
            gpu: gpu.clone(),
            model: whole.shard(choice.tp)?,
            setup: Setup {
                kv: engine.layout(kv),
                weights,
                activations: DType::Bf16,
                head: if weights.bits() < 16 { DType::Bf16 } else { weights },
                tp: choice.tp.max(1),
            },
            pp: choice.pp.max(1),
            limits: Limits {
                memory: choice.memory.unwrap_or(share),
                kv_memory: choice.kv_memory,
                runtime: engine.reserve_bytes,
            },
            engine: Some(engine.clone()),
        })
    }

    /// The engine's name; this project's own where it has none.
    #[must_use]
    pub fn engine_name(&self) -> &str {
        self.engine.as_ref().map_or("batchmax", |e| &e.name)
    }

    /// Devices of one copy of the model.
    #[must_use]
    pub fn devices(&self) -> u32 {
        self.setup.tp.saturating_mul(self.pp)
    }

    /// How long ops take: by timed kernels where any are known for the device, else by its data sheet.
    #[must_use]
    pub fn cost(&self, library: &Library) -> Box<dyn CostModel> {
        let roofline =
            || Box::new(Roofline::new(self.gpu.clone(), Efficiency::default())) as Box<_>;
        let Some(engine) = &self.engine else { return roofline() };
        let kernels = GpuKernels::new(
            library,
            self.gpu.clone(),
            &engine.framework,
            self.setup.weights,
            self.setup.kv.dtype,
            self.setup.tp,
        )
        .streaming(engine.streams)
        .remembering();
        if !knows_products(&kernels, &self.model, self.setup) {
            return roofline();
        }
        Box::new(UnderEngine::new(Box::new(kernels), &self.gpu, engine, self.pp))
    }

    /// One device's memory.
    ///
    /// An engine's reserve already holds its buffers, which are those of one step, and an engine needs positions of
    /// cached tokens only once some were dropped; this project's own executor allocates both.
    #[must_use]
    pub fn footprint(&self, program: &Program) -> Footprint {
        let mut buffers = Buffers::of(program);
        let whole = footprint_with(&self.model, program, &buffers, self.limits.runtime);
        let Some(engine) = &self.engine else { return whole };
        buffers.rows = buffers.rows.min(u64::from(engine.step_tokens));
        let activations = buffers.bytes(&self.model, self.setup.activations.bits() / 8);
        let held = Bytes((whole.kv_peak().0 as f64 * engine.kv_copies) as u64);
        let stage = Stage::fullest(&self.model, self.setup, self.pp, held);
        let caches = |bytes: Bytes| Bytes((bytes.0 as f64 * stage.part * engine.kv_copies) as u64);
        Footprint {
            weights: stage.weights,
            kv_prefill_peak: caches(whole.kv_prefill_peak),
            kv_decode_peak: caches(whole.kv_decode_peak),
            kv_spread: caches(whole.kv_spread),
            kv_shortfall: caches(whole.kv_shortfall),
            away: caches(whole.away),
            activations,
            bookkeeping: if program.drops() { caches(whole.bookkeeping) } else { Bytes(0) },
            runtime: self.limits.runtime.saturating_sub(activations),
        }
    }

    /// Why the engine can't run a policy, by the name of its preset, under a schedule; `None` where it can.
    #[must_use]
    pub fn refuses(&self, preset: &str, schedule: Schedule) -> Option<String> {
        let engine = self.engine.as_ref()?;
        if !runs_policy(engine, preset) {
            return Some(format!(
                "{} can't run the policy {preset} (it has {})",
                engine.name,
                engine.policies.join(", ")
            ));
        }
        let kind = schedule.to_string();
        let kind = kind.split(':').next().unwrap_or_default();
        let known = engine.schedules.iter().any(|s| s == kind);
        (!known).then(|| {
            format!(
                "{} has no {kind} schedule (it has {})",
                engine.name,
                engine.schedules.join(", ")
            )
        })
    }
}

/// What one of the groups of devices holds that have a part of the layers each.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stage {
    /// Its share of the layers, and so of the caches.
    pub part: f64,
    /// Its weights on one device.
    pub weights: Bytes,
}

impl Stage {
    /// The two groups of `pp` that can be the fullest: one with an end of the model, and one between with more layers. The
    /// embedding lies on the first group and the head on the last, on both where one table serves as both; layers that
    /// don't divide go to groups between before they go to an end, as vLLM and splits by free memory have it.
    #[must_use]
    pub fn of(model: &Model, setup: Setup, pp: u32) -> [Self; 2] {
        let pp = pp.max(1);
        let (each, rest) = (model.layers / pp, model.layers % pp);
        let ends = model.parameters() - u64::from(model.layers) * model.layer_linear_parameters();
        let end = if pp == 1 || model.tied_embeddings { ends } else { ends / 2 };
        let stage = |layers: u32, end: u64| Self {
            part: f64::from(layers) / f64::from(model.layers.max(1)),
            weights: setup.weights.bytes(u64::from(layers) * model.layer_linear_parameters())
                + setup.head.bytes(end),
        };
        let at_an_end = each + u32::from(rest > pp.saturating_sub(2));
        let between = if pp > 2 { each + u32::from(rest > 0) } else { 0 };
        [stage(at_an_end, end), stage(between, 0)]
    }

    /// The fuller of [`Self::of`] where the caches of all layers take `kv`.
    #[must_use]
    pub fn fullest(model: &Model, setup: Setup, pp: u32, kv: Bytes) -> Self {
        let [end, between] = Self::of(model, setup, pp);
        let total = |s: &Self| s.weights.0 as f64 + s.part * kv.0 as f64;
        if total(&between) > total(&end) { between } else { end }
    }
}

/// Whether an engine can run a policy, by the name of its preset.
#[must_use]
pub fn runs_policy(engine: &Engine, preset: &str) -> bool {
    let name = preset.split(':').next().unwrap_or_default();
    engine.policies.iter().any(|p| p == "*" || p == name)
}

/// Whether matrix products rest on anything measured.
fn knows_products(kernels: &GpuKernels, model: &Model, setup: Setup) -> bool {
    let kind = OpKind::Gemm {
        n: model.qkv_width(),
        k: u64::from(model.hidden),
        weights: setup.weights,
        accumulate: false,
    };
    let lanes = Lanes::One(Lane { sequences: 1, rows: 1, ..Lane::default() });
    let op = Op { name: "qkv", kind, dtype: setup.activations, lanes, branch: Branch::All };
    kernels.launch(&op, Phase::Decode, 0).source != Source::Roofline
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Load;
    use crate::lower::lower;
    use crate::plan::Bound;
    use crate::policy::{Full, Preset};
    use crate::profile::Catalog;
    use crate::serve::Deployment;

    fn parts() -> (Catalog, Model, Gpu, Engine) {
        let catalog = Catalog::built_in();
        let model = catalog.model("llama-3.1-8b").expect("built in");
        let gpu = catalog.gpu("h100-sxm").expect("built in");
        let engine = catalog.engine("vllm").expect("built in");
        (catalog, model, gpu, engine)
    }

    #[test]
    fn the_hypothetical_engine_is_the_newest_vllm_with_every_policy() {
        let (catalog, _, _, vllm) = parts();
        let ours = catalog.engine("batchmax").expect("built in");
        assert_eq!(ours.generation(None), vllm.generation(None));
        let memory = |e: &Engine| (e.memory_share, e.reserve_bytes, e.kv_block_tokens);
        assert_eq!(memory(&ours), memory(&vllm));
        assert!(runs_policy(&ours, "batch-max:budget=512") && !runs_policy(&vllm, "batch-max"));
    }

    #[test]
    fn a_placement_holds_as_many_sequences_as_a_deployment() {
        let (catalog, model, gpu, engine) = parts();
        let library = Library::new(catalog, Vec::new());
        let placement =
            Placement::new(&model, &gpu, &engine, Choice::default()).expect("it can be placed");
        let policy = Full::default();
        let kernels = GpuKernels::new(&library, gpu.clone(), "vllm", DType::Bf16, DType::Bf16, 1);
        let deployment = Deployment {
            model: &model,
            gpu: &gpu,
            engine: &engine,
            generation: engine.generation(None),
            kernels: &kernels,
            policy: &policy,
            setup: placement.setup,
            pp: 1,
            hit: 0,
        };
        let case = crate::plan::Case {
            placement: &placement,
            policy: &policy,
            isl: 2048,
            osl: 256,
            spread: Default::default(),
            hit: Default::default(),
            schedule: Schedule::Static,
        };
        let (largest, _) = case.largest_batch(1 << 16).expect("it lowers");
        assert_eq!(largest, deployment.capacity(2048, 256).expect("it fits"));
        // Nine tenths less 16.06 GB of weights and 2 GB of reserve, by 144 blocks of 16 tokens of 128 KiB.
        let free = gpu.memory_bytes.0 / 10 * 9 - model.parameters() * 2 - 2_000_000_000;
        assert_eq!(u64::from(largest), free / (144 * 16 * 131_072));
    }

    #[test]
    fn no_batch_is_larger_than_what_an_engine_runs_together() {
        let (_, model, gpu, engine) = parts();
        let placement =
            Placement::new(&model, &gpu, &engine, Choice::default()).expect("it can be placed");
        let policy = Full::default();
        let case = crate::plan::Case {
            placement: &placement,
            policy: &policy,
            isl: 64,
            osl: 16,
            spread: Default::default(),
            hit: Default::default(),
            schedule: Schedule::Static,
        };
        let (largest, over) = case.largest_batch(1 << 16).expect("it lowers");
        assert_eq!((largest, over.bound), (engine.most_sequences, Bound::Sequences));
        let asked = case.largest_batch(7).expect("it lowers");
        assert_eq!((asked.0, asked.1.bound), (7, Bound::Batch));
    }

    #[test]
    fn two_devices_hold_half_of_each_layer_and_two_stages_half_of_the_layers() {
        let (_, model, gpu, engine) = parts();
        let held = |tp, pp| {
            let choice = Choice { tp, pp, ..Choice::default() };
            let placement = Placement::new(&model, &gpu, &engine, choice).expect("it can");
            assert_eq!(placement.devices(), tp * pp);
            let load = Load::uniform(2, 1600, 1, Schedule::Static);
            let program = lower(&placement.model, &Full::default(), &load, placement.setup);
            placement.footprint(&program.expect("it lowers"))
        };
        let (one, shared, staged) = (held(1, 1), held(2, 1), held(1, 2));
        assert_eq!(one.kv_prefill_peak, Bytes(2 * 1600 * 131_072));
        assert_eq!(shared.kv_prefill_peak, Bytes(1600 * 131_072));
        assert_eq!(staged.kv_prefill_peak, Bytes(1600 * 131_072));
        assert_eq!(shared.weights.0, one.weights.0 / 2);
        // Half of the layers and one of the two embeddings.
        assert_eq!(staged.weights.0, one.weights.0 / 2);
        assert_eq!(
            (one.bookkeeping, one.activations + one.runtime),
            (Bytes(0), Bytes(2_000_000_000))
        );
    }

    #[test]
    fn what_an_engine_lacks_is_refused_by_name() {
        let (catalog, model, gpu, engine) = parts();
        let int2 = Choice { kv: Some(DType::Int2), ..Choice::default() };
        let error = Placement::new(&model, &gpu, &engine, int2).expect_err("vllm has no int2");
        assert_eq!(error, "vllm has no caches in int2 (it has f16, bf16, fp8)");
        let odd = Choice { tp: 3, ..Choice::default() };
        assert!(Placement::new(&model, &gpu, &engine, odd).expect_err("3").contains("32 heads"));
        let placement =
            Placement::new(&model, &gpu, &engine, Choice::default()).expect("it can be placed");
        let preset = Preset::parse(&catalog, "snapkv").expect("built in");
        let why = placement.refuses(&preset.name, Schedule::Static).expect("refused");
        assert_eq!(why, "vllm can't run the policy snapkv (it has full)");
        assert_eq!(placement.refuses("full", Schedule::Static), None);
    }

    #[test]
    fn a_device_without_any_timed_kernel_falls_back_to_its_data_sheet() {
        let (catalog, model, gpu, engine) = parts();
        let placement =
            Placement::new(&model, &gpu, &engine, Choice::default()).expect("it can be placed");
        let source = |library: &Library| {
            let cost = placement.cost(library);
            let kind = OpKind::Gemm { n: 6144, k: 4096, weights: DType::Bf16, accumulate: false };
            let lanes = Lanes::One(Lane { sequences: 8, rows: 1, ..Lane::default() });
            let op = Op { name: "qkv", kind, dtype: DType::Bf16, lanes, branch: Branch::All };
            (cost.launch(&op, Phase::Decode, 0).source, cost.common_stddev())
        };
        let none = Library::only(catalog.clone(), Vec::new());
        assert_eq!(source(&none), (Source::Roofline, 0.0));
        let (timed, common) = source(&Library::new(catalog, Vec::new()));
        assert!(timed < Source::Extrapolated && common > 0.0, "{timed:?}");
    }
}
