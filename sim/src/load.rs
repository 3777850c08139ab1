//! What is asked of a model: prompts, answers, and how they share the device.

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Tokens, parse_tokens};

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
    /// Sequences join and leave: a prompt is read as soon as there is room for it, one at a time, then its sequence generates
    /// with those that do; one that has its answer gives its memory back at once.
    Continuous {
        /// Requests that each place of the batch serves, one after another.
        turns: u32,
    },
}

/// Requests per place of a continuous schedule, where nobody says otherwise: enough that beginning and end count little.
const TURNS: u32 = 4;
/// More of them say no more about a rate.
const MOST_TURNS: u32 = 1024;

impl Schedule {
    /// Requests of `places` places; `None` where an index can't count them.
    #[must_use]
    pub fn requests(self, places: u32) -> Option<u32> {
        match self {
            Self::Static | Self::Staggered { .. } => Some(places),
            Self::Continuous { turns } => places.checked_mul(turns),
        }
    }
}

impl std::fmt::Display for Schedule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Static => f.pad("static"),
            Self::Staggered { prefill_batch: 1 } => f.pad("staggered"),
            Self::Staggered { prefill_batch } => f.pad(&format!("staggered:{prefill_batch}")),
            Self::Continuous { turns: TURNS } => f.pad("continuous"),
            Self::Continuous { turns } => f.pad(&format!("continuous:{turns}")),
        }
    }
}

impl std::str::FromStr for Schedule {
    type Err = String;
    /// `static`, `staggered`, `staggered:4`, `continuous`, `continuous:8`.
    fn from_str(text: &str) -> Result<Self, String> {
        let fail = || {
            format!(
                "\"{text}\" is not a schedule; known: static, staggered, staggered:N (N sequences prefill at a time), \
                 continuous, continuous:N (each place of the batch serves N requests in turn)"
            )
        };
        match text.split_once(':') {
            None if text == "static" => Ok(Self::Static),
            None if text == "staggered" => Ok(Self::Staggered { prefill_batch: 1 }),
            Some(("staggered", n)) => match n.parse() {
                Ok(prefill_batch) if prefill_batch > 0 => Ok(Self::Staggered { prefill_batch }),
                _ => Err(fail()),
            },
            None if text == "continuous" => Ok(Self::Continuous { turns: TURNS }),
            Some(("continuous", n)) => match n.parse() {
                Ok(turns) if (1..=MOST_TURNS).contains(&turns) => Ok(Self::Continuous { turns }),
                _ => Err(format!(
                    "\"{text}\" is not a schedule; a place serves 1 to {MOST_TURNS} requests"
                )),
            },
            _ => Err(fail()),
        }
    }
}

/// How far the lengths of answers lie apart, in thousandths of their mean: they are spread evenly from as much below it to as
/// much above it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct Spread(u32);

impl Spread {
    /// Whether all answers are alike.
    #[must_use]
    pub fn is_none(self) -> bool {
        self.0 == 0
    }

    /// Lengths of `count` answers as multiples of their mean: evenly spaced, neighbours far apart, so that any few that follow
    /// each other cover the whole range.
    fn multiples(self, count: u32) -> Vec<f64> {
        /// The golden ratio's fraction, in 64 bits: its multiples are spread as evenly as any sequence's.
        const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
        let mut order: Vec<u32> = (0..count).collect();
        order.sort_by_key(|index| u64::from(*index).wrapping_mul(GOLDEN));
        let mut multiples = vec![1.0; order.len()];
        for (rank, index) in order.into_iter().enumerate() {
            let offset = (2.0 * rank as f64 + 1.0) / f64::from(count) - 1.0;
            multiples[index as usize] += offset * f64::from(self.0) / 1000.0;
        }
        multiples
    }
}

impl std::str::FromStr for Spread {
    type Err = String;
    /// `0`, `50%`, `0.5`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (number, scale) = text.strip_suffix('%').map_or((text, 1.0), |n| (n, 0.01));
        match number.trim().parse::<f64>() {
            Ok(share) if (0.0..1.0).contains(&(share * scale)) => {
                Ok(Self((share * scale * 1000.0).round() as u32))
            }
            _ => Err(format!("expected a share below 1 (50%, 0.5), got \"{text}\"")),
        }
    }
}

/// What must be free before a request of a continuous schedule joins. Requests join in their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    /// Sequences at once; `None`: any number.
    pub places: Option<u32>,
    /// Bytes of the caches, of which each sequence reserves what it will hold at its worst moment; `None`: any amount. A
    /// request that is too large for all of it joins alone.
    pub kv: Option<Bytes>,
}

