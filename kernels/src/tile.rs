//! The register tile that matrix products and attention share: `rows x 2 vectors += A (rows x k) * B (k x 2 vectors)`.
//!
//! Every output element is one chain of multiply-adds over k in ascending order, whatever the number of rows.

use crate::simd::{Element, Simd};

/// Rows of the largest tile: 12 x 2 accumulators, 2 for B and the broadcasts fit 32 registers.
pub(crate) const MOST_ROWS: usize = 12;

/// Accumulates into `acc`.
///
/// # Safety
/// `a` must have `ROWS` rows of `k` elements, `lda` apart; `b` must have `k` rows of `2 * S::LANES` elements, `ldb`
/// apart; the target features of `S` must be present.
#[inline(always)]
pub(crate) unsafe fn multiply<S: Simd, E: Element, const ROWS: usize>(
    a: *const f32,
    lda: usize,
    b: *const E,
    ldb: usize,
    k: usize,
    acc: &mut [[S::V; 2]; ROWS],
) {
    // SAFETY: in bounds by the caller's promise.
    unsafe {
        for i in 0..k {
            let row = b.add(i * ldb);
            let b0 = E::load::<S>(row);
            let b1 = E::load::<S>(row.add(S::LANES));
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = S::splat(*a.add(r * lda + i));
                acc[0] = S::fma(x, b0, acc[0]);
                acc[1] = S::fma(x, b1, acc[1]);
            }
        }
    }
}

/// Runs `$body` with `$rows` as a constant, for 1 to 12 rows.
macro_rules! with_rows {
    ($count:expr, $rows:ident => $body:expr) => {
        match $count {
            1 => {
                const $rows: usize = 1;
                $body
            }
            2 => {
                const $rows: usize = 2;
                $body
            }
            3 => {
                const $rows: usize = 3;
                $body
            }
            4 => {
                const $rows: usize = 4;
                $body
            }
            5 => {
                const $rows: usize = 5;
                $body
            }
            6 => {
                const $rows: usize = 6;
                $body
            }
            7 => {
                const $rows: usize = 7;
                $body
            }
            8 => {
                const $rows: usize = 8;
                $body
            }
            9 => {
                const $rows: usize = 9;
                $body
            }
            10 => {
                const $rows: usize = 10;
                $body
            }
            11 => {
                const $rows: usize = 11;
                $body
            }
            _ => {
                const $rows: usize = 12;
                $body
            }
        }
    };
}
pub(crate) use with_rows;

/// Rows of a tile that keeps its accumulators in registers: 12 with 32 registers, 6 with 16.
#[inline(always)]
pub(crate) fn tile_rows<S: Simd>() -> usize {
    if S::LANES == 16 { MOST_ROWS } else { 6 }
}

/// `out (rows x 2 vectors) = A * B`, `ldo` apart.
///
/// # Safety
/// As [`multiply`]; `out` must have `rows` rows of `2 * S::LANES` writable elements.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "a kernel takes raw parts")]
pub(crate) unsafe fn product<S: Simd, E: Element>(
    a: *const f32,
    lda: usize,
    rows: usize,
    b: *const E,
    ldb: usize,
    k: usize,
    out: *mut f32,
    ldo: usize,
) {
    let most = tile_rows::<S>();
    let mut row = 0;
    while row < rows {
        let count = most.min(rows - row);
        // SAFETY: in bounds by the caller's promise.
        unsafe {
            with_rows!(count, ROWS => {
                let mut acc = [[S::zero(); 2]; ROWS];
                multiply::<S, E, ROWS>(a.add(row * lda), lda, b, ldb, k, &mut acc);
                for (r, acc) in acc.iter().enumerate() {
                    let to = out.add((row + r) * ldo);
                    S::store(to, acc[0]);
                    S::store(to.add(S::LANES), acc[1]);
                }
            });
        }
        row += count;
    }
}

/// `out = out * factor[row] + A * B`.
///
/// # Safety
/// As [`product`]; `factor` must have `rows` elements.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "a kernel takes raw parts")]
pub(crate) unsafe fn rescale_and_add<S: Simd, E: Element>(
    a: *const f32,
    lda: usize,
    rows: usize,
    b: *const E,
    ldb: usize,
    k: usize,
    factor: *const f32,
    out: *mut f32,
    ldo: usize,
) {
    let most = tile_rows::<S>();
    let mut row = 0;
    while row < rows {
        let count = most.min(rows - row);
        // SAFETY: in bounds by the caller's promise.
        unsafe {
            with_rows!(count, ROWS => {
                let mut acc = [[S::zero(); 2]; ROWS];
                for (r, acc) in acc.iter_mut().enumerate() {
                    let from = out.add((row + r) * ldo);
                    let factor = S::splat(*factor.add(row + r));
                    acc[0] = S::mul(S::load(from), factor);
                    acc[1] = S::mul(S::load(from.add(S::LANES)), factor);
                }
                multiply::<S, E, ROWS>(a.add(row * lda), lda, b, ldb, k, &mut acc);
                for (r, acc) in acc.iter().enumerate() {
                    let to = out.add((row + r) * ldo);
                    S::store(to, acc[0]);
                    S::store(to.add(S::LANES), acc[1]);
                }
            });
        }
        row += count;
    }
}
