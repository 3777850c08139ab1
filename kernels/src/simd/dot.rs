//! Sums of products of unsigned codes and signed bytes in integers: exact, so that all instruction sets agree.

#[cfg(target_arch = "x86_64")]
use std::arch::{asm, x86_64::*};

use half::f16;

#[cfg(target_arch = "x86_64")]
use super::Avx2;
use super::Portable;

/// What a product of codes is made of. A group is four codes for each of a vector's columns; a block has eight groups.
pub(crate) trait Dot: Copy {
    /// Columns of a vector: 8 or 16.
    const LANES: usize;
    /// Rows of a register tile of 1, 2 and 4 vectors of wide and of narrow codes; 0 where there is none.
    const ROWS: [[usize; 3]; 2];
    /// Vectors of the tiles of many rows, of wide and of narrow codes.
    const MANY: [usize; 2];
    /// A group.
    type Group: Copy;
    /// The sums of a block so far.
    type Sums: Copy;
    /// Four signed bytes that meet the codes of every column.
    type Quad: Copy;
    /// A group of wide codes, made ready for many rows.
    type Wide: Copy;
    /// Four signed numbers that meet wide codes.
    type Four: Copy;
    /// Bytes of such a number: two where [`in_pairs`] puts them so.
    const FOUR: usize;
    /// A float for each column.
    type F: Copy;

    fn none(self) -> Self::Group;
    fn zero(self) -> Self::Sums;
    /// # Safety
    /// `4 * LANES` bytes are readable at `p`.
    unsafe fn load(self, p: *const u8) -> Self::Group;
    /// The lower four bits of each byte.
    fn low(self, group: Self::Group) -> Self::Group;
    /// The upper four bits of each byte.
    fn high(self, group: Self::Group) -> Self::Group;
    /// # Safety
    /// Four bytes are readable at `p`.
    unsafe fn quad(self, p: *const i8) -> Self::Quad;
    /// Adds the products of each column's four codes below 16 with `quad`: of all eight groups of a block at most.
    fn dot(self, sums: Self::Sums, codes: Self::Group, quad: Self::Quad) -> Self::Sums;
    fn wide(self, group: Self::Group) -> Self::Wide;
    /// # Safety
    /// `4 * FOUR` bytes are readable at `p`.
    unsafe fn four(self, p: *const i8) -> Self::Four;
    /// The same as `dot`, of whole bytes.
    fn dot_wide(self, sums: Self::Sums, codes: Self::Wide, four: Self::Four) -> Self::Sums;
    /// The sums of a block. `NARROW`: those of `dot`.
    fn finish<const NARROW: bool>(self, sums: Self::Sums) -> Self::F;

    fn splat(self, x: f32) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, fused where the hardware can.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// # Safety
    /// `LANES` half floats are readable at `p`.
    unsafe fn load_f16(self, p: *const u16) -> Self::F;
    /// # Safety
    /// `LANES` floats are readable at `p`.
    unsafe fn load_f32(self, p: *const f32) -> Self::F;
    /// # Safety
    /// `LANES` floats are writable at `p`.
    unsafe fn store(self, p: *mut f32, v: Self::F);
    /// Asks for the cache line at `p`.
    #[inline(always)]
    fn prefetch(self, _p: *const u8) {}
}

/// Puts bytes into 16 bits each, four by four, the even ones first: as [`Dot::four`] reads them where a number has two bytes.
/// `wide` has twice as many bytes as `bytes`, whose number is a multiple of four.
pub(crate) fn in_pairs(bytes: &[i8], wide: &mut [i8]) {
    for (four, out) in bytes.as_chunks::<4>().0.iter().zip(wide.as_chunks_mut::<8>().0) {
        for (x, out) in [four[0], four[2], four[1], four[3]].iter().zip(out.as_chunks_mut::<2>().0)
        {
            *out = i16::from(*x).to_ne_bytes().map(u8::cast_signed);
        }
    }
}

/// AVX-512 with VNNI: four products a lane in one instruction.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Vnni(());

#[cfg(target_arch = "x86_64")]
impl Vnni {
    /// Whether the processor has it beside the rest of AVX-512.
    pub(crate) fn is_available() -> bool {
        is_x86_feature_detected!("avx512vnni")
    }

    /// # Safety
    /// The processor has AVX-512 F, BW, VL and VNNI.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

#[cfg(target_arch = "x86_64")]
macro_rules! safe {
    ($($name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $value:expr;)+) => {
        $(
            #[inline(always)]
            fn $name(self, $($arg: $ty),*) -> $ret {
                // SAFETY: `self` proves the features.
                unsafe { $value }
            }
        )+
    };
}

#[cfg(target_arch = "x86_64")]
impl Dot for Vnni {
    const LANES: usize = 16;
    const ROWS: [[usize; 3]; 2] = [[12, 6, 3]; 2];
    const MANY: [usize; 2] = [2; 2];
    type Group = __m512i;
    type Sums = __m512i;
    type Quad = __m512i;
    type Wide = __m512i;
    type Four = __m512i;
    const FOUR: usize = 1;
    type F = __m512;

