//! Numbers to codes.

use std::ops::Range;

use half::f16;

use crate::buffer::{Scratch, lines, split_lines};
use crate::kv::codec::{code_at, put_codes, quantise};
use crate::kv::tile::{Rows, key_tile, value_tile};
use crate::kv::{BLOCK_TOKENS, BlockPool, Codec, HeadCache, KeyAxis, with_format};
use crate::simd::{Isa, LANES, Simd, Source, multiversion};

/// Packs the first `keys` and `values` tokens of a head that has the halves for it.
pub(super) fn head(isa: Isa, pool: &BlockPool, head: &HeadCache, keys: usize, values: usize) {
    // SAFETY: the halves are the head's own, which nobody else uses.
    unsafe { with_format!(pool.format(), run::<B>(isa, pool, head, keys, values)) }
}

multiversion! {
    /// # Safety
    /// The head has packed halves for so many tokens, and nobody else uses its halves.
    unsafe fn run<B: Source>(pool: &BlockPool, head: &HeadCache, keys: usize, values: usize) = body
}

/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn body<S: Simd, B: Source>(
    s: S,
    pool: &BlockPool,
    head: &HeadCache,
    keys: usize,
    values: usize,
) {
    let dim = pool.head_dim();
    let padded = dim.next_multiple_of(LANES);
    let channels = head.narrow_channels(pool);
    if let Some(codec) = head.keys.codec
        && keys > head.keys.packed_tokens
    {
        let first = head.keys.packed_tokens;
        let group = match codec.key_axis {
            KeyAxis::Channel => codec.group as usize,
            KeyAxis::Token => BLOCK_TOKENS,
        };
        let size = lines(channels * BLOCK_TOKENS);
        let mut scratch = Scratch::take(group / BLOCK_TOKENS * size);
        let tiles = scratch.floats();
        for start in (first / group * group..keys).step_by(group) {
            let end = (start + group).min(keys);
            let blocks = start / BLOCK_TOKENS..end.div_ceil(BLOCK_TOKENS);
            // SAFETY: the blocks are the head's; tiles have 32 floats per channel.
            unsafe {
                for (tile, block) in tiles.chunks_exact_mut(size).zip(blocks.clone()) {
                    key_tile::<S, B>(s, pool, &head.keys, block, Rows::Kept, tile.as_mut_ptr());
                }
                match codec.key_axis {
                    KeyAxis::Channel => {
                        put_channels(S::ISA, pool, head, codec, start..end, tiles);
                    }
                    KeyAxis::Token => {
                        let out = pool.ptr(head.keys.packed[start / BLOCK_TOKENS]);
                        let lanes = first.max(start) - start..end - start;
                        put_tokens(S::ISA, codec, lanes, channels, tiles, out);
                    }
                }
            }
        }
    }
    if let Some(codec) = head.values.codec
        && values > head.values.packed_tokens
    {
        let mut scratch = Scratch::take(lines(BLOCK_TOKENS * padded + LANES));
        let (rows, _) = split_lines(scratch.floats(), BLOCK_TOKENS * padded + LANES);
        let first = head.values.packed_tokens;
        for block in first / BLOCK_TOKENS..values.div_ceil(BLOCK_TOKENS) {
            let base = block * BLOCK_TOKENS;
            let lanes = first.max(base) - base..values.min(base + BLOCK_TOKENS) - base;
            // SAFETY: the tokens exist, the rows have room for a block of them.
            unsafe {
                let tile = rows.as_mut_ptr();
                value_tile::<S, B>(s, pool, &head.values, block, lanes.clone(), padded, tile);
                let out = pool.ptr(head.values.packed[block]);
                for lane in lanes {
                    let row = &rows[lane * padded..lane * padded + dim];
                    put_value(S::ISA, codec, row, lane, out);
                }
            }
        }
    }
}

multiversion! {
    /// Packs keys of the tokens of a group channel by channel; `tiles` are its blocks, each on cache lines of its own.
    ///
    /// # Safety
    /// The head has packed halves for the tokens, which nobody else uses.
    pub(crate) unsafe fn put_channels(pool: &BlockPool, head: &HeadCache, codec: Codec, tokens: Range<usize>, tiles: &[f32]) = put_channels_body
}

/// # Safety
/// As [`put_channels`].
#[inline(always)]
unsafe fn put_channels_body<S: Simd>(
    _s: S,
    pool: &BlockPool,
    head: &HeadCache,
    codec: Codec,
    tokens: Range<usize>,
    tiles: &[f32],
) {
    let channels = head.narrow_channels(pool);
    let size = lines(channels * BLOCK_TOKENS);
    let parts = || {
        let first = tokens.start / BLOCK_TOKENS;
        tiles.chunks_exact(size).enumerate().filter_map(move |(i, tile)| {
            let base = (first + i) * BLOCK_TOKENS;
            let lanes = tokens.end.saturating_sub(base).min(BLOCK_TOKENS);
            (lanes > 0).then_some((first + i, lanes, tile))
        })
    };
    for channel in 0..channels {
        let at = channel * BLOCK_TOKENS;
        let (mut min, mut max) = (f32::INFINITY, f32::NEG_INFINITY);
        for (_, lanes, tile) in parts() {
            (min, max) = extremes(&tile[at..at + lanes], min, max);
        }
        let (scale, zero) = codec.fit(min, max);
        for (block, _, tile) in parts() {
            let mut codes = [0; BLOCK_TOKENS];
            for (code, x) in codes.iter_mut().zip(&tile[at..at + BLOCK_TOKENS]) {
                *code = quantise(*x, scale.to_f32(), zero.to_f32(), codec.top());
            }
            // SAFETY: the half has codes, scales and zeros of so many channels.
            unsafe {
                let half = pool.ptr(head.keys.packed[block]);
                put_codes(codec.bits, &codes, half.add(channel * codec.channel_bytes()));
                let levels = half.add(codec.key_code_bytes(channels));
                put_levels(levels, channels, channel, scale, zero);
            }
        }
    }
}

