//! Pruning: the channels of keys that matter least to the scores are dropped from the oldest tokens.

#[cfg(test)]
mod tests;

use crate::attend::AttendShape;
use crate::buffer::Scratch;
use crate::kv::{BLOCK_TOKENS, BlockPool, Half, Halves, HeadCache, PoolFull, with_format};
use crate::rank::keys::Keys;
use crate::simd::{LANES, Simd, Source, isa, multiversion};
use crate::threads::{Disjoint, Threads};

/// The caches of one sequence in one layer, with its query rows of this step.
pub struct ChannelItem<'a> {
    /// Caches of its KV heads.
    pub heads: &'a [HeadCache],
    /// Its first row.
    pub first_row: usize,
    /// Its rows.
    pub rows: usize,
}

/// Chooses the channels that stay: `kept[item * kv_heads + head]` are those of a head, ascending. A channel's score is the
/// mean of its squares in the queries of the last `window` rows (or all, if there are fewer) and the group's heads, times
/// the mean of its squares in all cached keys; the `drop` channels with the lowest go. Among equals the lower channel goes
/// first, and a score that is not a number is the highest.
///
/// # Panics
/// If the sizes do not fit each other, or `drop` exceeds the channels.
#[expect(clippy::too_many_arguments, reason = "the layout of a fused row")]
#[must_use]
pub fn rank_channels(
    threads: &Threads,
    pool: &BlockPool,
    items: &[ChannelItem<'_>],
    window: usize,
    drop: usize,
    shape: &AttendShape,
    qkv: &[f32],
    qkv_width: usize,
) -> Vec<Vec<u16>> {
    shape.check(pool, qkv, qkv_width);
    let dim = shape.head_dim;
    assert!(drop <= dim, "{drop} of {dim} channels dropped");
    for item in items {
        let last = item.first_row + item.rows;
        shape.check_item(item.heads.len(), last, qkv.len() / qkv_width);
    }
    let mut kept = vec![Vec::new(); items.len() * shape.kv_heads];
    let count = kept.len();
    let isa = isa();
    let out = Disjoint::new(&mut kept);
    threads.run(count, |i| {
        let (item, head) = (&items[i / shape.kv_heads], i % shape.kv_heads);
        let mut scores = vec![0.0; dim];
        // SAFETY: one score per channel; the halves are the head's own.
        unsafe {
            let head = &item.heads[head];
            with_format!(pool.format(), key_squares::<B>(isa, pool, head, &mut scores));
        }
        let mut squares = vec![0.0f32; dim];
        let last = window.min(item.rows);
        for row in item.first_row + item.rows - last..item.first_row + item.rows {
            let from = row * qkv_width + head * shape.group() * dim;
            for query in qkv[from..from + shape.group() * dim].chunks_exact(dim) {
                squares.iter_mut().zip(query).for_each(|(sum, q)| *sum += q * q);
            }
        }
        let factor = 1.0 / (last * shape.group()).max(1) as f32;
        scores.iter_mut().zip(squares).for_each(|(score, sum)| *score *= sum * factor);
        let mut order: Vec<u16> = (0..dim as u16).collect();
        // Scores are squares, so infinity stands above all of them.
        let key = |d: &u16| {
            let score = scores[usize::from(*d)];
            if score.is_nan() { f32::INFINITY } else { score }
        };
        order.sort_by(|a, b| key(a).total_cmp(&key(b)));
        let mut stay = order.split_off(drop);
        stay.sort_unstable();
        // SAFETY: each task has its own head's channels.
        unsafe { *out.item_mut(i) = stay };
    });
    kept
}

multiversion! {
    /// The mean of each channel's squares over the cached keys.
    ///
    /// # Safety
    /// One score per channel; nobody writes the head's halves.
    unsafe fn key_squares<B: Source>(pool: &BlockPool, head: &HeadCache, scores: &mut [f32]) = key_squares_body
}

#[inline(always)]
unsafe fn key_squares_body<S: Simd, B: Source>(
    s: S,
    pool: &BlockPool,
    head: &HeadCache,
    scores: &mut [f32],
) {
    let (dim, tokens, zero) = (pool.head_dim(), head.tokens(), s.splat(0.0));
    let mut keys = Keys::new(pool, head);
    let mut scratch = Scratch::take(dim * LANES);
    let sums = scratch.floats();
    sums.fill(0.0);
    for at in (0..tokens).step_by(LANES) {
        // SAFETY: there is a token at `at`; sums have a vector per channel.
        unsafe {
            let sixteen = keys.at::<S, B>(s, at);
            for d in 0..dim {
                let key = s.keep(sixteen.channel::<S, B>(s, d), 0, (tokens - at) as isize, zero);
                let sum = sums.as_mut_ptr().add(d * LANES);
                s.store(sum, s.mul_add(key, key, s.load(sum)));
            }
        }
    }
    for (score, sum) in scores.iter_mut().zip(sums.chunks_exact(LANES)) {
        // SAFETY: a whole vector.
        *score = unsafe { s.sum(s.load(sum.as_ptr())) } / tokens.max(1) as f32;
    }
}

/// The caches of one sequence in one layer, and what of their keys shall stay.
pub struct PruneItem<'a> {
    /// Caches of its KV heads.
    pub heads: &'a mut [HeadCache],
    /// The channels that stay, per head, ascending. Once a head has pruned keys they are settled.
    pub kept: &'a [Vec<u16>],
    /// The first so many tokens shall lack the other channels, or all if there are fewer. What is pruned stays so.
    pub tokens: usize,
}

