//! Attention of one query row per sequence, which is a matter of reading the cache once and fast.
//!
//! A long cache is cut into parts of 512 tokens, whatever the batch and the threads; each part has its own softmax, and the
//! parts are joined in order.

use std::cell::Cell;
use std::ops::Range;

use super::fused;
use super::{AttendItem, AttendShape, Job, to_score, visible};
use crate::buffer::{Scratch, lines, split_lines};
use crate::kv::tile::{Rows, key_tile, value_tile};
use crate::kv::{BLOCK_TOKENS, BlockPool, Half, HeadCache, with_format};
use crate::simd::math::exp;
use crate::simd::{F32, Isa, LANES, Simd, Source, isa, multiversion};
use crate::threads::{Disjoint, Threads};
use crate::tile::{Tile, fits, wide};

/// Blocks between the one at work and the one asked for.
const LOOK_AHEAD: usize = 3;
/// Tokens of a part.
const PART: usize = 512;

/// Attention of one query row per sequence; see [`super::attend_prefill`] for the arguments.
///
/// # Panics
/// If the sizes do not fit each other or an item has more or fewer rows than one.
#[expect(clippy::too_many_arguments, reason = "the layout of a fused row")]
pub fn attend_decode(
    threads: &Threads,
    pool: &BlockPool,
    items: &[AttendItem<'_>],
    shape: &AttendShape,
    qkv: &[f32],
    qkv_width: usize,
    out: &mut [f32],
    lse: Option<&mut [f32]>,
) {
    assert!(items.iter().all(|i| i.rows == 1), "an item without exactly one row");
    decode_with(isa(), threads, &Job::new(pool, items, shape, qkv, qkv_width, out, lse));
}

/// The same where some tokens of a cache are not seen: `without` has them, ascending, for each KV head of each item. A row
/// that sees nothing has zeros, and the logarithm of nothing.
///
/// # Panics
/// Also if there is not one list per item and KV head, or scores have a cap.
#[expect(clippy::too_many_arguments, reason = "the layout of a fused row")]
pub fn attend_without(
    threads: &Threads,
    pool: &BlockPool,
    items: &[AttendItem<'_>],
    without: &[Vec<u32>],
    shape: &AttendShape,
    qkv: &[f32],
    qkv_width: usize,
    out: &mut [f32],
    lse: Option<&mut [f32]>,
) {
    assert!(items.iter().all(|i| i.rows == 1), "an item without exactly one row");
    assert_eq!(without.len(), items.len() * shape.kv_heads, "not one list per KV head");
    assert!(shape.softcap.is_none(), "a capped score has no bottom");
    let job = Job { without, ..Job::new(pool, items, shape, qkv, qkv_width, out, lse) };
    decode_with(isa(), threads, &job);
}

/// One KV head of an item: its first part among all parts, and its number of parts.
struct Head {
    item: usize,
    head: usize,
    first: usize,
    parts: usize,
}

/// What a call lists: its heads, its tasks (head and part), results of parts.
#[derive(Default)]
struct Lists {
    heads: Vec<Head>,
    tasks: Vec<(usize, usize)>,
    partial: Vec<f32>,
}

thread_local! {
    /// The memory of a call's lists, for the next call.
    static LISTS: Cell<Lists> = Cell::default();
}

pub(super) fn decode_with(isa: Isa, threads: &Threads, job: &Job<'_>) {
    let Lists { mut heads, mut tasks, mut partial } = LISTS.take();
    heads.clear();
    tasks.clear();
    partial.clear();
    for (item, caches) in job.items.iter().map(|i| i.heads).enumerate() {
        for (head, cache) in caches.iter().enumerate() {
            // An empty cache has one empty part.
            let parts = cache.tokens().div_ceil(PART).max(1);
            tasks.extend((0..parts).map(|part| (heads.len(), part)));
            heads.push(Head { item, head, first: tasks.len() - parts, parts });
        }
    }
    let size = part_size(job.shape);
    let joins = heads.iter().any(|h| h.parts > 1);
    partial.resize(if joins { tasks.len() * size } else { 0 }, 0.0);
    let results = Disjoint::new(&mut partial);
    threads.run(tasks.len(), |i| {
        let (head, part) = tasks[i];
        let head = &heads[head];
        // SAFETY: tasks have parts of their own, and a head with a single part its own output.
        unsafe {
            let result =
                if head.parts > 1 { results.slice_mut(i * size..(i + 1) * size) } else { &mut [] };
            with_format!(job.pool.format(), run::<B>(isa, job, head, part, result));
        }
    });
    if joins {
        threads.run(heads.len(), |i| {
            let head = &heads[i];
            if head.parts > 1 {
                // SAFETY: all parts are done; each head has its own output.
                unsafe {
                    let parts =
                        results.slice_mut(head.first * size..(head.first + head.parts) * size);
                    join(isa, job, head, parts);
                }
            }
        });
    }
    LISTS.set(Lists { heads, tasks, partial });
}

/// Floats of a part's result: sums, then maximum, then denominator, of each query head.
fn part_size(shape: &AttendShape) -> usize {
    shape.group() * (shape.head_dim.next_multiple_of(LANES) + LANES)
}

multiversion! {
    /// # Safety
    /// The job is checked; no other task has this part.
    unsafe fn run<B: Source>(job: &Job<'_>, head: &Head, part: usize, result: &mut [f32]) = body
}

/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn body<S: Simd, B: Source>(
    s: S,
    job: &Job<'_>,
    head: &Head,
    part: usize,
    result: &mut [f32],
) {
    let (shape, item) = (job.shape, &job.items[head.item]);
    let (dim, group) = (shape.head_dim, shape.group());
    let padded = dim.next_multiple_of(LANES);
    let cache = &item.heads[head.head];
    let seen = visible(&cache.positions, 1, 0, shape.window);
    let keys = seen.start.max(part * PART)..seen.end.min((part + 1) * PART);
    let without = job.without.get(head.item * shape.kv_heads + head.head).map_or(&[][..], |w| w);
    let at = |token: usize| without.partition_point(|t| (*t as usize) < token);
    let without = &without[at(keys.start)..at(keys.end.max(keys.start))];
    let step = S::TILE_ROWS;
    // Only halves that are not whole need a tile; two of keys or one of values.
    let tile_size = if cache.is_plain() { 0 } else { 2 * tile_floats(dim) };
    let kept_size = cache.kept_channels().map_or(0, |k| step * k.len());
    let mut scratch = Scratch::take(
        lines(step * PART) + lines(step * padded) + lines(tile_size) + lines(kept_size),
    );
    let scratch = scratch.floats();
    let (scores, rest) = split_lines(scratch, step * PART);
    let (sums, rest) = split_lines(rest, step * padded);
    let (tile, rest) = split_lines(rest, tile_size);
    let (kept_queries, _) = split_lines(rest, kept_size);
    // A large group goes through in pieces; the block is in a cache the second time.
    for first in (0..group).step_by(step) {
        let rows = step.min(group - first);
        let query_head = head.head * group + first;
        let from = item.first_row * job.qkv_width + query_head * dim;
        let queries = &job.qkv[from..from + rows * dim];
        let mut softmax = [(f32::NEG_INFINITY, 0.0); 16];
        if keys.len() <= without.len() {
            sums.fill(0.0);
        } else {
            let view = View { pool: job.pool, cache, keys: keys.clone(), part: part * PART };
            // SAFETY: the keys are cached tokens of this head; scratch rows have the sizes given.
            unsafe {
                if !cache.is_plain() {
                    gather(cache, queries, dim, kept_queries);
                    view.narrow_products::<S, B>(s, queries, kept_queries, rows, tile, scores);
                }
                view.products::<S, B>(s, queries, rows, scores);
                for row in scores.chunks_exact_mut(PART).take(rows) {
                    for token in without {
                        row[*token as usize - part * PART] = f32::NEG_INFINITY;
                    }
                }
                for (i, softmax) in softmax.iter_mut().enumerate().take(rows) {
                    *softmax = view.softmax(s, shape, &mut scores[i * PART..(i + 1) * PART]);
                }
                view.values::<S, B>(s, rows, scores, sums, tile);
            }
        }
        for (i, (max, total)) in softmax.into_iter().enumerate().take(rows) {
            let sums = &sums[i * padded..(i + 1) * padded];
            if head.parts == 1 {
                // SAFETY: the head's only part writes its output.
                unsafe { job.finish(item.first_row, query_head + i, sums, max, total) };
            } else {
                let at = (first + i) * (padded + LANES);
                result[at..at + padded].copy_from_slice(sums);
                result[at + padded] = max;
                result[at + padded + 1] = total;
            }
        }
    }
}

/// Floats of a block's keys or values, with a vector more for values whose channels are not whole vectors.
fn tile_floats(dim: usize) -> usize {
    lines(BLOCK_TOKENS * dim.next_multiple_of(LANES) + LANES)
}

/// The bytes of a half that will be read soon; none of the one at work if there is no other.
fn soon(pool: &BlockPool, half: Option<&Half>, at_work: *const u8) -> (*const u8, usize) {
    half.map_or((at_work, 0), |half| (pool.ptr(*half).cast_const(), pool.bytes_of(*half) as usize))
}

/// The kept channels of the queries, if channels were pruned.
fn gather(cache: &HeadCache, queries: &[f32], dim: usize, out: &mut [f32]) {
    if let Some(kept) = cache.kept_channels() {
        for (query, out) in queries.chunks_exact(dim).zip(out.chunks_exact_mut(kept.len().max(1))) {
            out.iter_mut().zip(kept).for_each(|(out, channel)| *out = query[*channel as usize]);
        }
    }
}

/// The keys of a part that the query sees.
struct View<'a> {
    pool: &'a BlockPool,
    cache: &'a HeadCache,
    keys: Range<usize>,
    /// First token of the part.
    part: usize,
}

impl View<'_> {
    fn blocks(&self) -> Range<usize> {
        self.keys.start / BLOCK_TOKENS..self.keys.end.div_ceil(BLOCK_TOKENS)
    }

    /// A half with values of a block.
    #[inline(always)]
    fn value_half(&self, block: usize) -> *const u8 {
        let values = &self.cache.values;
        self.pool.ptr(if block < values.first_whole_block() {
            values.packed[block]
        } else {
            values.whole[block - values.whole_base()]
        })
    }

    /// Products with the keys of blocks that have packed or pruned ones. A block without whole keys needs the kept channels
    /// only.
    ///
    /// # Safety
    /// As [`Self::products`]; the tile has room for two blocks, `kept` are the kept channels of the queries.
    #[inline(always)]
    unsafe fn narrow_products<S: Simd, B: Source>(
        &self,
        s: S,
        queries: &[f32],
        kept: &[f32],
        rows: usize,
        tile: &mut [f32],
        scores: &mut [f32],
    ) {
        let (keys, dim) = (&self.cache.keys, self.pool.head_dim());
        let channels = self.cache.narrow_channels(self.pool);
        let end = self.blocks().end.min(keys.first_whole_block());
        let no_whole = |block: usize| {
            keys.narrow_tokens >= ((block + 1) * BLOCK_TOKENS).min(self.cache.tokens())
        };
        let kept = if keys.kept.is_some() { kept } else { queries };
        let mut block = self.blocks().start;
        while block < end {
            let two = block + 1 < end && no_whole(block + 1) && fits::<S>(rows, 4);
            let (form, queries, width) = if no_whole(block) {
                (Rows::Kept, kept, channels)
            } else {
                (Rows::All, queries, dim)
            };
            // SAFETY: the blocks are part of the cache, their parts of the scratch row.
            unsafe {
                let tile = tile.as_mut_ptr();
                let at = scores.as_mut_ptr().add(block * BLOCK_TOKENS - self.part);
                let mut product = Tile::product(
                    rows,
                    width,
                    (queries.as_ptr(), width),
                    (tile.cast::<u8>(), BLOCK_TOKENS),
                    (at, PART),
                );
                if form == Rows::Kept && keys.packed_tokens <= block * BLOCK_TOKENS {
                    product.b =
                        self.pool.ptr(keys.pruned[block - keys.packed_tokens / BLOCK_TOKENS]);
                    wide::<S, B>(s, product, BLOCK_TOKENS);
                    block += 1;
                    continue;
                }
                let all_packed = |block: usize| {
                    keys.packed_tokens >= ((block + 1) * BLOCK_TOKENS).min(self.cache.tokens())
                };
                if let Some(codec) = keys.codec
                    && all_packed(block)
                    && fused::takes_keys::<S>(rows)
                {
                    let half = self.pool.ptr(keys.packed[block]);
                    // The values come when the keys are done.
                    let (blocks, next) = (self.blocks(), block + LOOK_AHEAD);
                    let next = if next < blocks.end {
                        keys.packed.get(next)
                    } else {
                        self.cache.values.packed.get(blocks.start + next - blocks.end)
                    };
                    let rows = fused::Rows {
                        rows,
                        left: queries.as_ptr(),
                        left_stride: width,
                        out: at,
                        out_stride: PART,
                        soon: soon(self.pool, next, half),
                    };
                    fused::keys(S::ISA, codec, half, channels, rows);
                    block += 1;
                    continue;
                }
                key_tile::<S, B>(s, self.pool, keys, block, form, tile);
                if two {
                    let other = tile.add(tile_floats(dim));
                    key_tile::<S, B>(s, self.pool, keys, block + 1, form, other);
                    product.b_pair = tile_floats(dim);
                    product.vectors = 4;
                    product.columns = 2 * BLOCK_TOKENS;
                    s.tile::<F32>(&product);
                } else {
                    wide::<S, F32>(s, product, BLOCK_TOKENS);
                }
            }
            block += 1 + usize::from(two);
        }
    }

    /// # Safety
    /// The keys are cached tokens; scratch rows have [`PART`] numbers.
    #[inline(always)]
    unsafe fn products<S: Simd, B: Source>(
        &self,
        s: S,
        queries: &[f32],
        rows: usize,
        scores: &mut [f32],
    ) {
        let dim = self.pool.head_dim();
        let base = self.cache.keys.whole_base();
        let mut block = self.blocks().start.max(self.cache.keys.first_whole_block());
        while block < self.blocks().end {
            let two = block + 1 < self.blocks().end && fits::<S>(rows, 4);
            // SAFETY: the blocks are part of the cache, their parts of the scratch row.
            unsafe {
                let keys = self.pool.ptr(self.cache.keys.whole[block - base]);
                let at = scores.as_mut_ptr().add(block * BLOCK_TOKENS - self.part);
                let mut product = Tile::product(
                    rows,
                    dim,
                    (queries.as_ptr(), dim),
                    (keys, BLOCK_TOKENS),
                    (at, PART),
                );
                // The values come when the keys are done.
                let (blocks, next) = (self.blocks(), block + LOOK_AHEAD);
                let next = if next < blocks.end {
                    self.pool.ptr(self.cache.keys.whole[next - base])
                } else {
                    self.value_half((blocks.start + next - blocks.end).min(block))
                };
                product.ahead = (next as isize).wrapping_sub(keys as isize);
                if two {
                    // Two streams of memory at a time, and twice the independent sums.
                    let other = self.pool.ptr(self.cache.keys.whole[block + 1 - base]);
                    let way = (other as isize).wrapping_sub(keys as isize) / B::BYTES as isize;
                    product.b_pair = way as usize;
                    product.vectors = 4;
                    product.columns = 2 * BLOCK_TOKENS;
                    s.tile::<B>(&product);
                } else {
                    wide::<S, B>(s, product, BLOCK_TOKENS);
                }
            }
            block += 1 + usize::from(two);
        }
    }

    /// Products to weights, in place: their maximum and the sum of the weights.
    ///
    /// # Safety
    /// `row` has [`PART`] numbers, products where blocks are.
    #[inline(always)]
    unsafe fn softmax<S: Simd>(&self, s: S, shape: &AttendShape, row: &mut [f32]) -> (f32, f32) {
        let hidden = s.splat(f32::NEG_INFINITY);
        let blocks = self.blocks();
        let range = blocks.start * BLOCK_TOKENS - self.part..blocks.end * BLOCK_TOKENS - self.part;
        let from = (self.keys.start - self.part) as isize;
        let to = (self.keys.end - self.part) as isize;
        // SAFETY: whole blocks lie inside the row.
        unsafe {
            let mut largest = hidden;
            for at in range.clone().step_by(LANES) {
                let p = row.as_mut_ptr().add(at);
                let mut v = to_score(s, s.load(p), shape);
                if (at as isize) < from || (at + LANES) as isize > to {
                    v = s.keep(v, from - at as isize, to - at as isize, hidden);
                }
                s.store(p, v);
                largest = s.max(largest, v);
            }
            let max = s.largest(largest);
            let (by, mut total) = (s.splat(max), s.splat(0.0));
            for at in range.step_by(LANES) {
                let p = row.as_mut_ptr().add(at);
                let v = exp(s, s.sub(s.load(p), by));
                s.store(p, v);
                total = s.add(total, v);
            }
            (max, s.sum(total))
        }
    }

    /// Weights times values; values that the query does not see are not touched.
    ///
    /// # Safety
    /// As [`Self::products`].
    #[inline(always)]
    unsafe fn values<S: Simd, B: Source>(
        &self,
        s: S,
        rows: usize,
        weights: &[f32],
        sums: &mut [f32],
        tile: &mut [f32],
    ) {
        let whole = self.cache.values.first_whole_block();
        let dim = self.pool.head_dim();
        let padded = dim.next_multiple_of(LANES);
        let mut init: *const f32 = std::ptr::null();
        for block in self.blocks() {
            let base = block * BLOCK_TOKENS;
            let tokens = self.keys.start.max(base)..self.keys.end.min(base + BLOCK_TOKENS);
            // SAFETY: as above; a buffer can be read a vector beyond its last number.
            unsafe {
                let values = self.value_half(block);
                let lane = tokens.start - base;
                let mut product = Tile::product(
                    rows,
                    tokens.len(),
                    (weights.as_ptr().add(tokens.start - self.part), PART),
                    (values.wrapping_add(lane * dim * B::BYTES), dim),
                    (sums.as_mut_ptr(), padded),
                );
                product.init = init;
                product.init_stride = padded;
                let packed = self.cache.values.packed_tokens >= tokens.end;
                if let Some(codec) = self.cache.values.codec
                    && packed
                    && fused::takes_values::<S>(rows, dim)
                {
                    let next = self.cache.values.packed.get(block + LOOK_AHEAD);
                    let rows = fused::Rows {
                        rows,
                        left: product.a,
                        left_stride: product.a_stride,
                        out: product.out,
                        out_stride: padded,
                        soon: soon(self.pool, next, values),
                    };
                    let lanes = lane..tokens.end - base;
                    fused::values(S::ISA, codec, values, dim, lanes, init.is_null(), rows);
                } else if block < whole {
                    let (tile, end) = (tile.as_mut_ptr(), tokens.end - base);
                    value_tile::<S, B>(
                        s,
                        self.pool,
                        &self.cache.values,
                        block,
                        lane..end,
                        padded,
                        tile,
                    );
                    product.b = tile.add(lane * padded).cast::<u8>();
                    product.b_stride = padded;
                    wide::<S, F32>(s, product, padded);
                } else {
                    if block + LOOK_AHEAD < self.blocks().end {
                        let next = self.value_half(block + LOOK_AHEAD);
                        product.ahead = (next as isize).wrapping_sub(values as isize);
                    }
                    wide::<S, B>(s, product, padded);
                }
            }
            init = sums.as_ptr();
        }
    }
}

multiversion! {
    /// # Safety
    /// Nobody else writes this head's output.
    unsafe fn join(job: &Job<'_>, head: &Head, parts: &[f32]) = join_body
}

#[inline(always)]
unsafe fn join_body<S: Simd>(s: S, job: &Job<'_>, head: &Head, parts: &[f32]) {
    let shape = job.shape;
    let (group, padded) = (shape.group(), shape.head_dim.next_multiple_of(LANES));
    let size = part_size(shape);
    let mut scratch = Scratch::take(padded);
    let sums = scratch.floats();
    for i in 0..group {
        let at = i * (padded + LANES);
        let part = |p: usize| &parts[p * size + at..p * size + at + padded + LANES];
        let max = (0..head.parts).map(|p| part(p)[padded]).fold(f32::NEG_INFINITY, f32::max);
        sums.fill(0.0);
        let mut total = 0.0;
        for p in 0..head.parts {
            let part = part(p);
            // Hidden parts have no maximum to subtract from.
            if part[padded] > f32::NEG_INFINITY {
                let factor = s.to_array(exp(s, s.splat(part[padded] - max)))[0];
                total += part[padded + 1] * factor;
                for (sum, x) in sums.iter_mut().zip(part) {
                    *sum += x * factor;
                }
            }
        }
        let row = job.items[head.item].first_row;
        // SAFETY: by the contract.
        unsafe { job.finish(row, head.head * group + i, sums, max, total) };
    }
}
