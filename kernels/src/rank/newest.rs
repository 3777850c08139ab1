//! The attention of the last row, head by head, the largest of neighbours and of the group's heads.

use super::mass::{self, Mass, Step};
use super::{Pooling, RankItem, smooth};
use crate::kv::BlockPool;
use crate::simd::Isa;
use crate::threads::Threads;

/// Scores every token but the newest by the largest attention that a head of its group pays to it or its neighbours.
pub(super) fn scores(
    isa: Isa,
    threads: &Threads,
    pool: &BlockPool,
    items: &mut [RankItem<'_>],
    near: usize,
    step: &Step<'_>,
    scores: &mut Vec<Vec<f32>>,
) {
    let kv_heads = items.first().map_or(0, |i| i.heads.len());
    scores.resize_with(items.len() * kv_heads, Vec::new);
    for (item, scores) in items.iter().zip(scores.chunks_mut(kv_heads.max(1))) {
        for (head, scores) in item.heads.iter().zip(scores) {
            scores.clear();
            scores.resize(head.tokens(), 0.0);
        }
    }
    let mut pooled = Vec::new();
    for only in 0..step.shape.group() {
        let work = items
            .iter_mut()
            .map(|item| Mass {
                heads: &mut *item.heads,
                first_row: item.first_row,
                rows: item.rows,
                last: 1,
                by: 1,
                anew: true,
                only: Some(only),
            })
            .collect();
        mass::add(isa, threads, pool, work, step);
        for (item, scores) in items.iter_mut().zip(scores.chunks_mut(kv_heads.max(1))) {
            for (head, scores) in item.heads.iter_mut().zip(scores) {
                let others = head.tokens().saturating_sub(1);
                pooled.clear();
                pooled.resize(others, 0.0);
                smooth(Pooling::Max, &head.tally, others, near, &mut pooled);
                scores.iter_mut().zip(&pooled).for_each(|(most, p)| *most = most.max(*p));
                head.tally.clear();
            }
        }
    }
}
