//! Reading some cached tokens and keeping all: the choice of tokens for a query, and attention over the chosen ones.
//!
//! Chosen tokens are copied next to each other into a scratch cache of the same format and attended to there by the
//! ordinary kernel, so a choice of everything gives the ordinary result bit for bit.

mod clusters;
mod pages;
mod part;

pub use clusters::{ClusterItem, Clusters, cluster};
pub use pages::{IndexItem, PageIndex, index};
pub use part::{LeavingOrder, PartItem, append_part, refresh};

use crate::attend::{AttendItem, AttendShape, attend_decode};
use crate::kv::{BLOCK_TOKENS, BlockPool, HeadCache, KvFormat, PoolFull};
use crate::threads::{Disjoint, Threads};

/// How pages of tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PageChoice {
    /// By an upper bound of the products with their keys (Quest): whole pages.
    Bound {
        /// Every query head chooses for itself; otherwise the bounds of a group are added up.
        per_query_head: bool,
        /// The page of the newest token is always chosen.
        newest: bool,
    },
    /// By products with the page's extremes over the queries' largest channels, as shares of attention (`RocketKV`'s
    /// second stage): single tokens, one set per KV head.
    Shares {
        /// Channels that count.
        channels: usize,
    },
}

impl PageChoice {
    /// Whether every query head has a set of its own.
    #[must_use]
    pub fn per_query_head(self) -> bool {
        matches!(self, Self::Bound { per_query_head: true, .. })
    }
}

/// One sequence's query row and caches in one layer.
pub struct SelectItem<'a> {
    /// Caches of its KV heads.
    pub heads: &'a [HeadCache],
    /// Page indices of its KV heads.
    pub pages: Vec<&'a PageIndex>,
    /// Its row.
    pub row: usize,
    /// Tokens to choose per set.
    pub tokens: usize,
}

/// Chooses tokens for each item: ascending indices into the cache, one set per KV head or per query head, item after item.
///
/// # Panics
/// If the sizes do not fit each other.
#[must_use]
pub fn select_pages(
    threads: &Threads,
    items: &[SelectItem<'_>],
    choice: PageChoice,
    shape: &AttendShape,
    qkv: &[f32],
    qkv_width: usize,
) -> Vec<Vec<u32>> {
    let (group, dim) = (shape.group(), shape.head_dim);
    let sets = if choice.per_query_head() { group } else { 1 };
    let per_item = shape.kv_heads * sets;
    let mut chosen = vec![Vec::new(); items.len() * per_item];
    let out = Disjoint::new(&mut chosen);
    threads.run(items.len() * shape.kv_heads, |task| {
        let (item, head) = (&items[task / shape.kv_heads], task % shape.kv_heads);
        let from = item.row * qkv_width + head * group * dim;
        let queries = &qkv[from..from + group * dim];
        let tokens = item.heads[head].tokens();
        let pages = item.pages[head];
        assert_eq!(pages.tokens(), tokens, "the index lags behind the cache");
        // SAFETY: each task has its own sets.
        let out = unsafe { out.slice_mut(task * sets..(task + 1) * sets) };
        if item.tokens >= tokens {
            out.iter_mut().for_each(|set| set.extend(0..tokens as u32));
            return;
        }
        match choice {
            PageChoice::Bound { newest, .. } => {
                let mut bounds = vec![0.0; pages.count()];
                for (i, query) in queries.chunks_exact(dim).enumerate() {
                    pages.add_bounds(query, &mut bounds);
                    if sets > 1 {
                        out[i] = pages.best(&bounds, item.tokens, newest);
                        bounds.fill(0.0);
                    }
                }
                if sets == 1 {
                    out[0] = pages.best(&bounds, item.tokens, newest);
                }
            }
            PageChoice::Shares { channels } => {
                out[0] = pages.best_shares(queries, dim, channels, item.tokens);
            }
        }
    });
    chosen
}

/// One sequence of an attention over chosen tokens.
pub struct ChosenItem<'a> {
    /// Caches of its KV heads.
    pub heads: &'a [HeadCache],
    /// Its row.
    pub row: usize,
    /// Chosen tokens per KV head, or per query head; ascending.
    pub chosen: &'a [Vec<u32>],
}

