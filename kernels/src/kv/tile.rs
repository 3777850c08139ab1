//! Halves of any form as floats: what attention and ranking read where keys or values are not whole.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::codec::{Codec, KeyAxis};
use super::{BLOCK_TOKENS, BlockPool, Halves};
use crate::simd::{LANES, Simd, Source, multiversion};

/// Most scales of a half.
const MOST_GROUPS: usize = BLOCK_TOKENS * 16;

/// Scales and zeros of a half as floats.
pub(crate) struct Levels {
    scales: MaybeUninit<[f32; MOST_GROUPS]>,
    zeros: MaybeUninit<[f32; MOST_GROUPS]>,
}

impl Levels {
    /// # Safety
    /// `groups` scales and then zeros lie at `p`, with a vector readable behind them.
    #[inline(always)]
    pub(crate) unsafe fn load<S: Simd>(s: S, p: *const u8, groups: usize) -> Self {
        let mut levels = Self { scales: MaybeUninit::uninit(), zeros: MaybeUninit::uninit() };
        for at in (0..groups).step_by(LANES) {
            // SAFETY: by the contract; groups are at most MOST_GROUPS, a multiple of a vector.
            unsafe {
                let from = p.cast::<u16>().add(at);
                s.store(levels.scales.as_mut_ptr().cast::<f32>().add(at), s.load_f16(from));
                let from = from.add(groups);
                s.store(levels.zeros.as_mut_ptr().cast::<f32>().add(at), s.load_f16(from));
            }
        }
        levels
    }

    #[inline(always)]
    pub(crate) fn scales(&self) -> *const f32 {
        self.scales.as_ptr().cast()
    }

    #[inline(always)]
    pub(crate) fn zeros(&self) -> *const f32 {
        self.zeros.as_ptr().cast()
    }
}

multiversion! {
    /// Packed keys as floats, all 32 of each channel. Channel i goes to row `rows[i]`.
    ///
    /// # Safety
    /// `keys` are packed keys of so many channels; `out` has 32 floats per row.
    unsafe fn expand_keys(codec: Codec, keys: *const u8, channels: usize, rows: Option<&[u16]>, out: *mut f32) = expand_keys_body
}

#[inline(always)]
unsafe fn expand_keys_body<S: Simd>(
    s: S,
    codec: Codec,
    keys: *const u8,
    channels: usize,
    rows: Option<&[u16]>,
    out: *mut f32,
) {
    // SAFETY: the same contract.
    unsafe {
        match codec.bits {
            1 => keys_of::<S, 1>(s, codec, keys, channels, rows, out),
            2 => keys_of::<S, 2>(s, codec, keys, channels, rows, out),
            4 => keys_of::<S, 4>(s, codec, keys, channels, rows, out),
            _ => keys_of::<S, 8>(s, codec, keys, channels, rows, out),
        }
    }
}

/// # Safety
/// As [`expand_keys`], with so many bits.
#[inline(always)]
unsafe fn keys_of<S: Simd, const BITS: usize>(
    s: S,
    codec: Codec,
    keys: *const u8,
    channels: usize,
    rows: Option<&[u16]>,
    out: *mut f32,
) {
    let step = LANES * BITS / 8;
    // SAFETY: codes, scales and zeros lie as `Codec` says.
    unsafe {
        let levels =
            Levels::load(s, keys.add(codec.key_code_bytes(channels)), codec.key_groups(channels));
        let group = match codec.key_axis {
            KeyAxis::Channel => 1,
            KeyAxis::Token => codec.group as usize,
        };
        for (index, first) in (0..channels).step_by(group).enumerate() {
            let (scale, zero) = match codec.key_axis {
                KeyAxis::Channel => (
                    [s.splat(*levels.scales().add(first)); 2],
                    [s.splat(*levels.zeros().add(first)); 2],
                ),
                KeyAxis::Token => {
                    let (scale, zero) = (
                        levels.scales().add(index * BLOCK_TOKENS),
                        levels.zeros().add(index * BLOCK_TOKENS),
                    );
                    (
                        [s.load(scale), s.load(scale.add(LANES))],
                        [s.load(zero), s.load(zero.add(LANES))],
                    )
                }
            };
            for channel in first..(first + group).min(channels) {
                let from = keys.add(channel * 2 * step);
                let row = rows.map_or(channel, |r| r[channel] as usize);
                let to = out.add(row * BLOCK_TOKENS);
                for half in 0..2 {
                    let codes = s.codes::<BITS>(from.add(half * step));
                    s.store(to.add(half * LANES), s.mul_add(codes, scale[half], zero[half]));
                }
            }
        }
    }
}

