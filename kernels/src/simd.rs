//! Vectors of 16 floats for four instruction sets behind one trait, so that each kernel is written once.
//!
//! A value of a type that implements [`Simd`] is the proof that the processor has the instructions, and makes the
//! arithmetic safe to call. Kernels are `#[inline(always)]` generic bodies; [`multiversion`] wraps each into one function
//! per instruction set that the body is inlined into, and picks between them at run time.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod dot;
mod fp8;
pub(crate) mod math;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use std::fmt;
use std::sync::OnceLock;

use crate::tile::Tile;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use fp8::{fp8_bits, fp8_value};
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use portable::Portable;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// The instruction sets that kernels exist for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// 512-bit vectors.
    Avx512,
    /// 256-bit vectors with fused multiply-add.
    Avx2,
    /// 128-bit vectors of ARM.
    Neon,
    /// Plain Rust.
    Portable,
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Avx512 => "AVX-512",
            Isa::Avx2 => "AVX2",
            Isa::Neon => "NEON",
            Isa::Portable => "portable",
        })
    }
}

impl Isa {
    /// Those that this processor has, best first.
    #[must_use]
    pub fn available() -> Vec<Isa> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                found.push(Isa::Avx512);
            }
            if avx2 {
                found.push(Isa::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        found.push(Isa::Neon);
        found.push(Isa::Portable);
        found
    }
}

/// The best instruction set of this processor.
#[must_use]
pub fn isa() -> Isa {
    static BEST: OnceLock<Isa> = OnceLock::new();
    *BEST.get_or_init(|| Isa::available()[0])
}

/// Sixteen floats at a time. All operations work lane by lane and reductions have one fixed order, so instruction sets
/// differ only where one lacks fused multiply-add.
pub(crate) trait Simd: Copy {
    /// A vector.
    type V: Copy;
    /// The instruction set.
    const ISA: Isa;
    /// Vectors that a register tile may keep as accumulators.
    const ACCUMULATORS: usize;
    /// Vectors that the registers hold.
    const REGISTERS: usize;
    /// Rows of a register tile.
    const TILE_ROWS: usize;

    fn splat(self, x: f32) -> Self::V;
    /// # Safety
    /// 16 floats are readable at `p`.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// # Safety
    /// 16 half floats are readable at `p`.
    unsafe fn load_f16(self, p: *const u16) -> Self::V;
    /// # Safety
    /// 16 brain floats are readable at `p`.
    unsafe fn load_bf16(self, p: *const u16) -> Self::V;
    /// # Safety
    /// 16 e4m3 numbers are readable at `p`.
    unsafe fn load_fp8(self, p: *const u8) -> Self::V;
    /// 16 codes of `BITS` bits (1, 2, 4 or 8) as floats, the first one in the lowest bits of the first byte.
    ///
    /// # Safety
    /// `2 * BITS` bytes are readable at `p`.
    unsafe fn codes<const BITS: usize>(self, p: *const u8) -> Self::V;
    /// # Safety
    /// 16 floats are writable at `p`.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// # Safety
    /// 16 half floats are writable at `p`.
    unsafe fn store_f16(self, p: *mut u16, v: Self::V);
    /// Whole numbers in -128..=127 as signed bytes.
    ///
    /// # Safety
    /// 16 bytes are writable at `p`.
    unsafe fn store_i8(self, p: *mut i8, v: Self::V);

    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    fn sqrt(self, a: Self::V) -> Self::V;
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, fused where the hardware can.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `x` where `a < b`, else `y`.
    fn select_lt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// Lanes `from..to` of `v`, the others of `other`. Both ends may lie outside the vector.
    fn keep(self, v: Self::V, from: isize, to: isize, other: Self::V) -> Self::V;
    /// 2 to the power of whole-numbered lanes in -126..=127.
    fn pow2(self, n: Self::V) -> Self::V;
    /// Runs a register tile; see [`Tile`].
    ///
    /// # Safety
    /// As [`crate::tile::body`].
    unsafe fn tile<B: Source>(self, tile: &Tile);

    /// What the codes of a group stand for, for [`Self::look_up`].
    #[inline(always)]
    fn table<const BITS: usize>(self, scale: Self::V, zero: Self::V) -> (Self::V, Self::V) {
        (scale, zero)
    }

    /// 16 codes as the numbers that they stand for: `code * scale + zero`.
    ///
    /// # Safety
    /// As [`Self::codes`].
    #[inline(always)]
    unsafe fn look_up<const BITS: usize>(self, p: *const u8, table: (Self::V, Self::V)) -> Self::V {
        // SAFETY: the same contract.
        self.mul_add(unsafe { self.codes::<BITS>(p) }, table.0, table.1)
    }

    /// Asks for the cache line at `p`.
    #[inline(always)]
    fn prefetch(self, _p: *const u8) {}

