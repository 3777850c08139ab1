//! `score`, `calibrate check` and `calibrate --points` from outside.

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;

const RUNS: &str = "id,source,date,gpu,n_gpus,tp,pp,model,weight_dtype,kv_dtype,engine,engine_version,mode,\
batch_or_concurrency,input_len,output_len,kv_policy,metric,value,notes\n";

fn batchmax(dir: &std::path::Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_batchmax"))
        .args(["--data-dir", &dir.join("data").display().to_string()])
        .args(arguments)
        .current_dir(dir)
        .output()
        .expect("it runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

fn row(id: &str, gpu: &str, model: &str, engine: &str, metric: &str, value: &str) -> String {
    format!(
        "{id},x,2025,{gpu},1,1,1,{model},bf16,bf16,{engine},1,static-batch,8,1024,128,none,{metric},{value},dense\n"
    )
}

#[test]
fn every_run_is_predicted_or_refused_with_a_reason() {
    let dir = tempfile::tempdir().expect("a directory");
    let rows = [
        row("good", "h100-sxm", "llama-3.1-8b", "vllm", "output_tok_s", "900"),
        row("nogpu", "h900", "llama-3.1-8b", "vllm", "output_tok_s", "900"),
        row("noengine", "h100-sxm", "llama-3.1-8b", "vlln", "output_tok_s", "900"),
        row("nomodel", "h100-sxm", "llama-9", "vllm", "output_tok_s", "900"),
        row("nometric", "h100-sxm", "llama-3.1-8b", "vllm", "joy", "900"),
        row("nan", "h100-sxm", "llama-3.1-8b", "vllm", "output_tok_s", "NaN"),
        row("huge", "rtx-4090", "llama-3.1-70b", "vllm", "output_tok_s", "900"),
        "moe,x,2025,h100-sxm,1,1,1,mixtral,bf16,bf16,vllm,1,online,8,1024,128,none,tpot_ms,9,moe; x\n".to_owned(),
    ];
    fs::write(dir.path().join("runs.csv"), RUNS.to_owned() + &rows.concat()).expect("written");
    let out = batchmax(dir.path(), &["score", "--runs", "runs.csv", "--out", "p.csv", "--json"]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    let found: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!(found["predicted"], 1);
    assert_eq!(found["refused"].as_array().expect("a list").len(), 7);
    let predictions = fs::read_to_string(dir.path().join("p.csv")).expect("written");
    let lines: Vec<&str> = predictions.lines().collect();
    assert_eq!(lines[0], "id,metric,measured,predicted,low,high,source,refused");
    assert_eq!(lines.len(), 1 + rows.len());
    let good: Vec<&str> = lines[1].split(',').collect();
    let number = |i: usize| good[i].parse::<f64>().expect("a number");
    assert!(number(4) < number(3) && number(3) < number(5), "{good:?}");
    assert!((300.0..3000.0).contains(&number(3)), "{good:?}");
    for (line, expected) in [
        (2, "no gpu"),
        (3, "did you mean"),
        (4, "no model"),
        (5, "metric \"\"joy\"\" is not predicted"),
        (6, "not positive"),
        (7, "do not fit"),
        (8, "mixture of experts"),
    ] {
        assert!(lines[line].contains(expected), "{}", lines[line]);
    }
}

#[test]
fn files_that_are_no_runs_are_one_line_errors() {
    let dir = tempfile::tempdir().expect("a directory");
    for (content, expected) in [
        ("", "column \"id\" is missing"),
        ("id,gpu\n", "column \"model\" is missing"),
        (RUNS, "no run below the header"),
    ] {
        fs::write(dir.path().join("r.csv"), content).expect("written");
        let out = batchmax(dir.path(), &["score", "--runs", "r.csv"]);
        assert_eq!(out.status.code(), Some(2));
        let error = text(&out.stderr);
        assert!(error.contains(expected) && error.trim_end().lines().count() == 1, "{error}");
    }
    let out = batchmax(dir.path(), &["score", "--runs", "absent.csv"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("absent.csv"));
}

#[test]
fn timings_are_checked_against_what_ships() {
    let dir = tempfile::tempdir().expect("a directory");
    let points = "gpu,dtype,framework,version,kernel,m,n,k,latency_us,source\n\
                  h100_sxm,bf16,vllm,x,y,16,4096,4096,16.5,test\n\
                  h100_sxm,bf16,vllm,x,y,4096,4096,4096,190,test\n\
                  h100_sxm,bf16,vllm,x,y,4096,4096,4096,0,test\n";
    fs::write(dir.path().join("p.csv"), points).expect("written");
    let out = batchmax(dir.path(), &["calibrate", "check", "--points", "p.csv", "--json"]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("p.csv:4: latency_us: 0 is not a positive time"));
    let found: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!(found["total"]["n"], 2);
    let group = &found["groups"][0];
    assert_eq!(group["op"], "gemm");
    assert_eq!(group["gpu"], "h100-sxm");
    for name in ["median", "p90", "p95", "bias", "time_weighted", "coverage"] {
        assert!(group[name].is_f64(), "{name}: {group}");
    }
    assert!(group["median"].as_f64().expect("a number") < 0.3, "{group}");
    let out = batchmax(
        dir.path(),
        &["calibrate", "check", "--points", "p.csv", "--gpu", "a100", "--json"],
    );
    assert_eq!(out.status.code(), Some(2));
}

#[test]
fn a_few_timings_of_a_new_device_make_it_a_known_one() {
    let dir = tempfile::tempdir().expect("a directory");
    // A device as fast as half an H100, by its timings; its data sheet is an A40's.
    let mut points = String::from("gpu,dtype,framework,version,kernel,m,n,k,latency_us,source\n");
    for (n, k) in [(4096, 4096), (12_288, 4096), (4096, 14_336), (8192, 8192)] {
        for m in [1, 16, 128, 512, 2048] {
            let weights = 2.0 * f64::from(n) * f64::from(k) / 600e3;
            let products = 2.0 * f64::from(n) * f64::from(k) * f64::from(m) / 100e6;
            points +=
                &format!("a40,bf16,vllm,x,y,{m},{n},{k},{},test\n", 5.0 + weights.max(products));
        }
    }
    fs::write(dir.path().join("p.csv"), points).expect("written");
    let error = |extra: &[&str]| {
        let mut arguments = vec!["calibrate", "check", "--points", "p.csv", "--json"];
        arguments.extend(extra);
        let out = batchmax(dir.path(), &arguments);
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        let found: Value = serde_json::from_slice(&out.stdout).expect("JSON");
        found["total"]["median"].as_f64().expect("a number")
    };
    let before = error(&[]);
    let out = batchmax(dir.path(), &["calibrate", "--points", "p.csv"]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert!(dir.path().join("data/kernels/a40/vllm.toml").is_file());
    let after = error(&[]);
    assert!(after < 0.7 * before, "{after} after, {before} before");
}
