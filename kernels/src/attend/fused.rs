//! Products with packed halves whose codes become numbers in registers, for tiles of few rows. Each sum has the terms and
//! the order that [`crate::tile`] gives it, so which of the two computes it makes no difference.

use std::ops::Range;

use crate::kv::BLOCK_TOKENS;
use crate::kv::codec::{Codec, KeyAxis};
use crate::kv::tile::Levels;
use crate::simd::{Isa, LANES, Simd, multiversion};

/// Most rows of a tile that waits for its right factor, rather than the other way round.
const MOST_ROWS: usize = 4;

/// Left factor and results of a product: rows of floats, and floats between them.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) rows: usize,
    pub(super) left: *const f32,
    pub(super) left_stride: usize,
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
}

/// Whether an instruction set has these kernels: plain Rust gains nothing by them.
const fn exists<S: Simd>() -> bool {
    !matches!(S::ISA, Isa::Portable)
}

/// Whether the registers have room for so many rows of products with keys.
#[inline(always)]
pub(super) const fn takes_keys<S: Simd>(rows: usize) -> bool {
    exists::<S>() && rows <= MOST_ROWS && rows * 2 <= S::ACCUMULATORS
}

/// The same of values of so many channels.
#[inline(always)]
pub(super) const fn takes_values<S: Simd>(rows: usize, dim: usize) -> bool {
    takes_keys::<S>(rows) && dim.is_multiple_of(LANES * width::<S>(rows))
}

/// Vectors of values at a time.
const fn width<S: Simd>(rows: usize) -> usize {
    if rows * 4 <= S::ACCUMULATORS { 4 } else { 2 }
}

macro_rules! dispatch {
    ($name:ident, $bits:expr, $rows:expr, ($($arg:expr),*)) => {
        match ($bits, $rows) {
            (1, 1) => $name::<_, 1, 1>($($arg),*),
            (1, 2) => $name::<_, 1, 2>($($arg),*),
            (1, 3) => $name::<_, 1, 3>($($arg),*),
            (1, _) => $name::<_, 1, 4>($($arg),*),
            (2, 1) => $name::<_, 2, 1>($($arg),*),
            (2, 2) => $name::<_, 2, 2>($($arg),*),
            (2, 3) => $name::<_, 2, 3>($($arg),*),
            (2, _) => $name::<_, 2, 4>($($arg),*),
            (4, 1) => $name::<_, 4, 1>($($arg),*),
            (4, 2) => $name::<_, 4, 2>($($arg),*),
            (4, 3) => $name::<_, 4, 3>($($arg),*),
            (4, _) => $name::<_, 4, 4>($($arg),*),
            (_, 1) => $name::<_, 8, 1>($($arg),*),
            (_, 2) => $name::<_, 8, 2>($($arg),*),
            (_, 3) => $name::<_, 8, 3>($($arg),*),
            _ => $name::<_, 8, 4>($($arg),*),
        }
    };
}

multiversion! {
    /// Products of the left rows with packed keys: 32 per row.
    ///
    /// # Safety
    /// `keys` are packed keys of so many channels, left rows have as many floats, and [`takes_keys`] holds.
    pub(super) unsafe fn keys(codec: Codec, keys: *const u8, channels: usize, rows: Rows) = keys_body
}

#[inline(always)]
unsafe fn keys_body<S: Simd>(s: S, codec: Codec, keys: *const u8, channels: usize, rows: Rows) {
    if const { !exists::<S>() } {
        unreachable!("no such kernels");
    }
    // SAFETY: the same contract.
    unsafe { dispatch!(keys_of, codec.bits, rows.rows, (s, codec, keys, channels, rows)) }
}

