//! Partial caches: copies of the best tokens of a cache, into which new tokens come and from which the worst leave.
//!
//! They lie in the pool of the caches that they are copied from, in the order of the tokens at first; a token that comes
//! takes the place of the one that leaves. So attention over a partial cache that holds everything is attention over the
//! cache, bit for bit.

use std::collections::VecDeque;

use super::gather;
use crate::evict::{Protect, best};
use crate::kv::{BLOCK_TOKENS, BlockPool, HeadCache, KvFormat, PoolFull};
use crate::threads::{Disjoint, Threads};

/// The tokens of a partial cache by their place in it, the first to leave first.
pub type LeavingOrder = VecDeque<u32>;

/// The partial cache of one head.
pub struct PartItem<'a> {
    /// The cache.
    pub head: &'a HeadCache,
    /// The partial one.
    pub part: &'a mut HeadCache,
    /// Who leaves it when.
    pub order: &'a mut LeavingOrder,
    /// Tokens that it holds; one more before another leaves.
    pub keep: usize,
}

impl PartItem<'_> {
    /// Takes what is missing until the partial cache has room for `keep` tokens and one more, or all and one more.
    fn make_room(&mut self, pool: &mut BlockPool) -> Result<(), PoolFull> {
        let room = self.keep.min(self.head.tokens()) + 1;
        self.part.reserve(pool, room.saturating_sub(self.part.tokens()))
    }
}

