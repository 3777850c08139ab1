//! The sequences an op works on.

use crate::form::Length;
use crate::units::Tokens;

/// Equal sequences inside an op: `sequences` of them from index `first`, each with `rows` query tokens in this step
/// over a cache of `kv` tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Lane {
    /// Index of the first sequence in the load.
    pub first: u32,
    /// How many sequences.
    pub sequences: u32,
    /// Query tokens per sequence.
    pub rows: Tokens,
    /// Cached tokens per sequence and KV head. `Append`, `Evict`, `Release`: before the op. Other ops: as read.
    pub kv: Tokens,
    /// Of those, the ones that a step before has settled ([`crate::form`]); the others are new.
    pub settled: Tokens,
    /// Tokens that stay (`Evict`; `Release`: those that other sequences hold too), or rows that go on (`Forward`).
    pub keep: Tokens,
}

impl Lane {
    /// The cache's length `step` steps later, when each step has added its rows.
    #[must_use]
    pub fn length(&self, step: u32) -> Length {
        let grown = step.saturating_mul(self.rows);
        Length {
            settled: self.settled.saturating_add(grown),
            tokens: self.kv.saturating_add(grown),
        }
    }
}

/// The lanes of an op; one lane (all sequences equal) needs no allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lanes {
    /// All sequences are equal.
    One(Lane),
    /// Ragged batch.
    Many(Vec<Lane>),
}

impl FromIterator<Lane> for Lanes {
    /// One element is stored inline, without a list on the way.
    fn from_iter<I: IntoIterator<Item = Lane>>(lanes: I) -> Self {
        let mut lanes = lanes.into_iter();
        match (lanes.next(), lanes.next()) {
            (Some(one), None) => Self::One(one),
            (first, second) => Self::Many(first.into_iter().chain(second).chain(lanes).collect()),
        }
    }
}

impl Lanes {
    /// From a list; one element is stored inline.
    #[must_use]
    pub fn new(lanes: &[Lane]) -> Self {
        match lanes {
            [one] => Self::One(*one),
            many => Self::Many(many.to_vec()),
        }
    }

    /// The lanes in order of their sequences.
    #[must_use]
    pub fn as_slice(&self) -> &[Lane] {
        match self {
            Self::One(lane) => std::slice::from_ref(lane),
            Self::Many(lanes) => lanes,
        }
    }

    /// Adds a lane behind the others.
    pub fn push(&mut self, lane: Lane) {
        match self {
            Self::One(one) => *self = Self::Many(vec![*one, lane]),
            Self::Many(lanes) => lanes.push(lane),
        }
    }

    /// Query tokens of all sequences.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.as_slice().iter().map(|l| u64::from(l.sequences) * u64::from(l.rows)).sum()
    }

    /// The indices of the sequences.
    pub fn indices(&self) -> impl Iterator<Item = u32> {
        self.as_slice().iter().flat_map(|l| l.first..l.first + l.sequences)
    }

    /// Sequences of all lanes.
    #[must_use]
    pub fn sequences(&self) -> u64 {
        self.as_slice().iter().map(|l| u64::from(l.sequences)).sum()
    }
}
