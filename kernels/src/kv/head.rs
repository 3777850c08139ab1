//! The cache of one KV head.

use half::f16;

use super::pool::blocks;
use super::{BLOCK_TOKENS, BlockPool, Half, KvFormat, PoolFull};
use crate::simd::{bf16_bits, fp8_bits, fp8_value};

/// The keys or the values of a head, half-block by half-block.
#[derive(Debug, Default)]
pub struct Halves {
    /// Halves of numbers in the pool's format, in the order of their tokens. Reserved ones beyond the tokens come last.
    pub(crate) whole: Vec<Half>,
}

impl Halves {
    /// Number of halves.
    #[must_use]
    pub fn count(&self) -> usize {
        self.whole.len()
    }

    /// Bytes of the halves.
    #[must_use]
    pub fn held_bytes(&self, pool: &BlockPool) -> u64 {
        self.whole.len() as u64 * pool.half_bytes()
    }

    fn missing(&self, tokens: usize) -> usize {
        blocks(tokens).saturating_sub(self.whole.len())
    }
}

/// The cached tokens of one KV head of one layer of one sequence.
#[derive(Debug, Default)]
pub struct HeadCache {
    /// Keys.
    pub keys: Halves,
    /// Values.
    pub values: Halves,
    /// Original positions of the tokens, ascending.
    pub positions: Vec<u32>,
    /// Accumulated attention per token, where something accumulates it; may lag behind the tokens.
    pub tally: Vec<f32>,
}

impl HeadCache {
    /// Tokens in the cache.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.positions.len()
    }

    /// Bytes of its halves.
    #[must_use]
    pub fn held_bytes(&self, pool: &BlockPool) -> u64 {
        self.keys.held_bytes(pool) + self.values.held_bytes(pool)
    }

    /// Bytes that are missing for `extra_tokens` more.
    pub(crate) fn missing_bytes(&self, pool: &BlockPool, extra_tokens: usize) -> u64 {
        let tokens = self.tokens() + extra_tokens;
        (self.keys.missing(tokens) + self.values.missing(tokens)) as u64 * pool.half_bytes()
    }

    /// Takes halves until `extra_tokens` more fit.
    ///
    /// # Errors
    /// If the budget has no room; nothing is taken then.
    pub fn reserve(&mut self, pool: &mut BlockPool, extra_tokens: usize) -> Result<(), PoolFull> {
        let tokens = self.tokens() + extra_tokens;
        let (mut keys, mut values) = (self.keys.missing(tokens), self.values.missing(tokens));
        if keys + values == 0 {
            return Ok(());
        }
        pool.check_room(self.missing_bytes(pool, extra_tokens))?;
        // Keys and values of a block lie next to each other where the pool is fresh.
        while keys + values > 0 {
            if keys >= values {
                self.keys.whole.push(pool.try_alloc()?);
                keys -= 1;
            } else {
                self.values.whole.push(pool.try_alloc()?);
                values -= 1;
            }
        }
        Ok(())
    }

    /// Drops all tokens and gives all halves back.
    pub fn clear(&mut self, pool: &mut BlockPool) {
        self.truncate(pool, 0);
    }

    /// Keeps the first `tokens` tokens and gives back the halves that they don't need.
    pub fn truncate(&mut self, pool: &mut BlockPool, tokens: usize) {
        self.positions.truncate(tokens);
        self.tally.truncate(tokens);
        let needed = blocks(self.tokens());
        // Last one first, so that the pool hands them out in their old order.
        let (keys, values) = (&mut self.keys.whole, &mut self.values.whole);
        while keys.len().max(values.len()) > needed {
            let last = if values.len() >= keys.len() { values.pop() } else { keys.pop() };
            if let Some(half) = last {
                pool.free(half);
            }
        }
    }

    /// Replaces the contents by `tokens` made-up tokens at positions from 0, for timings without a prompt.
    ///
    /// # Errors
    /// If the budget has no room; the cache is empty then.
    pub fn fill(&mut self, pool: &mut BlockPool, tokens: usize) -> Result<(), PoolFull> {
        self.clear(pool);
        self.reserve(pool, tokens)?;
        self.positions.extend(0..tokens as u32);
        for (block, half) in self.keys.whole.iter().chain(&self.values.whole).enumerate() {
            let base = pool.ptr(*half);
            for index in 0..pool.head_dim() * BLOCK_TOKENS {
                let hash = (index as u32 + 1)
                    .wrapping_mul(0x9e37_79b9)
                    .wrapping_add((block as u32).wrapping_mul(0x85eb_ca6b));
                // SAFETY: a half has so many numbers, and it is this head's alone.
                unsafe {
                    write(pool.format(), base, index, ((hash >> 16) as f32 / 32_768.0) - 1.0);
                };
            }
        }
        Ok(())
    }

    /// The key of a token.
    ///
    /// # Panics
    /// If there is no such token.
    #[must_use]
    pub fn key(&self, pool: &BlockPool, token: usize) -> Vec<f32> {
        assert!(token < self.tokens(), "token {token} of {}", self.tokens());
        let base = pool.ptr(self.keys.whole[token / BLOCK_TOKENS]);
        // SAFETY: a half has so many numbers.
        let at = |d| unsafe { read(pool.format(), base, d * BLOCK_TOKENS + token % BLOCK_TOKENS) };
        (0..pool.head_dim()).map(at).collect()
    }

    /// The value of a token.
    ///
    /// # Panics
    /// If there is no such token.
    #[must_use]
    pub fn value(&self, pool: &BlockPool, token: usize) -> Vec<f32> {
        assert!(token < self.tokens(), "token {token} of {}", self.tokens());
        let base = pool.ptr(self.values.whole[token / BLOCK_TOKENS]);
        // SAFETY: a half has so many numbers.
        let at =
            |d| unsafe { read(pool.format(), base, token % BLOCK_TOKENS * pool.head_dim() + d) };
        (0..pool.head_dim()).map(at).collect()
    }
}

