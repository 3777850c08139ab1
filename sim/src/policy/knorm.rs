//! Knorm: tokens with small keys stay.
//!
//! Paper: <https://arxiv.org/abs/2406.11430>. Keys are measured after their rotation, which does not change a length.

use serde::Deserialize;

use super::evicting::{Evicting, Scoring};
use crate::op::Score;

/// Small keys are better.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SmallKeys {}

/// Eviction by key length.
pub type Knorm = Evicting<SmallKeys>;

impl Scoring for SmallKeys {
    const KIND: &'static str = "knorm";

    fn score(&self) -> Score {
        Score::KeyNorm
    }
}
