//! Attention over the paged cache, with online softmax block by block.
//!
//! Keys are visited in the order of the cache, 32 at a time, and a masked key adds exactly nothing; so a query's result
//! depends on nothing but itself and the keys it sees: not on its neighbours, nor on how the prompt was cut.

mod decode;
mod mass;
mod prefill;

pub use decode::attend_decode;
pub(crate) use mass::{attention_mass, mass_task};
pub use prefill::attend_prefill;

use crate::kv::{BLOCK_TOKENS, BlockPool, HeadCache};
use crate::simd::{Element, Simd};

/// One sequence's queries in one layer.
pub struct AttendItem<'a> {
    /// Its KV heads, this step's tokens included.
    pub heads: &'a [HeadCache],
    /// First row of the step that is its own.
    pub first_row: usize,
    /// Query rows. The last sees every cached token, the one before it all but the last, and so on.
    pub rows: usize,
}

/// Sizes and constants of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttendShape {
    /// Query heads.
    pub heads: usize,
    /// KV heads; query head h uses KV head h / (heads / kv_heads).
    pub kv_heads: usize,
    /// Channels per head, a multiple of 8.
    pub head_dim: usize,
    /// Factor on q.k.
    pub scale: f32,
    /// Scores become cap * tanh(score / cap).
    pub softcap: Option<f32>,
    /// A query at position p sees keys at positions above p - window.
    pub window: Option<u32>,
}

impl AttendShape {
    /// Query heads per KV head.
    #[must_use]
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// Columns of V in scratch memory: a multiple of the widest tile.
fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(32)
}

/// Scores of `rows` x 32 keys: factor * (q . k), capped.
///
/// # Safety
/// `q` has `rows` rows of `dim` values, `ldq` apart; `keys` is a K block; `scores` has `rows` x 32 places.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "a kernel takes raw parts")]
unsafe fn scores<S: Simd, E: Element>(
    q: *const f32,
    ldq: usize,
    rows: usize,
    keys: *const E,
    dim: usize,
    factor: f32,
    softcap: Option<f32>,
    scores: &mut [f32],
) {
    let wide = 2 * S::LANES;
    // SAFETY: by the caller's promise.
    unsafe {
        for half in 0..BLOCK_TOKENS / wide {
            let (b, out) = (keys.add(half * wide), scores.as_mut_ptr().add(half * wide));
            crate::tile::product::<S, E>(q, ldq, rows, b, BLOCK_TOKENS, dim, out, BLOCK_TOKENS);
        }
    }
    let scores = &mut scores[..rows * BLOCK_TOKENS];
    match softcap {
        Some(cap) => {
            for s in scores {
                *s = cap * (*s * factor / cap).tanh();
            }
        }
        None => {
            for s in scores {
                *s *= factor;
            }
        }
    }
}

/// The running softmax of one row: largest score, sum of the exponentials.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f32,
}

const EMPTY: Running = Running { max: f32::NEG_INFINITY, sum: 0.0 };

/// Turns a row of 32 scores into weights relative to the new maximum; returns the factor for what was summed before.
///
/// # Safety
/// The features of `S`; `row` has 32 places.
#[inline(always)]
unsafe fn soften<S: Simd>(row: *mut f32, running: &mut Running) -> f32 {
    // SAFETY: by the caller's promise.
    unsafe {
        let mut top = S::load(row);
        for i in 1..BLOCK_TOKENS / S::LANES {
            top = S::max(top, S::load(row.add(i * S::LANES)));
        }
        let max = running.max.max(S::max_lane(top));
        if max == f32::NEG_INFINITY {
            // Nothing is visible yet: no weight, nothing to rescale.
            for i in 0..BLOCK_TOKENS / S::LANES {
                S::store(row.add(i * S::LANES), S::zero());
            }
            return 1.0;
        }
        let mut sum = S::zero();
        for i in 0..BLOCK_TOKENS / S::LANES {
            let at = row.add(i * S::LANES);
            let weight = S::exp(S::sub(S::load(at), S::splat(max)));
            S::store(at, weight);
            sum = S::add(sum, weight);
        }
        let factor = if running.max == max { 1.0 } else { (running.max - max).exp() };
        running.sum = running.sum * factor + S::sum_lanes(sum);
        running.max = max;
        factor
    }
}

/// Hides the keys of a block that lie outside the window of a query.
fn hide_outside_window(row: &mut [f32], positions: &[u32], query: u32, window: Option<u32>) {
    if let Some(window) = window {
        for (score, position) in row.iter_mut().zip(positions) {
            if position.saturating_add(window) <= query {
                *score = f32::NEG_INFINITY;
            }
        }
    }
}

/// Widens a V block into `[tokens][padded]`.
///
/// # Safety
/// The block has `tokens` rows of `dim` values.
#[inline(always)]
unsafe fn widen_values<E: Element>(values: *const E, tokens: usize, dim: usize, out: &mut [f32]) {
    let width = padded(dim);
    for t in 0..tokens {
        for d in 0..dim {
            // SAFETY: by the caller's promise.
            out[t * width + d] = unsafe { *values.add(t * dim + d) }.widen();
        }
    }
}

fn check(
    items: &[AttendItem<'_>],
    pool: &BlockPool,
    shape: &AttendShape,
    qkv: &[f32],
    qkv_width: usize,
    out: &[f32],
    lse: Option<&[f32]>,
) {
    assert!(shape.heads.is_multiple_of(shape.kv_heads), "{} / {}", shape.heads, shape.kv_heads);
    assert!(shape.head_dim.is_multiple_of(8) && shape.head_dim == pool.head_dim());
    assert!(shape.heads * shape.head_dim <= qkv_width);
    let rows = items.iter().map(|i| i.first_row + i.rows).max().unwrap_or(0);
    assert!(rows * qkv_width <= qkv.len(), "{rows} rows of {qkv_width} in {}", qkv.len());
    assert!(rows * shape.heads * shape.head_dim <= out.len());
    assert!(lse.is_none_or(|l| rows * shape.heads <= l.len()));
    assert!(items.iter().all(|i| i.heads.len() == shape.kv_heads));
    // Every query sees at least itself, but for an empty cache.
    assert!(
        items
            .iter()
            .flat_map(|i| i.heads.iter().map(|h| (h.tokens(), i.rows)))
            .all(|(tokens, rows)| tokens == 0 || tokens >= rows)
    );
}

#[cfg(test)]
mod tests;
