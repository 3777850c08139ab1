//! The paged KV cache: blocks of 32 tokens of one (sequence, layer, KV head), from a pool with a hard byte budget.
//!
//! A block holds K transposed, `[head_dim][32]`, then V, `[32][head_dim]`: K is a ready panel for the scores of 32 keys, V
//! one for their weighted sum, so attention reads both in one stream.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::fmt;

use crate::simd::Element;

/// Tokens of a block.
pub const BLOCK_TOKENS: usize = 32;
/// Slabs are about this large: small enough to follow the need, large enough to be taken rarely.
const SLAB_BYTES: usize = 1 << 20;

/// Element types of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvFormat {
    /// 32-bit float.
    F32,
    /// binary16.
    F16,
    /// bfloat16.
    Bf16,
}

impl KvFormat {
    /// Bytes of one element.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// Runs `$body` with `$element` as the Rust type of a format.
macro_rules! with_element {
    ($format:expr, $element:ident => $body:expr) => {
        match $format {
            $crate::kv::KvFormat::F32 => {
                type $element = f32;
                $body
            }
            $crate::kv::KvFormat::F16 => {
                type $element = $crate::simd::Half;
                $body
            }
            $crate::kv::KvFormat::Bf16 => {
                type $element = $crate::simd::Brain;
                $body
            }
        }
    };
}
pub(crate) use with_element;

/// A block of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockId(u32);

/// The pool has no room for what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolFull {
    /// Bytes that were asked for.
    pub requested: u64,
    /// Bytes that are held.
    pub held: u64,
    /// Bytes that are allowed.
    pub budget: u64,
}

impl fmt::Display for PoolFull {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the KV pool is full: {} bytes more were asked for, {} of {} are held",
            self.requested, self.held, self.budget
        )
    }
}

impl std::error::Error for PoolFull {}

/// Blocks under a hard byte budget.
pub struct BlockPool {
    head_dim: usize,
    format: KvFormat,
    budget: u64,
    held: u64,
    peak: u64,
    slabs: Vec<*mut u8>,
    blocks_per_slab: usize,
    made: u32,
    free: Vec<BlockId>,
}

// SAFETY: the slabs are owned by the pool; threads reach blocks only through heads that own them alone.
unsafe impl Send for BlockPool {}
// SAFETY: as above; `&BlockPool` gives addresses, and who may write them is decided by the owners of the heads.
unsafe impl Sync for BlockPool {}

impl BlockPool {
    /// An empty pool. Nothing is taken from the system before the first block.
    #[must_use]
    pub fn new(head_dim: usize, format: KvFormat, budget_bytes: u64) -> Self {
        let block = Self::bytes_of_block(head_dim, format);
        Self {
            head_dim,
            format,
            budget: budget_bytes,
            held: 0,
            peak: 0,
            slabs: Vec::new(),
            blocks_per_slab: (SLAB_BYTES / block).max(1),
            made: 0,
            free: Vec::new(),
        }
    }

    fn bytes_of_block(head_dim: usize, format: KvFormat) -> usize {
        2 * BLOCK_TOKENS * head_dim * format.bytes()
    }

    /// Bytes of one block.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        Self::bytes_of_block(self.head_dim, self.format) as u64
    }

    /// Element type.
    #[must_use]
    pub fn format(&self) -> KvFormat {
        self.format
    }

    /// Channels per head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Bytes of the blocks that are out.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.held
    }

    /// The most that were out at once.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        self.peak
    }

    /// The limit.
    #[must_use]
    pub fn budget_bytes(&self) -> u64 {
        self.budget
    }

    /// Counts the peak from now on.
    pub fn reset_peak(&mut self) {
        self.peak = self.held;
    }

    /// Whether `blocks` more stay within the budget.
    pub(crate) fn check(&self, blocks: usize) -> Result<(), PoolFull> {
        let requested = blocks as u64 * self.block_bytes();
        if self.held.saturating_add(requested) > self.budget {
            return Err(PoolFull { requested, held: self.held, budget: self.budget });
        }
        Ok(())
    }

    /// Takes a block.
    pub fn try_alloc(&mut self) -> Result<BlockId, PoolFull> {
        self.check(1)?;
        self.held += self.block_bytes();
        self.peak = self.peak.max(self.held);
        if let Some(id) = self.free.pop() {
            return Ok(id);
        }
        if (self.made as usize).is_multiple_of(self.blocks_per_slab) {
            let layout = self.slab_layout();
            // SAFETY: the layout is not empty.
            let slab = unsafe { alloc(layout) };
            if slab.is_null() {
                handle_alloc_error(layout);
            }
            self.slabs.push(slab);
        }
        let id = BlockId(self.made);
        self.made += 1;
        Ok(id)
    }

    /// Gives a block back.
    pub fn free(&mut self, id: BlockId) {
        self.held -= self.block_bytes();
        self.free.push(id);
    }

    fn slab_layout(&self) -> Layout {
        let bytes = self.blocks_per_slab * self.block_bytes() as usize;
        Layout::from_size_align(bytes, 64).expect("a slab is far below isize::MAX")
    }

    /// The keys of a block, `[head_dim][32]`; the values follow them.
    #[inline(always)]
    pub(crate) fn block<E: Element>(&self, id: BlockId) -> *mut E {
        let (slab, index) =
            (id.0 as usize / self.blocks_per_slab, id.0 as usize % self.blocks_per_slab);
        // SAFETY: the block was handed out, so its slab exists and holds it.
        unsafe { self.slabs[slab].add(index * self.block_bytes() as usize).cast() }
    }

    /// Elements from the start of a block to its values.
    #[inline(always)]
    pub(crate) fn value_offset(&self) -> usize {
        self.head_dim * BLOCK_TOKENS
    }
}

