//! Which batch, policy and schedule give the most tokens per second in the memory there is.
//!
//! Pure: same query, same answer. The largest batch that fits is exact (bisection over a footprint that grows with the
//! batch).

use serde::Serialize;

use crate::cost::{CostModel, predict};
use crate::load::{Load, Schedule};
use crate::lower::{LowerError, Setup, lower};
use crate::memory::{Footprint, footprint};
use crate::metrics::Metrics;
use crate::policy::{Policy, Preset};
use crate::profile::Model;
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

/// One configuration.
#[derive(Clone, Copy)]
pub struct Case<'a> {
    /// The model.
    pub model: &'a Model,
    /// The policy.
    pub policy: &'a dyn Policy,
    /// Engine types and layout.
    pub setup: Setup,
    /// Prompt tokens.
    pub isl: Tokens,
    /// Generated tokens.
    pub osl: Tokens,
    /// Who runs when.
    pub schedule: Schedule,
    /// Memory.
    pub limits: Limits,
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

/// No batch above this is searched: an index must count the sequences, and nobody serves more from one device.
pub const LARGEST_BATCH: u32 = 1 << 16;

impl Case<'_> {
    /// The program at a batch.
    pub fn program(&self, batch: u32) -> Result<Program, LowerError> {
        let load = Load::uniform(batch, self.isl, self.osl, self.schedule);
        lower(self.model, self.policy, &load, self.setup)
    }

    /// Whether a footprint stays within the limits.
    #[must_use]
    pub fn over(&self, footprint: &Footprint) -> Option<Over> {
        let limits = &self.limits;
        if let Some(kv) = limits.kv_memory {
            let peak = footprint.kv_peak();
            if peak > kv {
                let bound = if footprint.kv_prefill_peak >= footprint.kv_decode_peak {
                    Bound::KvPrefill
                } else {
                    Bound::KvDecode
                };
                return Some(Over { bound, by: peak.saturating_sub(kv) });
            }
        }
        let total = footprint.total();
        (total > limits.memory)
            .then(|| Over { bound: Bound::Memory, by: total.saturating_sub(limits.memory) })
    }

    fn fits(&self, batch: u32) -> Result<Option<Over>, LowerError> {
        let program = self.program(batch)?;
        Ok(self.over(&footprint(self.model, &program, self.limits.runtime)))
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

    /// Predicts one batch.
    pub fn answer(&self, batch: u32, cost: &dyn CostModel) -> Result<Answer, LowerError> {
        let program = self.program(batch)?;
        let timeline = predict(cost, &program);
        let footprint = footprint(self.model, &program, self.limits.runtime);
        let metrics = Metrics::of(&program, &timeline);
        Ok(Answer { batch, over: self.over(&footprint), footprint, metrics, timeline, program })
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

/// What a plan searches.
pub struct Query<'a> {
    /// The model.
    pub model: &'a Model,
    /// How long ops take on the device.
    pub cost: &'a dyn CostModel,
    /// Engine types and layout.
    pub setup: Setup,
    /// Prompt tokens.
    pub isl: Tokens,
    /// Generated tokens.
    pub osl: Tokens,
    /// Memory.
    pub limits: Limits,
    /// Latencies.
    pub slo: Slo,
    /// Policies to try.
    pub policies: &'a [Preset],
    /// Schedules to try.
    pub schedules: &'a [Schedule],
    /// The batch, or the largest that fits.
    pub batch: Option<u32>,
}

/// One row of a plan.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The preset.
    pub preset: String,
    /// The policy with its parameters.
    pub policy: String,
    /// The schedule.
    pub schedule: Schedule,
    /// Prediction at the best batch; `None` where nothing fits.
    pub answer: Option<Answer>,
    /// What stops a larger batch, or any.
    pub bound: Bound,
    /// Bytes missing for the next sequence (or for the first).
    pub missing: Bytes,
}

impl Candidate {
    /// Output tokens per second, 0 where nothing fits.
    #[must_use]
    pub fn throughput(&self) -> f64 {
        self.answer.as_ref().map_or(0.0, |a| a.metrics.output_tokens_per_s)
    }
}

/// Candidates, the fastest first; those that do not fit last.
pub fn plan(query: &Query<'_>) -> Result<Vec<Candidate>, LowerError> {
    let mut candidates = Vec::new();
    for preset in query.policies {
        for &schedule in query.schedules {
            candidates.push(candidate(query, preset, schedule)?);
        }
    }
    candidates.sort_by(|a, b| b.throughput().total_cmp(&a.throughput()));
    Ok(candidates)
}

fn candidate(
    query: &Query<'_>,
    preset: &Preset,
    schedule: Schedule,
) -> Result<Candidate, LowerError> {
    let case = Case {
        model: query.model,
        policy: preset.policy.as_ref(),
        setup: query.setup,
        isl: query.isl,
        osl: query.osl,
        schedule,
        limits: query.limits,
    };
    let row = |answer, bound, missing| Candidate {
        preset: preset.name.clone(),
        policy: case.policy.label(),
        schedule,
        answer,
        bound,
        missing,
    };
    let (largest, over) = case.largest_batch(query.batch.unwrap_or(LARGEST_BATCH))?;
    if largest == 0 || query.batch.is_some_and(|batch| batch > largest) {
        let bound = if largest == 0 { Bound::NothingFits } else { over.bound };
        return Ok(row(None, bound, over.by));
    }
    let misses = |answer: &Answer| {
        let metrics = &answer.metrics;
        if query.slo.ttft.is_some_and(|limit| metrics.ttft > limit) {
            Some(Bound::Ttft)
        } else if query.slo.tpot.is_some_and(|limit| metrics.tpot > limit) {
            Some(Bound::Tpot)
        } else {
            None
        }
    };
    let answer = case.answer(largest, query.cost)?;
    let Some(mut bound) = misses(&answer) else {
        return Ok(row(Some(answer), over.bound, over.by));
    };
    if query.batch.is_some() {
        return Ok(row(None, bound, Bytes(0)));
    }
    // Latencies grow with the batch: bisect the largest that meets them.
    let (mut best, mut good, mut bad) = (None, 0u32, largest);
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        let trial = case.answer(middle, query.cost)?;
        match misses(&trial) {
            None => (good, best) = (middle, Some(trial)),
            Some(why) => (bad, bound) = (middle, why),
        }
    }
    Ok(row(best, bound, Bytes(0)))
}
