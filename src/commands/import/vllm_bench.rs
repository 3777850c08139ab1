//! Result files of `vllm bench serve`, `throughput` and `latency` (`benchmark_serving.py --save-result` and its
//! siblings), told apart by their keys. `serve --append-result` writes several objects one after the other.
//!
//! `throughput` and `latency` name neither model nor lengths: they come from flags.

use std::path::Path;

use anyhow::{Result, bail};
use batchmax_sim::profile::Catalog;
use serde_json::{Map, Value};

use crate::cli::import::VllmBenchArgs;

use super::runs::{self, Run, credible, kv_policy};
use super::sheet::read_file;
use super::summary::{Summary, tame};

/// Imports.
pub fn import(
    catalog: &Catalog,
    args: &VllmBenchArgs,
    dir: &Path,
    summary: &mut Summary,
) -> Result<()> {
    let gpu = catalog.gpu(&args.facts.gpu)?.name;
    let mut rows = Vec::new();
    for path in &args.files {
        let place = path.display().to_string();
        let bytes = read_file(path)?;
        for (i, document) in serde_json::Deserializer::from_slice(&bytes).into_iter().enumerate() {
            let result: Value = document
                .map_err(|e| anyhow::anyhow!("{place}: not JSON: {}", tame(&e.to_string())))?;
            let Some(result) = result.as_object() else {
                bail!("{place}: expected a JSON object, the result of vllm bench");
            };
            let base = base(args, &gpu, path, result);
            let found = if result.contains_key("mean_ttft_ms") {
                serve(base, result)
            } else if result.contains_key("elapsed_time") {
                throughput(base, args, result)
            } else if result.contains_key("avg_latency") {
                latency(base, args, result)
            } else {
                bail!(
                    "{place}: none of mean_ttft_ms, elapsed_time, avg_latency: not a result of vllm bench serve, throughput or latency"
                );
            };
            let here = || format!("{place} result {}", i + 1);
            match found {
                Err(why) => summary.leave_out(&why, here),
                Ok((run, metrics)) => {
                    for (metric, value) in metrics {
                        match value.ok_or("value is missing").and_then(credible) {
                            Ok(value) => rows.push(run.with(metric, value)),
                            Err(why) => summary.leave_out(&format!("{metric}: {why}"), here),
                        }
                    }
                }
            }
        }
    }
    runs::write(dir, "vllm-bench", rows, summary)
}

