//! Scores of cached tokens, by which eviction chooses, and the tally of the attention that they receive.

mod chance;
mod expected;
pub(crate) mod keys;
mod lag;
mod last;
mod mass;
mod newest;
#[cfg(test)]
mod tests;

use crate::attend::AttendShape;
use crate::kv::{BlockPool, HeadCache};
use crate::simd::{Isa, isa};
use crate::threads::{Disjoint, Threads};
pub use expected::{Rotation, expected_attention};
use mass::{Mass, Step};

/// The caches of one sequence in one layer, with its query rows of this step.
pub struct RankItem<'a> {
    /// Caches of its KV heads. [`Scorer::WindowAttention`] keeps its state in their tallies.
    pub heads: &'a mut [HeadCache],
    /// Its first row.
    pub first_row: usize,
    /// Its rows.
    pub rows: usize,
    /// Tokens of the sequence so far, dropped ones included.
    pub seen: u32,
}

/// The caches of one sequence in one layer, with its query rows of this step.
pub struct TallyItem<'a> {
    /// Caches of its KV heads.
    pub heads: &'a mut [HeadCache],
    /// Its first row.
    pub first_row: usize,
    /// Its rows.
    pub rows: usize,
}

/// How a score takes its neighbours in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The mean; missing neighbours count as zero.
    Mean,
    /// The largest of those there are.
    Max,
}

/// How tokens are scored. The best ones stay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scorer {
    /// The position.
    Recency,
    /// Minus the length of the key.
    KeyNorm,
    /// Minus the cosine between the key and the mean direction of all keys; 0 for a key of length 0.
    KeyDiff,
    /// The attention from the last rows of the prompt, averaged over them and the group's heads, then over neighbours.
    ///
    /// With several rows (a prompt, or a chunk of one) the state is replaced by the mean over the last `window` rows, or all
    /// if there are fewer. With one row and a state present (a decode step) the row's attention divided by `window` is
    /// added.
    WindowAttention {
        /// Rows that count.
        window: u32,
        /// Neighbours that a score is pooled over, itself included.
        pool: u32,
        /// How.
        pooling: Pooling,
        /// Pool as if the tokens of the last `window` positions were not there.
        exclude_window: bool,
    },
    /// The tally.
    Tallied {
        /// Divided by the number of tokens that could attend to it.
        mean: bool,
    },
    /// The attention from the sequence's last row, averaged over all query heads: a token has the same score in every head
    /// that holds it. The tallies serve as scratch space and are left empty.
    LastAttention,
    /// The attention from the sequence's last row: the largest over the group's heads and over `pool` neighbours. The
    /// newest token has none and is nobody's neighbour. The tallies serve as scratch space and are left empty.
    NewestAttention {
        /// Neighbours that a score is pooled over, itself included.
        pool: u32,
    },
    /// A number in 0..1 from seed, layer, head and position.
    Random {
        /// The seed.
        seed: u32,
        /// The layer.
        layer: u32,
    },
    /// The rank, in its partition of `lag` tokens, of a token's variation over the channels of keys and values scaled to the
    /// next partition's range: 0..1. Tokens without a next partition have more, newer ones most of it, sinks most of all.
    Lag {
        /// Tokens of a partition.
        lag: u32,
        /// First tokens, before the first partition.
        sinks: u32,
    },
}

