//! Which batch, policy, schedule and placement give the most in the memory there is.
//!
//! Pure: same query, same answer. The largest batch that fits is exact (bisection over a footprint that grows with the
//! batch).

mod crossing;
mod front;
mod search;

use serde::Serialize;

pub use crossing::{Crossing, crossing};
pub use front::{Marks, marks};
pub use search::{Candidate, Host, Objective, Query, plan};

use crate::cost::{CostModel, predict};
use crate::load::{Hit, Load, Schedule};
use crate::lower::{LowerError, lower, lower_prefix};
use crate::memory::Footprint;
use crate::metrics::Metrics;
use crate::place::Placement;
use crate::policy::Policy;
use crate::program::Program;
use crate::timeline::Timeline;
use crate::units::{Bytes, Seconds, Tokens};

/// Memory, as limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// Everything together.
    pub memory: Bytes,
    /// The caches alone.
    pub kv_memory: Option<Bytes>,
    /// What the process or the device takes for itself.
    pub runtime: Bytes,
}

/// Largest acceptable latencies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Slo {
    /// Time to the last sequence's first token.
    pub ttft: Option<Seconds>,
    /// Time per output token.
    pub tpot: Option<Seconds>,
}

impl Slo {
    /// The limit that a run misses.
    #[must_use]
    pub fn missed(&self, metrics: &Metrics) -> Option<Bound> {
        if self.ttft.is_some_and(|limit| metrics.ttft > limit) {
            Some(Bound::Ttft)
        } else if self.tpot.is_some_and(|limit| metrics.tpot > limit) {
            Some(Bound::Tpot)
        } else {
            None
        }
    }
}

/// One configuration.
#[derive(Clone, Copy)]
pub struct Case<'a> {
    /// What each device holds.
    pub placement: &'a Placement,
    /// The policy.
    pub policy: &'a dyn Policy,
    /// Prompt tokens.
    pub isl: Tokens,
    /// Generated tokens.
    pub osl: Tokens,
    /// How much of each prompt is cached.
    pub hit: Hit,
    /// Who runs when.
    pub schedule: Schedule,
}

/// What keeps a batch from growing, or a configuration from running.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// All memory is taken.
    Memory,
    /// The caches' own budget, while prompts are read.
    KvPrefill,
    /// The caches' own budget, while tokens are generated.
    KvDecode,
    /// TTFT limit.
    Ttft,
    /// TPOT limit.
    Tpot,
    /// The sequences that the engine runs together.
    Sequences,
    /// The batch that was asked for, or the largest that was searched.
    Batch,
    /// Not even one sequence.
    NothingFits,
}

impl Bound {
    /// As tables print it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::KvPrefill => "kv, prefill",
            Self::KvDecode => "kv, decode",
            Self::Ttft => "ttft limit",
            Self::Tpot => "tpot limit",
            Self::Sequences => "engine's sequences",
            Self::Batch => "batch",
            Self::NothingFits => "does not fit",
        }
    }
}

/// Why a batch does not fit, with the bytes that are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Over {
    /// Which limit.
    pub bound: Bound,
    /// By how much.
    pub by: Bytes,
}

impl std::fmt::Display for Over {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.bound {
            Bound::Sequences => f.write_str("more sequences than the engine runs together"),
            bound => write!(f, "over by {} ({})", self.by, bound.name()),
        }
    }
}

/// No batch above this is searched: an index must count the sequences, and nobody serves more from one device.
pub const LARGEST_BATCH: u32 = 1 << 16;

