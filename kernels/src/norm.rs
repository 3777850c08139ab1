//! Root-mean-square norms of rows and of heads inside rows.

use crate::threads::{Threads, for_row_blocks};

/// Rows of a task.
const BLOCK: usize = 16;

/// The factor of one row; eight partial sums in a fixed order.
fn inverse_rms(row: &[f32], eps: f32) -> f32 {
    let mut sums = [0.0f32; 8];
    let chunks = row.chunks_exact(8);
    let rest: f32 = chunks.remainder().iter().map(|x| x * x).sum();
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += x * x;
        }
    }
    let total =
        ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
    1.0 / ((total + rest) / row.len() as f32 + eps).sqrt()
}

/// out = x / rms(x) * weight for every row of `width` values.
///
/// # Panics
/// If the slices do not fit each other.
pub fn rms_norm(
    threads: &Threads,
    x: &[f32],
    width: usize,
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    assert!(x.len() == out.len() && weight.len() == width && x.len().is_multiple_of(width));
    for_row_blocks(threads, out, width, BLOCK, |first, out| {
        for (i, out) in out.chunks_mut(width).enumerate() {
            let x = &x[(first + i) * width..(first + i + 1) * width];
            let factor = inverse_rms(x, eps);
            for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
                *out = x * factor * w;
            }
        }
    });
}

/// The same in place, for `heads` heads of `head_dim` channels from column `offset` of every row.
///
/// # Panics
/// If the heads reach past the row.
#[expect(clippy::too_many_arguments, reason = "a kernel takes raw parts")]
pub fn qk_norm(
    threads: &Threads,
    qkv: &mut [f32],
    qkv_width: usize,
    offset: usize,
    heads: usize,
    head_dim: usize,
    weight: &[f32],
    eps: f32,
) {
    assert!(offset + heads * head_dim <= qkv_width && weight.len() == head_dim);
    for_row_blocks(threads, qkv, qkv_width, BLOCK, |_, rows| {
        for row in rows.chunks_mut(qkv_width) {
            for head in row[offset..offset + heads * head_dim].chunks_mut(head_dim) {
                let factor = inverse_rms(head, eps);
                for (x, w) in head.iter_mut().zip(weight) {
                    *x = *x * factor * w;
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_by_hand() {
        let mut out = [0.0; 4];
        // Mean square of (1, 1, 7, 7) is 25.
        rms_norm(&Threads::new(1), &[1.0, 1.0, 7.0, 7.0], 4, &[1.0, 2.0, 1.0, 10.0], 0.0, &mut out);
        for (got, want) in out.iter().zip([0.2, 0.4, 1.4, 14.0]) {
            assert!((got - want).abs() < 1e-6, "{got} {want}");
        }
    }

    #[test]
    fn heads_are_normalised_one_by_one() {
        let mut qkv = [9.0, 3.0, 4.0, 0.0, 5.0, 9.0];
        qk_norm(&Threads::new(1), &mut qkv, 6, 1, 2, 2, &[1.0, 1.0], 0.0);
        let half = 0.5f32.sqrt();
        let expected = [9.0, 3.0 / 5.0 / half, 4.0 / 5.0 / half, 0.0, 1.0 / half, 9.0];
        for (got, want) in qkv.iter().zip(expected) {
            assert!((got - want).abs() < 1e-6, "{got} {want}");
        }
    }
}
