//! SnapKV: once the prompt is read, keep the window and the tokens that the window's queries attend to.
//!
//! The last `window` queries' attention is averaged over queries, pooled along the cache and averaged over the heads
//! that share a KV head; the best `budget - window` tokens stay beside the window. Decode evicts nothing.
//!
//! Paper: <https://arxiv.org/abs/2404.14469>. Average pooling of 5, as in kvpress; original positions are kept.
//! Parameters: `instant` chooses when the cut happens, which decides the prefill peak (E0 or E1).

use serde::Deserialize;

use super::{Budget, Instant, Policy, PolicyError, Step, check_budget};
use crate::kv::KvTape;
use crate::op::{Phase, Protect, Score};
use crate::profile::Model;
use crate::units::Tokens;

/// One-shot compression after the prompt.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapKv {
    /// Tokens kept per layer and KV head, the window included.
    pub budget: Budget,
    /// Queries of the observation window; they stay.
    #[serde(default = "default_window")]
    pub window: Tokens,
    /// Width of the average pooling.
    #[serde(default = "default_pool")]
    pub pool: Tokens,
    /// When the cut happens.
    #[serde(default)]
    pub instant: Instant,
}

fn default_window() -> Tokens {
    32
}
fn default_pool() -> Tokens {
    5
}

impl SnapKv {
    fn acts(&self, step: &Step, kv: &KvTape<'_>) -> bool {
        step.phase == Phase::Prefill
            && step.prompt_read
            && kv.tokens() > self.budget.of(step.prompt)
    }

    fn protect(&self) -> Protect {
        Protect { sinks: 0, recent: self.window }
    }
}

impl Policy for SnapKv {
    fn label(&self) -> String {
        let instant = match self.instant {
            Instant::AfterLayer => "after-layer",
            Instant::AfterPrefill => "after-prefill",
        };
        format!(
            "snapkv:budget={},window={},pool={},instant={instant}",
            self.budget, self.window, self.pool
        )
    }

    fn acts_in_decode(&self) -> bool {
        false
    }

    fn check(&self, _model: &Model, prompt: Tokens) -> Result<(), PolicyError> {
        if self.window == 0 || self.pool == 0 {
            return Err(PolicyError {
                policy: self.label(),
                problem: "window and pool must be at least 1".to_owned(),
                remedy: "use window=32,pool=5".to_owned(),
            });
        }
        check_budget(self, self.budget.of(prompt), 0, self.window)
    }

    fn after_attend(&self, step: &Step, kv: &mut KvTape<'_>) {
        if self.acts(step, kv) {
            let (window, pool) = (self.window, self.pool);
            let by = Score::WindowAttention { window, pool, exclude_window: true };
            let ranked = kv.rank(by, self.protect());
            if self.instant == Instant::AfterLayer {
                ranked.keep(self.budget.of(step.prompt));
            }
        }
    }

    fn after_pass(&self, step: &Step, kv: &mut KvTape<'_>) {
        if self.instant == Instant::AfterPrefill && self.acts(step, kv) {
            kv.keep_protecting(self.budget.of(step.prompt), self.protect());
        }
    }
}
