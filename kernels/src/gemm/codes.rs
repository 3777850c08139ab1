//! Products with weights of 4 or 8 bits in blocks of 32 (GGUF's `Q4_0`, `Q4_1`, `Q8_0`), in integers.
//!
//! Rows of x become signed bytes with one scale per block of 32; the products of a block with the weights' codes are summed
//! exactly, and what they stand for is added up in floats, block by block:
//! `y = sum over blocks of d_w d_x (codes_w . codes_x) + m_w d_x (sum of codes_x)`.

use std::ops::Range;

use super::Split;
use super::packed::{BLOCK, Packed, block_bytes};
use crate::buffer::{Scratch, lines};
use crate::simd::dot::{Dot, in_pairs};
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, dot::Vnni};
use crate::simd::{Isa, LANES, Portable, Simd, multiversion};
use crate::threads::{Disjoint, Threads};
use crate::tile::PANEL;

/// Bytes ahead of the loads that tiles of few rows ask for.
const AHEAD: usize = 4096;
/// Rows from which on a tile has enough to do not to wait for memory.
const PATIENT: usize = 4;
/// Tiles that bring a share of the next panel each: where there are more, memory is fast enough by itself.
const MOST_SHARES: usize = 32;
/// Rounds to whole numbers where it is added and taken away again.
const WHOLE: f32 = 12_582_912.0;

/// Rows of x as bytes, and the scale and the scaled sum of each block.
pub(super) struct Quantised<'a> {
    codes: &'a [i8],
    /// Bytes of a code: [`Dot::FOUR`] of whoever multiplies it.
    bytes: usize,
    /// `(d, d x sum of codes)` per row and block.
    scales: &'a [f32],
    blocks: usize,
}

/// Bytes of a row's number where weights have so many bits.
fn code_bytes(isa: Isa, bits: usize) -> usize {
    match (isa, bits) {
        (_, 4) => 1,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, _) if Vnni::is_available() => Vnni::FOUR,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Avx2, _) => Avx2::FOUR,
        _ => Portable::FOUR,
    }
}

/// Floats of scratch space for `m` rows of `k`.
pub(super) fn scratch_floats(m: usize, k: usize) -> usize {
    let blocks = k.div_ceil(BLOCK);
    lines(m * blocks * BLOCK / 2) + lines(m * blocks * 2)
}

/// Turns `m` rows of `k` into bytes.
pub(super) fn quantise<'a>(
    isa: Isa,
    threads: &Threads,
    x: &[f32],
    (m, k): (usize, usize),
    bits: usize,
    scratch: &'a mut [f32],
) -> Quantised<'a> {
    /// Numbers that are worth a task, some ten microseconds.
    const WORTH: usize = 1 << 14;
    let blocks = k.div_ceil(BLOCK);
    let bytes = code_bytes(isa, bits);
    let (codes, scales) = scratch.split_at_mut(lines(m * blocks * BLOCK / 2));
    let scales = &mut scales[..m * blocks * 2];
    // SAFETY: floats have room and alignment for four times as many bytes, of which every pattern is one.
    let codes: &mut [i8] = unsafe {
        std::slice::from_raw_parts_mut(codes.as_mut_ptr().cast::<i8>(), m * blocks * BLOCK * bytes)
    };
    let share = m.div_ceil(threads.count() * 4).max(WORTH.div_ceil(k.max(1))).max(1);
    let (all_codes, all_scales) = (Disjoint::new(codes), Disjoint::new(scales));
    threads.run(m.div_ceil(share), |task| {
        let rows = task * share..((task + 1) * share).min(m);
        // SAFETY: tasks have rows of their own; the caller's `isa` is available.
        unsafe {
            let row = blocks * BLOCK * bytes;
            let codes = all_codes.slice_mut(rows.start * row..rows.end * row);
            let scales = all_scales.slice_mut(rows.start * blocks * 2..rows.end * blocks * 2);
            quantise_rows(isa, &x[rows.start * k..rows.end * k], k, (codes, bytes), scales);
        }
    });
    // SAFETY: the tasks are done; the slices are those of `scratch` that were cut off above.
    let (codes, scales) = unsafe {
        (
            all_codes.slice_mut(0..m * blocks * BLOCK * bytes),
            all_scales.slice_mut(0..m * blocks * 2),
        )
    };
    Quantised { codes, bytes, scales, blocks }
}

multiversion! {
    /// # Safety
    /// The instruction set is there.
    unsafe fn quantise_rows(x: &[f32], k: usize, codes: (&mut [i8], usize), scales: &mut [f32]) = quantise_body
}

