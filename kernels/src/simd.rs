//! The vector operations that the kernels are written in, for AVX-512, AVX2 and plain Rust.
//!
//! Kernels are generic over [`Simd`] and instantiated inside a function with the matching target features, into which
//! everything here is inlined. Each kernel adds in the same order on every path of one instruction set, whatever the
//! number of rows, so results do not depend on how work was cut up.

use std::fmt;
use std::sync::OnceLock;

/// Instruction sets that the kernels have a path for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 F, BW, VL, DQ.
    Avx512,
    /// AVX2, FMA, F16C.
    Avx2,
    /// Whatever the compiler makes of plain Rust.
    Portable,
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        })
    }
}

impl Isa {
    /// Those that this machine can run, the fastest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut list = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
            {
                list.push(Self::Avx512);
            }
            if avx2 {
                list.push(Self::Avx2);
            }
        }
        list.push(Self::Portable);
        list
    }
}

/// The fastest path of this machine.
#[must_use]
pub fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| Isa::available()[0])
}

/// Elements that can be widened to `f32` as they are loaded.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// # Safety
    /// `S::LANES` elements must be readable at `at`, and the target features of `S` present.
    unsafe fn load<S: Simd>(at: *const Self) -> S::V;
    /// The value of one element.
    fn widen(self) -> f32;
    /// The nearest element, ties to even.
    fn narrow(value: f32) -> Self;
}

/// A binary16 number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Half(pub(crate) u16);

/// A bfloat16 number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Brain(pub(crate) u16);

macro_rules! element {
    ($type:ty, $load:ident, $widen:expr, $narrow:expr) => {
        impl Element for $type {
            #[inline(always)]
            unsafe fn load<S: Simd>(at: *const Self) -> S::V {
                // SAFETY: by the caller's promise.
                unsafe { S::$load(at) }
            }
            #[inline(always)]
            fn widen(self) -> f32 {
                let widen: fn($type) -> f32 = $widen;
                widen(self)
            }
            #[inline(always)]
            fn narrow(value: f32) -> Self {
                let narrow: fn(f32) -> $type = $narrow;
                narrow(value)
            }
        }
    };
}

element!(f32, load, |x| x, |x| x);
element!(Half, load_half, |x| half::f16::from_bits(x.0).to_f32(), |x| Half(
    half::f16::from_f32(x).to_bits()
));
element!(Brain, load_brain, |x| f32::from_bits(u32::from(x.0) << 16), |x| Brain(
    half::bf16::from_f32(x).to_bits()
));

/// Vectors of `f32`.
///
/// Every method needs the target features of its implementor; loads and stores need `LANES` elements at the address.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    type V: Copy;
    const LANES: usize;
    unsafe fn zero() -> Self::V;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(at: *const f32) -> Self::V;
    unsafe fn load_half(at: *const Half) -> Self::V;
    unsafe fn load_brain(at: *const Brain) -> Self::V;
    unsafe fn store(at: *mut f32, v: Self::V);
    /// a * b + c.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// Round to nearest, ties to even.
    unsafe fn round(a: Self::V) -> Self::V;
    /// a * 2^n for integral n in -126..=127.
    unsafe fn scale(a: Self::V, n: Self::V) -> Self::V;
    /// `a` where `x >= limit`, else 0.
    unsafe fn keep_above(a: Self::V, x: Self::V, limit: Self::V) -> Self::V;

    /// e^x, relative error under 2e-7 down to -87; exactly 0 below (and for -inf), which masked keys rely on.
    #[inline(always)]
    unsafe fn exp(x: Self::V) -> Self::V {
        // SAFETY: the caller has the features.
        unsafe {
            let low = Self::splat(-87.0);
            let clamped = Self::max(x, low);
            let n = Self::round(Self::mul(clamped, Self::splat(std::f32::consts::LOG2_E)));
            // ln 2 in two parts, so that the reduction is exact.
            let r = Self::fma(n, Self::splat(-0.693_359_4), clamped);
            let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
            // Taylor coefficients to r^7; |r| <= 0.35 leaves 1e-9.
            let mut p = Self::splat(1.0 / 5040.0);
            for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
                p = Self::fma(p, r, Self::splat(c));
            }
            Self::keep_above(Self::scale(p, n), x, low)
        }
    }

    /// The largest of `LANES` numbers.
    #[inline(always)]
    unsafe fn max_lane(v: Self::V) -> f32 {
        let mut lanes = [0.0f32; 16];
        // SAFETY: the caller has the features; 16 is at least LANES.
        unsafe { Self::store(lanes.as_mut_ptr(), v) };
        lanes[..Self::LANES].iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

    /// The sum of the lanes, always in the order of a balanced tree.
    #[inline(always)]
    unsafe fn sum_lanes(v: Self::V) -> f32 {
        let mut lanes = [0.0f32; 16];
        // SAFETY: as above.
        unsafe { Self::store(lanes.as_mut_ptr(), v) };
        let mut width = Self::LANES / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
            width /= 2;
        }
        lanes[0]
    }
}

