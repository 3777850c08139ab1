//! Writes new keys and values into the caches.

use std::cell::Cell;

use crate::buffer::{Scratch, lines, split_lines};
use crate::kv::{BLOCK_TOKENS, BlockPool, HeadCache, PoolFull, with_format};
use crate::lists::recycle;
use crate::simd::{Isa, LANES, Simd, Source, isa, multiversion};
use crate::threads::{Disjoint, Threads};

/// The new tokens of one sequence in one layer.
pub struct AppendItem<'a> {
    /// Caches of its KV heads.
    pub heads: &'a mut [HeadCache],
    /// Its first row.
    pub first_row: usize,
    /// Its rows, one token each.
    pub rows: usize,
    /// Their positions in the sequence, ascending.
    pub positions: &'a [u32],
}

/// Appends each row's K and V, already rotated, to the caches of its sequence, rounded to the nearest number of the
/// cache's format. K of head h is at `key_offset + h * head_dim` of a row of `qkv`, V likewise.
///
/// # Errors
/// If the budget has no room for all items; nothing is changed then.
///
/// # Panics
/// If a row or a column lies outside `qkv`, or `head_dim` is not the pool's.
#[expect(clippy::too_many_arguments, reason = "the layout of a fused row")]
pub fn append(
    threads: &Threads,
    pool: &mut BlockPool,
    items: &mut [AppendItem<'_>],
    qkv: &[f32],
    qkv_width: usize,
    key_offset: usize,
    value_offset: usize,
    head_dim: usize,
) -> Result<(), PoolFull> {
    assert_eq!(head_dim, pool.head_dim(), "head_dim is not the pool's");
    for item in items.iter() {
        assert!((item.first_row + item.rows) * qkv_width <= qkv.len(), "rows outside qkv");
        assert_eq!(item.positions.len(), item.rows, "not one position per row");
        let last = key_offset.max(value_offset) + item.heads.len() * head_dim;
        assert!(last <= qkv_width, "columns outside qkv");
    }
    let missing = items
        .iter()
        .map(|i| i.heads.iter().map(|h| h.missing_bytes(pool, i.rows)).sum::<u64>())
        .sum();
    pool.check_room(missing)?;
    let mut list: Vec<Work<'_>> = recycle(WORK.take());
    for item in items.iter_mut() {
        for (index, head) in item.heads.iter_mut().enumerate() {
            head.reserve(pool, item.rows)?;
            list.push(Work {
                head,
                index,
                first_row: item.first_row,
                rows: item.rows,
                positions: item.positions,
            });
        }
    }
    let rows: usize = list.iter().map(|w| w.rows).sum();
    let isa = isa();
    let share =
        list.len().div_ceil(if rows * head_dim < 1 << 14 { 1 } else { threads.count() * 4 }).max(1);
    let tasks = list.len().div_ceil(share);
    let len = list.len();
    let work = Disjoint::new(&mut list);
    let pool = &*pool;
    threads.run(tasks, |task| {
        // SAFETY: each task has heads of its own.
        let part = unsafe { work.slice_mut(task * share..((task + 1) * share).min(len)) };
        for work in part {
            let from = Rows {
                key: key_offset + work.index * head_dim,
                value: value_offset + work.index * head_dim,
                qkv,
                width: qkv_width,
            };
            write(isa, pool, work, &from);
        }
    });
    WORK.set(recycle(list));
    Ok(())
}

thread_local! {
    /// The memory of a call's list, for the next call.
    static WORK: Cell<Vec<Work<'static>>> = const { Cell::new(Vec::new()) };
}

struct Work<'a> {
    head: &'a mut HeadCache,
    index: usize,
    first_row: usize,
    rows: usize,
    positions: &'a [u32],
}

struct Rows<'a> {
    qkv: &'a [f32],
    width: usize,
    key: usize,
    value: usize,
}

fn write(isa: Isa, pool: &BlockPool, work: &mut Work<'_>, from: &Rows<'_>) {
    // SAFETY: halves are reserved and belong to this head alone; rows and columns were checked by `append`.
    unsafe {
        with_format!(pool.format(), run::<B>(isa, pool, work, from));
    }
    work.head.positions.extend_from_slice(work.positions);
}

multiversion! { unsafe fn run<B: Source>(pool: &BlockPool, work: &Work<'_>, from: &Rows<'_>) = body }

