//! The register tile: the one inner loop behind matrix products and attention.
//!
//! It multiplies a few rows of floats with a strip of columns and keeps every output in one accumulator over the whole of
//! k, in order. That makes an output's value independent of the tile it happened to be computed in.

use crate::simd::{LANES, Simd, Source};

/// Columns of a panel of packed weights or keys.
pub(crate) const PANEL: usize = 32;

/// One tile: `out[r][c] = init[r][c] * scale[r] + sum over k of a[r][k] * b[k][c] (+ out[r][c]) (+ bias[c])`.
pub(crate) struct Tile {
    /// Rows, at most [`Simd::TILE_ROWS`].
    pub(crate) rows: usize,
    /// Vectors of 16 columns, as many as [`fits`] allows. 1, 2, 4 or 8.
    pub(crate) vectors: usize,
    /// Terms of each sum.
    pub(crate) k: usize,
    /// First row of the left factor.
    pub(crate) a: *const f32,
    /// Floats between its rows.
    pub(crate) a_stride: usize,
    /// First number of the right factor.
    pub(crate) b: *const u8,
    /// Numbers between its rows.
    pub(crate) b_stride: usize,
    /// Numbers between its pairs of vectors: 32 where columns are contiguous, else a panel or the way to another block,
    /// which may lead backwards.
    pub(crate) b_pair: usize,
    /// What the sums start with; null for zero. Pairs of vectors are `out_pair` apart here too.
    pub(crate) init: *const f32,
    /// Factor per row of `init`; null for one.
    pub(crate) scale: *const f32,
    /// Floats between rows of `init`.
    pub(crate) init_stride: usize,
    /// Where results go.
    pub(crate) out: *mut f32,
    /// Floats between rows of `out`.
    pub(crate) out_stride: usize,
    /// Columns of the last vectors that exist in `out`: results beyond are dropped.
    pub(crate) columns: usize,
    /// Add what is in `out`.
    pub(crate) accumulate: bool,
    /// Added to every row; null for none.
    pub(crate) bias: *const f32,
    /// Bytes from a number of the right factor to what will be read next: tiles of few rows wait for memory, so they ask
    /// for that early.
    pub(crate) ahead: isize,
    /// First byte of what comes after this and other tiles that pass by the same right factor, of which this one asks for its
    /// share; null for none.
    pub(crate) next: *const u8,
    /// Bytes of the share per term.
    pub(crate) next_step: usize,
}

/// Rows from which on a tile has enough to do not to wait for memory.
const PATIENT: usize = 8;

impl Tile {
    /// A plain product of contiguous columns, for [`wide`].
    #[inline(always)]
    pub(crate) fn product(
        rows: usize,
        k: usize,
        (a, a_stride): (*const f32, usize),
        (b, b_stride): (*const u8, usize),
        (out, out_stride): (*mut f32, usize),
    ) -> Self {
        Self {
            rows,
            vectors: 0,
            k,
            a,
            a_stride,
            b,
            b_stride,
            b_pair: PANEL,
            init: std::ptr::null(),
            scale: std::ptr::null(),
            init_stride: 0,
            out,
            out_stride,
            columns: 0,
            accumulate: false,
            bias: std::ptr::null(),
            ahead: 0,
            next: std::ptr::null(),
            next_step: 0,
        }
    }
}

/// Whether a tile's accumulators leave no room for a whole row of the right factor beside them.
const fn tight<S: Simd>(rows: usize, vectors: usize) -> bool {
    (rows + 1) * vectors + 1 > S::REGISTERS
}

/// Runs `tile`.
///
/// # Safety
/// All pointers are valid for the shape that the fields describe, `b` for `vectors * 16` numbers per row even where
/// `columns` is less; `out` does not overlap `a`, `b` or `bias`.
#[inline(always)]
pub(crate) unsafe fn body<S: Simd, B: Source>(s: S, tile: &Tile) {
    macro_rules! variants {
        ($(($rows:literal, $vectors:literal))+) => {
            match (tile.rows, tile.vectors) {
                // SAFETY: the same contract, and the shape is the matched one.
                $(($rows, $vectors) => unsafe { fixed::<S, B, $rows, $vectors>(s, tile) },)+
                (rows, vectors) => unreachable!("no tile of {rows} x {vectors}"),
            }
        };
    }
    variants! {
        (1, 1) (2, 1) (3, 1) (4, 1) (5, 1) (6, 1) (7, 1) (8, 1) (9, 1) (10, 1) (11, 1) (12, 1)
        (1, 2) (2, 2) (3, 2) (4, 2) (5, 2) (6, 2) (7, 2) (8, 2) (9, 2) (10, 2) (11, 2) (12, 2)
        (1, 4) (2, 4) (3, 4) (4, 4) (5, 4) (6, 4)
        (1, 8) (2, 8)
    }
}

/// Whether the registers have room for such a tile: accumulators, one row of the right factor and one number of the left.
#[inline(always)]
pub(crate) const fn fits<S: Simd>(rows: usize, vectors: usize) -> bool {
    rows * vectors <= S::ACCUMULATORS && (rows + 1) * vectors < S::ACCUMULATORS + 8
}