impl Drop for BlockPool {
    fn drop(&mut self) {
        let layout = self.slab_layout();
        for slab in &self.slabs {
            // SAFETY: each slab came from `alloc` with this layout.
            unsafe { dealloc(*slab, layout) };
        }
    }
}

/// The cache of one (sequence, layer, KV head).
#[derive(Debug, Default)]
pub struct HeadCache {
    /// Its blocks, in order.
    pub blocks: Vec<BlockId>,
    /// Original position of each token, ascending.
    pub positions: Vec<u32>,
    /// Running attention of each token; empty unless a score needs it.
    pub tally: Vec<f32>,
}

impl HeadCache {
    /// Tokens cached.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.positions.len()
    }

    /// Bytes of its blocks.
    #[must_use]
    pub fn held_bytes(&self, pool: &BlockPool) -> u64 {
        self.blocks.len() as u64 * pool.block_bytes()
    }

    /// Blocks that `extra` more tokens need.
    pub(crate) fn missing_blocks(&self, extra: usize) -> usize {
        (self.tokens() + extra).div_ceil(BLOCK_TOKENS).saturating_sub(self.blocks.len())
    }

    /// Takes blocks so that `extra` more tokens fit, or none.
    pub fn reserve(&mut self, pool: &mut BlockPool, extra: usize) -> Result<(), PoolFull> {
        let missing = self.missing_blocks(extra);
        pool.check(missing)?;
        for _ in 0..missing {
            self.blocks.push(pool.try_alloc()?);
        }
        Ok(())
    }

    /// Gives everything back.
    pub fn clear(&mut self, pool: &mut BlockPool) {
        self.truncate(pool, 0);
        *self = Self::default();
    }

    /// Forgets the tokens behind the first `tokens` and gives their blocks back.
    pub fn truncate(&mut self, pool: &mut BlockPool, tokens: usize) {
        self.positions.truncate(tokens);
        self.tally.truncate(tokens);
        let blocks = tokens.div_ceil(BLOCK_TOKENS).min(self.blocks.len());
        for id in self.blocks.drain(blocks..) {
            pool.free(id);
        }
    }

    /// Fills an empty cache with made-up tokens, so that a kernel can be timed over a long one.
    pub fn fill(&mut self, pool: &mut BlockPool, tokens: usize) -> Result<(), PoolFull> {
        self.clear(pool);
        self.reserve(pool, tokens)?;
        let elements = 2 * pool.value_offset();
        for &id in &self.blocks {
            with_element!(pool.format(), E => {
                let block: *mut E = pool.block(id);
                for i in 0..elements {
                    let value = ((i * 37 + id.0 as usize * 11) % 97) as f32 / 97.0 - 0.5;
                    // SAFETY: the block has this many elements and belongs to this head.
                    unsafe { block.add(i).write(E::narrow(value)) };
                }
            });
        }
        self.positions.extend(0..tokens as u32);
        Ok(())
    }

    /// The key of a token, widened.
    #[must_use]
    pub fn key(&self, pool: &BlockPool, token: usize) -> Vec<f32> {
        self.element(pool, token, |d| d * BLOCK_TOKENS + token % BLOCK_TOKENS)
    }

    /// The value of a token, widened.
    #[must_use]
    pub fn value(&self, pool: &BlockPool, token: usize) -> Vec<f32> {
        let (dim, start) = (pool.head_dim, pool.value_offset());
        self.element(pool, token, |d| start + (token % BLOCK_TOKENS) * dim + d)
    }

    fn element(&self, pool: &BlockPool, token: usize, at: impl Fn(usize) -> usize) -> Vec<f32> {
        assert!(token < self.tokens(), "token {token} of {}", self.tokens());
        let id = self.blocks[token / BLOCK_TOKENS];
        with_element!(pool.format, E => {
            let block: *const E = pool.block::<E>(id);
            // SAFETY: the offset is inside the block, and the token was written.
            (0..pool.head_dim).map(|d| unsafe { *block.add(at(d)) }.widen()).collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_hard() {
        // One block: 2 x 32 x 64 x 2 bytes = 8,192.
        let mut pool = BlockPool::new(64, KvFormat::F16, 20_000);
        let a = pool.try_alloc().expect("8192 of 20000");
        let _b = pool.try_alloc().expect("16384 of 20000");
        let error = pool.try_alloc().expect_err("24576 of 20000");
        assert_eq!(error, PoolFull { requested: 8192, held: 16_384, budget: 20_000 });
        pool.free(a);
        assert_eq!((pool.held_bytes(), pool.peak_bytes()), (8192, 16_384));
        assert_eq!(pool.try_alloc().expect("room again"), a);
    }

    #[test]
    fn reserving_takes_whole_blocks_or_nothing() {
        let mut pool = BlockPool::new(64, KvFormat::F16, 2 * 8192);
        let mut head = HeadCache::default();
        head.reserve(&mut pool, 33).expect("two blocks");
        assert_eq!(pool.held_bytes(), 2 * 8192);
        assert!(head.reserve(&mut pool, 65).is_err());
        assert_eq!(pool.held_bytes(), 2 * 8192);
        head.clear(&mut pool);
        assert_eq!(pool.held_bytes(), 0);
    }
}
