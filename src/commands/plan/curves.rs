//! Throughput against batch, and where each policy runs out of memory.

use anyhow::Result;
use batchmax_sim::plan::{Bound, Candidate};

use super::{Plan, Question};

/// Throughput of a policy by batch, up to the largest that fits.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    pub preset: String,
    /// (batch, output tokens per second of all copies).
    pub points: Vec<(u32, f64)>,
    /// What stops the next sequence.
    pub bound: Bound,
}

/// Curves of the selected candidate, of no compression, and of the best others.
pub fn curves(question: &Question<'_>, plan: &Plan, selected: usize) -> Result<Vec<Curve>> {
    const MOST: usize = 5;
    let kind = |c: &Candidate| c.preset.split(':').next().unwrap_or_default().to_owned();
    let fits = |c: &&Candidate| c.answer.is_some();
    let plain = plan.candidates.iter().filter(fits).find(|c| !c.compresses);
    let mut chosen: Vec<&Candidate> = Vec::new();
    let ranked = plan.candidates.iter().filter(fits);
    for c in plan.candidates.get(selected).into_iter().filter(fits).chain(plain).chain(ranked) {
        if chosen.len() < MOST && chosen.iter().all(|other| kind(other) != kind(c)) {
            chosen.push(c);
        }
    }
    chosen.into_iter().map(|c| curve(question, plan, c)).collect()
}

fn curve(question: &Question<'_>, plan: &Plan, c: &Candidate) -> Result<Curve> {
    let host = plan.host(c);
    let preset = question.preset(&c.preset)?;
    let case = question.case(&host.placement, preset.policy.as_ref(), c.schedule);
    let mut programs = case.lowered()?;
    let largest = c.answer.as_ref().map_or(0, |a| a.batch);
    let mut points = Vec::new();
    let mut batch = 1;
    while batch < largest {
        let (answer, _) = case.answer_of(programs.at(batch)?, host.cost.as_ref());
        points.push((batch, answer.metrics.output_tokens_per_s * f64::from(c.replicas)));
        batch *= 2;
    }
    points.extend(c.answer.as_ref().map(|a| (a.batch, c.throughput())));
    Ok(Curve { preset: c.preset.clone(), points, bound: c.bound })
}
