//! StreamingLLM: the first tokens (attention sinks) and a window of the newest ones, nothing between.
//!
//! Paper: <https://arxiv.org/abs/2309.17453>. Original positions are kept instead of re-rotating the window.
//! Parameters: `chunk` cuts while the prompt is read (E2); without it the prompt is read whole and cut layer by
//! layer (E1). Deviation: decode cuts once the cache has grown `slack` tokens over the budget.

use serde::Deserialize;

use super::{Budget, Policy, PolicyError, Step, check_budget};
use crate::kv::KvTape;
use crate::op::{Phase, Protect, Score};
use crate::profile::Model;
use crate::units::Tokens;

/// Sinks and a sliding window.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamingLlm {
    /// Tokens kept per layer and KV head, sinks included.
    pub budget: Budget,
    /// First tokens that stay.
    #[serde(default = "default_sinks")]
    pub sinks: Tokens,
    /// Prompt tokens per prefill step.
    #[serde(default)]
    pub chunk: Option<Tokens>,
    /// Tokens over the budget at which decode cuts.
    #[serde(default)]
    pub slack: Tokens,
}

fn default_sinks() -> Tokens {
    4
}

impl Policy for StreamingLlm {
    fn label(&self) -> String {
        let chunk = self.chunk.map_or_else(String::new, |c| format!(",chunk={c}"));
        format!(
            "streaming-llm:budget={},sinks={},slack={}{chunk}",
            self.budget, self.sinks, self.slack
        )
    }

    fn prefill_chunk(&self) -> Option<Tokens> {
        self.chunk
    }

    fn check(&self, _model: &Model, prompt: Tokens) -> Result<(), PolicyError> {
        check_budget(self, self.budget.of(prompt), self.sinks, 1)
    }

    fn after_attend(&self, step: &Step, kv: &mut KvTape<'_>) {
        let budget = self.budget.of(step.prompt);
        let slack = if step.phase == Phase::Decode { self.slack } else { 0 };
        if kv.tokens() > budget.saturating_add(slack) {
            kv.rank(Score::Recency, Protect { sinks: self.sinks, recent: 0 }).keep(budget);
        }
    }
}