/// Runs `tile` over `columns` contiguous columns, a multiple of 16 of them, as the registers have room.
///
/// # Safety
/// As [`body`] for the whole of the columns.
#[inline(always)]
pub(crate) unsafe fn wide<S: Simd, B: Source>(s: S, mut tile: Tile, columns: usize) {
    let mut left = columns / LANES;
    while left > 0 {
        let mut vectors = 8;
        while vectors > left || !fits::<S>(tile.rows, vectors) {
            vectors /= 2;
        }
        tile.vectors = vectors;
        tile.columns = vectors * LANES;
        // SAFETY: the part lies inside the columns of the contract.
        unsafe {
            s.tile::<B>(&tile);
            tile.b = tile.b.add(tile.columns * B::BYTES);
            tile.out = tile.out.add(tile.columns);
            if !tile.init.is_null() {
                tile.init = tile.init.add(tile.columns);
            }
        }
        left -= vectors;
    }
}

/// # Safety
/// As [`body`], with `R` rows and `N` vectors.
#[inline(always)]
#[expect(
    clippy::needless_range_loop,
    reason = "plain indices become registers, iterators over vectors may not"
)]
unsafe fn fixed<S: Simd, B: Source, const R: usize, const N: usize>(s: S, tile: &Tile) {
    if const { !fits::<S>(R, N) } {
        unreachable!("{R} x {N} accumulators don't fit the registers");
    }
    // SAFETY: all addresses lie in the shape of the contract.
    unsafe {
        let mut acc = [[s.splat(0.0); N]; R];
        if !tile.init.is_null() {
            for r in 0..R {
                let from = tile.init.add(r * tile.init_stride);
                for v in 0..N {
                    acc[r][v] = s.load(from.add(v * LANES));
                }
            }
            if !tile.scale.is_null() {
                for r in 0..R {
                    let scale = s.splat(*tile.scale.add(r));
                    for v in 0..N {
                        acc[r][v] = s.mul(acc[r][v], scale);
                    }
                }
            }
        }
        let mut b = tile.b;
        let b_step = tile.b_stride * B::BYTES;
        let place = |b: *const u8, v: usize| {
            let pair = (v / 2).wrapping_mul(tile.b_pair);
            b.wrapping_add(pair.wrapping_add((v % 2) * LANES).wrapping_mul(B::BYTES))
        };
        if const { tight::<S>(R, N) } {
            // Vector by vector, and the numbers of the left factor once for each: were they kept, or all vectors loaded first,
            // a sum would be written and read again with every term. The pointers hide that the numbers are the same.
            let mut a = [tile.a; N];
            for v in 1..N {
                a[v] = std::hint::black_box(tile.a);
            }
            for k in 0..tile.k {
                for v in 0..N {
                    let at = place(b, v);
                    if const { R <= PATIENT } && (v * LANES * B::BYTES).is_multiple_of(64) {
                        s.prefetch(at.wrapping_offset(tile.ahead));
                    }
                    let column = B::load(s, at);
                    for r in 0..R {
                        let a = s.splat(*a[v].add(r * tile.a_stride + k));
                        acc[r][v] = s.mul_add(a, column, acc[r][v]);
                    }
                }
                b = b.wrapping_add(b_step);
            }
        } else {
            let mut next = tile.next;
            for k in 0..tile.k {
                let mut columns = [s.splat(0.0); N];
                for v in 0..N {
                    let at = place(b, v);
                    if const { R <= PATIENT } && (v * LANES * B::BYTES).is_multiple_of(64) {
                        s.prefetch(at.wrapping_offset(tile.ahead));
                    }
                    columns[v] = B::load(s, at);
                }
                if !tile.next.is_null() {
                    s.prefetch(next);
                    next = next.wrapping_add(tile.next_step);
                }
                for r in 0..R {
                    let a = s.splat(*tile.a.add(r * tile.a_stride + k));
                    for v in 0..N {
                        acc[r][v] = s.mul_add(a, columns[v], acc[r][v]);
                    }
                }
                b = b.wrapping_add(b_step);
            }
        }
        if tile.columns < N * LANES || tile.accumulate || !tile.bias.is_null() {
            // By way of memory, so that the code for all the combinations is not there in every variant.
            let mut results = [[[0.0f32; LANES]; N]; R];
            for r in 0..R {
                for v in 0..N {
                    s.store(results[r][v].as_mut_ptr(), acc[r][v]);
                }
            }
            finish(tile, results.as_ptr().cast::<f32>(), N * LANES);
            return;
        }
        for r in 0..R {
            let out = tile.out.add(r * tile.out_stride);
            for v in 0..N {
                s.store(out.add(v * LANES), acc[r][v]);
            }
        }
    }
}

/// Writes the columns that exist of a tile whose sums, `stride` per row, are in memory.
///
/// # Safety
/// As [`body`], and `sums` has as many rows as the tile.
#[inline(never)]
unsafe fn finish(tile: &Tile, sums: *const f32, stride: usize) {
    let has_bias = !tile.bias.is_null();
    for r in 0..tile.rows {
        for c in 0..tile.columns {
            // SAFETY: by the contract.
            unsafe {
                let mut sum = *sums.add(r * stride + c);
                if has_bias {
                    sum += *tile.bias.add(c);
                }
                let out = tile.out.add(r * tile.out_stride + c);
                *out = if tile.accumulate { *out + sum } else { sum };
            }
        }
    }
}
