//! Eviction: the best tokens of each head stay, in place and in order.

mod mixed;
mod turn;
mod within;

use std::cell::Cell;
use std::ops::Range;

use crate::kv::{BLOCK_TOKENS, BlockPool, HeadCache, PoolFull};
use crate::simd::{Isa, isa};
use crate::threads::{Disjoint, Threads};
use mixed::Mixed;
pub use turn::Turning;
pub use within::{WithinItem, within};

/// Tokens that stay whatever their score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Protect {
    /// Those at the first positions of the sequence.
    pub sinks: u32,
    /// Those at its last positions.
    pub recent: u32,
}

/// The caches of one sequence in one layer.
pub struct EvictItem<'a> {
    /// Caches of its KV heads.
    pub heads: &'a mut [HeadCache],
    /// Tokens of the sequence so far, dropped ones included.
    pub seen: u32,
    /// Tokens that each head keeps.
    pub keep: Vec<usize>,
}

/// Keeps the `keep` best tokens of each head, where protected ones are best of all. Among equals the lower position stays;
/// a score that is not a number is the worst. If there are more protected tokens than `keep`, the sinks stay first, then
/// the most recent. Tokens keep their order, and halves that they no longer need go back to the pool.
///
/// Values that are packed move with their scales, and so do keys packed token by token. Keys packed along channels whose
/// group loses a token, and all those behind, are grouped and packed anew from what their codes stand for, which adds an
/// error of up to half a step of the new codes each time. What forms the tokens have does not change.
///
/// `scores[item * kv_heads + head]` has one score per cached token; it may be shorter where nothing has to go. With
/// `turning`, the keys of whole tokens that move up are rotated from their old place in the cache to the new one.
///
/// # Errors
/// If the budget has no room: forms end inside a block at other places than before, so that a cache of several forms may
/// need a half more. Nothing is changed then. A cache of whole tokens never needs more.
///
/// # Panics
/// If scores are missing, or keys that are to be turned are packed or pruned.
pub fn evict(
    threads: &Threads,
    pool: &mut BlockPool,
    items: &mut [EvictItem<'_>],
    scores: &[Vec<f32>],
    protect: Protect,
    turning: Option<Turning<'_>>,
) -> Result<(), PoolFull> {
    let mut work = Vec::new();
    let mut index = 0;
    for item in items.iter_mut() {
        assert_eq!(item.keep.len(), item.heads.len(), "not one number of tokens per head");
        for (head, keep) in item.heads.iter_mut().zip(item.keep.iter().copied()) {
            if head.tokens() > keep {
                assert!(
                    scores.get(index).is_some_and(|s| s.len() == head.tokens()),
                    "scores are missing"
                );
                work.push(Work {
                    head,
                    scores: &scores[index],
                    seen: item.seen,
                    keep,
                    kept: Vec::new(),
                    mixed: None,
                });
            }
            index += 1;
        }
    }
    let count = work.len();
    let isa = isa();
    let plain = work.iter().all(|w| w.head.is_plain());
    assert!(plain || turning.is_none(), "packed or pruned keys are not turned");
    if plain {
        let shared = &*pool;
        let parts = Disjoint::new(&mut work);
        threads.run(count, |i| {
            // SAFETY: each task has its own head, and a half belongs to one head.
            unsafe {
                let work = parts.item_mut(i);
                work.kept = best(work.scores, &work.head.positions, work.seen, work.keep, protect);
                compact(isa, shared, work);
                if let Some(turning) = turning {
                    turning.turn(shared, work.head, &work.kept);
                }
            }
        });
    } else {
        let parts = Disjoint::new(&mut work);
        threads.run(count, |i| {
            // SAFETY: each task has its own head.
            let work = unsafe { parts.item_mut(i) };
            work.kept = best(work.scores, &work.head.positions, work.seen, work.keep, protect);
        });
        mixed::plan(pool, &mut work)?;
        let shared = &*pool;
        let parts = Disjoint::new(&mut work);
        threads.run(count, |i| {
            // SAFETY: each task has its own head, and a half belongs to one head.
            unsafe { compact(isa, shared, parts.item_mut(i)) };
        });
    }
    // The free list has one order for any number of threads.
    for work in work {
        match work.mixed {
            None => work.head.truncate(pool, work.keep),
            Some(mixed) => mixed.settle(pool, work.head, work.keep),
        }
    }
    Ok(())
}

struct Work<'a> {
    head: &'a mut HeadCache,
    scores: &'a [f32],
    seen: u32,
    keep: usize,
    /// Indices of the tokens that stay, ascending.
    kept: Vec<u32>,
    /// Where they go, if they are not all whole.
    mixed: Option<Mixed>,
}

