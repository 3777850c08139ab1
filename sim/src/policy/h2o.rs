//! H2O: heavy hitters and recent tokens.
//!
//! Half of the budget are the newest tokens, half those that have received most attention from all queries so far, the
//! mean over the heads of a group. In decode every step adds its row and, over the budget, the least of the others goes.
//!
//! Paper: <https://arxiv.org/abs/2306.14048>. `mean` divides the sum by the number of queries that could see the token
//! (kvpress' `ObservedAttention`); undivided, old tokens have an advantage. `heavy` is the share of the heavy hitters.

use serde::Deserialize;

use super::Request;
use super::evicting::{Cut, Evicting, Scoring};
use crate::op::{Protect, Score};
use crate::units::Tokens;

/// Attention received.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HeavyHitters {
    /// Divide by the number of queries that could see the token.
    pub mean: bool,
    /// Share of the budget for heavy hitters, 0-1; the rest are the newest tokens.
    pub heavy: f64,
}

impl Default for HeavyHitters {
    fn default() -> Self {
        Self { mean: false, heavy: 0.5 }
    }
}

/// Eviction by received attention.
pub type H2o = Evicting<HeavyHitters>;

impl Scoring for HeavyHitters {
    const KIND: &'static str = "h2o";

    fn usual() -> Cut {
        Cut { decode: true, ..Cut::default() }
    }

    fn score(&self) -> Score {
        Score::TalliedAttention { mean: self.mean }
    }

    fn protect(&self, cut: &Cut, budget: Tokens) -> Protect {
        let newest = budget - (f64::from(budget) * self.heavy.clamp(0.0, 1.0)) as Tokens;
        Protect { sinks: cut.sinks, recent: newest.saturating_sub(cut.sinks).max(cut.recent) }
    }

    fn parameters(&self) -> String {
        format!("mean={},heavy={},", self.mean, self.heavy)
    }

    fn check(&self, _request: &Request<'_>) -> Result<(), (String, String)> {
        if (0.0..=1.0).contains(&self.heavy) {
            return Ok(());
        }
        Err((
            format!("heavy={} is not a share", self.heavy),
            "set it between 0 and 1 (0.5 is usual)".to_owned(),
        ))
    }
}
