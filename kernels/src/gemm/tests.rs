//! Products against a naive reference, and bit for bit against themselves.

use proptest::prelude::*;

use super::*;
use crate::reference;
use crate::testing::{assert_close, bits, noise};
use half::bf16;

/// Weights as the format holds them, and packed.
fn weights(n: usize, k: usize, format: WeightFormat, seed: u64) -> (Vec<f32>, Packed) {
    let mut plain = noise(seed, n * k);
    if format == WeightFormat::Bf16 {
        plain.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
    }
    let packed = Packed::pack(n, k, format, |i, row| {
        row.copy_from_slice(&plain[i * k..(i + 1) * k]);
    });
    if format.code_bits().is_some() {
        plain.chunks_exact_mut(k.max(1)).enumerate().for_each(|(i, row)| packed.row(i, row));
    }
    (plain, packed)
}

/// What rows of x stand for where weights are codes: 127 steps to the largest number of each 32.
fn as_bytes(x: &[f32], k: usize) -> Vec<f32> {
    let block = |x: &[f32]| {
        let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let by = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        x.iter().map(|x| (x * by).round_ties_even() * (largest / 127.0)).collect::<Vec<_>>()
    };
    x.chunks(k).flat_map(|row| row.chunks(32).flat_map(block)).collect()
}

const FORMATS: [WeightFormat; 4] =
    [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Q4, WeightFormat::Q8];

fn check(
    isa: Isa,
    threads: &Threads,
    m: usize,
    n: usize,
    k: usize,
    format: WeightFormat,
    accumulate: bool,
) {
    let seed = (m * 31 + n * 7 + k) as u64;
    let (plain, packed) = weights(n, k, format, seed);
    let (x, bias, before) = (noise(seed + 1, m * k), noise(seed + 2, n), noise(seed + 3, m * n));
    let mut out = if accumulate { before.clone() } else { vec![f32::NAN; m * n] };
    gemm_with(isa, threads, &x, m, &packed, Some(&bias), accumulate, &mut out);
    let met = if format.code_bits().is_some() { as_bytes(&x, k) } else { x.clone() };
    let mut exact = reference::gemm(&met, &plain, k, Some(&bias));
    if accumulate {
        exact.iter_mut().zip(&before).for_each(|(y, b)| *y += f64::from(*b));
    }
    let what = format!("{isa} {m} x {n} x {k} {format:?} {accumulate}");
    assert_close(&out, &exact, 1e-6 * (k as f64).sqrt() + 1e-6, &what);
    // A row alone, on one thread, has the same bits.
    let one = Threads::new(1);
    for row in [0, m / 2, m - 1] {
        let mut alone = before[row * n..(row + 1) * n].to_vec();
        gemm_with(
            isa,
            &one,
            &x[row * k..(row + 1) * k],
            1,
            &packed,
            Some(&bias),
            accumulate,
            &mut alone,
        );
        assert_eq!(bits(&alone), bits(&out[row * n..(row + 1) * n]), "{what}: row {row} alone");
    }
}

#[test]
fn a_hand_worked_product() {
    let w = Packed::pack(2, 3, WeightFormat::F32, |i, row| {
        row.copy_from_slice(if i == 0 { &[1.0, 2.0, 3.0] } else { &[-1.0, 0.5, 4.0] });
    });
    let mut out = [10.0, 20.0];
    gemm(&Threads::new(1), &[2.0, 4.0, 1.0], 1, &w, Some(&[0.5, 0.25]), true, &mut out);
    // 2 + 8 + 3 + 0.5 + 10, and -2 + 2 + 4 + 0.25 + 20.
    assert_eq!(out, [23.5, 24.25]);
}

