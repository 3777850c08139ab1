//! Runs: one metric of an end-to-end measurement a row.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::output::Table;
use super::summary::Summary;

/// The name of the file.
const FILE: &str = "runs.csv";

/// A row; blank where it is not known.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Run {
    /// Unique in its file.
    pub id: String,
    /// Where it was read.
    pub source: String,
    /// ISO 8601.
    pub date: String,
    /// Device.
    pub gpu: String,
    /// Devices in all.
    pub n_gpus: String,
    /// Devices per layer.
    pub tp: String,
    /// Pipeline stages.
    pub pp: String,
    /// Model, as its source calls it.
    pub model: String,
    /// Type of the weights.
    pub weight_dtype: String,
    /// Type of the cache.
    pub kv_dtype: String,
    /// Engine.
    pub engine: String,
    /// Its version.
    pub engine_version: String,
    /// `online`, `offline-throughput`, `static-batch`, `start-up`.
    pub mode: String,
    /// Sequences at once.
    pub batch_or_concurrency: String,
    /// Prompt tokens.
    pub input_len: String,
    /// Generated tokens.
    pub output_len: String,
    /// What is done to the cache.
    pub kv_policy: String,
    /// What was measured, with its unit.
    pub metric: String,
    /// How much.
    pub value: String,
    /// Everything else.
    pub notes: String,
}

impl Run {
    /// The same run, another metric.
    pub fn with(&self, metric: &str, value: f64) -> Self {
        Self { metric: metric.to_owned(), value: seven_digits(value), ..self.clone() }
    }
}

/// Writes all rows, numbered after `prefix`.
pub fn write(dir: &Path, prefix: &str, rows: Vec<Run>, summary: &mut Summary) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let mut table = Table::create(&dir.join(FILE), None)?;
    for (i, row) in rows.into_iter().enumerate() {
        table.serialize(&Run { id: format!("{prefix}-{:05}", i + 1), ..row })?;
    }
    summary.files.push(table.finish()?);
    Ok(())
}

/// A metric if it can be one.
pub fn credible(value: f64) -> Result<f64, &'static str> {
    match value {
        v if !v.is_finite() => Err("value is not a number"),
        v if v <= 0.0 => Err("value is not positive"),
        v if v > 1e12 => Err("value is absurdly large"),
        v => Ok(v),
    }
}

/// The policy that a type of the cache amounts to.
pub fn kv_policy(kv_dtype: &str) -> &'static str {
    if kv_dtype.starts_with("fp8") { "fp8-kv" } else { "none" }
}

fn seven_digits(value: f64) -> String {
    format!("{value:.6e}").parse::<f64>().unwrap_or(value).to_string()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn values_keep_seven_digits() {
        let run = Run::default();
        assert_eq!(run.with("ttft_ms", 972.310_982_335).value, "972.311");
        assert_eq!(run.with("kv_tokens", 2_042_016.0).value, "2042016");
    }

    #[test]
    fn the_head_is_that_of_the_layout() {
        let dir = tempfile::tempdir().unwrap();
        let mut summary = Summary::default();
        write(dir.path(), "x", vec![Run::default()], &mut summary).unwrap();
        let text = std::fs::read_to_string(dir.path().join(FILE)).unwrap();
        let head = "id,source,date,gpu,n_gpus,tp,pp,model,weight_dtype,kv_dtype,engine,engine_version,mode,\
                    batch_or_concurrency,input_len,output_len,kv_policy,metric,value,notes\nx-00001,";
        assert!(text.starts_with(head), "{text}");
    }
}
