//! The attention that each cached token receives from some of a step's queries, recomputed from the queries, the keys and
//! the softmax's denominators that attention left behind.

use super::{AttendShape, hide_outside_window, scores};
use crate::kv::{BLOCK_TOKENS, BlockPool, HeadCache, with_element};
use crate::simd::{Element, Simd, dispatch, isa};

/// Queries worked on at once.
const QUERIES: usize = 32;

/// What [`attention_mass`] reads.
pub(crate) struct Mass<'a> {
    pub(crate) head: &'a HeadCache,
    pub(crate) pool: &'a BlockPool,
    pub(crate) shape: &'a AttendShape,
    /// KV head.
    pub(crate) kv_head: usize,
    /// First row of the sequence in the step, and its rows.
    pub(crate) first_row: usize,
    pub(crate) rows: usize,
    /// The last of its rows that count.
    pub(crate) last: usize,
    pub(crate) qkv: &'a [f32],
    pub(crate) qkv_width: usize,
    /// rows x heads.
    pub(crate) lse: &'a [f32],
}

/// The task of one head: `rows` are (first row, rows, the last that count), `step` is (qkv, its width, log-sum-exp).
pub(crate) fn mass_task<'a>(
    head: &'a HeadCache,
    pool: &'a BlockPool,
    shape: &'a AttendShape,
    kv_head: usize,
    (first_row, rows, last): (usize, usize, usize),
    (qkv, qkv_width, lse): (&'a [f32], usize, &'a [f32]),
) -> Mass<'a> {
    Mass { head, pool, shape, kv_head, first_row, rows, last, qkv, qkv_width, lse }
}

/// Adds to `mass`, one place per cached token, the probabilities that the last `last` queries of a sequence give it,
/// summed over queries and over the heads of the group, query after query.
pub(crate) fn attention_mass(task: &Mass<'_>, mass: &mut [f32]) {
    assert!(mass.len() == task.head.tokens());
    assert!((task.first_row + task.rows) * task.qkv_width <= task.qkv.len());
    assert!((task.first_row + task.rows) * task.shape.heads <= task.lse.len());
    let path = isa();
    with_element!(task.pool.format(), E => {
        // SAFETY: sizes were checked, the path is available.
        unsafe { run::<E>(path, task, mass) };
    });
}

dispatch!(unsafe fn run<E: Element>(task: &Mass<'_>, mass: &mut [f32]) = body);

#[inline(always)]
unsafe fn body<S: Simd, E: Element>(task: &Mass<'_>, mass: &mut [f32]) {
    let shape = task.shape;
    let (dim, group) = (shape.head_dim, shape.group());
    let tokens = task.head.tokens();
    let positions = &task.head.positions;
    let mut keys = vec![0.0f32; dim * BLOCK_TOKENS];
    let mut weights = vec![0.0f32; QUERIES * group * BLOCK_TOKENS];
    let mut q = vec![0.0f32; QUERIES * group * dim];
    let last = task.last.min(task.rows);
    for first in (task.rows - last..task.rows).step_by(QUERIES) {
        let count = QUERIES.min(task.rows - first);
        for i in 0..count {
            let from = (task.first_row + first + i) * task.qkv_width + task.kv_head * group * dim;
            q[i * group * dim..(i + 1) * group * dim]
                .copy_from_slice(&task.qkv[from..from + group * dim]);
        }
        let visible = |i: usize| (tokens + first + i + 1).saturating_sub(task.rows);
        for start in (0..visible(count - 1)).step_by(BLOCK_TOKENS) {
            let here = BLOCK_TOKENS.min(tokens - start);
            // SAFETY: the block holds `here` tokens of this head; the buffers have the sizes above.
            unsafe {
                let block: *const E = task.pool.block::<E>(task.head.blocks[start / BLOCK_TOKENS]);
                for (i, key) in keys.iter_mut().enumerate() {
                    *key = (*block.add(i)).widen();
                }
                scores::<S, f32>(
                    q.as_ptr(),
                    dim,
                    count * group,
                    keys.as_ptr(),
                    dim,
                    shape.scale,
                    shape.softcap,
                    &mut weights,
                );
            }
            for i in 0..count {
                let sees = visible(i);
                let lse = (task.first_row + first + i) * shape.heads + task.kv_head * group;
                for g in 0..group {
                    let at = (i * group + g) * BLOCK_TOKENS;
                    let row = &mut weights[at..at + BLOCK_TOKENS];
                    row[sees.saturating_sub(start).min(here)..].fill(f32::NEG_INFINITY);
                    let seen = &positions[start..start + here];
                    hide_outside_window(row, seen, positions[sees - 1], shape.window);
                    // SAFETY: a row has 32 places.
                    unsafe { exponentials::<S>(row, task.lse[lse + g]) };
                    for (sum, p) in mass[start..start + here].iter_mut().zip(row.iter()) {
                        *sum += p;
                    }
                }
            }
        }
    }
}

/// e^(score - lse) of 32 scores.
#[inline(always)]
unsafe fn exponentials<S: Simd>(row: &mut [f32], lse: f32) {
    for i in (0..BLOCK_TOKENS).step_by(S::LANES) {
        // SAFETY: the row has 32 places.
        unsafe {
            let at = row.as_mut_ptr().add(i);
            S::store(at, S::exp(S::sub(S::load(at), S::splat(lse))));
        }
    }
}