#[inline(always)]
unsafe fn quantise_body<S: Simd>(
    s: S,
    x: &[f32],
    k: usize,
    (codes, bytes): (&mut [i8], usize),
    scales: &mut [f32],
) {
    let blocks = k.div_ceil(BLOCK);
    let rows = x.chunks_exact(k.max(1));
    for ((x, codes), scales) in rows
        .zip(codes.chunks_exact_mut((blocks * BLOCK * bytes).max(1)))
        .zip(scales.chunks_exact_mut((blocks * 2).max(1)))
    {
        for block in 0..blocks {
            let left = k - block * BLOCK;
            let from = x[block * BLOCK..].as_ptr();
            // SAFETY: a block's numbers are inside the row, those beyond its end are filled with zeros.
            unsafe {
                let (a, b) = if left >= BLOCK {
                    (s.load(from), s.load(from.add(LANES)))
                } else {
                    let part = |at: usize| {
                        let count = left.saturating_sub(at).min(LANES);
                        s.load_part(from.wrapping_add(at), count, 0.0)
                    };
                    (part(0), part(LANES))
                };
                let magnitude = |v| s.max(v, s.sub(s.splat(0.0), v));
                let largest = s.largest(s.max(magnitude(a), magnitude(b)));
                let scale = largest / 127.0;
                let by = s.splat(if largest > 0.0 { 127.0 / largest } else { 0.0 });
                let whole = s.splat(WHOLE);
                let round = |v| s.sub(s.add(s.mul(v, by), whole), whole);
                let (a, b) = (round(a), round(b));
                let out = &mut codes[block * BLOCK * bytes..][..BLOCK * bytes];
                if bytes == 1 {
                    s.store_i8(out.as_mut_ptr(), a);
                    s.store_i8(out.as_mut_ptr().add(LANES), b);
                } else {
                    let mut narrow = [0; BLOCK];
                    s.store_i8(narrow.as_mut_ptr(), a);
                    s.store_i8(narrow.as_mut_ptr().add(LANES), b);
                    in_pairs(&narrow, out);
                }
                scales[block * 2] = scale;
                // Whole numbers: exact in any order.
                scales[block * 2 + 1] = scale * s.sum(s.add(a, b));
            }
        }
    }
}

/// Where tiles of such codes stand in [`Dot::ROWS`].
const fn narrow(bits: usize) -> usize {
    (bits == 4) as usize
}

/// What all tasks share.
pub(super) struct Job<'a> {
    pub(super) x: Quantised<'a>,
    pub(super) w: &'a Packed,
    pub(super) bits: usize,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) accumulate: bool,
    pub(super) out: &'a Disjoint<'a, f32>,
}

