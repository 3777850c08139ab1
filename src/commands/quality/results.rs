//! Rows of measurements: kept in a file as they come, summarised as data that plans read, printed as a table.

use std::path::Path;

use anyhow::{Result, anyhow, bail};
use batchmax_exec::quality::{Interval, bootstrap, mean};
use batchmax_sim::profile::{Quality, QualityRow};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::paths::write_whole;
use crate::report::json::SCHEMA_VERSION;
use crate::report::table;

/// Raised whenever the same command would measure something else.
const PROTOCOL: u32 = 1;
/// What a file of results is.
const KIND: &str = "quality";

/// One policy at one context, per sample.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Bytes of cache per prompt token after the prefill, as held.
    pub kv_bytes_per_token: f64,
    /// KL(full || policy), nats, mean over the continuation.
    pub kl: Vec<f64>,
    /// Share of next tokens that are those of `full`.
    pub top1: Vec<f64>,
    /// Negative log-likelihood of the quoted tokens, nats.
    pub copy_nll: Vec<f64>,
    /// Share of quoted tokens that come first.
    pub copy_top1: Vec<f64>,
    /// Share of right digits.
    pub digits: Option<Vec<f64>>,
    /// Negative log-likelihood of a token of the answers, nats.
    pub answer_nll: Option<Vec<f64>>,
}

impl Measured {
    /// Sums to be filled.
    pub fn new(samples: usize) -> Self {
        let zeros = || vec![0.0; samples];
        Self {
            kl: zeros(),
            top1: zeros(),
            copy_nll: zeros(),
            copy_top1: zeros(),
            ..Self::default()
        }
    }
}

/// What is measured: the key of a row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Key {
    /// The policy as typed, or the preset's name.
    pub policy: String,
    /// Its label with all parameters.
    pub label: String,
    /// Budget, where it has one.
    pub budget: Option<String>,
    /// Prompt tokens between two cuts; none: one-shot.
    pub chunk: Option<u32>,
    /// Prompt tokens.
    pub context: u32,
}

impl Key {
    /// As tables print it.
    pub fn regime(&self) -> String {
        self.chunk.map_or_else(|| "one-shot".to_owned(), |c| format!("chunk {c}"))
    }
}

/// One row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    #[serde(flatten)]
    pub key: Key,
    #[serde(flatten)]
    pub measured: Measured,
}

/// `full` through the path of a policy that has room for everything.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Control {
    pub context: u32,
    pub label: String,
    /// KL(full || full), nats, per sample.
    pub kl: Vec<f64>,
}

/// All that one command measures; also the file it goes on from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    pub schema_version: u32,
    pub kind: String,
    pub protocol: u32,
    pub model: String,
    pub weights: String,
    pub cache: String,
    pub samples: usize,
    /// Of the hidden numbers of a sample, those asked for.
    pub questions: usize,
    /// Made-up weights and tokens: nothing here says anything about the model.
    pub synthetic: bool,
    pub controls: Vec<Control>,
    pub rows: Vec<Row>,
}

