//! Keeps the best tokens of each head and closes the gaps in place; what becomes empty goes back to the pool.

use crate::kv::{BLOCK_TOKENS, BlockPool, HeadCache, with_element};
use crate::threads::{Disjoint, Threads};

/// Tokens that stay whatever their score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Protect {
    /// Positions below this.
    pub sinks: u32,
    /// Positions from seen - recent on.
    pub recent: u32,
}

/// One sequence in one layer.
pub struct EvictItem<'a> {
    /// Its KV heads.
    pub heads: &'a mut [HeadCache],
    /// Tokens it has seen, this step's included.
    pub seen: u32,
    /// Tokens that stay per head.
    pub keep: usize,
}

/// Keeps per head the `keep` best tokens by `scores` (items by KV heads). Protected tokens count as infinitely good, NaN as
/// infinitely bad; of equal scores the lower position stays. Order is kept. If more are protected than stay, sinks go
/// first, then the most recent.
///
/// # Panics
/// If there are not as many scores as tokens.
pub fn evict(
    threads: &Threads,
    pool: &mut BlockPool,
    items: &mut [EvictItem<'_>],
    scores: &[Vec<f32>],
    protect: Protect,
) {
    let mut tasks: Vec<_> = items
        .iter_mut()
        .flat_map(|item| {
            let (seen, keep) = (item.seen, item.keep);
            item.heads.iter_mut().map(move |head| (seen, keep, head))
        })
        .collect();
    assert!(tasks.len() == scores.len(), "{} heads, {} lists of scores", tasks.len(), scores.len());
    let count = tasks.len();
    {
        let pool = &*pool;
        let tasks = Disjoint::new(&mut tasks);
        threads.run(count, |i| {
            // SAFETY: every task takes its own element.
            let (seen, keep, head) = &mut unsafe { tasks.part(i..i + 1) }[0];
            let scores = &scores[i];
            assert!(
                scores.len() == head.tokens(),
                "{} scores, {} tokens",
                scores.len(),
                head.tokens()
            );
            if *keep < head.tokens() {
                let kept = select(&head.positions, scores, *seen, *keep, protect);
                compact(head, pool, &kept);
            }
        });
    }
    for (_, keep, head) in tasks {
        let tokens = head.tokens().min(keep);
        head.truncate(pool, tokens);
    }
}

/// Indices of the tokens that stay, ascending.
fn select(positions: &[u32], scores: &[f32], seen: u32, keep: usize, protect: Protect) -> Vec<u32> {
    let first_recent = seen.saturating_sub(protect.recent);
    // Sinks before recent tokens before scores; among recent tokens the newest first.
    let rank = |i: u32| -> (u8, f32) {
        let (position, score) = (positions[i as usize], scores[i as usize]);
        if position < protect.sinks {
            (2, 0.0)
        } else if position >= first_recent {
            (1, position as f32)
        } else if score.is_nan() {
            (0, f32::NEG_INFINITY)
        } else {
            (0, score)
        }
    };
    let mut order: Vec<u32> = (0..positions.len() as u32).collect();
    let better = |a: &u32, b: &u32| {
        let ((class_a, score_a), (class_b, score_b)) = (rank(*a), rank(*b));
        class_b.cmp(&class_a).then(score_b.total_cmp(&score_a)).then(a.cmp(b))
    };
    if keep > 0 && keep < order.len() {
        order.select_nth_unstable_by(keep - 1, better);
    }
    order.truncate(keep);
    order.sort_unstable();
    order
}

/// Moves the kept tokens to the front, in order. The blocks that fall free are returned by the caller.
fn compact(head: &mut HeadCache, pool: &BlockPool, kept: &[u32]) {
    let dim = pool.head_dim();
    for (to, from) in kept.iter().enumerate() {
        let from = *from as usize;
        if from == to {
            continue;
        }
        with_element!(pool.format(), E => {
            let source: *const E = pool.block::<E>(head.blocks[from / BLOCK_TOKENS]);
            let target: *mut E = pool.block(head.blocks[to / BLOCK_TOKENS]);
            let (from, to) = (from % BLOCK_TOKENS, to % BLOCK_TOKENS);
            let values = pool.value_offset();
            // SAFETY: both blocks belong to this head; from is behind to, so rows do not overlap.
            unsafe {
                for d in 0..dim {
                    *target.add(d * BLOCK_TOKENS + to) = *source.add(d * BLOCK_TOKENS + from);
                }
                std::ptr::copy(source.add(values + from * dim), target.add(values + to * dim), dim);
            }
        });
    }
    for (to, from) in kept.iter().enumerate() {
        head.positions[to] = head.positions[*from as usize];
        if !head.tally.is_empty() {
            head.tally[to] = head.tally[*from as usize];
        }
    }
    head.positions.truncate(kept.len());
    head.tally.truncate(kept.len());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::append::{AppendItem, append};
    use crate::kv::KvFormat;

    #[test]
    fn selection_by_hand() {
        let positions = [0, 1, 2, 3, 4, 5, 6];
        let scores = [0.0, 5.0, 5.0, f32::NAN, 1.0, 9.0, 0.0];
        let protect = Protect { sinks: 1, recent: 1 };
        // 0 and 6 are protected, 5 is the best, then the first of the two fives.
        assert_eq!(select(&positions, &scores, 7, 4, protect), [0, 1, 5, 6]);
        // NaN is the last that stays.
        assert_eq!(select(&positions, &scores, 7, 6, protect), [0, 1, 2, 4, 5, 6]);
        // More protected than room: sinks, then the newest.
        let protect = Protect { sinks: 2, recent: 3 };
        assert_eq!(select(&positions, &scores, 7, 3, protect), [0, 1, 6]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn what_stays_is_what_was_there(
            tokens in 1..200usize, keep in 0..210usize, sinks in 0..6u32, recent in 0..40u32, seed in 0..1000u32,
        ) {
            let threads = Threads::new(2);
            let mut pool = BlockPool::new(8, KvFormat::F16, 1 << 24);
            let mut heads = vec![HeadCache::default(), HeadCache::default()];
            let qkv: Vec<f32> = (0..tokens * 40).map(|i| (i % 1013) as f32).collect();
            let mut items = [AppendItem { heads: &mut heads, first_row: 0, rows: tokens, first_position: 0 }];
            append(&threads, &mut pool, &mut items, &qkv, 40, 8, 24, 8).expect("room");
            let before: Vec<_> = (0..tokens).map(|t| (heads[1].key(&pool, t), heads[1].value(&pool, t))).collect();
            let scores: Vec<Vec<f32>> = (0..2u32)
                .map(|h| (0..tokens as u32).map(|t| ((t * 7919 + seed * 31 + h) % 17) as f32).collect())
                .collect();
            let protect = Protect { sinks, recent };
            let mut items = [EvictItem { heads: &mut heads, seen: tokens as u32, keep }];
            evict(&threads, &mut pool, &mut items, &scores, protect);
            let stays = keep.min(tokens);
            prop_assert_eq!(heads[1].tokens(), stays);
            prop_assert_eq!(pool.held_bytes(), 2 * stays.div_ceil(BLOCK_TOKENS) as u64 * pool.block_bytes());
            let kept = &heads[1].positions;
            prop_assert!(kept.windows(2).all(|w| w[0] < w[1]));
            for (i, position) in kept.iter().enumerate() {
                let (key, value) = &before[*position as usize];
                prop_assert_eq!(&heads[1].key(&pool, i), key);
                prop_assert_eq!(&heads[1].value(&pool, i), value);
            }
            if stays >= (sinks + recent) as usize {
                for p in (0..sinks).chain((tokens as u32).saturating_sub(recent)..tokens as u32) {
                    prop_assert!(p as usize >= tokens || kept.contains(&p), "{p} is protected");
                }
                let free = |p: u32| p >= sinks && p < (tokens as u32).saturating_sub(recent);
                let score = |p: &u32| scores[1][*p as usize];
                let worst = kept.iter().filter(|p| free(**p)).map(score).fold(f32::INFINITY, f32::min);
                let best_gone = (0..tokens as u32).filter(|p| free(*p) && !kept.contains(p)).map(|p| score(&p)).fold(f32::NEG_INFINITY, f32::max);
                prop_assert!(worst >= best_gone);
            }
        }
    }
}
