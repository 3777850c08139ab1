//! Measured serving runs of aiconfigurator-core: `systems/silicon_sample.csv`, one configuration a row.
//!
//! Two collections are in it: InferenceMAX (closed loop at a concurrency, random lengths up to the nominal ones) and the
//! package's own comparison runs (fixed lengths). Runs with separate prefill and decode engines are left out: they are not
//! one engine's.

use std::path::Path;

use anyhow::Result;
use batchmax_sim::profile::Catalog;

use crate::cli::import::PackageArgs;

use super::package::Package;
use super::runs::{self, Run, credible};
use super::sheet::{Row, Sheet};
use super::summary::{Summary, tame};

const FILE: &str = "silicon_sample.csv";
const METRICS: [(&str, &str); 2] = [("ttft_ms", "silicon_ttft_ms"), ("tpot_ms", "silicon_tpot_ms")];
const NEEDED: [&str; 14] = [
    "id",
    "silicon_data_source",
    "backend",
    "backend_version",
    "model_path",
    "system",
    "precision",
    "mode",
    "isl",
    "osl",
    "tp_size",
    "pp_size",
    "silicon_ttft_ms",
    "silicon_tpot_ms",
];

/// Imports.
pub fn import(
    catalog: &Catalog,
    args: &PackageArgs,
    dir: &Path,
    summary: &mut Summary,
) -> Result<()> {
    let mut package = Package::open(&args.package)?;
    let bytes = package.read(FILE)?;
    let mut sheet = Sheet::new(&format!("{}: {FILE}", package.name()), bytes)?;
    sheet.expect(&NEEDED)?;
    let names = args.gpu.as_ref().map(|wanted| {
        let mut names = vec![wanted.clone()];
        if let Ok(gpu) = catalog.gpu(wanted) {
            names.extend(gpu.aliases);
            names.push(gpu.name);
        }
        names
    });
    let label = package.label();
    let mut rows = Vec::new();
    sheet.visit(summary, |row, summary| {
        if names.as_ref().is_some_and(|names| !names.iter().any(|n| n == row.text("system"))) {
            return Ok(());
        }
        let run = run(row, &label)?;
        for (metric, column) in METRICS {
            let value = row.number(column).and_then(|v| Ok(credible(v)?));
            match value {
                Ok(value) => rows.push(run.with(metric, value)),
                Err(why) => summary.leave_out(&format!("{metric}: {why}"), || run.source.clone()),
            }
        }
        Ok(())
    });
    runs::write(dir, "aic", rows, summary)
}

/// A row of the file, metric still blank.
fn run(row: &Row<'_>, label: &str) -> Result<Run, String> {
    if row.text("mode") != "agg" {
        return Err("prefill and decode on separate engines".to_owned());
    }
    let origin = row.text("silicon_data_source");
    let (tp, pp) = (row.whole("tp_size", 1)?, row.whole("pp_size", 1)?);
    // Blank or 0 means one.
    let part = |column| row.whole(column, 0).unwrap_or(1).max(1);
    let (data, experts) =
        (part("attention_dp_size"), part("moe_tp_size").saturating_mul(part("moe_ep_size")));
    let concurrency = match origin.split("silicon_concurrency=").nth(1) {
        Some(rest) => rest.split(';').next().unwrap_or("").trim().to_owned(),
        None => row.whole("batch_size", 1)?.to_string(),
    };
    if concurrency.parse::<u32>().is_err() {
        return Err("no concurrency".to_owned());
    }
    let inference_max = is_inference_max(origin);
    let precision = row.text("precision");
    let weights = match precision {
        "fp4" => "nvfp4",
        "" => "bf16",
        other => other,
    };
    let kv = if inference_max && matches!(precision, "fp8" | "fp4") { "fp8" } else { "auto" };
    let mut notes = Vec::new();
    if precision.is_empty() {
        notes.push("precision blank in source, bf16 inferred".to_owned());
    }
    if data > 1 {
        let [tp, ep] = ["moe_tp_size", "moe_ep_size"].map(part);
        notes.push(format!("attention_dp={data} moe_tp={tp} moe_ep={ep}"));
    }
    notes.push(if inference_max {
        "InferenceMAX/InferenceX: closed loop at max-concurrency; nominal lengths; cache type assumed".to_owned()
    } else {
        "aiconfigurator comparison run; fixed lengths; closed loop".to_owned()
    });
    let per_rank = row.text("batch_size");
    if !per_rank.is_empty() && per_rank != concurrency {
        notes.push(format!("per-dp-rank batch={}", tame(per_rank)));
    }
    Ok(Run {
        source: format!("{label} wheel: systems/{FILE}#{}", tame_id(row.text("id"))),
        date: date(origin),
        gpu: device(row.text("system")),
        n_gpus: tp.saturating_mul(data).max(experts).saturating_mul(pp).to_string(),
        tp: tp.to_string(),
        pp: pp.to_string(),
        model: row.text("model_path").to_owned(),
        weight_dtype: weights.to_owned(),
        kv_dtype: kv.to_owned(),
        engine: if row.text("backend") == "trtllm" { "tensorrt-llm" } else { row.text("backend") }
            .to_owned(),
        engine_version: row.text("backend_version").to_owned(),
        mode: "online".to_owned(),
        batch_or_concurrency: concurrency,
        input_len: row.whole("isl", 1)?.to_string(),
        output_len: row.whole("osl", 1)?.to_string(),
        kv_policy: runs::kv_policy(kv).to_owned(),
        notes: notes.join("; "),
        ..Run::default()
    })
}