impl Results {
    /// Nothing measured yet.
    pub fn new(
        model: &str,
        weights: &str,
        cache: &str,
        samples: usize,
        questions: usize,
        synthetic: bool,
    ) -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            kind: KIND.to_owned(),
            protocol: PROTOCOL,
            model: model.to_owned(),
            weights: weights.to_owned(),
            cache: cache.to_owned(),
            samples,
            questions,
            synthetic,
            controls: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// With the rows that `path` has; an error where it holds something else.
    pub fn resumed(self, path: &Path) -> Result<Self> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(self),
            Err(e) => return Err(anyhow!("--out {}: {e}", path.display())),
        };
        let before: Self = serde_json::from_str(&text).map_err(|e| {
            anyhow!(
                "--out {}: no results of batchmax quality ({e}); hint: another FILE",
                path.display()
            )
        })?;
        let empty = Self { rows: Vec::new(), controls: Vec::new(), ..before.clone() };
        if empty != self {
            bail!(
                "--out {}: it holds {} {}, caches in {}, {} samples, {} questions, protocol {}, which is not what is asked; hint: another FILE",
                path.display(),
                before.model,
                before.weights,
                before.cache,
                before.samples,
                before.questions,
                before.protocol
            );
        }
        Ok(before)
    }

    /// Writes all rows.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_whole(path, format!("{:#}\n", serde_json::to_value(self)?))
    }

    /// The row of a key.
    pub fn row(&self, key: &Key) -> Option<&Row> {
        self.rows.iter().find(|r| r.key == *key)
    }

    /// The row at the same budget, regime and context of another policy.
    pub fn beside(&self, key: &Key, policy: &str) -> Option<&Row> {
        self.rows.iter().find(|r| {
            let k = &r.key;
            k.policy == policy
                && (&k.budget, k.chunk, k.context) == (&key.budget, key.chunk, key.context)
        })
    }

    /// `full` at a context.
    fn full(&self, context: u32) -> Option<&Row> {
        let full = crate::setting::UNCOMPRESSED;
        self.rows.iter().find(|r| r.key.policy == full && r.key.context == context)
    }

    /// The means as a description that plans read.
    pub fn summary(&self) -> Quality {
        let rows = self.rows.iter().map(|row| {
            let m = &row.measured;
            let kl = bootstrap(&m.kl);
            let budget = row.key.budget.as_ref().and_then(|b| share(b, row.key.context));
            QualityRow {
                policy: batchmax_sim::profile::quality::identity(&row.key.label).0,
                budget: budget.map(digits),
                chunk: row.key.chunk,
                context: row.key.context,
                kv_bytes_per_token: digits(m.kv_bytes_per_token),
                kl: digits(kl.mean),
                kl_low: digits(kl.low),
                kl_high: digits(kl.high),
                top1: digits(mean(&m.top1)),
                recall: m.digits.as_deref().map(|d| digits(mean(d))),
                answer_nll: m.answer_nll.as_deref().map(|n| digits(mean(n))),
                copy_top1: digits(mean(&m.copy_top1)),
                copy_nll: digits(mean(&m.copy_nll)),
            }
        });
        Quality {
            name: self.model.clone(),
            weights: self.weights.clone(),
            cache: self.cache.clone(),
            samples: self.samples as u32,
            about: format!(
                "batchmax quality, protocol {}: prose of one novel, {} of 4 hidden numbers asked for after the compression",
                self.protocol, self.questions
            ),
            row: rows.collect(),
        }
    }

    /// As JSON: the rows with their intervals.
    pub fn document(&self, gates: &[super::Gate], left_out: &[String]) -> Result<Value> {
        let mut body = serde_json::to_value(self)?;
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                let (m, full) = (&row.measured, self.full(row.key.context));
                let mut value = serde_json::to_value(row)?;
                let random = self.beside(&row.key, super::RANDOM).map(|r| &r.measured);
                let against = |a: &[f64], b: Option<&[f64]>| b.map(|b| interval(difference(a, b)));
                let optional = |a: &Option<Vec<f64>>, b: Option<&Option<Vec<f64>>>| {
                    a.as_deref().and_then(|a| against(a, b.and_then(|b| b.as_deref())))
                };
                let full = full.map(|r| &r.measured);
                value["intervals"] = json!({
                    "kl": interval(bootstrap(&m.kl)),
                    "top1": interval(bootstrap(&m.top1)),
                    "digits": m.digits.as_deref().map(|d| interval(bootstrap(d))),
                    "digits_minus_full": optional(&m.digits, full.map(|f| &f.digits)),
                    "answer_nll_minus_full": optional(&m.answer_nll, full.map(|f| &f.answer_nll)),
                    "copy_nll_minus_full": against(&m.copy_nll, full.map(|f| f.copy_nll.as_slice())),
                    "kl_minus_random": against(&m.kl, random.map(|r| r.kl.as_slice())),
                    "digits_minus_random": optional(&m.digits, random.map(|r| &r.digits)),
                });
                Ok(value)
            })
            .collect::<Result<_>>()?;
        body["rows"] = rows.into();
        body["left_out"] = json!(left_out);
        body["gates"] = json!(gates);
        Ok(body)
    }

    /// For people.
    pub fn table(&self) -> String {
        table::table(&HEAD, self.cells(), 3)
    }

    /// A row a measurement, under [`HEAD`].
    pub fn cells(&self) -> Vec<Vec<String>> {
        let rows = self.rows.iter().map(|row| {
            let (k, m) = (&row.key, &row.measured);
            let kl = bootstrap(&m.kl);
            let full = self.full(k.context).map(|r| &r.measured);
            let dash = || "-".to_owned();
            let digits = m.digits.as_deref();
            let full_digits = full.and_then(|f| f.digits.as_deref());
            let lost = digits.zip(full_digits).map(|(a, b)| range(difference(a, b)));
            let copy = full.map(|f| range(difference(&m.copy_nll, &f.copy_nll)));
            let random = self
                .beside(k, super::RANDOM)
                .filter(|r| r.key != *k)
                .map(|r| range(difference(&m.kl, &r.measured.kl)));
            vec![
                k.policy.clone(),
                k.budget.clone().unwrap_or_else(dash),
                k.regime(),
                k.context.to_string(),
                format!("{:.0}", m.kv_bytes_per_token),
                format!("{:.3}", kl.mean),
                format!("{:.3}..{:.3}", kl.low, kl.high),
                format!("{:.2}", mean(&m.top1)),
                digits.map_or_else(dash, |d| format!("{:.2}", mean(d))),
                lost.unwrap_or_else(dash),
                m.answer_nll.as_deref().map_or_else(dash, |n| format!("{:.2}", mean(n))),
                format!("{:.2}", mean(&m.copy_top1)),
                copy.unwrap_or_else(dash),
                random.unwrap_or_else(dash),
            ]
        });
        rows.collect()
    }
}

