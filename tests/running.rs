//! Commands that run, from outside: a model of two layers with made-up weights.
#![cfg(feature = "exec")]

mod common;

use common::{Place, Ran, document, refuses};

fn run(place: &Place, more: &[&str]) -> Ran {
    let mut args = vec!["run", "--model", "tiny.toml", "--weights", "synthetic", "--quiet"];
    args.extend(["--threads", "1"]);
    args.extend(more);
    place.run(&args)
}

#[test]
fn a_small_model_runs_and_reports_what_it_measured() {
    let place = Place::with_tiny();
    let size = ["--isl", "64", "--osl", "8", "--batch", "3", "--json"];
    let json = document(&run(&place, &size).answered(), "run");
    assert_eq!((&json["batch"], &json["synthetic"]), (&3.into(), &true.into()));
    let generated = json["generated"].as_array().expect("a list");
    assert!(
        generated.len() == 3
            && generated.iter().all(|g| g.as_array().is_some_and(|g| g.len() == 8))
    );
    // 3 sequences, 2 layers, 2 KV heads, K and V of 16 channels in f16: 64 + 7 tokens are 3 blocks of 32.
    assert_eq!(json["kv_decode_peak_bytes"], 3 * 2 * 2 * 2 * 16 * 2 * 96);
    let again = document(&run(&place, &size).answered(), "run");
    assert_eq!(again["generated"], json["generated"]);
    assert!(run(&place, &size[..6]).answered().contains("tokens/s"));
}

#[test]
fn requests_join_and_leave_under_a_budget_of_bytes() {
    let place = Place::with_tiny();
    let more = ["--batch", "2", "--schedule", "continuous:3", "--osl-spread", "50%", "--json"];
    let args = [&["--isl", "64", "--osl", "8"], &more[..]].concat();
    let json = document(&run(&place, &args).answered(), "run");
    assert_eq!((&json["batch"], &json["requests"]), (&2.into(), &6.into()));
    let lengths = |json: &serde_json::Value| -> Vec<usize> {
        let generated = json["generated"].as_array().expect("a list");
        generated.iter().map(|g| g.as_array().map_or(0, Vec::len)).collect()
    };
    let lengths = lengths(&json);
    assert!(lengths.len() == 6 && lengths.iter().all(|n| (4..=12).contains(n)), "{lengths:?}");
    // Two sequences of up to 75 tokens, 3 blocks of 32 each, whoever they are.
    assert_eq!(json["kv_decode_peak_bytes"], 2 * 2 * 2 * 2 * 16 * 2 * 96);
    // Prompts of their own lengths join by bytes: 2 blocks, 1 and 1 fit in 3 at no time together.
    place.write("ids.json", format!("[{:?}, [1], [2]]", vec![3; 40]));
    let ids = ["--ids", "ids.json", "--osl", "3", "--schedule", "continuous", "--json"];
    let block = 2 * 2 * 2 * 16 * 2 * 32;
    let budget = format!("{}", 3 * block);
    let json =
        document(&run(&place, &[&ids[..], &["--kv-memory", &budget]].concat()).answered(), "run");
    assert_eq!(json["kv_peak_bytes"], 3 * block);
    assert_eq!(json["generated"].as_array().map(Vec::len), Some(3));
    let refused = run(&place, &["--isl", "8", "--prefix-hit", "4", "--schedule", "continuous"]);
    let refused = refused.refused();
    assert!(refused.contains("a continuous schedule starts with empty caches"), "{refused}");
}

#[test]
fn a_prefix_read_first_changes_no_token() {
    let place = Place::with_tiny();
    let run = |more: &[&str]| {
        let size = ["--isl", "64", "--osl", "8", "--batch", "3", "--json"];
        document(&run(&place, &[&size, more].concat()).answered(), "run")
    };
    let (none, cached) = (run(&[]), run(&["--prefix-hit", "40"]));
    assert_eq!(cached["generated"], none["generated"]);
    // The executor holds the prefix in every sequence.
    assert_eq!(cached["kv_decode_peak_bytes"], none["kv_decode_peak_bytes"]);
    // 40 tokens leave 24, which are read over them; every step holds what was predicted, or the run would end.
    let policy = ["--policy", "batch-max:budget=24,chunk=8,sinks=2,recent=4,slack=0"];
    let compressed = run(&[&policy[..], &["--prefix-hit", "40"]].concat());
    assert!(compressed["kv_decode_peak_bytes"].as_u64() < none["kv_decode_peak_bytes"].as_u64());
}

