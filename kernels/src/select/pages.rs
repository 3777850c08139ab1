//! Extremes of the keys of neighbouring tokens, by which pages are chosen without reading them.

use super::{dot, keys, largest};
use crate::kv::{BlockPool, HeadCache};
use crate::threads::{Disjoint, Threads};

/// The smallest and the largest number of each channel in each page of a head's keys.
#[derive(Clone, Debug)]
pub struct PageIndex {
    page: usize,
    dim: usize,
    /// Per page and channel.
    low: Vec<f32>,
    high: Vec<f32>,
    tokens: usize,
}

/// A head's cache and its index.
pub struct IndexItem<'a> {
    /// The cache.
    pub head: &'a HeadCache,
    /// The index.
    pub pages: &'a mut PageIndex,
}

/// Brings indices up to their caches: new tokens are added, and an index of a cache that has lost tokens is built anew.
pub fn index(threads: &Threads, pool: &BlockPool, items: &mut [IndexItem<'_>]) {
    let count = items.len();
    let work = Disjoint::new(items);
    threads.run(count, |i| {
        // SAFETY: each task has its own index.
        let item = unsafe { work.item_mut(i) };
        item.pages.update(pool, item.head);
    });
}

impl PageIndex {
    /// An empty index of pages of `page` tokens with keys of `dim` channels.
    #[must_use]
    pub fn new(page: usize, dim: usize) -> Self {
        Self { page: page.max(1), dim, low: Vec::new(), high: Vec::new(), tokens: 0 }
    }

    /// Tokens it covers.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Bytes of the extremes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        4 * (self.low.len() + self.high.len()) as u64
    }

    pub(super) fn count(&self) -> usize {
        self.tokens.div_ceil(self.page)
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.low.clear();
        self.high.clear();
        self.tokens = 0;
    }

    fn update(&mut self, pool: &BlockPool, head: &HeadCache) {
        if head.tokens() < self.tokens {
            self.clear();
        }
        let from = self.tokens;
        for (token, key) in
            (from..).zip(keys(pool, head, from..head.tokens()).chunks_exact(self.dim))
        {
            if token.is_multiple_of(self.page) {
                self.low.extend_from_slice(key);
                self.high.extend_from_slice(key);
                continue;
            }
            let at = token / self.page * self.dim;
            for (low, x) in self.low[at..at + self.dim].iter_mut().zip(key) {
                *low = low.min(*x);
            }
            for (high, x) in self.high[at..at + self.dim].iter_mut().zip(key) {
                *high = high.max(*x);
            }
        }
        self.tokens = head.tokens();
    }

    /// Adds to `bounds` what a product of `query` with a key of each page can be at most.
    pub(super) fn add_bounds(&self, query: &[f32], bounds: &mut [f32]) {
        let pages = self.low.chunks_exact(self.dim).zip(self.high.chunks_exact(self.dim));
        for (bound, (low, high)) in bounds.iter_mut().zip(pages) {
            *bound += query
                .iter()
                .zip(low.iter().zip(high))
                .map(|(q, (l, h))| (q * l).max(q * h))
                .sum::<f32>();
        }
    }

    /// Tokens of the best pages, as many whole pages as `tokens` holds (the last one may be short).
    pub(super) fn best(&self, bounds: &[f32], tokens: usize, newest: bool) -> Vec<u32> {
        let pages = (tokens / self.page).max(1);
        let last = self.count() - 1;
        let mut best = if newest {
            let mut best = largest(&bounds[..last], pages - 1);
            best.push(last as u32);
            best
        } else {
            largest(bounds, pages)
        };
        best.sort_unstable();
        best.into_iter()
            .flat_map(|p| {
                let first = p as usize * self.page;
                (first..(first + self.page).min(self.tokens)).map(|t| t as u32)
            })
            .collect()
    }

    /// The tokens with the largest shares of attention, estimated with their page's extremes over the `channels` in which
    /// the group's queries (one after the other) are largest, added up over the group. All tokens of a page have the
    /// same share; an odd rest splits a page, lower index first.
    pub(super) fn best_shares(
        &self,
        queries: &[f32],
        dim: usize,
        channels: usize,
        tokens: usize,
    ) -> Vec<u32> {
        let sum = |of: &dyn Fn(f32) -> f32| -> Vec<f32> {
            (0..dim).map(|d| queries.iter().skip(d).step_by(dim).map(|q| of(*q)).sum()).collect()
        };
        let sizes = sum(&f32::abs);
        let signs = sum(&|q| q);
        let used = largest(&sizes, channels.clamp(1, dim));
        let mut shares = vec![0.0f32; self.count()];
        let mut estimates = vec![0.0f32; self.count()];
        let mut extremes = vec![0.0f32; used.len()];
        for query in queries.chunks_exact(dim) {
            let part: Vec<f32> = used.iter().map(|d| query[*d as usize]).collect();
            let all: f32 = query.iter().map(|q| q.abs()).sum();
            let some: f32 = part.iter().map(|q| q.abs()).sum();
            let temperature = if all > 0.0 { (dim as f32 * some / all).sqrt() } else { 1.0 };
            let mut most = f32::NEG_INFINITY;
            for (page, estimate) in estimates.iter_mut().enumerate() {
                for (x, d) in extremes.iter_mut().zip(&used) {
                    let at = page * dim + *d as usize;
                    *x = if signs[*d as usize] > 0.0 { self.high[at] } else { self.low[at] };
                }
                *estimate = dot(&part, &extremes) / temperature.max(f32::MIN_POSITIVE);
                most = most.max(*estimate);
            }
            let mut total = 0.0;
            for (page, estimate) in estimates.iter_mut().enumerate() {
                *estimate = (*estimate - most).exp();
                // A short last page counts once per token that it has.
                let members = self.page.min(self.tokens - page * self.page);
                total += *estimate * members as f32;
            }
            for (share, estimate) in shares.iter_mut().zip(&estimates) {
                *share += estimate / total;
            }
        }
        let per_token: Vec<f32> = (0..self.tokens).map(|t| shares[t / self.page]).collect();
        largest(&per_token, tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(keys: &[[f32; 2]], page: usize) -> PageIndex {
        let mut index = PageIndex::new(page, 2);
        for (token, key) in keys.iter().enumerate() {
            if token.is_multiple_of(page) {
                index.low.extend(key);
                index.high.extend(key);
            } else {
                let at = token / page * 2;
                for (d, x) in key.iter().enumerate() {
                    index.low[at + d] = index.low[at + d].min(*x);
                    index.high[at + d] = index.high[at + d].max(*x);
                }
            }
        }
        index.tokens = keys.len();
        index
    }

    #[test]
    fn bounds_are_at_least_every_product_and_pages_are_whole() {
        let keys = [[1.0, -2.0], [3.0, 0.0], [0.0, 5.0], [-1.0, 1.0], [9.0, -9.0]];
        let index = pages(&keys, 2);
        let query = [2.0, -1.0];
        let mut bounds = vec![0.0; 3];
        index.add_bounds(&query, &mut bounds);
        // Page 0: 2 x 3 + 2 = 8; page 1: 0 - 1 = -1; page 2: 18 + 9 = 27.
        assert_eq!(bounds, [8.0, -1.0, 27.0]);
        for (t, key) in keys.iter().enumerate() {
            assert!(dot(&query, key) <= bounds[t / 2]);
        }
        assert_eq!(index.best(&bounds, 4, false), [0, 1, 4]);
        // The newest page stays even where it is the worst.
        let index = pages(&keys[..4], 2);
        assert_eq!(index.best(&[8.0, -1.0], 2, true), [2, 3]);
        assert_eq!(index.best(&[8.0, -1.0], 2, false), [0, 1]);
        assert_eq!(index.bytes(), 2 * 2 * 2 * 4);
    }
}