type Found = Result<(Run, Vec<(&'static str, Option<f64>)>), String>;

/// What all metrics of a result share.
fn base(args: &VllmBenchArgs, gpu: &str, path: &Path, result: &Map<String, Value>) -> Run {
    let facts = &args.facts;
    let [tp, pp] = [facts.tp, facts.pp].map(|n| n.unwrap_or(1).max(1));
    let text = |key: &str| tame(result.get(key).and_then(Value::as_str).unwrap_or(""));
    let kv_dtype = facts.kv_dtype.clone().unwrap_or_else(|| "auto".to_owned());
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    // The client's backend: OpenAI's interface is vLLM's unless it says another engine.
    let engine = match text("backend").as_str() {
        backend if backend.starts_with("tensorrt") => "tensorrt-llm",
        backend if backend.starts_with("sglang") => "sglang",
        backend if backend.starts_with("lmdeploy") => "lmdeploy-turbomind",
        backend if backend.starts_with("deepspeed") => "deepspeed-mii",
        _ => "vllm",
    };
    Run {
        source: format!("vllm bench {}", tame(&name)),
        date: date(&text("date")),
        gpu: gpu.to_owned(),
        n_gpus: u64::from(tp).saturating_mul(u64::from(pp)).to_string(),
        tp: tp.to_string(),
        pp: pp.to_string(),
        model: facts.model.clone().unwrap_or_else(|| text("model_id")),
        weight_dtype: facts.weight_dtype.clone().unwrap_or_default(),
        kv_policy: kv_policy(&kv_dtype).to_owned(),
        kv_dtype,
        engine: engine.to_owned(),
        engine_version: facts.engine_version.clone().unwrap_or_default(),
        ..Run::default()
    }
}

/// A result of requests sent one by one.
fn serve(base: Run, result: &Map<String, Value>) -> Found {
    let number = |key: &str| result.get(key).and_then(Value::as_f64);
    let completed = number("completed").filter(|n| *n >= 1.0).ok_or("no request was completed")?;
    let mean = |key: &str| number(key).filter(|n| *n > 0.0).map(|n| n / completed);
    let input = mean("total_input_tokens").ok_or("no total_input_tokens")?;
    let output = mean("total_output_tokens").ok_or("no total_output_tokens")?;
    let mut notes = vec![format!("mean of {completed} requests")];
    if input.fract() != 0.0 || output.fract() != 0.0 {
        notes.push(format!("mean lengths {input:.1} and {output:.1}"));
    }
    match result.get("request_rate") {
        Some(Value::Number(rate)) => notes.push(format!("{rate} requests/s")),
        Some(Value::String(rate)) => notes.push(format!("request rate {}", tame(rate))),
        _ => {}
    }
    if let Some(failed) = number("failed").filter(|n| *n > 0.0) {
        notes.push(format!("{failed} requests failed"));
    }
    let concurrency = result.get("max_concurrency").and_then(Value::as_u64);
    let run = Run {
        mode: "online".to_owned(),
        batch_or_concurrency: concurrency.map(|n| n.to_string()).unwrap_or_default(),
        input_len: format!("{input:.0}"),
        output_len: format!("{output:.0}"),
        notes: notes.join("; "),
        ..base
    };
    let metrics = vec![
        ("ttft_ms", number("mean_ttft_ms")),
        ("tpot_ms", number("mean_tpot_ms")),
        ("output_tok_s", number("output_throughput")),
        ("total_tok_s", number("total_token_throughput")),
    ];
    Ok((run, metrics))
}

/// A result of all requests queued at once.
fn throughput(base: Run, args: &VllmBenchArgs, result: &Map<String, Value>) -> Found {
    let number = |key: &str| result.get(key).and_then(Value::as_f64).filter(|n| *n > 0.0);
    let (Some(isl), Some(osl)) = (args.isl, args.osl) else {
        return Err("a throughput result needs --isl and --osl".to_owned());
    };
    let requests = number("num_requests").ok_or("no num_requests")?;
    let tokens = number("total_num_tokens").ok_or("no total_num_tokens")?;
    let seconds = number("elapsed_time").ok_or("elapsed_time is not positive")?;
    let expected = requests * (isl as f64 + osl as f64);
    // Prompts made of random tokens come out a few tokens longer or shorter.
    if (tokens / expected - 1.0).abs() > 0.02 {
        return Err("total_num_tokens is not num_requests times --isl plus --osl".to_owned());
    }
    let run = Run {
        mode: "offline-throughput".to_owned(),
        notes: format!("{requests} requests"),
        ..base
    };
    let run = with_lengths(run, isl, osl);
    let metrics = vec![
        ("output_tok_s", Some(requests * osl as f64 / seconds)),
        ("total_tok_s", Some(tokens / seconds)),
    ];
    Ok((run, metrics))
}

/// A result of one batch from its first prompt token to its last token.
fn latency(base: Run, args: &VllmBenchArgs, result: &Map<String, Value>) -> Found {
    let (Some(isl), Some(osl), Some(batch)) = (args.isl, args.osl, args.batch) else {
        return Err("a latency result needs --isl, --osl and --batch".to_owned());
    };
    let seconds = result.get("avg_latency").and_then(Value::as_f64);
    let passes = result.get("latencies").and_then(Value::as_array).map_or(0, Vec::len);
    let run = Run {
        mode: "static-batch".to_owned(),
        batch_or_concurrency: batch.to_string(),
        notes: format!("mean of {passes} passes"),
        ..base
    };
    let run = with_lengths(run, isl, osl);
    let rate = |tokens: f64| seconds.filter(|s| *s > 0.0).map(|s| batch as f64 * tokens / s);
    let metrics = vec![
        ("e2e_s", seconds),
        ("output_tok_s", rate(osl as f64)),
        ("total_tok_s", rate(isl as f64 + osl as f64)),
    ];
    Ok((run, metrics))
}

fn with_lengths(run: Run, isl: u64, osl: u64) -> Run {
    Run { input_len: isl.to_string(), output_len: osl.to_string(), ..run }
}

/// `20250220-123456` -> `2025-02-20`.
fn date(text: &str) -> String {
    match text.get(..8) {
        Some(d) if d.bytes().all(|b| b.is_ascii_digit()) => {
            format!("{}-{}-{}", &d[..4], &d[4..6], &d[6..])
        }
        _ => String::new(),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use crate::cli::import::RunFacts;

    fn imported(text: &str, lengths: Option<(u64, u64, u64)>) -> Result<(Vec<String>, Summary)> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        std::fs::write(&path, text).unwrap();
        let facts = RunFacts {
            gpu: "h100".to_owned(),
            model: None,
            tp: Some(2),
            pp: None,
            weight_dtype: Some("bf16".to_owned()),
            kv_dtype: None,
            engine_version: Some("0.9.1".to_owned()),
        };
        let (isl, osl, batch) =
            lengths.map_or((None, None, None), |(i, o, b)| (Some(i), Some(o), Some(b)));
        let args = VllmBenchArgs { files: vec![path], facts, isl, osl, batch };
        let mut summary = Summary::default();
        import(&Catalog::built_in(), &args, dir.path(), &mut summary)?;
        let text = std::fs::read_to_string(dir.path().join("runs.csv")).unwrap_or_default();
        Ok((text.lines().skip(1).map(str::to_owned).collect(), summary))
    }

    const SERVE: &str = r#"{"date": "20250220-123456", "backend": "openai", "model_id": "Qwen/Qwen3-32B", "num_prompts": 10,
        "request_rate": "inf", "max_concurrency": 8, "completed": 10, "total_input_tokens": 10240,
        "total_output_tokens": 1285, "output_throughput": 500.5, "total_token_throughput": 4600.0,
        "mean_ttft_ms": 120.25, "mean_tpot_ms": 15.5}"#;

    #[test]
    fn a_serving_result_is_four_runs() {
        let (rows, summary) = imported(SERVE, None).unwrap();
        let start = "vllm bench r.json,2025-02-20,h100-sxm,2,2,1,Qwen/Qwen3-32B,bf16,auto,vllm,0.9.1,online,8,1024,128,none";
        let notes = "mean of 10 requests; mean lengths 1024.0 and 128.5; request rate inf";
        assert_eq!(rows[0], format!("vllm-bench-00001,{start},ttft_ms,120.25,{notes}"));
        assert_eq!(rows[3], format!("vllm-bench-00004,{start},total_tok_s,4600,{notes}"));
        assert_eq!((rows.len(), summary.rows_left_out()), (4, 0));
        let twice = imported(&format!("{SERVE}\n{SERVE}"), None).unwrap();
        assert_eq!(twice.0.len(), 8);
    }

    #[test]
    fn offline_results_take_their_lengths_from_flags() {
        let text = r#"{"elapsed_time": 10.0, "num_requests": 100, "total_num_tokens": 64000, "tokens_per_second": 6400.0}"#;
        let (rows, _) = imported(text, Some((512, 128, 1))).unwrap();
        assert!(
            rows[0].contains(",offline-throughput,,512,128,none,output_tok_s,1280,100 requests"),
            "{rows:?}"
        );
        let (rows, summary) = imported(text, None).unwrap();
        assert!(rows.is_empty() && summary.lines()[0].contains("needs --isl"));
        assert!(imported(text, Some((1024, 128, 1))).unwrap().0.is_empty());
        let text = r#"{"avg_latency": 2.0, "latencies": [2.0, 2.0], "percentiles": {"50": 2.0}}"#;
        let (rows, _) = imported(text, Some((32, 128, 8))).unwrap();
        assert!(
            rows[1].contains(",static-batch,8,32,128,none,output_tok_s,512,mean of 2 passes"),
            "{rows:?}"
        );
    }

    #[test]
    fn bad_results_are_refused() {
        for bad in ["", "{", "[1]", "{\"a\": 1}", "{\"mean_ttft_ms\": NaN}"] {
            match imported(bad, None) {
                Ok((rows, _)) => assert!(rows.is_empty() && bad.is_empty(), "{bad}"),
                Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
            }
        }
        let none = SERVE.replace("\"completed\": 10", "\"completed\": 0");
        assert!(imported(&none, None).unwrap().1.lines()[0].contains("no request was completed"));
        let zero = SERVE.replace("15.5", "-1");
        let (rows, summary) = imported(&zero, None).unwrap();
        assert_eq!((rows.len(), summary.rows_left_out()), (3, 1));
    }
}
