//! Ops on what dropped tokens leave behind.

use batchmax_kernels::cuda::Arg;
use batchmax_sim::op::{Choice, Heads, Lanes, Protect};

use super::interpreter::{Interpreter, Items};
use crate::error::ExecError;

impl Interpreter<'_, '_> {
    /// Takes memory for the states of caches that are about to get their first tokens.
    pub(super) fn open_states(
        &mut self,
        heads: Heads,
        items: &Items,
        layer: usize,
    ) -> Result<(), ExecError> {
        if heads.form.state.is_none() {
            return Ok(());
        }
        let (kv_heads, bytes) = (heads.kv as usize, 4 * self.kv.main.layout.state as u64);
        for item in &items.list {
            for h in 0..kv_heads {
                let index = item.sequence * kv_heads + h;
                if self.kv.main.head(layer, index).state.is_none() {
                    let place = self.kv.pool.take_behind(bytes, bytes)?;
                    self.kv.main.change(layer, index).state = Some(place);
                    let at = self.kv.pool.address(place);
                    self.device.fill(at, 0, bytes)?;
                }
            }
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
        layer: usize,
    ) -> Result<(), ExecError> {
        let Some((keys, _)) = self.maps.get(layer).copied() else { return Ok(()) };
        let Some(state) = heads.form.state else { return Ok(()) };
        let items = self.items(lanes)?;
        let counts = self.plain_counts(heads, (protect, choice), &items, layer)?;
        let (kv, scores) = (self.caches(layer)?, self.scores(layer)?);
        let kept = self.choose(kv.clone(), &items, scores, counts, protect)?;
        let (rank, hidden, dim) = (state.rank as usize, state.hidden as usize, heads.dim as usize);
        let psi = self.device.scratch("psi", (4 * rank * self.kv.main.plane()) as u64)?;
        let args = vec![
            kv.clone(),
            Arg::At(items.at),
            Arg::At(kept.keep),
            Arg::At(kept.list),
            Arg::At(keys),
            Arg::U32(state.hidden),
            Arg::U32(state.rank),
            Arg::At(psi),
        ];
        let (kv_heads, count) = (heads.kv as usize, items.list.len());
        let grid = [self.longest(layer, &items).div_ceil(8), kv_heads, count];
        let shared = 32 * (dim + hidden + 2 * rank);
        self.device.launch("state_psi", grid, (128, shared), args)?;
        let args = vec![
            kv,
            Arg::At(items.at),
            Arg::At(kept.keep),
            Arg::At(kept.list),
            Arg::U32(state.rank),
            Arg::At(psi),
        ];
        let threads = (dim + 1).next_multiple_of(32) as u32;
        Ok(self.device.launch("state_fold", [rank, kv_heads, count], (threads, 0), args)?)
    }

    /// Joins what this step's queries find in the states to their attention.
    pub(super) fn read_state(
        &mut self,
        heads: Heads,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let Some((_, queries)) = self.maps.get(layer).copied() else { return Ok(()) };
        let Some(state) = heads.form.state else { return Ok(()) };
        let items = self.items(lanes)?;
        let item_of: Vec<u32> = (items.list.iter().zip(0..))
            .flat_map(|(item, i)| std::iter::repeat_n(i, item.rows))
            .collect();
        let rows = item_of.len();
        let of = self.device.put_words("item-of", &item_of)?;
        let (rank, hidden, dim) = (state.rank as usize, state.hidden as usize, heads.dim as usize);
        let args = vec![
            self.caches(layer)?,
            Arg::At(items.at),
            Arg::At(of),
            self.slots.qkv.arg(),
            Arg::U32(rows as u32),
            Arg::At(queries),
            Arg::U32(state.hidden),
            Arg::U32(state.rank),
            self.slots.attention.arg(),
            Arg::At(self.slots.log_sum_exp),
        ];
        let grid = [rows.div_ceil(8), heads.query as usize, 1];
        let shared = 32 * (dim + hidden + rank);
        Ok(self.device.launch("state_read", grid, (128, shared), args)?)
    }
}
