//! Caches whose every token is packed when it comes.

use std::ops::Range;

use super::encode::{put_tokens, put_value};
use crate::append::AppendItem;
use crate::buffer::Scratch;
use crate::kv::pool::blocks;
use crate::kv::{BLOCK_TOKENS, BlockPool, Codec, HeadCache, KeyAxis, PoolFull};
use crate::simd::{Isa, isa};
use crate::threads::{Disjoint, Threads};

/// Appends as [`crate::append::append`] does, but packs each token at once, from the floats of its row, so that no token is
/// ever held whole.
///
/// # Errors
/// If the budget has no room for all items; nothing is changed then.
///
/// # Panics
/// If a row or a column lies outside `qkv`, `head_dim` is not the pool's, keys are not packed token by token
/// ([`KeyAxis::Token`]), or a cache holds tokens of another form.
#[expect(clippy::too_many_arguments, reason = "the layout of a fused row")]
pub fn append_packed(
    threads: &Threads,
    pool: &mut BlockPool,
    items: &mut [AppendItem<'_>],
    qkv: &[f32],
    qkv_width: usize,
    key_offset: usize,
    value_offset: usize,
    head_dim: usize,
    codec: Codec,
) -> Result<(), PoolFull> {
    assert_eq!(head_dim, pool.head_dim(), "head_dim is not the pool's");
    assert!(codec.is_valid(), "no codes like {codec:?}");
    assert!(codec.key_axis == KeyAxis::Token, "keys along channels can't be packed one by one");
    let (key_bytes, value_bytes) =
        (codec.key_half_bytes(head_dim), codec.value_half_bytes(head_dim));
    let mut wanted = 0;
    for item in items.iter() {
        assert!((item.first_row + item.rows) * qkv_width <= qkv.len(), "rows outside qkv");
        let last = key_offset.max(value_offset) + item.heads.len() * head_dim;
        assert!(last <= qkv_width, "columns outside qkv");
        for head in item.heads.iter() {
            for side in [&head.keys, &head.values] {
                let all = side.packed_tokens == head.tokens() && side.kept.is_none();
                let same = side.codec.is_none_or(|c| c == codec || head.tokens() == 0);
                assert!(all && same, "a cache holds tokens of another form");
            }
            let needed = blocks(head.tokens() + item.rows);
            wanted += (needed - head.keys.packed.len()) * key_bytes;
            wanted += (needed - head.values.packed.len()) * value_bytes;
        }
    }
    pool.exchange(0, wanted as u64)?;
    let mut work = Vec::new();
    for item in items.iter_mut() {
        for (index, head) in item.heads.iter_mut().enumerate() {
            let needed = blocks(head.tokens() + item.rows);
            for (side, bytes) in [(&mut head.keys, key_bytes), (&mut head.values, value_bytes)] {
                side.codec = Some(codec);
                while side.packed.len() < needed {
                    side.packed.push(pool.try_alloc_bytes(bytes)?);
                }
            }
            let rows = item.first_row..item.first_row + item.rows;
            work.push(Work { head, index, rows, positions: item.positions });
        }
    }
    let (count, isa, pool) = (work.len(), isa(), &*pool);
    let parts = Disjoint::new(&mut work);
    threads.run(count, |i| {
        // SAFETY: each task has a head of its own, with packed halves for the rows.
        unsafe {
            let work = parts.item_mut(i);
            let from = Columns {
                qkv,
                width: qkv_width,
                key: key_offset + work.index * head_dim,
                value: value_offset + work.index * head_dim,
            };
            write(isa, pool, codec, work, &from);
        }
        // SAFETY: as above.
        let Work { head, positions, .. } = unsafe { parts.item_mut(i) };
        head.positions.extend_from_slice(positions);
        for side in [&mut head.keys, &mut head.values] {
            side.packed_tokens += positions.len();
            side.narrow_tokens = side.packed_tokens;
        }
    });
    Ok(())
}

struct Work<'a> {
    head: &'a mut HeadCache,
    index: usize,
    rows: Range<usize>,
    positions: &'a [u32],
}

struct Columns<'a> {
    qkv: &'a [f32],
    width: usize,
    key: usize,
    value: usize,
}

/// # Safety
/// The head has packed halves for the rows, which nobody else uses; rows and columns lie in `qkv`.
unsafe fn write(isa: Isa, pool: &BlockPool, codec: Codec, work: &Work<'_>, from: &Columns<'_>) {
    let dim = pool.head_dim();
    let mut scratch = Scratch::take(dim * BLOCK_TOKENS);
    let tile = scratch.floats();
    let first = work.head.tokens();
    let end = first + work.rows.len();
    for block in first / BLOCK_TOKENS..blocks(end) {
        let base = block * BLOCK_TOKENS;
        let lanes = first.max(base) - base..end.min(base + BLOCK_TOKENS) - base;
        for lane in lanes.clone() {
            let start = (work.rows.start + base + lane - first) * from.width;
            let key = &from.qkv[start + from.key..start + from.key + dim];
            for (row, x) in tile.chunks_exact_mut(BLOCK_TOKENS).zip(key) {
                row[lane] = *x;
            }
            let value = &from.qkv[start + from.value..start + from.value + dim];
            // SAFETY: the half is this head's alone.
            unsafe { put_value(isa, codec, value, lane, pool.ptr(work.head.values.packed[block])) };
        }
        // SAFETY: as above.
        unsafe { put_tokens(isa, codec, lanes, dim, tile, pool.ptr(work.head.keys.packed[block])) };
    }
}