/// Database dumps and dated CSV files are InferenceMAX.
fn is_inference_max(origin: &str) -> bool {
    let dated = |rest: &str| rest.starts_with("20") && rest.get(4..5) == Some("-");
    origin.starts_with("db-dump/") || origin.strip_prefix("source_file=").is_some_and(dated)
}

fn date(origin: &str) -> String {
    let date = origin.split("measured=").nth(1).and_then(|rest| rest.get(..10)).unwrap_or("");
    let shape = date.bytes().map(|b| if b.is_ascii_digit() { b'0' } else { b });
    if shape.eq(*b"0000-00-00") { date.to_owned() } else { String::new() }
}

/// The names that published runs use for the package's systems.
fn device(system: &str) -> String {
    match system {
        "h100_sxm" => "H100-SXM-80GB".to_owned(),
        "h200_sxm" => "H200-SXM-141GB".to_owned(),
        "b200_sxm" => "B200-180GB".to_owned(),
        "a100_sxm" => "A100-SXM4-80GB".to_owned(),
        "l40s" => "L40S-48GB".to_owned(),
        other => other.trim_end_matches("_sxm").to_uppercase(),
    }
}

/// Ids are longer than what messages cut to.
fn tame_id(id: &str) -> String {
    id.chars().filter(|c| !c.is_control()).take(300).collect()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::super::package::tests::wheel;
    use super::*;

    const HEAD: &str = "id,silicon_data_source,backend,backend_version,model_path,system,precision,mode,isl,osl,batch_size,\
                        tp_size,pp_size,attention_dp_size,moe_tp_size,moe_ep_size,silicon_ttft_ms,silicon_tpot_ms";

    #[test]
    fn a_configuration_becomes_two_runs() {
        let text = format!(
            "{HEAD}\n\
             a,db-dump/2026-04-27; silicon_concurrency=512; measured=2026-04-21T00:00:00.000Z,vllm,0.19.0,M/M,b300_sxm,fp8,agg,1024,1024,128,4,1,4,1,16,727.8426075309881,31.7\n\
             b,source_file=/x.csv; silicon_concurrency=8,trtllm,1.0,Q/Q,h200_sxm,,agg,1000,100,8,1,1,,2,1,356.92,0\n\
             c,x,trtllm,1.0,Q/Q,h200_sxm,,disagg,1000,100,8,,,,,,1,1\n\
             d,silicon_concurrency=x,vllm,1,Q,h200_sxm,fp8,agg,1,1,8,1,1,,,,1,1\n"
        );
        let dir = tempfile::tempdir().unwrap();
        let root = "aiconfigurator_core";
        let package = wheel(
            dir.path(),
            &[
                (&format!("{root}/systems/{FILE}"), text.as_bytes()),
                (&format!("{root}-0.12.0.dist-info/METADATA"), b""),
            ],
        );
        let mut summary = Summary::default();
        let args = PackageArgs { package, gpu: None };
        import(&Catalog::built_in(), &args, dir.path(), &mut summary).unwrap();
        let text = std::fs::read_to_string(dir.path().join("runs.csv")).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines[1].starts_with(
            "aic-00001,aiconfigurator_core-0.12.0 wheel: systems/silicon_sample.csv#a,2026-04-21,B300,16,4,1,M/M,fp8,fp8,\
             vllm,0.19.0,online,512,1024,1024,fp8-kv,ttft_ms,727.8426,attention_dp=4 moe_tp=1 moe_ep=16; "
        ), "{text}");
        assert!(lines[1].ends_with("per-dp-rank batch=128"), "{text}");
        assert!(lines[3].contains("#b,,H200-SXM-141GB,2,1,1,Q/Q,bf16,auto,tensorrt-llm,1.0,online,8,1000,100,none,ttft_ms,356.92,"), "{text}");
        assert_eq!(summary.rows_left_out(), 3, "{:?}", summary.lines());
    }
}
