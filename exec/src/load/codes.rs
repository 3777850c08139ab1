//! Stored blocks as codes: those of the file where kernels have such, without a detour over floats.

use batchmax_kernels::gemm::CodeRow;
use batchmax_sim::profile::GgmlType;
use half::f16;

use super::LoadError;
use super::names::Part;
use super::rows;
use super::stored::{Shard, Stored};

/// Elements of a block, in the file as in the kernels.
const BLOCK: usize = 32;

/// Reads the rows of a part as codes of `bits` bits and hands each row over.
pub(super) fn read(
    shard: &Shard,
    stored: &Stored,
    part: &Part,
    bits: usize,
    row: &mut dyn FnMut(usize, &CodeRow),
) -> Result<(), LoadError> {
    let mut codes = CodeRow::zero(part.columns);
    if !has_codes(stored.kind, bits) || stored.rows == 1 {
        return rows::read(shard, stored, part, 0.0, &mut |i, values| {
            codes.quantise(values, bits);
            row(i, &codes);
        });
    }
    rows::read_raw(shard, stored, part, &mut |i, raw| {
        take(stored.kind, raw, &mut codes);
        let halves = codes.scales.iter().chain(&codes.minima);
        if halves.into_iter().any(|bits| !f16::from_bits(*bits).is_finite()) {
            return Err(format!(
                "holds a scale that is not a number in row {}; the file is damaged, fetch it again",
                part.first + i
            ));
        }
        row(i, &codes);
        Ok(())
    })
}

/// Whether blocks of this type are codes of at most so many bits with a scale and a minimum.
fn has_codes(kind: GgmlType, bits: usize) -> bool {
    match kind {
        GgmlType::Q4_0 | GgmlType::Q4_1 => true,
        GgmlType::Q8_0 => bits == 8,
        _ => false,
    }
}

/// The codes of a row's blocks.
fn take(kind: GgmlType, raw: &[u8], out: &mut CodeRow) {
    let half = |raw: &[u8]| f16::from_le_bytes([raw[0], raw[1]]);
    let nibbles = |raw: &[u8], codes: &mut [u8]| {
        for (j, byte) in raw[..BLOCK / 2].iter().enumerate() {
            (codes[j], codes[j + BLOCK / 2]) = (byte & 15, byte >> 4);
        }
    };
    // Powers of two times a scale are exact.
    let below = |scale: f16, by: f32| f16::from_f32(-by * scale.to_f32()).to_bits();
    let (blocks, scales) = (out.codes.chunks_exact_mut(BLOCK), out.scales.iter_mut());
    let places = blocks.zip(scales.zip(&mut out.minima));
    let bytes = match kind {
        GgmlType::Q4_0 => 18,
        GgmlType::Q4_1 => 20,
        _ => 34,
    };
    for (raw, (codes, (scale, minimum))) in raw.chunks_exact(bytes).zip(places) {
        *scale = half(raw).to_bits();
        match kind {
            GgmlType::Q4_1 => {
                *minimum = half(&raw[2..]).to_bits();
                nibbles(&raw[4..], codes);
            }
            GgmlType::Q4_0 => {
                *minimum = below(half(raw), 8.0);
                nibbles(&raw[2..], codes);
            }
            _ => {
                *minimum = below(half(raw), 128.0);
                for (code, byte) in codes.iter_mut().zip(&raw[2..]) {
                    *code = byte ^ 0x80;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(row: &CodeRow, i: usize) -> f32 {
        let half = |bits: u16| f16::from_bits(bits).to_f32();
        f32::from(row.codes[i]) * half(row.scales[i / BLOCK]) + half(row.minima[i / BLOCK])
    }

    fn taken(kind: GgmlType, raw: &[u8], columns: usize) -> CodeRow {
        let mut row = CodeRow::zero(columns);
        take(kind, raw, &mut row);
        row
    }

    #[test]
    fn codes_stand_for_what_the_blocks_hold() {
        // A scale of 0.5: nibbles 0 to 15 and back, in the halves of a block.
        let scale = f16::from_f32(0.5).to_le_bytes();
        let nibbles: Vec<u8> = (0..16u8).map(|j| j | (15 - j) << 4).collect();
        let raw = [&scale[..], &nibbles].concat();
        let row = taken(GgmlType::Q4_0, &raw, 32);
        for j in 0..16 {
            assert_eq!(value(&row, j), (j as f32 - 8.0) * 0.5);
            assert_eq!(value(&row, j + 16), (7.0 - j as f32) * 0.5);
        }
        let minimum = f16::from_f32(-3.0).to_le_bytes();
        let two = [&scale[..], &minimum, &nibbles].concat().repeat(2);
        let row = taken(GgmlType::Q4_1, &two, 64);
        assert_eq!([value(&row, 3), value(&row, 35), value(&row, 48)], [-1.5, -1.5, 4.5]);
        let signed: Vec<u8> = (0..32u8).map(|i| i.wrapping_sub(16)).collect();
        let row = taken(GgmlType::Q8_0, &[&scale[..], &signed].concat(), 32);
        assert!((0..32).all(|i| value(&row, i) == (i as f32 - 16.0) * 0.5));
    }

    #[test]
    fn four_bits_are_too_few_for_whole_bytes_and_eight_hold_nibbles() {
        assert!(has_codes(GgmlType::Q4_1, 8) && has_codes(GgmlType::Q4_0, 4));
        assert!(has_codes(GgmlType::Q8_0, 8) && !has_codes(GgmlType::Q8_0, 4));
        assert!(!has_codes(GgmlType::Q4_K, 4) && !has_codes(GgmlType::F16, 8));
    }
}
