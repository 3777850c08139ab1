//! PyramidKV: SnapKV with more tokens in the lower layers than in the upper ones.
//!
//! Budgets fall linearly from the first layer to the last, with the total of equal ones; the window stands outside.
//! Paper: <https://arxiv.org/abs/2406.02069>. `pyramid` is its beta: the last layer has mean / beta tokens beside the
//! window. Deviation: every evicting policy takes `pyramid`; this one has it by default.

use serde::Deserialize;

use super::Request;
use super::evicting::{Cut, Evicting, Scoring};
use super::snapkv::Snap;
use crate::op::{Protect, Score};
use crate::units::Tokens;

/// SnapKV's ranking under falling budgets.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(transparent)]
pub struct Falling(pub Snap);

/// SnapKV with a pyramid of budgets.
pub type PyramidKv = Evicting<Falling>;

impl Scoring for Falling {
    const KIND: &'static str = "pyramidkv";

    fn usual() -> Cut {
        Cut { pyramid: Some(20.0), ..Snap::usual() }
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
