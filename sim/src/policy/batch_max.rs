//! Batch-Max: compress the KV cache already while the prompt is read, so that a larger batch fits.
//!
//! After every prefill chunk each layer drops to a uniform budget per KV head and sequence; the largest cache of a
//! sequence is then budget + one layer's chunk instead of the prompt.
//!
//! Paper: <https://arxiv.org/abs/2412.05693>. Its score, chunk length and protected tokens are not public: `by`,
//! `chunk`, `sinks` and `recent` are this project's choices, not the authors'.
//! Deviation: decode steps cut only once the cache has grown `slack` tokens over the budget, which spares a compaction
//! per step; `slack = 0` cuts at every step.

use serde::{Deserialize, Serialize};

use super::evicting::{Cut, Evicting, Scoring};
use super::{Request, window_and_pool};
use crate::op::{Pooling, Score};
use crate::units::Tokens;

/// The scores a preset can name; parameters stand beside it in the preset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum By {
    /// Newer is better.
    Recency,
    /// Small keys are better.
    #[default]
    KeyNorm,
    /// Keys unlike the mean are better.
    Keydiff,
    /// Attention of the last queries, pooled over all candidates.
    Window,
    /// The same, pooled as if the window's own columns did not exist.
    WindowSnap,
    /// Attention received, divided by the queries that could see the token.
    Tally,
    /// Attention received, undivided (H2O).
    TallySum,
}

impl By {
    /// The score, with the window's parameters where it has some.
    #[must_use]
    pub fn score(self, window: Tokens, pool: Tokens) -> Score {
        let windowed = |exclude_window| Score::WindowAttention {
            window,
            pool,
            pooling: Pooling::Mean,
            exclude_window,
        };
        match self {
            Self::Recency => Score::Recency,
            Self::KeyNorm => Score::KeyNorm,
            Self::Keydiff => Score::KeyDiff,
            Self::Window => windowed(false),
            Self::WindowSnap => windowed(true),
            Self::Tally => Score::TalliedAttention { mean: true },
            Self::TallySum => Score::TalliedAttention { mean: false },
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Recency => "recency",
            Self::KeyNorm => "key-norm",
            Self::Keydiff => "keydiff",
            Self::Window => "window",
            Self::WindowSnap => "window-snap",
            Self::Tally => "tally",
            Self::TallySum => "tally-sum",
        }
    }
}

/// A ranking by choice.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AnyScore {
    /// The ranking.
    pub by: By,
    /// Queries of the window score.
    pub window: Tokens,
    /// Pooling of the window score.
    pub pool: Tokens,
}

impl Default for AnyScore {
    fn default() -> Self {
        Self { by: By::default(), window: 32, pool: 5 }
    }
}

/// Eviction after every prefill chunk and during decode.
pub type BatchMax = Evicting<AnyScore>;

impl Scoring for AnyScore {
    const KIND: &'static str = "batch-max";

    fn usual() -> Cut {
        Cut { chunk: Some(256), decode: true, ..Cut::default() }
    }

    fn score(&self) -> Score {
        self.by.score(self.window, self.pool)
    }

    fn parameters(&self) -> String {
        format!("by={},", self.by.name())
    }

    fn check(&self, request: &Request<'_>) -> Result<(), (String, String)> {
        match self.by {
            By::Window | By::WindowSnap => window_and_pool(self.window, self.pool, request),
            _ => Ok(()),
        }
    }
}
