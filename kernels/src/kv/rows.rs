//! Tokens as bytes, on their way to slower memory and back.

use std::ops::Range;

use super::{BLOCK_TOKENS, BlockPool, HeadCache, PoolFull};

impl BlockPool {
    /// Bytes of a token's key and value.
    #[must_use]
    pub fn token_bytes(&self) -> usize {
        2 * self.half_bytes() as usize / BLOCK_TOKENS
    }

    /// Bytes of a number.
    fn width(&self) -> usize {
        self.half_bytes() as usize / BLOCK_TOKENS / self.head_dim()
    }
}

impl HeadCache {
    /// Appends the key and the value of each of these tokens to `out`, as they are stored.
    ///
    /// # Panics
    /// If one of them is not there, packed or pruned.
    pub fn copy_out(&self, pool: &BlockPool, tokens: Range<usize>, out: &mut Vec<u8>) {
        let narrow = self.keys.narrow_tokens.max(self.values.narrow_tokens);
        assert!(
            tokens.start >= narrow && tokens.end <= self.tokens(),
            "no whole tokens {tokens:?}"
        );
        let (dim, width) = (pool.head_dim(), pool.width());
        for token in tokens {
            let (block, lane) = (token / BLOCK_TOKENS, token % BLOCK_TOKENS);
            let key = pool.ptr(self.keys.whole[block - self.keys.whole_base()]);
            let value = pool.ptr(self.values.whole[block - self.values.whole_base()]);
            // SAFETY: a half has a number per channel and lane, keys in rows of lanes, values in rows of channels.
            unsafe {
                for d in 0..dim {
                    let number = key.add((d * BLOCK_TOKENS + lane) * width);
                    out.extend_from_slice(std::slice::from_raw_parts(number, width));
                }
                let row = value.add(lane * dim * width);
                out.extend_from_slice(std::slice::from_raw_parts(row, dim * width));
            }
        }
    }

    /// Replaces the contents of a cache of whole tokens by these, with room for `room` in all. Halves that it has stay.
    ///
    /// # Errors
    /// If the budget has no room; the cache is empty then.
    ///
    /// # Panics
    /// If tokens are packed or pruned, or `rows` are not those of so many tokens.
    pub fn put(
        &mut self,
        pool: &mut BlockPool,
        positions: &[u32],
        rows: &[u8],
        room: usize,
    ) -> Result<(), PoolFull> {
        assert!(self.is_plain(), "packed or pruned tokens are not replaced");
        let bytes = pool.token_bytes();
        assert_eq!(rows.len(), positions.len() * bytes, "not one row per token");
        self.positions.clear();
        self.tally.clear();
        self.reserve(pool, room.max(positions.len()))?;
        let (dim, width) = (pool.head_dim(), pool.width());
        for (token, row) in rows.chunks_exact(bytes.max(1)).enumerate() {
            let (block, lane) = (token / BLOCK_TOKENS, token % BLOCK_TOKENS);
            let (key, value) = row.split_at(bytes / 2);
            // SAFETY: the halves are this cache's alone and have room for the token, as above.
            unsafe {
                let out = pool.ptr(self.keys.whole[block]);
                for (d, number) in key.chunks_exact(width).enumerate() {
                    let at = out.add((d * BLOCK_TOKENS + lane) * width);
                    std::ptr::copy_nonoverlapping(number.as_ptr(), at, width);
                }
                let at = pool.ptr(self.values.whole[block]).add(lane * dim * width);
                std::ptr::copy_nonoverlapping(value.as_ptr(), at, dim * width);
            }
        }
        self.positions.extend_from_slice(positions);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::KvFormat;

    #[test]
    fn tokens_come_back_as_they_went() {
        for format in [KvFormat::F32, KvFormat::Bf16, KvFormat::Fp8] {
            let mut pool = BlockPool::new(16, format, 1 << 20);
            let (mut from, mut to) = (HeadCache::default(), HeadCache::default());
            from.fill(&mut pool, 70).expect("room");
            let mut rows = Vec::new();
            for token in [69, 3, 40] {
                from.copy_out(&pool, token..token + 1, &mut rows);
            }
            assert_eq!(rows.len(), 3 * pool.token_bytes());
            to.put(&mut pool, &[69, 3, 40], &rows, 33).expect("room");
            // Room for 33: two blocks of keys, two of values.
            assert_eq!(to.held_bytes(&pool), 4 * pool.half_bytes());
            for (slot, token) in [69, 3, 40].into_iter().enumerate() {
                assert_eq!(to.key(&pool, slot), from.key(&pool, token));
                assert_eq!(to.value(&pool, slot), from.value(&pool, token));
            }
            to.put(&mut pool, &[], &[], 1).expect("room");
            assert_eq!(to.tokens(), 0);
        }
    }
}
