//! AVX2 with fused multiply-add: two registers per vector.

use std::arch::x86_64::*;

use super::{Isa, Simd, Source};
use crate::tile::{Tile, body};

/// Proof that the processor has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The processor has the features.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }

    /// All bits set in the lanes `from..to`, counted from lane `first` of the vector.
    #[inline(always)]
    fn lane_mask(self, first: i32, from: isize, to: isize) -> __m256 {
        // SAFETY: `self` proves the feature.
        unsafe {
            let lane = _mm256_add_epi32(
                _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                _mm256_set1_epi32(first),
            );
            let from = _mm256_set1_epi32(from.clamp(0, 16) as i32);
            let to = _mm256_set1_epi32(to.clamp(0, 16) as i32);
            _mm256_castsi256_ps(_mm256_andnot_si256(
                _mm256_cmpgt_epi32(from, lane),
                _mm256_cmpgt_epi32(to, lane),
            ))
        }
    }
}

type Pair = (__m256, __m256);

macro_rules! lanewise {
    ($($name:ident($($arg:ident),+) = $intrinsic:ident;)+) => {
        $(
            #[inline(always)]
            fn $name(self, $($arg: Pair),+) -> Pair {
                // SAFETY: `self` proves the feature.
                unsafe { ($intrinsic($($arg.0),+), $intrinsic($($arg.1),+)) }
            }
        )+
    };
}

impl Simd for Avx2 {
    type V = Pair;
    const ISA: Isa = Isa::Avx2;
    const ACCUMULATORS: usize = 6;
    const REGISTERS: usize = 8;
    const TILE_ROWS: usize = 6;

