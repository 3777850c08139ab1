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
    /// Bytes that will be read soon, asked for bit by bit: all at once they are more than can be under way.
    pub(super) soon: (*const u8, usize),
}

/// A pass's part of what will be read soon, asked for in equal steps.
struct Soon {
    at: *const u8,
    step: usize,
}

impl Soon {
    /// The part of pass `index` of `passes` with so many steps each.
    #[inline(always)]
    fn new(soon: (*const u8, usize), index: usize, passes: usize, steps: usize) -> Self {
        let part = soon.1.div_ceil(passes);
        Self { at: soon.0.wrapping_add(index * part), step: part.div_ceil(steps.max(1)) }
    }

    #[inline(always)]
    fn ask<S: Simd>(&mut self, s: S) {
        s.prefetch(self.at);
        self.at = self.at.wrapping_add(self.step);
    }
}

/// Whether an instruction set has these kernels: plain Rust gains nothing by them.
const fn exists<S: Simd>() -> bool {
    !matches!(S::ISA, Isa::Portable)
}

/// Whether the registers have room for so many rows of products with keys.
#[inline(always)]
pub(super) const fn takes_keys<S: Simd>(rows: usize) -> bool {
    exists::<S>() && rows <= MOST_ROWS && rows <= S::ACCUMULATORS
}

/// The same of values of so many channels.
#[inline(always)]
pub(super) const fn takes_values<S: Simd>(rows: usize, dim: usize) -> bool {
    takes_keys::<S>(rows) && dim.is_multiple_of(LANES * width::<S>(rows, 4))
}

/// Vectors of keys or values at a time, at most so many: beside their sums the registers have to hold the vectors
/// themselves, scales, zeros and what codes are made of.
const fn width<S: Simd>(rows: usize, most: usize) -> usize {
    let mut width = most;
    while width > 1 && (rows + 1) * width + 2 > S::REGISTERS {
        width /= 2;
    }
    width
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
    // SAFETY: the same contract.
    unsafe {
        let levels =
            Levels::load(s, keys.add(codec.key_code_bytes(channels)), codec.key_groups(channels));
        let lanes = Lanes { codec, keys, levels: &levels, channels, rows };
        if const { width::<S>(R, 2) == 2 } {
            lanes.add::<S, BITS, R, 2>(s, 0);
        } else {
            lanes.add::<S, BITS, R, 1>(s, 0);
            lanes.add::<S, BITS, R, 1>(s, 1);
        }
    }
}

struct Lanes<'a> {
    codec: Codec,
    keys: *const u8,
    levels: &'a Levels,
    channels: usize,
    rows: Rows,
}

impl Lanes<'_> {
    /// The products of `N` vectors of tokens from vector `first` on.
    ///
    /// # Safety
    /// As [`keys`]; the vectors exist.
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
        let (rows, step) = (self.rows, LANES * BITS / 8);
        // SAFETY: codes, scales and zeros lie as `Codec` says, rows by the contract.
        unsafe {
            let keys = self.keys.add(first * step);
            let (scales, zeros) = (self.levels.scales(), self.levels.zeros());
            let mut sums = [[s.splat(0.0); N]; R];
            let mut soon = Soon::new(rows.soon, first / N, 2 / N, self.channels);
            match self.codec.key_axis {
                KeyAxis::Channel => {
                    for channel in 0..self.channels {
                        soon.ask(s);
                        let (scale, zero) =
                            (s.splat(*scales.add(channel)), s.splat(*zeros.add(channel)));
                        let table = s.table::<BITS>(scale, zero);
                        let from = keys.add(channel * 2 * step);
                        let mut columns = [scale; N];
                        for v in 0..N {
                            columns[v] = s.look_up::<BITS>(from.add(v * step), table);
                        }
                        for r in 0..R {
                            let left = s.splat(*rows.left.add(r * rows.left_stride + channel));
                            for v in 0..N {
                                sums[r][v] = s.mul_add(left, columns[v], sums[r][v]);
                            }
                        }
                    }
                }
                KeyAxis::Token => {
                    let group = self.codec.group as usize;
                    for (index, from) in (0..self.channels).step_by(group).enumerate() {
                        let at = index * BLOCK_TOKENS + first * LANES;
                        let (mut scale, mut zero) = ([sums[0][0]; N], [sums[0][0]; N]);
                        for v in 0..N {
                            scale[v] = s.load(scales.add(at + v * LANES));
                            zero[v] = s.load(zeros.add(at + v * LANES));
                        }
                        for channel in from..(from + group).min(self.channels) {
                            soon.ask(s);
                            let from = keys.add(channel * 2 * step);
                            let mut columns = scale;
                            for v in 0..N {
                                let codes = s.codes::<BITS>(from.add(v * step));
                                columns[v] = s.mul_add(codes, scale[v], zero[v]);
                            }
                            for r in 0..R {
                                let left = s.splat(*rows.left.add(r * rows.left_stride + channel));
                                for v in 0..N {
                                    sums[r][v] = s.mul_add(left, columns[v], sums[r][v]);
                                }
                            }
                        }
                    }
                }
            }
            for r in 0..R {
                for v in 0..N {
                    s.store(rows.out.add(r * rows.out_stride + (first + v) * LANES), sums[r][v]);
                }
            }
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
            Columns { codec, values, levels: &levels, row_bytes, groups, dim, tokens, anew, rows };
        for first in (0..dim).step_by(const { width::<S>(R, 4) } * LANES) {
            match const { width::<S>(R, 4) } {
                4 => columns.add::<S, BITS, R, 4>(s, first),
                2 => columns.add::<S, BITS, R, 2>(s, first),
                _ => columns.add::<S, BITS, R, 1>(s, first),
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
    dim: usize,
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
            let width = N * LANES;
            let mut soon = Soon::new(rows.soon, first / width, self.dim / width, self.tokens.len());
            for (i, token) in self.tokens.clone().enumerate() {
                soon.ask(s);
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
