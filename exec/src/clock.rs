//! Times each op where it runs and gathers the times of an op over its layers, steps and loops.

use std::time::Instant;

use batchmax_sim::op::Phase;
use batchmax_sim::program::{Program, site};
use batchmax_sim::timeline::{Source, Span, Timeline};
use batchmax_sim::units::Seconds;

/// Running sums per op of the folded program.
#[derive(Debug)]
pub struct Clock {
    /// Start of each op of a pass in the sums: [pass][block].
    offsets: Vec<Vec<usize>>,
    sums: Vec<f64>,
    launches: Vec<f64>,
    /// Every launch of every op, where a profile needs medians.
    samples: Option<Vec<Vec<f64>>>,
    steps: [f64; 2],
    last: Instant,
    step_start: Instant,
}

impl Clock {
    /// For a program; `keep_samples` keeps every launch.
    #[must_use]
    pub fn new(program: &Program, keep_samples: bool) -> Self {
        let mut offsets = Vec::new();
        let mut count = 0;
        program.visit_passes(|_, pass, _| {
            let starts = pass
                .blocks()
                .map(|(_, block)| {
                    let start = count;
                    count += block.ops.len();
                    start
                })
                .collect();
            offsets.push(starts);
        });
        let now = Instant::now();
        Self {
            offsets,
            sums: vec![0.0; count],
            launches: vec![0.0; count],
            samples: keep_samples.then(|| vec![Vec::new(); count]),
            steps: [0.0; 2],
            last: now,
            step_start: now,
        }
    }

    /// A step begins.
    pub fn start_step(&mut self) {
        self.step_start = Instant::now();
        self.last = self.step_start;
    }

    /// An op has run since the last call.
    pub fn lap(&mut self, pass: u32, block: u32, op: u32) {
        let now = Instant::now();
        let seconds = (now - self.last).as_secs_f64();
        self.add(pass, block, op, seconds);
        self.last = now;
    }

    /// An op has taken so many seconds by another clock.
    pub(crate) fn add(&mut self, pass: u32, block: u32, op: u32, seconds: f64) {
        let at = self.offsets[pass as usize][block as usize] + op as usize;
        self.sums[at] += seconds;
        self.launches[at] += 1.0;
        if let Some(samples) = &mut self.samples {
            samples[at].push(seconds);
        }
    }

    /// A step has taken so many seconds by another clock.
    pub(crate) fn add_step(&mut self, phase: Phase, seconds: f64) {
        self.steps[phase as usize] += seconds;
    }

    /// A step has ended.
    pub fn end_step(&mut self, phase: Phase) {
        self.add_step(phase, self.step_start.elapsed().as_secs_f64());
    }

    /// Whether every launch of every op is wanted.
    pub(crate) fn keeps_samples(&self) -> bool {
        self.samples.is_some()
    }

    /// Wall time of the steps of a phase.
    #[must_use]
    pub fn phase(&self, phase: Phase) -> Seconds {
        Seconds(self.steps[phase as usize])
    }

    /// The launches of an op, if they were kept.
    #[must_use]
    pub fn samples(&self, pass: u32, block: u32, op: u32) -> &[f64] {
        let at = self.offsets[pass as usize][block as usize] + op as usize;
        self.samples.as_ref().map_or(&[], |s| s[at].as_slice())
    }

    /// The measured timeline: what whole steps took beyond their ops is the overhead.
    #[must_use]
    pub fn timeline(&self, program: &Program) -> Timeline {
        let mut timeline = Timeline::default();
        let mut ops = [0.0; 2];
        program.visit_passes(|pass_index, pass, _| {
            for (block_index, block) in pass.blocks() {
                for (op_index, op) in block.ops.iter().enumerate() {
                    let at = self.offsets[pass_index as usize][block_index as usize] + op_index;
                    ops[pass.phase as usize] += self.sums[at];
                    timeline.spans.push(Span {
                        site: site(pass_index, pass, block_index, block, op_index as u32),
                        family: op.family(pass.phase),
                        launches: self.launches[at],
                        time: Seconds(self.sums[at]),
                        stddev: Seconds(0.0),
                        source: Source::Run,
                    });
                }
            }
        });
        for phase in [Phase::Prefill, Phase::Decode] {
            let rest = self.steps[phase as usize] - ops[phase as usize];
            timeline.overhead[phase as usize] = Seconds(rest.max(0.0));
        }
        timeline
    }
}
