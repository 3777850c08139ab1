//! What policies were measured to lose on one model, as data.

use serde::{Deserialize, Serialize};

use super::ProfileError;
use crate::policy::Budget;
use crate::units::Tokens;

/// Measured losses of policies on one model (`quality/<model>.toml`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quality {
    /// The model that was measured.
    pub name: String,
    /// Type of its weights.
    pub weights: String,
    /// Type of its caches.
    pub cache: String,
    /// Samples behind every row.
    pub samples: u32,
    /// How it was measured, in a sentence.
    pub about: String,
    /// One per policy, budget, regime and context.
    #[serde(default)]
    pub row: Vec<QualityRow>,
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QualityRow {
    /// The policy's label without budget and chunk, see [`identity`].
    pub policy: String,
    /// Share of the prompt that stays; absent where the policy has no budget.
    pub budget: Option<f64>,
    /// Prompt tokens between two cuts; absent where the prompt was read whole.
    pub chunk: Option<Tokens>,
    /// Prompt tokens.
    pub context: Tokens,
    /// Bytes of cache per prompt token after the prefill, as held.
    pub kv_bytes_per_token: f64,
    /// KL(full || policy) of the next token, nats: mean and 90 % interval.
    pub kl: f64,
    /// Its lower end.
    pub kl_low: f64,
    /// Its upper end.
    pub kl_high: f64,
    /// Share of next tokens that are those of `full`.
    pub top1: f64,
    /// Share of right digits of hidden numbers that are asked for after the compression.
    pub recall: Option<f64>,
    /// Negative log-likelihood of their tokens, nats.
    pub answer_nll: Option<f64>,
    /// Share of right tokens of a repeated passage.
    pub copy_top1: f64,
    /// Negative log-likelihood of its tokens, nats.
    pub copy_nll: f64,
}

/// What a candidate was measured to lose, at worst over the contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lost {
    /// KL(full || policy), nats.
    pub kl: f64,
    /// Share of right digits, where it was asked.
    pub recall: Option<f64>,
}

/// A policy's label without budget and chunk, and the budget: what tells policies apart beside how much they keep.
#[must_use]
pub fn identity(label: &str) -> (String, Option<Budget>) {
    let mut budget = None;
    let mut parts = Vec::new();
    for part in label.split('+') {
        let (kind, parameters) = part.split_once(':').unwrap_or((part, ""));
        let mut others = Vec::new();
        for parameter in parameters.split(',').filter(|p| !p.is_empty()) {
            match parameter.split_once('=') {
                Some(("budget", text)) => {
                    budget = toml::Value::String(text.to_owned()).try_into().ok();
                }
                Some(("chunk", _)) => {}
                _ => others.push(parameter),
            }
        }
        parts.push(if others.is_empty() {
            kind.to_owned()
        } else {
            format!("{kind}:{}", others.join(","))
        });
    }
    (parts.join("+"), budget)
}

impl Quality {
    /// Refuses values that can't be measured.
    pub fn validate(&self, origin: &str) -> Result<(), ProfileError> {
        let share = |x: f64| (0.0..=1.0).contains(&x);
        for row in &self.row {
            let wrong = [
                ("budget", row.budget.is_some_and(|b| !(share(b) && b > 0.0))),
                ("kl", !(row.kl.is_finite() && row.kl >= 0.0)),
                ("top1", !share(row.top1)),
                ("recall", row.recall.is_some_and(|r| !share(r))),
                ("copy_top1", !share(row.copy_top1)),
                ("context", row.context == 0),
            ];
            if let Some((key, _)) = wrong.into_iter().find(|(_, wrong)| *wrong) {
                return Err(ProfileError::Invalid {
                    origin: origin.to_owned(),
                    key: format!("row of {} at {}: {key}", row.policy, row.context),
                    problem: "out of range".to_owned(),
                });
            }
        }
        Ok(())
    }

