//! Ops with a row that speculates: whole tokens go to slower memory, and those that it foresees come back.

use batchmax_kernels as k;
use batchmax_kernels::append::AppendItem;
use batchmax_kernels::attend::AttendItem;
use batchmax_kernels::evict::Protect;
use batchmax_kernels::rank::TallyItem;
use batchmax_sim::op::{Heads, Lanes, part_room};
use batchmax_sim::units::{Layer, Tokens};

use super::refresh::sequences;
use super::{Interpreter, layer_index};
use crate::error::ExecError;
use crate::tier::{Slot, Tier};

/// Tokens that a sequence will want whole in a layer, per KV head, ascending.
pub type Foreseen = Vec<Vec<u32>>;

impl Interpreter<'_> {
    fn slot(&self, layer: usize, sequence: u32, head: usize) -> Slot {
        let heads = self.model.kv_heads as usize;
        (layer * self.sequences.len() + sequence as usize) * heads + head
    }

    fn tier(&mut self) -> &mut Tier {
        let (place, bytes) = (&self.tier_place, self.kv.pool.token_bytes());
        self.tier.get_or_insert_with(|| Tier::new(place.clone(), bytes))
    }

    pub(super) fn offload(&mut self, lanes: &Lanes, layer: Option<Layer>) {
        let index = layer_index(layer);
        let mut moved = Vec::new();
        let (pool, picked) = self.kv.select(index, lanes.as_slice());
        for (sequence, lane, heads) in picked {
            for (h, head) in heads.iter().enumerate() {
                let end = head.tokens();
                let mut rows = Vec::with_capacity(lane.rows as usize * pool.token_bytes());
                head.copy_out(pool, end - (lane.rows as usize).min(end)..end, &mut rows);
                moved.push((sequence, h, rows));
            }
        }
        for (sequence, head, rows) in moved {
            let slot = self.slot(index, sequence, head);
            self.tier().store(slot, rows);
        }
    }

    /// Forgets what finished sequences have in slower memory.
    pub(super) fn forget(&mut self, lanes: &Lanes, layer: Option<Layer>) {
        if self.tier.is_none() {
            return;
        }
        for (sequence, _) in sequences(lanes) {
            for head in 0..self.model.kv_heads as usize {
                let slot = self.slot(layer_index(layer), sequence, head);
                self.tier().forget(slot);
            }
        }
    }

    pub(super) fn fetch(&mut self, lanes: &Lanes, layer: Option<Layer>) {
        let index = layer_index(layer);
        for (sequence, _) in sequences(lanes) {
            for head in 0..self.model.kv_heads as usize {
                let foreseen = &self.slots.foreseen[index][sequence as usize];
                let wanted = foreseen.get(head).cloned().unwrap_or_default();
                if !wanted.is_empty() {
                    let slot = self.slot(index, sequence, head);
                    self.tier().fetch(slot, wanted);
                }
            }
        }
    }

    /// Puts what was fetched for these sequences into their partial caches, with the speculating row's own token behind.
    fn arrive(&mut self, heads: Heads, lanes: &Lanes, layer: usize) -> Result<(), ExecError> {
        let rows = self.rows_of(lanes.as_slice());
        let (width, dim) = (self.model.qkv_width() as usize, heads.dim as usize);
        for ((sequence, keep), (first, count)) in sequences(lanes).into_iter().zip(rows) {
            let own = first + count - 1;
            let foreseen =
                self.slots.foreseen[layer].get(sequence as usize).cloned().unwrap_or_default();
            let mut arrived = Vec::with_capacity(heads.kv as usize);
            for head in 0..heads.kv as usize {
                let wanted = foreseen.get(head).map_or(&[][..], |w| w);
                let slot = self.slot(layer, sequence, head);
                arrived.push(match wanted {
                    [] => Vec::new(),
                    _ => self.tier().wait(slot)?,
                });
            }
            let (pool, items) = self.kv.parts(layer, &[(sequence, keep)]);
            for ((item, rows), head) in items.into_iter().zip(&arrived).zip(0..) {
                let wanted = foreseen.get(head).map_or(&[][..], |w| w);
                // Nobody asks for these positions; cached ones would do as well.
                let room = part_room(keep, item.head.tokens() as Tokens) as usize;
                item.part.put(pool, wanted, rows, room)?;
            }
            let (pool, parts) = self.kv.part_heads(layer, sequence);
            let position = self.slots.positions[own..=own].to_vec();
            let heads_of =
                AppendItem { heads: parts, first_row: own, rows: 1, positions: &position };
            let key = heads.query as usize * dim;
            let value = key + heads.kv as usize * dim;
            let qkv = &self.slots.qkv[..(own + 1) * width];
            let items = &mut [heads_of];
            k::append::append(self.threads, pool, items, qkv, width, key, value, dim)?;
        }
        Ok(())
    }

    pub(super) fn attend_ahead(
        &mut self,
        heads: Heads,
        lanes: &Lanes,
        layer: Option<Layer>,
    ) -> Result<(), ExecError> {
        let index = layer_index(layer);
        let all = self.sequences.len();
        self.slots.foreseen[index].resize_with(all, Foreseen::default);
        self.arrive(heads, lanes, index)?;
        let shape = self.attend_shape(heads, None);
        let width = self.model.qkv_width() as usize;
        let rows = self.rows_of(lanes.as_slice());
        let end = rows.last().map_or(0, |(first, count)| first + count);
        let kv_heads = heads.kv as usize;
        let (mut cached, mut fetched, mut without) = (Vec::new(), Vec::new(), Vec::new());
        for ((sequence, _), (first, count)) in sequences(lanes).into_iter().zip(rows) {
            let caches = self.kv.heads(index, sequence as usize);
            let foreseen = &self.slots.foreseen[index][sequence as usize];
            for first_row in first..first + count {
                cached.push(AttendItem { heads: caches, first_row, rows: 1 });
                without.extend((0..kv_heads).map(|h| foreseen.get(h).cloned().unwrap_or_default()));
            }
            let parts = self.kv.part(index, sequence as usize);
            fetched.push(AttendItem { heads: parts, first_row: first, rows: count });
        }
        let (pool, qkv) = (&self.kv.pool, &self.slots.qkv[..end * width]);
        let out = &mut self.slots.attention[..end * shape.heads * shape.head_dim];
        let lse = &mut self.slots.log_sum_exp[..end * shape.heads];
        let (mut other, mut other_lse) = (vec![0.0; out.len()], vec![0.0; lse.len()]);
        k::attend::attend_without(
            self.threads,
            pool,
            &cached,
            &without,
            &shape,
            qkv,
            width,
            out,
            Some(lse),
        );
        k::attend::attend_prefill(
            self.threads,
            pool,
            &fetched,
            &shape,
            qkv,
            width,
            &mut other,
            Some(&mut other_lse),
        );
        k::attend::join(out, lse, &other, &other_lse, shape.head_dim);
        Ok(())
    }

    /// Chooses what the speculating row attends to most, with fetched tokens as the whole ones that they were.
    pub(super) fn foresee(
        &mut self,
        heads: Heads,
        whole: bool,
        lanes: &Lanes,
        layer: Option<Layer>,
    ) {
        let (index, form) = (layer_index(layer), heads.form);
        let shape = self.attend_shape(heads, None);
        let width = self.model.qkv_width() as usize;
        let rows = self.rows_of(lanes.as_slice());
        for ((sequence, keep), (first, count)) in sequences(lanes).into_iter().zip(rows) {
            let row = first + count - 1;
            let (qkv, lse) = (&self.slots.qkv[..(row + 1) * width], &self.slots.log_sum_exp);
            let (pool, caches, parts) = self.kv.with_parts(index, sequence);
            for heads in [&mut *caches, &mut *parts] {
                heads.iter_mut().for_each(|head| head.tally.clear());
                let mut items = [TallyItem { heads, first_row: row, rows: 1 }];
                k::rank::tally(self.threads, pool, &mut items, &shape, qkv, width, lse);
            }
            let foreseen = &mut self.slots.foreseen[index][sequence as usize];
            foreseen.resize_with(caches.len(), Vec::new);
            for ((head, part), wanted) in caches.iter_mut().zip(parts).zip(foreseen) {
                for (token, mass) in wanted.iter().zip(&part.tally) {
                    head.tally[*token as usize] = *mass;
                }
                let (keys, values) = form.packed_of(head.tokens() as Tokens);
                let candidates = if whole { head.tokens() } else { keys.max(values) as usize };
                let (scores, positions) =
                    (&head.tally[..candidates], &head.positions[..candidates]);
                *wanted =
                    k::evict::best(scores, positions, u32::MAX, keep as usize, Protect::default());
                head.tally.clear();
                part.tally.clear();
            }
        }
    }
}
