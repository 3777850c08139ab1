//! Laws that every prediction obeys, whatever the numbers behind it: over timed kernels under an engine and over data
//! sheets.

use std::sync::OnceLock;

use batchmax_sim::cost::roofline::Efficiency;
use batchmax_sim::cost::{CostModel, Roofline};
use batchmax_sim::load::{Hit, Schedule};
use batchmax_sim::op::{Branch, DType, Heads, Lane, Lanes, Op, OpKind, Phase};
use batchmax_sim::place::{Choice, Placement};
use batchmax_sim::plan::{Answer, Case};
use batchmax_sim::policy::Preset;
use batchmax_sim::profile::{Catalog, Gpu};
use batchmax_sim::surface::Library;
use batchmax_sim::timeline::Source;
use batchmax_sim::units::Tokens;
use proptest::prelude::*;

const MODELS: [&str; 4] = ["llama-3.1-8b", "qwen2.5-7b", "llama-2-13b", "gemma-2-9b"];
/// Timed, timed, and known by its data sheet alone.
const GPUS: [&str; 3] = ["h100-sxm", "a100-sxm-80gb", "a40"];

/// All surfaces, unpacked once for all cases.
fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| Library::new(Catalog::built_in(), Vec::new()))
}

fn gpu(name: &str) -> Gpu {
    Catalog::built_in().gpu(name).expect("built in")
}

/// What is predicted.
#[derive(Clone, Debug)]
struct Run {
    model: &'static str,
    policy: String,
    batch: u32,
    isl: Tokens,
    osl: Tokens,
    hit: Hit,
    schedule: Schedule,
    tp: u32,
    timed: bool,
}

impl Run {
    fn placement(&self, gpu: &Gpu) -> Placement {
        let catalog = Catalog::built_in();
        let model = catalog.model(self.model).expect("built in");
        let engine = catalog.engine("batchmax").expect("built in");
        let choice = Choice { tp: self.tp, ..Choice::default() };
        Placement::new(&model, gpu, &engine, choice).expect("it can be placed")
    }

    fn cost(&self, placement: &Placement) -> Box<dyn CostModel> {
        if self.timed {
            return placement.cost(library());
        }
        Box::new(Roofline::new(placement.gpu.clone(), Efficiency::default()))
    }

    fn answer(&self, gpu: &Gpu) -> Answer {
        let placement = self.placement(gpu);
        let preset = Preset::parse(&Catalog::built_in(), &self.policy).expect("a policy");
        let case = Case {
            placement: &placement,
            policy: preset.policy.as_ref(),
            isl: self.isl,
            osl: self.osl,
            spread: Default::default(),
            hit: self.hit,
            schedule: self.schedule,
        };
        case.answer(self.batch, self.cost(&placement).as_ref()).expect("it lowers")
    }
}

