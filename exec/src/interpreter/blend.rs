//! Ops that put caches together from those of chunks that were read alone.

use batchmax_kernels as k;
use batchmax_kernels::append::AppendItem;
use batchmax_kernels::attend::AttendItem;
use batchmax_kernels::blend::Columns;
use batchmax_sim::op::{Heads, Lane, Lanes};
use batchmax_sim::units::{Layer, Tokens};

use super::{Interpreter, layer_index};
use crate::chunks::cut;
use crate::error::ExecError;

/// Width of a row of keys and values.
fn width(heads: Heads) -> usize {
    2 * heads.kv as usize * heads.dim as usize
}

/// The sequences of lanes with their lane, and where the rows of each begin among what was brought for all.
fn each(lanes: &[Lane]) -> impl Iterator<Item = (usize, &Lane, usize)> {
    let mut first = 0;
    lanes.iter().flat_map(|l| (l.first..l.first + l.sequences).map(move |s| (s as usize, l))).map(
        move |(sequence, lane)| {
            let at = first;
            first += lane.keep as usize;
            (sequence, lane, at)
        },
    )
}

impl Interpreter<'_> {
    /// Brings the caches of the chunks of each sequence, with room for all of its tokens, into the buffer that the
    /// feed-forward block needs later.
    pub(super) fn load(
        &mut self,
        heads: Heads,
        chunk: Tokens,
        lanes: &Lanes,
        layer: Option<Layer>,
    ) -> Result<(), ExecError> {
        let (width, layer) = (width(heads), layer_index(layer) as Layer);
        let all: usize = each(lanes.as_slice()).map(|(_, lane, _)| lane.keep as usize).sum();
        let staged = &mut self.slots.gate_up;
        // Only where heads are wider than the feed-forward block.
        if staged.len() < all * width {
            staged.resize(all * width, 0.0);
        }
        for (sequence, lane, first) in each(lanes.as_slice()) {
            let mut row = first;
            for ids in cut(&self.sequences[sequence].prompt, lane.rows, chunk) {
                let cache = self.chunks.get(ids, layer).ok_or(ExecError::MissingChunk)?;
                let to = &mut staged[row * width..(row + cache.rows()) * width];
                cache.read(self.threads, to);
                row += cache.rows();
            }
        }
        self.chunk = chunk;
        Ok(())
    }

    /// Scores of the step's tokens: how far their values are from what was brought.
    pub(super) fn deviate(&mut self, heads: Heads, lanes: &Lanes, layer: Option<Layer>) {
        let (stored_width, row_width) = (width(heads), self.model.qkv_width() as usize);
        let (kv, dim) = (heads.kv as usize, heads.dim as usize);
        let at = Columns {
            width: row_width,
            values: (heads.query as usize + kv) * dim,
            stored_width,
            stored_values: kv * dim,
            head_dim: dim,
            kv_heads: kv,
        };
        let format = self.kv.pool.format();
        let step_rows = self.rows_of(lanes.as_slice());
        let mut scores = Vec::with_capacity(step_rows.len() * kv);
        for ((_, lane, first), (row, count)) in each(lanes.as_slice()).zip(step_rows) {
            let new = &self.slots.qkv[row * row_width..(row + count) * row_width];
            let stored =
                &self.slots.gate_up[first * stored_width..][..lane.rows as usize * stored_width];
            scores.extend(k::blend::deviation(format, new, stored, at));
        }
        let index = layer_index(layer);
        // Takes the places of those lanes, which it makes where there are none yet.
        super::cache::take_scores(&mut self.slots.scores[index], lanes, heads.kv);
        super::cache::put_scores(&mut self.slots.scores[index], lanes, heads.kv, scores);
    }

    /// Fills caches with what was brought, turned to its places, and the step's rows.
    pub(super) fn blend(
        &mut self,
        heads: Heads,
        lanes: &Lanes,
        layer: Option<Layer>,
    ) -> Result<(), ExecError> {
        let (width, row_width) = (width(heads), self.model.qkv_width() as usize);
        let (kv, dim) = (heads.kv as usize, heads.dim as usize);
        let keys = heads.query as usize * dim;
        let step_rows = self.rows_of(lanes.as_slice());
        let slots = &mut self.slots;
        let mut all = 0;
        for ((_, lane, first), (row, count)) in each(lanes.as_slice()).zip(&step_rows) {
            let tokens = lane.keep as usize;
            let staged = &mut slots.gate_up[first * width..(first + tokens) * width];
            // Keys stand as their chunk has turned them: by the place of the chunk they are turned on.
            let chunk = self.chunk.max(1);
            let starts: Vec<u32> = (0..lane.keep).map(|at| at / chunk * chunk).collect();
            let (table, layout) = (&self.weights.rope, self.weights.rope_layout);
            k::rope::turn_on(self.threads, staged, width, kv, dim, &starts, table, layout);
            for row in *row..row + count {
                let at = slots.positions[row] as usize;
                let new = &slots.qkv[row * row_width + keys..][..width];
                staged[at * width..(at + 1) * width].copy_from_slice(new);
            }
            all = first + tokens;
        }
        let most = lanes.as_slice().iter().map(|l| l.keep).max().unwrap_or(0);
        let positions: Vec<u32> = (0..most).collect();
        let places: Vec<(usize, usize)> =
            each(lanes.as_slice()).map(|(_, lane, first)| (first, lane.keep as usize)).collect();
        let (pool, picked) = self.kv.select(layer_index(layer), lanes.as_slice());
        let mut items: Vec<AppendItem<'_>> = (picked.into_iter().zip(places))
            .map(|((_, _, heads), (first_row, rows))| AppendItem {
                heads,
                first_row,
                rows,
                positions: &positions[..rows],
            })
            .collect();
        let staged = &slots.gate_up[..all * width];
        k::append::append(self.threads, pool, &mut items, staged, width, 0, kv * dim, dim)?;
        Ok(())
    }

    /// Attention of the step's rows where they stand among the cached tokens.
    pub(super) fn attend_rows(&mut self, heads: Heads, lanes: &Lanes, layer: Option<Layer>) {
        let shape = self.attend_shape(heads, None);
        let width = self.model.qkv_width() as usize;
        let step_rows = self.rows_of(lanes.as_slice());
        let rows = step_rows.last().map_or(0, |(first, count)| first + count);
        let slots = &mut self.slots;
        let (pool, picked) = self.kv.select(layer_index(layer), lanes.as_slice());
        let items: Vec<AttendItem<'_>> = (picked.into_iter().zip(step_rows))
            .map(|((.., heads), (first_row, rows))| {
                let at = Some(&slots.positions[first_row..first_row + rows]);
                AttendItem { heads, first_row, rows, at }
            })
            .collect();
        k::attend::attend_prefill(
            self.threads,
            pool,
            &items,
            &shape,
            &slots.qkv[..rows * width],
            width,
            &mut slots.attention[..rows * shape.heads * shape.head_dim],
            Some(&mut slots.log_sum_exp[..rows * shape.heads]),
        );
    }
}