/// A number that sorts like (protection, score, lower position first); no two tokens have the same.
fn rank_key(score: f32, index: usize, position: u32, seen: u32, protect: Protect) -> u64 {
    let earlier = u64::from(u32::MAX - index as u32);
    if position < protect.sinks {
        return u64::from(u32::MAX) << 32 | earlier;
    }
    if position >= seen.saturating_sub(protect.recent) {
        return u64::from(u32::MAX - 1) << 32 | index as u64;
    }
    let score = if score.is_nan() { f32::NEG_INFINITY } else { score };
    // Adding zero makes -0 equal to 0. Negative numbers sort backwards by their bits.
    let bits = (score + 0.0).to_bits();
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(ordered) << 32 | earlier
}

fn rank_keys(
    scores: &[f32],
    positions: &[u32],
    seen: u32,
    protect: Protect,
) -> impl Iterator<Item = u64> {
    let of = move |(i, (score, position)): (usize, (&f32, &u32))| {
        rank_key(*score, i, *position, seen, protect)
    };
    scores.iter().zip(positions).enumerate().map(of)
}

/// How many tokens each head of a layer keeps if they share `heads.len() * mean`: every head its `guaranteed` best, then
/// the best of all heads together, among equals those of the lower head. `heads` are scores and positions.
#[must_use]
pub fn share(
    heads: &[(&[f32], &[u32])],
    seen: u32,
    mean: usize,
    guaranteed: usize,
    protect: Protect,
) -> Vec<usize> {
    let mut rest: Vec<(u64, usize)> = Vec::new();
    let mut keep = Vec::with_capacity(heads.len());
    for (head, (scores, positions)) in heads.iter().enumerate() {
        let mut keys: Vec<u64> = rank_keys(scores, positions, seen, protect).collect();
        keys.sort_unstable_by(|a, b| b.cmp(a));
        let sure = guaranteed.min(mean).min(keys.len());
        keep.push(sure);
        // What is compared between heads is the score alone: the lower half of a key is the place in its own head.
        rest.extend(keys[sure..].iter().map(|key| (key >> 32, head)));
    }
    let left = (heads.len() * mean).saturating_sub(keep.iter().sum());
    // Stable: equal scores stay in the order of the heads, and within a head of their places.
    rest.sort_by_key(|(score, _)| std::cmp::Reverse(*score));
    for (_, head) in rest.into_iter().take(left) {
        keep[head] += 1;
    }
    keep
}

/// Indices of the `keep` best of some tokens, ascending: by score, protected ones first, the lower index among equals.
///
/// # Panics
/// If there is not one score per position.
#[must_use]
pub fn best(
    scores: &[f32],
    positions: &[u32],
    seen: u32,
    keep: usize,
    protect: Protect,
) -> Vec<u32> {
    assert_eq!(scores.len(), positions.len(), "not one score per position");
    if keep == 0 {
        return Vec::new();
    }
    let keep = keep.min(positions.len());
    let [mut keys, mut order] = KEYS.take();
    keys.clear();
    keys.extend(rank_keys(scores, positions, seen, protect));
    order.clone_from(&keys);
    let (_, least, _) = order.select_nth_unstable_by(keep - 1, |a, b| b.cmp(a));
    let least = *least;
    let mut kept = Vec::with_capacity(keep);
    kept.extend((0..).zip(&keys).filter(|(_, key)| **key >= least).map(|(i, _): (u32, _)| i));
    KEYS.set([keys, order]);
    kept
}

thread_local! {
    /// The memory of the keys of [`best`], for its next call on this thread.
    static KEYS: Cell<[Vec<u64>; 2]> = const { Cell::new([Vec::new(), Vec::new()]) };
}

/// Moves the tokens that stay to the front, keys and values with them.
///
/// # Safety
/// Nobody else uses the head's halves.
unsafe fn compact(isa: Isa, pool: &BlockPool, work: &mut Work<'_>) {
    let kept = &work.kept;
    let head = &mut *work.head;
    if !head.tally.is_empty() {
        // Tokens that came after the last tally have received nothing yet.
        head.tally.resize(head.positions.len(), 0.0);
    }
    for (to, from) in kept.iter().enumerate() {
        head.positions[to] = head.positions[*from as usize];
        if !head.tally.is_empty() {
            head.tally[to] = head.tally[*from as usize];
        }
    }
    // Tokens up to the first gap are in place.
    let moved = (0u32..).zip(kept).position(|(to, from)| to != *from).unwrap_or(kept.len());
    // SAFETY: the caller's contract.
    unsafe {
        if let Some(mixed) = &work.mixed {
            mixed.move_all(isa, pool, head, kept, moved);
            return;
        }
        match pool.format().bytes() {
            4 => move_tokens::<u32>(pool, head, kept, moved..kept.len()),
            1 => move_tokens::<u8>(pool, head, kept, moved..kept.len()),
            _ => move_tokens::<u16>(pool, head, kept, moved..kept.len()),
        }
    }
}

