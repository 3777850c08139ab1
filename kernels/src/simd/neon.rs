//! NEON: four registers per vector.

use std::arch::aarch64::*;

use super::{Isa, Portable, Simd, Source};
use crate::tile::{Tile, body};

/// Every processor of this architecture has NEON, so there is nothing to prove. Half floats are converted by the portable
/// code, which the standard library has no stable vectors for.
#[derive(Clone, Copy)]
pub(crate) struct Neon;

type Four = [float32x4_t; 4];

macro_rules! lanewise {
    ($($name:ident($($arg:ident),+) = $value:expr;)+) => {
        $(
            #[inline(always)]
            fn $name(self, $($arg: Four),+) -> Four {
                // SAFETY: the architecture has the instructions.
                unsafe { [0, 1, 2, 3].map(|i| { $(let $arg = $arg[i];)+ $value }) }
            }
        )+
    };
}

impl Neon {
    /// Sixteen bytes as whole floats.
    #[inline(always)]
    fn widen(self, bytes: uint8x16_t) -> Four {
        // SAFETY: the architecture has the instructions.
        unsafe {
            let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
            [
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))),
                vcvtq_f32_u32(vmovl_high_u16(low)),
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))),
                vcvtq_f32_u32(vmovl_high_u16(high)),
            ]
        }
    }
}

impl Simd for Neon {
    type V = Four;
    const ISA: Isa = Isa::Neon;
    const ACCUMULATORS: usize = 6;
    const REGISTERS: usize = 8;
    const TILE_ROWS: usize = 6;

    lanewise! {
        add(a, b) = vaddq_f32(a, b);
        sub(a, b) = vsubq_f32(a, b);
        mul(a, b) = vmulq_f32(a, b);
        div(a, b) = vdivq_f32(a, b);
        sqrt(a) = vsqrtq_f32(a);
        // As elsewhere: the second where one is no number.
        max(a, b) = vbslq_f32(vcgtq_f32(a, b), a, b);
        min(a, b) = vbslq_f32(vcltq_f32(a, b), a, b);
        mul_add(a, b, c) = vfmaq_f32(c, a, b);
        select_lt(a, b, x, y) = vbslq_f32(vcltq_f32(a, b), x, y);
        pow2(n) = vreinterpretq_f32_s32(
            vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)))
        );
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Four {
        // SAFETY: the architecture has the instruction.
        unsafe { [vdupq_n_f32(x); 4] }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Four {
        // SAFETY: readable by the contract.
        unsafe { [0, 1, 2, 3].map(|i| vld1q_f32(p.add(i * 4))) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Four {
        // SAFETY: the same contract; the array has 16 elements.
        unsafe { self.load(Portable.load_f16(p).as_ptr()) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Four {
        // SAFETY: readable by the contract.
        unsafe {
            [0, 1, 2, 3].map(|i| vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.add(i * 4)))))
        }
    }

    #[inline(always)]
    unsafe fn load_fp8(self, p: *const u8) -> Four {
        // SAFETY: the same contract; the array has 16 elements.
        unsafe { self.load(Portable.load_fp8(p).as_ptr()) }
    }

    #[inline(always)]
    unsafe fn codes<const BITS: usize>(self, p: *const u8) -> Four {
        // SAFETY: readable by the contract.
        unsafe {
            if BITS == 8 {
                return self.widen(vld1q_u8(p));
            }
            let mut bytes = [0u8; 16];
            std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), 2 * BITS);
            // Each code's byte, shifted so that the code is lowest.
            let index: [u8; 16] = std::array::from_fn(|i| (i * BITS / 8) as u8);
            let shift: [i8; 16] = std::array::from_fn(|i| -((i * BITS % 8) as i8));
            let spread = vqtbl1q_u8(vld1q_u8(bytes.as_ptr()), vld1q_u8(index.as_ptr()));
            let shifted = vshlq_u8(spread, vld1q_s8(shift.as_ptr()));
            self.widen(vandq_u8(shifted, vdupq_n_u8(((1u16 << BITS) - 1) as u8)))
        }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Four) {
        for (i, v) in v.into_iter().enumerate() {
            // SAFETY: writable by the contract.
            unsafe { vst1q_f32(p.add(i * 4), v) };
        }
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, v: Four) {
        // SAFETY: the same contract.
        unsafe { Portable.store_f16(p, self.to_array(v)) };
    }

    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: Four) {
        // SAFETY: writable by the contract.
        unsafe {
            let whole = v.map(|v| vcvtnq_s32_f32(v));
            let low = vcombine_s16(vqmovn_s32(whole[0]), vqmovn_s32(whole[1]));
            let high = vcombine_s16(vqmovn_s32(whole[2]), vqmovn_s32(whole[3]));
            vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
        }
    }

    #[inline(always)]
    fn keep(self, v: Four, from: isize, to: isize, other: Four) -> Four {
        let (from, to) = (from.clamp(0, 16) as i32, to.clamp(0, 16) as i32);
        // SAFETY: the architecture has the instructions.
        unsafe {
            let first = vld1q_s32([0, 1, 2, 3].as_ptr());
            [0, 1, 2, 3].map(|i| {
                let lane = vaddq_s32(first, vdupq_n_s32(i as i32 * 4));
                let inside =
                    vandq_u32(vcgeq_s32(lane, vdupq_n_s32(from)), vcltq_s32(lane, vdupq_n_s32(to)));
                vbslq_f32(inside, v[i], other[i])
            })
        }
    }

    unsafe fn tile<B: Source>(self, tile: &Tile) {
        // SAFETY: the same contract.
        unsafe { body::<Neon, B>(self, tile) }
    }
}
