//! Token embeddings, read from the packed table that is also the head.

use crate::gemm::Packed;
use crate::threads::{Threads, for_row_blocks};

/// Row i of `out` becomes `scale` times row `ids[i]` of the table.
///
/// # Panics
/// If an id is past the table or the result has another size.
pub fn embed(threads: &Threads, table: &Packed, ids: &[u32], scale: f32, out: &mut [f32]) {
    let width = table.k();
    assert!(out.len() == ids.len() * width);
    for_row_blocks(threads, out, width, 16, |first, rows| {
        for (i, row) in rows.chunks_mut(width).enumerate() {
            table.row(ids[first + i] as usize, row);
            if scale != 1.0 {
                for x in row {
                    *x *= scale;
                }
            }
        }
    });
}