/// Moves token `kept[i]` to place i for each i in `range`.
///
/// # Safety
/// As [`compact`]; `T` has the size of the format.
unsafe fn move_tokens<T: Copy + Default>(
    pool: &BlockPool,
    head: &HeadCache,
    kept: &[u32],
    range: Range<usize>,
) {
    let dim = pool.head_dim();
    let keys_at = |token: usize| pool.ptr(head.keys.whole[token / BLOCK_TOKENS]).cast::<T>();
    let values_at = |token: usize| {
        // SAFETY: the half has a row for each of its tokens.
        unsafe {
            pool.ptr(head.values.whole[token / BLOCK_TOKENS])
                .cast::<T>()
                .add(token % BLOCK_TOKENS * dim)
        }
    };
    let mut at = range.start;
    while at < range.end {
        let end = (at / BLOCK_TOKENS * BLOCK_TOKENS + BLOCK_TOKENS).min(range.end);
        // SAFETY: all places lie in the head's halves. Sources never lie before their targets, so what a later move reads
        // is still there; a channel's row is collected before it is written.
        unsafe {
            let mut sources = [std::ptr::null::<T>(); BLOCK_TOKENS];
            for (source, from) in sources.iter_mut().zip(&kept[at..end]) {
                let from = *from as usize;
                *source = keys_at(from).add(from % BLOCK_TOKENS);
            }
            let count = end - at;
            let keys = keys_at(at).add(at % BLOCK_TOKENS);
            let mut row = [T::default(); BLOCK_TOKENS];
            for d in 0..dim {
                for (x, source) in row.iter_mut().zip(&sources[..count]) {
                    *x = *source.add(d * BLOCK_TOKENS);
                }
                std::ptr::copy_nonoverlapping(row.as_ptr(), keys.add(d * BLOCK_TOKENS), count);
            }
            let values = values_at(at);
            for (i, from) in kept[at..end].iter().enumerate() {
                if *from as usize != at + i {
                    std::ptr::copy_nonoverlapping(
                        values_at(*from as usize),
                        values.add(i * dim),
                        dim,
                    );
                }
            }
        }
        at = end;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::attend::AttendShape;
    use crate::kv::KvFormat;
    use crate::testing::{Layer, noise};

    fn layer(tokens: &[usize], dim: usize, format: KvFormat) -> Layer {
        let shape = AttendShape {
            heads: 2,
            kv_heads: 2,
            head_dim: dim,
            scale: 1.0,
            softcap: None,
            window: None,
        };
        let mut layer = Layer::new(tokens.len(), shape, format);
        layer.feed(11, tokens);
        layer
    }

    fn evict_all(layer: &mut Layer, keep: usize, scores: &[Vec<f32>], protect: Protect) {
        let mut items: Vec<EvictItem<'_>> = layer
            .caches
            .iter_mut()
            .zip(&layer.seen)
            .map(|(heads, seen)| {
                let keep = vec![keep; heads.len()];
                EvictItem { heads, seen: *seen, keep }
            })
            .collect();
        evict(&layer.threads, &mut layer.pool, &mut items, scores, protect, None).expect("room");
    }

    #[test]
    fn protection_order_ties_and_nan_by_hand() {
        let kept = |scores: [f32; 8], keep: usize, sinks: u32, recent: u32| {
            let mut layer = layer(&[8], 8, KvFormat::F32);
            let scores = vec![scores.to_vec(), vec![0.0; 8]];
            evict_all(&mut layer, keep, &scores, Protect { sinks, recent });
            // All equal: the lowest positions stay, beside the protected.
            layer.caches[0][0].positions.clone()
        };
        let scores = [0.0, 1.0, 5.0, f32::NAN, 2.0, 5.0, -0.0, 0.0];
        assert_eq!(kept(scores, 3, 0, 0), [2, 4, 5]);
        assert_eq!(kept(scores, 1, 0, 0), [2]);
        assert_eq!(kept(scores, 5, 0, 0), [0, 1, 2, 4, 5]);
        assert_eq!(kept(scores, 6, 0, 0), [0, 1, 2, 4, 5, 6]);
        assert_eq!(kept(scores, 7, 0, 0), [0, 1, 2, 4, 5, 6, 7]);
        assert_eq!(kept(scores, 4, 1, 2), [0, 2, 6, 7]);
        assert_eq!(kept([f32::NEG_INFINITY; 8], 3, 1, 1), [0, 1, 7]);
        assert_eq!(kept([f32::INFINITY; 8], 2, 1, 1), [0, 7]);
        // More protected than kept: sinks first, then the most recent.
        assert_eq!(kept(scores, 3, 2, 4), [0, 1, 7]);
        assert_eq!(kept(scores, 1, 2, 4), [0]);
        assert_eq!(kept(scores, 0, 2, 4), [] as [u32; 0]);
        assert_eq!(kept(scores, 99, 0, 0), [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn heads_share_by_score_and_each_has_its_guarantee() {
        let positions: Vec<u32> = (0..6).collect();
        let (low, high) = ([0.1, 0.2, 0.3, 0.2, 0.1, 0.0], [0.9, 0.2, 0.8, 0.7, 0.6, 0.5]);
        let heads = [(low.as_slice(), positions.as_slice()), (high.as_slice(), &positions)];
        let none = Protect::default();
        // Six in all: by score five are the upper head's, then .3 of the lower one.
        assert_eq!(share(&heads, 6, 3, 0, none), [1, 5]);
        assert_eq!(share(&heads, 6, 3, 2, none), [2, 4]);
        assert_eq!(share(&heads, 6, 3, 3, none), [3, 3]);
        // The newest of both go first; of the equal .2 the lower head's.
        assert_eq!(share(&heads, 6, 1, 0, Protect { sinks: 0, recent: 1 }), [1, 1]);
        assert_eq!(share(&heads, 6, 4, 0, none), [3, 5]);
        assert_eq!(share(&heads, 6, 9, 1, none), [6, 6]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn what_stays_is_the_best_unchanged_and_in_order(
            seed in any::<u64>(),
            tokens in prop::collection::vec(0usize..200, 3),
            dim in prop::sample::select(vec![8usize, 64, 80]),
            format in prop::sample::select(vec![KvFormat::F32, KvFormat::F16, KvFormat::Bf16, KvFormat::Fp8]),
            keep in 0usize..150,
            sinks in 0u32..6,
            recent in 0u32..40,
            levels in 2f32..50.0,
        ) {
            let mut layer = layer(&tokens, dim, format);
            let before: Vec<Vec<(Vec<f32>, Vec<f32>)>> = layer.caches.iter().flatten()
                .map(|h| (0..h.tokens()).map(|t| (h.key(&layer.pool, t), h.value(&layer.pool, t))).collect())
                .collect();
            let mut scores = Vec::new();
            for (i, head) in layer.caches.iter_mut().flatten().enumerate() {
                head.tally = (0..head.tokens()).map(|t| t as f32).collect();
                // Few levels make many ties.
                scores.push(noise(seed ^ i as u64, head.tokens()).iter().map(|x| (x * levels).round()).collect::<Vec<f32>>());
            }
            evict_all(&mut layer, keep, &scores, Protect { sinks, recent });
            let mut held = 0;
            for (i, head) in layer.caches.iter().flatten().enumerate() {
                let (all, seen) = (before[i].len(), layer.seen[i / 2]);
                prop_assert_eq!(head.tokens(), all.min(keep));
                prop_assert_eq!(head.keys.count(), head.tokens().div_ceil(BLOCK_TOKENS));
                held += head.held_bytes(&layer.pool);
                let value = |t: usize| {
                    if (t as u32) < sinks {
                        (2, 0.0)
                    } else if t as u32 >= seen.saturating_sub(recent) {
                        (1, t as f32)
                    } else {
                        (0, scores[i][t])
                    }
                };
                // By the definition; the sort is stable, so lower positions come first among equals.
                let mut order: Vec<usize> = (0..all).collect();
                order.sort_by(|a, b| value(*b).partial_cmp(&value(*a)).expect("no NaN"));
                order.truncate(keep);
                order.sort_unstable();
                prop_assert_eq!(&head.positions, &order.iter().map(|t| *t as u32).collect::<Vec<_>>());
                for (place, t) in order.iter().enumerate() {
                    prop_assert_eq!(&head.key(&layer.pool, place), &before[i][*t].0);
                    prop_assert_eq!(&head.value(&layer.pool, place), &before[i][*t].1);
                    prop_assert_eq!(head.tally[place], *t as f32);
                }
            }
            prop_assert_eq!(held, layer.pool.held_bytes());
        }
    }
}
