//! Packing: the oldest tokens of a cache become codes of a few bits.

mod direct;
pub(crate) mod encode;
#[cfg(test)]
pub(crate) mod tests;

pub use direct::append_packed;

use crate::kv::{BLOCK_TOKENS, BlockPool, Codec, Half, Halves, HeadCache, PoolFull};
use crate::simd::isa;
use crate::threads::{Disjoint, Threads};

/// The caches of one sequence in one layer, and how far they shall be packed.
pub struct PackItem<'a> {
    /// Caches of its KV heads.
    pub heads: &'a mut [HeadCache],
    /// The first so many tokens shall have packed keys, or all if there are fewer. What is packed stays so.
    pub keys: usize,
    /// The first so many tokens shall have packed values, or all.
    pub values: usize,
}

/// Packs the keys and the values of the first tokens, and gives back the halves that are no longer needed.
///
/// Keys along channels are best packed in whole groups of tokens. Tokens that are packed as part of a group and then have
/// others join them (because a count was not whole groups, or because an eviction left such a rest) are packed anew from
/// what their codes stand for. Keys of pruned channels are dropped. Keys and values may be packed differently, in two calls.
///
/// Bytes held change once, by the difference: they never count a token twice.
///
/// # Errors
/// If the budget has no room for the packed halves beside those that remain; nothing is changed then. (A packed half that
/// holds a single token yet may well be more than is given back.)
///
/// # Panics
/// If there are no such codes, or tokens are packed otherwise already.
pub fn pack(
    threads: &Threads,
    pool: &mut BlockPool,
    items: &mut [PackItem<'_>],
    codec: Codec,
) -> Result<(), PoolFull> {
    assert!(codec.is_valid(), "no codes like {codec:?}");
    let mut work = Vec::new();
    let (mut freed, mut wanted) = (0, 0);
    for item in items.iter_mut() {
        for head in item.heads.iter_mut() {
            let tokens = head.tokens();
            let plan = |side: &Halves, count: usize| {
                let packed = count.min(tokens).max(side.packed_tokens);
                let narrow = packed.max(side.narrow_tokens);
                Plan { packed, narrow, needed: Halves::needed(packed, narrow, tokens) }
            };
            let (keys, values) = (plan(&head.keys, item.keys), plan(&head.values, item.values));
            if keys.packed == head.keys.packed_tokens && values.packed == head.values.packed_tokens
            {
                continue;
            }
            let key_bytes = codec.key_half_bytes(head.narrow_channels(pool));
            let value_bytes = codec.value_half_bytes(pool.head_dim());
            for (side, plan, bytes) in
                [(&head.keys, &keys, key_bytes), (&head.values, &values, value_bytes)]
            {
                if plan.packed > side.packed_tokens {
                    let other = side.codec.filter(|c| side.packed_tokens > 0 && *c != codec);
                    assert!(other.is_none(), "tokens are packed as {other:?}, not as {codec:?}");
                    wanted += (plan.needed[0] - side.packed.len()) * bytes;
                    freed += plan.surplus(side).iter().map(|h| pool.bytes_of(*h)).sum::<u64>();
                }
            }
            work.push(Work { head, keys, values, key_bytes, value_bytes });
        }
    }
    pool.exchange(freed, wanted as u64)?;
    for work in &mut work {
        grow(pool, &mut work.head.keys, &work.keys, work.key_bytes, codec)?;
        grow(pool, &mut work.head.values, &work.values, work.value_bytes, codec)?;
    }
    let count = work.len();
    let isa = isa();
    let shared = &*pool;
    let parts = Disjoint::new(&mut work);
    threads.run(count, |i| {
        // SAFETY: each task has a head of its own.
        let work = unsafe { parts.item_mut(i) };
        encode::head(isa, shared, work.head, work.keys.packed, work.values.packed);
    });
    // The free lists have one order for any number of threads.
    for Work { head, keys, values, .. } in work {
        settle(pool, &mut head.keys, &keys);
        settle(pool, &mut head.values, &values);
    }
    Ok(())
}

/// What becomes of a side.
struct Plan {
    packed: usize,
    narrow: usize,
    needed: [usize; 3],
}

impl Plan {
    /// Pruned and whole halves to drop at the front, or all where none is needed.
    fn drops(&self, side: &Halves) -> [usize; 2] {
        let moved = |from: usize, to: usize| to / BLOCK_TOKENS - from / BLOCK_TOKENS;
        let of = |list: &[Half], moved: usize, needed: usize| {
            if needed == 0 { list.len() } else { moved.min(list.len()) }
        };
        [
            of(&side.pruned, moved(side.packed_tokens, self.packed), self.needed[1]),
            of(&side.whole, moved(side.narrow_tokens, self.narrow), self.needed[2]),
        ]
    }

    fn surplus(&self, side: &Halves) -> Vec<Half> {
        let [pruned, whole] = self.drops(side);
        side.pruned[..pruned].iter().chain(&side.whole[..whole]).copied().collect()
    }
}

struct Work<'a> {
    head: &'a mut HeadCache,
    keys: Plan,
    values: Plan,
    key_bytes: usize,
    value_bytes: usize,
}

/// Takes the packed halves that are missing.
fn grow(
    pool: &mut BlockPool,
    side: &mut Halves,
    plan: &Plan,
    bytes: usize,
    codec: Codec,
) -> Result<(), PoolFull> {
    if plan.packed > side.packed_tokens {
        side.codec = Some(codec);
        while side.packed.len() < plan.needed[0] {
            side.packed.push(pool.try_alloc_bytes(bytes)?);
        }
    }
    Ok(())
}

/// Drops the halves that are packed now.
fn settle(pool: &mut BlockPool, side: &mut Halves, plan: &Plan) {
    if plan.packed > side.packed_tokens {
        let [pruned, whole] = plan.drops(side);
        let surplus = side.pruned.drain(..pruned).chain(side.whole.drain(..whole));
        // Last one first: the next one taken is then the one after those that remain.
        surplus.collect::<Vec<_>>().into_iter().rev().for_each(|h| pool.recycle(h));
        (side.packed_tokens, side.narrow_tokens) = (plan.packed, plan.narrow);
    }
}