/// Plain Rust, eight at a time.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {
    type V = [f32; 8];
    const LANES: usize = 8;
    #[inline(always)]
    unsafe fn zero() -> Self::V {
        [0.0; 8]
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self::V {
        // SAFETY: eight elements are readable, by the caller's promise.
        unsafe { at.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_half(at: *const Half) -> Self::V {
        // SAFETY: as above.
        unsafe { at.cast::<[Half; 8]>().read_unaligned() }.map(Element::widen)
    }
    #[inline(always)]
    unsafe fn load_brain(at: *const Brain) -> Self::V {
        // SAFETY: as above.
        unsafe { at.cast::<[Brain; 8]>().read_unaligned() }.map(Element::widen)
    }
    #[inline(always)]
    unsafe fn store(at: *mut f32, v: Self::V) {
        // SAFETY: eight elements are writable, by the caller's promise.
        unsafe { at.cast::<[f32; 8]>().write_unaligned(v) };
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Not mul_add: without the instruction it is a call to a slow library function.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn scale(a: Self::V, n: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * f32::from_bits(((n[i] as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn keep_above(a: Self::V, x: Self::V, limit: Self::V) -> Self::V {
        std::array::from_fn(|i| if x[i] >= limit[i] { a[i] } else { 0.0 })
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Brain, Half, Simd};

    /// 256-bit vectors.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2;

    /// 512-bit vectors.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512;

    /// One-line methods, each an intrinsic. The safety of every block is the trait's contract.
    macro_rules! methods {
        ($($name:ident($($arg:ident: $type:ty),*) -> $out:ty = $body:expr;)*) => {
            $(
                #[inline(always)]
                unsafe fn $name($($arg: $type),*) -> $out {
                    // SAFETY: features and addresses by the contract of `Simd`.
                    unsafe { $body }
                }
            )*
        };
    }

    impl Simd for Avx2 {
        type V = __m256;
        const LANES: usize = 8;
        methods! {
            zero() -> __m256 = _mm256_setzero_ps();
            splat(x: f32) -> __m256 = _mm256_set1_ps(x);
            load(at: *const f32) -> __m256 = _mm256_loadu_ps(at);
            load_half(at: *const Half) -> __m256 = _mm256_cvtph_ps(_mm_loadu_si128(at.cast()));
            load_brain(at: *const Brain) -> __m256 = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(
                _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()))
            ));
            store(at: *mut f32, v: __m256) -> () = _mm256_storeu_ps(at, v);
            fma(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
            add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
            sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
            mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
            max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
            round(a: __m256) -> __m256 =
                _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
            scale(a: __m256, n: __m256) -> __m256 = _mm256_mul_ps(
                a,
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(
                    _mm256_cvtps_epi32(n),
                    _mm256_set1_epi32(127)
                )))
            );
            keep_above(a: __m256, x: __m256, limit: __m256) -> __m256 =
                _mm256_and_ps(a, _mm256_cmp_ps::<_CMP_GE_OQ>(x, limit));
        }
    }

    impl Simd for Avx512 {
        type V = __m512;
        const LANES: usize = 16;
        methods! {
            zero() -> __m512 = _mm512_setzero_ps();
            splat(x: f32) -> __m512 = _mm512_set1_ps(x);
            load(at: *const f32) -> __m512 = _mm512_loadu_ps(at);
            load_half(at: *const Half) -> __m512 = _mm512_cvtph_ps(_mm256_loadu_si256(at.cast()));
            load_brain(at: *const Brain) -> __m512 = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(
                _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()))
            ));
            store(at: *mut f32, v: __m512) -> () = _mm512_storeu_ps(at, v);
            fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
            add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
            sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
            mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
            max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
            round(a: __m512) -> __m512 =
                _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
            scale(a: __m512, n: __m512) -> __m512 = _mm512_scalef_ps(a, n);
            keep_above(a: __m512, x: __m512, limit: __m512) -> __m512 =
                _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, limit), a);
        }
    }
}

