//! Which policy wins, over context and memory: the planner's search at every cell.

use anyhow::Result;
use batchmax_sim::units::{Bytes, Tokens};

use crate::cli::PlanArgs;
use crate::commands::plan::{Plan, Question, WORTH};

/// Shortest context of the map.
const SHORTEST: Tokens = 512;
/// Memories of the map, as parts of 8 of the device's: from an eighth to four times.
const EIGHTHS: [u64; 11] = [32, 24, 16, 12, 8, 6, 5, 4, 3, 2, 1];

/// Who wins in a cell.
#[derive(Clone, Debug, PartialEq)]
pub struct Winner {
    /// The policy without its parameters.
    pub kind: String,
    pub preset: String,
    pub batch: u32,
    /// Output tokens per second of one copy.
    pub rate: f64,
    /// As a multiple of the best without compression; `None` where that does not fit.
    pub gain: Option<f64>,
    /// Whether it is worth compressing.
    pub pays: bool,
}

/// One context.
#[derive(Clone, Debug)]
pub struct Column {
    /// Index among [`Axes::contexts`].
    pub index: usize,
    /// By memory, in the order of [`Axes::memories`]; `None`: nothing fits.
    pub cells: Vec<Option<Winner>>,
}

/// What is varied.
#[derive(Clone, Debug, PartialEq)]
pub struct Axes {
    pub contexts: Vec<Tokens>,
    /// The largest first.
    pub memories: Vec<Bytes>,
    /// Whether that is memory of the caches alone.
    pub caches: bool,
    /// The cell of the query itself.
    pub own: (usize, usize),
    pub gpu: String,
}

impl Axes {
    /// Around a question, on the place of its best candidate.
    pub fn of(question: &Question<'_>, plan: &Plan) -> Option<Self> {
        let host = plan.hosts.get(plan.candidates.first()?.host)?;
        let longest = question.model.context.saturating_sub(question.osl).max(1);
        let mut contexts = Vec::new();
        let mut at = SHORTEST;
        while at < longest && contexts.len() < 24 {
            contexts.push(at);
            contexts.extend(Some(at / 2 * 3).filter(|c| *c < longest));
            at = at.saturating_mul(2);
        }
        contexts.push(longest);
        contexts.push(question.isl);
        contexts.retain(|c| question.hit.of(*c) < *c);
        contexts.sort_unstable();
        contexts.dedup();
        let limits = &host.placement.limits;
        let unit = limits.kv_memory.unwrap_or(limits.memory);
        let memories: Vec<Bytes> = EIGHTHS.iter().map(|e| Bytes(unit.0 / 8 * e)).collect();
        let column = contexts.iter().position(|c| *c == question.isl)?;
        let row = EIGHTHS.iter().position(|e| *e == 8)?;
        let gpu = host.placement.gpu.name.clone();
        let caches = limits.kv_memory.is_some();
        Some(Self { contexts, memories, caches, own: (column, row), gpu })
    }

    /// Columns from the coarse to the fine, the query's own first.
    pub fn order(&self) -> Vec<usize> {
        let mut order = vec![self.own.0];
        let mut step = self.contexts.len().next_power_of_two();
        while step > 0 {
            for i in (0..self.contexts.len()).step_by(step) {
                if !order.contains(&i) {
                    order.push(i);
                }
            }
            step /= 2;
        }
        order
    }
}

/// The winners of one context: what `plan` would say with that prompt and that memory.
pub fn column(asked: &Question<'_>, plan: &Plan, axes: &Axes, index: usize) -> Result<Column> {
    let none = Column { index, cells: vec![None; axes.memories.len()] };
    let args = PlanArgs { isl: axes.contexts[index].to_string(), ..asked.args.clone() };
    // Where no policy can read such a prompt, nothing wins.
    let Ok(question) = Question::new(asked.places, &args) else { return Ok(none) };
    let Some(host) = plan.candidates.first().map(|c| plan.host(c)) else { return Ok(none) };
    let mut placements = Vec::new();
    for memory in &axes.memories {
        let mut placement = host.placement.clone();
        match axes.caches {
            true => placement.limits.kv_memory = Some(*memory),
            false => placement.limits.memory = *memory,
        }
        placements.push(placement);
    }
    let mut best: Vec<Option<Winner>> = none.cells;
    let mut plain = vec![0.0f64; placements.len()];
    for preset in &question.policies {
        for &schedule in &question.schedules {
            let policy = preset.policy.as_ref();
            let at = |placement| question.case(placement, policy, schedule);
            let mut programs = at(&placements[0]).lowered()?;
            for (row, placement) in placements.iter().enumerate() {
                let cost = host.cost.as_ref();
                let (answer, ..) =
                    at(placement).best_of(&mut programs, cost, question.slo, question.batch)?;
                let Some(answer) = answer else { continue };
                let rate = answer.metrics.output_tokens_per_s;
                if !policy.compresses() {
                    plain[row] = plain[row].max(rate);
                }
                if best[row].as_ref().is_none_or(|b| rate > b.rate) {
                    let name = preset.name.split(':').next().unwrap_or_default().to_owned();
                    best[row] = Some(Winner {
                        kind: name,
                        preset: preset.name.clone(),
                        batch: answer.batch,
                        rate,
                        gain: None,
                        pays: policy.compresses(),
                    });
                }
            }
        }
    }
    for (winner, plain) in best.iter_mut().zip(plain) {
        if let Some(winner) = winner.as_mut().filter(|_| plain > 0.0) {
            let gain = winner.rate / plain;
            winner.gain = Some(gain);
            winner.pays &= gain >= WORTH;
        }
    }
    Ok(Column { index, cells: best })
}
