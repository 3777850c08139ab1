//! One query per sequence: the heads of a group share each key they read.
//!
//! A long cache is cut into partitions of a fixed length, so that one sequence can keep several threads busy; the
//! partitions are joined in order, so the result does not depend on who computed them.

use super::{
    AttendItem, AttendShape, EMPTY, Running, check, hide_outside_window, padded, scores, soften,
    widen_values,
};
use crate::kv::{BLOCK_TOKENS, BlockPool, HeadCache, with_element};
use crate::simd::{Element, Simd, dispatch, isa};
use crate::threads::{Disjoint, Threads};
use crate::tile::rescale_and_add;

/// Tokens of a partition: with 64 channels in 16 bits it is 64 KiB, a few microseconds of reading.
const PARTITION: usize = 256;

/// One partition of one KV head's cache.
struct Task<'a> {
    head: &'a HeadCache,
    pool: &'a BlockPool,
    shape: &'a AttendShape,
    tokens: (usize, usize),
    /// The group's queries.
    q: *const f32,
    /// Per head of the group: maximum, sum, then `padded(head_dim)` channels.
    partial: &'a mut [f32],
}

/// Attention of one query per item. Arguments as of [`super::attend_prefill`].
#[expect(clippy::too_many_arguments, reason = "a kernel takes raw parts")]
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
    check(items, pool, shape, qkv, qkv_width, out, lse.as_deref());
    assert!(items.iter().all(|i| i.rows == 1), "decode takes one query a sequence");
    let group = shape.group();
    let stride = group * (2 + padded(shape.head_dim));
    // (item, KV head, first token) of every partition; a head's partitions are neighbours.
    let mut parts = Vec::new();
    let mut heads = Vec::with_capacity(items.len() * shape.kv_heads);
    for (index, item) in items.iter().enumerate() {
        for (kv_head, head) in item.heads.iter().enumerate() {
            let from = parts.len();
            parts.extend((0..head.tokens()).step_by(PARTITION).map(|t| (index, kv_head, t)));
            heads.push((index, kv_head, from..parts.len()));
        }
    }
    let mut partials = vec![0.0f32; parts.len() * stride];
    let path = isa();
    {
        let partials = Disjoint::new(&mut partials);
        threads.run(parts.len(), |i| {
            let (index, kv_head, start) = parts[i];
            let item = &items[index];
            let head = &item.heads[kv_head];
            let first_column = item.first_row * qkv_width + kv_head * group * shape.head_dim;
            let task = Task {
                head,
                pool,
                shape,
                tokens: (start, (start + PARTITION).min(head.tokens())),
                q: qkv[first_column..].as_ptr(),
                // SAFETY: every task takes its own part.
                partial: unsafe { partials.part(i * stride..(i + 1) * stride) },
            };
            with_element!(pool.format(), E => {
                // SAFETY: sizes were checked, the path is available.
                unsafe { run::<E>(path, task) };
            });
        });
    }
    let mut lse = lse;
    for (index, kv_head, range) in heads {
        let row = items[index].first_row;
        let partials = &partials[range.start * stride..range.end * stride];
        for g in 0..group {
            let head = kv_head * group + g;
            let to = (row * shape.heads + head) * shape.head_dim;
            let total = join(partials, stride, g, &mut out[to..to + shape.head_dim]);
            if let Some(lse) = &mut lse {
                lse[row * shape.heads + head] = total;
            }
        }
    }
}

/// Joins one head's partitions in order; returns the log-sum-exp.
fn join(partials: &[f32], stride: usize, g: usize, out: &mut [f32]) -> f32 {
    let width = padded(out.len());
    let of = |part: &'_ [f32]| -> (f32, f32, usize) {
        let at = g * (2 + width);
        (part[at], part[at + 1], at + 2)
    };
    let max = partials.chunks(stride).map(|p| of(p).0).fold(f32::NEG_INFINITY, f32::max);
    out.fill(0.0);
    if max == f32::NEG_INFINITY {
        return max;
    }
    let mut sum = 0.0f32;
    for part in partials.chunks(stride) {
        let (own, own_sum, at) = of(part);
        let factor = if own == max { 1.0 } else { (own - max).exp() };
        sum += own_sum * factor;
        for (out, value) in out.iter_mut().zip(&part[at..]) {
            *out += value * factor;
        }
    }
    for value in out.iter_mut() {
        *value /= sum;
    }
    max + sum.ln()
}

dispatch!(unsafe fn run<E: Element>(task: Task<'_>) = body);

#[inline(always)]
unsafe fn body<S: Simd, E: Element>(task: Task<'_>) {
    let shape = task.shape;
    let (dim, group) = (shape.head_dim, shape.group());
    let width = padded(dim);
    let wide = 2 * S::LANES;
    let mut weights = vec![0.0f32; group * BLOCK_TOKENS];
    let mut factors = vec![1.0f32; group];
    let mut running = vec![EMPTY; group];
    let mut out = vec![0.0f32; group * width];
    // Where channels do not fill the tiles, values go through a padded copy.
    let direct = dim.is_multiple_of(wide);
    let mut values = if direct { Vec::new() } else { vec![0.0f32; BLOCK_TOKENS * width] };
    let positions = &task.head.positions;
    let query = positions[positions.len() - 1];
    for start in (task.tokens.0..task.tokens.1).step_by(BLOCK_TOKENS) {
        let here = BLOCK_TOKENS.min(task.tokens.1 - start);
        // SAFETY: the block holds `here` tokens of this head; the scratch buffers have the sizes above.
        unsafe {
            let block: *const E = task.pool.block::<E>(task.head.blocks[start / BLOCK_TOKENS]);
            scores::<S, E>(
                task.q,
                dim,
                group,
                block,
                dim,
                shape.scale,
                shape.softcap,
                &mut weights,
            );
            for g in 0..group {
                let weights = &mut weights[g * BLOCK_TOKENS..(g + 1) * BLOCK_TOKENS];
                weights[here..].fill(f32::NEG_INFINITY);
                hide_outside_window(weights, &positions[start..start + here], query, shape.window);
                factors[g] = soften::<S>(weights.as_mut_ptr(), &mut running[g]);
            }
            let from = block.add(task.pool.value_offset());
            if direct {
                for column in (0..dim).step_by(wide) {
                    rescale_and_add::<S, E>(
                        weights.as_ptr(),
                        BLOCK_TOKENS,
                        group,
                        from.add(column),
                        dim,
                        here,
                        factors.as_ptr(),
                        out.as_mut_ptr().add(column),
                        width,
                    );
                }
            } else {
                widen_values(from, here, dim, &mut values);
                for column in (0..width).step_by(wide) {
                    rescale_and_add::<S, f32>(
                        weights.as_ptr(),
                        BLOCK_TOKENS,
                        group,
                        values.as_ptr().add(column),
                        width,
                        here,
                        factors.as_ptr(),
                        out.as_mut_ptr().add(column),
                        width,
                    );
                }
            }
        }
    }
    for (g, Running { max, sum }) in running.iter().enumerate() {
        let part = &mut task.partial[g * (2 + width)..(g + 1) * (2 + width)];
        part[0] = *max;
        part[1] = *sum;
        part[2..].copy_from_slice(&out[g * width..(g + 1) * width]);
    }
}
