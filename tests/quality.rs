//! `batchmax quality` from outside, on a small made-up model: formats, gates, refusals.
#![cfg(feature = "exec")]

mod common;

use common::{Place, Ran, document};

fn quality(place: &Place, more: &[&str]) -> Ran {
    let mut args = vec!["quality", "--model", "tiny.toml", "--weights", "synthetic", "--quiet"];
    args.extend(["--threads", "1"]);
    let usual = [
        ["--context", "128"],
        ["--samples", "2"],
        ["--kv-dtype", "f32"],
        ["--policy", "knorm"],
        ["--budget", "50%"],
    ];
    args.extend(usual.iter().filter(|u| !more.contains(&u[0])).flatten());
    args.extend(more);
    place.run(&args)
}

#[test]
fn quality_has_gates_and_goes_on_from_a_file() {
    let place = Place::with_tiny();
    let few =
        [["--context", "320"], ["--policy", "knorm"], ["--budget", "50%"], ["--out", "q.json"]]
            .concat();
    let with = |more: &[&'static str]| [&few[..], more].concat();
    let one = document(&quality(&place, &with(&["--json"])).answered(), "quality");
    let keys = |d: &serde_json::Value| -> Vec<String> {
        let rows = d["rows"].as_array().expect("rows").iter();
        rows.map(|r| format!("{} {} {}", r["policy"], r["budget"], r["chunk"])).collect()
    };
    assert_eq!(keys(&one), [r#""full" null null"#, r#""knorm" "50%" null"#]);
    assert_eq!((&one["synthetic"], &one["samples"]), (&true.into(), &2.into()));
    let (full, knorm) = (&one["rows"][0], &one["rows"][1]);
    // 2 layers, 2 KV heads, K and V of 16 channels in f32; half of 320 tokens are five blocks of 32.
    assert_eq!(full["kv_bytes_per_token"], 512.0);
    assert_eq!(knorm["kv_bytes_per_token"], 256.0);
    assert_eq!(full["kl"], serde_json::json!([0.0, 0.0]));
    assert!(knorm["kl"].as_array().expect("a list").iter().all(|k| k.as_f64() > Some(0.0)));
    assert_eq!(knorm["digits"], serde_json::Value::Null, "made-up tokens hide no numbers");
    let gate = &one["gates"][0];
    assert_eq!(
        (&gate["name"], &gate["passed"]),
        (&"full through the path of a policy".into(), &true.into())
    );

    let grown = ["--context", "320", "--policy", "knorm", "streaming-llm", "--budget", "50%,40%"];
    let grown = [&grown[..], &["--chunked", "--out", "q.json", "--json"]].concat();
    let both = document(&quality(&place, &grown).answered(), "quality");
    // What was there stays as it was.
    assert_eq!(keys(&both).len(), 1 + 2 * 2 * 2);
    assert_eq!(both["rows"][1], one["rows"][1]);
    let before = std::fs::read_to_string(place.path("q.json")).expect("written");
    assert_eq!(document(&quality(&place, &grown).answered(), "quality"), both);
    assert_eq!(std::fs::read_to_string(place.path("q.json")).expect("written"), before);

    let table = quality(&place, &few[..6]).answered();
    assert!(table.contains("gate passed: full through the path") && table.contains("one-shot"));
    for other in [["--kv-dtype", "f16"], ["--questions", "1"], ["--samples", "3"]] {
        let other = quality(&place, &with(&other)).refused();
        assert!(other.contains("which is not what is asked"), "{other}");
    }
    // A chunk as long as the prompt is no chunk.
    let short = quality(&place, &["--chunked", "--json"]).answered();
    assert_eq!(keys(&document(&short, "quality")).len(), 2);
}

#[test]
fn quality_refuses_what_it_can_not_measure() {
    let place = Place::with_tiny();
    for (args, part) in [
        (["--policy", "nonsense"], "no policy \"nonsense\""),
        (["--policy", "snapkv:window=500"], "a window of 500 queries is longer"),
        (["--context", "400"], "longer than tiny reads, 512"),
        (["--context", "32"], "at least 96 tokens"),
        (["--budget", "some"], "budget"),
        (["--samples", "0"], "--samples"),
        (["--summary", "tiny.summary"], "made-up weights say nothing"),
    ] {
        let error = quality(&place, &args);
        assert!(error.err.contains(part), "{args:?}: {}", error.err);
        assert_eq!(error.code, Some(2), "{args:?}");
    }
}
