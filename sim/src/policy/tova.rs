//! TOVA: the newest query decides, for a whole layer at once.
//!
//! A token's score is the attention that the newest query pays it, the mean over all query heads: every KV head of a layer
//! keeps the same tokens. Every decode step ranks anew and drops what is over the budget.
//!
//! Paper: <https://arxiv.org/abs/2401.06104>. Deviations: the newest token always stays, which the paper leaves to its
//! score; with `slack` decode cuts once the cache has grown that much over the budget, by the query of that step.

use serde::Deserialize;

use super::evicting::{Cut, Evicting, Scoring};
use crate::op::{Protect, Score};
use crate::units::Tokens;

/// What the newest query attends to.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LastQuery {}

/// Eviction by the newest query.
pub type Tova = Evicting<LastQuery>;

impl Scoring for LastQuery {
    const KIND: &'static str = "tova";

    fn usual() -> Cut {
        Cut { decode: true, ..Cut::default() }
    }

    fn score(&self) -> Score {
        Score::LastAttention
    }

    fn protect(&self, cut: &Cut, _budget: Tokens) -> Protect {
        Protect { sinks: cut.sinks, recent: cut.recent.max(1) }
    }
}
