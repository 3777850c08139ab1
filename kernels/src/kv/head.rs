//! The cache of one KV head.

use half::f16;

use super::codec::{Codec, code_at};
use super::pool::blocks;
use super::{BLOCK_TOKENS, BlockPool, Half, KvFormat, PoolFull};
use crate::simd::{bf16_bits, fp8_bits, fp8_value};
use crate::state::State;

/// The keys or the values of a head, half-block by half-block. Packed tokens come first, then (keys only) pruned ones, then
/// whole ones; where two forms meet in a block, it has a half of each.
#[derive(Debug, Default)]
pub struct Halves {
    pub(crate) packed: Vec<Half>,
    pub(crate) pruned: Vec<Half>,
    /// Reserved ones beyond the tokens come last.
    pub(crate) whole: Vec<Half>,
    /// The first tokens, which are packed.
    pub(crate) packed_tokens: usize,
    /// The first tokens, which are packed or pruned.
    pub(crate) narrow_tokens: usize,
    /// How they are packed.
    pub(crate) codec: Option<Codec>,
    /// The channels of pruned and packed keys, ascending, if channels were pruned.
    pub(crate) kept: Option<Box<[u16]>>,
}

impl Halves {
    /// Number of halves.
    #[must_use]
    pub fn count(&self) -> usize {
        self.packed.len() + self.pruned.len() + self.whole.len()
    }

    /// The first so many tokens are packed.
    #[must_use]
    pub fn packed_tokens(&self) -> usize {
        self.packed_tokens
    }

    /// The first so many tokens are packed or lack the pruned channels.
    #[must_use]
    pub fn narrow_tokens(&self) -> usize {
        self.narrow_tokens
    }

    /// Bytes of the halves.
    #[must_use]
    pub fn held_bytes(&self, pool: &BlockPool) -> u64 {
        let all = self.packed.iter().chain(&self.pruned).chain(&self.whole);
        all.map(|h| pool.bytes_of(*h)).sum()
    }

    /// The block of the first whole half.
    #[inline(always)]
    pub(crate) fn whole_base(&self) -> usize {
        self.narrow_tokens / BLOCK_TOKENS
    }

    /// The first block with nothing but whole numbers.
    #[inline(always)]
    pub(crate) fn first_whole_block(&self) -> usize {
        blocks(self.narrow_tokens)
    }

    /// Whole halves that are missing for so many tokens.
    fn missing(&self, tokens: usize) -> usize {
        if tokens <= self.narrow_tokens {
            return 0;
        }
        (blocks(tokens) - self.whole_base()).saturating_sub(self.whole.len())
    }

    /// Halves of each form once `tokens` are left of which the first `packed` and `narrow` are that.
    pub(crate) fn needed(packed: usize, narrow: usize, tokens: usize) -> [usize; 3] {
        let between = |from: usize, to: usize| {
            if to > from { blocks(to) - from / BLOCK_TOKENS } else { 0 }
        };
        [blocks(packed), between(packed, narrow), between(narrow, tokens)]
    }

    /// Drops what lies beyond the first `tokens` tokens; last one first, so that the pool hands halves out in their old
    /// order. Whole ones are left to the caller, who knows how many: the number is returned.
    fn truncate_narrow(&mut self, pool: &mut BlockPool, tokens: usize) -> usize {
        self.narrow_tokens = self.narrow_tokens.min(tokens);
        self.packed_tokens = self.packed_tokens.min(tokens);
        let [packed, pruned, whole] = Self::needed(self.packed_tokens, self.narrow_tokens, tokens);
        while self.pruned.len() > pruned {
            self.pruned.pop().into_iter().for_each(|h| pool.free(h));
        }
        while self.packed.len() > packed {
            self.packed.pop().into_iter().for_each(|h| pool.free(h));
        }
        if tokens == 0 {
            (self.codec, self.kept) = (None, None);
        }
        whole
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
    /// What is left of dropped tokens, where something keeps that.
    pub(crate) state: Option<State>,
}

impl HeadCache {
    /// Tokens in the cache.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.positions.len()
    }

    /// Makes room for the lists of so many tokens; their halves are still the pool's.
    pub fn expect_tokens(&mut self, tokens: usize) {
        let more = |len: usize, wanted: usize| wanted.saturating_sub(len);
        self.positions.reserve_exact(more(self.positions.len(), tokens));
        for halves in [&mut self.keys, &mut self.values] {
            halves.whole.reserve_exact(more(halves.whole.len(), blocks(tokens)));
        }
    }

    /// The channels that pruned keys have, ascending, if channels were pruned.
    #[must_use]
    pub fn kept_channels(&self) -> Option<&[u16]> {
        self.keys.kept.as_deref()
    }

    /// Channels of keys that are packed or pruned.
    pub(crate) fn narrow_channels(&self, pool: &BlockPool) -> usize {
        self.keys.kept.as_ref().map_or(pool.head_dim(), |k| k.len())
    }

    /// Whether all tokens are whole.
    pub(crate) fn is_plain(&self) -> bool {
        self.keys.narrow_tokens == 0 && self.values.narrow_tokens == 0
    }

