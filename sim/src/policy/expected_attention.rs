//! Expected attention: what queries to come would attend to, were they like those of the prompt.
//!
//! Mean and covariance of a head's queries before their rotation, over the prompt behind the sinks, are turned by the mean
//! of the rotations of the next `future` positions. The expected weight of a key k is then exp(k.mu / sqrt(d) +
//! k.Sigma k / (2 d)), normalised over the keys behind the sinks; the mean over the heads of a group, times the length of
//! the value, is the score. Needs no attention probabilities.
//!
//! Paper: <https://arxiv.org/abs/2510.00636>; the formula is kvpress' (its `epsilon` is zero). Deviation: a logit cap of
//! the model is left out of the expectation. The prompt is read whole, and decode evicts nothing: both need its queries.

use serde::Deserialize;

use super::Request;
use super::evicting::{Cut, Evicting, Scoring};
use crate::op::Score;
use crate::units::Tokens;

/// Attention expected of later queries.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Expected {
    /// Positions ahead.
    pub future: Tokens,
}

impl Default for Expected {
    fn default() -> Self {
        Self { future: 512 }
    }
}

/// Eviction by expected attention.
pub type ExpectedAttention = Evicting<Expected>;

impl Scoring for Expected {
    const KIND: &'static str = "expected-attention";

    fn usual() -> Cut {
        Cut { sinks: 4, ..Cut::default() }
    }

    fn score(&self) -> Score {
        self.score_under(&Self::usual())
    }

    fn score_under(&self, cut: &Cut) -> Score {
        Score::ExpectedAttention { sinks: cut.sinks, future: self.future }
    }

    fn whole_prompt(&self) -> bool {
        true
    }

    fn parameters(&self) -> String {
        format!("future={},", self.future)
    }

    fn check(&self, _request: &Request<'_>) -> Result<(), (String, String)> {
        if self.future > 0 {
            return Ok(());
        }
        Err(("no position ahead".to_owned(), "set future to at least 1 (512 is usual)".to_owned()))
    }
}
