//! The program from outside: exit codes, answers on stdout, refusals of one line on stderr.

mod common;

use std::path::Path;
use std::process::Command;

use common::{LLAMA_ON_H100, Place, Ran, document, records, refuses, run};

#[test]
fn a_continuous_schedule_beats_a_static_one_where_answers_differ() {
    let rate = |schedule: &str| {
        let args = format!(
            "what-if {LLAMA_ON_H100} --isl 2k --osl 256 --osl-spread 80% --batch 8 --schedule {schedule} --json"
        );
        let json = document(&run(&args).answered(), "what-if");
        json["answers"][0]["answer"]["metrics"]["output_tok_s"].as_f64().expect("a rate")
    };
    // A static batch waits for its longest answer.
    assert!(rate("continuous:16") > 1.1 * rate("static"));
}

#[test]
fn help_leads_to_every_command_and_states_the_exit_codes() {
    let help = run("--help").answered();
    for verb in [
        "plan",
        "tui",
        "what-if",
        "explain",
        "fetch",
        "models",
        "gpus",
        "engines",
        "calibrate",
        "score",
        "policies",
    ] {
        assert!(help.contains(&format!("\n  {verb}")), "{verb}");
        assert!(run(&format!("{verb} --help")).answered().contains("Usage: batchmax"), "{verb}");
    }
    assert!(help.contains("Exit codes: 0 answered, 1 the answer is no, 2 usage or bad input, 3"));
    assert_eq!(run("--version").answered(), concat!("batchmax ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn nothing_typed_shows_the_help_as_an_error() {
    let ran = run("");
    assert_eq!((ran.code, ran.out.as_str()), (Some(2), ""));
    assert!(ran.err.contains("Usage: batchmax"), "{}", ran.err);
}

#[test]
fn usage_errors_are_one_line_with_a_hint() {
    refuses("plan --nonsense", &["unexpected argument '--nonsense'", "hint: batchmax --help"]);
    refuses("plan --isll 2k", &["unexpected argument '--isll'", "'--isl'"]);
    refuses("whatif", &["unrecognized subcommand 'whatif'", "'what-if'"]);
    refuses("plan --isl", &["a value is required for '--isl <ISL>'"]);
    refuses("plan --threads many", &["invalid value 'many' for '--threads <THREADS>'"]);
    refuses("models one two", &["unexpected argument 'two'"]);
}

#[test]
fn models_are_listed_and_shown() {
    let list = run("models").answered();
    assert!(list.starts_with("model "), "{list}");
    for name in ["smollm2-135m", "llama-3.1-8b", "bloom-176b", "decilm-7b"] {
        assert!(list.contains(&format!("\n{name} ")), "{name}");
    }
    let all = document(&run("models --json").answered(), "models");
    let count = all["models"].as_array().expect("a list").len();
    assert_eq!(count, list.lines().count() - 1);
    let one = document(&run("models BigScience/BLOOM --json").answered(), "models");
    assert_eq!(one["models"][0]["name"], "bloom-176b");
    let shown: toml::Table =
        run("models qwen2-7b").answered().parse().expect("a description that could be read back");
    assert_eq!(shown["hidden"].as_integer(), Some(3584));
}

#[test]
fn what_is_shown_of_a_model_or_device_can_be_read_back() {
    let place = Place::new();
    for (kind, name) in [("models", "gemma-2-2b"), ("models", "llama-3.2-1b"), ("gpus", "l40s")] {
        let shown = place.run(&[kind, name]).answered();
        place.write(&format!("copy/{kind}/{name}.toml"), &shown);
        assert_eq!(place.run(&["--profiles", "copy", kind, name]).answered(), shown, "{name}");
    }
}

#[test]
fn gpus_are_listed_and_shown() {
    let list = run("engines").answered();
    assert!(list.contains("vllm") && list.contains("tensorrt-llm"), "{list}");
    let all = document(&run("engines --json").answered(), "engines");
    assert!(all["engines"].as_array().is_some_and(|e| e.len() >= 8), "{all}");
    assert!(run("engines vllm").answered().contains("step_tokens"));
    let list = run("gpus").answered();
    assert!(list.contains("\nh100-sxm ") && list.contains("\nl40s "), "{list}");
    let all = document(&run("gpus --json").answered(), "gpus");
    assert_eq!(all["gpus"].as_array().expect("a list").len(), list.lines().count() - 1);
    let shown: toml::Table = run("gpus h100-sxm").answered().parse().expect("a description");
    assert_eq!(shown["name"].as_str(), Some("h100-sxm"));
}

#[test]
fn policies_are_listed_and_shown_with_changed_parameters_too() {
    let list = run("policies").answered();
    for name in ["batch-max", "full", "snapkv", "streaming-llm"] {
        assert!(list.contains(&format!("\n{name} ")), "{name}");
    }
    let all = document(&run("policies --json").answered(), "policies");
    assert_eq!(all["policies"].as_array().expect("a list").len(), list.lines().count() - 1);
    let shown = run("policies batch-max:budget=512").answered();
    assert!(shown.contains("# built-in policies/batch-max.toml"), "{shown}");
    assert!(shown.contains(",budget=512,chunk=256"), "{shown}");
}

#[test]
fn one_configuration_is_answered_in_full() {
    let args = format!("what-if {LLAMA_ON_H100} --isl 2k --osl 128 --batch 8");
    let text = run(&args).answered();
    let first = text.lines().next().expect("a title");
    assert_eq!(
        first,
        "llama-3.1-8b on h100-sxm · vllm · full · 2048 in, 128 out · batch 8 · static schedule"
    );
    for part in ["memory\n", "\nfits\n", "tokens/s", "TTFT", "TPOT"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let json = document(&run(&format!("{args} --json")).answered(), "what-if");
    let answer = &json["answers"][0];
    assert_eq!(answer["isl"], 2048);
    assert_eq!((&answer["answer"]["batch"], &answer["answer"]["fits"]), (&8.into(), &true.into()));
    let metrics = &answer["answer"]["metrics"];
    let number = |key: &str| metrics[key].as_f64().filter(|v| v.is_finite() && *v > 0.0);
    for key in ["ttft_s", "tpot_s", "total_s", "prefill_tok_s", "output_tok_s", "error"] {
        assert!(number(key).is_some(), "{key}: {metrics}");
    }
    // 8 sequences of 2,048 + 127 tokens, rounded up to 136 blocks of 16, 128 KiB a token.
    let memory = &answer["answer"]["memory"];
    assert_eq!(memory["kv_decode_peak_bytes"], 8 * 136 * 16 * 128 * 1024u64);
}

#[test]
fn a_sweep_answers_every_combination_in_its_order() {
    let args = format!(
        "what-if {LLAMA_ON_H100},l40s --isl 2k..8k --osl 128 --batch 1,4 --policy full batch-max"
    );
    let rows = records(&run(&format!("{args} --csv")).answered());
    assert_eq!(rows.len(), 2 * 3 * 2 * 2);
    let combinations: std::collections::BTreeSet<_> =
        rows.iter().map(|r| (&r["gpu"], &r["isl"], &r["batch"], &r["preset"])).collect();
    assert_eq!(combinations.len(), rows.len());
    assert!(rows.iter().all(|r| r["fits"] == "true" || r["fits"] == "false"));
    assert!(rows.iter().all(|r| r["output_tok_s"].parse::<f64>().is_ok_and(|v| v > 0.0)));
    let json = document(&run(&format!("{args} --json")).answered(), "what-if");
    assert_eq!(json["answers"].as_array().expect("a list").len(), rows.len());
    let table = run(&args).answered();
    assert_eq!(table.lines().count(), 1 + rows.len() + 1, "{table}");
    assert!(table.ends_with("○ roofline\n"), "{table}");
}

#[test]
fn what_does_not_fit_is_an_answer_of_its_own() {
    let small = format!("{LLAMA_ON_H100} --isl 2k --osl 128 --memory 1GB");
    assert!(run(&format!("what-if {small}")).no().contains("over by"));
    assert!(run(&format!("what-if {small} --batch 1")).no().contains("does not fit: over by"));
    let plan = run(&format!("plan {small}")).no();
    assert!(plan.contains("nothing fits"), "{plan}");
    let json = document(&run(&format!("what-if {small} --json")).no(), "what-if");
    assert!(json["answers"][0]["answer"].is_null());
    assert!(json["answers"][0]["missing"]["by"].as_u64().is_some_and(|by| by > 1 << 30));
    let csv = records(&run(&format!("what-if {small} --csv")).no());
    assert_eq!(csv[0]["fits"], "");
    // Caches that can't hold one chunk of the most frugal policy.
    let caches =
        format!("plan {LLAMA_ON_H100} --isl 2k --osl 128 --policy batch-max --kv-memory 1MB");
    assert!(run(&caches).no().contains("nothing fits"));
    // A limit that nothing meets.
    let limit = format!("plan {LLAMA_ON_H100} --isl 2k --osl 128 --ttft 1us");
    assert!(run(&limit).no().contains("nothing fits"));
}

#[test]
fn a_program_explained() {
    let args = "explain --model llama-3.2-1b --gpu h100-sxm --policy batch-max:budget=256,chunk=256 --isl 600 --osl 64 --batch 2";
    insta::assert_snapshot!(run(args).answered());
    let json = document(&run(&format!("{args} --json")).answered(), "explain");
    assert_eq!((&json["batch"], &json["passes"][0]["phase"]), (&2.into(), &"prefill".into()));
    let operation = &json["passes"][0]["blocks"][1]["ops"][1];
    assert_eq!(operation["op"], "qkv");
    // 2 x 256 tokens, 2,048 -> (32 + 2 x 8) x 64 channels, two operations a multiply-add.
    assert_eq!(operation["flops"], 2.0 * 512.0 * 2048.0 * 3072.0);
}

#[test]
fn a_cached_prefix_is_not_read() {
    let args = format!("what-if {LLAMA_ON_H100} --isl 2k --osl 128 --batch 8 --json");
    let answer = |hit: &str| {
        let document = document(&run(&format!("{args} --prefix-hit {hit}")).answered(), "what-if");
        let answer = &document["answers"][0];
        let figure = |key: &str| answer["answer"]["metrics"][key].as_f64().expect("a number");
        (answer["prefix_hit"].as_u64(), figure("ttft_s"), figure("tpot_s"))
    };
    let (none, share) = (answer("0"), answer("75%"));
    assert_eq!((none.0, share.0), (Some(0), Some(1536)));
    assert!(share.1 < 0.5 * none.1 && share.2 == none.2, "{none:?} {share:?}");
    let text =
        run("explain --model llama-3.2-1b --gpu h100-sxm --isl 600 --osl 64 --prefix-hit 512");
    assert!(text.answered().contains("(600 prompt + 64 generated tokens, the first 512 cached)"));
    let verb = |more: &str| format!("what-if {LLAMA_ON_H100} --isl 2k {more}");
    refuses(
        &verb("--prefix-hit 2k"),
        &["leaves nothing to read of 2048", "hint: --prefix-hit 2047"],
    );
    refuses(&verb("--prefix-hit most"), &["--prefix-hit: expected tokens (512, 4k) or a share"]);
    refuses(&verb("--policy fastkv --prefix-hit 50%"), &["which rows of a prefix"]);
}

#[test]
fn unknown_names_suggest_the_nearest() {
    let h100 = "--gpu h100-sxm";
    refuses(
        &format!("plan --model lama-3.1-8b {h100}"),
        &["no model \"lama-3.1-8b\"", "hint: did you mean \"llama-3.1-8b\"?"],
    );
    refuses("what-if --gpu h100-smx", &["no gpu \"h100-smx\"", "did you mean \"h100-sxm\"?"]);
    refuses(
        &format!("plan {h100} --policy batchmax"),
        &["no policy \"batchmax\"", "did you mean \"batch-max\"?"],
    );
    refuses("gpus zzz", &["no gpu \"zzz\"", "hint: batchmax gpus lists them"]);
    refuses("models ../../../etc/passwd", &["no model"]);
    refuses(
        &format!("plan {h100} --policy batch-max:bugdet=512"),
        &["unknown field `bugdet`; did you mean `budget`?"],
    );
    refuses(
        &format!("plan {h100} --weight-dtype f61"),
        &["--weight-dtype: \"f61\" is not a type; known: f32, f16"],
    );
}

#[test]
fn quantities_that_can_not_be_are_refused() {
    for (args, part) in [
        ("--isl 9223372036854775808", "--isl: \"9223372036854775808\" is not a number of tokens"),
        ("--isl NaN", "--isl: \"NaN\" is not a number of tokens"),
        ("--isl 0", "--isl 0: at least one token"),
        ("--isl 1.3", "--isl: \"1.3\" is not"),
        ("--osl -1", "unexpected argument '-1'"),
        ("--osl=-1", "--osl: \"-1\" is not a number of tokens"),
        ("--osl 0", "--osl 0: at least one token"),
        ("--batch 0", "--batch 0: at least one"),
        ("--batch many", "--batch"),
        ("--batch 4294967296", "--batch"),
        ("--memory NaN", "--memory: \"NaN\" is not a size"),
        ("--memory inf", "--memory: \"inf\" is not a size"),
        ("--memory 80XB", "--memory: \"80XB\" is not a size"),
        ("--memory 99999999999T", "--memory: \"99999999999T\" is not a size"),
        ("--kv-memory=-5MB", "--kv-memory: \"-5MB\" is not a size"),
        ("--schedule sometimes", "--schedule: \"sometimes\" is not a schedule; known: static"),
        ("--schedule continuous:0", "a place serves 1 to 1024 requests"),
        ("--osl-spread 100%", "--osl-spread: expected a share below 1"),
        ("--schedule staggered:0", "--schedule: \"staggered:0\" is not a schedule"),
        ("--policy batch-max:budget=0", "expected tokens (512, 4k), a share"),
        ("--policy batch-max:budget=NaN", "expected tokens (512, 4k), a share"),
        ("--policy batch-max:budget=200%", "expected tokens (512, 4k), a share"),
        ("--policy batch-max:chunk=-1", "chunk"),
        ("--policy batch-max:budget", "expected key=value"),
        ("--policy", "a value is required"),
    ] {
        refuses(&format!("plan {LLAMA_ON_H100} {args}"), &[part]);
        refuses(&format!("what-if {LLAMA_ON_H100} {args}"), &[part]);
    }
    refuses(&format!("plan {LLAMA_ON_H100} --ttft NaN"), &["\"NaN\" is not a time with its unit"]);
    refuses(&format!("plan {LLAMA_ON_H100} --tpot 50"), &["\"50\" is not a time with its unit"]);
    refuses(&format!("what-if {LLAMA_ON_H100} --isl 8k..2k"), &["from the smaller to the larger"]);
    refuses("explain --batch 4294967295", &["--batch 4294967295: at most 65536"]);
}

#[test]
fn the_largest_quantities_are_answered_without_overflow() {
    let place = Place::new();
    let model = include_str!("../profiles/models/llama-3.1-8b.toml")
        .replace("llama-3.1-8b\"", "endless\"")
        .replace("context = 131072", "context = 1073741824");
    let model = place.write("endless.toml", model);
    let model = model.to_str().expect("UTF-8");
    let ask = |verb: &str, more: &[&str]| {
        let mut args = vec![verb, "--model", model, "--gpu", "h100-sxm"];
        args.extend(["--isl", "1073740000", "--osl", "1000"]);
        args.extend(more);
        place.run(&args)
    };
    assert!(ask("what-if", &[]).no().contains("over by"));
    assert!(ask("what-if", &["--batch", "65536"]).no().contains("over by"));
    ask("explain", &["--batch", "65536"]).answered();
}

#[test]
fn prompts_past_the_context_are_refused_with_both_numbers() {
    for verb in ["plan", "what-if", "explain"] {
        refuses(
            &format!("{verb} {LLAMA_ON_H100} --isl 128k --osl 1"),
            &["131072 prompt tokens plus 1 generated ones exceed the context", "131072", "--isl"],
        );
    }
    run(&format!("explain {LLAMA_ON_H100} --isl 131071 --osl 1")).answered();
}

#[test]
fn a_budget_that_can_not_hold_what_must_stay_says_what_would() {
    refuses(
        &format!("what-if {LLAMA_ON_H100} --policy batch-max:budget=8"),
        &["a budget of 8 tokens can't hold 4 sinks and 32 recent tokens", "at least 36"],
    );
    refuses(
        &format!("what-if {LLAMA_ON_H100} --policy expected-attention:chunk=256"),
        &["ranks by all queries of the prompt", "leave out chunk"],
    );
    refuses(
        &format!("explain {LLAMA_ON_H100} --isl 8k --policy snapkv:window=4k"),
        &["a budget of 2048 tokens can't hold 0 sinks and 4096 recent tokens"],
    );
}

#[test]
fn this_machine_needs_its_profile_first() {
    refuses("plan", &["no kernel profile of this machine", "hint: batchmax profile"]);
    refuses("plan --threads 0", &["--threads 0: at least one thread"]);
    refuses("plan --threads 1000000", &["this machine has", "leave --threads out"]);
}

#[test]
fn descriptions_of_the_user_come_first_and_are_named_with_their_line() {
    let place = Place::new();
    let written = include_str!("../profiles/gpus/l40s.toml").replace("\"l40s\"", "\"mine\"");
    place.write("own/gpus/mine.toml", &written);
    let at = |args: &[&str]| {
        let all: Vec<&str> =
            ["--profiles", "own"].into_iter().chain(args.iter().copied()).collect();
        place.run(&all)
    };
    assert!(at(&["gpus"]).answered().contains("\nmine "));
    at(&["what-if", "--model", "qwen2.5-0.5b", "--gpu", "mine"]).answered();

    let lines = written.lines().count();
    place.write("own/gpus/mine.toml", format!("{written}usd_per_hr = 3\n"));
    let error = at(&["gpus", "mine"]).refused();
    // The last key stands inside the table of the peaks, where there is one.
    assert!(error.contains(&format!("own/gpus/mine.toml:{}: unknown field", lines + 1)), "{error}");

    place.write("own/models/odd.toml", "name = \"odd\"\nsource = \"x\"\nlayers = \"2 layers\"\n");
    assert_eq!(
        at(&["models", "odd"]).refused(),
        "error: own/models/odd.toml:3: invalid type: string \"2 layers\", expected a whole number from 0 to 4294967295\n\
         hint: a bare number, without quotes or units\n"
    );
    place.write("own/models/odd.toml", "name = \"odd\"\nsource = \"x\"\nlayers = 2\nhiden = 4\n");
    let error = at(&["models", "odd"]).refused();
    assert_eq!(
        error,
        "error: own/models/odd.toml:4: unknown field `hiden`; did you mean `hidden`?\n"
    );
    let error = at(&["models"]).refused();
    assert!(error.contains("own/models/odd.toml:4"), "{error}");

    place.write("own/policies/odd.toml", "kind = \"batch-max\"\nbudget = 512\nchunck = 64\n");
    let error = at(&["policies", "odd"]).refused();
    assert_eq!(
        error,
        "error: own/policies/odd.toml:3: unknown field `chunck`; did you mean `chunk`?\n"
    );
    place.write("own/policies/odd.toml", "kind = \"batch-mix\"\n");
    assert_eq!(
        at(&["policies", "odd"]).refused(),
        "error: own/policies/odd.toml: kind: unknown policy kind `batch-mix`; did you mean `batch-max`?\n"
    );
    refuses("--profiles nowhere models", &["--profiles nowhere: no such directory"]);
}

#[test]
fn files_that_are_no_descriptions_are_refused_by_name() {
    let place = Place::new();
    for name in ["noise.toml", "noise.json", "noise.gguf", "noise.csv"] {
        place.write(name, [0xff, 0xfe, 0, 7, b'\n', 0x80, b'"', b'{']);
        let args: &[&str] = if name == "noise.csv" {
            &["what-if", "--scenarios", name]
        } else {
            &["what-if", "--gpu", "h100-sxm", "--model", name]
        };
        place.run(args).refused();
    }
    for name in ["none.gguf", "none.json", "none.toml"] {
        let error = place.run(&["what-if", "--gpu", "h100-sxm", "--model", name]).refused();
        assert!(error.contains(name), "{error}");
    }
    let error = place.run(&["fetch", "none.gguf"]).refused();
    assert!(error.contains("none.gguf"), "{error}");
    let error = place.run(&["gpus", "h100\u{1b}[31m\nsxm"]).refused();
    assert!(!error.contains('\u{1b}'), "{error:?}");
}

#[test]
fn a_hugging_face_configuration_is_a_model() {
    let place = Place::new();
    let config = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
        "max_position_embeddings": 256, "torch_dtype": "bfloat16"}"#;
    place.write("tiny/config.json", config);
    for path in ["tiny", "tiny/config.json"] {
        let args = ["what-if", "--model", path, "--gpu", "t4", "--isl", "100", "--osl", "10"];
        assert!(place.run(&args).answered().starts_with("tiny on t4"));
    }
    place.write("tiny/config.json", config.replace("LlamaFor", "BloomFor"));
    let error = place.run(&["models", "tiny"]).refused();
    assert!(error.contains("\"BloomForCausalLM\" is not described yet; known: Llama"), "{error}");
}

const COLUMNS: &str = "id,gpu,model,batch,input_len,output_len,policy";

fn scenarios(place: &Place, text: &str) -> Ran {
    place.write("scenarios.csv", text);
    place.run(&["what-if", "--scenarios", "scenarios.csv"])
}

#[test]
fn scenarios_are_answered_row_by_row_and_refusals_say_why() {
    let rows = [
        "good,h100-sxm,llama-3.1-8b,4,2048,128,full",
        "alias,h100,META-LLAMA/Llama-3.1-8B,4,2048,128,",
        "largest,h100-sxm,llama-3.1-8b,max,2k,128,batch-max",
        "device,h1000,llama-3.1-8b,4,2048,128,full",
        "model,h100-sxm,llama-9,4,2048,128,full",
        "policy,h100-sxm,llama-3.1-8b,4,2048,128,fuller",
        "context,h100-sxm,llama-3.1-8b,4,999999,128,full",
        "zero,h100-sxm,llama-3.1-8b,0,2048,128,full",
        "text,h100-sxm,llama-3.1-8b,4,long,128,full",
        "memory,t4,llama-3.1-70b,max,2048,128,full",
    ];
    let text = scenarios(&Place::new(), &format!("{COLUMNS}\n{}\n", rows.join("\n"))).answered();
    let answers = records(&text);
    assert_eq!(answers.len(), rows.len());
    for (answer, row) in answers.iter().zip(&rows) {
        let id = row.split(',').next().expect("an id");
        assert_eq!(answer["id"], id);
        let good = ["good", "alias", "largest"].contains(&id);
        assert_eq!(answer["refused"].is_empty(), good, "{answer:?}");
        assert_eq!(answer["output_tok_s"].parse::<f64>().is_ok(), good, "{answer:?}");
        assert!(!answer["refused"].contains('\n'));
    }
    let why = |id: &str| &answers.iter().find(|a| a["id"] == id).expect("a row")["refused"];
    assert!(why("device").contains("no gpu \"h1000\""));
    assert!(why("model").contains("no model \"llama-9\""));
    assert!(why("policy").contains("did you mean \"full\"?"));
    assert!(why("context").contains("exceed the context"));
    assert!(why("text").contains("\"long\" is not a number of tokens"));
}

#[test]
fn scenario_files_that_can_not_be_read_are_refused_whole() {
    let place = Place::new();
    let error = scenarios(&place, "id,gpu,input_len,output_len\n1,t4,1,1\n").refused();
    assert!(error.contains("scenarios.csv:1: column \"model\" is missing"), "{error}");
    assert!(scenarios(&place, "").refused().contains("scenarios.csv"));
    let error = scenarios(&place, &format!("{COLUMNS}\n")).refused();
    assert!(error.contains("no scenario below the header"), "{error}");
    let error = scenarios(&place, &format!("{COLUMNS}\n1,t4\n")).refused();
    assert!(error.contains("scenarios.csv:2"), "{error}");
    refuses("what-if --scenarios none.csv", &["none.csv", "No such file"]);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let program = Path::new(env!("CARGO_BIN_EXE_batchmax"));
    let place = Place::new();
    let mut child = Command::new(program)
        .args(["models", "--json"])
        .env_clear()
        .env("HOME", place.dir.path())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("the program starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
