//! Scores of cached tokens: the higher, the more worth keeping. One function per word of the policies' language.

use crate::attend::{AttendShape, attention_mass, mass_task};
use crate::kv::{BLOCK_TOKENS, BlockPool, HeadCache, with_element};
use crate::simd::{Element, Simd, dispatch, isa};
use crate::threads::{Disjoint, Threads};

/// How tokens are scored. Candidates are all tokens of a head's cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scorer {
    /// The position.
    Recency,
    /// -|k|.
    KeyNorm,
    /// -cos(k, anchor); anchor = mean over the candidates of k / |k|.
    KeyDiff,
    /// Attention of the last queries: mean over them and over the heads of the group, average-pooled along the cache with
    /// zeros beyond its ends, always divided by `pool`. The unpooled mass stays in [`HeadCache::tally`]: a step of one
    /// row adds to it, a longer one replaces it.
    WindowAttention {
        /// Queries; also what the mass is divided by.
        window: u32,
        /// Width of the pooling, odd.
        pool: u32,
        /// Pool as if the newest `window` tokens did not exist.
        exclude_window: bool,
    },
    /// Attention received, as tallied; mean over the group.
    Tallied {
        /// Divide by the number of queries that could see the token.
        mean: bool,
    },
}

/// One sequence in one layer.
pub struct RankItem<'a> {
    /// Its KV heads.
    pub heads: &'a mut [HeadCache],
    /// First row of the step that is its own.
    pub first_row: usize,
    /// Its rows in this step.
    pub rows: usize,
    /// Tokens it has seen, this step's included.
    pub seen: u32,
}

/// One sequence in one layer.
pub struct TallyItem<'a> {
    /// Its KV heads.
    pub heads: &'a mut [HeadCache],
    /// First row of the step that is its own.
    pub first_row: usize,
    /// Its rows in this step.
    pub rows: usize,
}

/// Adds the attention of all queries of this step to each token's running sum (over queries and heads of the group, query
/// after query, so that chunks make no difference).
pub fn tally(
    threads: &Threads,
    pool: &BlockPool,
    items: &mut [TallyItem<'_>],
    shape: &AttendShape,
    qkv: &[f32],
    qkv_width: usize,
    lse: &[f32],
) {
    let mut tasks: Vec<_> = items
        .iter_mut()
        .flat_map(|item| {
            let (first_row, rows) = (item.first_row, item.rows);
            item.heads.iter_mut().enumerate().map(move |(h, head)| (h, first_row, rows, head))
        })
        .collect();
    let count = tasks.len();
    let tasks = Disjoint::new(&mut tasks);
    threads.run(count, |i| {
        // SAFETY: every task takes its own element.
        let (kv_head, first_row, rows, head) = &mut unsafe { tasks.part(i..i + 1) }[0];
        let mut sums = std::mem::take(&mut head.tally);
        sums.resize(head.tokens(), 0.0);
        let task = mass_task(
            head,
            pool,
            shape,
            *kv_head,
            (*first_row, *rows, *rows),
            (qkv, qkv_width, lse),
        );
        attention_mass(&task, &mut sums);
        head.tally = sums;
    });
}

/// Scores every token of every head of every item, items by KV heads, into `scores`.
#[expect(clippy::too_many_arguments, reason = "a kernel takes raw parts")]
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
    let mut tasks: Vec<_> = items
        .iter_mut()
        .flat_map(|item| {
            let at = (item.first_row, item.rows, item.seen);
            item.heads.iter_mut().enumerate().map(move |(h, head)| (h, at, head))
        })
        .collect();
    scores.resize_with(tasks.len(), Vec::new);
    let count = tasks.len();
    let tasks = Disjoint::new(&mut tasks);
    let scores = Disjoint::new(scores.as_mut_slice());
    threads.run(count, |i| {
        // SAFETY: every task takes its own elements.
        let ((kv_head, (first_row, rows, seen), head), out) =
            unsafe { (&mut tasks.part(i..i + 1)[0], &mut scores.part(i..i + 1)[0]) };
        out.clear();
        match scorer {
            Scorer::Recency => out.extend(head.positions.iter().map(|p| *p as f32)),
            Scorer::KeyNorm | Scorer::KeyDiff => {
                out.resize(head.tokens(), 0.0);
                with_element!(pool.format(), E => {
                    // SAFETY: the head's blocks hold its tokens; the path is available.
                    unsafe { run_keys::<E>(isa(), head, pool, scorer == Scorer::KeyDiff, out) };
                });
            }
            Scorer::WindowAttention { window, pool: width, exclude_window } => {
                let mut mass = std::mem::take(&mut head.tally);
                if *rows > 1 {
                    mass.clear();
                }
                mass.resize(head.tokens(), 0.0);
                let last = (window as usize).min(*rows);
                let at = (*first_row, *rows, last);
                let task = mass_task(head, pool, shape, *kv_head, at, (qkv, qkv_width, lse));
                attention_mass(&task, &mut mass);
                let pooled = if exclude_window {
                    head.positions.partition_point(|p| *p < seen.saturating_sub(window))
                } else {
                    mass.len()
                };
                let scale = 1.0 / (window as f32 * shape.group() as f32);
                average_pool(&mass[..pooled], width as usize, scale, out);
                out.extend(mass[pooled..].iter().map(|m| m * scale));
                head.tally = mass;
            }
            Scorer::Tallied { mean } => {
                let group = shape.group() as f32;
                out.extend(head.tally.iter().zip(&head.positions).map(|(sum, position)| {
                    let queries = if mean { (*seen - position) as f32 } else { 1.0 };
                    sum / (group * queries)
                }));
                // A token that nobody has tallied yet has received nothing.
                out.resize(head.tokens(), 0.0);
            }
        }
    });
}