/// The whole product.
pub(super) fn run(isa: Isa, threads: &Threads, split: &Split, job: &Job<'_>) {
    threads.run(split.tasks(), |task| {
        let (panels, rows) = split.part(task);
        // SAFETY: parts are disjoint in the output and inside the shapes that the caller checked; the caller's `isa` is
        // available, and VNNI where it is asked for.
        unsafe {
            match (isa, job.bits) {
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512, 4) if Vnni::is_available() => vnni::<4>(job, panels, rows),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512, _) if Vnni::is_available() => vnni::<8>(job, panels, rows),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512 | Isa::Avx2, 4) => avx2::<4>(job, panels, rows),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512 | Isa::Avx2, _) => avx2::<8>(job, panels, rows),
                (_, 4) => part::<Portable, 4>(Portable, job, panels, rows),
                _ => part::<Portable, 8>(Portable, job, panels, rows),
            }
        }
    });
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn vnni<const BITS: usize>(job: &Job<'_>, panels: Range<usize>, rows: Range<usize>) {
    // SAFETY: the features are enabled here; the rest is the caller's contract.
    unsafe { part::<Vnni, BITS>(Vnni::new(), job, panels, rows) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<const BITS: usize>(job: &Job<'_>, panels: Range<usize>, rows: Range<usize>) {
    // SAFETY: the features are enabled here; the rest is the caller's contract.
    unsafe { part::<Avx2, BITS>(Avx2::new(), job, panels, rows) }
}

/// Panels times rows of one task.
///
/// # Safety
/// Both inside the job's shape, and no other task at work on the same ones.
#[inline(always)]
unsafe fn part<D: Dot, const BITS: usize>(
    d: D,
    job: &Job<'_>,
    panels: Range<usize>,
    rows: Range<usize>,
) {
    let mut at = panels.start;
    while at < panels.end {
        // Few rows take more columns at a time, for enough independent sums.
        let vectors = [4, 2]
            .into_iter()
            .find(|v| {
                rows.len() <= D::ROWS[narrow(BITS)][v / 2]
                    && at + (v * D::LANES).div_ceil(PANEL) <= panels.end
            })
            .unwrap_or(D::MANY[narrow(BITS)]);
        let most = D::ROWS[narrow(BITS)][vectors / 2];
        let tiles = rows.len().div_ceil(most);
        let width = vectors * D::LANES;
        let shares = tiles * width.max(PANEL) / width;
        for column in (0..width.max(PANEL)).step_by(width) {
            for tile in 0..tiles {
                let share = (column / width * tiles + tile, shares);
                // Tiles of nearly equal height, rather than a short one at the end.
                let first = rows.start + rows.len() * tile / tiles;
                let last = rows.start + rows.len() * (tile + 1) / tiles;
                // SAFETY: the caller's contract.
                unsafe { multiply::<D, BITS>(d, job, at, column, vectors, first..last, share) };
            }
        }
        at += width.div_ceil(PANEL);
    }
}

/// One register tile: vectors from a column of a panel on, times rows.
///
/// # Safety
/// As [`part`].
#[inline(always)]
unsafe fn multiply<D: Dot, const BITS: usize>(
    d: D,
    job: &Job<'_>,
    panel: usize,
    inside: usize,
    vectors: usize,
    rows: Range<usize>,
    share: (usize, usize),
) {
    let column = panel * PANEL + inside;
    if column >= job.w.n() {
        return;
    }
    let blocks = job.x.blocks;
    let w = job.w.as_ptr().wrapping_add(panel * blocks * block_bytes(BITS));
    // Several tiles of rows bring the next panel, each a part. A single one asks for what it is about to read itself.
    let passes = PANEL.div_ceil(vectors * D::LANES);
    let (next, next_step) = if share.1 > passes && share.1 <= MOST_SHARES {
        let bytes = blocks * block_bytes(BITS);
        let next = w.wrapping_add(bytes + bytes * share.0 / share.1);
        (next, (block_bytes(BITS) / BITS).div_ceil(share.1))
    } else {
        (std::ptr::null(), 0)
    };
    // SAFETY: the addresses lie inside the packed weights, the rows and the output.
    let tile = unsafe {
        Tile {
            blocks,
            x: job.x.codes.as_ptr().add(rows.start * blocks * BLOCK * job.x.bytes),
            scales: job.x.scales.as_ptr().add(rows.start * blocks * 2),
            w,
            next,
            next_step,
            first: inside,
            out: job.out.as_ptr().add(rows.start * job.w.n() + column),
            out_stride: job.w.n(),
            columns: (job.w.n() - column).min(vectors * D::LANES),
            accumulate: job.accumulate,
            bias: job.bias.map_or(std::ptr::null(), |b| b.as_ptr().add(column)),
        }
    };
    macro_rules! variants {
        ($(($rows:literal, $vectors:literal))+) => {
            match (rows.len(), vectors) {
                // SAFETY: the same contract, and the shape is the matched one.
                $(($rows, $vectors) if const { $rows <= D::ROWS[narrow(BITS)][$vectors / 2] } => unsafe {
                    fixed::<D, BITS, $rows, $vectors>(d, &tile);
                },)+
                (rows, vectors) => unreachable!("no tile of {rows} x {vectors}"),
            }
        };
    }
    variants! {
        (1, 1) (2, 1) (3, 1) (4, 1) (5, 1) (6, 1)
        (1, 2) (2, 2) (3, 2) (4, 2) (5, 2) (6, 2)
        (1, 4) (2, 4) (3, 4)
    }
}

struct Tile {
    blocks: usize,
    x: *const i8,
    scales: *const f32,
    w: *const u8,
    /// The part of the next panel that this tile asks for, and bytes of it per group; null for none.
    next: *const u8,
    next_step: usize,
    /// First column of the panel.
    first: usize,
    out: *mut f32,
    out_stride: usize,
    columns: usize,
    accumulate: bool,
    bias: *const f32,
}

/// # Safety
/// All pointers are valid for the shape that the fields describe.
#[inline(always)]
#[expect(
    clippy::needless_range_loop,
    reason = "plain indices become registers, iterators over vectors may not"
)]
unsafe fn fixed<D: Dot, const BITS: usize, const R: usize, const V: usize>(d: D, tile: &Tile) {
    if const { R > D::ROWS[narrow(BITS)][V / 2] } {
        unreachable!("{R} x {V} sums don't fit the registers");
    }
    let bytes = const { block_bytes(BITS) };
    // Of the codes of 16 columns in a block.
    let half = LANES * BLOCK * BITS / 8;
    // SAFETY: all addresses lie in the shape of the contract.
    unsafe {
        let mut acc = [[d.splat(0.0); V]; R];
        let mut next = tile.next;
        for block in 0..tile.blocks {
            // Column in its panel, and that panel's block.
            let place = |v: usize| {
                let column = tile.first + v * D::LANES;
                let panel = tile.w.add((column / PANEL * tile.blocks + block) * bytes);
                (column % PANEL, panel)
            };
            let x_bytes = const { if BITS == 4 { 1 } else { D::FOUR } };
            let x = |r: usize| tile.x.add((r * tile.blocks + block) * BLOCK * x_bytes);
            let mut sums = [[d.zero(); V]; R];
            for group in 0..BITS {
                let mut codes = [d.none(); V];
                for v in 0..V {
                    let (column, panel) = place(v);
                    let p = panel.add(column / LANES * half + group * 64 + column % LANES * 4);
                    // A line is two vectors of eight columns.
                    if const { R <= PATIENT }
                        && tile.next.is_null()
                        && (column % LANES == 0 || v == 0)
                    {
                        d.prefetch(p.wrapping_add(AHEAD));
                    }
                    codes[v] = d.load(p);
                }
                if !tile.next.is_null() {
                    d.prefetch(next);
                    next = next.wrapping_add(tile.next_step);
                }
                if BITS == 4 {
                    // No closures here: they would not be compiled for the instruction set.
                    let (mut low, mut high) = (codes, codes);
                    for v in 0..V {
                        (low[v], high[v]) = (d.low(codes[v]), d.high(codes[v]));
                    }
                    for r in 0..R {
                        let first = d.quad(x(r).add(group * 8));
                        let second = d.quad(x(r).add(group * 8 + 4));
                        for v in 0..V {
                            sums[r][v] = d.dot(sums[r][v], low[v], first);
                            sums[r][v] = d.dot(sums[r][v], high[v], second);
                        }
                    }
                } else {
                    let mut wide = [d.wide(codes[0]); V];
                    for v in 1..V {
                        wide[v] = d.wide(codes[v]);
                    }
                    for r in 0..R {
                        let four = d.four(x(r).add(group * 4 * x_bytes));
                        for v in 0..V {
                            sums[r][v] = d.dot_wide(sums[r][v], wide[v], four);
                        }
                    }
                }
            }
            for v in 0..V {
                let (column, panel) = place(v);
                let at = panel.add(2 * half).cast::<u16>().add(column);
                let (scale, minimum) = (d.load_f16(at), d.load_f16(at.add(PANEL)));
                for r in 0..R {
                    let of_row = tile.scales.add((r * tile.blocks + block) * 2);
                    let sum = if BITS == 4 {
                        d.finish::<true>(sums[r][v])
                    } else {
                        d.finish::<false>(sums[r][v])
                    };
                    let product = d.mul(sum, d.splat(*of_row));
                    acc[r][v] = d.mul_add(product, scale, acc[r][v]);
                    acc[r][v] = d.mul_add(d.splat(*of_row.add(1)), minimum, acc[r][v]);
                }
            }
        }
        let whole = tile.columns == V * D::LANES && tile.bias.is_null();
        let mut results = [[[0.0f32; LANES]; V]; R];
        for r in 0..R {
            for v in 0..V {
                let out = tile.out.wrapping_add(r * tile.out_stride + v * D::LANES);
                if !whole {
                    // By way of memory: columns beyond the end are dropped.
                    d.store(results[r][v].as_mut_ptr(), acc[r][v]);
                } else if tile.accumulate {
                    d.store(out, d.add(d.load_f32(out), acc[r][v]));
                } else {
                    d.store(out, acc[r][v]);
                }
            }
        }
        if !whole {
            finish(tile, V, D::LANES, results.as_flattened());
        }
    }
}

/// Writes the columns that exist of a tile whose sums are in memory, `vectors` of `lanes` columns a row.
///
/// # Safety
/// The output is that of [`fixed`].
#[inline(never)]
unsafe fn finish(tile: &Tile, vectors: usize, lanes: usize, sums: &[[f32; LANES]]) {
    for (r, row) in sums.chunks_exact(vectors).enumerate() {
        for c in 0..tile.columns {
            // SAFETY: the column exists, by the contract.
            unsafe {
                let mut sum = row[c / lanes][c % lanes];
                if !tile.bias.is_null() {
                    sum += *tile.bias.add(c);
                }
                let out = tile.out.add(r * tile.out_stride + c);
                *out = if tile.accumulate { *out + sum } else { sum };
            }
        }
    }
}

/// Space for the rows of a product.
pub(super) fn scratch(m: usize, k: usize) -> Scratch {
    Scratch::take(scratch_floats(m, k))
}