multiversion! {
    /// Packed values of some tokens of a half as floats, `stride` apart; up to a vector too much per row is written.
    ///
    /// # Safety
    /// `values` are packed values; `out` has room for 32 rows and a vector.
    unsafe fn expand_values(codec: Codec, values: *const u8, dim: usize, tokens: Range<usize>, stride: usize, out: *mut f32) = expand_values_body
}

#[inline(always)]
unsafe fn expand_values_body<S: Simd>(
    s: S,
    codec: Codec,
    values: *const u8,
    dim: usize,
    tokens: Range<usize>,
    stride: usize,
    out: *mut f32,
) {
    // SAFETY: the same contract.
    unsafe {
        match codec.bits {
            1 => values_of::<S, 1>(s, codec, values, dim, tokens, stride, out),
            2 => values_of::<S, 2>(s, codec, values, dim, tokens, stride, out),
            4 => values_of::<S, 4>(s, codec, values, dim, tokens, stride, out),
            _ => values_of::<S, 8>(s, codec, values, dim, tokens, stride, out),
        }
    }
}

/// # Safety
/// As [`expand_values`], with so many bits.
#[inline(always)]
unsafe fn values_of<S: Simd, const BITS: usize>(
    s: S,
    codec: Codec,
    values: *const u8,
    dim: usize,
    tokens: Range<usize>,
    stride: usize,
    out: *mut f32,
) {
    let (row_bytes, groups) = (codec.row_bytes(dim), codec.groups(dim));
    let group = (codec.group as usize).min(dim.next_multiple_of(LANES));
    // SAFETY: codes, scales and zeros lie as `Codec` says; a buffer can be read a vector beyond its last number.
    unsafe {
        let levels = Levels::load(s, values.add(BLOCK_TOKENS * row_bytes), BLOCK_TOKENS * groups);
        for token in tokens {
            let (codes, out) = (values.add(token * row_bytes), out.add(token * stride));
            for (index, first) in (0..dim).step_by(group).enumerate() {
                let scale = s.splat(*levels.scales().add(token * groups + index));
                let zero = s.splat(*levels.zeros().add(token * groups + index));
                for at in (first..(first + group).min(dim)).step_by(LANES) {
                    let codes = s.codes::<BITS>(codes.add(at * BITS / 8));
                    s.store(out.add(at), s.mul_add(codes, scale, zero));
                }
            }
        }
    }
}

/// Keys in the pool's format as floats, from token `first` of the half on. Row i comes from row `from[i]` and goes to row
/// `to[i]`.
///
/// # Safety
/// `keys` has all the rows read, `out` 32 floats for each written.
#[inline(always)]
unsafe fn widen_keys<S: Simd, B: Source>(
    s: S,
    keys: *const u8,
    channels: usize,
    rows: (Option<&[u16]>, Option<&[u16]>),
    first: usize,
    out: *mut f32,
) {
    for channel in 0..channels {
        let from = rows.0.map_or(channel, |r| r[channel] as usize);
        let to = rows.1.map_or(channel, |r| r[channel] as usize);
        for half in 0..2 {
            // SAFETY: by the contract.
            unsafe {
                let at = half * LANES;
                let out = out.add(to * BLOCK_TOKENS + at);
                let v = B::load(s, keys.add((from * BLOCK_TOKENS + at) * B::BYTES));
                let v = if first > at {
                    s.keep(v, first as isize - at as isize, LANES as isize, s.load(out))
                } else {
                    v
                };
                s.store(out, v);
            }
        }
    }
}

/// What rows a tile of keys has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rows {
    /// One per channel of the head; where a channel was pruned, zero.
    All,
    /// One per channel that was not pruned.
    Kept,
}

