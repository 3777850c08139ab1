//! The planner from outside: the ranking, its limits, what it advises and how to go on.

mod common;

use common::{LLAMA_ON_H100, Place, document, records, refuses, run, shape_of};
use serde_json::Value;

#[track_caller]
fn plan(args: &str) -> Value {
    document(&run(&format!("plan {args} --json")).answered(), "plan")
}

fn candidates(plan: &Value) -> &Vec<Value> {
    plan["candidates"].as_array().expect("a list")
}

fn rate(candidate: &Value) -> f64 {
    candidate["output_tok_s"].as_f64().expect("a rate")
}

/// The command that a plan ends with, as arguments.
fn last_command(text: &str) -> &str {
    let last = text.lines().last().expect("a last line");
    last.strip_prefix("hint: batchmax ").unwrap_or_else(|| panic!("{last}"))
}

#[test]
fn a_plan_ranks_every_policy_and_ends_with_a_command_that_gives_the_same_answer() {
    let args = format!("{LLAMA_ON_H100} --isl 8k --osl 256");
    let text = run(&format!("plan {args}")).answered();
    for preset in ["full", "snapkv", "batch-max", "streaming-llm"] {
        let rows = text
            .lines()
            .filter(|l| l.strip_prefix(preset).is_some_and(|rest| rest.starts_with([' ', ':'])));
        assert!(rows.count() >= 2, "{preset}: {text}");
    }
    let json = plan(&args);
    let rates: Vec<f64> = candidates(&json).iter().map(rate).collect();
    assert!(rates.len() >= 8 && rates.is_sorted_by(|a, b| a >= b), "{rates:?}");
    assert_eq!(run(&format!("plan {args}")).answered(), text, "the same query, the same answer");

    let command = last_command(&text);
    assert!(command.starts_with("what-if --model llama-3.1-8b --gpu h100-sxm --engine batchmax"));
    let again = document(&run(&format!("{command} --json")).answered(), "what-if");
    let metrics = &again["answers"][0]["answer"]["metrics"];
    assert_eq!(metrics["output_tok_s"].as_f64(), json["recommended"]["output_tok_s"].as_f64());
}

#[test]
fn the_command_at_the_end_keeps_every_flag_that_matters() {
    let args = "--model llama-3.1-8b --gpu h100-sxm --isl 4k --osl 64 --memory 40GB --kv-memory 20GB \
                --weight-dtype fp8 --kv-dtype bf16,fp8 --tp 2";
    let text = run(&format!("plan {args}")).answered();
    let command = last_command(&text);
    for flag in ["--memory 40GB", "--kv-memory 20GB", "--weight-dtype fp8", "--kv-dtype ", "--tp 2"]
    {
        assert!(command.contains(flag), "{flag}: {command}");
    }
    let again = document(&run(&format!("{command} --json")).answered(), "what-if");
    let found = again["answers"][0]["answer"]["metrics"]["output_tok_s"].as_f64();
    assert_eq!(found, plan(args)["recommended"]["output_tok_s"].as_f64());
}

#[test]
fn the_shape_of_a_plan() {
    let args = format!(
        "plan {LLAMA_ON_H100} --isl 2k --osl 128 --policy full --schedule static --batch 4"
    );
    insta::assert_snapshot!(shape_of(&run(&args).answered()));
}

#[test]
fn the_shape_of_a_plan_with_compression() {
    let args = format!(
        "plan {LLAMA_ON_H100} --isl 8k --osl 256 --policy full batch-max --schedule static --chunk 256"
    );
    insta::assert_snapshot!(shape_of(&run(&args).answered()));
}

#[test]
fn nothing_that_does_not_fit_is_recommended() {
    for args in
        ["--isl 8k --osl 256", "--isl 32k --osl 64 --memory 24GB", "--isl 4k --kv-memory 3GB"]
    {
        let json = plan(&format!("{LLAMA_ON_H100} {args}"));
        for c in candidates(&json).iter().filter(|c| !c["answer"].is_null()) {
            assert_eq!(c["answer"]["fits"], true, "{args}");
        }
        assert_eq!(json["recommended"]["answer"]["fits"], true, "{args}");
    }
}

