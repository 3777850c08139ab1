//! Codes of a few bits, with a scale and a zero per group.

use half::f16;

use super::BLOCK_TOKENS;

/// What a group of packed keys runs along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyAxis {
    /// Consecutive tokens of one channel. A group of 64 tokens is two halves, which both hold its scale and zero.
    Channel,
    /// Consecutive channels of one token, as values always are; so tokens can be packed one by one.
    Token,
}

/// How keys and values are packed: codes of `bits` bits, and a scale and a zero of two bytes each per group.
///
/// With 8, 4 or 2 bits the zero is the group's minimum and the scale its range over the largest code. With one bit the two
/// values are the quartile points `(3 min + max) / 4` and `(min + 3 max) / 4`. Scale and zero are rounded to binary16 before
/// codes are computed; a code is `(x - zero) / scale` rounded to the nearest whole number, ties to even, and stands for
/// `code * scale + zero`. Where the scale is 0 every code is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Codec {
    /// 8, 4, 2 or 1.
    pub bits: u8,
    /// Numbers of a group: of channels a multiple of 16, of tokens a multiple of 32. A last group may be shorter.
    pub group: u16,
    /// What groups of keys run along.
    pub key_axis: KeyAxis,
}

impl Codec {
    /// Whether there are such kernels.
    #[must_use]
    pub const fn is_valid(self) -> bool {
        let unit = match self.key_axis {
            KeyAxis::Channel => 32,
            KeyAxis::Token => 16,
        };
        matches!(self.bits, 1 | 2 | 4 | 8) && self.group > 0 && self.group.is_multiple_of(unit)
    }

    /// Bytes of the packed keys of a block with so many channels: `4 * bits` per channel for 32 codes, and 4 per group, which
    /// are `channels` groups along tokens or `32 * ceil(channels / group)` along channels.
    #[must_use]
    pub const fn key_half_bytes(self, channels: usize) -> usize {
        self.key_code_bytes(channels) + 4 * self.key_groups(channels)
    }

    /// Bytes of the packed values of a block: per token `head_dim * bits / 8` for the codes, and 4 per group of channels.
    #[must_use]
    pub const fn value_half_bytes(self, head_dim: usize) -> usize {
        BLOCK_TOKENS * (self.row_bytes(head_dim) + 4 * self.groups(head_dim))
    }

    /// Groups of so many channels.
    pub(crate) const fn groups(self, channels: usize) -> usize {
        channels.div_ceil(self.group as usize)
    }

    /// Bytes of a channel's 32 codes.
    pub(crate) const fn channel_bytes(self) -> usize {
        BLOCK_TOKENS / 8 * self.bits as usize
    }

    pub(crate) const fn key_code_bytes(self, channels: usize) -> usize {
        channels * self.channel_bytes()
    }

    pub(crate) const fn key_groups(self, channels: usize) -> usize {
        match self.key_axis {
            KeyAxis::Channel => channels,
            KeyAxis::Token => BLOCK_TOKENS * self.groups(channels),
        }
    }

    /// Where the scale of a key's number is among those of its half; the zeros follow the scales.
    pub(crate) const fn key_group_of(self, channel: usize, lane: usize) -> usize {
        match self.key_axis {
            KeyAxis::Channel => channel,
            KeyAxis::Token => channel / self.group as usize * BLOCK_TOKENS + lane,
        }
    }

    /// Bytes of a value's codes.
    pub(crate) const fn row_bytes(self, head_dim: usize) -> usize {
        head_dim * self.bits as usize / 8
    }

    /// Largest code.
    pub(crate) const fn top(self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    /// Scale and zero of a group with these extremes, as stored.
    #[inline(always)]
    pub(crate) fn fit(self, min: f32, max: f32) -> (f16, f16) {
        let (scale, zero) = if self.bits == 1 {
            ((max - min) / 2.0, (3.0 * min + max) / 4.0)
        } else {
            ((max - min) / self.top(), min)
        };
        // An infinite scale would make every number one.
        let bound = |x: f32| f16::from_f32(x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()));
        (bound(scale), bound(zero))
    }
}

/// The code at an index of codes that lie next to each other, the first one in the lowest bits.
#[inline(always)]
pub(crate) unsafe fn code_at(codes: *const u8, bits: u8, index: usize) -> u8 {
    let bit = index * bits as usize;
    // SAFETY: the caller's index lies among the codes.
    let byte = unsafe { *codes.add(bit / 8) };
    (byte >> (bit % 8)) & ((1u16 << bits) - 1) as u8
}