#[test]
fn a_hand_worked_product_of_codes() {
    // One block of 32: codes 0 to 15 twice, of half the size and three less; x is 127 at one place and -1 at another, so
    // its scale is 1.
    let mut row = CodeRow::zero(32);
    for (i, code) in row.codes.iter_mut().enumerate() {
        *code = i as u8 % 16;
    }
    row.scales[0] = half::f16::from_f32(0.5).to_bits();
    row.minima[0] = half::f16::from_f32(-3.0).to_bits();
    for format in [WeightFormat::Q4, WeightFormat::Q8] {
        let w = Packed::pack_codes(1, 32, format, |_, out| out.clone_from(&row));
        let mut plain = [0.0; 32];
        w.row(0, &mut plain);
        assert!(plain.iter().enumerate().all(|(i, w)| *w == (i % 16) as f32 * 0.5 - 3.0));
        let mut x = [0.0; 32];
        (x[9], x[18]) = (127.0, -1.0);
        for isa in Isa::available() {
            let mut out = [10.0];
            gemm_with(isa, &Threads::new(1), &x, 1, &w, Some(&[0.25]), true, &mut out);
            // 127 x 1.5 + 2 + 0.25 + 10.
            assert_eq!(out, [202.75], "{isa} {format:?}");
        }
    }
}

#[test]
fn codes_lie_within_half_a_step() {
    let values = noise(4, 100);
    for (bits, most) in [(4, 15.0f32), (8, 255.0)] {
        let mut row = CodeRow::zero(100);
        row.quantise(&values, bits);
        for (i, x) in values.iter().enumerate() {
            let half = |bits: &[u16]| half::f16::from_bits(bits[i / 32]).to_f32();
            let (scale, minimum) = (half(&row.scales), half(&row.minima));
            let near = f32::from(row.codes[i]) * scale + minimum;
            // Half a step, and what binary16 makes of the ends.
            assert!((near - x).abs() <= scale * 0.5 + 2e-3, "{bits} {i}: {near} {x}");
            assert!(f32::from(row.codes[i]) <= most);
        }
        // Nothing is said beyond the end.
        assert!(row.codes[100..].iter().all(|c| *c == 0) && row.codes.len() == 128);
        // A block of equal numbers has no scale to divide by.
        row.quantise(&[0.75; 32], bits);
        assert!(row.scales[0] == 0 && row.codes.iter().all(|c| *c == 0));
    }
}

#[test]
fn codes_in_many_rows_and_deep_panels() {
    let threads = Threads::new(2);
    for isa in Isa::available().into_iter().filter(|i| *i != Isa::Portable) {
        for format in [WeightFormat::Q4, WeightFormat::Q8] {
            check(isa, &threads, 200, 130, 200, format, true);
            check(isa, &threads, 5, 65, 3000, format, false);
        }
    }
}

#[test]
fn k_in_blocks_changes_no_bit() {
    let threads = Threads::new(2);
    for isa in Isa::available().into_iter().filter(|i| *i != Isa::Portable) {
        // Blocks of 4096 for f32 and of 8192 for bf16.
        check(isa, &threads, 30, 40, 9001, WeightFormat::F32, true);
        check(isa, &threads, 14, 33, 17_000, WeightFormat::Bf16, false);
    }
}

#[test]
fn many_rows_in_several_row_blocks() {
    check(isa(), &Threads::new(2), 400, 70, 65, WeightFormat::Bf16, false);
}

#[test]
fn rows_unpack_and_padding_is_zero() {
    for format in FORMATS {
        let (plain, packed) = weights(45, 7, format, 5);
        let mut row = vec![0.0; 7];
        for i in 0..45 {
            packed.row(i, &mut row);
            assert_eq!(row, plain[i * 7..(i + 1) * 7]);
        }
        assert_eq!(packed.bytes(), Packed::bytes_for(45, 7, format));
        // A block of 32 codes has a scale and a minimum of two bytes.
        let expected = match format {
            WeightFormat::F32 => 64 * 7 * 4,
            WeightFormat::Bf16 => 64 * 7 * 2,
            WeightFormat::Q4 => 64 * (16 + 4),
            WeightFormat::Q8 => 64 * (32 + 4),
        };
        assert_eq!(packed.bytes(), expected);
    }
}

