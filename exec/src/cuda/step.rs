//! One step of a program on a device, and its times.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use batchmax_kernels::cuda::{Arg, Event};
use batchmax_sim::op::{Lanes, OpKind, Phase};
use batchmax_sim::program::{Pass, StepView};

use super::interpreter::Interpreter;
use super::memory::MAIN;
use crate::clock::Clock;
use crate::error::ExecError;
use crate::interpreter::step::StepRows;

/// Of so many decode steps with the same ops over as many rows, one is timed op by op: often enough to follow a cache that
/// grows by a token a step, seldom enough that what marks cost is a small part of the whole.
const TIMED_EVERY: u32 = 16;

/// Kinds of steps whose times are remembered; a continuous schedule has many, and few of them come again.
const MOST_KINDS: usize = 64;

/// An op of a step: its block, its place there, and seconds.
type Timing = (u32, u32, f64);

/// The ops of the last step of a kind that was timed.
#[derive(Default)]
pub(super) struct Timed {
    /// Steps since then, and the times.
    kinds: HashMap<u64, (u32, Vec<Timing>)>,
}

/// Equal for steps that run the same ops over as many rows, whatever pass they belong to.
fn kind_of(pass: &Pass) -> u64 {
    let mut hasher = DefaultHasher::new();
    for (_, block) in pass.blocks() {
        block.times().hash(&mut hasher);
        for op in &block.ops {
            (op.name, op.lanes.rows()).hash(&mut hasher);
        }
    }
    hasher.finish()
}

impl Timed {
    /// Whether the next step of a kind is to be timed.
    fn is_due(&mut self, phase: Phase, kind: u64) -> bool {
        match self.kinds.get_mut(&kind) {
            Some((since, _)) if phase == Phase::Decode => {
                *since += 1;
                *since >= TIMED_EVERY
            }
            _ => true,
        }
    }

    fn put(&mut self, kind: u64, ops: Vec<Timing>) {
        if self.kinds.len() >= MOST_KINDS && !self.kinds.contains_key(&kind) {
            self.kinds.clear();
        }
        self.kinds.insert(kind, (0, ops));
    }

    fn ops(&self, kind: u64) -> &[Timing] {
        self.kinds.get(&kind).map_or(&[], |(_, ops)| ops)
    }
}

impl Interpreter<'_, '_> {
    /// Runs one step. Its ops are timed between marks in the queue, but those of most decode steps: these go in stretches
    /// without marks between them, and their ops count as those of the last step of their kind that was timed.
    pub(super) fn step(&mut self, view: &StepView<'_>, clock: &mut Clock) -> Result<(), ExecError> {
        let mut lanes = Lanes::Many(Vec::new());
        view.pass.before.ops[0].move_lanes(view.step, view.shift, &mut lanes);
        let kind = kind_of(view.pass);
        let times_ops = clock.keeps_samples() || self.timed.is_due(view.pass.phase, kind);
        let mut marks = Vec::new();
        let start = self.mark()?;
        self.device.in_stretches(!times_ops)?;
        self.gather_rows(view, &lanes);
        self.advance(view.pass, &lanes)?;
        view.pass.visit(|block, index, layer, op| {
            op.move_lanes(view.step, view.shift, &mut lanes);
            let began = if self.sweep > 0 { Some(self.swept()?) } else { None };
            self.run(view.pass, op, &lanes, layer)?;
            if times_ops {
                marks.push((block, index, began, self.mark()?));
            }
            Ok::<(), ExecError>(())
        })?;
        view.pass.before.ops[0].move_lanes(view.step, view.shift, &mut lanes);
        for index in lanes.indices() {
            let sequence = &mut self.sequences[index as usize];
            sequence.seen += std::mem::take(&mut sequence.step);
        }
        self.device.in_stretches(false)?;
        let end = self.mark()?;
        clock.add_step(view.pass.phase, self.device.driver()?.elapsed(start, end)?);
        let mut last = start;
        let mut ops = Vec::with_capacity(marks.len());
        for (block, index, began, mark) in marks {
            if let Some(began) = began {
                self.device.give_event(std::mem::replace(&mut last, began));
            }
            ops.push((block, index, self.device.driver()?.elapsed(last, mark)?));
            self.device.give_event(std::mem::replace(&mut last, mark));
        }
        self.device.give_event(last);
        self.device.give_event(end);
        if times_ops {
            self.timed.put(kind, ops);
        }
        for (block, index, seconds) in self.timed.ops(kind) {
            clock.add(view.pass_index, *block, *index, *seconds);
        }
        self.count_copies()
    }

    /// Fills the device's cache with something else; a mark behind that.
    fn swept(&mut self) -> Result<Event, ExecError> {
        let at = self.device.scratch("sweep", self.sweep)?;
        self.device.fill(at, 0, self.sweep)?;
        self.mark()
    }

    fn mark(&mut self) -> Result<Event, ExecError> {
        let mark = self.device.take_event()?;
        self.device.driver()?.record(MAIN, mark)?;
        Ok(mark)
    }

    /// The step's rows, sequence after sequence.
    fn gather_rows(&mut self, view: &StepView<'_>, lanes: &Lanes) {
        let slots = &mut self.slots;
        slots.chosen.clear();
        StepRows {
            ids: &mut slots.ids,
            positions: &mut slots.positions,
            sequences: &mut slots.step_rows,
        }
        .gather(view, lanes, &mut self.sequences);
    }

    /// Counts the step's rows in all heads at once, where every layer appends the same.
    fn advance(&mut self, pass: &Pass, lanes: &Lanes) -> Result<(), ExecError> {
        self.advanced.clear();
        let layers = self.kv.main.layers();
        let mut appending = 0;
        for block in &pass.layers {
            let appends = block.ops.iter().filter(|op| matches!(op.kind, OpKind::Append { .. }));
            let mut rows = appends.map(|op| op.lanes.rows());
            // The lanes of all ops move alike from step to step.
            if rows.next() == Some(pass.before.ops[0].lanes.rows()) && rows.next().is_none() {
                appending += block.times() as usize;
            }
        }
        if appending != layers || pass.ahead > 0 {
            return Ok(());
        }
        for layer in 0..layers {
            self.kv.main.sync(self.device, layer)?;
        }
        let items = self.kept_items(lanes)?;
        let args = vec![
            Arg::At(self.kv.main.heads_at(0)),
            Arg::At(items.at),
            Arg::U32(self.model.kv_heads),
            Arg::U32(self.kv.main.per_layer() as u32),
        ];
        self.device.launch("advance_heads", [items.list.len(), layers, 1], (32, 0), args)?;
        self.advanced = vec![true; layers];
        Ok(())
    }
}
