//! AdaKV: the heads of a layer share its budget, by SnapKV's ranking.
//!
//! The layer keeps the best of all its heads together, so heads hold different numbers of tokens, and each frees what it
//! doesn't hold. A guaranteed share of the budget, the window among it, stays with every head.
//! Paper: <https://arxiv.org/abs/2407.11550>. `guaranteed` is its alpha. Deviation: every evicting policy takes
//! `guaranteed`; this one has it by default. How much each head keeps depends on the text: memory is an expectation.

use serde::Deserialize;

use super::Request;
use super::evicting::{Cut, Evicting, Scoring};
use super::snapkv::Snap;
use crate::op::{Protect, Score};
use crate::units::Tokens;

/// SnapKV's ranking over all heads of a layer.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(transparent)]
pub struct Together(pub Snap);

/// SnapKV with budgets that heads share.
pub type AdaKv = Evicting<Together>;

impl Scoring for Together {
    const KIND: &'static str = "adakv";

    fn usual() -> Cut {
        Cut { guaranteed: Some(0.2), ..Snap::usual() }
    }

    fn score(&self) -> Score {
        self.0.score()
    }

    fn protect(&self, cut: &Cut, budget: Tokens) -> Protect {
        self.0.protect(cut, budget)
    }

    fn parameters(&self) -> String {
        self.0.parameters()
    }

    fn check(&self, request: &Request<'_>) -> Result<(), (String, String)> {
        self.0.check(request)
    }
}
