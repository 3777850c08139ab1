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

fn is(value: &Value, kind: &str) -> bool {
    match kind {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("no type {other}"),
    }
}

/// What a value breaks of a schema, of the words that our schemas use: type, const, enum, properties, required,
/// additionalProperties, items and references to definitions.
fn broken(root: &Value, schema: &Value, value: &Value, at: &str, found: &mut Vec<String>) {
    let rules = schema.as_object().expect("rules");
    for (word, rule) in rules {
        match word.as_str() {
            "type" => {
                let kinds = rule.as_array().cloned().unwrap_or_else(|| vec![rule.clone()]);
                if !kinds.iter().any(|k| is(value, k.as_str().expect("a type"))) {
                    found.push(format!("{at}: {value} is not {rule}"));
                }
            }
            "const" if rule != value => found.push(format!("{at}: {value} is not {rule}")),
            "enum" if !rule.as_array().expect("values").contains(value) => {
                found.push(format!("{at}: {value} is none of {rule}"));
            }
            "required" if value.is_object() => {
                for name in rule.as_array().expect("names") {
                    let name = name.as_str().expect("a name");
                    if value.get(name).is_none() {
                        found.push(format!("{at}: {name} is missing"));
                    }
                }
            }
            "properties" if value.is_object() => {
                for (name, rule) in rule.as_object().expect("properties") {
                    if let Some(value) = value.get(name) {
                        broken(root, rule, value, &format!("{at}.{name}"), found);
                    }
                }
            }
            "additionalProperties" if value.is_object() => {
                let known = &schema["properties"];
                for (name, value) in value.as_object().expect("an object") {
                    let own = known.get(name).is_none();
                    match rule {
                        Value::Bool(false) if own => found.push(format!("{at}: {name} is new")),
                        Value::Object(_) if own => {
                            broken(root, rule, value, &format!("{at}.{name}"), found);
                        }
                        _ => {}
                    }
                }
            }
            "items" => {
                for (i, value) in value.as_array().into_iter().flatten().enumerate() {
                    broken(root, rule, value, &format!("{at}[{i}]"), found);
                }
            }
            "$ref" => {
                let name = rule.as_str().and_then(|r| r.strip_prefix("#/$defs/")).expect("ours");
                broken(root, &root["$defs"][name], value, at, found);
            }
            "const"
            | "enum"
            | "required"
            | "properties"
            | "additionalProperties"
            | "$schema"
            | "$defs"
            | "title"
            | "description" => {}
            other => panic!("{at}: the test does not know {other}"),
        }
    }
}

#[track_caller]
fn holds(kind: &str, place: &Place, args: &str) {
    let words: Vec<&str> = args.split_whitespace().chain(["--json"]).collect();
    let ran = place.run(&words);
    assert!(matches!(ran.code, Some(0 | 1)), "{args}: {}", ran.err);
    let value: Value = serde_json::from_str(&ran.out).expect("JSON");
    let schema = schema(kind);
    let mut found = Vec::new();
    broken(&schema, &schema, &value, kind, &mut found);
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

#[test]
fn the_check_itself_finds_what_is_wrong() {
    let schema = schema("doctor");
    let mut value: Value = serde_json::from_str(
        r#"{"schema_version": 1, "kind": "doctor", "missing": 0,
            "checks": [{"name": "machine", "state": "ok", "found": "x"}]}"#,
    )
    .expect("JSON");
    let wrong = |value: &Value| {
        let mut found = Vec::new();
        broken(&schema, &schema, value, "doctor", &mut found);
        found
    };
    assert!(wrong(&value).is_empty(), "{:?}", wrong(&value));
    value["checks"][0]["state"] = "fine".into();
    value["schema_version"] = 2.into();
    value["more"] = true.into();
    value.as_object_mut().expect("an object").remove("missing");
    assert_eq!(wrong(&value).len(), 4, "{:?}", wrong(&value));
}
