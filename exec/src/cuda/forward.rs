//! Rows that go on to the upper layers, where not all do.

use batchmax_kernels::cuda::Arg;
use batchmax_sim::op::Lanes;
use batchmax_sim::units::Tokens;

use super::interpreter::Interpreter;
use crate::error::ExecError;

impl Interpreter<'_, '_> {
    /// Moves the rows that go on next to each other, in order, and forgets the others.
    pub(super) fn forward(
        &mut self,
        width: u32,
        recent: Tokens,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let items = self.items(lanes)?;
        let keep: Vec<u32> = items.list.iter().map(|i| i.lane.keep.min(i.rows as u32)).collect();
        let most = keep.iter().copied().max().unwrap_or(0) as usize;
        let count = items.list.len();
        let (positions, kv, scores) = (self.positions()?, self.caches(layer)?, self.scores(layer)?);
        let wanted = self.device.put_words("forward-keep", &keep)?;
        let chosen = self.device.scratch("forwarded", (4 * count * most) as u64)?;
        let args = vec![
            kv,
            Arg::At(items.at),
            Arg::At(scores),
            Arg::At(positions),
            Arg::At(wanted),
            Arg::U32(recent),
            Arg::U32(most as u32),
            Arg::At(chosen),
        ];
        self.device.launch("forward_choose", [count, 1, 1], (256, 1152), args)?;
        let mut to = Vec::with_capacity(count);
        let mut rows = 0;
        for keep in &keep {
            to.push(rows);
            rows += keep;
        }
        let targets = self.device.put_words("forward-to", &to)?;
        let places = self.device.scratch("forward-positions", u64::from(4 * rows))?;
        // What the layer's norms read is free until the next layer's.
        let (input, out) = (self.slots.residual, self.slots.normed);
        let args = vec![
            Arg::At(items.at),
            Arg::At(chosen),
            Arg::U32(most as u32),
            Arg::At(wanted),
            Arg::At(targets),
            input.arg(),
            Arg::At(positions),
            out.arg(),
            Arg::At(places),
        ];
        let grid = [(most * width as usize / 8).div_ceil(256), count, 1];
        self.device.launch("forward_rows", grid, (256, 0), args)?;
        (self.slots.residual, self.slots.normed) = (out, input);
        self.slots.positions = self.device.words(places, rows as usize)?;
        // A step reads all its prompts whole or none: every sequence of the step is here.
        for ((step, item), (first, keep)) in
            self.slots.step_rows.iter_mut().zip(&items.list).zip(to.iter().zip(&keep))
        {
            (step.1, step.2) = (*first as usize, *keep as usize);
            let at = &self.slots.positions[*first as usize..][..*keep as usize];
            self.sequences[item.sequence].forwarded = at.to_vec();
        }
        Ok(())
    }
}
