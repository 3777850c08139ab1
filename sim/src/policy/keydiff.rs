//! KeyDiff: tokens whose keys point away from the mean direction stay.
//!
//! Paper: <https://arxiv.org/abs/2504.15364>. The anchor is the mean of the normalised keys of all candidates. Needs no
//! queries, so it loses little when it cuts chunk by chunk.

use serde::Deserialize;

use super::evicting::{Evicting, Scoring};
use crate::op::Score;

/// Unusual keys are better.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnusualKeys {}

/// Eviction by distance from the mean key.
pub type KeyDiff = Evicting<UnusualKeys>;

impl Scoring for UnusualKeys {
    const KIND: &'static str = "keydiff";

    fn score(&self) -> Score {
        Score::KeyDiff
    }
}