#[test]
fn copies_and_shared_layers_are_weighed_against_each_other() {
    // 16 GB of weights in half the types' range: one H100 holds it, so four copies are the baseline.
    let json =
        plan("--model llama-3.1-8b --gpu h100-sxm --gpus 4 --policy full --isl 2k --osl 128");
    let list = candidates(&json);
    for tp in [1, 2, 4] {
        let c = list.iter().find(|c| c["tp"] == tp).expect("a candidate");
        assert_eq!((&c["replicas"], &c["gpus"]), (&(4 / tp).into(), &4.into()));
        let one = c["answer"]["metrics"]["output_tok_s"].as_f64().expect("a rate");
        assert!((rate(c) - one * f64::from(4 / tp)).abs() < 1e-6 * rate(c));
    }
    // 141 GB of weights fit no single one.
    let json =
        plan("--model llama-3.1-70b --gpu h100-sxm --gpus 4 --policy full --isl 2k --osl 128");
    let fits = |tp: u32| candidates(&json).iter().any(|c| c["tp"] == tp && !c["answer"].is_null());
    assert!(!fits(1) && fits(4));
    refuses(&format!("plan {LLAMA_ON_H100} --gpus 2 --tp 4"), &["--gpus 2", "take 4 GPUs"]);
    refuses(&format!("plan {LLAMA_ON_H100} --tp 3"), &["3 devices can't share the 32 heads"]);
}

#[test]
fn money_decides_between_devices() {
    let args = "--model llama-3.1-8b --gpu h100-sxm,l40s --policy full --isl 2k --osl 128";
    let cheap = plan(&format!("{args} --objective cost --price l40s=0.01"));
    assert_eq!(cheap["recommended"]["gpu"], "l40s");
    let dear = plan(&format!("{args} --objective cost --price l40s=1000"));
    assert_eq!(dear["recommended"]["gpu"], "h100-sxm");
    // 2.50 USD an hour by the description.
    let best = &dear["recommended"];
    let expected = 2.5 / 3600.0 / rate(best) * 1e6;
    let usd = best["usd_per_million_output_tokens"].as_f64().expect("a price");
    assert!((usd - expected).abs() < 1e-9 * expected, "{usd} {expected}");
    for (text, part) in [
        ("l40s", "--price l40s: expected GPU=USD"),
        ("l40s=free", "\"free\" is not a price"),
        ("l40s=-1", "\"-1\" is not a price"),
        ("l404=1", "no gpu \"l404\""),
    ] {
        refuses(&format!("plan {args} --price {text}"), &[part]);
    }
    refuses(
        &format!("plan {args} --objective speed"),
        &["--objective: \"speed\"", "per-gpu, cost"],
    );
}

#[test]
fn a_front_holds_only_what_nothing_beats() {
    let args = format!("{LLAMA_ON_H100} --isl 8k --osl 256");
    let front = plan(&format!("{args} --pareto"));
    let points: Vec<(f64, f64, f64)> = candidates(&front)
        .iter()
        .map(|c| {
            let tpot = c["answer"]["metrics"]["tpot_s"].as_f64().expect("a time");
            let memory = c["answer"]["memory"]["total_bytes"].as_f64().expect("bytes");
            (rate(c), tpot, memory)
        })
        .collect();
    assert!(points.len() >= 4, "{points:?}");
    for a in &points {
        assert!(!points.iter().any(|b| b.0 > a.0 && b.1 < a.1 && b.2 < a.2), "{a:?}");
    }
    let batches: std::collections::BTreeSet<_> =
        candidates(&front).iter().map(|c| c["answer"]["batch"].as_u64()).collect();
    assert!(batches.len() >= 3, "smaller batches are on the front too: {batches:?}");
    let text = run(&format!("plan {args} --pareto")).answered();
    assert!(text.contains("candidates are beaten by one of these"), "{text}");
}

