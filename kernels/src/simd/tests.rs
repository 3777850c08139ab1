//! All instruction sets against plain arithmetic.

use super::math::{exp, tanh};
use super::*;

#[inline(always)]
unsafe fn map_body<S: Simd>(s: S, which: u32, x: &[f32], out: &mut [f32]) {
    for (x, out) in x.chunks_exact(LANES).zip(out.chunks_exact_mut(LANES)) {
        // SAFETY: both chunks have 16 elements.
        unsafe {
            let v = s.load(x.as_ptr());
            let y = match which {
                0 => exp(s, v),
                1 => tanh(s, v),
                2 => s.keep(v, 3, 9, s.splat(-1.0)),
                3 => s.keep(v, -4, 99, s.splat(-1.0)),
                _ => s.splat(s.sum(v) + s.largest(v)),
            };
            s.store(out.as_mut_ptr(), y);
        }
    }
}

multiversion! { unsafe fn map(which: u32, x: &[f32], out: &mut [f32]) = map_body }

fn apply(isa: Isa, which: u32, x: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    // SAFETY: `isa` is one of the available ones.
    unsafe { map(isa, which, x, &mut out) };
    out
}

#[test]
fn exp_is_close_and_exact_where_promised() {
    let x: Vec<f32> = (0..32_000).map(|i| -87.2 + i as f32 * (175.0 / 32_000.0)).collect();
    for isa in Isa::available() {
        let y = apply(isa, 0, &x);
        for (x, y) in x.iter().zip(&y) {
            let exact = f64::from(*x).exp();
            assert!((f64::from(*y) / exact - 1.0).abs() < 3e-7, "{isa}: exp({x}) = {y}");
        }
        let mut edge = [0.0; 16];
        edge[1] = f32::NEG_INFINITY;
        edge[2] = -1000.0;
        let y = apply(isa, 0, &edge);
        assert_eq!(&y[..3], &[1.0, 0.0, 0.0]);
    }
}

#[test]
fn tanh_is_close() {
    let x: Vec<f32> = (0..32_000).map(|i| -12.0 + i as f32 * (24.0 / 32_000.0)).collect();
    for isa in Isa::available() {
        for (x, y) in x.iter().zip(apply(isa, 1, &x)) {
            let exact = f64::from(*x).tanh();
            assert!(
                (f64::from(y) - exact).abs() <= 1e-6 * exact.abs() + 1e-12,
                "{isa}: tanh({x}) = {y}"
            );
        }
    }
}

#[test]
fn instruction_sets_agree_on_lanes() {
    let x: Vec<f32> = (0..16).map(|i| ((i * 7) % 16) as f32).collect();
    for isa in Isa::available() {
        let kept = apply(isa, 2, &x);
        for (i, y) in kept.iter().enumerate() {
            assert_eq!(*y, if (3..9).contains(&i) { x[i] } else { -1.0 });
        }
        assert_eq!(apply(isa, 3, &x), x);
        assert_eq!(apply(isa, 4, &x)[0], 120.0 + 15.0);
    }
}

#[inline(always)]
unsafe fn bytes_body<S: Simd>(s: S, bytes: &[u8; 256], out: &mut [f32], back: &mut [u8]) {
    for at in (0..256).step_by(LANES) {
        // SAFETY: all three have 256 elements.
        unsafe {
            let v = s.load_fp8(bytes.as_ptr().add(at));
            s.store(out.as_mut_ptr().add(at), v);
            s.store_fp8(back.as_mut_ptr().add(at), v);
        }
    }
}

multiversion! { unsafe fn all_bytes(bytes: &[u8; 256], out: &mut [f32], back: &mut [u8]) = bytes_body }

#[test]
fn every_byte_is_its_number_and_comes_back() {
    let bytes: [u8; 256] = std::array::from_fn(|i| i as u8);
    for isa in Isa::available() {
        let (mut out, mut back) = ([0.0; 256], [0; 256]);
        // SAFETY: `isa` is one of the available ones.
        unsafe { all_bytes(isa, &bytes, &mut out, &mut back) };
        for (byte, x) in bytes.iter().zip(out) {
            let exact = fp8_value(*byte);
            assert!(
                x.to_bits() == exact.to_bits() || x.is_nan() && exact.is_nan(),
                "{isa}: {byte}"
            );
        }
        assert_eq!(back, bytes, "{isa}");
    }
}

#[inline(always)]
unsafe fn codes_body<S: Simd>(s: S, bits: u8, bytes: &[u8; 16], out: &mut [f32; 16]) {
    // SAFETY: 16 codes are at most 16 bytes.
    unsafe {
        let p = bytes.as_ptr();
        let v = match bits {
            1 => s.codes::<1>(p),
            2 => s.codes::<2>(p),
            4 => s.codes::<4>(p),
            _ => s.codes::<8>(p),
        };
        s.store(out.as_mut_ptr(), v);
    }
}

multiversion! { unsafe fn read_codes(bits: u8, bytes: &[u8; 16], out: &mut [f32; 16]) = codes_body }

#[test]
fn codes_are_numbers_from_the_lowest_bits_up() {
    let bytes: [u8; 16] = std::array::from_fn(|i| (i * 91 + 13) as u8);
    let all = u128::from_le_bytes(bytes);
    for isa in Isa::available() {
        for bits in [1u8, 2, 4, 8] {
            let mut out = [0.0; 16];
            // SAFETY: `isa` is one of the available ones.
            unsafe { read_codes(isa, bits, &bytes, &mut out) };
            let exact = std::array::from_fn(|i| {
                ((all >> (i * usize::from(bits))) & ((1 << bits) - 1)) as f32
            });
            assert_eq!(out, exact, "{isa}: {bits} bits");
        }
    }
}

#[test]
fn bf16_rounds_to_nearest_even() {
    for x in [1.0f32, -2.5, 1.003_906_3, 1.011_718_8, f32::INFINITY, 3.3e38, 1e-40, 0.1] {
        assert_eq!(bf16_bits(x), half::bf16::from_f32(x).to_bits(), "{x}");
    }
    assert!(half::bf16::from_bits(bf16_bits(f32::NAN)).is_nan());
}
