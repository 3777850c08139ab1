//! Ops on what dropped tokens leave behind.

use batchmax_kernels as k;
use batchmax_kernels::attend::AttendItem;
use batchmax_kernels::evict::EvictItem;
use batchmax_sim::op::{Choice, Heads, Lane, Lanes, Protect};
use batchmax_sim::units::Layer;

use super::cache::{put_scores, take_scores};
use super::{Interpreter, layer_index};
use crate::error::ExecError;

impl Interpreter<'_> {
    /// Takes memory for the states of caches that are about to get their first tokens.
    pub(super) fn open_states(
        &mut self,
        heads: Heads,
        lanes: &[Lane],
        layer: Option<Layer>,
    ) -> Result<(), ExecError> {
        let Some(state) = heads.form.state else { return Ok(()) };
        let (pool, picked) = self.kv.picks(layer_index(layer), lanes);
        for head in picked.flat_map(|(_, _, heads)| heads) {
            head.open_state(pool, state.rank as usize)?;
        }
        Ok(())
    }

    /// Adds what the next eviction drops to the states.
    pub(super) fn accumulate(
        &mut self,
        heads: Heads,
        protect: Protect,
        choice: Choice,
        lanes: &Lanes,
        layer: Option<Layer>,
    ) {
        let index = layer_index(layer);
        let Some(maps) = self.maps.as_ref().and_then(|m| m.layers.get(index)) else { return };
        let protect = k::evict::Protect { sinks: protect.sinks, recent: protect.recent };
        let (pool, picked) = self.kv.select(index, lanes.as_slice());
        let scores = take_scores(&mut self.slots.scores[index], lanes, heads.kv);
        let mut items = Vec::with_capacity(picked.len());
        for (at, (sequence, lane, heads)) in picked.into_iter().enumerate() {
            let seen = self.sequences[sequence as usize].seen_with_step();
            let scores = &scores[at * heads.len()..(at + 1) * heads.len()];
            let keep = super::cache::kept(choice, heads, scores, seen, lane.keep, protect);
            items.push(EvictItem { heads, seen, keep });
        }
        k::state::accumulate(self.threads, pool, &items, &scores, protect, maps);
        // The eviction needs them.
        put_scores(&mut self.slots.scores[index], lanes, heads.kv, scores);
    }

    /// Joins what this step's queries find in the states to their attention.
    pub(super) fn read_state(&mut self, heads: Heads, lanes: &Lanes, layer: Option<Layer>) {
        let index = layer_index(layer);
        let Some(maps) = self.maps.as_ref().and_then(|m| m.layers.get(index)) else { return };
        let shape = self.attend_shape(heads, None);
        let width = self.model.qkv_width() as usize;
        let step_rows = self.rows_of(lanes.as_slice());
        let rows = step_rows.last().map_or(0, |(first, count)| first + count);
        let (pool, picked) = self.kv.select(index, lanes.as_slice());
        let items: Vec<AttendItem<'_>> = (picked.into_iter().zip(step_rows))
            .map(|((.., heads), (first_row, rows))| AttendItem { heads, first_row, rows, at: None })
            .collect();
        k::state::read_state(
            self.threads,
            pool,
            &items,
            &shape,
            &self.slots.qkv[..rows * width],
            width,
            &mut self.slots.attention[..rows * shape.heads * shape.head_dim],
            &self.slots.log_sum_exp[..rows * shape.heads],
            maps,
        );
    }
}
