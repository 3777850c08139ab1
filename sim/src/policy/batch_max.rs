//! Batch-Max: compress the KV cache already while the prompt is read, so that a larger batch fits.
//!
//! After every prefill chunk each layer drops to a uniform budget per KV head and sequence; the largest cache of a
//! sequence is then budget + one layer's chunk instead of the prompt.
//!
//! Paper: <https://arxiv.org/abs/2412.05693>. Its score, chunk length and protected tokens are not public: `by`,
//! `chunk`, `sinks` and `recent` are this project's choices, not the authors'.
//! Deviation: decode steps cut only once the cache has grown `slack` tokens over the budget, which spares a compaction
//! per step; `slack = 0` cuts at every step.

use serde::Deserialize;

use super::{Budget, By, Policy, PolicyError, Step, check_budget};
use crate::kv::KvTape;
use crate::op::{Phase, Protect};
use crate::profile::Model;
use crate::units::Tokens;

/// Eviction after every prefill chunk and during decode.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchMax {
    /// Tokens kept per layer and KV head.
    pub budget: Budget,
    /// Prompt tokens per chunk. A chunk as long as the prompt makes it a one-shot policy (E1).
    pub chunk: Tokens,
    /// The ranking.
    #[serde(default)]
    pub by: By,
    /// First tokens that stay.
    #[serde(default)]
    pub sinks: Tokens,
    /// Newest tokens that stay.
    #[serde(default)]
    pub recent: Tokens,
    /// Queries of the window score.
    #[serde(default = "default_window")]
    pub window: Tokens,
    /// Pooling of the window score.
    #[serde(default = "default_pool")]
    pub pool: Tokens,
    /// Tokens over the budget at which decode cuts.
    #[serde(default)]
    pub slack: Tokens,
    /// Cut in decode at all.
    #[serde(default = "yes")]
    pub decode: bool,
}

fn default_window() -> Tokens {
    32
}
fn default_pool() -> Tokens {
    5
}
fn yes() -> bool {
    true
}

impl Policy for BatchMax {
    fn label(&self) -> String {
        let decode = if self.decode { "" } else { ",decode=false" };
        format!(
            "batch-max:budget={},chunk={},by={},sinks={},recent={},slack={}{decode}",
            self.budget,
            self.chunk,
            self.by.name(),
            self.sinks,
            self.recent,
            self.slack
        )
    }

    fn prefill_chunk(&self) -> Option<Tokens> {
        Some(self.chunk)
    }

    fn acts_in_decode(&self) -> bool {
        self.decode
    }

    fn check(&self, _model: &Model, prompt: Tokens) -> Result<(), PolicyError> {
        if self.chunk == 0 {
            return Err(PolicyError {
                policy: self.label(),
                problem: "a chunk of 0 tokens reads nothing".to_owned(),
                remedy: "set chunk to at least 1 (256 is usual)".to_owned(),
            });
        }
        if matches!(self.by, By::Window | By::WindowSnap) && (self.window == 0 || self.pool == 0) {
            return Err(PolicyError {
                policy: self.label(),
                problem: "window and pool must be at least 1".to_owned(),
                remedy: "use window=32,pool=5".to_owned(),
            });
        }
        check_budget(self, self.budget.of(prompt), self.sinks, self.recent)
    }

    fn after_attend(&self, step: &Step, kv: &mut KvTape<'_>) {
        if step.phase == Phase::Decode && !self.decode {
            return;
        }
        if matches!(self.by, By::Tally | By::TallySum) {
            kv.tally();
        }
        let budget = self.budget.of(step.prompt);
        let slack = if step.phase == Phase::Decode { self.slack } else { 0 };
        if kv.tokens() > budget.saturating_add(slack) {
            let protect = Protect { sinks: self.sinks, recent: self.recent };
            kv.rank(self.by.score(self.window, self.pool), protect).keep(budget);
        }
    }
}
