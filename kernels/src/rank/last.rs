//! The attention of the last row, one order for all heads of a layer.

use super::RankItem;
use super::mass::{self, Mass, Step};
use crate::kv::BlockPool;
use crate::simd::Isa;
use crate::threads::Threads;

/// Scores every token by the mean attention of all query heads; a head that has dropped it gives it none.
pub(super) fn scores(
    isa: Isa,
    threads: &Threads,
    pool: &BlockPool,
    items: &mut [RankItem<'_>],
    step: &Step<'_>,
    scores: &mut Vec<Vec<f32>>,
) {
    let work = items
        .iter_mut()
        .map(|item| Mass {
            heads: &mut *item.heads,
            first_row: item.first_row,
            rows: item.rows,
            last: 1,
            by: 1,
            anew: true,
            only: None,
        })
        .collect();
    mass::add(isa, threads, pool, work, step);
    let kv_heads = items.first().map_or(0, |i| i.heads.len());
    scores.resize_with(items.len() * kv_heads, Vec::new);
    let mut sums = Vec::new();
    for (item, scores) in items.iter_mut().zip(scores.chunks_mut(kv_heads.max(1))) {
        let end = item.heads.iter().filter_map(|h| h.positions.last()).max();
        sums.clear();
        sums.resize(end.map_or(0, |p| *p as usize + 1), 0.0f32);
        for head in item.heads.iter() {
            for (position, mass) in head.positions.iter().zip(&head.tally) {
                sums[*position as usize] += mass;
            }
        }
        let share = 1.0 / kv_heads as f32;
        for (head, scores) in item.heads.iter_mut().zip(scores) {
            scores.clear();
            scores.extend(head.positions.iter().map(|p| sums[*p as usize] * share));
            head.tally.clear();
        }
    }
}
