//! Ops on partial caches: what fills them, when, and what reads them.

use batchmax_kernels as k;
use batchmax_kernels::attend::AttendItem;
use batchmax_sim::op::{Heads, Lane, Lanes};
use batchmax_sim::units::{Layer, Tokens};

use super::cache::take_scores;
use super::{Interpreter, layer_index};
use crate::error::ExecError;

/// Mean queries of a sequence in a layer.
#[derive(Clone, Debug, Default)]
pub struct Noted {
    /// Of the newest row.
    now: Vec<f32>,
    /// When its partial cache was filled; empty before.
    filled: Vec<f32>,
}

/// The sequences of lanes, each with the tokens that its lane keeps.
pub(super) fn sequences(lanes: &Lanes) -> Vec<(u32, Tokens)> {
    let each = |l: &Lane| (l.first..l.first + l.sequences).zip(std::iter::repeat(l.keep));
    lanes.as_slice().iter().flat_map(each).collect()
}

/// The cosine between two vectors; 1 where one of them is zero, which nobody can turn away from.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
    };
    let lengths = (dot(a, a) * dot(b, b)).sqrt();
    if lengths > 0.0 { dot(a, b) / lengths } else { 1.0 }
}

impl Interpreter<'_> {
    pub(super) fn compare(
        &mut self,
        heads: Heads,
        below: i32,
        lanes: &Lanes,
        layer: Option<Layer>,
    ) {
        let (width, dim) = (self.model.qkv_width() as usize, heads.dim as usize);
        let rows = self.rows_of(lanes.as_slice());
        let all = self.sequences.len();
        let slots = &mut self.slots;
        slots.stale.clear();
        let noted = &mut slots.noted[layer_index(layer)];
        noted.resize_with(all, Noted::default);
        for ((sequence, _), (first, count)) in sequences(lanes).into_iter().zip(rows) {
            let row = &slots.qkv[(first + count - 1) * width..][..heads.query as usize * dim];
            let noted = &mut noted[sequence as usize];
            noted.now.clear();
            noted.now.resize(dim, 0.0);
            for query in row.chunks_exact(dim) {
                noted.now.iter_mut().zip(query).for_each(|(sum, x)| *sum += x);
            }
            if noted.filled.is_empty()
                || cosine(&noted.now, &noted.filled) < f64::from(below) / 1000.0
            {
                slots.stale.push(sequence);
            }
        }
    }

    pub(super) fn refresh(&mut self, lanes: &Lanes, layer: Option<Layer>) -> Result<(), ExecError> {
        let index = layer_index(layer);
        let filled = sequences(lanes);
        let kv_heads = self.model.kv_heads;
        let scores = take_scores(&mut self.slots.scores[index], lanes, kv_heads);
        let (pool, mut items) = self.kv.parts(index, &filled);
        k::select::refresh(self.threads, pool, &mut items, &scores)?;
        for (sequence, _) in filled {
            if let Some(noted) = self.slots.noted[index].get_mut(sequence as usize) {
                noted.filled.clone_from(&noted.now);
            }
            let state = &mut self.sequences[sequence as usize];
            let step = state.generated.len() as u32;
            if step > 0 {
                state.refreshed.push((step, index as Layer));
            }
        }
        Ok(())
    }

    pub(super) fn append_part(
        &mut self,
        lanes: &Lanes,
        layer: Option<Layer>,
    ) -> Result<(), ExecError> {
        let (pool, mut items) = self.kv.parts(layer_index(layer), &sequences(lanes));
        k::select::append_part(self.threads, pool, &mut items)?;
        Ok(())
    }

    pub(super) fn attend_part(&mut self, heads: Heads, lanes: &Lanes, layer: Option<Layer>) {
        let shape = self.attend_shape(heads, None);
        let width = self.model.qkv_width() as usize;
        let rows = self.rows_of(lanes.as_slice());
        let end = rows.last().map_or(0, |(first, count)| first + count);
        let items: Vec<AttendItem<'_>> = (sequences(lanes).into_iter().zip(rows))
            .map(|((sequence, _), (first_row, rows))| {
                let heads = self.kv.part(layer_index(layer), sequence as usize);
                AttendItem { heads, first_row, rows, at: None }
            })
            .collect();
        k::attend::attend_decode(
            self.threads,
            &self.kv.pool,
            &items,
            &shape,
            &self.slots.qkv[..end * width],
            width,
            &mut self.slots.attention[..end * shape.heads * shape.head_dim],
            Some(&mut self.slots.log_sum_exp[..end * shape.heads]),
        );
    }
}