    /// # Safety
    /// 16 brain floats are writable at `p`.
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, v: Self::V) {
        let lanes = self.to_array(v);
        for (i, x) in lanes.iter().enumerate() {
            // SAFETY: 16 elements are writable, by this function's contract.
            unsafe { p.add(i).write(bf16_bits(*x)) };
        }
    }

    /// # Safety
    /// 16 bytes are writable at `p`.
    #[inline(always)]
    unsafe fn store_fp8(self, p: *mut u8, v: Self::V) {
        let bits = self.to_array(v).map(fp8_bits);
        // SAFETY: 16 bytes are writable, by this function's contract.
        unsafe { p.cast::<[u8; LANES]>().write_unaligned(bits) };
    }

    #[inline(always)]
    fn to_array(self, v: Self::V) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        // SAFETY: the array has 16 elements.
        unsafe { self.store(lanes.as_mut_ptr(), v) };
        lanes
    }

    /// The first `n` floats at `p`, then `fill`.
    ///
    /// # Safety
    /// `n` floats, at most 16, are readable at `p`.
    #[inline(always)]
    unsafe fn load_part(self, p: *const f32, n: usize, fill: f32) -> Self::V {
        let mut lanes = [fill; LANES];
        // SAFETY: at most 16 elements by the contract; the array is a fresh one.
        unsafe {
            std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n.min(LANES));
            self.load(lanes.as_ptr())
        }
    }

    /// Writes the first `n` lanes.
    ///
    /// # Safety
    /// `n` floats, at most 16, are writable at `p`.
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, v: Self::V, n: usize) {
        let lanes = self.to_array(v);
        // SAFETY: at most 16 elements by the contract; the array is a fresh one.
        unsafe { std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n.min(LANES)) };
    }

    /// Sum of the lanes: halves added together until one is left.
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        let mut lanes = self.to_array(v);
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        lanes[0]
    }

    /// Largest lane.
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        let mut lanes = self.to_array(v);
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                if lanes[i + half] > lanes[i] {
                    lanes[i] = lanes[i + half];
                }
            }
            half /= 2;
        }
        lanes[0]
    }
}

/// Nearest brain float, ties to even.
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    // A NaN must stay one: rounding could carry its payload away.
    let quiet = (bits >> 16) | 0x40;
    (if x.is_nan() { quiet } else { rounded }) as u16
}

/// How numbers lie in memory that vectors are loaded from.
pub(crate) trait Source: Copy + Send + Sync + 'static {
    /// Bytes of a number.
    const BYTES: usize;

    /// # Safety
    /// 16 numbers are readable at `p`, which is aligned to one.
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V;
    /// # Safety
    /// 16 numbers are writable at `p`, which is aligned to one.
    unsafe fn store<S: Simd>(s: S, p: *mut u8, v: S::V);
}

macro_rules! source {
    ($name:ident, $element:ty, $load:ident, $store:ident, $doc:literal) => {
        #[doc = $doc]
        #[derive(Clone, Copy)]
        pub(crate) struct $name;

        impl Source for $name {
            const BYTES: usize = size_of::<$element>();

            #[inline(always)]
            unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V {
                // SAFETY: the same contract.
                unsafe { s.$load(p.cast::<$element>()) }
            }

            #[inline(always)]
            unsafe fn store<S: Simd>(s: S, p: *mut u8, v: S::V) {
                // SAFETY: the same contract.
                unsafe { s.$store(p.cast::<$element>(), v) };
            }
        }
    };
}

source!(F32, f32, load, store, "Single precision.");
source!(F16, u16, load_f16, store_f16, "Half precision.");
source!(Bf16, u16, load_bf16, store_bf16, "Brain floats.");
source!(Fp8, u8, load_fp8, store_fp8, "Bytes with four bits of exponent.");

/// Makes `name(isa, args)` out of a body generic over [`Simd`]: one copy per instruction set.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis unsafe fn $name:ident $(<$($g:ident: $bound:path),+>)? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$meta])*
        $vis unsafe fn $name $(<$($g: $bound),+>)? (isa: $crate::simd::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            unsafe fn avx512 $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: the features are enabled here; the rest is the caller's contract.
                unsafe { $body $(::<_, $($g),+>)? ($crate::simd::Avx512::new(), $($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2 $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: the features are enabled here; the rest is the caller's contract.
                unsafe { $body $(::<_, $($g),+>)? ($crate::simd::Avx2::new(), $($arg),*) }
            }
            // SAFETY: an `Isa` comes from run-time detection; the rest is the caller's contract.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    $crate::simd::Isa::Avx512 => avx512 $(::<$($g),+>)? ($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::simd::Isa::Avx2 => avx2 $(::<$($g),+>)? ($($arg),*),
                    #[cfg(target_arch = "aarch64")]
                    $crate::simd::Isa::Neon => $body $(::<_, $($g),+>)? ($crate::simd::Neon, $($arg),*),
                    _ => $body $(::<_, $($g),+>)? ($crate::simd::Portable, $($arg),*),
                }
            }
        }
    };
}
pub(crate) use multiversion;

#[cfg(test)]
mod tests;
