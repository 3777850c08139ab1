//! Every policy, its parameters cut down to prompts that the emulated device can read.

use batchmax_exec::cuda::CudaEngine;
use batchmax_exec::{Engine, RunOptions};
use batchmax_sim::load::Schedule;
use batchmax_sim::op::DType;

use super::{Case, Logits, compare, device, engines, on_cpu, on_device, tiny};

/// The same numbers in another order differ by a few units in the last place of single precision; where that tips a rounding
/// to a half, a key or a value changes by 2^-11 of itself, and a logit, which is a sum over 64 channels of size one behind
/// three layers of such, by some thousandths.
pub(super) const HALVES: f32 = 0.01;

const WHOLE: &[&str] = &["full"];
const BY_TOKEN: &[&str] = &[
    "streaming-llm:budget=40,chunk=32,slack=2",
    "streaming-llm:budget=40,chunk=32,slack=2,rerotate=true",
    "batch-max:budget=40,chunk=32,recent=8,slack=2",
    "knorm:budget=50%,recent=8",
    "keydiff:budget=40,chunk=32,recent=8",
    "random:budget=50%",
    "lagkv:budget=50%,lag=16",
    "duoattention:sinks=8,recent=24",
];
const BY_ATTENTION: &[&str] = &[
    "snapkv:budget=50%,window=8",
    "snapkv-after-prefill:budget=50%,window=8",
    "pyramidkv:budget=50%,window=8,pyramid=2",
    "adakv:budget=50%,window=8",
    "h2o:budget=50%,slack=2",
    "h2o:budget=50%,slack=2,mean=true",
    "tova:budget=50%,slack=2",
    "expected-attention:budget=50%,future=32",
    "dbudgetkv",
];
const PACKED: &[&str] =
    &["kivi:residual=32", "kivi:residual=32,bits=2", "kv-int8", "kv-int4", "kv-int2"];
const CHANNELS: &[&str] = &["think:window=8,recent=16", "think:window=8,recent=16,drop=0.3"];
const CHOSEN: &[&str] = &[
    "quest:budget=50%,page=8",
    "quest:budget=50%,page=8,per_head=true",
    "rocketkv:budget=50%,window=8,pool=7",
    "clusterkv:budget=100%,sinks=4,per_cluster=8",
];
const PARTIAL: &[&str] =
    &["refreshkv:budget=25%,every=2", "refreshkv:budget=90%,every=3,similarity=0.2"];
const AHEAD: &[&str] = &["specache:residual=32,fetch=8"];
const CHUNKS: &[&str] = &["cacheblend:chunk=16,suffix=16,recompute=0.3"];
const FORWARD: &[&str] = &["fastkv:retain=0.4,forward=0.5"];
const STATE: &[&str] = &["less:budget=50%,rank=4,hidden=16,slack=2"];
const SHARED: &[&str] = &["kvsharer:layers=1"];
const COMBINED: &[&str] = &[
    "snapkv:budget=50%,window=8+kivi:residual=32",
    "snapkv:budget=50%,window=8+think:window=8,recent=16",
    "snapkv:budget=50%,window=8+think:window=8,recent=16+kivi:residual=32",
    "cacheblend:chunk=16,suffix=16+snapkv:budget=50%,window=8",
    "kvsharer:layers=1+snapkv:budget=50%,window=8",
    "fastkv:retain=0.6,forward=0.7+kivi:residual=32",
    "cacheblend:chunk=16,suffix=16+kivi:residual=32",
    "less:budget=50%,rank=4,hidden=16,slack=2+kivi:residual=32",
    "h2o:budget=50%,slack=2+kv-int4",
];

/// All of them.
pub(super) const EVERY: &[&[&str]] = &[
    WHOLE,
    BY_TOKEN,
    BY_ATTENTION,
    PACKED,
    CHANNELS,
    CHOSEN,
    PARTIAL,
    AHEAD,
    CHUNKS,
    FORWARD,
    STATE,
    SHARED,
    COMBINED,
];

fn all(policies: &[&str]) {
    all_within(policies, HALVES);
}