/// # Safety
/// `base` has a number at `index`.
pub(super) unsafe fn read(format: KvFormat, base: *const u8, index: usize) -> f32 {
    // SAFETY: by the contract.
    unsafe {
        match format {
            KvFormat::F32 => *base.cast::<f32>().add(index),
            KvFormat::F16 => f16::from_bits(*base.cast::<u16>().add(index)).to_f32(),
            KvFormat::Bf16 => f32::from_bits(u32::from(*base.cast::<u16>().add(index)) << 16),
            KvFormat::Fp8 => fp8_value(*base.add(index)),
        }
    }
}

/// # Safety
/// `base` has a writable number at `index`.
unsafe fn write(format: KvFormat, base: *mut u8, index: usize, x: f32) {
    // SAFETY: by the contract.
    unsafe {
        match format {
            KvFormat::F32 => base.cast::<f32>().add(index).write(x),
            KvFormat::F16 => base.cast::<u16>().add(index).write(f16::from_f32(x).to_bits()),
            KvFormat::Bf16 => base.cast::<u16>().add(index).write(bf16_bits(x)),
            KvFormat::Fp8 => base.add(index).write(fp8_bits(x)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_hard_and_the_peak_is_kept() {
        // One half: 64 x 32 x 2 bytes = 4096.
        let mut pool = BlockPool::new(64, KvFormat::F16, 3 * 8192 + 100);
        assert_eq!(pool.half_bytes(), 4096);
        let mut head = HeadCache::default();
        head.reserve(&mut pool, 33).expect("two blocks fit");
        assert_eq!((head.keys.count(), head.values.count(), pool.held_bytes()), (2, 2, 16_384));
        let full = head.reserve(&mut pool, 128).expect_err("four blocks don't fit");
        assert_eq!(full, PoolFull { requested: 16_384, held: 16_384, budget: 24_676 });
        assert_eq!(head.held_bytes(&pool), 16_384);
        assert!(!full.to_string().contains('\n'));
        head.clear(&mut pool);
        assert_eq!((pool.held_bytes(), pool.peak_bytes()), (0, 16_384));
        pool.reset_peak();
        assert_eq!(pool.peak_bytes(), 0);
    }

    #[test]
    fn truncation_frees_whole_blocks_only() {
        let mut pool = BlockPool::new(8, KvFormat::Bf16, 1 << 20);
        let mut head = HeadCache::default();
        head.fill(&mut pool, 100).expect("room");
        assert_eq!((head.keys.count(), head.tokens()), (4, 100));
        let (key, value) = (head.key(&pool, 40), head.value(&pool, 40));
        head.truncate(&mut pool, 64);
        assert_eq!((head.keys.count(), head.values.count(), head.tokens()), (2, 2, 64));
        assert_eq!((head.key(&pool, 40), head.value(&pool, 40)), (key.clone(), value));
        assert!(key.iter().all(|x| x.abs() <= 1.0));
        assert_ne!(key, head.key(&pool, 41));
    }
}
