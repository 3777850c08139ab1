//! The search: placements x policies x schedules, each at the largest batch that fits and meets the latencies.

use serde::Serialize;

use super::{Answer, Bound, Case, Lowered, Slo};
use crate::cost::CostModel;
use crate::load::{Hit, Schedule, Spread};
use crate::lower::LowerError;
use crate::op::Phase;
use crate::parallel::in_order;
use crate::place::Placement;
use crate::policy::Preset;
use crate::units::{Bytes, Tokens};

/// A placement and how long its ops take.
pub struct Host {
    /// What each device holds.
    pub placement: Placement,
    /// How long ops take on it.
    pub cost: Box<dyn CostModel>,
    /// Rent of one device, USD per hour.
    pub usd_per_hour: Option<f64>,
}

/// What a plan makes the most of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// Generated tokens per second of all devices.
    #[default]
    Output,
    /// Generated tokens per second of each device.
    PerGpu,
    /// Money per generated token.
    Cost,
}

impl std::str::FromStr for Objective {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "output" => Ok(Self::Output),
            "per-gpu" => Ok(Self::PerGpu),
            "cost" => Ok(Self::Cost),
            _ => Err(format!("\"{text}\" is not an objective; known: output, per-gpu, cost")),
        }
    }
}

/// What a plan searches.
pub struct Query<'a> {
    /// Placements to try.
    pub hosts: &'a [Host],
    /// Devices there are: as many copies of a placement run as fit.
    pub gpus: u32,
    /// Prompt tokens.
    pub isl: Tokens,
    /// Generated tokens, the mean.
    pub osl: Tokens,
    /// How far answers lie apart.
    pub spread: Spread,
    /// How much of each prompt is cached.
    pub hit: Hit,
    /// Latencies.
    pub slo: Slo,
    /// Policies to try.
    pub policies: &'a [Preset],
    /// Schedules to try.
    pub schedules: &'a [Schedule],
    /// The batch, or the largest that fits.
    pub batch: Option<u32>,
    /// Candidates of smaller batches too (powers of two), for the front of rates against latencies.
    pub smaller: bool,
    /// What counts.
    pub objective: Objective,
    /// Threads to search with, over the hosts; the answer doesn't depend on it.
    pub threads: usize,
}

/// One row of a plan.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Index among the hosts of the query.
    pub host: usize,
    /// Copies of the placement.
    pub replicas: u32,
    /// Devices of all copies.
    pub gpus: u32,
    /// Rent of all devices, USD per hour.
    pub usd_per_hour: Option<f64>,
    /// The preset.
    pub preset: String,
    /// The policy with its parameters.
    pub policy: String,
    /// Whether the policy drops anything.
    pub compresses: bool,
    /// The schedule.
    pub schedule: Schedule,
    /// Prediction of one copy at the best batch; `None` where nothing fits.
    pub answer: Option<Answer>,
    /// What stops a larger batch, or any.
    pub bound: Bound,
    /// Bytes missing for the next sequence (or for the first).
    pub missing: Bytes,
}

impl Candidate {
    /// Output tokens per second of all copies, 0 where nothing fits.
    #[must_use]
    pub fn throughput(&self) -> f64 {
        let one = self.answer.as_ref().map_or(0.0, |a| a.metrics.output_tokens_per_s);
        one * f64::from(self.replicas)
    }

    /// Output tokens per second of each device.
    #[must_use]
    pub fn per_gpu(&self) -> f64 {
        self.throughput() / f64::from(self.gpus.max(1))
    }

    /// USD per million output tokens, where the devices have a price.
    #[must_use]
    pub fn usd_per_million(&self) -> Option<f64> {
        let rate = self.throughput();
        self.usd_per_hour.filter(|_| rate > 0.0).map(|usd| usd / (rate * 3600.0) * 1e6)
    }

    /// How good it is: more is better, 0 where nothing fits.
    #[must_use]
    pub fn value(&self, objective: Objective) -> f64 {
        match objective {
            Objective::Output => self.throughput(),
            Objective::PerGpu => self.per_gpu(),
            Objective::Cost => self.usd_per_million().map_or(0.0, f64::recip),
        }
    }
    /// Where most of the time goes, with its share.
    #[must_use]
    pub fn mostly(&self) -> Option<(Phase, &'static str, f64)> {
        self.answer.as_ref()?.mostly
    }
}