/// The keys of a block as floats, `[channels][32]`, whatever their forms; those of tokens that are not there are
/// unspecified. Returns the number of channels.
///
/// # Safety
/// The block belongs to the keys and nobody writes it; `out` has 32 floats per channel.
#[inline(always)]
pub(crate) unsafe fn key_tile<S: Simd, B: Source>(
    _s: S,
    pool: &BlockPool,
    keys: &Halves,
    block: usize,
    rows: Rows,
    out: *mut f32,
) -> usize {
    // SAFETY: the same contract.
    unsafe { key_tile_of::<B>(S::ISA, pool, keys, block, rows, out) }
}

multiversion! { unsafe fn key_tile_of<B: Source>(pool: &BlockPool, keys: &Halves, block: usize, rows: Rows, out: *mut f32) -> usize = key_tile_body }

/// # Safety
/// As [`key_tile`].
#[inline(always)]
unsafe fn key_tile_body<S: Simd, B: Source>(
    s: S,
    pool: &BlockPool,
    keys: &Halves,
    block: usize,
    rows: Rows,
    out: *mut f32,
) -> usize {
    let dim = pool.head_dim();
    let kept = keys.kept.as_deref();
    let channels = kept.map_or(dim, <[u16]>::len);
    let base = block * BLOCK_TOKENS;
    let packed = keys.packed_tokens.saturating_sub(base).min(BLOCK_TOKENS);
    let narrow = keys.narrow_tokens.saturating_sub(base).min(BLOCK_TOKENS);
    let (to, from) = match rows {
        Rows::All => (kept, None),
        Rows::Kept => (None, kept),
    };
    // SAFETY: the halves are the cache's own and hold what their lists say.
    unsafe {
        if to.is_some() {
            std::slice::from_raw_parts_mut(out, dim * BLOCK_TOKENS).fill(0.0);
        }
        if let (true, Some(codec)) = (packed > 0, keys.codec) {
            let half = pool.ptr(keys.packed[block]);
            expand_keys(S::ISA, codec, half, channels, to, out);
        }
        if narrow > packed {
            let half = pool.ptr(keys.pruned[block - keys.packed_tokens / BLOCK_TOKENS]);
            widen_keys::<S, B>(s, half, channels, (None, to), packed, out);
        }
        if narrow < BLOCK_TOKENS
            && let Some(half) = keys.whole.get(block - keys.whole_base())
        {
            let count = if rows == Rows::All { dim } else { channels };
            widen_keys::<S, B>(s, pool.ptr(*half), count, (from, None), narrow, out);
        }
    }
    match rows {
        Rows::All => dim,
        Rows::Kept => channels,
    }
}

/// The values of some tokens of a block as floats, `stride` apart.
///
/// # Safety
/// As [`key_tile`]; the tokens exist, and `out` has room for 32 rows and a vector.
#[inline(always)]
pub(crate) unsafe fn value_tile<S: Simd, B: Source>(
    _s: S,
    pool: &BlockPool,
    values: &Halves,
    block: usize,
    tokens: Range<usize>,
    stride: usize,
    out: *mut f32,
) {
    // SAFETY: the same contract.
    unsafe { value_tile_of::<B>(S::ISA, pool, values, block, tokens, stride, out) }
}

multiversion! { unsafe fn value_tile_of<B: Source>(pool: &BlockPool, values: &Halves, block: usize, tokens: Range<usize>, stride: usize, out: *mut f32) = value_tile_body }

/// # Safety
/// As [`value_tile`].
#[inline(always)]
unsafe fn value_tile_body<S: Simd, B: Source>(
    s: S,
    pool: &BlockPool,
    values: &Halves,
    block: usize,
    tokens: Range<usize>,
    stride: usize,
    out: *mut f32,
) {
    let dim = pool.head_dim();
    let packed = values.packed_tokens.saturating_sub(block * BLOCK_TOKENS).min(tokens.end);
    // SAFETY: as above; a buffer can be read a vector beyond its last number.
    unsafe {
        if let (true, Some(codec)) = (packed > tokens.start, values.codec) {
            let half = pool.ptr(values.packed[block]);
            expand_values(S::ISA, codec, half, dim, tokens.start..packed, stride, out);
        }
        let first = tokens.start.max(packed);
        if first < tokens.end {
            let half = pool.ptr(values.whole[block - values.whole_base()]);
            for token in first..tokens.end {
                for at in (0..dim).step_by(LANES) {
                    let v = B::load(s, half.add((token * dim + at) * B::BYTES));
                    s.store(out.add(token * stride + at), v);
                }
            }
        }
    }
}
