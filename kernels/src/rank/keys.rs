//! Scores that come from the keys alone.

use crate::buffer::{Scratch, lines, split_lines};
use crate::kv::tile::{Rows, key_tile};
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
    let mut keys = Keys::new(pool, head);
    for at in (0..scores.len()).step_by(LANES) {
        // SAFETY: the half block holds the tokens from `at`, of which as many as remain are written.
        unsafe {
            let length = s.sqrt(squares::<S, B>(s, &keys.at::<S, B>(s, at), pool.head_dim()));
            let n = LANES.min(scores.len() - at);
            s.store_part(scores.as_mut_ptr().add(at), s.sub(s.splat(0.0), length), n);
        }
    }
}

/// The keys of a head, 16 tokens at a time.
pub(crate) struct Keys<'a> {
    pool: &'a BlockPool,
    head: &'a HeadCache,
    /// Floats of a block whose keys are not all whole.
    tile: Scratch,
}

/// The keys of 16 tokens; channels are 32 numbers apart.
pub(crate) struct Sixteen {
    keys: *const u8,
    widened: bool,
}

impl<'a> Keys<'a> {
    pub(crate) fn new(pool: &'a BlockPool, head: &'a HeadCache) -> Self {
        let floats = if head.is_plain() { 0 } else { pool.head_dim() * BLOCK_TOKENS };
        Self { pool, head, tile: Scratch::take(floats) }
    }

    /// Those from `token` on, a multiple of 16; good until the next call, and in order cheap.
    ///
    /// # Safety
    /// There is such a token, and nobody writes the head's halves.
    #[inline(always)]
    pub(crate) unsafe fn at<S: Simd, B: Source>(&mut self, s: S, token: usize) -> Sixteen {
        let (keys, block, lane) = (&self.head.keys, token / BLOCK_TOKENS, token % BLOCK_TOKENS);
        if block < keys.first_whole_block() {
            let tile = self.tile.floats().as_mut_ptr();
            if lane == 0 {
                // SAFETY: the tile has 32 floats per channel.
                unsafe { key_tile::<S, B>(s, self.pool, keys, block, Rows::All, tile) };
            }
            Sixteen { keys: tile.wrapping_add(lane).cast(), widened: true }
        } else {
            let base = self.pool.ptr(keys.whole[block - keys.whole_base()]);
            Sixteen { keys: base.wrapping_add(lane * B::BYTES), widened: false }
        }
    }
}

impl Sixteen {
    /// One channel.
    ///
    /// # Safety
    /// There is such a channel, and the keys are good still.
    #[inline(always)]
    pub(crate) unsafe fn channel<S: Simd, B: Source>(&self, s: S, channel: usize) -> S::V {
        let at = channel * BLOCK_TOKENS;
        // SAFETY: a half has 32 keys per channel.
        unsafe {
            if self.widened {
                s.load(self.keys.cast::<f32>().add(at))
            } else {
                B::load(s, self.keys.add(at * B::BYTES))
            }
        }
    }
}

/// Squared lengths of 16 keys.
///
/// # Safety
/// As [`Sixteen::channel`].
#[inline(always)]
unsafe fn squares<S: Simd, B: Source>(s: S, keys: &Sixteen, dim: usize) -> S::V {
    let mut sum = s.splat(0.0);
    for d in 0..dim {
        // SAFETY: by the contract.
        let key = unsafe { keys.channel::<S, B>(s, d) };
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
    let mut all = Keys::new(pool, head);
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
            let keys = all.at::<S, B>(s, at);
            let length = s.sqrt(squares::<S, B>(s, &keys, dim));
            let scale = inverse(s, length);
            s.store_part(scores.as_mut_ptr().add(at), scale, n);
            for d in 0..dim {
                let key = keys.channel::<S, B>(s, d);
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
            let keys = all.at::<S, B>(s, at);
            let mut dot = zero;
            for (d, anchor) in anchor.iter().enumerate() {
                let key = keys.channel::<S, B>(s, d);
                dot = s.mul_add(key, s.splat(*anchor), dot);
            }
            let scores = scores.as_mut_ptr().add(at);
            let scale = s.load_part(scores, n, 0.0);
            s.store_part(scores, s.mul(s.mul(dot, scale), unit), n);
        }
    }
}