/// # Safety
/// The head has halves for the rows, and nobody else uses them.
#[inline(always)]
unsafe fn body<S: Simd, B: Source>(s: S, pool: &BlockPool, work: &Work<'_>, from: &Rows<'_>) {
    let dim = pool.head_dim();
    let padded = dim.next_multiple_of(LANES);
    // Rows are converted as a whole, then the K part is scattered and the V part copied.
    let mut scratch = Scratch::take(2 * lines(padded));
    let scratch = scratch.floats();
    let (row, rest) = split_lines(scratch, padded);
    let (converted, _) = split_lines(rest, padded);
    let converted = converted.as_mut_ptr().cast::<u8>();
    let (keys, values) = (&work.head.keys, &work.head.values);
    for i in 0..work.rows {
        let token = work.head.tokens() + i;
        let (block, lane) = (token / BLOCK_TOKENS, token % BLOCK_TOKENS);
        let start = (work.first_row + i) * from.width;
        for (offset, is_key) in [(from.key, true), (from.value, false)] {
            row[..dim].copy_from_slice(&from.qkv[start + offset..start + offset + dim]);
            // SAFETY: scratch rows have whole vectors; the block has room for the token.
            unsafe {
                for at in (0..padded).step_by(LANES) {
                    B::store(s, converted.add(at * B::BYTES), s.load(row.as_ptr().add(at)));
                }
                if is_key {
                    let base = pool.ptr(keys.whole[block - keys.whole_base()]).add(lane * B::BYTES);
                    for d in 0..dim {
                        let to = base.add(d * BLOCK_TOKENS * B::BYTES);
                        std::ptr::copy_nonoverlapping(converted.add(d * B::BYTES), to, B::BYTES);
                    }
                } else {
                    let base = pool
                        .ptr(values.whole[block - values.whole_base()])
                        .add(lane * dim * B::BYTES);
                    std::ptr::copy_nonoverlapping(converted, base, dim * B::BYTES);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::KvFormat;
    use crate::simd::{fp8_bits, fp8_value};
    use half::{bf16, f16};

    #[test]
    fn rows_land_at_their_tokens_rounded_to_the_format() {
        let threads = Threads::new(2);
        let (dim, heads, rows) = (8, 2, 70);
        let width = 5 + 2 * heads * dim;
        let qkv: Vec<f32> = (0..rows * width).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        for format in [KvFormat::F32, KvFormat::F16, KvFormat::Bf16, KvFormat::Fp8] {
            let mut pool = BlockPool::new(dim, format, 1 << 20);
            let mut caches: Vec<HeadCache> = (0..heads).map(|_| HeadCache::default()).collect();
            for (first, count) in [(0, 33), (33, 1), (34, 36)] {
                let positions: Vec<u32> = (first as u32..).take(count).collect();
                let mut items = [AppendItem {
                    heads: &mut caches,
                    first_row: first,
                    rows: count,
                    positions: &positions,
                }];
                append(&threads, &mut pool, &mut items, &qkv, width, 5, 5 + heads * dim, dim)
                    .expect("room");
            }
            let round = |x: f32| match format {
                KvFormat::F32 => x,
                KvFormat::F16 => f16::from_f32(x).to_f32(),
                KvFormat::Bf16 => bf16::from_f32(x).to_f32(),
                KvFormat::Fp8 => fp8_value(fp8_bits(x)),
            };
            for (h, cache) in caches.iter().enumerate() {
                assert_eq!(cache.positions, (0..rows as u32).collect::<Vec<_>>());
                for t in 0..rows {
                    let key: Vec<f32> =
                        (0..dim).map(|d| round(qkv[t * width + 5 + h * dim + d])).collect();
                    let value: Vec<f32> = (0..dim)
                        .map(|d| round(qkv[t * width + 5 + (heads + h) * dim + d]))
                        .collect();
                    assert_eq!(cache.key(&pool, t), key);
                    assert_eq!(cache.value(&pool, t), value);
                }
            }
        }
    }

    #[test]
    fn a_full_pool_changes_nothing() {
        let threads = Threads::new(1);
        let mut pool = BlockPool::new(8, KvFormat::F16, 3 * 1024);
        let mut caches: Vec<HeadCache> = (0..4).map(|_| HeadCache::default()).collect();
        let qkv = vec![1.0; 16];
        let mut items: Vec<AppendItem<'_>> = caches
            .iter_mut()
            .map(|c| AppendItem {
                heads: std::slice::from_mut(c),
                first_row: 0,
                rows: 1,
                positions: &[0],
            })
            .collect();
        let full = append(&threads, &mut pool, &mut items, &qkv, 16, 0, 8, 8).expect_err("no room");
        assert_eq!((full.requested, full.held), (4096, 0));
        assert!(caches.iter().all(|c| c.keys.count() == 0 && c.tokens() == 0));
        assert_eq!(pool.held_bytes(), 0);
    }
}
