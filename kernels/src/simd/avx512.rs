//! AVX-512: one register per vector.

use std::arch::x86_64::*;

use super::{Isa, Simd, Source};
use crate::tile::{Tile, body};

/// Proof that the processor has AVX-512 F, BW, DQ and VL, and all of [`super::Avx2`].
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The processor has the features.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }

    /// Lanes with 16 codes of fewer than 8 bits in their lowest bits, and more codes above.
    ///
    /// # Safety
    /// `2 * BITS` bytes are readable at `p`.
    #[inline(always)]
    unsafe fn shifted<const BITS: usize>(self, p: *const u8) -> __m512i {
        // SAFETY: readable by the contract; `self` proves the features.
        unsafe {
            let lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            match BITS {
                1 => {
                    let words = _mm512_set1_epi16(p.cast::<i16>().read_unaligned());
                    _mm512_srlv_epi32(words, lane)
                }
                2 => {
                    let word = p.cast::<i32>().read_unaligned();
                    _mm512_srlv_epi32(_mm512_set1_epi32(word), _mm512_slli_epi32::<1>(lane))
                }
                _ => {
                    let both = _mm512_castsi128_si512(_mm_loadl_epi64(p.cast()));
                    let words = _mm512_permutexvar_epi32(_mm512_srli_epi32::<3>(lane), both);
                    let shift = _mm512_slli_epi32::<2>(lane);
                    _mm512_srlv_epi32(words, _mm512_and_si512(shift, _mm512_set1_epi32(31)))
                }
            }
        }
    }
}

macro_rules! lanewise {
    ($($name:ident($($arg:ident),+) = $intrinsic:ident($($order:ident),+);)+) => {
        $(
            #[inline(always)]
            fn $name(self, $($arg: __m512),+) -> __m512 {
                // SAFETY: `self` proves the feature.
                unsafe { $intrinsic($($order),+) }
            }
        )+
    };
}

impl Simd for Avx512 {
    type V = __m512;
    const ISA: Isa = Isa::Avx512;
    const ACCUMULATORS: usize = 24;
    const REGISTERS: usize = 32;
    const TILE_ROWS: usize = 12;

    lanewise! {
        add(a, b) = _mm512_add_ps(a, b);
        sub(a, b) = _mm512_sub_ps(a, b);
        mul(a, b) = _mm512_mul_ps(a, b);
        div(a, b) = _mm512_div_ps(a, b);
        sqrt(a) = _mm512_sqrt_ps(a);
        max(a, b) = _mm512_max_ps(a, b);
        min(a, b) = _mm512_min_ps(a, b);
        mul_add(a, b, c) = _mm512_fmadd_ps(a, b, c);
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` proves the feature.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: readable by the contract; `self` proves the feature.
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m512 {
        // SAFETY: readable by the contract; `self` proves the feature.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m512 {
        // SAFETY: readable by the contract; `self` proves the feature.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn load_fp8(self, p: *const u8) -> __m512 {
        // As half floats the numbers are 256 times too small, for their exponents are biased by 7 instead of 15.
        // SAFETY: readable by the contract; `self` proves the features.
        unsafe {
            let bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast()));
            let magnitude =
                _mm256_slli_epi16::<7>(_mm256_and_si256(bytes, _mm256_set1_epi16(0x7f)));
            let sign = _mm256_and_si256(_mm256_slli_epi16::<8>(bytes), _mm256_set1_epi16(i16::MIN));
            let nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x3f80));
            let magnitude = _mm256_mask_mov_epi16(magnitude, nan, _mm256_set1_epi16(0x7e00));
            let half = _mm256_or_si256(magnitude, sign);
            _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0))
        }
    }

    #[inline(always)]
    unsafe fn codes<const BITS: usize>(self, p: *const u8) -> __m512 {
        // SAFETY: readable by the contract; `self` proves the features.
        unsafe {
            if BITS == 8 {
                return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())));
            }
            let mask = _mm512_set1_epi32((1 << BITS) - 1);
            _mm512_cvtepi32_ps(_mm512_and_si512(self.shifted::<BITS>(p), mask))
        }
    }

    #[inline(always)]
    fn table<const BITS: usize>(self, scale: __m512, zero: __m512) -> (__m512, __m512) {
        if BITS == 8 {
            return (scale, zero);
        }
        // The table is looked up by four bits, of which a narrow code has the lowest.
        let entry: [f32; 16] = std::array::from_fn(|i| (i % (1 << BITS)) as f32);
        // SAFETY: the array has 16 elements.
        let entry = unsafe { self.load(entry.as_ptr()) };
        (self.mul_add(entry, scale, zero), zero)
    }

    #[inline(always)]
    unsafe fn look_up<const BITS: usize>(self, p: *const u8, table: (__m512, __m512)) -> __m512 {
        // SAFETY: readable by the contract; `self` proves the features.
        unsafe {
            if BITS == 8 {
                return self.mul_add(self.codes::<BITS>(p), table.0, table.1);
            }
            _mm512_permutexvar_ps(self.shifted::<BITS>(p), table.0)
        }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m512) {
        // SAFETY: writable by the contract; `self` proves the feature.
        unsafe { _mm512_storeu_ps(p, v) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, v: __m512) {
        // SAFETY: writable by the contract; `self` proves the feature.
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
    }

    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: __m512) {
        // SAFETY: writable by the contract; `self` proves the feature.
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v))) }
    }

    #[inline(always)]
    fn select_lt(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        // SAFETY: `self` proves the feature.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x) }
    }

    #[inline(always)]
    fn keep(self, v: __m512, from: isize, to: isize, other: __m512) -> __m512 {
        let below = |end: isize| (1u32 << end.clamp(0, 16)) - 1;
        let mask = below(to) & !below(from);
        // SAFETY: `self` proves the feature.
        unsafe { _mm512_mask_blend_ps(mask as u16, other, v) }
    }

    #[inline(always)]
    fn pow2(self, n: __m512) -> __m512 {
        // SAFETY: `self` proves the feature.
        unsafe {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
        }
    }

    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        // Halves added together, as everywhere.
        // SAFETY: `self` proves the features.
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    fn largest(self, v: __m512) -> f32 {
        // SAFETY: `self` proves the feature.
        unsafe { _mm512_reduce_max_ps(v) }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch has no effect but on time, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }

    unsafe fn tile<B: Source>(self, tile: &Tile) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        unsafe fn run<B: Source>(s: Avx512, tile: &Tile) {
            // SAFETY: the contract of `tile`.
            unsafe { body::<Avx512, B>(s, tile) }
        }
        // SAFETY: `self` proves the features; the rest is the caller's contract.
        unsafe { run::<B>(self, tile) }
    }
}
