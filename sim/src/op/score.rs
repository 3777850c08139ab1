//! How tokens are ranked.

use serde::{Deserialize, Serialize};

use crate::units::Tokens;

/// How a token's score takes its neighbours in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pooling {
    /// The mean; missing neighbours count as zero.
    #[default]
    Mean,
    /// The largest. Neighbours tie, and the lower position stays.
    Max,
}

/// How tokens are ranked before some are dropped. Closed: `exec` has one kernel per word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Score {
    /// Newer is better.
    Recency,
    /// Small keys are better: -|k|.
    KeyNorm,
    /// Unusual keys are better: -cos(k, mean of the normalised keys).
    KeyDiff,
    /// Attention that the last queries pay, smoothed along the cache.
    WindowAttention {
        /// Queries of the observation window.
        window: Tokens,
        /// Neighbours that a score is taken over, itself included. Queries and the group's heads are summed before.
        pool: Tokens,
        /// What is taken of them.
        pooling: Pooling,
        /// Pool as if the window's own columns did not exist (SnapKV, kvpress).
        exclude_window: bool,
    },
    /// Attention received since the token came, summed over queries.
    TalliedAttention {
        /// Divide by the number of queries that could see the token.
        mean: bool,
    },
    /// Attention that the newest query pays, over all query heads: one order for the whole layer.
    LastAttention,
    /// Attention that the newest query pays: the largest of some neighbours and of the group's heads. The newest token
    /// itself is no candidate and nobody's neighbour (`RefreshKV`).
    NewestAttention {
        /// Neighbours that a score is taken over, itself included.
        pool: Tokens,
    },
    /// A hash of layer, head and position.
    Random {
        /// Another seed, another order.
        seed: u32,
    },
    /// Tokens that vary against the tokens after them (`LagKV`), by rank inside their partition.
    Lag {
        /// Tokens of a partition.
        lag: Tokens,
        /// First tokens, before the first partition.
        sinks: Tokens,
    },
    /// The attention expected of the next queries, were they distributed like those of this step, times the value's length.
    ExpectedAttention {
        /// First tokens, whose queries are no sample and whose keys are no candidates.
        sinks: Tokens,
        /// Positions ahead.
        future: Tokens,
    },
}

impl Score {
    /// The name in presets and tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Recency => "recency",
            Self::KeyNorm => "key-norm",
            Self::KeyDiff => "keydiff",
            Self::WindowAttention { .. } => "window",
            Self::TalliedAttention { .. } => "tally",
            Self::LastAttention => "last",
            Self::NewestAttention { .. } => "newest",
            Self::Random { .. } => "random",
            Self::Lag { .. } => "lag",
            Self::ExpectedAttention { .. } => "expected",
        }
    }
}
