//! What follows from a ranking: whether compression pays, what one change would buy, from where on it pays.

use anyhow::Result;
use batchmax_sim::load::Hit;
use batchmax_sim::op::DType;
use batchmax_sim::place::Placement;
use batchmax_sim::plan::{Candidate, Case, Crossing, Host, crossing};
use batchmax_sim::policy::{Policy, Preset};
use batchmax_sim::units::{Bytes, Tokens};

use super::question::Question;
use super::{Plan, WORTH};
use crate::setting::UNCOMPRESSED;

/// Memory that one change adds.
const MORE: Bytes = Bytes(16_000_000_000);
/// Shortest context that is tried.
const SHORTEST: Tokens = 32;
/// Largest memory that is tried, as a multiple of the device's.
const MOST_MEMORY: u64 = 8;
/// Parts of the device's memory in which it is varied.
const UNITS: u64 = 256;

/// What one change would make of the recommended candidate.
pub struct Change {
    /// `+16 GB`.
    pub what: String,
    /// The best candidate then.
    pub candidate: Candidate,
    /// Its value as a multiple of the recommended one's.
    pub gain: f64,
}

/// Where compression pays.
pub struct Crossings {
    /// The policy that is compared with no compression.
    pub policy: String,
    pub gpu: String,
    pub context: Crossing,
    /// Shortest and longest context tried.
    pub contexts: (u64, u64),
    /// At equal batches.
    pub batch: Option<Crossing>,
    /// Largest batch of `full`.
    pub largest: u32,
    pub memory: Crossing,
    /// Least and most memory tried.
    pub memories: (u64, u64),
    /// Whether that is memory of the caches alone.
    pub caches: bool,
}

/// What follows.
#[derive(Default)]
pub struct Advice {
    /// Index of the candidate to take.
    pub recommended: Option<usize>,
    /// Value of the best compressing candidate as a multiple of the best uncompressed one's.
    pub gain: Option<f64>,
    /// Whether no uncompressed candidate fits though a compressing one does.
    pub only_compressed: bool,
    pub changes: Vec<Change>,
    pub crossings: Option<Crossings>,
}

impl Advice {
    /// Of a plan.
    pub fn of(question: &Question<'_>, plan: &Plan) -> Result<Self> {
        let fitting = |compresses: bool| {
            let mut list = plan.candidates.iter().enumerate();
            list.find(|(_, c)| c.answer.is_some() && c.compresses == compresses)
        };
        let (plain, compressed) = (fitting(false), fitting(true));
        let value = |c: &Candidate| c.value(question.objective);
        // Without a candidate to compare with, it is planned on the side.
        let base = match plain {
            Some((_, c)) => Some(value(c)),
            None if plan.candidates.iter().any(|c| !c.compresses) => None,
            None => beside(question, question.preset(UNCOMPRESSED)?)?.map(|c| value(&c)),
        };
        let gain = compressed.zip(base).map(|((_, c), base)| value(c) / base);
        let recommended = match (plain, compressed) {
            (Some((index, _)), Some(_)) if gain.is_some_and(|g| g < WORTH) => Some(index),
            (plain, compressed) => compressed.or(plain).map(|(index, _)| index),
        };
        let Some(index) = recommended else { return Ok(Self::default()) };
        let best = &plan.candidates[index];
        Ok(Self {
            recommended,
            gain,
            only_compressed: compressed.is_some() && base.is_none(),
            changes: changes(question, plan, best)?,
            crossings: match compressed {
                Some((_, c)) if !question.args.pareto => Some(crossings(question, plan, c)?),
                _ => None,
            },
        })
    }
}

fn beside(question: &Question<'_>, preset: Preset) -> Result<Option<Candidate>> {
    let mut other = question.clone();
    other.policies = vec![preset];
    // An engine that can't run it has nothing to compare with.
    let Ok(plan) = other.plan() else { return Ok(None) };
    Ok(plan.candidates.into_iter().next().filter(|c| c.answer.is_some()))
}

