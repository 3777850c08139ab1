//! What users ask about, from a program and its timeline.

use serde::Serialize;

use crate::load::Schedule;
use crate::op::{OpKind, Phase};
use crate::program::Program;
use crate::timeline::{Source, Timeline};
use crate::units::Seconds;

/// Times and rates of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Metrics {
    /// From joining to the first token, the longest; where all begin together, until the last sequence has its first token.
    pub ttft: Seconds,
    /// Mean time per output token after the first; under a continuous schedule that includes the waiting while others'
    /// prompts are read.
    pub tpot: Seconds,
    /// Until the last token.
    pub total: Seconds,
    /// Prompt tokens that are read (not found in a cache) per second of prefill.
    pub prefill_tokens_per_s: f64,
    /// Tokens generated in decode per second of decode.
    pub decode_tokens_per_s: f64,
    /// Generated tokens per second of the whole run.
    pub output_tokens_per_s: f64,
    /// Prompt and generated tokens per second of the whole run.
    pub total_tokens_per_s: f64,
    /// Half width of the 90 % interval of the total time, relative.
    pub error: f64,
    /// Where the times come from.
    pub source: Source,
}

impl Metrics {
    /// From a timeline of `program`.
    #[must_use]
    pub fn of(program: &Program, timeline: &Timeline) -> Self {
        let load = &program.header.load;
        let [prefill, decode] = timeline.phases();
        let total = prefill + decode;
        let (_, decode_steps) = program.steps();
        let outputs = load.output_tokens() as f64;
        let decoded = outputs - load.sequences() as f64;
        let rate = |tokens: f64, time: Seconds| if time.0 > 0.0 { tokens / time.0 } else { 0.0 };
        let (ttft, tpot) = match load.schedule {
            Schedule::Continuous { .. } => latencies(program, timeline),
            Schedule::Static | Schedule::Staggered { .. } if decode_steps > 0 => {
                (prefill, decode / decode_steps as f64)
            }
            Schedule::Static | Schedule::Staggered { .. } => (prefill, Seconds(0.0)),
        };
        Self {
            ttft,
            tpot,
            total,
            prefill_tokens_per_s: rate(load.read_tokens() as f64, prefill),
            decode_tokens_per_s: rate(decoded, decode),
            output_tokens_per_s: rate(outputs, total),
            total_tokens_per_s: rate(outputs + load.input_tokens() as f64, total),
            error: timeline.half_width_of(total, None),
            source: timeline.weakest_source_of(total),
        }
    }
}

/// One sequence's moments.
#[derive(Clone, Copy, Default)]
struct Moments {
    joined: Option<f64>,
    first: Option<f64>,
    last: f64,
    tokens: u32,
}

/// The longest time from joining to the first token, and the mean time between tokens: by walking through the steps, each
/// of which takes the mean of its pass.
fn latencies(program: &Program, timeline: &Timeline) -> (Seconds, Seconds) {
    let mut times = Vec::new();
    let mut phase_steps = [0.0; 2];
    program.visit_passes(|_, pass, n| {
        let steps = n * f64::from(pass.steps);
        phase_steps[pass.phase as usize] += steps;
        times.push((steps, 0.0));
    });
    for span in &timeline.spans {
        if let Some((steps, time)) = times.get_mut(span.site.pass as usize) {
            *time += span.time.0 / f64::max(*steps, 1.0);
        }
    }
    let overhead =
        |phase: Phase| timeline.overhead[phase as usize].0 / phase_steps[phase as usize].max(1.0);
    let overhead = [overhead(Phase::Prefill), overhead(Phase::Decode)];
    let mut all = vec![Moments::default(); program.header.load.sequences() as usize];
    // Whoever joins could do so since the last step that ended a sequence.
    let (mut now, mut free) = (0.0, 0.0);
    let walked: Result<(), std::convert::Infallible> = program.visit_steps(|view| {
        let pass = view.pass;
        let before = &pass.before.ops[0];
        if pass.phase == Phase::Prefill {
            for s in before.lanes_at(view.step, view.shift).indices() {
                all[s as usize].joined.get_or_insert(free);
            }
        }
        now += times[view.pass_index as usize].1 + overhead[pass.phase as usize];
        if pass.phase == Phase::Decode {
            free = now;
        }
        let sampled = pass.after.ops.iter().find(|op| matches!(op.kind, OpKind::Sample { .. }));
        if let Some(op) = sampled.filter(|_| !pass.only_speculates()) {
            for s in op.lanes_at(view.step, view.shift).indices() {
                let moments = &mut all[s as usize];
                moments.first.get_or_insert(now);
                moments.last = now;
                moments.tokens += 1;
            }
        }
        Ok(())
    });
    match walked {
        Ok(()) => {}
    }
    let (mut ttft, mut waited, mut gaps) = (0.0f64, 0.0, 0.0);
    for Moments { joined, first, last, tokens } in all {
        let first = first.unwrap_or_default();
        ttft = ttft.max(first - joined.unwrap_or_default());
        waited += last - first;
        gaps += f64::from(tokens.saturating_sub(1));
    }
    (Seconds(ttft), Seconds(if gaps > 0.0 { waited / gaps } else { 0.0 }))
}
