//! Ops that put caches together from those of chunks that were read alone.

use batchmax_kernels::cuda::Arg;
use batchmax_sim::op::{Heads, Lanes};
use batchmax_sim::units::{Layer, Tokens};

use super::cache::lanes_of;
use super::interpreter::{Interpreter, Items};
use super::memory::{Rows, bytes_of};
use crate::chunks::cut;
use crate::error::ExecError;

/// Width of a row of keys and values.
fn width(heads: Heads) -> usize {
    2 * heads.kv as usize * heads.dim as usize
}

/// Where the rows of each item begin among what was brought for all.
fn stored_from(items: &Items) -> Vec<u32> {
    let mut first = 0;
    (items.list.iter())
        .map(|item| {
            let at = first;
            first += item.lane.keep;
            at
        })
        .collect()
}

impl Interpreter<'_, '_> {
    /// The sequences of an op and what was brought for all of their tokens, or the room for it.
    fn brought(&mut self, heads: Heads, lanes: &Lanes) -> Result<(Items, Rows, usize), ExecError> {
        let items = self.items(lanes)?;
        let rows = items.list.iter().map(|i| i.lane.keep as usize).sum::<usize>();
        let (kind, width) = (self.kv.main.layout.kind, width(heads) as u32);
        let bytes = rows as u64 * u64::from(width) * kind.bytes();
        let at = self.device.scratch("staged", bytes)?;
        Ok((items, Rows { at, kind, width }, rows))
    }

    /// Brings the caches of the chunks of each sequence, with room for all of its tokens.
    pub(super) fn load(
        &mut self,
        heads: Heads,
        chunk: Tokens,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let (items, staged, _) = self.brought(heads, lanes)?;
        for (item, from) in items.list.iter().zip(stored_from(&items)) {
            let mut row = from as usize;
            let prompt = &self.sequences[item.sequence].prompt;
            for ids in cut(prompt, item.lane.rows, chunk) {
                let cache = self.chunks.get(ids, layer as Layer).ok_or(ExecError::MissingChunk)?;
                self.device.upload(staged.at.plus(staged.bytes(row)), &cache.to_bytes())?;
                row += cache.rows();
            }
        }
        self.chunk = chunk;
        Ok(())
    }

    /// Scores of the step's tokens: how far their values are from what was brought.
    pub(super) fn deviate(
        &mut self,
        heads: Heads,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let (items, staged, _) = self.brought(heads, lanes)?;
        let known: Vec<u32> = items.list.iter().map(|i| i.lane.rows).collect();
        let from = self.device.put_words("stored-from", &stored_from(&items))?;
        let known = self.device.put_words("compared", &known)?;
        let (kv, scores) = (self.caches(layer)?, self.scores(layer)?);
        let args = vec![
            kv,
            Arg::At(items.at),
            self.slots.qkv.arg(),
            Arg::U32((heads.query + heads.kv) * heads.dim),
            staged.arg(),
            Arg::At(from),
            Arg::At(known),
            Arg::At(scores),
        ];
        let lanes = lanes_of(heads.dim as usize);
        let grid = [(items.most_rows() * lanes).div_ceil(128), heads.kv as usize, items.list.len()];
        Ok(self.device.launch("deviate", grid, (128, 0), args)?)
    }

    /// Fills caches with what was brought, turned to its places, and the step's rows.
    pub(super) fn blend(
        &mut self,
        heads: Heads,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let (items, staged, rows) = self.brought(heads, lanes)?;
        let (kv_heads, begins) = (heads.kv as usize, stored_from(&items));
        let mut row_of = vec![u32::MAX; rows];
        for (item, from) in items.list.iter().zip(&begins) {
            for row in item.first..item.first + item.rows {
                row_of[(from + self.slots.positions[row]) as usize] = row as u32;
            }
            for h in 0..kv_heads {
                let (index, tokens) = (item.sequence * kv_heads + h, item.lane.keep as usize);
                self.kv.main.reserve(&mut self.kv.pool, layer, index, tokens)?;
                self.kv.main.change(layer, index).tokens += tokens;
            }
        }
        let from = self.device.put_words("stored-from", &begins)?;
        let of = self.device.put_words("row-of", &row_of)?;
        let (table, pairs) = self.turns;
        let args = vec![
            self.caches(layer)?,
            Arg::At(items.at),
            self.slots.qkv.arg(),
            Arg::U32(heads.query * heads.dim),
            staged.arg(),
            Arg::At(from),
            Arg::At(of),
            Arg::U32(self.chunk.max(1)),
            Arg::At(table),
            Arg::U32(pairs),
            Arg::U32(self.weights.interleaved.into()),
            Arg::F32(self.rope.factor()),
        ];
        let most = self.longest(layer, &items);
        let grid = [(most * heads.dim as usize).div_ceil(256), kv_heads, items.list.len()];
        Ok(self.device.launch("blend", grid, (256, 0), args)?)
    }

    /// Attention of the step's rows where they stand among the cached tokens.
    pub(super) fn attend_rows(
        &mut self,
        heads: Heads,
        lanes: &Lanes,
        layer: usize,
    ) -> Result<(), ExecError> {
        let items = self.items(lanes)?;
        let caches = self.attended(layer, &items)?;
        let at = self.device.put("positions", &bytes_of(&self.slots.positions))?;
        let out = self.out();
        self.attend_prefill(heads, &caches, &items, None, Some(at), out)
    }
}
