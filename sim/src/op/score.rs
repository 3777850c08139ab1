//! How tokens are ranked.

use crate::units::Tokens;

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
        /// Width of the average pooling.
        pool: Tokens,
        /// Pool as if the window's own columns did not exist (SnapKV, kvpress).
        exclude_window: bool,
    },
    /// Attention received since the token came, summed over queries.
    TalliedAttention {
        /// Divide by the number of queries that could see the token.
        mean: bool,
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
        }
    }
}
