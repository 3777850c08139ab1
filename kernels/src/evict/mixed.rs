//! Eviction from caches of several forms. Packed tokens move in place, the others to new halves: where a form begins inside
//! a block changes, and with it the lanes of all its tokens.

use std::ops::Range;

use super::Work;
use crate::buffer::{Scratch, lines, split_lines};
use crate::kv::codec::{code_at, put_codes};
use crate::kv::tile::{Rows, key_tile};
use crate::kv::{
    BLOCK_TOKENS, BlockPool, Codec, Half, Halves, HeadCache, KeyAxis, PoolFull, with_format,
};
use crate::pack::encode::put_channels;
use crate::simd::{Isa, Simd, Source, multiversion};

/// The places of one side after an eviction.
struct Side {
    packed: usize,
    narrow: usize,
    pruned: Vec<Half>,
    whole: Vec<Half>,
}

/// The places of a head's tokens after an eviction.
pub(super) struct Mixed {
    keys: Side,
    values: Side,
}

/// Counts what becomes of each head and takes the new halves for it.
pub(super) fn plan(pool: &mut BlockPool, work: &mut [Work<'_>]) -> Result<(), PoolFull> {
    let (mut freed, mut wanted) = (0, 0);
    let mut sizes = Vec::new();
    for work in work.iter().filter(|w| !w.head.is_plain()) {
        let pruned = pool.format().half_bytes(work.head.narrow_channels(pool));
        for side in [&work.head.keys, &work.head.values] {
            let among = |tokens: usize| work.kept.partition_point(|t| (*t as usize) < tokens);
            let (packed, narrow) = (among(side.packed_tokens), among(side.narrow_tokens));
            let needed = Halves::needed(packed, narrow, work.keep);
            let gone = side.packed[needed[0]..].iter().chain(&side.pruned).chain(&side.whole);
            freed += gone.map(|h| pool.bytes_of(*h)).sum::<u64>();
            wanted += (needed[1] * pruned) as u64 + needed[2] as u64 * pool.half_bytes();
            sizes.push((packed, narrow, needed, pruned));
        }
    }
    pool.exchange(freed, wanted)?;
    let mut sizes = sizes.into_iter();
    let mut side = || -> Result<Option<Side>, PoolFull> {
        let Some((packed, narrow, needed, bytes)) = sizes.next() else { return Ok(None) };
        let pruned =
            (0..needed[1]).map(|_| pool.try_alloc_bytes(bytes)).collect::<Result<_, _>>()?;
        let whole = (0..needed[2]).map(|_| pool.try_alloc()).collect::<Result<_, _>>()?;
        Ok(Some(Side { packed, narrow, pruned, whole }))
    };
    for work in work.iter_mut().filter(|w| !w.head.is_plain()) {
        if let (Some(keys), Some(values)) = (side()?, side()?) {
            work.mixed = Some(Mixed { keys, values });
        }
    }
    Ok(())
}

impl Mixed {
    /// Moves token `kept[i]` to place i; those before `moved` are in place where they are packed.
    ///
    /// # Safety
    /// Nobody else uses the head's halves, old and new.
    pub(super) unsafe fn move_all(
        &self,
        isa: Isa,
        pool: &BlockPool,
        head: &HeadCache,
        kept: &[u32],
        moved: usize,
    ) {
        // SAFETY: the caller's contract.
        unsafe {
            match pool.format().bytes() {
                4 => self.move_plain::<u32>(pool, head, kept),
                1 => self.move_plain::<u8>(pool, head, kept),
                _ => self.move_plain::<u16>(pool, head, kept),
            }
            if let Some(codec) = head.values.codec {
                let range = moved..self.values.packed;
                move_values(pool, &head.values, codec, kept, range);
            }
            let range = moved..self.keys.packed;
            match head.keys.codec {
                Some(codec) if !range.is_empty() && codec.key_axis == KeyAxis::Channel => {
                    with_format!(pool.format(), regroup::<B>(isa, pool, head, codec, kept, range));
                }
                Some(codec) if !range.is_empty() => {
                    move_keys(pool, head, codec, kept, range);
                }
                _ => {}
            }
        }
    }

    /// # Safety
    /// As [`Self::move_all`]; `T` has the size of the format.
    unsafe fn move_plain<T: Copy>(&self, pool: &BlockPool, head: &HeadCache, kept: &[u32]) {
        let (dim, end) = (pool.head_dim(), kept.len());
        let (keys, values) = (&head.keys, &head.values);
        let lists = [
            (
                head.narrow_channels(pool),
                (&keys.pruned, keys.packed_tokens),
                (&self.keys.pruned, self.keys.packed..self.keys.narrow),
            ),
            (dim, (&keys.whole, keys.narrow_tokens), (&self.keys.whole, self.keys.narrow..end)),
        ];
        // SAFETY: the lists have halves for all tokens of their forms.
        unsafe {
            for (channels, from, to) in lists {
                let base = to.1.start / BLOCK_TOKENS;
                for token in to.1 {
                    let source = kept[token] as usize;
                    let half = from.0[source / BLOCK_TOKENS - from.1 / BLOCK_TOKENS];
                    let source = pool.ptr(half).cast::<T>().add(source % BLOCK_TOKENS);
                    let half = to.0[token / BLOCK_TOKENS - base];
                    let target = pool.ptr(half).cast::<T>().add(token % BLOCK_TOKENS);
                    for channel in 0..channels {
                        *target.add(channel * BLOCK_TOKENS) = *source.add(channel * BLOCK_TOKENS);
                    }
                }
            }
            let base = self.values.narrow / BLOCK_TOKENS;
            for (i, source) in kept[self.values.narrow..].iter().enumerate() {
                let (token, source) = (self.values.narrow + i, *source as usize);
                let half = values.whole[source / BLOCK_TOKENS - values.whole_base()];
                let source = pool.ptr(half).cast::<T>().add(source % BLOCK_TOKENS * dim);
                let half = self.values.whole[token / BLOCK_TOKENS - base];
                let target = pool.ptr(half).cast::<T>().add(token % BLOCK_TOKENS * dim);
                std::ptr::copy_nonoverlapping(source, target, dim);
            }
        }
    }

    /// Gives back what is no longer needed.
    pub(super) fn settle(self, pool: &mut BlockPool, head: &mut HeadCache, keep: usize) {
        for (side, new) in [(&mut head.keys, self.keys), (&mut head.values, self.values)] {
            let whole = std::mem::replace(&mut side.whole, new.whole);
            let pruned = std::mem::replace(&mut side.pruned, new.pruned);
            let packed = side.packed.split_off(new.packed.div_ceil(BLOCK_TOKENS));
            let gone = packed.into_iter().chain(pruned).chain(whole);
            gone.rev().for_each(|h| pool.recycle(h));
            (side.packed_tokens, side.narrow_tokens) = (new.packed, new.narrow);
        }
        head.truncate(pool, keep);
    }
}

/// Moves packed values, each with its scales and zeros.
///
/// # Safety
/// As [`Mixed::move_all`].
unsafe fn move_values(
    pool: &BlockPool,
    values: &Halves,
    codec: Codec,
    kept: &[u32],
    range: Range<usize>,
) {
    let dim = pool.head_dim();
    let (bytes, groups) = (codec.row_bytes(dim), 2 * codec.groups(dim));
    let levels = BLOCK_TOKENS * bytes;
    // Codes, scales, zeros: where they begin and how much of them is a token's.
    let parts = [(0, bytes), (levels, groups), (levels + BLOCK_TOKENS * groups, groups)];
    for token in range {
        let source = kept[token] as usize;
        for (first, size) in parts {
            // SAFETY: both tokens have packed values. Sources never lie before their targets.
            unsafe {
                let from = pool.ptr(values.packed[source / BLOCK_TOKENS]);
                let to = pool.ptr(values.packed[token / BLOCK_TOKENS]);
                std::ptr::copy(
                    from.add(first + source % BLOCK_TOKENS * size),
                    to.add(first + token % BLOCK_TOKENS * size),
                    size,
                );
            }
        }
    }
}

/// Moves keys packed token by token, each with its scales and zeros.
///
/// # Safety
/// As [`Mixed::move_all`].
unsafe fn move_keys(
    pool: &BlockPool,
    head: &HeadCache,
    codec: Codec,
    kept: &[u32],
    range: Range<usize>,
) {
    let channels = head.narrow_channels(pool);
    let levels = codec.key_code_bytes(channels);
    let rows = 2 * codec.groups(channels);
    let packed = &head.keys.packed;
    let mut at = range.start;
    while at < range.end {
        let end = (at / BLOCK_TOKENS * BLOCK_TOKENS + BLOCK_TOKENS).min(range.end);
        let target = pool.ptr(packed[at / BLOCK_TOKENS]);
        let mut from = [(std::ptr::null::<u8>(), 0); BLOCK_TOKENS];
        for (from, source) in from.iter_mut().zip(&kept[at..end]) {
            let source = *source as usize;
            *from = (pool.ptr(packed[source / BLOCK_TOKENS]).cast_const(), source % BLOCK_TOKENS);
        }
        let from = &from[..end - at];
        // SAFETY: all tokens have packed keys. Sources never lie before their targets, so what a later move reads is still
        // there; a row is collected before it is written.
        unsafe {
            for channel in 0..channels {
                let offset = channel * codec.channel_bytes();
                let mut codes = [0; BLOCK_TOKENS];
                for (lane, code) in codes.iter_mut().enumerate() {
                    let (half, lane) = match lane.checked_sub(at % BLOCK_TOKENS) {
                        Some(i) if i < from.len() => from[i],
                        _ => (target.cast_const(), lane),
                    };
                    *code = code_at(half.add(offset), codec.bits, lane);
                }
                put_codes(codec.bits, &codes, target.add(offset));
            }
            for row in 0..rows {
                let offset = levels + row * 2 * BLOCK_TOKENS;
                let mut numbers = [0u16; BLOCK_TOKENS];
                for (number, (half, lane)) in numbers.iter_mut().zip(from) {
                    *number = half.add(offset).cast::<u16>().add(*lane).read_unaligned();
                }
                for (i, number) in numbers[..from.len()].iter().enumerate() {
                    let to = target.add(offset).cast::<u16>().add(at % BLOCK_TOKENS + i);
                    to.write_unaligned(*number);
                }
            }
        }
        at = end;
    }
}

multiversion! {
    /// Packs keys along channels anew, from the group of the first of `range` on.
    ///
    /// # Safety
    /// As [`Mixed::move_all`].
    unsafe fn regroup<B: Source>(pool: &BlockPool, head: &HeadCache, codec: Codec, kept: &[u32], range: Range<usize>) = regroup_body
}

#[inline(always)]
unsafe fn regroup_body<S: Simd, B: Source>(
    s: S,
    pool: &BlockPool,
    head: &HeadCache,
    codec: Codec,
    kept: &[u32],
    range: Range<usize>,
) {
    let (channels, group) = (head.narrow_channels(pool), codec.group as usize);
    let size = lines(channels * BLOCK_TOKENS);
    let mut scratch = Scratch::take((1 + group / BLOCK_TOKENS) * size);
    let (source, targets) = split_lines(scratch.floats(), size);
    let mut loaded = usize::MAX;
    for start in (range.start / group * group..range.end).step_by(group) {
        let end = (start + group).min(range.end);
        for (i, from) in kept[start..end].iter().enumerate() {
            let (block, lane) = (*from as usize / BLOCK_TOKENS, *from as usize % BLOCK_TOKENS);
            if block != loaded {
                // SAFETY: the block is the head's. What is packed anew lies in this block or before, and is read no more.
                unsafe {
                    key_tile::<S, B>(s, pool, &head.keys, block, Rows::Kept, source.as_mut_ptr());
                }
                loaded = block;
            }
            let target = &mut targets[i / BLOCK_TOKENS * size..][..size];
            for channel in 0..channels {
                target[channel * BLOCK_TOKENS + i % BLOCK_TOKENS] =
                    source[channel * BLOCK_TOKENS + lane];
            }
        }
        // SAFETY: the tokens have packed halves.
        unsafe { put_channels(S::ISA, pool, head, codec, start..end, targets) };
    }
}
