//! Random eviction: the floor that every ranking must beat.
//!
//! A token's score is a hash of layer, KV head and position, so a cut chunk by chunk keeps what one cut of the whole prompt
//! keeps, and two runs with the same `seed` the same tokens. Every head draws for itself.
//!
//! After kvpress' `RandomPress`, which draws anew for every sequence; here equal positions of two sequences fare alike, so
//! that a sequence does not depend on its neighbours in the batch.

use serde::Deserialize;

use super::evicting::{Evicting, Scoring};
use crate::op::Score;

/// Chance.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Chance {
    /// Another seed keeps other tokens.
    pub seed: u32,
}

/// Eviction by chance.
pub type Random = Evicting<Chance>;

impl Scoring for Chance {
    const KIND: &'static str = "random";

    fn score(&self) -> Score {
        Score::Random { seed: self.seed }
    }

    fn only_if_named(&self) -> bool {
        true
    }

    fn parameters(&self) -> String {
        format!("seed={},", self.seed)
    }
}
