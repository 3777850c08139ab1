//! The attention that cached tokens receive from query rows of a step, worked out again from queries, keys and the
//! softmax's denominators.

use std::ops::Range;

use crate::attend::{AttendShape, to_score, visible};
use crate::buffer::{Scratch, lines, split_lines};
use crate::kv::tile::{Rows, key_tile};
use crate::kv::{BLOCK_TOKENS, BlockPool, Halves, HeadCache, with_format};
use crate::simd::math::exp;
use crate::simd::{F32, Isa, LANES, Simd, Source, multiversion};
use crate::threads::{Disjoint, Threads};
use crate::tile::{Tile, wide};

/// Tokens of a task.
const PART: usize = 512;

/// What this step's attention read and wrote.
pub(super) struct Step<'a> {
    pub(super) shape: &'a AttendShape,
    pub(super) qkv: &'a [f32],
    pub(super) qkv_width: usize,
    pub(super) lse: &'a [f32],
}

/// Rows of one sequence whose attention is to be added.
pub(super) struct Mass<'a> {
    pub(super) heads: &'a mut [HeadCache],
    pub(super) first_row: usize,
    pub(super) rows: usize,
    /// The last of the rows that count.
    pub(super) last: usize,
    /// What their sum over the group's heads is divided by, beside the number of heads.
    pub(super) by: usize,
    /// Start from zero.
    pub(super) anew: bool,
    /// The one query head of each group that counts, if not all do.
    pub(super) only: Option<usize>,
}

/// A task: some tokens of one head.
struct Part<'a> {
    positions: &'a [u32],
    keys: &'a Halves,
    tally: &'a mut [f32],
    /// First token.
    first: usize,
    kv_head: usize,
    first_row: usize,
    rows: usize,
    last: usize,
    /// Query heads of the group that count.
    queries: Range<usize>,
    weight: f32,
}

/// Adds the rows' attention to the tallies of their caches.
pub(super) fn add(
    isa: Isa,
    threads: &Threads,
    pool: &BlockPool,
    work: Vec<Mass<'_>>,
    step: &Step<'_>,
) {
    step.shape.check(pool, step.qkv, step.qkv_width);
    let rows = (step.qkv.len() / step.qkv_width).min(step.lse.len() / step.shape.heads);
    let mut parts = Vec::new();
    for work in work {
        step.shape.check_item(work.heads.len(), work.first_row + work.rows, rows);
        let queries = work.only.map_or(0..step.shape.group(), |h| h..h + 1);
        let weight = 1.0 / (queries.len() * work.by) as f32;
        for (kv_head, head) in work.heads.iter_mut().enumerate() {
            if work.anew {
                head.tally.clear();
            }
            head.tally.resize(head.positions.len(), 0.0);
            let HeadCache { keys, positions, tally, .. } = head;
            for (i, tally) in tally.chunks_mut(PART).enumerate() {
                parts.push(Part {
                    positions,
                    keys,
                    tally,
                    first: i * PART,
                    kv_head,
                    first_row: work.first_row,
                    rows: work.rows,
                    last: work.last,
                    queries: queries.clone(),
                    weight,
                });
            }
        }
    }
    let count = parts.len();
    let parts = Disjoint::new(&mut parts);
    threads.run(count, |i| {
        // SAFETY: each task has its own part; rows and heads are checked above.
        unsafe { with_format!(pool.format(), run::<B>(isa, pool, step, parts.item_mut(i))) }
    });
}

multiversion! {
    /// # Safety
    /// The part's rows lie in `qkv` and `lse`, its blocks in the pool.
    unsafe fn run<B: Source>(pool: &BlockPool, step: &Step<'_>, part: &mut Part<'_>) = body
}

