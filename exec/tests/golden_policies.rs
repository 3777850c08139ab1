//! Policies against reference values (f32 weights and cache): kept positions, counts, greedy tokens. The conventions of
//! the references are those of `tests/golden/README.md`.

#![allow(clippy::print_stdout, reason = "how close, for whoever looks")]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use batchmax_exec::observe::Seen;
use batchmax_exec::quality::kl;
use batchmax_exec::sharing::{MeanCaches, cosine, search};
use batchmax_exec::{Engine, RunOptions, RunResult, load_of};
use batchmax_sim::load::Schedule;
use batchmax_sim::lower::lower;
use batchmax_sim::op::{DType, Pooling};
use batchmax_sim::policy::{
    AdaKv, Budget, CacheBlend, ClusterKv, Composed, Cut, DBudgetKv, FastKv, Full, H2o,
    HeavyHitters, Kivi, KvSharer, LagKv, Order, Policy, PyramidKv, Quest, RefreshKv, RocketKv,
    Snap, SnapKv, SpeCache, StreamingLlm, ThinK, Tova,
};
use common::{
    Golden, assert_greedy, engine, from_runs, ids, numbers, overlap, run, setup, worst_logit,
};
use serde_json::Value;

fn kept_of(result: &RunResult) -> &[Vec<Vec<u32>>] {
    result.sequences[0].kept.as_ref().expect("kept")
}

#[test]
fn evicting_policies_keep_what_the_reference_keeps() {
    assert_kept(|budget| {
        let h2o = H2o::new(budget);
        let streaming = StreamingLlm::new(budget);
        let cut = Cut { rerotate: true, ..streaming.cut };
        let rerotated = StreamingLlm { cut, ..streaming };
        let h2o_mean = H2o { by: HeavyHitters { mean: true, ..h2o.by }, ..h2o };
        vec![
            ("h2o", Box::new(h2o)),
            ("h2o_mean", Box::new(h2o_mean)),
            ("streaming", Box::new(StreamingLlm::new(budget))),
            ("streaming_rerotated", Box::new(rerotated)),
            ("snapkv", Box::new(SnapKv::new(budget))),
            ("pyramidkv", Box::new(PyramidKv::new(budget))),
            ("adakv", Box::new(AdaKv::new(budget))),
        ]
    });
}

#[test]
fn layers_keep_what_their_prompt_demands_as_in_the_reference() {
    let Some(engine) = engine() else { return };
    for prompt in &Golden::read("evict.json").prompts()[..1] {
        let orders =
            [("position", Order::Position), ("h2o", Order::H2o), ("h2o_mean", Order::H2oMean)];
        for (order_name, order) in orders {
            for (loss_name, loss) in [("0.01", 0.01), ("0.1", 0.1)] {
                let reference = &prompt["dbudgetkv"][order_name][loss_name];
                // Nothing is known beforehand, so everything may stay.
                let policy = DBudgetKv { loss, order, ..DBudgetKv::default() };
                let prompts = [ids(&prompt["ids"])];
                let result = run(&engine, &policy, &prompts, 32, Schedule::Static, DType::F32);
                let ratios = reference["ratio"].as_array().expect("layers");
                for (layer, (heads, ratio)) in kept_of(&result).iter().zip(ratios).enumerate() {
                    let theirs = reference["counts"][layer].as_u64().expect("a count") as u32;
                    let near = numbers(ratio).iter().any(|r| (r - loss).abs() < 1e-5);
                    for head in heads {
                        let apart = theirs.abs_diff(head.len() as u32);
                        assert!(
                            apart <= if near { 2 } else { 0 },
                            "{order_name} {loss}, layer {layer}: {} for {theirs}",
                            head.len()
                        );
                    }
                }
                let name = format!("dbudgetkv {order_name} {loss}");
                assert_greedy(&name, &result.sequences[0].generated, reference, 0.01);
            }
        }
    }
}

#[test]
fn tova_and_lagkv_keep_what_the_reference_keeps() {
    assert_kept(|budget| {
        vec![("tova", Box::new(Tova::new(budget))), ("lagkv", Box::new(LagKv::new(budget)))]
    });
}