#[test]
fn latencies_are_kept_and_named_where_they_bind() {
    let args = format!("{LLAMA_ON_H100} --isl 8k --osl 256");
    let limited = plan(&format!("{args} --tpot 15ms"));
    for c in candidates(&limited).iter().filter(|c| !c["answer"].is_null()) {
        assert!(c["answer"]["metrics"]["tpot_s"].as_f64().is_some_and(|t| t <= 0.015));
    }
    assert!(candidates(&limited).iter().any(|c| c["bound"] == "tpot"));
    refuses(&format!("plan {args} --tpot 15"), &["--tpot: \"15\" is not a time with its unit"]);
    refuses(&format!("plan {args} --ttft soon"), &["--ttft: \"soon\" is not a time"]);
}

#[test]
fn compression_that_does_not_pay_is_not_recommended() {
    // So little is generated from so short a prompt that the cache hardly matters.
    let args = format!(
        "{LLAMA_ON_H100} --isl 512 --osl 2 --policy full --policy batch-max --policy snapkv"
    );
    let text = run(&format!("plan {args}")).answered();
    assert!(text.contains("\ncompression does not pay here, "), "{text}");
    let json = plan(&args);
    assert_eq!(json["compression_pays"], false);
    assert_eq!(json["recommended"]["preset"], "full");
    // A long prompt and a long answer.
    let json = plan(&format!("{LLAMA_ON_H100} --isl 32k --osl 2k"));
    assert_eq!(json["compression_pays"], true);
    assert!(json["compression_gain"].as_f64().is_some_and(|g| g > 1.5));
}

#[test]
fn policies_that_nobody_named_are_left_out_where_they_can_not_work() {
    let args = format!("{LLAMA_ON_H100} --isl 64 --osl 64");
    let text = run(&format!("plan {args}")).answered();
    assert!(text.contains("\nleft out: snapkv: a budget of 16 tokens can't hold"), "{text}");
    assert_eq!(plan(&args)["left_out"].as_array().map(Vec::len), Some(8));
    refuses(&format!("plan {args} --policy snapkv"), &["a budget of 16 tokens can't hold"]);
}

#[test]
fn searched_parameters_are_listed_once_and_typed_ones_all() {
    let args = format!("{LLAMA_ON_H100} --isl 8k --osl 64 --policy batch-max --schedule static");
    let rows = |more: &str| {
        let text = run(&format!("plan {args} {more}")).answered();
        text.lines().filter(|l| l.starts_with("batch-max") && l.contains(" static ")).count()
    };
    // The preset's chunk, 1k and 4k are searched; the sentence at the end names the policy once more.
    assert_eq!(candidates(&plan(&args)).len(), 3);
    assert_eq!(rows(""), 1 + 1);
    assert_eq!(rows("--chunk 256,512"), 2 + 1);
    assert_eq!(rows("--budget 12.5%,25%"), 2 + 1);
    let budgets = plan(&format!("{args} --budget 12.5%,25% --chunk 256"));
    let names: Vec<_> = candidates(&budgets).iter().map(|c| c["preset"].as_str()).collect();
    // A quarter is the preset's own budget and is said all the same, since it was typed.
    assert_eq!(names, [Some("batch-max:budget=12.5%"), Some("batch-max:budget=25%")]);
    refuses(&format!("plan {args} --budget none"), &["expected tokens (512, 4k), a share"]);
}

#[test]
fn one_change_is_planned_anew() {
    let args = format!("{LLAMA_ON_H100} --isl 8k --osl 256 --policy batch-max:chunk=1k");
    let json = plan(&args);
    let changes = json["changes"].as_array().expect("a list");
    let gain = |what: &str| {
        let found = changes.iter().find(|c| c["change"] == what);
        let found = found.unwrap_or_else(|| panic!("{what}: {changes:?}"));
        (found["gain"].as_f64().expect("a gain"), found["output_tok_s"].as_f64().expect("a rate"))
    };
    for what in ["+16 GB", "fp8 KV", "fp8 weights", "budget halved", "one more GPU"] {
        let (gain, rate) = gain(what);
        assert!(gain > 0.9 && rate > 0.0, "{what}: {gain}");
    }
    // The changed plans are the plans of the changed questions.
    let asked = |more: &str| rate(&candidates(&plan(&format!("{args} {more}")))[0]);
    assert_eq!(gain("fp8 KV").1, asked("--kv-dtype fp8"));
    assert_eq!(gain("one more GPU").1, asked("--gpus 2"));
    let gpu: toml::Table = run("gpus h100-sxm").answered().parse().expect("a description");
    let memory = gpu["memory_bytes"].as_integer().expect("bytes") as f64;
    let more = (memory * 0.9) as u64 + 16_000_000_000;
    assert_eq!(gain("+16 GB").1, asked(&format!("--memory {more}")));
    let halved =
        format!("{LLAMA_ON_H100} --isl 8k --osl 256 --policy batch-max:chunk=1k,budget=12.5%");
    assert_eq!(gain("budget halved").1, rate(&candidates(&plan(&halved))[0]));
}

