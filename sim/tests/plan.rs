//! Plans whose numbers were worked out by hand, over a cost model of one microsecond a row and a millisecond a step.

use batchmax_sim::cost::{Cost, CostModel};
use batchmax_sim::kv::KvLayout;
use batchmax_sim::load::Schedule;
use batchmax_sim::lower::Setup;
use batchmax_sim::op::{DType, Op, OpKind, Phase};
use batchmax_sim::place::Placement;
use batchmax_sim::plan::{
    Bound, Candidate, Host, LARGEST_BATCH, Limits, Objective, Query, Slo, marks, plan,
};
use batchmax_sim::policy::Preset;
use batchmax_sim::profile::{Catalog, Model};
use batchmax_sim::timeline::Source;
use batchmax_sim::units::{Bytes, Seconds};

struct ByRow;

impl CostModel for ByRow {
    fn launch(&self, op: &Op, _phase: Phase, _step: u32) -> Cost {
        let rows = if matches!(op.kind, OpKind::Embed { .. }) { op.lanes.rows() } else { 0 };
        Cost { seconds: rows as f64 * 1e-6, relative_stddev: 0.1, source: Source::Measured }
    }

    fn step_overhead(&self, _phase: Phase) -> Seconds {
        Seconds(1e-3)
    }
}

/// Two layers of two KV heads of 16 channels in f16: 256 bytes a token.
fn host(caches: u64, usd_per_hour: Option<f64>) -> Host {
    let catalog = Catalog::built_in();
    let model = Model {
        layers: 2,
        hidden: 64,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        ffn: 128,
        vocab: 100,
        context: 512,
        ..catalog.model("llama-3.2-1b").expect("built in")
    };
    let placement = Placement {
        gpu: catalog.gpu("h100-sxm").expect("built in"),
        engine: None,
        model,
        setup: Setup {
            kv: KvLayout { dtype: DType::F16, block_tokens: 16, shares_prefix: false },
            weights: DType::F32,
            activations: DType::F32,
            head: DType::F32,
            tp: 1,
        },
        pp: 1,
        limits: Limits {
            memory: Bytes(1 << 40),
            kv_memory: Some(Bytes(caches)),
            runtime: Bytes(0),
        },
    };
    Host { placement, cost: Box::new(ByRow), usd_per_hour }
}

