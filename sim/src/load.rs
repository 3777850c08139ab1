//! What is asked of a model: prompts, answers, and how they share the device.

use serde::{Deserialize, Serialize};

use crate::units::{Tokens, parse_tokens};

/// How much of a prompt is in the cache before it is read (prefix caching), as people say it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Hit {
    /// The first tokens of each prompt.
    Tokens(Tokens),
    /// A share of each prompt, 0-1, rounded down.
    Share(f64),
}

impl Default for Hit {
    fn default() -> Self {
        Self::Tokens(0)
    }
}

impl Hit {
    /// Tokens of a prompt of `isl` tokens.
    #[must_use]
    pub fn of(self, isl: Tokens) -> Tokens {
        match self {
            Self::Tokens(tokens) => tokens,
            // 29 % of 100 are 29, though 0.29 x 100 is a little less.
            Self::Share(share) => (f64::from(isl) * share + 1e-6) as Tokens,
        }
    }
}

impl std::str::FromStr for Hit {
    type Err = String;
    /// `0`, `512`, `4k`, `75%`, `0.75`.
    fn from_str(text: &str) -> Result<Self, String> {
        let fail = || {
            format!(
                "expected tokens (512, 4k) or a share of the prompt (75%, 0.75), got \"{text}\""
            )
        };
        let (number, scale) = match text.strip_suffix('%') {
            Some(percent) => (percent, 0.01),
            None if text.contains('.') && !text.ends_with(['k', 'K', 'm', 'M']) => (text, 1.0),
            None => return parse_tokens(text).map(Self::Tokens).map_err(|_| fail()),
        };
        match number.trim().parse::<f64>() {
            Ok(share) if (0.0..=1.0).contains(&(share * scale)) => Ok(Self::Share(share * scale)),
            _ => Err(fail()),
        }
    }
}

/// Sequences of equal lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Group {
    /// How many.
    pub sequences: u32,
    /// Prompt tokens of each, >= 1.
    pub isl: Tokens,
    /// Generated tokens of each, >= 1.
    pub osl: Tokens,
    /// The first tokens of each prompt that a cache already holds, < `isl`: only the others are read. What is held is what
    /// the policy left of them when they were a prompt of their own.
    pub hit: Tokens,
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
        Self { groups: vec![Group { sequences: batch, isl, osl, hit: 0 }], schedule }
    }

    /// The same, where the first `hit` tokens of each prompt are cached.
    #[must_use]
    pub fn with_hit(mut self, hit: Hit) -> Self {
        for group in &mut self.groups {
            group.hit = hit.of(group.isl);
        }
        self
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

    /// Prompt tokens that are read: those that no cache holds.
    #[must_use]
    pub fn read_tokens(&self) -> u64 {
        let read = |g: &Group| u64::from(g.sequences) * u64::from(g.isl.saturating_sub(g.hit));
        self.groups.iter().map(read).sum()
    }

    /// Longest prompt plus its answer.
    #[must_use]
    pub fn longest(&self) -> u64 {
        self.groups.iter().map(|g| u64::from(g.isl) + u64::from(g.osl)).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hit_is_tokens_or_a_share_of_the_prompt() {
        let hit = |text: &str| text.parse::<Hit>().expect("a hit").of(2000);
        assert_eq!((hit("0"), hit("512"), hit("1k")), (0, 512, 1024));
        assert_eq!((hit("75%"), hit("0.75"), hit("100%")), (1500, 1500, 2000));
        // 33.3 % of 2,000 is 666: rounded down.
        assert_eq!(hit("33.3%"), 666);
        for wrong in ["-1", "101%", "1.5", "half", "", "%"] {
            assert!(wrong.parse::<Hit>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_cached_is_not_read() {
        let load = Load::uniform(3, 100, 5, Schedule::Static).with_hit(Hit::Tokens(60));
        assert_eq!((load.input_tokens(), load.read_tokens()), (300, 120));
    }
}
