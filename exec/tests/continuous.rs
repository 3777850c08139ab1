//! Sequences that join and leave get the same tokens, caches and memory as alone.

mod common;

use std::sync::atomic::AtomicBool;

use batchmax_exec::{RunOptions, RunResult};
use batchmax_sim::load::{Group, Load, Schedule};
use batchmax_sim::lower::lower;
use batchmax_sim::memory::kv_peaks;
use batchmax_sim::op::DType;
use batchmax_sim::policy::Preset;
use batchmax_sim::profile::Catalog;
use batchmax_sim::units::Bytes;
use common::{made_up, setup, small};

/// Prompt and answer of each request.
const LENGTHS: [(u32, u32); 6] = [(97, 20), (150, 5), (64, 1), (97, 33), (120, 12), (97, 20)];

const POLICIES: [&str; 12] = [
    "full",
    "full:chunk=48",
    "batch-max:budget=64,chunk=48",
    "h2o:budget=64",
    "snapkv:budget=50%",
    "streaming-llm:budget=64",
    "kivi:group=32,residual=32",
    "quest:budget=32",
    "clusterkv:budget=32",
    "refreshkv:budget=32,every=3",
    "specache:fetch=16,group=32,residual=32",
    "cacheblend:chunk=32,suffix=30",
];

fn load(lengths: &[(u32, u32)]) -> Load {
    let group = |&(isl, osl)| Group { sequences: 1, isl, osl, hit: 0 };
    Load::new(lengths.iter().map(group).collect(), Schedule::Continuous { turns: 4 })
}

fn prompts(from: usize, count: usize) -> Vec<Vec<u32>> {
    let one = |i: usize| made_up(LENGTHS[i].0 as usize, i as u32, 512);
    (from..from + count).map(one).collect()
}

fn go(policy: &str, load: &Load, prompts: &[Vec<u32>], budget: Option<Bytes>) -> RunResult {
    let engine = small();
    let preset = Preset::parse(&Catalog::built_in(), policy).expect("a policy");
    let program =
        lower(&engine.model, preset.policy.as_ref(), load, setup(DType::F16)).expect("lowers");
    let options = RunOptions { keep_details: true, kv_budget: budget, ..RunOptions::default() };
    // The engine holds every step to the predicted bytes.
    engine
        .run(&program, prompts, &options, &AtomicBool::new(false), &mut |_, _| {})
        .unwrap_or_else(|e| panic!("{policy}: {e}"))
}

#[test]
fn joining_late_changes_nothing() {
    for policy in POLICIES {
        let mut together = load(&LENGTHS);
        together.admission.places = Some(2);
        let together = go(policy, &together, &prompts(0, LENGTHS.len()), None);
        for (i, joined) in together.sequences.iter().enumerate() {
            let alone = go(policy, &load(&LENGTHS[i..=i]), &prompts(i, 1), None);
            let alone = &alone.sequences[0];
            assert_eq!(joined.generated.len(), LENGTHS[i].1 as usize, "{policy}, request {i}");
            assert_eq!(joined.generated, alone.generated, "{policy}, request {i}");
            assert_eq!(joined.gaps, alone.gaps, "{policy}, request {i}");
            assert_eq!(joined.prompt_logits, alone.prompt_logits, "{policy}, request {i}");
            assert_eq!(joined.refreshed, alone.refreshed, "{policy}, request {i}");
            if LENGTHS[i].1 > 1 {
                assert_eq!(joined.kept, alone.kept, "{policy}, request {i}");
            }
        }
    }
}

#[test]
fn a_budget_of_bytes_holds() {
    let engine = small();
    let preset = Preset::parse(&Catalog::built_in(), "full").expect("a policy");
    let mut requests = load(&LENGTHS);
    let alone = |l: &(u32, u32)| {
        let program = lower(
            &engine.model,
            preset.policy.as_ref(),
            &load(std::slice::from_ref(l)),
            setup(DType::F16),
        )
        .expect("lowers");
        let peaks = kv_peaks(&program);
        peaks.prefill.max(peaks.decode)
    };
    // Room for the two largest, not for three of any kind.
    let mut peaks: Vec<Bytes> = LENGTHS.iter().map(alone).collect();
    peaks.sort_unstable();
    let budget = peaks[peaks.len() - 1] + peaks[peaks.len() - 2];
    requests.admission.kv = Some(budget);
    let result = go("full", &requests, &prompts(0, LENGTHS.len()), Some(budget));
    let peak = result.kv_prefill_peak.max(result.kv_decode_peak);
    assert!(peak <= budget && peak > peaks[peaks.len() - 1], "{peak} of {budget}");
}
