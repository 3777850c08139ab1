//! `RocketKV`: half of the saving by dropping tokens once the prompt is read, half by reading a part of what is left.
//!
//! First stage: like SnapKV, with a wide maximum pooling over the attention that the window pays. Second stage: every step
//! estimates each token's share of attention from its page's extremes, in the channels in which the queries are largest,
//! and reads the best. Both follow from one number, the tokens whose traffic a step may cause.
//!
//! Paper: <https://arxiv.org/abs/2502.14051>; its parameters derive from the length S of prompt and answer and the budget
//! t: alpha = min(0.2 + 0.06 log2(S/t), 0.8), S / (S/t)^alpha tokens are kept, t/2 read, in pages of
//! min(floor(c), ceil(sqrt(c))) tokens and over d x page / c channels, where c is what is kept over t. Deviations: chosen
//! tokens are sorted by position, as in the authors' code for accuracy; a budget that holds everything reads everything,
//! where the formulas would read half. `answer` is the answer's length that the formulas leave room for.

use serde::Deserialize;

use super::{Budget, Policy, PolicyError, Reading, Request, Role, Step};
use crate::kv::KvTape;
use crate::op::{DType, Phase, Pick, Pooling, Protect, Score};
use crate::profile::Model;
use crate::units::{Layer, Tokens};

/// Eviction, then choice.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RocketKv {
    /// Tokens whose traffic a step may cause, per layer and KV head; a share is one of the prompt.
    pub budget: Budget,
    /// Generated tokens to leave room for.
    #[serde(default = "usual_answer")]
    pub answer: Tokens,
    /// Queries that choose what stays; they stay.
    #[serde(default = "usual_window")]
    pub window: Tokens,
    /// Width of the maximum pooling.
    #[serde(default = "usual_pool")]
    pub pool: Tokens,
}

fn usual_answer() -> Tokens {
    64
}

fn usual_window() -> Tokens {
    32
}

fn usual_pool() -> Tokens {
    63
}

/// What follows from a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Parameters {
    /// Prompt tokens that stay.
    kept: Tokens,
    /// Tokens that a step reads.
    read: Tokens,
    /// Tokens of a page.
    page: Tokens,
    /// Channels that count in the choice.
    channels: u32,
}

impl RocketKv {
    fn parameters(&self, prompt: Tokens, budget: Tokens, dim: u32) -> Parameters {
        let length = f64::from(prompt.saturating_add(self.answer));
        let budget = f64::from(budget).clamp(1.0, length);
        let ratio = (length / budget).max(1.0);
        let alpha = (0.2 + 0.06 * ratio.log2()).min(0.8);
        let cap = (length / ratio.powf(alpha)).floor();
        if budget >= f64::from(prompt) {
            // A budget for the prompt: nothing is dropped, everything read.
            return Parameters { kept: prompt, read: Tokens::MAX, page: 1, channels: dim };
        }
        let left = (cap / budget).max(1.0);
        let page = left.floor().min(left.sqrt().ceil());
        let channels = (f64::from(dim) * page / left).round_ties_even().clamp(1.0, f64::from(dim));
        Parameters {
            kept: ((cap - f64::from(self.answer)).max(1.0) as Tokens).min(prompt),
            read: (budget / 2.0).round_ties_even().min(cap) as Tokens,
            page: page as Tokens,
            channels: channels as u32,
        }
    }

    fn of(&self, prompt: Tokens, token_bytes: u64, dim: u32) -> Parameters {
        self.parameters(prompt, self.budget.of(prompt, token_bytes), dim)
    }
}

impl Policy for RocketKv {
    fn label(&self) -> String {
        let Self { budget, answer, window, pool } = self;
        format!("rocketkv:budget={budget},answer={answer},window={window},pool={pool}")
    }

    fn role(&self) -> Role {
        Role::Evicts
    }

    fn acts_in_decode(&self) -> bool {
        false
    }

    fn reads(&self, _layer: Layer, prompt: Tokens, model: &Model) -> Option<Reading> {
        let token_bytes = Request::new(model, prompt, DType::F16).token_bytes;
        let Parameters { read, page, channels, .. } = self.of(prompt, token_bytes, model.head_dim);
        Some(Reading { by: Pick::Shares { page, channels }, tokens: read })
    }

    fn check(&self, request: &Request<'_>) -> Result<(), PolicyError> {
        let refuse = |problem: String, remedy: &str| {
            Err(PolicyError { policy: self.label(), problem, remedy: remedy.to_owned() })
        };
        if self.window == 0 || self.pool == 0 || self.window > request.prompt {
            return refuse(
                format!("a window of {} in a prompt of {}", self.window, request.prompt),
                "set window between 1 and the prompt's length (32 is usual), pool to at least 1",
            );
        }
        let kept = self.of(request.prompt, request.token_bytes, request.model.head_dim).kept;
        if kept < self.window {
            return refuse(
                format!("{kept} tokens of the prompt stay, which can't hold the window"),
                "raise budget, or lower window or answer",
            );
        }
        if request.model.sliding_window.is_some() {
            return refuse(
                format!("{} has sliding layers, which read their window only", request.model.name),
                "use an evicting policy",
            );
        }
        Ok(())
    }

    fn after_attend(&self, step: &Step<'_>, kv: &mut KvTape<'_>) {
        if step.phase == Phase::Decode || !step.prompt_read {
            return;
        }
        // The dimension does not matter for what stays.
        let kept = self.of(step.prompt, step.token_bytes, 64).kept;
        if kept < kv.tokens() {
            let by = Score::WindowAttention {
                window: self.window,
                pool: self.pool,
                exclude_window: true,
                pooling: Pooling::Max,
            };
            kv.rank(by, Protect { sinks: 0, recent: self.window }).keep(kept);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_those_of_the_reference() {
        let policy = |answer| RocketKv { budget: Budget::Tokens(1), answer, window: 32, pool: 63 };
        // 512 prompt tokens and 32 generated ones at a budget of 128.
        let expected = Parameters { kept: 307, read: 64, page: 2, channels: 48 };
        assert_eq!(policy(32).parameters(512, 128, 64), expected);
        // 32k at 512 with 128 channels, without room for an answer: 3,191 stay, 256 are read, pages of 3, 62 channels.
        let expected = Parameters { kept: 3191, read: 256, page: 3, channels: 62 };
        assert_eq!(policy(0).parameters(32_768, 512, 128), expected);
        assert_eq!(policy(0).parameters(512, 4096, 64).kept, 512);
        // Room for the prompt, not for the answer: the formulas would drop nothing and read half.
        let all = policy(64).parameters(480, 512, 64);
        assert_eq!((all.kept, all.read), (480, Tokens::MAX));
    }
}
