//! Whole runs: what memory holds, what saturates, what is refused.

use batchmax_sim::cost::GpuKernels;
use batchmax_sim::engine::Engine;
use batchmax_sim::kv::KvLayout;
use batchmax_sim::lower::Setup;
use batchmax_sim::op::DType;
use batchmax_sim::policy::Preset;
use batchmax_sim::profile::{Catalog, Gpu, Model};
use batchmax_sim::serve::{Arrival, Deployment, Run, ServeError};
use batchmax_sim::surface::Library;

struct Place {
    model: Model,
    gpu: Gpu,
    engine: Engine,
    kernels: GpuKernels,
    preset: Preset,
    setup: Setup,
    pp: u32,
    hit: u32,
}

fn place(model: &str, gpu: &str, tp: u32, policy: &str) -> Place {
    let catalog = Catalog::built_in();
    let library = Library::new(catalog.clone(), Vec::new());
    let whole = catalog.model(model).expect("shipped");
    let gpu = catalog.gpu(gpu).expect("shipped");
    let setup = Setup {
        kv: KvLayout { dtype: DType::Bf16, block_tokens: 16, shares_prefix: true },
        weights: DType::Bf16,
        activations: DType::Bf16,
        head: DType::Bf16,
        tp,
    };
    Place {
        model: whole.shard(tp).expect("it divides"),
        kernels: GpuKernels::new(&library, gpu.clone(), "vllm", DType::Bf16, DType::Bf16, tp),
        engine: catalog.engine("vllm").expect("shipped"),
        preset: Preset::parse(&catalog, policy).expect("shipped"),
        gpu,
        setup,
        pp: 1,
        hit: 0,
    }
}

impl Place {
    fn deployment(&self) -> Deployment<'_> {
        Deployment {
            model: &self.model,
            gpu: &self.gpu,
            engine: &self.engine,
            generation: self.engine.generation(None),
            kernels: &self.kernels,
            policy: self.preset.policy.as_ref(),
            setup: self.setup,
            pp: self.pp,
            hit: self.hit,
        }
    }

    fn run(&self, arrival: Arrival, isl: u32, osl: u32) -> Run {
        self.deployment().run(arrival, isl, osl).expect("it fits")
    }
}

#[test]
fn tokens_that_fit_by_hand() {
    let place = place("llama-3.1-8b", "h100-sxm", 1, "full");
    // 0.9 x 81,559 MiB less 8.03e9 parameters of 2 bytes and 2e9 of reserve, over 32 layers x 2 x 8 heads x 128 x 2 B.
    let free = 0.9 * 81_559.0 * 1_048_576.0 - 2.0 * place.model.parameters() as f64 - 2e9;
    let by_hand = free / 131_072.0;
    let tokens = place.deployment().kv_tokens().expect("it fits") as f64;
    assert!((tokens / by_hand - 1.0).abs() < 1e-6, "{tokens} against {by_hand}");
}

#[test]
fn devices_that_share_a_model_hold_more_of_it() {
    let one = place("llama-3.1-8b", "l40s", 1, "full").deployment().kv_tokens().expect("fits");
    let two = place("llama-3.1-8b", "l40s", 2, "full").deployment().kv_tokens().expect("fits");
    assert!(two > 2 * one, "{two} against {one}");
}

#[test]
fn weights_that_do_not_fit_are_refused() {
    let place = place("llama-3.1-70b", "l40s", 1, "full");
    let refused = place.deployment().run(Arrival::Static { batch: 1 }, 128, 16);
    assert!(matches!(refused, Err(ServeError::Weights { .. })), "{refused:?}");
}

#[test]
fn a_static_batch_is_its_prefill_and_its_decode() {
    let place = place("llama-3.1-8b", "h100-sxm", 1, "full");
    let run = place.run(Arrival::Static { batch: 8 }, 1024, 128);
    let total = run.ttft_s + 127.0 * run.tpot_s;
    assert!((run.e2e_s / total - 1.0).abs() < 1e-9);
    assert!((run.output_tok_s - 8.0 * 128.0 / total).abs() < 1e-6);
    assert!((run.total_tok_s - 8.0 * 1152.0 / total).abs() < 1e-6);
    assert!(!run.queued && run.half_width > 0.02);
    // No step is faster than the weights can be read.
    let floor =
        2.0 * place.model.layer_linear_parameters() as f64 * 32.0 / place.gpu.bandwidth_bytes_per_s;
    assert!(run.tpot_s > floor, "{} under {floor}", run.tpot_s);
}

#[test]
fn a_closed_loop_saturates_where_memory_is_full() {
    let place = place("llama-3.1-8b", "l40s", 1, "full");
    let at = |n| place.run(Arrival::Closed { concurrency: Some(n) }, 4096, 256);
    let runs: Vec<Run> = [1, 4, 16, 64, 256].map(at).into();
    for pair in runs.windows(2) {
        assert!(pair[1].output_tok_s > 0.98 * pair[0].output_tok_s, "{pair:?}");
        assert!(pair[1].ttft_s >= pair[0].ttft_s);
    }
    let (last, full) = (&runs[4], &runs[3]);
    assert!(last.batch <= f64::from(last.capacity));
    // Requests beyond what memory holds wait and say so; they add nothing to the throughput.
    assert!(last.queued && last.ttft_s > 2.0 * full.ttft_s);
    assert!((last.output_tok_s / full.output_tok_s - 1.0).abs() < 0.02);
    let offline = place.run(Arrival::Closed { concurrency: None }, 4096, 256);
    assert!((offline.output_tok_s / last.output_tok_s - 1.0).abs() < 0.02);
}

#[test]
fn a_smaller_cache_holds_more_sequences() {
    let full = place("llama-3.1-8b", "l40s", 1, "full");
    let small = place("llama-3.1-8b", "l40s", 1, "batch-max:budget=25%,chunk=1024");
    let capacity = |p: &Place| p.deployment().capacity(8192, 256).expect("fits");
    assert!(capacity(&small) > 2 * capacity(&full));
}
