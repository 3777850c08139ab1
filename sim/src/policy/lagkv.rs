//! LagKV: tokens whose keys and values vary more than those of the tokens after them.
//!
//! Behind the sinks the cache is cut into partitions of `lag` tokens. Keys and values of a partition are scaled, channel
//! by channel, to the range of the next partition; a token's score is its standard deviation over the channels, by softmax
//! inside the partition, the mean of keys and values, and then its rank there. The last whole partition and what is left
//! behind it have no partition to be compared with and stay. Needs no attention.
//!
//! Paper: <https://arxiv.org/abs/2504.04704>; the ranks are kvpress'. Deviations: a channel that is constant in the next
//! partition counts as zero; where the budget is smaller than what has no rank, the newest of it stay; a cache of fewer
//! than two partitions is cut by age, as in kvpress. With `chunk` or `decode` partitions are counted in what is left.

use serde::Deserialize;

use super::Request;
use super::evicting::{Cut, Evicting, Scoring};
use crate::op::Score;
use crate::units::Tokens;

/// Variation against later tokens.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lagging {
    /// Tokens of a partition.
    pub lag: Tokens,
}

impl Default for Lagging {
    fn default() -> Self {
        Self { lag: 128 }
    }
}

/// Eviction by variation against later tokens.
pub type LagKv = Evicting<Lagging>;

impl Scoring for Lagging {
    const KIND: &'static str = "lagkv";

    fn usual() -> Cut {
        Cut { sinks: 4, ..Cut::default() }
    }

    fn score(&self) -> Score {
        self.score_under(&Self::usual())
    }

    fn score_under(&self, cut: &Cut) -> Score {
        Score::Lag { lag: self.lag, sinks: cut.sinks }
    }

    fn parameters(&self) -> String {
        format!("lag={},", self.lag)
    }

    fn check(&self, _request: &Request<'_>) -> Result<(), (String, String)> {
        if self.lag > 0 {
            return Ok(());
        }
        Err((
            "a partition needs tokens".to_owned(),
            "set lag to at least 1 (128 is usual)".to_owned(),
        ))
    }
}
