//! Attention of many queries per sequence: tiles of queries against blocks of keys, with the softmax kept up to date block
//! by block.

use std::ops::Range;

use super::{AttendItem, AttendShape, Job, to_score};
use crate::buffer::{Scratch, lines, split_lines};
use crate::kv::tile::{Rows, key_tile, value_tile};
use crate::kv::{BLOCK_TOKENS, BlockPool, HeadCache, with_format};
use crate::simd::math::exp;
use crate::simd::{F32, Isa, LANES, Simd, Source, isa, multiversion};
use crate::threads::Threads;
use crate::tile::{Tile, wide};

/// Queries (rows times heads of a group) of a task: enough that turning a block into floats costs little beside using it.
const QUERIES: usize = 192;
/// Most rows of a register tile in any instruction set.
const MOST_ROWS: usize = 12;

/// Attention of several query rows per sequence. The queries are the first `heads * head_dim` columns of a row of `qkv`;
/// `out` has `heads * head_dim` columns. `lse` gets the logarithm of the softmax's denominator per row and head. A row that
/// sees no key gives zeros and minus infinity.
///
/// # Panics
/// If the sizes do not fit each other.
#[expect(clippy::too_many_arguments, reason = "the layout of a fused row")]
pub fn attend_prefill(
    threads: &Threads,
    pool: &BlockPool,
    items: &[AttendItem<'_>],
    shape: &AttendShape,
    qkv: &[f32],
    qkv_width: usize,
    out: &mut [f32],
    lse: Option<&mut [f32]>,
) {
    prefill_with(isa(), threads, &Job::new(pool, items, shape, qkv, qkv_width, out, lse));
}

/// A tile of queries: item, KV head, rows of the item.
struct Task {
    item: usize,
    head: usize,
    rows: Range<usize>,
}

pub(super) fn prefill_with(isa: Isa, threads: &Threads, job: &Job<'_>) {
    let height = (QUERIES / job.shape.group()).clamp(8, 64);
    let mut tasks = Vec::new();
    for (item, rows) in job.items.iter().map(|i| i.rows).enumerate() {
        // The last rows see most keys: begun first, they don't keep the others waiting at the end.
        for first in (0..rows).step_by(height).rev() {
            tasks.extend((0..job.shape.kv_heads).map(|head| Task {
                item,
                head,
                rows: first..(first + height).min(rows),
            }));
        }
    }
    threads.run(tasks.len(), |i| {
        // SAFETY: tasks are disjoint in the output; the job was checked when it was made.
        unsafe { with_format!(job.pool.format(), run::<B>(isa, job, &tasks[i])) }
    });
}

multiversion! {
    /// # Safety
    /// The job is checked, and no other task has the same rows and heads.
    unsafe fn run<B: Source>(job: &Job<'_>, task: &Task) = body
}

/// Scratch space of a task. Pairs are (row, head of the group), rows outermost.
struct Tiles<'a> {
    queries: &'a mut [f32],
    sums: &'a mut [f32],
    keys: &'a mut [f32],
    values: &'a mut [f32],
    scores: &'a mut [f32],
    maxima: &'a mut [f32],
    totals: &'a mut [f32],
}

impl<'a> Tiles<'a> {
    fn sizes(pairs: usize, dim: usize) -> [usize; 7] {
        let padded = dim.next_multiple_of(LANES);
        [
            pairs * dim,
            pairs * padded,
            dim * BLOCK_TOKENS,
            // A vector at the last number of the last row.
            dim * BLOCK_TOKENS + LANES,
            MOST_ROWS * BLOCK_TOKENS,
            pairs + LANES,
            pairs * LANES,
        ]
    }

    fn scratch(pairs: usize, dim: usize) -> Scratch {
        Scratch::take(Self::sizes(pairs, dim).iter().map(|n| lines(*n)).sum())
    }

    fn new(scratch: &'a mut [f32], pairs: usize, dim: usize) -> Self {
        let sizes = Self::sizes(pairs, dim);
        let (queries, rest) = split_lines(scratch, sizes[0]);
        let (sums, rest) = split_lines(rest, sizes[1]);
        let (keys, rest) = split_lines(rest, sizes[2]);
        let (values, rest) = split_lines(rest, sizes[3]);
        let (scores, rest) = split_lines(rest, sizes[4]);
        let (maxima, rest) = split_lines(rest, sizes[5]);
        let (totals, _) = split_lines(rest, sizes[6]);
        sums.fill(0.0);
        values.fill(0.0);
        maxima.fill(f32::NEG_INFINITY);
        totals.fill(0.0);
        Self { queries, sums, keys, values, scores, maxima, totals }
    }
}

/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn body<S: Simd, B: Source>(s: S, job: &Job<'_>, task: &Task) {
    let (shape, item) = (job.shape, &job.items[task.item]);
    let (dim, group) = (shape.head_dim, shape.group());
    let cache = &item.heads[task.head];
    let pairs = task.rows.len() * group;
    let seen: Vec<Range<usize>> =
        task.rows.clone().map(|row| item.visible(&cache.positions, row, shape.window)).collect();
    let start = seen.iter().map(|r| r.start).min().unwrap_or(0);
    let end = seen.iter().map(|r| r.end).max().unwrap_or(0);
    let first_head = task.head * group;
    let mut scratch = Tiles::scratch(pairs, dim);
    let mut tiles = Tiles::new(scratch.floats(), pairs, dim);
    for (i, row) in task.rows.clone().enumerate() {
        let from = (item.first_row + row) * job.qkv_width + first_head * dim;
        tiles.queries[i * group * dim..(i + 1) * group * dim]
            .copy_from_slice(&job.qkv[from..from + group * dim]);
    }
    for block in start / BLOCK_TOKENS..end.div_ceil(BLOCK_TOKENS) {
        let base = block * BLOCK_TOKENS;
        // SAFETY: the block belongs to the cache, the tiles have the sizes that `new` gives them.
        unsafe {
            widen::<S, B>(s, job.pool, cache, block, cache.tokens() - base, &mut tiles);
            let parts = pairs.div_ceil(S::TILE_ROWS);
            for part in 0..parts {
                let pairs = pairs * part / parts..pairs * (part + 1) / parts;
                let rows = &seen[pairs.start / group..=(pairs.end - 1) / group];
                if rows.iter().any(|r| r.start < base + BLOCK_TOKENS && r.end > base) {
                    visit::<S>(s, shape, &mut tiles, pairs, base, &seen);
                }
            }
        }
    }
    let padded = dim.next_multiple_of(LANES);
    for pair in 0..pairs {
        let row = item.first_row + task.rows.start + pair / group;
        // SAFETY: the task has this head of this row for itself; totals are whole vectors.
        unsafe {
            let total = s.sum(s.load(tiles.totals[pair * LANES..].as_ptr()));
            let sums = &tiles.sums[pair * padded..];
            job.finish(row, first_head + pair % group, sums, tiles.maxima[pair], total);
        }
    }
}

/// Turns a block into floats; values of tokens that are not there become zero.
///
/// # Safety
/// The block belongs to the pool and nobody writes it.
#[inline(always)]
unsafe fn widen<S: Simd, B: Source>(
    s: S,
    pool: &BlockPool,
    cache: &HeadCache,
    block: usize,
    tokens: usize,
    tiles: &mut Tiles<'_>,
) {
    let dim = pool.head_dim();
    // SAFETY: both halves of a block have dim x 32 numbers, a multiple of 16.
    unsafe {
        let (keys, values) = (tiles.keys.as_mut_ptr(), tiles.values.as_mut_ptr());
        if block < cache.keys.first_whole_block() {
            key_tile::<S, B>(s, pool, &cache.keys, block, Rows::All, keys);
        } else {
            let half = pool.ptr(cache.keys.whole[block - cache.keys.whole_base()]);
            for at in (0..dim * BLOCK_TOKENS).step_by(LANES) {
                s.store(keys.add(at), B::load(s, half.add(at * B::BYTES)));
            }
        }
        if block < cache.values.first_whole_block() {
            let end = tokens.min(BLOCK_TOKENS);
            value_tile::<S, B>(s, pool, &cache.values, block, 0..end, dim, values);
        } else {
            let half = pool.ptr(cache.values.whole[block - cache.values.whole_base()]);
            for at in (0..dim * BLOCK_TOKENS).step_by(LANES) {
                s.store(values.add(at), B::load(s, half.add(at * B::BYTES)));
            }
        }
    }
    if tokens < BLOCK_TOKENS {
        tiles.values[tokens * dim..].fill(0.0);
    }
}

/// One register tile of pairs against one block.
///
/// # Safety
/// The pairs are at most [`Simd::TILE_ROWS`] and the tiles are as large as [`Tiles::new`] makes them.
#[inline(always)]
unsafe fn visit<S: Simd>(
    s: S,
    shape: &AttendShape,
    tiles: &mut Tiles<'_>,
    pairs: Range<usize>,
    base: usize,
    seen: &[Range<usize>],
) {
    let (dim, group, rows) = (shape.head_dim, shape.group(), pairs.len());
    let padded = dim.next_multiple_of(LANES);
    let hidden = s.splat(f32::NEG_INFINITY);
    // SAFETY: all addresses lie in the tiles.
    unsafe {
        let scores = tiles.scores.as_mut_ptr();
        let queries = tiles.queries.as_ptr().add(pairs.start * dim);
        let product = Tile::product(
            rows,
            dim,
            (queries, dim),
            (tiles.keys.as_ptr().cast(), BLOCK_TOKENS),
            (scores, BLOCK_TOKENS),
        );
        wide::<S, F32>(s, product, BLOCK_TOKENS);
        let maxima = tiles.maxima.as_mut_ptr().add(pairs.start);
        let before = s.load(maxima);
        for i in 0..rows {
            let at = scores.add(i * BLOCK_TOKENS);
            let mut low = to_score(s, s.load(at), shape);
            let mut high = to_score(s, s.load(at.add(LANES)), shape);
            let range = &seen[(pairs.start + i) / group];
            if range.start > base || range.end < base + BLOCK_TOKENS {
                let from = range.start as isize - base as isize;
                let to = range.end as isize - base as isize;
                low = s.keep(low, from, to, hidden);
                high = s.keep(high, from - LANES as isize, to - LANES as isize, hidden);
            }
            s.store(at, low);
            s.store(at.add(LANES), high);
            let largest = s.largest(s.max(low, high));
            if largest > *maxima.add(i) {
                *maxima.add(i) = largest;
            }
        }
        // While a query has seen no key its maximum is minus infinity, which can't be subtracted.
        let after = s.load(maxima);
        let safe = s.select_lt(hidden, after, after, s.splat(0.0));
        let factors = s.to_array(exp(s, s.sub(before, safe)));
        let safe = s.to_array(safe);
        for i in 0..rows {
            let at = scores.add(i * BLOCK_TOKENS);
            let max = s.splat(safe[i]);
            let low = exp(s, s.sub(s.load(at), max));
            let high = exp(s, s.sub(s.load(at.add(LANES)), max));
            s.store(at, low);
            s.store(at.add(LANES), high);
            let total = tiles.totals.as_mut_ptr().add((pairs.start + i) * LANES);
            s.store(total, s.mul_add(s.load(total), s.splat(factors[i]), s.add(low, high)));
        }
        let sums = tiles.sums.as_mut_ptr().add(pairs.start * padded);
        let mut product = Tile::product(
            rows,
            BLOCK_TOKENS,
            (scores, BLOCK_TOKENS),
            (tiles.values.as_ptr().cast(), dim),
            (sums, padded),
        );
        product.init = sums;
        product.init_stride = padded;
        product.scale = factors.as_ptr();
        wide::<S, F32>(s, product, padded);
    }
}
