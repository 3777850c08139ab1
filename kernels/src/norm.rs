//! Root-mean-square norms.
//!
//! The squares are summed in 16 partial sums that are then added in one fixed order.

use crate::simd::{Isa, LANES, Simd, isa, multiversion};
use crate::threads::Threads;

/// `out = x / sqrt(mean(x^2) + eps) * weight`, row by row of `width` numbers.
///
/// # Panics
/// If the sizes do not fit each other.
pub fn rms_norm(
    threads: &Threads,
    x: &[f32],
    width: usize,
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    rms_norm_with(isa(), threads, x, width, weight, eps, out);
}

fn rms_norm_with(
    isa: Isa,
    threads: &Threads,
    x: &[f32],
    width: usize,
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    assert!(width > 0 && x.len().is_multiple_of(width), "x is not whole rows of {width}");
    assert_eq!(x.len(), out.len(), "out is not as large as x");
    assert_eq!(weight.len(), width, "weight is not {width} long");
    threads.for_rows(out, width, |first, out| {
        for (row, out) in x[first * width..].chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            // SAFETY: `isa` is available, and all three have `width` numbers.
            unsafe { run(isa, row.as_ptr(), width, weight, eps, out.as_mut_ptr()) };
        }
    });
}

/// The same norm in place for each of `heads` heads of `head_dim` channels, from column `offset` of every row.
///
/// # Panics
/// If the sizes do not fit each other.
#[expect(clippy::too_many_arguments, reason = "the layout of a fused row")]
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
    assert!(
        qkv_width > 0 && qkv.len().is_multiple_of(qkv_width),
        "qkv is not whole rows of {qkv_width}"
    );
    assert!(offset + heads * head_dim <= qkv_width, "heads outside the row");
    assert_eq!(weight.len(), head_dim, "weight is not {head_dim} long");
    let isa = isa();
    threads.for_rows(qkv, qkv_width, |_, rows| {
        for row in rows.chunks_exact_mut(qkv_width) {
            for head in row[offset..offset + heads * head_dim].chunks_exact_mut(head_dim) {
                let p = head.as_mut_ptr();
                // SAFETY: `isa` is available; the head has `head_dim` numbers, and the kernel may work in place.
                unsafe { run(isa, p, head_dim, weight, eps, p) };
            }
        }
    });
}

multiversion! {
    /// # Safety
    /// `width` numbers at `x` and at `out`, which are either the same or do not overlap, and in `weight`.
    unsafe fn run(x: *const f32, width: usize, weight: &[f32], eps: f32, out: *mut f32) = body
}

#[inline(always)]
unsafe fn body<S: Simd>(
    s: S,
    x: *const f32,
    width: usize,
    weight: &[f32],
    eps: f32,
    out: *mut f32,
) {
    // SAFETY: all accesses stay below `width`.
    unsafe {
        let mut squares = s.splat(0.0);
        for at in (0..width).step_by(LANES) {
            let v = s.load_part(x.add(at), LANES.min(width - at), 0.0);
            squares = s.mul_add(v, v, squares);
        }
        let factor = s.splat(1.0 / (s.sum(squares) / width as f32 + eps).sqrt());
        for at in (0..width).step_by(LANES) {
            let n = LANES.min(width - at);
            let v = s.mul(s.load_part(x.add(at), n, 0.0), factor);
            s.store_part(out.add(at), s.mul(v, s.load_part(weight.as_ptr().add(at), n, 0.0)), n);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hand_worked_row() {
        let threads = Threads::new(1);
        let mut out = [0.0; 4];
        // Mean square of 1, -1, 7, 7 is 25, so the factor is 1/5.
        rms_norm(&threads, &[1.0, -1.0, 7.0, 7.0], 4, &[5.0, 5.0, 5.0, 10.0], 0.0, &mut out);
        for (y, exact) in out.iter().zip([1.0, -1.0, 7.0, 14.0]) {
            assert!((y - exact).abs() < 1e-6);
        }
    }

    #[test]
    fn rows_match_a_naive_norm_alone_and_together() {
        let (rows, width) = (300, 61);
        let x: Vec<f32> = (0..rows * width).map(|i| (i as f32 * 0.113).cos()).collect();
        let weight: Vec<f32> = (0..width).map(|i| 0.5 + i as f32 * 0.01).collect();
        for isa in Isa::available() {
            let mut together = vec![0.0; rows * width];
            rms_norm_with(isa, &Threads::new(2), &x, width, &weight, 1e-5, &mut together);
            let mut alone = vec![0.0; rows * width];
            for (x, out) in x.chunks(width).zip(alone.chunks_mut(width)) {
                rms_norm_with(isa, &Threads::new(1), x, width, &weight, 1e-5, out);
            }
            assert_eq!(together, alone);
            for (row, out) in x.chunks(width).zip(together.chunks(width)) {
                let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
                for ((x, w), y) in row.iter().zip(&weight).zip(out) {
                    let exact = f64::from(*x) / (mean + 1e-5).sqrt() * f64::from(*w);
                    assert!((f64::from(*y) - exact).abs() < 1e-6);
                }
            }
        }
    }

    #[test]
    fn heads_are_normed_in_place_and_nothing_else() {
        let threads = Threads::new(2);
        let mut qkv: Vec<f32> = (0..2 * 30).map(|i| i as f32 + 1.0).collect();
        let before = qkv.clone();
        qk_norm(&threads, &mut qkv, 30, 4, 2, 8, &[1.0; 8], 1e-6);
        for row in 0..2 {
            for c in 0..30 {
                let i = row * 30 + c;
                if (4..20).contains(&c) {
                    let start = row * 30 + 4 + (c - 4) / 8 * 8;
                    let mean = before[start..start + 8].iter().map(|x| x * x).sum::<f32>() / 8.0;
                    assert!((qkv[i] - before[i] / mean.sqrt()).abs() < 1e-5);
                } else {
                    assert_eq!(qkv[i], before[i]);
                }
            }
        }
    }
}
