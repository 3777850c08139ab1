//! Scores that come from the keys alone.

use crate::buffer::{Scratch, lines, split_lines};
use crate::kv::{BLOCK_TOKENS, BlockPool, HeadCache, with_format};
use crate::simd::{Isa, LANES, Simd, Source, multiversion};

/// Minus the length of each key.
pub(super) fn norms(isa: Isa, pool: &BlockPool, head: &HeadCache, scores: &mut [f32]) {
    // SAFETY: `isa` is available, the blocks are the head's own.
    unsafe { with_format!(pool.format(), run_norms::<B>(isa, pool, head, scores)) }
}

/// Minus the cosine between each key and the mean direction.
pub(super) fn differences(isa: Isa, pool: &BlockPool, head: &HeadCache, scores: &mut [f32]) {
    // SAFETY: `isa` is available, the blocks are the head's own.
    unsafe { with_format!(pool.format(), run_differences::<B>(isa, pool, head, scores)) }
}

multiversion! {
    /// # Safety
    /// One score per token of the head, whose blocks belong to the pool.
    unsafe fn run_norms<B: Source>(pool: &BlockPool, head: &HeadCache, scores: &mut [f32]) = norms_body
}

#[inline(always)]
unsafe fn norms_body<S: Simd, B: Source>(
    s: S,
    pool: &BlockPool,
    head: &HeadCache,
    scores: &mut [f32],
) {
    for at in (0..scores.len()).step_by(LANES) {
        // SAFETY: the half block holds the tokens from `at`, of which as many as remain are written.
        unsafe {
            let length = s.sqrt(squares::<S, B>(s, pool, half_block(pool, head, at, B::BYTES)));
            let n = LANES.min(scores.len() - at);
            s.store_part(scores.as_mut_ptr().add(at), s.sub(s.splat(0.0), length), n);
        }
    }
}

/// Address of the first channel of the 16 tokens from `token`, a multiple of 16.
#[inline(always)]
fn half_block(pool: &BlockPool, head: &HeadCache, token: usize, bytes: usize) -> *const u8 {
    let base = pool.ptr(head.keys.whole[token / BLOCK_TOKENS]);
    base.wrapping_add(token % BLOCK_TOKENS * bytes)
}

/// Squared lengths of the 16 keys at `keys`.
///
/// # Safety
/// `keys` comes from [`half_block`].
#[inline(always)]
unsafe fn squares<S: Simd, B: Source>(s: S, pool: &BlockPool, keys: *const u8) -> S::V {
    let mut sum = s.splat(0.0);
    for d in 0..pool.head_dim() {
        // SAFETY: a block has 32 keys per channel.
        let key = unsafe { B::load(s, keys.add(d * BLOCK_TOKENS * B::BYTES)) };
        sum = s.mul_add(key, key, sum);
    }
    sum
}

/// Reciprocals, 0 for 0.
#[inline(always)]
fn inverse<S: Simd>(s: S, x: S::V) -> S::V {
    let zero = s.splat(0.0);
    s.select_lt(zero, x, s.div(s.splat(1.0), x), zero)
}

multiversion! {
    /// # Safety
    /// As [`run_norms`].
    unsafe fn run_differences<B: Source>(pool: &BlockPool, head: &HeadCache, scores: &mut [f32]) = differences_body
}

#[inline(always)]
unsafe fn differences_body<S: Simd, B: Source>(
    s: S,
    pool: &BlockPool,
    head: &HeadCache,
    scores: &mut [f32],
) {
    let dim = pool.head_dim();
    let tokens = scores.len();
    let zero = s.splat(0.0);
    let mut scratch = Scratch::take(lines(dim * LANES) + lines(dim));
    let scratch = scratch.floats();
    let (sums, rest) = split_lines(scratch, dim * LANES);
    let (anchor, _) = split_lines(rest, dim);
    sums.fill(0.0);
    // SAFETY: half blocks hold the tokens from `at`; sums have a vector per channel.
    unsafe {
        // First pass: the inverse lengths, kept in the scores, and the sum of the directions.
        for at in (0..tokens).step_by(LANES) {
            let n = LANES.min(tokens - at);
            let keys = half_block(pool, head, at, B::BYTES);
            let length = s.sqrt(squares::<S, B>(s, pool, keys));
            let scale = inverse(s, length);
            s.store_part(scores.as_mut_ptr().add(at), scale, n);
            for d in 0..dim {
                let key = B::load(s, keys.add(d * BLOCK_TOKENS * B::BYTES));
                // Lanes beyond the tokens may hold anything.
                let direction = s.keep(s.mul(key, scale), 0, n as isize, zero);
                let sum = sums.as_mut_ptr().add(d * LANES);
                s.store(sum, s.add(s.load(sum), direction));
            }
        }
        let mut square = 0.0;
        for (d, anchor) in anchor.iter_mut().enumerate() {
            *anchor = s.sum(s.load(sums.as_ptr().add(d * LANES))) / tokens as f32;
            square += *anchor * *anchor;
        }
        let length = f32::sqrt(square);
        let unit = s.splat(if length > 0.0 { -1.0 / length } else { 0.0 });
        for at in (0..tokens).step_by(LANES) {
            let n = LANES.min(tokens - at);
            let keys = half_block(pool, head, at, B::BYTES);
            let mut dot = zero;
            for (d, anchor) in anchor.iter().enumerate() {
                let key = B::load(s, keys.add(d * BLOCK_TOKENS * B::BYTES));
                dot = s.mul_add(key, s.splat(*anchor), dot);
            }
            let scores = scores.as_mut_ptr().add(at);
            let scale = s.load_part(scores, n, 0.0);
            s.store_part(scores, s.mul(s.mul(dot, scale), unit), n);
        }
    }
}
