//! From stored blocks to f32, a band of rows at a time.

use std::borrow::Cow;

use batchmax_sim::profile::GgmlType;
use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use half::{bf16, f16};

use super::LoadError;
use super::names::Part;
use super::stored::{Shard, Stored};

/// Bytes that are read at once; more only where a single row is longer.
const BAND_BYTES: usize = 1 << 20;
/// candle views the bytes as its block types, none of which needs more.
const ALIGNMENT: usize = 8;

/// Takes some rows as they are stored: the index of the first, their number, their bytes.
type TakeBand<'a> = dyn FnMut(usize, usize, &[u8]) -> Result<(), LoadError> + 'a;
/// Takes one row as it is stored, or says what is wrong with it.
pub(super) type TakeRaw<'a> = dyn FnMut(usize, &[u8]) -> Result<(), String> + 'a;

/// What is wrong with a part.
fn failure(shard: &Shard, part: &Part, problem: String) -> LoadError {
    LoadError::Tensor { path: shard.path.clone(), tensor: part.name.clone(), problem }
}

/// Reads the rows of a part as they are stored and hands over bands of them, each with the index of its first.
fn bands(
    shard: &Shard,
    stored: &Stored,
    part: &Part,
    band: &mut TakeBand<'_>,
) -> Result<(), LoadError> {
    let fail = |problem: String| failure(shard, part, problem);
    let Some((block, block_bytes)) = stored.kind.layout() else {
        return Err(fail(format!(
            "is stored as {}, which is not read; convert it to F16, BF16, Q8_0 or Q4_K",
            stored.kind_name
        )));
    };
    // Header checks: columns are whole blocks and the tensor lies within the file, so nothing here overflows.
    let row_bytes = stored.columns / block as usize * block_bytes as usize;
    let is_vector = stored.rows == 1;
    let (first, end) = if is_vector { (0, 1) } else { (part.first, part.first + part.rows) };
    let most = (BAND_BYTES / row_bytes.max(1)).min(end - first).max(1);
    let mut buffer = vec![0u8; most * row_bytes + ALIGNMENT];
    let skip = buffer.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
    let mut at = first;
    while at < end {
        let count = most.min(end - at);
        let raw = &mut buffer[skip..skip + count * row_bytes];
        shard.read_at(stored.start + (at * row_bytes) as u64, raw)?;
        band(at - first, count, raw)?;
        at += count;
    }
    Ok(())
}

/// Reads the rows of a part of whole blocks, each as it is stored. `row` says what is wrong with one.
pub(super) fn read_raw(
    shard: &Shard,
    stored: &Stored,
    part: &Part,
    row: &mut TakeRaw<'_>,
) -> Result<(), LoadError> {
    bands(shard, stored, part, &mut |first, count, raw| {
        for (i, raw) in raw.chunks_exact(raw.len() / count).enumerate() {
            row(first + i, raw).map_err(|problem| failure(shard, part, problem))?;
        }
        Ok(())
    })
}

/// Reads the rows of a part, adds `add` to every value, and hands each row over.
pub(super) fn read(
    shard: &Shard,
    stored: &Stored,
    part: &Part,
    add: f32,
    row: &mut dyn FnMut(usize, &[f32]),
) -> Result<(), LoadError> {
    let fail = |problem: String| failure(shard, part, problem);
    let is_vector = stored.rows == 1;
    let first = if is_vector { 0 } else { part.first };
    bands(shard, stored, part, &mut |at, count, raw| {
        let mut values = decode(stored.kind, raw, count, stored.columns).map_err(&fail)?;
        for (i, values) in values.chunks_exact_mut(stored.columns).enumerate() {
            if let Some(bad) = values.iter().find(|v| !v.is_finite()) {
                let problem = format!(
                    "holds {bad} in row {}; the file is damaged, fetch it again",
                    first + at + i
                );
                return Err(fail(problem));
            }
            if add != 0.0 {
                values.iter_mut().for_each(|v| *v += add);
            }
            let shown = if is_vector {
                &values[part.first..part.first + part.columns]
            } else {
                &values[..]
            };
            row(at + i, shown);
        }
        Ok(())
    })
}

/// The values of whole rows.
fn decode(kind: GgmlType, raw: &[u8], rows: usize, columns: usize) -> Result<Vec<f32>, String> {
    let dtype = match kind {
        GgmlType::F32 => return Ok(floats(raw, f32::from_le_bytes)),
        GgmlType::F16 => return Ok(floats(raw, |b| f16::from_le_bytes(b).to_f32())),
        GgmlType::BF16 => return Ok(floats(raw, |b| bf16::from_le_bytes(b).to_f32())),
        GgmlType::Q4_0 => GgmlDType::Q4_0,
        GgmlType::Q4_1 => GgmlDType::Q4_1,
        GgmlType::Q5_0 => GgmlDType::Q5_0,
        GgmlType::Q5_1 => GgmlDType::Q5_1,
        GgmlType::Q8_0 => GgmlDType::Q8_0,
        GgmlType::Q2_K => GgmlDType::Q2K,
        GgmlType::Q3_K => GgmlDType::Q3K,
        GgmlType::Q4_K => GgmlDType::Q4K,
        GgmlType::Q5_K => GgmlDType::Q5K,
        GgmlType::Q6_K => GgmlDType::Q6K,
        GgmlType::Other(code) => {
            return Err(format!("is stored as type {code}, which is not read"));
        }
    };
    let dequantise = || -> candle_core::Result<Vec<f32>> {
        let storage = QStorage::from_data(Cow::Borrowed(raw), &Device::Cpu, dtype)?;
        QTensor::new(storage, (rows, columns))?.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()
    };
    dequantise().map_err(|e| format!("can't be dequantised: {}", first_line(&e.to_string())))
}

