//! What caches hold while a run goes on.

use super::{Replay, held_before, to_bytes};
use crate::memory::KvPeaks;
use crate::op::Phase;
use crate::program::Program;
use crate::timeline::Timeline;
use crate::units::{Bytes, Seconds};

/// One step of a run and what the caches hold in it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moment {
    /// Prefill or decode.
    pub phase: Phase,
    /// When the step ends, from the start of the run. Steps of one pass share its mean time.
    pub end: Seconds,
    /// Bytes of the caches at the worst moment of the step.
    pub peak: Bytes,
    /// Bytes of the caches behind the step.
    pub held: Bytes,
}

/// Longest run that is unrolled, steps.
const MOST_STEPS: u64 = 50_000;

/// The caches step by step, at the pace of `timeline`, which must be one of `program`. Its highest peaks are those of
/// [`super::kv_peaks`]. Empty for runs of more than 50,000 steps: nobody looks at so many.
#[must_use]
pub fn kv_history(program: &Program, timeline: &Timeline) -> Vec<Moment> {
    if program.steps().0 > MOST_STEPS {
        return Vec::new();
    }
    let pace = Pace::of(program, timeline);
    let layout = program.header.kv;
    let (mut held, mut at) = (held_before(program), Seconds(0.0));
    let mut moments = Vec::new();
    let walked: Result<(), std::convert::Infallible> = program.visit_steps(|view| {
        let (pass, step) = (view.pass, view.step);
        let mut replay = Replay { layout, peaks: KvPeaks::default() };
        replay.see(pass.phase, held);
        replay.step(pass, step, held);
        for (_, block) in pass.blocks() {
            let delta: i128 = block.ops.iter().map(|op| replay.delta(op, step)).sum();
            held += delta * i128::from(block.times());
        }
        at += pace.step(view.pass_index, pass.phase);
        let peak = replay.peaks.prefill.max(replay.peaks.decode);
        moments.push(Moment { phase: pass.phase, end: at, peak, held: to_bytes(held) });
        Ok(())
    });
    match walked {
        Ok(()) => moments,
    }
}

/// Mean time of a step, by pass.
struct Pace {
    passes: Vec<Seconds>,
    overhead: [Seconds; 2],
}

impl Pace {
    fn of(program: &Program, timeline: &Timeline) -> Self {
        let (mut steps, mut by_phase) = (Vec::new(), [0.0; 2]);
        program.visit_passes(|_, pass, times| {
            steps.push(f64::from(pass.steps) * times);
            by_phase[pass.phase as usize] += f64::from(pass.steps) * times;
        });
        let mut passes = vec![Seconds(0.0); steps.len()];
        for span in &timeline.spans {
            if let Some(pass) = passes.get_mut(span.site.pass as usize) {
                *pass += span.time;
            }
        }
        for (pass, steps) in passes.iter_mut().zip(steps) {
            pass.0 /= steps.max(1.0);
        }
        let overhead = [0, 1]
            .map(|phase| Seconds(timeline.overhead[phase].0 / f64::max(by_phase[phase], 1.0)));
        Self { passes, overhead }
    }

    fn step(&self, pass: u32, phase: Phase) -> Seconds {
        let own = self.passes.get(pass as usize).copied().unwrap_or_default();
        own + self.overhead[phase as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::kv_history;
    use crate::load::{Hit, Schedule, Spread};
    use crate::memory::{kv_peaks, kv_trace};
    use crate::op::Phase;
    use crate::place::{Choice, Placement};
    use crate::plan::Case;
    use crate::policy::Preset;
    use crate::profile::Catalog;
    use crate::surface::Library;

    #[test]
    fn a_history_holds_the_trace_reaches_the_peaks_and_ends_with_the_run() {
        let catalog = Catalog::built_in();
        let model = catalog.model("llama-3.2-1b").expect("a model");
        let gpu = catalog.gpu("h100-sxm").expect("a device");
        let engine = catalog.engine("batchmax").expect("an engine");
        let choice = Choice::default();
        let placement = Placement::new(&model, &gpu, &engine, choice).expect("it can be placed");
        let cost = placement.cost(&Library::new(catalog.clone(), Vec::new()));
        for preset in ["full", "snapkv", "batch-max", "kivi", "tova"] {
            for schedule in ["static", "staggered"] {
                let preset = Preset::parse(&catalog, preset).expect("a preset");
                let schedule: Schedule = schedule.parse().expect("a schedule");
                let policy = preset.policy.as_ref();
                let (spread, hit) = (Spread::default(), Hit::default());
                let placement = &placement;
                let case = Case { placement, policy, isl: 700, osl: 40, spread, hit, schedule };
                let program = case.program(3).expect("lowers");
                let (answer, timeline) = case.answer_of(&program, cost.as_ref());
                let moments = kv_history(&program, &timeline);
                let held: Vec<_> = moments.iter().map(|m| m.held).collect();
                assert_eq!(held, kv_trace(&program));
                let most =
                    |phase| moments.iter().filter(|m| m.phase == phase).map(|m| m.peak).max();
                let peaks = kv_peaks(&program);
                assert_eq!(most(Phase::Prefill), Some(peaks.prefill), "{}", preset.name);
                assert_eq!(most(Phase::Decode), Some(peaks.decode), "{}", preset.name);
                let end = moments.last().expect("steps").end.0;
                assert!((end / answer.metrics.total.0 - 1.0).abs() < 1e-9, "{end}");
            }
        }
    }
}