    /// Bytes of its halves, and of its state.
    #[must_use]
    pub fn held_bytes(&self, pool: &BlockPool) -> u64 {
        let state = self.state.map_or(0, |state| pool.bytes_of(state.half));
        self.keys.held_bytes(pool) + self.values.held_bytes(pool) + state
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

    /// Drops all tokens and the state, and gives all halves back.
    pub fn clear(&mut self, pool: &mut BlockPool) {
        self.truncate(pool, 0);
        self.state.take().into_iter().for_each(|state| pool.free(state.half));
    }

    /// Keeps the first `tokens` tokens and gives back the halves that they don't need.
    pub fn truncate(&mut self, pool: &mut BlockPool, tokens: usize) {
        self.positions.truncate(tokens);
        self.tally.truncate(tokens);
        let tokens = self.tokens();
        let most_keys = self.keys.truncate_narrow(pool, tokens);
        let most_values = self.values.truncate_narrow(pool, tokens);
        let (keys, values) = (&mut self.keys.whole, &mut self.values.whole);
        while keys.len() > most_keys || values.len() > most_values {
            let value_next = values.len() > most_values
                && (values.len() >= keys.len() || keys.len() <= most_keys);
            let last = if value_next { values.pop() } else { keys.pop() };
            last.into_iter().for_each(|h| pool.free(h));
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

    /// The key of a token, as attention sees it: 0 in channels that its half lacks.
    ///
    /// # Panics
    /// If there is no such token.
    #[must_use]
    pub fn key(&self, pool: &BlockPool, token: usize) -> Vec<f32> {
        assert!(token < self.tokens(), "token {token} of {}", self.tokens());
        let (keys, block, lane) = (&self.keys, token / BLOCK_TOKENS, token % BLOCK_TOKENS);
        let dim = pool.head_dim();
        let plain = |half: Half, channels: usize| -> Vec<f32> {
            // SAFETY: a half has 32 numbers per channel.
            let at = |d| unsafe { read(pool.format(), pool.ptr(half), d * BLOCK_TOKENS + lane) };
            (0..channels).map(at).collect()
        };
        if token >= keys.narrow_tokens {
            return plain(keys.whole[block - keys.whole_base()], dim);
        }
        let channels = self.narrow_channels(pool);
        let narrow = match keys.codec {
            Some(codec) if token < keys.packed_tokens => {
                let base = pool.ptr(keys.packed[block]);
                (0..channels)
                    .map(|d| {
                        let groups = codec.key_groups(channels);
                        // SAFETY: the half has 32 codes per channel, then scales and zeros.
                        unsafe {
                            let code = code_at(base, codec.bits, d * BLOCK_TOKENS + lane);
                            let levels = base.add(codec.key_code_bytes(channels));
                            number(code, levels, groups, codec.key_group_of(d, lane))
                        }
                    })
                    .collect()
            }
            _ => plain(keys.pruned[block - keys.packed_tokens / BLOCK_TOKENS], channels),
        };
        let Some(kept) = self.keys.kept.as_deref() else { return narrow };
        let mut key = vec![0.0; dim];
        kept.iter().zip(narrow).for_each(|(d, x)| key[*d as usize] = x);
        key
    }

    /// The value of a token.
    ///
    /// # Panics
    /// If there is no such token.
    #[must_use]
    pub fn value(&self, pool: &BlockPool, token: usize) -> Vec<f32> {
        assert!(token < self.tokens(), "token {token} of {}", self.tokens());
        let (values, block, lane) = (&self.values, token / BLOCK_TOKENS, token % BLOCK_TOKENS);
        let dim = pool.head_dim();
        if let (true, Some(codec)) = (token < values.packed_tokens, values.codec) {
            let base = pool.ptr(values.packed[block]);
            let groups = codec.groups(dim);
            // SAFETY: the half has a row of codes per token, then scales and zeros.
            let at = |d| unsafe {
                let code = code_at(base.add(lane * codec.row_bytes(dim)), codec.bits, d);
                let levels = base.add(BLOCK_TOKENS * codec.row_bytes(dim));
                let group = lane * groups + d / codec.group as usize;
                number(code, levels, BLOCK_TOKENS * groups, group)
            };
            return (0..dim).map(at).collect();
        }
        let base = pool.ptr(values.whole[block - values.whole_base()]);
        // SAFETY: a half has a row per token.
        let at = |d| unsafe { read(pool.format(), base, lane * dim + d) };
        (0..dim).map(at).collect()
    }
}

/// What a code stands for.
///
/// # Safety
/// `levels` starts `groups` scales and as many zeros.
unsafe fn number(code: u8, levels: *const u8, groups: usize, group: usize) -> f32 {
    // SAFETY: by the contract.
    let level = |index: usize| unsafe {
        f16::from_bits(levels.cast::<u16>().add(index).read_unaligned()).to_f32()
    };
    // A product of 8 and 11 bits is exact, so fusing the addition would change nothing.
    f32::from(code) * level(group) + level(groups + group)
}

/// # Safety
/// `base` has a number at `index`.
pub(crate) unsafe fn read(format: KvFormat, base: *const u8, index: usize) -> f32 {
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
pub(crate) unsafe fn write(format: KvFormat, base: *mut u8, index: usize, x: f32) {
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