    safe! {
        none() -> __m512i = _mm512_setzero_si512();
        zero() -> __m512i = _mm512_setzero_si512();
        low(group: __m512i) -> __m512i = _mm512_and_si512(group, _mm512_set1_epi8(15));
        high(group: __m512i) -> __m512i =
            _mm512_and_si512(_mm512_srli_epi16::<4>(group), _mm512_set1_epi8(15));
        splat(x: f32) -> __m512 = _mm512_set1_ps(x);
        add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        mul_add(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
    }

    #[inline(always)]
    unsafe fn load(self, p: *const u8) -> __m512i {
        // SAFETY: readable by the contract; `self` proves the features.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn quad(self, p: *const i8) -> __m512i {
        // SAFETY: readable by the contract; `self` proves the features.
        unsafe { _mm512_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }

    #[inline(always)]
    fn dot(self, sums: __m512i, codes: __m512i, quad: __m512i) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_dpbusd_epi32(sums, codes, quad) }
    }

    #[inline(always)]
    fn wide(self, group: __m512i) -> __m512i {
        group
    }

    #[inline(always)]
    unsafe fn four(self, p: *const i8) -> __m512i {
        // SAFETY: the same contract.
        unsafe { self.quad(p) }
    }

    #[inline(always)]
    fn dot_wide(self, sums: __m512i, codes: __m512i, four: __m512i) -> __m512i {
        self.dot(sums, codes, four)
    }

