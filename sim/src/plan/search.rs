//! The search: placements x policies x schedules, each at the largest batch that fits and meets the latencies.

use serde::Serialize;

use super::{Answer, Bound, Case, Slo};
use crate::cost::CostModel;
use crate::load::{Hit, Schedule};
use crate::lower::LowerError;
use crate::op::Phase;
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
    /// Generated tokens.
    pub osl: Tokens,
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

    /// Where most of the time goes, with its share; `host` is the time of steps that no op accounts for.
    #[must_use]
    pub fn mostly(&self) -> Option<(Phase, &'static str, f64)> {
        let timeline = &self.answer.as_ref()?.timeline;
        let ops = timeline.by_family().into_iter();
        let ops = ops.map(|((phase, family), (time, _))| (phase, family.name(), time.0));
        let host = [Phase::Prefill, Phase::Decode]
            .map(|phase| (phase, "host", timeline.overhead[phase as usize].0));
        let (phase, name, time) = ops.chain(host).max_by(|a, b| a.2.total_cmp(&b.2))?;
        let total = timeline.total().0;
        (total > 0.0).then(|| (phase, name, time / total))
    }
}

/// Candidates, the best first; those that do not fit last.
pub fn plan(query: &Query<'_>) -> Result<Vec<Candidate>, LowerError> {
    let mut candidates = Vec::new();
    for host in 0..query.hosts.len() {
        for preset in query.policies {
            for &schedule in query.schedules {
                search(query, host, preset, schedule, &mut candidates)?;
            }
        }
    }
    let value = |c: &Candidate| c.value(query.objective);
    candidates.sort_by(|a, b| value(b).total_cmp(&value(a)));
    Ok(candidates)
}

fn search(
    query: &Query<'_>,
    index: usize,
    preset: &Preset,
    schedule: Schedule,
    candidates: &mut Vec<Candidate>,
) -> Result<(), LowerError> {
    let host = &query.hosts[index];
    let cost = host.cost.as_ref();
    let case = Case {
        placement: &host.placement,
        policy: preset.policy.as_ref(),
        isl: query.isl,
        osl: query.osl,
        hit: query.hit,
        schedule,
    };
    let devices = host.placement.devices();
    let replicas = (query.gpus / devices).max(1);
    let gpus = devices.saturating_mul(replicas);
    let row = |answer, bound, missing| Candidate {
        host: index,
        replicas,
        gpus,
        usd_per_hour: host.usd_per_hour.map(|usd| usd * f64::from(gpus)),
        preset: preset.name.clone(),
        policy: case.policy.label(),
        compresses: case.policy.compresses(),
        schedule,
        answer,
        bound,
        missing,
    };
    let (answer, bound, missing) = case.best(cost, query.slo, query.batch)?;
    let best = answer.as_ref().map_or(0, |a| a.batch);
    candidates.push(row(answer, bound, missing));
    if query.smaller && query.batch.is_none() {
        let mut batch = 1;
        while batch < best {
            let answer = case.answer(batch, cost)?;
            if query.slo.missed(&answer.metrics).is_none() {
                candidates.push(row(Some(answer), Bound::Batch, Bytes(0)));
            }
            batch *= 2;
        }
    }
    Ok(())
}