/// Heads of [`Results::cells`].
pub const HEAD: [&str; 14] = [
    "policy",
    "budget",
    "regime",
    "context",
    "B/token",
    "KL",
    "90 %",
    "top-1",
    "digits",
    "- full",
    "NLL",
    "quote",
    "NLL - full",
    "KL - random",
];

/// Paired: the same samples under both.
fn difference(a: &[f64], b: &[f64]) -> Interval {
    let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    bootstrap(&differences)
}

fn interval(i: Interval) -> Value {
    json!({ "mean": i.mean, "low": i.low, "high": i.high })
}

fn range(i: Interval) -> String {
    format!("{:+.2}..{:+.2}", i.low, i.high)
}

/// A budget as a share of the prompt; bytes are none.
fn share(budget: &str, context: u32) -> Option<f64> {
    match budget.strip_suffix('%') {
        Some(percent) => percent.trim().parse::<f64>().ok().map(|p| p / 100.0),
        None => match budget.parse::<f64>() {
            Ok(x) if x > 0.0 && x < 1.0 => Some(x),
            _ => batchmax_sim::units::parse_tokens(budget)
                .ok()
                .map(|tokens| (f64::from(tokens) / f64::from(context)).min(1.0)),
        },
    }
}

/// Four digits behind the point are more than the samples know.
fn digits(x: f64) -> f64 {
    (x * 1e4).round() / 1e4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_as_shares() {
        assert_eq!(share("12.5%", 512), Some(0.125));
        assert_eq!(share("0.25", 512), Some(0.25));
        assert_eq!(share("128", 512), Some(0.25));
        assert_eq!(share("1k", 512), Some(1.0));
        assert_eq!(share("8MB", 512), None);
    }

    #[test]
    fn a_summary_reads_back_as_data() {
        let mut results = Results::new("m", "f32", "f16", 2, 4, false);
        let key = Key {
            policy: "snapkv".to_owned(),
            label: "snapkv:window=32,pool=5,budget=50%".to_owned(),
            budget: Some("50%".to_owned()),
            chunk: None,
            context: 512,
        };
        let mut measured = Measured::new(2);
        measured.kl = vec![0.01, 0.03];
        measured.digits = Some(vec![1.0, 0.5]);
        results.rows.push(Row { key, measured });
        let summary = results.summary();
        assert_eq!((summary.row[0].kl, summary.row[0].recall), (0.02, Some(0.75)));
        let text = toml::to_string(&summary).expect("plain data");
        assert_eq!(toml::from_str::<Quality>(&text).expect("reads back"), summary);
        let lost = summary.lost("snapkv:window=32,pool=5,budget=60%", None, 4096, 1);
        assert_eq!(lost.expect("covered").kl, 0.02);
    }
}
