//! Exponential and hyperbolic tangent of 16 lanes.

use super::Simd;

/// Below this the result is zero: the smallest normal number is e^-87.3.
const EXP_MIN: f32 = -87.3;
/// Above this the argument is clamped, so that the result stays finite.
const EXP_MAX: f32 = 88.0;

/// e^x with a relative error below 2e-7 for x in -87.3..=88; exactly 0 below (so for -infinity), e^88 above, exactly 1 at
/// 0. Results that would be subnormal are zero.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    // x = n ln 2 + r with |r| <= ln 2 / 2; adding 1.5 * 2^23 rounds to a whole number.
    let magic = s.splat(12_582_912.0);
    let low = s.splat(EXP_MIN);
    let clamped = s.max(s.min(x, s.splat(EXP_MAX)), low);
    let n = s.sub(s.mul_add(clamped, s.splat(std::f32::consts::LOG2_E), magic), magic);
    // ln 2 in two parts, the first short enough that its product with n is exact.
    let r = s.mul_add(n, s.splat(-0.693_359_4), clamped);
    let r = s.mul_add(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_2e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5] {
        p = s.mul_add(p, r, s.splat(c));
    }
    let p = s.add(s.mul_add(p, s.mul(r, r), r), s.splat(1.0));
    let y = s.mul(p, s.pow2(n));
    s.select_lt(x, low, s.splat(0.0), y)
}

/// tanh x with a relative error below 1e-6, as an odd rational function on -9..=9; +-1 beyond.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let limit = 7.905_311;
    let x = s.max(s.min(x, s.splat(limit)), s.splat(-limit));
    let x2 = s.mul(x, x);
    let mut p = s.splat(-2.760_768_5e-16);
    for c in
        [2.000_188e-13, -8.604_672e-11, 5.122_297e-8, 1.485_722_4e-5, 6.372_619e-4, 4.893_524_6e-3]
    {
        p = s.mul_add(p, x2, s.splat(c));
    }
    let mut q = s.splat(1.198_258_4e-6);
    for c in [1.185_347_1e-4, 2.268_434_6e-3, 4.893_525e-3] {
        q = s.mul_add(q, x2, s.splat(c));
    }
    s.div(s.mul(x, p), q)
}
