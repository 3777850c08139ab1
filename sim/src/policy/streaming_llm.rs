//! StreamingLLM: the first tokens (attention sinks) and a window of the newest ones, nothing between.
//!
//! Paper: <https://arxiv.org/abs/2309.17453>. Parameters: `chunk` cuts while the prompt is read (E2); without it the prompt
//! is read whole and cut layer by layer (E1); `rerotate` turns the window's keys to their places in the cache, as the
//! authors do. Deviations: positions in the text are kept by default, which saves turning the window at every cut and
//! is the same as long as the text fits the model's context; with `slack` decode cuts once the cache has grown that much
//! over the budget.

use serde::Deserialize;

use super::evicting::{Cut, Evicting, Scoring};
use crate::op::{Protect, Score};
use crate::units::Tokens;

/// Newer is better.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Newest {}

/// Sinks and a sliding window.
pub type StreamingLlm = Evicting<Newest>;

impl Scoring for Newest {
    const KIND: &'static str = "streaming-llm";

    fn usual() -> Cut {
        Cut { sinks: 4, decode: true, ..Cut::default() }
    }

    fn score(&self) -> Score {
        Score::Recency
    }

    /// Whatever the ranking says, the newest token is among the recent ones.
    fn protect(&self, cut: &Cut, _budget: Tokens) -> Protect {
        Protect { sinks: cut.sinks, recent: cut.recent.max(1) }
    }
}