#[test]
fn a_device_of_a_file_is_named_by_its_path_in_the_command_at_the_end() {
    let place = Place::new();
    // The least that describes a device.
    place.write(
        "my-card.toml",
        "name = \"my-card\"\nmemory_bytes = 25757220864\nbandwidth_bytes_per_s = 1008e9\nprocessors = 128\n\
         peak_flops_per_s = { bf16 = 165e12 }\nsource = \"its data sheet\"\n",
    );
    let args = "plan --model llama-3.2-1b --gpu my-card.toml --isl 4k --osl 64 --policy full,batch-max:chunk=1k,budget=25%";
    let text = place.run(&args.split_whitespace().collect::<Vec<_>>()).answered();
    let command = last_command(&text);
    assert!(command.contains("--gpu my-card.toml"), "{command}");
    place.run(&command.split_whitespace().collect::<Vec<_>>()).answered();
}

#[test]
fn a_policy_that_refuses_one_placement_runs_on_the_others() {
    // On eight devices each holds one KV head: there is nothing that its heads could share.
    let args =
        "--model llama-3.1-70b --gpu h100-sxm --gpus 8 --isl 4k --osl 64 --policy full,adakv";
    let json = plan(args);
    let on_eight = |preset: &str| {
        let mut all = candidates(&json).iter().filter(|c| c["preset"] == preset).peekable();
        assert!(all.peek().is_some(), "{preset}: {json}");
        all.any(|c| c["tp"] == 8)
    };
    assert!(on_eight("full") && !on_eight("adakv"), "{json}");
    let left_out = json["left_out"].as_array().expect("a list");
    let [why] = left_out.as_slice() else { panic!("{left_out:?}") };
    let why = why.as_str().expect("a reason");
    assert!(why.starts_with("adakv on h100-sxm, --tp 8: ") && why.contains("one KV head"), "{why}");
    refuses("plan --model llama-3.1-70b --gpu h100-sxm --tp 8 --policy adakv", &["one KV head"]);
}

#[test]
fn engines_run_what_they_can_and_say_what_they_can_not() {
    let args = format!("{LLAMA_ON_H100} --isl 2k --osl 128");
    let title = |args: &str| {
        let text = run(args).answered();
        text.lines().next().expect("a title").to_owned()
    };
    assert!(title(&format!("what-if {args}")).contains(" · vllm · full · "));
    let compressed = format!("what-if {args} --policy batch-max");
    assert!(title(&compressed).contains(" · batchmax · batch-max · "));
    refuses(
        &format!("{compressed} --engine vllm"),
        &["vllm can't run the policy batch-max (it has full)", "hint: --engine batchmax"],
    );
    refuses(
        &format!("what-if {args} --engine vllm --kv-dtype int4"),
        &["vllm has no caches in int4 (it has f16, bf16, fp8)", "hint: --engine batchmax"],
    );
    refuses(&format!("plan {args} --engine vlm"), &["no engine \"vlm\"", "did you mean \"vllm\"?"]);
    refuses(&format!("plan {args} --engine cuda"), &["no engine \"cuda\"", "known: ", "vllm"]);
    let text = run(&format!("plan {args} --engine vllm")).answered();
    assert!(text.contains("left out: vllm can't run "), "{text}");
    refuses("plan --engine vllm", &["this machine runs batchmax only"]);
    refuses("explain --tp 2", &["this machine shares layers over what --device names"]);
    // An engine with copies of its caches holds fewer sequences.
    let batch = |engine: &str| {
        let json = run(&format!("what-if {args} --engine {engine} --json")).answered();
        document(&json, "what-if")["answers"][0]["answer"]["batch"].as_u64().expect("a batch")
    };
    assert!(batch("transformers") < batch("vllm"));
    assert_eq!(batch("batchmax"), batch("vllm"));
}

