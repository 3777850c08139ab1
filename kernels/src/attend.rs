//! Attention over the paged cache.
//!
//! A query visits the blocks of its cache in order. Keys that it may not see get weight exactly zero, and adding zero
//! changes nothing, so its output is the same in a tile with other queries as alone, and the same in a chunk of a prompt as
//! in the whole prompt.

mod decode;
mod fused;
mod join;
mod prefill;
#[cfg(test)]
pub(crate) mod tests;

use std::ops::Range;

pub use decode::{attend_decode, attend_without};
pub use join::join;
pub use prefill::attend_prefill;

use crate::kv::{BlockPool, HeadCache};
use crate::simd::Simd;
use crate::simd::math::tanh;
use crate::threads::Disjoint;

/// The queries of one sequence in one layer.
pub struct AttendItem<'a> {
    /// Caches of its KV heads.
    pub heads: &'a [HeadCache],
    /// Its first row.
    pub first_row: usize,
    /// Its rows. The last one sees all cached tokens, each one before it one fewer.
    pub rows: usize,
}

/// Shape and constants of the attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttendShape {
    /// Query heads.
    pub heads: usize,
    /// KV heads; query head h uses KV head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Factor of q.k.
    pub scale: f32,
    /// Scores s become `cap * tanh(s / cap)`.
    pub softcap: Option<f32>,
    /// A query at position p sees keys at positions above p - window only.
    pub window: Option<u32>,
}

impl AttendShape {
    /// Query heads per KV head.
    #[must_use]
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Checks the shape against the pool and the rows.
    pub(crate) fn check(&self, pool: &BlockPool, qkv: &[f32], qkv_width: usize) {
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads),
            "heads don't form groups"
        );
        assert_eq!(self.head_dim, pool.head_dim(), "head_dim is not the pool's");
        assert!(self.heads * self.head_dim <= qkv_width, "queries outside the row");
        assert!(qkv.len().is_multiple_of(qkv_width), "qkv is not whole rows");
    }

    /// Checks one sequence's rows.
    pub(crate) fn check_item(&self, heads: usize, last_row: usize, qkv_rows: usize) {
        assert_eq!(heads, self.kv_heads, "an item does not have all KV heads");
        assert!(last_row <= qkv_rows, "rows outside qkv");
    }
}

/// The cached tokens that query row `row` of `rows` sees.
#[inline]
pub(crate) fn visible(
    positions: &[u32],
    rows: usize,
    row: usize,
    window: Option<u32>,
) -> Range<usize> {
    let end = positions.len().saturating_sub(rows - 1 - row);
    let start = match (window, positions[..end].last()) {
        (Some(window), Some(own)) => {
            positions[..end].partition_point(|p| p.saturating_add(window) <= *own)
        }
        _ => 0,
    };
    start..end
}

/// Raw products of queries and keys to scores.
#[inline(always)]
pub(crate) fn to_score<S: Simd>(s: S, product: S::V, shape: &AttendShape) -> S::V {
    let score = s.mul(product, s.splat(shape.scale));
    match shape.softcap {
        Some(cap) => s.mul(s.splat(cap), tanh(s, s.mul(score, s.splat(1.0 / cap)))),
        None => score,
    }
}

/// What both kernels read and write.
struct Job<'a> {
    pool: &'a BlockPool,
    items: &'a [AttendItem<'a>],
    shape: &'a AttendShape,
    qkv: &'a [f32],
    qkv_width: usize,
    out: Disjoint<'a, f32>,
    lse: Option<Disjoint<'a, f32>>,
    /// Cached tokens that no row sees, ascending, of each KV head of each item; empty: there are none.
    without: &'a [Vec<u32>],
}

impl<'a> Job<'a> {
    fn new(
        pool: &'a BlockPool,
        items: &'a [AttendItem<'a>],
        shape: &'a AttendShape,
        qkv: &'a [f32],
        qkv_width: usize,
        out: &'a mut [f32],
        lse: Option<&'a mut [f32]>,
    ) -> Self {
        shape.check(pool, qkv, qkv_width);
        let rows = qkv.len() / qkv_width;
        for item in items {
            let last = item.first_row + item.rows;
            shape.check_item(item.heads.len(), last, rows);
            assert!(last * shape.heads * shape.head_dim <= out.len(), "rows outside out");
            assert!(lse.as_ref().is_none_or(|l| last * shape.heads <= l.len()), "rows outside lse");
        }
        Self {
            pool,
            items,
            shape,
            qkv,
            qkv_width,
            out: Disjoint::new(out),
            lse: lse.map(Disjoint::new),
            without: &[],
        }
    }

    /// Writes the output of a query head of a row: sums over the softmax's denominator, and the denominator's logarithm.
    ///
    /// # Safety
    /// Nobody else writes this head of this row.
    #[inline(always)]
    unsafe fn finish(&self, row: usize, head: usize, sums: &[f32], max: f32, total: f32) {
        let dim = self.shape.head_dim;
        let at = (row * self.shape.heads + head) * dim;
        // SAFETY: by the contract.
        let out = unsafe { self.out.slice_mut(at..at + dim) };
        let factor = if total > 0.0 { 1.0 / total } else { 0.0 };
        for (out, sum) in out.iter_mut().zip(sums) {
            // Adding zero turns -0 into 0: which of them a sum is may depend on the keys it does not see.
            *out = sum * factor + 0.0;
        }
        if let Some(lse) = &self.lse {
            let at = row * self.shape.heads + head;
            // SAFETY: by the contract.
            let lse = unsafe { lse.item_mut(at) };
            *lse = if total > 0.0 { max + total.ln() } else { f32::NEG_INFINITY };
        }
    }
}