fn all_within(policies: &[&str], tolerance: f32) {
    all_over(policies, &[70, 97], tolerance);
}

fn all_over(policies: &[&str], prompts: &[usize], tolerance: f32) {
    let Some(mut driver) = device() else { return };
    let model = tiny();
    let (engine, weights) = engines(&model);
    {
        let mut cuda =
            CudaEngine::new(&mut driver, model, weights, DType::F32).expect("room for weights");
        for policy in policies {
            let (kv, schedule) = (DType::F16, Schedule::Static);
            let case = Case { policy, prompts, osl: 6, schedule, kv, tolerance };
            compare(&engine, &mut cuda, &case);
        }
    }
    assert_eq!(driver.leaks(), [], "given back");
}

#[test]
fn all_tokens_stay() {
    all(WHOLE);
}

#[test]
fn tokens_go_by_what_is_known_of_each() {
    all(BY_TOKEN);
}

#[test]
fn tokens_go_by_attention() {
    all(BY_ATTENTION);
}

#[test]
fn old_tokens_are_packed() {
    all(PACKED);
}

#[test]
fn channels_are_dropped() {
    all(CHANNELS);
}

#[test]
fn steps_read_a_choice() {
    all(CHOSEN);
    all_over(&[CLUSTERS], &[61, 97], HALVES);
}

const CLUSTERS: &str = "clusterkv:budget=50%,sinks=4,per_cluster=8";

/// At these lengths a key is as near to one centre as to another (on a CPU with AVX2), and a last bit decides which cluster it is in, so that other
/// tokens are read. Which they are is no fault of the device: the CPU does the same once its norms are a millionth larger or
/// smaller.
#[test]
fn keys_between_two_centres_go_to_either() {
    let Some(mut driver) = device() else { return };
    let model = tiny();
    let (engine, weights) = engines(&model);
    let nudged = [-1e-6f32, 1e-6, 3e-7, -3e-7, 5e-6].map(|by| {
        let (_, mut weights) = engines(&model);
        let norms = weights.layers.iter_mut().flat_map(|layer| &mut layer.attention_norm);
        norms.for_each(|x| *x *= 1.0 + by);
        Engine::new(model.clone(), weights, 1)
    });
    let mut cuda =
        CudaEngine::new(&mut driver, model.clone(), weights, DType::F32).expect("room for weights");
    for length in [64, 70, 72, 80] {
        let (kv, schedule) = (DType::F16, Schedule::Static);
        let prompts = &[length][..];
        let case = Case { policy: CLUSTERS, prompts, osl: 6, schedule, kv, tolerance: HALVES };
        let program = case.program(&model);
        let (cpu, expected) = on_cpu(&engine, &case, &program, &RunOptions::default());
        let forced = cpu.sequences.iter().map(|s| s.generated.clone()).collect();
        let options = RunOptions { forced, ..RunOptions::default() };
        let (_, found) = on_device(&mut cuda, &case, &program, &options);
        if apart(&found, &expected) <= HALVES {
            continue;
        }
        let others = nudged.iter().map(|engine| on_cpu(engine, &case, &program, &options).1);
        let nearest = others.map(|other| apart(&found, &other)).fold(f32::INFINITY, f32::min);
        assert!(nearest <= HALVES, "{length} tokens: {nearest} from the nearest");
    }
}

/// The largest difference of a logit.
fn apart(a: &Logits, b: &Logits) -> f32 {
    let pairs = a.iter().zip(b).flat_map(|(a, b)| a.1.iter().zip(&b.1));
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn partial_caches_stand_beside() {
    all(PARTIAL);
}

#[test]
fn rows_look_ahead() {
    all(AHEAD);
}

#[test]
fn chunks_are_taken_over() {
    all(CHUNKS);
}

#[test]
fn some_rows_go_on() {
    all(FORWARD);
}

#[test]
fn dropped_tokens_leave_a_state() {
    all(STATE);
}

#[test]
fn layers_share_caches() {
    all(SHARED);
}

#[test]
fn policies_go_together() {
    all(COMBINED);
}
