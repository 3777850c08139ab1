//! Rows that go on to the upper layers, where not all do.

use batchmax_kernels as k;
use batchmax_sim::op::Lanes;

use super::Interpreter;

impl Interpreter<'_> {
    /// Moves the rows that go on next to each other, in order, and forgets the others.
    pub(super) fn forward(&mut self, width: usize, recent: u32, lanes: &Lanes, layer: usize) {
        let rows = self.rows_of(lanes.as_slice());
        let kv_heads = self.model.kv_heads as usize;
        let kept = lanes
            .as_slice()
            .iter()
            .flat_map(|l| std::iter::repeat_n(l.keep as usize, l.sequences as usize));
        let sequences: Vec<usize> = (lanes.as_slice().iter())
            .flat_map(|l| l.first..l.first + l.sequences)
            .map(|sequence| sequence as usize)
            .collect();
        let mut choices = Vec::with_capacity(rows.len());
        for (index, ((first, count), keep)) in rows.iter().zip(kept).enumerate() {
            let at = sequences[index] * kv_heads;
            let heads = &self.slots.scores[layer][at..at + kv_heads];
            let mut scores = vec![0.0f32; *count];
            for head in heads {
                scores.iter_mut().zip(head).for_each(|(sum, score)| *sum += score);
            }
            let positions = &self.slots.positions[*first..first + count];
            let protect = k::evict::Protect { sinks: 0, recent };
            let seen = positions.last().map_or(0, |p| p + 1);
            choices.push((*first, k::evict::best(&scores, positions, seen, keep, protect)));
        }
        let slots = &mut self.slots;
        for (sequence, (first, kept)) in sequences.iter().zip(&choices) {
            let at = kept.iter().map(|row| slots.positions[first + *row as usize]);
            self.sequences[*sequence].forwarded = at.collect();
        }
        let mut to = 0;
        // A step reads all its prompts whole or none: every sequence of the step is here.
        for (step, (first, kept)) in slots.step_rows.iter_mut().zip(&choices) {
            (step.1, step.2) = (to, kept.len());
            for row in kept {
                let from = first + *row as usize;
                slots.residual.copy_within(from * width..(from + 1) * width, to * width);
                slots.positions[to] = slots.positions[from];
                to += 1;
            }
        }
    }
}