/// Drops channels from the keys of the first tokens. Attention then is what it would be if those channels of these keys were
/// zero. Halves of 32 keys hold the channels that stay and no others; keys that are packed after lack them too.
///
/// # Errors
/// If the budget has no room for the pruned halves beside those that remain; nothing is changed then.
///
/// # Panics
/// If channels are missing, out of order or others than those a head has, or keys were packed with all channels.
pub fn prune(
    threads: &Threads,
    pool: &mut BlockPool,
    items: &mut [PruneItem<'_>],
) -> Result<(), PoolFull> {
    let dim = pool.head_dim();
    let mut work = Vec::new();
    let (mut freed, mut wanted) = (0, 0);
    for item in items.iter_mut() {
        assert_eq!(item.heads.len(), item.kept.len(), "channels are not those of the heads");
        for (head, kept) in item.heads.iter_mut().zip(item.kept) {
            let rising = kept.windows(2).all(|w| w[0] < w[1]);
            let inside = kept.last().is_some_and(|c| usize::from(*c) < dim);
            assert!(rising && inside, "no channels {kept:?} of {dim}");
            let keys = &head.keys;
            let narrow = item.tokens.min(head.positions.len());
            if narrow <= keys.narrow_tokens {
                continue;
            }
            match keys.kept.as_deref() {
                Some(old) => assert!(old == kept, "a head has other channels"),
                None => assert!(keys.packed_tokens == 0, "keys were packed with all channels"),
            }
            let needed = Halves::needed(keys.packed_tokens, narrow, head.positions.len());
            let bytes = pool.format().half_bytes(kept.len());
            let moved = narrow / BLOCK_TOKENS - keys.whole_base();
            let surplus =
                if needed[2] == 0 { keys.whole.len() } else { moved.min(keys.whole.len()) };
            wanted += ((needed[1] - keys.pruned.len()) * bytes) as u64;
            freed += surplus as u64 * pool.half_bytes();
            work.push(Work { head, kept, narrow, pruned: needed[1], bytes, surplus });
        }
    }
    pool.exchange(freed, wanted)?;
    for work in &mut work {
        let keys = &mut work.head.keys;
        keys.kept.get_or_insert_with(|| work.kept.clone().into_boxed_slice());
        while keys.pruned.len() < work.pruned {
            keys.pruned.push(pool.try_alloc_bytes(work.bytes)?);
        }
    }
    let (shared, count) = (&*pool, work.len());
    let parts = Disjoint::new(&mut work);
    threads.run(count, |i| {
        // SAFETY: each task has its own head.
        unsafe {
            let work = parts.item_mut(i);
            match shared.format().bytes() {
                4 => drop_channels::<u32>(shared, work),
                1 => drop_channels::<u8>(shared, work),
                _ => drop_channels::<u16>(shared, work),
            }
        }
    });
    // The free lists have one order for any number of threads.
    for Work { head, narrow, surplus, .. } in work {
        let gone: Vec<Half> = head.keys.whole.drain(..surplus).collect();
        gone.into_iter().rev().for_each(|h| pool.recycle(h));
        head.keys.narrow_tokens = narrow;
    }
    Ok(())
}

struct Work<'a> {
    head: &'a mut HeadCache,
    kept: &'a Vec<u16>,
    narrow: usize,
    /// Pruned halves in the end.
    pruned: usize,
    /// Bytes of one.
    bytes: usize,
    /// Whole halves that go.
    surplus: usize,
}

/// Copies the channels that stay of the keys that become pruned.
///
/// # Safety
/// The head has pruned halves for them, and nobody else uses its halves; `T` has the size of the format.
unsafe fn drop_channels<T: Copy>(pool: &BlockPool, work: &Work<'_>) {
    let keys = &work.head.keys;
    let mut at = keys.narrow_tokens;
    while at < work.narrow {
        let block = at / BLOCK_TOKENS;
        let end = ((block + 1) * BLOCK_TOKENS).min(work.narrow);
        // SAFETY: both halves hold the block; one has all channels, the other those that stay.
        unsafe {
            let from = pool.ptr(keys.whole[block - keys.whole_base()]).cast::<T>();
            let to = pool.ptr(keys.pruned[block - keys.packed_tokens / BLOCK_TOKENS]).cast::<T>();
            for (row, channel) in work.kept.iter().enumerate() {
                std::ptr::copy_nonoverlapping(
                    from.add(usize::from(*channel) * BLOCK_TOKENS + at % BLOCK_TOKENS),
                    to.add(row * BLOCK_TOKENS + at % BLOCK_TOKENS),
                    end - at,
                );
            }
        }
        at = end;
    }
}