/// # Safety
/// As [`keys`].
#[inline(always)]
unsafe fn keys_of<S: Simd, const BITS: usize, const R: usize>(
    s: S,
    codec: Codec,
    keys: *const u8,
    channels: usize,
    rows: Rows,
) {
    let step = LANES * BITS / 8;
    let zero = s.splat(0.0);
    let mut sums = [[zero; 2]; R];
    // SAFETY: codes, scales and zeros lie as `Codec` says, rows by the contract.
    unsafe {
        let levels =
            Levels::load(s, keys.add(codec.key_code_bytes(channels)), codec.key_groups(channels));
        let (scales, zeros) = (levels.scales(), levels.zeros());
        match codec.key_axis {
            KeyAxis::Channel => {
                for channel in 0..channels {
                    let (scale, zero) =
                        (s.splat(*scales.add(channel)), s.splat(*zeros.add(channel)));
                    let table = s.table::<BITS>(scale, zero);
                    let from = keys.add(channel * 2 * step);
                    let low = s.look_up::<BITS>(from, table);
                    let high = s.look_up::<BITS>(from.add(step), table);
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let left = s.splat(*rows.left.add(r * rows.left_stride + channel));
                        sums[0] = s.mul_add(left, low, sums[0]);
                        sums[1] = s.mul_add(left, high, sums[1]);
                    }
                }
            }
            KeyAxis::Token => {
                let group = codec.group as usize;
                for (index, first) in (0..channels).step_by(group).enumerate() {
                    let (scale, zero) =
                        (scales.add(index * BLOCK_TOKENS), zeros.add(index * BLOCK_TOKENS));
                    let scale = [s.load(scale), s.load(scale.add(LANES))];
                    let zero = [s.load(zero), s.load(zero.add(LANES))];
                    for channel in first..(first + group).min(channels) {
                        let from = keys.add(channel * 2 * step);
                        let low = s.mul_add(s.codes::<BITS>(from), scale[0], zero[0]);
                        let high = s.mul_add(s.codes::<BITS>(from.add(step)), scale[1], zero[1]);
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let left = s.splat(*rows.left.add(r * rows.left_stride + channel));
                            sums[0] = s.mul_add(left, low, sums[0]);
                            sums[1] = s.mul_add(left, high, sums[1]);
                        }
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let out = rows.out.add(r * rows.out_stride);
            s.store(out, sums[0]);
            s.store(out.add(LANES), sums[1]);
        }
    }
}

multiversion! {
    /// Products of the left rows, one number per token, with packed values: `dim` per row, added to what is in `out` or, if
    /// `anew`, to zero.
    ///
    /// # Safety
    /// `values` are packed values of these tokens, and [`takes_values`] holds.
    pub(super) unsafe fn values(codec: Codec, values: *const u8, dim: usize, tokens: Range<usize>, anew: bool, rows: Rows) = values_body
}

#[inline(always)]
unsafe fn values_body<S: Simd>(
    s: S,
    codec: Codec,
    values: *const u8,
    dim: usize,
    tokens: Range<usize>,
    anew: bool,
    rows: Rows,
) {
    if const { !exists::<S>() } {
        unreachable!("no such kernels");
    }
    // SAFETY: the same contract.
    unsafe {
        dispatch!(values_of, codec.bits, rows.rows, (s, codec, values, dim, tokens, anew, rows));
    }
}

/// # Safety
/// As [`values`].
#[inline(always)]
unsafe fn values_of<S: Simd, const BITS: usize, const R: usize>(
    s: S,
    codec: Codec,
    values: *const u8,
    dim: usize,
    tokens: Range<usize>,
    anew: bool,
    rows: Rows,
) {
    let (row_bytes, groups) = (codec.row_bytes(dim), codec.groups(dim));
    // SAFETY: codes, scales and zeros lie as `Codec` says, rows by the contract.
    unsafe {
        let levels = Levels::load(s, values.add(BLOCK_TOKENS * row_bytes), BLOCK_TOKENS * groups);
        let columns =
            Columns { codec, values, levels: &levels, row_bytes, groups, tokens, anew, rows };
        if const { width::<S>(R) == 4 } {
            for first in (0..dim).step_by(4 * LANES) {
                columns.add::<S, BITS, R, 4>(s, first);
            }
        } else {
            for first in (0..dim).step_by(2 * LANES) {
                columns.add::<S, BITS, R, 2>(s, first);
            }
        }
    }
}

struct Columns<'a> {
    codec: Codec,
    values: *const u8,
    levels: &'a Levels,
    row_bytes: usize,
    groups: usize,
    tokens: Range<usize>,
    anew: bool,
    rows: Rows,
}

impl Columns<'_> {
    /// The products of `N` vectors of channels.
    ///
    /// # Safety
    /// As [`values`]; the channels exist.
    #[inline(always)]
    #[expect(
        clippy::needless_range_loop,
        reason = "plain indices become registers, iterators over vectors may not"
    )]
    unsafe fn add<S: Simd, const BITS: usize, const R: usize, const N: usize>(
        &self,
        s: S,
        first: usize,
    ) {
        let (rows, group) = (self.rows, self.codec.group as usize);
        let mut group_of = [0; N];
        for v in 0..N {
            group_of[v] = (first + v * LANES) / group;
        }
        // SAFETY: by the contract.
        unsafe {
            let mut sums = [[s.splat(0.0); N]; R];
            if !self.anew {
                for r in 0..R {
                    for v in 0..N {
                        sums[r][v] = s.load(rows.out.add(r * rows.out_stride + first + v * LANES));
                    }
                }
            }
            for (i, token) in self.tokens.clone().enumerate() {
                let codes = self.values.add(token * self.row_bytes + first * BITS / 8);
                let scales = self.levels.scales().add(token * self.groups);
                let zeros = self.levels.zeros().add(token * self.groups);
                let mut columns = [s.splat(0.0); N];
                let of = |group: usize| {
                    s.table::<BITS>(s.splat(*scales.add(group)), s.splat(*zeros.add(group)))
                };
                let mut table = of(group_of[0]);
                for v in 0..N {
                    if v > 0 && group_of[v] != group_of[v - 1] {
                        table = of(group_of[v]);
                    }
                    columns[v] = s.look_up::<BITS>(codes.add(v * LANES * BITS / 8), table);
                }
                for r in 0..R {
                    let left = s.splat(*rows.left.add(r * rows.left_stride + i));
                    for v in 0..N {
                        sums[r][v] = s.mul_add(left, columns[v], sums[r][v]);
                    }
                }
            }
            for r in 0..R {
                for v in 0..N {
                    s.store(rows.out.add(r * rows.out_stride + first + v * LANES), sums[r][v]);
                }
            }
        }
    }
}