impl Case<'_> {
    /// The program at a batch.
    pub fn program(&self, batch: u32) -> Result<Program, LowerError> {
        lower(&self.placement.model, self.policy, &self.load(batch), self.placement.setup)
    }

    /// What reads the cached prefixes at a batch, where there are any.
    #[must_use]
    pub fn prefix(&self, batch: u32) -> Option<Program> {
        lower_prefix(&self.placement.model, self.policy, &self.load(batch), self.placement.setup)
    }

    fn load(&self, batch: u32) -> Load {
        Load::uniform(batch, self.isl, self.osl, self.schedule).with_hit(self.hit)
    }

    /// Whether a footprint stays within the limits.
    #[must_use]
    pub fn over(&self, footprint: &Footprint) -> Option<Over> {
        let limits = &self.placement.limits;
        if let Some(kv) = limits.kv_memory {
            let peak = footprint.kv_peak() + footprint.kv_spread;
            if peak > kv {
                let bound = if footprint.kv_prefill_peak >= footprint.kv_decode_peak {
                    Bound::KvPrefill
                } else {
                    Bound::KvDecode
                };
                return Some(Over { bound, by: peak.saturating_sub(kv) });
            }
        }
        let total = footprint.most();
        (total > limits.memory)
            .then(|| Over { bound: Bound::Memory, by: total.saturating_sub(limits.memory) })
    }

    /// Sequences that the engine runs together, unless told otherwise; this project's own executor takes any number.
    fn most_sequences(&self) -> u32 {
        self.placement.engine.as_ref().map_or(LARGEST_BATCH, |e| e.most_sequences)
    }

    fn beyond_engine(&self, batch: u32) -> Option<Over> {
        let over = Over { bound: Bound::Sequences, by: Bytes(0) };
        (batch > self.most_sequences()).then_some(over)
    }

    fn fits(&self, batch: u32) -> Result<Option<Over>, LowerError> {
        let program = self.program(batch)?;
        let over = self.over(&self.placement.footprint(&program));
        Ok(over.or_else(|| self.beyond_engine(batch)))
    }

    /// The largest batch that fits and what stops the next one; 0 where not even one sequence fits.
    pub fn largest_batch(&self, most: u32) -> Result<(u32, Over), LowerError> {
        if let Some(over) = self.fits(1)? {
            return Ok((0, over));
        }
        // Doubling, then bisection: `good` fits, `bad` does not.
        let (mut good, mut bad) = (1u32, None);
        while good < most {
            let next = good.saturating_mul(2).min(most);
            match self.fits(next)? {
                None => good = next,
                Some(over) => {
                    bad = Some((next, over));
                    break;
                }
            }
        }
        let Some((mut bad, mut over)) = bad else {
            return Ok((good, Over { bound: Bound::Batch, by: Bytes(0) }));
        };
        while bad - good > 1 {
            let middle = good + (bad - good) / 2;
            match self.fits(middle)? {
                None => good = middle,
                Some(why) => (bad, over) = (middle, why),
            }
        }
        Ok((good, over))
    }

    /// The largest batch that fits and meets the latencies (or `batch`, if it does), what stops a larger one, and the
    /// bytes that are missing.
    pub fn best(
        &self,
        cost: &dyn CostModel,
        slo: Slo,
        batch: Option<u32>,
    ) -> Result<(Option<Answer>, Bound, Bytes), LowerError> {
        let (largest, over) = self.largest_batch(batch.unwrap_or(LARGEST_BATCH))?;
        if largest == 0 {
            return Ok((None, Bound::NothingFits, over.by));
        }
        if batch.is_some_and(|batch| batch > largest) {
            return Ok((None, over.bound, over.by));
        }
        let answer = self.answer(largest, cost)?;
        let Some(mut bound) = slo.missed(&answer.metrics) else {
            return Ok((Some(answer), over.bound, over.by));
        };
        if batch.is_some() {
            return Ok((None, bound, Bytes(0)));
        }
        // Latencies grow with the batch: bisect the largest that meets them.
        let (mut best, mut good, mut bad) = (None, 0u32, largest);
        while bad - good > 1 {
            let middle = good + (bad - good) / 2;
            let trial = self.answer(middle, cost)?;
            match slo.missed(&trial.metrics) {
                None => (good, best) = (middle, Some(trial)),
                Some(why) => (bad, bound) = (middle, why),
            }
        }
        Ok((best, bound, Bytes(0)))
    }

    /// Predicts one batch.
    pub fn answer(&self, batch: u32, cost: &dyn CostModel) -> Result<Answer, LowerError> {
        let program = self.program(batch)?;
        let timeline = predict(cost, &program);
        let footprint = self.placement.footprint(&program);
        let metrics = Metrics::of(&program, &timeline);
        let over = self.over(&footprint).or_else(|| self.beyond_engine(batch));
        Ok(Answer { batch, over, footprint, metrics, timeline, program })
    }
}

/// What the simulator says about one configuration.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Sequences.
    pub batch: u32,
    /// Memory.
    pub footprint: Footprint,
    /// The limit it breaks, if any.
    pub over: Option<Over>,
    /// Times and rates.
    pub metrics: Metrics,
    /// Op by op.
    pub timeline: Timeline,
    /// The program.
    pub program: Program,
}
