//! Many queries per sequence: tiles of queries against blocks of keys.

use super::{
    AttendItem, AttendShape, EMPTY, Running, check, hide_outside_window, padded, scores, soften,
    widen_values,
};
use crate::kv::{BLOCK_TOKENS, BlockPool, HeadCache, with_element};
use crate::simd::{Element, Simd, dispatch, isa};
use crate::threads::{Disjoint, Threads};
use crate::tile::rescale_and_add;

/// Rows (queries x heads of the group) of a tile: eight register tiles share one widened block.
const TILE: usize = 96;

/// One tile of queries of one KV head.
struct Task<'a> {
    head: &'a HeadCache,
    pool: &'a BlockPool,
    shape: &'a AttendShape,
    /// First query of the tile inside the sequence, and how many.
    queries: (usize, usize),
    /// Queries of the sequence in this step.
    sequence_rows: usize,
    /// First query head of the group.
    first_head: usize,
    /// The tile's first row of qkv.
    qkv: *const f32,
    qkv_width: usize,
    /// The tile's first row of the result.
    out: *mut f32,
    /// The tile's first row of log-sum-exp, or null.
    lse: *mut f32,
}

/// Attention of prompt chunks. Query head h of a row is its h-th group of `head_dim` columns. A sequence without cached
/// tokens gives zeros. `lse`, rows x heads, receives the logarithm of the softmax's denominator.
#[expect(clippy::too_many_arguments, reason = "a kernel takes raw parts")]
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
    check(items, pool, shape, qkv, qkv_width, out, lse.as_deref());
    let per_tile = (TILE / shape.group()).max(1);
    let mut tiles = Vec::new();
    for item in items {
        for kv_head in 0..shape.kv_heads {
            for first in (0..item.rows).step_by(per_tile) {
                tiles.push((item, kv_head, first, per_tile.min(item.rows - first)));
            }
        }
    }
    // Late queries see the most keys: starting with them leaves short tasks for the end.
    tiles.sort_by_key(|(_, _, first, _)| std::cmp::Reverse(*first));
    let out_width = shape.heads * shape.head_dim;
    let out = Disjoint::new(out);
    let lse = lse.map(Disjoint::new);
    let path = isa();
    threads.run(tiles.len(), |index| {
        let (item, kv_head, first, count) = &tiles[index];
        let row = item.first_row + first;
        // SAFETY: a tile writes only the columns of its heads in its own rows.
        let (out, lse) = unsafe {
            let lse = lse.as_ref().map_or(std::ptr::null_mut(), |l| l.pointer(row * shape.heads));
            (out.pointer(row * out_width), lse)
        };
        let task = Task {
            head: &item.heads[*kv_head],
            pool,
            shape,
            queries: (*first, *count),
            sequence_rows: item.rows,
            first_head: kv_head * shape.group(),
            qkv: qkv[row * qkv_width..].as_ptr(),
            qkv_width,
            out,
            lse,
        };
        with_element!(pool.format(), E => {
            // SAFETY: sizes were checked, the path is available.
            unsafe { run::<E>(path, &task) };
        });
    });
}

dispatch!(unsafe fn run<E: Element>(task: &Task<'_>) = body);

#[inline(always)]
unsafe fn body<S: Simd, E: Element>(task: &Task<'_>) {
    let shape = task.shape;
    let (dim, group) = (shape.head_dim, shape.group());
    let width = padded(dim);
    let (first, count) = task.queries;
    let rows = count * group;
    let tokens = task.head.tokens();
    let mut q = vec![0.0f32; rows * dim];
    let mut out = vec![0.0f32; rows * width];
    let mut weights = vec![0.0f32; rows * BLOCK_TOKENS];
    let mut factors = vec![1.0f32; rows];
    let mut running = vec![EMPTY; rows];
    let mut keys = vec![0.0f32; dim * BLOCK_TOKENS];
    let mut values = vec![0.0f32; BLOCK_TOKENS * width];
    // SAFETY: the rows and heads of the tile are inside qkv (checked).
    unsafe {
        for row in 0..rows {
            let from =
                task.qkv.add(row / group * task.qkv_width + (task.first_head + row % group) * dim);
            std::ptr::copy_nonoverlapping(from, q.as_mut_ptr().add(row * dim), dim);
        }
    }
    // Keys that query i of the tile sees.
    let visible = |i: usize| (tokens + first + i + 1).saturating_sub(task.sequence_rows);
    let positions = &task.head.positions;
    let most = if tokens == 0 { 0 } else { visible(count - 1) };
    for start in (0..most).step_by(BLOCK_TOKENS) {
        let here = BLOCK_TOKENS.min(tokens - start);
        let used = BLOCK_TOKENS.min(most - start);
        if let Some(window) = shape.window {
            let oldest_query = positions[visible(0) - 1];
            if positions[start + here - 1].saturating_add(window) <= oldest_query {
                continue;
            }
        }
        // SAFETY: the block holds `here` tokens of this head; the scratch buffers have the sizes above.
        unsafe {
            let block: *const E = task.pool.block::<E>(task.head.blocks[start / BLOCK_TOKENS]);
            for (i, key) in keys.iter_mut().enumerate() {
                *key = (*block.add(i)).widen();
            }
            widen_values(block.add(task.pool.value_offset()), used, dim, &mut values);
            scores::<S, f32>(
                q.as_ptr(),
                dim,
                rows,
                keys.as_ptr(),
                dim,
                shape.scale,
                shape.softcap,
                &mut weights,
            );
            for row in 0..rows {
                let sees = visible(row / group);
                let weights = &mut weights[row * BLOCK_TOKENS..(row + 1) * BLOCK_TOKENS];
                weights[sees.saturating_sub(start).min(BLOCK_TOKENS)..].fill(f32::NEG_INFINITY);
                let seen = &positions[start..start + here];
                hide_outside_window(weights, seen, positions[sees - 1], shape.window);
                factors[row] = soften::<S>(weights.as_mut_ptr(), &mut running[row]);
            }
            for column in (0..width).step_by(2 * S::LANES) {
                rescale_and_add::<S, f32>(
                    weights.as_ptr(),
                    BLOCK_TOKENS,
                    rows,
                    values.as_ptr().add(column),
                    width,
                    used,
                    factors.as_ptr(),
                    out.as_mut_ptr().add(column),
                    width,
                );
            }
        }
    }
    write(task, &out, &running);
}

fn write(task: &Task<'_>, out: &[f32], running: &[Running]) {
    let shape = task.shape;
    let (dim, group) = (shape.head_dim, shape.group());
    let width = padded(dim);
    for (row, Running { max, sum }) in running.iter().enumerate() {
        let (query, head) = (row / group, task.first_head + row % group);
        let inverse = if *sum > 0.0 { 1.0 / sum } else { 0.0 };
        for d in 0..dim {
            // SAFETY: this tile's own rows and heads, checked by the caller.
            unsafe {
                *task.out.add((query * shape.heads + head) * dim + d) =
                    out[row * width + d] * inverse;
            }
        }
        if !task.lse.is_null() {
            // SAFETY: as above.
            unsafe { *task.lse.add(query * shape.heads + head) = max + sum.ln() };
        }
    }
}