multiversion! {
    /// Packs the keys of some tokens of a block token by token; the codes of the other tokens stay.
    ///
    /// # Safety
    /// `out` is a packed half of so many channels, which nobody else uses.
    pub(crate) unsafe fn put_tokens(codec: Codec, lanes: Range<usize>, channels: usize, tile: &[f32], out: *mut u8) = put_tokens_body
}

/// # Safety
/// As [`put_tokens`].
#[inline(always)]
unsafe fn put_tokens_body<S: Simd>(
    _s: S,
    codec: Codec,
    lanes: Range<usize>,
    channels: usize,
    tile: &[f32],
    out: *mut u8,
) {
    let (group, bytes) = (codec.group as usize, codec.channel_bytes());
    for first in (0..channels).step_by(group) {
        let last = (first + group).min(channels);
        let (mut min, mut max) = ([f32::INFINITY; BLOCK_TOKENS], [f32::NEG_INFINITY; BLOCK_TOKENS]);
        for row in tile[first * BLOCK_TOKENS..last * BLOCK_TOKENS].chunks_exact(BLOCK_TOKENS) {
            for (lane, x) in row.iter().enumerate() {
                min[lane] = if *x < min[lane] { *x } else { min[lane] };
                max[lane] = if *x > max[lane] { *x } else { max[lane] };
            }
        }
        let (mut scales, mut zeros) = ([0.0; BLOCK_TOKENS], [0.0; BLOCK_TOKENS]);
        for lane in lanes.clone() {
            let (scale, zero) = codec.fit(min[lane], max[lane]);
            (scales[lane], zeros[lane]) = (scale.to_f32(), zero.to_f32());
            let groups = codec.key_groups(channels);
            // SAFETY: the half has scales and zeros of its groups behind the codes.
            unsafe {
                let levels = out.add(codec.key_code_bytes(channels));
                put_levels(levels, groups, codec.key_group_of(first, lane), scale, zero);
            }
        }
        for channel in first..last {
            let row = &tile[channel * BLOCK_TOKENS..(channel + 1) * BLOCK_TOKENS];
            let mut codes = [0; BLOCK_TOKENS];
            for (lane, code) in codes.iter_mut().enumerate() {
                *code = quantise(row[lane], scales[lane], zeros[lane], codec.top());
            }
            // SAFETY: the half has 32 codes per channel.
            unsafe {
                let out = out.add(channel * bytes);
                if lanes.len() < BLOCK_TOKENS {
                    for (lane, code) in codes.iter_mut().enumerate() {
                        if !lanes.contains(&lane) {
                            *code = code_at(out, codec.bits, lane);
                        }
                    }
                }
                put_codes(codec.bits, &codes, out);
            }
        }
    }
}

multiversion! {
    /// Packs the value of a token.
    ///
    /// # Safety
    /// `out` is a packed half of values with as many channels as the row, which nobody else uses.
    pub(crate) unsafe fn put_value(codec: Codec, row: &[f32], lane: usize, out: *mut u8) = put_value_body
}

/// # Safety
/// As [`put_value`].
#[inline(always)]
unsafe fn put_value_body<S: Simd>(_s: S, codec: Codec, row: &[f32], lane: usize, out: *mut u8) {
    let (dim, groups) = (row.len(), codec.groups(row.len()));
    let mut codes = [0; 256];
    for (index, part) in row.chunks(codec.group as usize).enumerate() {
        let (min, max) = extremes(part, f32::INFINITY, f32::NEG_INFINITY);
        let (scale, zero) = codec.fit(min, max);
        let from = index * codec.group as usize;
        for (code, x) in codes[from..].iter_mut().zip(part) {
            *code = quantise(*x, scale.to_f32(), zero.to_f32(), codec.top());
        }
        // SAFETY: the half has scales and zeros of its groups behind the codes.
        unsafe {
            let levels = out.add(BLOCK_TOKENS * codec.row_bytes(dim));
            put_levels(levels, BLOCK_TOKENS * groups, lane * groups + index, scale, zero);
        }
    }
    // SAFETY: the half has a row of codes per token.
    unsafe { put_codes(codec.bits, &codes[..dim], out.add(lane * codec.row_bytes(dim))) };
}

/// Least and largest number, beginning with those given.
#[inline(always)]
fn extremes(numbers: &[f32], min: f32, max: f32) -> (f32, f32) {
    numbers.iter().fold((min, max), |(min, max), x| {
        (if *x < min { *x } else { min }, if *x > max { *x } else { max })
    })
}

/// # Safety
/// `levels` starts `groups` scales and as many zeros.
#[inline(always)]
unsafe fn put_levels(levels: *mut u8, groups: usize, group: usize, scale: f16, zero: f16) {
    // SAFETY: by the contract.
    unsafe {
        let levels = levels.cast::<u16>().add(group);
        levels.write_unaligned(scale.to_bits());
        levels.add(groups).write_unaligned(zero.to_bits());
    }
}