/// Means of `width` neighbours, zeros beyond the ends.
fn average_pool(values: &[f32], width: usize, scale: f32, out: &mut Vec<f32>) {
    let reach = width / 2;
    out.extend((0..values.len()).map(|i| {
        let around = &values[i.saturating_sub(reach)..(i + reach + 1).min(values.len())];
        around.iter().sum::<f32>() * scale / width as f32
    }));
}

dispatch!(unsafe fn run_keys<E: Element>(head: &HeadCache, pool: &BlockPool, diff: bool, out: &mut [f32]) = keys_body);

/// Key norms or distances from the mean direction. Plain loops over 32 tokens: the compiler vectorises them.
#[inline(always)]
unsafe fn keys_body<S: Simd, E: Element>(
    head: &HeadCache,
    pool: &BlockPool,
    diff: bool,
    out: &mut [f32],
) {
    let dim = pool.head_dim();
    let mut anchor = vec![0.0f32; dim];
    let tokens = head.tokens();
    let key = |block: *const E, d: usize, t: usize| -> f32 {
        // SAFETY: inside the K block; slots past the last token are cut from the result.
        unsafe { *block.add(d * BLOCK_TOKENS + t) }.widen()
    };
    for (index, id) in head.blocks.iter().enumerate() {
        let block: *const E = pool.block::<E>(*id);
        let here = BLOCK_TOKENS.min(tokens.saturating_sub(index * BLOCK_TOKENS));
        let mut squares = [0.0f32; BLOCK_TOKENS];
        for d in 0..dim {
            for (t, square) in squares[..here].iter_mut().enumerate() {
                let k = key(block, d, t);
                *square += k * k;
            }
        }
        let norms = &mut out[index * BLOCK_TOKENS..index * BLOCK_TOKENS + here];
        for (norm, square) in norms.iter_mut().zip(&squares) {
            *norm = -square.sqrt();
        }
        if diff {
            for (d, sum) in anchor.iter_mut().enumerate() {
                for (t, norm) in norms.iter().enumerate() {
                    *sum += key(block, d, t) / -norm.min(-f32::MIN_POSITIVE);
                }
            }
        }
    }
    if !diff {
        return;
    }
    for a in &mut anchor {
        *a /= tokens.max(1) as f32;
    }
    let length = anchor.iter().map(|a| a * a).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
    for (index, id) in head.blocks.iter().enumerate() {
        let block: *const E = pool.block::<E>(*id);
        let here = BLOCK_TOKENS.min(tokens.saturating_sub(index * BLOCK_TOKENS));
        let mut dots = [0.0f32; BLOCK_TOKENS];
        for (d, a) in anchor.iter().enumerate() {
            for (t, dot) in dots[..here].iter_mut().enumerate() {
                *dot += key(block, d, t) * a;
            }
        }
        let scores = &mut out[index * BLOCK_TOKENS..index * BLOCK_TOKENS + here];
        for (score, dot) in scores.iter_mut().zip(&dots) {
            let norm = -score.min(-f32::MIN_POSITIVE);
            *score = -dot / (norm * length);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::append::{AppendItem, append};
    use crate::kv::KvFormat;

    #[test]
    fn pooling_by_hand() {
        let mut out = Vec::new();
        average_pool(&[5.0, 0.0, 10.0, 0.0, 0.0, 5.0], 5, 1.0, &mut out);
        assert_eq!(out, [3.0, 3.0, 3.0, 3.0, 3.0, 1.0]);
    }

    #[test]
    fn key_scores_by_hand() {
        let threads = Threads::new(1);
        let mut pool = BlockPool::new(8, KvFormat::F32, 1 << 20);
        let mut heads = vec![HeadCache::default()];
        // Two columns matter: keys (3,4), (0,2), (1,0); no queries, no values.
        let mut qkv = vec![0.0f32; 3 * 24];
        (qkv[8], qkv[9]) = (3.0, 4.0);
        (qkv[24 + 8], qkv[24 + 9]) = (0.0, 2.0);
        (qkv[48 + 8], qkv[48 + 9]) = (1.0, 0.0);
        let mut items =
            [AppendItem { heads: &mut heads, first_row: 0, rows: 3, first_position: 0 }];
        append(&threads, &mut pool, &mut items, &qkv, 24, 8, 16, 8).expect("room");
        let shape = AttendShape {
            heads: 1,
            kv_heads: 1,
            head_dim: 8,
            scale: 1.0,
            softcap: None,
            window: None,
        };
        let mut scores = Vec::new();
        let mut rank_by = |scorer| {
            let mut items = [RankItem { heads: &mut heads, first_row: 0, rows: 3, seen: 3 }];
            rank(&threads, &pool, &mut items, scorer, &shape, &qkv, 24, &[0.0; 3], &mut scores);
            scores[0].clone()
        };
        assert_eq!(rank_by(Scorer::Recency), [0.0, 1.0, 2.0]);
        assert_eq!(rank_by(Scorer::KeyNorm), [-5.0, -2.0, -1.0]);
        // Anchor = ((.6,.8) + (0,1) + (1,0)) / 3 = (.5333, .6); |anchor| = .80277.
        let expected =
            [-(0.6 * 1.6 / 3.0 + 0.8 * 0.6) / 0.802_77, -0.6 / 0.802_77, -(1.6 / 3.0) / 0.802_77];
        for (got, want) in rank_by(Scorer::KeyDiff).iter().zip(expected) {
            assert!((f64::from(*got) - want).abs() < 1e-5, "{got} {want}");
        }
    }
}