/// Different answers at once, at most: a program has an event for each, and more of them change no rate.
pub const MOST_APART: u64 = 16;

/// A set of sequences and their schedule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// Uniform lengths are one group.
    pub groups: Vec<Group>,
    /// Who runs when.
    pub schedule: Schedule,
    /// Of a continuous schedule.
    pub admission: Admission,
}

impl Load {
    /// These groups, all of them at once.
    #[must_use]
    pub fn new(groups: Vec<Group>, schedule: Schedule) -> Self {
        Self { groups, schedule, admission: Admission::default() }
    }

    /// Equal requests: `batch` sequences at once, as often as the schedule has turns.
    #[must_use]
    pub fn uniform(batch: u32, isl: Tokens, osl: Tokens, schedule: Schedule) -> Self {
        let sequences = schedule.requests(batch).unwrap_or(u32::MAX);
        let mut load = Self::new(vec![Group { sequences, isl, osl, hit: 0 }], schedule);
        if matches!(schedule, Schedule::Continuous { .. }) {
            load.admission.places = Some(batch);
        }
        load
    }

    /// The same with answers of different lengths. In a large batch some neighbours have answers of one length, so that no more
    /// than [`MOST_APART`] different ones run at once.
    #[must_use]
    pub fn with_spread(mut self, spread: Spread) -> Self {
        if spread.is_none() {
            return self;
        }
        let alike = u32::try_from(self.batch().div_ceil(MOST_APART)).unwrap_or(u32::MAX).max(1);
        let groups = std::mem::take(&mut self.groups);
        let count = groups.iter().map(|g| g.sequences.div_ceil(alike)).sum();
        let mut multiples = spread.multiples(count).into_iter();
        for group in groups {
            let mut left = group.sequences;
            while left > 0 {
                let sequences = left.min(alike);
                let osl = f64::from(group.osl) * multiples.next().unwrap_or(1.0);
                let osl = osl.round().max(1.0) as Tokens;
                self.groups.push(Group { sequences, osl, ..group });
                left -= sequences;
            }
        }
        self
    }

    /// Sequences that run at once.
    #[must_use]
    pub fn batch(&self) -> u64 {
        match (self.schedule, self.admission.places) {
            (Schedule::Continuous { .. }, Some(places)) => self.sequences().min(places.into()),
            _ => self.sequences(),
        }
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
    fn answers_are_spread_around_their_mean() {
        let spread: Spread = "50%".parse().expect("a spread");
        assert_eq!(spread, "0.5".parse().expect("a spread"));
        for (count, groups) in [(2, 2), (7, 7), (16, 16), (64, 16), (1000, 16)] {
            let load = Load::uniform(count, 10, 200, Schedule::Static).with_spread(spread);
            let lengths: Vec<u32> = load.groups.iter().map(|g| g.osl).collect();
            assert_eq!((lengths.len(), load.sequences()), (groups, count.into()));
            assert!(lengths.iter().all(|l| (100..=300).contains(l)), "{lengths:?}");
            let mean = load.output_tokens() as f64 / f64::from(count);
            // A last, smaller group weighs less.
            assert!((mean / 200.0 - 1.0).abs() < 0.02, "{count}: {mean}");
        }
        let four = Load::uniform(4, 10, 200, Schedule::Static).with_spread(spread);
        let mut lengths: Vec<u32> = four.groups.iter().map(|g| g.osl).collect();
        assert_eq!(four.clone().with_spread(Spread::default()), four);
        lengths.sort_unstable();
        // 200 less and more 3/4 and 1/4 of its half.
        assert_eq!(lengths, [125, 175, 225, 275]);
        for wrong in ["1", "100%", "-0.1", "wide", ""] {
            assert!(wrong.parse::<Spread>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_continuous_batch_serves_its_turns() {
        let schedule: Schedule = "continuous:3".parse().expect("a schedule");
        let load = Load::uniform(4, 100, 5, schedule);
        assert_eq!((load.batch(), load.sequences()), (4, 12));
        assert_eq!(schedule.to_string(), "continuous:3");
        assert_eq!("continuous".parse::<Schedule>().expect("one").to_string(), "continuous");
        assert!("continuous:0".parse::<Schedule>().is_err());
    }

    #[test]
    fn what_is_cached_is_not_read() {
        let load = Load::uniform(3, 100, 5, Schedule::Static).with_hit(Hit::Tokens(60));
        assert_eq!((load.input_tokens(), load.read_tokens()), (300, 120));
    }
}
