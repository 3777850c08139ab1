//! The paged KV cache.
//!
//! One block holds K and V of 32 tokens of one KV head of one layer of one sequence: K transposed as `[head_dim][32]`, then
//! V as `[32][head_dim]`. So a K block is a ready right factor for scores and a V block one for outputs, and every head can
//! keep tokens of its own. All blocks come from one pool with a hard byte budget.

use std::fmt;

use crate::buffer::AlignedBytes;
use crate::simd::bf16_bits;
use half::f16;

/// Tokens of a block.
pub const BLOCK_TOKENS: usize = 32;

/// Slabs are about this large: big enough that the system maps each by itself, small enough to follow the use.
const SLAB_BYTES: usize = 3 << 19;

/// The number format of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvFormat {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// Brain floats.
    Bf16,
}

impl KvFormat {
    /// Bytes of a number.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            KvFormat::F32 => 4,
            KvFormat::F16 | KvFormat::Bf16 => 2,
        }
    }
}

/// Calls a function generic over the source of a format.
macro_rules! with_format {
    ($format:expr, $call:ident :: <B> ($($arg:expr),* $(,)?)) => {
        match $format {
            $crate::kv::KvFormat::F32 => $call::<$crate::simd::F32>($($arg),*),
            $crate::kv::KvFormat::F16 => $call::<$crate::simd::F16>($($arg),*),
            $crate::kv::KvFormat::Bf16 => $call::<$crate::simd::Bf16>($($arg),*),
        }
    };
}
pub(crate) use with_format;

/// A block of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockId(u32);

/// The budget does not hold what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolFull {
    /// Bytes asked for.
    pub requested: u64,
    /// Bytes held then.
    pub held: u64,
    /// The budget.
    pub budget: u64,
}

impl fmt::Display for PoolFull {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { requested, held, budget } = self;
        write!(
            f,
            "the KV cache budget of {budget} bytes has no room for {requested} more beside {held} held"
        )
    }
}

impl std::error::Error for PoolFull {}

/// All cache blocks of a run.
pub struct BlockPool {
    head_dim: usize,
    format: KvFormat,
    budget: u64,
    block_bytes: usize,
    slab_blocks: usize,
    slabs: Vec<AlignedBytes>,
    /// Blocks given back, the last one on top: it is the one most likely in a cache.
    free: Vec<BlockId>,
    /// Blocks ever handed out; those beyond have never been touched.
    fresh: usize,
    held: usize,
    peak: usize,
}

impl BlockPool {
    /// An empty pool of blocks for heads of this many channels.
    ///
    /// # Panics
    /// Unless `head_dim` is a multiple of 8 up to 256.
    #[must_use]
    pub fn new(head_dim: usize, format: KvFormat, budget_bytes: u64) -> Self {
        assert!(
            head_dim > 0 && head_dim.is_multiple_of(8) && head_dim <= 256,
            "head_dim {head_dim}"
        );
        let block_bytes = 2 * head_dim * BLOCK_TOKENS * format.bytes();
        Self {
            head_dim,
            format,
            budget: budget_bytes,
            block_bytes,
            slab_blocks: (SLAB_BYTES / block_bytes).max(1),
            slabs: Vec::new(),
            free: Vec::new(),
            fresh: 0,
            held: 0,
            peak: 0,
        }
    }

    /// Channels of a head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Number format.
    #[must_use]
    pub fn format(&self) -> KvFormat {
        self.format
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes as u64
    }