/// Defines `fn name(isa, args)` that runs the generic `body::<S>` inside a function with the target features of `isa`.
macro_rules! dispatch {
    ($(#[$doc:meta])* $vis:vis unsafe fn $name:ident $(<$g:ident: $bound:path>)? ($($arg:ident: $type:ty),* $(,)?) = $body:ident) => {
        $(#[$doc])*
        #[inline]
        #[expect(clippy::allow_attributes, reason = "some instantiations have few arguments")]
        #[allow(clippy::too_many_arguments, reason = "kernels take raw parts")]
        $vis unsafe fn $name $(<$g: $bound>)? (isa: $crate::simd::Isa, $($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments, reason = "kernels take raw parts")]
            unsafe fn avx512 $(<$g: $bound>)? ($($arg: $type),*) {
                // SAFETY: by the caller's promise; this function has the features.
                unsafe { $body::<$crate::simd::Avx512 $(, $g)?>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments, reason = "kernels take raw parts")]
            unsafe fn avx2 $(<$g: $bound>)? ($($arg: $type),*) {
                // SAFETY: as above.
                unsafe { $body::<$crate::simd::Avx2 $(, $g)?>($($arg),*) }
            }
            // SAFETY: `isa` is one of those that were detected; pointers by the caller's promise.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    $crate::simd::Isa::Avx512 => avx512 $(::<$g>)? ($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::simd::Isa::Avx2 => avx2 $(::<$g>)? ($($arg),*),
                    _ => $body::<$crate::simd::Portable $(, $g)?>($($arg),*),
                }
            }
        }
    };
}
pub(crate) use dispatch;

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(always)]
    unsafe fn exp_body<S: Simd>(values: &[f32], out: &mut [f32]) {
        for i in (0..values.len()).step_by(S::LANES) {
            // SAFETY: the test's slices are multiples of 16.
            unsafe { S::store(out.as_mut_ptr().add(i), S::exp(S::load(values.as_ptr().add(i)))) };
        }
    }
    dispatch!(unsafe fn exp_all(values: &[f32], out: &mut [f32]) = exp_body);

    #[test]
    fn exp_is_exact_to_a_few_ulps_and_zero_when_masked() {
        let mut values: Vec<f32> = (0..4000).map(|i| -(i as f32) * 0.0217).collect();
        values.extend([f32::NEG_INFINITY, -200.0, -88.0, 0.0]);
        values.resize(4016, 1.5);
        for isa in Isa::available() {
            let mut out = vec![0.0; values.len()];
            // SAFETY: available, and multiples of 16.
            unsafe { exp_all(isa, &values, &mut out) };
            for (x, y) in values.iter().zip(&out) {
                if *x < -87.0 {
                    assert_eq!(*y, 0.0, "{isa}: {x}");
                } else {
                    let exact = f64::from(*x).exp();
                    assert!((f64::from(*y) / exact - 1.0).abs() < 3e-7, "{isa}: e^{x} = {y}");
                }
            }
        }
    }
}