fn runs() -> impl Strategy<Value = Run> {
    let policies = prop::sample::select(vec![
        "full",
        "batch-max:budget=256,chunk=128",
        "batch-max:budget=50%,chunk=512",
        "snapkv:budget=25%",
        "streaming-llm:budget=512",
    ]);
    let schedules = prop::sample::select(vec![
        Schedule::Static,
        Schedule::Staggered { prefill_batch: 1 },
        Schedule::Staggered { prefill_batch: 3 },
    ]);
    let sizes = (1u32..200, 256u32..3700, 2u32..300);
    let place = (prop::sample::select(vec![1u32, 2]), any::<bool>());
    (prop::sample::select(MODELS.to_vec()), policies, sizes, schedules, place).prop_map(
        |(model, policy, (batch, isl, osl), schedule, (tp, timed))| Run {
            model,
            policy: policy.to_owned(),
            batch,
            isl,
            osl,
            hit: Hit::default(),
            schedule,
            tp,
            timed,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn more_bandwidth_never_slows(
        run in runs(),
        name in prop::sample::select(GPUS.to_vec()),
        factor in 1.0f64..4.0,
    ) {
        let slow = gpu(name);
        let fast =
            Gpu { bandwidth_bytes_per_s: slow.bandwidth_bytes_per_s * factor, ..slow.clone() };
        let (before, after) = (run.answer(&slow).metrics, run.answer(&fast).metrics);
        prop_assert!(after.ttft.0 <= before.ttft.0 * (1.0 + 1e-9), "{before:?} {after:?}");
        prop_assert!(after.tpot.0 <= before.tpot.0 * (1.0 + 1e-9), "{before:?} {after:?}");
    }

    /// On data sheets, where a larger launch never takes less; timed kernels have steps in their shapes.
    #[test]
    fn a_longer_hit_never_raises_ttft_and_leaves_tpot(
        run in runs(),
        shares in (0.0f64..1.0, 0.0f64..1.0),
        name in prop::sample::select(GPUS.to_vec()),
    ) {
        let run = Run { timed: false, ..run };
        // Policies with a window want as many tokens in a prefix.
        let hit = |share: f64| 128 + (f64::from(run.isl - 129) * share) as Tokens;
        let gpu = gpu(name);
        let at = |hit| Run { hit: Hit::Tokens(hit), ..run.clone() }.answer(&gpu).metrics;
        let (less, more) = (hit(shares.0.min(shares.1)), hit(shares.0.max(shares.1)));
        let (none, less, more) = (at(0), at(less), at(more));
        prop_assert!(more.ttft.0 <= less.ttft.0 * (1.0 + 1e-9), "{less:?} {more:?}");
        prop_assert!(less.ttft.0 <= none.ttft.0 * (1.0 + 1e-9), "{none:?} {less:?}");
        prop_assert!((more.tpot.0 / none.tpot.0 - 1.0).abs() < 1e-9, "{none:?} {more:?}");
    }

    #[test]
    fn under_an_engine_a_hit_leaves_tpot(run in runs(), share in 0.0f64..1.0) {
        let run = Run { timed: true, ..run };
        let gpu = gpu("h100-sxm");
        let hit = Hit::Tokens(128 + (f64::from(run.isl - 129) * share) as Tokens);
        let (without, with) = (run.answer(&gpu).metrics, Run { hit, ..run }.answer(&gpu).metrics);
        prop_assert!((with.tpot.0 / without.tpot.0 - 1.0).abs() < 1e-9, "{without:?} {with:?}");
    }

    #[test]
    fn a_larger_batch_never_lowers_memory(run in runs(), more in 1u32..100) {
        let small = run.answer(&gpu("h100-sxm")).footprint;
        let larger = Run { batch: run.batch + more, ..run };
        let large = larger.answer(&gpu("h100-sxm")).footprint;
        prop_assert!(large.kv_prefill_peak >= small.kv_prefill_peak);
        prop_assert!(large.kv_decode_peak >= small.kv_decode_peak);
        prop_assert!(large.total() >= small.total());
    }

    #[test]
    fn a_smaller_budget_never_raises_memory(
        run in runs(),
        budgets in (64u32..2048, 64u32..2048),
        policy in prop::sample::select(vec!["batch-max:chunk=256", "snapkv:window=32", "streaming-llm:sinks=4"]),
    ) {
        let at = |budget: u32| {
            let policy = format!("{policy},budget={budget}");
            Run { policy, ..run.clone() }.answer(&gpu("h100-sxm")).footprint
        };
        let (less, more) = (at(budgets.0.min(budgets.1)), at(budgets.0.max(budgets.1)));
        prop_assert!(less.kv_decode_peak <= more.kv_decode_peak, "{less:?} {more:?}");
        // A budget that nothing reaches needs no positions of what was kept.
        if more.bookkeeping.0 > 0 {
            prop_assert!(less.total() <= more.total(), "{less:?} {more:?}");
        }
    }

    #[test]
    fn no_token_is_faster_than_reading_the_weights(
        run in runs(),
        name in prop::sample::select(GPUS.to_vec()),
    ) {
        let gpu = gpu(name);
        let placement = run.placement(&gpu);
        let model = &placement.model;
        // Every step reads the layers and the head once; the embedding only in its rows.
        let linear = u64::from(model.layers) * model.layer_linear_parameters();
        let head = u64::from(model.vocab) * u64::from(model.hidden);
        let bytes = placement.setup.weights.bytes(linear) + placement.setup.head.bytes(head);
        let floor = bytes.0 as f64 / gpu.bandwidth_bytes_per_s;
        let tpot = run.answer(&gpu).metrics.tpot.0;
        prop_assert!(tpot >= floor, "{tpot} under {floor}");
    }

    #[test]
    fn the_largest_batch_is_exact_and_what_is_asked_beyond_it_is_over(run in runs()) {
        let gpu = gpu("h100-sxm");
        let placement = run.placement(&gpu);
        let preset = Preset::parse(&Catalog::built_in(), &run.policy).expect("a policy");
        let (isl, osl, schedule) = (run.isl, run.osl, run.schedule);
        let policy = preset.policy.as_ref();
        let case = Case { placement: &placement, policy, isl, osl, spread: Default::default(), hit: run.hit, schedule };
        let (largest, over) = case.largest_batch(1 << 16).expect("it lowers");
        let cost = run.cost(&placement);
        if largest > 0 {
            let fits = case.answer(largest, cost.as_ref()).expect("it lowers");
            prop_assert_eq!(fits.over, None);
            prop_assert!(fits.footprint.total() <= placement.limits.memory);
        }
        let next = case.answer(largest + 1, cost.as_ref()).expect("it lowers");
        prop_assert_eq!(next.over, Some(over));
    }
}

fn product(rows: u32) -> Op {
    let kind = OpKind::Gemm { n: 6144, k: 4096, weights: DType::Bf16, accumulate: false };
    let lanes = Lanes::One(Lane { sequences: rows, rows: 1, ..Lane::default() });
    Op { name: "qkv", kind, dtype: DType::Bf16, lanes, branch: Branch::All }
}

fn attention(sequences: u32, kv: Tokens) -> Op {
    let heads = Heads { query: 32, kv: 8, dim: 128, dtype: DType::Bf16, form: Default::default() };
    let kind = OpKind::Attend { heads, window: None };
    let lanes = Lanes::One(Lane { sequences, rows: 1, kv, settled: kv - 1, ..Lane::default() });
    Op { name: "attend", kind, dtype: DType::Bf16, lanes, branch: Branch::All }
}

#[test]
fn the_interval_widens_outside_what_was_timed() {
    let run = Run {
        model: "llama-3.1-8b",
        policy: "full".into(),
        batch: 1,
        isl: 1024,
        osl: 8,
        hit: Hit::default(),
        schedule: Schedule::Static,
        tp: 1,
        timed: true,
    };
    for name in ["h100-sxm", "h200-sxm"] {
        let cost = run.cost(&run.placement(&gpu(name)));
        for (inside, outside) in
            [(product(256), product(1 << 24)), (attention(16, 2048), attention(4096, 1 << 21))]
        {
            let inside = cost.launch(&inside, Phase::Decode, 0);
            let outside = cost.launch(&outside, Phase::Decode, 0);
            assert!(inside.source < Source::Extrapolated, "{name}: {inside:?}");
            assert_eq!(outside.source, Source::Extrapolated, "{name}: {outside:?}");
            assert!(outside.relative_stddev > inside.relative_stddev, "{inside:?} {outside:?}");
        }
    }
    // Of a device that nobody timed all is extrapolated, and wider.
    let (timed, unknown) = (gpu("h100-sxm"), gpu("a40"));
    let width = |gpu: &Gpu| run.answer(gpu).metrics;
    assert!(width(&unknown).error > width(&timed).error);
    assert!(width(&unknown).source >= Source::Extrapolated);
}