    /// Bytes of the blocks in use.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        (self.held * self.block_bytes) as u64
    }

    /// Most bytes in use since the start or [`Self::reset_peak`].
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        (self.peak * self.block_bytes) as u64
    }

    /// The budget.
    #[must_use]
    pub fn budget_bytes(&self) -> u64 {
        self.budget
    }

    /// Starts the peak anew from what is held.
    pub fn reset_peak(&mut self) {
        self.peak = self.held;
    }

    /// Takes a block, contents unspecified.
    ///
    /// # Errors
    /// If the budget has no room for it.
    pub fn try_alloc(&mut self) -> Result<BlockId, PoolFull> {
        self.check_room(1)?;
        let id = self.free.pop().unwrap_or_else(|| {
            let index = self.fresh;
            if index / self.slab_blocks == self.slabs.len() {
                let within = (self.budget / self.block_bytes as u64) as usize - index;
                self.slabs
                    .push(AlignedBytes::zeroed(self.slab_blocks.min(within) * self.block_bytes));
            }
            self.fresh += 1;
            BlockId(u32::try_from(index).expect("more than 2^32 blocks"))
        });
        self.held += 1;
        self.peak = self.peak.max(self.held);
        Ok(id)
    }

    /// Whether `blocks` more fit.
    pub(crate) fn check_room(&self, blocks: usize) -> Result<(), PoolFull> {
        let requested = (blocks * self.block_bytes) as u64;
        if self.held_bytes() + requested > self.budget {
            return Err(PoolFull { requested, held: self.held_bytes(), budget: self.budget });
        }
        Ok(())
    }

    /// Gives a block back.
    pub fn free(&mut self, block: BlockId) {
        debug_assert!((block.0 as usize) < self.fresh, "a block of another pool");
        self.held -= 1;
        self.free.push(block);
    }

    /// Address of a block's K part.
    #[inline]
    pub(crate) fn key_ptr(&self, block: BlockId) -> *mut u8 {
        let index = block.0 as usize;
        let slab = &self.slabs[index / self.slab_blocks];
        // SAFETY: a slab has room for each of its blocks.
        unsafe { slab.as_ptr().add(index % self.slab_blocks * self.block_bytes) }
    }

    /// Address of a block's V part.
    #[inline]
    pub(crate) fn value_ptr(&self, block: BlockId) -> *mut u8 {
        // SAFETY: the V part is the second half of the block.
        unsafe { self.key_ptr(block).add(self.block_bytes / 2) }
    }

    fn read(&self, base: *const u8, index: usize) -> f32 {
        // SAFETY: the callers' index lies inside the block part that `base` starts.
        unsafe {
            match self.format {
                KvFormat::F32 => *base.cast::<f32>().add(index),
                KvFormat::F16 => f16::from_bits(*base.cast::<u16>().add(index)).to_f32(),
                KvFormat::Bf16 => f32::from_bits(u32::from(*base.cast::<u16>().add(index)) << 16),
            }
        }
    }

    fn write(&mut self, base: *mut u8, index: usize, x: f32) {
        // SAFETY: as in `read`; the pool is borrowed mutably.
        unsafe {
            match self.format {
                KvFormat::F32 => base.cast::<f32>().add(index).write(x),
                KvFormat::F16 => base.cast::<u16>().add(index).write(f16::from_f32(x).to_bits()),
                KvFormat::Bf16 => base.cast::<u16>().add(index).write(bf16_bits(x)),
            }
        }
    }
}

/// The cached tokens of one KV head of one layer of one sequence.
#[derive(Debug, Default)]
pub struct HeadCache {
    /// Blocks, in the order of their tokens. Reserved ones beyond the tokens come last.
    pub blocks: Vec<BlockId>,
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

    /// Bytes of its blocks.
    #[must_use]
    pub fn held_bytes(&self, pool: &BlockPool) -> u64 {
        self.blocks.len() as u64 * pool.block_bytes()
    }

    /// Blocks that are missing for `extra_tokens` more.
    pub(crate) fn missing_blocks(&self, extra_tokens: usize) -> usize {
        (self.tokens() + extra_tokens).div_ceil(BLOCK_TOKENS).saturating_sub(self.blocks.len())
    }

    /// Takes blocks until `extra_tokens` more fit.
    ///
    /// # Errors
    /// If the budget has no room; nothing is taken then.
    pub fn reserve(&mut self, pool: &mut BlockPool, extra_tokens: usize) -> Result<(), PoolFull> {
        let missing = self.missing_blocks(extra_tokens);
        pool.check_room(missing)?;
        for _ in 0..missing {
            self.blocks.push(pool.try_alloc()?);
        }
        Ok(())
    }

