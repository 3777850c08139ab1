//! The JSON that is printed is that of docs/schemas.

mod common;

use std::path::PathBuf;

use common::Place;
use serde_json::Value;

fn schema(kind: &str) -> Value {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/schemas");
    let path = dir.join(format!("{kind}.json"));
    let text = std::fs::read_to_string(&path).expect("a schema");
    serde_json::from_str(&text).expect("JSON")
}

/// What a document breaks of a schema.
fn broken(schema: &Value, value: &Value) -> Vec<String> {
    let validator = jsonschema::draft202012::new(schema).expect("a schema");
    validator.iter_errors(value).map(|e| format!("{}: {e}", e.instance_path())).collect()
}

#[track_caller]
fn holds(kind: &str, place: &Place, args: &str) {
    let words: Vec<&str> = args.split_whitespace().chain(["--json"]).collect();
    let ran = place.run(&words);
    assert!(matches!(ran.code, Some(0 | 1)), "{args}: {}", ran.err);
    let value: Value = serde_json::from_str(&ran.out).expect("JSON");
    let found = broken(&schema(kind), &value);
    assert!(found.is_empty(), "{args}:\n{}", found.join("\n"));
}

#[test]
fn documents_are_those_of_the_schemas() {
    let place = Place::new();
    for args in [
        "plan --model qwen2.5-7b --gpu l40s --isl 8k",
        "plan --model qwen2.5-7b --gpu l40s,t4 --isl 8k --objective cost --pareto",
        "plan --model llama-3.1-70b --gpu t4",
        "plan --model llama-3.1-8b --gpu h100-sxm --gpus 4 --tpot 20ms --max-kl 0.2",
    ] {
        holds("plan", &place, args);
    }
    holds("what-if", &place, "what-if --model qwen2.5-7b --gpu l40s,t4 --isl 2k..8k --batch 1,max");
    holds("what-if", &place, "what-if --model llama-3.1-70b --gpu t4");
    place.write(
        "s.csv",
        "id,gpu,model,batch,input_len,output_len,policy\na,t4,qwen2.5-0.5b,1,100,10,full\nb,none,qwen2.5-0.5b,1,100,10,full\n",
    );
    holds("scenarios", &place, "what-if --scenarios s.csv");
    holds(
        "explain",
        &place,
        "explain --model qwen2.5-0.5b --gpu t4 --policy batch-max --isl 1k --batch 2",
    );
    for kind in ["models", "gpus", "engines", "policies"] {
        holds(kind, &place, kind);
    }
    holds("doctor", &place, "doctor");
    holds("config", &place, "config");
}

#[cfg(feature = "exec")]
const TINY: &str = "--model tiny.toml --weights synthetic --quiet --threads 1";

/// Commands that run: on a model of two layers with made-up weights.
#[cfg(feature = "exec")]
#[test]
fn documents_of_runs_are_those_of_the_schemas() {
    let place = Place::with_tiny();
    for (kind, args) in [
        ("run", "--isl 64 --osl 8 --batch 3"),
        ("run", "--isl 64 --osl 1 --batch 1 --temperature 0.7"),
        ("run", "--isl 64 --osl 8 --batch 2 --schedule continuous:3"),
        ("run", "--isl 64 --osl 8 --batch 2 --policy dbudgetkv"),
        ("compare", "--isl 200 --osl 8 --kv-memory 400kB"),
        ("quality", "--context 128 --samples 2 --policy snapkv:budget=50%,window=8"),
        ("quality", "--context 128 --samples 2 --chunked --budget 50% --policy knorm random"),
        ("prepare", "less:hidden=8,budget=25% --context 64 --samples 4 --out less.toml"),
        ("prepare", "dbudgetkv --context 64 --samples 4 --out dbudgetkv.toml"),
        ("prepare", "duoattention --context 64 --samples 4 --out duoattention.toml"),
    ] {
        holds(kind, &place, &format!("{kind} {TINY} {args}"));
    }
    holds("devices", &place, "devices");
}

/// What needs a profile of the machine.
#[cfg(feature = "exec")]
#[test]
#[ignore = "times kernels for two minutes"]
fn documents_of_profiles_are_those_of_the_schemas() {
    let place = Place::with_tiny();
    let profile = "profile --model tiny.toml --threads 1 --rounds 1 --quiet --out timings.json";
    holds("profile", &place, profile);
    holds("validate", &place, &format!("validate {TINY} --isl 64 --osl 8 --batch 2"));
    holds("validate", &place, &format!("validate {TINY} --isl 64 --osl 8 --policy dbudgetkv"));
    holds("import", &place, "import batchmax-profile timings.json");
    let ran = place.run(
        &format!("validate {TINY} --isl 64 --osl 8 --batch 2 --out r.json")
            .split_whitespace()
            .collect::<Vec<_>>(),
    );
    assert!(matches!(ran.code, Some(0 | 1)), "{}", ran.err);
    holds("import", &place, "import batchmax-validate r.json --out .");
}

#[test]
fn documents_about_timings_are_those_of_the_schemas() {
    let place = Place::new();
    let rows = [(16, 16.5), (64, 17.0), (256, 20.0), (1024, 60.0), (4096, 190.0)]
        .map(|(m, us)| format!("h100_sxm,bf16,vllm,x,y,{m},4096,4096,{us},test\n"));
    let head = "gpu,dtype,framework,version,kernel,m,n,k,latency_us,source\n";
    place.write("points.csv", head.to_owned() + &rows.concat());
    holds("calibrate-check", &place, "calibrate check --points points.csv");
    holds("calibrate", &place, "calibrate --points points.csv --out fitted");
    place.write(
        "runs.csv",
        "id,source,date,gpu,n_gpus,tp,pp,model,weight_dtype,kv_dtype,engine,engine_version,mode,\
         batch_or_concurrency,input_len,output_len,kv_policy,metric,value,notes\n\
         a,x,2025,h100-sxm,1,1,1,llama-3.1-8b,bf16,bf16,vllm,1,static-batch,8,1024,128,none,output_tok_s,900,\n\
         b,x,2025,h900,1,1,1,llama-3.1-8b,bf16,bf16,vllm,1,static-batch,8,1024,128,none,output_tok_s,900,\n",
    );
    holds("score", &place, "score --runs runs.csv");
    holds("calibrate-engines", &place, "calibrate engines --runs runs.csv --out engines");
}

#[test]
fn the_check_itself_finds_what_is_wrong() {
    let schema = schema("doctor");
    let mut value: Value = serde_json::from_str(
        r#"{"schema_version": 1, "kind": "doctor", "missing": 0,
            "checks": [{"name": "machine", "state": "ok", "found": "x"}]}"#,
    )
    .expect("JSON");
    let wrong = |value: &Value| broken(&schema, value);
    assert!(wrong(&value).is_empty(), "{:?}", wrong(&value));
    value["checks"][0]["state"] = "fine".into();
    value["schema_version"] = 2.into();
    value["more"] = true.into();
    value.as_object_mut().expect("an object").remove("missing");
    assert_eq!(wrong(&value).len(), 4, "{:?}", wrong(&value));
}