    #[inline(always)]
    fn finish<const NARROW: bool>(self, sums: __m512i) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_cvtepi32_ps(sums) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m512 {
        // SAFETY: readable by the contract; `self` proves the features.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_f32(self, p: *const f32) -> __m512 {
        // SAFETY: readable by the contract; `self` proves the features.
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m512) {
        // SAFETY: writable by the contract; `self` proves the features.
        unsafe { _mm512_storeu_ps(p, v) }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch has no effect but on time, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}

/// The sum as it stands. The compiler may not add in another order: it would make trees of a block's sums, which need more
/// registers than there are.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
fn in_order(mut sum: __m256i) -> __m256i {
    // SAFETY: there are no instructions.
    unsafe {
        asm!("/* {0} */", inout(ymm_reg) sum, options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// Codes below 16 are summed in 16 bits: eight groups of two products of at most 15 x 127 fit. Of wide codes already two products
/// don't: the even and the odd ones become 16 bits wide, once for many rows, and meet pairs of numbers in 32 bits.
#[cfg(target_arch = "x86_64")]
impl Dot for Avx2 {
    const LANES: usize = 8;
    const ROWS: [[usize; 3]; 2] = [[4, 4, 1], [4, 4, 1]];
    const MANY: [usize; 2] = [2, 2];
    type Group = __m256i;
    type Sums = __m256i;
    type Quad = __m256i;
    type Wide = (__m256i, __m256i);
    type Four = (__m256i, __m256i);
    const FOUR: usize = 2;
    type F = __m256;

    safe! {
        none() -> __m256i = _mm256_setzero_si256();
        zero() -> __m256i = _mm256_setzero_si256();
        low(group: __m256i) -> __m256i = _mm256_and_si256(group, _mm256_set1_epi8(15));
        high(group: __m256i) -> __m256i =
            _mm256_and_si256(_mm256_srli_epi16::<4>(group), _mm256_set1_epi8(15));
        splat(x: f32) -> __m256 = _mm256_set1_ps(x);
        add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        mul_add(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
    }

    #[inline(always)]
    unsafe fn load(self, p: *const u8) -> __m256i {
        // SAFETY: readable by the contract; `self` proves the feature.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }

    #[inline(always)]
    unsafe fn quad(self, p: *const i8) -> __m256i {
        // SAFETY: readable by the contract; `self` proves the feature.
        unsafe { _mm256_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }

    #[inline(always)]
    fn dot(self, sums: __m256i, codes: __m256i, quad: __m256i) -> __m256i {
        // SAFETY: `self` proves the feature.
        unsafe { in_order(_mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, quad))) }
    }

    #[inline(always)]
    fn wide(self, group: __m256i) -> (__m256i, __m256i) {
        // SAFETY: `self` proves the feature.
        unsafe { (_mm256_and_si256(group, _mm256_set1_epi16(255)), _mm256_srli_epi16::<8>(group)) }
    }

    #[inline(always)]
    unsafe fn four(self, p: *const i8) -> (__m256i, __m256i) {
        let p = p.cast::<i32>();
        // SAFETY: readable by the contract; `self` proves the feature.
        unsafe {
            (_mm256_set1_epi32(p.read_unaligned()), _mm256_set1_epi32(p.add(1).read_unaligned()))
        }
    }

    #[inline(always)]
    fn dot_wide(
        self,
        sums: __m256i,
        codes: (__m256i, __m256i),
        four: (__m256i, __m256i),
    ) -> __m256i {
        // SAFETY: `self` proves the feature.
        unsafe {
            let even = in_order(_mm256_add_epi32(sums, _mm256_madd_epi16(codes.0, four.0)));
            in_order(_mm256_add_epi32(even, _mm256_madd_epi16(codes.1, four.1)))
        }
    }

    #[inline(always)]
    fn finish<const NARROW: bool>(self, sums: __m256i) -> __m256 {
        // SAFETY: `self` proves the feature.
        unsafe {
            let whole = if NARROW { _mm256_madd_epi16(sums, _mm256_set1_epi16(1)) } else { sums };
            _mm256_cvtepi32_ps(whole)
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m256 {
        // SAFETY: readable by the contract; `self` proves the features.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_f32(self, p: *const f32) -> __m256 {
        // SAFETY: readable by the contract; `self` proves the feature.
        unsafe { _mm256_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m256) {
        // SAFETY: writable by the contract; `self` proves the feature.
        unsafe { _mm256_storeu_ps(p, v) }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch has no effect but on time, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}

type Eight = [f32; 8];

impl Dot for Portable {
    const LANES: usize = 8;
    const ROWS: [[usize; 3]; 2] = [[4, 0, 0]; 2];
    const MANY: [usize; 2] = [1; 2];
    type Group = [u8; 32];
    type Sums = [i32; 8];
    type Quad = [i8; 4];
    type Wide = [u8; 32];
    type Four = [i8; 4];
    const FOUR: usize = 1;
    type F = Eight;

    #[inline(always)]
    fn none(self) -> [u8; 32] {
        [0; 32]
    }

    #[inline(always)]
    fn zero(self) -> [i32; 8] {
        [0; 8]
    }

    #[inline(always)]
    unsafe fn load(self, p: *const u8) -> [u8; 32] {
        // SAFETY: readable by the contract.
        unsafe { p.cast::<[u8; 32]>().read_unaligned() }
    }

    #[inline(always)]
    fn low(self, group: [u8; 32]) -> [u8; 32] {
        group.map(|b| b & 15)
    }

    #[inline(always)]
    fn high(self, group: [u8; 32]) -> [u8; 32] {
        group.map(|b| b >> 4)
    }

    #[inline(always)]
    unsafe fn quad(self, p: *const i8) -> [i8; 4] {
        // SAFETY: readable by the contract.
        unsafe { p.cast::<[i8; 4]>().read_unaligned() }
    }

    #[inline(always)]
    fn dot(self, mut sums: [i32; 8], codes: [u8; 32], quad: [i8; 4]) -> [i32; 8] {
        for (sum, codes) in sums.iter_mut().zip(codes.as_chunks::<4>().0) {
            for (code, x) in codes.iter().zip(quad) {
                *sum += i32::from(*code) * i32::from(x);
            }
        }
        sums
    }

    #[inline(always)]
    fn wide(self, group: [u8; 32]) -> [u8; 32] {
        group
    }

    #[inline(always)]
    unsafe fn four(self, p: *const i8) -> [i8; 4] {
        // SAFETY: the same contract.
        unsafe { self.quad(p) }
    }

    #[inline(always)]
    fn dot_wide(self, sums: [i32; 8], codes: [u8; 32], four: [i8; 4]) -> [i32; 8] {
        self.dot(sums, codes, four)
    }

    #[inline(always)]
    fn finish<const NARROW: bool>(self, sums: [i32; 8]) -> Eight {
        sums.map(|x| x as f32)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Eight {
        [x; 8]
    }

    #[inline(always)]
    fn add(self, a: Eight, b: Eight) -> Eight {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn mul(self, a: Eight, b: Eight) -> Eight {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn mul_add(self, a: Eight, b: Eight, c: Eight) -> Eight {
        std::array::from_fn(|i| super::portable::mul_add(a[i], b[i], c[i]))
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Eight {
        // SAFETY: readable by the contract.
        unsafe { p.cast::<[u16; 8]>().read_unaligned() }.map(|b| f16::from_bits(b).to_f32())
    }

    #[inline(always)]
    unsafe fn load_f32(self, p: *const f32) -> Eight {
        // SAFETY: readable by the contract.
        unsafe { p.cast::<Eight>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Eight) {
        // SAFETY: writable by the contract.
        unsafe { p.cast::<Eight>().write_unaligned(v) }
    }
}