fn floats<const N: usize>(raw: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    raw.as_chunks::<N>().0.iter().map(|bytes| value(*bytes)).collect()
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As in the file: scale, minimum, then 16 bytes whose low nibbles are the first half.
    fn q4_1_block(scale: f32, minimum: f32, nibbles: [u8; 32]) -> Vec<u8> {
        let mut raw = f16::from_f32(scale).to_le_bytes().to_vec();
        raw.extend(f16::from_f32(minimum).to_le_bytes());
        raw.extend((0..16).map(|j| nibbles[j] | nibbles[j + 16] << 4));
        raw
    }

    fn aligned(raw: &[u8], run: impl Fn(&[u8])) {
        let mut buffer = vec![0u8; raw.len() + ALIGNMENT];
        let skip = buffer.as_ptr().align_offset(ALIGNMENT);
        buffer[skip..skip + raw.len()].copy_from_slice(raw);
        run(&buffer[skip..skip + raw.len()]);
    }

    #[test]
    fn q4_1_is_scale_times_nibble_plus_minimum_with_low_nibbles_first() {
        let nibbles: [u8; 32] = std::array::from_fn(|i| (i * 7 % 16) as u8);
        let mut raw = q4_1_block(0.5, -3.0, nibbles);
        raw.extend(q4_1_block(0.25, 1.0, nibbles));
        aligned(&raw, |raw| {
            let values = decode(GgmlType::Q4_1, raw, 1, 64).expect("values");
            for (i, nibble) in nibbles.iter().enumerate() {
                assert_eq!(values[i], f32::from(*nibble) * 0.5 - 3.0);
                assert_eq!(values[32 + i], f32::from(*nibble) * 0.25 + 1.0);
            }
        });
    }

    #[test]
    fn q8_0_is_scale_times_signed_byte_and_q4_0_is_centred_on_eight() {
        let mut raw = f16::from_f32(0.125).to_le_bytes().to_vec();
        raw.extend((0..32u8).map(|i| i.wrapping_sub(16)));
        aligned(&raw, |raw| {
            let values = decode(GgmlType::Q8_0, raw, 1, 32).expect("values");
            assert!((0..32).all(|i| values[i] == (i as f32 - 16.0) * 0.125));
        });
        let mut raw = f16::from_f32(2.0).to_le_bytes().to_vec();
        raw.extend((0..16u8).map(|j| j | (15 - j) << 4));
        aligned(&raw, |raw| {
            let values = decode(GgmlType::Q4_0, raw, 1, 32).expect("values");
            assert!((0..16).all(|i| values[i] == (i as f32 - 8.0) * 2.0));
            assert!((0..16).all(|i| values[16 + i] == (7.0 - i as f32) * 2.0));
        });
    }

    #[test]
    fn q5_1_takes_its_fifth_bits_from_one_word() {
        let mut raw = f16::from_f32(1.0).to_le_bytes().to_vec();
        raw.extend(f16::from_f32(0.5).to_le_bytes());
        let fifth = 0xA5C3_0F96u32;
        raw.extend(fifth.to_le_bytes());
        raw.extend([0x21u8; 16]);
        aligned(&raw, |raw| {
            let values = decode(GgmlType::Q5_1, raw, 1, 32).expect("values");
            for (i, value) in values.iter().enumerate() {
                let low = if i < 16 { 1.0 } else { 2.0 };
                let high = if fifth >> i & 1 == 1 { 16.0 } else { 0.0 };
                assert_eq!(*value, low + high + 0.5, "{i}");
            }
        });
    }

    #[test]
    fn q4_k_scales_each_group_of_32_by_six_bits() {
        // Groups 0-3: low 6 bits of bytes 0-3 (scales) and 4-7 (minima); 4-7: nibbles of bytes 8-11 with the top two
        // bits of the former. Quants: 32 bytes hold the low nibbles of one group and the high nibbles of the next.
        let (scales, minima) = ([1u8, 2, 3, 63, 17, 33, 48, 62], [0u8, 5, 9, 63, 16, 35, 50, 61]);
        let mut packed = [0u8; 12];
        for g in 0..4 {
            packed[g] = scales[g] | (scales[g + 4] >> 4) << 6;
            packed[g + 4] = minima[g] | (minima[g + 4] >> 4) << 6;
            packed[g + 8] = (scales[g + 4] & 15) | (minima[g + 4] & 15) << 4;
        }
        let mut raw = f16::from_f32(0.5).to_le_bytes().to_vec();
        raw.extend(f16::from_f32(0.25).to_le_bytes());
        raw.extend(packed);
        raw.extend((0..128u8).map(|i| (i % 16) | i.wrapping_mul(3) << 4));
        aligned(&raw, |raw| {
            let values = decode(GgmlType::Q4_K, raw, 1, 256).expect("values");
            for (i, value) in values.iter().enumerate() {
                let (group, within) = (i / 32, i % 32);
                let byte = (group / 2 * 32 + within) as u8;
                let nibble = if group % 2 == 0 { byte % 16 } else { byte.wrapping_mul(3) % 16 };
                let expected = 0.5 * f32::from(scales[group]) * f32::from(nibble)
                    - 0.25 * f32::from(minima[group]);
                assert_eq!(*value, expected, "{i}");
            }
        });
    }

    #[test]
    fn halves_are_widened_exactly() {
        let raw: Vec<u8> =
            [1.5f32, -0.25].iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        assert_eq!(decode(GgmlType::F16, &raw, 1, 2).expect("values"), [1.5, -0.25]);
        let raw: Vec<u8> =
            [1.5f32, -0.25].iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        assert_eq!(decode(GgmlType::BF16, &raw, 1, 2).expect("values"), [1.5, -0.25]);
    }
}