#[inline(always)]
unsafe fn body<S: Simd, B: Source>(s: S, pool: &BlockPool, step: &Step<'_>, part: &mut Part<'_>) {
    let shape = step.shape;
    let (dim, group) = (shape.head_dim, shape.group());
    // Tiles of rows, one query head after the other, so that rows and heads can be added in one fixed order.
    let tile_size = if part.keys.narrow_tokens() == 0 { 0 } else { dim * BLOCK_TOKENS };
    let score_size = group * S::TILE_ROWS * BLOCK_TOKENS;
    let mut scratch = Scratch::take(lines(score_size) + lines(tile_size));
    let (scores, rest) = split_lines(scratch.floats(), score_size);
    let (tile, _) = split_lines(rest, tile_size);
    for first in (part.rows - part.last..part.rows).step_by(S::TILE_ROWS) {
        let rows = first..(first + S::TILE_ROWS).min(part.rows);
        let mut seen = [const { 0..0 }; 16];
        for (seen, row) in seen.iter_mut().zip(rows.clone()) {
            *seen = visible(part.positions, part.rows, row, shape.window);
        }
        let seen = &seen[..rows.len()];
        let end = seen.iter().map(|r| r.end).max().unwrap_or(0).min(part.first + part.tally.len());
        let start = seen.iter().map(|r| r.start).min().unwrap_or(0).max(part.first);
        for block in start / BLOCK_TOKENS..end.div_ceil(BLOCK_TOKENS) {
            if block * BLOCK_TOKENS < part.first {
                continue;
            }
            let narrow = block < part.keys.first_whole_block();
            let keys = if narrow {
                // SAFETY: the block is the caller's contract, the tile has 32 floats per channel.
                unsafe {
                    key_tile::<S, B>(s, pool, part.keys, block, Rows::All, tile.as_mut_ptr());
                }
                tile.as_ptr().cast()
            } else {
                pool.ptr(part.keys.whole[block - part.keys.whole_base()]).cast_const()
            };
            let row = part.first_row + rows.start;
            for h in part.queries.clone() {
                let head = part.kv_head * group + h;
                // SAFETY: rows and block are the caller's contract, the tile is inside the scratch space.
                unsafe {
                    let queries = step.qkv.as_ptr().add(row * step.qkv_width + head * dim);
                    let out = scores.as_mut_ptr().add(h * S::TILE_ROWS * BLOCK_TOKENS);
                    let product = Tile::product(
                        rows.len(),
                        dim,
                        (queries, step.qkv_width),
                        (keys, BLOCK_TOKENS),
                        (out, BLOCK_TOKENS),
                    );
                    if narrow {
                        wide::<S, F32>(s, product, BLOCK_TOKENS);
                    } else {
                        wide::<S, B>(s, product, BLOCK_TOKENS);
                    }
                }
            }
            // SAFETY: as above.
            unsafe { add_block(s, step, part, block, row, seen, scores) };
        }
    }
}

/// Adds the probabilities of one block's tokens.
///
/// # Safety
/// As [`run`]; the scores are those of the block.
#[inline(always)]
unsafe fn add_block<S: Simd>(
    s: S,
    step: &Step<'_>,
    part: &mut Part<'_>,
    block: usize,
    row: usize,
    seen: &[Range<usize>],
    scores: &[f32],
) {
    let shape = step.shape;
    let group = shape.group();
    let base = block * BLOCK_TOKENS;
    let (zero, weight) = (s.splat(0.0), s.splat(part.weight));
    for half in 0..2 {
        let from = base + half * LANES;
        let at = from - part.first;
        let count = part.tally.len().saturating_sub(at).min(LANES);
        if count == 0 {
            break;
        }
        // SAFETY: `count` tallies remain; scores lie in the tiles.
        unsafe {
            let tally = part.tally.as_mut_ptr().add(at);
            let mut sum = s.load_part(tally, count, 0.0);
            for (i, seen) in seen.iter().enumerate() {
                let keep_from = seen.start as isize - from as isize;
                let keep_to = seen.end as isize - from as isize;
                for h in part.queries.clone() {
                    let lse = step.lse[(row + i) * shape.heads + part.kv_head * group + h];
                    let tile = (h * S::TILE_ROWS + i) * BLOCK_TOKENS + half * LANES;
                    let score = to_score(s, s.load(scores[tile..tile + LANES].as_ptr()), shape);
                    let p = exp(s, s.sub(score, s.splat(lse)));
                    sum = s.mul_add(s.keep(p, keep_from, keep_to, zero), weight, sum);
                }
            }
            s.store_part(tally, sum, count);
        }
    }
}