#[test]
fn shared_layers_are_in_the_program() {
    let args = format!("explain {LLAMA_ON_H100} --isl 256 --osl 4 --batch 1");
    assert!(!run(&args).answered().contains("all_reduce"));
    let shared = run(&format!("{args} --tp 2")).answered();
    assert!(shared.contains("all_reduce"), "{shared}");
    refuses(&format!("{args} --tp 0"), &["--tp 0: expected a number of GPUs"]);
    refuses(&format!("{args} --tp 1,2"), &["--tp: one number is expected here"]);
    refuses(&format!("{args} --pp 0"), &["invalid value '0' for '--pp <N>'"]);
    refuses(&format!("{args} --pp 64"), &["64 groups of devices can't share the 32 layers"]);
}

#[test]
fn flags_of_the_processor_are_read_on_gpus_too() {
    refuses(&format!("plan {LLAMA_ON_H100} --threads 0"), &["--threads 0: at least one thread"]);
    refuses(&format!("what-if {LLAMA_ON_H100} --threads 0"), &["--threads 0"]);
}

#[test]
fn a_sweep_over_batches_types_and_devices_to_a_layer() {
    // Prompts so long that memory ends before the engine's number of sequences.
    let args = format!("what-if {LLAMA_ON_H100} --isl 16k --osl 64");
    refuses(&format!("{args} --batch 4,0"), &["--batch 0: at least one sequence"]);
    refuses(&format!("{args} --batch 65537"), &["--batch 65537: at most 65536"]);
    refuses(&format!("{args} --batch 8..2"), &["--batch 8..2: a range goes from the smaller"]);
    let rows = records(
        &run(&format!("{args} --batch 1..4,max --tp 1,2 --kv-dtype bf16,fp8 --csv")).answered(),
    );
    assert_eq!(rows.len(), 4 * 2 * 2);
    let largest = |tp: &str, kv: &str| -> u32 {
        let batches = rows.iter().filter(|r| r["tp"] == tp && r["kv_dtype"] == kv);
        batches.map(|r| r["batch"].parse().expect("a batch")).max().expect("rows")
    };
    assert!(largest("1", "fp8") >= 2 * largest("1", "bf16"));
    assert!(largest("2", "bf16") > 2 * largest("1", "bf16"));
}

#[test]
fn scenarios_name_engine_devices_and_types() {
    let rows = "id,gpu,tp,model,weight_dtype,kv_dtype,engine,batch,input_len,output_len,policy\n\
         one,h100-sxm,1,llama-3.1-8b,,,vllm,max,16384,128,full\n\
         two,h100-sxm,2,llama-3.1-8b,,,vllm,max,16384,128,full\n\
         small,h100-sxm,1,llama-3.1-8b,fp8,fp8,vllm,max,16384,128,full\n\
         slow,h100-sxm,1,llama-3.1-8b,,,transformers,16,2048,128,full\n\
         fast,h100-sxm,1,llama-3.1-8b,,,vllm,16,2048,128,full\n\
         ours,h100-sxm,1,llama-3.1-8b,,,batchmax,max,2048,128,batch-max\n\
         not,h100-sxm,1,llama-3.1-8b,,,vllm,max,2048,128,batch-max\n\
         odd,h100-sxm,x,llama-3.1-8b,,,vllm,max,2048,128,full\n\
         type,h100-sxm,1,llama-3.1-8b,,f61,vllm,max,2048,128,full\n";
    let place = Place::new();
    place.write("s.csv", rows);
    let answers = records(&place.run(&["what-if", "--scenarios", "s.csv"]).answered());
    let of = |id: &str| answers.iter().find(|a| a["id"] == id).expect("a row");
    let number = |id: &str, column: &str| -> f64 { of(id)[column].parse().expect("a number") };
    assert!(number("two", "max_batch") > 2.0 * number("one", "max_batch"));
    assert!(number("small", "max_batch") > 2.0 * number("one", "max_batch"));
    assert!(number("slow", "tpot_ms") > 1.5 * number("fast", "tpot_ms"));
    assert_eq!(of("ours")["predicted_engine"], "batchmax");
    assert!(of("not")["refused"].contains("vllm can't run the policy batch-max"));
    assert!(of("odd")["refused"].contains("tp x: expected a number of GPUs"));
    assert!(of("type")["refused"].contains("kv_dtype: \"f61\" is not a type"));

    let text = place.run(&["what-if", "--scenarios", "s.csv", "--json"]).answered();
    let json = document(&text, "scenarios");
    let list = json["scenarios"].as_array().expect("a list");
    assert_eq!(list.len(), 9);
    assert_eq!(list[0]["answer"]["fits"], true);
    assert!(list[6]["refused"].as_str().is_some_and(|why| why.contains("can't run")));

    place.write("noise.csv", [0xff, 0xfe, b'\n', 0x80]);
    let error = place.run(&["what-if", "--scenarios", "noise.csv"]).refused();
    assert!(error.contains("noise.csv"), "{error}");
}