/// Scores every cached token of every head: `scores[item * kv_heads + head][token]`. `qkv` and `lse` are those of this
/// step's attention; only [`Scorer::WindowAttention`], [`Scorer::LastAttention`] and [`Scorer::NewestAttention`] read them.
///
/// # Panics
/// If the sizes do not fit each other.
#[expect(clippy::too_many_arguments, reason = "the layout of a fused row")]
pub fn rank(
    threads: &Threads,
    pool: &BlockPool,
    items: &mut [RankItem<'_>],
    scorer: Scorer,
    shape: &AttendShape,
    qkv: &[f32],
    qkv_width: usize,
    lse: &[f32],
    scores: &mut Vec<Vec<f32>>,
) {
    rank_with(isa(), threads, pool, items, scorer, &Step { shape, qkv, qkv_width, lse }, scores);
}

fn rank_with(
    isa: Isa,
    threads: &Threads,
    pool: &BlockPool,
    items: &mut [RankItem<'_>],
    scorer: Scorer,
    step: &Step<'_>,
    scores: &mut Vec<Vec<f32>>,
) {
    if let Scorer::WindowAttention { window, .. } = scorer {
        let mut work = Vec::new();
        for item in items.iter_mut() {
            let state = item.heads.iter().all(|h| !h.tally.is_empty());
            let (last, by, anew) = if item.rows == 1 && state {
                (1, window.max(1) as usize, false)
            } else {
                let last = item.rows.min(window as usize);
                (last, last.max(1), true)
            };
            work.push(Mass {
                heads: &mut *item.heads,
                first_row: item.first_row,
                rows: item.rows,
                last,
                by,
                anew,
                only: None,
            });
        }
        mass::add(isa, threads, pool, work, step);
    }
    if scorer == Scorer::LastAttention {
        return last::scores(isa, threads, pool, items, step, scores);
    }
    if let Scorer::NewestAttention { pool: near } = scorer {
        return newest::scores(isa, threads, pool, items, near.max(1) as usize, step, scores);
    }
    let kv_heads = items.first().map_or(0, |i| i.heads.len());
    scores.resize_with(items.len() * kv_heads, Vec::new);
    let out = Disjoint::new(scores);
    let items = &*items;
    threads.run(items.len() * kv_heads, |i| {
        let item = &items[i / kv_heads];
        let head = &item.heads[i % kv_heads];
        // SAFETY: each task has its own head's scores.
        let scores = unsafe { out.item_mut(i) };
        scores.clear();
        scores.resize(head.tokens(), 0.0);
        match scorer {
            Scorer::Recency => fill(scores, &head.positions, |p| p as f32),
            Scorer::KeyNorm => keys::norms(isa, pool, head, scores),
            Scorer::KeyDiff => keys::differences(isa, pool, head, scores),
            Scorer::WindowAttention { window, pool, pooling, exclude_window } => {
                let end = if exclude_window {
                    head.positions.partition_point(|p| *p < item.seen.saturating_sub(window))
                } else {
                    head.tokens()
                };
                smooth(pooling, &head.tally, end, pool.max(1) as usize, scores);
            }
            Scorer::Random { seed, layer } => {
                let draw = chance::Draw::new(seed, layer, (i % kv_heads) as u32);
                fill(scores, &head.positions, |p| draw.at(p));
            }
            Scorer::Lag { lag, sinks } => {
                lag::ranks(pool, head, lag as usize, sinks as usize, scores);
            }
            // Ranked before, all heads at once.
            Scorer::LastAttention | Scorer::NewestAttention { .. } => {}
            Scorer::Tallied { mean } => {
                let known = head.tally.len().min(scores.len());
                scores[..known].copy_from_slice(&head.tally[..known]);
                if mean {
                    for (score, p) in scores.iter_mut().zip(&head.positions) {
                        *score /= (item.seen.saturating_sub(*p)).max(1) as f32;
                    }
                }
            }
        }
    });
}

fn fill(scores: &mut [f32], positions: &[u32], score: impl Fn(u32) -> f32) {
    for (out, p) in scores.iter_mut().zip(positions) {
        *out = score(*p);
    }
}

/// Each of the first `end` values pooled with its neighbours among them, of which there are `pool` with itself. Values from
/// `end` on stay as they are.
fn smooth(pooling: Pooling, values: &[f32], end: usize, pool: usize, scores: &mut [f32]) {
    for (i, out) in scores.iter_mut().enumerate() {
        if i < end {
            let first = i as isize - (pool / 2) as isize;
            let last = (first + pool as isize).min(end as isize) as usize;
            let near = &values[first.max(0) as usize..last];
            *out = match pooling {
                Pooling::Mean => near.iter().sum::<f32>() / pool as f32,
                Pooling::Max => near.iter().copied().fold(f32::NEG_INFINITY, f32::max),
            };
        } else {
            *out = values[i];
        }
    }
}

/// Adds to each cached token's tally the probability that every query row of this step gives it, averaged over the heads of
/// its group. New tokens start at zero. Rows are added one by one in order, so chunks of a prompt give what the whole does.
///
/// # Panics
/// If the sizes do not fit each other.
pub fn tally(
    threads: &Threads,
    pool: &BlockPool,
    items: &mut [TallyItem<'_>],
    shape: &AttendShape,
    qkv: &[f32],
    qkv_width: usize,
    lse: &[f32],
) {
    tally_with(isa(), threads, pool, items, &Step { shape, qkv, qkv_width, lse });
}

fn tally_with(
    isa: Isa,
    threads: &Threads,
    pool: &BlockPool,
    items: &mut [TallyItem<'_>],
    step: &Step<'_>,
) {
    let mut work = Vec::new();
    for item in items.iter_mut() {
        let (first_row, rows) = (item.first_row, item.rows);
        work.push(Mass {
            heads: &mut *item.heads,
            first_row,
            rows,
            last: rows,
            by: 1,
            anew: false,
            only: None,
        });
    }
    mass::add(isa, threads, pool, work, step);
}