/// Attention of one row per item over its chosen tokens; the arguments are those of [`attend_decode`].
///
/// # Errors
/// Never in practice: the scratch pool has no budget.
///
/// # Panics
/// If the sizes do not fit each other, or a cache is not in the pool's plain format.
#[expect(clippy::too_many_arguments, reason = "the layout of a fused row")]
pub fn attend_chosen(
    threads: &Threads,
    pool: &BlockPool,
    items: &[ChosenItem<'_>],
    shape: &AttendShape,
    qkv: &[f32],
    qkv_width: usize,
    out: &mut [f32],
    lse: Option<&mut [f32]>,
) -> Result<(), PoolFull> {
    let sets = items.first().map_or(shape.kv_heads, |i| i.chosen.len());
    assert!(sets == shape.kv_heads || sets == shape.heads, "{sets} sets");
    let mut scratch = BlockPool::new(pool.head_dim(), pool.format(), u64::MAX / 2);
    let mut caches: Vec<HeadCache> = Vec::with_capacity(items.len() * sets);
    for item in items {
        assert_eq!(item.chosen.len(), sets, "items differ in their sets");
        for chosen in item.chosen {
            let mut cache = HeadCache::default();
            cache.reserve(&mut scratch, chosen.len())?;
            caches.push(cache);
        }
    }
    let shared = &scratch;
    let work = Disjoint::new(&mut caches);
    threads.run(items.len() * sets, |task| {
        let (item, set) = (&items[task / sets], task % sets);
        let head = &item.heads[set * shape.kv_heads / sets];
        // SAFETY: each task fills its own cache.
        unsafe { gather(pool, head, &item.chosen[set], shared, work.item_mut(task)) };
    });
    let gathered = AttendShape { kv_heads: sets, ..*shape };
    let attended: Vec<AttendItem<'_>> = items
        .iter()
        .zip(caches.chunks(sets.max(1)))
        .map(|(item, heads)| AttendItem { heads, first_row: item.row, rows: 1, at: None })
        .collect();
    attend_decode(threads, &scratch, &attended, &gathered, qkv, qkv_width, out, lse);
    Ok(())
}

/// Copies tokens of `head` to the front of `to`, whose halves are reserved.
///
/// # Safety
/// Nobody else uses `to`'s halves.
unsafe fn gather(
    pool: &BlockPool,
    head: &HeadCache,
    tokens: &[u32],
    scratch: &BlockPool,
    to: &mut HeadCache,
) {
    to.positions.extend(tokens.iter().map(|t| head.positions[*t as usize]));
    // SAFETY: the caller's contract; the element has the format's size.
    unsafe {
        match pool.format() {
            KvFormat::F32 => copy::<u32>(pool, head, tokens, scratch, to),
            KvFormat::F16 | KvFormat::Bf16 => copy::<u16>(pool, head, tokens, scratch, to),
            KvFormat::Fp8 => copy::<u8>(pool, head, tokens, scratch, to),
        }
    }
}

/// # Safety
/// As [`gather`]; `T` has the size of the format.
unsafe fn copy<T: Copy + Default>(
    pool: &BlockPool,
    head: &HeadCache,
    tokens: &[u32],
    scratch: &BlockPool,
    to: &HeadCache,
) {
    let dim = pool.head_dim();
    let place = |token: usize| (token / BLOCK_TOKENS, token % BLOCK_TOKENS);
    for (block, part) in tokens.chunks(BLOCK_TOKENS).enumerate() {
        // SAFETY: tokens are cached ones, their halves hold `dim` rows of a block's tokens, and the target is reserved.
        unsafe {
            let mut sources = [std::ptr::null::<T>(); BLOCK_TOKENS];
            for (source, token) in sources.iter_mut().zip(part) {
                let (from, lane) = place(*token as usize);
                *source = pool.ptr(head.keys.whole[from]).cast::<T>().add(lane);
            }
            let keys = scratch.ptr(to.keys.whole[block]).cast::<T>();
            let mut row = [T::default(); BLOCK_TOKENS];
            for d in 0..dim {
                for (x, source) in row.iter_mut().zip(&sources[..part.len()]) {
                    *x = *source.add(d * BLOCK_TOKENS);
                }
                std::ptr::copy_nonoverlapping(
                    row.as_ptr(),
                    keys.add(d * BLOCK_TOKENS),
                    BLOCK_TOKENS,
                );
            }
            let values = scratch.ptr(to.values.whole[block]).cast::<T>();
            for (i, token) in part.iter().enumerate() {
                let (from, lane) = place(*token as usize);
                let source = pool.ptr(head.values.whole[from]).cast::<T>().add(lane * dim);
                std::ptr::copy_nonoverlapping(source, values.add(i * dim), dim);
            }
        }
    }
}

/// The keys of `tokens` of a head, one after the other: what indices are built from.
fn keys(pool: &BlockPool, head: &HeadCache, tokens: std::ops::Range<usize>) -> Vec<f32> {
    tokens.flat_map(|token| head.key(pool, token)).collect()
}

/// The sum of products.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    // Eight sums side by side, which the compiler turns into vectors.
    let mut sums = [0.0f32; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a8.remainder().iter().zip(b8.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a8.zip(b8) {
        for i in 0..8 {
            sums[i] += x[i] * y[i];
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// Indices of the `count` largest values, the lower index among equals, ascending.
fn largest(values: &[f32], count: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    // Stable, and total: a value that is not a number comes last.
    let of = |i: &u32| {
        let value = values[*i as usize];
        if value.is_nan() { f32::NEG_INFINITY } else { value }
    };
    order.sort_by(|a, b| of(b).total_cmp(&of(a)));
    order.truncate(count);
    order.sort_unstable();
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Layer;

    fn layer(tokens: &[usize], format: KvFormat) -> Layer {
        let shape = AttendShape {
            heads: 6,
            kv_heads: 2,
            head_dim: 64,
            scale: 0.125,
            softcap: None,
            window: None,
        };
        let mut layer = Layer::new(tokens.len(), shape, format);
        layer.feed(3, tokens);
        let ones = vec![1; tokens.len()];
        layer.feed(4, &ones);
        layer
    }

    fn indices(layer: &Layer, page: usize) -> Vec<Vec<PageIndex>> {
        let mut all: Vec<Vec<PageIndex>> = (layer.caches.iter())
            .map(|heads| heads.iter().map(|_| PageIndex::new(page, 64)).collect())
            .collect();
        let mut items: Vec<IndexItem<'_>> = (layer.caches.iter().flatten())
            .zip(all.iter_mut().flatten())
            .map(|(head, pages)| IndexItem { head, pages })
            .collect();
        index(&layer.threads, &layer.pool, &mut items);
        all
    }

    fn chosen(layer: &Layer, page: usize, tokens: usize, choice: PageChoice) -> Vec<Vec<u32>> {
        let pages = indices(layer, page);
        let items: Vec<SelectItem<'_>> = layer
            .caches
            .iter()
            .zip(&pages)
            .enumerate()
            .map(|(row, (heads, pages))| {
                let pages = pages.iter().collect();
                SelectItem { heads, pages, row, tokens }
            })
            .collect();
        let shape = layer.shape;
        select_pages(&layer.threads, &items, choice, &shape, &layer.qkv, layer.width)
    }

    fn attend(layer: &Layer, sets: &[Vec<u32>]) -> Vec<f32> {
        let per_item = sets.len() / layer.caches.len();
        let items: Vec<ChosenItem<'_>> = layer
            .caches
            .iter()
            .zip(sets.chunks(per_item))
            .enumerate()
            .map(|(row, (heads, chosen))| ChosenItem { heads, row, chosen })
            .collect();
        let mut out = vec![0.0; items.len() * 6 * 64];
        attend_chosen(
            &layer.threads,
            &layer.pool,
            &items,
            &layer.shape,
            &layer.qkv,
            layer.width,
            &mut out,
            None,
        )
        .expect("scratch has no budget");
        out
    }

    fn dense(layer: &Layer) -> Vec<f32> {
        let items: Vec<AttendItem<'_>> = (layer.caches.iter().enumerate())
            .map(|(first_row, heads)| AttendItem { heads, first_row, rows: 1, at: None })
            .collect();
        let mut out = vec![0.0; items.len() * 6 * 64];
        let (pool, shape) = (&layer.pool, &layer.shape);
        attend_decode(&layer.threads, pool, &items, shape, &layer.qkv, layer.width, &mut out, None);
        out
    }

    #[test]
    fn a_choice_of_everything_is_ordinary_attention_bit_for_bit() {
        for format in [KvFormat::F32, KvFormat::F16, KvFormat::Fp8] {
            let layer = layer(&[70, 33, 1], format);
            for choice in [
                PageChoice::Bound { per_query_head: false, newest: true },
                PageChoice::Bound { per_query_head: true, newest: false },
                PageChoice::Shares { channels: 10 },
            ] {
                let sets = chosen(&layer, 16, 999, choice);
                assert_eq!(attend(&layer, &sets), dense(&layer), "{choice:?}");
            }
        }
    }

    #[test]
    fn attention_over_chosen_tokens_by_the_definition() {
        let layer = layer(&[90], KvFormat::F32);
        let sets = chosen(&layer, 4, 24, PageChoice::Shares { channels: 64 });
        assert!(sets.iter().all(|s| s.len() == 24 && s.windows(2).all(|w| w[0] < w[1])));
        let out = attend(&layer, &sets);
        for h in 0..6 {
            let (head, set) = (&layer.caches[0][h / 3], &sets[h / 3]);
            let query = &layer.qkv[h * 64..(h + 1) * 64];
            let weights: Vec<f64> = (set.iter())
                .map(|t| {
                    let key = head.key(&layer.pool, *t as usize);
                    let dot: f64 = query.iter().zip(&key).map(|(a, b)| f64::from(a * b)).sum();
                    (dot * 0.125).exp()
                })
                .collect();
            let total: f64 = weights.iter().sum();
            for d in 0..64 {
                let expected: f64 = (set.iter().zip(&weights))
                    .map(|(t, w)| w * f64::from(head.value(&layer.pool, *t as usize)[d]))
                    .sum::<f64>()
                    / total;
                assert!((f64::from(out[h * 64 + d]) - expected).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn single_token_pages_and_all_channels_choose_the_largest_shares() {
        let layer = layer(&[50], KvFormat::F32);
        let sets = chosen(&layer, 1, 8, PageChoice::Shares { channels: 64 });
        for (kv, set) in sets.iter().enumerate() {
            let head = &layer.caches[0][kv];
            let mut shares = vec![0.0f64; head.tokens()];
            for h in kv * 3..kv * 3 + 3 {
                let query = &layer.qkv[h * 64..(h + 1) * 64];
                let weights: Vec<f64> = (0..head.tokens())
                    .map(|t| {
                        let key = head.key(&layer.pool, t);
                        let dot: f64 = query.iter().zip(&key).map(|(a, b)| f64::from(a * b)).sum();
                        (dot / 8.0).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                shares.iter_mut().zip(&weights).for_each(|(s, w)| *s += w / total);
            }
            let mut order: Vec<u32> = (0..shares.len() as u32).collect();
            order.sort_by(|a, b| shares[*b as usize].total_cmp(&shares[*a as usize]));
            order.truncate(8);
            order.sort_unstable();
            assert_eq!(*set, order);
        }
    }

    #[test]
    fn ties_go_to_the_lower_index() {
        assert_eq!(largest(&[1.0, 3.0, 3.0, f32::NAN, 3.0], 2), [1, 2]);
        assert_eq!(largest(&[0.0; 4], 3), [0, 1, 2]);
        assert_eq!(dot(&[1.0; 11], &[2.0; 11]), 22.0);
    }
}
