//! Panels in files are those in memory.

use std::io::Write;
use std::sync::Arc;

use super::*;
use crate::mapped::{MARGIN, Mapped};
use crate::testing::{bits, noise};

const FORMATS: [WeightFormat; 4] =
    [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Q4, WeightFormat::Q8];

fn packed(n: usize, k: usize, format: WeightFormat) -> Packed {
    let plain = noise(7, n * k);
    Packed::pack(n, k, format, |i, row| row.copy_from_slice(&plain[i * k..(i + 1) * k]))
}

/// A mapped file of `before` zeros, the panels and `behind` more zeros.
fn file_with(panels: &[u8], before: usize, behind: usize) -> Arc<Mapped> {
    let mut file = tempfile::tempfile().expect("a file");
    let parts = [&vec![0; before], panels, &vec![0; behind]];
    file.write_all(&parts.concat()).expect("writable");
    Arc::new(Mapped::open(&file).expect("maps"))
}

#[test]
fn products_with_panels_in_a_file_have_the_same_bits() {
    let threads = Threads::new(2);
    for format in FORMATS {
        // The last panel is not full, nor is the last block of codes.
        let (m, n, k) = (3, 75, 83);
        let own = packed(n, k, format);
        let file = file_with(own.panels(), MARGIN, MARGIN);
        let mapped = Packed::mapped(n, k, format, &file, MARGIN).expect("fits");
        assert_eq!(own.panels(), mapped.panels());
        let x = noise(8, m * k);
        let product = |w: &Packed| {
            let mut out = vec![0.0; m * n];
            gemm(&threads, &x, m, w, None, false, &mut out);
            bits(&out)
        };
        assert_eq!(product(&own), product(&mapped), "{format:?}");
        let (mut a, mut b) = (vec![0.0; k], vec![0.0; k]);
        for row in 0..n {
            own.row(row, &mut a);
            mapped.row(row, &mut b);
            assert_eq!(bits(&a), bits(&b), "{format:?}, row {row}");
        }
    }
}

#[test]
fn panels_that_a_file_does_not_hold_whole_are_refused() {
    for format in FORMATS {
        let own = packed(40, 64, format);
        let at = |file: &Arc<Mapped>, start| Packed::mapped(40, 64, format, file, start).is_some();
        let file = file_with(own.panels(), MARGIN, MARGIN);
        assert!(at(&file, 0) && at(&file, MARGIN));
        assert!(!at(&file, 2 * MARGIN) && !at(&file, MARGIN / 2) && !at(&file, usize::MAX - 63));
        assert!(!at(&file_with(own.panels(), 0, MARGIN - 1), 0));
    }
}

#[test]
#[should_panic(expected = "a matrix in a file is not written to")]
fn a_matrix_in_a_file_takes_no_codes() {
    let own = packed(32, 32, WeightFormat::Q4);
    let file = file_with(own.panels(), 0, MARGIN);
    let mut mapped = Packed::mapped(32, 32, WeightFormat::Q4, &file, 0).expect("fits");
    mapped.put_codes(0, &CodeRow::zero(32));
}

/// FNV-1a.
fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[test]
#[cfg(target_endian = "little")]
fn files_of_this_layout_hold_these_bytes() {
    let found = FORMATS.map(|format| digest(packed(75, 83, format).panels()));
    let of_layout_1 = [
        17_280_338_697_367_001_447,
        1_273_450_226_258_963_678,
        17_097_990_361_389_526_402,
        3_238_268_079_715_845_574,
    ];
    assert_eq!(
        (Packed::LAYOUT, found),
        (1, of_layout_1),
        "where the bytes are meant to be others, raise Packed::LAYOUT and note the new ones here"
    );
}