    /// Drops all tokens and gives all blocks back.
    pub fn clear(&mut self, pool: &mut BlockPool) {
        self.truncate(pool, 0);
    }

    /// Keeps the first `tokens` tokens and gives back the blocks that they don't need.
    pub fn truncate(&mut self, pool: &mut BlockPool, tokens: usize) {
        self.positions.truncate(tokens);
        self.tally.truncate(tokens);
        let needed = self.tokens().div_ceil(BLOCK_TOKENS);
        // Last one first, so that the pool hands them out in their old order.
        while self.blocks.len() > needed {
            if let Some(block) = self.blocks.pop() {
                pool.free(block);
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
        for block in &self.blocks {
            let (base, numbers) = (pool.key_ptr(*block), pool.block_bytes / pool.format.bytes());
            for index in 0..numbers {
                let hash = (index as u32 + 1).wrapping_mul(0x9e37_79b9).wrapping_add(block.0 << 20);
                let x = ((hash >> 16) as f32 / 32_768.0) - 1.0;
                pool.write(base, index, x);
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
        let base = pool.key_ptr(self.blocks[token / BLOCK_TOKENS]);
        (0..pool.head_dim)
            .map(|d| pool.read(base, d * BLOCK_TOKENS + token % BLOCK_TOKENS))
            .collect()
    }

    /// The value of a token.
    ///
    /// # Panics
    /// If there is no such token.
    #[must_use]
    pub fn value(&self, pool: &BlockPool, token: usize) -> Vec<f32> {
        assert!(token < self.tokens(), "token {token} of {}", self.tokens());
        let base = pool.value_ptr(self.blocks[token / BLOCK_TOKENS]);
        (0..pool.head_dim)
            .map(|d| pool.read(base, token % BLOCK_TOKENS * pool.head_dim + d))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_hard_and_the_peak_is_kept() {
        // One block: 2 x 64 x 32 x 2 bytes = 8192.
        let mut pool = BlockPool::new(64, KvFormat::F16, 3 * 8192 + 100);
        assert_eq!(pool.block_bytes(), 8192);
        let mut head = HeadCache::default();
        head.reserve(&mut pool, 33).expect("two blocks fit");
        assert_eq!((head.blocks.len(), pool.held_bytes()), (2, 16_384));
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
    fn freed_blocks_come_back_last_in_first_out() {
        let mut pool = BlockPool::new(8, KvFormat::F32, 1 << 20);
        let a = pool.try_alloc().expect("room");
        let b = pool.try_alloc().expect("room");
        pool.free(a);
        pool.free(b);
        assert_eq!(pool.try_alloc().expect("room"), b);
        assert_eq!(pool.try_alloc().expect("room"), a);
    }

    #[test]
    fn truncation_frees_whole_blocks_only() {
        let mut pool = BlockPool::new(8, KvFormat::Bf16, 1 << 20);
        let mut head = HeadCache::default();
        head.fill(&mut pool, 100).expect("room");
        assert_eq!((head.blocks.len(), head.tokens()), (4, 100));
        let key = head.key(&pool, 40);
        head.truncate(&mut pool, 64);
        assert_eq!((head.blocks.len(), head.tokens()), (2, 64));
        assert_eq!(head.key(&pool, 40), key);
        assert!(key.iter().all(|x| x.abs() <= 1.0));
    }

    #[test]
    fn slabs_never_exceed_the_budget() {
        let mut pool = BlockPool::new(256, KvFormat::F32, 70 * 65_536);
        while pool.try_alloc().is_ok() {}
        assert_eq!(pool.held_bytes(), 70 * 65_536);
        assert_eq!(pool.slabs.iter().map(|s| s.len() as u64).sum::<u64>(), 70 * 65_536);
    }
}