/// Fills partial caches with the newest and the best other tokens of their caches; among equal scores the lower position
/// is better. The worst will leave first, the newest last. `scores` are those of the items.
///
/// # Errors
/// If the budget has no room; the partial caches at fault are empty then.
///
/// # Panics
/// If there is not one score per token, or a cache is not in the pool's plain format.
pub fn refresh(
    threads: &Threads,
    pool: &mut BlockPool,
    items: &mut [PartItem<'_>],
    scores: &[Vec<f32>],
) -> Result<(), PoolFull> {
    assert!(scores.len() >= items.len(), "not one list of scores per head");
    for item in items.iter_mut() {
        assert!(item.head.is_plain(), "packed or pruned tokens are not copied");
        item.order.clear();
        item.part.positions.clear();
        item.make_room(pool)?;
    }
    let (pool, count) = (&*pool, items.len());
    let work = Disjoint::new(items);
    threads.run(count, |i| {
        // SAFETY: each task has its own item.
        let item = unsafe { work.item_mut(i) };
        let positions = &item.head.positions;
        let newest = Protect { sinks: 0, recent: 1 };
        let seen = positions.last().map_or(0, |p| p + 1);
        let kept = best(&scores[i], positions, seen, item.keep, newest);
        let mut order: Vec<u32> = (0..kept.len() as u32).collect();
        let last = order.pop();
        let score = |slot: &u32| scores[i][kept[*slot as usize] as usize];
        // Of equal ones the later is worse.
        order.sort_by(|a, b| score(a).total_cmp(&score(b)).then(b.cmp(a)));
        item.order.extend(order.into_iter().chain(last));
        // SAFETY: the part is this task's alone, and has room.
        unsafe { gather(pool, item.head, &kept, pool, item.part) };
    });
    Ok(())
}

/// Copies the newest token of each cache into its partial cache, in the place of the first to leave once that holds `keep`
/// tokens and one more.
///
/// # Errors
/// If the budget has no room.
///
/// # Panics
/// If a cache is empty or not in the pool's plain format.
pub fn append_part(
    threads: &Threads,
    pool: &mut BlockPool,
    items: &mut [PartItem<'_>],
) -> Result<(), PoolFull> {
    for item in items.iter_mut() {
        assert!(item.head.is_plain() && item.head.tokens() > 0, "no whole newest token");
        item.make_room(pool)?;
    }
    let (pool, count) = (&*pool, items.len());
    let work = Disjoint::new(items);
    threads.run(count, |i| {
        // SAFETY: each task has its own item.
        let item = unsafe { work.item_mut(i) };
        let newest = item.head.tokens() - 1;
        let full = item.part.tokens() > item.keep;
        let leaves = if full { item.order.pop_front() } else { None };
        let slot = leaves.map_or(item.part.tokens(), |slot| slot as usize);
        let position = item.head.positions[newest];
        match item.part.positions.get_mut(slot) {
            Some(old) => *old = position,
            None => item.part.positions.push(position),
        }
        item.order.push_back(slot as u32);
        // SAFETY: the part is this task's alone and has room for the slot; the element has the format's size.
        unsafe {
            match pool.format() {
                KvFormat::F32 => copy_one::<u32>(pool, item.head, newest, item.part, slot),
                KvFormat::F16 | KvFormat::Bf16 => {
                    copy_one::<u16>(pool, item.head, newest, item.part, slot);
                }
                KvFormat::Fp8 => copy_one::<u8>(pool, item.head, newest, item.part, slot),
            }
        }
    });
    Ok(())
}

/// Copies one token.
///
/// # Safety
/// Both tokens have a place in their caches, of which nobody else uses `to`; `T` has the size of the format.
unsafe fn copy_one<T: Copy>(
    pool: &BlockPool,
    from: &HeadCache,
    token: usize,
    to: &HeadCache,
    slot: usize,
) {
    let dim = pool.head_dim();
    let place = |token: usize| (token / BLOCK_TOKENS, token % BLOCK_TOKENS);
    let ((a, lane), (b, at)) = (place(token), place(slot));
    // SAFETY: the caller's contract; keys have a row of a block's tokens per channel, values one of channels per token.
    unsafe {
        let (key, out) = (
            pool.ptr(from.keys.whole[a]).cast::<T>().add(lane),
            pool.ptr(to.keys.whole[b]).cast::<T>().add(at),
        );
        for d in 0..dim {
            *out.add(d * BLOCK_TOKENS) = *key.add(d * BLOCK_TOKENS);
        }
        let value = pool.ptr(from.values.whole[a]).cast::<T>().add(lane * dim);
        let out = pool.ptr(to.values.whole[b]).cast::<T>().add(at * dim);
        std::ptr::copy_nonoverlapping(value, out, dim);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attend::AttendShape;
    use crate::testing::Layer;

    fn layer(tokens: usize) -> Layer {
        let shape = AttendShape {
            heads: 1,
            kv_heads: 1,
            head_dim: 8,
            scale: 0.3,
            softcap: None,
            window: None,
        };
        let mut layer = Layer::new(1, shape, KvFormat::F16);
        layer.feed(3, &[tokens]);
        layer
    }

    #[test]
    fn the_worst_leave_first_and_newcomers_last() {
        let mut layer = layer(6);
        let (mut part, mut order) = (HeadCache::default(), LeavingOrder::new());
        let scores = [vec![0.5, 0.1, 0.3, 0.3, 0.2, 0.0]];
        let mut all = Vec::new();
        for step in 0..5 {
            if step > 0 {
                layer.feed(3, &[1]);
            }
            let [heads] = layer.caches.as_mut_slice() else { panic!("one sequence") };
            let item = PartItem { head: &heads[0], part: &mut part, order: &mut order, keep: 3 };
            if step == 0 {
                refresh(&layer.threads, &mut layer.pool, &mut [item], &scores).expect("room");
            } else {
                append_part(&layer.threads, &mut layer.pool, &mut [item]).expect("room");
            }
            for (slot, position) in part.positions.iter().enumerate() {
                let token = *position as usize;
                assert_eq!(part.key(&layer.pool, slot), heads[0].key(&layer.pool, token));
                assert_eq!(part.value(&layer.pool, slot), heads[0].value(&layer.pool, token));
            }
            let mut sorted = part.positions.clone();
            sorted.sort_unstable();
            all.push(sorted);
        }
        // The newest, 5, and the best two others, of which 2 stays before 3; then 2 leaves, then 0, then 5 for newer ones.
        let expected: [&[u32]; 5] =
            [&[0, 2, 5], &[0, 2, 5, 6], &[0, 5, 6, 7], &[5, 6, 7, 8], &[6, 7, 8, 9]];
        assert_eq!(all, expected);
        // Room for three and one more: a block for keys, one for values, here and in the cache.
        assert_eq!(layer.pool.held_bytes(), 4 * layer.pool.half_bytes());
    }

    #[test]
    fn with_room_a_partial_cache_is_the_cache() {
        let mut layer = layer(40);
        let (mut part, mut order) = (HeadCache::default(), LeavingOrder::new());
        let scores = [vec![0.0; 40]];
        let heads = &layer.caches[0];
        let item = PartItem { head: &heads[0], part: &mut part, order: &mut order, keep: 99 };
        refresh(&layer.threads, &mut layer.pool, &mut [item], &scores).expect("room");
        for _ in 0..30 {
            layer.feed(3, &[1]);
            let heads = &layer.caches[0];
            let item = PartItem { head: &heads[0], part: &mut part, order: &mut order, keep: 99 };
            append_part(&layer.threads, &mut layer.pool, &mut [item]).expect("room");
        }
        assert_eq!(part.positions, layer.caches[0][0].positions);
    }
}