#[test]
fn prompts_as_ids_are_dumped_with_what_was_kept() {
    let place = Place::with_tiny();
    place.write("ids.json", "[[1, 2, 3], [4, 5, 6, 7]]");
    let args = ["--ids", "ids.json", "--osl", "2", "--dump", "dump.json"];
    run(&place, &args).answered();
    let dump = std::fs::read_to_string(place.path("dump.json")).expect("it was written");
    let dump: serde_json::Value = serde_json::from_str(&dump).expect("valid JSON");
    assert_eq!(dump["prompts"][1]["ids"], serde_json::json!([4, 5, 6, 7]));
    for (ids, part) in [
        ("[[1, 100]]", "token id 100 is outside the vocabulary of 100"),
        ("[[1, -1]]", "invalid value"),
        ("[[]]", "a prompt without tokens"),
        ("[]", "a prompt without tokens"),
        ("{", "ids.json"),
    ] {
        place.write("ids.json", ids);
        let error = run(&place, &args).refused();
        assert!(error.contains(part), "{ids}: {error}");
    }
}

#[test]
fn without_a_batch_the_largest_that_fits_is_run() {
    let place = Place::with_tiny();
    let limited = ["--isl", "64", "--osl", "8", "--kv-memory", "200kB", "--json"];
    let of = |more: &[&str]| run(&place, &[&limited, more].concat());
    let largest: serde_json::Value = serde_json::from_str(&of(&[]).answered()).expect("valid JSON");
    let batch = largest["batch"].as_u64().expect("a number");
    assert!(batch > 1 && largest["kv_peak_bytes"].as_u64() <= Some(200_000), "{largest}");
    of(&["--batch", &batch.to_string()]).answered();
    let error = of(&["--batch", &(batch + 1).to_string()]).refused();
    assert!(error.contains("the caches need"), "{error}");
}

#[test]
fn what_would_not_fit_is_refused_before_it_starts() {
    let place = Place::with_tiny();
    let size = ["--isl", "64", "--osl", "8"];
    let with = |more: &[&str]| run(&place, &[&size, more].concat()).refused();
    // Two layers of 36,864 and two embeddings of 6,400 parameters in f32: 346,112 bytes.
    let error = with(&["--memory", "10kB"]);
    assert!(error.contains("the weights alone take 338 KiB, the memory is 9.77 KiB"), "{error}");
    let error = with(&["--memory", "400kB"]);
    assert!(error.contains("the run takes"), "{error}");
    let error = with(&["--kv-memory", "1kB"]);
    assert!(error.contains("the caches need") && error.contains("--kv-memory is"), "{error}");
    let error = run(&place, &["--isl", "4294967295"]).refused();
    assert!(error.contains("exceed the context of tiny"), "{error}");
    refuses("run --model llama-3.1-405b --isl 16 --osl 4", &["the weights alone take 1.48 TiB"]);
    refuses("profile --model llama-3.1-405b", &["12 layers of llama-3.1-405b take"]);
}

#[test]
fn choices_that_can_not_be_are_refused() {
    let place = Place::with_tiny();
    for (args, part) in [
        (["--temperature", "NaN"], "--temperature NaN: expected 0"),
        (["--temperature=-1", "--json"], "--temperature -1: expected 0"),
        (["--top-p", "0"], "--top-p 0: expected a probability"),
        (["--top-p", "NaN"], "--top-p NaN: expected a probability"),
        (["--weight-dtype", "int4"], "can't run weights in int4 (it has f32, bf16, q8 and q4)"),
        (["--prompt", "Hello"], "--prompt needs the model's tokeniser"),
        (["--gpu", "h100-sxm"], "--gpu h100-sxm: this runs on cpu"),
        (["--batch", "0"], "--batch 0: at least one sequence"),
    ] {
        let error = run(&place, &[&["--isl", "16", "--osl", "2"][..], &args].concat()).refused();
        assert!(error.contains(part), "{args:?}: {error}");
    }
    refuses("run --weights none", &["--weights none: expected auto, real or synthetic"]);
    refuses("run --weights real", &["no weights of smollm2-135m are here", "batchmax fetch"]);
    refuses("validate --tolerance NaN", &["--tolerance NaN: expected a share"]);
    refuses("calibrate", &["hint: batchmax profile"]);
}

#[test]
fn models_that_can_only_be_predicted_are_not_run() {
    for model in ["bloom", "bloom-7b1", "falcon-180b", "gpt-j-6b", "opt-6.7b", "decilm-7b"] {
        for verb in ["run", "validate", "profile", "compare", "quality"] {
            refuses(
                &format!("{verb} --model {model}"),
                &["the executor can't run", "hint: plan and what-if can still predict it"],
            );
        }
        crate::common::run(&format!(
            "what-if --model {model} --gpu b200-sxm --isl 1k --memory 900GB"
        ))
        .answered();
    }
}