/// Candidates, the best first; those that do not fit last.
///
/// A policy that refuses the part of the model that a placement gives a device ([`Bound::Refused`]) runs on others.
///
/// # Errors
/// Where nothing can be lowered, or a load is one that nothing can serve.
pub fn plan(query: &Query<'_>) -> Result<Vec<Candidate>, LowerError> {
    let found = in_order(query.hosts.len(), query.threads, Programs::default, |programs, index| {
        search(query, index, programs)
    });
    let mut candidates = found?.concat();
    if !candidates.is_empty() && candidates.iter().all(|c| c.bound == Bound::Refused) {
        for index in 0..query.hosts.len() {
            cases(query, index).try_for_each(|(_, case)| case.lowered().map(|_| ()))?;
        }
    }
    let value = |c: &Candidate| c.value(query.objective);
    candidates.sort_by(|a, b| value(b).total_cmp(&value(a)));
    Ok(candidates)
}

/// What was lowered for hosts with the same part of the model in the same types: programs don't depend on the device.
#[derive(Default)]
struct Programs<'a> {
    kinds: Vec<(&'a Placement, Vec<Option<Lowered<'a>>>)>,
}

impl<'a> Programs<'a> {
    /// One for each policy and schedule, in their order; none where the policy refuses.
    fn of(
        &mut self,
        query: &Query<'a>,
        index: usize,
    ) -> Result<&mut [Option<Lowered<'a>>], LowerError> {
        let placement = &query.hosts[index].placement;
        let same =
            |(p, _): &(&Placement, _)| p.model == placement.model && p.setup == placement.setup;
        let kind = match self.kinds.iter().position(same) {
            Some(kind) => kind,
            None => {
                let lowered = cases(query, index).map(|(_, case)| match case.lowered() {
                    Ok(lowered) => Ok(Some(lowered)),
                    Err(LowerError::Policy(_)) => Ok(None),
                    Err(error) => Err(error),
                });
                self.kinds.push((placement, lowered.collect::<Result<_, _>>()?));
                self.kinds.len() - 1
            }
        };
        Ok(&mut self.kinds[kind].1)
    }
}

/// What is tried on a host: policies x schedules.
fn cases<'a>(query: &Query<'a>, index: usize) -> impl Iterator<Item = (&'a Preset, Case<'a>)> {
    let (isl, osl, spread, hit) = (query.isl, query.osl, query.spread, query.hit);
    let (placement, schedules) = (&query.hosts[index].placement, query.schedules);
    query.policies.iter().flat_map(move |preset| {
        schedules.iter().map(move |&schedule| {
            let policy = preset.policy.as_ref();
            (preset, Case { placement, policy, isl, osl, spread, hit, schedule })
        })
    })
}

fn search<'a>(
    query: &Query<'a>,
    index: usize,
    programs: &mut Programs<'a>,
) -> Result<Vec<Candidate>, LowerError> {
    let mut candidates = Vec::new();
    let host = &query.hosts[index];
    let cost = host.cost.as_ref();
    let devices = host.placement.devices();
    let replicas = (query.gpus / devices).max(1);
    let gpus = devices.saturating_mul(replicas);
    let programs = programs.of(query, index)?;
    for ((preset, case), programs) in cases(query, index).zip(programs) {
        let row = |answer, bound, missing| Candidate {
            host: index,
            replicas,
            gpus,
            usd_per_hour: host.usd_per_hour.map(|usd| usd * f64::from(gpus)),
            preset: preset.name.clone(),
            policy: case.policy.label(),
            compresses: case.policy.compresses(),
            schedule: case.schedule,
            answer,
            bound,
            missing,
        };
        let Some(programs) = programs else {
            candidates.push(row(None, Bound::Refused, Bytes(0)));
            continue;
        };
        let (answer, bound, missing) = case.best_of(programs, cost, query.slo, query.batch)?;
        let best = answer.as_ref().map_or(0, |a| a.batch);
        candidates.push(row(answer, bound, missing));
        if query.smaller && query.batch.is_none() {
            let mut batch = 1;
            while batch < best {
                let (answer, _) = case.answer_of(programs.at(batch)?, cost);
                if query.slo.missed(&answer.metrics).is_none() {
                    candidates.push(row(Some(answer), Bound::Batch, Bytes(0)));
                }
                batch *= 2;
            }
        }
    }
    Ok(candidates)
}
