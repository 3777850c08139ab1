//! What the executor's tests share: the default model, a way to run a policy over prompts, the reference values.

#![allow(dead_code, reason = "every test binary uses another part")]
#![allow(clippy::print_stderr, reason = "a skipped test says so")]

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use batchmax_exec::load::Checkpoint;
use batchmax_exec::weights::Weights;
use batchmax_exec::{Engine, RunOptions, RunResult, fetch, load_of};
use batchmax_sim::kv::KvLayout;
use batchmax_sim::load::Schedule;
use batchmax_sim::lower::{Setup, lower};
use batchmax_sim::op::DType;
use batchmax_sim::policy::Policy;
use batchmax_sim::profile::{Catalog, Model};
use serde_json::Value;

/// The default model's file: given, fetched before, or fetched now. `None` (loudly) where it can't be had.
pub fn default_model() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("BATCHMAX_TEST_MODEL") {
        return Some(PathBuf::from(path));
    }
    let data = std::env::var_os("XDG_DATA_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|h| Path::new(&h).join(".local/share")))?;
    match fetch::fetch_default(&data.join("batchmax"), &mut |_| {}) {
        Ok(path) => Some(path),
        Err(error) => {
            eprintln!("SKIPPED: the default model can't be had: {error}");
            None
        }
    }
}

/// The default model with f32 weights on two threads.
pub fn engine() -> Option<Engine> {
    engine_of(DType::F32, DType::F32)
}

/// The default model with weights of a type, embedding and head of another.
pub fn engine_of(weights: DType, head: DType) -> Option<Engine> {
    let checkpoint = Checkpoint::open(&default_model()?).expect("the fetched model opens");
    let weights = Weights::load(&checkpoint, weights, head).expect("the fetched model loads");
    Some(Engine::new(checkpoint.model().clone(), weights, 2))
}

/// A small made-up model of the default one's kind.
pub fn small() -> Engine {
    let mut model = small_model();
    model.name = "small".to_owned();
    let weights = Weights::synthetic(&model, DType::F32).expect("executable");
    Engine::new(model, weights, 2)
}

/// Its shape.
pub fn small_model() -> Model {
    let mut model = Catalog::built_in().model("smollm2-135m").expect("built in");
    model.layers = 3;
    model.vocab = 512;
    model.hidden = 192;
    model.ffn = 320;
    model.heads = 6;
    model.kv_heads = 2;
    model.head_dim = 32;
    model
}

/// The CPU's types with a cache of `kv`.
pub fn setup(kv: DType) -> Setup {
    Setup {
        kv: KvLayout { dtype: kv, block_tokens: 32, shares_prefix: false },
        weights: DType::F32,
        activations: DType::F32,
        head: DType::F32,
        tp: 1,
    }
}

/// Runs a policy over prompts and keeps everything.
pub fn run(
    engine: &Engine,
    policy: &dyn Policy,
    prompts: &[Vec<u32>],
    osl: u32,
    schedule: Schedule,
    kv: DType,
) -> RunResult {
    let load = load_of(prompts, osl, schedule);
    let program = lower(&engine.model, policy, &load, setup(kv)).expect("lowers");
    let options = RunOptions { keep_details: true, ..RunOptions::default() };
    engine
        .run(&program, prompts, &options, &AtomicBool::new(false), &mut |_, _| {})
        .expect("runs within its own prediction")
}

/// Deterministic token ids.
pub fn made_up(length: usize, seed: u32, vocab: u32) -> Vec<u32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % vocab
        })
        .collect()
}

/// A file of reference values.
pub struct Golden(Value);

impl Golden {
    /// From `tests/golden/` at the root.
    pub fn read(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
        let text =
            std::fs::read_to_string(path).expect("the reference values are in the repository");
        Self(serde_json::from_str(&text).expect("JSON"))
    }

    /// The prompts.
    pub fn prompts(&self) -> &[Value] {
        self.0["prompts"].as_array().expect("prompts")
    }
}

/// A list of numbers.
pub fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("list").iter().map(|v| v.as_f64().expect("number")).collect()
}

/// A list of token ids or positions.
pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("list").iter().map(|v| v.as_u64().expect("id") as u32).collect()
}

/// Tokens must agree up to the first step whose two best logits are closer than `gap`.
pub fn assert_greedy(what: &str, ours: &[u32], golden: &Value, gap: f64) {
    // The files name them differently.
    let either =
        |a: &str, b: &str| if golden[a].is_null() { golden[b].clone() } else { golden[a].clone() };
    let theirs = ids(&either("greedy32", "greedy"));
    let gaps = numbers(&either("greedy_gap", "gap"));
    let sure = gaps.iter().position(|g| *g < gap).unwrap_or(gaps.len());
    assert_eq!(ours[..sure], theirs[..sure], "{what}: first {sure} tokens");
}

/// Largest difference of the best fifty logits.
pub fn worst_logit(logits: &[f32], golden: &Value) -> f64 {
    let (best, values) = (ids(&golden["top50_ids"]), numbers(&golden["top50_logits"]));
    best.iter()
        .zip(&values)
        .map(|(id, expected)| (f64::from(logits[*id as usize]) - expected).abs())
        .fold(0.0, f64::max)
}

/// Positions from runs `[start, length, start, length, ...]`.
pub fn from_runs(value: &Value) -> Vec<u32> {
    ids(value).chunks(2).flat_map(|r| r[0]..r[0] + r[1]).collect()
}

/// How many of the kept positions of layers 0, 15 and 29 agree, and of how many.
pub fn overlap(
    kept: &[Vec<Vec<u32>>],
    theirs: impl Fn(usize, usize) -> Vec<u32>,
) -> (usize, usize) {
    let (mut equal, mut all) = (0, 0);
    for layer in [0usize, 15, 29] {
        for (head, ours) in kept[layer].iter().enumerate() {
            let theirs = theirs(layer, head);
            assert_eq!(ours.len(), theirs.len(), "layer {layer}, head {head}");
            all += ours.len();
            equal += ours.iter().filter(|p| theirs.contains(p)).count();
        }
    }
    (equal, all)
}
