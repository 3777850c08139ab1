//! Which batch, policy, schedule and placement give the most in the memory there is.
//!
//! Pure: same query, same answer. The largest batch that fits is exact (bisection over a footprint that grows with the
//! batch).

mod crossing;
mod front;
mod largest;
mod lowered;
mod search;

use serde::Serialize;

pub use crossing::{Crossing, crossing};
pub use front::{Marks, marks};
pub use search::{Candidate, Host, Objective, Query, plan};

pub use largest::largest;
pub use lowered::Lowered;

use crate::cost::{CostModel, predict};
use crate::load::{Hit, Load, Schedule, Spread};
use crate::lower::{LowerError, lower, lower_prefix};
use crate::memory::Footprint;
use crate::metrics::Metrics;
use crate::op::Phase;
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
    /// Generated tokens, the mean.
    pub osl: Tokens,
    /// How far answers lie apart.
    pub spread: Spread,
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
    /// The policy refuses what a device holds of the model.
    Refused,
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
            Self::Refused => "refused",
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

impl<'a> Case<'a> {
    /// The program at a batch.
    pub fn program(&self, batch: u32) -> Result<Program, LowerError> {
        lower(&self.placement.model, self.policy, &self.load(batch), self.placement.setup)
    }

    /// What reads the cached prefixes at a batch, where there are any.
    #[must_use]
    pub fn prefix(&self, batch: u32) -> Option<Program> {
        lower_prefix(&self.placement.model, self.policy, &self.load(batch), self.placement.setup)
    }

    pub(crate) fn load(&self, batch: u32) -> Load {
        let load = Load::uniform(batch, self.isl, self.osl, self.schedule);
        load.with_hit(self.hit).with_spread(self.spread)
    }

    /// Whether a footprint stays within the limits.
    #[must_use]
    pub fn over(&self, footprint: &Footprint) -> Option<Over> {
        let limits = &self.placement.limits;
        if let Some(kv) = limits.kv_memory {
            let peak = footprint.kv_most();
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

    /// Its programs, for all batches.
    ///
    /// # Errors
    /// Where there is none.
    pub fn lowered(&self) -> Result<Lowered<'a>, LowerError> {
        Lowered::new(*self)
    }

    fn footprint(&self, programs: &mut Lowered<'_>, batch: u32) -> Result<Footprint, LowerError> {
        Ok(self.placement.footprint(programs.at(batch)?))
    }

    /// The largest batch that fits and what stops the next one; 0 where not even one sequence fits.
    ///
    /// # Errors
    /// Where there is no program.
    pub fn largest_batch(&self, most: u32) -> Result<(u32, Over), LowerError> {
        self.largest_of(&mut self.lowered()?, most)
    }

    fn largest_of(&self, programs: &mut Lowered<'_>, most: u32) -> Result<(u32, Over), LowerError> {
        let guess = self.guess(programs, most)?;
        let why_not = |batch| -> Result<Option<Over>, LowerError> {
            let over = self.over(&self.footprint(programs, batch)?);
            Ok(over.or_else(|| self.beyond_engine(batch)))
        };
        let (largest, over) = largest(most, guess, why_not)?;
        Ok((largest, over.unwrap_or(Over { bound: Bound::Batch, by: Bytes(0) })))
    }

    /// Where to look for the largest batch: footprints of one and of two sequences, extended. Only a place to begin at, what
    /// is found there is replayed; `None` where last groups that are smaller than the others make the footprint uneven.
    fn guess(&self, programs: &mut Lowered<'_>, most: u32) -> Result<Option<u32>, LowerError> {
        if matches!(self.schedule, Schedule::Staggered { prefill_batch: 2.. }) || most < 2 {
            return Ok(None);
        }
        let (one, two) = (self.footprint(programs, 1)?, self.footprint(programs, 2)?);
        let more = |limit: Bytes, of: fn(&Footprint) -> Bytes| {
            let each = of(&two).saturating_sub(of(&one)).0.max(1);
            limit.saturating_sub(of(&one)).0 / each
        };
        let limits = &self.placement.limits;
        let caches = limits.kv_memory.map_or(u64::MAX, |kv| more(kv, Footprint::kv_most));
        let fit = more(limits.memory, Footprint::most).min(caches).saturating_add(1);
        let most = most.min(self.most_sequences()).max(1);
        Ok(Some(u32::try_from(fit).unwrap_or(u32::MAX).min(most)))
    }

    /// The largest batch that fits and meets the latencies (or `batch`, if it does), what stops a larger one, and the
    /// bytes that are missing.
    ///
    /// # Errors
    /// Where there is no program.
    pub fn best(
        &self,
        cost: &dyn CostModel,
        slo: Slo,
        batch: Option<u32>,
    ) -> Result<(Option<Answer>, Bound, Bytes), LowerError> {
        self.best_of(&mut self.lowered()?, cost, slo, batch)
    }

    /// The same over programs that are lowered ([`Self::lowered`]): they don't depend on limits and devices.
    ///
    /// # Errors
    /// Where a batch is larger than an index can count.
    pub fn best_of(
        &self,
        programs: &mut Lowered<'_>,
        cost: &dyn CostModel,
        slo: Slo,
        batch: Option<u32>,
    ) -> Result<(Option<Answer>, Bound, Bytes), LowerError> {
        let (largest, over) = self.largest_of(programs, batch.unwrap_or(LARGEST_BATCH))?;
        if largest == 0 {
            return Ok((None, Bound::NothingFits, over.by));
        }
        if batch.is_some_and(|batch| batch > largest) {
            return Ok((None, over.bound, over.by));
        }
        let answer = self.answer_of(programs.at(largest)?, cost).0;
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
            let trial = self.answer_of(programs.at(middle)?, cost).0;
            match slo.missed(&trial.metrics) {
                None => (good, best) = (middle, Some(trial)),
                Some(why) => (bad, bound) = (middle, why),
            }
        }
        Ok((best, bound, Bytes(0)))
    }

    /// Predicts one batch.
    ///
    /// # Errors
    /// Where there is no program.
    pub fn answer(&self, batch: u32, cost: &dyn CostModel) -> Result<Answer, LowerError> {
        Ok(self.answer_of(&self.program(batch)?, cost).0)
    }

    /// Predicts a program of this case, with its time op by op.
    #[must_use]
    pub fn answer_of(&self, program: &Program, cost: &dyn CostModel) -> (Answer, Timeline) {
        let timeline = predict(cost, program);
        let footprint = self.placement.footprint(program);
        let batch = program.header.load.batch() as u32;
        let answer = Answer {
            batch,
            policy: program.header.policy.clone(),
            schedule: program.header.load.schedule,
            over: self.over(&footprint).or_else(|| self.beyond_engine(batch)),
            footprint,
            metrics: Metrics::of(program, &timeline),
            mostly: timeline.mostly(),
        };
        (answer, timeline)
    }
}

/// What the simulator says about one configuration.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Sequences.
    pub batch: u32,
    /// The policy with its parameters.
    pub policy: String,
    /// Who runs when.
    pub schedule: Schedule,
    /// Memory.
    pub footprint: Footprint,
    /// The limit it breaks, if any.
    pub over: Option<Over>,
    /// Times and rates.
    pub metrics: Metrics,
    /// Where most of the time goes, with its share.
    pub mostly: Option<(Phase, &'static str, f64)>,
}
