//! What is asked of a model: prompts, answers, and how they share the device.

use serde::{Deserialize, Serialize};

use crate::units::Tokens;

/// Sequences of equal lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Group {
    /// How many.
    pub sequences: u32,
    /// Prompt tokens of each, >= 1.
    pub isl: Tokens,
    /// Generated tokens of each, >= 1.
    pub osl: Tokens,
}

/// Who runs when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// The whole batch prefills together, then decodes together (the Batch-Max paper's setting).
    Static,
    /// `prefill_batch` sequences prefill at a time, then all decode together: the strong baseline, since prefill is
    /// compute-bound and one sequence at a time costs little.
    Staggered {
        /// Sequences that prefill together.
        prefill_batch: u32,
    },
}

impl std::fmt::Display for Schedule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Static => f.pad("static"),
            Self::Staggered { prefill_batch: 1 } => f.pad("staggered"),
            Self::Staggered { prefill_batch } => f.pad(&format!("staggered:{prefill_batch}")),
        }
    }
}

impl std::str::FromStr for Schedule {
    type Err = String;
    /// `static`, `staggered`, `staggered:4`.
    fn from_str(text: &str) -> Result<Self, String> {
        let fail = || {
            format!(
                "\"{text}\" is not a schedule; known: static, staggered, staggered:N (N sequences prefill at a time)"
            )
        };
        match text.split_once(':') {
            None if text == "static" => Ok(Self::Static),
            None if text == "staggered" => Ok(Self::Staggered { prefill_batch: 1 }),
            Some(("staggered", n)) => match n.parse() {
                Ok(prefill_batch) if prefill_batch > 0 => Ok(Self::Staggered { prefill_batch }),
                _ => Err(fail()),
            },
            _ => Err(fail()),
        }
    }
}

/// A set of sequences and their schedule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// Uniform lengths are one group.
    pub groups: Vec<Group>,
    /// Who runs when.
    pub schedule: Schedule,
}

impl Load {
    /// `batch` equal sequences.
    #[must_use]
    pub fn uniform(batch: u32, isl: Tokens, osl: Tokens, schedule: Schedule) -> Self {
        Self { groups: vec![Group { sequences: batch, isl, osl }], schedule }
    }

    /// Sequences of all groups.
    #[must_use]
    pub fn sequences(&self) -> u64 {
        self.groups.iter().map(|g| u64::from(g.sequences)).sum()
    }

    /// Generated tokens of all sequences.
    #[must_use]
    pub fn output_tokens(&self) -> u64 {
        self.groups.iter().map(|g| u64::from(g.sequences) * u64::from(g.osl)).sum()
    }

    /// Prompt tokens of all sequences.
    #[must_use]
    pub fn input_tokens(&self) -> u64 {
        self.groups.iter().map(|g| u64::from(g.sequences) * u64::from(g.isl)).sum()
    }

    /// Longest prompt plus its answer.
    #[must_use]
    pub fn longest(&self) -> u64 {
        self.groups.iter().map(|g| u64::from(g.isl) + u64::from(g.osl)).max().unwrap_or(0)
    }
}