fn found(hosts: &[Host], policies: &[&str], change: impl FnOnce(&mut Query<'_>)) -> Vec<Candidate> {
    let parse = |p: &&str| Preset::parse(&Catalog::built_in(), p).expect("a policy");
    let policies: Vec<Preset> = policies.iter().map(parse).collect();
    let mut query = Query {
        hosts,
        gpus: 1,
        isl: 64,
        osl: 17,
        spread: Default::default(),
        hit: Default::default(),
        slo: Slo::default(),
        policies: &policies,
        schedules: &[Schedule::Static],
        batch: None,
        smaller: false,
        objective: Objective::Output,
        threads: 2,
    };
    change(&mut query);
    plan(&query).expect("it lowers")
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-9 * b.abs()
}

#[test]
fn the_largest_batch_and_its_times() {
    // 64 + 16 tokens are five blocks, 20,480 bytes a sequence: four fit, the fifth lacks 2,400.
    let list = found(&[host(100_000, None)], &["full"], |_| ());
    let c = &list[0];
    let a = c.answer.as_ref().expect("it fits");
    assert_eq!((a.batch, c.bound, c.missing), (4, Bound::KvDecode, Bytes(2_400)));
    assert_eq!(a.footprint.kv_prefill_peak, Bytes(4 * 64 * 256));
    // 1 ms + 256 rows; 16 steps of 1 ms + 4 rows.
    assert!(close(a.metrics.ttft.0, 1.256e-3) && close(a.metrics.tpot.0, 1.004e-3));
    assert!(close(c.throughput(), 68.0 / (1.256e-3 + 16.064e-3)));
    assert_eq!((c.gpus, c.replicas, c.usd_per_million()), (1, 1, None));
    let (phase, name, share) = c.mostly().expect("a part");
    assert!(phase == Phase::Decode && name == "host" && close(share, 16e-3 / 17.32e-3));
}

#[test]
fn latencies_bind_where_they_are_reached() {
    // 1 ms + 64 us a sequence: three within 1.2 ms.
    let ttft = Slo { ttft: Some(Seconds(1.2e-3)), tpot: None };
    let list = found(&[host(100_000, None)], &["full"], |q| q.slo = ttft);
    assert_eq!(list[0].answer.as_ref().map(|a| a.batch), Some(3));
    assert_eq!(list[0].bound, Bound::Ttft);
    // 1 ms + 1 us a sequence: two within 1.0025 ms.
    let tpot = Slo { ttft: None, tpot: Some(Seconds(1.0025e-3)) };
    let list = found(&[host(100_000, None)], &["full"], |q| q.slo = tpot);
    assert_eq!(list[0].answer.as_ref().map(|a| a.batch), Some(2));
    assert_eq!(list[0].bound, Bound::Tpot);
    let never = Slo { ttft: Some(Seconds(1e-3)), tpot: None };
    let list = found(&[host(100_000, None)], &["full"], |q| q.slo = never);
    assert!(list[0].answer.is_none() && list[0].bound == Bound::Ttft);
    let asked = found(&[host(100_000, None)], &["full"], |q| {
        q.slo = ttft;
        q.batch = Some(4);
    });
    assert!(asked[0].answer.is_none() && asked[0].bound == Bound::Ttft);
}

#[test]
fn copies_multiply_rates_and_rents() {
    let hosts = [host(100_000, Some(2.0)), host(30_000, Some(0.2))];
    let list = found(&hosts, &["full"], |q| q.gpus = 4);
    let (first, second) = (&list[0], &list[1]);
    assert_eq!((first.host, first.replicas, first.gpus), (0, 4, 4));
    let rate = 4.0 * 68.0 / (1.256e-3 + 16.064e-3);
    assert!(close(first.throughput(), rate) && close(first.per_gpu(), rate / 4.0));
    assert!(close(first.usd_per_million().expect("a price"), 8.0 / (rate * 3600.0) * 1e6));
    // The small one holds one sequence at a tenth of the rent: slower, and cheaper by 2.5 at 17.080 ms.
    assert!(close(second.throughput(), 4.0 * 17.0 / (1.064e-3 + 16.016e-3)));
    let by_cost = found(&hosts, &["full"], |q| q.objective = Objective::Cost);
    assert_eq!((by_cost[0].host, by_cost[1].host), (1, 0));
    let by_gpu = found(&hosts, &["full"], |q| q.objective = Objective::PerGpu);
    assert_eq!(by_gpu[0].host, 0);
}

#[test]
fn smaller_batches_are_on_the_front_of_rate_and_latency() {
    let list = found(&[host(100_000, None)], &["full"], |q| q.smaller = true);
    let batches: Vec<_> = list.iter().filter_map(|c| c.answer.as_ref().map(|a| a.batch)).collect();
    assert_eq!(batches, [4, 2, 1]);
    let marks = marks(&list, Objective::Output);
    // 20 KiB less of 400 are memory; 1 us of a millisecond is no latency that anyone could tell.
    assert!(marks.iter().all(|m| m.memory), "{marks:?}");
    assert_eq!(marks.iter().map(|m| m.tpot).collect::<Vec<_>>(), [true, false, false]);
    // Another, worse policy at the same batches is on neither: it takes as long in more memory.
    let both = found(&[host(1 << 20, None)], &["full", "full:chunk=32"], |q| q.batch = Some(4));
    let marks = batchmax_sim::plan::marks(&both, Objective::Output);
    assert_eq!(both[1].policy, "full:chunk=32");
    assert!(marks[0].tpot && !marks[1].tpot, "{marks:?}");
}

#[test]
fn what_does_not_fit_comes_last_with_what_is_missing() {
    let hosts = [host(20_000, None), host(1 << 30, None)];
    let list = found(&hosts, &["full"], |_| ());
    assert_eq!(list[0].host, 1);
    let last = &list[1];
    assert!(last.answer.is_none() && last.value(Objective::Output) == 0.0);
    assert_eq!((last.bound, last.missing), (Bound::NothingFits, Bytes(480)));
    let batch = list[0].answer.as_ref().map(|a| a.batch);
    assert_eq!(batch, Some(52_428), "1 GiB by 20,480 bytes");
    let most = found(&[host(1 << 40, None)], &["full"], |_| ());
    assert_eq!(most[0].answer.as_ref().map(|a| a.batch), Some(LARGEST_BATCH));
    assert_eq!(most[0].bound, Bound::Batch);
}