#[test]
fn what_was_measured_to_lose_too_much_is_left_out() {
    let place = Place::new();
    let row = |policy: &str, budget: f64, kl: f64, recall: f64| {
        format!(
            "[[row]]\npolicy = \"{policy}\"\nbudget = {budget}\ncontext = 512\nkv_bytes_per_token = 5760.0\nkl = {kl}\n\
             kl_low = {kl}\nkl_high = {kl}\ntop1 = 0.9\nrecall = {recall}\nanswer_nll = 1.0\ncopy_top1 = 0.5\ncopy_nll = 1.0\n"
        )
    };
    let rows = [
        row("snapkv:window=32,pool=5", 0.25, 0.07, 0.2),
        row("knorm:sinks=4,recent=32", 0.25, 0.3, 0.9),
    ];
    let head = "name = \"smollm2-135m\"\nweights = \"f32\"\ncache = \"f16\"\nsamples = 8\nabout = \"made up\"\n";
    place.write("mine/quality/smollm2-135m.toml", format!("{head}{}", rows.concat()));
    let ask = |more: &[&str]| {
        let mut args = vec!["--profiles", "mine", "plan"];
        args.extend(LLAMA_ON_H100.split(' '));
        args.extend(["--isl", "4k", "--osl", "64", "--schedule", "static", "--policy"]);
        args.extend(["full", "snapkv", "knorm", "keydiff", "snapkv:budget=10%"]);
        args.extend(more);
        place.run(&args)
    };
    let found = |more: &[&str]| -> (Vec<String>, String) {
        let plan = document(&ask(&[more, &["--json"]].concat()).answered(), "plan");
        let mut names: Vec<String> = candidates(&plan)
            .iter()
            .map(|c| c["preset"].as_str().expect("a name").into())
            .collect();
        names.sort_unstable();
        (names, plan["left_out"].to_string())
    };
    assert_eq!(found(&[]).0.len(), 6, "keydiff in two chunks");
    let (names, left) = found(&["--max-kl", "0.1"]);
    assert_eq!(names, ["full", "snapkv"]);
    assert!(left.contains("knorm: KL 0.300 is over 0.1 (measured on smollm2-135m)"), "{left}");
    assert!(left.contains("keydiff: its quality was not measured"), "{left}");
    assert!(left.contains("snapkv:budget=10%: its quality was not measured"), "{left}");
    let (names, left) = found(&["--min-recall", "0.5"]);
    assert_eq!(names, ["full", "knorm"]);
    assert!(left.contains("snapkv: recall 0.20 is under 0.5"), "{left}");
    assert_eq!(found(&["--max-kl", "0.1", "--min-recall", "0.5"]).0, ["full"]);
    let text = ask(&["--max-kl", "0.1"]).answered();
    assert!(text.contains("left out: knorm: KL 0.300"), "{text}");
    assert!(ask(&["--max-kl=-1"]).refused().contains("--max-kl -1"));
    assert!(ask(&["--min-recall", "1.5"]).refused().contains("from 0 to 1"));
}
