//! Embedding look-up.

use crate::gemm::Packed;
use crate::threads::Threads;

/// Writes row `ids[i]` of `table`, times `scale`, to row `i` of `out`.
///
/// # Panics
/// If an id is outside the table or `out` is not one row per id.
pub fn embed(threads: &Threads, table: &Packed, ids: &[u32], scale: f32, out: &mut [f32]) {
    assert_eq!(out.len(), ids.len() * table.k(), "out is not one row per id");
    threads.for_rows(out, table.k(), |first, out| {
        for (id, row) in ids[first..].iter().zip(out.chunks_exact_mut(table.k())) {
            table.row(*id as usize, row);
            // Times one would be exact too, but most models have no scale.
            if scale != 1.0 {
                row.iter_mut().for_each(|x| *x *= scale);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::WeightFormat;

    #[test]
    fn rows_are_looked_up_and_scaled() {
        let threads = Threads::new(2);
        for format in [WeightFormat::F32, WeightFormat::Bf16] {
            let table = Packed::pack(70, 3, format, |i, row| {
                row.iter_mut().enumerate().for_each(|(j, x)| *x = (i as f32) + j as f32 * 0.25);
            });
            let mut out = [0.0; 9];
            embed(&threads, &table, &[0, 63, 31], 2.0, &mut out);
            assert_eq!(out, [0.0, 0.5, 1.0, 126.0, 126.5, 127.0, 62.0, 62.5, 63.0]);
        }
    }
}