    lanewise! {
        add(a, b) = _mm256_add_ps;
        sub(a, b) = _mm256_sub_ps;
        mul(a, b) = _mm256_mul_ps;
        div(a, b) = _mm256_div_ps;
        sqrt(a) = _mm256_sqrt_ps;
        max(a, b) = _mm256_max_ps;
        min(a, b) = _mm256_min_ps;
        mul_add(a, b, c) = _mm256_fmadd_ps;
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Pair {
        // SAFETY: `self` proves the feature.
        unsafe { (_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Pair {
        // SAFETY: readable by the contract; `self` proves the feature.
        unsafe { (_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Pair {
        // SAFETY: readable by the contract; `self` proves the feature.
        unsafe {
            (
                _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Pair {
        // SAFETY: readable by the contract; `self` proves the feature.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast()));
            (
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_fp8(self, p: *const u8) -> Pair {
        // As half floats the numbers are 256 times too small, for their exponents are biased by 7 instead of 15.
        // SAFETY: readable by the contract; `self` proves the features.
        unsafe {
            let bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast()));
            let magnitude =
                _mm256_slli_epi16::<7>(_mm256_and_si256(bytes, _mm256_set1_epi16(0x7f)));
            let sign = _mm256_and_si256(_mm256_slli_epi16::<8>(bytes), _mm256_set1_epi16(i16::MIN));
            let nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x3f80));
            let nan = _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00));
            let half = _mm256_or_si256(_mm256_or_si256(magnitude, sign), nan);
            let by = _mm256_set1_ps(256.0);
            (
                _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), by),
                _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256::<1>(half)), by),
            )
        }
    }

    #[inline(always)]
    unsafe fn codes<const BITS: usize>(self, p: *const u8) -> Pair {
        // SAFETY: readable by the contract; `self` proves the features.
        unsafe {
            let (low, high) = match BITS {
                1 => (i32::from(*p), i32::from(*p.add(1))),
                2 => {
                    let (low, high) =
                        (p.cast::<u16>().read_unaligned(), p.add(2).cast::<u16>().read_unaligned());
                    (i32::from(low), i32::from(high))
                }
                4 => (p.cast::<i32>().read_unaligned(), p.add(4).cast::<i32>().read_unaligned()),
                _ => {
                    let half = |p: *const u8| {
                        let bytes = _mm_loadl_epi64(p.cast());
                        _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))
                    };
                    return (half(p), half(p.add(8)));
                }
            };
            let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let shift = _mm256_mullo_epi32(lane, _mm256_set1_epi32(BITS as i32));
            let mask = _mm256_set1_epi32((1 << BITS) - 1);
            let half = |word: i32| {
                let codes = _mm256_srlv_epi32(_mm256_set1_epi32(word), shift);
                _mm256_cvtepi32_ps(_mm256_and_si256(codes, mask))
            };
            (half(low), half(high))
        }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Pair) {
        // SAFETY: writable by the contract; `self` proves the feature.
        unsafe {
            _mm256_storeu_ps(p, v.0);
            _mm256_storeu_ps(p.add(8), v.1);
        }
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, v: Pair) {
        // SAFETY: writable by the contract; `self` proves the feature.
        unsafe {
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0));
            _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.1));
        }
    }

    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: Pair) {
        // SAFETY: writable by the contract; `self` proves the feature.
        unsafe {
            let (low, high) = (_mm256_cvtps_epi32(v.0), _mm256_cvtps_epi32(v.1));
            // Packing goes by halves of a register.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high));
            let bytes = _mm_packs_epi16(
                _mm256_castsi256_si128(words),
                _mm256_extracti128_si256::<1>(words),
            );
            _mm_storeu_si128(p.cast(), bytes);
        }
    }

    #[inline(always)]
    fn select_lt(self, a: Pair, b: Pair, x: Pair, y: Pair) -> Pair {
        // SAFETY: `self` proves the feature.
        unsafe {
            (
                _mm256_blendv_ps(y.0, x.0, _mm256_cmp_ps::<_CMP_LT_OQ>(a.0, b.0)),
                _mm256_blendv_ps(y.1, x.1, _mm256_cmp_ps::<_CMP_LT_OQ>(a.1, b.1)),
            )
        }
    }

    #[inline(always)]
    fn keep(self, v: Pair, from: isize, to: isize, other: Pair) -> Pair {
        // SAFETY: `self` proves the feature.
        unsafe {
            (
                _mm256_blendv_ps(other.0, v.0, self.lane_mask(0, from, to)),
                _mm256_blendv_ps(other.1, v.1, self.lane_mask(8, from, to)),
            )
        }
    }

    #[inline(always)]
    fn pow2(self, n: Pair) -> Pair {
        // SAFETY: `self` proves the feature.
        unsafe {
            let bias = _mm256_set1_epi32(127);
            let low = _mm256_add_epi32(_mm256_cvtps_epi32(n.0), bias);
            let high = _mm256_add_epi32(_mm256_cvtps_epi32(n.1), bias);
            (
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(high)),
            )
        }
    }

    #[inline(always)]
    fn sum(self, v: Pair) -> f32 {
        // Halves added together, as everywhere.
        // SAFETY: `self` proves the feature.
        unsafe {
            let eight = _mm256_add_ps(v.0, v.1);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    fn largest(self, v: Pair) -> f32 {
        // The upper half counts where it is larger: what is no number stays only in the lower one, as everywhere.
        // SAFETY: `self` proves the feature.
        unsafe {
            let eight = _mm256_max_ps(v.1, v.0);
            let (low, high) = (_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let four = _mm_max_ps(high, low);
            let two = _mm_max_ps(_mm_movehl_ps(four, four), four);
            _mm_cvtss_f32(_mm_max_ss(_mm_shuffle_ps::<1>(two, two), two))
        }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch has no effect but on time, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }

    unsafe fn tile<B: Source>(self, tile: &Tile) {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn run<B: Source>(s: Avx2, tile: &Tile) {
            // SAFETY: the contract of `tile`.
            unsafe { body::<Avx2, B>(s, tile) }
        }
        // SAFETY: `self` proves the features; the rest is the caller's contract.
        unsafe { run::<B>(self, tile) }
    }
}
