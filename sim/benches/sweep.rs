//! Configurations per second on one core: what a sweep and a plan are made of.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

use batchmax_sim::cost::{
    CostModel, GpuKernels, Roofline, UnderEngine, predict, roofline::Efficiency,
};
use batchmax_sim::kv::KvLayout;
use batchmax_sim::load::{Load, Schedule};
use batchmax_sim::lower::{Setup, Uniform, lower};
use batchmax_sim::memory::footprint;
use batchmax_sim::metrics::Metrics;
use batchmax_sim::op::DType;
use batchmax_sim::policy::Preset;
use batchmax_sim::profile::Catalog;
use batchmax_sim::program::Program;
use batchmax_sim::surface::Library;
use batchmax_sim::units::Bytes;

fn sweep(c: &mut Criterion) {
    let catalog = Catalog::built_in();
    let model = catalog.model("llama-3.1-8b").expect("shipped");
    let gpu = catalog.gpu("h100-sxm").expect("shipped");
    let engine = catalog.engine("vllm").expect("shipped");
    let library = Library::new(catalog.clone(), Vec::new());
    let setup = Setup {
        kv: KvLayout { dtype: DType::Bf16, block_tokens: 16, shares_prefix: false },
        weights: DType::Bf16,
        activations: DType::Bf16,
        head: DType::Bf16,
        tp: 1,
    };
    let kernels = || GpuKernels::new(&library, gpu.clone(), "vllm", DType::Bf16, DType::Bf16, 1);
    let timed: Box<dyn CostModel> =
        Box::new(UnderEngine::new(Box::new(kernels()), &gpu, &engine, 1));
    let sheet: Box<dyn CostModel> = Box::new(Roofline::new(gpu.clone(), Efficiency::default()));
    for policy in ["full", "batch-max:budget=25%,chunk=1024", "snapkv"] {
        let preset = Preset::parse(&catalog, policy).expect("shipped");
        let policy_of = preset.policy.as_ref();
        let answer = |cost: &dyn CostModel, program: &Program| {
            let timeline = predict(cost, program);
            let memory = footprint(&model, program, Bytes(1 << 30));
            black_box((Metrics::of(program, &timeline), memory));
        };
        for (name, cost) in [("timed kernels", &timed), ("data sheet", &sheet)] {
            let mut group = c.benchmark_group(format!("{policy}, {name}"));
            group.throughput(Throughput::Elements(1));
            let mut batch = 0;
            // Another batch and length each time: nothing is answered from memory.
            group.bench_function("any load", |b| {
                b.iter(|| {
                    batch = batch % 128 + 1;
                    let load = Load::uniform(batch, 4096 + 16 * batch, 256, Schedule::Static);
                    let program =
                        lower(&model, policy_of, &load, setup).expect("it is within the context");
                    answer(cost.as_ref(), &program);
                });
            });
            group.finish();
        }
        // As a plan and a sweep ask: lowered once a length, look-ups remembered; nothing is known before the first.
        let mut group = c.benchmark_group(format!("{policy}, timed kernels"));
        group.throughput(Throughput::Elements(8 * 128));
        group.bench_function("8 lengths x 128 batches", |b| {
            b.iter(|| {
                let kernels = Box::new(kernels().remembering());
                let cost = UnderEngine::new(kernels, &gpu, &engine, 1);
                for length in 0..8 {
                    let load = Load::uniform(1, 4096 + 250 * length, 256, Schedule::Static);
                    let mut programs = Uniform::new(&model, policy_of, &load, setup)
                        .expect("it is within the context");
                    for batch in 1..=128 {
                        answer(&cost, programs.at(batch).expect("a batch"));
                    }
                }
            });
        });
        group.finish();
    }
}

criterion_group!(benches, sweep);
criterion_main!(benches);