/// Writes codes next to each other; as many as fill whole bytes.
///
/// # Safety
/// `out` has room for them.
#[inline(always)]
pub(crate) unsafe fn put_codes(bits: u8, codes: &[u8], out: *mut u8) {
    #[inline(always)]
    unsafe fn put<const BITS: usize>(codes: &[u8], out: *mut u8) {
        for (i, part) in codes.chunks_exact(8 / BITS).enumerate() {
            let mut byte = 0;
            for (j, code) in part.iter().enumerate() {
                byte |= code << (j * BITS);
            }
            // SAFETY: by the caller's contract.
            unsafe { out.add(i).write(byte) };
        }
    }
    // SAFETY: the same contract.
    unsafe {
        match bits {
            1 => put::<1>(codes, out),
            2 => put::<2>(codes, out),
            4 => put::<4>(codes, out),
            _ => put::<8>(codes, out),
        }
    }
}

/// The code of a number in a group.
#[inline(always)]
pub(crate) fn quantise(x: f32, scale: f32, zero: f32, top: f32) -> u8 {
    let code = if scale > 0.0 { (x - zero) / scale } else { 0.0 };
    // Adding 1.5 * 2^23 rounds to whole numbers, which are then the lowest bits.
    (code.max(0.0).min(top) + 12_582_912.0).to_bits() as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_codes_and_four_bytes_a_group() {
        let codec = |bits, group, key_axis| Codec { bits, group, key_axis };
        // 64 channels x 32 tokens x 2 bits = 512 bytes, and 64 groups.
        assert_eq!(codec(2, 32, KeyAxis::Channel).key_half_bytes(64), 512 + 256);
        // Two halves share a group of 64, and both hold it.
        assert_eq!(codec(2, 64, KeyAxis::Channel).key_half_bytes(64), 512 + 256);
        assert_eq!(codec(2, 32, KeyAxis::Channel).value_half_bytes(64), 512 + 32 * 2 * 4);
        assert_eq!(codec(2, 64, KeyAxis::Channel).value_half_bytes(64), 512 + 32 * 4);
        assert_eq!(codec(8, 64, KeyAxis::Token).key_half_bytes(64), 2048 + 32 * 4);
        assert_eq!(codec(1, 32, KeyAxis::Channel).key_half_bytes(40), 160 + 160);
        assert_eq!(codec(4, 32, KeyAxis::Token).value_half_bytes(80), 32 * 40 + 32 * 3 * 4);
        assert!(
            codec(4, 48, KeyAxis::Token).is_valid() && !codec(4, 48, KeyAxis::Channel).is_valid()
        );
        assert!(
            !codec(3, 32, KeyAxis::Token).is_valid() && !codec(4, 0, KeyAxis::Token).is_valid()
        );
    }

    #[test]
    fn groups_by_hand() {
        let codec = |bits| Codec { bits, group: 32, key_axis: KeyAxis::Channel };
        // -1 .. 2 in two bits: steps of 1.
        let (scale, zero) = codec(2).fit(-1.0, 2.0);
        assert_eq!((scale.to_f32(), zero.to_f32()), (1.0, -1.0));
        // 0.5 and 2.5 steps above the zero are ties.
        let code = |x| quantise(x, 1.0, -1.0, 3.0);
        assert_eq!([-1.0, -0.5, 0.0, 0.6, 1.5, 2.0].map(code), [0, 0, 1, 2, 2, 3]);
        assert_eq!([-9.0, 9.0, f32::NAN].map(code), [0, 3, 0]);
        // One bit: the quartile points 1 and 3 of 0 .. 4; the middle is a tie and goes down.
        let (scale, zero) = codec(1).fit(0.0, 4.0);
        assert_eq!((scale.to_f32(), zero.to_f32()), (2.0, 1.0));
        assert_eq!([0.0, 2.0, 2.1, 4.0].map(|x| quantise(x, 2.0, 1.0, 1.0)), [0, 0, 1, 1]);
        // A constant group.
        let (scale, zero) = codec(4).fit(3.0, 3.0);
        assert_eq!((scale.to_f32(), zero.to_f32(), quantise(3.0, 0.0, 3.0, 15.0)), (0.0, 3.0, 0));
        // Scale and zero are those of binary16: 0.1 is 0.09997559.
        assert_eq!(codec(8).fit(0.1, 25.6).1.to_bits(), 0x2e66);
        assert_eq!(codec(2).fit(-1e9, 1e9).0, half::f16::MAX);
    }

    #[test]
    fn codes_come_back() {
        for bits in [1u8, 2, 4, 8] {
            let codes: Vec<u8> = (0..40u32).map(|i| (i * 37 % (1 << bits)) as u8).collect();
            let mut bytes = [0xee; 41];
            // SAFETY: 40 codes are at most 40 bytes.
            unsafe { put_codes(bits, &codes, bytes.as_mut_ptr()) };
            assert_eq!(bytes[5 * bits as usize], 0xee);
            for (i, code) in codes.iter().enumerate() {
                // SAFETY: as above.
                assert_eq!(unsafe { code_at(bytes.as_ptr(), bits, i) }, *code);
            }
        }
        // The first code is in the lowest bits.
        let mut byte = [0];
        // SAFETY: four codes are a byte.
        unsafe { put_codes(2, &[3, 0, 1, 2], byte.as_mut_ptr()) };
        assert_eq!(byte, [0b10_01_00_11]);
    }
}