fn changes(question: &Question<'_>, plan: &Plan, best: &Candidate) -> Result<Vec<Change>> {
    let placement = &plan.host(best).placement;
    let kv = placement.setup.kv.dtype;
    let mut same = question.about(question.preset(&best.preset)?, &placement.gpu.name, kv);
    same.tps = vec![placement.setup.tp];
    let mut tried: Vec<(String, Question<'_>)> = Vec::new();
    match placement.limits.kv_memory {
        Some(caches) => {
            let what = format!("{} for the caches", caches + caches);
            tried.push((what, Question { extra: caches, ..same.clone() }));
        }
        None => {
            let what = format!("+{} GB", MORE.0 / 1_000_000_000);
            tried.push((what, Question { extra: MORE, ..same.clone() }));
        }
    }
    if placement.engine.is_some() {
        if kv.bits() > 8 {
            tried.push(("fp8 KV".into(), Question { kvs: vec![Some(DType::Fp8)], ..same.clone() }));
        }
        if placement.setup.weights.bits() > 8 {
            let weights = Some(DType::Fp8);
            tried.push(("fp8 weights".into(), Question { weights, ..same.clone() }));
        }
    }
    if let Some(half) = half_budget(&best.policy) {
        let also = if best.preset.contains(':') { ',' } else { ':' };
        let preset = question.preset(&format!("{}{also}budget={half}", best.preset))?;
        if question.too_lossy(&preset).is_none() {
            let policies = vec![preset];
            tried.push(("budget halved".into(), Question { policies, ..same.clone() }));
        }
    }
    if placement.engine.is_some() {
        let mut more = Question { count: question.count + 1, ..same.clone() };
        more.search_tp();
        tried.push(("one more GPU".into(), more));
    }
    let before = best.value(question.objective);
    let mut found = Vec::new();
    for (what, changed) in tried {
        // A change that can't be made (a type the engine lacks, a budget too small) is none.
        let Ok(plan) = changed.plan() else { continue };
        let first = plan.candidates.into_iter().next().filter(|c| c.answer.is_some());
        if let Some(candidate) = first {
            let gain = candidate.value(question.objective) / before;
            found.push(Change { what, candidate, gain });
        }
    }
    Ok(found)
}

/// Half of the budget that stands in a policy's label.
fn half_budget(label: &str) -> Option<String> {
    let (_, rest) = label.split_once("budget=")?;
    let budget = rest.split(',').next()?;
    match budget.strip_suffix('%') {
        Some(share) => Some(format!("{}%", share.parse::<f64>().ok()? / 2.0)),
        None => Some((budget.parse::<u32>().ok()? / 2).to_string()),
    }
}

fn crossings(question: &Question<'_>, plan: &Plan, best: &Candidate) -> Result<Crossings> {
    let host = plan.host(best);
    let compressed = question.preset(&best.preset)?;
    let full = question.preset(UNCOMPRESSED)?;
    let pays = |placement: &Placement, isl: Tokens, batch: Option<u32>| -> Result<bool> {
        let rate =
            |preset: &Preset| rate(question, host, placement, preset.policy.as_ref(), isl, batch);
        // No compression that pays nothing at all is beaten by whatever runs.
        Ok(match (rate(&compressed), rate(&full)) {
            (Some(with), Some(without)) => with >= WORTH * without,
            (Some(_), None) => true,
            (None, _) => false,
        })
    };
    let placement = &host.placement;
    let longest = question.model.context.saturating_sub(question.osl).max(1);
    // A prompt is longer than its cached part.
    let shortest = match question.hit {
        Hit::Tokens(hit) => SHORTEST.max(hit.saturating_add(1)),
        Hit::Share(_) => SHORTEST,
    };
    let from = shortest.min(longest);
    let context = crossing(from.into(), longest.into(), |isl| {
        pays(placement, isl as Tokens, question.batch)
    })?;
    let case = |preset: &'_ Preset| -> Result<u32> {
        let mut largest = 0;
        for &schedule in &question.schedules {
            let case = question.case(placement, preset.policy.as_ref(), schedule);
            let (answer, ..) = case.best(host.cost.as_ref(), question.slo, None)?;
            largest = largest.max(answer.map_or(0, |a| a.batch));
        }
        Ok(largest)
    };
    let largest = case(&full)?;
    let batch = if largest == 0 {
        None
    } else {
        let at = |batch: u64| pays(placement, question.isl, Some(batch as u32));
        Some(crossing(1, largest.into(), at)?)
    };
    // Where the caches have a limit of their own, that is the memory that is tried.
    let caches = placement.limits.kv_memory;
    let unit = (caches.unwrap_or(placement.limits.memory).0 / UNITS).max(1);
    let mut other = placement.clone();
    let memory = crossing(1, MOST_MEMORY * UNITS, |units| {
        let tried = Bytes(units * unit);
        match caches {
            Some(_) => other.limits.kv_memory = Some(tried),
            None => other.limits.memory = tried,
        }
        pays(&other, question.isl, question.batch)
    })?;
    let scaled = |units: u64| units * unit;
    Ok(Crossings {
        policy: best.preset.clone(),
        gpu: placement.gpu.name.clone(),
        context,
        contexts: (from.into(), longest.into()),
        batch,
        largest,
        memory: match memory {
            Crossing::From(at) => Crossing::From(scaled(at)),
            Crossing::UpTo(at) => Crossing::UpTo(scaled(at)),
            Crossing::Between(low, high) => Crossing::Between(scaled(low), scaled(high)),
            other => other,
        },
        memories: (scaled(1), scaled(MOST_MEMORY * UNITS)),
        caches: caches.is_some(),
    })
}

/// Output tokens per second of a policy under its best schedule; `None` where it can't run.
fn rate(
    question: &Question<'_>,
    host: &Host,
    placement: &Placement,
    policy: &dyn Policy,
    isl: Tokens,
    batch: Option<u32>,
) -> Option<f64> {
    let rates = question.schedules.iter().filter_map(|&schedule| {
        let case = Case { isl, ..question.case(placement, policy, schedule) };
        let (answer, ..) = case.best(host.cost.as_ref(), question.slo, batch).ok()?;
        Some(answer?.metrics.output_tokens_per_s)
    });
    rates.max_by(f64::total_cmp)
}

#[cfg(test)]
mod tests {
    use super::half_budget;

    #[test]
    fn half_of_a_budget() {
        let half = |label: &str| half_budget(label).unwrap_or_default();
        assert_eq!(half("snapkv:budget=25%,window=32"), "12.5%");
        assert_eq!(half("batch-max:budget=512,chunk=256"), "256");
        assert_eq!(half("mine:chunk=1,budget=100"), "50");
        assert_eq!(half_budget("full"), None);
    }
}
