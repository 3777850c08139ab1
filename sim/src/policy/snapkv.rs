//! SnapKV: once the prompt is read, keep the window and the tokens that the window's queries attend to.
//!
//! The last `window` queries' attention is averaged over queries, pooled along the cache and averaged over the heads
//! that share a KV head; the best `budget - window` tokens stay beside the window. Decode evicts nothing.
//!
//! Paper: <https://arxiv.org/abs/2404.14469>. Average pooling of 5, as in kvpress; original positions are kept.
//! `pooling = "max"` with `pool = 63` is the first stage of RocketKV (<https://arxiv.org/abs/2502.14051>).
//! Parameters: `instant` chooses when the cut happens, which decides the prefill peak (E0 or E1).

use serde::Deserialize;

use super::evicting::{Cut, Evicting, Scoring};
use super::{Request, window_and_pool};
use crate::op::{Pooling, Protect, Score};
use crate::units::Tokens;

/// A window of queries that chooses.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Snap {
    /// Queries of the observation window; they stay.
    pub window: Tokens,
    /// Width of the pooling.
    pub pool: Tokens,
    /// Its kind.
    pub pooling: Pooling,
}

impl Default for Snap {
    fn default() -> Self {
        Self { window: 32, pool: 5, pooling: Pooling::Mean }
    }
}

/// One-shot compression after the prompt.
pub type SnapKv = Evicting<Snap>;

impl Scoring for Snap {
    const KIND: &'static str = "snapkv";

    fn score(&self) -> Score {
        let Self { window, pool, pooling } = *self;
        Score::WindowAttention { window, pool, pooling, exclude_window: true }
    }

    fn protect(&self, cut: &Cut, _budget: Tokens) -> Protect {
        Protect { sinks: cut.sinks, recent: cut.recent.max(self.window) }
    }

    fn parameters(&self) -> String {
        let pooling = match self.pooling {
            Pooling::Mean => "",
            Pooling::Max => "pooling=max,",
        };
        format!("window={},pool={},{pooling}", self.window, self.pool)
    }

    fn check(&self, request: &Request<'_>) -> Result<(), (String, String)> {
        window_and_pool(self.window, self.pool, request)
    }
}
