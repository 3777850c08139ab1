//! What the screens show: answers of the planner, as data. Nothing here computes; everything is asked of `plan`.

use anyhow::Result;
use batchmax_sim::cost::{Cost, CostModel, Roofline, predict};
use batchmax_sim::op::{DType, Op, Phase};
use batchmax_sim::plan::{Answer, Candidate, Case, Marks, Objective, marks};
use batchmax_sim::profile::{Gpu, Quality};
use batchmax_sim::timeline::{Source, Timeline};
use batchmax_sim::units::{Bytes, Seconds};

use crate::commands::plan::{Plan, Question, show};

/// Where a candidate runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Host {
    pub gpu: String,
    pub engine: String,
    pub tp: u32,
    pub kv: DType,
    /// Memory of each device.
    pub memory: Bytes,
    /// Memory of the caches alone.
    pub kv_memory: Option<Bytes>,
}

/// A ranking.
#[derive(Clone, Debug)]
pub struct Found {
    /// All candidates, the best first.
    pub candidates: Vec<Candidate>,
    pub marks: Vec<Marks>,
    pub hosts: Vec<Host>,
    /// Those that a table shows: the best of each policy, schedule and place.
    pub shown: Vec<usize>,
    pub objective: Objective,
    /// Devices there are.
    pub gpus: u32,
    /// The query as a sentence.
    pub head: String,
}

impl Found {
    /// Of a plan.
    pub fn of(question: &Question<'_>, plan: &Plan) -> Self {
        let marks = marks(&plan.candidates, question.objective);
        let host = |h: &batchmax_sim::plan::Host| Host {
            gpu: h.placement.gpu.name.clone(),
            engine: h.placement.engine_name().to_owned(),
            tp: h.placement.setup.tp,
            kv: h.placement.setup.kv.dtype,
            memory: h.placement.limits.memory,
            kv_memory: h.placement.limits.kv_memory,
        };
        Self {
            shown: show::shown(question, plan, &marks),
            head: show::head(question, plan),
            marks,
            hosts: plan.hosts.iter().map(host).collect(),
            candidates: plan.candidates.clone(),
            objective: question.objective,
            gpus: question.count,
        }
    }

    /// Where a candidate runs.
    pub fn host(&self, candidate: &Candidate) -> &Host {
        &self.hosts[candidate.host]
    }
}

/// What follows from a ranking, in the words of `plan`.
#[derive(Clone, Debug, Default)]
pub struct Advised {
    pub recommended: Option<usize>,
    pub changes: Vec<Vec<String>>,
    pub pays: Vec<String>,
    pub verdict: Vec<String>,
}

/// Time of all ops of one name in one phase.
#[derive(Clone, Debug, PartialEq)]
pub struct OpRow {
    pub phase: Phase,
    pub name: &'static str,
    pub family: &'static str,
    pub launches: f64,
    pub time: Seconds,
    pub flops: f64,
    pub bytes: f64,
    /// The least time that the device's data sheet allows, and whether memory sets it.
    pub floor: Option<(Seconds, bool)>,
    pub source: Source,
}

/// A candidate op by op.
#[derive(Clone, Debug)]
pub struct Ops {
    pub title: String,
    pub answer: Answer,
    pub rows: Vec<OpRow>,
    /// Time of steps that no op accounts for: prefill, decode.
    pub overhead: [Seconds; 2],
    /// Peak FLOP/s and bytes/s of the device.
    pub peaks: (Option<f64>, f64),
    pub gpu: String,
}

/// What is counted of an op instead of its time.
enum Count<'a> {
    Flops,
    Bytes,
    Compute(&'a Gpu),
    Memory(&'a Gpu),
}

impl CostModel for Count<'_> {
    fn launch(&self, op: &Op, _phase: Phase, step: u32) -> Cost {
        let seconds = match self {
            Self::Flops => op.work(step).flops.0,
            Self::Bytes => op.work(step).bytes().0 as f64,
            Self::Compute(gpu) => Roofline::floor(gpu, op, step).0,
            Self::Memory(gpu) => Roofline::floor(gpu, op, step).1,
        };
        Cost { seconds, relative_stddev: 0.0, source: Source::Roofline }
    }

    fn step_overhead(&self, _phase: Phase) -> Seconds {
        Seconds(0.0)
    }

    fn transfers_run_beside(&self) -> bool {
        false
    }
}

/// The candidate at its batch, op by op.
pub fn ops(question: &Question<'_>, plan: &Plan, c: &Candidate) -> Result<Option<Ops>> {
    let Some(found) = &c.answer else { return Ok(None) };
    let host = plan.host(c);
    let preset = question.preset(&c.preset)?;
    let case: Case<'_> = question.case(&host.placement, preset.policy.as_ref(), c.schedule);
    let program = case.program(found.batch)?;
    let (answer, timeline) = case.answer_of(&program, host.cost.as_ref());
    let gpu = &host.placement.gpu;
    let count = |what: Count<'_>| predict(&what, &program);
    let counts = [
        count(Count::Flops),
        count(Count::Bytes),
        count(Count::Compute(gpu)),
        count(Count::Memory(gpu)),
    ];
    Ok(Some(Ops {
        title: format!("{} · batch {} · {} schedule", c.preset, answer.batch, c.schedule),
        rows: rows(&timeline, &counts),
        overhead: timeline.overhead,
        peaks: (
            gpu.peak_flops_per_s.of(host.placement.setup.activations),
            gpu.bandwidth_bytes_per_s,
        ),
        gpu: gpu.name.clone(),
        answer,
    }))
}

fn rows(timeline: &Timeline, counts: &[Timeline; 4]) -> Vec<OpRow> {
    let mut rows: Vec<OpRow> = Vec::new();
    let mut floors: Vec<(f64, f64)> = Vec::new();
    for (i, span) in timeline.spans.iter().enumerate() {
        let of = |what: usize| counts[what].spans.get(i).map_or(0.0, |s| s.time.0);
        let same = |r: &OpRow| r.phase == span.site.phase && r.name == span.site.name;
        let at = rows.iter().position(same).unwrap_or_else(|| {
            rows.push(OpRow {
                phase: span.site.phase,
                name: span.site.name,
                family: span.family.name(),
                launches: 0.0,
                time: Seconds(0.0),
                flops: 0.0,
                bytes: 0.0,
                floor: None,
                source: Source::Run,
            });
            floors.push((0.0, 0.0));
            rows.len() - 1
        });
        let row = &mut rows[at];
        row.launches += span.launches;
        row.time += span.time;
        row.flops += of(0);
        row.bytes += of(1);
        row.source = row.source.max(span.source);
        floors[at].0 += of(2);
        floors[at].1 += of(3);
    }
    for (row, (compute, memory)) in rows.iter_mut().zip(floors) {
        let least = compute.max(memory);
        row.floor = (least > 0.0).then_some((Seconds(least), memory >= compute));
    }
    rows.sort_by(|a, b| b.time.0.total_cmp(&a.time.0));
    rows
}

/// What policies were measured to lose.
#[derive(Clone, Debug)]
pub struct Measured {
    pub quality: Quality,
    /// Whether it was measured on the model that is asked about.
    pub own: bool,
}