    /// What a policy with this label loses on prompts of `prompt` tokens, never better than measured: at each context the
    /// largest measured budget that is not over its own, and the larger loss of the contexts. A policy that cuts by chunks
    /// is held by what was measured at chunks no larger than its own. `None`: nothing measured covers it.
    #[must_use]
    pub fn lost(
        &self,
        label: &str,
        chunk: Option<Tokens>,
        prompt: Tokens,
        token_bytes: u64,
    ) -> Option<Lost> {
        let (policy, budget) = identity(label);
        let share = budget.map(|b| f64::from(b.of(prompt, token_bytes)) / f64::from(prompt));
        // A chunk that holds the whole prompt cuts once.
        let chunk = chunk.filter(|c| *c < prompt);
        let covers = |row: &&QualityRow| {
            let cut = match (row.chunk, chunk) {
                (None, None) => true,
                (Some(measured), Some(own)) => measured <= own,
                _ => false,
            };
            // Tokens are whole: a share may come out one token short.
            let slack = 1.0 / f64::from(prompt);
            let kept = match (row.budget, share) {
                (None, None) => true,
                (Some(measured), Some(own)) => measured <= own + slack,
                _ => false,
            };
            row.policy == policy && cut && kept
        };
        let rows: Vec<&QualityRow> = self.row.iter().filter(covers).collect();
        // Of the chunks that cover, the nearest one.
        let nearest = rows.iter().filter_map(|r| r.chunk).max();
        let rows = rows.into_iter().filter(|r| r.chunk == nearest);
        let mut best: Vec<&QualityRow> = Vec::new();
        for row in rows {
            match best.iter_mut().find(|b| b.context == row.context) {
                Some(b) if b.budget < row.budget => *b = row,
                Some(_) => {}
                None => best.push(row),
            }
        }
        let kl = best.iter().map(|r| r.kl).max_by(f64::total_cmp)?;
        let recalls: Option<Vec<f64>> = best.iter().map(|r| r.recall).collect();
        let recall = recalls.and_then(|r| r.into_iter().min_by(f64::total_cmp));
        Some(Lost { kl, recall })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(budget: f64, chunk: Option<Tokens>, context: Tokens, kl: f64) -> QualityRow {
        QualityRow {
            policy: "snapkv:window=32".to_owned(),
            budget: Some(budget),
            chunk,
            context,
            kv_bytes_per_token: 1.0,
            kl,
            kl_low: kl,
            kl_high: kl,
            top1: 1.0,
            recall: Some(1.0 - kl),
            answer_nll: Some(0.0),
            copy_top1: 1.0,
            copy_nll: 0.0,
        }
    }

    fn quality(row: Vec<QualityRow>) -> Quality {
        let text = |t: &str| t.to_owned();
        let (weights, cache) = (text("f32"), text("f16"));
        Quality { name: text("m"), weights, cache, samples: 8, about: text("test"), row }
    }

    #[test]
    fn labels_without_what_is_kept() {
        let (policy, budget) = identity("snapkv:window=32,pool=5,budget=25%,chunk=256,decode=true");
        assert_eq!(policy, "snapkv:window=32,pool=5,decode=true");
        assert_eq!(budget, Some(Budget::Share(0.25)));
        assert_eq!(identity("full"), ("full".to_owned(), None));
        assert_eq!(
            identity("streaming-llm:budget=512"),
            ("streaming-llm".to_owned(), Some(Budget::Tokens(512)))
        );
        assert_eq!(identity("snapkv:budget=8MB+kivi:bits=2").0, "snapkv+kivi:bits=2");
    }

    #[test]
    fn what_is_not_better_than_measured() {
        let measured = quality(vec![
            row(0.5, None, 512, 0.02),
            row(0.25, None, 512, 0.07),
            row(0.25, None, 2048, 0.09),
            row(0.25, Some(256), 512, 0.2),
        ]);
        let kl = |label: &str, chunk| measured.lost(label, chunk, 1024, 1).map(|l| l.kl);
        // At 50 % the context of 2,048 was measured at 25 % only: that bounds it.
        assert_eq!(kl("snapkv:window=32,budget=50%", None), Some(0.09));
        assert_eq!(kl("snapkv:window=32,budget=30%", None), Some(0.09));
        assert_eq!(kl("snapkv:window=32,budget=256", None), Some(0.09));
        assert_eq!(kl("snapkv:window=32,budget=255", None), Some(0.09), "one token short");
        // Less than was measured, other parameters, smaller chunks: nothing is known.
        assert_eq!(kl("snapkv:window=32,budget=20%", None), None);
        assert_eq!(kl("snapkv:window=16,budget=50%", None), None);
        assert_eq!(kl("snapkv:window=32,budget=50%", Some(128)), None);
        assert_eq!(kl("snapkv:window=32,budget=50%", Some(512)), Some(0.2));
        // A chunk as long as the prompt is no chunk.
        assert_eq!(kl("snapkv:window=32,budget=50%", Some(4096)), Some(0.09));
        let lost = measured.lost("snapkv:window=32,budget=25%", None, 1024, 1).expect("measured");
        assert_eq!(lost.recall, Some(1.0 - 0.09));
    }

    #[test]
    fn impossible_values_are_refused() {
        let mut bad = quality(vec![row(0.5, None, 512, 0.02)]);
        assert!(bad.validate("file").is_ok());
        bad.row[0].top1 = 1.5;
        let error = bad.validate("file").expect_err("a share").to_string();
        assert!(error.contains("top1"), "{error}");
    }
}