type Named = (&'static str, Box<dyn Policy>);

/// Kept positions after the prefill and greedy tokens of policies under the name that the reference has for them.
fn assert_kept(policies: impl Fn(Budget) -> Vec<Named>) {
    let Some(engine) = engine() else { return };
    for prompt in Golden::read("evict.json").prompts() {
        let number = |key: &str| prompt[key].as_u64().expect("number") as u32;
        let (tokens, long) = (number("budget"), number("len") > 1000);
        for (name, policy) in policies(Budget::Tokens(tokens)) {
            let reference = &prompt[name];
            let prompt_ids = ids(&prompt["ids"]);
            let result =
                run(&engine, policy.as_ref(), &[prompt_ids], 32, Schedule::Static, DType::F32);
            let kept = kept_of(&result);
            if let Some(counts) = reference["counts"].as_array() {
                for (heads, expected) in kept.iter().zip(counts) {
                    let ours: Vec<u32> = heads.iter().map(|h| h.len() as u32).collect();
                    let theirs =
                        expected.as_u64().map_or_else(|| ids(expected), |n| vec![n as u32; 3]);
                    // Heads that share a budget meet near-ties.
                    let apart: u32 = ours.iter().zip(&theirs).map(|(a, b)| a.abs_diff(*b)).sum();
                    assert!(apart <= if name == "adakv" { 2 } else { 0 }, "{name}: {ours:?}");
                }
            }
            let runs =
                |l: usize, h: usize| from_runs(&reference["prefill"][l.to_string()]["kept"][h]);
            let (equal, all) = overlap(kept, runs);
            println!("{name}, {} tokens: {equal} of {all} positions", prompt["len"]);
            assert!(equal as f64 >= 0.99 * all as f64, "{name}: {equal} of {all}");
            if name.starts_with("streaming") {
                assert_eq!(equal, all);
            }
            let gap = if long { 0.05 } else { 0.01 };
            assert_greedy(name, &result.sequences[0].generated, reference, gap);
        }
    }
}

#[test]
fn fastkv_keeps_and_forwards_what_the_reference_does() {
    let Some(engine) = engine() else { return };
    for (prompt, source) in prompts_with_ids() {
        for (name, retain) in [("retain0.1", 0.1), ("retain0.25", 0.25)] {
            let reference = &prompt["fastkv"][name];
            let policy = FastKv { retain, ..FastKv::default() };
            let result = run(
                &engine,
                &policy,
                std::slice::from_ref(&source),
                32,
                Schedule::Static,
                DType::F32,
            );
            let kept = kept_of(&result);
            let counts: Vec<u32> = kept.iter().map(|heads| heads[0].len() as u32).collect();
            assert_eq!(counts, ids(&reference["kept_count_per_layer"]));
            let (mut equal, mut all) = (0, 0);
            for (layer, heads) in reference["kept"].as_object().expect("layers") {
                let layer: usize = layer.parse().expect("a number");
                let heads = heads["positions"].as_array().expect("heads");
                for (ours, theirs) in kept[layer].iter().zip(heads) {
                    let theirs = ids(theirs);
                    all += theirs.len();
                    equal += ours.iter().filter(|p| theirs.contains(p)).count();
                }
            }
            println!("fastkv {name}: {equal} of {all} positions");
            assert!(equal as f64 >= 0.99 * all as f64, "{name}: {equal} of {all}");
            let logits = result.sequences[0].prompt_logits.as_ref().expect("kept");
            let worst = worst_logit(logits, &reference["prefill_logits"]);
            assert!(worst <= 5e-3, "{name}: logits differ by {worst}");
            assert_greedy(name, &result.sequences[0].generated, reference, 0.05);
        }
    }
}

#[test]
fn shared_layers_give_the_reference_tokens() {
    let Some(engine) = engine() else { return };
    for (prompt, source) in prompts_with_ids() {
        for (name, layers) in [("C4", 4), ("C8", 8)] {
            let reference = &prompt["kvsharer"][name];
            let map: Vec<(u32, u32)> = (reference["map"].as_array().expect("pairs").iter())
                .map(|pair| (ids(pair)[0], ids(pair)[1]))
                .collect();
            let maps = BTreeMap::from([(engine.model.name.clone(), map)]);
            let policy = KvSharer { layers, maps, unsearched: false };
            let result = run(
                &engine,
                &policy,
                std::slice::from_ref(&source),
                32,
                Schedule::Static,
                DType::F32,
            );
            let logits = result.sequences[0].prompt_logits.as_ref().expect("kept");
            let worst = worst_logit(logits, &reference["prefill_logits"]);
            println!("kvsharer {name}: logits within {worst:.1e}");
            assert!(worst <= 5e-3, "{name}: logits differ by {worst}");
            assert_greedy(name, &result.sequences[0].generated, reference, 0.05);
        }
    }
}

#[test]
fn layers_that_share_are_found_as_the_reference_finds_them() {
    let Some(engine) = engine() else { return };
    let golden = Golden::read("golden.json");
    let text = golden.prompts().iter().map(|p| ids(&p["ids"])).max_by_key(Vec::len);
    let excerpts: Vec<Vec<u32>> =
        text.expect("prompts")[..1920].chunks(64).map(<[u32]>::to_vec).collect();
    let states = |policy: &dyn Policy, see: &mut dyn FnMut(Seen<'_>)| {
        let load = load_of(&excerpts, 1, Schedule::Static);
        let program = lower(&engine.model, policy, &load, setup(DType::F32)).expect("lowers");
        let mut states = Vec::new();
        let stop = AtomicBool::new(false);
        let seen = engine.observe(&program, &excerpts, &stop, &mut |seen| match seen {
            Seen::Hidden(rows) => states.extend_from_slice(rows),
            qkv @ Seen::Qkv { .. } => see(qkv),
        });
        seen.expect("runs");
        states
    };
    let mut caches = MeanCaches::new(&engine.model, 64);
    let full = states(&Full::default(), &mut |seen| {
        if let Seen::Qkv { layer, rows } = seen {
            caches.add(layer, rows);
        }
    });
    let golden = Golden::read("select.json");
    let reference = &golden.prompts()[0]["kvsharer"];
    let pairs = caches.pairs();
    for (pair, theirs) in
        pairs.iter().zip(reference["top20_pairs_i_j_dist"].as_array().expect("list"))
    {
        let theirs = numbers(theirs);
        assert_eq!((f64::from(pair.layer), f64::from(pair.source)), (theirs[0], theirs[1]));
        assert!((pair.distance - theirs[2]).abs() < 2e-3, "{pair:?} {theirs:?}");
    }
    let trials = search(&pairs, 4, 0.5, &mut |taken| {
        let maps = BTreeMap::from([(engine.model.name.clone(), taken.to_vec())]);
        let policy = KvSharer { layers: taken.len() as u32, maps, unsearched: false };
        Ok::<f64, ()>(cosine(&full, &states(&policy, &mut |_| {}), 64 * 576))
    });
    for (trial, theirs) in
        trials.expect("no error").iter().zip(reference["trail"].as_array().expect("list"))
    {
        let pair = (u64::from(trial.pair.layer), u64::from(trial.pair.source));
        assert_eq!(Some(pair.0), theirs["i"].as_u64());
        assert_eq!(Some(pair.1), theirs["j"].as_u64());
        let cos = theirs["cos"].as_f64().expect("number");
        println!("kvsharer {pair:?}: cosine {:.6}, reference {cos:.6}", trial.cosine);
        assert!((trial.cosine - cos).abs() < 1e-4, "{trial:?}");
    }
}

#[test]
fn max_pooling_keeps_what_rocketkv_keeps_of_a_prompt() {
    let Some(engine) = engine() else { return };
    for (prompt, source) in prompts_with_ids() {
        // One set of parameters per token budget of the system.
        for (name, reference) in prompt["rocketkv"].as_object().expect("budgets") {
            let number = |key: &str| reference["params"][key].as_u64().expect("number") as u32;
            let cut = SnapKv::new(Budget::Tokens(number("prompt_budget"))).cut;
            let pooling = Pooling::Max;
            let by = Snap { window: number("window"), pool: number("kernel"), pooling };
            let policy = SnapKv { cut, by };
            let result = run(
                &engine,
                &policy,
                std::slice::from_ref(&source),
                2,
                Schedule::Static,
                DType::F32,
            );
            let theirs = |l: usize, h: usize| ids(&reference["stage1"][l.to_string()]["kept"][h]);
            let (equal, all) = overlap(kept_of(&result), theirs);
            println!("rocketkv {name}, {} tokens: {equal} of {all} positions", prompt["len"]);
            assert!(equal as f64 >= 0.99 * all as f64, "{name}: {equal} of {all}");
        }
    }
}

/// The prompts of `select.json` with their ids, which `golden.json` has.
fn prompts_with_ids() -> Vec<(Value, Vec<u32>)> {
    let golden = Golden::read("golden.json");
    let of_length = |len: &Value| {
        let same = golden.prompts().iter().find(|p| p["len"] == *len);
        ids(&same.expect("a prompt of this length")["ids"])
    };
    let select = Golden::read("select.json");
    select.prompts().iter().map(|p| (p.clone(), of_length(&p["len"]))).collect()
}

#[test]
fn choosing_policies_give_the_reference_tokens() {
    let Some(engine) = engine() else { return };
    for (prompt, source) in prompts_with_ids() {
        let budget = Budget::Tokens(128);
        let quest = |per_head, newest| Quest { budget, page: 16, per_head, newest };
        let rocket = |budget| RocketKv { budget, answer: 32, window: 32, pool: 63 };
        let policies: [(&Value, Box<dyn Policy>); 5] = [
            (&prompt["rocketkv"]["t256"], Box::new(rocket(Budget::Tokens(256)))),
            (&prompt["quest"]["query_forced"], Box::new(quest(true, true))),
            (&prompt["quest"]["query_free"], Box::new(quest(true, false))),
            (&prompt["quest"]["kv_forced"], Box::new(quest(false, true))),
            (&prompt["clusterkv"], Box::new(ClusterKv { budget, sinks: 16, per_cluster: 80 })),
        ];
        for (reference, policy) in policies {
            let result = run(
                &engine,
                policy.as_ref(),
                std::slice::from_ref(&source),
                32,
                Schedule::Static,
                DType::F32,
            );
            let generated = &result.sequences[0].generated;
            let same =
                generated.iter().zip(ids(&reference["greedy"])).take_while(|(a, b)| **a == *b);
            println!("{}: {} of 32 tokens", policy.label(), same.count());
            assert_greedy(&policy.label(), generated, reference, 0.05);
        }
    }
}

/// Generated tokens, and the logits of the first step after the prompt.
fn with_first_step(
    engine: &Engine,
    policy: &dyn Policy,
    prompt: &[u32],
    osl: u32,
) -> (Vec<u32>, Vec<f32>) {
    let prompts = [prompt.to_vec()];
    let load = load_of(&prompts, osl, Schedule::Static);
    let program = lower(&engine.model, policy, &load, setup(DType::F32)).expect("lowers");
    let (options, stop) = (RunOptions::default(), AtomicBool::new(false));
    let mut logits = Vec::new();
    let result =
        engine.run_watched(&program, &prompts, &options, &stop, &mut |_, _| {}, &mut |c| {
            if c.index == 1 {
                logits = c.logits.to_vec();
            }
        });
    (result.expect("runs").sequences[0].generated.clone(), logits)
}

#[test]
fn packed_caches_give_the_reference_tokens() {
    let Some(engine) = engine() else { return };
    let (prompt, source) = prompts_with_ids().swap_remove(0);
    for (bits, residual, osl) in [(2, 32, 48), (2, 128, 32), (4, 32, 48), (4, 128, 32)] {
        let name = format!("b{bits}_g32_R{residual}_f16");
        let reference = &prompt["kivi"][&name];
        let policy = Kivi { bits, group: 32, residual, swapped: false };
        let (generated, logits) = with_first_step(&engine, &policy, &source, osl);
        let worst = worst_logit(&logits, &reference["step1_logits"]);
        println!("kivi {name}: logits within {worst:.1e}");
        assert!(worst <= 5e-2, "{name}: logits differ by {worst}");
        assert_greedy(&name, &generated, reference, 0.1);
    }
}

#[test]
fn pruned_channels_give_the_reference_tokens() {
    let Some(engine) = engine() else { return };
    let (prompt, source) = prompts_with_ids().swap_remove(0);
    let reference = &prompt["think_snapkv"]["recent32"];
    let snap = SnapKv::new(Budget::Share(0.5));
    let snap = SnapKv { by: Snap { window: 64, ..snap.by }, ..snap };
    let think = ThinK { drop: 0.5, window: 32, recent: 32 };
    let policy = Composed::new(vec![Arc::new(snap), Arc::new(think)]).expect("go together");
    let (generated, logits) = with_first_step(&engine, &policy, &source, 32);
    let worst = worst_logit(&logits, &reference["step1_logits"]);
    println!("think after snapkv: logits within {worst:.1e}");
    assert!(worst <= 5e-3, "logits differ by {worst}");
    assert_greedy("think after snapkv", &generated, reference, 0.05);
}

#[test]
fn refreshkv_refreshes_where_the_reference_does() {
    let Some(engine) = engine() else { return };
    for prompt in Golden::read("evict.json").prompts() {
        for (name, before_rope) in [("refreshkv", false), ("refreshkv_before_rope", true)] {
            let reference = &prompt[name];
            let budget = Budget::Tokens(reference["k"].as_u64().expect("number") as u32);
            let policy = RefreshKv { before_rope, ..RefreshKv::new(budget) };
            let source = ids(&prompt["ids"]);
            let result = run(&engine, &policy, &[source], 32, Schedule::Static, DType::F32);
            let result = &result.sequences[0];
            let gap = numbers(&reference["greedy_gap"]).iter().position(|g| *g < 0.01);
            let sure = gap.unwrap_or(32) as u32;
            let cosines = if before_rope { "cos_before_rope" } else { "cos" };
            let (mut compared, mut all) = (0, 0);
            for check in reference["checks"].as_array().expect("checks") {
                let step = check["step"].as_u64().expect("number") as u32;
                // A cosine at the threshold may fall either way, and what comes later with it.
                if numbers(&check[cosines]).iter().any(|c| (c - 0.85).abs() < 1e-4) || step > sure {
                    break;
                }
                let layers: Vec<u32> =
                    result.refreshed.iter().filter(|(s, _)| *s == step).map(|r| r.1).collect();
                assert_eq!(layers, ids(&check["full_layers"]), "{name}, step {step}");
                compared += 30;
                all += layers.len();
            }
            println!(
                "{name}, {} tokens: {all} of {compared} compared layers refresh",
                prompt["len"]
            );
            assert_greedy(name, &result.generated, reference, 0.01);
        }
    }
}

#[test]
fn specache_gives_the_reference_tokens_and_guesses() {
    let Some(engine) = engine() else { return };
    for (prompt, source) in prompts_with_ids() {
        let reference = &prompt["specache"];
        let policy = SpeCache { bits: 2, group: 64, residual: 64, fetch: 64, whole: true };
        let prompts = std::slice::from_ref(&source);
        let result = run(&engine, &policy, prompts, 32, Schedule::Static, DType::F32);
        let ours = &result.sequences[0];
        let theirs = ids(&reference["greedy"]);
        let same = ours.generated.iter().zip(&theirs).take_while(|(a, b)| a == b).count();
        // Guesses are comparable as long as the tokens are.
        let guesses = ids(&reference["speculative_tokens"]);
        let alike = ours.guesses.iter().zip(&guesses).take(same).filter(|(a, b)| a == b).count();
        let tier = result.tier;
        println!(
            "specache, {} tokens: {same} of 32 tokens, {alike} of {} guesses; {} fetched, busy {:.1} ms, waited {:.1} ms of {:.0} ms",
            prompt["len"],
            same.min(31),
            tier.fetched,
            tier.busy.0 * 1e3,
            tier.waited.0 * 1e3,
            result.decode.0 * 1e3,
        );
        assert_greedy("specache", &ours.generated, reference, 0.1);
        assert!(alike as f64 >= 0.9 * same.min(31) as f64, "{alike} guesses");
    }
}

#[test]
fn cacheblend_computes_anew_what_the_reference_does() {
    let Some(engine) = engine() else { return };
    for (prompt, source) in prompts_with_ids() {
        for suffix in [1, 128] {
            let name = format!("suffix{suffix}");
            let reference = &prompt["cacheblend"][&name];
            if reference.is_null() {
                continue;
            }
            let blend = |recompute| {
                let policy = CacheBlend { recompute, suffix, chunk: 128, check: 1 };
                let source = std::slice::from_ref(&source);
                run(&engine, &policy, source, 32, Schedule::Static, DType::F32)
            };
            let result = blend(0.16);
            let (ours, theirs) = (&result.sequences[0].forwarded, ids(&reference["recomputed"]));
            let equal = ours.iter().filter(|p| theirs.contains(p)).count();
            assert_eq!(ours.len(), theirs.len());
            assert!(equal as f64 >= 0.99 * theirs.len() as f64, "{equal} of {}", theirs.len());
            let logits = |r: &RunResult| r.sequences[0].prompt_logits.clone().expect("kept");
            let worst = worst_logit(&logits(&result), &reference["prefill_logits"]);
            assert!(worst <= 5e-3, "{name}: logits differ by {worst}");
            assert_greedy(&name, &result.sequences[0].generated, reference, 0.05);
            let source = std::slice::from_ref(&source);
            let full = run(&engine, &Full::default(), source, 1, Schedule::Static, DType::F32);
            let losses = reference["kl_full_vs_blend_by_r"].as_object().expect("shares");
            for (recompute, expected) in losses {
                let expected = expected.as_f64().expect("number");
                let found =
                    kl(&logits(&full), &logits(&blend(recompute.parse().expect("a share"))));
                println!("cacheblend {name}, {recompute}: KL {found}, reference {expected}");
                assert!((found - expected).abs() <= 0.02 * expected + 1e-5, "{recompute}: {found}");
            }
        }
    }
}
