//! Writes a step's keys and values to the caches.

use crate::kv::{BLOCK_TOKENS, BlockPool, HeadCache, PoolFull, with_element};
use crate::simd::Element;
use crate::threads::{Disjoint, Threads};

/// One sequence's new tokens in one layer.
pub struct AppendItem<'a> {
    /// Its KV heads.
    pub heads: &'a mut [HeadCache],
    /// First row of the step that is its own.
    pub first_row: usize,
    /// How many rows.
    pub rows: usize,
    /// Position of the first.
    pub first_position: u32,
}

/// Appends the keys and values of `qkv` (rotated already), `qkv_width` columns a row, to every head of every item. Where
/// the pool has no room for all of them, nothing is changed.
///
/// # Panics
/// If an item's rows are past the end of `qkv`.
#[expect(clippy::too_many_arguments, reason = "a kernel takes raw parts")]
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
    let missing: usize = items
        .iter()
        .map(|item| item.heads.iter().map(|h| h.missing_blocks(item.rows)).sum::<usize>())
        .sum();
    pool.check(missing)?;
    let mut tasks = Vec::with_capacity(items.len());
    for item in items.iter_mut() {
        let last = item.first_row + item.rows;
        assert!(last * qkv_width <= qkv.len(), "rows up to {last} of {}", qkv.len() / qkv_width);
        for (index, head) in item.heads.iter_mut().enumerate() {
            head.reserve(pool, item.rows)?;
            tasks.push((index, item.first_row, item.rows, item.first_position, head));
        }
    }
    let pool = &*pool;
    let count = tasks.len();
    let tasks = Disjoint::new(&mut tasks);
    threads.run(count, |i| {
        // SAFETY: every task takes its own element.
        let (index, first_row, rows, position, head) = &mut unsafe { tasks.part(i..i + 1) }[0];
        let key = key_offset + *index * head_dim;
        let value = value_offset + *index * head_dim;
        for row in 0..*rows {
            let from = &qkv[(*first_row + row) * qkv_width..(*first_row + row + 1) * qkv_width];
            let token = head.tokens();
            let slot = token % BLOCK_TOKENS;
            let id = head.blocks[token / BLOCK_TOKENS];
            with_element!(pool.format(), E => {
                let block: *mut E = pool.block(id);
                let values = pool.value_offset() + slot * head_dim;
                for d in 0..head_dim {
                    // SAFETY: inside the block, which belongs to this head alone.
                    unsafe {
                        block.add(d * BLOCK_TOKENS + slot).write(E::narrow(from[key + d]));
                        block.add(values + d).write(E::narrow(from[value + d]));
                    }
                }
            });
            head.positions.push(*position + row as u32);
            if !head.tally.is_empty() {
                head.tally.push(0.0);
            }
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::KvFormat;

    #[test]
    fn keys_and_values_come_back() {
        let threads = Threads::new(2);
        let mut pool = BlockPool::new(8, KvFormat::F32, 1 << 20);
        let mut heads = vec![HeadCache::default(), HeadCache::default()];
        // One row: 8 query columns, 2 x 8 of keys, 2 x 8 of values.
        let qkv: Vec<f32> = (0..40 * 40).map(|i| i as f32).collect();
        let mut items =
            [AppendItem { heads: &mut heads, first_row: 1, rows: 35, first_position: 7 }];
        append(&threads, &mut pool, &mut items, &qkv, 40, 8, 24, 8).expect("room");
        assert_eq!(heads[1].positions, (7..42).collect::<Vec<u32>>());
        let row = 34.0 * 40.0;
        assert_eq!(heads[1].key(&pool, 33), (16..24).map(|c| row + c as f32).collect::<Vec<_>>());
        assert_eq!(heads[0].value(&pool, 33), (24..32).map(|c| row + c as f32).collect::<Vec<_>>());
    }

    #[test]
    fn a_full_pool_changes_nothing() {
        let threads = Threads::new(1);
        let mut pool = BlockPool::new(8, KvFormat::F32, 3000);
        let mut heads = vec![HeadCache::default(), HeadCache::default()];
        let qkv = vec![0.0; 40];
        let mut items =
            [AppendItem { heads: &mut heads, first_row: 0, rows: 1, first_position: 0 }];
        assert!(append(&threads, &mut pool, &mut items, &qkv, 40, 8, 24, 8).is_err());
        assert_eq!(pool.held_bytes(), 0);
        assert_eq!(heads[0].tokens(), 0);
    }
}