#[test]
fn synthetic_weights_are_uniform_and_repeat() {
    for format in FORMATS {
        let (a, b) = (
            Packed::synthetic(100, 500, format, 9, 0.5),
            Packed::synthetic(100, 500, format, 9, 0.5),
        );
        let other = Packed::synthetic(100, 500, format, 10, 0.5);
        let (mut x, mut y, mut z) = (vec![0.0; 500], vec![0.0; 500], vec![0.0; 500]);
        let (mut sum, mut square, mut same) = (0.0, 0.0, 0);
        for i in 0..100 {
            a.row(i, &mut x);
            b.row(i, &mut y);
            other.row(i, &mut z);
            assert_eq!(x, y);
            same += x.iter().zip(&z).filter(|(x, z)| x == z).count();
            sum += x.iter().map(|x| f64::from(*x)).sum::<f64>();
            square += x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            // Steps of codes are rounded to binary16, so the largest may lie a little beyond.
            let most = if format.code_bits().is_some() { 0.5001 } else { 0.5 };
            assert!(x.iter().all(|x| x.abs() <= most));
        }
        assert!((sum / 50_000.0).abs() < 0.005, "{sum}");
        // The variance of a uniform distribution on -1/2..1/2 is 1/12; on 16 points of it, 1/12 x 17/15.
        let (variance, equal) = match format {
            WeightFormat::Q4 => (17.0 / 15.0 / 12.0, 50_000 / 16),
            WeightFormat::Q8 => (257.0 / 255.0 / 12.0, 50_000 / 256),
            _ => (1.0 / 12.0, 0),
        };
        assert!((square / 50_000.0 - variance).abs() < 0.002, "{square}");
        assert!(same < equal + 500, "{same}");
    }
}

#[test]
fn no_rows_and_no_terms_are_fine() {
    let threads = Threads::new(2);
    let (_, packed) = weights(33, 5, WeightFormat::F32, 1);
    gemm(&threads, &[], 0, &packed, None, false, &mut []);
    let empty = Packed::pack(3, 0, WeightFormat::F32, |_, _| {});
    let mut out = [7.0; 3];
    gemm(&threads, &[], 1, &empty, Some(&[1.0, 2.0, 3.0]), false, &mut out);
    assert_eq!(out, [1.0, 2.0, 3.0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn products_match_the_reference(
        m in 1usize..70,
        n in 1usize..140,
        k in 1usize..120,
        format in 0usize..4,
        accumulate in any::<bool>(),
    ) {
        let threads = Threads::new(2);
        let format = FORMATS[format];
        for isa in Isa::available() {
            check(isa, &threads, m, n, k, format, accumulate);
        }
    }
}

#[test]
fn the_first_columns_are_those_of_the_whole_product() {
    let threads = Threads::new(2);
    let w = Packed::synthetic(200, 48, WeightFormat::F32, 3, 1.0);
    for m in [1, 7, 64] {
        let x = noise(m as u64, m * 48);
        let mut whole = vec![0.0; m * 200];
        gemm(&threads, &x, m, &w, None, false, &mut whole);
        for columns in [1, 64, 100, 200] {
            let mut part = vec![-7.0; m * 200];
            gemm_first(&threads, &x, m, &w, columns, None, &mut part);
            let computed = columns.next_multiple_of(PANEL).min(200);
            for (part, whole) in part.chunks(200).zip(whole.chunks(200)) {
                assert_eq!(part[..computed], whole[..computed]);
                assert!(part[computed..].iter().all(|x| *x == -7.0));
            }
        }
    }
}

#[test]
fn parts_are_those_numbers() {
    let number = |i: usize, at: usize| ((i * 7 + at * 3) % 16) as f32 - 8.0;
    for format in [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Q8, WeightFormat::Q4] {
        let whole = Packed::pack(70, 96, format, |i, out| {
            out.iter_mut().zip(0..).for_each(|(x, at)| *x = number(i, at));
        });
        let part = whole.part(&[60..70, 3..5], 32..96).expect("whole blocks");
        assert_eq!((part.n(), part.k(), part.format()), (12, 64, format));
        let (mut of, mut from) = (vec![0.0; 64], vec![0.0; 96]);
        for (i, row) in (60..70).chain(3..5).enumerate() {
            part.row(i, &mut of);
            whole.row(row, &mut from);
            assert_eq!(of, from[32..], "{format:?}, row {i}");
        }
        assert_eq!(whole.part(&[0..70, 0..0], 0..48).is_none(), format.code_bits().is_some());
    }
}
