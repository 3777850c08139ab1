//! Results of `batchmax validate --out`, as runs: what somebody measured on a machine of their own, to be scored elsewhere.

use std::path::Path;

use anyhow::Result;
use batchmax_sim::profile::Catalog;
use serde::Deserialize;

use crate::cli::import::BatchmaxValidateArgs;

use super::runs::{self, Run, credible};
use super::sheet::read_file;
use super::summary::{Summary, tame};

/// What is needed of a result.
#[derive(Deserialize)]
struct Document {
    run: Ran,
    measured: Measured,
    synthetic: bool,
}

/// On what, and what of.
#[derive(Deserialize)]
struct Ran {
    date: String,
    version: String,
    processor: String,
    isa: String,
    device: String,
    devices: u32,
    model: String,
    weight_dtype: String,
    kv_dtype: String,
    isl: u64,
    osl: u64,
    prefix_hit: u64,
    schedule: String,
    preset: String,
}

#[derive(Deserialize)]
struct Measured {
    batch: u64,
    prefill_s: f64,
    decode_s: f64,
    prefill_tok_s: f64,
    decode_tok_s: f64,
    output_tok_s: f64,
    peak_rss_bytes: f64,
}

/// Imports.
pub fn import(
    catalog: &Catalog,
    args: &BatchmaxValidateArgs,
    dir: &Path,
    summary: &mut Summary,
) -> Result<()> {
    let gpu = args.gpu.as_ref().map(|name| catalog.gpu(name)).transpose()?.map(|gpu| gpu.name);
    let mut rows = Vec::new();
    for path in &args.files {
        let place = path.display().to_string();
        let Document { run, measured, synthetic } = serde_json::from_slice(&read_file(path)?)
            .map_err(|e| {
                anyhow::anyhow!(
                    "{place}: not a result of batchmax validate --out: {}",
                    tame(&e.to_string())
                )
            })?;
        // The rows of a file of runs are static batches or closed loops.
        if run.schedule != "static" {
            summary.leave_out("a schedule that is not static", || place.clone());
            continue;
        }
        if run.prefix_hit > 0 {
            summary.leave_out("prompts that were partly cached", || place.clone());
            continue;
        }
        let base = base(&run, &measured, synthetic, gpu.clone());
        let metrics = [
            ("prefill_tok_s", measured.prefill_tok_s),
            ("decode_tok_s", measured.decode_tok_s),
            ("output_tok_s", measured.output_tok_s),
            ("e2e_s", measured.prefill_s + measured.decode_s),
            ("peak_mem_gb", measured.peak_rss_bytes / 1e9),
        ];
        for (metric, value) in metrics {
            match credible(value) {
                Ok(value) => rows.push(base.with(metric, value)),
                Err(why) => summary.leave_out(&format!("{metric}: {why}"), || place.clone()),
            }
        }
    }
    runs::write(dir, "batchmax-validate", rows, summary)
}

fn base(run: &Ran, measured: &Measured, synthetic: bool, gpu: Option<String>) -> Run {
    let weights = if synthetic { "; synthetic weights" } else { "" };
    Run {
        source: "batchmax validate".to_owned(),
        date: tame(&run.date),
        gpu: gpu.unwrap_or_else(|| tame(&run.device)),
        n_gpus: run.devices.to_string(),
        tp: run.devices.to_string(),
        pp: "1".to_owned(),
        model: tame(&run.model),
        weight_dtype: tame(&run.weight_dtype),
        kv_dtype: tame(&run.kv_dtype),
        engine: "batchmax".to_owned(),
        engine_version: tame(&run.version),
        mode: "static-batch".to_owned(),
        batch_or_concurrency: measured.batch.to_string(),
        input_len: run.isl.to_string(),
        output_len: run.osl.to_string(),
        kv_policy: tame(&run.preset),
        notes: tame(&format!("{}, {}{weights}", run.processor, run.isa)),
        ..Run::default()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use batchmax_sim::runs::read_rows;
    use serde_json::{Value, json};

    use super::*;

    fn result() -> Value {
        json!({
            "kind": "validate",
            "run": {
                "date": "2026-11-27", "version": "0.1.0", "processor": "NVIDIA H100", "threads": 1,
                "isa": "sm_90, driver 12040", "device": "cuda-2x-nvidia-h100", "devices": 2,
                "model": "llama-3.1-8b", "weight_dtype": "bf16", "kv_dtype": "fp8", "isl": 4096,
                "osl": 256, "prefix_hit": 0, "schedule": "static",
                "preset": "snapkv:budget=25%,window=32",
            },
            "synthetic": true,
            "measured": {
                "batch": 16, "prefill_s": 2.0, "decode_s": 8.0, "prefill_tok_s": 32768.0,
                "decode_tok_s": 510.0, "output_tok_s": 409.6, "peak_rss_bytes": 3.0e10,
            },
        })
    }

    fn imported(results: &[Value], gpu: Option<&str>) -> Result<(String, Summary)> {
        let dir = tempfile::tempdir().unwrap();
        let write = |(i, result): (usize, &Value)| {
            let file = dir.path().join(format!("{i}.json"));
            std::fs::write(&file, result.to_string()).unwrap();
            file
        };
        let files = results.iter().enumerate().map(write).collect();
        let args = BatchmaxValidateArgs { files, gpu: gpu.map(str::to_owned) };
        let (mut summary, out) = (Summary::default(), dir.path().join("out"));
        import(&Catalog::built_in(), &args, &out, &mut summary)?;
        Ok((std::fs::read_to_string(out.join("runs.csv")).unwrap_or_default(), summary))
    }

    #[test]
    fn results_become_runs_that_are_understood() {
        let (text, _) = imported(&[result()], Some("h100-sxm")).unwrap();
        let (rows, bad) = read_rows("runs.csv", text.as_bytes()).unwrap();
        assert!(bad.is_empty());
        let values: Vec<_> = rows.iter().map(|r| (r.metric.as_str(), r.value.as_str())).collect();
        assert_eq!(
            values,
            [
                ("prefill_tok_s", "32768"),
                ("decode_tok_s", "510"),
                ("output_tok_s", "409.6"),
                ("e2e_s", "10"),
                ("peak_mem_gb", "30"),
            ]
        );
        let question = rows[2].understand(&Catalog::built_in()).unwrap();
        assert_eq!((question.setup.tp, question.isl, question.osl), (2, 4096, 256));
        assert!(question.preset.name.starts_with("snapkv"), "{}", question.preset.name);
        assert_eq!(rows[0].notes, "NVIDIA H100, sm_90, driver 12040; synthetic weights");
        let (own, _) = imported(&[result()], None).unwrap();
        assert!(own.contains(",cuda-2x-nvidia-h100,2,2,1,"), "{own}");
    }

    #[test]
    fn what_rows_cannot_say_is_left_out_and_what_is_no_result_is_refused() {
        let mut staggered = result();
        staggered["run"]["schedule"] = json!("staggered:1");
        let mut cached = result();
        cached["run"]["prefix_hit"] = json!(100);
        let mut endless = result();
        endless["measured"]["decode_tok_s"] = json!(0.0);
        let (text, summary) = imported(&[staggered, cached, endless], None).unwrap();
        assert_eq!((text.lines().count(), summary.rows_left_out()), (1 + 4, 3));
        let error = imported(&[json!({ "measured": {} })], None).unwrap_err().to_string();
        assert!(error.contains("not a result of batchmax validate --out"), "{error}");
        assert!(!error.contains('\n'));
    }
}
